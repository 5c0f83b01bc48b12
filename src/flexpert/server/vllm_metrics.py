"""vLLM's names and labels for what is measured here, so that its dashboards and tools read it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from prometheus_client.core import Metric

MetricNames = Literal["flexpert", "vllm", "both"]


@dataclass(frozen=True, slots=True)
class VllmName:
    """A family of vLLM's, and ours that it shows. labels: ours → vLLM's; values: of labels,
    ours → vLLM's."""

    vllm: str
    ours: str
    labels: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)


_FINISHED = {"cancelled": "abort", "failed": "error"}

VLLM_NAMES = (
    VllmName("num_requests_running", "requests_running"),
    VllmName("num_requests_waiting", "requests_waiting"),
    VllmName("kv_cache_usage_perc", "kv_used_ratio"),
    VllmName("gpu_cache_usage_perc", "kv_used_ratio"),  # until vLLM 0.11
    VllmName("cache_config_info", "cache_config_info"),
    VllmName("num_preemptions", "preemptions"),
    VllmName("prefix_cache_queries", "prefix_cache_queries"),
    VllmName("prefix_cache_hits", "cached_prompt_tokens"),
    VllmName("gpu_prefix_cache_queries", "prefix_cache_queries"),  # until vLLM 0.11
    VllmName("gpu_prefix_cache_hits", "cached_prompt_tokens"),
    VllmName("prompt_tokens_cached", "cached_prompt_tokens"),
    VllmName("spec_decode_num_drafts", "drafts"),
    VllmName("spec_decode_num_draft_tokens", "draft_tokens"),
    VllmName("spec_decode_num_accepted_tokens", "accepted_draft_tokens"),
    VllmName("spec_decode_num_accepted_tokens_per_pos", "accepted_draft_tokens_by_position"),
    VllmName("prompt_tokens", "prompt_tokens"),
    VllmName("generation_tokens", "tokens"),
    VllmName("iteration_tokens_total", "step_tokens"),
    VllmName("request_success", "sequences", {"outcome": "finished_reason"}, _FINISHED),
    VllmName("request_prompt_tokens", "request_prompt_tokens"),
    VllmName("request_generation_tokens", "request_generation_tokens"),
    VllmName("request_max_num_generation_tokens", "request_generation_tokens"),
    VllmName("request_params_max_tokens", "request_params_max_tokens"),
    VllmName("request_params_n", "request_params_n"),
    VllmName("time_to_first_token_seconds", "time_to_first_token_seconds"),
    VllmName("inter_token_latency_seconds", "inter_token_seconds"),
    VllmName("time_per_output_token_seconds", "inter_token_seconds"),  # until vLLM 0.11
    VllmName("request_time_per_output_token_seconds", "request_time_per_output_token_seconds"),
    VllmName("e2e_request_latency_seconds", "request_latency_seconds"),
    VllmName("request_queue_time_seconds", "request_queue_seconds"),
    VllmName("request_prefill_time_seconds", "request_prefill_seconds"),
    VllmName("request_decode_time_seconds", "request_decode_seconds"),
    VllmName("request_inference_time_seconds", "request_inference_seconds"),
)
"""Without the prefixes `vllm:` and `flexpert_`, and without a counter's `_total`."""

_SHOWN: dict[str, list[VllmName]] = {}
for _name in VLLM_NAMES:
    _SHOWN.setdefault("flexpert_" + _name.ours, []).append(_name)


def named(families: Iterable[Metric], model: str, names: MetricNames) -> Iterator[Metric]:
    """The families under the names that are asked for; what vLLM has not keeps ours.

    A service is one engine of vLLM's: its ranks come and go, the series stay.
    """
    for family in families:
        shown = () if names == "flexpert" else _SHOWN.get(family.name, ())
        if names != "vllm" or not shown:
            yield family
        for name in shown:
            yield _as_vllm(family, name, model)


def _as_vllm(family: Metric, name: VllmName, model: str) -> Metric:
    shown = Metric("vllm:" + name.vllm, family.documentation, family.type)
    for sample in family.samples:
        ending = sample.name[len(family.name) :]
        if ending == "_created":
            continue
        labels = {"model_name": model, "engine": "0"}
        for label, value in sample.labels.items():
            labels[name.labels.get(label, label)] = name.values.get(value, value)
        shown.add_sample(shown.name + ending, labels, sample.value)
    return shown
