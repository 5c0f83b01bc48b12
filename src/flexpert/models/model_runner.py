"""The dense part of a model in this process: everything but the experts, and the KV cache.

On a CPU batches are padded to few sizes; on a GPU steps are replays of captured graphs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexpert.errors import ModelError, UnsupportedModel
from flexpert.kernels.device_stream import stream_of
from flexpert.kernels.experts import Gate
from flexpert.kernels.kernel_set import Kernels, cpu_kernels
from flexpert.kernels.state_steps import StateRows
from flexpert.kernels.step_upload import StepUpload
from flexpert.models import recorded_steps, recording, registrations
from flexpert.models.batch import ForwardBatch, decode_slots, rows_and_starts
from flexpert.models.dense_weights import load_dense, replace_tensor
from flexpert.models.deterministic import RowwiseMode
from flexpert.models.device_drafts import DeviceDrafts, DraftGraphs, Proposals
from flexpert.models.device_indexers import DeviceIndexedAttention, DeviceIndexer
from flexpert.models.device_latents import DeviceLatentAttention
from flexpert.models.draft_layer import NAME as DRAFTS
from flexpert.models.draft_layer import draft_layer
from flexpert.models.draft_steps import DraftSteps
from flexpert.models.fixed_order import FixedOrderMode, check_fixed_order
from flexpert.models.fused import fuse
from flexpert.models.fused_layers import fuse_layers
from flexpert.models.fused_modules import fuse_modules
from flexpert.models.fusion_verdicts import FusionVerdicts
from flexpert.models.gate_programs import gate_programs
from flexpert.models.indexed_attention import (
    BoundIndexer,
    IndexedAttention,
    Indexer,
    bind_indexers,
)
from flexpert.models.kv_cache import KVCache
from flexpert.models.latent_attention import LatentAttention, kept_latent
from flexpert.models.padding import exact_batch, pad_batch, pad_rows
from flexpert.models.paged_attention import PagedAttention
from flexpert.models.position_cache import PositionCache, give_positions
from flexpert.models.recorded_steps import Experts, IdleStep, RecordedSteps, Walk, in_python
from flexpert.models.source import ModelInfo, ModelSource
from flexpert.models.state_layers import StateLayer, bind_states
from flexpert.models.step_graphs import GraphShape, StepGraphs
from flexpert.moe.moe_layers import MoELayers, NativeMoELayers

CPU = torch.device("cpu")


class RoutedExperts:
    """One MoE layer's experts module, bound to the runtime."""

    __slots__ = ("apply_gate", "compute", "drafts", "layer", "rows", "runtime", "topk")

    def __init__(
        self, layer: int, module: Any, runtime: MoELayers, topk: int, *, drafts: bool = False
    ) -> None:
        self.layer = layer
        self.drafts = drafts  # of the draft layer
        self.runtime = runtime
        self.topk = topk
        self.compute: Experts = runtime.forward
        self.rows = 0  # of the batch; what comes after is padding
        self.apply_gate: Gate = module._apply_gate if module.has_gate else module.act_fn

    def experts(self, module: nn.Module, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        rows = self.rows
        given = x[:rows].contiguous(), expert_ids[:rows].contiguous(), weights[:rows].contiguous()
        if (noting := recording.current()) is not None:
            y = noting.experts(self.layer, *given, self.apply_gate)
        else:
            y = self.compute(self.layer, *given, self.apply_gate)
        return pad_rows(y, x.shape[0])


class ModelRunner:
    """The dense part of a model, ready to compute batches; made by `load`, used by one thread.

    kv: the cache that attention reads and writes. verdicts: which of its modules our kernels
    compute, for the next `load` of the same model on the same kind of device. recorded: computes
    steps on a CPU; None: that was not possible, as `not_recorded` says. sampled: [most] int64 on
    the device, where a sampler leaves the tokens of a step for the batches after it. left: int64,
    what is there of the step before when a batch is computed: `sampled`, or with `device_drafts`
    what these leave. drafts: its draft layer, where the host says what it computes; None: it has
    none. device_drafts: the same where the host does not wait to know.
    """

    info: ModelInfo

    def __init__(
        self,
        info: ModelInfo,
        model: PreTrainedModel,
        attention: list[PagedAttention],
        indexers: Sequence[BoundIndexer],
        experts: list[RoutedExperts],
        states: list[StateLayer],
        positions: PositionCache | None,
        kv: KVCache,
        *,
        deterministic: bool,
        moe: MoELayers,
        kernels: Kernels,
        verdicts: FusionVerdicts,
        most_samples: int,
        most_tokens: int,
        most_proposed: int,
    ) -> None:
        self.info = info
        self.kv = kv
        self.verdicts = verdicts
        self.graphs: StepGraphs | None = None
        self.recorded: RecordedSteps | None = None
        self.not_recorded = ""
        self._recorded_rows: int | None = 0
        self._idle: IdleStep | None = None
        self._model = model
        self._attention = attention
        self._indexers = indexers
        self._experts = experts
        own = sum(not routed.drafts for routed in experts)
        self._of_drafts = range(own, len(experts))  # behind all others
        self._states = states
        self._positions = positions
        self._deterministic = deterministic
        self._moe = moe
        self._fixed_order = kernels.fixed_order
        self._native = moe.native if isinstance(moe, NativeMoELayers) else in_python
        self._pads_batches = kernels.pads_batches and not deterministic
        self._device = next(model.parameters()).device
        self._upload: StepUpload | None = None  # a CPU needs none
        if self._device.type != "cpu":
            self._upload = StepUpload(stream_of(self._device))
        self.sampled = torch.zeros(most_samples, dtype=torch.int64, device=self._device)
        self.drafts: DraftSteps | None = None
        self.device_drafts: DeviceDrafts | None = None
        self._draft_graphs: DraftGraphs | None = None
        self._on_device: ForwardBatch | None = None  # of the step that was computed without a graph
        if draft_layer(model) is not None and not most_proposed:
            self.drafts = DraftSteps(model, info, kv.slots_of(-1), most_tokens)
        elif draft_layer(model) is not None:
            blocks, size = kv.layers[0][0].shape[:2]
            self.device_drafts = DeviceDrafts(
                model,
                info,
                self.sampled,
                kv.slots_of(-1),
                most_tokens=most_tokens,
                most_sequences=most_samples,
                most_proposed=most_proposed,
                block_size=size,
                most_blocks=min(blocks, -(-info.max_model_len // size)),
                stream=stream_of(self._device),
            )
        self.left = self.sampled if self.device_drafts is None else self.device_drafts.left
        self._slices_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @classmethod
    def load(
        cls,
        source: ModelSource,
        *,
        moe: MoELayers,
        kv_blocks: int,
        kv_block_size: int,
        deterministic: bool,
        state_slots: int = 0,
        kv_memory: Tensor | None = None,
        device: torch.device = CPU,
        kernels: Kernels | None = None,
        verdicts: FusionVerdicts = MappingProxyType({}),
        most_samples: int = 1,
        most_tokens: int = 256,
        most_proposed: int = 0,
        lap: Callable[[str], None] = lambda part: None,
    ) -> ModelRunner:
        """Read the dense weights and reserve the KV cache (its pages are touched on use).

        Args:
            state_slots: see `KVCache`.
            kv_memory: [`KVCache.nbytes`] uint8 for the cache, on `device`; default: memory of its
                own.
            device: of weights and batches.
            kernels: for `device`; default: a CPU's. A GPU's that are to be deterministic are those
                of `fixed_order_gpu_kernels`.
            verdicts: of an earlier load; modules without one are tried.
            most_samples: size of `sampled`.
            most_tokens: of a step, where the model has a draft layer. most_proposed: by it, for a
                sequence, where the device goes on without the host; 0: it does not.
            lap: told when a part of it is over.

        Raises:
            ModelError: a tensor of the checkpoint cannot be read or has another shape.
            UnsupportedModel: the model computes something at its start that we cannot repeat, or
                something in an order that depends on the batch, though it is to be deterministic.
        """
        source.checkpoint.files.check_unchanged()
        model = source.build(attention=registrations.IMPLEMENTATION)
        for name in source.experts_names:
            model.get_submodule(name)._parameters.clear()
        with torch.no_grad():
            compute_buffers(model)
            keep_frequencies(model)
            lap("skeleton")
            load_dense(model, source, stream_of(device) if device.type == "cuda" else None)
        _check_real(model)
        lap("dense weights")
        runner = cls.assemble(
            model.to(device),
            source.info,
            attention_names=source.attention_names,
            experts_names=source.experts_names,
            state_names=source.state_names,
            moe=moe,
            kv_blocks=kv_blocks,
            kv_block_size=kv_block_size,
            state_slots=state_slots,
            deterministic=deterministic,
            kv_memory=kv_memory,
            kernels=kernels or cpu_kernels(),
            verdicts=verdicts,
            most_samples=most_samples,
            most_tokens=most_tokens,
            most_proposed=most_proposed,
        )
        if kernels is None or kernels.recorded_rows:
            heights = [shape.height for shape in source.expert_shapes()]
            runner.record((kernels or cpu_kernels()).recorded_rows, heights)
        if deterministic and kernels is not None and kernels.fixed_order is not None:
            runner._check_fixed_order()
        lap("kernels by verdicts" if runner.verdicts == verdicts else "kernels by trials")
        return runner

    @classmethod
    def assemble(
        cls,
        model: PreTrainedModel,
        info: ModelInfo,
        *,
        attention_names: Sequence[str],
        experts_names: Sequence[str],
        state_names: Sequence[str] = (),
        moe: MoELayers,
        kv_blocks: int,
        kv_block_size: int,
        state_slots: int = 0,
        kernels: Kernels,
        deterministic: bool = False,
        kv_memory: Tensor | None = None,
        verdicts: FusionVerdicts = MappingProxyType({}),
        most_samples: int = 1,
        most_tokens: int = 256,
        most_proposed: int = 0,
    ) -> ModelRunner:
        """Bind a model that has its dense weights to a KV cache on the same device, and to `moe`.

        Args:
            model: built with `registrations.IMPLEMENTATION`, on one device.
            attention_names, experts_names, state_names: its modules of each kind, in the order of
                the forward.
            state_slots, verdicts, most_samples, most_tokens, most_proposed: see `load`.
        """
        device = next(model.parameters()).device
        if kv_memory is None:
            size = KVCache.nbytes(info, kv_blocks, kv_block_size, state_slots)
            kv_memory = torch.empty(size, dtype=torch.uint8, device=device)
        kv = KVCache(info, kv_blocks, kv_block_size, kv_memory, state_slots)
        wrap, indexers = _indexers_of(model, info, attention_names, kv, kernels, deterministic)
        attention = []
        for name, shape, (keys, values) in zip(
            attention_names, info.attention, kv.layers, strict=True
        ):
            module = model.get_submodule(name)
            layer = _attention_of(module, keys, values, kernels, deterministic)
            layer.chunk = shape.chunk
            if shape.indexed:
                layer = wrap(layer)
            registrations.bind(module, layer)
            attention.append(layer)
        experts = []
        for index, name in enumerate(experts_names):
            module = model.get_submodule(name)
            drafts = name.startswith(f"{DRAFTS}.")
            routed = RoutedExperts(index, module, moe, info.topk, drafts=drafts)
            registrations.bind(module, routed)
            experts.append(routed)
        with torch.inference_mode():
            found = dict(fuse(model, kernels, deterministic=deterministic, known=verdicts))
            if kernels.fusions is not None:
                found.update(fuse_modules(model, kernels.fusions, verdicts))
                found.update(fuse_layers(model, kernels.fusions, verdicts))
            states = bind_states(
                model,
                info,
                state_names,
                kv,
                deterministic=deterministic,
                pads_rows=kernels.pads_batches and not deterministic,
                kernels=kernels.states,
            )
        return cls(
            info,
            model,
            attention,
            indexers,
            experts,
            states,
            give_positions([model.get_submodule(name) for name in attention_names]),
            kv,
            deterministic=deterministic,
            moe=moe,
            kernels=kernels,
            verdicts=found,
            most_samples=most_samples,
            most_tokens=most_tokens,
            most_proposed=most_proposed,
        )

    def capture(self, shapes: Sequence[GraphShape], max_blocks: int) -> None:
        """From now on, compute steps on a GPU as replays of graphs captured here.

        Args:
            shapes: of batches; a batch is padded to the next one. See `StepGraphs`. Where the host
                cuts prompts, for attention or for layers with states, only those that decode.
            max_blocks: KV blocks of the longest sequence.
        """
        if self._states or any(layer.cuts_prompts for layer in self._attention):
            shapes = [shape for shape in shapes if shape.decodes]
        drafts = self.device_drafts
        with torch.inference_mode(), self._mode():
            self.graphs = StepGraphs(
                self._walk,
                shapes=shapes,
                max_blocks=max_blocks,
                device=self._device,
                states=bool(self._states),
                after=() if drafts is None else (self._first_draft, self._leave_out),
            )
        if drafts is not None:
            sizes = sorted({shape.sequences for shape in shapes if shape.decodes})
            with torch.inference_mode():
                self._draft_graphs = self._capture_drafts(self.graphs, drafts, sizes)

    def _capture_drafts(
        self, graphs: StepGraphs, drafts: DeviceDrafts, sizes: Sequence[int]
    ) -> DraftGraphs:
        """The largest first, into whose memory the others fit."""
        heads, agains = [], []
        for size in reversed(sizes):
            batch = drafts.further(size)
            drafts.begin()
            heads.append(graphs.also(functools.partial(drafts.head, size)))
            if drafts.width > 2:
                agains.append(graphs.also(functools.partial(self._further_draft, batch)))
        return DraftGraphs(sizes, heads[::-1], agains[::-1])

    def _first_draft(self, batch: ForwardBatch) -> Tensor:
        assert self.device_drafts is not None
        self._bind(batch)
        return self.device_drafts.first(batch)

    def _leave_out(self, batch: ForwardBatch) -> Tensor:
        assert self.device_drafts is not None
        return self.device_drafts.leave_out(batch)

    def _further_draft(self, batch: ForwardBatch) -> Tensor:
        assert self.device_drafts is not None
        self._bind(batch)
        return self.device_drafts.again(batch)

    def record(self, most_rows: int, heights: Sequence[int]) -> None:
        """Compute steps on a CPU without transformers' modules from now on, if that can be; else
        `not_recorded` says why not. What stands between the products of the experts, too.

        Args:
            most_rows: of a step, where rows need not have the same bits in any company.
            heights: of each MoE layer's experts, see `ExpertShape`.
        """
        asked = [experts.apply_gate for experts in self._experts]
        programs = gate_programs(asked, heights, self.info.dtype)
        for experts, program in zip(self._experts, programs, strict=True):
            experts.apply_gate = program or experts.apply_gate
        gates = [program for program in programs if program is not None]
        if len(gates) == len(programs):
            self._idle = IdleStep(self.info.dtype, self.info.topk, gates)
        try:
            with torch.inference_mode(False), torch.no_grad():
                self.recorded = self._record(self._trial_walk)
                if self.drafts is not None:
                    self.drafts.recorded = self._record_drafts(self.drafts)
        except (UnsupportedModel, RuntimeError, TypeError, ValueError) as error:
            self.not_recorded = str(error).partition("\n")[0]
        self._recorded_rows = None if self._deterministic else most_rows

    def _record_drafts(self, drafts: DraftSteps) -> RecordedSteps:
        generator = torch.Generator().manual_seed(0)
        drafts.states.copy_(torch.randn(drafts.states.shape, generator=generator))
        try:
            return self._record(self._trial_draft, drafts.states)
        finally:
            drafts.states.zero_()

    def _record(self, walk: Walk, *given: Tensor) -> RecordedSteps:
        """Raises: UnsupportedModel: it is not possible, and why."""
        size = self.kv.layers[0][0].shape[1]
        steps = RecordedSteps(recorded_steps.record(walk, size, given))
        if self._deterministic and (left := recorded_steps.rounds_by_torch(steps)):
            raise UnsupportedModel(f"--deterministic has no kernel for {', '.join(left)}")
        batch = recorded_steps.trial_batch(7, 4, size, stride=3)
        with self.stand_in_experts():
            expected = walk(batch)[0]
        self._bind(batch)
        rounding = min(0.05, 2**13 * torch.finfo(self.info.dtype).eps)
        recorded_steps.check(steps, batch, expected, recording.stand_in_experts, rounding=rounding)
        return steps

    def _trial_walk(self, batch: ForwardBatch) -> tuple[Tensor, ...]:
        logits = self._walk(batch, padded=False)
        heard = None if self.drafts is None else self.drafts.heard
        return (logits,) if heard is None else (logits, heard)

    def _trial_draft(self, batch: ForwardBatch) -> tuple[Tensor, ...]:
        assert self.drafts is not None
        logits = self._walk_draft(batch, padded=False)
        assert self.drafts.found is not None
        return logits, self.drafts.found

    def _check_fixed_order(self) -> None:
        """Raises: UnsupportedModel: a module computes in an order that depends on the batch."""
        batch = recorded_steps.trial_batch(7, 4, self.kv.layers[0][0].shape[1], stride=3)
        if self._upload is not None:
            batch = batch.sent(self._upload)

        def walk() -> None:
            with torch.inference_mode(), self._mode():
                self._walk(batch)

        with self.stand_in_experts():
            check_fixed_order(self._model, walk)

    @contextlib.contextmanager
    def stand_in_experts(self) -> Iterator[None]:
        """Within it no expert is needed: what is computed in their place is cheap, and wrong. Steps
        that are recorded with their experts are not changed by it."""
        for experts in self._experts:
            experts.compute = recording.stand_in_experts
        try:
            yield
        finally:
            for experts in self._experts:
                experts.compute = experts.runtime.forward

    def forward(self, batch: ForwardBatch, mean_tokens: int = 0) -> Tensor:
        """[M, vocab] logits of `batch.sample_rows`; walks all MoE layers once, in order, but for
        the draft layer's.

        On a CPU they are float32. On a GPU they are as the model computes them, nothing waits for
        the device, and they are valid until what is launched by the next call.

        Args:
            batch: on the host.
            mean_tokens: of the ranks that take part in this step; 0: nobody said.
        """
        with torch.inference_mode(), self._mode():
            self._moe.expect(batch.token_ids.shape[0], mean_tokens)
            self._on_device = None
            if self.graphs is not None:
                logits = self.graphs.forward(batch, mean_tokens)
                if logits is not None:
                    return logits
            rows = batch.token_ids.shape[0]
            if self.recorded is not None and self._takes(rows):
                self._bind(batch)
                tokens = self._tokens(batch, batch.token_ids)
                logits = self.recorded.forward(
                    batch if tokens is batch.token_ids else replace(batch, token_ids=tokens),
                    self._moe.forward,
                    self._native,
                )
                if self.drafts is not None:
                    self.drafts.keep(self.recorded.beside[0], rows)
                return logits
            self._on_device = batch if self._upload is None else batch.sent(self._upload)
            logits = self._walk(self._on_device)
            if self.drafts is not None:
                self.drafts.keep(self.drafts.heard, rows)
            return logits

    def draft(self, batch: ForwardBatch, behind: Tensor | None = None) -> Tensor:
        """[M, vocab] float32 logits of the token after the next one, of a model with `drafts`.

        Behind a `forward`, as often as all ranks agree on: it walks what `forward` does not of the
        MoE layers. A second time and further it is applied to what it has given.

        Args:
            batch: that of `forward`, but for the tokens: those after its own; and for the rows that
                are wanted. Behind another call one token of each sequence.
            behind: [N] int64, the rows of the call before that these go on from; None: it was a
                `forward`.
        """
        drafts = self.drafts
        assert drafts is not None
        with torch.inference_mode(), self._mode():
            rows = batch.token_ids.shape[0]
            self._moe.expect(rows)
            if behind is not None:
                if not rows:
                    self._idle_drafts(1)
                    return torch.empty((0, self.info.vocab))
                drafts.go_on(behind)
            if drafts.recorded is not None and self._takes(rows):
                self._bind(batch)
                logits = drafts.recorded.forward(batch, self._moe.forward, self._native)
                (drafts.found,) = drafts.recorded.beside
                return logits
            return self._walk_draft(batch)

    def leave_out_drafts(self, slots: Tensor) -> None:
        """In the place of `draft`, where ranks agree that the draft layer is not computed: of these
        tokens it will find keys and values of 0. slots: [N] int64, where they would have gone."""
        assert self.drafts is not None
        with torch.inference_mode():
            self.drafts.leave_out(slots)

    def propose(self, asked: Sequence[int], times: int) -> Proposals:
        """Behind a `forward` and the sampling of its tokens, of a model with `device_drafts`: what
        it proposes to follow them. Nothing waits for the device. All ranks walk the same exchanges.

        Args:
            asked: how many tokens each sequence is to be proposed, as in the batch.
            times: how often the layer is applied, on all ranks; 0: see `leave_out_drafts`.
        """
        drafts, sequences = self.device_drafts, len(asked)
        assert drafts is not None
        with torch.inference_mode():
            if self._on_device is not None:
                (self._first_draft if times else self._leave_out)(self._on_device)
            else:
                assert self.graphs is not None
                self.graphs.replay_after(0 if times else 1)
            most = max(asked, default=0)
            graphs = self._draft_graphs
            at = None if graphs is None else graphs.at(sequences)
            for place in range(times):
                if place:
                    self._apply_again(sequences if most > place else 0, sequences)
                if most <= place:
                    continue
                if graphs is None or at is None:
                    drafts.head(sequences)
                else:
                    graphs.heads[at]()
            return drafts.read(asked)

    def _apply_again(self, count: int, sequences: int) -> None:
        """count: rows of `sequences` that count."""
        assert self.device_drafts is not None
        self._moe.expect(count)
        at = None if self._draft_graphs is None else self._draft_graphs.at(sequences)
        if self._draft_graphs is not None and at is not None:
            self._draft_graphs.agains[at]()
        elif count:
            self._further_draft(self.device_drafts.further(sequences))
        else:
            self._idle_drafts(1)

    def _bind(self, batch: ForwardBatch) -> None:
        """Let all layers know what is computed."""
        for layer in self._attention:
            layer.batch = batch
        for indexer in self._indexers:
            indexer.batch = batch
        for experts in self._experts:
            experts.rows = batch.token_ids.shape[0]
        if self._states:
            slots, rows = batch.state_slots, self._state_rows(batch)
            if slots is None and batch.states is not None:
                slots = decode_slots(batch.states)
            for states in self._states:
                states.runs, states.decodes, states.rows = batch.states, slots, rows

    def _state_rows(self, batch: ForwardBatch) -> StateRows | None:
        """For layers with states that compute all rows at once; None: there are none."""
        if not any(layer.fused for layer in self._states):
            return None
        slots, rows, starts = batch.state_slots, batch.state_rows, batch.state_starts
        if slots is None and batch.states is not None:  # the device is the host
            slots = decode_slots(batch.states)
            if not batch.states.apart:
                rows, starts = rows_and_starts(batch.states)
        if rows is not None:
            return StateRows(rows[1], rows[2], rows[0], starts)
        return None if slots is None else StateRows(slots[0], slots[1])

    def _tokens(self, batch: ForwardBatch, token_ids: Tensor) -> Tensor:
        """token_ids, with those sampled in the step before; see `ForwardBatch.sources`."""
        if batch.sources is None:
            return token_ids
        known = self.left[batch.sources.clamp_min(0)]
        return torch.where(batch.sources < 0, token_ids, known)

    @property
    def steps(self) -> str:
        """What computes them, in words; see `RankView`."""
        if self._upload is not None:
            return ""
        if self.recorded is None:
            return f"transformers: {self.not_recorded}" if self.not_recorded else "transformers"
        left = sorted({name.partition("::")[2] for name in self.recorded.left})
        return f"recorded, and by torch: {', '.join(left)}" if left else "recorded"

    def is_recorded(self, rows: int) -> bool:
        """Whether steps of so many rows are computed as they were recorded, with no library that
        would prepare itself for their size."""
        return self.recorded is not None and self._takes(rows)

    def _takes(self, rows: int) -> bool:
        return self._recorded_rows is None or rows <= self._recorded_rows

    def _walk(self, batch: ForwardBatch, *, padded: bool = True) -> Tensor:
        """`forward`, launched module by module."""
        self._bind(batch)
        if self.device_drafts is not None:
            self.device_drafts.place(batch)
        cut = pad_batch if self._pads_batches and padded else exact_batch
        token_ids, positions, sample_rows = cut(batch)
        if self.device_drafts is None:
            token_ids = self._tokens(batch, token_ids)
        if self._positions is not None:
            self._positions.positions = positions
        rows = {"logits_to_keep": sample_rows} if self._slices_logits else {}
        logits: Tensor = self._model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            **rows,
        ).logits[0]
        if not rows:
            logits = logits[sample_rows]
        logits = logits[: batch.sample_rows.shape[0], : self.info.vocab]
        return logits.float() if self._upload is None else logits

    def _walk_draft(self, batch: ForwardBatch, *, padded: bool = True) -> Tensor:
        """`draft`, launched module by module."""
        assert self.drafts is not None
        self._bind(batch)
        cut = pad_batch if self._pads_batches and padded else exact_batch
        return self.drafts.walk(*cut(batch))[: batch.sample_rows.shape[0]]

    def forward_idle(self, mean_tokens: int = 0, times: int = 0) -> None:
        """Take part in a step without tokens: each MoE layer in order, and the draft layer's as
        often as that is applied; no attention.

        mean_tokens: as for `forward`. times: see `propose`.
        """
        with torch.inference_mode(), self._mode():
            self._moe.expect(0, mean_tokens)
            if self.graphs is not None and self.graphs.idle(mean_tokens):
                if times:
                    self.graphs.replay_after(0)
                for _ in range(1, times):
                    self._apply_again(0, 0)
                return
            self._walk_idle(range(self._of_drafts.start))
            self._idle_drafts(times)

    def _idle_drafts(self, times: int) -> None:
        """The draft layer's exchanges, without tokens, so often."""
        for _ in range(times):
            self._walk_idle(self._of_drafts)

    def _walk_idle(self, layers: range) -> None:
        if self._idle is not None:
            self._idle.walk(self._idle_layer, self._native, layers)
            return
        for index in layers:
            self._idle_layer(index)

    def _idle_layer(self, index: int) -> None:
        layer, device = self._experts[index], self._device
        layer.runtime.forward(
            layer.layer,
            torch.empty((0, self.info.hidden), dtype=self.info.dtype, device=device),
            torch.empty((0, layer.topk), dtype=torch.int64, device=device),
            torch.empty((0, layer.topk), dtype=torch.float32, device=device),
            layer.apply_gate,
        )

    def _mode(self) -> contextlib.AbstractContextManager[object]:
        if not self._deterministic:
            return contextlib.nullcontext()
        if self._fixed_order is None:
            return RowwiseMode()
        return FixedOrderMode(self._fixed_order, interpreted=self._device.type == "cpu")

    @property
    def dense_nbytes(self) -> int:
        """Bytes of weights and buffers in this process."""
        tensors = {*self._model.parameters(), *self._model.buffers()}
        return sum(t.nbytes for t in tensors)

    @property
    def kv_nbytes(self) -> int:
        """Bytes reserved for the KV cache, and for states."""
        states = sum(state.nbytes for layer in self.kv.states for state in layer.values())
        return states + sum(part.nbytes for part in self.kv.parts)


def _attention_of(
    module: nn.Module, keys: Tensor, values: Tensor, kernels: Kernels, isolated: bool
) -> PagedAttention:
    shape, kernel = kept_latent(module), kernels.paged_attention
    if shape is None:
        return PagedAttention(keys, values, kernel, isolated=isolated)
    if kernels.latents is not None:
        return DeviceLatentAttention(module, shape, keys, values, kernels, isolated=isolated)
    return LatentAttention(module, shape, keys, values, kernel, isolated=isolated)


def _indexers_of(
    model: PreTrainedModel,
    info: ModelInfo,
    names: Sequence[str],
    kv: KVCache,
    kernels: Kernels,
    deterministic: bool,
) -> tuple[Callable[[PagedAttention], PagedAttention], Sequence[BoundIndexer]]:
    """The indexers of a model, and what makes a layer of attention ask them."""
    given = model, names, info.attention, kv.index_keys
    if kernels.indexers is not None:
        on_device = bind_indexers(
            *given, functools.partial(DeviceIndexer, kernels=kernels.indexers)
        )
        return functools.partial(DeviceIndexedAttention, indexers=on_device), on_device
    indexers = bind_indexers(*given, functools.partial(Indexer, deterministic=deterministic))
    return functools.partial(IndexedAttention, indexers=indexers), indexers


def compute_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies) as transformers does.

    `_init_weights` is transformers' own way to do so after loading on the meta device; parameters
    are still there, so it cannot touch any.
    """
    modules: dict[str, list[str]] = {}
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        modules.setdefault(path, []).append(leaf)
        unset = float("nan") if buffer.is_floating_point() else 0
        replace_tensor(model, name, torch.full(buffer.shape, unset, dtype=buffer.dtype))
    for path, leaves in modules.items():
        module = model.get_submodule(path)
        model._init_weights(module)
        for leaf in leaves:
            buffer = getattr(module, leaf)
            if not buffer.is_floating_point() or buffer.isnan().any():
                raise UnsupportedModel(
                    f"{model.config.model_type} does not fit: its buffer {path}.{leaf} is in no "
                    "checkpoint and transformers does not say how to compute it"
                )


def keep_frequencies(model: PreTrainedModel) -> None:
    """Let rotary embeddings of the type "dynamic" keep their frequencies, as they do within
    max_position_embeddings, which is our limit; they would ask the device each time."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.rope_type = "default"


def _check_real(model: PreTrainedModel) -> None:
    """Nothing may be left on the meta device."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ModelError(f"{name} of {type(model).__name__} got no value from the checkpoint")
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise UnsupportedModel(
                    f"{model.config.model_type} does not fit: {path}.{attribute} is computed when "
                    "the model is built and in no checkpoint"
                )
