"""formats/pickled.py: a foreign file gives arrays and plain types; nothing in it is run."""
import os
import pickle
import zipfile

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


@pytest.mark.parametrize("content", [b"# A heading\n", b"\x89PNG\r\n", b"{}"])
def test_what_is_no_file_of_torch_is_said_in_plain_words(content, tmp_path):
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(ValueError, match="^it is no file of PyTorch$"):
        read(tmp_path / "README.md")


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


def twice(kind) -> bytes:
    """A pickle of 60 lists or tuples, each with the one before in it twice: 2 ** 60 parts."""
    one = kind()
    for _ in range(60):
        one = kind([one, one])
    return pickle.dumps(one, 2)


EXPLODING = {
    "shared": twice(list),
    "filled when others hold them": b"\x80\2" + b"".join(b"]q%c0" % i for i in range(61)) + b"".join(
        b"h%c(h%ch%ce0" % (i, i + 1, i + 1) for i in range(60)) + b"h\0.",
    "a key": b"\x80\2}" + twice(tuple)[2:-1] + b"K\1s.",                  # hashed when it is read
    "many arrays of one text": b"(" + pickle.dumps(bytes(2 ** 20), 4)[:-1] + b"0" + b"".join(
        b"cnumpy.core.numeric\n_frombuffer\nh\0cnumpy\ndtype\nX\2\0\0\0u1\x85RJ\0\0\x10\0\x85X\1\0\0\0C(tR"
        for _ in range(400)) + b"l."}


@pytest.mark.parametrize("content", EXPLODING.values(), ids=EXPLODING)
def test_a_pickle_that_explodes_is_refused_before_it_is_built(tmp_path, content):
    (tmp_path / "a.pkl").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", content)
    for name in ("a.pkl", "a.pth"):
        with pytest.raises(ValueError, match="much more memory than its size"):
            read(tmp_path / name)


def test_a_zip_that_unpacks_to_much_is_refused(tmp_path):
    torch.save({"a": torch.zeros(10 ** 6)}, tmp_path / "good.pth")
    for name, method in (("a.pth", zipfile.ZIP_DEFLATED), ("b.pth", zipfile.ZIP_STORED)):
        with zipfile.ZipFile(tmp_path / "good.pth") as good, zipfile.ZipFile(tmp_path / name, "w", method) as archive:
            for entry in good.namelist():
                archive.writestr(entry, good.read(entry))
    assert (tmp_path / "a.pth").stat().st_size < 10 ** 5
    with pytest.raises(ValueError, match="much more memory than its size"):
        read(tmp_path / "a.pth")
    assert len(read(tmp_path / "b.pth")["a"]) == 10 ** 6


def test_a_tensor_has_as_many_numbers_as_its_file(tmp_path):
    """One number may stand for all of a tensor, and two tensors may share theirs."""
    one = torch.zeros(1000)
    for old in (False, True):
        torch.save({"a": one, "b": one, "c": one[:10]}, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
        assert set(read(tmp_path / "a.pth")) == {"a", "b", "c"}
        for large in ([torch.zeros(1).expand(10 ** 12)], {"a": (one.expand(100, 1000),)}):
            torch.save(large, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
            with pytest.raises(ValueError, match="much more memory than its size"):
                read(tmp_path / "a.pth")


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.pth")
    for path in (tmp_path / "a.pth", "/dev/zero"):
        with pytest.raises(OSError, match="no ordinary file"):
            read(path)
