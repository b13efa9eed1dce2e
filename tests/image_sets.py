"""Small image folders whose pixels say which record they are."""

from pathlib import Path

import numpy as np
from PIL import Image

FIRST_GREY, GREY_STEP = 8, 10  # far enough apart to survive JPEG, resizing and float16
MAX_RECORDS = (255 - FIRST_GREY) // GREY_STEP + 1


def grey_of(record):
    """Grey level of every pixel of a record's image."""
    return FIRST_GREY + GREY_STEP * record


def record_of(grey):
    """The record whose image has about this grey level."""
    return round((float(grey) - FIRST_GREY) / GREY_STEP)


def size_of(record):
    """(height, width) of a record's image: all different, upright and lying ones."""
    return (40 + 3 * record, 70 + record) if record % 2 else (60 + record, 44 + 2 * record)


def make_image_folder(root, *, num_records=24, classes=("ant", "bee", "cat")):
    """Class folders of grey JPEGs; record i of the conversion has grey level ``grey_of(i)``."""
    assert num_records <= MAX_RECORDS
    root = Path(root)
    bounds = np.linspace(0, num_records, len(classes) + 1).astype(int)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for record in range(bounds[label], bounds[label + 1]):
            save_grey(root / name / f"{record:03}.jpg", record)
    return root


def save_grey(path, record):
    height, width = size_of(record)
    Image.fromarray(np.full((height, width, 3), grey_of(record), np.uint8)).save(path, quality=95)


def save_noise(path, *, seed, size=(50, 60), **options):
    """An image whose every pixel counts, for comparing pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def save_damaged(path):
    """An image whose header is right and whose pixels are damaged, so that it is noticed when decoding."""
    save_noise(path, seed=0, size=(60, 60), format="PNG")
    raw = bytearray(path.read_bytes())
    raw[2000:5000] = bytes(3000)
    path.write_bytes(raw)
