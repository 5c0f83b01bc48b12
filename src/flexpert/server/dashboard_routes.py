"""`/` for browsers: a page that shows the service live, and its files."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from flexpert.server.dashboard_files import FILES, HEADERS, PAGE, PREFIX, DashboardFile


class PageRoute(Route):
    """Answers only who asks for a page: for programs `/` is what it would be without it."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return Match.NONE, {}
        accepted = b",".join(value for name, value in scope["headers"] if name == b"accept")
        if b"text/html" not in accepted.lower():
            return Match.NONE, {}
        return super().matches(scope)


def dashboard_routes() -> list[Route]:
    """The page, and each of its files under a path of its own."""
    routes: list[Route] = [PageRoute("/", _answer(FILES[PAGE]), include_in_schema=False)]
    for name, file in FILES.items():
        if name != PAGE:
            routes.append(Route(PREFIX + name, _answer(file), include_in_schema=False))
    return routes


def _answer(file: DashboardFile) -> Callable[[Request], Awaitable[Response]]:
    headers = {**HEADERS, "etag": file.etag, "content-type": file.media_type}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers)

    return answer
