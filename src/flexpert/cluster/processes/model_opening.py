"""What the fork server of a service does before it forks anybody: it opens the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexpert.cluster.processes.lean_imports import trim_imports

if TYPE_CHECKING:
    from flexpert.models.source import ModelSource

SETUP = f"{__name__}:open_model"


def open_model(config_json: bytes) -> ModelSource:
    """The model of a settings tree given as JSON: what the fork server has for every child.

    Raises:
        ModelError: it cannot be opened or served.
    """
    trim_imports()
    import torch

    from flexpert.cluster.processes.rank_process import open_source
    from flexpert.config import Config

    source = open_source(Config.model_validate_json(config_json))
    source.try_grammar_tokens()  # a rank would hold up its step loop to make its own
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork would wait for the others for ever
    try:
        source.try_extents()
    finally:
        torch.set_num_threads(threads)
    return source
