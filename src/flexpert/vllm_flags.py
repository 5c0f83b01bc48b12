"""vLLM's flags of `vllm serve`, and what becomes of each here: one table (pure).

A flag that means the same as one of our settings is taken for it; one that asks for what is the
case anyway is accepted, and that is said; any other one is refused with what to use instead. Flags
that have our names (`--host`, `--port`, `--dtype`, `--max-model-len`, `--api-key`, …) are settings
of ours and not in here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexpert.errors import ConfigError


@dataclass(frozen=True, slots=True)
class VllmFlag:
    """What becomes of one flag of vLLM's.

    names: its spellings, the long one first. setting: the setting that means the same, dotted;
    "" if there is none. negated: it turns that setting, a switch, off. takes: it has a value.
    value: of the setting, where the flag has none.
    holds: values for which it is the case anyway; "" stands for the flag without a value. advice:
    what to know instead: why it is the case anyway, or what to use.
    """

    names: tuple[str, ...]
    advice: str
    setting: str = ""
    negated: bool = False
    takes: bool = True
    holds: tuple[str, ...] = ()
    value: str = ""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def ours(self) -> str:
        """Our flag of the setting, with the value if it has one of its own."""
        name = self.setting.rpartition(".")[2].replace("_", "-")
        value = f"={self.value}" if self.value else ""
        return f"--no-{name}" if self.negated else f"--{name}{value}"


def _same(
    names: str, setting: str, advice: str = "", *, negated: bool = False, takes: bool = True
) -> VllmFlag:
    return VllmFlag(tuple(names.split()), advice, setting, negated, takes)


def _means(names: str, setting: str, value: str) -> VllmFlag:
    """A switch that is a value of a setting."""
    return VllmFlag(tuple(names.split()), "", setting, takes=False, value=value)


def _holds(names: str, advice: str, *values: str) -> VllmFlag:
    return VllmFlag(tuple(names.split()), advice, takes=bool(values), holds=values or ("",))


def _refused(names: str, advice: str, *, takes: bool = True) -> VllmFlag:
    return VllmFlag(tuple(names.split()), advice, takes=takes)


_HOSTS = "other hosts join with 'flexpert join'; see --join-listen"
_LORA = "LoRA adapters are not served: merge the adapter into the checkpoint and serve that"
_SPLIT = "a layer's experts are spread over whole ranks: give --ranks the number of GPUs"
_GRAPHS = "ranks on GPUs capture their CUDA graphs by themselves, ranks on CPUs have none"
_BALANCE = (
    "say when experts move with --balance, how many replicas there are with --redundant-experts"
)
_TEXT_ONLY = "only text is served"
_SPECULATION = "no model beside the served one proposes tokens: --speculate ngram, or mtp"
_CHECKPOINT = "a checkpoint is read as transformers saves it: leave it out"

VLLM_FLAGS: Sequence[VllmFlag] = (
    # ---- the same by another name
    _same("--served-model-name", "model.served_name", "one name"),
    _same("--data-parallel-size -dp", "cluster.ranks", "--max-ranks bounds later changes"),
    _same("--max-num-seqs", "engine.max_running", "of one rank, as with vLLM"),
    _same("--max-num-batched-tokens", "engine.max_tokens_per_step", "of one rank, as with vLLM"),
    _same("--block-size", "engine.kv_block_size"),
    _same("--kv-cache-memory-bytes --kv-cache-memory", "engine.kv_memory", "of one rank"),
    _same("--enable-prefix-caching", "engine.prefix_cache", takes=False),
    _same("--no-enable-prefix-caching", "engine.prefix_cache", negated=True, takes=False),
    _same("--num-redundant-experts", "cluster.redundant_experts", "in each layer"),
    _same("--uvicorn-log-level", "server.log_level"),
    _same(
        "--speculative-config -sc", "engine.speculate", "methods ngram and mtp; docs/speculation.md"
    ),
    # ---- the case anyway
    _holds("--enable-expert-parallel -ep", "experts are always spread over the ranks"),
    _holds("--enable-elastic-ep", "ranks may always join and leave: 'flexpert scale'"),
    _holds("--enable-chunked-prefill", "long prompts are always computed in chunks"),
    _holds("--disable-log-requests", "requests are not logged"),
    _holds("--no-enable-log-requests", "requests are not logged"),
    _holds("--disable-log-stats", "no statistics are logged; GET /metrics has them"),
    _holds("--disable-uvicorn-access-log", "answers are logged with --log-level debug only"),
    _holds("--disable-custom-all-reduce", "there is no all-reduce between ranks"),
    _holds("--async-scheduling", "the head never waits for a step of the ranks"),
    _holds("--tensor-parallel-size -tp", _SPLIT, "1"),
    _holds("--pipeline-parallel-size -pp", _SPLIT, "1"),
    _holds("--decode-context-parallel-size -dcp", "a rank holds whole sequences", "1"),
    _holds("--prefill-context-parallel-size -pcp", "a rank holds whole sequences", "1"),
    _holds("--api-server-count -asc", "one process answers HTTP", "1"),
    _holds("--data-parallel-backend -dpb", "ranks are processes of one service", "mp"),
    _holds("--distributed-executor-backend", "ranks are processes of one service", "mp"),
    _holds("--kv-cache-dtype", "the KV cache has the model's dtype: --dtype", "auto"),
    _holds("--load-format", _CHECKPOINT, "auto", "safetensors"),
    _holds("--tokenizer-mode", "the checkpoint's tokenizer is used", "auto"),
    _holds("--config-format", _CHECKPOINT, "auto", "hf"),
    _holds("--model-impl", "the model code is that of transformers", "auto", "transformers"),
    _holds("--runner", "text is generated, nothing else", "auto", "generate"),
    _holds("--task", "text is generated, nothing else", "auto", "generate"),
    _holds("--scheduling-policy", "requests are served in the order they come", "fcfs"),
    _holds("--swap-space", "KV is not swapped to the host: leave it out", "0"),
    _holds("--cpu-offload-gb", "weights are not kept on the host: leave it out", "0"),
    # ---- something else
    _refused(
        "--gpu-memory-utilization",
        "give the KV cache its size, --kv-memory SIZE, and bound a rank by --memory-per-rank SIZE",
    ),
    _refused("--num-gpu-blocks-override", "give the KV cache its size: --kv-memory SIZE"),
    _refused("--data-parallel-size-local -dpl", _HOSTS),
    _refused("--data-parallel-start-rank -dpr", _HOSTS),
    _refused("--data-parallel-rank -dpn", _HOSTS),
    _refused("--data-parallel-address -dpa", _HOSTS),
    _refused("--data-parallel-rpc-port -dpp", _HOSTS),
    _refused("--data-parallel-hybrid-lb -dph", _HOSTS, takes=False),
    _refused("--data-parallel-external-lb -dpe", _HOSTS, takes=False),
    _refused("--headless", _HOSTS, takes=False),
    _refused("--nnodes -n", _HOSTS),
    _refused("--node-rank -r", _HOSTS),
    _refused("--master-addr", _HOSTS),
    _refused("--master-port", _HOSTS),
    _means("--enable-eplb", "cluster.balance", "auto"),
    _refused("--eplb-config", _BALANCE),
    _refused("--all2all-backend", "use --all2all nixl_ep for NVIDIA's kernels, or leave it out"),
    _refused("--enable-dbo", "steps are not overlapped: leave it out", takes=False),
    _refused("--no-enable-chunked-prefill", "prompts are always computed in chunks", takes=False),
    _refused("--enforce-eager", f"{_GRAPHS}: leave it out", takes=False),
    _refused("--compilation-config -O -cc", f"{_GRAPHS}: leave it out"),
    _refused("--cuda-graph-sizes", f"{_GRAPHS}: leave it out"),
    _refused("--tokenizer", "the checkpoint's own is used, or none: --skip-tokenizer-init"),
    _refused("--tokenizer-revision", "the tokenizer comes with the model: --revision"),
    _refused("--code-revision", "the code comes with the model: --revision"),
    _refused("--hf-config-path", _CHECKPOINT),
    _refused("--hf-overrides", "edit config.json in a copy of the checkpoint"),
    _refused("--rope-scaling", "edit config.json in a copy of the checkpoint"),
    _refused("--rope-theta", "edit config.json in a copy of the checkpoint"),
    _refused("--hf-token", "the Hugging Face libraries read the environment: HF_TOKEN"),
    _refused("--download-dir", "the Hugging Face libraries read the environment: HF_HOME"),
    _refused("--seed", "give a seed with each request; --deterministic makes equal ones equal"),
    _refused("--max-logprobs", "20 is the most a request may ask for: leave it out"),
    _refused("--logprobs-mode", "they are those before temperature and penalties: leave it out"),
    _refused("--logits-processors", "there are none of one's own; see logit_bias of a request"),
    _refused("--speculative-model", _SPECULATION),
    _refused("--num-speculative-tokens", _SPECULATION),
    _refused("--enable-lora", _LORA, takes=False),
    _refused("--lora-modules", _LORA),
    _refused("--max-loras", _LORA),
    _refused("--max-lora-rank", _LORA),
    _refused("--limit-mm-per-prompt", _TEXT_ONLY),
    _refused("--mm-processor-kwargs", _TEXT_ONLY),
    _refused("--allowed-local-media-path", _TEXT_ONLY),
    _refused("--kv-transfer-config", "prefill and decoding are not split between services"),
    _refused("--kv-events-config", "KV events are not published"),
    _refused("--kv-offloading-size", "KV is not kept on the host: leave it out"),
    _refused("--disable-sliding-window", "leave it out", takes=False),
    _refused("--enable-sleep-mode", "'flexpert scale' changes the number of ranks", takes=False),
    _refused("--collect-detailed-traces", "--otlp-traces-endpoint sends all there is of a request"),
    _refused("--root-path", "let the proxy take the prefix off"),
    _refused("--middleware", "put a proxy in front"),
    _refused("--enable-log-requests", "requests are not logged", takes=False),
)

_BY_NAME: Mapping[str, VllmFlag] = {name: flag for flag in VLLM_FLAGS for name in flag.names}


def translated(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of `flexpert serve` with vLLM's flags as ours, and remarks for the user.

    As vLLM does, a long flag may be written with underscores: `--max_num_seqs`.

    Raises:
        ConfigError: one of them has no equivalent here; says what to use instead.
    """
    ours: list[str] = []
    remarks: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            return [*ours, argument, *rest], remarks
        name, equals, value = _split(argument)
        flag = _BY_NAME.get(name)
        if flag is None:
            ours.append(name + equals + value)
            continue
        given: str | None = value if equals else None
        if given is None and flag.takes and rest and not _is_flag(rest[0]):
            given = rest.pop(0)
        if flag.setting:
            if name == "--served-model-name":
                _check_single(rest)
            ours.append(flag.ours)
            ours += [] if given is None else [given]
            continue
        shown = name if given is None else f"{name} {given[:80]}"
        if (given or "") not in flag.holds:
            raise ConfigError(f"{shown} is vLLM's: {flag.advice}")
        remarks.append(f"{shown} changes nothing: {flag.advice}")
    return ours, remarks


def translated_argument(name: str, value: object) -> tuple[str, object] | None:
    """A keyword argument of vLLM's `LLM` as a setting and its value.

    None: it asks for what is the case anyway.

    Raises:
        KeyError: vLLM has no flag of that name that we have not as well.
        ConfigError: there is no equivalent here; says what to use instead.
    """
    flag = _BY_NAME["--" + name.replace("_", "-")]
    if flag.value:
        return (flag.setting, flag.value) if value else None
    if flag.setting:
        return flag.setting, value
    given = "" if value is True else "" if value is None else str(value)
    switched_off = not flag.takes and value is False
    if switched_off or value is None or given in flag.holds:
        return None
    raise ConfigError(f"{name}={value!r:.80} is vLLM's: {flag.advice}")


def _split(argument: str) -> tuple[str, str, str]:
    """ "--max_num_seqs=4" → ("--max-num-seqs", "=", "4"); what is no long flag stays whole."""
    if not argument.startswith("--"):
        return argument, "", ""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-"), equals, value


def _is_flag(argument: str) -> bool:
    """A number below zero is a value."""
    return argument.startswith("-") and not argument[1:2].isdigit()


def _check_single(rest: Sequence[str]) -> None:
    """Raises: ConfigError"""
    if rest and not _is_flag(rest[0]):
        raise ConfigError(
            f"--served-model-name takes one name, and {rest[0][:80]!r} follows it; the model is "
            "named before the flags, further names are not served"
        )
