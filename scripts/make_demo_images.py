"""Make a small image set that a network can learn, to try things out without a data set."""

from __future__ import annotations

import colorsys
import io
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import click
import numpy as np
import numpy.typing as npt
from PIL import Image

FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]

# Half of ImageNet's photos are 500 pixels wide; the other shapes are its next most frequent ones.
SIZES = ((500, 375), (500, 375), (375, 500), (500, 333), (333, 500), (500, 400))  # (width, height), pixels

# At this quality, these images are about as large as an ImageNet photo, 110 kB.
JPEG_QUALITY = 91

# Each pattern fills the plane and looks the same when mirrored, so that random crops and flips keep the class.
# (u, v) are coordinates in periods of the pattern, of any shape; the result is a mask in [0, 1].
PATTERNS: dict[str, Callable[[FloatArray, FloatArray], FloatArray]] = {
    "bars": lambda u, v: _edge(np.cos(2 * math.pi * u)),
    "checks": lambda u, v: _edge(np.cos(math.pi * u) * np.cos(math.pi * v)),
    "discs": lambda u, v: _edge(0.35 - np.hypot(_cell(u), _cell(v))),
    "rings": lambda u, v: _edge(0.1 - np.abs(np.hypot(_cell(u), _cell(v)) - 0.33)),
    "crosses": lambda u, v: _edge(0.09 - np.minimum(np.abs(_cell(u)), np.abs(_cell(v)))),
    "diamonds": lambda u, v: _edge(0.3 - np.abs(_cell(u)) - np.abs(_cell(v))),
    "ladders": lambda u, v: _edge(np.cos(2 * math.pi * v)),
    "waves": lambda u, v: _edge(np.cos(2 * math.pi * (v + 0.25 * np.sin(2 * math.pi * u)))),
}


@dataclass(frozen=True, kw_only=True)
class DemoImages:
    """The settings of an image set."""

    classes: int = 4
    """Number of classes, 2 to the number of patterns."""
    train_per_class: int = 100
    val_per_class: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= len(PATTERNS):
            raise ValueError(f"classes: {self.classes}, expected 2 to {len(PATTERNS)}")
        if self.train_per_class < 1 or self.val_per_class < 1:
            raise ValueError(
                f"images per class: {self.train_per_class} (train) and {self.val_per_class} (val), "
                "expected at least 1 of each"
            )
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed}, expected 0 or more")


def make_demo_images(out: Path, settings: DemoImages) -> int:
    """Write OUT/train/CLASS/*.jpg and OUT/val/CLASS/*.jpg and return their total size in bytes.

    The folder appears under its name when it is complete. The same settings give the same pixels.

    Raises:
        FileExistsError: OUT exists already.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already; give another folder, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        partial.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        jobs = []
        for split, count in enumerate((settings.train_per_class, settings.val_per_class)):
            for label, name in enumerate(list(PATTERNS)[: settings.classes]):
                folder = partial / ("train", "val")[split] / name
                folder.mkdir(parents=True)
                jobs += [(folder / f"{name}_{i:04d}.jpg", label, (split, i)) for i in range(count)]

        def write(job: tuple[Path, int, tuple[int, int]]) -> int:
            path, label, key = job
            # Each image has its own generator, so the order in which threads make them does not matter.
            generator = np.random.default_rng((settings.seed, label, *key))
            return path.write_bytes(demo_jpeg(label, generator, num_classes=settings.classes))

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            num_bytes = sum(pool.map(write, jobs))
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return num_bytes


def demo_jpeg(label: int, generator: np.random.Generator, *, num_classes: int) -> bytes:
    """Draw one image: the class's pattern, in roughly the class's colour, over a noisy background."""
    width, height = SIZES[generator.integers(len(SIZES))]
    background = _natural_noise(height, width, generator)

    angle = math.radians(generator.uniform(-12, 12))
    period = generator.uniform(40, 80)  # pixels: several fit in a crop, and a resize keeps them
    y, x = np.mgrid[:height, :width].astype(np.float32) / np.float32(period)
    u = x * math.cos(angle) - y * math.sin(angle) + generator.uniform()
    v = x * math.sin(angle) + y * math.cos(angle) + generator.uniform()
    mask = list(PATTERNS.values())[label](u, v)[..., None]

    # Neighbouring classes' hues overlap a little, so that the pattern is worth learning too.
    hue = (label + generator.normal(scale=0.2)) / num_classes
    colour = np.array(colorsys.hsv_to_rgb(hue % 1, generator.uniform(0.4, 0.8), generator.uniform(0.6, 1.0)))
    opacity = np.float32(generator.uniform(0.4, 0.7))
    pixels = background * (1 - opacity * mask) + colour.astype(np.float32) * opacity * mask

    pixels += 0.02 * generator.standard_normal((height, width, 1), dtype=np.float32)  # a sensor's grain
    image = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _natural_noise(height: int, width: int, generator: np.random.Generator) -> FloatArray:
    """Noise whose amplitude falls as 1/frequency, as in photos; RGB in [0, 1], shape (height, width, 3)."""
    size = 512  # a power of two is the Fourier transform's fastest size; the largest image fits into it
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]).astype(np.float32)
    frequency[0, 0] = np.inf
    planes = []
    for _ in range(2):
        white = generator.standard_normal((size, size), dtype=np.float32)
        plane = np.fft.irfft2(np.fft.rfft2(white) / frequency, s=(size, size))[:height, :width]
        planes.append((plane / plane.std()).astype(np.float32))
    tint = generator.normal(scale=0.06, size=3).astype(np.float32)  # colour varies less than brightness
    mean = np.float32(generator.uniform(0.35, 0.6))
    texture: npt.NDArray[np.floating] = mean + 0.17 * planes[0][..., None] + tint * planes[1][..., None]
    return texture


def _cell(coordinate: FloatArray) -> FloatArray:
    """Signed distance to the centre of the coordinate's cell, -0.5 to 0.5."""
    return coordinate - np.floor(coordinate) - 0.5


def _edge(distance: FloatArray) -> FloatArray:
    """1 where the distance is positive and 0 where it is negative, with a soft edge between."""
    return (0.5 + 20 * distance).clip(0, 1)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--classes",
    type=click.IntRange(2, len(PATTERNS)),
    default=4,
    show_default=True,
    help="Number of classes.",
)
@click.option(
    "--train-per-class",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Number of training images per class.",
)
@click.option(
    "--val-per-class",
    type=click.IntRange(min=1),
    default=25,
    show_default=True,
    help="Number of validation images per class.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="The same seed gives the same images.",
)
def main(out: Path, classes: int, train_per_class: int, val_per_class: int, seed: int) -> None:
    """Make class folders of JPEGs in OUT/train and OUT/val, as large as photos.

    OUT must not exist.
    """
    settings = DemoImages(classes=classes, train_per_class=train_per_class, val_per_class=val_per_class, seed=seed)
    try:
        num_bytes = make_demo_images(out, settings)
    except OSError as error:
        raise click.ClickException(str(error)) from error
    num_images = classes * (train_per_class + val_per_class)
    click.echo(
        f"{out}: {num_images} images in {classes} classes, {num_bytes / 1e6:.1f} MB, "
        f"{num_bytes / num_images / 1e3:.0f} kB each on average"
    )


if __name__ == "__main__":
    main()
