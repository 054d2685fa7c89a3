"""The gate: a corpus passes Great Expectations' suite, or the line stops and shows which documents it was.

Each check has a name, a limit in params.yaml and a severity: one listed under `warnings` is reported, any other stops the line. The metric
is the same for the same documents (no clock, no numpy); the HTML data docs beside it are for people, and do have a clock in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from llm_from_scratch.data.documents import Document
from llm_from_scratch.data.features import features
from llm_from_scratch.section import Section

if TYPE_CHECKING:
    import pandas as pd

SHOWN_ROWS = 20  # failing rows kept of each check
EXCERPT = 80  # characters

CheckName = Literal[
    "documents",
    "splits",
    "ids",
    "licence",
    "length",
    "duplicates",
    "near_duplicates",
    "language",
    "mojibake",
    "control",
    "pii",
    "leaked",
    "overlap",
]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class CorpusError(ValueError):
    """A corpus did not pass. The message is one line, then the offending rows."""


class ValidationParams(Section):
    """The limits. Shares are of documents, but for `maximum_control_share` (of a document's characters) and `maximum_train_overlap`
    (of a held-out document's runs of 13 words)."""

    warnings: list[CheckName]
    minimum_documents: int
    minimum_characters: int
    maximum_characters: int
    maximum_duplicate_share: Share
    maximum_near_duplicate_share: Share
    near_duplicate_similarity: Annotated[float, Field(ge=0.75, le=1.0)]  # below, hashing finds too few of the pairs
    minimum_language_share: Share
    maximum_mojibake_share: Share
    maximum_control_share: Share
    maximum_pii_share: Share
    maximum_leaked_share: Share
    maximum_train_overlap: Share


@dataclass(frozen=True)
class Failure:
    """One offending row of a check that failed; `id` is empty where the corpus as a whole is at fault."""

    check: str
    severity: str
    id: str
    column: str
    value: str

    def __str__(self) -> str:
        return f"{self.check} ({self.severity}): {f'id={self.id} ' if self.id else ''}{self.column}={self.value}"


@dataclass(frozen=True)
class Report:
    """`passed` unless a critical check failed; `metric` is plain JSON; `failures` has at most SHOWN_ROWS rows a check."""

    passed: bool
    metric: dict[str, Any]
    failures: list[Failure]


class Described(Protocol):
    """As much of a source as the checks need: what it says of its licence and language, and the share it holds out."""

    licence: str
    language: str
    validation: float


def validate(documents: Sequence[Document], source: Described, params: ValidationParams, docs: Path) -> Report:
    """Run every check and write the data docs, an index.html, into `docs`. Raises ValueError where the validation extra is missing."""
    try:
        frame = features(documents, source.licence, params.near_duplicate_similarity)
        results = _run(frame, _expectations(source, params), docs)
    except ImportError as error:
        raise ValueError(f"no {error.name} here, which validates a corpus; pip install 'llm-from-scratch[validation]'") from None
    checks, failures = {}, []
    for result in results:
        name, severity = result.expectation_config.meta["check"], result.expectation_config.severity.value
        checks[name] = {"severity": severity, "passed": bool(result.success), "unexpected": int(result.result.get("unexpected_count") or 0)}
        if not result.success:
            failures += _failures(name, severity, result)
    passed = all(check["passed"] for check in checks.values() if check["severity"] == "critical")
    held_out = sum(document.split == "validation" for document in documents)
    metric = {
        "passed": passed,
        "documents": len(documents),
        "validation_documents": held_out,
        "characters": sum(len(document.text) for document in documents),
        "checks": dict(sorted(checks.items())),
    }
    return Report(passed, metric, failures)


def require(report: Report, name: str, docs: Path) -> None:
    """Stop the line unless the corpus passed. Raises CorpusError with the rows at fault."""
    if report.passed:
        return
    critical = [failure for failure in report.failures if failure.severity == "critical"]
    checks = ", ".join(dict.fromkeys(failure.check for failure in critical))
    rows = "\n".join(f"  {failure}" for failure in critical)
    raise CorpusError(f"corpus {name} failed {checks}; nothing was placed; see {docs}, then mend the source or its limits\n{rows}")


def _run(frame: pd.DataFrame, expectations: list[Any], docs: Path) -> Iterable[Any]:
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs)}
    index = {"class_name": "DefaultSiteIndexBuilder"}
    context.add_data_docs_site("docs", {"class_name": "SiteBuilder", "store_backend": store, "site_index_builder": index})
    asset = context.data_sources.add_pandas("corpus").add_dataframe_asset("documents")
    suite = context.suites.add(gx.ExpectationSuite(name="gate", expectations=expectations))
    definition = gx.ValidationDefinition(name="gate", data=asset.add_batch_definition_whole_dataframe("all"), suite=suite)
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name="gate",
            validation_definitions=[context.validation_definitions.add(definition)],
            actions=[gx.checkpoint.UpdateDataDocsAction(name="docs", site_names=["docs"])],
            result_format={
                "result_format": "SUMMARY",
                "unexpected_index_column_names": ["id"],
                "partial_unexpected_count": SHOWN_ROWS,
            },
        )
    )
    (outcome,) = checkpoint.run(batch_parameters={"dataframe": frame}).run_results.values()
    results: Iterable[Any] = outcome.results
    return results


def _expectations(source: Described, params: ValidationParams) -> list[Any]:
    import great_expectations.expectations as gxe

    def of(check: CheckName) -> dict[str, Any]:
        return {"meta": {"check": check}, "severity": "warning" if check in params.warnings else "critical"}

    def only(column: str, value: str | int, least: float, check: CheckName) -> Any:
        # Shares such as 1 - 0.9 are not exact in binary; a document on the limit passes.
        return gxe.ExpectColumnValuesToBeInSet(column=column, value_set=[value], mostly=round(least, 9), **of(check))

    def between(column: str, least: float, most: float, check: CheckName) -> Any:
        return gxe.ExpectColumnValuesToBeBetween(column=column, min_value=least, max_value=most, **of(check))

    splits = ["train", "validation"] if source.validation > 0 else ["train"]
    return [
        gxe.ExpectTableRowCountToBeBetween(min_value=params.minimum_documents, **of("documents")),
        gxe.ExpectColumnDistinctValuesToContainSet(column="split", value_set=splits, **of("splits")),
        gxe.ExpectColumnValuesToBeUnique(column="id", **of("ids")),
        gxe.ExpectColumnValuesToMatchRegex(column="licence", regex=r"\S", **of("licence")),
        between("characters", params.minimum_characters, params.maximum_characters, "length"),
        between("control_share", 0.0, params.maximum_control_share, "control"),
        between("train_overlap", 0.0, params.maximum_train_overlap, "overlap"),
        only("duplicate_of", "", 1 - params.maximum_duplicate_share, "duplicates"),
        only("near_duplicate_of", "", 1 - params.maximum_near_duplicate_share, "near_duplicates"),
        only("leaked_from", "", 1 - params.maximum_leaked_share, "leaked"),
        only("language", source.language, params.minimum_language_share, "language"),
        only("mojibake", 0, 1 - params.maximum_mojibake_share, "mojibake"),
        only("pii", "", 1 - params.maximum_pii_share, "pii"),
    ]


def _failures(check: str, severity: str, result: Any) -> list[Failure]:
    column = result.expectation_config.kwargs.get("column", "documents")
    rows = result.result.get("partial_unexpected_index_list") or []
    if not rows:
        found = result.result.get("observed_value", result.exception_info)
        return [Failure(check, severity, "", column, str(found)[:EXCERPT])]
    return [Failure(check, severity, str(row["id"]), column, str(row[column])[:EXCERPT]) for row in rows]
