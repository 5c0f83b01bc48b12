"""The draft layer's part in steps on a CPU: what it needs of the model's part, and what computes
it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexpert.models.draft_layer import draft_logits, draft_states
from flexpert.models.padding import padded_size
from flexpert.models.recorded_steps import RecordedSteps
from flexpert.models.source import ModelInfo


class DraftSteps:
    """Of a model with a draft layer; used by one thread.

    states: [at least most_tokens, hidden], what the layer takes: of each row of the step before
    what the decoder gave, or the layer itself. heard: [1, rows, hidden], what the decoder gave in
    the walk before, module by module. found: [rows, hidden], what the layer gave. recorded:
    computes the draft layer; None: transformers' modules do.
    """

    def __init__(
        self, model: PreTrainedModel, info: ModelInfo, cache: Sequence[Tensor], most_tokens: int
    ) -> None:
        """cache: what the layer's attention keeps, as `KVCache.slots_of` gives it."""
        self._model = model
        self._cache = cache
        self._vocab = info.vocab
        self.recorded: RecordedSteps | None = None
        weight = next(model.parameters())
        rows = padded_size(most_tokens)
        self.states = torch.zeros((rows, info.hidden), dtype=info.dtype, device=weight.device)
        self.heard: Tensor | None = None
        self.found: Tensor | None = None
        decoder: Any = model.get_decoder()
        decoder.register_forward_hook(self._hear)

    def _hear(self, _module: nn.Module, _given: object, found: Any) -> None:
        self.heard = found[0]

    def keep(self, states: Tensor | None, rows: int) -> None:
        """states: [1, at least rows, hidden], of a step."""
        assert states is not None
        self.states[:rows].copy_(states[0, :rows])

    def leave_out(self, slots: Tensor) -> None:
        """The layer is not computed for tokens whose keys and values would go to `slots`, [N]
        int64: they are 0."""
        for part in self._cache:
            part.index_fill_(0, slots, 0)

    def go_on(self, rows: Tensor) -> None:
        """Take what the layer gave of these rows, [D] int64, for another application."""
        assert self.found is not None
        self.states[: rows.shape[0]] = self.found[rows]

    def walk(self, token_ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """[M, vocab] float32 logits of the token after the next one, launched module by module.

        Args:
            token_ids: [N] int64, the token after each of the step before. positions: [N] int64.
            rows: [M] int64, those that are wanted.
        """
        states = self.states[: token_ids.shape[0]].unsqueeze(0)
        self.found = draft_states(self._model, token_ids, positions, states)
        return draft_logits(self._model, self.found[rows])[:, : self._vocab].float()
