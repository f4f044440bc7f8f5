"""Metadata of image files: read from a Pillow image, cleaned so that it fits the image at another size, and written.

The resolution is kept as it is: a scan at 300 dpi stays at 300 dpi, so that it prints larger, not finer. Pixels are
upright, so orientations are removed from EXIF data and reset in XMP; sizes in pixels are removed from both.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, PngImagePlugin

ORIENTATION = 274
_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 282, 283, 296
_XMP, _IPTC, _PHOTOSHOP = 700, 33723, 34377  # TIFF tags
_IPTC_RESOURCE = 0x0404  # in Photoshop's image resources
SUB_IFDS = (34665, 34853)  # Exif, GPS
INTEROP = 40965
_PIXEL_SIDES = (40962, 40963)
# TIFF tags that describe the layout of the file on disk or the map coordinates of its pixels: wrong for a new file.
_LAYOUT = [*range(254, 267), 273, ORIENTATION, *range(277, 282), *range(284, 294), 297, 301, *range(317, 326)]
_PRIVATE = [*range(330, 348), *range(512, 533), _XMP, _IPTC, _PHOTOSHOP, 34675, 37724]
_MAPS = [33550, 33922, 34264, 34735, 34736, 34737]
_STRUCTURE = frozenset([*_LAYOUT, *_PRIVATE, *_MAPS, INTEROP, *SUB_IFDS])
_COLOR_SPACES = {True: b"GRAY", False: b"RGB "}  # in the header of an ICC profile, by `gray`

LARGEST = (
    4 * 2**20
)  # bytes of the XMP, of the IPTC data, or of all texts; cameras and editors write kilobytes
_LARGEST_COMPRESSED = (
    2**20
)  # bytes of a compressed chunk that Pillow accepts; larger ones fail the whole image
_JPEG_SEGMENT = 65533  # bytes
_COMMENT = "Comment"  # the keyword of PNG, and the only text of a JPEG
_NAMES = {"xmp": "XMP", "iptc": "IPTC data", "text": "texts"}
_XMP_TURN = re.compile(rb"""(tiff:Orientation\s*(?:=\s*["']|>)\s*)\d+""")
_XMP_STALE = rb"(?:tiff:Image(?:Width|Length)|exif:Pixel[XY]Dimension|xmpNote:HasExtendedXMP)"
_XMP_REMOVED = re.compile(rb"""\s%b\s*=\s*(?:"[^"]*"|'[^']*')|<(%b)>[^<]*</\1>""" % (_XMP_STALE, _XMP_STALE))


@dataclass(frozen=True)
class Metadata:
    """What a file says about its pixels.

    Attributes:
        icc_profile: the color profile, as stored in files.
        exif: EXIF data without the orientation, as stored in files.
        xmp: an XMP packet in UTF-8, with orientation 1 if it has one.
        iptc: IPTC-IIM data.
        text: keywords and texts of a PNG; a comment of another format has the keyword 'Comment'.
        dpi: horizontal and vertical resolution, in pixels per inch.
    """

    icc_profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    iptc: bytes | None = None
    text: tuple[tuple[str, str], ...] = ()
    dpi: tuple[float, float] | None = None


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, that is still to be applied; 1 if it is missing, invalid or unreadable."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF data raises anything, and the pixels are fine without it
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def read(image: Image.Image, *, gray: bool) -> tuple[Metadata, tuple[str, ...], tuple[str, ...]]:
    """The metadata of a loaded image.

    Args:
        gray: whether its pixels are gray, for the color profile.

    Returns:
        It; notes for the user, one clause each; and the names of what is too large or damaged and was left out.
    """
    exif, exif_notes = _exif(image)
    profile, profile_notes = _profile(image, gray)
    values: dict[str, Any] = {"icc_profile": profile, "exif": exif, "dpi": _resolution(image)}
    dropped = []
    for name, found in (("xmp", _xmp), ("iptc", _iptc), ("text", _text)):
        try:
            values[name] = found(image)
        except Exception:  # broken data raises anything
            dropped.append(_NAMES[name])
    xmp = image.info.get("xmp")
    if isinstance(xmp, bytes) and b"HasExtendedXMP" in xmp:
        dropped.append("extended XMP")  # in other segments, which Pillow does not join
    return Metadata(**values), (*exif_notes, *profile_notes), tuple(dropped)


def fitting(metadata: Metadata, file_format: str) -> tuple[Metadata, tuple[str, ...]]:
    """What a file of this format ('PNG', 'JPEG', 'TIFF', 'WEBP') can hold, and the names of the rest."""
    kept, lost = metadata, []

    def drop(field: str, name: str, value: Any = None) -> None:
        nonlocal kept
        kept = replace(kept, **{field: value})
        lost.append(name)

    if file_format == "JPEG":
        if len(metadata.icc_profile or b"") > 255 * (_JPEG_SEGMENT - 14):
            drop("icc_profile", "color profile")
        if len(metadata.exif or b"") > _JPEG_SEGMENT:
            drop("exif", "EXIF data")
        if len(metadata.xmp or b"") > _JPEG_SEGMENT - 29:
            drop("xmp", "XMP")
        if len(metadata.iptc or b"") > _JPEG_SEGMENT - 32:
            drop("iptc", "IPTC data")
        if metadata.dpi and not all(1 <= round(value) <= 65535 for value in metadata.dpi):
            drop("dpi", "resolution")
    elif file_format == "WEBP" and metadata.iptc:
        drop("iptc", "IPTC data")
    if file_format != "PNG":
        held = [
            (keyword, text)
            for keyword, text in metadata.text
            if file_format == "JPEG" and keyword == _COMMENT and len(_comment_bytes(text)) <= _JPEG_SEGMENT
        ]
        rest = {keyword for keyword, _ in metadata.text} - {keyword for keyword, _ in held}
        if rest:
            names = ["comment"] * (_COMMENT in rest) + ["texts"] * bool(rest - {_COMMENT})
            drop("text", " and ".join(names), tuple(held))
    return kept, tuple(lost)


def save_options(metadata: Metadata, file_format: str) -> dict[str, Any]:
    """Options of Pillow's `save` in this format, for all that it can hold."""
    kept, _ = fitting(metadata, file_format)
    options: dict[str, Any] = {
        "icc_profile": kept.icc_profile,
        "exif": kept.exif,
        "xmp": kept.xmp,
        "dpi": kept.dpi,
    }
    if file_format == "JPEG":
        options["comment"] = _comment_bytes(dict(kept.text).get(_COMMENT, ""))
        options["extra"] = _app13(kept.iptc) if kept.iptc else None
    elif file_format == "PNG":
        options["pnginfo"] = png_chunks(kept)
        del options["xmp"]
    elif file_format == "WEBP":
        options["exif"] = _with_resolution(kept)
    elif file_format == "TIFF":
        options["exif"] = tiff_tags(kept)
        if kept.exif:
            options["compression"] = "raw"  # Pillow cannot write EXIF through libtiff, which compresses
        del options["xmp"], options["dpi"]
    return {name: value for name, value in options.items() if value}


def pillow_info(metadata: Metadata) -> dict[str, Any]:
    """Metadata as Pillow has it in `Image.info`."""
    comment = dict(metadata.text).get(_COMMENT)
    values = {
        "icc_profile": metadata.icc_profile,
        "exif": metadata.exif,
        "xmp": metadata.xmp,
        "dpi": metadata.dpi,
        "comment": None if comment is None else _comment_bytes(comment),
    }
    return {name: value for name, value in values.items() if value}


def png_chunks(metadata: Metadata) -> PngImagePlugin.PngInfo | None:
    """Texts, XMP and IPTC data as chunks of a PNG; None if there are none."""
    info = PngImagePlugin.PngInfo()
    for keyword, text in metadata.text:
        if not isinstance(text, PngImagePlugin.iTXt):
            if not text.isascii():  # a comment of a JPEG, in an unknown encoding if it is not UTF-8
                data = _comment_bytes(text)
                text = data.decode("utf-8" if _is_utf8(data) else "latin-1")
            text = text.replace("\0", " ")
        info.add_text(keyword, text, zip=len(text) > 1024)
    if metadata.xmp:
        info.add_itxt("XML:com.adobe.xmp", metadata.xmp.decode())
    if metadata.iptc:  # as ImageMagick writes it and ExifTool reads it
        lines = "\n".join(re.findall(".{1,72}", metadata.iptc.hex()))
        info.add_text("Raw profile type iptc", f"\niptc\n{len(metadata.iptc):8}\n{lines}\n", zip=True)
    return info if info.chunks else None


def tiff_tags(metadata: Metadata) -> Image.Exif | None:
    """EXIF, XMP and IPTC data and the resolution as tags of a TIFF; None if there are none."""
    tags = Image.Exif()
    tags.load(metadata.exif or b"")
    if metadata.dpi:
        tags[_X_RESOLUTION], tags[_Y_RESOLUTION] = metadata.dpi
        tags[_RESOLUTION_UNIT] = 2  # inch
    if metadata.xmp:
        tags[_XMP] = metadata.xmp
    if metadata.iptc:
        tags[_IPTC] = metadata.iptc
    return tags if len(tags) else None


def without_large_chunks(data: bytes) -> tuple[bytes, tuple[str, ...]]:
    """A PNG without the texts and the color profile that are too large for Pillow, and the names of those."""
    names = {b"iCCP": "color profile", b"tEXt": "texts", b"zTXt": "texts", b"iTXt": "texts"}
    parts, dropped, start = [data[:8]], [], 8
    while start + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + size
        if kind in names and _is_large(kind, data[start + 8 : end - 4]):
            is_xmp = data.startswith(b"XML:com.adobe.xmp\0", start + 8)
            dropped.append("XMP" if is_xmp else names[kind])
        else:
            parts.append(data[start:end])
        start = end
    return b"".join(parts), tuple(dict.fromkeys(dropped))


def _is_large(kind: bytes, body: bytes) -> bool:
    """Whether the text or profile in a chunk of a PNG is longer than Pillow accepts, once it is decompressed."""
    if len(body) > _LARGEST_COMPRESSED:
        return True
    packed = body.partition(b"\0")[2]
    if kind == b"iTXt":
        packed = packed[2:].split(b"\0", 2)[-1] if packed[:1] == b"\1" else b""
    else:
        packed = b"" if kind == b"tEXt" else packed[1:]
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(packed, _LARGEST_COMPRESSED)
    except zlib.error:
        return False  # Pillow's to judge
    return bool(unpacker.unconsumed_tail)


def _exif(image: Image.Image) -> tuple[bytes | None, tuple[str, ...]]:
    """EXIF bytes that fit the upright image at any size, or None; and notes for the user."""
    clean = Image.Exif()
    try:
        found = image.getexif()
        for tag, value in found.items():
            if tag not in _STRUCTURE:
                clean[tag] = value
        for tag in SUB_IFDS:
            inner = dict(found.get_ifd(tag))
            for side in _PIXEL_SIDES:
                inner.pop(side, None)
            if inner.pop(INTEROP, None) is not None:
                inner[INTEROP] = dict(found.get_ifd(INTEROP))
            if inner:
                clean[tag] = inner
        return (clean.tobytes() if len(clean) else None), ()
    except Exception:  # as above
        return None, ("damaged EXIF data was dropped",)


def _profile(image: Image.Image, gray: bool) -> tuple[bytes | None, tuple[str, ...]]:
    """The ICC profile if it fits RGB (or gray) pixels, else None; and notes for the user."""
    data = image.info.get("icc_profile")
    if not data or image.mode in ("CMYK", "LAB"):  # these were converted by the profile
        return None, ()
    # ICC.1 section 7.2: size in bytes 0-3, color space in 16-19, 'acsp' in 36-39.
    valid = isinstance(data, bytes) and len(data) >= 128 and data[36:40] == b"acsp"
    if valid and int.from_bytes(data[:4], "big") <= len(data) and data[16:20] == _COLOR_SPACES[gray]:
        return data, ()
    return None, ("a color profile that does not match the pixels was dropped",)


def _xmp(image: Image.Image) -> bytes | None:
    """The XMP packet for the upright image; ValueError if it is too large or not in UTF-8."""
    data = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or _raw_profile(image, "xmp")
    if not data:
        return None
    data = _limited(data.encode() if isinstance(data, str) else data).rstrip(b"\0")
    if b"\0" in data or not _is_utf8(data):
        raise ValueError("not in UTF-8")
    return _XMP_REMOVED.sub(b"", _XMP_TURN.sub(rb"\g<1>1", data))


def _iptc(image: Image.Image) -> bytes | None:
    """The IPTC data of a JPEG, TIFF or PNG; ValueError if it is damaged or too large."""
    resources = image.info.get("photoshop")  # of a JPEG
    data = resources.get(_IPTC_RESOURCE) if isinstance(resources, dict) else _raw_profile(image, "iptc")
    if hasattr(image, "tag_v2"):
        stored = (
            image.tag_v2._tagdata
        )  # the bytes; their type may be LONG, of which Pillow decodes the first only
        data = stored.get(_IPTC) or stored.get(_PHOTOSHOP)
    if data and data.startswith(b"8BIM"):
        data = _resource(data)
    if data and not data.startswith(b"\x1c"):
        raise ValueError("not IPTC data")
    return _limited(data) if data else None


def _resource(data: bytes) -> bytes | None:
    """The IPTC data in Photoshop's image resources."""
    start = 0
    while data[start : start + 4] == b"8BIM":
        kind, length = struct.unpack_from(">HB", data, start + 4)
        start += 6 + length + 1 + (length + 1) % 2
        size = struct.unpack_from(">I", data, start)[0]
        if kind == _IPTC_RESOURCE:
            return data[start + 4 : start + 4 + size]
        start += 4 + size + size % 2
    return None


def _text(image: Image.Image) -> tuple[tuple[str, str], ...]:
    """Texts of a PNG, or the comment of another format; ValueError if they are too large."""
    if image.format == "PNG":
        found = {
            keyword: text
            for keyword, text in image.text.items()  # type: ignore[attr-defined]
            if keyword != "XML:com.adobe.xmp" and not keyword.startswith("Raw profile type ")
        }
        if sum(len(keyword) + len(text) for keyword, text in found.items()) > LARGEST:
            raise ValueError("too large")
        return tuple(found.items())
    comment = image.info.get("comment")
    if isinstance(comment, bytes) and comment.rstrip(b"\0"):
        return ((_COMMENT, _limited(comment).rstrip(b"\0").decode("utf-8", "surrogateescape")),)
    return ()


def _resolution(image: Image.Image) -> tuple[float, float] | None:
    """Pixels per inch; None if the file does not say."""
    found = image.info.get("dpi")
    is_jpeg = image.format in ("JPEG", "MPO")
    if image.format == "TIFF" or (is_jpeg and image.info.get("jfif_unit") not in (1, 2)):
        found = None  # Pillow makes one up
    try:
        if found is None:
            tags = image.getexif()
            inches = {2: 1.0, 3: 2.54}[tags.get(_RESOLUTION_UNIT, 2)]
            found = [float(tags[tag]) * inches for tag in (_X_RESOLUTION, _Y_RESOLUTION)]
        across, down = (float(value) for value in found)
    except Exception:  # no such tags, or broken ones
        return None
    return (across, down) if all(math.isfinite(one) and 0 < one < 1e6 for one in (across, down)) else None


def _with_resolution(metadata: Metadata) -> bytes | None:
    """EXIF data with the resolution, unless it has one."""
    tags = Image.Exif()
    tags.load(metadata.exif or b"")
    if not metadata.dpi or _X_RESOLUTION in tags:
        return metadata.exif
    # Load the directories: Pillow writes only those that it has seen.
    for tag in SUB_IFDS:
        tags.get_ifd(tag)
    tags[_X_RESOLUTION], tags[_Y_RESOLUTION] = metadata.dpi
    tags[_RESOLUTION_UNIT] = 2
    return tags.tobytes()


def _raw_profile(image: Image.Image, name: str) -> bytes | None:
    """A profile that ImageMagick has stored in a text of a PNG: its name, its length, and hexadecimal digits."""
    text = image.info.get(f"Raw profile type {name}")
    if not isinstance(text, str):
        return None
    return bytes.fromhex("".join(_limited(text, 3 * LARGEST).split("\n")[3:]))


def _limited(data: Any, most: int = LARGEST) -> Any:
    if not isinstance(data, bytes | str) or len(data) > most:
        raise ValueError("too large, or of another type")
    return data


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _comment_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _app13(iptc: bytes) -> bytes:
    """The JPEG segment of IPTC data."""
    body = b"Photoshop 3.0\0" + struct.pack(">4sHHI", b"8BIM", _IPTC_RESOURCE, 0, len(iptc)) + iptc
    body += b"\0" * (len(iptc) % 2)
    return b"\xff\xed" + struct.pack(">H", len(body) + 2) + body


def frames(image: Image.Image) -> tuple[str, ...]:
    """A note if the file holds several images. Call it last: counting moves the decoder to another frame."""
    try:
        count = getattr(image, "n_frames", 1)
    except Exception:  # a later frame is damaged; the first one is not
        count = 2
    return ("only the first image of the file was read",) if count > 1 else ()
