"""Image files in and out: the only room that opens or writes them. Host side, Pillow and numpy.

Shape legend: H height, W width. An image is a user's file; whatever is wrong with it becomes one
ImageError whose message is the reason alone, so that a caller can put the path before it.
"""

from __future__ import annotations

import io
import os
import stat
import threading
import uuid
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sr3_jax.errors import UserError
from sr3_jax.image_io import metadata
from sr3_jax.image_io.errors import reason, sniff
from sr3_jax.image_io.pixels import UnsupportedPixels, raw_mode, to_pixels

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_MAX_MEGAPIXELS = 200.0
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP")  # no others: Pillow would start Ghostscript for EPS
_WRITERS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
    "TIFF": {"compression": "tiff_adobe_deflate"},
}
_MAX_SIDE = {"JPEG": 65500, "WEBP": 16383}  # limits of the formats; libjpeg stops a little under 65535
_MAX_JPEG_EXIF = 65533  # bytes in one JPEG segment
SCRATCH_PREFIX = ".sr3-"  # of files that are being written
WRITABLE_SUFFIXES = frozenset(_WRITERS)
IMAGE_SUFFIXES = WRITABLE_SUFFIXES | {".gif", ".bmp"}

# Pillow warns of odd tags and of large images; both are judged here, and a progress bar must stay whole.
warnings.filterwarnings("ignore", module=r"PIL\.")
_BOMB_LIMIT = threading.Lock()


class ImageError(UserError):
    """An image that cannot be read or written; the message is the reason without the path."""


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """An image in memory, upright, with 8 bits a channel.

    rgb uint8 [H,W,3], three equal channels when `grey`; alpha uint8 [H,W] or None, 255 opaque. icc_profile
    and exif are bytes as files hold them, the exif without orientation. `notes` tell what reading changed.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    grey: bool = False
    icc_profile: bytes | None = None
    exif: bytes | None = None
    format: str = "PNG"
    notes: tuple[str, ...] = ()


def sniff_file(path: Path) -> str | None:
    """`sniff` of a regular file; None also for what cannot be opened."""
    try:
        if not path.is_file():  # a pipe would block
            return None
        with path.open("rb") as file:
            return sniff(file.read(32))
    except OSError:
        return None


def read_image(source: Path | bytes, *, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS) -> DecodedImage:
    """The image in a file or in bytes, turned upright by its EXIF orientation; an animation's first frame.

    Raises ImageError if it is not an image, is damaged or truncated, or has more than `max_megapixels`,
    which is judged from the header, before memory is taken.
    """
    with _opened(source, max_megapixels) as image:
        return _decode(image)


def from_pillow(image: Image.Image) -> DecodedImage:
    """A Pillow image of any mode as 8-bit arrays with its metadata. ImageError if its pixels cannot be shown."""
    try:
        return _decode(image)
    except UnsupportedPixels as error:
        raise ImageError(f"image {error}") from error


def to_pillow(image: DecodedImage) -> Image.Image:
    """A Pillow image in mode L, LA, RGB or RGBA, with the ICC profile and EXIF in its `info`."""
    result = Image.fromarray(_channels(image))
    result.info |= {
        name: value for name, value in (("icc_profile", image.icc_profile), ("exif", image.exif)) if value
    }
    return result


def with_pixels(image: DecodedImage, rgb: np.ndarray) -> DecodedImage:
    """`image` at another size: its metadata with the pixels `rgb` uint8 [H',W',3], its alpha resized to these."""
    height, width, _ = rgb.shape
    if image.grey:
        luma = np.asarray(Image.fromarray(rgb).convert("L"))  # BT.601
        rgb = np.broadcast_to(luma[..., None], rgb.shape)
    alpha = image.alpha
    if alpha is not None:
        alpha = np.asarray(Image.fromarray(alpha).resize((width, height), Image.Resampling.BICUBIC))
    return replace(image, rgb=rgb, alpha=alpha)


def _decode(image: Image.Image) -> DecodedImage:
    raw = raw_mode(image)
    image.load()
    pixels = to_pixels(image, raw)
    # After loading: Pillow itself rotates TIFFs then, and some PNGs keep their EXIF after the pixels.
    turn = metadata.orientation(image)
    exif, exif_notes = metadata.exif(image)
    profile, profile_notes = metadata.profile(image, pixels.grey)
    file_format = image.format or ""
    return DecodedImage(
        rgb=_upright(pixels.rgb, turn),
        alpha=None if pixels.alpha is None else _upright(pixels.alpha, turn),
        grey=pixels.grey,
        icc_profile=profile,
        exif=exif,
        format="JPEG" if file_format == "MPO" else file_format,
        notes=(*pixels.notes, *exif_notes, *profile_notes, *metadata.frames(image)),
    )


def _channels(image: DecodedImage) -> np.ndarray:
    """uint8 [H,W] for a gray image without alpha, else [H,W,2..4]."""
    channels = [image.rgb[..., :1] if image.grey else image.rgb]
    if image.alpha is not None:
        channels.append(image.alpha[..., None])
    pixels = np.concatenate(channels, axis=-1) if len(channels) > 1 else channels[0]
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def read_rgb(source: Path | bytes, *, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS) -> np.ndarray:
    """`read_image`'s colours alone: uint8 [H,W,3]."""
    return read_image(source, max_megapixels=max_megapixels).rgb


def read_size(source: Path | bytes, *, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS) -> tuple[int, int]:
    """(height, width) of the upright image, from the header alone: the pixels may still prove damaged."""
    with _opened(source, max_megapixels) as image:
        width, height = image.size
        # Where Pillow turns a TIFF on loading, its size is already that of the turned image.
        turned = metadata.orientation(image) >= 5 and image.format != "TIFF"
        return (width, height) if turned else (height, width)


@contextmanager
def _opened(source: Path | bytes, max_megapixels: float) -> Iterator[Image.Image]:
    """The Pillow image behind `source`, its header checked; every failure inside becomes a ImageError."""
    head = b""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else _open_regular(source) as file:
            head = file.read(32)
            file.seek(0)
            if not head:
                raise ImageError("is empty")
            with _open_header(file, max_megapixels) as image:
                width, height = image.size
                if width < 1 or height < 1:
                    raise ImageError("has no pixels")
                if width * height > max_megapixels * 1e6:
                    raise ImageError(
                        f"is {width}x{height} pixels, over the limit of {max_megapixels:g} megapixels"
                    )
                yield image
    except ImageError:
        raise
    except UnsupportedPixels as error:
        raise ImageError(str(error)) from error
    except Exception as error:  # decoders raise whatever broken bytes make of them: struct.error, KeyError
        raise ImageError(reason(error, head=head, max_megapixels=max_megapixels)) from error


def _open_regular(path: Path) -> IO[bytes]:
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise ImageError("is a folder")
    if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
        raise ImageError("is not a regular file")
    return Path(path).open("rb")


def _open_header(file: IO[bytes], max_megapixels: float) -> Image.Image:
    # Pillow's own limit is one number for the process. It guards the tiles of a TIFF too, which may be larger
    # than the image; it is raised or lowered to ours while a header is parsed, and others keep theirs.
    with _BOMB_LIMIT:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max(1, int(max_megapixels * 1e6))
        try:
            return Image.open(file, formats=_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _upright(array: np.ndarray, turn: int) -> np.ndarray:
    """`array` [H,W,...] as EXIF orientation `turn` (1..8) says that it is to be looked at."""
    if turn >= 5:
        array = array.swapaxes(0, 1)
    if turn in (3, 4, 7, 8):
        array = array[::-1]
    if turn in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def require_writable(path: Path, *, height: int, width: int, alpha: bool) -> None:
    """ImageError if a file of this name cannot hold such an image. Cheap: ask before hours of work."""
    kind = _WRITERS.get(path.suffix.lower())
    if kind is None:
        raise ImageError(f"cannot be written as '{path.suffix}': name it .png, .jpg, .webp or .tif")
    if alpha and kind == "JPEG":
        raise ImageError("has transparency, which JPEG cannot hold: name the output .png")
    if max(height, width) > _MAX_SIDE.get(kind, 2**31 - 1):
        raise ImageError(f"would be {width}x{height} pixels, more than {kind} can hold: name the output .png")


def write_image(path: Path, image: DecodedImage, *, durable: bool = True) -> None:
    """Write `image` in the format of the suffix: JPEG at quality 95 in full chroma, the others exactly.

    Whole or not at all: the bytes go to a hidden file beside `path`, which then takes its name. The folder
    must exist. Not `durable`, a power cut may leave a damaged file, and writing is ten times as fast for small ones:
    for those who check what they read. Raises ImageError.
    """
    path = Path(path)
    height, width = image.rgb.shape[:2]
    require_writable(path, height=height, width=width, alpha=image.alpha is not None)
    kind = _WRITERS[path.suffix.lower()]
    options = dict(_SAVE_OPTIONS[kind])
    if image.icc_profile:
        options["icc_profile"] = image.icc_profile
    if image.exif and not (kind == "JPEG" and len(image.exif) > _MAX_JPEG_EXIF):
        options["exif"] = image.exif
        if kind == "TIFF":
            options["compression"] = "raw"  # Pillow fails to write EXIF through libtiff, which compresses
    # Its name is not made from the target's, which may be as long as names can be.
    scratch = path.parent / f"{SCRATCH_PREFIX}{uuid.uuid4().hex}.tmp"
    try:
        with scratch.open("xb") as file:
            Image.fromarray(_channels(image)).save(file, format=kind, **options)
            file.flush()
            if durable:
                os.fsync(file.fileno())  # else a power cut could leave the name without the bytes
        os.replace(scratch, path)
    except Exception as error:
        raise ImageError(f"could not be written: {reason(error)}") from error
    finally:
        scratch.unlink(missing_ok=True)
