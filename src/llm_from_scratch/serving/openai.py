"""Requests of the OpenAI API, as far as a small text model can serve them, and of three routes of our own.

Read the way their clients write: null means absent, unknown fields are ignored, and a field that would change the answer but is not
supported is refused by name, never ignored. Images, audio and tools are what it cannot do.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.serving.errors import ApiError
from llm_from_scratch.serving.limits import ServeParams

SEEDS = 2**63
"""Ours are 0 up to this; the API's run from its negative, and wrap around."""

MOST_LOGPROBS = 20
"""Alternatives of a token that a request may ask for."""

Harmless = Mapping[str, tuple[object, ...]]
"""Fields that this server does not support, each with the values that ask for nothing."""


def short(value: object) -> str:
    """What was found, for an error: in ASCII and not too long."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


class Form(BaseModel):
    """A request's body."""

    model_config = ConfigDict(strict=True, protected_namespaces=())
    harmless: ClassVar[Harmless] = {}


class Ask(Form):
    """POST /ask: a question to answer from the documents."""

    question: Annotated[str, Field(pattern=r"\S")]


class Retrieve(Form):
    """POST /retrieve: the passages that fit a query best, without an answer.

    `filters` keeps those that have the value, or one of the values, for each key: `document`, `title` or one of the metadata.
    """

    query: Annotated[str, Field(pattern=r"\S")]
    k: Annotated[int, Field(ge=1)] | None = None
    mode: Literal["fused", "rrf", "dense", "bm25"] | None = None
    filters: dict[str, str | list[str]] | None = None


class Reload(Form):
    """POST /admin/reload: another model of the server's store takes over, and nobody is cut off.

    `model` is its tag in the store; null takes the one that was stored last. What has begun ends on the model it began on, and
    X-Bundle-Digest says of each answer which one that was. Answered once the new model answers.
    """

    model: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*(:[a-z0-9][a-z0-9_.-]*)?$", max_length=200)] | None = None


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _texts(value: object) -> object:
    """An embedding's input as a list of strings."""
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts and isinstance(texts[0], int | list):
        raise ValueError("tokens are not supported here, as the embedding model has a vocabulary of its own; send text")
    if isinstance(texts, list) and not all(texts):
        raise ValueError("an empty text has no meaning to embed; leave it out")
    return texts


class EmbeddingRequest(Form):
    """POST /v1/embeddings: texts to turn into unit vectors."""

    harmless: ClassVar[Harmless] = {"dimensions": ()}

    model: str
    input: Annotated[list[str], Field(min_length=1), BeforeValidator(_texts, json_schema_input_type=str | list[str])]
    encoding_format: Literal["float", "base64"] | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Request(Form, ABC):
    """What completions and chat have in common. Beyond OpenAI's: `top_k`, `min_p` and `repetition_penalty`, as vLLM names them."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=SEEDS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[TokenId, Bias] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    stop: (
        Annotated[
            list[Annotated[str, Field(min_length=1)]],
            Field(max_length=4),
            BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def wanted_tokens(self) -> tuple[str, int | None]:
        """The field that says how many tokens at most, and what it says."""
        return "max_tokens", self.max_tokens

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """For how many alternatives of each token a log probability is wanted; None: for none at all."""

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, limits: ServeParams) -> list[Sampling]:
        """How to draw each of the `n` answers, each with a seed of its own; OpenAI's defaults where the request is silent.

        Raises ApiError when it asks for too much.
        """
        name, tokens = self.wanted_tokens
        _at_most(name, tokens, limits.maximum_new_tokens, "tokens")
        _at_most("n", self.n, limits.maximum_choices, "answers")
        seed = secrets.randbelow(SEEDS) if self.seed is None else self.seed
        drawn = Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            max_tokens=limits.default_new_tokens if tokens is None else max(1, tokens),
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            stop=tuple(self.stop or ()),
            logprobs=self.alternatives,
        )
        return [replace(drawn, seed=(seed + choice) % SEEDS) for choice in range(self.n or 1)]


def _at_most(name: str, found: int | None, most: int, what: str) -> None:
    if found is not None and found > most:
        message = f"{name} is {found}, more than the {most} {what} that this server gives; ask for fewer"
        raise ApiError(400, message, "invalid_value", param=name)


def _prompts(prompt: object) -> object:
    """A list of prompts, each text or ids, from one of either or a list of either; null is the beginning of a document."""
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError("send text, a list of texts, token ids, or a list of lists of them")
    if all(isinstance(part, str) for part in prompt) or all(_ids(part) for part in prompt):
        return prompt
    if _ids(prompt):
        return [prompt]
    raise ValueError("send either texts or token ids, whole numbers from 0 up, and not a mixture")


def _ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)


def _none_for_false(value: object) -> object:
    return None if value is False else value


class CompletionRequest(Request):
    """POST /v1/completions: texts to continue, or the ids of their tokens. `max_tokens` 0 with `echo` reads without writing."""

    harmless: ClassVar[Harmless] = {"suffix": ("",)}

    prompt: Annotated[
        list[str] | list[list[int]],
        BeforeValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]] | None),
    ] = Field(default_factory=lambda: [""])
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[
        Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None, BeforeValidator(_none_for_false, json_schema_input_type=int | None)
    ] = None

    @model_validator(mode="after")
    def fits_together(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            message = f"best_of is not supported by this server; found {self.best_of}, leave it out"
            raise ApiError(400, message, "unsupported_parameter", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            message = "max_tokens is 0, and without echo that is no answer; ask for 1"
            raise ApiError(400, message, "invalid_value", param="max_tokens")
        return self

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


def _joined_text(content: object) -> object:
    """A message's content as one string: it may come as a list of text parts."""
    if not isinstance(content, list):
        return content
    for place, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"part {place} is {short(kind)}; this model reads text alone, as in {{'type': 'text', 'text': '…'}}")
    return "\n".join(part["text"] for part in content)


class TextPart(BaseModel):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. `developer` is OpenAI's newer name for `system`."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_text, json_schema_input_type=str | list[TextPart])]

    @property
    def speaker(self) -> Literal["system", "user", "assistant"]:
        """The role as the model knows it."""
        return "system" if self.role == "developer" else self.role


class ChatRequest(Request):
    """POST /v1/chat/completions: a conversation that waits for the assistant's turn.

    Beyond OpenAI's fields, `documents` true answers the last message from the indexed documents, with what was read as `annotations`. What
    was said before it is then not read, and there is one answer, without log probabilities.
    """

    harmless: ClassVar[Harmless] = {
        "tools": ([],),
        "functions": ([],),
        "tool_choice": ("none", "auto"),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    documents: bool | None = None

    @model_validator(mode="after")
    def fits_together(self) -> ChatRequest:
        wrong: dict[str, tuple[object, str]] = {
            "max_tokens": (
                self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens),
                f"max_tokens is {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}; give one of them",
            ),
            "top_logprobs": (
                self.top_logprobs and not self.logprobs,
                f"top_logprobs is {self.top_logprobs}, which wants logprobs to be true",
            ),
            "documents": (
                self.documents and (self.n not in (None, 1) or self.logprobs),
                "documents gives one answer without log probabilities; leave out n and logprobs",
            ),
            "messages": (
                self.documents and (self.messages[-1].speaker != "user" or not self.messages[-1].content.strip()),
                "documents answers the last message, which has to be the user's question; it is another's, or empty",
            ),
        }
        for name, (is_wrong, message) in wrong.items():
            if is_wrong:
                raise ApiError(400, message, "invalid_value", param=name)
        return self

    @property
    def wanted_tokens(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is None:
            return super().wanted_tokens
        return "max_completion_tokens", self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
