"""What MLflow knows of a bundle: the versions that are it, and the run that made it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llm_from_scratch import tracking


def remembered(made_by: str, digest: str, inputs: Mapping[str, str], params: Mapping[str, Any]) -> dict[str, Any]:
    """Versions with this digest, and the last finished run of this node that read the same with the same params; in a line each."""
    if not tracking.connected().uri:
        return {}
    finished = f"attributes.run_name = '{made_by}' and attributes.status = 'FINISHED'"
    try:
        with tracking.answering() as client:
            versions = client.search_model_versions(f"tags.digest = '{digest}'") if digest else []
            experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
            runs = client.search_runs([experiment.experiment_id], finished, order_by=["start_time DESC"]) if experiment else []
    except ValueError as error:  # the chain does not depend on the store
        return {"mlflow": f"cannot be asked: {error}"}
    known: dict[str, Any] = {}
    if versions:
        known["registered"] = [f"{found.name} version {found.version}{_during(found.tags)}" for found in versions]
    now = tracking.flat(params)
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
