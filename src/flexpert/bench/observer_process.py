"""Watches a service as an open page does, or as a scraper of `/metrics`, in a process of its own.

    python -m flexpert.bench.observer_process NAME URL

So that what watching costs those who watch is not taken for what it costs the service. WATCHING is
printed once the service has answered; it ends when the service does, or when it is terminated.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final

from flexpert.bench.load import Target, exchange, parse_reply
from flexpert.errors import FlexpertError

WATCHING: Final = "watching"
SCRAPE_S = 1.0
PLACEMENT_S = 5.0  # as the page: `LOADS_MS` in dashboard/app.js

Began = Callable[[], None]


async def watch_page(target: Target, began: Began) -> None:
    """The requests of an open page: its stream, and the placement of the layer it shows.

    Raises: FlexpertError: the service does not answer, or no more.
    """
    request = target.message("GET", "/cluster/stream")
    async with asyncio.TaskGroup() as group:
        group.create_task(_look(target, "/cluster/placement?layer=0", PLACEMENT_S, lambda: None))
        await exchange(target, request, stall_s=30.0, on_data=lambda _: began())
        raise FlexpertError("the stream has ended")


async def watch_metrics(target: Target, began: Began) -> None:
    """Raises: FlexpertError: the service does not answer, or no more."""
    await _look(target, "/metrics", SCRAPE_S, began)


async def _look(target: Target, path: str, every_s: float, began: Began) -> None:
    """A GET again and again."""
    while True:
        reply = parse_reply(await exchange(target, target.message("GET", path)))
        if reply.status != 200:
            raise FlexpertError(f"{path} answered {reply.status}")
        began()
        await asyncio.sleep(every_s)


OBSERVED: Final[dict[str, Callable[[Target, Began], Coroutine[Any, Any, None]]]] = {
    "page": watch_page,
    "metrics": watch_metrics,
}


def main() -> None:
    name, url = sys.argv[1:]
    told = False

    def began() -> None:
        nonlocal told
        if not told:
            told = True
            print(WATCHING, flush=True)

    try:
        asyncio.run(OBSERVED[name](Target.parse(url), began))
    except* FlexpertError as group:
        sys.exit(str(group.exceptions[0]))


if __name__ == "__main__":
    main()
