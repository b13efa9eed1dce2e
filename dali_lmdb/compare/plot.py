"""A comparison as bars; needs matplotlib, the extra ``plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dali_lmdb.compare.settings import CompareSettings
from dali_lmdb.compare.table import speed
from dali_lmdb.compare.throughput import Comparison, Measurement
from dali_lmdb.figures import GREY, save_figure

__all__ = ["plot"]

_COLORS = ("#3b76af", "#c8641f")  # readable on white and on black


def plot(result: Comparison, path: Path) -> None:
    """Draw the images/s of each backend with their spread; loading and training have an axis each.

    The background is transparent and text is grey, so that it is readable on light and dark pages.

    Raises:
        StateError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    groups = [
        [found for found in result.measurements if ("model" in found.backend) == is_training]
        for is_training in (False, True)
    ]
    groups = [group for group in groups if group]
    heights = [len(group) + 1.2 for group in groups]
    figure = Figure(figsize=(8, 0.42 * sum(heights) + 1.3), layout="constrained")
    axes = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, group, color in zip(axes, groups, _COLORS, strict=False):
        _bars(axis, group, color=color, settings=result.settings)
    figure.supxlabel(_caption(result), fontsize=7.5, color=GREY)
    save_figure(figure, path)


def _bars(axis: Any, group: list[Measurement], *, color: str, settings: CompareSettings) -> None:
    medians = [found.images_per_s for found in group]
    below = [median - min(found.rounds) for median, found in zip(medians, group, strict=True)]
    above = [max(found.rounds) - median for median, found in zip(medians, group, strict=True)]
    places = range(len(group))
    axis.barh(places, medians, xerr=[below, above], color=color, ecolor=GREY, capsize=3, height=0.65)
    furthest = max(median + more for median, more in zip(medians, above, strict=True))
    base = next(found for found in group if found.backend == found.base)
    for place, found, more in zip(places, group, above, strict=True):
        text = speed(found.images_per_s)
        if found.backend != found.base:
            text += f"  ({found.ratio:.2f} x)" if found.interval.differs else "  (not told apart)"
        # Right of the reference line, which would cross it.
        left = max(found.images_per_s + more, base.images_per_s) + 0.015 * furthest
        axis.text(left, place, text, va="center", fontsize=8.5, color=GREY)
    axis.axvline(base.images_per_s, color=GREY, linestyle="--", linewidth=1)
    axis.set_yticks(places, [found.backend for found in group])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.35 * furthest)
    what = "loading"
    if "model" in group[0].backend:
        what = f"training {settings.arch}, batches of {settings.train_batch_size}"
    axis.set_xlabel(f"images/s, {what}", color=GREY)
    axis.tick_params(colors=GREY)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GREY)


def _caption(result: Comparison) -> str:
    settings, found, where = result.settings, result.versions, result.machine
    device = where["gpu"] or "no GPU"
    return (
        f"{settings.task}, {settings.size} px, batches of {settings.batch_size}, {settings.workers} workers; "
        f"median, lowest and highest of {settings.rounds} rounds of {settings.seconds:g} s\n"
        f"{device}, {where['cores']} cores of {where['cpu']}; DALI {found['nvidia-dali-cuda120']}, "
        f"torch {found['torch']}, Pillow {found['pillow']}"
    )
