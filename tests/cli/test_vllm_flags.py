"""Promises to those who come from vLLM: each flag of the table is ours, the case, or refused.

`python tests/cli/test_vllm_flags.py` writes the table into docs/vllm.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexpert.cli.main import app
from flexpert.cli.settings import flags, settings
from flexpert.config import Config
from flexpert.errors import ConfigError
from flexpert.speculative_settings import SpeculativeSettings
from flexpert.vllm_flags import VLLM_FLAGS, VllmFlag, translated

PAGE = Path(__file__).parents[2] / "docs/vllm.md"
BEGIN, END = "<!-- table of flags -->\n", "<!-- end -->\n"

SAME = [flag for flag in VLLM_FLAGS if flag.setting]
HOLDS = [flag for flag in VLLM_FLAGS if flag.holds]
REFUSED = [flag for flag in VLLM_FLAGS if not flag.setting]

LOOKUP = SpeculativeSettings(prompt_lookup_max=3, prompt_lookup_min=3)

# what the settings of the table may be set to
VALUES = {
    "model.served_name": ("mine", "mine"),
    "cluster.ranks": ("3", 3),
    "engine.max_running": ("5", 5),
    "engine.max_tokens_per_step": ("64", 64),
    "engine.kv_block_size": ("32", 32),
    "engine.kv_memory": ("1048576", 2**20),
    "cluster.redundant_experts": ("2", 2),
    "server.log_level": ("debug", "debug"),
    "engine.speculate": ('{"method": "ngram", "prompt_lookup_max": 3}', LOOKUP),
}


def named(flag: VllmFlag) -> str:
    return flag.name


def config(*arguments: str) -> Config:
    """What `flexpert serve` would run with."""
    seen: list[Config] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "flexpert.server.service_process.serve", lambda config: seen.append(config) or 0
        )
        result = CliRunner().invoke(app, ["serve", *arguments])
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return seen[0]


def test_no_name_is_twice_in_the_table_or_a_flag_of_ours() -> None:
    names = [name for flag in VLLM_FLAGS for name in flag.names]
    assert len(names) == len(set(names))
    ours = {flag.name for flag in flags()}
    assert ours.isdisjoint(names), "a flag that has become a setting leaves the table"


@pytest.mark.parametrize("flag", SAME, ids=named)
def test_a_flag_that_means_the_same_sets_our_setting(flag: VllmFlag) -> None:
    section, _, field = flag.setting.partition(".")
    if not flag.takes:
        (written,), _ = translated([flag.name])
        assert written == flag.ours
        found = config(flag.name)
        value = getattr(getattr(found, section), field)
        assert value == flag.value if flag.value else value is not flag.negated
        return
    text, value = VALUES[flag.setting]
    for name in flag.names:
        forms = [[name, text]]
        if name.startswith("--"):
            forms += [[f"{name}={text}"], [f"--{name[2:].replace('-', '_')}", text]]
        for form in forms:
            assert getattr(getattr(config(*form), section), field) == value


@pytest.mark.parametrize("flag", HOLDS, ids=named)
def test_what_is_the_case_anyway_is_accepted_and_said(flag: VllmFlag) -> None:
    for name in flag.names:
        for value in flag.holds:
            given = [name, value] if value else [name]
            ours, remarks = translated([*given, "--port", "0"])
            assert ours == ["--port", "0"]
            assert remarks == [f"{' '.join(given)} changes nothing: {flag.advice}"]
    assert config(*([flag.name, flag.holds[0]] if flag.takes else [flag.name])) == Config()


@pytest.mark.parametrize("flag", REFUSED, ids=named)
def test_any_other_is_refused_with_advice(flag: VllmFlag) -> None:
    assert flag.advice
    if not flag.takes and flag.holds:
        return
    for name in flag.names:
        given = [name, "7"] if flag.takes else [name]
        with pytest.raises(ConfigError) as refused:
            config(*given)
        assert str(refused.value) == f"{' '.join(given)} is vLLM's: {flag.advice}"


def test_advice_names_flags_that_there_are() -> None:
    """And settings that there are."""
    ours = {flag.name for flag in flags()}
    for flag in VLLM_FLAGS:
        words = {word.strip(",.:;'()") for word in flag.advice.split()}
        assert {word for word in words if word.startswith("--")} <= ours
        if flag.setting:
            assert flag.ours.partition("=")[0].replace("--no-", "--") in ours


def test_the_order_of_other_arguments_stays() -> None:
    ours, remarks = translated(["./m", "-dp", "4", "--kv_memory", "1GiB", "--", "--max-num-seqs"])
    assert ours == ["./m", "--ranks", "4", "--kv-memory", "1GiB", "--", "--max-num-seqs"]
    assert not remarks


def test_what_follows_a_flag_without_its_value_is_not_swallowed() -> None:
    with pytest.raises(ConfigError, match=r"^--tensor-parallel-size is vLLM's"):
        translated(["--tensor-parallel-size", "--port", "0"])


def test_a_served_name_is_one() -> None:
    with pytest.raises(ConfigError, match="takes one name, and 'b' follows"):
        translated(["m", "--served-model-name", "a", "b"])


def test_the_model_is_an_argument_or_a_flag() -> None:
    assert config("./m").model.model == config("--model", "./m").model.model == "./m"
    assert config("--ranks", "2", "./m").model.model == "./m"
    with pytest.raises(ConfigError, match="named twice"):
        config("./m", "--model", "./n")


def test_complaints_of_a_translated_flag_name_ours() -> None:
    with pytest.raises(ConfigError, match=r"--max-running 0: "):
        config("--max-num-seqs", "0")
    assert settings(None, {}) == Config()


# ---- the page -----------------------------------------------------------------------------------


def table() -> str:
    def row(flag: VllmFlag) -> str:
        names = ", ".join(f"`{name}`" for name in flag.names)
        if flag.setting:
            return f"| {names} | taken for `{flag.ours}` | {flag.advice} |\n"
        if flag.holds:
            values = ", ".join(f"`{value}`" for value in flag.holds if value)
            how = f"with {values}: changes nothing; else refused" if values else "changes nothing"
            return f"| {names} | {how} | {flag.advice} |\n"
        return f"| {names} | refused | {flag.advice} |\n"

    rows = "".join(row(flag).replace("  |", " |") for flag in VLLM_FLAGS)
    return f"{BEGIN}| vLLM's flag | here | what to know |\n|---|---|---|\n{rows}{END}"


def test_the_page_has_the_table() -> None:
    assert table() in PAGE.read_text(), "python tests/cli/test_vllm_flags.py writes it"


if __name__ == "__main__":
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(before + table() + rest.partition(END)[2])
    sys.exit(0)
