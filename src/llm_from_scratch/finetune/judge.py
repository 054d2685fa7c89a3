"""The gold judge: what counts as good, outside of any model. It labels pairs, and at the end it says whether training reached it.

By default the sentiment of the text, by VADER's lexicon (Hutto and Gilbert 2014), from -1 to 1. Others are a length, a regular
expression, or any function from text to a number. A judge that is a rule can be asked a million times; whether what it likes is worth
having, no judge says.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, field_validator

from llm_from_scratch.section import Section

Judge = Callable[[str], float]


class VaderJudge(Section):
    """VADER's compound score, from -1 (bad news) to 1 (good news)."""

    kind: Literal["vader"]


class LengthJudge(Section):
    """The closer to `characters`, the better: 0 there, and -1 for a text that is empty or twice as long."""

    kind: Literal["length"]
    characters: Annotated[int, Field(ge=1)]


class PatternJudge(Section):
    """How many times `pattern` matches in a hundred characters."""

    kind: Literal["pattern"]
    pattern: str

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error}); correct it") from None
        return pattern


class CallableJudge(Section):
    """`function` is `package.module:name`, importable where the stage runs: text to a number. DVC does not see when its code changes."""

    kind: Literal["callable"]
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]


JudgeParams = Annotated[VaderJudge | LengthJudge | PatternJudge | CallableJudge, Field(discriminator="kind")]


def judge(params: VaderJudge | LengthJudge | PatternJudge | CallableJudge) -> Judge:
    """The function that scores a text. Raises ValueError where it cannot be had."""
    match params:
        case VaderJudge():
            return _vader()
        case LengthJudge(characters=wanted):
            return lambda text: -min(1.0, abs(len(text) - wanted) / wanted)
        case PatternJudge(pattern=pattern):
            found = re.compile(pattern)
            return lambda text: 100 * len(found.findall(text)) / max(1, len(text))
        case CallableJudge(function=function):
            return _imported(function)


def _vader() -> Judge:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ValueError("the judge vader needs vaderSentiment; pip install 'llm-from-scratch[finetune]'") from None
    analyzer = SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


def _imported(function: str) -> Judge:
    module, _, name = function.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"judge {function}: {error}; name it package.module:function, importable where the stage runs") from None
    return lambda text: float(found(text))
