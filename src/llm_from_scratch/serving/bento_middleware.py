"""Two classes that BentoML puts around the app and that forget nothing, mended: as they are, requests make the process larger.

Its timer is never cancelled, and keeps what it knows of a request for `timeout` seconds: 8 KB each, 40 MB after 5,000. The lane has a
deadline of its own, with an answer that OpenAI's clients can read. Its traffic metrics begin a histogram for every path that anybody asks
for, so a scanner fills the memory and /metrics. BentoML has a setting for neither, and both classes are private: only this module reaches
for them, and says so in a line where a version has them no more.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from bentoml.exceptions import BentoMLException
from starlette.types import Receive, Scope, Send

Call = Callable[[Any, Scope, Receive, Send], Awaitable[None]]
Place = tuple[str, str, dict[str, Any]]
"""Module, class, and the arguments that it is made with."""
TIMER: Place = ("bentoml._internal.server.http.traffic", "TimeoutMiddleware", {"timeout": 1.0})
METRICS: Place = ("bentoml._internal.server.http.instruments", "RunnerTrafficMetricsMiddleware", {})


def mend(is_known: Callable[[str], bool]) -> None:
    """For this process, once: no timer, and traffic metrics of paths that are known. Raises BentoMLException as `found` does."""
    timer, metrics = found(*TIMER), found(*METRICS)
    timer.__call__ = untimed
    metrics.__call__ = counting(metrics.__call__, is_known)


def found(home: str, name: str, options: dict[str, Any]) -> Any:
    """The class. Raises BentoMLException where BentoML has none like it, or it calls the app that it wraps no longer `app`."""
    try:
        middleware = getattr(importlib.import_module(home), name)
        middleware(None, **options).app  # noqa: B018
    except (ImportError, AttributeError, TypeError) as error:
        message = f"bentoml {version('bentoml')} has no {name} like that of 1.4.39 ({error})"
        raise BentoMLException(f"{message}; install the version in requirements.lock, or mend serving/bento_middleware.py") from None
    return middleware


async def untimed(middleware: Any, scope: Scope, receive: Receive, send: Send) -> None:
    """What is called in the place of a middleware: the app behind it."""
    await middleware.app(scope, receive, send)


def counting(call: Call, is_known: Callable[[str], bool]) -> Call:
    """What a middleware does, `call`, for known paths alone."""

    async def known(middleware: Any, scope: Scope, receive: Receive, send: Send) -> None:
        await (call if is_known(scope.get("path", "")) else untimed)(middleware, scope, receive, send)

    return known
