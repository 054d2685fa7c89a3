"""The service as `python -m pipelines serve` starts it, by BentoML from a store of its own, for whoever measures it from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.request import Request, urlopen

import psutil

from llm_from_scratch import config
from llm_from_scratch.serving.limits import ServeParams
from pipelines.servers import free_port, running
from stages.__main__ import read_yaml

ROOT = Path(__file__).parent.parent
PACKAGE = """
import json, sys
from pathlib import Path
from llm_from_scratch.serving.limits import ServeParams
from llm_from_scratch.serving.package import package
limits = ServeParams.model_validate(json.loads(sys.argv[1]))
index, embedder, *models = map(Path, sys.argv[2:])
print(*(package(model, index, embedder, limits) for model in models))
"""
SERVICE = "llm_from_scratch.serving.service:LanguageModel"


@dataclass(frozen=True)
class Parts:
    """The bundles that are served, the model that takes over in a reload (its original, in floats), and the limits."""

    model: Path
    floats: Path
    index: Path
    embedder: Path
    limits: ServeParams


@dataclass(frozen=True)
class Server:
    """`bentoml serve`, the worker that it started, and the tags of the models in its store: what it serves, and what it can take over."""

    address: str
    process: subprocess.Popen[bytes]
    worker: psutil.Process
    tags: tuple[str, str]

    def resident_mb(self) -> float:
        return float(self.worker.memory_info().rss) / 2**20

    def metric(self, name: str) -> float:
        """The sum of a metric's values, from /metrics."""
        text = urlopen(f"{self.address}/metrics", timeout=30).read().decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name)

    def busy(self) -> float:
        """Answers that are being made or wait."""
        return self.metric("llm_running") + self.metric("llm_queue_length")

    def reload(self, tag: str) -> str:
        """Lets another model take over; its digest. Raises HTTPError where the server refuses."""
        asked = Request(f"{self.address}/admin/reload", json.dumps({"model": tag}).encode(), {"Content-Type": "application/json"})
        return str(json.load(urlopen(asked, timeout=120))["digest"])


def built(project: Path) -> Parts:
    """The parts of a project after `make repro`. Raises ValueError where it has none."""
    verdict = project / "reports" / "verdict.json"
    if not verdict.exists():
        raise ValueError(f"{verdict}, which names what to serve, is not there; run `make repro`, or name a built project with --project")
    artifacts, params = project / "artifacts", config.parse(read_yaml(ROOT / "params.yaml"), "params.yaml")
    models, served = artifacts / "models", json.loads(verdict.read_text(encoding="utf-8"))["served"]
    return Parts(models / served, models / params.serve.model, artifacts / "index", artifacts / "raw" / params.index.embedder, params.serve)


def toy(folder: Path) -> Parts:
    """Parts as the tests have them, with few places."""
    from llm_from_scratch.retrieval.embed import Embedder
    from tests.tiny import tiny_embedder, tiny_index, tiny_limits, tiny_model

    embedder = tiny_embedder(folder / "embedder")
    tiny_index(folder / "index", Embedder.open(embedder))
    limits = tiny_limits(slots=4, maximum_waiting=4, maximum_body_bytes=65536)
    return Parts(tiny_model(folder / "model"), tiny_model(folder / "floats", seed=1), folder / "index", embedder, limits)


@cache
def store(parts: Parts, home: Path) -> tuple[str, str]:
    """Puts both models into the store at `home`, the one to serve last, which makes it the one that is served; its tag, and the other's."""
    packed = [parts.limits.model_dump_json(), *map(str, (parts.index, parts.embedder, parts.floats, parts.model))]
    command = [sys.executable, "-c", PACKAGE, *packed]
    said = subprocess.run(command, env=_environment(home), check=True, stdout=subprocess.PIPE, text=True).stdout
    floats, served = said.split()[-2:]
    return served, floats


@contextmanager
def serving(home: Path, tags: tuple[str, str]) -> Iterator[Server]:
    """A server of what was stored last in `home`, ready."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "bentoml", "serve", SERVICE, "--port", str(port)]
    log, told = home.parent / "server.log", _environment(home)
    with running(command, f"{address}/readyz", log=log, environment=told, folder=ROOT / "src") as process:
        workers = [child for child in psutil.Process(process.pid).children() if "_bentoml_impl.worker.service" in " ".join(child.cmdline())]
        yield Server(address, process, workers[0], tags)


def _environment(home: Path) -> dict[str, str]:
    return {**os.environ, "BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True", "PYTHONPATH": str(ROOT / "src")}
