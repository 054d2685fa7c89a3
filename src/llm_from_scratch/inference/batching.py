"""Continuous batching: a step reads a token of every request that is being written, and requests join and leave between steps (Yu et al.
2022, Orca).

There is no thread of its own. Callers iterate, each in its thread; whoever finds nothing drawn for it does the next step for everybody
(where steps are short, the next few: see BURST), and the others wait for it. So nothing runs when nobody asks, and a caller that went away
can not hold anybody up.

A step has two parts. One request that has more than one token to read (its prompt, or its newest half once it outgrew its slot) reads a
chunk, alone, so a long prompt delays the others by a chunk at a time. Then all that have one token to read read it in one forward, each
row at its own position.

What a request gets depends on its prompt, its settings and its own generator, never on what others ask. The logits, though, are sums that
a matrix product may add up in another order when it has more rows: their last bits may differ, and with them, once in many thousand
tokens, a choice between two that are equally likely to six digits. `same_bits` rules that out: every step then has all slots as rows,
filled or not, so each product has the same shape and each row the same bits whoever is beside it; a lone request pays for it. (It holds
for one machine and number of threads. LLM.int8() is the exception: bitsandbytes looks for outliers in all rows together.)

Memory is taken at the start: `slots` times `capacity` tokens. A text longer than its slot goes on from its newest half.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic

import numpy as np
import torch
from torch import Tensor, nn

from llm_from_scratch.inference.decoding import choosing, context_of, evaluating
from llm_from_scratch.inference.draft import Draft
from llm_from_scratch.inference.forward import forward_of
from llm_from_scratch.inference.kv_cache import SlotCache
from llm_from_scratch.inference.lookup import Lookup
from llm_from_scratch.inference.sampling import Sampling, TokenLogprob, likeliest, log_probability, pick

Drawn = tuple[int, TokenLogprob | None]
CLOSED = "the engine was closed; open it again"
BURST = 0.005
"""Seconds for which steps may begin before callers are woken: a small model's is shorter than it takes to wake sixteen threads."""


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Up to `slots` requests at once; prompts are read `prefill_chunk` tokens at a time.

    `capacity` is how many tokens a slot holds (None: the model's context). `same_bits`: see the module. In steps with a single request,
    `lookup` guesses up to so many tokens from the text itself (see `lookup`; 0: never), and where it has no guess, `draft` up to so many
    with an 8-bit copy of the model (see `draft`; 0: never). Raises ValueError.
    """

    slots: int
    prefill_chunk: int
    capacity: int | None = None
    same_bits: bool = False
    lookup: int = 0
    draft: int = 0

    def __post_init__(self) -> None:
        for name, least in {"slots": 1, "prefill_chunk": 1, "capacity": 2, "lookup": 0, "draft": 0}.items():
            if (found := getattr(self, name)) is not None and found < least:
                raise ValueError(f"batching.{name}: found {found}, wanted at least {least}")
        for name in ("lookup", "draft"):
            if (tokens := getattr(self, name)) and self.same_bits:
                raise ValueError(f"batching: {name} of {tokens} reads several tokens when a request is alone; same_bits rules that out")


@dataclass(frozen=True)
class Stats:
    """Requests that have a slot and that wait for one; tokens that the slots hold, and could hold; tokens generated since the start."""

    running: int
    waiting: int
    cache_tokens_used: int
    cache_tokens_capacity: int
    generated_tokens: int


class Request:
    """A text in the making: `ids`, of which those before `start` are forgotten. `drawn` waits for the caller."""

    def __init__(self, ids: Sequence[int], sampling: Sampling, ends: Collection[int], scored: bool) -> None:
        self.ids, self.prompt = list(ids), len(ids)
        self.sampling, self.ends, self.scored = sampling, ends, scored
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.lookup = Lookup()
        self.start = 0
        self.drawn: deque[Drawn] = deque()
        self.over = False
        self.error: Exception | None = None

    def take(self, logits: Tensor, best: int | None = None) -> int | None:
        """The next token, from logits (V,) or already found; None where the text is over."""
        sampling = self.sampling
        token = pick(logits, sampling, self.generator, self.ids, self.prompt) if best is None else best
        if token in self.ends:
            self.over = True
            return None
        self.ids.append(token)
        if len(self.ids) - self.prompt == sampling.max_tokens:
            self.over = True  # never set to False: its caller may have left meanwhile
        self.drawn.append((token, None if sampling.logprobs is None else log_probability(logits, token, sampling.logprobs)))
        return token

    def score(self, logits: Tensor, first: int) -> None:
        """Scores the tokens after place `first`, from the logits (T, V) there and at the places behind it."""
        assert self.sampling.logprobs is not None
        for row, token in zip(logits, self.ids[first + 1 :], strict=False):
            self.drawn.append((token, log_probability(row, token, self.sampling.logprobs)))
        if first + len(logits) >= len(self.ids):
            self.over = True


class Batcher:
    """Writes for any number of threads with one model, a gpt or llama."""

    def __init__(self, model: nn.Module, batching: Batching) -> None:
        self.model, self.batching = model, batching
        self.limit = min(context_of(model), batching.capacity or context_of(model))
        self._cache = SlotCache(model, batching.slots, self.limit)
        self._forward = forward_of(model)
        self._draft = Draft(model, self._cache) if batching.draft else None
        self._threads = torch.get_num_threads()
        self._slots: list[Request | None] = [None] * batching.slots
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._stepping = False
        self._closed = False
        self._generated = 0

    def tokens(self, ids: Sequence[int], sampling: Sampling, ends: Collection[int]) -> Generator[Drawn]:
        """Each new token after `ids`, one at least, with its log probability where asked for. Closing the iterator frees the slot.

        Raises what went wrong in the step that this request was part of, and RuntimeError once the batcher is closed.
        """
        return self._follow(Request(ids, sampling, ends, scored=False))

    def scores(self, ids: Sequence[int], top: int) -> list[TokenLogprob]:
        """The log probabilities of all tokens but the first. Raises as `tokens` does."""
        request = Request(ids, Sampling(temperature=0, max_tokens=1, logprobs=top), (), scored=True)
        return [scored for _, scored in self._follow(request) if scored is not None]

    def stats(self) -> Stats:
        with self._changed:
            running = [slot for slot, request in enumerate(self._slots) if request is not None and not request.over]
            used = sum(self._cache.lengths[slot] for slot in running)
            waiting = sum(not request.over for request in self._waiting)
            return Stats(len(running), waiting, used, self.batching.slots * self.limit, self._generated)

    def close(self) -> None:
        """Ends all requests, those that wait too, with an error."""
        with self._changed:
            self._closed = True
            for request in (*self._slots, *self._waiting):
                if request is not None and not request.over:
                    request.over, request.error = True, RuntimeError(CLOSED)
            self._changed.notify_all()

    def _follow(self, request: Request) -> Generator[Drawn]:
        with self._changed:
            if self._closed:
                raise RuntimeError(CLOSED)
            self._waiting.append(request)
        try:
            while self._await(request):
                yield request.drawn.popleft()
            if request.error is not None:
                raise request.error
        finally:
            with self._changed:
                request.over = True
                if not self._stepping:
                    self._seat()

    def _await(self, request: Request) -> bool:
        """Whether there is a token for `request`, once that is known: by waiting for the step of another caller, or doing one."""
        while not request.drawn and not request.over:
            with self._changed:
                if self._stepping:
                    self._changed.wait()
                    continue
                self._stepping = True
            try:
                self._steps()
            finally:
                with self._changed:
                    self._stepping = False
                    self._seat()
                    self._changed.notify_all()
        return bool(request.drawn)

    def _seat(self) -> None:
        """Frees the slots of those that are done, moves the others to the front, and gives free slots to those that waited longest."""
        for slot, request in enumerate(self._slots):
            if request is not None and request.over:
                self._slots[slot], self._cache.lengths[slot] = None, 0
        for slot, request in enumerate(self._slots):
            if request is None:
                last = max((place for place, other in enumerate(self._slots) if other is not None), default=0)
                if last > slot:
                    self._cache.move(last, slot)
                    self._slots[slot], self._slots[last] = self._slots[last], None
        self._waiting = deque(request for request in self._waiting if not request.over)
        for slot, request in enumerate(self._slots):
            if request is None and self._waiting:
                self._slots[slot] = self._waiting.popleft()

    def _steps(self) -> None:
        """One; where several callers wait, as many as begin within BURST. With all the threads that there were at the start.

        (torch gives a thread as many as the process has when it begins. While another one chooses tokens that is one, and it stays so.)
        """
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        end = monotonic() + BURST
        self._step()
        while monotonic() < end and sum(request is not None and not request.over for request in self._slots) > 1:
            self._step()

    @torch.inference_mode()
    def _step(self) -> None:
        with self._changed:
            self._seat()
        with evaluating(self.model):
            seated = [(slot, request) for slot, request in enumerate(self._slots) if request is not None]
            for slot, request in seated:
                self._make_room(slot, request)
            ready = [pair for pair in seated if not pair[1].scored and self._unread(*pair) == 1]
            several = next((pair for pair in seated if pair not in ready), None)
            if several is not None:
                self._guarded([several[1]], partial(self._read_chunk, *several))
            if len(ready) == 1 and (self.batching.lookup or self._draft is not None):
                self._guarded([ready[0][1]], partial(self._look_ahead, *ready[0]))
            elif ready:
                self._guarded([request for _, request in ready], partial(self._read_one_each, ready))

    def _guarded(self, requests: Sequence[Request], work: Callable[[], object]) -> None:
        """Does `work`; what goes wrong is for those `requests` alone to raise."""
        try:
            work()
        except BaseException as error:
            for request in requests:
                request.error = error if isinstance(error, Exception) else RuntimeError(f"the step was broken off by {error!r}")
                request.over = True
            if not isinstance(error, Exception):
                raise

    def _unread(self, slot: int, request: Request) -> int:
        return len(request.ids) - request.start - self._cache.lengths[slot]

    def _make_room(self, slot: int, request: Request) -> None:
        if len(request.ids) - request.start > self.limit:
            request.start = len(request.ids) - max(1, self.limit // 2)
            self._cache.lengths[slot] = 0

    def _run(self, ids: list[list[int]], first: int, reading: Collection[int], every: bool) -> Tensor:
        """Logits (B, T, V), or of the last place only, of ids (B, T) in the slots from `first` on."""
        rows = self._cache.rows(first, len(ids), len(ids[0]), reading)
        return self._forward(torch.from_numpy(np.array(ids)).to(self._cache.device), rows, every)

    def _read_chunk(self, slot: int, request: Request) -> None:
        begin = request.start + self._cache.lengths[slot]
        chunk = request.ids[begin : begin + self.batching.prefill_chunk]
        logits = self._run([chunk], slot, [slot], request.scored)[0]
        if request.scored:
            request.score(logits, begin)
        elif not self._unread(slot, request):
            with choosing(logits[-1]):
                self._take(request, logits[-1])

    def _read_one_each(self, ready: Sequence[tuple[int, Request]]) -> None:
        slots = [slot for slot, _ in ready]
        first, behind = (0, self.batching.slots) if self.batching.same_bits else (slots[0], slots[-1] + 1)
        tokens = [[0] for _ in range(first, behind)]
        for slot, request in ready:
            tokens[slot - first] = [request.ids[-1]]
        logits = self._run(tokens, first, slots, every=False).squeeze(1)
        with choosing(logits):
            best = likeliest(logits) if any(request.sampling.plain for _, request in ready) else []
            rows = logits.unbind()
            for slot, request in ready:
                found = best[slot - first] if request.sampling.plain else None
                self._guarded([request], partial(self._take, request, rows[slot - first], found))

    def _look_ahead(self, slot: int, request: Request) -> None:
        """Reads the newest token and a guess of those behind it, and takes tokens as long as they are as guessed."""
        guess = self._guess(slot, request)
        logits = self._run([[request.ids[-1], *guess]], slot, [slot], every=True)[0]
        with choosing(logits):
            best = likeliest(logits) if request.sampling.plain else [None] * len(logits)
            for row, found, expected in zip(logits, best, [*guess, None], strict=True):
                if self._take(request, row, found) != expected or request.over:
                    break
        self._cache.lengths[slot] = len(request.ids) - request.start - 1

    def _guess(self, slot: int, request: Request) -> list[int]:
        sampling, length = request.sampling, self._cache.lengths[slot]
        room = min(self.limit - length, sampling.max_tokens - (len(request.ids) - request.prompt)) - 1
        found = request.lookup.guess(request.ids, min(self.batching.lookup, room)) if self.batching.lookup else []
        if found or self._draft is None:
            return found
        ends, most = request.ends, min(self.batching.draft, room)
        return self._draft.guess(slot, request.ids, request.prompt, sampling, request.generator, ends, most)

    def _take(self, request: Request, logits: Tensor, best: int | None = None) -> int | None:
        token = request.take(logits, best)
        self._generated += token is not None
        return token
