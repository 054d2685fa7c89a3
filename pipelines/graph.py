"""In which order the nodes of the graph run, and which of them side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Set
from graphlib import TopologicalSorter
from typing import Any, Protocol, TypeVar

from pipelines.gpu import uses_gpu

EDGE = re.compile(r'"(?P<one>[^"]+)"(?:\s*->\s*"(?P<other>[^"]+)")?')

Graph = Mapping[str, Set[str]]
"""Each node, with the nodes that it stands on."""


class Future(Protocol):
    def result(self) -> Any: ...


F = TypeVar("F", bound=Future)


def parse(dot: str) -> Graph:
    """The graph that `dvc dag --dot` prints."""
    graph: dict[str, set[str]] = {}
    for edge in EDGE.finditer(dot):
        graph.setdefault(edge["one"], set())
        if edge["other"]:
            graph.setdefault(edge["other"], set()).add(edge["one"])
    return graph


def touched(graph: Graph, changed: Iterable[str]) -> set[str]:
    """The nodes `changed`, and all that stand on them."""
    found = set(changed)
    for node in TopologicalSorter(graph).static_order():
        if graph[node] & found:
            found.add(node)
    return found


def walk(graph: Graph, start: Callable[[str], F], first: Callable[[Set[F]], F], beside: int) -> None:
    """`start` each node once all that it stands on has ended well; `first` waits for one of several.

    With `beside` 0 they run one at a time. Otherwise a node that uses the card starts as soon as it can, to wait for the card by itself,
    and `beside` others run at a time next to it. After one that fails none is started; those under way come to their end, and its error is
    raised.
    """
    sorter = TopologicalSorter(graph)
    sorter.prepare()
    ready: list[str] = []
    running: dict[F, str] = {}
    while sorter.is_active():
        ready += sorter.get_ready()
        for node in ready.copy():
            if _may_start(node, running.values(), beside):
                ready.remove(node)
                running[start(node)] = node
        ended = first(running.keys())
        node = running.pop(ended)
        try:
            ended.result()
        except Exception:
            while running:
                running.pop(first(running.keys()))
            raise
        sorter.done(node)


def _may_start(node: str, running: Iterable[str], beside: int) -> bool:
    if not beside:
        return not list(running)
    return uses_gpu(node) or sum(not uses_gpu(other) for other in running) < beside
