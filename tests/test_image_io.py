"""Reading and writing image files: pixels, transparency, metadata and errors."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import numpy as np
import pytest
from hostile import IPTC, chunk, encode, exif, pixels, png, tiff
from PIL import Image, ImageOps, PngImagePlugin, features

from sr3_jax.errors import UserError
from sr3_jax.image_io.errors import printable
from sr3_jax.image_io.image_file import (
    DecodedImage,
    ImageError,
    from_pillow,
    not_storable,
    read_image,
    read_rgb,
    read_size,
    require_writable,
    to_pillow,
    write_image,
)
from sr3_jax.image_io.metadata import Metadata

# image_file ignores these warnings on import, but pytest resets the filters.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> hostile.Hostile:
    return hostile.make(tmp_path_factory.mktemp("images") / "in")


def test_hostile_inputs_are_many(made):
    assert len(made.good) > 100
    assert len(made.bad) > 80


def test_valid_images_are_read(made):
    for path, size in made.good.items():
        image = read_image(path)
        assert image.rgb.shape == (*size, 3), path
        assert image.rgb.dtype == np.uint8
        assert image.rgb.flags["C_CONTIGUOUS"]
        assert image.alpha is None or (image.alpha.shape, image.alpha.dtype) == (size, np.uint8)
        assert not image.gray or (np.ptp(image.rgb, axis=-1) == 0).all(), path
        assert read_size(path) == size, path


def test_invalid_images_fail_with_a_reason(made):
    for path, why in made.bad.items():
        with pytest.raises(ImageError) as caught:
            read_image(path)
        assert why in str(caught.value), (path, caught.value)
        assert "\n" not in str(caught.value)
        assert str(path) not in str(caught.value)


def test_image_error_is_a_user_error():
    assert issubclass(ImageError, UserError)


def test_truncated_images_fail_or_are_read_completely():
    """Truncated anywhere, an image fails or is complete; it is never partly black."""
    smooth = pixels(20, 24)
    kinds = {"PNG": {}, "JPEG": {}, "GIF": {}, "BMP": {}, "WEBP": {"lossless": True}, "TIFF": {}}
    for kind, options in kinds.items():
        data = encode(smooth, kind, **options)
        whole, failures = read_rgb(data), 0
        for cut in range(0, len(data), max(1, len(data) // 60)):
            try:
                np.testing.assert_array_equal(read_rgb(data[:cut]), whole, err_msg=f"{kind} cut at {cut}")
            except ImageError:
                failures += 1
        assert failures > 40, kind
    with pytest.raises(ImageError) as caught:
        read_image(encode(smooth, "JPEG")[:-40])
    assert "truncated" in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_is_applied_and_its_tag_removed(tmp_path, kind, turn):
    data = encode(pixels(), kind, exif=exif(turn))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    image = read_image(data)
    np.testing.assert_array_equal(image.rgb, upright)
    assert read_size(data) == upright.shape[:2]
    for suffix in (".png", ".jpg", ".webp", ".tif"):
        write_image(tmp_path / f"out{suffix}", image)
        with Image.open(tmp_path / f"out{suffix}") as again:
            again.load()
            tags = again.getexif()
            assert 274 not in tags
            assert tags[271] == "Maker"
            assert tags.get_ifd(34665)[36867] == "2020:01:01 00:00:00"
        assert read_rgb(tmp_path / f"out{suffix}").shape == upright.shape


def test_orientation_is_applied_to_alpha():
    rgba = np.concatenate([pixels(), pixels(seed=3)[..., :1]], axis=-1)
    image = read_image(encode(rgba, "PNG", exif=exif(6)))
    np.testing.assert_array_equal(image.rgb, np.rot90(rgba[..., :3], -1))
    np.testing.assert_array_equal(image.alpha, np.rot90(rgba[..., 3], -1))


DEEP = np.linspace(0, 65535, 90).astype(np.uint16).reshape(9, 10)


@pytest.mark.parametrize(
    "data",
    [
        encode(DEEP, "PNG"),
        encode(DEEP, "TIFF"),
        encode(DEEP, "TIFF", compression="tiff_lzw"),
        encode(DEEP.astype(np.int32), "TIFF"),
        encode(DEEP.astype(np.float32) / 65535, "TIFF"),
        encode(DEEP.astype(np.float32) / 257, "TIFF"),
    ],
)
def test_16_bit_gray_is_scaled_not_clipped(data):
    image = read_image(data)
    assert image.gray
    assert image.notes
    np.testing.assert_array_equal(image.rgb[..., 0], np.rint(DEEP / 257.0).astype(np.uint8))


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_with_either_byte_order_and_white_level(order):
    data = DEEP.astype(f"{order}u2").tobytes()
    level = np.rint(DEEP / 257.0).astype(np.uint8)
    np.testing.assert_array_equal(read_rgb(tiff(10, 9, data, depth=16, order=order))[..., 0], level)
    if order == "<":  # Pillow opens the other order only with black at 0
        white_is_zero = tiff(10, 9, data, depth=16, black=0)
        np.testing.assert_array_equal(read_rgb(white_is_zero)[..., 0], 255 - level)


def test_floats_without_known_white_are_stretched_with_a_note():
    values = np.linspace(-7, 3000, 90, dtype=np.float32).reshape(9, 10)
    image = read_image(encode(values, "TIFF"))
    assert (image.rgb.min(), image.rgb.max()) == (0, 255)
    assert "-7 to 3000" in image.notes[0]
    flat = read_image(encode(np.full((2, 2), -5, np.float32), "TIFF"))
    assert (flat.rgb == 0).all()


def test_16_bit_color_is_reduced_with_a_note():
    wide = np.arange(2 * 3 * 3, dtype=np.uint16).reshape(2, 3, 3) * 3800
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    image = read_image(png(3, 2, 16, 2, rows))
    assert np.abs(image.rgb - wide / 257.0).max() <= 1
    assert len(image.notes) == 1 and "16 bits" in image.notes[0]
    keyed = read_image(png(3, 2, 16, 2, rows, chunk(b"tRNS", wide[1, 2].astype(">u2").tobytes())))
    assert keyed.alpha is not None
    np.testing.assert_array_equal(keyed.alpha, [[255, 255, 255], [255, 255, 0]])


def test_16_bit_gray_with_alpha_stays_gray():
    both = np.array([[[0, 65535], [30000, 128 * 257]]], np.uint16)
    image = read_image(png(2, 1, 16, 4, b"\0" + both.astype(">u2").tobytes()))
    assert image.gray
    assert image.alpha is not None
    np.testing.assert_array_equal(image.alpha, [[255, 128]])


@pytest.mark.parametrize(("depth", "row"), [(1, 0b01 << 6), (2, 0b0111 << 4), (4, 0x1F)])
def test_transparent_gray_level_becomes_alpha(depth, row):
    """PNG's tRNS gives a level in the bit depth of the file, here that of the second pixel."""
    key = (1 << depth) - 1
    data = png(2, 1, depth, 0, bytes([0, row]), chunk(b"tRNS", struct.pack(">H", key)))
    image = read_image(data)
    assert image.alpha is not None
    np.testing.assert_array_equal(image.alpha, [[255, 0]])
    assert image.rgb[0, 1, 0] == 255


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 90, 10))])
def test_palette_transparency_becomes_alpha(transparency):
    palette = Image.fromarray(pixels()).quantize(9)
    image = read_image(encode(palette, "PNG", transparency=transparency))
    table = np.full(256, 255, np.uint8)
    if isinstance(transparency, int):
        table[transparency] = 0
    else:
        table[: len(transparency)] = np.frombuffer(transparency, np.uint8)
    np.testing.assert_array_equal(image.alpha, table[np.asarray(palette)])
    np.testing.assert_array_equal(image.rgb, np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_lossless_round_trip(tmp_path, kind):
    suffix = {"PNG": ".png", "TIFF": ".TIFF", "WEBP": ".webp"}[kind]
    gray = np.repeat(pixels()[..., :1], 3, axis=-1)
    for alpha in (None, pixels(seed=2)[..., 0]):
        for rgb, is_gray in ((pixels(seed=1), False), (gray, True)):
            profile = None if is_gray else hostile.srgb()
            before = DecodedImage(rgb, alpha, is_gray, Metadata(icc_profile=profile))
            write_image(tmp_path / f"a{suffix}", before)
            after = read_image(tmp_path / f"a{suffix}")
            np.testing.assert_array_equal(after.rgb, rgb)
            np.testing.assert_array_equal(after.alpha, alpha) if alpha is not None else None
            assert (after.alpha is None) == (alpha is None)
            assert after.gray == (is_gray and kind != "WEBP")  # WebP has no grayscale mode
            assert after.metadata == before.metadata
            assert after.format == kind


def test_jpeg_is_written_with_full_chroma(tmp_path):
    write_image(tmp_path / "a.jpg", DecodedImage(pixels(64, 64)))
    with Image.open(tmp_path / "a.jpg") as image:
        assert all(part[1:3] == (1, 1) for part in image.layer)
        assert max(image.quantization[0]) <= 20  # quality 95
    assert np.abs(read_rgb(tmp_path / "a.jpg").astype(int) - pixels(64, 64)).mean() < 4
    write_image(tmp_path / "g.jpg", DecodedImage(pixels(8, 8)[..., :1].repeat(3, -1), gray=True))
    assert read_image(tmp_path / "g.jpg").gray


def cmyk_profile() -> bytes:
    """An ICC profile that depends only on black ink: a table of 2^4 points, Lab (100, 0, 0) or (0, 0, 0)."""
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0])
    table += struct.pack(">9i", *(0x10000 * (i % 4 == 0) for i in range(9)))
    table += ramp * 4 + bytes([255, 128, 128, 0, 128, 128]) * 8 + ramp * 3
    head = struct.pack(
        ">I4sI4s4s4s12s4s", 144 + len(table), b"", 0x02400000, b"prtr", b"CMYK", b"Lab ", b"", b"acsp"
    )
    head += bytes(28) + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    return head.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table


def test_cmyk_is_converted_by_its_profile_if_valid():
    cmyk = Image.fromarray(pixels()).convert("CMYK")
    plain = read_image(encode(cmyk, "TIFF"))
    np.testing.assert_array_equal(plain.rgb, np.asarray(cmyk.convert("RGB")))
    assert len(plain.notes) == 1 and "CMYK" in plain.notes[0] and "profile" not in plain.notes[0]
    profiled = read_image(encode(cmyk, "TIFF", icc_profile=cmyk_profile()))
    assert len(profiled.notes) == 1 and "profile" in profiled.notes[0]
    assert profiled.rgb.min() > 250  # the image has no black ink
    assert profiled.metadata.icc_profile is None
    broken = read_image(encode(cmyk, "TIFF", icc_profile=b"?" * 200))
    np.testing.assert_array_equal(broken.rgb, plain.rgb)


def test_mismatched_profiles_are_dropped_with_a_note():
    assert (
        read_image(encode(pixels(), "PNG", icc_profile=hostile.srgb())).metadata.icc_profile == hostile.srgb()
    )
    for data in (
        encode(pixels(), "PNG", icc_profile=hostile.srgb()[:90]),
        encode(pixels()[..., 0], "PNG", icc_profile=hostile.srgb()),  # an RGB profile in a gray image
    ):
        image = read_image(data)
        assert image.metadata.icc_profile is None
        assert "profile" in image.notes[0]


def test_first_frame_of_an_animation_is_read():
    frames = [Image.fromarray(pixels(seed=seed)) for seed in range(3)]
    for kind, options in {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}.items():
        image = read_image(encode(frames[0], kind, save_all=True, append_images=frames[1:], **options))
        np.testing.assert_array_equal(image.rgb, np.asarray(frames[0]))
        assert len(image.notes) == 1 and "first" in image.notes[0]


def test_size_limit_is_checked_from_the_header():
    data = encode(pixels(30, 40), "PNG")
    with pytest.raises(ImageError, match=r"40x30 .*0\.001 megapixels"):
        read_image(data, max_megapixels=0.001)
    with pytest.raises(ImageError, match=r"0.0001"):
        read_size(data, max_megapixels=0.0001)
    assert read_image(data, max_megapixels=0.0012).rgb.shape == (30, 40, 3)
    with pytest.raises(ImageError, match=r"10000 megapixels.* 200"):
        read_image(png(100_000, 100_000, 8, 2, b""))


def test_size_limit_is_not_shared_between_threads():
    """Threads with different limits do not affect each other or Pillow's own limit."""
    before = Image.MAX_IMAGE_PIXELS
    data = encode(pixels(30, 40), "PNG")
    stop = threading.Event()

    def read_with_low_limit() -> None:
        while not stop.is_set():
            with pytest.raises(ImageError):
                read_image(data, max_megapixels=1e-6)

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(read_with_low_limit) for _ in range(2)]
        try:
            for _ in range(100):
                read_image(data, max_megapixels=400)
        finally:
            stop.set()
        for future in futures:
            future.result()
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (PermissionError(13, "Permission denied"), "permission denied"),
        (OSError(5, "Input/output error"), "input/output error"),
        (MemoryError(), "needs more memory"),
        (ZeroDivisionError("division by zero"), "is damaged (division by zero)"),
        (RecursionError("too deep\n  here"), "is damaged (too deep here)"),
    ],
)
def test_any_exception_becomes_a_reason(tmp_path, monkeypatch, error, why):
    path = tmp_path / "a.png"
    path.write_bytes(encode(pixels(), "PNG"))

    def fail(*_: object, **__: object) -> None:
        raise error

    if isinstance(error, OSError):
        monkeypatch.setattr(Path, "open", fail)
    else:
        monkeypatch.setattr("sr3_jax.image_io.image_file.to_pixels", fail)
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert why in str(caught.value)


def test_failed_write_preserves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ImageError, match="no space left"):
        write_image(path, DecodedImage(pixels()))
    assert os.listdir(tmp_path) == ["a.png"]
    assert path.read_bytes() == b"old"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_image(path, DecodedImage(pixels()))
    assert os.listdir(tmp_path) == ["a.png"]


def test_file_name_of_maximum_length_is_written(tmp_path):
    path = tmp_path / ("n" * 251 + ".png")
    write_image(path, DecodedImage(pixels()))
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_images_that_a_format_cannot_store_fail(tmp_path):
    for name, sides, alpha, why in (
        ("a.gif", (9, 9), False, "'.gif'"),
        ("a", (9, 9), False, "cannot be written"),
        ("a.JPG", (9, 9), True, "transparency"),
        ("a.jpg", (65501, 9), False, "9x65501.*JPEG"),
        ("a.webp", (9, 16384), False, "16384x9.*WEBP"),
        ("a.webp", (8001, 8000), False, "8000x8001.*lossless WebP"),
    ):
        with pytest.raises(ImageError, match=why):
            require_writable(tmp_path / name, height=sides[0], width=sides[1], alpha=alpha)
    require_writable(tmp_path / "a.png", height=70000, width=70000, alpha=True)
    require_writable(tmp_path / "a.webp", height=8001, width=8000, alpha=False, quality=90)
    with pytest.raises(ImageError, match="transparency"):
        write_image(tmp_path / "a.jpg", DecodedImage(pixels(), alpha=pixels()[..., 0]))
    assert not list(tmp_path.iterdir())


def test_exif_too_long_for_jpeg_is_dropped(tmp_path):
    image = DecodedImage(pixels(), metadata=Metadata(exif=b"Exif\0\0" + bytes(70_000)))
    write_image(tmp_path / "a.jpg", image)
    assert read_image(tmp_path / "a.jpg").metadata.exif is None


@pytest.mark.parametrize("file_format", ["AVIF", "JPEG2000"])
def test_phone_formats_are_read(file_format):
    if not features.check({"AVIF": "avif", "JPEG2000": "jpg_2000"}[file_format]):
        pytest.skip(f"this Pillow has no {file_format}")
    image = read_image(encode(np.full((16, 24, 3), 90, np.uint8), file_format))
    assert image.rgb.shape == (16, 24, 3) and np.abs(image.rgb.astype(int) - 90).max() <= 2


@pytest.mark.parametrize(
    ("head", "named"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "JPEG XL"),
        (b"\xff\x0a" + bytes(40), "JPEG XL"),
    ],
)
def test_formats_that_cannot_be_read_are_named(head, named):
    with pytest.raises(ImageError, match=named):
        read_image(head)


@pytest.mark.parametrize("sample_format", [1, 3])
def test_32_bit_color_tiff_is_unsupported_not_damaged(sample_format):
    """Unsigned integers and floats: Pillow has no mode for either."""
    rows = bytes(4 * 4 * 3 * 4)
    entries = [
        (256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 146),
        (277, 3, 1, 3), (278, 3, 1, 4), (279, 4, 1, len(rows)), (339, 3, 3, 140),
    ]  # fmt: skip
    tags = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + tags + bytes(4)
    data = head + struct.pack("<6H", *[32] * 3, *[sample_format] * 3) + rows
    with pytest.raises(ImageError, match="not supported"):
        read_image(data)
    with pytest.raises(ImageError, match=r"damaged|truncated"):
        read_image(data[:100])


def test_printable_escapes_control_characters_and_invalid_bytes():
    assert printable(Path(os.fsdecode(b"\xff/a\nb\x1b[31m 'q'.png"))) == "\\xff/a\\nb\\x1b[31m 'q'.png"
    assert printable("かな 😀") == "かな 😀"
    assert printable("\ud800\u202ea") == "\\ud800\\u202ea"
    assert str(UserError("a\x1b[31m\nb")) == "a\\x1b[31m\nb"


def test_reading_prints_nothing(made, tmp_path):
    """Warnings of Pillow and of libtiff do not reach the terminal, which may show a progress bar."""
    code = (
        "import sys; from pathlib import Path; from sr3_jax.image_io.image_file import read_image\n"
        "for path in map(Path, sys.argv[1:]):\n"
        "    try: read_image(path)\n"
        "    except ValueError: pass\n"
    )
    damaged = bytearray(
        encode(
            np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8),
            "TIFF",
            compression="tiff_adobe_deflate",
        )
    )
    damaged[200:260] = bytes(60)  # libtiff prints 'incorrect data check'
    (tmp_path / "damaged.tif").write_bytes(damaged)
    paths = [*made.good, *made.bad, tmp_path / "damaged.tif"]
    run = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, check=True)
    assert (run.stdout, run.stderr) == (b"", b"")


@pytest.mark.parametrize("hidden", [0, 255])
def test_hidden_colors_do_not_reach_the_visible_edge(hidden):
    """A red disc on transparent pixels of another color: everything that is read is red."""
    y, x = np.mgrid[:31, :45]
    alpha = np.clip(255 * (10.5 - np.hypot(y - 12, x - 20)), 0, 255).astype(np.uint8)
    red = np.array([200, 30, 60], np.uint8)
    rgb = np.where((alpha > 0)[..., None], red, np.uint8(hidden))
    data = encode(np.concatenate([rgb, alpha[..., None]], -1), "PNG")
    np.testing.assert_array_equal(read_rgb(data), np.broadcast_to(red, rgb.shape))
    np.testing.assert_array_equal(read_image(data).rgb, rgb)  # which a copy of the file keeps


def test_fully_transparent_and_opaque_images_keep_their_colors():
    rgb = pixels()
    for level in (0, 255):
        alpha = np.full((*rgb.shape[:2], 1), level, np.uint8)
        np.testing.assert_array_equal(read_rgb(encode(np.concatenate([rgb, alpha], -1), "PNG")), rgb)


@pytest.mark.parametrize("tags", [{254: 1}, {50706: b"\x01\x04\x00\x00"}])
def test_camera_raw_files_are_named_and_their_preview_is_not_used(tmp_path, tags):
    file = tmp_path / "photo.tif"
    Image.fromarray(pixels(20, 30)).save(file, tiffinfo=tags)
    with pytest.raises(ImageError, match="camera raw"):
        read_image(file)
    Image.fromarray(pixels(20, 30)).save(file, tiffinfo={254: 2})  # a page of a document
    assert read_image(file).rgb.shape == (20, 30, 3)


XMP = (
    b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'>"
    b"<rdf:Description rdf:about='' tiff:Orientation='6' exif:PixelXDimension='14'><dc:creator>\xc3\x89va</dc:creator>"
    b"<exif:PixelYDimension>10</exif:PixelYDimension></rdf:Description></rdf:RDF></x:xmpmeta>"
)
_SEGMENT = struct.pack(">4sHHI", b"8BIM", 0x0404, 0, len(IPTC)) + IPTC + b"\0" * (len(IPTC) % 2)


def with_metadata(kind: str) -> bytes:
    """A file that other programs could have written, with all metadata that its format can hold."""
    tags = Image.Exif()
    tags[271] = "Maker"
    options: dict[str, object] = {"xmp": XMP, "exif": tags, "dpi": (300, 150)}
    if kind == "JPEG":
        body = b"Photoshop 3.0\0" + _SEGMENT
        options |= {
            "extra": b"\xff\xed" + struct.pack(">H", len(body) + 2) + body,
            "comment": "caf\u00e9".encode(),
        }
    elif kind == "PNG":
        options["pnginfo"] = info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", XMP.decode())
        info.add_text("Comment", "caf\u00e9")
        info.add_text("Author", "\u6771\u4eac")
        info.add_text("Raw profile type iptc", f"\niptc\n{len(_SEGMENT):8}\n{_SEGMENT.hex()}\n", zip=True)
    elif kind == "TIFF":
        tags[700], tags[34377] = XMP, _SEGMENT
    else:
        tags[282], tags[283], tags[296] = 300 / 2.54, 150 / 2.54, 3  # per centimeter
    return encode(pixels(), kind, **options)


HELD = {
    "JPEG": {"xmp", "iptc", "dpi", "Comment"},
    "PNG": {"xmp", "iptc", "dpi", "Comment", "Author"},
    "TIFF": {"xmp", "iptc", "dpi"},
    "WEBP": {"xmp", "dpi"},
}
NAMED = {"xmp": "XMP", "iptc": "IPTC data", "dpi": "resolution", "Comment": "comment", "Author": "texts"}


@pytest.mark.parametrize("source", HELD)
@pytest.mark.parametrize("target", HELD)
def test_metadata_goes_wherever_the_format_can_hold_it_and_the_rest_is_named(tmp_path, source, target):
    image = read_image(with_metadata(source))
    path = tmp_path / f"out.{target.lower()}"
    write_image(path, image)
    after = read_image(path)
    held = HELD[source] & HELD[target]
    assert ("xmp" in held) == (after.metadata.xmp is not None)
    assert after.metadata.iptc == (IPTC if "iptc" in held else None)
    assert after.metadata.dpi == pytest.approx((300, 150), rel=1e-3)
    assert dict(after.metadata.text) == {
        name: text for name, text in (("Comment", "caf\u00e9"), ("Author", "\u6771\u4eac")) if name in held
    }
    with Image.open(path) as again:
        assert again.getexif()[271] == "Maker"
        if target != "WEBP":
            assert again.info["dpi"] == pytest.approx((300, 150), rel=1e-3)
    lost = " ".join(not_storable(path, image))
    assert {name for name, word in NAMED.items() if word in lost} == HELD[source] - held


def test_xmp_and_exif_of_a_turned_image_describe_the_upright_one(tmp_path):
    """The orientation may be in XMP alone: it is applied once, and no reader of the output turns the image again."""
    data = encode(pixels(), "JPEG", xmp=XMP.replace(b"'6'", b'"6"'))
    image = read_image(data)
    assert image.rgb.shape == (14, 10, 3)
    for suffix in (".jpg", ".png", ".tif", ".webp"):
        write_image(tmp_path / f"a{suffix}", image)
        after = read_image(tmp_path / f"a{suffix}")
        assert after.rgb.shape == (14, 10, 3), suffix
        xmp = after.metadata.xmp or b""
        assert b'tiff:Orientation="1"' in xmp
        assert "\u00c9va".encode() in xmp
        assert b"Dimension" not in xmp
    both = encode(pixels(), "JPEG", xmp=XMP, exif=exif(3))
    assert read_image(both).rgb.shape == (10, 14, 3)


def test_huge_or_damaged_metadata_is_left_out_and_named():
    huge, damaged = b"<x>" + b" " * 50_000_000, b"<x>\xff\xfe\0</x>"
    tags = Image.Exif()
    tags[700], tags[33723] = huge, b"no IPTC"
    image = read_image(encode(pixels(), "TIFF", exif=tags))
    assert (image.metadata.xmp, image.metadata.iptc, image.dropped) == (None, None, ("XMP", "IPTC data"))
    image = read_image(encode(pixels(), "WEBP", lossless=True, xmp=huge))
    assert (image.metadata.xmp, image.dropped) == (None, ("XMP",))
    image = read_image(encode(pixels(), "JPEG", xmp=damaged, comment=b"latin \xe9"))
    assert (image.metadata.xmp, image.dropped) == (None, ("XMP",))
    np.testing.assert_array_equal(read_rgb(encode(pixels(), "WEBP", lossless=True, xmp=huge)), pixels())


@pytest.mark.parametrize("before_pixels", [True, False])
@pytest.mark.parametrize("compressed", [True, False])
def test_png_chunks_larger_than_pillow_accepts_do_not_cost_the_image(before_pixels, compressed):
    text = b" " * 50_000_000
    body = b"\1\0\0\0" + zlib.compress(text) if compressed else b"\0\0\0\0" + text + b" " * 20_000_000
    bomb = chunk(b"iTXt", b"XML:com.adobe.xmp\0" + body)
    plain = encode(pixels(), "PNG", dpi=(300, 300))
    at = plain.index(b"IDAT") - 4 if before_pixels else plain.index(b"IEND") - 4
    head, tail = plain[:at], plain[at:]
    image = read_image(head + bomb + tail)
    np.testing.assert_array_equal(image.rgb, pixels())
    assert image.metadata.xmp is None
    assert image.dropped
    assert image.metadata.dpi == pytest.approx((300, 300), rel=1e-3)


def test_comments_in_any_encoding_survive(tmp_path):
    image = read_image(encode(pixels(), "JPEG", comment=b"caf\xe9"))
    for suffix in (".jpg", ".png"):
        write_image(tmp_path / f"a{suffix}", image)
    with Image.open(tmp_path / "a.jpg") as again:
        assert again.info["comment"] == b"caf\xe9"
    assert dict(read_image(tmp_path / "a.png").metadata.text) == {"Comment": "caf\u00e9"}


def test_pillow_images_keep_their_metadata():
    with Image.open(io.BytesIO(with_metadata("JPEG"))) as image:
        info = to_pillow(from_pillow(image)).info
    assert (info["dpi"], info["comment"]) == ((300, 150), "caf\u00e9".encode())
    assert b"va</dc:creator>" in info["xmp"]
