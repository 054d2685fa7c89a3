"""Requests of the OpenAI API, as far as a small text model can serve them.

Read the way their clients write: null means absent, unknown fields are ignored, and a field that would change the answer but is not
supported is refused by name, never ignored. Images, audio, tools and more than one choice are what it cannot do.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.serving.errors import ApiError
from llm_from_scratch.serving.limits import ServeParams

SEEDS = 2**63
"""Ours are 0 up to this; the API's run from its negative, and wrap around."""

HARMLESS: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "echo": (False,),
    "suffix": ("",),
}
"""Fields that this server does not support, each with the values that ask for nothing."""


def _joined_text(content: object) -> object:
    """A message's content as one string: it may come as a list of text parts."""
    if not isinstance(content, list):
        return content
    for place, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"part {place} is {_short(kind)}; this model reads text alone, as in {{'type': 'text', 'text': '…'}}")
    return "\n".join(part["text"] for part in content)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _single_prompt(prompt: object) -> object:
    """A prompt may come wrapped in a list, as a batch of one."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise ValueError(f"found {len(prompt)} prompts; send them one at a time")
        return prompt[0]
    return prompt


class Ask(BaseModel):
    """POST /ask: a question to answer from the documents."""

    model_config = ConfigDict(strict=True)

    question: Annotated[str, Field(pattern=r"\S")]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class Request(BaseModel):
    """What completions and chat have in common. Beyond OpenAI's fields, `top_k` and `repetition_penalty` as vLLM names them."""

    model_config = ConfigDict(strict=True)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=SEEDS)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4), BeforeValidator(_as_list)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def wanted_tokens(self) -> tuple[str, int | None]:
        """The field that says how many tokens at most, and what it says."""
        return "max_tokens", self.max_tokens

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, limits: ServeParams) -> Sampling:
        """How to draw the answer; OpenAI's defaults where the request is silent. Raises ApiError when it asks for too many tokens."""
        name, tokens = self.wanted_tokens
        if tokens is not None and tokens > limits.maximum_new_tokens:
            message = f"{name} is {tokens}, more than the {limits.maximum_new_tokens} that this server gives; ask for fewer"
            raise ApiError(400, message, "invalid_value", param=name)
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            max_tokens=limits.default_new_tokens if tokens is None else tokens,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            repetition_penalty=self.repetition_penalty or 1.0,
            stop=tuple(self.stop or ()),
            seed=secrets.randbelow(SEEDS) if self.seed is None else self.seed % SEEDS,
        )


class CompletionRequest(Request):
    """POST /v1/completions: text to continue, or the ids of its tokens."""

    prompt: Annotated[str | list[int] | None, BeforeValidator(_single_prompt)] = None


class Message(BaseModel):
    """One turn. `developer` is OpenAI's newer name for `system`."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_text)]

    @property
    def speaker(self) -> Literal["system", "user", "assistant"]:
        """The role as the model knows it."""
        return "system" if self.role == "developer" else self.role


class ChatRequest(Request):
    """POST /v1/chat/completions: a conversation that waits for the assistant's turn."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def wanted_tokens(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is None:
            return super().wanted_tokens
        if self.max_tokens not in (None, self.max_completion_tokens):
            message = f"max_tokens is {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}; give one of them"
            raise ApiError(400, message, "invalid_value", param="max_tokens")
        return "max_completion_tokens", self.max_completion_tokens


R = TypeVar("R", bound=BaseModel)


def parse(body: bytes, form: type[R]) -> R:
    """The request in `body`. Raises ApiError 400 naming the field at fault, what was found there and what was wanted."""
    fields = _object(body)
    if issubclass(form, Request):
        refuse_unsupported(fields)
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        issue = error.errors(include_url=False)[0]
        path = [str(step) for step in issue["loc"]]
        if issue["type"] == "missing":
            raise ApiError(400, f"{'.'.join(path)} is missing", "missing_required_parameter", param=".".join(path)) from None
        names = _field_path(path, fields)
        wanted = issue["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{names}: {wanted}; found {_short(issue['input'])}", "invalid_value", param=names) from None


def refuse_unsupported(fields: Mapping[str, Any]) -> None:
    """Raises ApiError 400 for the first field that asks for what this server cannot do."""
    for name, harmless in HARMLESS.items():
        value = fields.get(name)
        if value is not None and not any(type(value) is type(allowed) and value == allowed for allowed in harmless):
            message = f"{name} is not supported by this server; found {_short(value)}, leave it out"
            raise ApiError(400, message, "unsupported_parameter", param=name)


def _object(body: bytes) -> dict[str, Any]:
    if not body.strip():
        raise ApiError(400, "the body is empty; send a JSON object", "invalid_json")
    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=_not_a_number)
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(400, "the body has half a character in it (a lone surrogate); send whole ones", "invalid_json") from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start}); send JSON in UTF-8", "invalid_json") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON ({error.msg}, at character {error.pos}); send a JSON object", "invalid_json") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON that can be read ({error})", "invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body is {_short(fields)}; send a JSON object", "invalid_json")
    return fields


def _not_a_number(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def _field_path(path: Sequence[str], fields: Any) -> str:
    """The path of a field as the client wrote it: pydantic adds the branch of a union, which no request has."""
    known: list[str] = []
    for step in path:
        try:
            fields = fields[int(step)] if isinstance(fields, list) else fields[step]
        except (KeyError, ValueError, IndexError, TypeError):
            break
        known.append(step)
    return ".".join(known)


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
