"""The curves of a run, over all its starts: loss, top-1 and learning rate as a picture."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["CURVES_NAME", "History", "draw"]

CURVES_NAME = "curves.png"

_MOST_POINTS = 1000  # more than a picture can show


@dataclass
class History:
    """What a checkpoint keeps to draw the curves of the whole run; plain values only."""

    steps: list[list[float]] = field(default_factory=list)
    """Points (epochs done, loss, learning rate, count): means of ``count`` reports of steps, as many in each."""
    results: list[dict[str, Any]] = field(default_factory=list)
    """Of each evaluation."""
    elapsed_s: float = 0.0
    """How long the run took, over all its starts."""

    def add_steps(self, epochs_done: float, *, loss: float, lr: float) -> None:
        """Add a report; once there are many points, every two become one."""
        point = [epochs_done, loss, lr, 1]
        if self.steps and self.steps[-1][-1] < self.steps[0][-1]:
            point = _mean(self.steps.pop(), point)
        self.steps.append(point)
        if len(self.steps) == 2 * _MOST_POINTS:
            self.steps = [_mean(*pair) for pair in zip(self.steps[::2], self.steps[1::2], strict=True)]


def _mean(one: list[float], other: list[float]) -> list[float]:
    *values, n = one
    *others, m = other
    return [*((n * x + m * y) / (n + m) for x, y in zip(values, others, strict=True)), n + m]


def draw(history: History, folder: Path) -> None:
    """Draw ``curves.png`` in a folder, replacing an older one.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: it cannot be written; an older one is still there.
    """
    # Not pyplot, which keeps state, and may open a window.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 9), layout="constrained")
    loss, top1, lr = figure.subplots(3, sharex=True)
    places, losses, rates, _ = zip(*history.steps, strict=True)
    loss.plot(places, losses, label="training", color="tab:blue", linewidth=1)
    lr.plot(places, rates, color="tab:gray")
    ends = [result["epoch"] + 1 for result in history.results]
    averaged = [result for result in history.results if "ema_val_top1" in result]
    averaged_ends = [result["epoch"] + 1 for result in averaged]
    for axes, name in ((loss, "val_loss"), (top1, "val_top1")):
        values = [result[name] for result in history.results]
        axes.plot(ends, values, label="validation", color="tab:orange", marker=".")
        if averaged:
            values = [result[f"ema_{name}"] for result in averaged]
            axes.plot(averaged_ends, values, label="validation, averaged weights", color="tab:green", marker=".")
        axes.legend()
    loss.set_ylabel("loss")
    top1.set_ylabel("top-1 [%]")
    lr.set_ylabel("learning rate")
    lr.set_ylim(bottom=0)
    lr.set_xlabel("epochs done")
    lr.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (loss, top1, lr):
        axes.grid(alpha=0.3)

    path = folder / CURVES_NAME
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)  # follows no link
    try:
        figure.savefig(partial, format="png", dpi=120)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
