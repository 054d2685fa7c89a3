"""Another model takes over while clients are being answered: none is cut off, and every answer is one model's from its first byte."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY

from benchmarks import serving_clients
from llm_from_scratch import bundle
from llm_from_scratch.inference.batching import Batching, Stats
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.retrieval.index import Index
from llm_from_scratch.serving.app import create_app
from llm_from_scratch.serving.embedding import SharedEmbedder
from llm_from_scratch.serving.metrics import PrometheusMeter
from llm_from_scratch.serving.reloading import Served
from llm_from_scratch.serving.responder import EMBEDDER, INDEX, MODEL, RUNGS, SERVING, Responder
from tests.tiny import SENTENCES, tiny_embedder, tiny_index, tiny_limits, tiny_model

LONG = 3000  # tokens: seconds of work
LIMITS = tiny_limits(slots=4, maximum_waiting=32, maximum_new_tokens=LONG)
DIGESTS = {"a": "aa" * 32, "b": "bb" * 32}
HERE = ("127.0.0.1", 50000)


@pytest.fixture(scope="module")
def open_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Responder]:
    """A store of two models, `a` and `b`, the last of which is what no tag means."""
    folder = tmp_path_factory.mktemp("store")
    embedder = SharedEmbedder.open(tiny_embedder(folder / "embedder"))
    tiny_index(folder / "index", embedder)
    for seed, name in enumerate(DIGESTS):
        tiny_model(folder / name, seed)

    def opened(tag: str | None) -> Responder:
        name = tag or "b"
        if name not in DIGESTS:
            raise ValueError(f"no model '{name}' in the store")
        engine = Engine.open(folder / name, batching=Batching(slots=LIMITS.slots, prefill_chunk=LIMITS.prefill_chunk))
        return Responder(engine, Index.open(folder / "index", embedder), LIMITS, f"fp_{name}", digests={MODEL: DIGESTS[name]})

    return opened


@pytest.fixture
def served(open_model: Callable[[str | None], Responder]) -> Iterator[tuple[str, Served]]:
    """Model `a` over a socket, and how it is served."""
    app = create_app(open_model("a"), open_stored=open_model)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app.state.served
    server.should_exit = True
    thread.join(30)


def reload(address: str, tag: str | None, **headers: str) -> httpx2.Response:
    return httpx2.post(f"{address}/admin/reload", json={"model": tag}, headers=headers, timeout=60)


def until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_of_clients_that_stream_across_reloads_none_is_lost_cut_or_refused(served: tuple[str, Served]) -> None:
    address, models = served
    load = serving_clients.Load(address, "tiny", 8, 96, 32, temperature=0.0)
    with ThreadPoolExecutor(1) as pool:
        clients = pool.submit(lambda: asyncio.run(serving_clients.run(load)))
        for tag in ("b", "a", "b"):
            until(lambda: any(lane.running for lane in models.lanes()) and len(models.lanes()) == 2)
            said = reload(address, tag)
            assert (said.status_code, said.json()["digest"], said.json()["changed"]) == (200, DIGESTS[tag], True)
        saw = clients.result(120)

    assert [outcome.said for outcome in saw.outcomes if outcome.how != "finished"] == []
    assert [outcome.tokens for outcome in saw.outcomes] == [32] * 8 * 96
    assert {outcome.digest for outcome in saw.outcomes} == set(DIGESTS.values())


def test_an_answer_ends_on_the_model_it_began_on_which_is_then_freed(served: tuple[str, Served]) -> None:
    address, models = served
    old = weakref.ref(models.now)
    wanted = {name: greedy(responder) for name, responder in (("a", models.now), ("b", models.open_stored("b")))}
    asked = {"model": "tiny", "prompt": "The cat", "temperature": 0, "max_tokens": LONG, "stream": True}

    gc.disable()  # what is freed only when somebody sweeps may stay for hours
    try:
        with httpx2.stream("POST", f"{address}/v1/completions", json=asked, timeout=60) as stream:
            frames = (json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {"))
            first = next(frames)
            assert reload(address, None).json() == {
                "object": "reload",
                "digest": DIGESTS["b"],
                "previous": DIGESTS["a"],
                "changed": True,
            }
            short = httpx2.post(f"{address}/v1/completions", json=asked | {"max_tokens": 40, "stream": False}, timeout=60)
            assert len(models.lanes()) == 4  # the old one is still writing
            text = "".join(frame["choices"][0]["text"] for frame in (first, *frames))
        until(lambda: len(models.lanes()) == 2)
        until(lambda: old() is None)
    finally:
        gc.enable()

    assert (stream.headers["x-bundle-digest"], short.headers["x-bundle-digest"]) == (DIGESTS["a"], DIGESTS["b"])
    assert wanted["a"] != wanted["b"]
    assert text.startswith(wanted["a"])
    assert short.json()["choices"][0]["text"] == wanted["b"]


def test_what_a_reload_does_not_change_is_not_opened_a_second_time(tmp_path: Path) -> None:
    """Each reload took the memory of another index and embedder until the old ones were gone, and the heap kept that size."""
    embedders = [SharedEmbedder.open(tiny_embedder(tmp_path / f"embedder_{seed}", seed)) for seed in (0, 1)]
    for number, embedder in enumerate(embedders):
        tiny_index(tmp_path / f"index_{number}{number}", embedder)
    tiny_index(tmp_path / "index_10", embedders[0], SENTENCES[::-1])
    for seed, name in enumerate("abc"):
        tiny_model(tmp_path / name, seed)

    def packaged(model: str, index: str, rung: str) -> Path:
        parts = {MODEL: model, INDEX: f"index_{index}", EMBEDDER: f"embedder_{index[1]}", f"{RUNGS}/gpt": rung}
        folder = tmp_path / f"{model}_{index}_{rung}"
        for part, source in parts.items():
            shutil.copytree(tmp_path / source, folder / part)
        digests = {part: bundle.read_manifest(folder / part).digest for part in parts}
        (folder / SERVING).write_text(json.dumps({"serve": LIMITS.model_dump(), "digests": digests}), encoding="utf-8")
        return folder

    first = Responder.open(packaged("a", "00", "c"))
    other_model = Responder.open(packaged("b", "00", "c"), first)
    more_documents = Responder.open(packaged("b", "10", "c"), other_model)
    other_index = Responder.open(packaged("b", "11", "a"), more_documents)

    assert other_model.engine is not first.engine
    assert other_model.index is first.index
    assert other_model.rungs["gpt"] is first.rungs["gpt"]
    assert more_documents.index is not first.index
    assert more_documents.index.embedder is first.index.embedder
    assert other_index.index is not other_model.index
    assert other_index.index.embedder.digest == embedders[1].digest
    assert other_index.rungs["gpt"] is not other_model.rungs["gpt"]
    assert [len(responder.index.search("The cat", 1)) for responder in (other_model, other_index)] == [1, 1]


def greedy(responder: Responder) -> str:
    return "".join(piece.text for piece in responder.engine.complete("The cat", Sampling(temperature=0, max_tokens=40)))


def test_a_reload_that_fails_leaves_the_model_that_answers_and_two_at_once_are_one_too_many(
    open_model: Callable[[str | None], Responder],
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly(tag: str | None) -> Responder:
        begun.set()
        assert go_on.wait(30)
        return open_model(tag)

    with TestClient(create_app(open_model("a"), open_stored=slowly), client=HERE) as browser, ThreadPoolExecutor(1) as pool:
        wrong = pool.submit(lambda: browser.post("/admin/reload", json={"model": "c"}))
        assert begun.wait(30)
        second = browser.post("/admin/reload", json={})
        go_on.set()
        assert (second.status_code, second.headers["retry-after"]) == (409, "1")
        assert wrong.result(30).json()["error"] | {"type": ""} == {
            "message": "no model 'c' in the store",
            "type": "",
            "param": "model",
            "code": "invalid_value",
        }
        answer = browser.post("/v1/completions", json={"model": "tiny", "prompt": "The cat", "max_tokens": 1})
        assert answer.headers["x-bundle-digest"] == DIGESTS["a"]
        assert browser.post("/admin/reload", json={"model": "../b"}).status_code == 400
        assert browser.post("/admin/reload", json={"model": "b"}).json()["digest"] == DIGESTS["b"]


def test_a_server_that_goes_down_meanwhile_takes_no_other_model(open_model: Callable[[str | None], Responder]) -> None:
    def opened(tag: str | None) -> Responder:
        for lane in app.state.served.lanes():
            lane.drain()  # as SIGTERM does
        return open_model(tag)

    app = create_app(open_model("a"), open_stored=opened)
    with TestClient(app, client=HERE) as browser:
        assert browser.post("/admin/reload", json={}).status_code == 503
        assert app.state.served.now.digests[MODEL] == DIGESTS["a"]


def test_only_the_owner_may_reload(open_model: Callable[[str | None], Responder]) -> None:
    """Any page that is open in a browser here can send a request to 127.0.0.1, and a browser adds the password it knows."""
    page: dict[str, Any] = {"json": {}, "headers": {"Origin": "http://127.0.0.1:3000"}}
    bearer = {"Authorization": "Bearer sk-123"}
    with TestClient(create_app(open_model("a"), open_stored=open_model), client=("203.0.113.9", 1)) as stranger:
        assert stranger.post("/admin/reload", json={}).status_code == 403
    with TestClient(create_app(open_model("a"), open_stored=open_model), client=HERE) as browser:
        assert browser.post("/admin/reload", **page).json()["error"]["code"] == "not_allowed"
    with TestClient(create_app(open_model("a"), "sk-123", open_model), client=("203.0.113.9", 1)) as stranger:
        assert stranger.post("/admin/reload", json={}).status_code == 401
        assert stranger.post("/admin/reload", json={}, headers=bearer | page["headers"]).status_code == 403
        assert stranger.post("/admin/reload", json={}, headers=bearer).status_code == 200
    with TestClient(create_app(open_model("a")), client=HERE) as browser:
        assert browser.post("/admin/reload", json={}).json()["error"]["code"] == "no_store"


def test_the_load_of_two_models_is_added_up_and_one_that_is_gone_counts_no_more() -> None:
    class Model:
        """Anything that can be gone."""

    meter, old, new = PrometheusMeter(), Model(), Model()
    told = partial(REGISTRY.get_sample_value, "llm_cache_tokens")
    meter.load(old, 3, Stats(2, 0, 50, 100, 0))
    meter.load(new, 1, Stats(1, 0, 10, 100, 0))
    assert (REGISTRY.get_sample_value("llm_queue_length"), REGISTRY.get_sample_value("llm_running")) == (4, 3)
    assert (told({"state": "used"}), told({"state": "capacity"})) == (60, 200)
    del old
    meter.load(new, 0, Stats(1, 0, 10, 100, 0))
    assert (told({"state": "used"}), told({"state": "capacity"})) == (10, 100)
