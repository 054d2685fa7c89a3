"""The promises of the design, read from the code: who may import whom, where each tool lives, and what DVC must watch."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "src" / "llm_from_scratch"
ROWS = (
    {"section", "progress", "hardware", "spool"},
    {"bundle"},
    {"data", "tokenizer", "model"},
    {"training", "inference"},
    {"finetune", "retrieval"},
    {"evaluation"},
    {"serving", "report", "tracking"},
    {"registry"},
    {"config"},
)
ROW = {room: place for place, rooms in enumerate(ROWS) for room in rooms}
HOMES = {
    "mlflow": ("tracking.py",),
    "bentoml": ("serving/",),
    "gradio": ("serving/",),
    "matplotlib": ("report/",),
    "prefect": (),
    "dvc": (),
}
BUNDLE_MAY_IMPORT = {"safetensors", "torch"}  # torch for the type of a tensor alone
EXEMPT = {
    "llm_from_scratch.config",
    "llm_from_scratch.tracking",
    "llm_from_scratch.progress",
    "llm_from_scratch.hardware",
}  # none can change an output
FLOWS_MAY_USE = {f"llm_from_scratch.{room}" for room in ("config", "tracking", "registry", "serving", "bundle")}


def modules() -> list[Path]:
    return sorted(LIBRARY.rglob("*.py"))


def module_name(path: Path) -> str:
    base = ROOT / "src" if LIBRARY in path.parents else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_path(name: str) -> Path | None:
    base = ROOT / "src" if name.split(".")[0] == "llm_from_scratch" else ROOT
    stem = base.joinpath(*name.split("."))
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.exists()), None)


def type_only(tree: ast.AST) -> set[int]:
    """Lines under `if TYPE_CHECKING`: nothing there runs."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    return {line for block in blocks for line in range(block.lineno, (block.end_lineno or block.lineno) + 1)}


@cache
def imported(path: Path, running: bool = False) -> frozenset[str]:
    """Every module name that `path` imports, at its top or inside a function; with `running`, only what can execute."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    idle = type_only(tree) if running else set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if getattr(node, "lineno", 0) in idle:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= set(_from(node, path))
    return frozenset(names)


def _from(node: ast.ImportFrom, path: Path) -> Iterator[str]:
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    stem = package[: len(package) - node.level + 1] if node.level else []
    module = ".".join([*stem, *([node.module] if node.module else [])])
    yield module
    yield from (f"{module}.{alias.name}" for alias in node.names if module_path(f"{module}.{alias.name}"))


def room(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(LIBRARY).as_posix())
def test_a_module_imports_only_from_rows_below_its_own(path: Path) -> None:
    if path.parent == LIBRARY and path.name == "__init__.py":
        return
    own = room(module_name(path))
    for name in imported(path):
        if name.startswith("llm_from_scratch."):
            assert room(name) == own or ROW[room(name)] < ROW[own], f"{module_name(path)} imports {name}"


def test_every_room_stands_in_a_row() -> None:
    rooms = {path.relative_to(LIBRARY).parts[0].removesuffix(".py") for path in modules()} - {"__init__"}
    assert rooms == set(ROW)


@pytest.mark.parametrize("tool", HOMES)
def test_a_tool_has_one_home(tool: str) -> None:
    users = {path.relative_to(LIBRARY).as_posix() for path in modules() if any(name.split(".")[0] == tool for name in imported(path))}
    assert all(user.startswith(HOMES[tool]) if HOMES[tool] else False for user in users), users


def test_the_bundle_stands_on_the_standard_library_and_safetensors() -> None:
    import sys

    outside = {name.split(".")[0] for name in imported(LIBRARY / "bundle.py")} - set(sys.stdlib_module_names)
    assert outside <= BUNDLE_MAY_IMPORT


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(LIBRARY).as_posix())
def test_the_library_reads_no_argument_environment_or_yaml_and_prints_nothing(path: Path) -> None:
    text = ast.unparse(ast.parse(path.read_text(encoding="utf-8")))
    for forbidden in ("sys.argv", "os.environ", "os.getenv"):
        assert forbidden not in text, forbidden
    assert not re.search(r"(?<![\w.])print\(", text)
    assert not {name.split(".")[0] for name in imported(path)} & {"yaml", "ruamel", "argparse", "click"}


def test_stages_never_import_each_other() -> None:
    for path in (ROOT / "stages").glob("*.py"):
        assert not [name for name in imported(path) if name.startswith("stages")], path


def test_flows_hold_no_domain_code() -> None:
    for path in (ROOT / "pipelines").rglob("*.py"):
        used = {".".join(name.split(".")[:2]) for name in imported(path) if name.startswith("llm_from_scratch.")}
        assert used <= FLOWS_MAY_USE, f"{path.name} imports {used - FLOWS_MAY_USE}"


def reached(start: Path) -> set[Path]:
    """Every file of the library that running `start` can execute, the exempt ones not followed."""
    seen: set[Path] = set()
    waiting = [start]
    while waiting:
        for name in imported(waiting.pop(), running=True):
            if not name.startswith("llm_from_scratch") or name in EXEMPT:
                continue
            parts = name.split(".")
            for end in range(2, len(parts) + 1):  # importing a.b.c runs a.b too
                path = module_path(".".join(parts[:end]))
                if path and path not in seen and module_name(path) not in EXEMPT:
                    seen.add(path)
                    waiting.append(path)
    return seen


def graph() -> dict[str, dict]:
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return {name: stage.get("do", stage) for name, stage in stages.items()}


@pytest.mark.parametrize("stage", graph())
def test_dvc_watches_all_the_code_a_stage_runs_and_no_other(stage: str) -> None:
    start = ROOT / "stages" / f"{stage}.py"
    needed = {path.relative_to(ROOT).as_posix() for path in {start, *reached(start)}}
    listed = [dep for dep in graph()[stage]["deps"] if dep.startswith(("src/", "stages/"))]

    def covers(dep: str, path: str) -> bool:
        return path == dep or path.startswith(dep.rstrip("/") + "/")

    missing = sorted(path for path in needed if not any(covers(dep, path) for dep in listed))
    idle = sorted(dep for dep in listed if not any(covers(dep, path) for path in needed))
    assert not missing, f"dvc.yaml: {stage}.deps lacks {missing}"
    assert not idle, f"dvc.yaml: {stage}.deps lists what {stage} never imports: {idle}"


def test_the_graph_has_its_seven_stages() -> None:
    assert list(graph()) == ["download", "tokenize", "train", "quantize", "finetune", "index", "evaluate"]


def test_no_section_of_params_has_a_default_in_python() -> None:
    import llm_from_scratch
    from llm_from_scratch.section import Section

    for module in pkgutil.walk_packages(llm_from_scratch.__path__, "llm_from_scratch."):
        if module.name.startswith("llm_from_scratch.serving.service"):
            continue  # importing it opens the packaged model
        for _, value in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(value, Section):
                optional = [name for name, field in value.model_fields.items() if not field.is_required()]
                assert not optional, f"{value.__name__} has defaults for {optional}"
