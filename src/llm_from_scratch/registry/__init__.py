"""Which version is in use: finished bundles as versions of MLflow's registered models, and the aliases that move between them.

A version holds no weights. It is a folder of some kilobytes that says which bundle it is (by digest), how to open it, and what each
held-out unit costs it; a newer version is decided by those against the champion's, whose bundle may be long gone.

| alias | version |
|---|---|
| `champion` | the one in use |
| `challenger` | the newest one that did not take over |
| `previous` | what the champion took over from; `rollback` goes there, and again to the one before that |
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_from_scratch import bundle, tracking
from llm_from_scratch.evaluation.promotion import Decision, Rule, Scores, decide

if TYPE_CHECKING:
    from llm_from_scratch.tracking import ModelVersion

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
WITHDRAWN = "withdrawn"
"""The tag of a version that somebody rolled back from: no rule makes it champion again."""
REPLACED, NOTHING = "replaced", "nothing"
"""The tag of a version that is or was champion: the number of the one it took over from, the first one of nothing."""
SCORES = "scores.json"
CODE = Path(__file__).with_name("pyfunc.py")
EXAMPLES = {"chat": "What is a river?", "query": "What is a river?", "judge": "The river is beautiful.", "text": "The river"}
"""A question, or the beginning of a text, for each way in which a bundle is asked."""


@dataclass(frozen=True)
class Candidate:
    """A finished bundle at `root / folder` to be a version: its digest, card, numbers and facts, its scores, and DVC's digest of it.

    `beside` are the folders, under `root`, of the bundles that it cannot be opened without: an adapter's base, an index' embedder.
    """

    name: str
    root: Path
    folder: str
    digest: str
    card: str
    metrics: Mapping[str, float]
    facts: Mapping[str, str]
    beside: Mapping[str, str]
    scores: Path


def register(candidate: Candidate) -> str:
    """The number of the version of `candidate`, made if none has its digest yet; its scores are those of the newest evaluation."""
    with tracking.answering() as client:
        tracking.ensure_model(client, candidate.name, candidate.card)
        for version in client.search_model_versions(f"name = '{candidate.name}'"):
            if version.tags.get("digest") == candidate.digest:
                _keep_scores(client, version, candidate)
                return str(version.version)
        run = tracking.rebuild_run(client)
        place = f"versions/{candidate.name}/{candidate.digest[:16]}"
        with tempfile.TemporaryDirectory() as partial:
            _write(Path(partial) / "version", candidate)
            client.log_artifacts(run, str(Path(partial) / "version"), place)
        source = f"{client.get_run(run).info.artifact_uri}/{place}"
        made = client.create_model_version(candidate.name, source, run, tags=_tags(candidate, place), description=candidate.card)
        return str(made.version)


def promote(name: str, number: str, rule: Rule) -> Decision:
    """Make version `number` champion if it is the first, or beats the champion by `rule`; else it stays challenger. Both say why."""
    with tracking.answering() as client:
        champion, version = tracking.aliased(client, name, CHAMPION), client.get_model_version(name, number)
        if champion is None:
            decision = Decision(True, "the first version")
        elif champion.version == version.version:
            return Decision(False, "is the champion already")
        elif WITHDRAWN in version.tags:
            return Decision(False, f"rolled back on purpose; python -m pipelines rollback {name} --to {number} takes it up again")
        else:
            decision = _compared(client, champion, version, rule)
        client.set_registered_model_alias(name, CHALLENGER, number)
        if decision.promoted:
            _crown(client, version, champion.version if champion else NOTHING)
        _note(client, version, f"{'promoted' if decision.promoted else 'not promoted'}: {decision.reason}")
        return decision


def rollback(name: str, number: str = "") -> str:
    """Version `number` (without one: what was champion before) becomes champion again; says from where to where.

    What is left is marked, so that no rule takes it up again. Raises ValueError where there is nothing to go back to.
    """
    wanted = way_back(name, number)
    with tracking.answering() as client:
        champion = tracking.aliased(client, name, CHAMPION)
        if champion is None:
            raise ValueError(f"{name} has no champion to roll back from; python -m pipelines promote makes one")
        if champion.version == wanted.version:
            raise ValueError(f"{name}: version {wanted.version} is the champion already; name another with --to")
        client.set_model_version_tag(name, champion.version, WITHDRAWN, f"for version {wanted.version}")
        client.delete_model_version_tag(name, wanted.version, WITHDRAWN)
        back = int(wanted.version) < int(champion.version) and REPLACED in wanted.tags
        _crown(client, wanted, wanted.tags[REPLACED] if back else champion.version)
        return f"{name}: champion moved from version {champion.version} to version {wanted.version}, bundle {wanted.tags['digest'][:12]}…"


def way_back(name: str, number: str = "") -> ModelVersion:
    """The version that `rollback` would go to. Raises ValueError where there is none."""
    with tracking.answering() as client:
        versions = {str(version.version): version for version in client.search_model_versions(f"name = '{name}'")}
        previous = tracking.aliased(client, name, PREVIOUS) if versions else None
        models = sorted(model.name for model in client.search_registered_models())
    if not versions:
        raise ValueError(f"no registered model {name}; there is {', '.join(models) or 'none: python -m pipelines promote registers them'}")
    known = ", ".join(sorted(versions, key=int))
    if not number and previous is None:
        raise ValueError(f"{name} never had another champion; name a version with --to, of {known}")
    wanted = number or str(previous and previous.version)
    if wanted not in versions:
        raise ValueError(f"{name} has no version {wanted}; there is {known}")
    return versions[wanted]


def version_with(digest: str) -> ModelVersion:
    """The newest version whose bundle's digest begins so. Raises ValueError where there is none."""
    with tracking.answering() as client:
        found = [version for version in client.search_model_versions() if version.tags.get("digest", "").startswith(digest)]
    if not (digest and found):
        raise ValueError(f"no version has a digest that begins with {digest!r}; make mlflow shows those there are")
    return max(found, key=lambda version: int(version.creation_timestamp))


def champion_of(name: str) -> ModelVersion | None:
    """The version of `name` that is in use, if there is one."""
    with tracking.answering() as client:
        return tracking.aliased(client, name, CHAMPION)


def _compared(client: Any, champion: ModelVersion, version: ModelVersion, rule: Rule) -> Decision:
    try:
        held, offered = (_scores_of(client, one) for one in (champion, version))
    except ValueError as error:
        again = f"python -m pipelines rollback {version.name} --to {version.version} makes this one champion by hand"
        return Decision(False, f"champion version {champion.version} cannot be compared with: {error}; {again}")
    return decide(held, offered, rule)


def _scores_of(client: Any, version: ModelVersion) -> Scores:
    if not (place := version.tags.get("artifacts", "")):
        raise ValueError(f"version {version.version} was registered without scores")
    with tempfile.TemporaryDirectory() as folder:
        try:
            text = Path(client.download_artifacts(version.run_id, f"{place}/{SCORES}", folder)).read_text(encoding="utf-8")
        except Exception as error:  # MLflow's, or whatever keeps its artifacts
            raise ValueError(f"the scores of version {version.version} cannot be read ({' '.join(str(error).split())[:120]})") from None
    return Scores.from_json(text)


def _crown(client: Any, version: ModelVersion, replaced: str) -> None:
    """The champion's alias first: killed in between, a model has one champion, and at worst a way back too many."""
    name, number = version.name, version.version
    client.set_registered_model_alias(name, CHAMPION, number)
    client.set_model_version_tag(name, number, REPLACED, replaced)
    if replaced == NOTHING:
        client.delete_registered_model_alias(name, PREVIOUS)
    else:
        client.set_registered_model_alias(name, PREVIOUS, replaced)
    if (challenger := tracking.aliased(client, name, CHALLENGER)) is not None and challenger.version == number:
        client.delete_registered_model_alias(name, CHALLENGER)


def _write(folder: Path, candidate: Candidate) -> None:
    """What a version is: how to open its bundle, and what its units cost."""
    asked = candidate.facts["asked"]
    beside = {
        role: {"folder": place, "digest": bundle.read_manifest(candidate.root / place).digest} for role, place in candidate.beside.items()
    }
    config = {
        "root": str(candidate.root.resolve()),
        "folder": candidate.folder,
        "digest": candidate.digest,
        "asked": asked,
        "beside": beside,
    }
    example: tuple[list[str], dict[str, Any]] = ([EXAMPLES[asked]], {"max_tokens": 24, "temperature": 0.0, "seed": 0})
    tracking.write_pyfunc(folder, CODE, config, example, ["llm-from-scratch"])
    shutil.copyfile(candidate.scores, folder / SCORES)


def _keep_scores(client: Any, version: ModelVersion, candidate: Candidate) -> None:
    """A bundle that is scored anew, on other units perhaps, is compared by its new scores; where nothing was asked, by those it has."""
    if not Scores.from_json(candidate.scores.read_text(encoding="utf-8")).units:
        return
    digest = bundle.file_digest(candidate.scores)
    if (place := version.tags.get("artifacts", "")) and version.tags.get("scores") != digest:
        with tempfile.TemporaryDirectory() as partial:
            client.log_artifact(version.run_id, shutil.copyfile(candidate.scores, Path(partial) / SCORES), place)
        client.set_model_version_tag(version.name, version.version, "scores", digest)


def _tags(candidate: Candidate, place: str) -> dict[str, str]:
    connection = tracking.connected()
    return {
        "digest": candidate.digest,
        "folder": candidate.folder,
        "dvc": connection.digests.get(candidate.folder, ""),
        "artifacts": place,
        "scores": bundle.file_digest(candidate.scores),
        **connection.tags(),
        **{f"metric.{key}": repr(value) for key, value in candidate.metrics.items()},
        **candidate.facts,
    }


def _note(client: Any, version: ModelVersion, decision: str) -> None:
    """The decision in the version's tags, and under its card."""
    client.set_model_version_tag(version.name, version.version, "decision", decision)
    card = str(version.description or "").split("\n\n## Promotion\n")[0]
    client.update_model_version(version.name, version.version, f"{card}\n\n## Promotion\n\n{decision[0].upper()}{decision[1:]}.")
