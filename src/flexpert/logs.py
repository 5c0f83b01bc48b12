"""How lines of the log look, in every process of a service."""

from __future__ import annotations

import datetime
import json
import logging
from typing import Literal

LogFormat = Literal["text", "json"]

LOG_FIELDS = ("rank", "epoch", "request", "operation", "host", "pid")
"""What a line may name beside its message: given to the logger as `extra`."""


class JsonLines(logging.Formatter):
    """A line an event: time (UTC), level, logger and message; of `LOG_FIELDS` those that it names;
    exception: the traceback, if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, object] = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in LOG_FIELDS:
            value = getattr(record, name, None)
            if value is not None:
                line[name] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def start_logging(level: str, handler: logging.Handler, how: LogFormat = "text") -> None:
    """level: least severity that is logged, in capitals."""
    if how == "json":
        handler.setFormatter(JsonLines())
        logging.basicConfig(level=level, handlers=[handler])
        return
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=[handler]
    )
