"""What is scheduled or ordered beside the rebuild: a look at the sources, sweeps, promotion, and a service that is tried out."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.deployments import run_deployment

from pipelines import gpu, process
from pipelines.notify import tell
from pipelines.promote import promote


@flow(name="data-changed", on_failure=[tell], on_crashed=[tell])
def data_changed(rebuild: str, notify: str = "") -> None:
    """Start deployment `rebuild` where a source is not as it was downloaded; for one and the same change, once a day at most."""
    said = process.require("sources", [sys.executable, "-m", "stages", "sources", "--json"])
    if not (changed := json.loads(said[-1])):
        get_run_logger().info("every source is as it was downloaded")
        return
    run = run_deployment(
        rebuild,
        parameters={"again": [f"download@{name}" for name in changed]},
        idempotency_key=f"{datetime.now(UTC).date()} {json.dumps(changed, sort_keys=True)}",
        tags=["data-changed"],
        as_subflow=False,
        timeout=0,
    )
    get_run_logger().info("%s changed: rebuild %s is %s", ", ".join(changed), run.name, run.state.name.lower() if run.state else "there")


@flow(name="sweep", on_failure=[tell], on_crashed=[tell])
def sweep(arguments: tuple[str, ...] = (), notify: str = "") -> None:
    """`python -m pipelines sweep ARGUMENTS`, experiments of DVC, with the card for as long as they last."""
    gpu.ensure_limit()
    with gpu.lease():
        process.require("sweep", [sys.executable, "-m", "pipelines", "sweep", *arguments])


@flow(name="promote", on_failure=[tell], on_crashed=[tell])
def promotion(notify: str = "") -> None:
    """Register the finished models, and move the champion aliases by their rule."""
    for line in promote(Path.cwd()):
        get_run_logger().info(line)


@flow(name="serve-smoke", on_failure=[tell], on_crashed=[tell])
def serve_smoke(notify: str = "") -> None:
    """Package what is finished, serve it, ask it, and see that the answer is of the model that was packaged."""
    process.require("serve-smoke", [sys.executable, "-m", "pipelines", "serve-smoke"])
