"""Measure the loaders beside their peers on the CPU, in turns: ``peers.py IMAGES STORE``.

All rows do the same work on the same photos: a random resized crop and a flip for training, a resize and a
central crop for evaluation, both normalised. ``reader`` is DALI's own file reader, the peer of ``DaliLoader``;
``plain`` is a ``DataLoader`` over the classic ``ImageFolderLMDB`` as projects write it by hand, the peer of
``TorchLoader``.

Each round measures every row once, in a process of its own. The time to the first batch counts from the
construction of the loader, after the imports; then come some batches that do not count, and the window: a fixed
number of batches, so that both its ends find the workers in the same state.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from plain_lmdb import plain_loader, write_plain

from dali_lmdb.cli import Command, print_progress, print_result
from dali_lmdb.compare.dali_reader import batches_of, define_reader
from dali_lmdb.compare.repeat import RepeatedStore
from dali_lmdb.compare.report import Measured, machine, spread, versions
from dali_lmdb.errors import SourceError
from dali_lmdb.loaders.backends import Backend, open_loader
from dali_lmdb.loaders.folder import FolderStore
from dali_lmdb.loaders.settings import Dtype
from dali_lmdb.plan.augment import EvalTransform, TrainTransform, Transform
from dali_lmdb.store import open_store

__all__ = ["ROWS", "Peers", "PeersSettings", "Window", "main", "measure_peers"]

# Shuffled again and again by the loaders that stop at an epoch's end, as one long epoch: with ImageNet, the end is
# a small part of it.
_EPOCH_BATCHES = 10_000
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class _Row:
    """What one row measures."""

    task: str
    name: str
    title: str
    peer: str
    """Name of the row of the same task that it is compared with."""


_READER = "DALI's own file reader"
_PLAIN = "plain `DataLoader` over a plain `ImageFolderLMDB`"
ROWS = {
    f"{row.task}/{row.name}": row
    for row in (
        _Row(task="train", name="dali", title="`DaliLoader`", peer="reader"),
        _Row(task="train", name="dali-uint8", title='`DaliLoader(dtype="uint8")`', peer="reader"),
        _Row(task="train", name="reader", title=_READER, peer="reader"),
        _Row(task="train", name="torch", title="`TorchLoader`", peer="plain"),
        _Row(task="train", name="plain", title=_PLAIN, peer="plain"),
        _Row(task="eval", name="dali", title="`DaliLoader`", peer="reader"),
        _Row(task="eval", name="reader", title=_READER, peer="reader"),
        _Row(task="eval", name="torch", title="`TorchLoader`", peer="plain"),
        _Row(task="eval", name="plain", title=_PLAIN, peer="plain"),
    )
}
"""By name, in the order of the table."""


@dataclass(frozen=True, kw_only=True)
class PeersSettings:
    """What to measure."""

    batch_size: int = 64
    """Images per batch, at most the number of records."""
    rounds: int = 5
    """Number of measurements of each row."""
    batches: int = 48
    """Batches in a window."""
    threads: int = 2
    """DALI's threads, or worker processes of a ``DataLoader``."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """One measurement of one row."""

    images_per_s: float
    cpu_ms: float
    """CPU time of all processes for one image, in milliseconds."""
    start_s: float
    """Seconds from the construction of the loader to its first batch."""


@dataclass(frozen=True, kw_only=True)
class Peers(Measured):
    """The result of ``measure_peers``."""

    settings: PeersSettings
    rounds: dict[str, list[Window]]
    """By row."""

    def ratios(self, row: str) -> list[float] | None:
        """Images/s divided by the peer's in the same round; None if the peer was not measured."""
        peer = self.rounds.get(f"{ROWS[row].task}/{ROWS[row].peer}")
        if peer is None:
            return None
        pairs = zip(self.rounds[row], peer, strict=True)
        return [window.images_per_s / other.images_per_s for window, other in pairs]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        rows: dict[str, Any] = {}
        for row, windows in self.rounds.items():
            ratios = self.ratios(row)
            rows[row] = {"ratio_to_peer": None if ratios is None else spread(ratios)}
            for name in ("images_per_s", "cpu_ms", "start_s"):
                rows[row][name] = spread([getattr(window, name) for window in windows])
        return self._described(rows=rows)


def measure_peers(
    images: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    rows: Iterable[str] = tuple(ROWS),
    settings: PeersSettings | None = None,
    progress: Callable[[int, str, Window], None] | None = None,
) -> Peers:
    """Measure some rows of the table.

    Args:
        images: the image folder that the store was made from.
        store: a store.
        rows: some of ``ROWS``.
        settings: by default ``PeersSettings()``.
        progress: called after every window with the round's number, from 1, and the row.

    Raises:
        StoreError, SourceError: the data cannot be opened, or differ.
    """
    settings = settings or PeersSettings()
    opened, folder = open_store(store), FolderStore(images)
    if len(folder) != len(opened) or len(folder) < settings.batch_size:
        raise SourceError(
            f"{images}: {len(folder)} images, the store has {len(opened)}; both need the same images, and at "
            f"least {settings.batch_size}"
        )
    names = list(rows)
    windows: dict[str, list[Window]] = {row: [] for row in ROWS if row in names}
    with tempfile.TemporaryDirectory() as temporary:
        paths = _Paths(images=Path(images), store=Path(store), plain=Path(temporary) / "plain.lmdb")
        write_plain(folder, paths.plain)
        for number in range(settings.rounds):
            for row in list(reversed(windows)) if number % 2 else list(windows):
                windows[row].append(_in_own_process(_measure, row, paths, settings, number))
                if progress is not None:
                    progress(number + 1, row, windows[row][-1])
    return Peers(
        store=str(store),
        num_records=len(opened),
        image_bytes=int(opened.column("num_bytes").sum(dtype=np.int64)),
        settings=settings,
        rounds=windows,
        versions=versions(),
        machine=machine("cpu"),
    )


@dataclass(frozen=True, kw_only=True)
class _Paths:
    """The same photos, three times."""

    images: Path
    store: Path
    plain: Path


def _in_own_process(function: Callable[..., Window], *arguments: Any) -> Window:
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), initializer=_fork_workers
    ) as pool:
        return pool.submit(function, *arguments).result()


def _fork_workers() -> None:
    # As usual on Linux. A spawned process would spawn its workers, too, and lmdb's environments cannot be pickled.
    multiprocessing.set_start_method("fork", force=True)


def _measure(row: str, paths: _Paths, settings: PeersSettings, number: int) -> Window:
    task, name = ROWS[row].task, ROWS[row].name
    transform = TrainTransform() if task == "train" else EvalTransform()
    begin = time.perf_counter()
    with _open(name, transform, paths, settings, seed=number) as loader:
        batches = _endless(loader)
        next(batches)
        start_s = time.perf_counter() - begin
        for _ in range(4 * settings.threads - 1):
            next(batches)
        # Batches of a DataLoader arrive in bursts of one from each worker, so only whole bursts are counted.
        num_batches = -(-settings.batches // settings.threads) * settings.threads
        begin, cpu_begin = time.perf_counter(), _cpu_s()
        num_images = sum(next(batches) for _ in range(num_batches))
        elapsed_s, cpu_s = time.perf_counter() - begin, _cpu_s() - cpu_begin
        batches.close()
    return Window(images_per_s=num_images / elapsed_s, cpu_ms=1e3 * cpu_s / num_images, start_s=start_s)


@contextmanager
def _open(
    name: str, transform: Transform, paths: _Paths, settings: PeersSettings, *, seed: int
) -> Iterator[Iterable[Any]]:
    """Open what a row measures."""
    if name == "reader":
        yield _reader(transform, paths, settings, seed=seed)
    elif name == "plain":
        yield plain_loader(
            paths.plain,
            is_training=isinstance(transform, TrainTransform),
            batch_size=settings.batch_size,
            num_workers=settings.threads,
            num_batches=_EPOCH_BATCHES,
        )
    else:
        store = open_store(paths.store)
        times = -(-_EPOCH_BATCHES * settings.batch_size // len(store))
        backend: Backend = "torch" if name == "torch" else "dali"
        dtype: Dtype = "uint8" if name == "dali-uint8" else "float32"
        with open_loader(
            RepeatedStore(store, times=times),
            backend=backend,
            workers=settings.threads,
            transform=transform,
            batch_size=settings.batch_size,
            device="cpu",
            rank=0,
            world_size=1,
            seed=seed,
            last_batch="drop",
            dtype=dtype,
        ) as loader:
            yield loader


def _reader(transform: Transform, paths: _Paths, settings: PeersSettings, *, seed: int) -> Iterator[Any]:
    folder = FolderStore(paths.images)
    reader = define_reader(
        folder.files,
        folder.labels.tolist(),
        transform=transform,
        batch_size=settings.batch_size,
        device_id=None,
        decode_device="cpu",
        hw_decoder_load=0,
        num_threads=settings.threads,
        seed=seed,
    )
    return batches_of(reader)


def _endless(loader: Iterable[tuple[torch.Tensor, ...]]) -> Generator[int, None, None]:
    """The number of images of each batch; the batch itself is dropped."""
    while True:
        for batch in loader:
            num_images = len(batch[1])
            del batch
            yield num_images


def _cpu_s() -> float:
    """CPU time of this process and its workers so far, in seconds."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()
        total += (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS  # utime and stime, see proc(5)
    return total


def _at_least_1(name: str, help: str) -> Callable[..., Any]:
    default = getattr(PeersSettings, name.removeprefix("--").replace("-", "_"))
    return click.option(name, type=click.IntRange(min=1), default=default, show_default=True, help=help)


@click.command(cls=Command)
@click.argument("images", metavar="IMAGES")
@click.argument("store", metavar="STORE")
@_at_least_1("--rounds", "Number of measurements of each row.")
@_at_least_1("--batches", "Batches in a window.")
@_at_least_1("--batch-size", "Images per batch.")
@_at_least_1("--threads", "DALI's threads, or worker processes of a DataLoader.")
@click.option("--only", multiple=True, type=click.Choice(list(ROWS)), help="Measure this row; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def main(images: str, store: str, *, only: tuple[str, ...], as_json: bool, **numbers: int) -> None:
    """Measure the loaders on STORE beside their peers on IMAGES, the folder it was made from, without a GPU."""
    settings = PeersSettings(**numbers)
    found = measure_peers(images, store, rows=only or ROWS, settings=settings, progress=_report)
    print_result(json.dumps(found.to_dict()) if as_json else _table(found))


def _report(number: int, row: str, window: Window) -> None:
    print_progress(
        f"round {number}: {row} {window.images_per_s:,.0f} images/s, {window.cpu_ms:.2f} ms of CPU time per "
        f"image, first batch after {window.start_s:.2f} s"
    )


def _table(result: Peers) -> str:
    """The result in Markdown."""
    settings = result.settings
    head = result.heading(
        f"batches of {settings.batch_size}, {settings.threads} workers or threads, {settings.rounds} rounds of "
        f"{settings.batches} batches",
    )
    lines = [
        "| work | loader | images/s (lowest to highest) | CPU ms/image | first batch, s | ratio to its peer |",
        "|---|---|---|---|---|---|",
    ]
    for row, windows in result.rounds.items():
        speeds, ratios = [window.images_per_s for window in windows], result.ratios(row)
        cells = [
            ROWS[row].task,
            ROWS[row].title,
            _spread(speeds, ",.0f"),
            f"{statistics.median(window.cpu_ms for window in windows):.2f}",
            f"{statistics.median(window.start_s for window in windows):.2f}",
            "" if ratios is None else _spread(ratios, ".2f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([head, *lines])


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
