"""The same weights, prompts and clients at another server: `transformers serve`, which is OpenAI-compatible too.

Both read the same folder of floats and answer greedily, so their texts can be compared; one server runs at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from benchmarks.serving_clients import PROMPTS, Load, Told
from benchmarks.serving_server import ROOT, Parts, serving, store
from pipelines.servers import free_port, running

PEERS = {
    f"transformers serve {version('transformers')}": [],
    f"transformers serve {version('transformers')}, continuous batching": ["--continuous-batching"],
}
OURS = "this service"

Ask = Callable[[Load], Told]
Row = Callable[..., dict[str, Any]]


def compare(
    parts: Parts,
    folder: Path,
    loads: Sequence[tuple[int, int]],
    tokens: int,
    ask: Callable[[Load], Told],
    row: Callable[..., dict[str, Any]],
) -> list[dict[str, Any]]:
    """A row for each server and number of clients."""
    floats = replace(parts, model=parts.floats)
    texts: dict[str, list[str]] = {}
    rows: list[dict[str, Any]] = []
    servers = {OURS: ours(floats, folder), **{name: peer(floats, folder, more) for name, more in PEERS.items()}}
    for name, starting in servers.items():
        with starting as (address, model):
            texts[name] = [_greedy(address, model, prompt, tokens) for prompt in PROMPTS]
            for clients, requests in loads:
                now = Load(address, model, clients, requests, tokens, temperature=0.0, says_done=name == OURS)
                same = sum(mine == its for mine, its in zip(texts[OURS], texts[name], strict=True))
                rows.append(row(name, now, ask(now), **{"same texts": f"{same} of {len(PROMPTS)}"}))
    best = {clients: max(line["tokens/s"] for line in rows if line["what"] != OURS and line["clients"] == clients) for clients, _ in loads}
    for line in rows:
        if line["what"] == OURS:
            line["also"]["times the best peer"] = round(line["tokens/s"] / best[line["clients"]], 2)
    return rows


@contextmanager
def ours(parts: Parts, folder: Path) -> Iterator[tuple[str, str]]:
    """The address of our server, and the name that it knows the model by."""
    with tempfile.TemporaryDirectory(dir=folder) as home:
        tags = store(parts, Path(home) / "bentoml")
        with serving(Path(home) / "bentoml", tags) as server:
            yield server.address, parts.limits.model_name


@contextmanager
def peer(parts: Parts, folder: Path, more: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The same of `transformers serve`, with options `more`."""
    program = shutil.which("transformers", path=str(Path(sys.executable).parent))
    if program is None:
        raise ValueError("no `transformers` beside this Python; make setup installs it")
    port, model = free_port(), str(parts.model.resolve())
    command = [program, "serve", model, "--port", str(port), "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32", *more]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    address = f"http://127.0.0.1:{port}"
    with running(command, f"{address}/health", log=folder / "peer.log", environment=environment, folder=ROOT):
        yield address, model


def _greedy(address: str, model: str, prompt: str, tokens: int) -> str:
    """What a server says to `prompt`; the first is also its warm-up."""
    asked = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0.0}
    request = Request(f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"})
    return str(json.load(urlopen(request, timeout=120))["choices"][0]["text"])
