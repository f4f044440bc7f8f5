"""What an image file carries besides pixels, cleaned for one of another size. Pillow alone; no files."""

from __future__ import annotations

from PIL import Image

ORIENTATION = 274
_SUB_IFDS = (34665, 34853)  # Exif, GPS
_INTEROP = 40965
_PIXEL_SIDES = (40962, 40963)
# TIFF tags that say how the old file lay on disk, or place its pixels on a map: untrue of any other file.
_LAYOUT = [*range(254, 267), 273, ORIENTATION, *range(277, 282), *range(284, 294), 297, 301, *range(317, 326)]
_PRIVATE = [*range(330, 348), *range(512, 533), 700, 33723, 34377, 34675, 37724]
_MAPS = [33550, 33922, 34264, 34735, 34736, 34737]
_STRUCTURE = frozenset([*_LAYOUT, *_PRIVATE, *_MAPS, _INTEROP, *_SUB_IFDS])
_SPACES = {True: b"GRAY", False: b"RGB "}  # an ICC header's word for grey and for colour


def orientation(image: Image.Image) -> int:
    """The EXIF orientation 1..8 that is still to be applied; 1 when absent, odd or unreadable."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF raises anything; the pixels are as good without it
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def exif(image: Image.Image) -> tuple[bytes | None, tuple[str, ...]]:
    """EXIF bytes that fit the upright image at any size (or None), and what there is to tell about it."""
    clean = Image.Exif()
    try:
        found = image.getexif()
        for tag, value in found.items():
            if tag not in _STRUCTURE:
                clean[tag] = value
        for tag in _SUB_IFDS:
            inner = dict(found.get_ifd(tag))
            for side in _PIXEL_SIDES:
                inner.pop(side, None)
            if inner.pop(_INTEROP, None) is not None:
                inner[_INTEROP] = dict(found.get_ifd(_INTEROP))
            if inner:
                clean[tag] = inner
        return (clean.tobytes() if len(clean) else None), ()
    except Exception:  # as above
        return None, ("damaged EXIF dropped",)


def profile(image: Image.Image, grey: bool) -> tuple[bytes | None, tuple[str, ...]]:
    """The ICC profile if it is one for the RGB or grey pixels that we hand out, and what there is to tell."""
    data = image.info.get("icc_profile")
    if not data or image.mode in ("CMYK", "LAB"):  # done with: the pixels are converted
        return None, ()
    # ICC.1 section 7.2: size in bytes 0-3, colour space in 16-19, 'acsp' in 36-39.
    sound = isinstance(data, bytes) and len(data) >= 128 and data[36:40] == b"acsp"
    if sound and int.from_bytes(data[:4], "big") <= len(data) and data[16:20] == _SPACES[grey]:
        return data, ()
    return None, ("a colour profile that does not fit was dropped",)


def frames(image: Image.Image) -> tuple[str, ...]:
    """A note if the file holds more images than the one in hand. Asked last: counting moves the decoder."""
    try:
        count = getattr(image, "n_frames", 1)
    except Exception:  # a later frame is damaged; ours is whole
        count = 2
    return ("only the first of several images in the file",) if count > 1 else ()
