"""What BentoML puts around the app leaves nothing behind of a request, and a BentoML that has it otherwise is told in one line."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from bentoml.exceptions import BentoMLException

from llm_from_scratch.serving.bento_middleware import METRICS, TIMER, counting, found, untimed


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": scope["path"]})


async def asked(call: Any, path: str) -> tuple[list[str], int]:
    """What was sent, and how many timers stand afterwards."""
    sent: list[str] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message["type"])

    await call(TimeoutMiddleware(app, timeout=600), {"type": "http", "path": path}, None, send)
    return sent, len(asyncio.get_running_loop()._scheduled)  # type: ignore[attr-defined]


def test_bentomls_timer_stands_for_minutes_after_its_request_and_ours_does_not_begin() -> None:
    assert asyncio.run(asked(TimeoutMiddleware.__call__, "/ask")) == (["/ask"], 1)
    assert asyncio.run(asked(untimed, "/ask")) == (["/ask"], 0)


def test_what_bentoml_does_for_a_path_is_done_for_known_ones_alone() -> None:
    """Its metrics kept a histogram of every path that a scanner tried; here its timer stands for them."""
    call = counting(TimeoutMiddleware.__call__, {"/ask"}.__contains__)

    assert asyncio.run(asked(call, "/ask")) == (["/ask"], 1)
    assert asyncio.run(asked(call, "/wp-login.php")) == (["/wp-login.php"], 0)


def test_a_bentoml_that_has_it_otherwise_is_one_line() -> None:
    assert found(*TIMER) is TimeoutMiddleware
    assert found(*METRICS).__name__ == "RunnerTrafficMetricsMiddleware"
    for home, name in (("bentoml.moved", "TimeoutMiddleware"), (TIMER[0], "Timer"), ("collections", "Counter")):
        with pytest.raises(BentoMLException, match=rf"^bentoml \S+ has no {name} like that of 1\.4\.39 .*requirements\.lock") as caught:
            found(home, name, {"timeout": 1.0} if name != "Counter" else {})
        assert "\n" not in str(caught.value)
