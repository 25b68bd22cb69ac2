"""Pictures of items: decoding with bounds on their size, and the noise picture that stands for a missing one."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import struct
import zlib
from collections import Counter

import numpy as np
from PIL import Image, ImageOps

from sda_fast.data.errors import WARNING_MEANINGS
from sda_fast.data.items import Item

logger = logging.getLogger(__name__)

NOISE_SIDE = 224
MAX_SOURCE_PIXELS = 80_000_000
MAX_ASPECT_RATIO = 100
_NOT_THERE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_UNDECODABLE = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    EOFError,
    LookupError,
    AttributeError,
    RuntimeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def load_image(
    item: Item,
    *,
    min_pixels: int = 20 * 20,
    max_pixels: int = 256 * 256,
    seed: int = 0,
    warnings: Counter[str] | None = None,
) -> tuple[Image.Image, bool]:
    """The item's picture, or a noise picture where it is missing or broken.

    The picture is turned upright by its EXIF orientation, put on white where transparent, reduced to its first frame
    where animated, converted to RGB, and scaled with its aspect ratio kept so that width x height lies between the
    bounds (DESIGN.md section 2: between 20x20 and 256x256 pixels). Sides differing by more than 1:100 are brought to
    1:100, which the image processors need.

    Args:
        min_pixels, max_pixels: bounds on width x height.
        seed: of the noise picture.
        warnings: where given, counts missing_image, image_not_found, broken_image and oversized_image.

    Returns:
        (RGB picture, whether it is noise).

    Raises:
        ValueError: the bounds are not 1 <= min_pixels <= max_pixels.
        OSError: the file is there but cannot be read (permission, input/output error).
    """
    if not 1 <= min_pixels <= max_pixels:
        raise ValueError(f"expected 1 <= min_pixels <= max_pixels, got {min_pixels} and {max_pixels}")
    fault, reason = "missing_image", "no image given"
    if item.image is not None:
        try:
            return _decode(item.image.read_bytes(), min_pixels, max_pixels), False
        except _NOT_THERE as error:
            fault, reason = "image_not_found", str(error)
        except _OversizedError as error:
            fault, reason = "oversized_image", f"{item.image}: {error}"
        except _BrokenError as error:
            fault, reason = "broken_image", f"{item.image}: {error}"
    if warnings is not None:
        warnings[fault] += 1
    level = logging.DEBUG if fault == "missing_image" else logging.WARNING
    logger.log(level, "item %s: %s (%s). %s", item.item_id, fault, reason, WARNING_MEANINGS[fault])
    return _bound_size(noise_image(item.item_id, seed), min_pixels, max_pixels), True


def noise_image(item_id: str, seed: int = 0) -> Image.Image:
    """Uniform RGB noise, 224 x 224, the bytes of SHAKE-256 over "seed:item_id": the same on every machine."""
    size = NOISE_SIDE * NOISE_SIDE * 3
    return Image.frombytes(
        "RGB", (NOISE_SIDE, NOISE_SIDE), hashlib.shake_256(f"{seed}:{item_id}".encode()).digest(size)
    )


def bounded_size(width: int, height: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) scaled to an area between the bounds, aspect ratio kept to rounding and to at most 1:100."""
    aspect = min(max(width / height, 1 / MAX_ASPECT_RATIO), MAX_ASPECT_RATIO)
    area = min(max(width * height, min_pixels), max_pixels)
    if area == width * height and aspect == width / height:
        return width, height
    exact_width, exact_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
    rounding = math.ceil if area == min_pixels else math.floor
    return max(1, rounding(round(exact_width, 6))), max(1, rounding(round(exact_height, 6)))


class _BrokenError(Exception):
    pass


class _OversizedError(Exception):
    pass


def _decode(content: bytes, min_pixels: int, max_pixels: int) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            if width * height > MAX_SOURCE_PIXELS:
                raise _OversizedError(f"{width} x {height} pixels, the limit is {MAX_SOURCE_PIXELS}")
            target = bounded_size(width, height, min_pixels, max_pixels)
            image.draft("RGB", (2 * target[0], 2 * target[1]))
            image.load()
            return _bound_size(_to_rgb(ImageOps.exif_transpose(image)), min_pixels, max_pixels)
    except Image.DecompressionBombError as error:
        raise _OversizedError(str(error)) from error
    except _UNDECODABLE as error:
        raise _BrokenError(f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # convert("RGB") would clip everything above 255 to white.
        values = np.asarray(image).astype(np.float64)
        if values.size and np.max(values) > 255:
            values /= 257.0
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        transparent = image.convert("RGBA")
        white = Image.new("RGBA", transparent.size, "white")
        return Image.alpha_composite(white, transparent).convert("RGB")
    return image.convert("RGB")


def _bound_size(image: Image.Image, min_pixels: int, max_pixels: int) -> Image.Image:
    size = bounded_size(image.width, image.height, min_pixels, max_pixels)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
