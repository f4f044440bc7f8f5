"""A folder of hostile inputs: unusual images that must be read, and files that must fail.

Shared by the tests of `sr3 upscale` and `sr3 prepare`. All files are generated from seeds.
"""

from __future__ import annotations

import functools
import io
import os
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

HEIGHT, WIDTH = 10, 14
IPTC = b"\x1c\x02\x78\x00\x0a" + b"Kingfisher" + b"\x1c\x02\x69\x00\x04Bird"  # caption and headline


@dataclass
class Hostile:
    """good: path -> (height, width) of the upright image; bad: path -> part of the reason; ignored: non-image files."""

    good: dict[Path, tuple[int, int]] = field(default_factory=dict)
    bad: dict[Path, str] = field(default_factory=dict)
    ignored: list[Path] = field(default_factory=list)


def pixels(height: int = HEIGHT, width: int = WIDTH, *, seed: int = 0) -> np.ndarray:
    """uint8 [H,W,3], smooth with some noise, different for each seed."""
    rng = np.random.default_rng([seed, height, width])
    ramp = np.linspace(40, 200, height)[:, None, None] + np.linspace(-30, 30, width)[None, :, None]
    return np.clip(ramp + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    """The bytes of an image file."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, color: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG from the fields of its header and filtered rows; `extra` chunks come before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body + chunk(b"IEND", b"")


def exif(orientation: int) -> bytes:
    """EXIF data with an orientation, a maker and a date."""
    tags = Image.Exif()
    tags[274], tags[271], tags[34665] = orientation, "Maker", {36867: "2020:01:01 00:00:00"}
    return tags.tobytes()


@functools.cache
def srgb() -> bytes:
    """An ICC profile for RGB; made once, since it has a timestamp."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _lab(image: Image.Image) -> Image.Image:
    source, target = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(image, source, target, outputMode="LAB")


def tiff(
    width: int,
    height: int,
    data: bytes = b"",
    *,
    depth: int = 8,
    order: str = "<",
    black: int = 1,
    at: int = 8,
) -> bytes:
    """A gray TIFF from its fields and pixels; `at` is the offset of the tags that the header claims."""
    tags = {
        256: width,
        257: height,
        258: depth,
        259: 1,
        262: black,
        273: 122,
        277: 1,
        278: height,
        279: len(data),
    }
    fields = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HIH", 42, at, len(tags))
    return head + fields + bytes(4) + data


def make(folder: Path) -> Hostile:
    """Create `folder` with more than 150 inputs."""
    made = Hostile()
    folder.mkdir(parents=True)
    for name, data in _good().items():
        size = (WIDTH, HEIGHT) if "turn5678" in name else (HEIGHT, WIDTH)
        made.good[_put(folder / "good" / name, data)] = size
    for name in (
        "1x1.png",
        "1x1.tif",
        "1x37.png",
        "41x1.jpg",
        "2x90.webp",
        "3x1.bmp",
        "37x91.png",
        "1x2.gif",
    ):
        height, width = (int(side) for side in name.split(".")[0].split("x"))
        kind = {"jpg": "JPEG", "tif": "TIFF"}.get(name[-3:], name.split(".")[1].upper())
        made.good[_put(folder / "sizes" / name, encode(pixels(height, width), kind))] = (height, width)
    for index, name in enumerate(_names()):
        path = folder / "names" / os.fsdecode(name)
        made.good[_put(path, encode(pixels(seed=index), "PNG"))] = (HEIGHT, WIDTH)
    for name, (data, why) in _bad().items():
        made.bad[_put(folder / "bad" / name, data)] = why
    made.bad[_put(folder / "bad" / "no\nline 'quote' \"double\" 😀.png", b"text")] = "is not an image"
    made.bad[_put(folder / "bad" / os.fsdecode(b"\xff\xfe bad.jpg"), b"\xff\xd8\xff")] = "is a damaged JPEG"
    _special(folder / "special", made)
    others = {
        "notes.txt": b"BM is how a BMP begins\n", ".DS_Store": b"\0\0\0\1Bud1", "._photo.jpg": b"\0\5\x16\7",
        "clip.mp4": b"\0\0\0 ftypisom", "empty": b"", "archive.zip": b"PK\3\4",
    }  # fmt: skip
    for name, data in others.items():
        made.ignored.append(_put(folder / "others" / name, data))
    return made


def _put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _good() -> dict[str, bytes]:
    """Name -> a complete but unusual image of HEIGHT x WIDTH (rotated if its name says so)."""
    rgb = Image.fromarray(pixels())
    gray = rgb.convert("L")
    alpha = Image.fromarray(pixels(seed=5)[..., 0])
    rgba, gray_alpha = rgb.copy(), Image.merge("LA", (gray, alpha))
    rgba.putalpha(alpha)
    palette = rgb.quantize(9)
    deep = (np.asarray(gray).astype(np.uint16) << 8) + 77
    animated = {"save_all": True, "append_images": [rgb.rotate(180), rgb.rotate(90)], "duration": 50}
    wide = pixels().astype(">u2").tobytes()
    rows16 = b"".join(b"\0" + wide[i : i + WIDTH * 6] for i in range(0, len(wide), WIDTH * 6))
    bits = b"".join(b"\0" + bytes([165, 36]) for _ in range(HEIGHT))
    fours = b"".join(b"\0" + bytes(range(7)) for _ in range(HEIGHT))
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"A" * 300_000_000, 1))
    whole_png, whole_jpeg = encode(rgb, "PNG"), encode(rgb, "JPEG")
    good = {
        "plain.png": whole_png, "plain.jpg": whole_jpeg, "UPPER.JPEG": whole_jpeg,
        "plain.webp": encode(rgb, "WEBP"),
        "plain.tif": encode(rgb, "TIFF"), "plain.bmp": encode(rgb, "BMP"), "plain.gif": encode(palette,
        "GIF"),
        "lossless.webp": encode(rgb, "WEBP", lossless=True), "progressive.jpg": encode(rgb,
        "JPEG", progressive=True),
        "gray.png": encode(gray, "PNG"), "gray.jpg": encode(gray, "JPEG"), "gray.tiff": encode(gray, "TIFF"),
        "gray_alpha.png": encode(gray_alpha, "PNG"), "alpha.png": encode(rgba, "PNG"),
        "alpha.webp": encode(rgba, "WEBP"), "alpha.tif": encode(rgba, "TIFF"),
        "deep_gray.png": encode(deep, "PNG"), "deep_gray.tif": encode(deep, "TIFF"),
        "text_bomb.png": png(WIDTH, HEIGHT, 8, 2, bytes(HEIGHT * (1 + 3 * WIDTH)), bomb),
        "deep_rgb.png": png(WIDTH, HEIGHT, 16, 2, rows16), "bits.png": png(WIDTH, HEIGHT, 1, 0, bits),
        "four_bits.png": png(WIDTH, HEIGHT, 4, 0, fours), "keyed.png": png(
            WIDTH, HEIGHT, 4, 0, fours, chunk(b"tRNS", struct.pack(">H", 3))),
        "float.tif": encode(Image.fromarray(np.asarray(gray, np.float32) / 255), "TIFF"),
        "float_minus.tif": encode(Image.fromarray(np.asarray(gray, np.float32) - 99), "TIFF"),
        "int32.tif": encode(Image.fromarray(np.asarray(gray, np.int32) * 9999), "TIFF"),
        "bilevel.tif": encode(rgb.convert("1"), "TIFF", compression="group4"),
        "cmyk.jpg": encode(rgb.convert("CMYK"), "JPEG"), "cmyk.tif": encode(rgb.convert("CMYK"), "TIFF"),
        "cmyk_profile.jpg": encode(rgb.convert("CMYK"), "JPEG", icc_profile=srgb()),
        "lab.tif": encode(_lab(rgb), "TIFF"), "ycbcr.tif": encode(rgb.convert("YCbCr"), "TIFF", compression="jpeg"),
        "lzw.tif": encode(rgb,
        "TIFF", compression="tiff_lzw"),
        "jpeg_in.tif": encode(rgb, "TIFF", compression="jpeg"),
        "palette.png": encode(palette, "PNG"), "palette_alpha.png": encode(palette, "PNG", transparency=3),
        "palette_alphas.png": encode(palette, "PNG", transparency=bytes(range(0, 90, 10))),
        "animated.gif": encode(rgb, "GIF", **animated), "animated.webp": encode(rgb, "WEBP", **animated),
        "animated.png": encode(rgb, "PNG", **animated), "pages.tif": encode(rgb, "TIFF", **animated),
        "transparent.gif": encode(palette, "GIF", transparency=2),
        "png_called.jpg": whole_png, "alpha_png_called.jpg": encode(rgba, "PNG"),
        "jpg_called.png": whole_jpeg,
        "gif_called.tiff": encode(palette, "GIF"), "webp_called.png": encode(rgb, "WEBP"),
        "no_suffix": whole_png, "odd.suffix": whole_jpeg, "bmp.dat": encode(rgb, "BMP"),
        "trailing.png": whole_png + b"garbage" * 99, "trailing.jpg": whole_jpeg + b"\0" * 999,
        "profile.jpg": encode(rgb, "JPEG", icc_profile=srgb()), "profile.png": encode(rgb,
        "PNG", icc_profile=srgb()),
        "broken_profile.jpg": encode(rgb, "JPEG", icc_profile=b"no profile" * 30),
        "cut_profile.png": encode(rgb, "PNG", icc_profile=srgb()[:90]),
        "broken_cmyk_profile.jpg": encode(rgb.convert("CMYK"), "JPEG", icc_profile=b"?" * 300),
        "broken_exif.jpg": encode(rgb, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\x99" * 60),
        "looping_exif.jpg": encode(rgb,
        "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x69\x87\4\0\1\0\0\0\x08\0\0\0"),
        "orientation_99.jpg": encode(rgb, "JPEG", exif=exif(99)),
        "no_end.png": whole_png[:-12], "odd_comment.jpg": encode(rgb, "JPEG", comment=b"\xff\xfe\0"),
    }  # fmt: skip
    for turn in range(1, 9):
        name = f"turn{'5678' if turn >= 5 else '1234'}_{turn}"
        for suffix, kind in {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF"}.items():
            good[f"{name}.{suffix}"] = encode(rgb, kind, exif=exif(turn))
    return good


def _names() -> list[bytes]:
    """File names that break careless code."""
    return [
        b"latin \xe9\xe8.png", b"\xff\xfe\xfd.png", b"new\nline.png", b"tab\there.png",
        b"'single' \"double\".png",
        "emoji 😀🏽.png".encode(), "かな.png".encode(), b"-rf.png", b"--output.png", b"$(touch pwned).png",
        b"back\\slash.png", b"%s%n.png", b" leading and trailing .png", b"a.b.c.png", b"\x1b[31mred.png",
        b"n" * 251 + b".png", "ü".encode() * 125 + b".PNG", b".hidden.png", b"nul.png", b"tilde~.png",
    ]  # fmt: skip


def _bad() -> dict[str, tuple[bytes, str]]:
    """Name -> (bytes, part of the reason)."""
    rgb = Image.fromarray(pixels(40, 48))
    whole = {
        "a.png": encode(rgb, "PNG"), "b.jpg": encode(rgb, "JPEG"), "c.webp": encode(rgb, "WEBP"),
        "d.tif": encode(rgb, "TIFF"), "e.tif": encode(rgb, "TIFF", compression="tiff_lzw"),
        "f.gif": encode(rgb, "GIF"), "g.bmp": encode(rgb, "BMP"), "h.jpg": encode(rgb,
        "JPEG", progressive=True),
    }  # fmt: skip
    bad = {}
    for name, data in whole.items():
        for share in (0.003, 0.01, 0.05, 0.3, 0.6, 0.9):
            cut = max(1, int(len(data) * share))
            bad[f"cut_{cut}_{name}"] = (data[:cut], "is ")
    good_png = whole["a.png"]
    middle = len(good_png) // 2
    rows = b"\0" + bytes(3)
    frame = whole["b.jpg"].index(b"\xff\xc0") + 5  # height and width in the JPEG's frame header
    huge_jpeg = whole["b.jpg"][:frame] + struct.pack(">HH", 65000, 65000) + whole["b.jpg"][frame + 4 :]
    huge_bmp = whole["g.bmp"][:18] + struct.pack("<ii", 99999, 99999) + whole["g.bmp"][26:]
    huge_gif = whole["f.gif"][:6] + struct.pack("<HH", 65535, 65535) + whole["f.gif"][10:]
    nan = np.full((9, 9), np.nan, np.float32)
    limit = "limit"
    bad |= {
        "empty.png": (b"", "is empty"), "empty.jpg": (b"", "is empty"), "empty.tif": (b"", "is empty"),
        "html.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "is not an image"),
        "text.png": (b"hello\n", "is not an image"), "zeros.png": (b"\0" * 5000, "is not an image"),
        "random.webp": (np.random.default_rng(1).bytes(3000), "is not an image"),
        "eps.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
        "pdf.jpg": (b"%PDF-1.7\n", "is not an image"), "svg.png": (b"<svg xmlns='x'/>", "is not an image"),
        "signature.png": (b"\x89PNG\r\n\x1a\n", "is a damaged PNG"), "soi.jpg": (b"\xff\xd8\xff\xd9", "is "),
        "riff.webp": (b"RIFF\4\0\0\0WEBP", "is a damaged WEBP"), "magic.gif": (b"GIF89a", "is a damaged GIF"),
        "magic.tif": (b"II*\0", "is a damaged TIFF"),
        "huge.png": (png(100_000, 100_000, 8, 2, b""), limit), "huge.jpg": (huge_jpeg, limit),
        "wide.png": (png(2**31 - 1, 1, 8, 2, b""), limit), "huge.bmp": (huge_bmp, limit),
        "huge.gif": (huge_gif, limit), "huge.tif": (tiff(100_000, 100_000), limit),
        "no_width.png": (png(0, 9, 8, 2, b""), "is "), "no_size.tif": (tiff(0, 0), "is "),
        "depth3.png": (png(1, 1, 3, 2, rows), "is a damaged PNG"),
        "color9.png": (png(1, 1, 8, 9, rows), "is a damaged PNG"),
        "few_pixels.png": (png(900, 900, 8, 2, rows), "is "),
        "crc.png": (good_png[:29] + b"\0\0\0\0" + good_png[33:], "is a damaged PNG"),
        "pixel_crc.png": (good_png[:middle] + b"\x55" * 40 + good_png[middle + 40 :], "is "),
        "no_pixels.tif": (tiff(30, 30), "is "), "far_offset.tif": (tiff(30, 30, at=2**31), "is "),
        "own_offset.tif": (tiff(30, 30, at=0), "is "),
        "nan.tif": (encode(Image.fromarray(nan), "TIFF"), "not finite"),
    }  # fmt: skip
    return bad


def _special(folder: Path, made: Hostile) -> None:
    """Paths that are not plain files: links, folders, a pipe, a file without permissions."""
    real = _put(folder / "real.png", encode(pixels(), "PNG"))
    made.good[real] = (HEIGHT, WIDTH)
    link = folder / "link.png"
    link.symlink_to("real.png")
    made.good[link] = (HEIGHT, WIDTH)
    inner = _put(
        folder / "folder.png" / "inner.jpg", encode(pixels(), "JPEG")
    )  # a folder with the suffix of an image
    made.good[inner] = (HEIGHT, WIDTH)
    (folder / "nothing.png").mkdir()
    for name, target, why in (
        ("dangling.png", "absent.png", "does not exist"),
        ("loop.png", "loop.png", "itself"),
    ):
        (folder / name).symlink_to(target)
        made.bad[folder / name] = why
    (folder / "up").symlink_to("..")  # a folder that contains itself
    (folder / "folder.png" / "self").symlink_to(".")
    os.mkfifo(folder / "pipe.png")
    made.bad[folder / "pipe.png"] = "not a regular file"
    closed = _put(folder / "closed.png", encode(pixels(), "PNG"))
    closed.chmod(0)
    if os.access(closed, os.R_OK):  # root can read it anyway
        made.good[closed] = (HEIGHT, WIDTH)
    else:
        made.bad[closed] = "permission denied"
