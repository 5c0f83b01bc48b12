"""What a server holds of the machine's memory, with all processes that it has started."""

from __future__ import annotations

import psutil

from flexpert.errors import FlexpertError


def held_memory(pid: int) -> int:
    """PSS in bytes: a page that n processes share counts as 1 / n in each of them, be it of a file
    or not. Raises: FlexpertError: it cannot be looked at."""
    try:
        server = psutil.Process(pid)
        processes = [server, *server.children(recursive=True)]
        return sum(process.memory_full_info().pss for process in processes)
    except psutil.Error as error:
        raise FlexpertError(f"process {pid} cannot be looked at: {error!r}") from error
