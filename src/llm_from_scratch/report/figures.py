"""The pictures of a run, as PNG files. Equal numbers give equal bytes, so git shows a change only where something changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Curve = Sequence[Mapping[str, float]]
INK, ACCENT, QUIET = "#1f2933", "#2563eb", "#9aa5b1"
SHADES = ("#dbeafe", "#fde68a", "#d1fae5", "#fbcfe8")
COLUMNS, TITLE_COLUMNS = 150, 20  # of letters, in a line of the encoding table
DRAWN = 0x0530  # matplotlib's font has the scripts below this code point


def ladder(folder: Path, bits: Mapping[str, float], honest: str) -> Path:
    """Bits per byte of each rung, lower is better; the rung named `honest` (the n-gram) is drawn as a line that the others must pass."""
    figure, axes = _axes(8, 0.55 * len(bits) + 1.2)
    names = list(bits)[::-1]
    bars = axes.barh(names, [bits[name] for name in names], color=[QUIET if name == honest else ACCENT for name in names])
    axes.bar_label(bars, fmt="%.3f", padding=4, color=INK)
    if honest in bits:
        axes.axvline(bits[honest], color=QUIET, linestyle="--", linewidth=1)
    axes.set_xlabel("bits per byte on held-out text (lower is better)")
    axes.set_xlim(0, 1.12 * max(bits.values()))
    return _save(figure, folder / "ladder.png")


def loss_curves(folder: Path, curves: Mapping[str, Curve], name: str = "loss_curves") -> Path:
    """Held-out bits per byte while each model trained, by share of its steps."""
    figure, axes = _axes(8, 4.5)
    for rung, curve in curves.items():
        points = [(row["step"], row["val_bpb"]) for row in curve if _known(row.get("val_bpb"))]
        if points:
            steps, bits = np.array(points).T
            axes.plot(steps / max(1.0, steps.max()), bits, label=rung, linewidth=1.6)
    axes.set_xlabel("share of training done")
    axes.set_ylabel("held-out bits per byte")
    axes.legend(frameon=False, ncols=2)
    return _save(figure, folder / f"{name}.png")


def heatmaps(folder: Path, name: str, maps: np.ndarray, tokens: Sequence[str], most: int = 4) -> Path:
    """Attention of the last layer's first heads: maps (layers, heads, T, T), a row a query, a column what it looks at."""
    heads = min(most, maps.shape[1])
    figure, grid = _grid(heads, len(tokens))
    labels = [token.replace("\n", "⏎").replace(" ", "·") or "∅" for token in tokens]
    for head, axes in enumerate(grid):
        axes.imshow(maps[-1, head], cmap="Blues", vmin=0, vmax=max(0.01, float(maps[-1, head].max())))
        axes.set_title(f"layer {maps.shape[0]}, head {head + 1}", fontsize=9)
        axes.set_xticks(range(len(labels)), labels, fontsize=6, rotation=90)
        axes.set_yticks(range(len(labels)), labels, fontsize=6)
    return _save(figure, folder / f"heatmap_{name}.png")


def encodings(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = "encodings") -> Path:
    """Texts of different kinds cut into their tokens, a box each: `rows` have title, bytes, and tokens with piece and id."""
    figure, axes = _axes(11, 0.45 * len(rows) + 0.3)
    for line, row in enumerate(rows):
        pieces = [_drawable(token["piece"]) for token in row["tokens"]]
        axes.text(0, -line, f"{row['title']}\n{row['bytes']} bytes, {len(pieces)} tokens", fontsize=7, va="center", color=INK)
        column = float(TITLE_COLUMNS)
        for place, piece in enumerate(pieces):
            if column + len(piece) > COLUMNS:
                axes.text(column, -line, "…", fontsize=8, va="center", color=QUIET)
                break
            box = {"boxstyle": "round,pad=0.2", "facecolor": SHADES[place % len(SHADES)], "edgecolor": "none"}
            axes.text(column, -line, piece, fontsize=7, va="center", family="monospace", color=INK, bbox=box)
            column += len(piece) + 1.2
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(-len(rows) + 0.4, 0.6)
    axes.set_axis_off()
    return _save(figure, folder / f"{name}.png")


def quantization(folder: Path, entries: Mapping[str, Mapping[str, float]]) -> Path:
    """Size against loss: where each quantized bundle and its original stand."""
    figure, axes = _axes(7, 4.2)
    for name, row in entries.items():
        axes.plot([row["size_mb_fp32"], row["size_mb"]], [row["val_bpb_fp32"], row["val_bpb"]], color=QUIET, linewidth=1)
        axes.scatter([row["size_mb_fp32"]], [row["val_bpb_fp32"]], color=QUIET, s=30)
        axes.scatter([row["size_mb"]], [row["val_bpb"]], color=ACCENT, s=50)
        axes.annotate(name, (row["size_mb"], row["val_bpb"]), textcoords="offset points", xytext=(6, 6), fontsize=9)
    axes.set_xlabel("size on disk, MB (grey: before)")
    axes.set_ylabel("held-out bits per byte")
    return _save(figure, folder / "quantization.png")


def question_answering(folder: Path, conditions: Mapping[str, Mapping[str, Any]], chance: float) -> Path:
    """Accuracy with no, a random, the retrieved and the right passage, with its 95% interval; the dashed line is guessing."""
    figure, axes = _axes(7, 3.8)
    names = list(conditions)
    values = [conditions[name]["accuracy"] for name in names]
    spans = np.array([[row["accuracy"] - row["accuracy_low"], row["accuracy_high"] - row["accuracy"]] for row in conditions.values()]).T
    axes.bar(names, values, color=ACCENT, yerr=np.clip(spans, 0, None), capsize=4, width=0.6)
    axes.axhline(chance, color=QUIET, linestyle="--", linewidth=1)
    axes.set_ylim(0, 1)
    axes.set_ylabel(f"accuracy on held-out entries, {round(1 / chance)} choices")
    return _save(figure, folder / "question_answering.png")


def token_lengths(folder: Path, bytes_per_token: Mapping[str, float]) -> Path:
    """How many bytes of held-out text one token of each tokenizer carries."""
    figure, axes = _axes(7, 0.6 * len(bytes_per_token) + 1.2)
    bars = axes.barh(list(bytes_per_token), list(bytes_per_token.values()), color=ACCENT)
    axes.bar_label(bars, fmt="%.2f", padding=4)
    axes.set_xlabel("bytes a token, held-out text")
    return _save(figure, folder / "token_lengths.png")


def _known(value: float | None) -> bool:
    return value is not None and not np.isnan(value)


def _axes(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _grid(panels: int, size: int) -> Any:
    from matplotlib.figure import Figure

    side = min(4.5, 1.5 + 0.09 * size)
    figure = Figure(figsize=(side * panels, side + 0.3), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, panels))


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def _drawable(piece: str) -> str:
    """A token's piece with what the font cannot draw as its code point."""
    return "".join(one if ord(one) < DRAWN or one in "·⏎—" else f"u{ord(one):x}" for one in piece) or "∅"
