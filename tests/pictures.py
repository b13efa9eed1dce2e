"""Made pictures with the statistics of photos, and the kinds of file they come in."""

import io

import numpy as np
from PIL import Image, ImageDraw


def picture(seed):
    """Smooth colours, sharp edges and some noise, in the statistics of a photo; uint8 of shape (h, w, 3)."""
    random = np.random.default_rng(seed)
    height, width = random.integers(150, 420, 2)
    y, x = np.mgrid[0:height, 0:width]
    waves = random.uniform(0.005, 0.08, (3, 2)) @ np.stack([x.ravel(), y.ravel()]) + random.uniform(0, 6, (3, 1))
    image = Image.fromarray((127 + 100 * np.sin(waves)).T.reshape(height, width, 3).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for left, top, across, down, *color in random.integers(0, (width, height, 90, 90, 256, 256, 256), (12, 7)):
        draw.ellipse([left, top, left + across, top + down], fill=tuple(color))
    return np.clip(np.asarray(image) + random.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


def as_file(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


ORIENTED = Image.Exif()
ORIENTED[0x0112] = 6  # turned by 90 degrees; both leave it as it is stored

KINDS = {
    "plain jpeg": lambda image: as_file(image, "JPEG", quality=90),
    "grey jpeg": lambda image: as_file(image.convert("L"), "JPEG"),
    "progressive jpeg": lambda image: as_file(image, "JPEG", progressive=True),
    "cmyk jpeg": lambda image: as_file(image.convert("CMYK"), "JPEG"),
    "jpeg with exif orientation": lambda image: as_file(image, "JPEG", exif=ORIENTED),
    "png": lambda image: as_file(image, "PNG"),
    "png with alpha": lambda image: as_file(image.convert("RGBA"), "PNG"),
    "png with a palette": lambda image: as_file(image.convert("P"), "PNG"),
    "png of one bit": lambda image: as_file(image.convert("1"), "PNG"),
    "bmp": lambda image: as_file(image, "BMP"),
    "webp": lambda image: as_file(image, "WEBP"),
    "tiff": lambda image: as_file(image, "TIFF"),
    "ppm": lambda image: as_file(image, "PPM"),
}
"""Encoders of an image, by kind of file."""
