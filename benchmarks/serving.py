"""Weeks 11 and 12: the service under load, on the machine that its clients run on too: tokens, waits, refusals, memory, and its end.

It is served as `python -m pipelines serve` does, by BentoML from its own store, and asked over sockets by streaming clients in a process of
their own. Everything is counted on their side.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import numpy as np
import psutil

from benchmarks import table
from benchmarks.serving_clients import Load, Told, told
from llm_from_scratch import config
from llm_from_scratch.serving.limits import ServeParams
from stages.__main__ import read_yaml

ROOT = Path(__file__).parent.parent
PACKAGE = """
import json, sys
from pathlib import Path
from llm_from_scratch.serving.limits import ServeParams
from llm_from_scratch.serving.package import package
print(package(*map(Path, sys.argv[1:4]), ServeParams.model_validate(json.loads(sys.argv[4]))))
"""
START_SECONDS = 180
FIFTHS = 5


@dataclass(frozen=True)
class Effort:
    """How much of everything: answers of so many tokens, clients at once with so many requests each, and short requests for the memory."""

    tokens: int
    loads: Sequence[tuple[int, int]]
    short: int
    leaving: int
    ending: int


FULL = Effort(tokens=48, loads=((1, 12), (16, 4), (200, 2), (400, 1)), short=5000, leaving=100, ending=64)
QUICK = Effort(tokens=8, loads=((1, 2), (4, 2), (12, 1)), short=40, leaving=4, ending=6)


@dataclass(frozen=True)
class Parts:
    """The bundles that are served, and the limits."""

    model: Path
    index: Path
    embedder: Path
    limits: ServeParams


@dataclass(frozen=True)
class Server:
    """`bentoml serve` and the worker that it started."""

    address: str
    process: subprocess.Popen[bytes]
    worker: psutil.Process

    def resident_mb(self) -> float:
        return float(self.worker.memory_info().rss) / 2**20

    def metric(self, name: str) -> float:
        """The sum of a metric's values, from /metrics."""
        text = urlopen(f"{self.address}/metrics", timeout=30).read().decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name)


def built(project: Path) -> Parts:
    """The parts of a project after `make repro`. Raises ValueError where it has none."""
    verdict = project / "reports" / "verdict.json"
    if not verdict.exists():
        raise ValueError(f"{verdict}, which names what to serve, is not there; run `make repro`, or name a built project with --project")
    artifacts, params = project / "artifacts", config.parse(read_yaml(ROOT / "params.yaml"), "params.yaml")
    served = json.loads(verdict.read_text(encoding="utf-8"))["served"]
    return Parts(artifacts / "models" / served, artifacts / "index", artifacts / "raw" / params.index.embedder, params.serve)


def toy(folder: Path) -> Parts:
    """Parts as the tests have them, with few places."""
    from llm_from_scratch.retrieval.embed import Embedder
    from tests.tiny import tiny_embedder, tiny_index, tiny_model

    limits = config.parse(read_yaml(ROOT / "params.yaml"), "params.yaml").serve
    limits = limits.model_copy(update={"slots": 4, "maximum_waiting": 4, "maximum_choices": 4, "maximum_prompt_tokens": 64})
    embedder = tiny_embedder(folder / "embedder")
    tiny_index(folder / "index", Embedder.open(embedder))
    return Parts(tiny_model(folder / "model"), folder / "index", embedder, limits)


@contextmanager
def serving(parts: Parts, home: Path) -> Iterator[Server]:
    """A server of `parts`, ready."""
    environment = {**os.environ, "BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True", "PYTHONPATH": str(ROOT / "src")}
    packed = [str(parts.model), str(parts.index), str(parts.embedder), parts.limits.model_dump_json()]
    subprocess.run([sys.executable, "-c", PACKAGE, *packed], env=environment, check=True, stdout=subprocess.DEVNULL)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "bentoml", "serve", "llm_from_scratch.serving.service:LanguageModel", "--port", str(port)]
    log = home.parent / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT / "src", env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        yield _ready(f"http://127.0.0.1:{port}", process, log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ready(address: str, process: subprocess.Popen[bytes], log: Path) -> Server:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urlopen(f"{address}/readyz", timeout=5).read()
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
            continue
        workers = [child for child in psutil.Process(process.pid).children() if "_bentoml_impl.worker.service" in " ".join(child.cmdline())]
        return Server(address, process, workers[0])
    raise ValueError(f"the server did not come up: {log.read_text(encoding='utf-8')[-2000:]}")


def start(load: Load) -> subprocess.Popen[str]:
    """The clients, on their way."""
    command = [sys.executable, "-m", "benchmarks.serving_clients", json.dumps(asdict(load))]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def finish(clients: subprocess.Popen[str]) -> Told:
    """What they saw."""
    said, _ = clients.communicate()
    return told(said.splitlines())


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
        **more,
    }


def _percentile(values: Sequence[float], share: int) -> float | None:
    return round(float(np.percentile(values, share)), 1) if values else None


def measure(server: Server, model: str, effort: Effort) -> list[dict[str, Any]]:
    """All rows but the last, which ends the server."""
    many = max(clients for clients, _ in effort.loads)

    def load(clients: int, requests: int, tokens: int, leave_after: int = 0) -> Load:
        return Load(server.address, model, clients, requests, tokens, leave_after)

    finish(start(load(4, 4, effort.tokens)))  # the first answers find cold caches
    rows = []
    for clients, requests in effort.loads:
        now = load(clients, requests, effort.tokens)
        rows.append(row("streams" if clients < many else "streams, more than there are places", now, finish(start(now))))
    short, saw, resident = load(8, effort.short // (8 * FIFTHS), 2), Told(), [server.resident_mb()]
    for _ in range(FIFTHS):
        part = finish(start(short))
        saw.outcomes += part.outcomes
        saw.seconds += part.seconds
        resident.append(server.resident_mb())
    rows.append(row("short requests", short, saw, **{"MB before and after each fifth": " ".join(f"{mb:.0f}" for mb in resident)}))
    leaving = load(effort.leaving, 1, effort.tokens, leave_after=1)
    saw = finish(start(leaving))
    begin = time.monotonic()
    while server.metric("llm_running") + server.metric("llm_queue_length") > 0 and time.monotonic() - begin < 60:
        time.sleep(0.02)
    more = {"left": saw.count("left"), "s until free": round(time.monotonic() - begin, 2)}
    return [*rows, row("clients that leave at their first token", leaving, saw, **more)]


def ending(server: Server, model: str, effort: Effort) -> dict[str, Any]:
    """SIGTERM while half of the clients or more are being answered or wait; who comes later is refused until the server is gone."""
    early = Load(server.address, model, effort.ending, 1, effort.tokens)
    clients = start(early)
    begin = time.monotonic()
    while server.metric("llm_running") + server.metric("llm_queue_length") < effort.ending / 2 and time.monotonic() - begin < 30:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    begin, later = time.monotonic(), Counter[str]()
    while clients.poll() is None or server.process.poll() is None:
        later[_knock(server.address, model)] += 1
        time.sleep(0.02)
    more: dict[str, Any] = {"s until gone": round(time.monotonic() - begin, 2), "exit": server.process.returncode}
    more |= {f"later: {how}": count for how, count in sorted(later.items())}
    return row("SIGTERM while they wait", early, finish(clients), **more)


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


def main() -> None:
    parser = table.parser(__doc__ or "")
    parser.add_argument("--project", type=Path, default=ROOT, help="the folder of a project that was built")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        parts = toy(Path(folder)) if arguments.quick else built(arguments.project)
        with serving(parts, Path(folder) / "bentoml") as server:
            rows = measure(server, parts.limits.model_name, effort)
            rows.append(ending(server, parts.limits.model_name, effort))
    settings = {
        "model": parts.model.name,
        "slots": parts.limits.slots,
        "waiting": parts.limits.maximum_waiting,
        "answers": f"{effort.tokens} tokens",
        **table.packages("bentoml", "uvicorn", "aiohttp"),
    }
    notes = [
        "The clients run on the same cores as the server: what they take, it does not have.",
        "lost: neither complete nor refused with 429 or 503 and a Retry-After. Accepted requests are all others than the refused.",
        "No peer serves this model: the rows compare with the first, one client at a time.",
    ]
    table.write(arguments.out, "serving", "The service under load", rows, settings, notes)


if __name__ == "__main__":
    main()
