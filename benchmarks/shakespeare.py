"""What the comparisons with nanoGPT share: its characters, its split, its recipe for a CPU run as a process, and one way to score.

nanoGPT (Karpathy, github.com/karpathy/nanoGPT, MIT) is not in the package registry: a clone's folder is given on the command line.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from llm_from_scratch.evaluation.likelihood import token_nats

CHARACTERS = 1_115_394
WIDTH, LAYERS, HEADS, CONTEXT, BATCH, ITERATIONS = 128, 4, 4, 64, 12, 2000
LINE = re.compile(r"^iter (\d+): loss [\d.]+, time ([\d.]+)ms", re.MULTILINE)


@dataclass(frozen=True)
class Text:
    """Character ids of tinyshakespeare, nanoGPT's 90 and 10 percent; `vocab_size` characters, in the order of their code points."""

    path: Path
    train: np.ndarray
    val: np.ndarray
    vocab_size: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nanogpt", type=Path, required=True, metavar="FOLDER", help="a clone of github.com/karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="tinyshakespeare, 1,115,394 characters")


def read(path: Path, quick: bool) -> Text:
    text = path.read_text(encoding="utf-8")
    if len(text) != CHARACTERS and not quick:
        raise SystemExit(f"{path}: {len(text)} characters, tinyshakespeare has {CHARACTERS}; give that file, or --quick")
    known = sorted(set(text))
    place = {character: index for index, character in enumerate(known)}
    ids = np.array([place[character] for character in text], dtype=np.uint16)
    return Text(path, ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :], len(known))


@dataclass(frozen=True)
class Peer:
    """nanoGPT's run: the time of its iterations without those that evaluate, and what it left."""

    seconds: float
    iterations: int
    checkpoint: Path

    @property
    def tok_per_s(self) -> float:
        return self.iterations * BATCH * CONTEXT / self.seconds


def train_nanogpt(folder: Path, text: Text, work: Path, seed: int, iterations: int) -> Peer:
    """nanoGPT's own train.py with its own recipe for a CPU; the seed, which it has as a constant, is written into a copy."""
    shutil.copytree(folder, work, ignore=shutil.ignore_patterns(".git", "out*", "*.bin"))
    script = work / "train.py"
    script.write_text(script.read_text(encoding="utf-8").replace("manual_seed(1337", f"manual_seed({seed}"), encoding="utf-8")
    data = work / "data" / "shakespeare_char"
    shutil.copyfile(text.path, data / "input.txt")  # where it is, prepare.py downloads nothing
    flags = {
        "device": "cpu", "compile": False, "eval_iters": 20, "eval_interval": iterations, "log_interval": 1, "block_size": CONTEXT,
        "batch_size": BATCH, "n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "max_iters": iterations, "lr_decay_iters": iterations,
        "dropout": 0.0, "always_save_checkpoint": True,
    }  # fmt: skip
    said = ""
    for command in (
        [str(data / "prepare.py")],
        ["train.py", "config/train_shakespeare_char.py", *(f"--{key}={value}" for key, value in flags.items())],
    ):
        done = subprocess.run([sys.executable, *command], cwd=work, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{folder}: {command[0]} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
        said = done.stdout
    times = {int(number): float(milliseconds) / 1000 for number, milliseconds in LINE.findall(said)}
    training = [seconds for number, seconds in times.items() if number % iterations]  # the first and the last evaluate as well
    mean = sum(training) / len(training)
    return Peer(mean * iterations, iterations, work / "out-shakespeare-char" / "ckpt.pt")


class Nanogpt(nn.Module):
    """A checkpoint of nanoGPT, answering as our rungs do: ids (B, T) to logits (B, T, V)."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        super().__init__()
        specification = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules["nanogpt_model"] = module  # its dataclass looks itself up there
        specification.loader.exec_module(module)
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        self.inner = module.GPT(module.GPTConfig(**saved["model_args"]))
        self.inner.load_state_dict(saved["model"])
        self.vocab_size: int = saved["model_args"]["vocab_size"]
        self.context: int = saved["model_args"]["block_size"]

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids.contiguous()
        return self.inner(ids, ids)[0]  # with targets it gives the logits of every place


def disjoint_nats(model: nn.Module, ids: np.ndarray, context: int) -> np.ndarray:
    """(N - 1,) nats, the text cut into windows of `context` that know nothing of each other: what nanoGPT's own estimate samples."""
    pieces = [ids[start : start + context + 1] for start in range(0, len(ids) - 1, context)]
    whole = [piece for piece in pieces if len(piece) == context + 1]
    rest = [piece for piece in pieces if 2 <= len(piece) <= context]
    costs = []
    for group in (*(whole[first : first + 64] for first in range(0, len(whole), 64)), rest):
        if group:
            rows = torch.from_numpy(np.stack(group).astype(np.int64))
            with torch.no_grad():
                logits = model(rows[:, :-1]).float()
            costs.append(nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").double().numpy())
    return np.concatenate(costs)


def scores(model: nn.Module, ids: np.ndarray, context: int) -> dict[str, float]:
    """Nats a character over all of `ids` but the first, in both protocols."""
    model.eval()
    return {
        "disjoint windows": float(disjoint_nats(model, ids, context).mean()),
        "half-overlapping": float(token_nats(model, ids, context).mean()),
    }


def middle_of(rows: list[dict[str, float]]) -> dict[str, str]:
    """One row of several seeds: the median, and the extremes behind it."""
    return {key: f"{median(row[key] for row in rows):.4g} ({_extremes([row[key] for row in rows])})" for key in rows[0]}


def _extremes(values: list[float]) -> str:
    return f"{min(values):.4g} … {max(values):.4g}"
