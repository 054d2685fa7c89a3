"""The comparisons with nanoGPT at toy size; those that need its folder are checked for what they say without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.shakespeare import disjoint_nats

ROOT = Path(__file__).parent.parent


def benchmark(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_the_ablation_compares_every_variant_with_our_recipe(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + int(letter)) for letter in np.random.default_rng(1).integers(9, size=4000)))
    done = benchmark("ablation", "--quick", "--text", str(text), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = {row["variant"]: row for row in json.loads((tmp_path / "ablation.json").read_text())["rows"]}
    assert rows["our recipe"]["against ours"] == 0
    assert len(rows) > 10
    assert all(np.isfinite(row["val loss"]) for row in rows.values())


@pytest.mark.parametrize("name", ["nanogpt", "throughput"])
def test_without_nanogpts_folder_it_is_asked_for(name: str) -> None:
    done = benchmark(name, "--text", "nowhere.txt")
    assert done.returncode == 2
    assert "--nanogpt" in done.stderr.splitlines()[-1]


def test_another_text_than_tinyshakespeare_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("too short")
    done = benchmark("ablation", "--text", str(text))
    assert done.returncode == 1
    assert done.stderr.strip().endswith("text.txt: 9 characters, tinyshakespeare has 1115394; give that file, or --quick")


def test_disjoint_windows_score_each_token_once_with_what_is_before_it_in_its_window() -> None:
    class Place(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            """Surer of token 0 the further on in the window: log-odds of its place."""
            logits = torch.zeros(*ids.shape, 2)
            logits[..., 0] = torch.arange(ids.size(1), dtype=torch.float32)
            return logits

    nats = disjoint_nats(Place(), np.zeros(9, np.uint16), 3)
    assert nats.tolist() == pytest.approx([np.log1p(np.exp(-place)) for place in (0, 1, 2, 0, 1, 2, 0, 1)])
