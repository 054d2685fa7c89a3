"""SIGKILL, which no code sees coming: to a stage, as the kernel does when memory is short, and to all, as a machine does that goes down."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time

from drills.ground import Clone, Ground, Outcome, kill_below, line_with, lines, repro, shown

STAGES = {
    "download@shakespeare": "raw/shakespeare",
    "tokenize@shakespeare_bpe": "tokens/shakespeare_bpe",
    "train@base": "models/base",
    "quantize@base_int8": "models/base_int8",
    "finetune@sft": "models/sft",
    "index": "index",
}
"""A node of each stage that makes a bundle, and where; evaluate makes pages."""
CHAIN = {"tokenize@shakespeare_char": "tokens/shakespeare_char", "train@gpt": "models/gpt", "train@bigram": "models/bigram"}
PAGES = ("reports/metrics.json", "reports/verdict.json", "reports/report.md")
KILLS = 3


def in_stage(ground: Ground, node: str, draw: random.Random) -> Outcome:
    """The process of one node is killed in its middle; DVC lives and says so."""
    with ground.copy() as clone:
        clone.stale(node)
        said = lines(killed(clone, node, ground.seconds.get(node, 10.0), draw))
        clone.must(*repro(node))
        line = line_with(said, "ERROR")
        if node in STAGES:
            return ground.outcome(clone, line, repro(node), STAGES[node])
        same = sum((clone.root / page).read_bytes() == (ground.whole.root / page).read_bytes() for page in PAGES)
        return Outcome(line, shown(repro(node)), same, len(PAGES))


def killed(clone: Clone, node: str, seconds: float, draw: random.Random) -> str:
    """What was said when all processes below DVC were killed, after a part of the time that the node takes; sooner where it was done."""
    for attempt in range(5):
        process = clone.start(*repro(node))
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith(">"):  # DVC's prompt before the stage's command
                break
        time.sleep(draw.uniform(0.3, 0.9) * seconds / 2**attempt)
        kill_below(process)
        said += process.communicate()[0]
        if process.returncode:
            return said
        clone.stale(node)
    raise RuntimeError(f"{node} was always faster than the kill")


def at_random(ground: Ground, draw: random.Random) -> Outcome:
    """Everything, DVC too, is killed at random moments of a chain of nodes; then it may end."""
    with ground.copy() as clone:
        clone.stale(*CHAIN)
        command = repro(*CHAIN)
        kills, whole = [], sum(ground.seconds.get(node, 6.0) for node in CHAIN) + 5
        for _ in range(KILLS):
            process = clone.start(*command)
            try:
                process.communicate(timeout=(moment := draw.uniform(0.2, whole)))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                kills.append(f"{moment:.1f}")
        said = clone.must(*command)
        return ground.outcome(
            clone,
            line_with([*said, "Killed"], "had been killed", "Killed"),
            command,
            *CHAIN.values(),
            remark=f"killed after {', '.join(kills)} s",
        )
