"""Names of image files."""

from __future__ import annotations

__all__ = ["IMAGE_EXTENSIONS", "is_image_name"]

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""torchvision.datasets.folder.IMG_EXTENSIONS."""


def is_image_name(name: str) -> bool:
    """Whether ``ImageFolder`` would take a file of this name."""
    return name.lower().endswith(IMAGE_EXTENSIONS)
