"""flexpert without HTTP inside an asyncio program: a head on the caller's own loop."""

from __future__ import annotations

import asyncio
import importlib
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any

from flexpert.cluster.processes.early_fork_server import EarlyForkServer
from flexpert.cluster.views import ClusterView, OperationView
from flexpert.config import Config
from flexpert.engine.request import SamplingParams
from flexpert.errors import FlexpertError, RequestError, ServiceStopped
from flexpert.frontend.generation import Generation
from flexpert.frontend.outputs import Completion, GrowingCompletion, encode_prompt
from flexpert.frontend.request_limits import Prompt, with_bad_tokens
from flexpert.frontend.text import ChatOptions
from flexpert.frontend.token_ids import token_text
from flexpert.llm import import_tokenizers, one_of_both, params_of_one, settle, succeeded

if TYPE_CHECKING:
    from flexpert.cluster.head import Head


class AsyncLLM:
    """A model on elastic ranks, on the event loop of this program.

        async with AsyncLLM("tiny", ranks=2) as llm:
            async for completion in llm.generate("In the beginning"):
                print(completion.text)
            await llm.scale(4)

    It is started by entering it, or by `start`, and belongs to the loop that did so. Arguments as
    for `LLM`; nothing but the settings is read before the start.

    Raises:
        ConfigError: a setting is wrong.
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
        self._running: dict[str, Generation] = {}
        self._aborted: set[str] = set()
        self._numbers = itertools.count(1)
        self._head: Head | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    # ---- life -------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bring the ranks up; returns when requests are answered.

        Raises:
            ConfigError, ModelError, FlexpertError: it cannot be started; nothing is left behind.
        """
        if self._loop is not None:
            raise FlexpertError("this AsyncLLM was started already; make another one")
        self._loop = asyncio.get_running_loop()
        # on this thread: the system ends the fork server with the thread that has started it
        with EarlyForkServer(self.config) as fork_server:
            # the loop has other things to do meanwhile
            module = await asyncio.to_thread(importlib.import_module, "flexpert.cluster.head")
            head: Head = module.Head(self.config, fork_server=fork_server)
            try:
                imports = asyncio.to_thread(import_tokenizers, self.config)
                await asyncio.gather(head.start(), imports)
                tokenizer = await asyncio.to_thread(head.open_tokenizer)
                self._text = await asyncio.to_thread(token_text, tokenizer)
            except BaseException:
                await head.stop()
                raise
        self._head = head

    async def close(self) -> None:
        """End the ranks; requests that still run raise ServiceStopped. Idempotent."""
        self._closed = True
        head = self._head
        if head is not None:
            self._check_loop()
            await head.stop()

    async def __aenter__(self) -> AsyncLLM:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # ---- answers ----------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        sampling_params: SamplingParams | None = None,
    ) -> AsyncGenerator[Completion, None]:
        """Continue one prompt: the completion again and again, each time with all that has come.

        The last one is `finished`. Closing the generator, or cancelling the task that reads it,
        frees the request; who leaves the loop early uses `contextlib.aclosing`, or `abort`.

        Args:
            prompt: a text, or token ids.
            request_id: for `abort` and logs; default: a number.
            sampling_params: vLLM's name of `params`.

        Raises:
            RequestError: it cannot be answered, or another request of that name runs.
        """
        self._ready()
        ids = encode_prompt(self._text, prompt)
        text = prompt if isinstance(prompt, str) else None
        completions = self._answer(text, ids, params, sampling_params, request_id)
        async with aclosing(completions) as arriving:
            async for completion in arriving:
                yield completion

    async def chat(
        self,
        messages: Sequence[dict[str, Any]],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        sampling_params: SamplingParams | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> AsyncGenerator[Completion, None]:
        """Answer one conversation; otherwise as `generate`, the template's options as `LLM.chat`.

        Raises:
            RequestError: also if the model has no chat template.
        """
        self._ready()
        options = ChatOptions(
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            tools=None if tools is None else list(tools),
            kwargs=chat_template_kwargs or {},
        )
        ids = self._text.chat(messages, options)
        completions = self._answer(None, ids, params, sampling_params, request_id)
        async with aclosing(completions) as arriving:
            async for completion in arriving:
                yield completion

    async def abort(self, request_id: str) -> None:
        """End a request: its last completion has the finish reason "abort". Unknown ones pass."""
        self._ready()
        generation = self._running.get(request_id)
        if generation is not None:
            self._aborted.add(request_id)
            generation.cancel()

    # ---- the cluster ------------------------------------------------------------------------

    async def scale(
        self,
        ranks: int | None = None,
        *,
        add: int = 0,
        remove: Sequence[int] = (),
        wait: bool = True,
    ) -> OperationView:
        """Change the ranks while requests go on; as `LLM.scale`.

        Raises:
            OperationConflict, OperationRefused: at once.
            OperationError: it failed or was cancelled while we waited; the ranks are as before.
        """
        head = self._ready()
        operation = head.begin_operation(ranks=ranks, add=add, remove=remove)
        return succeeded(await head.wait_operation(operation.id) if wait else operation)

    def cluster(self) -> ClusterView:
        """Epoch, ranks, placement, and the operation that runs."""
        return self._ready().cluster()

    # ---- inside -----------------------------------------------------------------------------

    def _ready(self) -> Head:
        """Raises: ServiceStopped, FlexpertError: it is not running, or not on this loop."""
        if self._closed:
            raise ServiceStopped("this AsyncLLM is closed")
        if self._head is None:
            raise FlexpertError(
                "this AsyncLLM is not started: use 'async with AsyncLLM(…)', or await start()"
            )
        self._check_loop()
        return self._head

    def _check_loop(self) -> None:
        """Raises: FlexpertError"""
        if asyncio.get_running_loop() is not self._loop:
            raise FlexpertError("this AsyncLLM belongs to the event loop that has started it")

    async def _answer(
        self,
        text: str | None,
        prompt: list[int],
        params: SamplingParams | None,
        sampling_params: SamplingParams | None,
        request_id: str | None,
    ) -> AsyncGenerator[Completion, None]:
        one_of_both(params, sampling_params)
        head = self._ready()
        resolved = params_of_one(params or sampling_params, head.sampling_defaults)
        name = request_id or f"llm-{next(self._numbers)}"
        if name in self._running:
            raise RequestError(f"a request of the name {name!r} is running", "request_id")
        resolved = with_bad_tokens(resolved, self._text)
        generation = Generation(head, self._text, [prompt], resolved, request_id=name)
        self._running[name] = generation
        try:
            with generation:
                await generation.submit()
                growing = GrowingCompletion(text, prompt, generation)
                async with aclosing(generation.parts()) as arriving:
                    try:
                        async for parts in arriving:
                            growing.add(parts)
                            yield growing.completion()
                    except ServiceStopped:
                        if name not in self._aborted:
                            raise
                        growing.abort()
                        yield growing.completion()
        finally:
            del self._running[name]
            self._aborted.discard(name)
