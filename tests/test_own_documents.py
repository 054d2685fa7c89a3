"""A person's own documents in the index: nothing says what is right about them, so nothing is asked, and every page says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch import bundle
from llm_from_scratch.data.documents import Document, with_splits, write_documents
from llm_from_scratch.report import cards, pages
from stages import evaluate
from tests import test_architecture, test_claims

NOTES = [Document(f"notes/{number}.md", f"Note {number}", f"The key of room {number} hangs behind door {number}.") for number in range(20)]


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_documents_that_do_not_say_what_they_are_give_no_questions_held_out_or_not(share: float, tmp_path: Path) -> None:
    """It used to end the whole run with an error, after everything else was done."""
    with bundle.writing(tmp_path / "raw/text_folder") as folder:
        write_documents(folder / "documents.jsonl", with_splits(NOTES, share))
        bundle.seal(folder, "corpus", "download@text_folder")
    params = test_claims.params()
    params = params.model_copy(update={"index": params.index.model_copy(update={"documents": "text_folder"})})

    assert evaluate.learned_from(params) == "wikipedia", "models are measured on what they have read, not on what is searched"
    assert evaluate.ask(params, tmp_path, "sft") == ({"rag": {}, "retrieval": {}}, [], {}), "and neither model nor index had to be opened"


def test_evaluate_waits_for_what_is_searched_and_for_what_base_has_read() -> None:
    deps, tokens = test_architecture.graph()["evaluate"]["deps"], test_claims.params().train["base"].tokens

    assert {"artifacts/raw/${index.documents}", f"artifacts/raw/${{tokenize.{tokens}.corpus}}"} <= set(deps)


@pytest.mark.parametrize(
    "page",
    ["report.md.j2", "summary.md.j2", "retriever.md.j2", "readme_answers.md.j2", *(f"weeks/{week}.md.j2" for week in test_claims.WEEKS)],
)
def test_every_page_can_be_written_where_nothing_was_asked(page: str) -> None:
    asked = test_claims.values()
    unasked = asked | {"m": asked["m"] | {"rag": {}, "retrieval": {}, "limits": without_fields(asked["m"])}, "questions": []}

    said = pages.render(page, unasked)

    if page in {"report.md.j2", "readme_answers.md.j2", "weeks/week_11.md.j2"}:
        assert "No questions were asked: no held-out document of the index says in a line what it is" in said
    assert "question_answering.png" not in said, "a picture that nobody drew"


def without_fields(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The limits of models where no text was held out and nothing was asked."""
    models = {name: told for name, told in metrics.get("limits", {}).items() if name != "retriever"}
    return {name: {"topics": [], "pronouns": told["pronouns"], "memorization": told["memorization"]} for name, told in models.items()}


def test_the_card_of_what_is_served_claims_no_answers_where_nothing_was_asked(tmp_path: Path) -> None:
    asked = test_claims.values()
    served = asked["m"]["served"]["model"]
    manifest = test_claims.told_by((test_claims.REPORTS / "cards" / f"{served}.md").read_text(encoding="utf-8"))
    claimed = []
    for changed in ({}, {"rag": {}, "limits": without_fields(asked["m"])}):
        cards.write_model(tmp_path / "card.md", asked | {"m": asked["m"] | changed}, served, manifest)
        said = (tmp_path / "card.md").read_text(encoding="utf-8")
        claimed.append([claim in said for claim in ("held-out questions, four choices each", "**By field.**", "**Answers by field**")])
    assert claimed == [[True] * 3, [False] * 3]
