"""Streaming clients of an OpenAI API, many in one event loop, in a process of their own: `python -m benchmarks.serving_clients` JSON.

One line of JSON comes out: how each request ended, and when its frames came. A request is `finished` with a finish_reason and [DONE],
`refused` with 429 or 503 and a Retry-After before any text, and `lost` in every other case. (Peers that say no [DONE] end with the stream.)
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import aiohttp

PROMPTS = (
    "The history of the city",
    "A star is",
    "The river runs",
    "In the year",
    "The king said that",
    "An animal that",
    "The war of",
    "It is",
)


@dataclass
class Load:
    """`clients` at once send `requests` each, one after another, for `max_tokens`; each leaves after `leave_after` frames (0: never).

    A stream ends in [DONE], or with itself where the server `says_done` nothing.
    """

    address: str
    model: str
    clients: int
    requests: int
    max_tokens: int
    leave_after: int = 0
    key: str = ""
    temperature: float = 1.0
    says_done: bool = True


@dataclass
class Outcome:
    """How a request ended; seconds from sending it to its first text, to its last, and the longest wait in between; the tokens it got.

    `digest` names the model that answered, where the server says it.
    """

    how: Literal["finished", "refused", "lost", "left"]
    first: float | None = None
    last: float | None = None
    tokens: int = 0
    said: str = ""
    longest_wait: float = 0.0
    digest: str = ""


@dataclass
class Told:
    """All outcomes, and the seconds from the first request to the last end."""

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, how: str) -> int:
        return sum(outcome.how == how for outcome in self.outcomes)

    def finished(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.how == "finished"]


def told(lines: Iterable[str]) -> Told:
    """What a process of this module wrote."""
    fields = json.loads(list(lines)[-1])
    return Told([Outcome(**outcome) for outcome in fields["outcomes"]], fields["seconds"])


async def run(load: Load) -> Told:
    """All clients together."""
    result = Told()
    begin = time.perf_counter()
    connector, patience = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    headers = {"Authorization": f"Bearer {load.key}"} if load.key else {}
    async with aiohttp.ClientSession(load.address, connector=connector, timeout=patience, headers=headers) as session:

        async def client(number: int) -> None:
            for request in range(load.requests):
                result.outcomes.append(await _ask(session, load, number * load.requests + request))

        await asyncio.gather(*(client(number) for number in range(load.clients)))
    result.seconds = time.perf_counter() - begin
    return result


async def _ask(session: aiohttp.ClientSession, load: Load, number: int) -> Outcome:
    asked = {"model": load.model, "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": load.max_tokens, "seed": number}
    asked |= {"temperature": load.temperature, "stream": True, "stream_options": {"include_usage": True}}
    begin = time.perf_counter()
    try:
        async with session.post("/v1/completions", json=asked) as reply:
            if reply.status != 200:
                refused = reply.status in (429, 503) and "Retry-After" in reply.headers
                return Outcome("refused" if refused else "lost", said=f"{reply.status}: {await reply.text()}")
            return await _read(reply, load, begin)
    except (aiohttp.ClientError, ConnectionError) as error:
        return Outcome("lost", said=repr(error))


async def _read(reply: aiohttp.ClientResponse, load: Load, begin: float) -> Outcome:
    outcome = Outcome("lost", digest=reply.headers.get("X-Bundle-Digest", ""))
    frames, ended = 0, False
    async for line in reply.content:
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]\n":
            outcome.how = "finished" if ended else "lost"
            break
        fields: dict[str, Any] = json.loads(line[6:])
        if "error" in fields:
            outcome.said = fields["error"]["message"]
            break
        ended |= any(choice.get("finish_reason") for choice in fields["choices"])  # a peer leaves nulls out
        if fields["choices"]:
            frames += 1
            now = time.perf_counter() - begin
            outcome.longest_wait = max(outcome.longest_wait, now - (outcome.last or now))
            outcome.first, outcome.last = outcome.first or now, now
        if fields.get("usage"):
            outcome.tokens = fields["usage"]["completion_tokens"]
        if load.leave_after and frames == load.leave_after:
            return Outcome("left", outcome.first, outcome.last)
    if ended and not load.says_done:
        outcome.how = "finished"
    return outcome


def main(arguments: Sequence[str]) -> None:
    print(json.dumps(asdict(asyncio.run(run(Load(**json.loads(arguments[0])))))))


if __name__ == "__main__":
    main(sys.argv[1:])
