"""The loop: a batch, a loss, a step, again. Every neural rung and every fine-tuning method is trained by this one `fit`.

What differs comes in as a value: the batches (a function of the step), the loss (a function of model and batch) and the plan.
What a run shows goes out through `log`; what it must not lose goes into a `Journal`. A batch that memory does not hold goes through
the model in parts. Each process drives one device; how several share a step is `parallel`'s to know.

Shapes: B batch, T context, V vocabulary.
"""

from __future__ import annotations

import csv
import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_from_scratch.progress import bar as progress_bar
from llm_from_scratch.training import memory
from llm_from_scratch.training.distributed import ALONE, Parallel
from llm_from_scratch.training.learner import learner
from llm_from_scratch.training.optimizer import Optimizer, build
from llm_from_scratch.training.plan import Plan
from llm_from_scratch.training.precision import Arithmetic, arithmetic
from llm_from_scratch.training.resume import BAD_BATCH, Journal, Saved, capture, restore
from llm_from_scratch.training.schedule import share
from llm_from_scratch.training.sharded import whole

Batch = tuple[Tensor, ...]  # inputs and targets, each (B, T) int64, a target of -100 not scored; what else the loss reads, B rows of it
Batches = Callable[[int], Batch]  # the batch of a step
Loss = Callable[[nn.Module, Batch], Tensor]  # a mean over the scored targets, so that parts add up; one without gradient moves nothing
Log = Callable[[int, Mapping[str, float]], None]
Evaluate = Callable[[nn.Module], Mapping[str, float]]

LOG_EVERY = 20
CURVE = ("step", "train_loss", "val_loss", "val_bpb", "learning_rate")


def quiet(step: int, metrics: Mapping[str, float]) -> None:
    """The default log: a library has nothing to say to a terminal."""


@dataclass(frozen=True)
class Fitted:
    """A finished run. `tokens` and `seconds` are those of all its steps, evaluation not counted, also where it was resumed (at
    step `resumed_at`, else 0); `curve` holds every row that was logged."""

    tokens: int
    seconds: float
    resumed_at: int
    curve: list[dict[str, float]]

    @property
    def tok_per_s(self) -> float:
        return self.tokens / self.seconds

    def metrics(self) -> dict[str, float]:
        """What training took, as a report has it; where it was resumed, the time of all its parts."""
        return {
            "tokens_seen": self.tokens,
            "seconds": round(self.seconds, 3),
            "tok_per_s": round(self.tok_per_s, 1),
            "resumed_at": self.resumed_at,
        }


def fit(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    plan: Plan,
    log: Log = quiet,
    journal: Journal | None = None,
    evaluate: Evaluate | None = None,
    device: str = "cpu",
    progress: bool = False,
    parallel: Parallel = ALONE,
) -> Fitted:
    """Train `model` in place for `plan.steps` steps and leave it in evaluation mode, going on from the journal's last save if it has one.

    On a CPU a run that was killed and resumed ends in the same bits as one that was not. `progress` shows on stderr where it
    stands. Raises ValueError when the loss or the gradient is no longer finite (the weights are then those before that step, and the
    batch lies beside the journal's saves), when memory does not hold even one row, or where the processes cannot have equal shares.
    """
    parallel.require_equal_shares(plan.batch)
    trained = parallel.place(model, torch.device(device))
    with _own_randomness(plan.seed, torch.device(device)), arithmetic(plan.precision, torch.device(device)) as numbers:
        taught, optimizer = parallel.wrap(learner(trained, plan)), build(trained, plan)
        heard = log if parallel.first else quiet
        run = _Run(trained, taught, loss, plan, optimizer, numbers, torch.device(device), heard, journal, parallel)
        resumed_at = run.resume()
        trained.train()
        steps = range(resumed_at, plan.steps)
        try:
            with progress_bar(steps, desc="train", total=plan.steps, initial=resumed_at, disable=not (progress and parallel.first)) as bar:
                for step in bar:
                    run.advance(batches(step))
                    if run.reports_now():
                        bar.set_postfix(loss=f"{run.report(evaluate)['train_loss']:.3f}", refresh=False)
                    if run.saves_now():
                        run.save()
        finally:
            if journal is not None:
                journal.settle()
    parallel.give_back(trained, model)
    model.eval()
    return Fitted(run.state.tokens, run.state.seconds, resumed_at, run.state.curve)


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a language model: mean nats per scored target."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten(), ignore_index=memory.UNSCORED)


def write_curve(path: Path, curve: Sequence[Mapping[str, float]], more: Sequence[str] = ()) -> None:
    """The curve as CSV, a row a log point, empty where nothing was measured; `more` names columns beside those that every run has."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, [*CURVE, *more], extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(curve)


@dataclass
class _State:
    """Where a run stands, beside its tensors: totals, the curve, and what was measured since its last row.

    `micro_batch` is the plan's until memory has run out, and then as much as it held.
    """

    micro_batch: int
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    reported_tokens: int = 0
    reported_seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass
class _Run:
    """The parts of one `fit`, and its state between steps. `learner` is what the loss calls in place of `model`.

    With several processes each has a run, and all are in the same state; only the first writes.
    """

    model: nn.Module
    learner: nn.Module
    loss: Loss
    plan: Plan
    optimizer: Optimizer
    numbers: Arithmetic
    device: torch.device
    log: Log
    journal: Journal | None
    parallel: Parallel
    state: _State = field(init=False)

    def __post_init__(self) -> None:
        self.state = _State(self.plan.micro_batch)

    def resume(self) -> int:
        """Go back to the journal's last save; the step it was made after, 0 without one. The log, a new one, hears the curve again."""
        saved = self.parallel.from_first(self.journal.latest() if self.journal is not None and self.parallel.first else None)
        if saved is not None:
            restore(saved.tensors, self.model, self.optimizer)
            self.numbers.scaler.load_state_dict(saved.facts["scaler"])
            self.state = _State(**saved.facts["state"])
            for row in self.state.curve:
                self.log(int(row["step"]), {name: value for name, value in row.items() if name != "step"})
        return self.state.step

    def save(self) -> None:
        if self.journal is not None:
            facts = {"state": asdict(self.state), "scaler": self.numbers.scaler.state_dict()}
            tensors = self.parallel.whole(capture(self.model, self.optimizer))
            if self.parallel.first:
                self.journal.save(Saved(self.state.step, tensors, facts))

    def advance(self, batch: Batch) -> None:
        """One optimizer step, timed."""
        started = perf_counter()
        self.optimizer.scale(share(self.state.step, self.plan))
        self.parallel.reseed(self.plan.seed, self.state.step)
        value = self.accumulate(batch)
        norm = self.clip(batch)
        scaler = self.numbers.scaler
        scaler.step(cast(torch.optim.Optimizer, self.optimizer))  # it wants step() and param_groups, which ours has
        scaler.update()
        self.optimizer.zero_grad()
        self.state.step += 1
        self.state.losses.append(value)
        self.state.norms.append(norm)
        self.state.tokens += batch[0].numel()
        self.state.seconds += perf_counter() - started

    def accumulate(self, batch: Batch) -> float:
        """Add the gradients of `batch` to those there are, in smaller parts where memory runs out; its loss."""
        while True:
            try:
                *early, last = memory.parts(batch, self.state.micro_batch * self.parallel.world)
                with self.parallel.accumulating(self.learner):
                    value = sum(self.backward(part, weight) for part, weight in early)
                return value + self.backward(*last)
            except (RuntimeError, MemoryError) as error:
                if not memory.ran_out(error):
                    raise
                complaint = str(error).split("\n")[0]
            self.back_off(len(batch[0]), complaint)  # here the error is gone, and with it the tensors that its frames held

    def backward(self, part: Batch, weight: float) -> float:
        """Add the gradients of `weight` · the loss of `part`; that much loss. The mean of all processes' gradients is the part's."""
        rows, own = self.parallel.share(part)
        with self.numbers.autocast():
            loss = self.loss(self.learner, tuple(tensor.to(self.device, non_blocking=True) for tensor in rows))
        value = self.parallel.total(loss.item() * own)
        self.require_finite("loss", value, part)
        factor = weight * own * self.parallel.world
        if loss.requires_grad:
            self.numbers.scaler.scale(loss if factor == 1 else loss * factor).backward()  # type: ignore[no-untyped-call]
        return value * weight

    def back_off(self, batch: int, complaint: str) -> None:
        """From this step on, half as many rows at once; the step begins again. Raises ValueError where there is nothing to halve."""
        self.optimizer.zero_grad()
        memory.release(self.device)
        step, rows = self.state.step + 1, min(self.state.micro_batch or batch, batch)
        if self.parallel.world > 1:
            raise ValueError(f"step {step}: out of memory on process {self.parallel.rank} ({complaint}); set micro_batch, or set it lower")
        if rows == 1:
            raise ValueError(
                f"step {step}: memory does not hold even one row of the batch ({complaint}); "
                f"lower context ({self.plan.context}), take a smaller model, or set checkpointing to true"
            )
        self.state.micro_batch = rows // 2
        warnings.warn(f"step {step}: out of memory with {rows} rows at once; going on with {rows // 2}", stacklevel=2)

    def clip(self, batch: Batch) -> float:
        """Shorten the gradient to `plan.clip`; its norm before. One that overflowed in fp16 passes: the scaler skips its step."""
        scaler = self.numbers.scaler
        scaler.unscale_(cast(torch.optim.Optimizer, self.optimizer))
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        norm = whole(nn.utils.clip_grad_norm_(weights, self.plan.clip)).item()
        if not scaler.is_enabled():
            self.require_finite("gradient norm", norm, batch)
        return norm

    def require_finite(self, what: str, value: float, batch: Batch) -> None:
        """Raise ValueError where `value` is not finite, after keeping the state before the step, and the batch that did it."""
        if math.isfinite(value):
            return
        self.optimizer.zero_grad()
        self.save()
        found = f"the {what} of batch {_digest(batch)} ({len(batch[0])} rows) is {value}"
        kept = ""
        if self.journal is not None:
            if self.parallel.first:
                self.journal.keep_batch(*batch[:2])
                self.journal.settle()
            self.parallel.wait()  # for what is written: the first process to end will end them all
            kept = f"; the state before it is in {self.journal.folder}, the rows are in {BAD_BATCH} there"
        raise ValueError(
            f"step {self.state.step + 1}: {found}, wanted a finite number{kept}; "
            f"lower learning_rate ({self.plan.learning_rate}) or embedding_learning_rate ({self.plan.embedding_learning_rate})"
        )

    def reports_now(self) -> bool:
        return self.state.step % LOG_EVERY == 0 or self.evaluates_now()

    def evaluates_now(self) -> bool:
        return self.state.step % self.plan.evaluate_every == 0 or self.state.step == self.plan.steps

    def saves_now(self) -> bool:
        return self.state.step % self.plan.checkpoint_every == 0 or self.state.step == self.plan.steps

    def report(self, evaluate: Evaluate | None) -> dict[str, float]:
        """One row of the curve: means since the row before, and what `evaluate` finds when it is due. Infinities are left out."""
        state = self.state
        row = {
            "train_loss": fmean(state.losses),
            "grad_norm": fmean(state.norms),
            "learning_rate": self.plan.learning_rate * share(state.step - 1, self.plan),
            "tok_per_s": (state.tokens - state.reported_tokens) / (state.seconds - state.reported_seconds),
        }
        if state.micro_batch:
            row["micro_batch"] = state.micro_batch
        if evaluate is not None and self.evaluates_now():
            row |= self.look(evaluate)
        row = {name: float(value) for name, value in row.items() if math.isfinite(value)}
        self.log(state.step, row)
        state.curve.append({"step": state.step, **row})
        state.losses, state.norms = [], []
        state.reported_tokens, state.reported_seconds = state.tokens, state.seconds
        return row

    def look(self, evaluate: Evaluate) -> Mapping[str, float]:
        self.model.eval()
        with torch.no_grad():
            found = evaluate(self.model)
        self.model.train()
        return found


def _digest(batch: Batch) -> str:
    """A name for a batch: the first digits of the sha256 of its input tokens."""
    return hashlib.sha256(batch[0].numpy(force=True).tobytes()).hexdigest()[:12]


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """torch's generators seeded for a run, and given back to the caller as they were."""
    cards = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cards):
        torch.manual_seed(seed)
        yield
