"""From a body's bytes to a request, and from whatever is wrong with it to one line that names the field."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from llm_from_scratch.serving.errors import ApiError
from llm_from_scratch.serving.openai import Form, short

F = TypeVar("F", bound=Form)


def parse(body: bytes, form: type[F]) -> F:
    """The request in `body`. Raises ApiError 400 naming the field at fault, what was found there and what was wanted."""
    fields = _object(body)
    refuse_unsupported(fields, form)
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        issue = error.errors(include_url=False)[0]
        path = [str(step) for step in issue["loc"]]
        if issue["type"] == "missing":
            raise ApiError(400, f"{'.'.join(path)} is missing", "missing_required_parameter", param=".".join(path)) from None
        names = _field_path(path, fields)
        wanted = issue["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{names}: {wanted}; found {short(issue['input'])}", "invalid_value", param=names) from None


def refuse_unsupported(fields: Mapping[str, Any], form: type[Form]) -> None:
    """Raises ApiError 400 for the first field that asks for what this server cannot do."""
    for name, harmless in form.harmless.items():
        value = fields.get(name)
        if value is not None and not any(type(value) is type(allowed) and value == allowed for allowed in harmless):
            message = f"{name} is not supported by this server; found {short(value)}, leave it out"
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
        raise ApiError(400, f"the body is {short(fields)}; send a JSON object", "invalid_json")
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
