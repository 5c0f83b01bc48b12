"""flexpert without HTTP: a head on a thread of its own behind ordinary calls."""

from __future__ import annotations

import asyncio
import concurrent.futures.thread
import importlib
import itertools
import queue
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from flexpert.cluster.processes.early_fork_server import EarlyForkServer
from flexpert.cluster.views import ClusterView, OperationView
from flexpert.config import Config, load_config
from flexpert.engine.output_grammar import resolve
from flexpert.engine.request import SamplingParams
from flexpert.errors import ConfigError, OperationError, RequestError, ServiceStopped
from flexpert.frontend.generation import Generation
from flexpert.frontend.outputs import Completion, encode_prompt, whole_completion
from flexpert.frontend.request_limits import Prompt, with_bad_tokens
from flexpert.frontend.text import ChatOptions
from flexpert.frontend.token_ids import token_text
from flexpert.vllm_flags import translated_argument

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

STOP_TIMEOUT_S = 10.0

Prompts = str | Sequence[Prompt]
Params = SamplingParams | Iterable[SamplingParams] | None


class LLM:
    """A model on elastic ranks, in this program.

        with LLM("tiny", ranks=2) as llm:
            for completion in llm.generate(["In the beginning", "And it came to pass"]):
                print(completion.text)
            llm.scale(4)

    All methods may be called from any thread, also at the same time: requests share the ranks'
    steps, and a change of ranks disturbs none of them.

    Args:
        model: "tiny" (embedded, the default), a directory, or a hub id.
        ranks: worker processes at the start.
        deterministic: the same bits whatever else runs and however the ranks change.
        max_ranks: how many ranks there may ever be.
        config: the base settings; default: those of the environment.
        settings: any other, by its name or path: `max_running=32`, `engine__max_running=32` or
            `**{"engine.max_running": 32}`; vLLM's names of settings are known as well.

    Raises:
        ConfigError, ModelError: it cannot be started so; nothing is left behind.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        ranks: int | None = None,
        deterministic: bool | None = None,
        max_ranks: int | None = None,
        config: Config | None = None,
        **settings: Any,
    ) -> None:
        self.config = settle(model, ranks, deterministic, max_ranks, config, settings)
        with EarlyForkServer(self.config) as fork_server:
            self._start(fork_server)

    def _start(self, fork_server: EarlyForkServer) -> None:
        from flexpert.cluster.head import Head

        self._head = Head(self.config, fork_server=fork_server)
        self._numbers = itertools.count(1)
        self._closing = threading.RLock()  # a signal's handler may close while we hold it
        self._closed = False
        self._loop = asyncio.new_event_loop()
        # a daemon, so that a program that forgets to close still comes to its exit hooks
        self._thread = threading.Thread(target=self._loop.run_forever, name="flexpert", daemon=True)
        self._thread.start()
        _open.add(self)
        try:
            started = self._begin_on_loop(self._head.start())
            import_tokenizers(self.config)
            _result(started)
            self._text = token_text(self._head.open_tokenizer())
        except BaseException:
            self.close()
            raise

    # ---- answers ----------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompts,
        params: Params = None,
        *,
        progress: bool = False,
        sampling_params: Params = None,
        use_tqdm: bool | None = None,
    ) -> list[Completion]:
        """Continue every prompt; answers in the prompts' order. All run at the same time.

        Args:
            prompts: a text, or a list of texts and lists of token ids.
            params: for all prompts, or one for each; default: `SamplingParams()`.
            progress: show a progress bar on standard error.
            sampling_params, use_tqdm: vLLM's names of `params` and `progress`.

        Raises:
            RequestError: one of them cannot be answered; then none is.
        """
        one = isinstance(prompts, str | bytes | bytearray | Mapping)
        asked: list[Any] = [prompts] if one or not isinstance(prompts, Iterable) else list(prompts)
        params = one_of_both(params, sampling_params)
        encoded = [encode_prompt(self._text, prompt) for prompt in asked]
        texts = [prompt if isinstance(prompt, str) else None for prompt in asked]
        progress = progress if use_tqdm is None else bool(use_tqdm)
        return self._generate(texts, encoded, params, progress=progress)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        params: Params = None,
        *,
        progress: bool = False,
        sampling_params: Params = None,
        use_tqdm: bool | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[Completion]:
        """Answer one conversation, or several: [{"role": "user", "content": "Hello"}].

        Args:
            params, progress, sampling_params, use_tqdm: as for `generate`.
            add_generation_prompt: the text ends where the assistant's turn begins.
            continue_final_message: the answer goes on with the last message; needs
                `add_generation_prompt=False`.
            chat_template: used instead of the model's.
            tools: descriptions of functions, as OpenAI has them, for the template.
            chat_template_kwargs: further variables of the template, as `enable_thinking`.

        Raises:
            RequestError: also if the model has no chat template.
        """
        options = ChatOptions(
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            tools=None if tools is None else list(tools),
            kwargs=chat_template_kwargs or {},
        )
        params = one_of_both(params, sampling_params)
        progress = progress if use_tqdm is None else bool(use_tqdm)
        single = bool(messages) and isinstance(messages[0], Mapping)
        talks: list[Any] = [messages] if single else list(messages)
        encoded = [self._text.chat(talk, options) for talk in talks]
        return self._generate([None] * len(talks), encoded, params, progress=progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one answer as it comes. Leaving the loop frees the request.

        Raises:
            RequestError: `params.n` is not 1, or as `generate`.
        """
        params = params_of_one(params, self._head.sampling_defaults)
        if params.n != 1:
            raise RequestError("n must be 1 to stream one text")
        return self._stream(encode_prompt(self._text, prompt), params)

    # ---- the cluster ------------------------------------------------------------------------

    def scale(
        self,
        ranks: int | None = None,
        *,
        add: int = 0,
        remove: Sequence[int] = (),
        wait: bool = True,
    ) -> OperationView:
        """Change the ranks while requests go on: to a number of them, or by who joins and leaves.

        Args:
            wait: return when it is done; else at once, see `cluster().operation`.

        Raises:
            OperationConflict, OperationRefused: at once.
            OperationError: it failed or was cancelled while we waited; the ranks are as before.
        """

        async def change() -> OperationView:
            operation = await self._head.request_operation(ranks=ranks, add=add, remove=remove)
            return await self._head.wait_operation(operation.id) if wait else operation

        return succeeded(self._call(change()))

    def cluster(self) -> ClusterView:
        """Epoch, ranks, placement, and the operation that runs."""

        async def look() -> ClusterView:
            return self._head.cluster()

        return self._call(look())

    # ---- life -------------------------------------------------------------------------------

    def close(self) -> None:
        """End the ranks; calls that still wait raise ServiceStopped. Idempotent."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        _open.discard(self)
        try:
            asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- inside -----------------------------------------------------------------------------

    async def _finish(self) -> None:
        await self._head.stop()
        # a start that Ctrl-C cut short is ending its ranks; cancelled again it would leave them
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            _, late = await asyncio.wait(others, timeout=STOP_TIMEOUT_S)
            for task in late:
                task.cancel()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the head's loop and wait; Ctrl-C while waiting cancels the work."""
        return _result(self._begin_on_loop(work))

    def _begin_on_loop(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        # what begins before `close` is ended by it; later the loop would never get to it
        with self._closing:
            if self._closed:
                work.close()
                raise ServiceStopped("this LLM is closed")
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _begin(self, prompt: list[int], params: SamplingParams) -> Generation:
        name = f"llm-{next(self._numbers)}"
        params = with_bad_tokens(params, self._text)
        return Generation(self._head, self._text, [prompt], params, request_id=name)

    def _generate(
        self,
        texts: list[str | None],
        prompts: list[list[int]],
        params: Params,
        *,
        progress: bool,
    ) -> list[Completion]:
        each = _spread(params, len(prompts), self._head.sampling_defaults)
        bar = _progress(len(prompts)) if progress else None

        async def one(text: str | None, prompt: list[int], generation: Generation) -> Completion:
            completion = await whole_completion(text, prompt, generation)
            if bar is not None:
                bar.advance(bar.task_ids[0])
            return completion

        async def all_of_them() -> list[Completion]:
            begun: list[Generation] = []
            try:
                for prompt, desired in zip(prompts, each, strict=True):
                    begun.append(self._begin(prompt, desired))
                    await begun[-1].submit()
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(one(text, prompt, generation))
                        for text, prompt, generation in zip(texts, prompts, begun, strict=True)
                    ]
                return [task.result() for task in tasks]
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from None
            finally:
                for generation in begun:
                    generation.cancel()

        if bar is None:
            return self._call(all_of_them())
        with bar:
            return self._call(all_of_them())

    def _stream(self, prompt: list[int], params: SamplingParams) -> Iterator[str]:
        arrived: queue.SimpleQueue[str | None] = queue.SimpleQueue()

        async def produce() -> None:
            try:
                with self._begin(prompt, params) as generation:
                    await generation.submit()
                    async with aclosing(generation.parts()) as arriving:
                        async for parts in arriving:
                            arrived.put("".join([part.text for part in parts]))
            finally:
                arrived.put(None)

        future = self._begin_on_loop(produce())
        try:
            while (text := arrived.get()) is not None:
                if text:
                    yield text
            future.result()
        finally:
            future.cancel()


def _result(future: concurrent.futures.Future[T]) -> T:
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def import_tokenizers(config: Config) -> None:
    """What opens a tokenizer, which takes about as long as the ranks take to start."""
    if not config.model.skip_tokenizer_init:
        with suppress(ImportError):  # it is said when the tokenizer is opened
            importlib.import_module("transformers").AutoTokenizer  # noqa: B018


def succeeded(operation: OperationView) -> OperationView:
    """The operation. Raises: OperationError: it failed, or was cancelled."""
    if operation.state in ("failed", "cancelled"):
        reason = operation.error or "no reason was given"
        raise OperationError(f"operation {operation.id} {operation.state}: {reason}")
    return operation


def _close_all() -> None:
    for llm in list(_open):
        llm.close()


_open: set[LLM] = set()
# Not atexit: that comes after the interpreter has closed its thread pools, and the head needs one
# to wait for its processes. Hooks run last first, so ours before the pools' own.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]


def _spread(params: Params, count: int, defaults: Mapping[str, Any]) -> list[SamplingParams]:
    """One for each prompt. defaults: the model's, where none are given."""
    if params is None or isinstance(params, SamplingParams):
        return [_resolved(params or SamplingParams(**defaults))] * count
    each = list(params)
    if not all(isinstance(one, SamplingParams) for one in each):
        raise RequestError("params are SamplingParams(…), or a list of them, one for each prompt")
    if len(each) != count:
        raise RequestError(f"{len(each)} params were given for {count} prompts")
    return [_resolved(one) for one in each]


def _resolved(params: SamplingParams) -> SamplingParams:
    """Its structure is checked here, in the caller's thread. Raises: RequestError"""
    if params.structured_outputs is None:
        return params
    params.check()
    structure = resolve(params.structured_outputs)
    return msgspec.structs.replace(params, structured_outputs=structure)


def params_of_one(params: SamplingParams | None, defaults: Mapping[str, Any]) -> SamplingParams:
    """Those of a single prompt; see `_spread`. Raises: RequestError: they are none."""
    return _spread(params, 1, defaults)[0]


def one_of_both(params: Params, sampling_params: Params) -> Params:
    """The same by our name and by vLLM's. Raises: RequestError: both are given."""
    if params is not None and sampling_params is not None:
        raise RequestError("params and sampling_params are the same; give one of them")
    return sampling_params if params is None else params


def settle(
    model: str | None,
    ranks: int | None,
    deterministic: bool | None,
    max_ranks: int | None,
    config: Config | None,
    settings: Mapping[str, Any],
) -> Config:
    """The settings of a service in a program, as `LLM` takes them. Raises: ConfigError"""
    given: dict[str, Any] = {}
    for name, value in settings.items():
        given |= _setting(name, value)
    named = {
        "model.model": model,
        "cluster.ranks": ranks,
        "cluster.max_ranks": max_ranks,
        "engine.deterministic": deterministic,
    }
    given |= {path: value for path, value in named.items() if value is not None}
    if given.get("server.otlp_traces_endpoint") is not None:
        raise ConfigError("otlp_traces_endpoint: 'flexpert serve' sends traces, a program does not")
    return _settle(config, given)


def _setting(name: str, value: object) -> dict[str, Any]:
    """A keyword argument as a setting: by its path, its name alone, or vLLM's.

    Raises: ConfigError
    """
    path = name.replace("__", ".")
    if "." in path:
        return {path: value}
    for section, tree in Config.model_fields.items():
        if path in getattr(tree.annotation, "model_fields", ()):
            return {f"{section}.{path}": value}
    try:
        found = translated_argument(name, value)
    except KeyError:
        return {path: value}  # `load_config` says that there is no such setting
    return {} if found is None else dict([found])


def _settle(config: Config | None, given: dict[str, Any]) -> Config:
    if config is None:
        return load_config(overrides=given)
    base = {
        f"{section}.{name}": value
        for section, values in config.model_dump().items()
        for name, value in values.items()
    }
    desired = {path: value for path, value in given.items() if value is not None}
    return load_config(environment={}, overrides=base | desired)


def _progress(total: int) -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True))
    bar.add_task("prompts", total=total)
    return bar
