"""A comparison as bars; needs matplotlib, the extra ``plot``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dali_lmdb.compare.throughput import Comparison, Measurement
from dali_lmdb.disk import os_errors
from dali_lmdb.errors import StateError

__all__ = ["check_plot", "plot"]

_COLORS = ("#3b76af", "#c8641f")  # readable on white and on black
_GREY = "#808080"


def check_plot(path: Path) -> None:
    """Find what would stop ``plot``, before anything is measured.

    Raises:
        ValueError: matplotlib is missing, or the file has an unknown suffix or no folder.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'dali-lmdb[plot]'") from error
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"{path}: expected a name that ends in .png or .svg")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist; create it first")


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
        _bars(axis, group, color=color, arch=result.settings.arch)
    figure.supxlabel(_caption(result), fontsize=7.5, color=_GREY)
    partial = path.with_name(path.name + ".partial")
    with os_errors(path, "cannot be written", StateError):
        try:
            figure.savefig(partial, format=path.suffix[1:], dpi=150, transparent=True)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _bars(axis: Any, group: list[Measurement], *, color: str, arch: str | None) -> None:
    medians = [found.images_per_s for found in group]
    below = [median - min(found.rounds) for median, found in zip(medians, group, strict=True)]
    above = [max(found.rounds) - median for median, found in zip(medians, group, strict=True)]
    places = range(len(group))
    axis.barh(places, medians, xerr=[below, above], color=color, ecolor=_GREY, capsize=3, height=0.65)
    furthest = max(median + more for median, more in zip(medians, above, strict=True))
    for place, found, more in zip(places, group, above, strict=True):
        text = f"{found.images_per_s:,.0f}" + ("" if found.backend == found.base else f"  ({found.ratio:.2f} x)")
        axis.text(
            found.images_per_s + more + 0.015 * furthest, place, text, va="center", fontsize=8.5, color=_GREY
        )
    base = next((found for found in group if found.backend == found.base), None)
    if base is not None:
        axis.axvline(base.images_per_s, color=_GREY, linestyle="--", linewidth=1)
    axis.set_yticks(places, [found.backend for found in group])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * furthest)
    is_training = "model" in group[0].backend
    axis.set_xlabel(f"images/s, training {arch}" if is_training else "images/s, loading", color=_GREY)
    axis.tick_params(colors=_GREY)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_GREY)


def _caption(result: Comparison) -> str:
    settings, found, where = result.settings, result.versions, result.machine
    device = where["gpu"] or "no GPU"
    return (
        f"{settings.task}, {settings.size} px, batches of {settings.batch_size}, {settings.workers} workers; "
        f"median, lowest and highest of {settings.rounds} rounds of {settings.seconds:g} s\n"
        f"{device}, {where['cores']} cores of {where['cpu']}; DALI {found['nvidia-dali-cuda120']}, "
        f"torch {found['torch']}, Pillow {found['pillow']}"
    )
