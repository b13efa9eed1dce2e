"""Steps about speed: decoding by mode, share and threads, DALI's own reader, hand-over, and training."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dali_lmdb.compare.dali_reader import define_reader
from dali_lmdb.compare.repeat import RepeatedStore
from dali_lmdb.loaders.base import Loader
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.settings import DaliSettings, Device
from dali_lmdb.plan.augment import TrainTransform
from dali_lmdb.store import Store, open_store
from dali_lmdb.threads import threads_per_rank
from dali_lmdb.train.models import build_model, training_loss
from gpu_steps.card import synchronize, used_bytes, utilization
from gpu_steps.isolated import Row

__all__ = ["decoding", "file_reader", "handover", "training"]

_EPOCH_STEPS = 1000  # smaller stores are repeated, so that no epoch ends within a measurement
_WARM_UP_STEPS = 10  # of decoding: DALI's buffers have grown by then
_MAX_FILES = 4096  # that DALI's own reader reads: half a GB of photos
_ROUNDS = 4  # of training; each measures both ways, so that the card's clock affects both alike
_UNTIMED_STEPS = 3  # first in each turn: their batches were prefetched while the other way ran


def decoding(
    store: str,
    *,
    device: Device,
    batch_size: int,
    seconds: float,
    shares: Sequence[float],
    threads: Sequence[int],
    **arguments: Any,
) -> Iterator[Row]:
    """Images/s of the loader alone for each share of the hardware engine and number of threads, train work.

    Args:
        seconds: length of each measurement.
        threads: numbers of threads; those above this machine's cores are left out, 0 is all cores.
        arguments: more arguments of ``DaliLoader``.
    """
    cores = threads_per_rank()
    with open_store(store) as opened:
        repeated = _repeated(opened, batch_size)
        for num_threads in sorted({number or cores for number in threads if number <= cores}):
            for share in shares:
                chosen = {"hw_decoder_load": share, "num_threads": num_threads} | arguments
                yield {"share": share, "threads": num_threads} | _one_speed(
                    repeated, device=device, batch_size=batch_size, seconds=seconds, **chosen
                )


def _one_speed(store: Store, *, device: Device, batch_size: int, seconds: float, **arguments: Any) -> Row:
    synchronize(device)
    before = used_bytes() if device == "cuda" else 0
    with _open(store, device=device, batch_size=batch_size, **arguments) as loader:
        batches = _endless(loader)
        _take(batches, steps=_WARM_UP_STEPS, seconds=seconds, device=device)
        with utilization(device) as busy:
            images, elapsed_s = _take(batches, seconds=seconds, device=device)
        batches.close()
        row: Row = {"images/s": round(images / elapsed_s)}
        if device == "cuda":
            row |= busy.to_row()
            row["GPU memory, MB"] = round((used_bytes() - before) / 1e6)
            row["by stats(), MB"] = round(loader.stats()["gpu_memory_bytes"] / 1e6)
    return row


def file_reader(store: str, *, device: Device, batch_size: int, seconds: float) -> Iterator[Row]:
    """Images/s of DALI's own file reader, with random crops by ``decoders.image_random_crop``.

    The reference for our loader: NVIDIA's examples train with it. It reads the store's first records as files.
    """
    with tempfile.TemporaryDirectory(prefix="gpu_report-") as folder:
        with open_store(store) as opened:
            num_files = min(_MAX_FILES, len(opened))
            for record in range(num_files):
                Path(folder, f"{record:06}.jpg").write_bytes(opened.read(record))
        pipeline = define_reader(
            sorted(map(str, Path(folder).iterdir())),
            [0] * num_files,
            transform=TrainTransform(),
            batch_size=batch_size,
            device_id=torch.cuda.current_device() if device == "cuda" else None,
            decode_device="gpu" if device == "cuda" else "cpu",
            hw_decoder_load=DaliSettings.hw_decoder_load,
            num_threads=threads_per_rank(),
            seed=0,
        )
        pipeline.build()

        def batch() -> int:
            return len(pipeline.run()[1])

        batches = iter(batch, 0)
        _take(batches, steps=_WARM_UP_STEPS, seconds=seconds, device=device)
        with utilization(device) as busy:
            images, elapsed_s = _take(batches, seconds=seconds, device=device)
        yield {
            "files": num_files,
            "threads": threads_per_rank(),
            "images/s": round(images / elapsed_s),
        } | busy.to_row()


def handover(store: str, *, seconds: float) -> Iterator[Row]:
    """Records/s that one core hands over to DALI without decoding."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from handover import measure_handover
    from reading import ReadingSettings

    found = measure_handover(store, settings=ReadingSettings(rounds=3, seconds=seconds))
    for name, speeds in (
        ("wall time", [one.records_per_s for one in found.rounds]),
        ("CPU time", [one.records_per_cpu_s for one in found.rounds]),
    ):
        yield {
            "per second of": name,
            "records/s": round(statistics.median(speeds)),
            "min": round(min(speeds)),
            "max": round(max(speeds)),
        }


def training(
    store: str, *, device: Device, batch_size: int, arch: str, steps: int, seconds: float
) -> Iterator[Row]:
    """Images/s of training with the loader's batches and with the same batch every time, in turns.

    The second is what the GPU could do if loading cost nothing.

    Args:
        steps: number of steps of each way, over all rounds.
        seconds: time limit of each way, over all rounds; it may end them before ``steps``.
    """
    with (
        open_store(store) as opened,
        _open(_repeated(opened, batch_size), device=device, batch_size=batch_size) as loader,
    ):
        step = _training_step(arch, num_classes=len(loader.classes), device=device)
        batches = iter(loader)
        kept = tuple(tensor.clone() for tensor in next(batches))
        ways: dict[str, Callable[[], None]] = {
            "loader": lambda: step(*next(batches)),
            "one batch": lambda: step(*kept),
        }
        rows = []
        for number in range(1, _ROUNDS + 1):
            row: Row = {"round": number}
            for way, work in ways.items():
                for _ in range(_UNTIMED_STEPS):
                    work()
                num_steps, elapsed_s = _repeat(work, steps // _ROUNDS, seconds / _ROUNDS, device)
                row[f"{way}, images/s"] = round(num_steps * batch_size / elapsed_s, 1)
                row[f"{way}, steps"] = num_steps
            row["loader / one batch"] = round(row["loader, images/s"] / row["one batch, images/s"], 3)
            rows.append(row)
            yield row
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    yield medians | {"round": "median"}


def _training_step(arch: str, *, num_classes: int, device: Device) -> Callable[..., None]:
    """One step of SGD, channels last; on a GPU in mixed precision."""
    model = build_model(arch, num_classes=num_classes, size=224).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    dtype = torch.float16 if device == "cuda" else torch.float32
    no_bf16 = device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    scaler = torch.amp.GradScaler(device, enabled=no_bf16)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        with torch.autocast("cuda", dtype=torch.float16 if no_bf16 else torch.bfloat16, enabled=device == "cuda"):
            loss = training_loss(model(images.to(dtype)), labels, arch=arch)
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()

    return step


def _repeat(work: Callable[[], None], steps: int, seconds: float, device: Device) -> tuple[int, float]:
    """Do something once, then again until steps or seconds are used up; return (steps done, elapsed seconds)."""
    synchronize(device)
    begin, done = time.perf_counter(), 0
    while done == 0 or (done < steps and time.perf_counter() - begin < seconds):
        work()
        done += 1
    synchronize(device)
    return done, time.perf_counter() - begin


def _take(
    batches: Iterator[int], *, seconds: float, device: Device, steps: int | None = None
) -> tuple[int, float]:
    """Take batches for some seconds, at least one and at most ``steps``; return (images, elapsed seconds)."""
    taken = []
    num_steps, elapsed_s = _repeat(lambda: taken.append(next(batches)), steps or sys.maxsize, seconds, device)
    assert num_steps == len(taken)
    return sum(taken), elapsed_s


def _endless(loader: Loader) -> Generator[int, None, None]:
    """The number of images of each batch, epoch after epoch."""
    while True:
        for batch in loader:
            num_images = len(batch[1])
            del batch  # its memory belongs to the pipeline, which reuses it for the next one
            yield num_images


def _repeated(store: Store, batch_size: int) -> Store:
    return RepeatedStore(store, times=-(-_EPOCH_STEPS * batch_size // len(store)))


def _open(store: Store, *, device: Device, batch_size: int, **arguments: Any) -> DaliLoader:
    chosen: dict[str, Any] = {"transform": TrainTransform(), "dtype": "float16", "layout": "NHWC"} | arguments
    return DaliLoader(store, device=device, batch_size=batch_size, **chosen)
