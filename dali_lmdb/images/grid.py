"""Pictures of many images, with text below each."""

from __future__ import annotations

import io
import textwrap
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from dali_lmdb.images.opening import BadImageError, open_image, to_rgb

__all__ = ["Cell", "draw_grid", "enlarged"]

_CELL = 232  # as wide as the names of ImageNet's validation images
_LINE = 14
_GAP = 8
_NUM_COLUMNS = 5
_FONT_SIZE = 11
_TEXT_WIDTH = 34  # characters that fit a cell at this size


Cell = bytes | npt.NDArray[np.uint8] | str
"""What a cell shows: an image file, which fits the limits of a store; pixels, uint8 of shape (height, width, 3);
or a text, in place of an image."""


def draw_grid(cells: Sequence[tuple[Cell, Sequence[str]]], *, num_columns: int = _NUM_COLUMNS) -> bytes:
    """Draw images in rows, each with its lines of text, which are cut to its width.

    Image files are shrunk to a cell; pixels are shown as they are, in cells as large as the largest of them.

    Args:
        cells: what each shows, and its lines.

    Returns:
        A PNG; a small empty one without cells.
    """
    num_lines = max((len(lines) for _, lines in cells), default=0)
    side = max(_CELL, *(max(shown.shape) for shown, _ in cells if isinstance(shown, np.ndarray)), 0)
    height = side + num_lines * _LINE + _GAP
    num_columns = min(num_columns, max(1, len(cells)))
    num_rows = max(1, -(-len(cells) // num_columns))
    picture = Image.new("RGB", (num_columns * (side + _GAP) + _GAP, num_rows * height + _GAP), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT_SIZE)
    for number, (shown, lines) in enumerate(cells):
        left = _GAP + number % num_columns * (side + _GAP)
        top = _GAP + number // num_columns * height
        image = _image(shown, side)
        x, y = left + (side - image.width) // 2, top + (side - image.height) // 2
        draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline="lightgrey")
        picture.paste(image, (x, y))
        if isinstance(shown, str):
            draw.text((left + _GAP, top + _GAP), textwrap.fill(shown, _TEXT_WIDTH), fill="black", font=font)
        for place, line in enumerate(lines):
            draw.text((left, top + side + place * _LINE), _fit(line, font, side), fill="black", font=font)
    output = io.BytesIO()
    picture.save(output, "PNG")
    return output.getvalue()


def enlarged(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Small pixels enlarged by the largest whole factor with which they fit a usual cell; others as they are."""
    factor = max(1, _CELL // max(pixels.shape))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def _image(shown: Cell, side: int) -> Image.Image:
    if isinstance(shown, np.ndarray):
        return Image.fromarray(shown)
    if isinstance(shown, str):
        return Image.new("RGB", (side, side), "lightgrey")
    try:
        image = to_rgb(open_image(shown, max_pixels=None))
    except BadImageError:
        return Image.new("RGB", (side, side), "grey")
    image.thumbnail((side, side))
    return image


def _fit(line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """The line, or its beginning and end where it is too long; letters without accents, and ? for others."""
    shown = "".join(char for char in unicodedata.normalize("NFKD", line) if not unicodedata.combining(char))
    shown = shown.encode("ascii", "replace").decode()  # Pillow's font has no other letters
    keep = len(shown)
    text = shown
    while font.getlength(text) > width and keep > 2:
        keep -= 1
        text = f"{shown[: keep // 2]}…{shown[-(keep - keep // 2) :]}"
    return text
