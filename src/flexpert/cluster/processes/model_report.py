"""What a process that has opened the model tells the head of it: in a fork, which ends with it.

So whatever is asked for here, of the GPUs' driver or of a chat template, leaves nothing behind in
the process that all others are forks of.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from flexpert import errors
from flexpert.cluster.generation_defaults import sampling_defaults
from flexpert.cluster.processes.child_connection import Connection
from flexpert.cluster.processes.early_fork_server import for_children
from flexpert.cluster.processes.helper import ForkedHelper
from flexpert.cluster.processes.launcher import LocalLauncher
from flexpert.cluster.served_model import ServedModel
from flexpert.config import Config
from flexpert.errors import FlexpertError
from flexpert.models.token_tables import TokenTables, token_tables

if TYPE_CHECKING:
    from flexpert.models.source import ModelSource

ENTRY = f"{__name__}:report_main"


class ReportSpec(msgspec.Struct, frozen=True):
    """config: the settings tree as JSON. described: see `ServedModel.description`."""

    config: str
    described: bool


class ModelTold(msgspec.Struct, frozen=True, tag="model"):
    model: ServedModel


class TokensTold(msgspec.Struct, frozen=True, tag="tokens"):
    """tables: None: the settings leave the tokenizer out."""

    tables: TokenTables | None


class ReportFailed(msgspec.Struct, frozen=True, tag="failed"):
    """kind: name of a class of `flexpert.errors`."""

    kind: str
    error: str


Told = ModelTold | TokensTold | ReportFailed

_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.Decoder(Told).decode


@dataclass(frozen=True, slots=True)
class ModelReport:
    """model: there already. tables: come later; None: the settings leave the tokenizer out."""

    model: ServedModel
    tables: asyncio.Future[TokenTables | None]


async def ask_model(
    launcher: LocalLauncher, config: Config, timeout_s: float, *, described: bool = False
) -> ModelReport:
    """What the fork server's model is, by these settings.

    Raises:
        ModelError, ConfigError: it cannot be served so.
        FlexpertError: the process that was to tell it has ended, or takes longer than timeout_s.
    """
    loop = asyncio.get_running_loop()
    model: asyncio.Future[ServedModel] = loop.create_future()
    tables: asyncio.Future[TokenTables | None] = loop.create_future()

    def fail(error: FlexpertError) -> None:
        for future in (model, tables):
            if not future.done():
                future.set_exception(error)
        if model.exception() is not None:
            tables.exception()  # nobody waits for them

    def hear(message: bytes) -> None:
        told = _decode(message)
        if isinstance(told, ModelTold):
            model.set_result(told.model)
        elif isinstance(told, TokensTold):
            tables.set_result(told.tables)
        else:
            fail(getattr(errors, told.kind, FlexpertError)(told.error))

    def ended(why: str) -> None:
        if not (model.done() and tables.done()):
            fail(FlexpertError(f"the model could not be described: its process ended ({why})"))

    spec = _encode(ReportSpec(for_children(config), described))
    helper = ForkedHelper(launcher, ENTRY, spec, hear, ended)
    try:
        return ModelReport(await asyncio.wait_for(model, timeout_s), tables)
    except TimeoutError:
        raise FlexpertError(
            f"the model was not described within {timeout_s:.0f} s; raise cluster.start_timeout"
        ) from None
    finally:
        if not (model.done() and not model.cancelled() and model.exception() is None):
            helper.kill()


async def model_apart(config: Config, timeout_s: float) -> tuple[ServedModel, TokenTables | None]:
    """The same of a model that a fork server opens for this alone, and that ends with it.

    Raises: as `LocalLauncher.start` and `ask_model`.
    """
    none_of_these = {"state_dir": None, "takeover": False, "resume": False}
    cluster = config.cluster.model_copy(update=none_of_these)
    alone = config.model_copy(update={"cluster": cluster})
    launcher = LocalLauncher(lambda rank, status, why: None)
    try:
        await launcher.start(alone, timeout_s)
        report = await ask_model(launcher, config, timeout_s)
        return report.model, await report.tables
    finally:
        await launcher.close()


# ---- in the process that has opened it ------------------------------------------------------


def report_main(spec: bytes, end: socket.socket, source: ModelSource) -> int:
    """Tell the head of the model. spec: `ReportSpec`."""
    told = msgspec.msgpack.decode(spec, type=ReportSpec)
    config = Config.model_validate_json(told.config)
    connection = Connection(end)
    try:
        tokenizer: Any = None if config.model.skip_tokenizer_init else source.tokenizer()
        model = served_model(source, config, tokenizer, described=told.described)
        connection.send(_encode(ModelTold(model)))
        tables = None if tokenizer is None else token_tables(tokenizer)
        connection.send(_encode(TokensTold(tables)))
    except FlexpertError as error:
        connection.send(_encode(ReportFailed(type(error).__name__, str(error))))
    connection.close(_SEND_S)
    return 0


_SEND_S = 60.0


def served_model(
    source: ModelSource, config: Config, tokenizer: Any = None, *, described: bool = False
) -> ServedModel:
    """What a head knows of a model.

    tokenizer: the model's; None: the settings leave it out.

    Raises: FlexpertError: the settings do not fit it.
    """
    import torch

    from flexpert.cluster.end_tokens import with_end_tokens
    from flexpert.cluster.hosts.model_description import describe_model
    from flexpert.engine.device_memory_plan import device_memory_plan
    from flexpert.engine.device_profile import uses_gpu
    from flexpert.engine.memory_plan import host_memory_plan, kv_blocks, state_slots

    engine, capacity = config.engine, config.cluster.max_ranks
    info, shapes = with_end_tokens(source.info, tokenizer), source.expert_shapes()
    state_slots(info, engine)  # whether the device computes such layers at all
    return ServedModel(
        path=str(source.path),
        trusted=source.trusted,
        name=info.name,
        vocab=info.vocab,
        max_model_len=info.max_model_len,
        eos_token_ids=info.eos_token_ids,
        experts=info.experts,
        moe_layers=info.moe_layers,
        largest_expert=max(shape.nbytes for shape in shapes),
        all_experts=sum(shape.nbytes for shape in shapes) * info.experts,
        kv_blocks=kv_blocks(info, engine),
        host=host_memory_plan(source, engine, capacity),
        device=device_memory_plan(source, engine, capacity) if engine.device == "cuda" else None,
        gpus=torch.cuda.device_count() if uses_gpu(engine) else None,
        sampling_defaults=sampling_defaults(source.path, config.model.generation_config),
        description=describe_model(source) if described else {},
    )
