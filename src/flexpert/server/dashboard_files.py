"""The files of the page at `/`, and the headers that keep a browser from anything else (pure)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

PREFIX = "/dashboard/"

# Only what comes from this server runs or is asked; nobody may frame the page.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # asked for again, and not sent again while it is the same
}

_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class DashboardFile:
    """content, and what is said of it."""

    content: bytes
    media_type: str
    etag: str


def _read() -> Mapping[str, DashboardFile]:
    found = {}
    top = resources.files("flexpert.server").joinpath("dashboard")
    for folder, start in ((top, ""), (top.joinpath("vendor"), "vendor/")):
        for entry in folder.iterdir():
            media_type = _TYPES.get(entry.name.rpartition(".")[2])
            if media_type is not None:
                content = entry.read_bytes()
                etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
                found[start + entry.name] = DashboardFile(content, media_type, etag)
    return found


FILES: Mapping[str, DashboardFile] = _read()
PAGE = "index.html"

# They hold nothing of the service, so a browser gets them without a key; what they show it asks
# for with one.
PATHS = frozenset({"/", *(PREFIX + name for name in FILES if name != PAGE)})
