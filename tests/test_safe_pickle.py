"""Pickles: what features are made of is read as it was written, and nothing in a file is ever executed or believed."""

import builtins
import collections
import io
import os
import pickle
import posix
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from clipcap_rag.errors import InputError
from clipcap_rag.safe_pickle import read_pickle

REBUILD, LOAD = torch._utils._rebuild_tensor_v2, torch.storage._load_from_bytes


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def storage(tensor: torch.Tensor) -> torch.storage.TypedStorage:
    """The content of a tensor as a pickle holds it."""
    return tensor.__reduce_ex__(2)[1][0]


def stored(tensor: torch.Tensor) -> bytes:
    """The bytes that `_load_from_bytes` gets."""
    return storage(tensor).__reduce__()[1][0]


def name(module: str, attribute: str) -> bytes:
    """The operations that look a name up in protocol 4, dots in it included."""
    return b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, attribute)) + b"\x93"


@pytest.fixture
def write(tmp_path):
    def write(content: bytes) -> Path:
        (tmp_path / "file.pkl").write_bytes(content)
        return tmp_path / "file.pkl"

    return write


@pytest.fixture
def marker(tmp_path):
    """A file that malicious pickles make."""
    return tmp_path / "executed"


def refusal(path: Path) -> str:
    """The one sentence with which a file is refused, without much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as refused:
        read_pickle(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
    message = str(refused.value)
    assert str(path) in message and "\n" not in message and ". " not in message and len(message) < 500
    return message


# -- what is read


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_data_is_read_as_it_was_written(write, protocol):
    content = {
        "half": torch.arange(6, dtype=torch.float16).reshape(2, 3),
        "part": torch.arange(12.0).reshape(4, 3)[1:3],
        "tokens": [torch.arange(4), torch.arange(2)],
        "rows": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "foreign": np.arange(3, dtype=">i4"),
        "texts": ["a", "ü", None, True, 7, 2.5, (1,), b"bytes"],
        "id": np.int64(12),
    }
    read = read_pickle(write(pickle.dumps(content, protocol=protocol)))
    assert list(read) == list(content)
    assert read["half"].dtype is torch.float16
    for key in ("half", "part"):
        assert torch.equal(read[key], content[key])
    assert all(map(torch.equal, read["tokens"], content["tokens"]))
    for key in ("rows", "columns", "foreign"):
        assert np.array_equal(read[key], content[key]) and read[key].dtype.kind == content[key].dtype.kind
    assert read["texts"] == content["texts"] and read["id"] == 12


def test_numpy_2_calls_its_modules_otherwise(write):
    for protocol in (4, 5):
        written = pickle.dumps([np.arange(3.0), np.float32(2)], protocol=protocol)
        for module in (b"multiarray", b"numeric"):  # a name with its length before it
            old, new = b"numpy.core." + module, b"numpy._core." + module
            written = written.replace(bytes([len(old)]) + old, bytes([len(new)]) + new)
        written = written[:2] + written[11:]  # without the frame, whose length is no longer right
        assert b"numpy._core" in written
        array, number = read_pickle(write(written))
        assert array.tolist() == [0, 1, 2] and number == 2


def test_files_of_torch_save_are_read(tmp_path):
    content = {"clip_embedding": torch.arange(6.0).reshape(2, 3), "captions": [{"caption": "a", "clip_embedding": 1}]}
    torch.save(content, tmp_path / "file.pkl")
    read = read_pickle(tmp_path / "file.pkl")
    assert torch.equal(read["clip_embedding"], content["clip_embedding"]) and read["captions"] == content["captions"]


def test_tensors_of_a_gpu_are_read_without_one(write):
    held = stored(torch.arange(3.0))
    moved = held.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    assert moved != held
    tensor = Call(torch._utils._rebuild_tensor_v2, Call(LOAD, moved), 0, (3,), (1,), False, {})
    assert read_pickle(write(pickle.dumps(tensor))).tolist() == [0, 1, 2]


# -- what is refused


@pytest.mark.parametrize("function", [os.system, posix.system, builtins.eval, builtins.exec, getattr, __import__])
def test_functions_are_not_called(write, marker, function):
    command = f"touch {marker}" if function in (os.system, posix.system) else f"open({str(marker)!r}, 'w')"
    malicious = pickle.dumps({"clip_embedding": Call(function, command), "captions": []})
    named = pickle.dumps(function)
    for content in (malicious, named):
        message = refusal(write(content))
        assert f"{function.__module__}.{function.__name__}" in message and "could run code" in message
    assert not marker.exists()
    if function is os.system:  # or the test would say nothing
        pickle.loads(malicious)
        assert marker.exists()


@pytest.mark.parametrize(
    "module, attribute",
    [
        ("torch.storage", "_load_from_bytes.__globals__"),
        ("torch.storage", "torch.load"),
        ("torch._utils", "_rebuild_tensor_v2.__class__"),
        ("torch", "load"),
        ("numpy", "ndarray.__reduce__"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "fromfile"),
        ("collections", "OrderedDict.__init__"),
        ("collections", "namedtuple"),
        ("pickle", "loads"),
        ("clipcap_rag.safe_pickle", "read_pickle"),
        ("builtins", "object"),
        ("os\n\x1b[2Jerror", "system"),
    ],
)
def test_other_names_and_ways_through_known_ones_are_refused(write, module, attribute):
    message = refusal(write(b"\x80\x04" + name(module, attribute) + b"."))
    assert attribute in message and message.isprintable()


def test_nothing_hides_inside_a_tensor(write, marker):
    evil = Call(os.system, f"touch {marker}")
    plain, old, new = pickle.dumps(evil), io.BytesIO(), io.BytesIO()
    torch.save(evil, old, _use_new_zipfile_serialization=False)
    torch.save(evil, new)
    for nested in (plain, old.getvalue(), new.getvalue(), b"", "text"):
        refusal(write(pickle.dumps(Call(LOAD, nested))))
    assert "posix.system" in refusal(write(new.getvalue()))
    assert "posix.system" in refusal(write(pickle.dumps(Call(LOAD, old.getvalue()))))
    assert not marker.exists()


THREE = Call(LOAD, stored(torch.arange(3.0)))
RECONSTRUCT = np.arange(3).__reduce__()[0]
SCALAR = np.float64(1).__reduce__()[0]


@pytest.mark.parametrize(
    "value",
    [
        Call(REBUILD, THREE, 0, (4,), (1,), False, {}),
        Call(REBUILD, THREE, 1, (3,), (1,), False, {}),
        Call(REBUILD, THREE, 0, (10**12,), (1,), False, {}),
        Call(REBUILD, THREE, 0, (10**6, 10**6), (0, 0), False, {}),
        Call(REBUILD, THREE, -1, (1,), (1,), False, {}),
        Call(REBUILD, THREE, 0, (-1,), (1,), False, {}),
        Call(REBUILD, THREE, 0, ("3",), (1,), False, {}),
        Call(REBUILD, THREE, 0, (3,), (1, 1), False, {}),
        Call(REBUILD, "storage", 0, (3,), (1,), False, {}),
        Call(REBUILD),
        Call(LOAD, stored(torch.arange(3.0))[:-4]),
        Call(LOAD),
        Call(collections.OrderedDict, [("a", 1)]),
        Call(np.dtype, "O"),
        Call(np.dtype, "V8"),
        Call(np.dtype, [("a", "f4")]),
        Call(np.ndarray, (3,)),
        Call(RECONSTRUCT),
        Call(SCALAR, np.dtype("f8"), b"12"),
        Call(SCALAR, "f8", b"12345678"),
        np.array([{}], object),
        np.array(["text"]),
        np.zeros(2, [("a", "f4")]),
    ],
    ids=lambda value: "",
)
def test_known_names_check_what_they_get(write, value):
    refusal(write(pickle.dumps(value, protocol=4)))


def test_arrays_have_the_size_of_their_content(write):
    whole = pickle.dumps(np.arange(3, dtype=np.int8), protocol=4)
    assert whole.count(b"K\x03\x85") == 1
    refusal(write(whole.replace(b"K\x03\x85", b"K\x04\x85")))


@pytest.mark.parametrize(
    "operations",
    [
        name("torch._utils", "_rebuild_tensor_v2") + b"}\x8c\x0c__defaults__K\x01sb",  # attributes of a function
        name("torch._utils", "_rebuild_tensor_v2") + b"}}\x8c\x08__code__K\x01s\x86b",
        name("numpy", "dtype") + b")\x81",  # objects
        name("numpy", "dtype") + b")}\x92",
        b"(" + name("numpy", "dtype") + b"o",
        b"(inumpy\ndtype\n",
        b"Pname\n",
        b"K\x01Q",
        b"\x82\x01",
        b"]}b",
        b"\x97",
        b"K\x01)R",
        b"0" * 5,
        b"\xff",
        b"",
    ],
)
def test_other_operations_are_refused(write, operations):
    refusal(write(b"\x80\x05" + operations + b"."))


@pytest.mark.parametrize("operation", [b"\x96", b"\x8e", b"\x8d", b"\x95"])
@pytest.mark.parametrize("size", [2**32, 2**62, 2**64 - 1])
def test_sizes_are_not_believed(write, operation, size):
    refusal(write(b"\x80\x05" + operation + struct.pack("<Q", size) + b"x."))


def test_places_are_not_believed(write):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_pickle(write(b"\x80\x04]r\xff\xff\xff\xff.")) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18


def test_a_file_of_torch_save_cannot_enlarge_its_tensors(tmp_path):
    large = Call(REBUILD, storage(torch.arange(3.0)), 0, (10**9,), (1,), False, collections.OrderedDict())
    torch.save(large, tmp_path / "file.pkl")
    refusal(tmp_path / "file.pkl")


def test_damaged_files(write, tmp_path):
    whole = pickle.dumps({"clip_embedding": torch.arange(64.0), "captions": ["a"] * 9})
    assert read_pickle(write(whole))["captions"] == ["a"] * 9
    for length in range(0, len(whole), 7):
        refusal(write(whole[:length]))
    for content in (b"a caption\n", b"\x89PNG\r\n\x1a\n" + bytes(40), b"PK\x03\x04" + bytes(40), bytes(100)):
        assert "damaged or no pickle" in refusal(write(content))
    saved = io.BytesIO()
    torch.save(torch.arange(9), saved)
    refusal(write(saved.getvalue()[:-60]))
    with pytest.raises(InputError, match="there is no file"):
        read_pickle(tmp_path / "nothing.pkl")
    with pytest.raises(InputError, match="there is no file"):
        read_pickle(tmp_path)
