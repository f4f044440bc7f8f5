"""Seeded hostile image and model files for benchmarks/soak.py: cut, flipped, of absurd sizes, not what they claim."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_SUFFIX = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "TIFF": "tif", "GIF": "gif", "BMP": "bmp"}
_MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "F", "I"),
    "GIF": ("L", "P"),
    "BMP": ("1", "L", "P", "RGB"),
}
_SIDES = ((1, 1), (24, 18), (31, 7), (18, 24))


# ---- Images


def write_images(folder: Path, *, count: int, seed: int) -> None:
    """Write `count` files to a new folder, named by their kind."""
    folder.mkdir(parents=True)
    kinds = (_cut_image, _flipped_image, _wrong_header, _giant, _bad_metadata, _odd_mode, _mixed)
    for index in range(count):
        chance = random.Random(f"image {seed} {index}")
        kind = kinds[index % len(kinds)]
        suffix, data = kind(chance)
        (folder / f"{index:04d}{kind.__name__}.{suffix}").write_bytes(data)


def _image(chance: random.Random, file_format: str | None = None, **options: Any) -> tuple[str, bytes]:
    """A valid image: (format, bytes)."""
    file_format = file_format or chance.choice(list(_MODES))
    mode, (width, height) = chance.choice(_MODES[file_format]), chance.choice(_SIDES)
    noise = np.frombuffer(chance.randbytes(height * width * 3), np.uint8).reshape(height, width, 3)
    image = Image.fromarray(noise)
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    elif mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(noise[..., 1]))
        image = image.convert(mode)
    elif mode in ("F", "I"):
        image = image.convert("L").convert(mode)
    elif mode != "LAB":
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file_format, file.getvalue()


def _cut_image(chance: random.Random) -> tuple[str, bytes]:
    file_format, data = _image(chance)
    return _SUFFIX[file_format], data[: chance.randrange(len(data))]


def _flipped_image(chance: random.Random) -> tuple[str, bytes]:
    file_format, data = _image(chance)
    return _SUFFIX[file_format], _flip(data, chance, most=20)


def _flip(data: bytes, chance: random.Random, *, most: int, within: int | None = None) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, most)):
        place = chance.randrange(min(len(changed), within or len(changed)))
        changed[place] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _wrong_header(chance: random.Random) -> tuple[str, bytes]:
    """Random bytes in the first 64, or the head of another format."""
    file_format, data = _image(chance)
    if chance.random() < 0.5:
        return _SUFFIX[file_format], _flip(data, chance, most=8, within=64)
    head = chance.choice((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"II*\0", b"RIFF", b"BM"))
    return _SUFFIX[file_format], head + data[len(head) :]


def _giant(chance: random.Random) -> tuple[str, bytes]:
    """A small file that claims, or really has, a very large side."""
    width, height = chance.choice(
        ((2**31 - 1, 1), (1, 2**31 - 1), (100_000, 100_000), (65_535, 65_535), (20_000, 1), (1, 20_000))
    )
    rows = b""
    if width * height <= 20_000:  # complete: 1 bit per pixel
        rows = (b"\0" + bytes(-(-width // 8))) * height
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows))
    return "png", data + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _bad_metadata(chance: random.Random) -> tuple[str, bytes]:
    """EXIF, ICC or XMP data that is cut, loops, is random, or decompresses to 200 MB."""
    loop = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x69\x87\4\0\1\0\0\0\x08\0\0\0"
    junk = chance.randbytes(chance.randint(1, 3000))
    kind = chance.randrange(5)
    if kind == 0:
        return "jpg", _image(chance, "JPEG", exif=chance.choice((loop, b"Exif\0\0MM\0*" + junk)))[1]
    if kind == 1:
        return "jpg", _image(chance, "JPEG", icc_profile=junk)[1]
    if kind == 2:
        return "png", _image(chance, "PNG", icc_profile=junk, exif=b"Exif\0\0" + junk)[1]
    if kind == 3:
        return "webp", _image(chance, "WEBP", exif=junk, icc_profile=junk, xmp=junk)[1]
    data = _image(chance, "PNG")[1]
    name = chance.choice((b"iTXt", b"zTXt", b"iCCP", b"eXIf", b"tEXt"))
    packed = zlib.compress(b"\0" * 200_000_000, 1) if chance.random() < 0.2 else junk
    profile = {b"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0", b"iCCP": b"profile\0\0", b"zTXt": b"exif\0\0"}
    return "png", data[:33] + _chunk(name, profile.get(name, b"Raw profile type exif\0") + packed) + data[33:]


def _odd_mode(chance: random.Random) -> tuple[str, bytes]:
    """A valid image in an unusual mode, perhaps animated or under the name of another format."""
    file_format, data = _image(chance)
    return chance.choice((_SUFFIX[file_format], "png", "jpg")), data


def _mixed(chance: random.Random) -> tuple[str, bytes]:
    """The head of one file and the tail of another."""
    (file_format, one), (_, two) = _image(chance), _image(chance)
    return _SUFFIX[file_format], one[: chance.randrange(len(one))] + two[chance.randrange(len(two)) :]


# ---- Models


def write_models(folder: Path, whole: bytes, *, count: int, seed: int, trap: Path) -> list[Path]:
    """Write `count` files to a new folder, derived from the bytes of a valid export.

    Args:
        trap: a file that code in a pickle would create.
    """
    folder.mkdir(parents=True)
    kinds: tuple[Callable[[bytes, random.Random], bytes], ...] = (
        _cut_model,
        _flipped_header,
        _flipped_data,
        _json_bomb,
        _absurd_config,
        _absurd_tensors,
        lambda whole, chance: _pickle(chance, trap),
    )
    names = ("cut", "flipped_header", "flipped_data", "json_bomb", "absurd_config", "tensors", "pickle")
    paths = []
    for index in range(count):
        chance = random.Random(f"model {seed} {index}")
        kind = index % len(kinds)
        paths.append(folder / f"{index:04d}_{names[kind]}.safetensors")
        paths[-1].write_bytes(kinds[kind](whole, chance))
    return paths


def _split(whole: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + size]), whole[8 + size :]


def _joined(header: bytes | dict[str, Any], data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _cut_model(whole: bytes, chance: random.Random) -> bytes:
    return whole[: chance.randrange(len(whole))]


def _flipped_header(whole: bytes, chance: random.Random) -> bytes:
    return _flip(whole, chance, most=5, within=8 + int.from_bytes(whole[:8], "little"))


def _flipped_data(whole: bytes, chance: random.Random) -> bytes:
    header, data = _split(whole)
    return _joined(header, _flip(data, chance, most=200))


def _json_bomb(whole: bytes, chance: random.Random) -> bytes:
    """A header or a config that is nested deeply, very long, or has numbers that take forever to parse."""
    deep = chance.choice((1_000, 100_000, 1_000_000))
    text = chance.choice(
        (
            "[" * deep + "]" * deep,
            '{"a":' * deep + "1" + "}" * deep,
            "9" * chance.choice((5_000, 3_000_000)),
            '{"model": {"channels": ' + "9" * 20_000 + "}}",
            json.dumps({f"k{index}": index for index in range(300_000)}),
            '{"model": {"channels": 1e999, "dropout": NaN}}',
        )
    )
    header, data = _split(whole)
    if chance.random() < 0.4:
        return _joined(text.encode(), data)
    header["__metadata__"]["config"] = text
    return _joined(header, data)


def _absurd_config(whole: bytes, chance: random.Random) -> bytes:
    """The export with one or two fields of its config replaced by values that no run has."""
    header, data = _split(whole)
    config = json.loads(header["__metadata__"]["config"])
    values = (
        *(0, -1, 1, 10**7, 10**9, 2**63, 1e300, 0.5, float("nan"), float("inf"), True, None),
        *("", "ancestral", "\x1b[31m", "os:system", "a" * 10_000),
        *([], [0], [10**7] * 4, [1] * 10_000, [[[]]], {}, {"a": {"b": 1}}),
    )
    for _ in range(chance.randint(1, 2)):
        section = chance.choice(("model", "diffusion", "sampling", "data"))
        field = chance.choice(sorted(config[section]))
        config[section][field] = chance.choice(values)
    if chance.random() < 0.1:
        config = chance.choice((None, [], "model", {"model": 1}, {section: config[section]}))
    header["__metadata__"]["config"] = json.dumps(config)
    return _joined(header, data)


def _absurd_tensors(whole: bytes, chance: random.Random) -> bytes:
    """The export with a wrong shape, type, offset or name of a tensor."""
    header, data = _split(whole)
    name = chance.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    change = chance.randrange(7)
    if change == 0:
        entry["shape"] = chance.choice(([], [0], [2**62, 2**62], [1] * 5_000, [-1], entry["shape"][::-1]))
    elif change == 1:
        entry["dtype"] = chance.choice(("F64", "BOOL", "I8", "F8_E4M3", "BF16", "X", ""))
    elif change == 2:
        entry["data_offsets"] = chance.choice(([0, 2**63], [4, 0], [0, 0], [-4, 4], [len(data)] * 2))
    elif change == 3:
        header[chance.choice(("a" * 100_000, "..", "a.b.c", "", ".".join("a" * 3_000)))] = header.pop(name)
    elif change == 4:
        del header[name]
    elif change == 5:
        data = struct.pack("<f", float("nan")) * (len(data) // 4)
    else:
        header |= {f"more.{index}": entry for index in range(50_000)}
    return _joined(header, data)


def _pickle(chance: random.Random, trap: Path) -> bytes:
    """A pickle under the name of a model, plain or in the zip file of PyTorch; it would run code when loaded."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(trap), "w")

    protocol = chance.randrange(6)
    data = pickle.dumps({"model": Trap(), "more": list(range(chance.randrange(99)))}, protocol)
    if chance.random() < 0.3:
        data = b"\x80\x04r" + struct.pack("<I", 2**31 - 1) + b"."  # an index that asks for gigabytes
    if chance.random() < 0.4:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", data)
        data = file.getvalue()
    return data[: chance.randint(1, len(data))] if chance.random() < 0.2 else data
