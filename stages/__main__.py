"""One node of the graph: `python -m stages train base`. DVC calls this; a person can too.

Beside the graph: import and export of models, documents that join an index or leave it, sources, which says what changed since it was
downloaded, whence, which says where something comes from, and digests, which says whether a rebuild is the same as the committed one.

Everything from outside enters here (arguments, environment, YAML) and goes on as values. A mistake a person can mend ends in one line.

An entry whose `parallel` is ddp or fsdp runs in one process a card: `torchrun --nproc-per-node 2 -m stages train base`. Called without
torchrun, it starts torchrun, so that DVC needs to know nothing of it; on which machines, torchrun's own variables say (PET_NNODES, …).
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from llm_from_scratch.training.distributed import Place

STAGES = ("download", "tokenize", "train", "quantize", "finetune", "index", "evaluate", "readme")
BESIDE = {
    "import": "exchange",
    "export": "exchange",
    "documents": "documents",
    "sources": "sources",
    "whence": "whence",
    "digests": "digests",
}
"""Commands beside the graph, and the modules that have them."""
EPILOG = (
    "Beside the graph: import SOURCE --name NAME, export NAME --gguf FILE, documents --add FOLDER --remove ID, sources, whence THING, and "
    "digests; see their --help."
)
WAYS_ON = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room"),
    errno.EROFS: "make it writable",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "give this user the right to it"),
}
"""What a person can do about a disk that refuses."""
SHARED = ("train",)
"""What several processes can do together."""


def main() -> int:
    quiet_threads()
    quick_log()
    plain_warnings()
    if sys.argv[1:2] and sys.argv[1] in BESIDE:
        return ended(" ".join(sys.argv[1:3]), lambda: beside(*sys.argv[1:]))
    parser = argparse.ArgumentParser(prog="python -m stages", description="Run one stage of dvc.yaml.", epilog=EPILOG)
    parser.add_argument("stage", choices=STAGES, help="what to do")
    parser.add_argument("name", nargs="?", default="", help="which entry of the stage's section in params.yaml")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the parameters (default: params.yaml)")
    arguments = parser.parse_args()
    who = " ".join(filter(None, (arguments.stage, arguments.name)))
    return ended(who, lambda: run(arguments.stage, arguments.name, arguments.params))


def ended(who: str, work: Callable[[], None]) -> int:
    """The exit status of `work`; what a person can mend is said in one line."""
    try:
        work()
    except (ValueError, OSError) as error:
        way = WAYS_ON.get(error.errno or 0) if isinstance(error, OSError) else None
        print(f"{who}: {error}{f'; {way}, then the same command goes on' if way else ''}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{who}: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def beside(what: str, *given: str) -> None:
    from importlib import import_module

    module = BESIDE[what]
    import_module(f"stages.{module}").main(given if module == what else [what, *given])


def quiet_threads() -> None:
    """Threads that wait spin for some microseconds, then sleep. Must precede torch's import.

    Two threads on two cores, tokens/s of training `base`: asleep at once 11,000, this 14,500, spinning on 15,500;
    with one of the cores busy elsewhere: 7,600, 6,400 and 2,800.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def quick_log() -> None:
    """MLflow's own patience with its server is two minutes a request and seven tries; a build has better things to wait for."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


def plain_warnings() -> None:
    """Those of this project are a line for a person, without the place in the code that they come from."""
    usual = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        return f"{message}\n" if "llm_from_scratch" in filename else usual(message, category, filename, lineno, line)

    warnings.formatwarning = formatted


def run(stage: str, name: str, params_file: Path) -> None:
    from importlib import import_module

    from llm_from_scratch import config, tracking

    root = params_file.resolve().parent
    params = config.parse(read_yaml(params_file), params_file.name)
    section = params.sources if stage == "download" else getattr(params, stage, None)
    if isinstance(section, dict) and name not in section:
        raise ValueError(f"no '{name}' in {params_file.name}; {stage} has {', '.join(section)}")
    rank, shared = int(os.environ.get("RANK", 0)), {}
    if "RANK" in os.environ:
        shared = {"place": place(stage)}
    elif isinstance(section, dict) and getattr(section[name], "parallel", "none") != "none":
        start_torchrun(stage)
    tracking.connect(
        uri=os.environ.get("MLFLOW_TRACKING_URI", "") if rank == 0 else "",
        rebuild=os.environ.get("REBUILD_ID", "by-hand"),
        revision=git_revision(root),
        digests=dvc_digests(root),
        spool=root / "var/spool",
        experiment=os.environ.get("DVC_EXP_NAME", ""),
    )
    import_module(f"stages.{stage}").run(params, name, root, **shared)


def place(stage: str) -> Place:
    """Which of torchrun's processes this is. It ends when torchrun does, and not only when torchrun has time to say so."""
    from llm_from_scratch.training.distributed import Place

    if stage not in SHARED:
        raise ValueError("it runs in one process; start it without torchrun")
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    return Place(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def end_with(parent: int) -> None:
    """One that is left behind would go on to write where the next run writes."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def start_torchrun(stage: str) -> NoReturn:
    """This command again, in this process' place: one process a card (without cards, a core) of this machine, if nobody says otherwise."""
    if stage not in SHARED:
        raise ValueError(f"{stage} runs in one process; set parallel to none")
    each = [] if "PET_NPROC_PER_NODE" in os.environ else ["--nproc-per-node", "auto"]
    meet = [] if "PET_NNODES" in os.environ else ["--standalone"]
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *each, *meet, "-m", "stages", *sys.argv[1:]])


def read_yaml(path: Path) -> dict[str, object]:
    """A YAML 1.2 mapping, so that 3e-4 is a number as it is for DVC. Raises ValueError with the line that is wrong."""
    from ruamel.yaml import YAML, YAMLError

    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path.name}: expected a mapping of sections, got {tree!r}")
    return tree


def dvc_digests(root: Path) -> dict[str, str]:
    """Path → DVC's digest of every finished output in dvc.lock, so that MLflow's datasets carry the same ones."""
    lock = root / "dvc.lock"
    stages = read_yaml(lock).get("stages", {}) if lock.exists() else {}
    assert isinstance(stages, dict)
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", []) if "md5" in out}


def git_revision(root: Path) -> str:
    """The commit of the code, with a mark where the tree differs from it; empty outside a repository or without git."""
    import subprocess

    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
