"""What a request to a path or with a method that is not served is told (pure).

Clients that were made for other servers ask for what those have: the answer names what is meant
and what there is instead, so that nobody has to guess from a bare 404.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from flexpert.server.http_errors import ApiError

# What programs are told by `code` when an endpoint of other servers is asked for.
NOT_SERVED = "not_served"

# beginning of a path, without a leading /v1 → what it is, and what to do instead
UNSERVED: Mapping[str, str] = {
    "/embeddings": "embeddings; use a server of embedding models",
    "/embed": "embeddings; use a server of embedding models",
    "/pooling": "pooling; use a server of embedding models",
    "/classify": "classification; use a server of embedding models",
    "/rerank": "reranking; use a server of reranking models",
    "/score": "scoring; use a server of reranking models, or logprobs of /v1/completions",
    "/audio": "audio; use a server of speech models",
    "/realtime": "audio; use a server of speech models",
    "/images": "images; use a server of image models",
    "/videos": "videos; use a server of video models",
    "/moderations": "moderation; ask the model itself, through /v1/chat/completions",
    "/files": "files; send what the model shall read in the messages of a request",
    "/uploads": "files; send what the model shall read in the messages of a request",
    "/batches": "batch jobs; send the requests themselves, they share the ranks' steps",
    "/fine_tuning": "fine-tuning; it serves checkpoints as they are",
    "/load_lora_adapter": "LoRA adapters; merge the adapter into the checkpoint and serve that",
    "/unload_lora_adapter": "LoRA adapters; merge the adapter into the checkpoint and serve that",
    "/assistants": "assistants; keep the conversation and send it to /v1/chat/completions",
    "/threads": "assistants; keep the conversation and send it to /v1/chat/completions",
    "/conversations": "conversations; keep them and send them to /v1/chat/completions",
    "/vector_stores": "vector stores; search elsewhere and send what was found in the messages",
    "/sleep": "sleep mode; 'flexpert scale' changes the number of ranks",
    "/wake_up": "sleep mode; 'flexpert scale' changes the number of ranks",
    "/reset_prefix_cache": "a reset of the prefix cache; it gives way where memory is needed",
    "/start_profile": "profiling",
    "/stop_profile": "profiling",
    "/collective_rpc": "calls of the ranks; the control API is under /cluster",
    "/invocations": "SageMaker's interface; use /v1/chat/completions or /v1/completions",
    "/api/chat": "Ollama's API; use /v1/chat/completions",
    "/api/generate": "Ollama's API; use /v1/completions",
    "/api/tags": "Ollama's API; use /v1/models",
    "/generate": "the API of TGI or SGLang; use /v1/completions",
    "/generate_stream": "TGI's API; use /v1/completions with stream",
    "/completion": "llama.cpp's own API; use /v1/completions",
    "/infill": "infilling; use /v1/completions",
}


def unknown_path(path: str, served: Sequence[str]) -> ApiError:
    """404 with what was probably meant. served: the paths that there are, templates as they are."""
    bare = _without_version(path)
    for start, what in UNSERVED.items():
        if path not in served and (bare == start or bare.startswith(start + "/")):
            return ApiError(404, f"flexpert does not serve {what}", code=NOT_SERVED)
    if f"/v1{bare}" in served:
        return ApiError(
            404,
            f"there is no {_shown(path)}; /v1{bare} is served: the base URL of a client ends "
            "with /v1, once, and paths have no slash at their end",
        )
    if bare in served:
        return ApiError(404, f"there is no {_shown(path)}; {bare} is served, without /v1")
    near = difflib.get_close_matches(path[:_LONGEST], served, n=1, cutoff=0.75)
    advice = f"did you mean {near[0]}?" if near else "GET /openapi.json describes what there is"
    return ApiError(404, f"there is no {_shown(path)}; {advice}")


def wrong_method(method: str, path: str, methods: Sequence[str]) -> ApiError:
    """405 with the methods that the path has."""
    return ApiError(
        405,
        f"{_shown(path)} is not asked with {_shown(method)}; use {' or '.join(methods)}",
        headers={"allow": ", ".join(methods)},
    )


def wrong_content_type(given: str | None) -> ApiError:
    """415. given: the header as it was sent, None without one."""
    has = "has no Content-Type" if given is None else f"has the Content-Type {_shown(given)!r}"
    return ApiError(
        415,
        f"the body must be JSON, and the request {has}; send the header "
        "'Content-Type: application/json' (curl: -H 'Content-Type: application/json')",
        code="unsupported_media_type",
    )


_LONGEST = 100  # characters of a client's that are repeated, or compared


def _without_version(path: str) -> str:
    """ "/v1/v1/models/" → "/models"."""
    bare = path.rstrip("/")
    while bare.startswith(("/v1/", "/v2/")):
        bare = bare[3:]
    return bare


def _shown(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
