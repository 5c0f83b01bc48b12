"""What the fork server of a service does before it forks anybody: it opens the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from flexpert import heap, library_pages
from flexpert.cluster.processes.lean_imports import trim_conversions, trim_imports
from flexpert.config import Config
from flexpert.device_settings import DEVICE_SETTINGS
from flexpert.errors import ConfigError, FlexpertError

if TYPE_CHECKING:
    from flexpert.models.source import ExpertFormat, ModelSource

_EXPERTS: Final[Mapping[str, ExpertFormat]] = {
    "none": "unquantized",
    "auto": "stored",
    "fp8": "fp8",
    "mxfp4": "mxfp4",
    "int8": "int8",
    "int4": "int4",
}


def import_all() -> None:
    """All that needs no settings: also what its children run, which they would import each."""
    trim_imports()
    import flexpert.cluster.processes.model_report
    import flexpert.cluster.processes.rank_process
    import flexpert.comm.host.host_buffer  # noqa: F401

    trim_conversions()


def open_model(config_json: bytes) -> ModelSource:
    """The model of a settings tree given as JSON: what the fork server has for every child.

    Raises:
        ConfigError: the machine has no such device.
        ModelError: it cannot be opened or served.
        FlexpertError: opening it has opened a GPU.
    """
    import_all()
    import torch

    from flexpert.comm.cuda.driver_state import driver_is_open
    from flexpert.engine.device_profile import check_device

    config = Config.model_validate_json(config_json)
    if config.engine.device == "cuda":
        _in_fork(lambda: check_device(config.engine))
    else:
        check_device(config.engine)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is tried computes; a fork would wait for the others for ever
    try:
        source = open_source(config)
        source.hold_files()
        source.try_grammar_tokens()  # a rank would hold up its step loop to make its own
        source.try_extents()
    finally:
        torch.set_num_threads(threads)
    os.register_at_fork(after_in_child=_renew_thread_pool)
    if driver_is_open():
        raise FlexpertError(
            "opening the model has opened the GPU's driver in the process that ranks are forked "
            "from, where they could not use it; please report this with the model's config.json"
        )
    heap.trim()
    library_pages.give_back()
    return source


def open_source(config: Config) -> ModelSource:
    """The model that a settings tree names.

    Raises:
        ModelError: it cannot be opened or served.
    """
    from flexpert.models.source import ModelSource

    speculate = config.engine.speculate
    quantization = DEVICE_SETTINGS[config.engine.device].quantization(config.model.quantization)
    return ModelSource.open(
        config.model.model,
        revision=config.model.revision,
        dtype=config.model.dtype,
        max_model_len=config.model.max_model_len,
        experts=_EXPERTS[quantization],
        trust_remote_code=config.model.trust_remote_code,
        latent_cache=not config.engine.deterministic,
        drafts=speculate is not None and speculate.method == "mtp",
    )


def _renew_thread_pool() -> None:
    """The first operation after a fork does so, and others at the same time would fail
    (findings/torch_first_threads_after_fork.sh)."""
    import torch

    torch.set_num_threads(torch.get_num_threads())


def _in_fork(check: Callable[[], None]) -> None:
    """Check in a process that ends with it: one that has asked CUDA cannot be forked any more.

    Raises: ConfigError
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            check()
            status = 0
        except ConfigError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as told:
        refusal = told.read().decode()
    _, status = os.waitpid(pid, 0)
    if status:
        how = os.waitstatus_to_exitcode(status)
        raise ConfigError(refusal or f"the device could not be looked at (exit status {how})")
