"""The folder of a run: one run at a time holds it, and nothing but a lock is written there before the run begins."""
import contextlib
import fcntl
import itertools
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from formats.files import UserError, check_ordinary, warn
from tools.command_line import output_file
from tools.processes import from_first, gathered, together

# a file of a run, as a killed process leaves it half written: see `beside` in formats/files.py
HALF_WRITTEN = re.compile(r"(last\.pt|final\.pt|metrics\.jsonl|config\.json|nonfinite\.json|labels-\d+\.png)"
                          r"\.[0-9a-f]{16}\.tmp")


class RunFolder:
    """Holds the folder of a run in a `with` block, which all processes enter; process 0 alone locks and writes.

    An earlier run is held from the start. A new folder is made by `begin` alone, so that a run that is refused leaves
    none. Raises UserError on all processes where another run holds the folder, or process 0 lacks the run.
    """

    def __init__(self, out: str | os.PathLike, fresh: bool, rank: int):
        self.out, self.fresh, self.rank, self.locked = Path(out), fresh, rank, False
        self.held = contextlib.ExitStack()

    def __enter__(self) -> "RunFolder":
        self.fresh = from_first(self.fresh, "process 0 to say whether it starts anew")
        if not self.fresh:
            check_first(self.out)
        with together("process 0 to lock the folder of the run"):
            if self.rank == 0 and self.out.is_dir():
                self.held.enter_context(lock(self.out))
                self.locked = True
        return self

    def __exit__(self, *_) -> None:
        self.held.close()

    def begin(self) -> None:
        """Make the folder and lock it, or take the one that is held; remove what killed processes left half written.

        With `fresh` an earlier run is renamed to OUT.1, OUT.2, ... Process 0 alone calls this. Raises UserError.
        """
        if self.fresh and self.out.exists():
            aside = next(p for i in itertools.count(1)
                         if not (p := self.out.with_name(f"{self.out.name}.{i}")).exists())
            self.out.rename(aside)
            print(f"moved {self.out} to {aside}")
            self.locked = False
        output_file(str(self.out / "last.pt"))
        if not self.locked:
            self.held.enter_context(lock(self.out))
            if (self.out / "last.pt").exists():
                raise UserError(f"another run has just begun in {self.out}")
        for file in self.out.glob("*.tmp"):
            if HALF_WRITTEN.fullmatch(file.name):
                file.unlink()


@contextlib.contextmanager
def lock(folder: str | os.PathLike) -> Iterator[None]:
    """Hold a folder in the block. Raises UserError where another process, of this machine or of another, holds it.

    The system frees such a lock (fcntl's) when its process ends, however that ends; loading processes do not inherit
    it. Where a file system has no locks, that is a warning. A new lock in a folder where no run begins is removed.
    """
    path = os.path.join(folder, "lock")
    new = not os.path.lexists(path)
    try:  # no link that leads elsewhere
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        check_ordinary(opened)
    except OSError as error:
        raise UserError(f"cannot lock {folder}: its file `lock` cannot be opened ({error.strerror})") from None
    with open(opened, "r+", errors="replace") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"a run is under way in {folder}: {file.read().strip() or 'it has just begun'}; wait for "
                            "its end, or choose another --out") from None
        except OSError as error:
            warn(f"{folder} cannot be locked ({error.strerror}): start no second run in it")
        if not os.path.lexists(path) or not os.path.samestat(os.fstat(opened), os.lstat(path)):
            raise UserError(f"a run in {folder} has just ended or begun; try again")  # its lock file was replaced
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # the words are for people
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        try:
            yield
        finally:
            os.ftruncate(file.fileno(), 0)
            if new and not os.path.exists(os.path.join(folder, "config.json")):  # which each run that begins writes
                with contextlib.suppress(OSError):
                    os.remove(path)


def check_first(out: str | os.PathLike) -> None:
    """Raises UserError on all processes where process 0 lacks a run that another one has: its machine has not been the
    first one before, and they share no folder."""
    exists = any(os.path.exists(os.path.join(out, name)) for name in ("last.pt", "previous.pt"))
    found = gathered((exists, socket.gethostname()), "all to look for a run")
    others = [f"process {rank} on {host}" for rank, (exists, host) in enumerate(found) if exists]
    with together("all to look for a run"):
        if others and not found[0][0]:
            raise UserError(f"the run in {out} is that of {others[0]}, but process 0 on {found[0][1]} has none: let "
                            "the same machine be the first (--node_rank=0), or share the folder")
