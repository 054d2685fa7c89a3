"""BentoML's timer, turned off: it is never cancelled, and keeps what it knows of a request for `timeout` seconds: 8 KB, 40 MB of 5,000.

The lane has a deadline of its own, with an answer that OpenAI's clients can read. BentoML has no setting for it (`traffic.timeout` must be
more than nothing), and the timer is of a private class: only this module reaches for it, and says so in a line where there is none.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Any

from bentoml.exceptions import BentoMLException
from starlette.types import Receive, Scope, Send

HOME, NAME = "bentoml._internal.server.http.traffic", "TimeoutMiddleware"


def turn_off_timer(home: str = HOME, name: str = NAME) -> None:
    """For this process. Raises BentoMLException where BentoML has no such class, or it no longer calls the app that it wraps `app`."""
    try:
        timer = getattr(importlib.import_module(home), name)
        timer(app=None, timeout=1.0).app  # noqa: B018
    except (ImportError, AttributeError, TypeError) as error:
        found = f"bentoml {version('bentoml')} has no timer where 1.4 has it ({error})"
        raise BentoMLException(f"{found}; install the version in requirements.lock, or mend serving/untimed.py") from None
    timer.__call__ = untimed


async def untimed(middleware: Any, scope: Scope, receive: Receive, send: Send) -> None:
    """What is called in place of the timer: the app behind it."""
    await middleware.app(scope, receive, send)
