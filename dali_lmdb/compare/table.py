"""A comparison as a table, in text or Markdown."""

from __future__ import annotations

from collections.abc import Callable

from dali_lmdb.compare.throughput import BACKENDS, Comparison, Measurement

__all__ = ["markdown", "speed", "table"]

_COLUMNS: dict[str, Callable[[Measurement], str]] = {
    "images/s": lambda found: speed(found.images_per_s),
    "min": lambda found: speed(min(found.rounds)),
    "max": lambda found: speed(max(found.rounds)),
    "ratio": lambda found: f"{found.ratio:.2f}",
    "from": lambda found: _limit(found, found.interval.low),
    "to": lambda found: _limit(found, found.interval.high),
    "CPU ms": lambda found: f"{found.cpu_ms_per_image:.2f}",
    "cores": lambda found: f"{found.cores:.1f}",
    "MB": lambda found: _scaled(found.memory_bytes, 1e-6, digits=0),
    "kB read": lambda found: _scaled(found.read_bytes_per_image, 1e-3, digits=1),
}
_WIDTHS = (10, 9, 9, 8, 7, 7, 9, 7, 8, 10)


def speed(images_per_s: float) -> str:
    """Images/s, with a decimal where they are few, as in training on CPUs."""
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.1f}"


def table(result: Comparison) -> str:
    """What was measured, as text of several lines."""
    name_width = max(len(found.backend) for found in result.measurements) + 3
    head = "".join(f"{title:>{width}}" for title, width in zip(_COLUMNS, _WIDTHS, strict=True))
    rows = [
        f"{found.backend:<{name_width}}"
        + "".join(f"{show(found):>{width}}" for show, width in zip(_COLUMNS.values(), _WIDTHS, strict=True))
        for found in result.measurements
    ]
    meanings = [f"{found.backend:<{name_width}}{_meaning(found.backend, result)}" for found in result.measurements]
    return "\n".join(
        [
            result.heading(*_description(result)),
            f"{'':{name_width}}{head}",
            *rows,
            "",
            *meanings,
            *_notes(result),
        ]
    )


def markdown(result: Comparison) -> str:
    """The same as Markdown."""
    rows = [["", *_COLUMNS], ["---", *("---:" for _ in _COLUMNS)]]
    rows += [[f"`{found.backend}`", *(show(found) for show in _COLUMNS.values())] for found in result.measurements]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    meanings = [f"* `{found.backend}`: {_meaning(found.backend, result)}" for found in result.measurements]
    notes = [f"* {note}" for note in _notes(result)]
    return "\n".join([*result.heading(*_description(result)).splitlines(), "", *lines, "", *meanings, *notes])


def _scaled(value: float | None, scale: float, *, digits: int) -> str:
    return "-" if value is None else f"{value * scale:,.{digits}f}"


def _limit(found: Measurement, value: float) -> str:
    if len(found.rounds) < 2 or found.backend == found.base:
        return "-"
    return f"{value:.2f}" if value < 100 else ">99"


def _description(result: Comparison) -> list[str]:
    settings = result.settings
    model = [] if settings.arch is None else [f"trained: {settings.arch}, batches of {settings.train_batch_size}"]
    lines = [
        f"{settings.task}, {settings.size} x {settings.size}, batches of {settings.batch_size}, "
        f"{settings.workers} workers or threads, {settings.rounds} rounds of {settings.seconds:g} s",
        *model,
    ]
    if settings.device == "cuda":  # what decides how fast a GPU decodes
        found = result.versions
        lines.append(
            f"DALI {found['nvidia-dali-cuda120']}, nvImageCodec {found['nvimagecodec']}, nvJPEG "
            f"{found['nvjpeg']}, driver {result.machine['driver']}; hw_decoder_load "
            f"{settings.hw_decoder_load:g}, {settings.dtype} {settings.layout}"
        )
    return lines


def _meaning(backend: str, result: Comparison) -> str:
    chosen = result.decoding.get(backend)
    if chosen is None:
        return BACKENDS[backend]
    return f"{BACKENDS[backend]} ({chosen['decode']}s decoded on the {chosen['decode_device'].upper()})"


def _notes(result: Comparison) -> list[str]:
    """What the figures do and do not say."""
    notes = [f"{backend}: not measured: {cause}" for backend, cause in result.failed.items()]
    others = [found for found in result.measurements if found.backend != found.base]
    for base in sorted({found.base for found in others}):
        alike = [found.backend for found in others if found.base == base and not found.interval.differs]
        if alike:
            notes.append(f"not told apart from {base}, with 99 % confidence: {', '.join(alike)}")
    return notes if result.conclusion is None else [*notes, result.conclusion]
