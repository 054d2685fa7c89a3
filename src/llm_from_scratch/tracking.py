"""What happened, in MLflow: one experiment, a parent run a rebuild, a nested run a stage. `registry` keeps the versions there.

The only module that imports mlflow. It points at artifacts by digest and never stores a second copy of weights. With no tracking URI
every function here is silent. Where MLflow fails or is slow in mid-run, the build goes on and says so once; what MLflow did not take waits
in the spool and is delivered at the next connection.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from llm_from_scratch import spool
from llm_from_scratch.hardware import Readings
from llm_from_scratch.spool import Patient, Record, Spool, Tell, reason, sayable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion as ModelVersion  # for `registry` too

EXPERIMENT = "llm-from-scratch"
BATCH = 200  # metrics written at once: one call to sqlite costs some 40 ms however many it carries
GRACE, SHARE = 10.0, 0.02  # seconds that a server may keep a stage in all, and the share of a long stage's time that it may besides

Log = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Connection:
    """Where to write (`uri`, "" for nowhere), which rebuild this is, the code's commit, and DVC's digest of each output.

    `spool` is the folder where what the store does not take waits (none: it is lost); `experiment` is DVC's name of the experiment that
    this is a part of, "" outside of one.
    """

    uri: str = ""
    rebuild: str = ""
    revision: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)
    spool: Path | None = None
    experiment: str = ""

    def tags(self) -> dict[str, str]:
        named = {"experiment": self.experiment} if self.experiment else {}
        return {"rebuild": self.rebuild, "revision": self.revision} | named


_connection = Connection()


def connect(uri: str, rebuild: str, revision: str, digests: Mapping[str, str], spool: Path | None = None, experiment: str = "") -> None:
    """Say once, at the start of a process, where runs go. A sqlite file's folder is made."""
    global _connection
    _connection = Connection(uri, rebuild, revision, digests, spool, experiment)
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


def catch_up() -> None:
    """Deliver all that waits in the spool, however long it takes. Raises ValueError where the store cannot be reached."""
    if _connection.uri and _connection.spool:
        with answering():
            spool.deliver(_connection.spool, _record)


def log_files(stage: str, files: Sequence[Path]) -> None:
    """Attach small files (a report, its figures) to this rebuild's parent run; a rebuild that had nothing to do has none."""

    def attach() -> None:
        client = _client()
        if parent := _known_parent(client, _connection.rebuild):
            for path in files:
                client.log_artifact(parent, str(path), stage)

    if _connection.uri:
        _attempt(attach)


def rebuild_address(page: str) -> str:
    """Where MLflow's page at `page` shows this rebuild's parent run; "" where nothing is tracked, or no stage has run in it."""
    found: list[str] = []

    def find() -> None:
        client = _client()
        if parent := _known_parent(client, _connection.rebuild):
            found.append(f"{page.rstrip('/')}/#/experiments/{client.get_run(parent).info.experiment_id}/runs/{parent}")

    if _connection.uri:
        _attempt(find)
    return "".join(found)


@contextmanager
def answering() -> Iterator[MlflowClient]:
    """The store, for work that cannot do without it: what it raises becomes one line. Unlike a log, a registry that fails is a failure."""
    from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR

    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
    try:
        yield _client()
    except ValueError:
        raise
    except Exception as error:  # sqlite's, HTTP's or MLflow's own
        raise ValueError(f"MLflow at {sayable(_connection.uri)}: {' '.join(str(error).split())[:200]}") from None


def connected() -> Connection:
    """What `connect` was told last."""
    return _connection


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Params by path, as MLflow takes them: no value is longer than 500 characters."""
    found: dict[str, str] = {}
    for key, value in params.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: str(value)[:500]}
    return found


def rebuild_run(client: MlflowClient) -> str:
    """The run that stands for this rebuild; one is made where there is none yet."""
    return _parent(client, _connection.rebuild, _connection.revision)


def ensure_model(client: MlflowClient, name: str, card: str) -> None:
    """A registered model of that name, described by the newest card."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name)
    client.update_registered_model(name, card)


def aliased(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version of `name` that an alias points at, if there is one."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:  # the latter for an alias that was never set
            raise
        return None


Answer = Callable[[list[str], Mapping[str, Any]], list[str]]
"""How a version is asked: a text for each text, under params."""

_untried = ContextVar("untried", default=False)
"""While a version is written: MLflow would open it and ask it the example, which takes longer than all the rest."""


def write_pyfunc(
    folder: Path, code: Path, config: Mapping[str, Any], example: tuple[list[str], dict[str, Any]], requires: list[str]
) -> None:
    """What `mlflow.pyfunc.load_model` opens, some kilobytes: the file `code`, which calls `be_pyfunc`, and what it is told (`config`)."""
    from mlflow.pyfunc import save_model

    logging.getLogger("mlflow.models.signature").setLevel(logging.WARNING)  # it says of each version that it asks the example
    token = _untried.set(True)
    try:
        save_model(folder, python_model=str(code), model_config=dict(config), input_example=example, pip_requirements=requires)
    finally:
        _untried.reset(token)


def be_pyfunc(open_version: Callable[[Mapping[str, Any]], Answer]) -> None:
    """Say to MLflow, which runs the file that calls this, how a version is opened: from its config to how it is asked."""
    from mlflow.models import set_model
    from mlflow.pyfunc import PythonModel, PythonModelContext

    class Version(PythonModel):  # type: ignore[misc, unused-ignore]
        def load_context(self, context: PythonModelContext) -> None:
            self.answer: Answer = (lambda texts, params: texts) if _untried.get() else open_version(context.model_config)

        def predict(self, model_input: list[str], params: dict[str, Any] | None = None) -> list[str]:
            return self.answer(model_input, params or {})

    set_model(Version())


class _Run:
    """One nested run, its metrics buffered, those of the machine among them. What fails in MLflow is said once and stops no work."""

    def __init__(self) -> None:
        import mlflow  # noqa: F401  # takes seconds, which are not to be counted as its server's

        self.complained = False
        self.pending: list[tuple[str, float, int, int]] = []
        self.machine = Readings()
        self.read = 0
        self.tell: Tell = _record if _connection.uri.startswith("sqlite:") else Patient(_record, GRACE, SHARE)
        self.spool = Spool(_connection.spool, uuid4().hex, self.tell, self.complain)

    def start(self, title: str, stage: str, params: Mapping[str, Any], reads: Sequence[str]) -> None:
        try:
            if _connection.spool:
                spool.deliver(_connection.spool, self.tell)
        except Exception as error:  # as in Spool: what others left may wait on
            self.complain(error)
        tags = {"stage": stage, **_connection.tags()}
        inputs = {path: _connection.digests[path].removesuffix(".dir") for path in reads if path in _connection.digests}
        self.put("begin", title=title, tags=tags, params=flat(params), inputs=inputs)
        self.machine.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = _now()
        self.pending += [(key, float(value), now, step) for key, value in metrics.items()]
        if len(self.pending) >= BATCH:
            self.flush()

    def flush(self) -> None:
        for when, found in self.machine.take():
            self.pending += [(key, value, when, self.read) for key, value in found.items()]
            self.read += 1
        if self.pending:
            self.put("metrics", points=self.pending)
            self.pending = []

    def end(self, status: str) -> None:
        self.machine.stop()
        self.flush()
        self.put("end", status=status, rebuild=_connection.rebuild, revision=_connection.revision)
        self.spool.close()

    def put(self, kind: str, **fields: Any) -> None:
        self.spool.put({"kind": kind, "at": _now(), **fields})

    def complain(self, error: Exception) -> None:
        if not self.complained:
            self.complained = True
            then = f"what it missed waits in {_connection.spool} for the next one" if _connection.spool else "what it missed is lost"
            place = sayable(_connection.uri)
            warnings.warn(f"MLflow at {place} did not take this ({reason(error)}); the build goes on, and {then}", stacklevel=2)


def _record(key: str, record: Record) -> None:
    """Tell MLflow one record of the run that bears `key`. Told twice, it is there once."""
    from mlflow.entities import Metric, Param

    client = _client()
    if record["kind"] == "begin":
        run = _run(client, key) or _begin(client, key, record)
        client.log_batch(run, params=[Param(name, value) for name, value in record["params"].items()])
        _log_inputs(client, run, record["inputs"])
        return
    if not (run := _run(client, key)):
        raise ValueError(f"the store has no run {key} any more")
    if record["kind"] == "metrics":
        client.log_batch(run, metrics=[Metric(*point) for point in record["points"]])
    else:  # the rebuild ends with its last stage, and as that one did
        for ended in (run, _parent(client, record["rebuild"], record["revision"])):
            client.set_terminated(ended, record["status"], record["at"])


def _begin(client: MlflowClient, key: str, record: Record) -> str:
    parent = _parent(client, record["tags"]["rebuild"], record["tags"]["revision"])
    tags = {**record["tags"], "mlflow.parentRunId": parent, "key": key}
    return str(client.create_run(_experiment(client), record["at"], tags, run_name=record["title"]).info.run_id)


def _run(client: MlflowClient, key: str) -> str:
    """The id of the run that bears `key`, "" where none does."""
    found = client.search_runs([_experiment(client)], f"tags.key = '{key}'", max_results=1)
    return str(found[0].info.run_id) if found else ""


def _now() -> int:
    return int(time.time() * 1000)


def _attempt(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:  # whatever the store raises (sqlite, HTTP, MLflow): a log may fail, the build may not
        warnings.warn(f"MLflow at {sayable(_connection.uri)} did not take this ({reason(error)}); the build goes on", stacklevel=2)


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


def _parent(client: MlflowClient, rebuild: str, revision: str) -> str:
    """The run that stands for a rebuild, made by whichever stage comes first."""
    if known := _known_parent(client, rebuild):
        return known
    tags = {"level": "rebuild", "rebuild": rebuild, "revision": revision}  # of a sweep, all experiments
    return str(client.create_run(_experiment(client), run_name=f"rebuild {rebuild}", tags=tags).info.run_id)


def _known_parent(client: MlflowClient, rebuild: str) -> str:
    """The run that stands for a rebuild, "" where no stage has run in it."""
    of_this = f"tags.rebuild = '{rebuild}' and tags.level = 'rebuild'"
    found = client.search_runs([_experiment(client)], of_this, max_results=1)
    return str(found[0].info.run_id) if found else ""


def _log_inputs(client: MlflowClient, run: str, digests: Mapping[str, str]) -> None:
    """Each output that the stage reads, as a dataset whose digest is DVC's."""
    import json

    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(Dataset(path, digest, "local", json.dumps({"uri": path})), [InputTag("mlflow.data.context", "input")])
        for path, digest in digests.items()
    ]
    if inputs:
        client.log_inputs(run, inputs)
