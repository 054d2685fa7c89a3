"""Which of Gradio's routes exist here: those that the page itself calls.

Gradio brings some sixty more (uploads into temporary files, a proxy, an editor), and reads bodies of any length. Who may see the page
is `auth`'s business, as for every other route.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

READ = ("assets/", "static/", "theme.css", "config", "gradio_api/queue/data", "gradio_api/startup-events")
WRITE = ("gradio_api/queue/join", "gradio_api/cancel", "gradio_api/reset")


class PageOnly:
    """ASGI middleware: under `path` nothing but the page, and no body of more than `maximum_body_bytes`."""

    def __init__(self, app: ASGIApp, path: str, maximum_body_bytes: int) -> None:
        self.app = app
        self.path = path
        self.maximum_body_bytes = maximum_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None
        if scope["type"] == "http" and scope["path"].startswith(f"{self.path}/"):
            refusal = self._refusal(scope["method"], scope["path"].removeprefix(f"{self.path}/"), Headers(scope=scope))
        await (refusal or self.app)(scope, receive, send)

    def _refusal(self, method: str, route: str, headers: Headers) -> Response | None:
        read = method in ("GET", "HEAD") and (not route or route.startswith(READ))
        if not read and not (method == "POST" and route.startswith(WRITE)):
            return PlainTextResponse("the page has no such part", 404)
        length = headers.get("Content-Length", "0" if read else "")
        if not length.isdecimal() or int(length) > self.maximum_body_bytes:
            return PlainTextResponse(f"no more than {self.maximum_body_bytes} bytes are read, with their number; clear the chat", 413)
        return None
