"""EXIF data and ICC profiles of a Pillow image, cleaned so that they fit the image at another size."""

from __future__ import annotations

from PIL import Image

ORIENTATION = 274
_SUB_IFDS = (34665, 34853)  # Exif, GPS
_INTEROP = 40965
_PIXEL_SIDES = (40962, 40963)
# TIFF tags that describe the layout of the file on disk or the map coordinates of its pixels: wrong for a new file.
_LAYOUT = [*range(254, 267), 273, ORIENTATION, *range(277, 282), *range(284, 294), 297, 301, *range(317, 326)]
_PRIVATE = [*range(330, 348), *range(512, 533), 700, 33723, 34377, 34675, 37724]
_MAPS = [33550, 33922, 34264, 34735, 34736, 34737]
_STRUCTURE = frozenset([*_LAYOUT, *_PRIVATE, *_MAPS, _INTEROP, *_SUB_IFDS])
_COLOR_SPACES = {True: b"GRAY", False: b"RGB "}  # in the header of an ICC profile, by `gray`


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, that is still to be applied; 1 if it is missing, invalid or unreadable."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF data raises anything, and the pixels are fine without it
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def exif(image: Image.Image) -> tuple[bytes | None, tuple[str, ...]]:
    """EXIF bytes that fit the upright image at any size, or None; and notes for the user."""
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
        return None, ("damaged EXIF data was dropped",)


def profile(image: Image.Image, gray: bool) -> tuple[bytes | None, tuple[str, ...]]:
    """The ICC profile if it fits RGB (or gray) pixels, else None; and notes for the user."""
    data = image.info.get("icc_profile")
    if not data or image.mode in ("CMYK", "LAB"):  # these were converted by the profile
        return None, ()
    # ICC.1 section 7.2: size in bytes 0-3, color space in 16-19, 'acsp' in 36-39.
    valid = isinstance(data, bytes) and len(data) >= 128 and data[36:40] == b"acsp"
    if valid and int.from_bytes(data[:4], "big") <= len(data) and data[16:20] == _COLOR_SPACES[gray]:
        return data, ()
    return None, ("a color profile that does not match the pixels was dropped",)


def frames(image: Image.Image) -> tuple[str, ...]:
    """A note if the file holds several images. Call it last: counting moves the decoder to another frame."""
    try:
        count = getattr(image, "n_frames", 1)
    except Exception:  # a later frame is damaged; the first one is not
        count = 2
    return ("only the first image of the file was read",) if count > 1 else ()
