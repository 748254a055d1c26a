"""Picture files to arrays and back: RGB on white, fitted into a square, hashed by what they show."""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from btm.errors import DataError
from btm.files import write_atomic

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
"""File formats that are opened; those that would start another program (EPS) are not among them."""
_WHITE = (255, 255, 255)


def load_picture(path: Path | str) -> np.ndarray:
    """Read a picture file; of an animation the first frame, of a transparent one what it looks like on white.

    Returns:
        uint8 ``(height, width, 3)``.

    Raises:
        DataError: If the file is missing, damaged, of another format or unreasonably large.
    """
    from PIL import Image, ImageOps

    try:
        # A pipe or a device would be read for ever.
        if Path(path).exists() and not Path(path).is_file():
            raise OSError("it is not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                upright = ImageOps.exif_transpose(file)
                if "A" in upright.getbands() or "transparency" in upright.info:
                    coloured = upright.convert("RGBA")
                    upright = Image.new("RGBA", coloured.size, (*_WHITE, 255))
                    upright.alpha_composite(coloured)
                return np.array(_eight_bit(upright).convert("RGB"))
    # The library raises many kinds of error for damaged files; all of them mean that the picture cannot be used.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} is no picture that can be read ({reason}); known are {', '.join(FORMATS)}") from None


def fit_square(picture: np.ndarray, size: int) -> np.ndarray:
    """Scale a picture to fit a white square of ``size`` pixels, centred, so that nothing of it is lost.

    Args:
        picture: uint8 ``(height, width, 3)``.
        size: Side in pixels.

    Returns:
        uint8 ``(size, size, 3)``; the picture itself where it has this size.
    """
    height, width = picture.shape[:2]
    if (height, width) == (size, size):
        return picture
    from PIL import Image

    scale = size / max(height, width)
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    square = np.full((size, size, 3), 255, dtype=np.uint8)
    top, left = (size - small[1]) // 2, (size - small[0]) // 2
    resized = np.asarray(Image.fromarray(picture).resize(small, Image.Resampling.LANCZOS))
    square[top : top + small[1], left : left + small[0]] = resized
    return square


def picture_hash(picture: np.ndarray) -> str:
    """128-bit hash of size and pixels as 32 hexadecimal digits: the same for the same picture in any file."""
    digest = xxhash.xxh3_128(repr(picture.shape).encode())
    digest.update(np.ascontiguousarray(picture).data)
    return digest.hexdigest()


def save_png(picture: np.ndarray, path: Path) -> None:
    """Write uint8 ``(height, width, 3)`` as a PNG file, atomically."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="PNG")
    write_atomic(path, content.getvalue())


def _eight_bit(image: "Image.Image") -> "Image.Image":
    """16-bit grey levels as 8-bit ones; pillow's own conversion clips them."""
    from PIL import Image

    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image
