"""Pages from templates: the report, the weeks, the cards, and the marked blocks of README.md. All numbers come from metrics.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import log2
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

BLOCK = re.compile(r"(<!-- begin (?P<name>[\w-]+) -->\n).*?(<!-- end (?P=name) -->)", re.DOTALL)


def environment() -> Environment:
    """The project's templates; a name that the numbers do not have is an error, never a blank."""
    made = Environment(
        loader=PackageLoader("llm_from_scratch.report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    made.filters["percent"] = lambda value, digits=1: f"{100 * value:.{digits}f}%"
    made.filters["number"] = lambda value: f"{value:,.0f}"
    made.filters["fixed"] = lambda value, digits=3: f"{value:.{digits}f}"
    made.filters["signed"] = lambda value, digits=1: f"{100 * value:+.{digits}f}%"
    made.filters["log2"] = log2
    made.filters["short"] = short
    made.filters["fenced"] = lambda text: "```text\n" + text.strip("\n").replace("```", "'''") + "\n```"
    return made


def render(template: str, values: Mapping[str, Any]) -> str:
    """One page. Raises jinja2.UndefinedError naming a number the run does not have."""
    return environment().get_template(template).render(values).rstrip() + "\n"


def write_page(path: Path, template: str, values: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(template, values), encoding="utf-8")
    return path


def short(value: Any) -> str:
    """A cell of a table of any kind: four digits of a fraction, all of a whole number, text as it is, nothing for None."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if type(value) is int else str(value)


def fill_blocks(text: str, fill: Callable[[str], str]) -> str:
    """`text` with what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` replaced by `fill(NAME)`."""
    return BLOCK.sub(lambda found: f"{found[1]}{fill(found['name']).rstrip()}\n{found[3]}", text)
