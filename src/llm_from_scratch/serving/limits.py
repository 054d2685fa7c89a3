"""What the server takes and gives at most: the `serve` section of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from llm_from_scratch.section import Section

LONGEST_DEADLINE = 600
"""Seconds. BentoML's own timer is set above it, because its 504 has no body that an OpenAI client could read."""


class ServeParams(Section):
    """Which model is served under what name, and how much one request, and all of them together, may ask of it.

    `slots` answers are made at a time, prompts read `prefill_chunk` tokens a step, and `maximum_waiting` answers may stand in line behind
    them; a request takes as many places as it wants choices (prompts times `n`), up to `maximum_choices`. `deadline_seconds` counts from
    arrival. `/retrieve` gives up to `maximum_passages`, an answer from documents reads `passages`, and `/v1/embeddings` takes up to
    `maximum_inputs` texts.
    """

    model: str
    model_name: str
    embedding_name: str
    slots: PositiveInt
    prefill_chunk: PositiveInt
    maximum_prompt_tokens: PositiveInt
    maximum_new_tokens: PositiveInt
    default_new_tokens: PositiveInt
    maximum_choices: PositiveInt
    maximum_inputs: PositiveInt
    maximum_body_bytes: PositiveInt
    maximum_waiting: NonNegativeInt
    deadline_seconds: Annotated[float, Field(gt=0, le=LONGEST_DEADLINE)]
    passages: PositiveInt
    maximum_passages: PositiveInt

    @model_validator(mode="after")
    def fit_together(self) -> ServeParams:
        if self.default_new_tokens > self.maximum_new_tokens:
            raise ValueError(
                f"default_new_tokens is {self.default_new_tokens}, more than maximum_new_tokens, {self.maximum_new_tokens}; lower it"
            )
        if self.maximum_choices > (places := self.slots + self.maximum_waiting):
            raise ValueError(f"maximum_choices is {self.maximum_choices}, and slots and maximum_waiting leave {places} places; lower it")
        if self.model_name == self.embedding_name:
            raise ValueError(f"model_name and embedding_name are both '{self.model_name}'; a client tells the models apart by them")
        return self
