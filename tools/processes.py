"""The processes of a run: torchrun's group, signals to stop, loading processes."""
import contextlib
import datetime
import multiprocessing
import os
import signal
from collections.abc import Iterator

import torch
import torch.distributed as dist

from formats.files import UserError


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
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=60))
    return dist.get_rank(), dist.get_world_size(), device


class StopSignals:
    """Remembers a SIGTERM or SIGINT, so that the current step is finished and saved. A second one ends at once."""

    def __enter__(self) -> "StopSignals":
        self.asked = 0
        self.before = {number: signal.signal(number, self.remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def remember(self, number: int, frame) -> None:
        self.asked = number
        signal.signal(number, signal.SIG_DFL)


def ignore_signals(worker: int) -> None:
    """Initialise a worker of a training run: torchrun, Slurm and Ctrl-C signal workers too, but the current step or
    evaluation still needs their batches to finish."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


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
