"""What launches.c makes."""

from collections.abc import Callable
from typing import Any, final

import torch

Wanted = tuple[int, int, int, int, tuple[int, ...]]
Launch = tuple[Kernel, int, int, int, tuple[tuple[int, int], ...]]

def use_tensors(kind: type[torch.Tensor]) -> None:
    """Once, before all else. Raises: AttributeError, ValueError: tensors cannot be read."""

def describe(tensor: torch.Tensor) -> Wanted:
    """What `Call` compares: code and bits of its dtype, kind and index of its device, its sizes."""

@final
class Kernel:
    """A compiled kernel with its arguments, all but those that change."""

    def __new__(
        cls,
        name: str,
        keeps: object,
        driver: tuple[int, int, int, int],
        device: int,
        function: int,
        context: int,
        threads: int,
        shared: int,
        pointers: int,
        changing: int,
        place: bytes,
        words: tuple[int, ...],
    ) -> Kernel:
        """See kernel_t. keeps: is kept alive."""

    def launch(self, programs: int, *changing: Any) -> bool:
        """On the current stream; False: a tensor is not aligned, and nothing was done.

        Raises: RuntimeError: the driver refuses.
        """

@final
class Call:
    """Launches in a row that take their changing arguments from the same tensors."""

    run: Callable[..., int]
    """(tokens, rows, *tensors) → how many tokens there are, which is looked for if a negative
    number is given; or -1: something is not as it is wanted, and nothing was done.

    Raises: RuntimeError: the driver refuses.
    """

    def arm(self, functions: tuple[int, ...], give_back: Callable[[int, int], None]) -> int:
        """Launch all at once from now on, as a graph, but where the current stream is captured.

        functions: of the driver, see graph_functions. give_back: is told the executable graph (or
        0) and the graph that are to be destroyed.

        Returns: the driver's answer; if it is not 0, nothing has changed.
        """

    def __new__(
        cls,
        quiet: int,
        quiet_words: int,
        stop: int,
        most_tokens: int,
        most_rows: int,
        tensors: tuple[Wanted, ...],
        launches: tuple[Launch, ...],
    ) -> Call:
        """quiet, stop: addresses of int64 words that must be 0, so many and one. tensors: as
        `describe` says, with sizes that are found. launches: see launch_t."""
