"""Measure how long the interpreter works on an image of ``DaliLoader(device="cpu")``.

Only one thread at a time runs Python, so this is what limits a loader with many cores. Images of 16 x 16 pixels
leave almost nothing else to do; what all threads but DALI's take for them is an upper bound of it.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import click
import numpy as np
from PIL import Image

from dali_lmdb import DaliLoader, EvalTransform, TrainTransform
from dali_lmdb.cli import Command, print_result
from dali_lmdb.convert import ConvertSettings, convert

__all__ = ["interpreter_us", "main"]

_NUM_IMAGES = 4096
_SIDE = 16


@click.command(cls=Command)
@click.option(
    "--epochs", type=click.IntRange(min=1), default=10, show_default=True, help="Epochs that are measured."
)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="Threads of the loader.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def main(epochs: int, threads: int, as_json: bool) -> None:
    """Measure how long the interpreter works on an image, for training and evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        store = _make_store(Path(folder))
        found = {
            name: interpreter_us(store, transform, epochs=epochs, threads=threads)
            for name, transform in (
                ("train", TrainTransform(size=_SIDE)),
                ("eval", EvalTransform(size=_SIDE, resize=_SIDE)),
            )
        }
    if as_json:
        print_result(json.dumps({f"{name}_us": value for name, value in found.items()}))
    else:
        print_result(
            "\n".join(f"{name}: at most {value:.0f} us of Python an image" for name, value in found.items())
        )


def interpreter_us(store: Path, transform: TrainTransform | EvalTransform, *, epochs: int, threads: int) -> float:
    """CPU time of all threads but DALI's, in microseconds an image."""
    with DaliLoader(
        store, transform=transform, batch_size=64, device="cpu", num_threads=threads, last_batch="short"
    ) as loader:
        for _ in loader:
            pass
        begin = _cpu_s()
        for _ in range(epochs):
            for _ in loader:
                pass
        num_images: int = epochs * loader.num_records
        return (_cpu_s() - begin) / num_images * 1e6


def _cpu_s() -> float:
    """CPU time so far of this process's threads that DALI has not named."""
    nanoseconds = 0
    for task in Path("/proc/self/task").iterdir():
        if not (task / "comm").read_text().startswith("[DALI]"):
            nanoseconds += int((task / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9


def _make_store(folder: Path) -> Path:
    """A store of small JPEGs of noise."""
    random = np.random.default_rng(0)
    images = folder / "images" / "one"
    images.mkdir(parents=True)
    for number in range(_NUM_IMAGES):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (_SIDE, _SIDE, 3), np.uint8)).save(file, "JPEG")
        (images / f"{number}.jpg").write_bytes(file.getvalue())
    store = folder / "small.lmdb"
    convert(folder / "images", store, settings=ConvertSettings())
    return store


if __name__ == "__main__":
    main()
