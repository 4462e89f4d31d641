"""What benchmark.py measures with: a clock for the parts of the work, memory, and made-up data."""
import inspect
import io
import json
import math
import multiprocessing
import re
import resource
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from data import TestImages, TrainBatches, canvas_of
from formats.coco import CocoBoxes
from formats.files import optional
from model import CondInst, Predictor, build_model, predict
from refine import ellipse
from tools.command_line import write_json
from tools.export import as_onnx, as_pt2, description, traced
from tools.label import COLOURS, at_pixels, model_masks

# -------------------------------------------------------------------------------------------------- seconds


class Clock:
    """Seconds by part. Parts may be nested: a part's time does not contain that of its inner parts."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, defaultdict(float)
        self.inner = []  # for each open part, the seconds of its inner parts so far

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str):
        start = self.now()
        self.inner.append(0.0)
        try:
            yield
        finally:
            seconds = self.now() - start
            self.seconds[name] += seconds - self.inner.pop()
            if self.inner:
                self.inner[-1] += seconds

    def timed(self, function: Callable, name: str) -> Callable:
        def call(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)
        return call

    @contextmanager
    def watching(self, parts: dict[tuple, str]):
        """Time functions while the block runs. parts: (module, class or object, name of the function) -> part; raises
        AttributeError for a function that does not exist."""
        with ExitStack() as stack:
            for (owner, name), part in parts.items():
                stack.enter_context(patch.object(owner, name, self.timed(getattr(owner, name), part)))
            yield


def imported_functions(module: ModuleType) -> dict[tuple[ModuleType, str], str]:
    """(module, name) -> "file.py" for all functions that a module imports from the other files of its folder."""
    folder = Path(module.__file__).parent
    return {(module, name): f"{value.__module__}.py" for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ != module.__name__
            and (folder / f"{value.__module__}.py").exists()}


def medians(rounds: int, device: torch.device, **works: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each of `works`, which take turns, after one round that does not count."""
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

    It is measured in another process that does nothing else, and computes only while this one waits. Up to half of Y is
    fetching memory for large maps from the system, which a process that holds free memory is spared: within a training
    run Y was anything between 0.6 and 1.0 s on one machine.
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
    """The process of a Yardstick: answers each message with the seconds of a pass."""
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
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """MiB at the peak since reset_peak (since the process began, if this is not Linux): of the device's tensors, or of
    this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20  # macOS: bytes
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024


def tensor_peak(work: Callable[[], object], device: torch.device) -> float:
    """MiB of tensors that `work` holds at its peak, beyond those from before: exact, unlike a process's memory."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        reset_peak(device)
        work()
        return peak_memory(device) - before / 2 ** 20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = np.cumsum([event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])])
    return float(held.max()) / 2 ** 20


def process_memory(process: int | str = "self") -> dict[str, float]:
    """MiB of a process (Linux): "private" memory, and "proportional", which adds its part of what it shares."""
    rows = [line.split() for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]]
    mib = {row[0].rstrip(":"): int(row[1]) / 1024 for row in rows}
    return {"private": mib["Private_Clean"] + mib["Private_Dirty"], "proportional": mib["Pss"]}


# ---------------------------------------------------------------------------------------------------- data


CATEGORIES = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]


def made_up_data(folder: Path, count: int, size: tuple[int, int], instances: int, seed: int = 0) -> CocoBoxes:
    """A data set in COCO's format: JPEGs of smooth colours of `size` (height, width), each with `instances` boxes whose
    sides are 16 pixels to half the image."""
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


@torch.no_grad()
def measure_labels(folder: Path, network: CondInst, size: tuple[int, int], rounds: int, device: torch.device,
                   counts: tuple[int, ...] = (1, 8, 64, 500)) -> dict:
    """Seconds of the masks for an image with so many boxes (tools/label.py) and of the network's pass; milliseconds a
    box, with a network and without; MiB of tensors at the peak."""
    annotations = made_up_data(folder, 1, size, max(counts))
    images, classes = TestImages(annotations, *size, whole=True), torch.arange(network.num_classes)
    whole = TestImages.collate([images[0]])
    network_pass = medians(rounds, device, network=lambda: network(whole.images.to(device), whole.sizes))["network"]
    predictions, figures = network(whole.images.to(device), whole.sizes), {"seconds": {"network": network_pass}}
    for count in counts:
        boxes = torch.from_numpy(annotations.boxes[:count])
        batch = whole._replace(boxes=[whole.boxes[0][:count]], labels=[whole.labels[0][:count]]).to(device)
        works = {"with": lambda: model_masks(predictions, batch, 0, boxes, classes.to(device)),
                 "without": lambda: at_pixels(batch.teacher_images[0, :, :size[0], :size[1]], boxes,
                                              ellipse(device).expand(count, -1, -1), 1.0, size, COLOURS)}
        seconds = medians(rounds, device, **works)
        figures["seconds"] |= {f"{count} boxes, {name} a network": seconds[name] for name in works}
        for name in works:
            figures.setdefault(f"milliseconds a box, {name} a network", {})[str(count)] = 1000 * seconds[name] / count
    figures[f"peak MiB for {count} boxes"] = {name: tensor_peak(work, device) for name, work in works.items()}
    return figures


@torch.no_grad()
def measure_export(backbone: str, size: tuple[int, int], rounds: int) -> dict:
    """Seconds of an image of `size` with 100 objects on the CPU, and MB of the files. The program makes run lengths at
    the image's size, the files (tools/export.py) masks at stride 4. Raises UserError: a package is missing."""
    runtime, *_ = [optional(package, "--only export") for package in ("onnxruntime", "onnx", "onnxscript")]
    network = build_model(backbone, 80).eval()
    torch.nn.init.zeros_(network.head.class_logits.bias)  # of probability 0.5: objects everywhere
    model = Predictor(network, [str(label) for label in range(80)], size, rescore=True)
    program = traced(model)
    pt2, onnx = as_pt2(program, description(model, True)), as_onnx(program, description(model, False))
    loaded = torch.export.load(io.BytesIO(pt2)).module()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(onnx, options)
    images = torch.rand(1, 3, *canvas_of([size])) * 255
    seconds = medians(rounds, torch.device("cpu"), program=lambda: predict(network, images, [size], [size]),
                      pt2=lambda: loaded(images), onnxruntime=lambda: session.run(None, {"images": images.numpy()}))
    weights = sum(x.nbytes for x in network.state_dict().values())
    return {"seconds": seconds, "MB": {"weights": weights / 1e6, "pt2": len(pt2) / 1e6, "onnx": len(onnx) / 1e6}}


def many_annotations(folder: Path, count: int, instances: int = 7) -> Path:
    """Write a COCO file of `count` images, all of them links to one small JPEG; returns its path.

    It is written piece by piece, so that it does not raise this process's memory.
    """
    Image.fromarray(np.full((48, 64, 3), 99, np.uint8)).save(folder / "0.jpg")
    for i in range(1, count):
        (folder / f"{i}.jpg").symlink_to("0.jpg")
    rows = {"images": ({"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in range(count)),
            "annotations": ({"id": i, "image_id": i // instances, "category_id": i % 80 + 1, "iscrowd": 0,
                             "area": 99.75, "bbox": [i % 40 + 0.25, i % 30 + 0.5, 10.5, 9.5]}
                            for i in range(count * instances)),
            "categories": CATEGORIES}
    with open(folder / "many.json", "w") as file:
        for number, (name, entries) in enumerate(rows.items()):
            file.write(("," if number else "{") + f'"{name}": [')
            for i, entry in enumerate(entries):
                file.write("," * (i > 0) + json.dumps(entry))
            file.write("]")
        file.write("}")
    return folder / "many.json"


def measure_annotations(folder: Path, count: int) -> dict:
    """Seconds and MiB to load the boxes of `count` images. Then, with 0, 2 and 4 workers that make batches, the MiB of
    all processes and of a worker alone, after a tenth of the batches and after all."""
    path, before = many_annotations(folder, count), process_memory()["private"]
    clock = Clock(torch.device("cpu"))
    with clock.part("load"):
        annotations = CocoBoxes(path, folder)
    figures = {"images": len(annotations), "boxes": len(annotations.boxes), "load seconds": clock.seconds["load"],
               "MiB before": before, "MiB after": process_memory()["private"],
               "MiB of arrays": sum(x.nbytes for x in vars(annotations).values() if hasattr(x, "nbytes")) / 2 ** 20}
    batches = TrainBatches(annotations, batch_size=32, min_sizes=[48], max_size=64, teacher_size=(48, 64))
    steps = min(len(annotations) // 32, 1000)
    for workers in (0, 2, 4):
        found = figures[f"MiB with {workers} workers"] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of more workers than cores; it is memory that counts here
            loader = iter(DataLoader(batches, batch_size=None, sampler=range(steps), num_workers=workers,
                                     collate_fn=TrainBatches.collate))
        for number in range(1, steps - 10):  # a worker ends after its last batch
            next(loader)
            if number in (steps // 10, steps - 11):
                children = [process_memory(worker.pid) for worker in multiprocessing.active_children()]
                found[f"all, batch {number}"] = sum(m["proportional"] for m in (process_memory(), *children))
                if workers:
                    found[f"one worker, batch {number}"] = statistics.mean(m["private"] for m in children)
        del loader
    return figures
