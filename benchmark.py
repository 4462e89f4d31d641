"""What training, inference and data cost on this device, and where the time goes: python benchmark.py

    python benchmark.py                                  training, inference, evaluation and data, R-50 at 480 x 640
    python benchmark.py --size 800 1333 --device cuda    the paper's size
    python benchmark.py --growth growth.png              how the cost grows with instances, size and batch
    torchrun --nproc_per_node=2 benchmark.py --only training

Times are medians over alternating rounds, in seconds and in Y: one forward pass of torchvision's resnet50 (eval,
float32, no gradients) over the same number of pictures of the same size, with the same threads. Y makes machines
comparable. The limit is what the convolutions of a step would take at the speed of one large convolution, measured
in the same run. The pictures are made up. Weights are random, so nothing would be found: `knowing` puts the boxes
into the teacher's and the detector's answers, and its time is not counted.
"""
import argparse
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import boxteacher
import evaluate
import model
import teacher
import train
from assign import fcos_targets
from coco import CocoBoxes, DataError
from curves import COLOURS, INK, axes, ticks
from data import AUGMENTATIONS, Batch, TrainBatches, as_rgb, positive, resized, view
from evaluate import output_file, pick_amp, pick_device, start_distributed, write_json
from model import Predictions
from pretrained import IMAGENET

# what is timed: (module, function) -> part of the step. A function's time is its own, less that of other parts in it.
TRAINING = {
    (boxteacher, "label"): "labelling", (boxteacher, "fcos_targets"): "detection losses",
    (boxteacher, "detection_losses"): "detection losses", (boxteacher, "select_instances"): "mask head",
    (boxteacher, "mask_logits"): "mask head", (boxteacher, "box_masks"): "mask losses",
    (boxteacher, "valid_cells"): "mask losses", (boxteacher, "disagreement"): "mask losses",
    (boxteacher, "similar_colors"): "mask losses", (boxteacher, "pair_weights"): "mask losses",
    (boxteacher, "refine"): "mask losses", (boxteacher, "alike_labels"): "mask losses",
    (boxteacher, "box_supervised_losses"): "mask losses", (boxteacher, "mask_supervised_losses"): "mask losses",
    (torch.Tensor, "backward"): "backward", (torch.nn.utils, "clip_grad_norm_"): "optimiser",
    (torch.optim.SGD, "step"): "optimiser", (torch.optim.AdamW, "step"): "optimiser", (teacher, "update"): "EMA"}
INFERENCE = {(model, "detect"): "detections", (model, "mask_logits"): "mask head", (model, "paste_masks"): "pasting",
             (evaluate, "coco_results"): "run lengths", (evaluate, "coco_metrics"): "COCOeval"}


# --------------------------------------------------------------------------------------------------- clocks


class Clock:
    """Seconds by part. Parts may lie within one another: each has the time that no inner one has."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.open = device, defaultdict(float), []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str):
        start = self.now()
        self.open.append(0.0)
        try:
            yield
        finally:
            took = self.now() - start
            self.seconds[name] += took - self.open.pop()
            if self.open:
                self.open[-1] += took

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


# --------------------------------------------------------------------------------------------- what is timed


def made_up_data(folder: Path, count: int, size: tuple[int, int], instances: int, seed: int = 0) -> CocoBoxes:
    """JPEGs of smooth colours with `instances` boxes each, 16 pixels to half the picture, in COCO's format."""
    rng, (height, width) = np.random.default_rng(seed), size
    images, annotations = [], []
    for i in range(count):
        coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC)).astype(np.int16)
        picture = (picture + rng.integers(-12, 13, picture.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.jpg", quality=92)
        images.append({"id": i + 1, "file_name": f"{i}.jpg", "width": width, "height": height})
        for _ in range(instances):
            w, h = np.exp(rng.uniform(math.log(16), np.log([width / 2, height / 2])))
            box = [rng.uniform(0, width - w), rng.uniform(0, height - h), w, h]
            annotations.append({"id": len(annotations) + 1, "image_id": i + 1, "bbox": [float(v) for v in box],
                                "category_id": int(rng.integers(1, 81)), "area": float(w * h), "iscrowd": 0,
                                "segmentation": [[box[0], box[1], box[0] + w, box[1], box[0] + w, box[1] + h]]})
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
    write_json(str(folder / "boxes.json"), {"images": images, "annotations": annotations, "categories": categories})
    return CocoBoxes(folder / "boxes.json", folder)


def knowing(predictions: Predictions, boxes: list[torch.Tensor], labels: list[torch.Tensor]) -> Predictions:
    """The same answers, but the locations that would learn a box have found it."""
    classes = predictions.class_logits.shape[-1]
    targets = fcos_targets(predictions.locations, boxes, labels, classes)
    found = targets.labels < classes
    logits = torch.full_like(predictions.class_logits, -6.0)
    logits[found, targets.labels[found]] = 1.0
    return predictions._replace(class_logits=logits, ltrb=targets.ltrb,
                                centerness=torch.where(found, 3.0, predictions.centerness))


class Training:
    """A run of train.py's on made-up data, a step at a time."""

    def __init__(self, args: argparse.Namespace, folder: Path, rank: int, world_size: int):
        teacher_size = args.teacher_size or args.size
        options = ["--backbone", args.backbone, "--backbone-weights", "imagenet", "--out", str(folder / "run"),
                   "--batch-size", str(args.batch_size * world_size), "--amp", args.amp, "--min-size",
                   str(args.size[0]), "--max-size", str(args.size[1]), "--teacher-min-size", str(teacher_size[0]),
                   "--teacher-max-size", str(teacher_size[1]), "--iters", "100000", "--ramp", "1", "--lr", "1e-6"]
        self.args = train.parse_arguments(options)
        self.args.device = args.device
        annotations = made_up_data(folder, 2 * args.batch_size * world_size, tuple(args.size), args.instances)
        with patch.object(train.checkpoint, "load_backbone", lambda *_: ({}, False)):  # random weights, frozen norms
            self.run = train.Run(self.args, annotations.classes, rank, world_size, args.device)
        batches = TrainBatches(annotations, batch_size=self.args.batch_size, min_sizes=self.args.min_size,
                               max_size=self.args.max_size, teacher_size=tuple(teacher_size), rank=rank,
                               world_size=world_size)
        self.loader = iter(DataLoader(batches, batch_size=None, sampler=range(100000), num_workers=args.workers,
                                      collate_fn=TrainBatches.collate, pin_memory=args.device.type == "cuda"))
        self.batch: Batch | None = None
        self.clock = Clock(args.device)
        self.look = self.run.teacher.forward
        self.run.teacher.forward = self.teacher_forward

    def teacher_forward(self, images: torch.Tensor, sizes: list) -> Predictions:
        with self.clock.part("teacher network"):
            predictions = self.look(images, sizes)
        with self.clock.part("not counted"):
            scales = [b.new_tensor([t[1] / s[1], t[0] / s[0]]).repeat(2) for b, s, t in
                      zip(self.batch.boxes, self.batch.sizes, self.batch.teacher_sizes)]
            return knowing(predictions, [b * s for b, s in zip(self.batch.boxes, scales)], self.batch.labels)

    def step(self) -> float:
        """One iteration; -> seconds, less those of `knowing`."""
        self.clock.seconds.clear()
        start = self.clock.now()
        with self.clock.part("data wait"):
            self.batch = next(self.loader).to(self.run.device)
        with self.clock.part("rest"):
            train.train_step(self.run, [self.batch], 10, False)
        return self.clock.now() - start - self.clock.seconds.pop("not counted")


def yardstick(batch_size: int, size: tuple[int, int], device: torch.device) -> Callable[[], object]:
    """Y: what it does."""
    network = torchvision.models.resnet50(weights=None).eval().to(device)
    pictures = torch.rand(batch_size, 3, *size, device=device)
    return lambda: torch.no_grad()(network)(pictures)


def convolution_rate(device: torch.device, dtype: torch.dtype | None, rounds: int) -> float:
    """FLOPs a second of a 3 x 3 convolution of 256 channels over 2 x 120 x 160 cells: as fast as it gets here."""
    layer = torch.nn.Conv2d(256, 256, 3, padding=1).to(device, dtype)
    x = torch.rand(2, 256, 120, 160, device=device, dtype=dtype)
    with torch.no_grad():
        seconds = medians(rounds, device, work=lambda: layer(x))["work"]
    return 2 * x.numel() * 256 * 9 / seconds


# ------------------------------------------------------------------------------------------------- figures


def measure_training(args: argparse.Namespace, folder: Path, rank: int, world_size: int) -> dict:
    """Seconds of a step and of its parts, in turn with Y; memory; FLOPs and how near they come to the limit."""
    training, device = Training(args, folder, rank, world_size), args.device
    y, seconds, ys, parts = yardstick(args.batch_size, tuple(args.size), device), [], [], defaultdict(list)
    with FlopCounterMode(display=False) as flops:
        training.step()
    reset_peak(device)
    for _ in range(args.rounds):
        ys.append(medians(1, device, y=y)["y"])
        seconds.append(training.step())
    memory = peak_memory(device)
    with training.clock.watching(TRAINING, {training.run.model: "student network"}):
        for _ in range(args.rounds):  # by itself: on a GPU looking at the clock waits for the device
            training.step()
            for name, value in training.clock.seconds.items():
                parts[name].append(value)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        training.step()
    step, whole = statistics.median(seconds), 0.0
    convolutions = 0.0
    for event in profiler.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        whole += own
        convolutions += own * any(word in event.key.lower() for word in ("conv", "xmma", "cutlass", "cudnn"))
    rate = convolution_rate(device, pick_amp(args.amp, device), args.rounds)
    return {"seconds": step, "Y": statistics.median(ys), "in Y": step / statistics.median(ys),
            "pictures a second": args.batch_size * world_size / step, "peak MiB": memory,
            "TFLOP": flops.get_total_flops() / 1e12, "convolution TFLOP/s": rate / 1e12,
            "fraction of the limit": flops.get_total_flops() / rate / step,
            "share of convolutions": convolutions / whole,
            "parts": {name: statistics.median(values) for name, values in parts.items()}}


def measure_inference(args: argparse.Namespace, folder: Path) -> dict:
    """Seconds a picture from pixels to 100 detections' run lengths, and its parts. Y is that of a batch, as above."""
    annotations = made_up_data(folder, 1, tuple(args.size), 200)
    device, classes = args.device, annotations.classes
    network = model.build_model(args.backbone, 80).eval().to(device)
    batch = evaluate.TestImages.collate([evaluate.TestImages(annotations, args.size[0], args.size[1])[0]]).to(device)
    clock, look, ys = Clock(device), network.forward, []

    def forward(images, sizes):
        with clock.part("network"):
            predictions = look(images, sizes)
        with clock.part("not counted"):
            return knowing(predictions, batch.boxes, batch.labels)

    network.forward = forward
    y, seconds, parts, count = yardstick(args.batch_size, tuple(args.size), device), [], defaultdict(list), 0
    amp = pick_amp(args.amp, device)
    with clock.watching(INFERENCE, {}):
        for number in range(args.rounds + 1):
            ys.append(medians(1, device, y=y)["y"])
            clock.seconds.clear()
            start = clock.now()
            with clock.part("rest"), torch.autocast(device.type, amp, enabled=amp is not None):
                answers = model.predict(network, batch.images, batch.sizes, batch.original_sizes)
                count = len(evaluate.coco_results(1, answers[0], classes))
            took = clock.now() - start - clock.seconds.pop("not counted")
            if number:
                seconds.append(took)
                for name, value in clock.seconds.items():
                    parts[name].append(value)
    one = statistics.median(seconds)
    ys = statistics.median(ys[1:])
    return {"detections": count, "seconds": one, "Y": ys, "in Y": one / ys,
            "parts": {name: statistics.median(values) for name, values in parts.items()}}


def measure_evaluation(args: argparse.Namespace, folder: Path, count: int = 12) -> dict:
    """Seconds of evaluating `count` pictures, by part; beside what each picture takes."""
    annotations = made_up_data(folder, count, tuple(args.size), 20)
    network = model.build_model(args.backbone, 80).eval().to(args.device)
    clock, look = Clock(args.device), network.forward
    boxes = {annotations.image_ids[i]: annotations.image_boxes(i) for i in range(count)}
    queue = [(torch.from_numpy(b).to(args.device), torch.from_numpy(c).to(args.device)) for b, c in boxes.values()]

    def forward(images, sizes):
        with clock.part("network"):
            predictions = look(images, sizes)
        with clock.part("not counted"):
            b, c = queue.pop(0)
            return knowing(predictions, [b], [c])

    network.forward = forward
    start = clock.now()
    with clock.watching(INFERENCE, {}), clock.part("loading and the rest"):
        results = evaluate.evaluate(network, annotations, min_size=args.size[0], max_size=args.size[1],
                                    workers=args.workers, device=args.device, amp_dtype=pick_amp(args.amp, args.device),
                                    progress=False)
        evaluate.coco_metrics(annotations.json_path, results)
    took = clock.now() - start - clock.seconds.pop("not counted")
    return {"pictures": count, "detections": len(results), "seconds": took, "pictures a second": count / took,
            "parts": dict(clock.seconds)}


def measure_data(args: argparse.Namespace, folder: Path) -> dict:
    """Milliseconds a picture of one worker, beside those of decoding and resizing it to the two views."""
    annotations = made_up_data(folder, 8, (480, 640), 7)
    size = resized(480, 640, *args.size)

    def bare():
        for i in range(8):
            with Image.open(annotations.path(i)) as image:
                view(as_rgb(image), size, False)

    works = {"decode and resize": bare}
    for augment in AUGMENTATIONS:
        batches = TrainBatches(annotations, batch_size=8, min_sizes=[args.size[0]], max_size=args.size[1],
                               teacher_size=tuple(args.size), augment=augment)
        works[augment] = lambda batches=batches: batches[0]
    seconds = medians(args.rounds, torch.device("cpu"), **works)
    return {"milliseconds a picture": {name: 1000 * s / 8 for name, s in seconds.items()},
            "rate against the bare one": {name: seconds["decode and resize"] / s for name, s in seconds.items()}}


def measure_growth(args: argparse.Namespace, folder: Path) -> dict:
    """Seconds and peak memory of a step against instances a picture, shorter side and batch, each with the exponent
    that fits: cost ~ x ^ exponent."""
    found = {}
    for name, values in (("instances", args.growth_instances), ("size", args.growth_sizes), ("batch_size",
                                                                                               args.growth_batches)):
        rows = []
        for value in values:
            setting = argparse.Namespace(**vars(args))
            setattr(setting, name, [value, round(value * 4 / 3)] if name == "size" else value)
            (folder / f"{name}{value}").mkdir()
            training = Training(setting, folder / f"{name}{value}", 0, 1)
            training.step()
            reset_peak(args.device)
            seconds = statistics.median(training.step() for _ in range(args.rounds))
            rows.append({"x": value, "seconds": seconds, "MiB": peak_memory(args.device)})
            print(f"    {name} {value}: {seconds:.2f} s, {rows[-1]['MiB']:.0f} MiB", flush=True)
        x = np.log([row["x"] for row in rows])
        found[name] = {"rows": rows, "exponents": {key: float(np.polyfit(x, np.log([r[key] for r in rows]), 1)[0])
                                                   for key in ("seconds", "MiB")}}
    return found


# ------------------------------------------------------------------------------------------------- showing


def show(title: str, figures: dict) -> None:
    """A table: the figures, and the parts with their share and in Y where there is one."""
    print(f"\n{title}")
    for name, value in figures.items():
        if not isinstance(value, dict):
            print(f"    {name:28}{value:10.3f}" if isinstance(value, float) else f"    {name:28}{value:>10}")
    whole = figures.get("seconds")
    for part, value in sorted(figures.get("parts", {}).items(), key=lambda item: -item[1]):
        in_y = f"{value / figures['Y']:9.2f} Y" if "Y" in figures else ""
        print(f"        {part:24}{value:10.3f} s{100 * value / whole:7.1f} %{in_y}")
    for name, values in figures.items():
        if isinstance(values, dict) and name != "parts":
            print(f"    {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in values.items()))


def draw_growth(growth: dict, path: str) -> None:
    """Write a PNG: a panel for each quantity, time above and memory below."""
    font, width, height = ImageFont.load_default(size=12), 280, 180
    canvas = Image.new("RGB", (len(growth) * (width + 90) + 10, 2 * (height + 90)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, (name, of) in enumerate(growth.items()):
        for line, (key, unit) in enumerate((("seconds", "seconds a step"), ("MiB", "peak memory, MiB"))):
            left, top = 70 + column * (width + 90), 40 + line * (height + 90)
            xs, ys = [row["x"] for row in of["rows"]], [row[key] for row in of["rows"]]
            x_ticks, y_ticks = ticks(0, max(xs)), ticks(0, max(ys))
            axes(canvas, left, top, width, height, [(x / x_ticks[-1], f"{x:g}") for x in x_ticks],
                 [(y / y_ticks[-1], f"{y:g}") for y in y_ticks], name.replace("_", " "), "", font)
            draw.text((left + width // 2, top - 14), f"{unit}: x ^ {of['exponents'][key]:.2f}", INK, font, "mm")
            points = [(left + x / x_ticks[-1] * width, top + (1 - y / y_ticks[-1]) * height) for x, y in zip(xs, ys)]
            draw.line(points, COLOURS[line], 2)
            for x, y in points:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), COLOURS[line])
    canvas.save(path, format="PNG")


# -------------------------------------------------------------------------------------------- command line

MEASURES = {"training": measure_training, "inference": measure_inference, "evaluation": measure_evaluation,
            "data": measure_data}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What training, inference and data cost on this device.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--device", type=pick_device, default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1")
    add("--backbone", choices=list(IMAGENET), default="r50", help="as from ImageNet: norms and first stage frozen")
    add("--size", nargs=2, type=positive, default=[480, 640], metavar=("H", "W"), help="of the pictures, pixels")
    add("--teacher-size", nargs=2, type=positive, metavar=("H", "W"), help="of the teacher's; None: the same")
    add("--batch-size", type=positive, default=2, help="pictures a step and process")
    add("--instances", type=positive, default=7, help="boxes a picture")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="as in train.py")
    add("--workers", type=int, default=0, help="loading processes; 0: loading is in the step's own time")
    add("--rounds", type=positive, default=5, help="each figure is the median of so many")
    add("--only", nargs="+", choices=MEASURES, default=list(MEASURES), help="measure these alone")
    add("--json", metavar="FILE", help="write all figures there")
    add("--growth", metavar="FILE", help="measure how a step grows, too, and draw it there (PNG); takes minutes")
    add("--growth-instances", nargs="+", type=positive, default=[8, 32, 128, 512])
    add("--growth-sizes", nargs="+", type=positive, default=[480, 640, 800, 1000], help="shorter sides, pixels")
    add("--growth-batches", nargs="+", type=positive, default=[1, 2, 4, 8])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        for path in (args.json, args.growth):
            output_file(path)
        rank, world_size, args.device = start_distributed(args.device)
        gpu = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
        about = {"device": gpu, "processes": world_size, "threads": torch.get_num_threads(),
                 "torch": str(torch.__version__), "torchvision": torchvision.__version__,
                 "options": {k: v if isinstance(v, (int, str, list, type(None))) else str(v)
                             for k, v in vars(args).items()}}
        figures = {"about": about}
        if rank == 0:
            print(f"{world_size} x {gpu}, {about['threads']} threads, torch {about['torch']}, {args.backbone}, "
                  f"{args.batch_size} pictures of {args.size[0]} x {args.size[1]}, {args.instances} boxes each")
        for name in args.only:
            if rank and name != "training":
                continue
            with tempfile.TemporaryDirectory() as folder:
                where = (rank, world_size) if name == "training" else ()
                figures[name] = MEASURES[name](args, Path(folder), *where)
            if rank == 0:
                show(name, figures[name])
        if args.growth and world_size == 1:
            with tempfile.TemporaryDirectory() as folder:
                print("\ngrowth")
                figures["growth"] = measure_growth(args, Path(folder))
            for name, of in figures["growth"].items():
                print(f"    {name}: time ~ x ^ {of['exponents']['seconds']:.2f}, "
                      f"memory ~ x ^ {of['exponents']['MiB']:.2f}")
            draw_growth(figures["growth"], args.growth)
        if rank == 0:
            write_json(args.json, figures)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
