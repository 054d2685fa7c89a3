"""What is counted while answering, for Prometheus: time to the first token and between tokens, the line, the cache, tokens, refusals.

`Meter` counts nothing, for an app that nobody scrapes. BentoML serves what `PrometheusMeter` counts at its own /metrics. Before BentoML has
set up how its processes share their numbers, prometheus_client must not be imported, so it is when the meter is made.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from llm_from_scratch.inference.batching import Stats

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Meter:
    """Told of everything, and quiet about it."""

    def first_token(self, seconds: float) -> None:
        """From a request's arrival to the first token of an answer to it."""

    def next_tokens(self, seconds: float, tokens: int) -> None:
        """Since the answer's last tokens. Under load several come at once: each then counts, with the mean time between them."""

    def answered(self, prompt_tokens: int, completion_tokens: int) -> None:
        """A request whose answers are complete."""

    def refused(self, code: str) -> None:
        """A request, or the rest of its answer, that ended in an error."""

    def load(self, of: object, waiting: int, stats: Stats) -> None:
        """How many answers stand in line, and what the engine has on its hands: `of` one of the models that answer, as a rule the only."""


class PrometheusMeter(Meter):
    """Counts into prometheus_client's registry; one a process."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self._first = Histogram("llm_time_to_first_token_seconds", "From arrival to the first token", buckets=FIRST)
        self._between = Histogram("llm_inter_token_latency_seconds", "Between the tokens of an answer", buckets=BETWEEN)
        self._requests = Counter("llm_requests", "Requests by how they ended", ["code"])
        self._tokens = Counter("llm_tokens", "Tokens read and written", ["kind"])
        self._waiting = Gauge("llm_queue_length", "Answers that stand in line", multiprocess_mode="livesum")
        self._running = Gauge("llm_running", "Answers that the engine is making", multiprocess_mode="livesum")
        self._cache = Gauge("llm_cache_tokens", "Places in the cache", ["state"], multiprocess_mode="livesum")
        self._loads: WeakKeyDictionary[object, tuple[int, Stats]] = WeakKeyDictionary()  # of a model that is gone nothing is left
        self._turn = threading.Lock()

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def next_tokens(self, seconds: float, tokens: int) -> None:
        for _ in range(tokens):
            self._between.observe(seconds / tokens)

    def answered(self, prompt_tokens: int, completion_tokens: int) -> None:
        self._requests.labels("ok").inc()
        self._tokens.labels("prompt").inc(prompt_tokens)
        self._tokens.labels("completion").inc(completion_tokens)

    def refused(self, code: str) -> None:
        self._requests.labels(code).inc()

    def load(self, of: object, waiting: int, stats: Stats) -> None:
        with self._turn:
            self._loads[of] = (waiting, stats)
            loads = list(self._loads.values())
        self._waiting.set(sum(waiting for waiting, _ in loads))
        self._running.set(sum(stats.running for _, stats in loads))
        self._cache.labels("used").set(sum(stats.cache_tokens_used for _, stats in loads))
        self._cache.labels("capacity").set(sum(stats.cache_tokens_capacity for _, stats in loads))
