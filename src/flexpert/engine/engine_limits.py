"""What one rank has room for. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields

from flexpert.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What one rank has room for.

    max_tokens_per_step: token budget of a step. max_running: sequences computed at once.
    max_model_len: tokens of prompt and answer. blocks, block_size: the KV cache.
    max_scored_per_step: rows of logits, each as long as the vocabulary, that are computed only to
    tell how likely a prompt's tokens were. state_slots: of a model whose layers keep a state of
    each sequence (see `StateSlots`); 0: they keep none.
    """

    max_tokens_per_step: int
    max_running: int
    max_model_len: int
    blocks: int
    block_size: int
    prefix_cache: bool
    max_scored_per_step: int = 256
    state_slots: int = 0

    def __post_init__(self) -> None:
        for entry in fields(self):
            least = 0 if entry.name in ("prefix_cache", "state_slots") else 1
            if getattr(self, entry.name) < least:
                raise ConfigError(f"{entry.name} must be at least {least}")
        if 0 < self.state_slots < 2 * self.rows:
            raise ConfigError(f"state_slots must be at least {2 * self.rows}: two a sequence")

    @property
    def rows(self) -> int:
        """Sequences that run at once: one that decodes takes a token of a step's budget."""
        return min(self.max_running, self.max_tokens_per_step)

    @property
    def longest_table(self) -> int:
        """KV blocks of the longest sequence there is room for."""
        return min(-(-self.max_model_len // self.block_size), self.blocks)
