"""The API in this process, and then the Bento that was built, served from another folder with the package taken away."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

from llm_from_scratch import bundle
from llm_from_scratch.inference.batching import Batching
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.retrieval.embed import Embedder
from llm_from_scratch.retrieval.index import Index
from llm_from_scratch.serving.app import create_app
from llm_from_scratch.serving.auth import read_key
from llm_from_scratch.serving.embedding import SharedEmbedder
from llm_from_scratch.serving.errors import ApiError
from llm_from_scratch.serving.lane import Check, Lane
from llm_from_scratch.serving.package import package, require_free
from llm_from_scratch.serving.responder import Responder
from pipelines.servers import free_port, running
from tests.tiny import CONTEXT, SENTENCES, tiny_embedder, tiny_index, tiny_limits, tiny_model, tiny_quantized

ROOT = Path(__file__).parent.parent
LIMITS = tiny_limits()
HELLO = [{"role": "user", "content": "What is a cat?"}]


@dataclass(frozen=True)
class Parts:
    """The three bundles that are served, and another model, the one that was quantized."""

    model: Path
    floats: Path
    index: Path
    embedder: Path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("bundles")
    made = Parts(folder / "model_int8", folder / "model", folder / "index", folder / "embedder")
    tiny_quantized(made.model, tiny_model(made.floats))
    tiny_embedder(made.embedder)
    tiny_index(made.index, Embedder.open(made.embedder))
    return made


@pytest.fixture(scope="module")
def engine(parts: Parts) -> Engine:
    return Engine.open(parts.model, batching=Batching(slots=LIMITS.slots, prefill_chunk=LIMITS.prefill_chunk))


@pytest.fixture(scope="module")
def index(parts: Parts) -> Index:
    return Index.open(parts.index, SharedEmbedder.open(parts.embedder))


@pytest.fixture(scope="module")
def browser(engine: Engine, index: Index) -> Iterator[TestClient]:
    with TestClient(create_app(Responder(engine, index, LIMITS, "fp_test"))) as client:
        yield client


@pytest.fixture(scope="module")
def client(browser: TestClient) -> OpenAI:
    return OpenAI(base_url="http://testserver/v1", api_key="none", http_client=browser, max_retries=0)


# The API, asked by OpenAI's own client. The same questions go to the served Bento below.


def a_completion_is_what_the_engine_says(client: OpenAI, engine: Engine) -> None:
    said = client.completions.create(model="tiny", prompt="The cat", temperature=0, max_tokens=12)
    pieces = list(engine.complete("The cat", Sampling(temperature=0, max_tokens=12)))

    assert said.choices[0].text == "".join(piece.text for piece in pieces)
    assert said.choices[0].finish_reason == pieces[-1].finish_reason == "length"
    assert said.usage is not None
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (len(engine.tokenizer.encode("The cat")), 12)


def a_streamed_chat_says_what_the_whole_one_says(client: OpenAI, engine: Engine) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0)
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    assert (
        text
        == whole.choices[0].message.content
        == "".join(piece.text for piece in engine.chat(HELLO, Sampling(temperature=0, max_tokens=8)))
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def a_question_is_answered_with_what_was_read(client: OpenAI, engine: Engine) -> None:
    said = client.post("/../ask", body={"question": "What is a river?"}, cast_to=dict[str, Any])

    assert said["model"] == "tiny"
    assert said["found"]
    assert [source["number"] for source in said["citations"]] == [1, 2]
    assert {source["text"] for source in said["citations"]} <= set(SENTENCES)
    assert set(said["citations"][0]) == {"number", "title", "text", "document", "score"}
    assert said["citations"][0]["title"] == "river"
    assert said["citations"][0]["score"] >= said["citations"][1]["score"] > 0


def the_model_is_listed_by_its_name(client: OpenAI, engine: Engine) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-embedder"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5' here; there is 'tiny'") as caught:
        client.completions.create(model="gpt-5", prompt="a")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def what_is_wrong_with_a_body_is_said_in_openais_shape(client: OpenAI, engine: Engine) -> None:
    wrong = {
        b"": (400, "invalid_json"),
        b"{": (400, "invalid_json"),
        b'{"question": "\xe9"}': (400, "invalid_json"),
        b" " * 5000: (413, "request_too_large"),
    }
    for path in ("/ask", "/retrieve", "/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
        for body, (status, code) in wrong.items():
            reply = client._client.post(str(client.base_url.join(path)), content=body)
            assert reply.status_code == status
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
            assert reply.json()["error"]["code"] == code


def a_prompt_too_long_is_refused_with_both_numbers(client: OpenAI, engine: Engine) -> None:
    found = len(engine.tokenizer.encode("cat " * 100))
    with pytest.raises(openai.BadRequestError, match=f"the prompt is {found} tokens, and no more than 64 are read") as caught:
        client.completions.create(model="tiny", prompt="cat " * 100)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="no more than 64 are read"):
        client.post("/../ask", body={"question": "cat " * 100}, cast_to=dict[str, Any])


ASKED = (
    a_completion_is_what_the_engine_says,
    a_streamed_chat_says_what_the_whole_one_says,
    a_question_is_answered_with_what_was_read,
    the_model_is_listed_by_its_name,
    what_is_wrong_with_a_body_is_said_in_openais_shape,
    a_prompt_too_long_is_refused_with_both_numbers,
)
Asked = Callable[[OpenAI, Engine], None]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked.__name__)
def test_in_this_process(asked: Asked, client: OpenAI, engine: Engine) -> None:
    asked(client, engine)


def test_a_seed_draws_the_same_answer_again_and_stop_ends_it(client: OpenAI) -> None:
    def draw(seed: int, **more: Any) -> str:
        return client.completions.create(model="tiny", prompt="The cat", max_tokens=24, seed=seed, **more).choices[0].text

    first = draw(3)
    middle = first[len(first) // 2]

    assert draw(3) == first != draw(4)
    assert draw(3, stop=[middle]) == first[: first.index(middle)]


def test_a_prompt_of_token_ids_is_read_as_it_is_and_checked_against_the_vocabulary(client: OpenAI, engine: Engine) -> None:
    ids = engine.tokenizer.encode("The cat")

    by_ids, by_text = (client.completions.create(model="tiny", prompt=prompt, temperature=0).choices[0].text for prompt in (ids, "The cat"))
    assert by_ids == by_text
    with pytest.raises(openai.BadRequestError, match=f"found token 300; this model's tokens are 0 to {engine.tokenizer.vocab_size - 1}"):
        client.completions.create(model="tiny", prompt=[1, 300])


def test_an_answer_bears_the_digests_of_what_it_came_from_whole_and_streamed(engine: Engine, index: Index) -> None:
    """And no header at all where they are not known, as with the other tests' responder."""
    digests = {"model": "aa" * 32, "index": "bb" * 32, "embedder": "cc" * 32}
    of_model, of_index = {"x-bundle-digest": digests["model"]}, {"x-index-digest": digests["index"]}
    chat = {"model": "tiny", "messages": HELLO}
    asked: tuple[tuple[str, dict[str, Any], dict[str, str]], ...] = (
        ("/v1/completions", {"model": "tiny", "prompt": "The cat"}, of_model),
        ("/v1/completions", {"model": "tiny", "prompt": "The cat", "stream": True}, of_model),
        ("/v1/chat/completions", chat, of_model),
        ("/v1/chat/completions", chat | {"documents": True}, of_model | of_index),
        ("/v1/chat/completions", chat | {"documents": True, "stream": True}, of_model | of_index),
        ("/ask", {"question": "What is a cat?"}, of_model | of_index),
        ("/retrieve", {"query": "cat"}, of_index),
        ("/v1/embeddings", {"model": "tiny-embedder", "input": "cat"}, {"x-embedder-digest": digests["embedder"]}),
    )
    with TestClient(create_app(Responder(engine, index, LIMITS, "fp_test", digests=digests))) as browser:
        for path, body, wanted in asked:
            reply = browser.post(path, json=body)
            assert reply.status_code == 200, reply.text
            assert {name: value for name, value in reply.headers.items() if name.endswith("-digest")} == wanted, path
        assert [model["digest"] for model in browser.get("/v1/models").json()["data"]] == [digests["model"], digests["embedder"]]
    with TestClient(create_app(Responder(engine, index, LIMITS, "fp_test"))) as browser:
        assert not [name for name in browser.post("/ask", json={"question": "What is a cat?"}).headers if name.endswith("-digest")]


def test_an_unknown_address_names_the_known_ones_and_a_wrong_method_is_405(browser: TestClient) -> None:
    assert "there is POST /v1/chat/completions" in browser.post("/v1/images").json()["error"]["message"]
    assert browser.get("/ask").status_code == 405
    assert set(browser.get("/ask").json()["error"]) == {"message", "type", "param", "code"}


def test_the_landing_page_is_whole_and_loads_nothing_from_elsewhere(browser: TestClient) -> None:
    page = browser.get("/")

    assert page.headers["content-type"].startswith("text/html")
    assert re.findall(r"(?:src|href)=\S*", page.text) == ['href="ui/">More']


def test_an_app_without_its_model_yet_says_so() -> None:
    reply = TestClient(create_app()).get("/v1/models")

    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")


def test_with_a_key_only_who_bears_it_is_answered(engine: Engine, index: Index) -> None:
    with TestClient(create_app(Responder(engine, index, LIMITS, "fp_test"), key="sk-123")) as browser:
        knows, guesses = (
            OpenAI(base_url="http://testserver/v1", api_key=key, http_client=browser, max_retries=0) for key in ("sk-123", "sk")
        )
        assert knows.completions.create(model="tiny", prompt="a", max_tokens=1).usage is not None
        for ask in (guesses.models.list, lambda: guesses.completions.create(model="tiny", prompt="a")):
            with pytest.raises(openai.AuthenticationError, match="wants its API key") as caught:
                ask()
            assert caught.value.code == "invalid_api_key"
        assert browser.post("/ask", json={"question": "What is a cat?"}).status_code == 401
        assert browser.post("/ask", json={}, headers={"Authorization": b"Bearer \xe9"}).status_code == 401
        for path in ("/", "/openapi.json", "/retrieve", "/v1/nowhere", "/ui"):
            assert browser.get(path).status_code == 401
        assert browser.get("/healthz").status_code == 404  # not here, but BentoML has it, and nobody is asked for a key
        assert browser.get("/openapi.json", headers={"Authorization": "Bearer sk-123"}).json()["security"] == [{"key": []}]


def test_a_browser_asks_its_reader_for_the_key_and_sends_it_as_a_password(engine: Engine, index: Index) -> None:
    with TestClient(create_app(Responder(engine, index, LIMITS, "fp_test"), key="sk-123")) as browser:
        assert browser.get("/").headers["www-authenticate"].startswith("Basic ")
        assert browser.get("/", auth=("anybody", "sk-123")).status_code == 200
        assert browser.get("/", auth=("anybody", "sk-124")).status_code == 401
        for wrong in ("Basic", "Basic !", "Basic sk-123", "Digest sk-123", "sk-123"):
            assert browser.get("/", headers={"Authorization": wrong}).status_code == 401


def test_a_key_file_holds_one_key_or_the_server_does_not_open(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-123\n")
    assert read_key(tmp_path / "key") == "sk-123"
    for content, complaint in {"": "holds no API key", "a b": "holds more than one word", "é": "not plain ASCII"}.items():
        (tmp_path / "wrong").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=f"wrong.*{complaint}.*; write one line"):
            read_key(tmp_path / "wrong")
    with pytest.raises(ValueError, match="No such file"):
        read_key(tmp_path / "none")


def test_a_failure_of_ours_tells_the_client_nothing_of_our_insides(engine: Engine, index: Index) -> None:
    other = Responder(engine, index, LIMITS, "fp_test")
    other.engine = None
    reply = TestClient(create_app(other), raise_server_exceptions=False).post("/v1/completions", json={"model": "tiny", "prompt": "a"})

    assert reply.status_code == 500
    assert "NoneType" not in reply.text
    assert reply.json()["error"]["type"] == "server_error"


def test_a_default_length_that_leaves_no_room_for_a_question_is_refused(engine: Engine, index: Index) -> None:
    with pytest.raises(ValueError, match=f"serve.default_new_tokens is {CONTEXT}, which leaves no room"):
        Responder(engine, index, tiny_limits(default_new_tokens=CONTEXT, maximum_new_tokens=CONTEXT), "fp_test")


# The line before the model.


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def counting(check: Check) -> Iterator[int]:
    """Work without an end, an item every millisecond."""
    for number in itertools.count():
        time.sleep(0.001)
        yield number


def test_as_many_jobs_run_as_there_are_workers_and_the_rest_in_the_order_they_came() -> None:
    began: list[int] = []
    together = threading.Barrier(2)

    def job(number: int) -> Callable[[Check], Iterator[int]]:
        def produce(check: Check) -> Iterator[int]:
            began.append(number)
            if number < 2:
                together.wait(30)  # passes only where both are being worked on
            yield from range(3)

        return produce

    async def scenario() -> None:
        lane = Lane(workers=2, maximum_waiting=9, deadline_seconds=60)
        jobs = [lane.submit(job(number)) for number in range(5)]
        assert [[item async for _, item in one] for one in jobs] == [[0, 1, 2]] * 5
        await lane.idle()
        assert (lane.waiting, lane.running) == (0, 0)
        lane.close()

    run(scenario())
    assert sorted(began[:2]) == [0, 1]
    assert began[2:] == [2, 3, 4]


def test_the_parts_of_a_job_share_one_answer_and_fail_together() -> None:
    def failing(check: Check) -> Iterator[int]:
        yield 7
        raise ValueError("no such file")

    async def scenario() -> None:
        lane = Lane(workers=2, maximum_waiting=9, deadline_seconds=60)
        parts = [item async for item in lane.submit(*(lambda check, part=part: [part] * 3 for part in range(4)))]
        assert sorted(parts) == [(part, part) for part in range(4) for _ in range(3)]
        with pytest.raises(ValueError, match="no such file"):
            async for _ in lane.submit(counting, failing):
                pass
        await asyncio.wait_for(lane.idle(), 30)  # the endless part ended with the other
        lane.close()

    run(scenario())


def test_the_line_has_an_end_and_who_leaves_it_makes_room() -> None:
    async def scenario() -> None:
        lane = Lane(workers=1, maximum_waiting=1, deadline_seconds=60)
        with pytest.raises(ApiError, match="no more than 1 may"):
            lane.submit(counting, counting, counting)  # all parts or none
        working, waiting = lane.submit(counting), lane.submit(counting)
        with pytest.raises(ApiError, match="1 answers are waiting already, and no more than 1 may") as caught:
            lane.submit(counting)
        assert caught.value.status == 429
        assert int(caught.value.headers["Retry-After"]) >= 1
        waiting.stop()
        with pytest.raises(ApiError) as left:
            await anext(aiter(waiting))
        assert left.value.status == 499
        lane.submit(counting)
        assert not working.stopped
        lane.close()

    run(scenario())


def test_a_lane_that_drains_finishes_what_it_took_in_and_takes_no_more() -> None:
    async def scenario() -> None:
        lane = Lane(workers=1, maximum_waiting=9, deadline_seconds=60)
        jobs = [lane.submit(lambda check: range(3)) for _ in range(3)]
        lane.drain()
        with pytest.raises(ApiError, match="going down") as caught:
            lane.submit(counting)
        assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "1"})
        assert [[item async for _, item in job] for job in jobs] == [[0, 1, 2]] * 3
        await lane.idle()
        lane.close()

    run(scenario())


def test_the_event_loop_goes_on_while_an_answer_is_made() -> None:
    def busy(check: Check) -> Iterator[int]:
        time.sleep(0.5)  # as long as a step of a large model: nothing is yielded meanwhile
        yield 1

    async def scenario() -> int:
        lane = Lane(workers=1, maximum_waiting=1, deadline_seconds=60)
        job = lane.submit(busy)
        ticks = 0
        answer = asyncio.create_task(anext(aiter(job)))
        while not answer.done():
            ticks += 1
            await asyncio.sleep(0.01)
        lane.close()
        return ticks

    assert run(scenario()) > 5


def test_the_deadline_counts_from_arrival_and_stops_the_work() -> None:
    async def scenario() -> None:
        lane = Lane(workers=1, maximum_waiting=2, deadline_seconds=0.2)
        working, waiting = lane.submit(counting), lane.submit(counting)
        for job in (waiting, working):
            with pytest.raises(ApiError, match=r"no complete answer after 0\.2 s") as caught:
                async for _ in job:
                    pass
            assert (caught.value.status, caught.value.code) == (503, "deadline_exceeded")
            assert job.stopped
        lane.close()

    run(scenario())


def test_what_the_work_raises_reaches_who_waits_for_it() -> None:
    def failing(check: Check) -> Iterator[int]:
        yield 1
        raise ValueError("no such file")

    async def scenario() -> None:
        lane = Lane(workers=1, maximum_waiting=1, deadline_seconds=60)
        with pytest.raises(ValueError, match="no such file"):
            async for _ in lane.submit(failing):
                pass
        assert [item async for _, item in lane.submit(lambda check: [2])] == [2]  # and the lane lives on
        lane.close()

    run(scenario())


async def hang_up_on(
    app: Any, path: str, body: dict[str, Any], after: Callable[[list[dict[str, Any]]], bool], unfinished: bool = False
) -> list[dict[str, Any]]:
    """What was sent to a client that leaves once `after` is true of it, or in the middle of its `unfinished` body.

    ASGI by hand, as test clients wait for the whole answer.
    """
    sent: list[dict[str, Any]] = []
    left = asyncio.Event()
    messages = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": unfinished}])

    async def receive() -> dict[str, Any]:
        if (message := next(messages, None)) is not None:
            return message
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if after(sent):
            left.set()

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": []}
    scope |= {"asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http", "root_path": ""}
    if after(sent):
        asyncio.get_running_loop().call_later(0.3, left.set)
    await app(scope, receive, send)
    return sent


LONG = 100_000  # tokens: minutes of work


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_stops_its_answer(stream: bool, engine: Engine, index: Index) -> None:
    async def scenario() -> None:
        responder = Responder(engine, index, tiny_limits(maximum_new_tokens=LONG, slots=1, maximum_choices=2), "fp_test")
        asked = {"model": "tiny", "prompt": "The cat", "temperature": 0, "max_tokens": LONG, "stream": stream}
        leave = (lambda sent: len(sent) > 5) if stream else (lambda sent: not sent)
        sent = await hang_up_on(create_app(responder), "/v1/completions", asked, leave)
        assert stream or sent[0]["status"] == 499
        # The next one gets the only slot at once: nobody makes an answer that nobody waits for.
        job = responder.lane.submit(lambda check: ["next"])
        assert [item async for _, item in job] == ["next"]
        responder.close()

    begin = time.monotonic()
    run(scenario())
    assert time.monotonic() - begin < 30


def test_a_client_that_leaves_before_its_request_is_whole_is_no_failure_of_ours(engine: Engine, index: Index) -> None:
    """Every such client used to leave a traceback in the log."""

    async def scenario() -> None:
        app = create_app(Responder(engine, index, LIMITS, "fp_test"))
        sent = await hang_up_on(app, "/ask", {"question": "What"}, lambda sent: not sent, unfinished=True)
        assert sent[0]["status"] == 499

    run(scenario())


def test_a_question_breaks_off_in_the_middle_of_its_answer_too(parts: Parts, index: Index, tmp_path: Path) -> None:
    long_reader = Engine.open(tiny_model(tmp_path / "model", context=4096))

    async def scenario() -> None:
        wide = tiny_limits(maximum_new_tokens=4000, default_new_tokens=4000)
        responder = Responder(long_reader, index, wide, "fp_test")
        sent = await hang_up_on(create_app(responder), "/ask", {"question": "What is a cat?"}, lambda sent: not sent)
        assert sent[0]["status"] == 499
        responder.close()

    run(scenario())


def test_a_fourth_client_is_turned_away_with_429_and_when_to_come_back(engine: Engine, index: Index) -> None:
    async def scenario() -> None:
        responder = Responder(engine, index, tiny_limits(maximum_new_tokens=LONG), "fp_test")
        app = create_app(responder)
        first_three = [responder.lane.submit(counting) for _ in range(3)]
        sent = await hang_up_on(app, "/v1/completions", {"model": "tiny", "prompt": "a"}, lambda sent: bool(sent))
        assert sent[0]["status"] == 429
        assert int(dict(sent[0]["headers"])[b"retry-after"]) >= 1
        assert json.loads(sent[1]["body"])["error"]["type"] == "rate_limit_error"
        for job in first_three:
            job.stop()
        responder.close()

    run(scenario())


def test_an_error_in_the_middle_of_a_stream_is_a_frame_and_no_done_follows(engine: Engine, index: Index) -> None:
    responder = Responder(engine, index, tiny_limits(maximum_new_tokens=LONG, deadline_seconds=0.5), "fp_test")
    with TestClient(create_app(responder)) as browser:
        asked = {"model": "tiny", "prompt": "The cat", "temperature": 0, "max_tokens": LONG, "stream": True}
        text = browser.post("/v1/completions", json=asked).text
        client = OpenAI(base_url="http://testserver/v1", api_key="none", http_client=browser, max_retries=0)
        with pytest.raises(openai.APIError, match=r"no complete answer after 0\.5 s"):
            list(client.completions.create(model="tiny", prompt="The cat", temperature=0, max_tokens=LONG, stream=True))

    assert json.loads(text.split("\n\n")[-2].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert "[DONE]" not in text


# The package, the Bento, the server.

BLOCK = f"import sys\nsys.path[:] = [folder for folder in sys.path if folder != {str(ROOT / 'src')!r}]\n"
PACKAGE_AND_BUILD = """
import json, os, sys
from pathlib import Path
from llm_from_scratch.serving.limits import ServeParams
from llm_from_scratch.serving.package import build, package

model, floats, index, embedder, root = map(Path, sys.argv[1:6])
limits = ServeParams.model_validate(json.loads(sys.argv[6]))
tags = [package(packed, index, embedder, limits) for packed in (model, model, floats)]
stored = sorted(path.name for path in (Path(os.environ["BENTOML_HOME"]) / "models" / "llm_from_scratch").iterdir() if path.is_dir())
print(json.dumps({"models": tags, "stored": stored, "bento": build(root, tags[0])}))
"""


@dataclass(frozen=True)
class Built:
    """A store with a model that was put there twice, another one, and a Bento of the first.

    And the environment of a machine that has neither this project nor its package.
    """

    models: list[str]
    stored: list[str]
    bento: str
    home: Path
    elsewhere: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def built(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("bento")
    (folder / "block").mkdir()
    (folder / "block" / "sitecustomize.py").write_text(BLOCK, encoding="utf-8")
    (folder / "elsewhere").mkdir()
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("BENTOML", "PYTHON"))}
    ours |= {"BENTOML_HOME": str(folder / "home"), "BENTOML_DO_NOT_TRACK": "True", "OMP_NUM_THREADS": "1"}
    arguments = [str(parts.model), str(parts.floats), str(parts.index), str(parts.embedder), str(ROOT), LIMITS.model_dump_json()]
    here = ours | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", PACKAGE_AND_BUILD, *arguments], env=here, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    away = ours | {"PYTHONPATH": str(folder / "block")}
    return Built(made["models"], made["stored"], made["bento"], folder / "home", folder / "elsewhere", away)


@pytest.fixture(scope="module")
def server(built: Built) -> Iterator[str]:
    """The address of the served Bento."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "bentoml", "serve", built.bento, "--port", str(port)]
    with running(command, f"{address}/readyz", patience=30, environment=built.environment, folder=built.elsewhere):
        yield address


def _flip_last_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.slow
@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked.__name__)
def test_the_bento_served_without_the_package(asked: Asked, server: str, engine: Engine) -> None:
    asked(OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0), engine)


@pytest.mark.slow
def test_the_bento_brings_its_page(server: str) -> None:
    """What it does in a browser is in test_ui."""
    page = httpx2.get(f"{server}/ui/", timeout=30)
    scripts = re.findall(r'src="\./(assets/[^"]+\.js)"', page.text)

    assert (page.status_code, "Completion" in page.text) == (200, True)
    assert [httpx2.get(f"{server}/ui/{script}", timeout=30).status_code for script in scripts] == [200]
    assert httpx2.get(f"{server}/ui", timeout=30).headers["location"] == "/ui/"


@pytest.mark.slow
def test_the_bento_takes_over_another_model_of_its_store_and_the_first_one_again(server: str, built: Built, parts: Parts) -> None:
    for tag, folder in ((built.models[2], parts.floats), (built.models[0], parts.model)):
        digest = bundle.read_manifest(folder).digest
        taken = httpx2.post(f"{server}/admin/reload", json={"model": tag}, timeout=120)
        asked = httpx2.post(f"{server}/v1/completions", json={"model": "tiny", "prompt": "The cat"}, timeout=60)
        assert (taken.status_code, taken.json()["digest"], asked.headers["x-bundle-digest"]) == (200, digest, digest)

    wrong = httpx2.post(f"{server}/admin/reload", json={"model": "llm_from_scratch:none"}, timeout=60).json()["error"]
    assert wrong["param"] == "model"
    assert "python -m pipelines reload stores" in wrong["message"]


@pytest.fixture
def command(built: Built, parts: Parts, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python -m` what it is called with, in a project whose graph has chosen `parts.floats` to serve."""
    params = YAML(typ="safe").load(ROOT / "params.yaml")
    models, raw = tmp_path / "artifacts" / "models", tmp_path / "artifacts" / "raw"
    models.mkdir(parents=True)
    raw.mkdir()
    (tmp_path / "params.yaml").symlink_to(ROOT / "params.yaml")
    (tmp_path / "artifacts" / "index").symlink_to(parts.index)
    (raw / params["index"]["embedder"]).symlink_to(parts.embedder)
    (raw / "tiny").symlink_to(parts.embedder)
    for name in (*params["train"], "chosen"):
        (models / name).symlink_to(parts.floats)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "verdict.json").write_text('{"served": "chosen"}', encoding="utf-8")
    here = built.environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}

    def run(*told: str) -> subprocess.CompletedProcess[str]:
        whole = [sys.executable, "-m", *told]
        return subprocess.run(whole, cwd=tmp_path, env=here, capture_output=True, text=True, timeout=120, check=False)

    return run


@pytest.mark.slow
def test_one_command_lets_a_running_server_take_over_the_model_that_is_chosen_now(
    server: str, built: Built, parts: Parts, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    digests = [bundle.read_manifest(folder).digest[:12] for folder in (parts.floats, parts.model)]
    said = command("pipelines", "reload", "--url", server)
    assert said.stdout.startswith(f"{server} answers with {digests[0]}…"), said.stderr
    assert said.stdout.endswith(f"before with {digests[1]}…\n")
    assert (
        httpx2.get(f"{server}/v1/models", timeout=30).json()["data"][0]["id"]
        == YAML(typ="safe").load(ROOT / "params.yaml")["serve"]["model_name"]
    )
    nobody = command("pipelines", "reload", "--url", f"http://127.0.0.1:{free_port()}")
    assert nobody.stderr.startswith("pipelines reload: nobody answers at http://127.0.0.1:")
    assert nobody.stderr.count("\n") == 1
    assert httpx2.post(f"{server}/admin/reload", json={"model": built.models[0]}, timeout=120).status_code == 200


@pytest.mark.slow
def test_documents_of_ones_own_are_added_and_a_running_server_answers_from_them(
    server: str, built: Built, command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "boiler.md").write_text("# Boiler\n\nThe boiler stands in the cellar behind the door.\n", encoding="utf-8")

    def found() -> list[str]:
        asked = {"query": "Where is the boiler in the cellar?", "mode": "bm25"}
        return [hit["document"] for hit in httpx2.post(f"{server}/retrieve", json=asked, timeout=60).json()["data"]]

    before, added = found(), command("stages", "documents", "--add", "notes")
    assert added.returncode == 0, added.stderr
    assert "python -m pipelines serve --index var/index" in added.stderr
    taken = command("pipelines", "reload", "--index", "var/index", "--url", server)
    assert taken.returncode == 0, taken.stderr
    assert taken.stdout.startswith(f"{server} answers with ")
    again = command("pipelines", "reload", "--index", "var/index", "--url", server)
    assert again.stdout.endswith("), as before\n"), again.stdout
    plain = command("pipelines", "reload", "--url", server)
    assert plain.stdout.endswith("), as before; its index or embedder is new\n"), plain.stdout
    assert not any(hit.startswith("boiler.md") for hit in found())
    assert command("pipelines", "reload", "--index", "var/index", "--url", server).returncode == 0
    assert [any(hit.startswith("boiler.md") for hit in hits) for hits in (before, found()[:1])] == [False, True]
    nothing = command("pipelines", "reload", "--index", "var/nothing", "--url", server)
    assert (nothing.stderr.count("\n"), "var/nothing" in nothing.stderr) == (1, True), nothing.stderr
    assert httpx2.post(f"{server}/admin/reload", json={"model": built.models[0]}, timeout=120).status_code == 200


@pytest.mark.slow
def test_the_numbers_in_metrics_are_those_of_the_requests_that_were_made(server: str, engine: Engine) -> None:
    client, before, begin = OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0), metrics(server), time.monotonic()
    said = [client.completions.create(model="tiny", prompt="The cat", max_tokens=tokens, n=2).usage for tokens in (4, 12, 32)]
    said.append(client.chat.completions.create(model="tiny", messages=HELLO).usage)
    *_, last = client.completions.create(model="tiny", prompt="The", max_tokens=32, stream=True, stream_options={"include_usage": True})
    said.append(last.usage)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-5", prompt="The cat")
    assert httpx2.get(f"{server}/nowhere", timeout=30).status_code == 404  # each path used to have a histogram of its own, for good
    seconds = time.monotonic() - begin
    native, routes = "bentoml_service_request", (("completions", 200, 4), ("chat/completions", 200, 1), ("completions", 404, 1))
    asked = {f"{native}_duration_seconds_count{{/v1/{route},{status}}}": wanted for route, status, wanted in routes}
    while (new := metrics(server))["llm_running"] or any(new.get(name, 0) - before.get(name, 0) < asked[name] for name in asked):
        assert time.monotonic() - begin < 60  # a request is counted after its answer has left
    more = {name: value - before.get(name, 0) for name, value in new.items()}
    read, written = (sum(getattr(used, f"{kind}_tokens") for used in said) for kind in ("prompt", "completion"))

    for route, status, wanted in routes:
        labels = f"{{/v1/{route},{status}}}"
        assert (more[f"{native}_total{labels}"], more[f"{native}_duration_seconds_count{labels}"]) == (wanted, wanted)
        assert 0 < more[f"{native}_duration_seconds_sum{labels}"] < seconds
    assert not [name for name in new if "/nowhere" in name]
    assert (more["llm_requests_total{ok}"], more["llm_requests_total{model_not_found}"]) == (5, 1)
    assert (more["llm_tokens_total{prompt}"], more["llm_tokens_total{completion}"]) == (read, written)
    first, between = "llm_time_to_first_token_seconds", "llm_inter_token_latency_seconds"
    answers = 3 * 2 + 2
    assert more[f"{first}_count"] == answers
    assert 0 < more[f"{between}_count"] <= written - answers
    assert 0 < more[f"{first}_sum"] + more[f"{between}_sum"] < 2 * seconds  # two answers to a request run side by side
    for name in (first, between):
        buckets = [value for key, value in new.items() if key.startswith(f"{name}_bucket")]
        assert buckets == sorted(buckets)
        assert buckets[-1] == new[f"{name}_count"]
    assert [new[name] for name in ("llm_queue_length", "llm_running", "llm_cache_tokens{used}")] == [0, 0, 0]
    assert new["llm_cache_tokens{capacity}"] == LIMITS.slots * CONTEXT


def metrics(server: str) -> dict[str, float]:
    """What /metrics says now, by the name of each number and its labels but those of the service."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx2.get(f"{server}/metrics", timeout=30).text):
        for sample in family.samples:
            labels = [value for label, value in sample.labels.items() if not label.endswith(("_name", "_version"))]
            found[f"{sample.name}{{{','.join(labels)}}}" if labels else sample.name] = sample.value
    return found


@pytest.mark.slow
def test_where_the_bento_is_served_the_package_is_not_installed(built: Built) -> None:
    tried = subprocess.run(
        [sys.executable, "-c", "import llm_from_scratch"],
        cwd=built.elsewhere,
        env=built.environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert "No module named 'llm_from_scratch'" in tried.stderr


@pytest.mark.slow
def test_a_stored_model_is_named_by_its_content_and_kept_once(built: Built) -> None:
    assert built.models[0] == built.models[1]
    assert built.stored == sorted(tag.split(":")[1] for tag in set(built.models))


@pytest.mark.slow
def test_the_bento_holds_the_package_and_nothing_else_of_the_project_and_names_its_exact_model(built: Built) -> None:
    bento = built.home / "bentos" / built.bento.replace(":", "/")
    packed = {path.relative_to(bento / "src").parts[0] for path in (bento / "src").iterdir()}
    written = YAML(typ="safe").load(bento / "bento.yaml")

    assert packed == {"llm_from_scratch", "bentofile.yaml"}
    assert (bento / "src/llm_from_scratch/serving/landing.html").exists()
    assert written["args"]["model"] == written["services"][0]["models"][0]["tag"] == built.models[0]


@pytest.mark.slow
def test_without_a_host_the_server_listens_on_loopback_alone(server: str) -> None:
    port = int(server.rsplit(":", 1)[1])
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"]

    assert f"0100007F:{port:04X}" in listening
    assert f"00000000:{port:04X}" not in listening


@pytest.mark.slow
def test_a_port_in_use_is_one_clear_line(server: str) -> None:
    """bentoml itself answers with a page of traceback."""
    port = int(server.rsplit(":", 1)[1])
    with pytest.raises(ValueError, match=rf"^cannot listen on 127.0.0.1:{port} \(Address already in use\); stop .* --port$"):
        require_free("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"no such port"):
        require_free("127.0.0.1", 70_000)


@pytest.mark.slow
def test_a_stored_model_with_a_flipped_bit_is_one_clear_error_before_anything_listens(built: Built, tmp_path: Path) -> None:
    """The worker used to find out, and was started again and again."""
    shutil.copytree(built.home, tmp_path / "home")
    weights = tmp_path / "home/models" / built.models[0].replace(":", "/") / "model/model.safetensors"
    _flip_last_bit(weights)
    tried = subprocess.run(
        [sys.executable, "-m", "bentoml", "serve", built.bento, "--port", str(free_port())],
        cwd=built.elsewhere,
        env=built.environment | {"BENTOML_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert tried.returncode != 0
    assert "model.safetensors: sha256 is" in tried.stderr
    assert "Traceback" not in tried.stderr


@pytest.mark.slow
def test_a_bento_that_wants_a_key_does_not_open_without_one(built: Built) -> None:
    """`bentoml serve --arg` would be dropped without a word, and everybody let in: the Bento itself has to know of the key."""
    here = {name: value for name, value in built.environment.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "bentoml", "build", "src", "-f", "bentofile.yaml", "--output", "tag"]
    closed = subprocess.run(
        [*command, "--arg", f"model={built.models[0]}", "--arg", "api_key_file=/nowhere/key"],
        cwd=ROOT,
        env=here,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout.rpartition("__tag__:")[2]
    tried = subprocess.run(
        [sys.executable, "-m", "bentoml", "serve", closed.strip(), "--port", str(free_port())],
        cwd=built.elsewhere,
        env=built.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert tried.returncode != 0
    assert "cannot read an API key from /nowhere/key (No such file or directory)" in tried.stderr
    assert "Traceback" not in tried.stderr


def test_an_index_made_with_another_embedder_is_not_packaged(parts: Parts, tmp_path: Path) -> None:
    other = tiny_embedder(tmp_path / "other", seed=1)
    with pytest.raises(bundle.BundleError, match=r"index was made from embedder .* rebuild it with: dvc repro index"):
        package(parts.model, parts.index, other, LIMITS)


def test_a_damaged_model_is_not_packaged(parts: Parts, tmp_path: Path) -> None:
    damaged = tiny_model(tmp_path / "model")
    _flip_last_bit(damaged / "model.safetensors")
    with pytest.raises(bundle.BundleError, match=r"model\.safetensors: sha256 is"):
        package(damaged, parts.index, parts.embedder, LIMITS)
