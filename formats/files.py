"""Errors of one line, text that is safe to print, files written whole, optional packages."""
import argparse
import contextlib
import errno
import importlib
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO

# what pip calls a package that is imported under another name
PIP_NAMES = {"cv2": "opencv-python-headless", "torch.utils.tensorboard": "tensorboard", "yaml": "pyyaml"}


class UserError(Exception):
    """Something that a user can mend; the message is one line, which says how."""

    def __str__(self) -> str:
        text = super().__str__().strip()
        if text.startswith("Caught "):  # a DataLoader's worker passes its error on as a whole traceback: the last line
            text = text.split("\n")[-1].removeprefix(f"{type(self).__module__}.{type(self).__name__}: ")
        return printable(text)


def printable(text: object) -> str:
    """The text with control characters as \\x1b or \\n, and so with every other character that moves the cursor, turns
    the direction or is half a surrogate pair: names from files can neither command a terminal nor end a print."""
    unsafe = r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(unsafe, lambda found: ascii(found[0])[1:-1], str(text))


class SaidElsewhere(UserError):
    """Ends this process because another one of the same run fails, which says why."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """For a program's main: a UserError or OSError ends it with one line on stderr and exit status 1, without a line if
    nobody reads what it prints any more."""
    try:
        yield
        print(end="", flush=True)  # not sys.stdout.flush(): where it is closed, sys.stdout is None
    except (UserError, OSError) as error:
        silent = isinstance(error, SaidElsewhere) or isinstance(error, BrokenPipeError) and reader_has_gone()
        if not silent:
            print(printable(f"error: {error}"), file=sys.stderr)
        sys.exit(1)


def reader_has_gone() -> bool:
    """Whether what is printed goes into a pipe that was closed at its other end, as by `| head`."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again at its end
        return True
    return False


def positive(text: str) -> int:
    """An argument type: an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


class CommandLine(argparse.ArgumentParser):
    """A parser whose errors are one line, too."""

    def error(self, message: str) -> None:
        self.exit(2, printable(f"error: {message} (see {self.prog} --help)") + "\n")


def warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":       # under torchrun every process reads the same files
        print(printable(f"warning: {message}"), file=sys.stderr, flush=True)


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is one: 1 class, 2 classes, 0 boxes."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "x")) else "s"
    return f"{number} {noun}{ending}"


def check_ordinary(path: str | Path) -> None:
    """Raises OSError if there is something else than a file: reading a pipe or a device may wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no ordinary file", str(path))


def beside(path: str | Path) -> str:
    """Makes a new, empty file beside `path` and returns its path, which nobody can foresee: what is there already, a
    link too, is neither followed nor changed. Raises OSError."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f"{name[:40]}.{secrets.token_hex(8)}.tmp")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return temporary


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[str]:
    """Yields the path of a new file beside `path`, and renames it to `path` after the block, so that a file that exists
    is whole. If the block fails, the new file is removed and `path` stays as it was; an OSError then names `path`."""
    temporary = None
    try:
        temporary = beside(path)
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.remove(temporary)
        # a full disk names no file
        if isinstance(error, OSError) and error.errno and str(error.filename or ".tmp").endswith(".tmp"):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def sync(file: IO) -> None:
    """Bring what was written to an open file to the disk. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def write_whole(path: str | Path, content: bytes) -> None:
    """Writes a file, see `replacing`. Raises OSError."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)


def optional(package: str, needed_by: str) -> ModuleType:
    """Imports a package that only some users need: cv2, yaml, torch.utils.tensorboard, onnx, onnxscript, onnxruntime or
    a module of cityscapesscripts. Raises UserError naming the pip command; `needed_by` (an option or a file) begins its
    message."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{needed_by} needs a package that cannot be imported ({reason}): "
                        f"pip install {PIP_NAMES.get(package, package.split('.')[0])}") from None
