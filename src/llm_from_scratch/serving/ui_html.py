"""What the page draws, as HTML: coloured tokens, passages, an attention map, one card a rung.

Everything that a reader typed or a model wrote is escaped here, and nothing is fetched: no script, no image, no font.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from llm_from_scratch.serving.ui_work import Attention, Found, Token

CSS = """
.tokens { white-space: pre-wrap; line-height: 2; font-family: ui-monospace, monospace; }
.token { border-radius: .2rem; padding: .15rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .8rem; }
.card { border: 1px solid var(--border-color-primary); border-radius: .5rem; padding: .7rem; }
.card p { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0 0; }
.page table { border-collapse: collapse; width: 100%; }
.page table, .page th, .page td { border: 0; }
.page th, .page td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--border-color-primary); }
.page .given { opacity: .65; }
.page .problem { border-left: .25rem solid #c2410c; padding: .3rem .8rem; }
.page svg { max-width: 100%; height: auto; }
.page svg text { fill: currentColor; font: 12px ui-monospace, monospace; }
"""
"""Beside Gradio's own theme."""

SURPRISED = 0.6  # how much of the colour the least likely token gets: the text on it stays readable
CELL, LABELS = 26, 110
"""Of a drawing, in its own units: the side of a cell and the room for a token beside it."""


def problem(message: str) -> str:
    """One line to the reader: what went wrong and what to do."""
    return _page(f'<p class="problem" role="alert">{escape(message)}</p>')


def tokens(prompt: str, drawn: Sequence[Token]) -> str:
    """The prompt, the tokens after it (the less likely, the stronger the colour; the alternatives on hover), and a table of all."""
    spans = "".join(
        f'<span class="token" style="background: {_colour(token)}" title="{escape(_likely(token))}">{escape(token.text)}</span>'
        for token in drawn
    )
    rows = (_row(_visible(token.text), _percent(token.probability), _best(token)) for token in drawn)
    table = f"<table>{_head('token', 'probability', 'the likeliest here, best first')}{''.join(rows)}</table>"
    text = f'<p class="tokens"><span class="given">{escape(prompt)}</span>{spans}</p>'
    return _page(f"{text}<details open><summary>Token by token</summary>{table}</details>" if drawn else text)


def passages(found: Sequence[Found]) -> str:
    """A table, best first: the score and rank of this search, the rank in each search alone, the passage."""
    if not found:
        return _page("<p>No passage found.</p>")
    rows = (
        _row(
            str(one.hit.rank),
            f"{one.hit.score:.4f}",
            str(one.dense_rank or "–"),
            str(one.bm25_rank or "–"),
            one.hit.passage.title,
            one.hit.passage.text,
        )
        for one in found
    )
    return _page(f"<table>{_head('rank', 'score', 'dense', 'BM25', 'title', 'passage')}{''.join(rows)}</table>")


def attention(drawn: Attention) -> str:
    """A square of cells, a row a token that looks and a column what it looks at; nothing looks ahead, so the upper half stays empty."""
    size = len(drawn.tokens) * CELL
    cells = [
        f'<rect x="{column * CELL}" y="{row * CELL}" width="{CELL - 1}" height="{CELL - 1}" fill="rgb(37 99 235)" '
        f'fill-opacity="{max(weight, 0.02):.3f}"><title>{escape(_visible(token))} looks at {escape(_visible(drawn.tokens[column]))}: '
        f"{_percent(weight)}</title></rect>"
        for row, token in enumerate(drawn.tokens)
        for column, weight in enumerate(drawn.weights[row, : row + 1].tolist())
    ]
    labels = [
        f'<text x="-6" y="{(place + 0.6) * CELL:g}" text-anchor="end">{escape(_visible(token))}</text>'
        f'<text transform="translate({(place + 0.6) * CELL:g} {size + 6}) rotate(90)">{escape(_visible(token))}</text>'
        for place, token in enumerate(drawn.tokens)
    ]
    whole = size + LABELS
    return _page(
        f'<svg role="img" aria-label="attention" viewBox="{-LABELS} 0 {whole} {whole}" width="{whole}" height="{whole}">'
        f"{''.join(cells)}{''.join(labels)}</svg>"
    )


def cards(texts: Mapping[str, str]) -> str:
    """What each rung wrote, a card each."""
    drawn = (f'<div class="card"><strong>{escape(rung)}</strong><p>{escape(text)}</p></div>' for rung, text in texts.items())
    return _page(f'<div class="cards">{"".join(drawn)}</div>')


def _colour(token: Token) -> str:
    return f"rgb(234 88 12 / {SURPRISED * (1 - token.probability):.2f})"


def _likely(token: Token) -> str:
    return f"{_percent(token.probability)}; likeliest: {_best(token)}"


def _best(token: Token) -> str:
    return " · ".join(f"{_visible(text)} {_percent(probability)}" for text, probability in token.alternatives)


def _visible(text: str) -> str:
    """A token in a table: its blanks and line ends can be seen."""
    return text.replace(" ", "␣").replace("\n", "⏎")


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _head(*names: str) -> str:
    return f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in names)}</tr>"


def _row(*cells: str) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _page(inside: str) -> str:
    return f'<div class="page">{inside}</div>'
