"""How lines of the log look, in every process of a service."""

from __future__ import annotations

import logging


def start_logging(level: str, handler: logging.Handler) -> None:
    """level: least severity that is logged, in capitals."""
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=[handler]
    )
