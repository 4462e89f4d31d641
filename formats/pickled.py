"""Read a foreign file of weights and run nothing in it: .pth or .pt of PyTorch, .pkl of detectron2.

A pickle may call any function by its name. Here it can only build tensors, plain types and numpy's arrays of numbers.
PARTS stand in for numpy's functions, since numpy.dtype lets a file declare that its bytes are pointers.
"""
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import torch


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


def read(path: str | Path):
    """The content of a file, on the CPU. Raises ValueError with the reason, or FileNotFoundError."""
    if Path(path).is_dir():
        raise ValueError("it is a folder: name a file in it")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")                              # about foreign files: the error is enough
            start = file.read(1)
            file.seek(0)
            if start in (b"", b"<"):
                raise ValueError("it is empty" if start == b"" else "it is a web page, not what was to be downloaded")
            if str(path).endswith(".pkl"):
                return ArrayUnpickler(file, encoding="latin1").load()
            with torch.serialization.safe_globals([(part, name) for name, part in ADMITTED.items()]):
                return torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:                       # torch and pickle raise many types for a damaged file
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))              # torch's message about a function
        if refused:
            raise ValueError(f"it wants to run {refused[1]}; only arrays are admitted") from None
        raise ValueError("it is truncated, or something else than a file of PyTorch or numpy arrays") from None
