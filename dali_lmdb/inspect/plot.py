"""A store as a picture: images per class, and their sizes; needs matplotlib, the extra ``plot``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dali_lmdb.errors import one_line
from dali_lmdb.figures import GREY, save_figure
from dali_lmdb.inspect.info import class_records
from dali_lmdb.store import open_store

__all__ = ["plot_store", "store_figure"]

_BLUE, _ORANGE = "#3b76af", "#c8641f"  # readable on white and on black
_MOST_BARS = 40  # classes that have a bar with a name each
_LEAST_BARS = 6  # for which there is room, so that few are not too thick
_NAMED = 3  # of more classes, the largest and smallest that are named
_NAME_CHARACTERS, _TITLE_CHARACTERS = 24, 90
_ROOM = 0.35  # above the largest class, for the names, as a share of the axis below
_BINS = 60
_PLAIN = "{x:,g}"  # of numbers at ticks
_WIDE = 8  # an axis is logarithmic if its largest value is so many times the median


def plot_store(path: str | os.PathLike[str], file: Path) -> None:
    """Write ``store_figure`` to a file.

    Raises:
        StoreNotFoundError, StoreFormatError, StoreDamagedError: see ``dali_lmdb.errors``.
        StateError: the file cannot be written.
    """
    save_figure(store_figure(path), file)


def store_figure(path: str | os.PathLike[str]) -> Any:
    """Draw the images of each class, their heights and widths, and their bytes, as a matplotlib ``Figure``.

    The background is transparent and text is grey, so that it is readable on light and dark pages.

    Raises:
        StoreNotFoundError, StoreFormatError, StoreDamagedError: see ``dali_lmdb.errors``.
    """
    from matplotlib.figure import Figure

    with open_store(path) as store:
        counts = class_records(store)
        has_bars = len(counts) <= _MOST_BARS
        figure = Figure(figsize=(10, max(5.5, 1.3 + 0.24 * len(counts)) if has_bars else 6), layout="constrained")
        classes, sizes, num_bytes = (figure.add_subplot(place) for place in _places(figure))
        if has_bars:
            _bars(classes, store.classes, counts)
        else:
            _profile(classes, store.classes, counts)
        _sizes(sizes, figure, store.column("height"), store.column("width"))
        _bytes(num_bytes, store.column("num_bytes"))
        for axis in (classes, sizes, num_bytes):
            axis.tick_params(which="both", colors=GREY)
            axis.title.set_color(GREY)
            axis.spines[["top", "right"]].set_visible(False)
            axis.spines[["left", "bottom"]].set_color(GREY)
        title = f"{store.path.name}: {len(store):,} images, {len(counts):,} classes"
        figure.suptitle(_short(title, _TITLE_CHARACTERS), fontsize=11, color=GREY, parse_math=False)
    return figure


def _places(figure: Any) -> tuple[Any, Any, Any]:
    grid = figure.add_gridspec(2, 2, width_ratios=(1.1, 1), height_ratios=(1.4, 1))
    return grid[:, 0], grid[0, 1], grid[1, 1]


def _bars(axis: Any, names: list[str], counts: npt.NDArray[np.int64]) -> None:
    places = range(len(counts))
    axis.barh(places, counts, color=_BLUE, height=0.7)
    for place, count in enumerate(counts.tolist()):
        axis.annotate(
            f"{count:,}", (count, place), (3, 0), textcoords="offset points", va="center", fontsize=8, color=GREY
        )
    axis.set_yticks(places, [_short(name) for name in names], fontsize=8, parse_math=False)
    axis.set_ylim(max(len(counts), _LEAST_BARS) - 0.4, -0.6)
    axis.set_xlim(0, 1.15 * max(1, int(counts.max(initial=0))))
    _number(axis.xaxis, integer=True)
    axis.set_title("images per class", fontsize=10)


def _profile(axis: Any, names: list[str], counts: npt.NDArray[np.int64]) -> None:
    """The classes by size, of which only a few are named."""
    order = np.argsort(-counts, kind="stable")
    axis.fill_between(
        np.arange(len(counts) + 1), np.append(counts[order], 0), step="post", color=_BLUE, linewidth=0
    )
    median = float(np.median(counts))
    axis.axhline(median, color=_ORANGE, linestyle="--", linewidth=1)
    most = max(1, int(counts.max()))
    axis.set_xlim(0, len(counts))
    if _is_wide(counts):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(_PLAIN)
        axis.set_ylim(0.5, most * (2 * most) ** _ROOM)  # with room for the names
    else:
        axis.set_ylim(0, most * (1 + _ROOM))
        _number(axis.yaxis, integer=True)
    _number(axis.xaxis, integer=True)
    axis.set_xlabel("classes, largest first", fontsize=9, color=GREY)
    axis.set_title("images per class", fontsize=10)
    columns = (("largest", order[:_NAMED], 0.02, "left"), ("smallest", order[-_NAMED:], 0.98, "right"))
    for what, chosen, x, side in columns:
        lines = [what, *(f"{_short(names[label])}: {counts[label]:,}" for label in chosen.tolist())]
        text = axis.text(
            x, 0.985, "\n".join(lines), transform=axis.transAxes, ha=side, va="top", fontsize=8, color=GREY
        )
        text.set_parse_math(False)
    axis.text(
        0.98,
        0.84,
        f"median {median:,g}",
        transform=axis.transAxes,
        ha="right",
        va="top",
        fontsize=8,
        color=_ORANGE,
    )


def _sizes(axis: Any, figure: Any, heights: npt.NDArray[np.int32], widths: npt.NDArray[np.int32]) -> None:
    known = (heights > 0) & (widths > 0)
    axis.set_title("height and width, pixels", fontsize=10)
    if not known.any():
        _say(axis, "sizes are unknown (--check none)" if len(heights) else "no images")
        return
    heights, widths = heights[known], widths[known]
    if heights.min() == heights.max() and widths.min() == widths.max():
        _say(axis, f"all {heights[0]:,} x {widths[0]:,}")
        return
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, NullLocator

    x, y = _edges(widths), _edges(heights)
    counts, _, _ = np.histogram2d(widths, heights, bins=(x, y))
    filled = np.ma.masked_equal(counts.T, 0)
    mesh = axis.pcolormesh(x, y, filled, cmap="viridis", norm=LogNorm(1, max(10, counts.max())), rasterized=True)
    bar = figure.colorbar(mesh, ax=axis, ticks=LogLocator(subs=(1,)), format=_PLAIN)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(colors=GREY, labelsize=8)
    bar.outline.set_edgecolor(GREY)
    bar.set_label("images", fontsize=8, color=GREY)
    axis.set_xlabel("width", fontsize=9, color=GREY)
    axis.set_ylabel("height", fontsize=9, color=GREY)
    _scale(axis.xaxis, axis.set_xscale, widths)
    _scale(axis.yaxis, axis.set_yscale, heights)


def _bytes(axis: Any, num_bytes: npt.NDArray[np.uint32]) -> None:
    axis.set_title("size of an image, kB", fontsize=10)
    if not len(num_bytes):
        _say(axis, "no images")
        return
    kilobytes = num_bytes / 1e3
    axis.hist(kilobytes, bins=_edges(kilobytes), color=_BLUE)
    axis.set_ylabel("images", fontsize=9, color=GREY)
    _number(axis.yaxis, integer=True)
    _scale(axis.xaxis, axis.set_xscale, kilobytes)


def _say(axis: Any, text: str) -> None:
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", fontsize=9, color=GREY)
    axis.set_xticks([])
    axis.set_yticks([])


def _edges(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Edges of bins that hold all values, and some room beside them."""
    low, high = float(values.min()), float(values.max())
    if _is_wide(values):
        return np.geomspace(max(low, high * 1e-6) * 0.9, high * 1.1, _BINS + 1)
    room = max(0.05 * (high - low), 0.05 * high)
    return np.linspace(max(0.0, low - room), high + room, _BINS + 1)


def _is_wide(values: npt.NDArray[Any]) -> bool:
    return bool(values.max(initial=0) > _WIDE * np.median(values) > 0)


def _scale(axis: Any, set_scale: Any, values: npt.NDArray[Any]) -> None:
    """Few ticks with plain numbers, on a logarithmic axis too."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if _is_wide(values):
        set_scale("log")
        axis.set_major_locator(LogLocator(subs=(1, 3) if values.max() < 1e3 * values.min() else (1,)))
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(_PLAIN)
    else:
        _number(axis, integer=values.dtype.kind in "iu")


def _number(axis: Any, *, integer: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(5, integer=integer))
    axis.set_major_formatter(_PLAIN)


def _short(name: str, num_characters: int = _NAME_CHARACTERS) -> str:
    name, half = one_line(name), num_characters // 2
    return name if len(name) <= num_characters else f"{name[: half - 1]}…{name[-half:]}"
