"""What spans say: by the names of OpenTelemetry's conventions for generative AI, by vLLM's where
those have none, and by ours. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexpert.cluster.operation import Operation
from flexpert.cluster.sequence_trace import RankStay, SequenceTrace, StageTime
from flexpert.engine.request import SamplingParams
from flexpert.frontend.generation import Usage

Value = str | bool | int | float | Sequence[str] | Sequence[int]
Attributes = dict[str, Value]

# path → `gen_ai.operation.name` of what it is asked for
TRACED_PATHS: Mapping[str, str] = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
}

# `OperationView.purpose` → name of the operation's span
OPERATION_SPANS: Mapping[str, str] = {"request": "scale"}


def of_params(id: str, params: SamplingParams, stream: bool) -> Attributes:
    """What was asked for. id: of the answer."""
    found: Attributes = {
        "gen_ai.request.id": id,
        "gen_ai.response.id": id,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.n": params.n,
        "gen_ai.request.stream": stream,
    }
    if params.n != 1:
        found["gen_ai.request.choice.count"] = params.n
    if params.max_tokens is not None:
        found["gen_ai.request.max_tokens"] = params.max_tokens
    if params.top_k:
        found["gen_ai.request.top_k"] = params.top_k
    if params.seed is not None:
        found["gen_ai.request.seed"] = params.seed
    if params.presence_penalty:
        found["gen_ai.request.presence_penalty"] = params.presence_penalty
    if params.frequency_penalty:
        found["gen_ai.request.frequency_penalty"] = params.frequency_penalty
    return found


def of_usage(usage: Usage) -> Attributes:
    return {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.prompt_tokens": usage.prompt_tokens,
        "gen_ai.usage.completion_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.prompt_tokens_details.cached_tokens,
    }


def of_sequences(
    sequences: Sequence[SequenceTrace], stages: Sequence[Sequence[StageTime]], arrived: float
) -> Attributes:
    """Where they ran and how long that took. stages: of each of them; the longest counts. arrived:
    when their request did."""

    def longest(*names: str) -> float:
        sums = [sum(s.ended - s.began for s in each if s.stage in names) for each in stages]
        return max(sums, default=0.0)

    found: Attributes = {
        "gen_ai.usage.num_sequences": len(sequences),
        "gen_ai.latency.time_in_queue": longest("queue"),
        "gen_ai.latency.time_in_model_prefill": longest("prefill"),
        "gen_ai.latency.time_in_model_decode": longest("decode"),
        "gen_ai.latency.time_in_model_inference": longest("prefill", "decode"),
    }
    first = [one.first for one in sequences if one.first is not None]
    if first:
        found["gen_ai.latency.time_to_first_token"] = min(first) - arrived
    ends = [each[-1].ended for each in stages if each]
    if ends:
        found["gen_ai.latency.e2e"] = max(ends) - arrived
    finishes = [one.outcome for one in sequences if one.outcome in ("stop", "length")]
    if finishes:
        found["gen_ai.response.finish_reasons"] = finishes
    found["flexpert.ranks"] = list(dict.fromkeys(s.rank for one in sequences for s in one.stays))
    found["flexpert.moves"] = sum(len(one.moves) for one in sequences)
    found["flexpert.ranks_lost"] = sum(stay.lost for one in sequences for stay in one.stays)
    return found


def of_stage(stage: StageTime) -> Attributes:
    if stage.rank is None:
        return {}
    return {"flexpert.rank": stage.rank, "flexpert.tokens": stage.tokens}


def of_move(sequence: SequenceTrace, left: RankStay, came: RankStay) -> Attributes:
    """Why and with how much of its KV a sequence went on elsewhere."""
    found: Attributes = {
        "flexpert.rank.from": left.rank,
        "flexpert.rank.to": came.rank,
        "flexpert.kv_tokens": came.kv_tokens,
        "flexpert.tokens_without_kv": sequence.without_kv(came),
    }
    if came.change is not None:
        found["flexpert.operation.id"] = came.change.id
        found["flexpert.operation.purpose"] = came.change.purpose
    return found


def of_operation(operation: Operation) -> Attributes:
    view = operation.view()
    found: Attributes = {
        "flexpert.operation.id": view.id,
        "flexpert.operation.purpose": view.purpose,
        "flexpert.operation.state": view.state,
        "flexpert.epoch": view.epoch,
        "flexpert.ranks.before": sorted(operation.before),
        "flexpert.ranks.after": view.target,
        "flexpert.moved_experts": view.moved_experts,
        "flexpert.copied_experts": view.copied_experts,
        "flexpert.moved_requests": view.moved_requests,
        "flexpert.moved_with_kv": view.moved_with_kv,
        "flexpert.moved_kv_bytes": view.moved_kv_bytes,
        "flexpert.recomputed_tokens": view.recomputed_tokens,
    }
    if view.pause_ms is not None:
        found["flexpert.pause_ms"] = view.pause_ms
    if view.reason is not None:
        found["flexpert.operation.reason"] = view.reason
    return found
