"""What the server takes and gives at most: the `serve` section of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from llm_from_scratch.section import Section

LONGEST_DEADLINE = 600
"""Seconds. BentoML's own timer is set above it, because its 504 has no body that an OpenAI client could read."""


class ServeParams(Section):
    """Which model is served under what name, and how much one request, and all of them together, may ask of it.

    `maximum_waiting` requests may stand in line behind the one being answered; `deadline_seconds` counts from arrival.
    """

    model: str
    model_name: str
    maximum_prompt_tokens: PositiveInt
    maximum_new_tokens: PositiveInt
    default_new_tokens: PositiveInt
    maximum_body_bytes: PositiveInt
    maximum_waiting: NonNegativeInt
    deadline_seconds: Annotated[float, Field(gt=0, le=LONGEST_DEADLINE)]
    passages: PositiveInt

    @model_validator(mode="after")
    def default_fits(self) -> ServeParams:
        if self.default_new_tokens > self.maximum_new_tokens:
            raise ValueError(
                f"default_new_tokens is {self.default_new_tokens}, more than maximum_new_tokens, {self.maximum_new_tokens}; lower it"
            )
        return self
