"""Grey pictures of more than 8 bits a pixel: 16-bit PNG, TIFF of floats. Imported where one is met."""

from collections.abc import Callable

import numpy as np
from PIL import Image


def eight_bits(image: Image.Image, tell: Callable[[str], None]) -> Image.Image:
    """To 8 bits, where PIL would clip. 16-bit values keep their high byte; other ranges are stretched."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not numbers")
    low, high = values.min(), values.max()
    if image.mode != "F" and low >= 0 and high < 2**16:
        if 2**8 <= high < 2**12:
            tell(f"its 16-bit values end at {high:.0f}, so it is nearly black; if they have 12 bits, multiply by 16")
        return Image.fromarray((values // 256).astype(np.uint8))
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    tell(f"its values are read as {low:g} (black) to {high:g} (white)")
    return Image.fromarray(((values - low) / (high - low) * 255).round().astype(np.uint8))
