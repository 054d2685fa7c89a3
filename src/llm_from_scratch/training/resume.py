"""A run that can be killed at any moment and goes on bit for bit: weights, moments, random state and curve, saved as it goes.

Each save is a sealed folder, renamed into place when it is whole, so a kill leaves the save before it. Tensors are copied at once and
written by a thread while training goes on. It holds only what cannot be made again: frozen weights come from where they came before,
batches and rates follow from the step.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_from_scratch.bundle import BundleError, load_tensors, save_tensors, seal, verify, writing
from llm_from_scratch.training.optimizer import Optimizer
from llm_from_scratch.training.sharded import shared_like

KEPT = 2
BAD_BATCH = "bad_batch.safetensors"


@dataclass(frozen=True)
class Saved:
    """The state after `step` steps: tensors by name, and `facts`, anything JSON can hold."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Journal:
    """The saves of one run, in a folder of its own; only the last two are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._pending: Future[None] | None = None

    def save(self, saved: Saved) -> None:
        """Copy the state and write it in the background, after the save before it is done."""
        self.settle()
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in saved.tensors.items()}
        self._pending = self._writer.submit(self._write, saved.step, tensors, json.dumps(saved.facts))

    def keep_batch(self, inputs: Tensor, targets: Tensor) -> None:
        """Put a batch that stopped the run beside the saves, for a person to look at."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.folder / BAD_BATCH, {"inputs": inputs, "targets": targets})

    def settle(self) -> None:
        """Wait until everything is on disk. Raises whatever the writing raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self) -> Saved | None:
        """The newest save that is whole, None where there is none. A damaged one is passed over for the one before it."""
        self.settle()
        for folder in reversed(self._saves()):
            try:
                verify(folder, "checkpoint")
            except BundleError:
                continue
            facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return Saved(int(folder.name), load_tensors(folder / "state.safetensors"), facts)
        return None

    def remove(self) -> None:
        """Forget the run, once what it was for is in place."""
        self.settle()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, step: int, tensors: dict[str, Tensor], facts: str) -> None:
        with writing(self.folder / f"{step:09d}") as partial:
            save_tensors(partial / "state.safetensors", tensors)
            (partial / "state.json").write_text(facts, encoding="utf-8")
            seal(partial, "checkpoint", "train")
        for old in self._saves()[:-KEPT]:
            shutil.rmtree(old)

    def _saves(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("[0-9]*") if path.is_dir())


def capture(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors that a run changes, under names that `restore` knows: what learns, buffers, moments and torch's random state."""
    return {
        **{f"model.{name}": tensor for name, tensor in _changing(model).items()},
        **{f"optimizer.{name}": tensor for name, tensor in optimizer.state_dict().items()},
        **{f"random.{name}": state for name, state in _random_states(model).items()},
    }


def restore(tensors: Mapping[str, Tensor], model: nn.Module, optimizer: Optimizer) -> None:
    """Put back what `capture` took. Raises ValueError where the tensors are of another model."""
    changing = _changing(model)
    weights = _under("model.", tensors)
    found, wanted = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (weights, changing))
    if found != wanted:
        odd = min(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise ValueError(f"{odd}: the saved run has {found.get(odd)}, the model {wanted.get(odd)}; remove the run's folder to start anew")
    with torch.no_grad():
        for name, tensor in changing.items():
            tensor.copy_(shared_like(weights[name], tensor))
    optimizer.load_state_dict(_under("optimizer.", tensors))
    states = _under("random.", tensors)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], _device(model))


def run_folder(runs: Path, config: Mapping[str, Any], *digests: str) -> Path:
    """Where the run of this configuration, data and code keeps its state: change any of them and it is another run."""
    identity = json.dumps([config, *digests], sort_keys=True)
    return runs / hashlib.sha256(identity.encode()).hexdigest()[:16]


def code_digest(sources: Iterable[Path]) -> str:
    """sha256 over source files, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """Each tensor that training may change, once, though tied weights have two names."""
    lasting = model.state_dict().keys()
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {**learned, **{name: buffer for name, buffer in model.named_buffers() if name in lasting}}


def _random_states(model: nn.Module) -> dict[str, Tensor]:
    """torch's own generators; batches and evaluation bring theirs along."""
    device = _device(model)
    on_card = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **on_card}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
