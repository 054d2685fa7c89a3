"""How requests of OpenAI's API are read, before any model is asked."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from llm_from_scratch.inference.sampling import Sampling, TokenLogprob
from llm_from_scratch.serving.errors import ApiError
from llm_from_scratch.serving.limits import ServeParams
from llm_from_scratch.serving.logprobs import Names, chat_logprobs, completion_logprobs
from llm_from_scratch.serving.openai import Ask, ChatRequest, CompletionRequest, EmbeddingRequest, Form, Retrieve
from llm_from_scratch.serving.parsing import parse
from llm_from_scratch.serving.replies import Delta, Reply, merged, usage
from llm_from_scratch.tokenizer import BpeTokenizer
from tests.tiny import tiny_limits

LIMITS = tiny_limits(maximum_choices=4, maximum_waiting=2)


def drawn(request: CompletionRequest | ChatRequest) -> Sampling:
    """How its only answer is drawn."""
    [sampling] = request.sampling(LIMITS)
    return sampling


def completion(**fields: Any) -> CompletionRequest:
    return parse(json.dumps({"model": "tiny", "prompt": "The cat", **fields}).encode(), CompletionRequest)


def chat(**fields: Any) -> ChatRequest:
    said = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], **fields}
    return parse(json.dumps(said).encode(), ChatRequest)


def refused(body: bytes, form: type = ChatRequest) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(body, form)
    assert caught.value.status == 400
    assert "\n" not in caught.value.message
    return caught.value


def test_a_silent_request_gets_openais_defaults_and_our_length() -> None:
    sampling = drawn(completion())

    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.stop) == (1.0, 1.0, 8, ())


def test_two_silent_requests_draw_from_different_seeds_and_a_given_seed_is_kept() -> None:
    assert drawn(completion()).seed != drawn(completion()).seed
    assert drawn(completion(seed=7)).seed == 7
    assert drawn(completion(seed=-1)).seed == 2**63 - 1  # the API's seeds are signed, the generator's are not


def test_an_explicit_null_means_the_same_as_silence() -> None:
    silent = drawn(chat(seed=1))
    names = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "stream", "stream_options", "n", "tools", "logprobs")

    assert drawn(chat(seed=1, **dict.fromkeys(names))) == silent


def test_a_field_nobody_knows_is_ignored() -> None:
    assert chat(metadata={"who": "me"}, reasoning_effort="low", brand_new_field=1).messages[0].content == "Hello"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("audio", {}),
    ],
)
def test_what_would_change_the_answer_and_is_not_supported_is_refused_by_name(name: str, value: object) -> None:
    error = refused(json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], name: value}).encode())

    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert error.message.startswith(f"{name} is not supported")


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        (CompletionRequest, {"prompt": "a", "suffix": "end"}),
        (CompletionRequest, {"prompt": "a", "best_of": 3}),
        (EmbeddingRequest, {"input": "a", "dimensions": 8}),
    ],
)
def test_the_other_routes_refuse_by_name_too(form: type[Form], fields: dict[str, Any]) -> None:
    error = refused(json.dumps({"model": "tiny", **fields}).encode(), form)

    assert (error.param, error.code) == (list(fields)[-1], "unsupported_parameter")


def test_asking_an_unsupported_field_for_nothing_is_fine() -> None:
    harmless = {name: values[0] for name, values in ChatRequest.harmless.items() if values}

    assert drawn(chat(**harmless)).max_tokens == 8
    assert drawn(completion(suffix="", best_of=1, logprobs=False, echo=False, logit_bias={}, presence_penalty=0)).logprobs is None


def test_what_is_asked_for_reaches_the_sampler() -> None:
    asked = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2}
    asked |= {"presence_penalty": -1, "frequency_penalty": 1.5}
    sampling = drawn(chat(**asked, logit_bias={"5": -100, "7": 2.5}))

    assert {name: getattr(sampling, name) for name in asked} == asked
    assert sampling.logit_bias == ((5, -100), (7, 2.5))


def test_log_probabilities_are_a_number_in_completions_and_a_switch_with_a_number_in_chats() -> None:
    assert [drawn(completion(logprobs=wanted)).logprobs for wanted in (None, 0, 3)] == [None, 0, 3]
    assert drawn(chat(logprobs=False)).logprobs is None
    assert drawn(chat(logprobs=True)).logprobs == 0
    assert drawn(chat(logprobs=True, top_logprobs=4)).logprobs == 4
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "top_logprobs": 4}).encode()
    assert "wants logprobs to be true" in refused(body).message


def test_several_answers_get_seeds_of_their_own_and_the_first_is_that_of_one() -> None:
    alone, (first, second) = drawn(chat(seed=2**63 - 1)), chat(seed=2**63 - 1, n=2).sampling(LIMITS)

    assert (first, second.seed) == (alone, 0)
    with pytest.raises(ApiError, match="n is 5, more than the 4 answers") as caught:
        chat(n=5).sampling(LIMITS)
    assert (caught.value.status, caught.value.param) == (400, "n")


def test_reading_without_writing_takes_an_echo() -> None:
    assert completion(max_tokens=0, echo=True, logprobs=1).max_tokens == 0
    assert "max_tokens is 0" in refused(b'{"model": "tiny", "prompt": "a", "max_tokens": 0}', CompletionRequest).message


def test_an_answer_from_documents_is_one_answer_to_the_users_last_message() -> None:
    assert chat(documents=True).documents
    for fields, says in (
        ({"n": 2}, "one answer"),
        ({"logprobs": True}, "one answer"),
        ({"messages": [{"role": "assistant", "content": "Hello"}]}, "has to be the user's"),
    ):
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "documents": True, **fields}
        assert says in refused(json.dumps(body).encode()).message


def test_texts_to_embed_are_texts() -> None:
    def embedded(given: object) -> list[str]:
        return parse(json.dumps({"model": "tiny", "input": given}).encode(), EmbeddingRequest).input

    assert embedded("a") == ["a"]
    assert embedded(["a", "b"]) == ["a", "b"]
    for given, says in (
        ([1, 2], "tokens are not supported"),
        ([[1], [2]], "tokens are not supported"),
        ("", "empty text"),
        ([], "found []"),
    ):
        error = refused(json.dumps({"model": "tiny", "input": given}).encode(), EmbeddingRequest)
        assert error.param == "input"
        assert says in error.message


def test_content_comes_as_text_or_as_text_parts() -> None:
    parts = [{"type": "text", "text": "Read this."}, {"type": "text", "text": "What is it?"}]

    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "Read this.\nWhat is it?"


def test_an_image_is_refused_as_what_it_is() -> None:
    picture = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    error = refused(json.dumps({"model": "tiny", "messages": [{"role": "user", "content": picture}]}).encode())

    assert error.param == "messages.0.content"
    assert "image_url" in error.message
    assert "text alone" in error.message


def test_developer_is_the_newer_name_of_system() -> None:
    assert chat(messages=[{"role": "developer", "content": "Be brief."}]).messages[0].speaker == "system"


def test_a_prompt_is_text_or_tokens_or_a_list_of_either() -> None:
    assert completion(prompt="The cat").prompt == ["The cat"]
    assert completion(prompt=["The cat", ""]).prompt == ["The cat", ""]
    assert completion(prompt=[1, 2]).prompt == [[1, 2]]
    assert completion(prompt=[[1, 2], [3]]).prompt == [[1, 2], [3]]
    assert completion(prompt=None).prompt == parse(b'{"model": "tiny"}', CompletionRequest).prompt == [""]
    for wrong in ([], ["a", 1], [1, True], [-1], [[]], [1.0], {"a": 1}, 7):
        error = refused(json.dumps({"model": "tiny", "prompt": wrong}).encode(), CompletionRequest)
        assert (error.param, error.code) == ("prompt", "invalid_value")


def test_a_single_stop_string_needs_no_list() -> None:
    assert drawn(completion(stop=".")).stop == (".",)
    assert drawn(completion(stop=[".", "!"])).stop == (".", "!")
    assert drawn(completion(stop=[])).stop == ()


def test_both_names_of_the_length_are_read_and_a_contradiction_is_refused() -> None:
    assert drawn(chat(max_tokens=5)).max_tokens == 5
    assert drawn(chat(max_completion_tokens=6)).max_tokens == 6
    with pytest.raises(ApiError, match="max_tokens is 5 and max_completion_tokens 6"):
        drawn(chat(max_tokens=5, max_completion_tokens=6))


def test_more_tokens_than_the_limit_names_both_numbers() -> None:
    with pytest.raises(ApiError, match="max_tokens is 33, more than the 32") as caught:
        drawn(completion(max_tokens=33))
    assert (caught.value.status, caught.value.param) == (400, "max_tokens")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"{", "not JSON"),
        (b'{"model": NaN}', "NaN is no JSON number"),
        (b'{"model": "\xff"}', "not UTF-8 (byte 11)"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"model": "\\ud800"}', "half a character"),
        (b"[]", "send a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused_with_the_reason(body: bytes, says: str) -> None:
    error = refused(body)

    assert error.code == "invalid_json"
    assert says in error.message


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temperature": "hot"}, "temperature", "found 'hot'"),
        ({"temperature": 3}, "temperature", "found 3"),
        ({"temperature": True}, "temperature", "found True"),
        ({"top_p": 0}, "top_p", "found 0"),
        ({"max_tokens": 0}, "max_tokens", "found 0"),
        ({"max_tokens": 1.5}, "max_tokens", "found 1.5"),
        ({"seed": 2**63}, "seed", "found 9223372036854775808"),
        ({"stop": ["a", ""]}, "stop.1", "found ''"),
        ({"stop": list("abcde")}, "stop", "at most 4"),
        ({"stream": "yes"}, "stream", "found 'yes'"),
        ({"messages": []}, "messages", "found []"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "found 'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "found None"),
        ({"messages": "Hello"}, "messages", "found 'Hello'"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_found(fields: dict[str, Any], param: str, says: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **fields}
    error = refused(json.dumps(body).encode())

    assert (error.param, error.code) == (param, "invalid_value")
    assert says in error.message


def test_a_missing_field_is_named() -> None:
    assert refused(b'{"messages": [{"role": "user", "content": "Hi"}]}').param == "model"
    assert refused(b'{"model": "tiny", "messages": [{"role": "user"}]}').param == "messages.0.content"
    assert refused(b"{}", Ask).message == "question is missing"


def test_a_question_has_to_say_something() -> None:
    assert parse(b'{"question": "What is a cat?"}', Ask).question == "What is a cat?"
    assert refused(b'{"question": "  "}', Ask).param == "question"


def test_an_error_has_the_four_fields_that_clients_read() -> None:
    inside = {"message": "m", "type": "invalid_request_error", "param": "p", "code": "c"}

    assert ApiError(400, "m", "c", param="p").body() == {"error": inside}
    assert ApiError(429, "m", "c", retry_after=3).headers == {"Retry-After": "3"}
    assert [ApiError(status, "m", "c").kind for status in (404, 429, 503)] == ["invalid_request_error", "rate_limit_error", "server_error"]


def test_a_stream_says_in_pieces_what_the_whole_answer_says() -> None:
    deltas = [Delta("one\n", 0, completion_tokens=1), Delta("two", 4, (), "stop", 2, 3)]
    for form, said in (("chat", "content"), ("completion", "text")):
        reply = Reply(form, "tiny", "fp_1", include_usage=True, created=1, key="k")
        stream = reply.opening(0) + "".join(reply.more(0, delta) for delta in deltas) + reply.closing(deltas[-1:])
        frames = stream.split("\n\n")
        assert frames.pop() == ""
        assert frames.pop() == "data: [DONE]"
        assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
        chunks = [json.loads(frame.removeprefix("data: ")) for frame in frames]
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        whole = reply.whole([merged(deltas)])
        choice = whole["choices"][0]

        assert "".join(part.get("delta", part).get(said, "") for part in choices) == choice.get("message", choice)[said] == "one\ntwo"
        assert [part["finish_reason"] for part in choices if part["finish_reason"]] == [choice["finish_reason"]] == ["stop"]
        assert [chunk["usage"] for chunk in chunks if chunk["usage"]] == [whole["usage"]]
        assert whole["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
        assert {chunk["id"] for chunk in chunks} == {whole["id"]}


def test_a_prompt_with_several_answers_is_counted_once() -> None:
    answers = [Delta("", 0, (), "stop", prompt, 1) for prompt in (5, 5, 7, 7)]

    assert Reply("completion", "tiny", "fp_1", choices=2).counted(answers) == usage(12, 4)


def test_tokens_are_spelled_as_the_api_spells_them() -> None:
    """Worked by hand: é is two bytes, each a token here; the API calls half a character `bytes:`, and JSON has no minus infinity."""
    tokenizer = BpeTokenizer([])
    (a, first, second), end, words = tokenizer.encode("aé"), tokenizer.eot, Names(tokenizer)
    tokens = [
        (a, None),
        (first, TokenLogprob(first, -0.5, ((first, -0.5), (a, -1.5)))),
        (second, TokenLogprob(second, -math.inf, ())),
        (end, None),
    ]

    told = completion_logprobs(tokens, words, 10)
    assert told["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "<|endoftext|>"]
    assert told["token_logprobs"] == [None, -0.5, -9999.0, None]
    assert told["top_logprobs"] == [None, {"bytes:\\xc3": -0.5, "a": -1.5}, {"bytes:\\xa9": -9999.0}, None]
    assert told["text_offset"] == [10, 11, 11, 12]
    assert chat_logprobs(tokens, words)["content"][0]["top_logprobs"][1] == {"token": "a", "logprob": -1.5, "bytes": [97]}


def test_the_limits_refuse_a_default_beyond_the_maximum_and_a_deadline_beyond_bentomls() -> None:
    with pytest.raises(ValidationError, match="default_new_tokens is 33, more than maximum_new_tokens, 32"):
        ServeParams.model_validate({**LIMITS.model_dump(), "default_new_tokens": 33})
    with pytest.raises(ValidationError, match="deadline_seconds"):
        ServeParams.model_validate({**LIMITS.model_dump(), "deadline_seconds": 601})
    with pytest.raises(ValidationError, match="maximum_choices is 5, and slots and maximum_waiting leave 4 places"):
        ServeParams.model_validate({**LIMITS.model_dump(), "maximum_choices": 5})


def test_a_search_has_a_query_and_knows_its_modes() -> None:
    assert parse(b'{"query": "a cat", "k": 3, "mode": "bm25"}', Retrieve).k == 3
    assert refused(b'{"query": " "}', Retrieve).param == "query"
    assert refused(b'{"query": "a", "mode": "best"}', Retrieve).param == "mode"
    assert refused(b'{"query": "a", "k": 0}', Retrieve).param == "k"
