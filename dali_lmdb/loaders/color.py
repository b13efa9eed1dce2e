"""The colour jitter of both loaders on the CPU: DALI's ``color_twist``, one linear map of each pixel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["color_maps"]

# From RGB to YIQ, NTSC 1953, rounded as in DALI's color_twist (color_twist.h, Rgb2Yiq).
_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)

Reals = npt.NDArray[np.float32]


def color_maps(*, hue: Reals, saturation: Reals, brightness: Reals, contrast: Reals) -> tuple[Reals, Reals]:
    """Saturation and hue in YIQ, contrast about 128, then brightness, for n images.

    Args:
        hue, saturation, brightness, contrast: of ``Augmentation``, each of shape (n,).

    Returns:
        (matrices, offsets): float32 of shape (n, 3, 3) and (n,). A pixel RGB from 0 to 255 becomes
        ``matrix @ pixel + offset``, rounded and clipped to 0..255.
    """
    angles = np.deg2rad(hue.astype(np.float64))
    cos, sin = saturation * np.cos(angles), saturation * np.sin(angles)
    turns = np.zeros((len(hue), 3, 3))
    turns[:, 0, 0] = 1
    turns[:, 1, 1], turns[:, 1, 2] = cos, sin
    turns[:, 2, 1], turns[:, 2, 2] = -sin, cos
    factors = (brightness.astype(np.float64) * contrast)[:, None, None]
    matrices = factors * (_YIQ_TO_RGB @ turns @ _RGB_TO_YIQ)
    offsets = brightness.astype(np.float64) * 128 * (1 - contrast.astype(np.float64))
    return matrices.astype(np.float32), offsets.astype(np.float32)
