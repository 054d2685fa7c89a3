"""The API as others' programs call it, over a socket: openai, langchain-openai, curl, lm-eval, and schemathesis with wrong requests."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import gc
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import openai
import pytest
import schemathesis
import torch
import uvicorn
from openai import OpenAI
from transformers import AutoModelForCausalLM

from benchmarks import serving_clients
from llm_from_scratch.inference import batching
from llm_from_scratch.inference.batching import Batching
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.retrieval.index import Index
from llm_from_scratch.serving.app import create_app
from llm_from_scratch.serving.embedding import SharedEmbedder
from llm_from_scratch.serving.lane import Job
from llm_from_scratch.serving.replies import Delta, Reply
from llm_from_scratch.serving.responder import Responder
from llm_from_scratch.tokenizer.chat import render
from pipelines.servers import free_port
from tests.tiny import SENTENCES, tiny_embedder, tiny_index, tiny_limits, tiny_model

LIMITS = tiny_limits(slots=4, maximum_waiting=32, maximum_choices=8, maximum_prompt_tokens=100, maximum_body_bytes=65536)
ROOT = Path(__file__).parent.parent
KEY = "sk-test"
QUESTION = [{"role": "user", "content": "What is a cat?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of floats, so that transformers can say what it should."""
    made = tmp_path_factory.mktemp("served")
    tiny_model(made / "model")
    tiny_index(made / "index", SharedEmbedder.open(tiny_embedder(made / "embedder")))
    return made


@pytest.fixture(scope="module")
def responder(folder: Path) -> Responder:
    engine = Engine.open(folder / "model", batching=Batching(slots=LIMITS.slots, prefill_chunk=LIMITS.prefill_chunk))
    return Responder(engine, Index.open(folder / "index", SharedEmbedder.open(folder / "embedder")), LIMITS, "fp_test")


@pytest.fixture(scope="module")
def address(responder: Responder) -> Iterator[str]:
    """Where the app is served, as uvicorn serves it under BentoML too."""
    server = uvicorn.Server(uvicorn.Config(create_app(responder, KEY), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def client(address: str) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=60)


def true_logprobs(folder: Path, ids: list[int]) -> torch.Tensor:
    """What transformers says: (T, V) log probabilities of what follows each of the T tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    with torch.inference_mode():
        said: torch.Tensor = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return said


# OpenAI's own client.


def test_an_echo_scores_a_text_as_transformers_does(client: OpenAI, folder: Path, responder: Responder) -> None:
    text = "The cat is a small animal."
    ids = responder.engine.tokenizer.encode(text)
    truth = true_logprobs(folder, ids)

    said = client.completions.create(model="tiny", prompt=text, echo=True, logprobs=3, max_tokens=0)
    told = said.choices[0].logprobs
    assert told is not None
    assert said.choices[0].text == "".join(told.tokens) == text
    assert told.token_logprobs[0] is None
    np.testing.assert_allclose(told.token_logprobs[1:], [truth[place, token] for place, token in enumerate(ids[1:])], atol=1e-4)
    for place, top in enumerate(told.top_logprobs[1:]):
        np.testing.assert_allclose(sorted(top.values())[-3:], truth[place].topk(3).values.flip(0), atol=1e-4)
    assert [text[start:].startswith(token) for token, start in zip(told.tokens, told.text_offset, strict=True)] == [True] * len(ids)
    assert said.usage is not None
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (len(ids), 0)


def test_log_probabilities_of_an_answer_are_those_of_transformers_whole_and_streamed(
    client: OpenAI, folder: Path, responder: Responder
) -> None:
    words = responder.engine.tokenizer
    asked: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    streamed = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(**asked, stream=True)]

    assert whole is not None
    assert whole.content is not None
    parts = [token for told in streamed if told is not None and told.content for token in told.content]
    assert [token.token for token in parts] == [token.token for token in whole.content]
    assert len(whole.content) == 6
    pieces = responder.engine.chat(QUESTION, Sampling(temperature=0, max_tokens=6))
    answer = [token for piece in pieces for token in piece.token_ids]
    assert [bytes(token.bytes or []) for token in whole.content] == [words.bytes_of(token) for token in answer]
    prompt, _ = render(QUESTION, words, prompt=True)
    truth = true_logprobs(folder, [*prompt, *answer])[len(prompt) - 1 :]
    np.testing.assert_allclose(
        [token.logprob for token in whole.content], [truth[place, token] for place, token in enumerate(answer)], atol=1e-4
    )
    assert all(token.top_logprobs[0].logprob == token.logprob for token in whole.content)  # greedy: the likeliest is the one


def test_several_prompts_and_answers_come_in_order_and_are_those_of_each_alone(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": ["The cat", "A river"], "n": 2, "seed": 5, "max_tokens": 6}
    both = client.completions.create(**asked)
    alone = [
        client.completions.create(model="tiny", prompt=prompt, seed=seed, max_tokens=6)
        for prompt in ("The cat", "A river")
        for seed in (5, 6)
    ]

    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices] == [one.choices[0].text for one in alone]
    assert both.usage is not None
    assert both.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone[::2] if one.usage)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    texts = ["".join(chunk.choices[0].text for chunk in chunks if chunk.choices and chunk.choices[0].index == place) for place in range(4)]
    assert texts == [choice.text for choice in both.choices]
    assert chunks[-1].usage == both.usage
    with pytest.raises(openai.BadRequestError, match="9 answers are wanted, more than the 8"):
        client.completions.create(model="tiny", prompt=["a", "b", "c"], n=3)


def test_a_bias_takes_the_choice_away_and_a_token_that_is_none_is_refused(client: OpenAI, responder: Responder) -> None:
    words = responder.engine.tokenizer
    [only] = words.encode("x")

    said = client.completions.create(model="tiny", prompt="The cat", temperature=0, max_tokens=4, logit_bias={str(only): 100})
    assert said.choices[0].text == "xxxx"
    with pytest.raises(openai.BadRequestError, match=f"found token {words.vocab_size}") as caught:
        client.completions.create(model="tiny", prompt="The cat", logit_bias={str(words.vocab_size): 1})
    assert caught.value.param == "logit_bias"


def test_what_is_beyond_openai_goes_through_its_client_as_extra_fields(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "The cat", "max_tokens": 6}
    greedy = client.completions.create(temperature=0, **asked).choices[0].text

    for field in ({"top_k": 1}, {"min_p": 1.0}):
        assert client.completions.create(extra_body=field, **asked).choices[0].text == greedy
    assert client.completions.create(temperature=0, extra_body={"repetition_penalty": 10.0}, **asked).choices[0].text != greedy
    assert client.completions.create(temperature=0, presence_penalty=2, frequency_penalty=2, **asked).usage is not None


def test_an_embedding_is_the_embedders_as_numbers_and_as_base64(client: OpenAI, responder: Responder, address: str) -> None:
    truth = responder.index.embedder.embed(list(SENTENCES[:2]))

    for encoding in ("float", "base64"):
        said = client.embeddings.create(model="tiny-embedder", input=list(SENTENCES[:2]), encoding_format=encoding)
        told = [row.embedding if encoding == "float" else np.frombuffer(base64.b64decode(str(row.embedding)), "<f4") for row in said.data]
        np.testing.assert_allclose(told, truth, atol=1e-6)
    np.testing.assert_allclose(client.embeddings.create(model="tiny-embedder", input=SENTENCES[0]).data[0].embedding, truth[0], atol=1e-6)
    with pytest.raises(openai.NotFoundError, match="there is 'tiny-embedder'"):
        client.embeddings.create(model="tiny", input="a")
    with pytest.raises(openai.BadRequestError, match="dimensions is not supported"):
        client.embeddings.create(model="tiny-embedder", input="a", dimensions=2)
    with pytest.raises(openai.BadRequestError, match="found 5 texts, more than the 4"):
        client.embeddings.create(model="tiny-embedder", input=list("abcde"))
    with pytest.raises(openai.BadRequestError, match="no more than 62 are read"):
        client.embeddings.create(model="tiny-embedder", input="cat " * 70)


def test_a_chat_with_documents_cites_what_it_read_as_annotations(
    client: OpenAI, responder: Responder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "What is a river?"}], "temperature": 0}
    said = client.chat.completions.create(**asked, extra_body={"documents": True}).choices[0]
    asked_directly = client.post("/../ask", body={"question": "What is a river?"}, cast_to=dict[str, Any])

    assert said.message.content == asked_directly["answer"]
    cited = said.message.annotations
    assert cited
    assert [note.type for note in cited] == ["url_citation"] * len(cited)
    assert [note.url_citation.title for note in cited] == [source["title"] for source in asked_directly["citations"]]
    assert cited[0].url_citation.url.startswith("urn:document:Q")
    assert 0 <= cited[0].url_citation.start_index < cited[0].url_citation.end_index <= len(said.message.content or "")
    writer = responder.engine._writer
    assert isinstance(writer, batching.Batcher)
    forward = writer._forward  # a tiny model has said everything before the first frame leaves
    monkeypatch.setattr(writer, "_forward", lambda *given: (time.sleep(0.02), forward(*given))[1])
    streamed = list(client.chat.completions.create(**asked, stream=True, extra_body={"documents": True}))
    noted = [chunk.choices[0].delta.annotations for chunk in streamed if "annotations" in (chunk.choices[0].delta.model_extra or {})]  # type: ignore[attr-defined]
    assert noted == [[note.to_dict() for note in cited]], "once, at the end"
    pieces = [chunk.choices[0].delta.content or "" for chunk in streamed]
    assert "".join(pieces) == said.message.content
    assert sum(map(bool, pieces)) > 1, "it does not wait for its end"


def test_passages_are_found_without_an_answer_and_filtered(client: OpenAI) -> None:
    def retrieve(**fields: Any) -> list[dict[str, Any]]:
        return client.post("/../retrieve", body=fields, cast_to=dict[str, Any])["data"]  # type: ignore[no-any-return]

    best, *_ = retrieve(query="river", k=3, mode="bm25")
    assert (best["title"], best["text"], best["rank"]) == ("river", SENTENCES[2], 1)
    assert [hit["title"] for hit in retrieve(query="an animal", k=3, filters={"title": ["dog", "star"]}, mode="dense")] != []
    assert {hit["title"] for hit in retrieve(query="an animal", k=3, filters={"title": ["dog", "star"]}, mode="dense")} <= {"dog", "star"}
    with pytest.raises(openai.BadRequestError, match="no passage has a 'colour'"):
        retrieve(query="river", filters={"colour": "red"})
    with pytest.raises(openai.BadRequestError, match="k is 4, more than the 3 passages"):
        retrieve(query="river", k=4)


# Others' clients.


def test_langchain_chats_streams_counts_and_embeds(address: str, responder: Responder) -> None:
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    chat = ChatOpenAI(model="tiny", base_url=f"{address}/v1", api_key=KEY, temperature=0, max_tokens=8, max_retries=0)  # type: ignore[arg-type, call-arg]
    truth = "".join(piece.text for piece in responder.engine.chat(QUESTION, Sampling(temperature=0, max_tokens=8)))
    said = chat.invoke("What is a cat?")
    chunks = list(chat.stream([("system", "Be brief."), ("user", "What is a cat?")]))

    assert said.content == truth
    assert said.usage_metadata is not None
    assert said.usage_metadata["output_tokens"] == 8
    assert "".join(str(chunk.content) for chunk in chunks)
    logprobs = chat.bind(logprobs=True).invoke("What is a cat?").response_metadata["logprobs"]
    assert len(logprobs["content"]) == 8
    embedder = OpenAIEmbeddings(model="tiny-embedder", base_url=f"{address}/v1", api_key=KEY, check_embedding_ctx_length=False)  # type: ignore[arg-type, call-arg]
    np.testing.assert_allclose(embedder.embed_query("A river"), responder.index.embedder.embed(["A river"])[0], atol=1e-6)


def test_curl_reads_a_stream_line_by_line_and_is_told_when_it_lacks_the_key(address: str) -> None:
    body = json.dumps({"model": "tiny", "prompt": "The cat", "max_tokens": 3, "stream": True})
    command = ["curl", "--silent", "--no-buffer", "--include", f"{address}/v1/completions", "--data", body]
    said = subprocess.run([*command, "--oauth2-bearer", KEY], capture_output=True, text=True, timeout=60, check=True).stdout
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    head, *lines = said.split("\n\n")
    assert "content-type: text/event-stream" in head.lower()
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines if line)
    assert refused.startswith("HTTP/1.1 401")
    assert json.loads(refused.rpartition("\n")[2])["error"]["code"] == "invalid_api_key"


TASK = """
task: which_animal
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.mark.parametrize("as_tokens", [True, False])
def test_lm_eval_scores_a_task_of_ours_as_transformers_would(
    as_tokens: bool, address: str, folder: Path, responder: Responder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    asked = [
        {"question": "The cat is", "choices": ["a small animal", "water that runs"]},
        {"question": "A river is", "choices": ["a sphere of gas", "water"]},
        {"question": "A star", "choices": ["is a sphere", "barks at the cat"]},
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(json.dumps(one) for one in asked) + "\n", encoding="utf-8")
    (tmp_path / "task.yaml").write_text(TASK.format(questions=questions), encoding="utf-8")
    for name, value in {"OPENAI_API_KEY": KEY, "HF_DATASETS_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setitem(os.environ, name, value)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    scored = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "tiny",
            "base_url": f"{address}/v1/completions",
            "tokenizer": str(folder / "model"),
            "tokenizer_backend": "huggingface",
            "tokenized_requests": as_tokens,
            "num_concurrent": 2,
            "max_length": 64,
        },
        batch_size=2,
        tasks=["which_animal"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )

    words = responder.engine.tokenizer
    for one, sample in zip(asked, scored["samples"]["which_animal"], strict=True):
        context = words.encode(str(one["question"]))
        for choice, (logprob, _) in zip(one["choices"], sample["filtered_resps"], strict=True):
            ids = words.encode(f"{one['question']} {choice}")
            truth = true_logprobs(folder, ids)
            assert math.isclose(logprob, sum(float(truth[at - 1, ids[at]]) for at in range(len(context), len(ids))), abs_tol=1e-3)


# Many at once, and the end.


def test_of_many_streaming_clients_none_is_cut_off_and_those_beyond_the_places_are_sent_away(address: str, responder: Responder) -> None:
    """The benchmark does it with 200 and more."""
    places = LIMITS.slots + LIMITS.maximum_waiting
    saw = asyncio.run(serving_clients.run(serving_clients.Load(address, "tiny", 2 * places, 1, 16, key=KEY, temperature=0.0)))

    assert [outcome.said for outcome in saw.outcomes if outcome.how == "lost"] == []
    assert saw.count("finished") >= places
    assert saw.count("finished") + saw.count("refused") == 2 * places
    assert all(outcome.tokens == 16 for outcome in saw.finished())


def test_nothing_is_left_of_requests_that_were_answered_cut_off_or_refused(address: str, responder: Responder) -> None:
    """What is left over of each request is what a server dies of after a week: the benchmark shows its memory over 5,000."""
    load = serving_clients.Load(address, "tiny", 20, 12, 4, key=KEY)
    asyncio.run(serving_clients.run(load))
    before = _kept()
    asyncio.run(serving_clients.run(load))
    left = asyncio.run(serving_clients.run(dataclasses.replace(load, requests=3, max_tokens=32, leave_after=1)))
    wrong = asyncio.run(serving_clients.run(dataclasses.replace(load, requests=1, model="gpt-5")))
    assert (left.count("left"), wrong.count("lost")) == (60, 20)

    deadline = time.monotonic() + 20
    while (responder.lane.running or responder.lane.waiting) and time.monotonic() < deadline:
        time.sleep(0.01)
    stats = responder.engine.stats()
    assert (stats.running, stats.waiting, stats.cache_tokens_used) == (0, 0, 0)
    while ((kept := _kept()) - before or kept.keys() & OF_A_REQUEST) and time.monotonic() < deadline:
        time.sleep(0.1)  # a connection of a client that left is noticed a moment later
    assert kept - before == Counter()
    assert not kept.keys() & OF_A_REQUEST
    assert responder.users == 0


OF_A_REQUEST = {"Job", "Delta", "Reply", "Request"}


def _kept() -> Counter[str]:
    """What there is of one request each, of tasks that are not done, and of timers that are not off."""
    gc.collect()
    return Counter(type(thing).__name__ for thing in gc.get_objects() if _counts(thing))


def _counts(thing: object) -> bool:
    if type(thing) in weakref.ProxyTypes:  # to ask a dead one what it is raises an error
        return False
    if isinstance(thing, asyncio.Task):
        return not thing.done()
    if isinstance(thing, asyncio.TimerHandle):
        return not thing.cancelled()
    return isinstance(thing, Job | Delta | Reply | batching.Request)


def test_at_sigterm_what_runs_is_finished_and_what_comes_is_sent_away(folder: Path) -> None:
    limits = LIMITS.model_copy(update={"slots": 1, "maximum_choices": 1, "maximum_new_tokens": 4000, "default_new_tokens": 8})
    (folder / "limits.json").write_text(limits.model_dump_json(), encoding="utf-8")
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "tests.serving_child", str(folder), str(port)], cwd=ROOT)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        _until_it_answers(client, process)
        asked: dict[str, Any] = {"model": "tiny", "prompt": "The cat", "temperature": 0, "stream": True}
        running = client.completions.create(max_tokens=2000, **asked)
        first = next(running)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(lambda: list(client.completions.create(max_tokens=4, **asked)))
            time.sleep(0.2)  # until it stands in line
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)  # until the signal is there
            with pytest.raises(openai.InternalServerError, match="going down") as caught:
                client.completions.create(model="tiny", prompt="The cat")
            rest = list(running)
            assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "1")
            assert first.choices[0].finish_reason is None
            assert rest[-1].choices[0].finish_reason == "length"
            assert waiting.result(60)[-1].choices[0].finish_reason == "length"
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


def _until_it_answers(client: OpenAI, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            time.sleep(0.1)
    pytest.fail("the server did not come up")


# Wrong requests.


def test_no_request_that_schemathesis_thinks_of_makes_the_server_fail(address: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json", headers=headers)
    checks = [
        schemathesis.checks.not_a_server_error,
        schemathesis.specs.openapi.checks.status_code_conformance,
        schemathesis.specs.openapi.checks.content_type_conformance,
        schemathesis.specs.openapi.checks.response_schema_conformance,
    ]
    bounded = hypothesis.settings(
        max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    found = [result.ok() for result in schema.get_all_operations()]
    assert {operation.label for operation in found} >= {"POST /v1/chat/completions", "POST /v1/embeddings", "GET /v1/models", "POST /ask"}
    for operation in found:
        for mode in schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE:

            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            @bounded
            def holds(case: schemathesis.Case) -> None:
                case.call_and_validate(headers=headers, checks=checks, timeout=30)

            holds()
