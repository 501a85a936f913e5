"""Small pictures inside a page. May import: PIL, markupsafe."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Pixels of the longer side, more than they are shown with.
_SIDE = 96


def data_uri(pixels: NDArray[Any]) -> str:
    """An image, uint8 (H, W, 3), as the address that is its content."""
    from PIL import Image
    from PIL.Image import Resampling

    image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8))
    image.thumbnail((_SIDE, _SIDE), Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
