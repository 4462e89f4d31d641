"""Read a foreign file of weights and run nothing in it: .pth or .pt of PyTorch, .pkl of detectron2.

A pickle may call any function by its name. Here it can only build tensors, plain types and numpy's arrays of numbers.
PARTS stand in for numpy's functions, since numpy.dtype lets a file declare that its bytes are pointers. A file that is
damaged, or would become much larger in memory than it is on disk, is refused before anything is built.
"""
import io
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from formats.files import check_ordinary


class NumberType:
    """In place of numpy.dtype: numbers of up to 8 bytes. A pickle gives kind and size first, then the byte order."""

    def __init__(self, code: str, *_, order: str = ""):
        if not re.fullmatch(r"[<>|=]?[biuf][1248]", f"{order}{code}"):
            raise ValueError(f"only arrays of numbers are admitted, not of {ascii(code):.40}")
        self.code = f"{order}{code}"

    def __setstate__(self, state: tuple) -> None:
        self.__init__(self.code, order=state[1])


def array_of(data: bytes | str, kind: NumberType, shape: tuple = (), order: str = "C") -> np.ndarray:
    data = data.encode("latin1") if isinstance(data, str) else data      # str: written by Python 2
    array = np.frombuffer(data, kind.code).reshape(shape, order=order)
    return array.astype(array.dtype.newbyteorder("="))


class Array(np.ndarray):
    """In place of numpy.ndarray, which a pickle creates empty and then fills."""

    def __new__(cls, *_) -> "Array":
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        array = array_of(data, kind, shape, "F" if fortran else "C")
        super().__setstate__((1, array.shape, array.dtype, False, array.tobytes()))


PARTS = {"ndarray": Array, "_reconstruct": Array, "dtype": NumberType,
         "scalar": lambda kind, data: array_of(data, kind)[()],
         "_frombuffer": lambda data, kind, shape, order: array_of(data, kind, shape, order),
         "encode": lambda text, encoding: text.encode("latin1"),         # how protocol 2 writes bytes
         "bytes": lambda: b""}
MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric",
           "_codecs", "__builtin__", "builtins")
ADMITTED = {f"{module}.{name}": part for module in MODULES for name, part in PARTS.items()}


class ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if f"{module}.{name}" not in ADMITTED:
            raise ValueError(f"it wants to run {ascii(module + '.' + name):.80}; only arrays are admitted")
        return ADMITTED[f"{module}.{name}"]


# -------------------------------------------------------------------------------------- before anything is built

FILLING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")   # change what they are applied to
PART = 64                                                # bytes that a part of a pickle takes at least
LARGE = "it would take much more memory than its size"


class Weight:
    """What an object of a pickle will take, in bytes; what others share counts in each of them."""

    def __init__(self, size: int):
        self.size, self.held = size, False               # held: another object contains it


def check_pickle(file: BinaryIO, limit: int) -> None:
    """Raises ValueError if the next pickle in a file will create objects of more than `limit` bytes.

    Lists that contain one list twice, and so on, double with each of them; and every array may be made of one text."""
    stack, memo, mark, spent = [], {}, Weight(0), 0
    for opcode, value, _ in pickletools.genops(file):
        name, before, taken, spent = opcode.name, list(opcode.stack_before), [], spent + PART
        if "PUT" in name or name == "MEMOIZE":
            memo[len(memo) if value is None else value] = stack[-1]
            continue
        if "GET" in name or name == "DUP":
            stack.append(stack[-1] if name == "DUP" else memo[value])
            continue
        if pickletools.markobject in before:
            while (top := stack.pop()) is not mark:
                taken.append(top)
            before = before[:before.index(pickletools.markobject)]
        taken += [stack.pop() for _ in before]
        if name == "MARK":
            stack.append(mark)
            continue
        one = taken.pop() if name in FILLING else Weight(0)
        more = PART + sum(part.size for part in taken) + (len(value) if isinstance(value, (bytes, str)) else 0)
        spent += more
        if spent > limit or one.held:                    # what holds it has been weighed already
            raise ValueError(LARGE)
        one.size += more
        for part in taken:
            part.held = True
        stack += [one] * len(opcode.stack_after)


def check_zip(file: BinaryIO, size: int, limit: int) -> None:
    """Raises ValueError if a file of torch.save is damaged: torch does not look at the checksums in it. Also if its
    parts are larger than the file: compressed, as torch's never are, or one on another."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError(LARGE)
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"it is damaged: {damaged} in it has another checksum")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                check_pickle(io.BytesIO(archive.read(entry)), limit)


def is_intact(path: str | Path) -> bool:
    """Whether all checksums in a file of torch.save are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:                                # zipfile raises many types for a damaged file
        return False


def tensors_in(content) -> Iterator[torch.Tensor]:
    """All tensors in dictionaries, lists and tuples, at any depth."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            waiting += value.values() if isinstance(value, dict) else value


# ------------------------------------------------------------------------------------------------------- reading

def read(path: str | Path):
    """The content of a file, on the CPU. Raises ValueError with the reason, or OSError."""
    if Path(path).is_dir():
        raise ValueError("it is a folder: name a file in it")
    try:
        check_ordinary(path)
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")                              # about foreign files: the error is enough
            start, size = file.read(4), os.fstat(file.fileno()).st_size
            file.seek(0)
            if start == b"" or start[:1] == b"<":
                raise ValueError("it is empty" if start == b"" else "it is a web page, not what was to be downloaded")
            limit = 2**26 + 16 * size
            if str(path).endswith(".pkl"):
                check_pickle(file, limit)
                file.seek(0)
                return ArrayUnpickler(file, encoding="latin1").load()
            if start == b"PK\3\4":
                check_zip(file, size, limit)
            elif start[:1] != b"\x80":                                   # how each pickle of torch begins
                raise ValueError("it is no file of PyTorch")
            else:
                for _ in range(5):                                       # pickles, then the numbers: torch before 1.6
                    check_pickle(file, limit)
            file.seek(0)
            with torch.serialization.safe_globals([(part, name) for name, part in ADMITTED.items()]):
                content = torch.load(file, map_location="cpu", weights_only=True)
            if sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(content)) > 4 * size:
                raise ValueError(LARGE)                                  # 4: some of them may share their numbers
            return content
    except ValueError:
        raise
    except Exception as error:                       # torch and pickle raise many types for a damaged file
        if isinstance(error, OSError) and error.filename:
            raise
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))              # torch's message about a function
        if refused:
            raise ValueError(f"it wants to run {refused[1]}; only arrays are admitted") from None
        raise ValueError("it is truncated, or something else than a file of PyTorch or numpy arrays") from None
