"""Who may ask: whoever bears the key, where there is one.

The key lies in a file, as container platforms hand out secrets; what is passed around is the file's path, so no parameter, image,
command line or log holds the key. One key for all is what it is: it tells no two clients apart. Programs send it as a bearer token; a
browser asks for it in its own window (HTTP Basic, any name, the key as the password), so the pages need no login of their own.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Callable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from llm_from_scratch.serving.errors import ApiError

OPEN = frozenset({"/healthz", "/livez", "/readyz", "/metrics"})
"""What needs no key: what orchestrators and Prometheus ask for."""


def read_key(file: Path) -> str:
    """The key that `file` holds, on one line. Raises ValueError where there is none: a server that was to be closed never opens."""
    try:
        key = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not plain ASCII"
        raise ValueError(f"cannot read an API key from {file} ({reason}); write one line of letters and digits there") from None
    if not key or len(key.split()) > 1:
        raise ValueError(f"{file} holds {'more than one word' if key else 'no API key'}; write one line of letters and digits there")
    return key


def require_key(authorization: str, key: str) -> None:
    """Raises ApiError 401 where a header bears another key than `key`, or none; an empty `key` lets everybody in."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "basic":
        given = _password(given)
    # Compared even where the scheme is wrong, and byte for byte to the end: the time taken tells nothing.
    equal = hmac.compare_digest(given.strip().encode(), key.encode())
    if key and not (equal and scheme.lower() in ("bearer", "basic")):
        raise ApiError(401, "this server wants its API key, in the header Authorization: Bearer …", "invalid_api_key")


def require_owner(request: Request) -> None:
    """Raises ApiError 403 for whoever may not change what is served: where there is no key, all but programs on this machine.

    A web page may not with a key either: its reader's browser would send that along. Browsers name the page in `Origin`.
    """
    if "origin" in request.headers:
        raise ApiError(403, "no web page may ask for this; send it with a program, without the header Origin", "not_allowed")
    if not request.app.state.key and not _is_loopback(request.client.host if request.client else ""):
        raise ApiError(403, "without an API key only this machine may ask for this; serve with --api-key-file", "not_allowed")


class Guard:
    """ASGI middleware: nothing but `OPEN` is reached without the key. The key may come after the app: `key` is asked each time."""

    def __init__(self, app: ASGIApp, key: Callable[[], str]) -> None:
        self.app = app
        self.key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and scope["path"] not in OPEN:
            try:
                require_key(Headers(scope=scope).get("authorization", ""), self.key())
            except ApiError as error:
                return await _refuse(error, scope, receive, send)
        await self.app(scope, receive, send)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        headers = error.headers | {"WWW-Authenticate": 'Basic realm="llm-from-scratch", charset="UTF-8"'}
        await JSONResponse(error.body(), error.status, headers)(scope, receive, send)


def _password(credentials: str) -> str:
    """What follows the name in `name:password`, base64; nothing where it is not that."""
    try:
        return base64.b64decode(credentials.strip(), validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""
