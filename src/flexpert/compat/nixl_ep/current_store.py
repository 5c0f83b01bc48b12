"""The store that `set_tcp_store_group` gave last, for a buffer that is given one only once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]


class CurrentStore:
    """Has all methods of the store of the moment.

    Raises: ValueError: in every use while there is none.
    """

    def __init__(self, store: Store | None) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        if self.store is None:
            raise ValueError(
                "ranks connect through a torch TCPStore: give Buffer(tcp_store_group=store), or "
                "call set_tcp_store_group(store) before connect_ranks"
            )
        return getattr(self.store, name)
