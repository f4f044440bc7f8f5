"""Weights of published networks from a file, without running any of it.

Such files are pickles (NumPy's, or PyTorch's with the numbers beside it), and a pickle may call any function of
any installed package. Here it can call none: each name that weights need stands for a few lines of this file,
which make plain arrays, and every other name refuses the file. safetensors files hold no code to begin with.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from sr3_jax.errors import UserError

LARGEST_FILE = 2 * 1024**3  # bytes; read into memory whole
STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ByteStorage": "u1",
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in a file of PyTorch before 1.6


def read_file(path: Path) -> tuple[bytes, str]:
    """A file's bytes and their SHA-256 in hex. UserError if it cannot be read or is over 2 GiB."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(
                f"{path} is over 2 GiB, too large for a metric's weights: name the weights' own file"
            )
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"weights {path} cannot be read ({reason}): name a file that can") from error
    return content, hashlib.sha256(content).hexdigest()


def read_arrays(content: bytes, name: str) -> dict[str, np.ndarray]:
    """Every array in a .safetensors, a PyTorch file or a pickle of NumPy arrays (protocol 3, 4), by dotted name.

    `name` is what errors call the file. Raises UserError if it is none of these, is damaged, or would run code.
    """
    try:
        if content[:4] == b"PK\x03\x04":
            tree = _torch_zip(content)
        elif content[:1] == b"\x80":
            tree = _pickles(content)
        else:
            tree = load_safetensors(content)
        return dict(_flatten(tree))
    except _Refused as error:
        raise UserError(f"{name} {error}: name a file that holds weights alone") from error
    except SafetensorError as error:
        raise UserError(
            f"{name} is neither safetensors, PyTorch's nor a pickle of arrays: name another"
        ) from error
    except Exception as error:  # damage may come out anywhere in the unpickler, as nearly any exception
        raise UserError(f"{name} is damaged or no file of weights: fetch it again") from error


class _Refused(Exception):
    """What is wrong with the file, to follow its name."""


class _Array:
    """What NumPy's pickles call an array: made empty, then given its state."""

    value: np.ndarray

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, kind, fortran, numbers = state
        if not isinstance(kind, _Dtype) or type(numbers) is not bytes:
            raise _Refused("holds an array of objects")
        flat = np.frombuffer(numbers, np.dtype(kind.code))
        self.value = flat.reshape(shape, order="F" if fortran else "C").copy()


class _Dtype:
    def __init__(self, code: str, *_: object) -> None:
        if code not in {"f2", "f4", "f8", "i4", "i8", "u1"}:
            raise _Refused(f"holds an array of type {code!r:.40}")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in {"<", "|", "="}:
            raise _Refused(f"holds an array of byte order {state[1]!r:.40}")


class _Reader(pickle.Unpickler):
    """An unpickler that knows the names in `known` and no other."""

    def __init__(self, file: BinaryIO, known: Mapping[tuple[str, str], Any], storage: Callable[[Any], Any]):
        super().__init__(file, encoding="latin1")
        self.known, self.storage = known, storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.known:
            return self.known[module, name]
        raise _Refused(f"calls for {f'{module}.{name}'!r:.80}, which no weights need")

    def persistent_load(self, pid: Any) -> Any:
        return self.storage(pid)


def _names() -> dict[tuple[str, str], Any]:
    """What the names in a file of weights stand for.

    A pickle may set attributes of what it is given: OrderedDict takes none, and the functions are new for each file.
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
    raise _Refused("refers to data outside itself")


def _tensor(storage: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object) -> Any:
    """What PyTorch calls a tensor: a view into a storage, numbers counted from `offset`."""
    if not (isinstance(storage, _Storage) and isinstance(offset, int) and len(shape) == len(strides)):
        raise _Refused("holds a tensor without its data")
    return _View(storage, offset, tuple(map(int, shape)), tuple(map(int, strides)))


class _Storage:
    """A run of numbers; in files of PyTorch before 1.6 they come after the tensors that use them."""

    def __init__(self, code: str) -> None:
        self.dtype = np.dtype(code)
        self.numbers: np.ndarray | None = None


class _View:
    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self) -> np.ndarray:
        numbers = self.storage.numbers
        if numbers is None:
            raise _Refused("lacks the data of a tensor")
        last = self.offset + sum(
            (side - 1) * step for side, step in zip(self.shape, self.strides, strict=True)
        )
        negative = any(number < 0 for number in (self.offset, *self.shape, *self.strides))
        # No weights share their numbers: a view of more than there are would only fill the memory.
        if negative or last >= numbers.size or not 0 < math.prod(self.shape) <= numbers.size:
            raise _Refused("has a tensor that reaches past its data")
        steps = [step * numbers.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, steps).copy()


def _storage_type(pid: Any) -> tuple[str, str]:
    """(type, key) of a storage as PyTorch writes it: ('storage', type, key, device, count, ...)."""
    if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and pid[1] in STORAGES.values()):
        raise _Refused("refers to data in an unknown way")
    return pid[1], str(pid[2])


def _torch_zip(content: bytes) -> Any:
    """PyTorch since 1.6: a zip of data.pkl and a file of raw numbers for each storage, none of them compressed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickled = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickled) != 1:
            raise _Refused("is a zip file, but not one of PyTorch's weights")
        if any(name.endswith("/code/") or "/code/" in name for name in archive.namelist()):
            raise _Refused("is a TorchScript program")
        folder = pickled[0].removesuffix("data.pkl")
        if sum(info.file_size for info in archive.infolist()) > LARGEST_FILE:
            raise _Refused("unpacks to over 2 GiB")
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
    """A pickle of NumPy arrays, or the several pickles and raw numbers of PyTorch before 1.6."""
    file = io.BytesIO(content)
    storages: dict[str, _Storage] = {}

    def storage(pid: Any) -> _Storage:
        code, key = _storage_type(pid)
        return storages.setdefault(key, _Storage(code))

    first = _Reader(file, _names(), _no_storage).load()
    if first != _LEGACY_MAGIC:
        return first
    for _ in range(2):  # the format's version, and what machine wrote it
        _Reader(file, _names(), _no_storage).load()
    tree = _Reader(file, _names(), storage).load()
    for key in _Reader(file, _names(), _no_storage).load():
        count = int.from_bytes(file.read(8), "little")
        kept = storages[str(key)]
        numbers = file.read(count * kept.dtype.itemsize)
        kept.numbers = np.frombuffer(numbers, kept.dtype, count)
    return tree


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, np.ndarray]]:
    if isinstance(tree, _Array):
        tree = tree.value
    elif isinstance(tree, _View):
        tree = tree.array()
    if isinstance(tree, np.ndarray):
        return [(prefix, tree)]
    if not isinstance(tree, dict):
        raise _Refused(f"holds something that is no array ({prefix or 'at its top'!s:.80})")
    return [
        entry
        for key, value in tree.items()
        for entry in _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    ]
