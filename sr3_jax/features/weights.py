"""Read weights of published networks from files without executing any code in them.

Such files are pickles (of NumPy arrays, or PyTorch's with separate raw data), and a pickle may call any function of any
installed package. This reader calls none: the few names that weights need are replaced by functions of this module that
make arrays, and any other name is an error. safetensors files contain no code.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from sr3_jax.errors import UserError

LARGEST_FILE = 2 * 1024**3  # bytes, since files are read into memory
STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ByteStorage": "u1",
    "BFloat16Storage": "bfloat16",
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in a file of PyTorch before 1.6


def read_file(path: Path) -> tuple[bytes, str]:
    """A file's bytes and their SHA-256 in hex. UserError if the file cannot be read or is over 2 GiB."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{path} is over 2 GiB, too large to read: use a file that contains only weights")
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"weights {path} cannot be read ({reason}): check the path") from error
    return content, hashlib.sha256(content).hexdigest()


def read_arrays(content: bytes, name: str) -> dict[str, np.ndarray]:
    """The arrays in a .safetensors file, a PyTorch file or a pickle of NumPy arrays (protocol 3, 4), by dotted name.

    Args:
        name: the file's name in error messages.

    Raises:
        UserError: the file has none of these formats, is damaged, or would run code.
    """
    try:
        if content[:4] == b"PK\x03\x04":
            tree = _torch_zip(content)
        elif content[:1] == b"\x80":
            tree = _pickles(content)
        else:
            tree = load_safetensors(content)
        return dict(_flatten(tree))
    except _Unsupported as error:
        raise UserError(
            f"{name} {error}: use a file with a state dict only, as torch.save(model.state_dict(), FILE) writes"
        ) from error
    except SafetensorError as error:
        raise UserError(
            f"{name} is not a safetensors file, a PyTorch file or a pickle of arrays: use another file"
        ) from error
    except Exception as error:  # damage can raise almost any exception in the unpickler
        raise UserError(f"{name} is damaged or not a file of weights: download it again") from error


class _Unsupported(Exception):
    """A file that cannot be read; the message is the reason, which follows the file's name."""


class _Array:
    """An array in a NumPy pickle, which is created empty and then given its state."""

    value: np.ndarray

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, kind, fortran, numbers = state
        if not isinstance(kind, _Dtype) or type(numbers) is not bytes:
            raise _Unsupported("contains an array of objects")
        flat = np.frombuffer(numbers, np.dtype(kind.code))
        self.value = flat.reshape(shape, order="F" if fortran else "C").copy()


class _Dtype:
    def __init__(self, code: str, *_: object) -> None:
        if code not in {"f2", "f4", "f8", "i4", "i8", "u1"}:
            raise _Unsupported(f"contains an array of type {code!r:.40}")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in {"<", "|", "="}:
            raise _Unsupported(f"contains an array of byte order {state[1]!r:.40}")


class _Reader(pickle.Unpickler):
    """An unpickler that resolves only the names in `known`."""

    def __init__(self, file: BinaryIO, known: Mapping[tuple[str, str], Any], storage: Callable[[Any], Any]):
        _check_memo(file)
        super().__init__(file, encoding="latin1")
        self.known, self.storage = known, storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.known:
            return self.known[module, name]
        raise _Unsupported(f"refers to {f'{module}.{name}'!r:.80}, which is not needed for weights")

    def persistent_load(self, pid: Any) -> Any:
        return self.storage(pid)


def _check_memo(file: BinaryIO) -> None:
    """Refuse a pickle that numbers an object beyond its count: the unpickler would allocate all numbers below it."""
    start = file.tell()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > count:
            raise _Unsupported("has an object number beyond the number of its objects")
    file.seek(start)


def _names() -> dict[tuple[str, str], Any]:
    """The replacements of the names in a file of weights.

    A pickle can set attributes on these objects: OrderedDict has none to set, and the functions are new for each file.
    """
    known: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("numpy", "ndarray"): "ndarray",
        ("numpy", "dtype"): lambda *code: _Dtype(*code),
        ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: _tensor(*arguments),
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        known[module, "_reconstruct"] = lambda *_: _Array()
    return known | {("torch", storage): code for storage, code in STORAGES.items()}


def _no_storage(pid: Any) -> Any:
    raise _Unsupported("refers to data outside itself")


def _tensor(storage: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object) -> Any:
    """A PyTorch tensor: a strided view into a storage, starting at `offset`."""
    if not (isinstance(storage, _Storage) and isinstance(offset, int) and len(shape) == len(strides)):
        raise _Unsupported("contains a tensor without its data")
    return _View(storage, offset, tuple(map(int, shape)), tuple(map(int, strides)))


class _Storage:
    """A flat array; in files of PyTorch before 1.6 it follows the tensors that refer to it."""

    def __init__(self, code: str) -> None:
        self.dtype = jnp.dtype(code)  # NumPy alone has no bfloat16
        self.numbers: np.ndarray | None = None


class _View:
    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self) -> np.ndarray:
        numbers = self.storage.numbers
        if numbers is None:
            raise _Unsupported("lacks the data of a tensor")
        last = self.offset + sum(
            (side - 1) * step for side, step in zip(self.shape, self.strides, strict=True)
        )
        negative = any(number < 0 for number in (self.offset, *self.shape, *self.strides))
        # Weights do not overlap: a view larger than its storage could only exhaust memory.
        if negative or last >= numbers.size or not 0 < math.prod(self.shape) <= numbers.size:
            raise _Unsupported("has a tensor that extends beyond its data")
        steps = [step * numbers.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, steps).copy()


def _storage_type(pid: Any) -> tuple[str, str]:
    """(type, key) of a storage, which PyTorch writes as ('storage', type, key, device, count, ...)."""
    if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and pid[1] in STORAGES.values()):
        raise _Unsupported("refers to data in an unknown way")
    return pid[1], str(pid[2])


def _torch_zip(content: bytes) -> Any:
    """PyTorch since 1.6: an uncompressed zip of data.pkl and a file of raw data for each storage."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickled = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickled) != 1:
            raise _Unsupported("is a zip file, but not of PyTorch weights")
        if any(name.endswith("/code/") or "/code/" in name for name in archive.namelist()):
            raise _Unsupported("is a TorchScript program")
        folder = pickled[0].removesuffix("data.pkl")
        if sum(info.file_size for info in archive.infolist()) > LARGEST_FILE:
            raise _Unsupported("unpacks to over 2 GiB")
        storages: dict[str, _Storage] = {}

        def storage(pid: Any) -> _Storage:
            code, key = _storage_type(pid)
            if key not in storages:
                storages[key] = _Storage(code)
                storages[key].numbers = np.frombuffer(
                    archive.read(f"{folder}data/{key}"), storages[key].dtype
                )
            return storages[key]

        return _Reader(io.BytesIO(archive.read(pickled[0])), _names(), storage).load()


def _pickles(content: bytes) -> Any:
    """A pickle of NumPy arrays, or the pickles and raw data of PyTorch before 1.6."""
    file = io.BytesIO(content)
    storages: dict[str, _Storage] = {}

    def storage(pid: Any) -> _Storage:
        code, key = _storage_type(pid)
        return storages.setdefault(key, _Storage(code))

    first = _Reader(file, _names(), _no_storage).load()
    if first != _LEGACY_MAGIC:
        return first
    for _ in range(2):  # the format's version, and the machine that wrote it
        _Reader(file, _names(), _no_storage).load()
    tree = _Reader(file, _names(), storage).load()
    for key in _Reader(file, _names(), _no_storage).load():
        count = int.from_bytes(file.read(8), "little")
        target = storages[str(key)]
        numbers = file.read(count * target.dtype.itemsize)
        target.numbers = np.frombuffer(numbers, target.dtype, count)
    return tree


def _flatten(tree: Any, prefix: str = "", seen: set[int] | None = None) -> list[tuple[str, np.ndarray]]:
    seen = set() if seen is None else seen
    if isinstance(tree, _Array):
        tree = tree.value
    elif isinstance(tree, _View):
        tree = tree.array()
    if isinstance(tree, np.ndarray):
        return [(prefix, tree)]
    if not isinstance(tree, dict):
        raise _Unsupported(f"contains something other than arrays ({prefix or 'at the top level'!s:.80})")
    if id(tree) in seen:  # groups in groups could double the number of arrays at each level
        raise _Unsupported(f"contains the same group twice ({prefix!s:.80})")
    seen.add(id(tree))
    return [
        entry
        for key, value in tree.items()
        for entry in _flatten(value, f"{prefix}.{key}" if prefix else str(key), seen)
    ]
