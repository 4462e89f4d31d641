"""Errors of one line, files written whole, optional packages."""
import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# what pip calls a package that is imported under another name
PIP_NAMES = {"cv2": "opencv-python-headless", "torch.utils.tensorboard": "tensorboard", "yaml": "pyyaml"}


class UserError(Exception):
    """Something that a user can mend; the message is one line, which says how."""

    def __str__(self) -> str:
        # A DataLoader's worker passes its error on as a whole traceback, whose last line is the message.
        line = super().__str__().strip().split("\n")[-1]
        return line.removeprefix(f"{type(self).__module__}.{type(self).__name__}: ")


class SaidElsewhere(UserError):
    """Ends this process because another one of the same run fails, which says why."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """For a program's main: a UserError or OSError ends it with one line on stderr and exit status 1."""
    try:
        yield
    except (UserError, OSError) as error:
        if not isinstance(error, SaidElsewhere):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def positive(text: str) -> int:
    """An argument type: an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


class CommandLine(argparse.ArgumentParser):
    """A parser whose errors are one line, too."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":       # under torchrun every process reads the same files
        print(f"warning: {message}", file=sys.stderr, flush=True)


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is one: 1 class, 2 classes, 0 boxes."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "x")) else "s"
    return f"{number} {noun}{ending}"


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[str]:
    """Yields a temporary path beside `path`, and renames it to `path` after the block, so that a file that exists is
    whole. If the block fails, the temporary file is removed and `path` stays as it was."""
    temporary = f"{path}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def optional(package: str, needed_by: str) -> ModuleType:
    """Imports a package that only some users need: cv2, yaml, torch.utils.tensorboard or a module of
    cityscapesscripts. Raises UserError naming the pip command; `needed_by` (an option or a file) begins its message."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{needed_by} needs a package that cannot be imported ({reason}): "
                        f"pip install {PIP_NAMES.get(package, package.split('.')[0])}") from None
