"""Several processes train one model: each takes its rows of every batch, and their gradients become those of the whole.

ddp    every process holds the model, and gradients are averaged during the backward pass
fsdp   every process holds a part of each weight, gradient and moment (FSDP2), and gathers a layer while it computes with it

`fit` is told by a `Parallel`; the one that does nothing, ALONE, is a single process. A batch is a pure function of the step, so every
process makes all of it and nothing is sent; what counts rows and scored targets is known everywhere. The sums of another number of
processes round otherwise, so their losses agree closely and not to the bit. Saves and bundles hold whole tensors, whoever made them.

What it cannot do is train a model that one machine's memory does not hold: it starts from a whole one, and ends in one.

Shapes: B batch, T context.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm_from_scratch.training.memory import UNSCORED
from llm_from_scratch.training.plan import Parallelism
from llm_from_scratch.training.resume import Saved
from llm_from_scratch.training.sharded import is_shared, whole

Part = tuple[Tensor, ...]  # inputs and targets, each (B, T) int64, and what else the loss reads

PATIENCE = timedelta(hours=1)  # how long one process waits for the others before it takes them for dead


@dataclass(frozen=True)
class Place:
    """Which of `world` processes this is, and which of those on its machine; torchrun's RANK, WORLD_SIZE and LOCAL_RANK."""

    rank: int
    world: int
    local: int


ONLY = Place(0, 1, 0)


class Parallel:
    """How a step is shared among processes, in the words of the loop. This one shares with nobody, and costs nothing."""

    rank = 0
    world = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that logs and writes."""
        return self.rank == 0

    def require_equal_shares(self, batch: int) -> None:
        """Raises ValueError where `batch` rows cannot be shared equally."""
        if batch % self.world:
            raise ValueError(f"batch {batch} does not divide among {self.world} processes; set it to a multiple of {self.world}")

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model to train, on `device`: `model` itself, or one that stands for it until `give_back`."""
        return model.to(device)

    def wrap(self, learner: nn.Module) -> nn.Module:
        """What the loss calls, so that a backward pass leaves the same gradients everywhere."""
        return learner

    def give_back(self, trained: nn.Module, model: nn.Module) -> None:
        """Bring what was learned home into `model`."""

    def share(self, part: Part) -> tuple[Part, float]:
        """This process's rows of `part`, and their share of its scored targets."""
        return part, 1.0

    def total(self, value: float) -> float:
        """The sum over all processes."""
        return value

    def wait(self) -> None:
        """Until all processes are here."""

    def accumulating(self, learner: nn.Module) -> AbstractContextManager[None]:
        """Around a backward pass that is not the last of its step: gradients may stay at home until then."""
        return nullcontext()

    def reseed(self, seed: int, step: int) -> None:
        """Randomness of a step: one process goes on with the state that it has, and journals."""

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as one process would have them; only the first process needs the answer, and all must ask."""
        return tensors

    def from_first(self, saved: Saved | None) -> Saved | None:
        """What the first process has, for all of them."""
        return saved


ALONE = Parallel()


class Replicated(Parallel):
    """DDP: the model is everywhere, and gradients are averaged while the backward pass still runs."""

    def __init__(self, place: Place) -> None:
        self.rank, self.world = place.rank, place.world
        self.device = torch.device("cpu")

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        self.device = device
        return model.to(device)

    def wrap(self, learner: nn.Module) -> nn.Module:
        cards = [torch.cuda.current_device()] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(learner, device_ids=cards, forward_sync_buffers=False)

    def share(self, part: Part) -> tuple[Part, float]:
        """Rows in order, as equal in number as they go. Who has nothing to score lends a hand with a row that does not count:
        its share is 0, but a process that stays away from a backward pass leaves the others waiting."""
        targets = part[1]
        scored = (targets != UNSCORED).sum(1)
        start, end = (len(targets) * rank // self.world for rank in (self.rank, self.rank + 1))
        own = int(scored[start:end].sum())
        if not own:
            start = int(scored.argmax())
            end = start + 1
        return tuple(tensor[start:end] for tensor in part), own / max(1, int(scored.sum()))

    def total(self, value: float) -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.item()

    def wait(self) -> None:
        self.total(0.0)

    def accumulating(self, learner: nn.Module) -> AbstractContextManager[None]:
        assert isinstance(learner, nn.parallel.DistributedDataParallel)
        return learner.no_sync()

    def reseed(self, seed: int, step: int) -> None:
        """From the step and the rank, so that dropout differs between processes and a resumed run needs no process's state."""
        torch.manual_seed((seed * 1_000_003 + step) * self.world + self.rank)

    def from_first(self, saved: Saved | None) -> Saved | None:
        """Sent tensor by tensor; the folder of saves need not be on a disk that all machines see."""
        header = [saved and replace(saved, tensors={name: tensor.to("meta") for name, tensor in saved.tensors.items()})]
        dist.broadcast_object_list(header, device=torch.device("cpu"))
        if (told := header[0]) is None:
            return None
        sent = (
            saved.tensors if saved is not None else {name: torch.empty_like(tensor, device="cpu") for name, tensor in told.tensors.items()}
        )
        for tensor in sent.values():
            dist.broadcast(tensor, 0)
        return replace(told, tensors=sent)


class Sharded(Replicated):
    """FSDP2: each process holds a slice of every weight, and layers are gathered one at a time.

    The model it was given stays whole where it is, in the machine's memory, and a copy is sliced: a sliced module cannot be undone.
    """

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.device = device
        mesh = init_device_mesh(device.type, (self.world,))
        sliced = copy.deepcopy(model)
        layers = [layer for stack in sliced.modules() if isinstance(stack, nn.ModuleList) for layer in stack]
        for module in (*layers, sliced):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        return sliced

    def wrap(self, learner: nn.Module) -> nn.Module:
        return learner

    @torch.no_grad()
    def give_back(self, trained: nn.Module, model: nn.Module) -> None:
        tensors = dict([*trained.named_parameters(), *trained.named_buffers()])
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(whole(tensors[name]))
        model.to(self.device)

    def accumulating(self, learner: nn.Module) -> AbstractContextManager[None]:
        """Gradients go out at every backward pass: keeping them at home would take the memory of a whole model."""
        return nullcontext()

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """One at a time, and only the first process keeps them, in its machine's memory."""
        gathered: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            full = whole(tensor)
            if self.first:
                gathered[name] = full.cpu() if is_shared(tensor) else full
        return gathered


@contextmanager
def together(kind: Parallelism, place: Place) -> Iterator[Parallel]:
    """Among the processes that torchrun started: join them, and at the end wait for all. One process needs no others, and is alone.

    Where one raises, it leaves without waiting: its process ends, torchrun sees that and ends the others. Raises ValueError where
    `kind` is for one process and there are more, or where they are more than the machine has cards.
    """
    if place.world == 1:
        yield ALONE
        return
    if kind == "none":
        raise ValueError(f"it is for one process (parallel: none), and torchrun started {place.world}; set parallel to ddp or fsdp")
    cards = torch.cuda.device_count()
    if cards and place.local >= cards:
        raise ValueError(f"process {place.local + 1} of this machine has no card, there are {cards}; lower --nproc-per-node to {cards}")
    if cards:
        torch.cuda.set_device(place.local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cards else "gloo", rank=place.rank, world_size=place.world, timeout=PATIENCE)
    yield Sharded(place) if kind == "fsdp" else Replicated(place)
    dist.all_reduce(torch.zeros(1))  # on the CPU also where cards are: a barrier of NCCL's would take one
    dist.destroy_process_group()
