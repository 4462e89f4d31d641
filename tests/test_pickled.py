"""formats/pickled.py: a foreign file gives arrays and plain types; nothing in it is run."""
import pickle

import numpy as np
import pytest
import torch

from formats.pickled import read
from helpers import Code


def test_a_pickle_may_hold_arrays_and_nothing_else(tmp_path):
    path = tmp_path / "a.pkl"
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": [np.float64(2.5), "text"]}
    arrays |= {"c": np.arange(6, dtype=">i2").reshape(2, 3).T, "d": np.array(True), "e": np.zeros((0, 3))}
    for protocol in range(6):
        path.write_bytes(pickle.dumps(arrays, protocol))
        back = read(path)
        assert back["b"] == arrays["b"] and all(np.array_equal(back[key], arrays[key]) for key in "acde")
        assert [back[key].shape for key in "acde"] == [(2, 3), (3, 2), (), (0, 3)] and back["c"].dtype == np.int16
    for wrong in (np.array(["text"]), np.array([None]), np.zeros(2, np.complex64), np.zeros(2, np.longdouble),
                  np.zeros(2, [("a", "O")]), np.dtype("V8")):
        path.write_bytes(pickle.dumps({"a": wrong}))
        with pytest.raises(ValueError, match="only arrays of numbers are admitted"):
            read(path)
    for wrong in (print, np.load, np.ndarray.tofile, torch.zeros(2), Code(tmp_path / "ran")):
        path.write_bytes(pickle.dumps({"a": wrong}))
        with pytest.raises(ValueError, match="only arrays are admitted"):
            read(path)
    assert not (tmp_path / "ran").exists()


class Crafted:
    """A pickle that describes a type of 8 bytes which are a pointer, and lets numpy follow it."""

    def __reduce__(self):
        return np.zeros(1).__reduce__()[0], (np.ndarray, Pointer(), b"b")


class Pointer:
    def __reduce__(self):
        return np.float64().__reduce__()[0], (PointerType(), b"A" * 8)


class PointerType:
    def __reduce__(self):
        return np.dtype, ("V8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)


def test_a_pickle_cannot_reach_into_memory(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Crafted()))
    torch.save(Crafted(), tmp_path / "a.pth")
    for name in ("a.pkl", "a.pth"):
        with pytest.raises(ValueError, match="only arrays of numbers"):
            read(tmp_path / name)


class Flags:
    """The type of a number, declared to be a pointer to an object."""

    def __reduce__(self):
        return np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 63)


def array(shape: tuple, kind, data: bytes):
    """What a pickle states about an array, true or not."""
    class Described:
        def __reduce__(self):
            return (*np.zeros(1).__reduce__()[:2], (1, shape, kind, False, data))
    return Described()


def test_a_pickle_cannot_claim_sizes_or_types(tmp_path):
    """The size of an array is that of its bytes in the file, and its type a number's."""
    class Bytes:
        def __reduce__(self):
            return bytes, (10 ** 12,)

    for suffix in (".pkl", ".pth"):
        def reread(content):
            if suffix == ".pkl":
                (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
            else:
                torch.save(content, tmp_path / "a.pth")
            return read(tmp_path / f"a{suffix}")

        plain = reread(array((1,), Flags(), np.float64(2.5).tobytes()))
        assert plain.tolist() == [2.5] and plain.dtype == np.float64 and not plain.dtype.hasobject
        for wrong in (array((10 ** 12,), np.dtype("f8"), b"8" * 8), array((2 ** 32, 2 ** 32), np.dtype("f8"), b""),
                      array((-1, 0), np.dtype("f8"), b""), array((2,), np.dtype("f8"), "text"), Bytes()):
            with pytest.raises(ValueError):
                reread(wrong)
