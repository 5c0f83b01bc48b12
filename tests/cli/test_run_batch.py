"""`flexpert run-batch`: one answer for each request, through changes, kills and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.served import SOURCES, Served, served
from support.waiting import wait_until

from flexpert.cli.batch_file import answered, parse_request, requests_of
from flexpert.cli.batch_run import open_output
from flexpert.errors import ConfigError

COUNT = int(os.environ.get("FLEXPERT_TEST_BATCH", "40"))


def line(name: str, **changed: object) -> bytes:
    body = {"prompt": "In the beginning", "max_tokens": 4}
    told = {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps({**told, **changed}).encode() + b"\n"


def done(name: str) -> bytes:
    told = {"id": "x", "custom_id": name, "response": None, "error": {"code": "c", "message": "m"}}
    return json.dumps(told).encode() + b"\n"


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"method": "GET"}, "method"),
        ({"url": "/v1/files"}, "url"),
        ({"body": 3}, "body"),
        ({"body": {"stream": True}}, "stream"),
    ],
)
def test_what_is_wrong_with_a_line_is_its_answer(changed: dict[str, object], wrong: str) -> None:
    assert wrong in parse_request(line("a", **changed), 1).wrong


@pytest.mark.parametrize("lines", [[b"{\n"], [b"[]\n"], [line("")], [line("a"), line("a")]])
def test_a_batch_whose_answers_could_not_be_told_apart_is_refused(lines: list[bytes]) -> None:
    with pytest.raises(ConfigError, match=f"line {len(lines)} of the batch"):
        list(requests_of(lines))


def test_a_torn_last_line_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(done("a") + done("b") + done("c")[:20])
    assert answered(path.read_bytes())[0] == {"a", "b"}
    with open_output(path, resume=True) as (_, names):
        assert names == {"a", "b"}
    assert path.read_bytes() == done("a") + done("b")


def test_an_output_is_not_begun_twice(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(done("a"))
    with pytest.raises(ConfigError, match="--resume"), open_output(path, resume=False):
        pass
    with (
        open_output(path, resume=True),
        pytest.raises(ConfigError, match="another process"),
        open_output(path, resume=True),
    ):
        pass


# ---- a service ------------------------------------------------------------------------------


def batch(service: Served, source: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    command = (sys.executable, "-m", "flexpert", "run-batch", "--url", service.url)
    files = ("-i", str(source), "-o", str(output), "--concurrency", "8")
    return subprocess.Popen(
        [*command, *files, *flags],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(one) for one in path.read_bytes().splitlines()] if path.exists() else []


def disturb(service: Served, stop: threading.Event) -> tuple[int, int]:
    """Five changes and three kills, one after the other; how many there were."""
    changes = kills = 0
    for ranks in (3, 2, 4, 1, 3):
        if stop.is_set():
            break
        changes += service.scale(ranks)["state"] == "done"
        if kills < 3 and len(service.ranks()) > 1:
            os.kill(max(service.ranks().values()), signal.SIGKILL)
            kills += 1
            wait_until(lambda: service.http("GET", "/cluster").json()["operation"] is None, 120)
    return changes, kills


@pytest.mark.slow
def test_a_batch_is_answered_once_through_changes_kills_and_ctrl_c(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"prompt": [20, 30, 40], "max_tokens": 64, "temperature": 0, "ignore_eos": True}
    wrong = {"prompt": [20], "max_tokens": 10**6}
    bodies = [{**body, "prompt": [20 + number, 30]} for number in range(COUNT - 1)]
    source.write_bytes(
        b"".join(line(f"r{number}", body=one) for number, one in enumerate([*bodies, wrong]))
    )
    with served() as service:
        stop = threading.Event()
        happened: list[tuple[int, int]] = []
        trouble = threading.Thread(target=lambda: happened.append(disturb(service, stop)))
        first = batch(service, source, output)
        wait_until(lambda: len(lines_of_so_far(output)) > COUNT // 10, 200)
        trouble.start()
        wait_until(lambda: len(lines_of_so_far(output)) > COUNT // 5, 200)
        first.send_signal(signal.SIGINT)
        _, said = first.communicate(timeout=100)
        assert first.returncode == 130, said
        assert "--resume" in said
        with output.open("ab") as torn:  # as a kill in the middle of a line leaves it
            torn.write(done("torn")[:30])
        before = len(lines_of_so_far(output))
        assert before < COUNT
        again = batch(service, source, output, "--resume")
        _, said = again.communicate(timeout=400)
        stop.set()
        trouble.join(400)
        assert again.returncode == 0, said
        print(f"changes and kills: {happened}, {before} answers before Ctrl-C; {said}")
    told = lines_of(output)
    assert sorted(str(one["custom_id"]) for one in told) == sorted(f"r{n}" for n in range(COUNT))
    statuses = [one["response"]["status_code"] for one in told]  # type: ignore[index]
    assert statuses.count(200) == COUNT - 1
    assert statuses.count(400) == 1  # its error is an answer, as OpenAI tells it
    assert happened[0][0] >= 1


def lines_of_so_far(path: Path) -> list[bytes]:
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1].splitlines()
