"""What benchmark.py measures with: a clock for parts of the work, memory, and made-up data."""
import json
import math
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from formats.coco import CocoBoxes
from tools.command_line import write_json

CATEGORIES = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]


# -------------------------------------------------------------------------------------------------- seconds


class Clock:
    """Seconds by part. Parts may lie within one another: each has the time that no inner one has. Every thread has
    its own; where two work at a time, the parts together are more than the whole."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, defaultdict(float)
        self.lock, self.thread = threading.Lock(), threading.local()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str):
        start, inner = self.now(), vars(self.thread).setdefault("inner", [])
        inner.append(0.0)
        try:
            yield
        finally:
            took = self.now() - start
            with self.lock:
                self.seconds[name] += took - inner.pop()
            if inner:
                inner[-1] += took

    def timed(self, function: Callable, name: str) -> Callable:
        def call(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)
        return call

    @contextmanager
    def watching(self, parts: dict[tuple, str], networks: dict[torch.nn.Module, str]):
        """Time these functions and networks wherever they are called."""
        with ExitStack() as stack:
            for (owner, name), part in parts.items():
                stack.enter_context(patch.object(owner, name, self.timed(getattr(owner, name), part)))
            for network, part in networks.items():
                stack.enter_context(patch.object(network, "forward", self.timed(network.forward, part)))
            yield


def medians(rounds: int, device: torch.device, **works: Callable[[], object]) -> dict[str, float]:
    """Seconds of each of `works`, taken in turn, after one round that does not count."""
    clock, seconds = Clock(device), {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            start = clock.now()
            work()
            if number:
                seconds[name].append(clock.now() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


class Yardstick:
    """Y: a forward pass of torchvision's resnet50 (eval, float32, no gradients) over `batch_size` images of `size`.

    In a process of its own, whose memory is that of a program that does nothing else: in ours Y came out anywhere
    between 0.6 and 1.0 s on one machine. Half of a Y can go into fetching fresh memory for its large maps from the
    system, or none where the process happens to hold memory that is free. It computes only while it is asked.
    """

    def __init__(self, batch_size: int, size: list[int], device: torch.device):
        context = torch.multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        about = (theirs, (batch_size, 3, *size), str(device), torch.get_num_threads())
        self.process = context.Process(target=passes, args=about, daemon=True)

    def __enter__(self) -> "Yardstick":
        self.process.start()
        self.seconds()  # the first pass does not count
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.join()

    def seconds(self) -> float:
        self.pipe.send("pass")
        while not self.pipe.poll(1):
            if not self.process.is_alive():
                raise RuntimeError("the process that measures Y has ended")
        return self.pipe.recv()


def passes(pipe, shape: tuple[int, ...], device: str, threads: int) -> None:
    """What the process of a Yardstick does: answer each message with the seconds of a pass."""
    torch.set_num_threads(threads)
    network, clock = torchvision.models.resnet50(weights=None).eval().to(device), Clock(torch.device(device))
    images = torch.rand(shape, device=device)
    with torch.no_grad():
        while pipe.recv():
            start = clock.now()
            network(images)
            pipe.send(clock.now() - start)


# --------------------------------------------------------------------------------------------------- memory


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # no Linux: the peak is then that of the whole process


def peak_memory(device: torch.device) -> float:
    """MiB: of the device's tensors, or of this process, since reset_peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def tensor_peak(work: Callable[[], object], device: torch.device) -> float:
    """MiB of tensors that `work` holds at its most, above those from before it: to the byte, unlike a process's."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        reset_peak(device)
        work()
        return peak_memory(device) - before / 2 ** 20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return float(held.max()) / 2 ** 20


def process_memory(process: int | str = "self") -> dict[str, float]:
    """MiB of a process (Linux): "private", of its own alone, and "proportional", with its part of what it shares."""
    rows = [line.split() for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]]
    mib = {row[0].rstrip(":"): int(row[1]) / 1024 for row in rows}
    return {"private": mib["Private_Clean"] + mib["Private_Dirty"], "proportional": mib["Pss"]}


# ---------------------------------------------------------------------------------------------------- data


def made_up_data(folder: Path, count: int, size: tuple[int, int], instances: int, seed: int = 0) -> CocoBoxes:
    """JPEGs of smooth colours with `instances` boxes each, 16 pixels to half the image, in COCO's format."""
    rng, (height, width) = np.random.default_rng(seed), size
    images, annotations = [], []
    for i in range(count):
        coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC)).astype(np.int16)
        image = (image + rng.integers(-12, 13, image.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{i}.jpg", quality=92)
        images.append({"id": i + 1, "file_name": f"{i}.jpg", "width": width, "height": height})
        for _ in range(instances):
            w, h = np.exp(rng.uniform(math.log(16), np.log([width / 2, height / 2])))
            box = [rng.uniform(0, width - w), rng.uniform(0, height - h), w, h]
            annotations.append({"id": len(annotations) + 1, "image_id": i + 1, "bbox": [float(v) for v in box],
                                "category_id": int(rng.integers(1, 81)), "area": float(w * h), "iscrowd": 0,
                                "segmentation": [[box[0], box[1], box[0] + w, box[1], box[0] + w, box[1] + h]]})
    write_json(str(folder / "boxes.json"), {"images": images, "annotations": annotations, "categories": CATEGORIES})
    return CocoBoxes(folder / "boxes.json", folder)


def many_annotations(folder: Path, count: int, instances: int = 7) -> Path:
    """-> a COCO file in `folder` of `count` images, links to one small JPEG. Written piece by piece, so that this
    process holds no more than before."""
    Image.fromarray(np.full((48, 64, 3), 99, np.uint8)).save(folder / "0.jpg")
    for i in range(1, count):
        (folder / f"{i}.jpg").symlink_to("0.jpg")
    rows = {"images": ({"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in range(count)),
            "annotations": ({"id": i, "image_id": i // instances, "category_id": i % 80 + 1, "iscrowd": 0,
                             "area": 99.75, "bbox": [i % 40 + 0.25, i % 30 + 0.5, 10.5, 9.5]}
                            for i in range(count * instances)),
            "categories": CATEGORIES}
    with open(folder / "many.json", "w") as file:
        for number, (name, of) in enumerate(rows.items()):
            file.write(("," if number else "{") + f'"{name}": [')
            for i, row in enumerate(of):
                file.write("," * (i > 0) + json.dumps(row))
            file.write("]")
        file.write("}")
    return folder / "many.json"
