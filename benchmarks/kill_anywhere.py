"""Kill a training at random moments, start it again, and compare its weights with those of a run that was left alone.

It is the real stage, `python -m stages train`, in a process of its own, ended by SIGKILL, which no code sees coming; at last once
through `dvc repro`, which starts stages for people. One bit that differs is a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks import table
from llm_from_scratch import bundle
from llm_from_scratch.data.rendered import write_conversations
from llm_from_scratch.data.shards import write_shards
from llm_from_scratch.tokenizer.char import train_char
from llm_from_scratch.tokenizer.chat import render
from stages.__main__ import read_yaml

PROJECT = Path(__file__).resolve().parent.parent
PROVERBS = ("The quick brown fox jumps over the lazy dog. ", "A rolling stone gathers no moss. ", "Still waters run deep. ")
TOY = {
    "model": {"architecture": "gpt", "context": 16, "width": 16, "layers": 2, "heads": 2, "dropout": 0.1},
    "context": 16,
    "batch": 4,
    "steps": 100,
    "evaluate_every": 50,
    "checkpoint_every": 5,
}


@dataclass(frozen=True)
class Site:
    """A project folder with nothing in it but params, tokens, and what the one rung leaves behind."""

    root: Path
    rung: str

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "stages", "train", self.rung]

    def start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        told = {"PYTHONPATH": f"{PROJECT}{os.pathsep}{PROJECT / 'src'}", "MLFLOW_TRACKING_URI": "", "DVC_NO_ANALYTICS": "1"}
        with (self.root / "said.txt").open("wb") as said:
            return subprocess.Popen(command, cwd=self.root, env=os.environ | told, stdout=said, stderr=said, start_new_session=True)

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        if process.wait() != 0:
            said = (self.root / "said.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RuntimeError(f"the training ended with {process.returncode}: {' / '.join(said[-3:])}")

    def newest_save(self) -> int:
        return max((int(path.name) for path in self.root.glob("runs/*/[0-9]*")), default=0)

    def outcome(self) -> dict[str, str]:
        """sha256 of the weights, and of the manifest over everything in the bundle."""
        folder = self.root / "artifacts/models" / self.rung
        return {"weights": bundle.file_digest(folder / "model.safetensors"), "bundle": bundle.verify(folder, "model").digest}

    def resumed_at(self) -> int:
        metrics = json.loads((self.root / "artifacts/logs/train" / self.rung / "metrics.json").read_text(encoding="utf-8"))
        return int(metrics["resumed_at"])

    def clear(self) -> None:
        for name in ("runs", "artifacts/models", "artifacts/logs"):
            shutil.rmtree(self.root / name, ignore_errors=True)


def main() -> int:
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="kill_anywhere") as place:
        site = prepare(Path(place), arguments)
        steps, every = arguments.changes["steps"], arguments.changes["checkpoint_every"]
        whole = left_alone(site, steps // every)
        draw, rows = random.Random(arguments.seed), []
        for number in range(arguments.tries):
            rows.append(killed(site, site.command, draw, whole, every, steps) | {"through": "stage"})
            print(f"{number + 1} of {arguments.tries}: {rows[-1]}", file=sys.stderr, flush=True)
        if arguments.dvc:
            rows.append(killed(site, repro(site), draw, whole, every, steps) | {"through": "dvc repro"})
    equal = sum(row["equal"] for row in rows)
    notes = [
        f"{equal} of {len(rows)} tries ended in the weights of the run that was left alone, sha256 {whole.digests['weights'][:12]}….",
        "Each kill waits for a save drawn at random, and then for a random part of the time to the next one, so it lands in a step, in a "
        "save, or, where that save was there from the start, in imports; the table has the step of the last whole save at each kill, and "
        "where the last process went on.",
        "`equal` compares the weights, and the manifest over the whole bundle.",
        f"The run left alone took {whole.end:.0f} s, {whole.first_save:.0f} s of them until its first save.",
    ]
    settings = {"rung": arguments.rung, "seed": arguments.seed, **arguments.changes}
    table.write(arguments.out, "kill_anywhere", "Training killed at random moments ends in the same bits", rows, settings, notes)
    return 0 if equal == len(rows) else 1


def parse() -> argparse.Namespace:
    parser = table.parser(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--rung", default="base", help="which entry of params.yaml's train")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--checkpoint-every", type=int, default=5)
    parser.add_argument("--tokens", type=Path, help="its tokens bundle; artifacts/tokens/… if not given")
    parser.add_argument("--dvc", action=argparse.BooleanOptionalAction, default=True, help="one more try through dvc repro")
    arguments = parser.parse_args()
    short = {"evaluate_every": arguments.steps // 2, "checkpoint_every": arguments.checkpoint_every, "evaluate_tokens": 4000}
    arguments.changes = {"steps": arguments.steps, "warmup_steps": 10, **short}
    if arguments.quick:
        arguments.tries, arguments.dvc, arguments.changes = 1, False, TOY | {"warmup_steps": 10}
    return arguments


def prepare(root: Path, arguments: argparse.Namespace) -> Site:
    """params.yaml with the one rung made short, and its tokens."""
    params: dict[str, Any] = read_yaml(PROJECT / "params.yaml")
    if arguments.rung not in params["train"]:
        raise SystemExit(f"no rung '{arguments.rung}' in params.yaml; train has {', '.join(params['train'])}")
    rung = params["train"][arguments.rung]
    rung |= arguments.changes
    with (root / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(params, file)
    tokens = root / "artifacts/tokens" / rung["tokens"]
    if arguments.quick:
        toy_tokens(tokens)
    else:
        source = arguments.tokens or PROJECT / "artifacts/tokens" / rung["tokens"]
        bundle.verify(source, "tokens")
        shutil.copytree(source, tokens)
    return Site(root, arguments.rung)


def toy_tokens(folder: Path) -> None:
    words = train_char(PROVERBS)
    with bundle.writing(folder) as partial:
        words.save(partial)
        texts = [proverb * 20 for proverb in PROVERBS]
        facts = write_shards(partial, {"train": texts, "validation": texts}, words.encode_batch, words.eot, words.vocab_size)
        said = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": proverb[:8]}] for proverb in PROVERBS]
        write_conversations(partial, (render(messages, words, prompt=False) for messages in said))
        bundle.seal(partial, "tokens", "tokenize@toy", **facts)


@dataclass(frozen=True)
class Whole:
    """A run that nobody disturbed: seconds to its first save and to its end, the seconds between saves, and its digests."""

    first_save: float
    end: float
    pace: float
    digests: dict[str, str]


def left_alone(site: Site, saves: int) -> Whole:
    started, first_save = time.perf_counter(), 0.0
    process = site.start(site.command)
    while process.poll() is None:
        if not first_save and site.newest_save():
            first_save = time.perf_counter() - started
        time.sleep(0.01)
    site.finish(process)
    end = time.perf_counter() - started
    return Whole(first_save, end, (end - first_save) / saves, site.outcome())


def killed(site: Site, command: Sequence[str], draw: random.Random, whole: Whole, every: int, steps: int) -> dict[str, Any]:
    """One try: up to three kills, then a last process that may end; one row of the table."""
    site.clear()
    saves: list[int] = []
    for _ in range(draw.randint(1, 3)):
        newest, process = site.newest_save(), site.start(command)
        if not kill(site, process, draw, whole, range(newest, max(newest + 1, steps - every), every)):
            break
        saves.append(site.newest_save())
    else:
        process = site.start(command)
    site.finish(process)
    if not saves:  # it was faster than the one left alone: nothing was tried
        return killed(site, command, draw, whole, every, steps)
    found = site.outcome()
    return {
        "kills": len(saves),
        "newest save at each": ", ".join(map(str, saves)),
        "resumed at": site.resumed_at(),
        "sha256": found["weights"][:12],
        "equal": found == whole.digests,
    }


def kill(site: Site, process: subprocess.Popen[bytes], draw: random.Random, whole: Whole, between: range) -> bool:
    """Wait for a save drawn from `between`, then for less than it takes to the next one, and kill; false where all was done by then."""
    awaited = draw.choice(between)
    while site.newest_save() < awaited and process.poll() is None:
        time.sleep(0.002)
    starting = whole.first_save if awaited == between.start else 0.0  # that save is there already: the kill may hit imports too
    try:
        process.wait(timeout=draw.uniform(0, starting + whole.pace))
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def repro(site: Site) -> list[str]:
    """The same stage as the only node of a DVC project; the command that rebuilds it."""
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "--quiet"], cwd=site.root, check=True)
    node = {
        "cmd": shlex.join(site.command),
        "params": [f"train.{site.rung}"],
        "deps": ["artifacts/tokens"],
        "outs": [f"artifacts/models/{site.rung}", f"artifacts/logs/train/{site.rung}"],
    }
    with (site.root / "dvc.yaml").open("w", encoding="utf-8") as file:
        YAML().dump({"stages": {"train": node}}, file)
    return [*dvc, "repro", "--quiet"]


if __name__ == "__main__":
    sys.exit(main())
