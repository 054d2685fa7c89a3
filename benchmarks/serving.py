"""Weeks 11 and 12: the service under load, on the machine that its clients run on too: tokens, waits, refusals, memory, and its end.

It is served as `python -m pipelines serve` does, by BentoML from its own store, and asked over sockets by streaming clients in a process of
their own. Everything is counted on their side. Parts are measured one by one (`--part`), and the others' rows stay as they were.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import numpy as np

from benchmarks import serving_peer, table
from benchmarks.serving_clients import Load, Told, told
from benchmarks.serving_server import ROOT, Parts, Server, built, serving, store, toy

FIFTHS = 5


@dataclass(frozen=True)
class Effort:
    """How much of everything: answers of so many `tokens`; clients at once, with so many requests each, for the loads and for the peers.

    `warm` and `short` are the requests before the memory is looked at and while it is.
    """

    tokens: int
    loads: Sequence[tuple[int, int]]
    warm: int
    short: int
    leaving: int
    ending: int
    reloads: int
    compared: Sequence[tuple[int, int]]


FULL = Effort(
    tokens=48,
    loads=((1, 12), (16, 4), (200, 2), (400, 1)),
    warm=1000,
    short=5000,
    leaving=100,
    ending=64,
    reloads=10,
    compared=((1, 8), (16, 2), (64, 1)),
)
QUICK = Effort(
    tokens=8, loads=((1, 2), (4, 2), (12, 1)), warm=16, short=40, leaving=4, ending=6, reloads=2, compared=((1, 1), (2, 1), (4, 1))
)


@dataclass(frozen=True)
class Bench:
    """A server of `parts`, what is asked of it, and how much."""

    server: Server
    parts: Parts
    effort: Effort

    def load(self, clients: int, requests: int, tokens: int, leave_after: int = 0) -> Load:
        return Load(self.server.address, self.parts.limits.model_name, clients, requests, tokens, leave_after)

    def until_free(self) -> float:
        """Seconds until nobody is answered any more."""
        begin = time.monotonic()
        while self.server.busy() > 0 and time.monotonic() - begin < 60:
            time.sleep(0.02)
        return round(time.monotonic() - begin, 2)


def start(load: Load) -> subprocess.Popen[str]:
    """The clients, on their way."""
    command = [sys.executable, "-m", "benchmarks.serving_clients", json.dumps(asdict(load))]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def finish(clients: subprocess.Popen[str]) -> Told:
    """What they saw."""
    said, _ = clients.communicate()
    return told(said.splitlines())


def ask(load: Load) -> Told:
    """All of it, from the first request to the last end."""
    return finish(start(load))


def row(what: str, load: Load, saw: Told, **more: Any) -> dict[str, Any]:
    """A line of the table. Between tokens: an answer's time after its first token over the tokens after it."""
    done = [outcome for outcome in saw.finished() if outcome.first is not None and outcome.last is not None]
    first = [1000 * outcome.first for outcome in done if outcome.first is not None]
    between = [1000 * (outcome.last - outcome.first) / (outcome.tokens - 1) for outcome in done if outcome.tokens > 1]  # type: ignore[operator]
    return {
        "what": what,
        "clients": load.clients,
        "requests": len(saw.outcomes),
        "finished": saw.count("finished"),
        "refused": saw.count("refused"),
        "lost": saw.count("lost"),
        "tokens/s": round(sum(outcome.tokens for outcome in done) / saw.seconds, 1),
        **{f"first token ms, p{share}": _percentile(first, share) for share in (50, 95)},
        **{f"between tokens ms, p{share}": _percentile(between, share) for share in (50, 95)},
        "also": more,
    }


def _percentile(values: Sequence[float], share: int) -> float | None:
    return round(float(np.percentile(values, share)), 1) if values else None


def loads(bench: Bench) -> list[dict[str, Any]]:
    """More and more clients, past the places that there are; and clients that leave."""
    ask(bench.load(4, 4, bench.effort.tokens))  # the first answers find cold caches
    many = max(clients for clients, _ in bench.effort.loads)
    rows = []
    for clients, requests in bench.effort.loads:
        now = bench.load(clients, requests, bench.effort.tokens)
        rows.append(row("streams" if clients < many else "streams, more than there are places", now, ask(now)))
    leaving = bench.load(bench.effort.leaving, 1, bench.effort.tokens, leave_after=1)
    saw = ask(leaving)
    free = bench.until_free()
    return [*rows, row("clients that leave at their first token", leaving, saw, left=saw.count("left"), **{"s until free": free})]


def memory(bench: Bench) -> list[dict[str, Any]]:
    """What the worker's process holds after a warm-up, and after each fifth of the requests that follow."""
    ask(bench.load(8, bench.effort.warm // 8, 2))
    short, saw, resident = bench.load(8, bench.effort.short // (8 * FIFTHS), 2), Told(), [bench.server.resident_mb()]
    for _ in range(FIFTHS):
        part = ask(short)
        saw.outcomes += part.outcomes
        saw.seconds += part.seconds
        resident.append(bench.server.resident_mb())
    held = {"MB warm, and after each fifth": " ".join(f"{mb:.1f}" for mb in resident), "MB more": round(resident[-1] - resident[0], 1)}
    return [row("short requests", short, saw, **held)]


def reloads(bench: Bench) -> list[dict[str, Any]]:
    """Clients that stream on while the server takes one model after another."""
    load = bench.load(16, 4 * bench.effort.reloads, bench.effort.tokens)
    clients, before, seconds = start(load), bench.server.resident_mb(), []
    digests = []
    for number in range(bench.effort.reloads):
        begin = time.monotonic()
        digests.append(_reloaded(bench.server, bench.server.tags[1 - number % 2]))
        seconds.append(time.monotonic() - begin)
    saw = finish(clients)
    bench.until_free()
    seen = {outcome.digest for outcome in saw.outcomes}
    more = {
        "reloads": len(digests),
        "s a reload, median": round(float(np.median(seconds)), 2),
        "models seen": len(seen & set(digests)),
        "longest wait ms": round(1000 * max(outcome.longest_wait for outcome in saw.finished())),
        "MB before and after": f"{before:.1f} {bench.server.resident_mb():.1f}",
    }
    return [row("streams across reloads", load, saw, **more)]


def _reloaded(server: Server, tag: str) -> str:
    """Asked again while the answers of the model before the last go on."""
    while True:
        try:
            return server.reload(tag)
        except HTTPError as error:
            if error.code != 409:
                raise
            time.sleep(0.1)


def ending(bench: Bench) -> list[dict[str, Any]]:
    """SIGTERM while half of the clients or more are being answered or wait; who comes later is refused until the server is gone."""
    server, early = bench.server, bench.load(bench.effort.ending, 1, bench.effort.tokens)
    clients = start(early)
    begin = time.monotonic()
    while server.busy() < bench.effort.ending / 2 and time.monotonic() - begin < 30:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    begin, later = time.monotonic(), Counter[str]()
    while clients.poll() is None or server.process.poll() is None:
        later[_knock(server.address, bench.parts.limits.model_name)] += 1
        time.sleep(0.02)
    more: dict[str, Any] = {"s until gone": round(time.monotonic() - begin, 2), "exit": server.process.returncode}
    more |= {f"later: {how}": count for how, count in sorted(later.items())}
    return [row("SIGTERM while they wait", early, finish(clients), **more)]


def _knock(address: str, model: str) -> str:
    """What becomes of a request that comes now."""
    asked = json.dumps({"model": model, "prompt": "It", "max_tokens": 1}).encode()
    try:
        urlopen(f"{address}/v1/completions", data=asked, timeout=30).read()
        return "answered"
    except HTTPError as error:
        return str(error.code) if "Retry-After" in error.headers else f"{error.code} for good"
    except (URLError, OSError):
        return "no server"


PARTS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {"loads": loads, "memory": memory, "reloads": reloads, "ending": ending}
"""Each with a server of its own, so that what one leaves behind is not the next one's."""

PEER = "peer"


def measured(part: str, parts: Parts, effort: Effort, folder: Path) -> list[dict[str, Any]]:
    """The rows of a part; `folder` keeps the store for the next one."""
    if part == PEER:
        return serving_peer.compare(parts, folder, effort.compared, effort.tokens, ask, row)
    tags = store(parts, folder / "bentoml")
    with serving(folder / "bentoml", tags) as server:
        return PARTS[part](Bench(server, parts, effort))


def kept(out: Path, part: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The new rows of a part, with those of the others as they were measured before, in the order of the parts."""
    file = out / "serving.json"
    old = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    every = [line for line in old if line["part"] != part] + [{"part": part, **line} for line in rows]
    return sorted(every, key=lambda line: [*PARTS, PEER].index(line["part"]))


def main() -> None:
    parser = table.parser(__doc__ or "")
    parser.add_argument("--project", type=Path, default=ROOT, help="the folder of a project that was built")
    parser.add_argument("--part", nargs="+", choices=[*PARTS, PEER], default=[*PARTS, PEER], help="what to measure now")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop; the parts that were done are kept"))  # and its servers end with it
    effort = QUICK if arguments.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        parts = toy(Path(folder)) if arguments.quick else built(arguments.project)
        settings = {
            "model": parts.model.name,
            "peers' model": parts.floats.name,
            "slots": parts.limits.slots,
            "waiting": parts.limits.maximum_waiting,
            "answers": f"{effort.tokens} tokens",
            **table.packages("bentoml", "uvicorn", "aiohttp", "transformers"),
        }
        for part in arguments.part:
            rows = kept(arguments.out, part, measured(part, parts, effort, Path(folder)))
            table.write(arguments.out, "serving", "The service under load", rows, settings, NOTES)


NOTES = [
    "The clients run on the same cores as the server: what they take, it does not have.",
    "lost: neither complete nor refused with 429 or 503 and a Retry-After. Accepted requests are all others than the refused.",
    "MB are what the worker's process holds (RSS), with the index and the embedder in it.",
    "peer: the same folder of floats, greedy, at one server after the other; `same texts` says how many of the prompts got the same answer "
    "as from this service, and `times the best peer` is of tokens/s.",
]


if __name__ == "__main__":
    main()
