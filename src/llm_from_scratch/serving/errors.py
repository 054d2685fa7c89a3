"""What goes wrong, in the shape that OpenAI's clients read: {"error": {message, type, param, code}}."""

from __future__ import annotations

from typing import TypedDict

REFUSALS = {
    400: "the request is wrong; `param` names the field at fault",
    401: "the API key is missing or wrong",
    403: "the owner of the server alone may ask for this: who bears its key or, where it has none, programs on its own machine",
    404: "there is no such model",
    405: "the route knows other methods",
    409: "a reload is going on; Retry-After says when to come again",
    413: "the body is longer than the limit",
    429: "too many are waiting; Retry-After says when to come again",
    500: "the server failed",
    503: "the server is loading, going down, or took longer than its deadline; Retry-After says when to come again",
}
"""Every status that is not an answer."""


class ErrorFields(TypedDict):
    """The inside of an error body. `param` is the request's field at fault, `code` a name that programs can rely on."""

    message: str
    type: str
    param: str | None
    code: str | None


class ApiError(Exception):
    """A request that gets no answer. `status` is HTTP's; `retry_after` seconds is for those worth sending again."""

    def __init__(self, status: int, message: str, code: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self) -> dict[str, ErrorFields]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
