"""What happened, in MLflow: one experiment, a parent run a rebuild, a nested run a stage, and a registry of finished models.

The only module that imports mlflow. It points at artifacts by digest and never stores a second copy of weights. With no tracking URI
every function here is silent, and where MLflow fails in mid-run the build goes on and says so once.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities.model_registry import ModelVersion

EXPERIMENT = "llm-from-scratch"
CHAMPION = "champion"
BATCH = 200  # metrics written at once: one call to sqlite costs some 40 ms however many it carries

Log = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Connection:
    """Where to write (`uri`, "" for nowhere), which rebuild this is, the code's commit, and DVC's digest of each output."""

    uri: str = ""
    rebuild: str = ""
    revision: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)


_connection = Connection()


def connect(uri: str, rebuild: str, revision: str, digests: Mapping[str, str]) -> None:
    """Say once, at the start of a process, where runs go. A sqlite file's folder is made."""
    global _connection
    _connection = Connection(uri, rebuild, revision, digests)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)


def quiet(step: int, metrics: Mapping[str, float]) -> None:
    """The log of somebody who keeps none."""


@contextmanager
def stage_run(stage: str, name: str, params: Mapping[str, Any], reads: Sequence[str] = ()) -> Iterator[Log]:
    """A nested run for one node of the graph; yields its log. `reads` are the outputs of other nodes that it stands on, as in dvc.yaml."""
    if not _connection.uri:
        yield quiet
        return
    run = _Run()
    run.start(f"{stage}@{name}" if name else stage, stage, params, reads)
    try:
        yield run.log
    except BaseException:
        run.end("FAILED")
        raise
    run.end("FINISHED")


def log_files(stage: str, files: Sequence[Path]) -> None:
    """Attach small files (a report, its figures) to this rebuild's parent run; a rebuild that had nothing to do has none."""

    def attach() -> None:
        client = _client()
        if parent := _known_parent(client):
            for path in files:
                client.log_artifact(parent, str(path), stage)

    if _connection.uri:
        _attempt(attach)


def rebuild_address(page: str) -> str:
    """Where MLflow's page at `page` shows this rebuild's parent run; "" where nothing is tracked, or no stage has run in it."""
    found: list[str] = []

    def find() -> None:
        client = _client()
        if parent := _known_parent(client):
            found.append(f"{page.rstrip('/')}/#/experiments/{client.get_run(parent).info.experiment_id}/runs/{parent}")

    if _connection.uri:
        _attempt(find)
    return "".join(found)


@dataclass(frozen=True)
class Candidate:
    """A finished bundle to be a version of a registered model: its card, digest, and the numbers a rule may read."""

    name: str
    folder: Path
    digest: str
    card: str
    metrics: Mapping[str, float]
    facts: Mapping[str, str]


@contextmanager
def _registry() -> Iterator[None]:
    """What the store raises as one line: unlike a log, a registry that fails is a failure."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # sqlite's, HTTP's or MLflow's own
        raise ValueError(f"MLflow at {_connection.uri}: {' '.join(str(error).split())[:200]}") from None


@_registry()
def register(candidate: Candidate) -> str:
    """The version number of `candidate`, made if no version has its digest yet; the card becomes its description."""
    client = _client()
    _ensure_model(client, candidate)
    for version in client.search_model_versions(f"name = '{candidate.name}'"):
        if version.tags.get("digest") == candidate.digest:
            return str(version.version)
    tags = {
        "digest": candidate.digest,
        "revision": _connection.revision,
        "rebuild": _connection.rebuild,
        **{f"metric.{key}": repr(value) for key, value in candidate.metrics.items()},
        **candidate.facts,
    }
    made = client.create_model_version(
        candidate.name, source=candidate.folder.resolve().as_uri(), run_id=_parent(client), tags=tags, description=candidate.card
    )
    return str(made.version)


@_registry()
def promote(name: str, number: str, metric: str, minimum_gain: float) -> bool:
    """Move the champion alias to version `number` if its `metric` is lower than the champion's by `minimum_gain`; say whether it moved.

    Raises ValueError where one of them has no such metric.
    """
    client = _client()
    champion = champion_of(name)
    if champion is not None:
        held, offered = (_metric(version, metric) for version in (champion, client.get_model_version(name, number)))
        if champion.version == number or held - offered < minimum_gain:
            return False
    client.set_registered_model_alias(name, CHAMPION, number)
    return True


def _metric(version: ModelVersion, metric: str) -> float:
    if (value := version.tags.get(f"metric.{metric}")) is None:
        raise ValueError(f"{version.name}, version {version.version}, has no {metric} to compare by; move the champion alias by hand once")
    return float(value)


def champion_of(name: str) -> ModelVersion | None:
    """The version of `name` that the champion alias points at, if there is one."""
    from mlflow.exceptions import MlflowException

    try:
        return _client().get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:  # the latter for an alias that was never set
            raise
        return None


def remembered(made_by: str, digest: str, inputs: Mapping[str, str], params: Mapping[str, Any]) -> dict[str, Any]:
    """What MLflow knows: versions with this digest, and the last finished run of this node that read the same with the same params."""
    if not _connection.uri:
        return {}
    try:
        client = _client()
        versions = client.search_model_versions(f"tags.digest = '{digest}'") if digest else []
        experiment = client.get_experiment_by_name(EXPERIMENT)
        finished = f"attributes.run_name = '{made_by}' and attributes.status = 'FINISHED'"
        newest = ["attributes.start_time DESC"]
        runs = client.search_runs([experiment.experiment_id], finished, order_by=newest) if experiment else []
    except Exception as error:  # whatever the store raises (sqlite, HTTP, MLflow): the chain does not depend on it
        return {"mlflow": f"cannot be asked: {' '.join(str(error).split())[:160]}"}
    known: dict[str, Any] = {}
    if versions:
        known["registered"] = [f"{found.name} version {found.version}{_during(found.tags)}" for found in versions]
    now = {param.key: param.value for param in _flat_params(params)}
    for run in runs:
        read = {given.dataset.name: given.dataset.digest for given in run.inputs.dataset_inputs}
        same_inputs = all(f"{read[name]}.dir" == found for name, found in inputs.items() if name in read)
        if same_inputs and all(_agree(value, now[name]) for name, value in run.data.params.items() if name in now):
            known["mlflow"] = f"run {run.info.run_id}{_during(run.data.tags)}"
            break
    return known


def _during(tags: Mapping[str, str]) -> str:
    return f" of rebuild {tags.get('rebuild') or 'unknown'}, code {tags.get('revision') or 'not recorded'}"


def _agree(noted: str, now: str) -> bool:
    """Whether a param is the same, but for how Python writes numbers and sequences; what MLflow noted is cut at 500 characters."""
    try:
        return float(noted) == float(now)
    except ValueError:
        then, today = (re.sub(r"[\[\](), ]", "", value) for value in (noted, now))
        return then == today or (len(noted) == 500 and today.startswith(then))


class _Run:
    """One nested run, its metrics buffered. Whatever fails in MLflow is said once and does not stop the work."""

    def __init__(self) -> None:
        self.id = ""
        self.pending: list[Metric] = []

    def start(self, title: str, stage: str, params: Mapping[str, Any], reads: Sequence[str]) -> None:
        def begin() -> None:
            client = _client()
            tags = {"mlflow.parentRunId": _parent(client), "stage": stage, "rebuild": _connection.rebuild, "revision": _connection.revision}
            self.id = client.create_run(_experiment(client), run_name=title, tags=tags).info.run_id
            client.log_batch(self.id, params=_flat_params(params))
            _log_inputs(client, self.id, reads)

        _attempt(begin)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.id:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            self.pending += [Metric(key, float(value), now, step) for key, value in metrics.items()]
            if len(self.pending) >= BATCH:
                self.flush()

    def flush(self) -> None:
        batch, self.pending = self.pending, []
        _attempt(lambda: _client().log_batch(self.id, metrics=batch))

    def end(self, status: str) -> None:
        if self.id:
            self.flush()
            _attempt(lambda: _end(_client(), self.id, status))


def _attempt(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:  # whatever the store raises (sqlite, HTTP, MLflow): a log may fail, the build may not
        warnings.warn(f"MLflow did not take this ({type(error).__name__}: {str(error)[:200]}); the build goes on", stacklevel=2)


def _end(client: MlflowClient, run: str, status: str) -> None:
    """The rebuild ends with its last stage, and as that one did."""
    for ended in (run, _parent(client)):
        client.set_terminated(ended, status)


def _client() -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=_connection.uri, registry_uri=_connection.uri)


def _experiment(client: MlflowClient) -> str:
    if found := client.get_experiment_by_name(EXPERIMENT):
        return str(found.experiment_id)
    place = None
    if _connection.uri.startswith("sqlite:///"):
        place = (Path(_connection.uri.removeprefix("sqlite:///")).resolve().parent / "mlruns").as_uri()
    return str(client.create_experiment(EXPERIMENT, artifact_location=place))


def _parent(client: MlflowClient) -> str:
    """The run that stands for this rebuild, made by whichever stage comes first."""
    if known := _known_parent(client):
        return known
    experiment = _experiment(client)
    tags = {"level": "rebuild", "rebuild": _connection.rebuild, "revision": _connection.revision}
    return str(client.create_run(experiment, run_name=f"rebuild {_connection.rebuild}", tags=tags).info.run_id)


def _known_parent(client: MlflowClient) -> str:
    """The run that stands for this rebuild, "" where no stage has run in it."""
    of_this = f"tags.rebuild = '{_connection.rebuild}' and tags.level = 'rebuild'"
    found = client.search_runs([_experiment(client)], of_this, max_results=1)
    return str(found[0].info.run_id) if found else ""


def _flat_params(params: Mapping[str, Any], prefix: str = "") -> list[Any]:
    from mlflow.entities import Param

    flat: list[Any] = []
    for key, value in params.items():
        flat += _flat_params(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [Param(prefix + key, str(value)[:500])]
    return flat


def _log_inputs(client: MlflowClient, run: str, reads: Sequence[str]) -> None:
    """Each output that the stage reads, as a dataset whose digest is DVC's."""
    import json

    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(path, _connection.digests[path].removesuffix(".dir"), "local", json.dumps({"uri": path})),
            [InputTag("mlflow.data.context", "input")],
        )
        for path in reads
        if path in _connection.digests
    ]
    if inputs:
        client.log_inputs(run, inputs)


def _ensure_model(client: MlflowClient, candidate: Candidate) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(candidate.name)
    except MlflowException:
        client.create_registered_model(candidate.name)
    client.update_registered_model(candidate.name, candidate.card)
