"""Pictures of many images, with text below each."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from dali_lmdb.images.opening import BadImageError, open_image, to_rgb

__all__ = ["draw_grid"]

_CELL = 232  # as wide as the names of ImageNet's validation images
_LINE = 14
_GAP = 8
_NUM_COLUMNS = 5
_FONT_SIZE = 11


def draw_grid(cells: Sequence[tuple[bytes, Sequence[str]]]) -> bytes:
    """Draw images in rows of five, each with its lines of text, which are cut to its width.

    Args:
        cells: the image files, which fit the limits of a store, and their lines.

    Returns:
        A PNG; a small empty one without cells.
    """
    num_lines = max((len(lines) for _, lines in cells), default=0)
    height = _CELL + num_lines * _LINE + _GAP
    num_columns = min(_NUM_COLUMNS, max(1, len(cells)))
    num_rows = max(1, -(-len(cells) // _NUM_COLUMNS))
    picture = Image.new("RGB", (num_columns * (_CELL + _GAP) + _GAP, num_rows * height + _GAP), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT_SIZE)
    for number, (data, lines) in enumerate(cells):
        left = _GAP + number % _NUM_COLUMNS * (_CELL + _GAP)
        top = _GAP + number // _NUM_COLUMNS * height
        image = _thumbnail(data)
        picture.paste(image, (left + (_CELL - image.width) // 2, top + (_CELL - image.height) // 2))
        for place, line in enumerate(lines):
            draw.text((left, top + _CELL + place * _LINE), _fit(line, font), fill="black", font=font)
    output = io.BytesIO()
    picture.save(output, "PNG")
    return output.getvalue()


def _thumbnail(data: bytes) -> Image.Image:
    try:
        image = to_rgb(open_image(data, max_pixels=None))
    except BadImageError:
        return Image.new("RGB", (_CELL, _CELL), "grey")
    image.thumbnail((_CELL, _CELL))
    return image


def _fit(line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The line, or its beginning and end where it is too long."""
    shown = line.encode("ascii", "replace").decode() if isinstance(font, ImageFont.ImageFont) else line
    keep = len(shown)
    text = shown
    while font.getlength(text) > _CELL and keep > 2:
        keep -= 1
        text = f"{shown[: keep // 2]}…{shown[-(keep - keep // 2) :]}"
    return text
