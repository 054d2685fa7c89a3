"""After the graph: `python -m stages digests` writes down what this rebuild made, and compares it with what was committed.

reports/digests.json has the digest of every bundle, the models' bits per byte, and the CPU, threads and libraries that they were made with.
Equal digests are the certificate that a rebuild is the same to the last bit; they can be expected on the same kind of CPU, with as many
threads and the same libraries. Elsewhere the models must be as good, within certify.maximum_bpb_difference of params.yaml.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from llm_from_scratch import bundle, config
from llm_from_scratch.evaluation.certificate import Rebuild, compare

FILE = Path("reports/digests.json")
METRICS = Path("reports/metrics.json")
SCORED = ("ladder", "quantize", "finetune", "alignment")
"""Sections of metrics.json whose entries are models with bits per byte."""
LIBRARIES = ("torch", "numpy", "tokenizers", "safetensors", "faiss-cpu", "bitsandbytes", "peft", "transformers")
"""Whose kernels or formats are in the bytes."""
CPU_FACTS = ("vendor_id", "cpu family", "model")


def main(given: Sequence[str]) -> None:
    """The command, in the project's folder. With --strict, raises ValueError where the rebuild is neither equal nor as good."""
    parser = argparse.ArgumentParser(prog="python -m stages digests", description="Write this rebuild's digests; compare them.")
    parser.add_argument("--strict", action="store_true", help="fail where they are not equal, on another CPU where models are not as good")
    parser.add_argument("--against", type=Path, help=f"another rebuild's {FILE.name} (default: the one that git's HEAD has)")
    asked = parser.parse_args(given)
    root = Path.cwd()
    params = YAML(typ="safe", pure=True).load((root / "params.yaml").read_text(encoding="utf-8"))
    tolerance = config.parse(params, "params.yaml").certify.maximum_bpb_difference
    mine, theirs = made(root), known(root, asked.against)
    (root / FILE).write_text(json.dumps(mine.model_dump(), indent=2) + "\n", encoding="utf-8")
    if theirs is None:
        print(f"{len(mine.digests)} digests in {FILE}; commit it, and the next rebuild is compared with it")
        return
    found = compare(mine, theirs, tolerance)
    print(found.line())
    if asked.strict and not found.holds:
        raise ValueError(f"{len(found.different)} digests differ and {len(found.missing)} bundles are not here; see git diff {FILE}")


def made(root: Path) -> Rebuild:
    """What the graph has made and artifacts/ has now, every byte of it checked; what was imported, or is left over, is not the rebuild's.

    Raises BundleError where a bundle is damaged.
    """
    artifacts = root / "artifacts"
    folders = [root / path for path in outputs(root) if path.startswith("artifacts/") and (root / path / bundle.MANIFEST).exists()]
    metrics = json.loads((root / METRICS).read_text(encoding="utf-8"))
    return Rebuild(
        made_on=made_on(),
        digests={folder.relative_to(artifacts).as_posix(): bundle.verify(folder).digest for folder in folders},
        val_bpb=bits_per_byte(metrics),
    )


def outputs(root: Path) -> list[str]:
    """What dvc.lock says that the graph made."""
    lock = YAML(typ="safe", pure=True).load((root / "dvc.lock").read_text(encoding="utf-8"))
    return sorted(out["path"] for node in lock["stages"].values() for out in node.get("outs", []))


def bits_per_byte(metrics: Mapping[str, Any]) -> dict[str, float]:
    rows = {name: row for section in SCORED for name, row in metrics.get(section, {}).items()}
    return {name: row["val_bpb"] for name, row in rows.items() if "val_bpb" in row}


def known(root: Path, file: Path | None) -> Rebuild | None:
    """What `file` says, or the committed one; none where git has none. Raises ValueError where it cannot be read."""
    if file is not None:
        return Rebuild.model_validate_json(file.read_text(encoding="utf-8"))
    try:
        shown = subprocess.run(["git", "show", f"HEAD:{FILE}"], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return None if shown.returncode else Rebuild.model_validate_json(shown.stdout)


def made_on() -> dict[str, str]:
    """What decides the order in which numbers are added up, and with that the last bits; no host, no clock."""
    import torch

    libraries = {name: version(name).split("+")[0] for name in LIBRARIES}
    kernels = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return {"cpu": cpu(), "kernels": kernels, "threads": str(torch.get_num_threads()), "python": platform.python_version(), **libraries}


def cpu() -> str:
    """Vendor, family and model, as Linux tells them; elsewhere the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except FileNotFoundError:
        return platform.machine()
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return " ".join(told[name] for name in CPU_FACTS if name in told) or platform.machine()
