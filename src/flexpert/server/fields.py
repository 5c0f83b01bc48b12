"""Fields of requests that are not served, and why; whatever else is unknown.

Nothing that would change an answer is dropped in silence: a known field is served (it is in
`schemas`) or refused here by name, unless its value says what happens anyway; an unknown one is
refused, or passed over and told in a header where `server.lenient` is set.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from flexpert.errors import RequestError

IGNORED_HEADER = "x-flexpert-ignored"
_MOST_NAMED = 20  # ignored fields in the header
_LONGEST = 80  # characters of a name

# What these say happens anyway, or is the same as not to say it.
_NEUTRAL: tuple[Any, ...] = (None, False, [], {}, "")
_ALSO_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "length_penalty": (1, 1.0),
    "verbosity": ("medium",),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "repeat_last_n": (-1,),
    "n_predict": (-1,),
    "cache_prompt": (True,),
    "typical_p": (1, 1.0),
    "tfs_z": (1, 1.0),
    "mirostat": (0,),
    "dynatemp_range": (0, 0.0),
    "dry_multiplier": (0, 0.0),
    "xtc_probability": (0, 0.0),
}

_BEAM = "beam search is not served"
_MEDIA = "only text is served"
_OTHERS_SAMPLERS = "this way of sampling is not served; temperature, top_p, top_k and min_p are"
REFUSED: Mapping[str, str] = {
    # OpenAI
    "audio": _MEDIA,
    "modalities": _MEDIA,
    "prediction": "predicted outputs are not served",
    "web_search_options": "nothing is searched for",
    "functions": "send them as tools",
    "function_call": "send it as tool_choice",
    "service_tier": "there is one tier",
    "verbosity": "no model here takes it; say it in the messages",
    "prompt_cache_retention": "the prefix cache keeps what it has room for",
    "moderation": "nothing is moderated",
    # vLLM
    "use_beam_search": _BEAM,
    "length_penalty": _BEAM,
    "early_stopping": _BEAM,
    "prompt_embeds": "prompts are texts or token ids",
    "mm_processor_kwargs": _MEDIA,
    "media_io_kwargs": _MEDIA,
    "logits_processors": "no code of clients is run; logit_bias and allowed_token_ids are served",
    "kv_transfer_params": "KV moves between ranks by itself",
    "vllm_xargs": "they are for plugins of vLLM",
    "repetition_detection": "it is not served; repetition_penalty is",
    "thinking_token_budget": "it is not served; max_tokens bounds the answer with its reasoning",
    "guided_decoding_backend": "there is one engine for structured output",
    "guided_whitespace_pattern": "whitespace is the engine's",
    "guided_grammar_whitespace_pattern": "whitespace is the engine's",
    "return_token_strs": "POST /detokenize gives the texts of tokens",
    "structural_tag": "send it in structured_outputs",
    # llama.cpp
    "n_predict": "send max_tokens",
    "repeat_penalty": "send repetition_penalty",
    "repeat_last_n": "repetition_penalty is over prompt and answer",
    "cache_prompt": "cached prefixes are always used",
    "id_slot": "there are no slots",
    "n_probs": "send logprobs",
    "n_keep": "no context is shifted: what does not fit is refused",
    "samplers": _OTHERS_SAMPLERS,
    "typical_p": _OTHERS_SAMPLERS,
    "tfs_z": _OTHERS_SAMPLERS,
    "mirostat": _OTHERS_SAMPLERS,
    "mirostat_tau": _OTHERS_SAMPLERS,
    "mirostat_eta": _OTHERS_SAMPLERS,
    "dynatemp_range": _OTHERS_SAMPLERS,
    "dry_multiplier": _OTHERS_SAMPLERS,
    "xtc_probability": _OTHERS_SAMPLERS,
    "t_max_predict_ms": "send max_tokens, or close the connection",
    "lora": "adapters are not served",
    "lora_request": "adapters are not served",
}
"""Field → why it is not served, or what to send instead."""


def check_fields(request: BaseModel, *, lenient: bool) -> list[str]:
    """Fields that are passed over, by their paths; only where that is allowed.

    Raises: RequestError: one is known and not served, or unknown.
    """
    ignored = []
    for path, name, value, known in _unknown(request, ""):
        if value is None or _says_nothing(name, value):
            continue
        if name in REFUSED:
            raise RequestError(f"{path} is not supported by this server: {REFUSED[name]}", path)
        if not lenient:
            raise RequestError(f"{path} is not known here{_nearest(name, known)}", path)
        ignored.append(path)
    return ignored


def header(ignored: list[str]) -> dict[str, str]:
    """What a client is told of them."""
    if not ignored:
        return {}
    shown = [path.encode("ascii", "replace").decode() for path in ignored[:_MOST_NAMED]]
    named = ", ".join("".join(c if c.isprintable() else "?" for c in path) for path in shown)
    more = f", and {len(ignored) - _MOST_NAMED} more" if len(ignored) > _MOST_NAMED else ""
    return {IGNORED_HEADER: named + more}


def _says_nothing(name: str, value: object) -> bool:
    if name not in REFUSED:
        return False
    also = _ALSO_NEUTRAL.get(name, ())
    return any(
        value is one or (value == one and type(value) is type(one)) for one in (*_NEUTRAL, *also)
    )


def _unknown(model: BaseModel, prefix: str) -> Iterator[tuple[str, str, object, Iterable[str]]]:
    """(path, name, value, names known there) of fields that no schema has, nested ones included;
    not those of messages, which reach the chat template."""
    known = type(model).model_fields
    for name, value in (model.model_extra or {}).items():
        yield f"{prefix}{name[:_LONGEST]}", name, value, known
    for name in known:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _unknown(value, f"{prefix}{name}.")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name[:_LONGEST], list(known), n=1)
    return (
        f"; is {near[0]} meant?" if near else "; leave it out, or start the server with --lenient"
    )
