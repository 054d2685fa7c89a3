"""A run that is killed goes on as if nothing had happened: the same bits, the same curve."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import signal
import time
import warnings
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llm_from_scratch.bundle import load_tensors
from llm_from_scratch.training.batches import windows
from llm_from_scratch.training.loop import Batch, Batches, Fitted, fit, next_token
from llm_from_scratch.training.optimizer import build
from llm_from_scratch.training.plan import Plan
from llm_from_scratch.training.resume import BAD_BATCH, Journal, Saved, capture, code_digest, run_folder

PLAN: dict[str, Any] = {
    "seed": 1,
    "context": 8,
    "batch": 4,
    "micro_batch": 0,
    "steps": 50,
    "optimizer": "muon",
    "learning_rate": 0.02,
    "embedding_learning_rate": 0.01,
    "weight_decay": 0.1,
    "warmup_steps": 5,
    "cooldown_share": 0.5,
    "final_share": 0.1,
    "clip": 1.0,
    "precision": "fp32",
    "checkpointing": False,
    "compile": False,
    "parallel": "none",
    "evaluate_every": 15,
    "checkpoint_every": 7,
}


class Forgetful(nn.Module):
    """Tied, and with dropout: a run that loses its place in the random numbers ends elsewhere."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, width)
        self.hidden = nn.Linear(width, width)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(width, 11)
        self.head.weight = self.tokens.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: Tensor) -> Tensor:
        if self.training:
            self.get_buffer("seen").add_(ids.numel())
        logits: Tensor = self.head(self.drop(self.hidden(self.tokens(ids)).relu()))
        return logits


class Killed(Exception):
    """What a test raises in place of a kill."""


def forgetful(width: int = 12) -> Forgetful:
    torch.manual_seed(0)
    return Forgetful(width)


def plan(**changes: Any) -> Plan:
    return Plan.model_validate(PLAN | changes)


def batches(dies_at: int = -1, seconds: float = 0.0) -> Batches:
    at = windows(np.arange(500, dtype=np.uint16) % 11, 8, 4, seed=1)

    def or_die(step: int) -> Batch:
        time.sleep(seconds)
        if step == dies_at:
            raise Killed
        return at(step)

    return or_die


def evaluate(model: nn.Module) -> dict[str, float]:
    return {"val_loss": model.get_parameter("tokens.weight").norm().item()}


def digest(model: nn.Module) -> str:
    """sha256 over every byte of weights and buffers."""
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())).hexdigest()


def without_clock(fitted: Fitted) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "tok_per_s"} for row in fitted.curve]


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "adamw"}, {"precision": "fp16"}, {"micro_batch": 3}], ids=["muon", "adamw", "fp16", "in parts"]
)
@pytest.mark.parametrize("dies_at", [3, 7, 22, 49])
def test_a_stopped_run_ends_in_the_same_bits_and_the_same_curve(tmp_path: Path, dies_at: int, changes: dict[str, Any]) -> None:
    straight, stopped = forgetful(), forgetful()
    whole = fit(straight, batches(), next_token, plan(**changes), evaluate=evaluate)
    with pytest.raises(Killed):
        fit(stopped, batches(dies_at), next_token, plan(**changes), journal=Journal(tmp_path), evaluate=evaluate)

    resumed = forgetful()
    rest = fit(resumed, batches(), next_token, plan(**changes), journal=Journal(tmp_path), evaluate=evaluate)
    assert rest.resumed_at == dies_at // 7 * 7
    assert digest(resumed) == digest(straight)
    assert without_clock(rest) == without_clock(whole)
    assert rest.tokens == whole.tokens == 50 * 4 * 8


def test_a_resumed_run_logs_the_whole_curve_so_that_its_picture_has_no_hole(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(forgetful(), batches(dies_at=30), next_token, plan(), journal=Journal(tmp_path), evaluate=evaluate)
    rows: list[dict[str, float]] = []
    rest = fit(
        forgetful(), batches(), next_token, plan(), lambda step, row: rows.append({"step": step, **row}), Journal(tmp_path), evaluate
    )
    assert [row["step"] for row in rows] == [15, 20, 30, 40, 45, 50]
    assert rows == rest.curve


def test_a_finished_run_is_read_back_without_a_step(tmp_path: Path) -> None:
    model, again = forgetful(), forgetful()
    done = fit(model, batches(), next_token, plan(), journal=Journal(tmp_path))
    read = fit(again, batches(dies_at=0), next_token, plan(), journal=Journal(tmp_path))
    assert digest(again) == digest(model)
    assert (read.resumed_at, read.curve, read.seconds) == (50, done.curve, done.seconds)


def test_a_run_without_a_journal_leaves_nothing_and_one_with_it_keeps_two_saves(tmp_path: Path) -> None:
    fit(forgetful(), batches(), next_token, plan())
    assert list(tmp_path.iterdir()) == []
    journal = Journal(tmp_path / "run")
    fit(forgetful(), batches(), next_token, plan(), journal=journal)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["000000049", "000000050"]
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".pt", ".pkl", ".bin")]
    journal.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut short", "one bit", "gone"])
def test_a_damaged_save_is_passed_over_for_the_one_before_it(tmp_path: Path, file: str, damage: str) -> None:
    straight, resumed = forgetful(), forgetful()
    fit(straight, batches(), next_token, plan(), journal=Journal(tmp_path))
    path = tmp_path / "000000050" / file
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + (b"" if damage == "cut short" else bytes([content[middle] ^ 1]) + content[middle + 1 :]))

    rest = fit(resumed, batches(), next_token, plan(), journal=Journal(tmp_path))
    assert rest.resumed_at == 49
    assert digest(resumed) == digest(straight)


def test_with_no_save_left_whole_the_run_starts_anew(tmp_path: Path) -> None:
    fit(forgetful(), batches(), next_token, plan(), journal=Journal(tmp_path))
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"")
    assert Journal(tmp_path).latest() is None


def test_a_save_holds_the_moment_it_was_asked_for_though_it_is_written_later(tmp_path: Path) -> None:
    weight = torch.zeros(1000)
    journal = Journal(tmp_path)
    journal.save(Saved(1, {"weight": weight}, {"note": "zeros"}))
    weight += 1
    latest = journal.latest()
    assert latest is not None
    assert (latest.step, latest.facts) == (1, {"note": "zeros"})
    assert latest.tensors["weight"].sum() == 0


def test_a_save_that_cannot_be_written_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        fit(forgetful(), batches(), next_token, plan(), journal=Journal(tmp_path / "run"))


def test_a_save_of_another_model_is_refused(tmp_path: Path) -> None:
    fit(forgetful(), batches(), next_token, plan(), journal=Journal(tmp_path))
    wanted = (
        r"head.bias: the saved run has None|hidden.bias: the saved run has \(12,\), the model \(6,\); remove the run's folder to start anew"
    )
    with pytest.raises(ValueError, match=wanted):
        fit(forgetful(width=6), batches(), next_token, plan(), journal=Journal(tmp_path))


def test_frozen_weights_are_not_saved_and_tied_ones_once() -> None:
    model = forgetful()
    model.hidden.requires_grad_(False)
    names = set(capture(model, build(model, plan(optimizer="adamw"))))
    assert {"model.tokens.weight", "model.head.bias", "model.seen", "random.cpu"} == names


def test_the_state_before_a_loss_that_is_not_finite_is_kept(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return next_token(model, batch) * (float("nan") if int(model.get_buffer("seen")) == 10 * 32 else 1)

    model = forgetful()
    wanted = (
        rf"step 10: the loss of batch \w+ \(4 rows\) is nan, .*; the state before it is in {tmp_path}, the rows are in bad_batch.* there"
    )
    with pytest.raises(ValueError, match=wanted):
        fit(model, batches(), loss, plan(), journal=Journal(tmp_path))
    latest = Journal(tmp_path).latest()
    assert latest is not None
    assert latest.step == 9
    assert torch.equal(latest.tensors["model.tokens.weight"], model.tokens.weight)
    assert model.tokens.weight.isfinite().all()
    seen = load_tensors(tmp_path / BAD_BATCH)
    assert torch.equal(seen["inputs"], batches()(9)[0])
    assert torch.equal(seen["targets"], batches()(9)[1])


def test_how_many_rows_memory_holds_is_remembered_over_a_kill(tmp_path: Path) -> None:
    def hungry(model: nn.Module, batch: Batch) -> Tensor:
        torch.empty(2**50 if len(batch[0]) > 2 else 1, dtype=torch.uint8)  # the allocator really refuses that much
        return next_token(model, batch)

    straight, resumed = forgetful(), forgetful()
    with pytest.warns(UserWarning, match="step 1: out of memory with 4 rows at once; going on with 2"):
        fit(straight, batches(), hungry, plan())
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(Killed):
        fit(forgetful(), batches(dies_at=30), hungry, plan(), journal=Journal(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(resumed, batches(), hungry, plan(), journal=Journal(tmp_path))
    assert digest(resumed) == digest(straight)


def test_another_configuration_other_data_or_other_code_is_another_run(tmp_path: Path) -> None:
    source = tmp_path / "loop.py"
    source.write_text("step = 1")
    code = code_digest([source])
    base = run_folder(tmp_path, {"rate": 0.1}, "data", code)
    assert base == run_folder(tmp_path, {"rate": 0.1}, "data", code_digest([source]))
    source.write_text("step = 2")
    others = {
        run_folder(tmp_path, {"rate": 0.2}, "data", code),
        run_folder(tmp_path, {"rate": 0.1}, "other data", code),
        run_folder(tmp_path, {"rate": 0.1}, "data", code_digest([source])),
    }
    assert len(others | {base}) == 4


LONG = {"steps": 200, "checkpoint_every": 5, "evaluate_every": 45}


def run_apart(folder: Path) -> None:
    """In a process of its own: a run that leaves its outcome beside its saves."""
    model = forgetful()
    done = fit(model, batches(seconds=0.002), next_token, plan(**LONG), journal=Journal(folder / "run"), evaluate=evaluate)
    outcome = {"digest": digest(model), "curve": without_clock(done), "resumed_at": done.resumed_at}
    (folder / "outcome.json").write_text(json.dumps(outcome))


def start(folder: Path) -> ForkServerProcess:
    """Forked from a server that has torch loaded already, so that each run does not spend seconds on importing it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llm_from_scratch.training.loop"])
    folder.mkdir(exist_ok=True)
    process = context.Process(target=run_apart, args=(folder,))
    process.start()
    return process


def newest(folder: Path) -> int:
    return max((int(path.name) for path in (folder / "run").glob("[0-9]*")), default=0)


def finished(process: ForkServerProcess, folder: Path) -> dict[str, Any]:
    process.join()
    assert process.exitcode == 0
    outcome: dict[str, Any] = json.loads((folder / "outcome.json").read_text())
    return outcome


def test_a_run_killed_again_and_again_ends_in_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    """SIGKILL lands anywhere: in a step, in a save, between the files of a save."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    whole = finished(start(straight), straight)
    draw = random.Random(7)
    for _ in range(5):
        before, process = newest(killed), start(killed)
        while newest(killed) <= before:
            assert process.is_alive(), "the run ended before it could be killed"
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.04))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL

    rest = finished(start(killed), killed)
    assert (whole["resumed_at"], rest["resumed_at"] > 0) == (0, True)
    assert rest["digest"] == whole["digest"]
    assert rest["curve"] == whole["curve"]
