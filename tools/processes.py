"""The processes of a run: torchrun's group and what it agrees on, signals, output, loading processes.

    together, same_everywhere    what is wrong on one process ends all of them, with one line
    StopSignals                  a request to stop, as people and job managers send it
    lasting_output               what people read may be lost, the run goes on
    loaded                       batches, whatever happens to loading processes
"""
import contextlib
import datetime
import gc
import hashlib
import inspect
import multiprocessing
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from formats.coco import CocoBoxes
from formats.files import SaidElsewhere, UserError, printable

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # SIGUSR1: Slurm's warning of a time limit
FORWARDED = 2    # seconds within which torchrun has forwarded a Ctrl-C, which its processes get themselves too
SILENT = 60      # seconds that a process waits for others without saying so
ATTEMPTS = 5     # times in a row that loading processes may die without a batch
warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores: they wait for files, too
# the DDP option that copies the buffers of process 0 to the others in each forward pass; torch 2.14 renamed it
SYNC_BUFFERS = next(name for name in ("forward_sync_buffers", "broadcast_buffers")
                    if name in inspect.signature(DistributedDataParallel).parameters)


def start_distributed(device: torch.device) -> tuple[int, int, torch.device]:
    """Join torchrun's process group, if any (NCCL on CUDA, else gloo). Returns rank, world size and the device.

    Raises UserError where this machine has fewer GPUs than processes.
    """
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(f"more processes than GPUs: this machine has {gpus}, use --nproc_per_node={gpus}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # NCCL's limit of ten minutes is too short: the others wait while the first process computes AP
    backend = "nccl" if device.type == "cuda" else "gloo"
    with saying("all processes to start"):
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=60))
    return dist.get_rank(), dist.get_world_size(), device


def launcher() -> list[str]:
    """The words before the program in the command that started this process: python, or torchrun and its options. On
    several machines that is the first one's command; the others have another --node_rank."""
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ["python"]
    words = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    if machines != "1":
        words += [f"--nnodes={machines}", "--node_rank=0", f"--master_addr={os.environ['MASTER_ADDR']}",
                  f"--master_port={os.environ['MASTER_PORT']}"]
    return words


def same_command(options: list[str]) -> str:
    """The command that goes on with this run, given the options of this one."""
    options = [word for word in options if not (word.startswith("--f") and "--fresh".startswith(word))]
    return shlex.join([*launcher(), sys.argv[0], *options])


# -------------------------------------------------------------------------------------- what processes agree on


@contextlib.contextmanager
def saying(what: str) -> Iterator[None]:
    """Says what this process waits for in the block, once that has taken SILENT seconds. Two processes of each machine
    do: the others wait for the same."""
    line = f"process {os.environ.get('RANK', 0)} on {socket.gethostname()} waits for {what}"
    timer = threading.Timer(SILENT, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    if int(os.environ.get("LOCAL_RANK", 0)) < 2:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def gathered(value, what: str) -> list:
    """The values of all processes, in the order of their ranks. what: see `saying`."""
    everyone = [value]
    if dist.is_initialized():
        everyone *= dist.get_world_size()
        with saying(what):
            dist.all_gather_object(everyone, value)
    return everyone


def from_first(value, what: str):
    """The value of process 0, on all processes. what: see `saying`."""
    holder = [value]
    if dist.is_initialized():
        with saying(what):
            dist.broadcast_object_list(holder)
    return holder[0]


def read_by_first(read: Callable, what: str):
    """What `read` returns on process 0, on all: they may be on machines that share no folder. Raises UserError on all
    where it cannot be read. what: see `saying`."""
    with together(what):
        content = read() if not dist.is_initialized() or dist.get_rank() == 0 else None
    return from_first(content, what)


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """All processes leave the block together. A UserError or OSError within it is raised on all of them, and said by
    process 0 alone. A process that may fail alone must not wait for others within the block. what: see `saying`.
    """
    problem = None
    try:
        yield
    except (UserError, OSError) as error:
        problem = error
    problems = gathered(None if problem is None else str(problem), what)
    wrong = [rank for rank, text in enumerate(problems) if text is not None]
    if not wrong:
        return
    if problems[0] is None:
        problems[0] = f"process {wrong[0]}: {problems[wrong[0]]}"
    if dist.is_initialized() and dist.get_rank() > 0:
        raise SaidElsewhere(problems[0])
    raise problem or UserError(problems[0])


def same_everywhere(facts: dict[str, object]) -> None:
    """Compare facts, {name: value}, over all processes; raises UserError on all of them where one differs."""
    everyone = gathered((socket.gethostname(), facts), "all processes to say what they train on")
    host, first = everyone[0]
    with together("the comparison of all processes"):
        for rank, (other, theirs) in enumerate(everyone):
            for name in first | theirs:
                one, two = first.get(name), theirs.get(name)
                if one != two:
                    one, two = where_they_differ(str(one), str(two))
                    raise UserError(f"{name} differs: {one} for process 0 on {host}, {two} for process {rank} on "
                                    f"{other}")


def where_they_differ(one: str, two: str, length: int = 80) -> list[str]:
    """Of each text `length` characters, with the first that differs among them."""
    first = len(os.path.commonprefix([one, two]))
    start = 0 if first < length else first - length // 2
    end = start + length
    return ["…" * (start > 0) + text[start:end] + "…" * (end < len(text)) for text in (one, two)]


def same_data(annotations: CocoBoxes, validation: CocoBoxes | None) -> None:
    """Raises UserError on all processes unless they have read the same annotation files."""
    facts = {"the number of images": len(annotations), "the number of boxes": len(annotations.boxes),
             "the list of classes": [(c["id"], c["name"]) for c in annotations.classes]}
    with together("all processes to read the annotation files"):
        for split, purpose in ((annotations, "train"), (validation, "evaluate")):
            if split is not None:
                with open(split.json_path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                facts[f"the content of the file to {purpose} on"] = digest[:16]
    same_everywhere(facts)


def agreed(*flags: Tensor | bool, device: torch.device) -> list[bool]:
    """For each flag, whether it holds on all processes. The host waits here for the device, unless one process has
    flags that are no tensors."""
    if not dist.is_initialized() and not any(isinstance(flag, Tensor) for flag in flags):
        return list(flags)
    values = torch.stack([torch.as_tensor(flag, device=device) for flag in flags]).float()
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MIN)
    return values.bool().tolist()


def joined(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, with gradients that are the means over all processes, which wait for each other here."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return model
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True,
                                   **{SYNC_BUFFERS: False})


# ------------------------------------------------------------------------------------------- signals and output


class StopSignals:
    """Remembers a signal of STOP, so that the current step is finished and saved.

    Schedulers signal every process of a job and torchrun forwards what it gets: more signals are the same request. Only
    the second Ctrl-C of a person ends the process at once. A SIGHUP that is ignored (nohup) stays so.
    """

    def __enter__(self) -> "StopSignals":
        self.asked, self.interrupted = 0, None
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self.before = {number: signal.signal(number, self.remember) for number in STOP
                       if not (ignored and number == signal.SIGHUP)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def remember(self, number: int, frame) -> None:
        self.asked = self.asked or number
        if number == signal.SIGINT:
            now, first = time.monotonic(), self.interrupted
            self.interrupted = first or now
            if first is not None and (now - first > FORWARDED or "RANK" not in os.environ):
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)


def ignore_signals(worker: int) -> None:
    """Initialise a worker of a training run: torchrun, Slurm and Ctrl-C signal workers too, but the current step or
    evaluation still needs their batches to finish."""
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)


class Lasting:
    """A stream that loses what cannot be written: its terminal or pipe is closed, its disk full."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # of a class, say, whose name the terminal cannot show

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, work: Callable, *arguments) -> None:
        """After a failure the stream goes nowhere: what it still holds would fail again at the end of the process."""
        try:
            work(*arguments)
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """In the block, what is printed never ends the process (see Lasting)."""
    with open(os.devnull, "w") as nowhere:
        streams = Lasting(sys.stdout or nowhere), Lasting(sys.stderr or nowhere)  # None: closed from the start
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            try:
                yield
            finally:
                for stream in streams:
                    stream.flush()


# ----------------------------------------------------------------------------------------------------- loading


@contextlib.contextmanager
def ending_loaders() -> Iterator[None]:
    """Kill the loading processes that were started in the block, whatever ends it: they ignore SIGTERM, so an exit that
    waits for them would never end."""
    others = multiprocessing.active_children()
    try:
        yield
    finally:
        for child in set(multiprocessing.active_children()).difference(others):
            child.kill()


def loaded(loader_from: Callable[[int], DataLoader], start: int, stop: int) -> Iterator:
    """Items start to stop of a data set. If a loading process dies (killed, out of memory), all are started anew at the
    next item. Raises UserError after ATTEMPTS of them without an item.

    loader_from: called with the number of an item, makes a loader that begins there.
    """
    failures = 0
    while start < stop:
        loader = loader_from(start)
        try:
            for item in begun(loader):
                yield item
                start, failures = start + 1, 0
        except (RuntimeError, OSError, EOFError) as error:
            died = re.search("DataLoader worker .pid|in memory thread", str(error))
            if not loader.num_workers or isinstance(error, RuntimeError) and not died:
                raise
            failures += 1
            reason = printable((str(error).strip().splitlines() or [type(error).__name__])[-1][:200])
            if failures == ATTEMPTS:
                raise UserError(f"loading processes died {ATTEMPTS} times in a row ({reason}); less memory is needed "
                                "with fewer --workers") from None
            print(f"warning: {reason}; loading processes are started anew", file=sys.stderr, flush=True)


def begun(loader: DataLoader) -> Iterator:
    """iter(loader) without the handler that torch then sets: when a loading process dies, it raises an error in the
    middle of a step."""
    if loader.num_workers:  # an iterator that failed is in a cycle with its error: freed in a new process, it complains
        gc.collect()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        if signal.getsignal(signal.SIGCHLD) != before:  # torch sets it in the main thread alone, as Python demands
            signal.signal(signal.SIGCHLD, before)
