"""What every benchmark ends in: a table in reports/benchmarks, as JSON for programs and Markdown for people, with the machine in both."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import cpuinfo
import torch
from tabulate import tabulate

REPORTS = Path(__file__).parent.parent / "reports" / "benchmarks"


def parser(about: str) -> argparse.ArgumentParser:
    """A command line with what all benchmarks share: `--quick`, for a look at whether it runs, and `--out`."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--quick", action="store_true", help="toy size: shows that it runs, and measures nothing worth keeping")
    made.add_argument("--out", type=Path, default=REPORTS, help="the folder for NAME.json and NAME.md")
    return made


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    card = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    found = cpuinfo.get_cpu_info()
    return {
        "cpu": f"{found.get('brand_raw', platform.machine())} (family {found.get('family')}, model {found.get('model')})",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "avx512": "avx512f" in found.get("flags", []),
        "bf16_units": bool({"avx512_bf16", "amx_bf16"} & set(found.get("flags", []))),
        **card,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def waiting() -> dict[str, str]:
    """What OpenMP's threads do between two products: `PASSIVE` lets others run, which a lone benchmark pays for with their waking up."""
    return {"omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default")}


def packages(*names: str) -> dict[str, str]:
    """The peers' versions, as installed."""
    return {name: version(name) for name in names}


def middle(values: Sequence[float]) -> dict[str, float]:
    """Several runs of one measurement: the middle one, and the extremes as its spread."""
    return {"median": median(values), "low": min(values), "high": max(values), "runs": len(values)}


def write(out: Path, name: str, title: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], notes: Sequence[str]) -> None:
    """NAME.json and NAME.md in `out`: `rows` as the table, `settings` (seeds, sizes, peers' versions), and `notes` on how to read it.

    A cell that is a mapping holds what only its row has to say: "name value, name value" on the page.
    """
    out.mkdir(parents=True, exist_ok=True)
    facts = {"title": title, "machine": machine(), "settings": dict(settings), "rows": [dict(row) for row in rows], "notes": list(notes)}
    (out / f"{name}.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shown = {**facts["machine"], **facts["settings"]}
    lines = [
        f"# {title}",
        "",
        tabulate([{name: _cell(value) for name, value in row.items()} for row in rows], headers="keys", tablefmt="github", floatfmt=".4g"),
        "",
        *(f"* {note}" for note in notes),
        "",
        "Measured with `python -m benchmarks." + name + "`: " + ", ".join(f"{key} {value}" for key, value in shown.items()) + ".",
        "",
    ]
    text = "\n".join(lines)
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def _cell(value: Any) -> Any:
    return ", ".join(f"{name} {inside}" for name, inside in value.items()) if isinstance(value, Mapping) else value
