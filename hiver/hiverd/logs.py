"""Log lines for people, or as JSON for machines. Never a request body, a configuration or an environment."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import msgspec

from hiverd.clock import rfc3339


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": rfc3339(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure_logging(level: str, style: Literal["text", "json"]) -> None:
    """Everything to stderr, ours from `level` on, libraries' from warning on."""
    handler = logging.StreamHandler(sys.stderr)
    if style == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("hiverd").setLevel(level.upper())
    for name in ("hiver_backends", "hiver_storage", "hiver_snapshots"):
        logging.getLogger(name).setLevel(level.upper())
