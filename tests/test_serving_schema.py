"""How requests of OpenAI's API are read, before any model is asked."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from llm_from_scratch.serving.errors import ApiError
from llm_from_scratch.serving.limits import ServeParams
from llm_from_scratch.serving.openai import HARMLESS, Ask, ChatRequest, CompletionRequest, parse
from llm_from_scratch.serving.replies import Reply, usage

LIMITS = ServeParams(
    model="chat_int8",
    model_name="tiny",
    maximum_prompt_tokens=64,
    maximum_new_tokens=32,
    default_new_tokens=8,
    maximum_body_bytes=4096,
    maximum_waiting=2,
    deadline_seconds=30,
    passages=1,
)


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
    sampling = completion().sampling(LIMITS)

    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.stop) == (1.0, 1.0, 8, ())


def test_two_silent_requests_draw_from_different_seeds_and_a_given_seed_is_kept() -> None:
    assert completion().sampling(LIMITS).seed != completion().sampling(LIMITS).seed
    assert completion(seed=7).sampling(LIMITS).seed == 7
    assert completion(seed=-1).sampling(LIMITS).seed == 2**63 - 1  # the API's seeds are signed, the generator's are not


def test_an_explicit_null_means_the_same_as_silence() -> None:
    silent = chat(seed=1).sampling(LIMITS)
    names = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "stream", "stream_options", "n", "tools", "logprobs")

    assert chat(seed=1, **dict.fromkeys(names)).sampling(LIMITS) == silent


def test_a_field_nobody_knows_is_ignored() -> None:
    assert chat(metadata={"who": "me"}, reasoning_effort="low", brand_new_field=1).messages[0].content == "Hello"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("logprobs", True),
        ("logprobs", 0),  # in the completions API 0 asks for the log-probability of each token, and 0 == False in Python
        ("top_logprobs", 3),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5),
        ("echo", True),
        ("suffix", "end"),
        ("audio", {}),
    ],
)
def test_what_would_change_the_answer_and_is_not_supported_is_refused_by_name(name: str, value: object) -> None:
    error = refused(json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], name: value}).encode())

    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert error.message.startswith(f"{name} is not supported")


def test_asking_an_unsupported_field_for_nothing_is_fine() -> None:
    harmless = {name: values[0] for name, values in HARMLESS.items() if values}

    assert chat(**harmless).sampling(LIMITS).max_tokens == 8


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


def test_a_prompt_is_text_or_tokens_and_one_at_a_time() -> None:
    assert completion(prompt=[1, 2]).prompt == completion(prompt=[[1, 2]]).prompt == [1, 2]
    assert completion(prompt=["The cat"]).prompt == "The cat"
    assert "found 2 prompts" in refused(b'{"model": "tiny", "prompt": ["a", "b"]}', CompletionRequest).message


def test_a_single_stop_string_needs_no_list() -> None:
    assert completion(stop=".").sampling(LIMITS).stop == (".",)
    assert completion(stop=[".", "!"]).sampling(LIMITS).stop == (".", "!")
    assert completion(stop=[]).sampling(LIMITS).stop == ()


def test_both_names_of_the_length_are_read_and_a_contradiction_is_refused() -> None:
    assert chat(max_tokens=5).sampling(LIMITS).max_tokens == 5
    assert chat(max_completion_tokens=6).sampling(LIMITS).max_tokens == 6
    with pytest.raises(ApiError, match="max_tokens is 5 and max_completion_tokens 6"):
        chat(max_tokens=5, max_completion_tokens=6).sampling(LIMITS)


def test_more_tokens_than_the_limit_names_both_numbers() -> None:
    with pytest.raises(ApiError, match="max_tokens is 33, more than the 32") as caught:
        completion(max_tokens=33).sampling(LIMITS)
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
    for form, said in (("chat", "content"), ("completion", "text")):
        reply = Reply(form, "tiny", "fp_1", created=1, key="k")
        frames = [*reply.opening(), reply.text("one\n"), reply.text("two"), *reply.closing("stop", usage(2, 3))]
        assert all(frame.startswith("data: ") and frame.endswith("\n\n") and "\n" not in frame[:-2] for frame in frames)
        chunks = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        whole = reply.whole("one\ntwo", "stop", usage(2, 3))
        choice = whole["choices"][0]

        assert "".join(part.get("delta", part).get(said, "") for part in choices) == choice.get("message", choice)[said] == "one\ntwo"
        assert choices[-1]["finish_reason"] == choice["finish_reason"] == "stop"
        assert chunks[-1]["usage"] == whole["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
        assert {chunk["id"] for chunk in chunks} == {whole["id"]}
        assert frames[-1] == "data: [DONE]\n\n"


def test_the_limits_refuse_a_default_beyond_the_maximum_and_a_deadline_beyond_bentomls() -> None:
    with pytest.raises(ValidationError, match="default_new_tokens is 33, more than maximum_new_tokens, 32"):
        ServeParams.model_validate({**LIMITS.model_dump(), "default_new_tokens": 33})
    with pytest.raises(ValidationError, match="deadline_seconds"):
        ServeParams.model_validate({**LIMITS.model_dump(), "deadline_seconds": 601})
