"""Failure drills: `python -m drills`. For each: the line that a person sees, what is lost, and the command that goes on.

The toy graph is built once in a clone of HEAD. Each drill breaks a copy of it with real means, mends what broke, gives the command again,
and compares the digests of what came out with those of the graph that nobody disturbed. A drill that loses something fails the whole.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import tabulate

from drills import damage, killing, servers, world
from drills.ground import PROJECT, Ground, Outcome, Unfit, built, opened

SEED = 1
NOT_HELD = "not held: "
DRILLS: dict[str, Callable[[Ground], Outcome]] = {
    **{
        f"SIGKILL in {node}": partial(killing.in_stage, node=node, draw=random.Random(f"{SEED} {node}"))
        for node in (*killing.STAGES, "evaluate")
    },
    "SIGKILL at random times": partial(killing.at_random, draw=random.Random(SEED)),
    "disk full in training": damage.disk_full,
    "disk full in DVC's cache": damage.cache_full,
    "read-only folder": damage.read_only,
    "corrupt object in DVC's cache": damage.damaged_cache,
    **{f"corrupt {what}": partial(damage.damaged, what=what) for what in damage.DAMAGE},
    "MLflow server down": servers.mlflow_down,
    "MLflow server killed in mid-run": servers.mlflow_killed,
    "MLflow server slow": servers.mlflow_slow,
    "Prefect server down": servers.prefect_down,
    "two rebuilds at once": world.two_at_once,
    "clock jump": world.clock,
    "no network": world.no_network,
    "mirror with wrong bytes": world.lying_mirror,
}


def main() -> int:
    arguments = parse()
    chosen = [name for name in DRILLS if not arguments.only or any(word in name for word in arguments.only)]
    if not chosen:
        print(f"drills: none is called {' or '.join(arguments.only)}; there is {', '.join(DRILLS)}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="drills.") as place:
        try:
            ground = opened(arguments.built.resolve()) if arguments.built else built(Path(place), say)
        except (RuntimeError, ValueError, OSError) as error:
            print(f"drills: {error}", file=sys.stderr)
            return 1
        rows = []
        for name in chosen:
            rows.append(held(name, ground))
            write(arguments.out, rows)  # each time: drills take minutes, and are broken off
    return 1 if any(row["failed"] for row in rows) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m drills", description="Break the pipeline on purpose; see what is said and lost.")
    parser.add_argument(
        "--only", nargs="+", default=[], help="drills with one of these words in the name; the table keeps the others' rows"
    )
    parser.add_argument("--built", type=Path, help="a clone in which the toy graph is built already (default: build one)")
    parser.add_argument("--out", type=Path, default=PROJECT / "reports", help="the folder for drills.md and drills.json")
    return parser.parse_args()


def held(name: str, ground: Ground) -> dict[str, Any]:
    """One drill; its row of the table. What goes wrong with it is its row, too."""
    started = time.monotonic()
    row: dict[str, Any] = {"drill": name, "failed": False}
    try:
        outcome = DRILLS[name](ground)
        row |= {"what you see": outcome.said, "what is lost": outcome.lost, "how it goes on": outcome.goes_on, "besides": outcome.remark}
        row["failed"] = outcome.equal != outcome.compared
    except Unfit as error:
        row |= {"what you see": f"{NOT_HELD}{error}", "what is lost": "", "how it goes on": "", "besides": ""}
    except Exception as error:  # the rows before it are made, and those after it are still to be
        said = f"FAILED: {type(error).__name__}: {error}"
        row |= {"what you see": said, "what is lost": "unknown", "how it goes on": "", "besides": "", "failed": True}
    row["seconds"] = round(time.monotonic() - started)
    say(f"{name}: {row['what you see']} | {row['what is lost']} | {row['besides']} ({row['seconds']} s)")
    return row


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    """drills.json and drills.md. Rows of drills that were not held this time stay as they were."""
    out.mkdir(parents=True, exist_ok=True)
    table = out / "drills.json"
    before = json.loads(table.read_text(encoding="utf-8"))["rows"] if table.exists() else []
    known = {row["drill"]: row for row in [*before, *rows]}
    rows = [known[name] for name in DRILLS if name in known]
    table.write_text(json.dumps({"rows": rows}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shown = [
        {
            "drill": row["drill"],
            "what you see": cell(row["what you see"]),
            "what is lost": row["what is lost"],
            "how it goes on": cell(row["how it goes on"]),
            "besides": row["besides"],
            "s": row["seconds"],
        }
        for row in rows
    ]
    lost, unfit = sum(row["failed"] for row in rows), sum(row["what you see"].startswith(NOT_HELD) for row in rows)
    lines = [
        "# Failure drills",
        "",
        f"{len(rows) - unfit} of {len(DRILLS)} ways to break the pipeline, each held on a copy of the toy graph with real tools; {lost} of "
        "them lost something. The line is what a person saw; the command is the one that was given again; digests are those of the bundles "
        "that came out (of evaluate, its pages), held against a build that nobody disturbed.",
        "",
        tabulate(shown, headers="keys", tablefmt="github"),
        "",
        "Held with `make drills`.",
        "",
    ]
    (out / "drills.md").write_text("\n".join(lines), encoding="utf-8")


def cell(text: str) -> str:
    """Text as a cell of a Markdown table shows it, to the letter."""
    return f"`{text.replace('|', '¦').replace('`', chr(39))}`" if text else ""


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
