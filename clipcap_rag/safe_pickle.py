"""Pickles of tensors, arrays, numbers and text, read without giving them a way to run code."""

import io
import math
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from tqdm import tqdm

from clipcap_rag.errors import InputError
from clipcap_rag.progress import bar

_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # begins what a tensor holds
_NUMBERS = re.compile(r"[<>=|]?[fiub][1248]")


def read_pickle(path: Path) -> Any:
    """What `pickle.dump` or `torch.save` wrote: tensors, arrays, numbers and text in lists, tuples and dictionaries.

    Of the names that a pickle may call only those that rebuild a tensor or an array are known, and they stand for
    functions of this module that check their arguments. The tensors' content is read by `torch.load` with
    `weights_only`. No size that a file claims is believed before as many bytes are there.

    Raises:
        InputError: the file is missing, damaged, no pickle, or names anything else.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}; check the path")
    try:
        with open(path, "rb") as file:
            if zipfile.is_zipfile(file):
                return _torch_load(path, mmap=True)  # which cannot enlarge a tensor beyond its file
            file.seek(0)
            with bar(path.name, total=path.stat().st_size, unit="B") as progress:
                return _Unpickler(_Bounded(file, progress)).load()
    except _Forbidden as error:
        raise InputError(
            f"{path} names {str(error)[:100]!r}, which features do not need and which could run code, so it is not "
            "read; make the file again from the photos"
        ) from error
    except Exception as error:  # a pickle can be wrong in as many ways as there are programs
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:150].rstrip(".: ")
        raise InputError(
            f"{path} is damaged or no pickle of tensors, numbers and text ({reason}); copy it again or make it again"
        ) from error


class _Forbidden(Exception):
    """A pickle names something that is not known here."""


class _Bounded:
    """A file that is not asked for more bytes than it has: memory is taken for as many as are asked for."""

    def __init__(self, file: IO[bytes], progress: tqdm):
        self.file, self.left, self.progress = file, progress.total, progress

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            raise EOFError("it ends too early")
        self.left -= count
        self.progress.update(count)
        return self.file.read(count)

    def readline(self) -> bytes:
        line = self.file.readline()
        self.left -= len(line)
        return line


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler without the operations that can do more than call one of `_KNOWN`.

    The one written in Python is ten times slower (4 s for a million captions), but nine bytes make the one written in C
    fill gigabytes of memory: it believes a pickle's word about how many objects it remembers.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise _Forbidden(f"{module}.{name}")
        return _KNOWN[module, name]

    def load_build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) not in (_Array, _Type):
            raise pickle.UnpicklingError("it sets attributes")
        self.stack[-1].__setstate__(state)

    def load_bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    def refuse(self) -> None:
        raise pickle.UnpicklingError("it makes objects that are no data")

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    for operation in ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4"):
        dispatch[getattr(pickle, operation)[0]] = refuse


def _torch_load(source: Any, **options: Any) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True, **options)
    except Exception as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            raise _Forbidden(forbidden[1]) from error
        raise pickle.UnpicklingError("its tensors are damaged or of a kind that is not read") from error


def _storage(data: bytes) -> torch.storage.TypedStorage:
    if not isinstance(data, bytes) or not data.startswith(_TORCH_MAGIC):
        raise pickle.UnpicklingError("a tensor has no content")
    return _torch_load(io.BytesIO(data))


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    """A tensor that is stored row by row; torch itself would enlarge the storage to any size that is asked for."""
    if not isinstance(storage, torch.storage.TypedStorage) or not _are_counts((offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor has no content or no size")
    flat = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
    tensor = flat[offset : offset + math.prod(size)].view(size)
    if any(length > 1 and step != own for length, step, own in zip(size, stride, tensor.stride(), strict=True)):
        raise pickle.UnpicklingError("a tensor is not stored row by row")
    return tensor


class _Type:
    """A NumPy number type in a pickle; its state says only the order of the bytes."""

    def __init__(self, code: str):
        if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
            raise pickle.UnpicklingError("an array holds something else than numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError("an array holds something else than numbers")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that takes only numbers, and only as many as are there."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, by_column, data = state
        values = _frombuffer(data, kind, shape, "F" if by_column else "C")
        super().__setstate__((1, values.shape, values.dtype, bool(by_column), bytes(data)))


def _frombuffer(data: bytes, kind: _Type, shape: tuple, order: str, *_: Any) -> np.ndarray:
    if not isinstance(data, bytes | bytearray) or not isinstance(kind, _Type) or not _are_counts(shape):
        raise pickle.UnpicklingError("an array has no content, type or shape")
    return np.frombuffer(data, kind.dtype).reshape(shape, order=order)


def _are_counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and value >= 0 for value in values)


_KNOWN = {
    ("collections", "OrderedDict"): lambda: {},
    ("_codecs", "encode"): lambda text, _: str.encode(text, "latin1"),  # bytes, before protocol 3
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): lambda code, *_: _Type(code),
}
for _package in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _KNOWN |= {
        (f"{_package}.multiarray", "_reconstruct"): lambda kind, shape, code: np.empty(0).view(_Array),
        (f"{_package}.multiarray", "scalar"): lambda kind, data: _frombuffer(data, kind, (), "C").item(),
        (f"{_package}.numeric", "_frombuffer"): _frombuffer,
    }
