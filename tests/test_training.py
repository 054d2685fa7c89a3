"""How a model learns: batches, the learning rate, the optimizers, the loop that joins them, and the stage around it."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from llm_from_scratch import bundle
from llm_from_scratch.config import Params
from llm_from_scratch.data.documents import Split
from llm_from_scratch.data.shards import write_shards
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.model.gpt import Gpt, GptShape
from llm_from_scratch.tokenizer import load
from llm_from_scratch.tokenizer.char import train_char
from llm_from_scratch.training.batches import windows
from llm_from_scratch.training.learner import COMPILERS
from llm_from_scratch.training.loop import Batch, fit, next_token, write_curve
from llm_from_scratch.training.optimizer import BETAS, MOMENTUM, Muon, build, orthogonal, split
from llm_from_scratch.training.plan import NgramTrainParams, Plan, RungParams, TrainParams
from llm_from_scratch.training.precision import arithmetic
from llm_from_scratch.training.resume import Journal
from llm_from_scratch.training.schedule import share
from stages import train

CPU = torch.device("cpu")
PLAN: dict[str, Any] = {
    "seed": 1,
    "context": 8,
    "batch": 4,
    "micro_batch": 0,
    "steps": 60,
    "optimizer": "adamw",
    "learning_rate": 0.01,
    "embedding_learning_rate": 0.02,
    "weight_decay": 0.1,
    "warmup_steps": 5,
    "cooldown_share": 0.5,
    "final_share": 0.1,
    "clip": 1.0,
    "precision": "fp32",
    "checkpointing": False,
    "compile": False,
    "parallel": "none",
    "evaluate_every": 25,
    "checkpoint_every": 20,
}
BIGRAM = {**PLAN, "tokens": "letters", "evaluate_tokens": 0, "lessons": None, "model": {"architecture": "bigram"}}


def plan(**changes: Any) -> Plan:
    return Plan.model_validate(PLAN | changes)


class Tiny(nn.Module):
    """An embedding, two hidden matrices of one shape, a norm, and a head."""

    def __init__(self, vocab_size: int = 11, width: int = 6) -> None:
        super().__init__()
        self.vocab_size, self.context = vocab_size, 8
        self.tokens = nn.Embedding(vocab_size, width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        x = x + self.second(self.first(x).relu())
        logits: Tensor = self.head(self.norm(x))
        return logits


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def counting(length: int = 500) -> np.ndarray:
    """A text that can be learned: 0 1 2 … 10 0 1 2 …"""
    return np.arange(length, dtype=np.uint16) % 11


def names_of(model: nn.Module, weights: list[nn.Parameter]) -> set[str]:
    return {name for name, weight in model.named_parameters() if any(weight is one for one in weights)}


# batches


def test_targets_are_the_inputs_one_token_ahead() -> None:
    inputs, targets = windows(np.arange(100, dtype=np.uint16), context=8, batch=16, seed=1)(0)
    assert inputs.shape == targets.shape == (16, 8)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)


def test_the_batch_of_a_step_depends_on_nothing_but_seed_and_step() -> None:
    ids = np.arange(1000, dtype=np.uint16)
    at, again, other = windows(ids, 8, 4, seed=1), windows(ids, 8, 4, seed=1), windows(ids, 8, 4, seed=2)
    at(3), at(9)
    assert torch.equal(at(7)[0], again(7)[0])
    assert not torch.equal(at(7)[0], at(8)[0])
    assert not torch.equal(at(7)[0], other(7)[0])


def test_windows_reach_the_first_and_the_last_token() -> None:
    at = windows(np.arange(10, dtype=np.uint16), context=8, batch=64, seed=1)
    inputs, targets = at(0)
    assert inputs.min() == 0
    assert targets.max() == 9


def test_one_window_is_enough_and_less_says_what_is_wrong() -> None:
    assert windows(np.arange(9), context=8, batch=1, seed=1)(0)[1].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    with pytest.raises(ValueError, match=r"8 training tokens are fewer than one window of context \+ 1 = 9; lower context"):
        windows(np.arange(8), context=8, batch=1, seed=1)


# schedule


def test_the_rate_warms_up_stays_and_cools_down_to_the_final_share_at_the_last_step() -> None:
    told = plan(steps=20, warmup_steps=4, cooldown_share=0.5, final_share=0.1)
    rates = [share(step, told) for step in range(20)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:10] == [1.0] * 6
    assert rates[10:] == pytest.approx([0.91, 0.82, 0.73, 0.64, 0.55, 0.46, 0.37, 0.28, 0.19, 0.1])


def test_without_warmup_and_cooldown_the_rate_stays() -> None:
    told = plan(steps=7, warmup_steps=0, cooldown_share=0.0)
    assert [share(step, told) for step in range(7)] == [1.0] * 7


# optimizer


def test_only_hidden_matrices_decay() -> None:
    model = tiny()
    matrices, rest = split(model)
    assert names_of(model, matrices) == {"first.weight", "second.weight"}
    assert len(matrices) + len(rest) == len(list(model.parameters()))
    decayed, kept = build(model, plan()).param_groups
    assert (decayed["weight_decay"], decayed["lr"]) == (0.1, 0.01)
    assert (kept["weight_decay"], kept["lr"]) == (0.0, 0.02)


def test_a_head_tied_to_the_embedding_is_no_hidden_matrix_and_is_moved_once() -> None:
    model = tiny()
    model.head.weight = model.tokens.weight
    matrices, rest = split(model)
    assert names_of(model, matrices) == {"first.weight", "second.weight"}
    assert sum(weight is model.tokens.weight for weight in rest) == 1


def test_frozen_weights_stay_and_only_what_requires_a_gradient_is_held() -> None:
    """As under LoRA: all is frozen but two thin matrices."""
    model = tiny()
    model.requires_grad_(False)
    model.register_parameter("lora_A", nn.Parameter(torch.randn(2, 6)))
    model.register_parameter("lora_B", nn.Parameter(torch.zeros(6, 2)))
    before = model.first.weight.clone()
    for optimizer in ("adamw", "muon"):
        held = build(model, plan(optimizer=optimizer))
        assert names_of(model, [weight for group in held.param_groups for weight in group["params"]]) == {"lora_A", "lora_B"}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, Tiny)
        x = model.tokens(batch[0])
        logits = model.head(x + x @ model.get_parameter("lora_A").T @ model.get_parameter("lora_B").T)
        return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())

    fit(model, windows(counting(), 8, 4, 1), loss, plan(steps=3, warmup_steps=0))
    assert torch.equal(model.first.weight, before)
    assert model.get_parameter("lora_B").abs().sum() > 0


def test_nothing_to_train_and_muon_without_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        build(tiny().requires_grad_(False), plan())
    with pytest.raises(ValueError, match="muon moves hidden matrices, and Embedding has none that learn; set optimizer to adamw"):
        build(nn.Embedding(5, 5), plan(optimizer="muon"))


def test_our_adamw_is_the_one_of_torch() -> None:
    ours, theirs = tiny(), tiny()
    optimizer = build(ours, plan())
    matrices, rest = split(theirs)
    groups = [{"params": matrices, "lr": 0.005, "weight_decay": 0.1}, {"params": rest, "lr": 0.01, "weight_decay": 0.0}]
    oracle = torch.optim.AdamW(groups, betas=BETAS, foreach=False, fused=False)
    optimizer.scale(0.5)
    for step in range(5):
        batch = windows(counting(), 8, 4, 1)(step)
        for model, mover in ((ours, optimizer), (theirs, oracle)):
            mover.zero_grad()
            next_token(model, batch).backward()
            mover.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_newton_schulz_brings_every_singular_value_near_one_and_keeps_the_vectors(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(1, *shape)
    result = orthogonal(matrix)
    values = torch.linalg.svdvals(result[0])
    left, _, right = torch.linalg.svd(matrix[0], full_matrices=False)
    assert values.min() > 0.5
    assert values.max() < 1.3
    aligned = left.T @ result[0] @ right.T
    torch.testing.assert_close(aligned, torch.diag(aligned.diagonal()), atol=1e-4, rtol=0)


def test_newton_schulz_of_nothing_is_nothing() -> None:
    assert orthogonal(torch.zeros(2, 4, 3)).abs().sum() == 0


def stepped(optimizers: list[torch.optim.Optimizer], weights: list[nn.Parameter], steps: int = 4) -> None:
    random = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=random)
        for optimizer in optimizers:
            optimizer.step()


def matrices_of(*shapes: tuple[int, int]) -> list[nn.Parameter]:
    torch.manual_seed(5)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def test_matrices_stacked_by_shape_move_as_they_would_one_by_one() -> None:
    shapes = [(8, 8), (12, 4), (8, 8), (4, 12), (12, 4)]
    stacked, single = matrices_of(*shapes), matrices_of(*shapes)
    together = Muon(stacked, lr=0.02, weight_decay=0.1)
    assert len(together.param_groups) == 3
    stepped([together], stacked)
    stepped([Muon([matrix], lr=0.02, weight_decay=0.1) for matrix in single], single)
    for mine, other in zip(stacked, single, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_our_muon_is_the_one_of_torch_up_to_its_bfloat16() -> None:
    shapes = [(8, 8), (12, 4), (4, 12)]
    ours, theirs = matrices_of(*shapes), matrices_of(*shapes)
    stepped([Muon(ours, lr=0.02, weight_decay=0.1)], ours)
    stepped([torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=MOMENTUM)], theirs)
    for mine, other, start in zip(ours, theirs, matrices_of(*shapes), strict=True):
        torch.testing.assert_close(mine, other, atol=0.02 * 4 * 0.05, rtol=0)
        assert (mine - start).abs().max() > 0.01


def test_muon_leaves_a_matrix_without_gradient_alone() -> None:
    used, unused = matrices_of((4, 4), (4, 4))
    before = unused.clone()
    stepped([Muon([used, unused], lr=0.1, weight_decay=0.5)], [used])
    assert torch.equal(unused, before)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_optimizer_goes_on_from_its_state_as_if_it_had_never_stopped(optimizer: str) -> None:
    straight, stopped = tiny(), tiny()
    first = build(straight, plan(optimizer=optimizer))
    second = build(stopped, plan(optimizer=optimizer))
    for step in range(6):
        if step == 3:
            state = {name: tensor.clone() for name, tensor in second.state_dict().items()}
            second = build(stopped, plan(optimizer=optimizer))
            second.load_state_dict(state)
        for model, mover in ((straight, first), (stopped, second)):
            mover.zero_grad()
            next_token(model, windows(counting(), 8, 4, 1)(step)).backward()
            mover.step()
    for mine, other in zip(straight.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(mine, other)


# precision


def test_bf16_computes_products_in_bfloat16_and_keeps_weights_and_gradients_in_fp32() -> None:
    model = nn.Linear(4, 4)
    with arithmetic("bf16", CPU) as numbers:
        with numbers.autocast():
            out = model(torch.randn(2, 4))
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert model.weight.dtype == torch.float32
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == torch.float32


def test_only_fp16_scales_its_loss() -> None:
    for precision, scaled in (("fp32", 1.0), ("bf16", 1.0), ("fp16", 65536.0)):
        with arithmetic(precision, CPU) as numbers:
            assert numbers.scaler.scale(torch.tensor(1.0)).item() == scaled


def test_tf32_without_a_card_is_refused() -> None:
    with pytest.raises(ValueError, match="precision tf32 needs an NVIDIA card, and this run is on cpu; set precision to fp32"):
        fit(tiny(), windows(counting(), 8, 4, 1), next_token, plan(precision="tf32"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_half_precision_learns_what_fp32_learns(precision: str) -> None:
    losses = {}
    for chosen in ("fp32", precision):
        done = fit(tiny(), windows(counting(), 8, 4, 1), next_token, plan(precision=chosen, steps=40))
        losses[chosen] = done.curve[-1]["train_loss"]
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.1)


# the loop


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fit_learns_to_count(optimizer: str) -> None:
    model = tiny()
    batch = windows(counting(), 8, 16, seed=2)(0)
    before = next_token(model, batch).item()
    done = fit(model, windows(counting(), 8, 16, seed=1), next_token, plan(optimizer=optimizer, steps=150))
    assert before > 2
    assert next_token(model, batch).item() < 0.5
    assert not model.training
    assert done.tokens == 150 * 16 * 8
    assert done.tok_per_s == done.tokens / done.seconds


def test_the_log_gets_a_row_every_twenty_steps_and_wherever_something_was_evaluated() -> None:
    rows: dict[int, Mapping[str, float]] = {}

    def log(step: int, metrics: Mapping[str, float]) -> None:
        rows[step] = dict(metrics)

    modes: list[bool] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        modes.append(model.training)
        return {"val_loss": 1.5, "val_bpb": 2.0}

    done = fit(tiny(), windows(counting(), 8, 4, 1), next_token, plan(), log, evaluate=evaluate)
    assert list(rows) == [20, 25, 40, 50, 60]
    assert [step for step, row in rows.items() if "val_loss" in row] == [25, 50, 60]
    assert all({"train_loss", "learning_rate", "tok_per_s", "grad_norm"} <= row.keys() for row in rows.values())
    assert rows[60]["learning_rate"] == pytest.approx(0.01 * 0.1)
    assert modes == [False] * 3
    assert done.curve == [{"step": step, **row} for step, row in rows.items()]


def test_where_a_run_stands_is_told_in_lines_also_to_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny(), windows(counting(), 8, 4, 1), next_token, plan(), progress=True)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("train:   0% 0/60 [")
    assert last.startswith("train: 100% 60/60 [")
    assert "loss=" in last


def test_the_curve_is_a_table_that_says_nothing_where_nothing_was_measured(tmp_path: Path) -> None:
    write_curve(
        tmp_path / "curve.csv", [{"step": 20, "train_loss": 2.5, "tok_per_s": 9.0}, {"step": 25, "train_loss": 2.0, "val_loss": 1.5}]
    )
    with (tmp_path / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"step": "20", "train_loss": "2.5", "val_loss": "", "val_bpb": "", "learning_rate": ""}
    assert rows[1]["val_loss"] == "1.5"


def test_fit_gives_the_random_numbers_back_as_they_were() -> None:
    model = nn.Sequential(tiny(), nn.Dropout(0.5))
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    fit(model, windows(counting(), 8, 4, 1), next_token, plan(steps=3, warmup_steps=0))
    assert torch.equal(torch.rand(3), expected)


def test_a_long_gradient_is_shortened_to_the_clip_and_logged_as_it_was() -> None:
    """The slope of 1000 · sum over a 3 by 3 table is 1000 everywhere, 3000 long."""
    rows: list[Mapping[str, float]] = []
    stepped_with: list[float] = []

    def spy(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        stepped_with.append(optimizer.param_groups[0]["params"][0].grad.norm().item())

    hook = register_optimizer_step_pre_hook(spy)
    fit(
        nn.Embedding(3, 3),
        windows(counting(), 8, 4, 1),
        lambda model, batch: 1000 * model.get_parameter("weight").sum(),
        plan(steps=1, warmup_steps=0, clip=0.5),
        lambda step, row: rows.append(row),
    )
    hook.remove()
    assert stepped_with == [pytest.approx(0.5)]
    assert rows[0]["grad_norm"] == pytest.approx(3000.0)


def test_targets_of_minus_100_are_not_scored() -> None:
    model = tiny()
    inputs, targets = windows(counting(), 8, 4, 1)(0)
    half = targets.clone()
    half[:, 4:] = -100
    assert next_token(model, (inputs, half)).item() == pytest.approx(next_token(model, (inputs[:, :4], targets[:, :4])).item())


def test_a_loss_that_is_not_finite_stops_the_run_before_it_spoils_a_weight() -> None:
    model = tiny()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        return next_token(model, batch) * (math.nan if len(calls) == 8 else 1.0)

    calls: list[int] = []
    with pytest.raises(
        ValueError, match=r"step 8: the loss of batch [0-9a-f]{12} \(4 rows\) is nan, wanted a finite number; lower learning_rate \(0.01\)"
    ):
        fit(model, windows(counting(), 8, 4, 1), loss, plan())
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_a_gradient_that_is_not_finite_stops_the_run_too() -> None:
    """The root of zero is finite and its slope is not."""
    model = tiny()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return next_token(model, batch) + (0 * model.get_parameter("first.weight").sum()).sqrt()

    with pytest.raises(
        ValueError, match=r"step 1: the gradient norm of batch [0-9a-f]{12} \(4 rows\) is (nan|inf), wanted a finite number"
    ):
        fit(model, windows(counting(), 8, 4, 1), loss, plan())
    assert all(weight.isfinite().all() for weight in model.parameters())


# memory


def uneven(step: int) -> Batch:
    """Four rows of 8, 3, 0 and 5 scored targets."""
    inputs, targets = windows(counting(), 8, 4, 1)(step)
    targets = targets.clone()
    for row, scored in enumerate((8, 3, 0, 5)):
        targets[row, scored:] = -100
    return inputs, targets


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_gradient_of_parts_is_that_of_the_whole_batch_however_unevenly_it_is_scored(rows: int) -> None:
    model, seen = tiny(), dict[str, Tensor]()

    def spy(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        seen.update({name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None})

    oracle = tiny()
    inputs, targets = uneven(0)
    (F.cross_entropy(oracle(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") / 16).backward()
    hook = register_optimizer_step_pre_hook(spy)
    done = fit(model, uneven, next_token, plan(steps=1, warmup_steps=0, micro_batch=rows, clip=1e9))
    hook.remove()
    for name, weight in oracle.named_parameters():
        assert weight.grad is not None
        torch.testing.assert_close(seen[name], weight.grad, atol=1e-6, rtol=0)
    assert done.curve[0]["train_loss"] == pytest.approx(next_token(tiny(), uneven(0)).item(), abs=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_run_in_parts_ends_where_the_one_with_whole_batches_does(rows: int, optimizer: str) -> None:
    """In double precision: in single, a moment of almost nothing is divided by its own root, which blows up the last bit."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-100)

    ends = []
    for micro_batch in (0, rows):
        model = tiny().double()
        fit(model, uneven, loss, plan(optimizer=optimizer, steps=40, micro_batch=micro_batch))
        ends.append(list(model.parameters()))
    for whole, parts in zip(*ends, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


def test_a_batch_in_which_nothing_is_scored_has_no_loss_in_parts_either() -> None:
    with pytest.raises(ValueError, match=r"the loss of batch .* is nan"):
        fit(tiny(), lambda step: (uneven(0)[0], torch.full((4, 8), -100)), next_token, plan(micro_batch=2))


TOO_MUCH = 2**50  # bytes: no machine has them, so torch's own allocator refuses


def hungry(rows: int, where: str = "forward") -> Any:
    """The loss of a model that takes more memory than there is for more than `rows` rows at once."""

    def allocate(*_: Tensor) -> None:
        torch.empty(TOO_MUCH, dtype=torch.uint8)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value = next_token(model, batch)
        if len(batch[0]) > rows:
            value.register_hook(allocate) if where == "backward" else allocate()
        return value

    return loss


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_where_memory_runs_out_the_run_goes_on_in_smaller_parts_to_the_same_end(where: str) -> None:
    rows: list[Mapping[str, float]] = []
    backed_off, planned = tiny(), tiny()
    fit(planned, uneven, next_token, plan(micro_batch=1))
    with pytest.warns(UserWarning, match="out of memory") as told:
        fit(backed_off, uneven, hungry(1, where), plan(), lambda step, row: rows.append(row))
    said = [str(warning.message) for warning in told]
    assert said == [f"step 1: out of memory with {rows} rows at once; going on with {rows // 2}" for rows in (4, 2)]
    assert [row["micro_batch"] for row in rows] == [1] * 5
    for mine, other in zip(backed_off.parameters(), planned.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_where_memory_does_not_hold_one_row_the_run_says_so_in_one_line() -> None:
    wanted = r"step 1: memory does not hold even one row of the batch \(.*can't allocate memory.*\); lower context \(8\), take a smaller"
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(ValueError, match=wanted) as error:
        fit(tiny(), uneven, hungry(0), plan())
    assert "\n" not in str(error.value)


def test_an_error_that_is_not_about_memory_is_not_taken_for_one() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        fit(tiny(), uneven, lambda model, batch: model(batch[0]) @ torch.zeros(3, 3), plan())


def small_gpt() -> Gpt:
    torch.manual_seed(0)
    return Gpt(GptShape(vocab_size=11, context=8, width=16, layers=3, heads=2, hidden=64, dropout=0.2, norm_eps=1e-5))


def kept_bytes(model: nn.Module) -> int:
    """What the forward pass keeps for the backward pass."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        next_token(model.train(), windows(counting(), 8, 4, 1)(0))
    return sum(kept)


def test_checkpointing_keeps_less_and_learns_the_same_dropout_included() -> None:
    kept, computed_again = small_gpt(), small_gpt()
    fit(kept, windows(counting(), 8, 4, 1), next_token, plan(steps=10))
    fit(computed_again, windows(counting(), 8, 4, 1), next_token, plan(steps=10, checkpointing=True))
    for mine, other in zip(computed_again.parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=0)
    assert kept_bytes(computed_again) < 0.5 * kept_bytes(kept)


def test_checkpointing_of_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="checkpointing computes the layers of a gpt or llama again, and Tiny is none; set it to false"):
        fit(tiny(), windows(counting(), 8, 4, 1), next_token, plan(checkpointing=True))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_learns_what_an_eager_one_does_under_the_same_names(tmp_path: Path) -> None:
    eager, compiled = tiny(), tiny()
    batches = windows(counting(), 8, 4, 1)
    fit(eager, batches, next_token, plan(steps=10))
    fit(compiled, batches, next_token, plan(steps=10, compile=True), journal=Journal(tmp_path), evaluate=lambda model: {"val_loss": 1.0})
    assert list(compiled.state_dict()) == list(eager.state_dict())
    for mine, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_compiling_without_a_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"torch.compile needs a C\+\+ compiler, found none of c\+\+, g\+\+, .* set compile to false"):
        fit(tiny(), windows(counting(), 8, 4, 1), next_token, plan(compile=True))


# params


def rung(tree: Any) -> Any:
    return TypeAdapter(RungParams).validate_python(tree)


def test_the_n_gram_needs_no_plan_and_every_neural_rung_does() -> None:
    counted = {"tokens": "letters", "seed": 1, "evaluate_tokens": 0, "model": {"architecture": "ngram", "order": 3}}
    assert isinstance(rung(counted), NgramTrainParams)
    assert isinstance(rung(BIGRAM), TrainParams)
    with pytest.raises(ValidationError, match="steps"):
        rung({key: value for key, value in BIGRAM.items() if key != "steps"})
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        rung(counted | {"steps": 5})
    with pytest.raises(ValidationError, match="valid dictionary"):
        rung("ngram")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"steps": 0}, "greater than 0"),
        ({"learning_rate": -0.1}, "greater than 0"),
        ({"learning_rate": "3e-4"}, "valid number"),
        ({"cooldown_share": 1.5}, "less than or equal to 1"),
        ({"optimizer": "adam"}, "'adamw', 'muon', 'adamw_8bit' or 'paged_adamw_8bit'"),
        ({"warmup_steps": 61}, "61 is more than the 60 steps there are"),
        ({"model": {"architecture": "mini_gtp"}}, "no rung 'mini_gtp'"),
        (
            {"model": {"architecture": "attention", "context": 4, "width": 8, "layers": 1, "heads": 1}},
            "it sees 4 tokens, and context puts 8 into a batch",
        ),
    ],
)
def test_a_plan_that_cannot_work_is_refused_before_any_work(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        rung(BIGRAM | change)


# the stage

COUNTED = {"tokens": "letters", "seed": 1, "evaluate_tokens": 0, "model": {"architecture": "ngram", "order": 3}}
GPT = {**BIGRAM, "optimizer": "muon", "model": {"architecture": "gpt", "context": 8, "width": 8, "layers": 1, "heads": 2, "dropout": 0.1}}
LINES = "The quick brown fox jumps over the lazy dog. "


def tokens_in(root: Path, kind: str = "tokens", vocab_size: int = 0) -> None:
    """A tokens bundle of a few sentences; `vocab_size` is what the shards claim, 0 the truth."""
    words = train_char([LINES])
    with bundle.writing(root / "artifacts/tokens/letters") as folder:
        words.save(folder)
        documents: dict[Split, list[str]] = {"train": [LINES * 20, LINES * 10], "validation": [LINES * 3]}
        facts = write_shards(folder, documents, words.encode_batch, words.eot, vocab_size or words.vocab_size)
        bundle.seal(folder, kind, "tokenize@letters", **facts)


def params(**rungs: Any) -> Params:
    """Params of which only the section `train` is there."""
    return Params.model_construct(train={name: rung(tree) for name, tree in rungs.items()})


@pytest.mark.parametrize("tree", [COUNTED, BIGRAM, GPT], ids=["ngram", "bigram", "gpt"])
def test_the_stage_leaves_a_bundle_that_opens_and_the_numbers_beside_it(tmp_path: Path, tree: dict[str, Any]) -> None:
    tokens_in(tmp_path)
    train.run(params(rung=tree), "rung", tmp_path)
    folder, logs = tmp_path / "artifacts/models/rung", tmp_path / "artifacts/logs/train/rung"

    manifest = bundle.verify(folder, "ngram" if tree is COUNTED else "model")
    tokens = bundle.verify(tmp_path / "artifacts/tokens/letters")
    assert manifest.made_by == "train@rung"
    assert manifest.parents == {"tokens": tokens.digest}
    assert manifest.facts["tokenizer_digest"] == bundle.file_digest(tmp_path / "artifacts/tokens/letters/tokenizer.json")
    assert load(folder).encode("fox") == load(tmp_path / "artifacts/tokens/letters").encode("fox")
    assert Engine.open(folder) is not None
    assert f"`{tree['model']['architecture']}`" in (folder / "README.md").read_text()

    metrics = json.loads((logs / "metrics.json").read_text())
    assert metrics["parameters"] == manifest.facts["parameters"] > 0
    assert metrics["val_bpb"] == pytest.approx(metrics["val_loss"] / math.log(2) * (45 * 3) / (45 * 3 - 1))
    assert metrics["size_mb"] > 0
    assert metrics["tokens_seen"] == (45 * 30 + 2 if tree is COUNTED else 60 * 4 * 8)
    assert (logs / "sample.txt").read_text().startswith("The quick brown")
    with (logs / "curve.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == (["0"] if tree is COUNTED else ["20", "25", "40", "50", "60"])
    assert not list((tmp_path / "runs").glob("*"))


def test_two_runs_of_the_stage_make_the_same_bundle_to_the_last_bit(tmp_path: Path) -> None:
    digests = []
    for place in ("one", "two"):
        tokens_in(tmp_path / place)
        train.run(params(rung=GPT), "rung", tmp_path / place)
        digests.append(bundle.verify(tmp_path / place / "artifacts/models/rung").digest)
    assert digests[0] == digests[1]


def test_a_stage_that_died_goes_on_to_the_same_bundle_curve_sample_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(*arguments: Any) -> Any:
        at = windows(*arguments)

        def or_die(step: int) -> Batch:
            if step == 47:
                raise KeyboardInterrupt
            return at(step)

        return or_die

    outcomes = []
    for place, dies in (("straight", False), ("stopped", True)):
        root = tmp_path / place
        tokens_in(root)
        if dies:
            with monkeypatch.context() as patched:
                patched.setattr(train, "windows", dying)
                with pytest.raises(KeyboardInterrupt):
                    train.run(params(rung=GPT), "rung", root)
            assert not (root / "artifacts/models/rung").exists()
        train.run(params(rung=GPT), "rung", root)
        logs = root / "artifacts/logs/train/rung"
        metrics = json.loads((logs / "metrics.json").read_text())
        assert metrics.pop("resumed_at") == (40 if dies else 0)
        del metrics["seconds"], metrics["tok_per_s"]
        files = [(logs / name).read_bytes() for name in ("curve.csv", "sample.txt")]
        outcomes.append((bundle.verify(root / "artifacts/models/rung").digest, metrics, files))
        assert not list((root / "runs").glob("*"))
    assert outcomes[0] == outcomes[1]


def test_the_stage_refuses_what_it_cannot_train_on(tmp_path: Path) -> None:
    with pytest.raises(bundle.BundleError, match=r"no finished bundle in .*artifacts/tokens/letters; dvc repro builds it"):
        train.run(params(rung=BIGRAM), "rung", tmp_path)

    tokens_in(tmp_path, kind="corpus")
    with pytest.raises(bundle.BundleError, match=r"found a bundle of kind 'corpus', wanted tokens; .* tokenize@letters"):
        train.run(params(rung=BIGRAM), "rung", tmp_path)

    tokens_in(tmp_path, vocab_size=1000)
    with pytest.raises(ValueError, match=r"the shards have 1000 tokens, the tokenizer \d+; rebuild it with: .* tokenize@letters"):
        train.run(params(rung=BIGRAM), "rung", tmp_path)

    tokens_in(tmp_path)
    with pytest.raises(ValueError, match=r"1352 training tokens are fewer than one window of context \+ 1 = 2001; lower context"):
        train.run(params(rung=BIGRAM | {"context": 2000}), "rung", tmp_path)
    with pytest.raises(ValueError, match=r"has no lessons; set tokenize.letters.lessons to true, or take the rung's section lessons out"):
        train.run(params(rung=BIGRAM | {"lessons": {"first": 1, "share": 0.5, "batch": 2}}), "rung", tmp_path)
    assert not (tmp_path / "artifacts/models").exists()
