"""Every setting in one validated tree: defaults < file < environment < command line.

A file is YAML or JSON with the tree's own nesting. An environment variable is `FLEXPERT_` plus the
path joined by two underscores: `FLEXPERT_ENGINE__MAX_RUNNING=32`. Unknown names are errors.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from flexpert.device_settings import DEVICE_SETTINGS, Quantization, SettingCombination
from flexpert.errors import ConfigError
from flexpert.reading import read_text, shown
from flexpert.speculative_settings import Speculate

ENVIRONMENT_PREFIX = "FLEXPERT_"

_MOST_FILE_BYTES = 1 << 16  # the tree with all its settings has some 3 KiB
_MOST_DEPTH = 8  # the tree has 2
_MOST_COUNT = 2**50  # bytes or whatever is counted
_MOST_SECONDS = 366 * 86400.0  # what is handed to the system's clocks must not overflow there

_SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(text: object) -> object:
    """A size in bytes from 268435456, "256MiB", "0.5g", "2 GB" (powers of two throughout)."""
    if not isinstance(text, str):
        return text
    number = text.strip().lower().removesuffix("ib").removesuffix("b").strip()
    unit = number[-1:] if number[-1:].isalpha() else ""
    try:
        size = float(number.removesuffix(unit)) * _UNITS[unit]
        return int(size) if size >= 0 else -1  # which no size may be; -0.5 is not 0
    except (ValueError, KeyError, OverflowError):  # the last: it is infinite
        raise ValueError(f"{shown(text)!r} is no size; write for example 256MiB or 2GiB") from None


def parse_duration(text: object) -> object:
    """Seconds from 2, "2", "2s", "500ms", "1.5m" or "1h"."""
    if not isinstance(text, str):
        return text
    number = text.strip().lower()
    unit = number.lstrip("+-.0123456789")  # "nan" and "inf" have none, and are refused as numbers
    try:
        return float(number.removesuffix(unit)) * _SECONDS[unit.strip()]
    except (ValueError, KeyError):
        raise ValueError(
            f"{shown(text)!r} is no duration; write for example 2s, 500ms or 5m"
        ) from None


def parse_amounts(text: object) -> object:
    """Amounts by name from JSON."""
    if not isinstance(text, str):
        return text
    try:
        amounts = json.loads(text)
    except (ValueError, RecursionError):
        amounts = None
    if not isinstance(amounts, dict):
        raise ValueError(f'{shown(text)!r} is no JSON object; write for example {{"rack1": 0.1}}')
    return amounts


Seconds = Annotated[float, BeforeValidator(parse_duration)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]


def _is_text(value: str) -> bool:
    """Whether it can be written down; half of a surrogate pair cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _check_key(key: SecretStr) -> SecretStr:
    text = key.get_secret_value()
    if not text.strip():
        raise ValueError("is empty; leave it out, or give a key")
    if text != text.strip() or not text.isprintable():
        raise ValueError("must be printable text without spaces at its ends")
    return key


Key = Annotated[SecretStr, AfterValidator(_check_key)]


def balance_every_s(balance: str) -> float | None:
    """Seconds between two rebalances; None: they are not at fixed times. Raises: ValueError"""
    if not balance.startswith("every="):
        return None
    seconds = parse_duration(balance.removeprefix("every="))
    assert isinstance(seconds, float)
    return seconds


def _check_balance(value: str) -> str:
    if value in ("off", "auto"):
        return value
    every_s = balance_every_s(value)
    if every_s is None or not 1.0 <= every_s <= _MOST_SECONDS:
        raise ValueError(f"{shown(value)!r} is none of off, auto, every=60s (of at least 1s)")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*")
    @classmethod
    def _within_reason(cls, value: Any) -> Any:
        """Bounds of every setting, in addition to its own range."""
        if isinstance(value, float) and not abs(value) <= _MOST_SECONDS:  # nan is not, either
            wrong = "more than a year" if math.isfinite(value) else "not a finite number"
            raise ValueError(f"{value:g} is {wrong}")
        if isinstance(value, int) and abs(value) > _MOST_COUNT:
            raise ValueError("larger than anything that is counted here (2**50)")
        if isinstance(value, str) and ("\0" in value or not _is_text(value)):
            raise ValueError(f"{value!a} is not valid text")
        return value


class ModelConfig(_Section):
    """What is served."""

    model: str = Field("tiny", description="'tiny' (embedded), a directory, or a hub id")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    served_name: str | None = Field(None, description="name in the API; default: the model's")
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    quantization: Quantization = Field(
        "auto",
        description="of the experts in memory: int4, int8 or mxfp4 on a CPU, fp8 or mxfp4 on a "
        "GPU; auto: the checkpoint's, none: unquantized",
    )
    max_model_len: int | None = Field(
        None, ge=8, le=2**31 - 1, description="tokens of prompt and answer"
    )
    skip_tokenizer_init: bool = Field(
        False, description="token ids in and out, without a tokenizer; texts are refused"
    )
    trust_remote_code: bool = Field(
        False, description="run the Python code that the checkpoint brings along; read it first"
    )
    generation_config: str = Field(
        "auto",
        description="where sampling settings come from that a request leaves out: auto: the "
        "model's generation_config.json; vllm or none: nowhere; a folder that has one",
    )


class EngineConfig(_Section):
    """One rank."""

    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="what a rank computes on; cuda: the NVIDIA GPUs of this machine"
    )
    all2all: Literal["auto", "nixl_ep"] = Field(
        "auto", description="between GPUs; auto: flexpert's own kernels, nixl_ep: NVIDIA's"
    )
    max_tokens_per_step: int = Field(
        256, ge=16, le=65536, description="token budget of a step; on a GPU 2048"
    )
    max_running: int = Field(
        64, ge=1, le=4096, description="sequences decoded at once per rank; on a GPU 256"
    )
    kv_memory: Bytes = Field(
        256 * 2**20, description="bytes of KV cache per rank, beside states; on a GPU 4GiB"
    )
    kv_block_size: int = Field(16, ge=1, le=256, description="tokens of a KV block")
    map_experts: Literal["auto", "on", "off"] = Field(
        "auto",
        description="use experts where the checkpoint's files are mapped, shared by all ranks of a "
        "machine, instead of copying them (CPUs); auto: those of 1 GiB and more",
    )
    prefix_cache: bool = Field(True, description="reuse KV blocks of equal prompt prefixes")
    speculate: Speculate = Field(
        None,
        description="propose tokens and check several in one step: off, ngram (by lookup in the "
        "text), mtp (by the model's own layer), or vLLM's JSON (docs/speculation.md)",
    )
    deterministic: bool = Field(
        False, description="bit-identical answers on any ranks; without it rounding may change them"
    )
    machine: str = Field(
        "",
        max_length=200,
        description="name of this machine: ranks with equal names share memory; default: found out",
    )
    transport: Literal["auto", "nixl"] = Field(
        "auto",
        description="between ranks; auto: memory on one machine, NIXL between them; nixl: always",
    )
    interface: str = Field(
        "",
        max_length=200,
        description="network interfaces of this host to others, as eth1 or mlx5_0:1,eth1; "
        "default: UCX chooses",
    )
    port_range: str | None = Field(
        None, description="TCP ports between hosts, as 20000-20100; default: any"
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="per rank; default: 1, or its share of the cores for wide models",
    )

    @field_validator("port_range")
    @classmethod
    def _is_range(cls, value: str | None) -> str | None:
        if value is None:
            return None
        found = re.fullmatch(r"(\d{1,5})-(\d{1,5})", value)
        if not found or not 1 <= int(found[1]) <= int(found[2]) <= 65535:
            raise ValueError(f"{shown(value)!r} is no range of ports; write 20000-20100")
        return value


class ClusterConfig(_Section):
    """Membership and its limits in time."""

    ranks: int = Field(
        1, ge=0, le=256, description="ranks at start; 0: none of its own, with --join-listen"
    )
    max_ranks: int = Field(8, ge=1, le=256, description="capacity: number of rank ids")
    spare_ranks: int = Field(
        0, ge=0, le=256, description="processes kept ready for the ids that join next"
    )
    redundant_experts: int = Field(
        0, ge=0, le=2**20, description="replicas in each layer beyond one of each expert"
    )
    scale_policy: Literal["thin", "replicate"] = Field(
        "thin",
        description="more ranks than at start: each holds fewer experts, or as many, as replicas",
    )
    balance: Annotated[str, AfterValidator(_check_balance)] = Field(
        "off",
        max_length=40,
        description="move experts between ranks by their load: off, auto (when it gains more than "
        "it costs), or every=60s",
    )
    balance_bandwidth: Bytes = Field(
        256 * 2**20, ge=2**16, description="bytes of experts a rank loads a second for that"
    )
    record_routing: Path | None = Field(
        None, description="a file that gets the load of every expert, a JSON line every 5 s"
    )
    start_timeout: Seconds = Field(
        120.0, gt=0, description="from a rank's spawn to its first report"
    )
    load_timeout: Seconds = Field(600.0, gt=0, description="loading and warm-up of a change")
    migration_timeout: Seconds = Field(
        30.0,
        gt=0,
        description="KV migration while serving; what is late is copied at the switch",
    )
    commit_timeout: Seconds = Field(30.0, gt=0, description="arming until all ranks switched")
    exchange_timeout: Seconds = Field(60.0, gt=0, description="waiting for a peer within a step")
    stall_timeout: Seconds = Field(2.0, gt=0, description="silence until a rank is terminated")
    wedged_timeout: Seconds = Field(
        30.0, gt=0, description="work without a step until the service says that it is wedged"
    )
    restart_policy: Literal["always", "on-failure", "never"] = Field(
        "on-failure", description="start a new rank for a lost one"
    )
    restart_limit: int = Field(
        5, ge=1, description="short lives in a row after which a rank is left out"
    )
    restart_backoff: Seconds = Field(
        1.0, ge=0, description="before the second restart, then doubled"
    )
    restart_backoff_max: Seconds = Field(30.0, ge=0, description="longest wait before a restart")
    shutdown_timeout: Seconds = Field(
        10.0, ge=0, description="for running requests to finish at the end"
    )
    state_dir: Path | None = Field(
        None,
        description="directory where the head writes down what another needs to go on with its "
        "ranks and requests; default: all end with it",
    )
    resume: bool = Field(
        False, description="go on with the ranks and requests of the service in --state-dir, if any"
    )
    takeover: bool = Field(
        False,
        description="take ranks, requests and port over from the head that runs with --state-dir, "
        "and let it go: an upgrade without an outage",
    )
    orphan_timeout: Seconds = Field(
        60.0, gt=0, description="with --state-dir: how long ranks without a head wait for one"
    )
    max_sequences: int = Field(
        16384, ge=1, description="unfinished requests that the head keeps; more are refused (429)"
    )
    routing: Literal["prefix", "fewest"] = Field(
        "prefix",
        description="which rank a request goes to; prefix: one that has its prefix cached, unless "
        "it is far busier; fewest: the one with the fewest requests",
    )
    on_missing_expert: Literal["load", "degrade"] = Field(
        "load", description="after a loss: wait for lost experts, or go on without them meanwhile"
    )
    expert_cache: Bytes | None = Field(
        None,
        description="host memory for a copy of the experts, from which a GPU rank's that was lost "
        "come back; default: all, if half of what is free holds them; 0: none",
    )
    memory_per_rank: Bytes | None = Field(
        None, description="limit of a rank: of the host's memory, or of its GPU's; default: none"
    )
    join_listen: str | None = Field(
        None,
        max_length=300,
        description="address where hosts join ('flexpert join'), as tcp://0.0.0.0:7000; needs a "
        "cluster token; port 0: any; default: none can",
    )
    cluster_token_file: Path | None = Field(
        None,
        description="a file whose first line is the cluster token; default: FLEXPERT_CLUSTER_TOKEN",
    )
    host_timeout: Seconds = Field(
        2.0, gt=0, description="silence until a host that has joined is lost"
    )
    launcher: Literal["local", "ray"] = Field(
        "local",
        description="what starts ranks; local: this machine; ray: the nodes of a Ray cluster",
    )
    ray_address: str = Field(
        "auto", max_length=300, description="HOST:PORT of the Ray cluster; auto: as Ray finds it"
    )
    ray_strategy: Literal["SPREAD", "PACK", "STRICT_SPREAD", "STRICT_PACK"] = Field(
        "SPREAD", description="how ranks are placed on the nodes of Ray"
    )
    ray_resources: Annotated[dict[str, float], BeforeValidator(parse_amounts)] = Field(
        {}, description='what else a rank needs of its node, as JSON: {"rack1": 0.1}'
    )
    ray_cpus_per_rank: float = Field(1.0, gt=0, description="CPUs of a rank for Ray")
    wait_for_resources: Seconds = Field(
        0.0, ge=0, description="for room on Ray's nodes; 0: what has none is refused"
    )
    autoscale: str | None = Field(
        None,
        max_length=500,
        description="change the number of ranks by what clients get, as "
        "max=8,ttft_p99=0.5s,itl_p99=50ms; default: nothing changes it by itself",
    )
    autoscale_policy: str | None = Field(
        None,
        max_length=1000,
        description="with --autoscale: a policy of your own, as FILE.py:FUNCTION",
    )
    autoscale_dry_run: bool = Field(
        False, description="with --autoscale: say what would be done, and do nothing"
    )
    memory_headroom: float = Field(
        0.05, ge=0, lt=1, description="share of the host's memory left free"
    )

    @field_validator("join_listen")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"tcp://[^/\s]+:\d{1,5}", value):
            raise ValueError(f"{value!r} is no address to listen on; write tcp://0.0.0.0:7000")
        return value

    @field_validator("ray_address")
    @classmethod
    def _is_ray_address(cls, value: str) -> str:
        if value != "auto" and not re.fullmatch(r"[^/\s]+:\d{1,5}", value):
            raise ValueError(
                f"{value!r} is no address of Ray; write auto, or HOST:PORT of its GCS (ray:// "
                "would be for clients outside; the head has to run on a node of the cluster)"
            )
        return value

    @field_validator("ray_resources")
    @classmethod
    def _are_amounts(cls, amounts: dict[str, float]) -> dict[str, float]:
        for name, amount in amounts.items():
            if not name or not 0 < amount <= _MOST_COUNT:
                raise ValueError(f"{name!r}: {amount:g} is no amount of a resource")
            if name in ("CPU", "GPU"):
                raise ValueError(f"{name} of a rank are --ray-cpus-per-rank and --device")
        return amounts

    @model_validator(mode="after")
    def _can_be_resumed(self) -> ClusterConfig:
        if self.resume and self.state_dir is None:
            raise ValueError("resume needs the directory of the service: --state-dir DIR")
        if self.takeover and self.state_dir is None:
            raise ValueError("takeover needs the directory of the running head: --state-dir DIR")
        if self.takeover and self.resume:
            raise ValueError(
                "takeover is for a head that runs, resume for one that has ended: leave one out"
            )
        if self.state_dir is not None and self.launcher == "ray":
            raise ValueError(
                "state_dir cannot be had with launcher=ray: Ray ends what a job has started with "
                "the job, which is the head's; hosts whose ranks outlive it join (join_listen)"
            )
        return self

    @model_validator(mode="after")
    def _fits(self) -> ClusterConfig:
        if self.launcher == "ray" and self.spare_ranks:
            raise ValueError("spare_ranks needs launcher=local: Ray keeps no process ready")
        if self.launcher == "ray" and self.ranks == 0:
            raise ValueError("launcher=ray starts the ranks itself: give --ranks 1 or more")
        if self.ranks == 0 and self.join_listen is None:
            raise ValueError(
                "ranks=0 leaves a head that computes nothing unless hosts join it: say where they "
                "may with --join-listen tcp://0.0.0.0:7000, or start with --ranks 1"
            )
        if self.ranks > self.max_ranks:
            raise ValueError(
                f"ranks ({self.ranks}) exceeds max_ranks ({self.max_ranks}); raise --max-ranks"
            )
        return self


# as vLLM names them; `flexpert.frontend.tools.answer_parser` has what they mean
ToolCallParser = Literal[
    "auto",
    "none",
    "deepseek_v3",
    "deepseek_v31",
    "deepseek_v32",
    "glm45",
    "hermes",
    "kimi_k2",
    "llama3_json",
    "minimax_m2",
    "mistral",
    "openai",
    "qwen3_coder",
]
ReasoningParser = Literal[
    "auto",
    "none",
    "deepseek_r1",
    "deepseek_v3",
    "glm45",
    "kimi_k2",
    "minimax_m2",
    "mistral",
    "openai_gptoss",
    "qwen3",
]


def _as_origins(value: object) -> object:
    """vLLM's JSON list, or a list of a file, as a text with commas."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ",".join(value)
    return value


class ServerConfig(_Section):
    """HTTP."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 picks a free one")
    api_key: Key | None = Field(
        None,
        description="bearer token for /v1; others on this machine see it on the command line: "
        "prefer --api-key-file, or FLEXPERT_SERVER__API_KEY; none: open",
    )
    api_key_file: Path | None = Field(None, description="a file whose first line is that token")
    control_key: Key | None = Field(
        None,
        description="bearer token to scale, as visible as --api-key; default: the API's",
    )
    control_key_file: Path | None = Field(None, description="a file whose first line is that token")
    insecure: bool = Field(
        False, description="listen on a --host other than loopback without a key: all may use it"
    )
    tls_cert_file: Path | None = Field(
        None, description="serve HTTPS: a certificate and its chain in PEM; read again when renewed"
    )
    tls_key_file: Path | None = Field(
        None, description="its private key in PEM; default: in the same file"
    )
    tls_key_password: Key | None = Field(
        None,
        description="of an encrypted key; visible on the command line: prefer "
        "FLEXPERT_SERVER__TLS_KEY_PASSWORD",
    )
    header_timeout: Seconds = Field(10.0, gt=0, description="for a request's headers to arrive")
    body_timeout: Seconds = Field(60.0, gt=0, description="for a request's body to arrive")
    write_timeout: Seconds = Field(
        60.0, gt=0, description="time a client may take without reading any of its answer"
    )
    max_header_bytes: Bytes = Field(64 * 2**10, ge=1024, description="largest headers of a request")
    max_body: Bytes = Field(16 * 2**20, ge=1024, description="largest body of a request")
    max_requests_per_key: int = Field(
        1024, ge=1, description="concurrent requests of one key, or of all without keys"
    )
    max_connections: int | None = Field(
        None,
        ge=1,
        description="connections open at once; default: what the limit of open files allows",
    )
    max_choices: int = Field(1024, ge=1, description="prompts times n of one request")
    max_prompt_tokens: int | None = Field(
        None,
        ge=1,
        description="in all prompts of one request; default: 1048576, or one context",
    )
    preprocess_timeout: Seconds = Field(
        10.0, gt=0, description="time to parse and tokenise one request"
    )
    allowed_origins: Annotated[str, BeforeValidator(_as_origins)] = Field(
        "",
        description="origins whose pages browsers let read answers (CORS), with commas between "
        "them, or *; default: none",
    )
    lenient: bool = Field(
        False,
        description="pass unknown fields of requests over, and tell them in a header of the answer",
    )
    tool_call_parser: ToolCallParser = Field(
        "auto",
        description="how the model writes calls of tools: a parser's name (docs/tools.md); auto: "
        "found in the chat template; none: tools are refused",
    )
    reasoning_parser: ReasoningParser = Field(
        "auto",
        description="how it marks its reasoning: a parser's name (docs/tools.md); auto: found in "
        "the chat template; none: reasoning is content",
    )
    trust_request_chat_template: bool = Field(
        False, description="requests may bring their own chat template, a program that runs here"
    )
    metrics_names: Literal["both", "flexpert", "vllm"] = Field(
        "both", description="whose names /metrics has; vllm: of what vLLM has, only its"
    )
    otlp_traces_endpoint: str | None = Field(
        None,
        description="send traces of requests and changes to this OpenTelemetry collector over "
        "HTTP, as http://localhost:4318/v1/traces (docs/tracing.md); needs flexpert[otel]",
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = Field(
        "text", description="of the log on standard error; json: an object a line"
    )

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, value: str) -> str:
        for origin in filter(None, map(str.strip, value.split(","))):
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s,]+", origin):
                raise ValueError(f"{shown(origin)!r} is no origin; write https://example.org, or *")
        return value

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _is_collector(cls, value: str | None) -> str | None:
        """With the path that the protocol has, where none is given."""
        if value is None:
            return None
        try:
            url = urlsplit(value)
            right = url.scheme in ("http", "https") and url.hostname and url.port != 0
        except ValueError:  # of the port, or of brackets
            right = False
        if not right or re.search(r"[^!-~]", value):
            raise ValueError(
                f"{shown(value)!r} is no URL of a collector; write http://localhost:4318/v1/traces"
            )
        return value if url.path.strip("/") else url._replace(path="/v1/traces").geturl()

    @property
    def origins(self) -> list[str]:
        """The allowed origins, each by itself."""
        return [one.strip() for one in self.allowed_origins.split(",") if one.strip()]

    @model_validator(mode="after")
    def _one_source(self) -> ServerConfig:
        for name in ("api_key", "control_key"):
            if getattr(self, name) is not None and getattr(self, f"{name}_file") is not None:
                raise ValueError(f"{name} and {name}_file are both set; leave one out")
        return self

    @model_validator(mode="after")
    def _has_certificate(self) -> ServerConfig:
        key = self.tls_key_file or self.tls_key_password
        if key is not None and self.tls_cert_file is None:
            raise ValueError("tls_cert_file is missing: a key of TLS is of no use without it")
        return self


class Config(_Section):
    """The whole tree."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()
    server: ServerConfig = ServerConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_device(cls, tree: Any) -> Any:
        """What `DeviceSettings` says, wherever nothing is given."""
        if not isinstance(tree, dict):
            return tree
        device = DEVICE_SETTINGS.get(_device(tree.get("engine")))
        if device is None:
            return tree
        engine, cluster = tree["engine"], tree.get("cluster") or {}
        of_cluster = device.cluster_defaults()
        if of_cluster and isinstance(cluster, dict) and not {"ranks", "max_ranks"} & cluster.keys():
            cluster = {**of_cluster, **cluster}
            tree = {**tree, "cluster": cluster}
        if isinstance(engine, dict):
            alone = isinstance(cluster, dict) and str(cluster.get("max_ranks")) == "1"
            defaults = device.engine_defaults(engine.get("all2all"), alone=alone)
            tree = {**tree, "engine": {**defaults, **engine}}
        return tree

    @model_validator(mode="after")
    def _fits_device(self) -> Config:
        refusal = DEVICE_SETTINGS[self.engine.device].refusal(
            SettingCombination(
                quantization=self.model.quantization,
                all2all=self.engine.all2all,
                deterministic=self.engine.deterministic,
                speculates=self.engine.speculate is not None,
                max_ranks=self.cluster.max_ranks,
                on_missing_expert=self.cluster.on_missing_expert,
            )
        )
        if refusal is not None:
            raise ValueError(refusal)
        return self

    @model_validator(mode="after")
    def _reaches_its_ranks(self) -> Config:
        if self.engine.all2all != "nixl_ep":
            return self
        if self.engine.transport == "nixl" or self.cluster.join_listen is not None:
            name = "transport=nixl" if self.engine.transport == "nixl" else "join_listen"
            raise ValueError(
                f"{name} is not for all2all=nixl_ep: NVIDIA's kernels, as they are used here, "
                "exchange between GPUs of one machine; drop --all2all, and flexpert's own kernels "
                "exchange with other machines by way of their hosts"
            )
        return self

    @model_validator(mode="after")
    def _keeps_its_promise(self) -> Config:
        if self.engine.deterministic and self.cluster.on_missing_expert == "degrade":
            raise ValueError(
                "on_missing_expert=degrade contradicts deterministic: an answer computed without "
                "some experts is another answer; drop --deterministic or --on-missing-expert"
            )
        return self


def _device(engine: object) -> str:
    """The device that a tree not yet validated names; "" if it names none."""
    if isinstance(engine, EngineConfig):
        return engine.device
    device = engine.get("device") if isinstance(engine, dict) else None
    return device if isinstance(device, str) else ""


def load_config(
    *,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """The settings of all four sources, checked.

    Args:
        file: YAML or JSON with the tree's nesting.
        environment: default: `os.environ`.
        overrides: dotted path → value, e.g. {"cluster.ranks": 2}; None values are skipped.

    Raises:
        ConfigError: names each wrong setting.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        tree = _read_file(file)
    for name, value in sorted((os.environ if environment is None else environment).items()):
        if name.startswith(ENVIRONMENT_PREFIX) and "__" in name:
            _insert(tree, name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"), value)
    for path, value in (overrides or {}).items():
        if value is not None:
            _insert(tree, path.split("."), value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(shown, item['loc']))}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        ]
        complaint = "; ".join(line.removeprefix(": ") for line in lines)  # of the whole tree
        raise ConfigError(f"wrong settings: {complaint}") from None


class _Loader(yaml.SafeLoader):
    """YAML without what grows when it is read: references, and depth."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise ConfigError(f"line {mark.line + 1} has a reference (*), which is not read")
        self.depth += 1
        if self.depth > _MOST_DEPTH:
            raise ConfigError(f"it is nested deeper than {_MOST_DEPTH} levels")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _read_file(file: Path) -> dict[str, Any]:
    text = read_text(file, "the settings file", most=_MOST_FILE_BYTES)
    try:
        # the loader is a safe one
        tree = json.loads(text) if file.suffix == ".json" else yaml.load(text, Loader=_Loader)
    except (ConfigError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} is not valid YAML or JSON: {error}") from None
    except RecursionError:
        raise ConfigError(f"{file} is not valid YAML or JSON: it is nested too deep") from None
    except (LookupError, AttributeError, TypeError):  # PyYAML's of a value that its tag denies
        raise ConfigError(f"{file} is not valid YAML or JSON: a tag (!!) is wrong") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold a mapping with sections such as 'cluster:'")
    return {name: section for name, section in tree.items() if section is not None}


def _insert(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        below = tree.setdefault(key, {})
        if not isinstance(below, dict):
            raise ConfigError(f"setting {key!r} is a section, not a value")
        tree = below
    tree[path[-1]] = value
