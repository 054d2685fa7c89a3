"""The API described for programs: OpenAPI 3.1, its requests from the models that read them.

Only what OpenAI's own description leaves open is said here in words; bodies are checked by `parsing`, not by this document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from llm_from_scratch.serving.errors import REFUSALS
from llm_from_scratch.serving.openai import Ask, ChatRequest, CompletionRequest, EmbeddingRequest, Form, Reload, Retrieve

TEMPLATE = "#/components/schemas/{model}"
POSTS: dict[str, tuple[type[Form], str, Sequence[str]]] = {
    "/v1/chat/completions": (ChatRequest, "The next turn of a conversation", ("id", "object", "created", "model", "choices", "usage")),
    "/v1/completions": (CompletionRequest, "What follows a text", ("id", "object", "created", "model", "choices", "usage")),
    "/v1/embeddings": (EmbeddingRequest, "Texts as unit vectors", ("object", "data", "model", "usage")),
    "/ask": (Ask, "An answer from the documents, with what was read", ("answer", "found", "citations", "model")),
    "/retrieve": (Retrieve, "The passages that fit a query best", ("object", "data")),
    "/admin/reload": (Reload, "Another model takes over", ("object", "digest", "previous", "changed")),
}
"""Each route with its request, what it is for, and the fields of its answer."""

STREAMED = {"/v1/chat/completions", "/v1/completions"}


def document(has_key: bool) -> dict[str, Any]:
    """The description; with `has_key` it says that every route wants one."""
    forms = sorted({form for form, _, _ in POSTS.values()}, key=lambda form: form.__name__)
    _, schemas = models_json_schema([(form, "validation") for form in forms], ref_template=TEMPLATE)
    components: dict[str, Any] = {"schemas": {**schemas["$defs"], "Error": _error()}}
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "llm-from-scratch", "version": "1", "description": "OpenAI's API, and answers from documents."},
        "paths": {
            "/v1/models": {"get": _operation("The models that are served", ("object", "data"), (401, 500, 503))},
            "/v1/models/{name}": {"get": _model()},
            **{route: {"post": _post(route)} for route in POSTS},
        },
        "components": components,
    }
    if has_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}]
    return described


def _post(route: str) -> dict[str, Any]:
    form, about, fields = POSTS[route]
    operation = _operation(about, fields, REFUSALS)
    operation["description"] = (form.__doc__ or "").strip()
    operation["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": TEMPLATE.format(model=form.__name__)}}},
    }
    if route in STREAMED:
        operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return operation


def _model() -> dict[str, Any]:
    operation = _operation("One of the models", ("id", "object", "created", "owned_by"), (401, 404, 500, 503))
    return operation | {"parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]}


def _operation(about: str, fields: Sequence[str], refusals: Iterable[int]) -> dict[str, Any]:
    answer = {"type": "object", "required": list(fields), "properties": {name: {} for name in fields}}
    return {
        "summary": about,
        "responses": {
            "200": {"description": about, "content": {"application/json": {"schema": answer}}},
            **{str(status): _refusal(status) for status in refusals},
        },
    }


def _refusal(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": TEMPLATE.format(model="Error")}}}
    return {"description": REFUSALS[status], "content": content}


def _error() -> dict[str, Any]:
    text, either = {"type": "string"}, {"type": ["string", "null"]}
    inside = {"message": text, "type": text, "param": either, "code": either}
    error = {"type": "object", "required": list(inside), "properties": inside}
    return {"type": "object", "required": ["error"], "properties": {"error": error}}
