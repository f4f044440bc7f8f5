"""The pixels of a Pillow image of any mode as 8-bit arrays.

Pillow's own conversions clip pixels of more than 8 bits (65535 and 256 both become 255) and lose the gray level that
means transparent, so gray, 16-bit and float modes are converted here. Shape legend: H height, W width.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
_DEEP_NOTE = "16 bits per channel reduced to 8"


class UnsupportedPixels(ValueError):
    """Pixels that have no meaning as an 8-bit image; the message is the reason, without the path."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """8-bit pixels: rgb [H,W,3] (equal channels if gray), alpha [H,W] or None, and notes about the conversion."""

    rgb: np.ndarray
    alpha: np.ndarray | None
    gray: bool
    notes: tuple[str, ...]


def raw_mode(image: Image.Image) -> str:
    """Pillow's name for the pixel packing in the file ('RGB;16B', 'LA;16B', 'L;2', ...); '' if unknown.

    Call it before `load`, which discards it.
    """
    for tile in getattr(image, "tile", ()):
        args = tile[3]
        name = args[0] if isinstance(args, tuple) and args else args
        if isinstance(name, str):
            return name
    return ""


def to_pixels(image: Image.Image, raw: str) -> Pixels:
    """Convert a loaded image to 8-bit arrays.

    Args:
        raw: its `raw_mode`, from before loading.

    Raises:
        UnsupportedPixels: the values have no meaning as an 8-bit image. Pillow's own exceptions pass through.
    """
    mode = image.mode
    if mode == "I" or mode == "F" or mode.startswith("I;16"):
        return _deep_gray(image)
    deep = image.format in ("PNG", "TIFF") and ";16" in raw  # Pillow has already taken the high bytes
    notes = (_DEEP_NOTE,) if deep else ()
    if mode in ("1", "L"):
        level = np.asarray(image.convert("L"))
        return Pixels(_to_rgb(level), _alpha_of_key(level, image, raw), True, notes)
    if mode in ("LA", "La") or raw.split(";")[0] == "LA":  # Pillow opens 16-bit LA as RGBA
        both = np.asarray(image.convert("LA" if mode != "La" else "RGBA"))
        return Pixels(_to_rgb(both[..., 0]), both[..., -1].copy(), True, notes)
    if mode in ("CMYK", "LAB"):
        rgb, note = _by_profile(image)
        return Pixels(rgb, None, False, (*notes, note))
    if mode == "RGB" and isinstance(image.info.get("transparency"), tuple):
        rgb = np.array(image)
        key = np.asarray(image.info["transparency"][:3], np.int64) >> (8 if deep else 0)
        alpha = np.where((rgb == key).all(axis=-1), 0, 255).astype(np.uint8)
        return Pixels(rgb, alpha, False, notes)
    if image.has_transparency_data:
        both = np.asarray(image.convert("RGBA"))
        return Pixels(np.ascontiguousarray(both[..., :3]), both[..., 3].copy(), False, notes)
    return Pixels(np.array(image.convert("RGB")), None, False, notes)


def _to_rgb(level: np.ndarray) -> np.ndarray:
    return np.repeat(level[..., None], 3, axis=-1)  # [H,W,3]


def _alpha_of_key(level: np.ndarray, image: Image.Image, raw: str) -> np.ndarray | None:
    """Alpha [H,W] of a gray image in which one level means transparent (PNG's tRNS), else None."""
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return None
    # The key is in the file's levels (except for 1 bit in a recent Pillow), the pixels are in 8 bits.
    key *= {"1": 255, "L;2": 85, "L;4": 17}.get(raw, 1)
    return np.where(level == min(key, 255), 0, 255).astype(np.uint8)


def _deep_gray(image: Image.Image) -> Pixels:
    """Convert gray pixels of more than 8 bits, scaled so that the white level becomes 255.

    White is 2^bits - 1 for integers of known depth; 65535 for 32-bit integers up to that; 1 for floats in [0,1] and 255
    for floats in [0,255]. For anything else white is unknown, and the range of values is stretched to [0,255].
    """
    values = np.asarray(image).astype(np.float64)  # [H,W]
    if not np.isfinite(values).all():
        raise UnsupportedPixels("has pixels that are not finite numbers")
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))
    bits = bits[0] if isinstance(bits, tuple) else bits
    least, greatest = float(values.min()), float(values.max())
    black, alpha = 0.0, None
    if image.mode.startswith("I;16"):
        white, note = float(2 ** min(int(bits), 16) - 1), _DEEP_NOTE
        key = image.info.get("transparency")
        if isinstance(key, int):
            alpha = np.where(values == key, 0, 255).astype(np.uint8)
    elif least >= 0 and image.mode == "I" and greatest <= 65535:
        white, note = 65535.0, _DEEP_NOTE
    elif least >= 0 and image.mode == "F" and greatest <= 255:
        white, note = (1.0 if greatest <= 1 else 255.0), "floating-point pixels rounded to 8 bits"
    else:
        black, white = least, greatest
        note = f"values {least:g} to {greatest:g} stretched to 8 bits"
    unit = (values - black) / ((white - black) or 1.0)
    if tags.get(_PHOTOMETRIC) == 0:  # TIFF's white-is-zero, which Pillow inverts for 8 bits only
        unit = 1.0 - unit
    level = np.rint(np.clip(unit, 0.0, 1.0) * 255.0).astype(np.uint8)
    return Pixels(_to_rgb(level), alpha, True, (note,))


def _by_profile(image: Image.Image) -> tuple[np.ndarray, str]:
    """CMYK or Lab to RGB [H,W,3], and a note: CMYK by the image's own color profile if it has a usable one."""
    try:
        profile = image.info.get("icc_profile") or b""
        source = ImageCms.createProfile("LAB") if image.mode == "LAB" else io.BytesIO(profile)
        target = ImageCms.createProfile("sRGB")
        rgb = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
        return np.array(rgb), f"{image.mode} converted to RGB by its color profile"
    except (ImportError, OSError, ValueError, TypeError, ImageCms.PyCMSError):
        pass  # no profile, a broken one, or one that is not for CMYK
    try:
        return np.array(image.convert("RGB")), f"{image.mode} converted to RGB"
    except ValueError as error:
        raise UnsupportedPixels(f"has {image.mode} colors, which cannot be converted to RGB") from error


def fill_transparent(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Replace the hidden colors of fully transparent pixels by those of the visible pixels around them.

    Resampling mixes colors across the edge of an object, so black under alpha 0 would become a dark fringe. Colors
    spread outward from coarse to fine averages ("push-pull"); visible pixels keep theirs.

    Args:
        rgb: uint8 [H,W,3].
        alpha: uint8 [H,W].
    """
    visible = alpha > 0
    if visible.all() or not visible.any():
        return rgb
    colors, weights = [rgb * visible[..., None].astype(np.float32)], [visible.astype(np.float32)[..., None]]
    while max(weights[-1].shape[:2]) > 1:  # push: sums over 2x2 pixels, and how many of them are visible
        colors.append(_halve(colors[-1]))
        weights.append(_halve(weights[-1]))
    filled = colors[-1] / weights[-1]
    # Pull: fill each level from the next coarser one.
    for color, weight in zip(colors[-2::-1], weights[-2::-1], strict=True):
        height, width = weight.shape[:2]
        coarse = filled.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
        filled = np.where(weight > 0, color / np.maximum(weight, 1.0), coarse)
    return np.where(visible[..., None], rgb, np.rint(filled).astype(np.uint8))


def _halve(x: np.ndarray) -> np.ndarray:
    """[H,W,C] -> [ceil(H/2),ceil(W/2),C]: the sum of each 2x2 square."""
    x = np.pad(x, ((0, x.shape[0] % 2), (0, x.shape[1] % 2), (0, 0)))
    return x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]
