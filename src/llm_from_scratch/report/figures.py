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


def quantization(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> Path:
    """Size and time against loss, a row of two panels for each original: the line joins what nothing else beats in both (Pareto).

    The originals' own size, time and loss stand in their quantizations' rows, under names that end in _fp32.
    """
    originals = list(dict.fromkeys(row["model"] for row in entries.values()))
    figure, grid = _panels(len(originals), 2)
    for line, original in zip(grid, originals, strict=True):
        rows = {name: row for name, row in entries.items() if row["model"] == original}
        for axes, (key, label) in zip(line, (("size_mb", "size on disk, MB"), ("p50_ms", "ms a token, one request")), strict=True):
            points = {name: (row[key], row["val_bpb"]) for name, row in rows.items()}
            before = np.median([(row[f"{key}_fp32"], row["val_bpb_fp32"]) for row in rows.values()], axis=0)
            _pareto(axes, points | {f"{original} (fp32)": (float(before[0]), float(before[1]))})
            axes.set_xlabel(f"{label} (lower is better)")
        line[0].set_ylabel("held-out bits per byte")
    return _save(figure, folder / "quantization.png")


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points that no other beats or equals in both numbers, lower being better, by the first number."""
    best: list[str] = []
    for name in sorted(points, key=lambda name: points[name]):
        if not best or points[name][1] < points[best[-1]][1]:
            best.append(name)
    return best


def alignment(folder: Path, curves: Mapping[str, Curve]) -> Path:
    """While each policy trained: what the reward model says of its answers, what the gold judge says, and how far it went."""
    figure, grid = _panels(1, 3)
    for axes, (key, label) in zip(
        grid[0], (("learned", "learned reward"), ("gold", "gold reward"), ("kl", "KL from the start, nats an answer")), strict=True
    ):
        for method, curve in curves.items():
            points = [(row["step"], row[key]) for row in curve if _known(row.get(key))]
            axes.plot(*zip(*points, strict=True), label=method, linewidth=1.6) if points else None
        axes.set_xlabel("step")
        axes.set_ylabel(label)
    grid[0][0].legend(frameon=False)
    return _save(figure, folder / "alignment.png")


def frontier(folder: Path, paths: Mapping[str, Sequence[tuple[float, float]]], best_of: Sequence[Mapping[str, float]]) -> Path:
    """Gold reward against distance: `paths` of (KL, gold) from the start to where each policy ended; and best-of-n, which trains nothing.

    A path that bends down has begun to please the reward model and no longer the judge.
    """
    figure, axes = _axes(8, 4.5)
    for method, path in paths.items():
        distances, gold = zip(*path, strict=True)
        axes.plot(np.sqrt(np.clip(distances, 0, None)), gold, marker="o", markersize=4, linewidth=1.4, label=method)
    if best_of:
        axes.plot(
            [row["kl"] ** 0.5 for row in best_of],
            [row["gold"] for row in best_of],
            color=QUIET,
            linestyle="--",
            marker="s",
            label="best of n",
        )
        for row in best_of[1:]:
            axes.annotate(
                f"{row['n']}", (row["kl"] ** 0.5, row["gold"]), textcoords="offset points", xytext=(4, -10), fontsize=8, color=INK
            )
    axes.set_xlabel("square root of the KL from the start, nats an answer")
    axes.set_ylabel("gold reward, held-out prompts")
    axes.legend(frameon=False)
    return _save(figure, folder / "frontier.png")


def overoptimization(folder: Path, runs: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> Path:
    """How far from the start (KL) against how much better, by the gold judge (left scale) and the reward model that is optimized (right).

    A column for each reward model, with its `policy` above its `best_of`: points with kl, gold and learned, both in standard deviations
    of the start. Where dashes go on up and the line turns down, the model is pleased and the judge no longer (Gao et al. 2023, figure 1).
    """
    figure, grid = _panels(2, len(runs))
    figure.set_size_inches(3.6 * len(runs) + 0.4, 5.6)
    for column, (name, run) in zip(grid.T, runs.items(), strict=True):
        for axes, kind, title in zip(column, ("policy", "best_of"), ("a policy trained", "best of n"), strict=True):
            away = np.sqrt(np.clip([point["kl"] for point in run[kind]], 0, None))
            axes.plot(away, [point["gold"] for point in run[kind]], color=ACCENT, marker="o", markersize=3)
            axes.axhline(0, color=QUIET, linewidth=0.6)
            axes.set_title(f"{name}: {title}", fontsize=9)
            other = axes.twinx()
            other.plot(away, [point["learned"] for point in run[kind]], color=QUIET, linestyle="--")
            other.spines[["top"]].set_visible(False)
            other.tick_params(axis="y", labelcolor=QUIET)
    for axes in grid[:, 0]:
        axes.set_ylabel("gold judge (line)", color=ACCENT)
    for axes in grid[1]:
        axes.set_xlabel("square root of KL, nats")
    figure.supylabel("above the start, in its standard deviations; reward model dashed, right", fontsize=8)
    return _save(figure, folder / "overoptimization.png")


def calibration(folder: Path, rows: Sequence[Mapping[str, float]]) -> Path:
    """How sure the reward model was of held-out pairs, and how often it was right; on the dashed line it knows what it knows."""
    figure, axes = _axes(5, 4)
    axes.plot([0.5, 1], [0.5, 1], color=QUIET, linestyle="--", linewidth=1)
    axes.plot([row["said"] for row in rows], [row["right"] for row in rows], color=ACCENT, marker="o")
    for row in rows:
        axes.annotate(
            f"{row['pairs']:.0f}", (row["said"], row["right"]), textcoords="offset points", xytext=(5, -10), fontsize=8, color=INK
        )
    axes.set_xlabel("probability that it gave to the answer it preferred")
    axes.set_ylabel("share of pairs where the judge agreed")
    return _save(figure, folder / "calibration.png")


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


def _pareto(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Labelled points and their frontier, on a scale of at least half a percent of the loss. Labels at one place are stacked."""
    best = pareto(points)
    axes.step(*zip(*(points[name] for name in best), strict=True), where="post", color=QUIET, linewidth=1, linestyle="--")
    across = 1.5 * max(x for x, _ in points.values())
    low, high = (extreme(y for _, y in points.values()) for extreme in (min, max))
    span = max(high - low, 0.005 * high)
    placed: list[tuple[float, float]] = []
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1][1]):
        axes.scatter([x], [y], color=ACCENT if name in best else QUIET, s=40, zorder=2)
        height = 120 * (y - low) / span  # in points of print, as the labels' own height is
        label = max([height, *(other + 10 for place, other in placed if abs(x - place) < 0.25 * across)])
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(7, 2 + label - height), fontsize=8, color=INK)
        placed.append((x, label))
    axes.set_xlim(0, across)
    axes.set_ylim(low - 0.2 * span, low + 1.5 * span)


def _known(value: float | None) -> bool:
    return value is not None and not np.isnan(value)


def reading(folder: Path, rows: Sequence[Mapping[str, Any]], chance: float) -> Path:
    """Accuracy without and with the passage against how long a model was trained; the dashed line is guessing, the numbers are the lift."""
    figure, axes = _axes(6, 3.8)
    rows = sorted(rows, key=lambda row: row["steps"])
    steps = [row["steps"] for row in rows]
    for name, color in (("with the passage", ACCENT), ("none", QUIET)):
        axes.plot(steps, [row[name] for row in rows], color=color, marker="o", label=name)
    for row in rows:
        place = (row["steps"], row["with the passage"])
        axes.annotate(f"{100 * row['lift']:+.1f}", place, textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8, color=INK)
    axes.axhline(chance, color=QUIET, linestyle="--", linewidth=1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("steps of training, each run with a cooldown of its own")
    axes.set_ylabel(f"accuracy on held-out entries, {round(1 / chance)} choices")
    axes.legend(frameon=False)
    return _save(figure, folder / "reading.png")


def _axes(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _panels(rows: int, columns: int) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * columns, 3.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


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
