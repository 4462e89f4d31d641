"""What training, inference and data cost on this device, and where the time goes: python benchmark.py

    python benchmark.py                                  R-50, two images of 480 x 640, everything but the next three
    python benchmark.py --only annotations               100,000 annotated images in memory
    python benchmark.py --only export                    a model as an ONNX or pt2 file (tools/export.py), on the CPU
    python benchmark.py --growth growth.png              also how the cost of a step grows (tools/growth.py)
    python benchmark.py --size 800 1333 --device cuda    the paper's size
    torchrun --nproc_per_node=2 benchmark.py --only training

Times are medians over alternating rounds, in seconds and in Y, which makes machines comparable: Y is one forward pass
of torchvision's resnet50 (eval, float32, no gradients) over as many images of the same size, with as many threads, in
another process (measuring.Yardstick says why). The limit is the time of a step's convolutions at the speed of one
large convolution, measured in the same run. The share of the convolutions is that of all PyTorch operations with
"conv" in their name, forward and backward, in the time of all operations; what such an operation does to its input
and output, such as a change of layout, is part of it.

Images and weights are random, so nothing would be found: `with_planted_boxes` writes the boxes into the predictions of
the teacher or the detector, and `with_planted_masks` draws the masks. This time is not counted, or is listed as a part.
"""
import argparse
import contextlib
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import boxteacher
import evaluate
import masks
import model
import teacher
import train
from assign import fcos_targets
from backbone import make_backbone
from data import AUGMENTATIONS, COMPILED_STRIDE, STRIDE, Batch, TrainBatches, view
from formats.files import CommandLine, one_line_errors
from formats.pictures import as_rgb
from formats.released import IMAGENET
from losses import MaskGrid, disagreement, pair_weights, similar_colors, weighted_pairs
from model import Predictions
from recipe import parse_arguments as training_arguments
from tools.command_line import AMP, DEVICE, not_negative, output_file, pick_amp, positive, write_json
from tools.growth import draw_growth, measure_growth, show_growth
from tools.measuring import (Clock, Yardstick, imported_functions, made_up_data, measure_annotations,
                             measure_export, measure_labels, medians, peak_memory, reset_peak, tensor_peak)
from tools.processes import start_distributed
from tools.start import Start

# What is timed: (module or class, function) -> part. Inner parts are taken off the outer ones.
TRAINING = imported_functions(boxteacher) | {
    (torch.Tensor, "backward"): "backward", (torch.nn.utils, "get_total_norm"): "optimiser",
    (torch.optim.SGD, "step"): "optimiser", (torch.optim.AdamW, "step"): "optimiser", (teacher, "update"): "EMA"}
INFERENCE = {(model, "detect"): "detections", (model, "mask_logits"): "mask head", (model, "paste_masks"): "pasting",
             (masks, "encode"): "run lengths"}


# ------------------------------------------------------------------------------------------ what would be found


def with_planted_boxes(predictions: Predictions, boxes: list[torch.Tensor], labels: list[torch.Tensor]) -> Predictions:
    """Predictions as if the network had learnt these boxes: every location that FCOS assigns to a box finds it.

    boxes[b] (G_b, 4) xyxy pixels of the network's input, labels[b] (G_b,).
    """
    classes = predictions.class_logits.shape[-1]
    targets = fcos_targets(predictions.locations, boxes, labels, classes)
    positive = targets.labels < classes
    logits = torch.full_like(predictions.class_logits, -6.0)
    logits[positive, targets.labels[positive]] = 1.0
    return predictions._replace(class_logits=logits, ltrb=targets.ltrb,
                                centerness=torch.where(positive, 3.0, predictions.centerness))


def plant_boxes(network: model.CondInst, clock: Clock, part: str, objects: Callable[[], tuple[list, list]]) -> None:
    """Time the network's forward passes as `part`, and plant `objects()`, boxes and labels, into what they return."""
    forward = network.forward

    def planted(*inputs, **options) -> Predictions:
        with clock.part(part):
            predictions = forward(*inputs, **options)
        with clock.part("not counted"):
            return with_planted_boxes(predictions, *objects())

    network.forward = planted


def with_planted_masks(mask_logits: Callable, clock: Clock, part: str) -> Callable:
    """model.mask_logits for a batch of one image, but with an ellipse in each box: random weights would draw noise all
    over the image. Drawing is timed as `part`."""
    def planted(predictions: Predictions, locations: list[torch.Tensor]) -> torch.Tensor:
        logits = mask_logits(predictions, locations)
        with clock.part(part):
            boxes = model.decode_boxes(predictions.ltrb[0], predictions.locations)[locations[0], :, None, None]
            (x0, y0, x1, y1), (h, w) = boxes.unbind(1), logits.shape[1:]
            y, x = (torch.arange(n, device=logits.device) * 4 + 2 for n in (h, w))
            a, b = (2 * x - x0 - x1) / (x1 - x0), (2 * y[:, None] - y0 - y1) / (y1 - y0)
            return 6 * (1 - (a.square() + b.square()).sqrt())

    return planted


@contextlib.contextmanager
def planted_inference(network: model.CondInst, clock: Clock, drawing: str,
                      objects: Callable[[], tuple[list, list]]) -> Iterator[None]:
    """Time the parts of inference with planted boxes and masks. drawing: the part that drawing the masks is."""
    plant_boxes(network, clock, "network", objects)
    with clock.watching(INFERENCE), \
            patch.object(model, "mask_logits", with_planted_masks(model.mask_logits, clock, drawing)):
        yield


# -------------------------------------------------------------------------------------------------- a training run


class Training:
    """A run of train.py on made-up data, one step at a time."""

    def __init__(self, args: argparse.Namespace, folder: Path, rank: int, world_size: int):
        teacher_size = args.teacher_size or args.size
        options = ["--backbone", args.backbone, "--backbone-weights", "imagenet", "--out", str(folder / "run"),
                   "--batch-size", str(args.batch_size * world_size), "--amp", args.amp, "--min-size",
                   str(args.size[0]), "--max-size", str(args.size[1]), "--teacher-min-size", str(teacher_size[0]),
                   "--teacher-max-size", str(teacher_size[1]), "--iters", "100000", "--ramp", "1", "--lr", "1e-6",
                   "--fit-steps", str(args.fit_steps), "--colors", args.colors,
                   *["--compile"] * args.compile]
        self.args = training_arguments(options)
        self.args.device = args.device
        annotations = made_up_data(folder, 2 * args.batch_size * world_size, tuple(args.size), args.instances)
        start = Start(backbone=make_backbone(args.backbone, frozen=True).state_dict(), stride_in_1x1=False)
        with patch.object(train, "load_backbone", lambda *_: start):  # frozen norms without a download
            self.run, _ = train.make_run(self.args, annotations, rank, world_size, args.device)
        batches = TrainBatches(annotations, batch_size=self.args.batch_size, min_sizes=self.args.min_size,
                               max_size=self.args.max_size, teacher_size=tuple(teacher_size), rank=rank,
                               world_size=world_size, stride=COMPILED_STRIDE if args.compile else STRIDE)
        self.loader = iter(DataLoader(batches, batch_size=None, sampler=range(100000), num_workers=args.workers,
                                      collate_fn=TrainBatches.collate, pin_memory=args.device.type == "cuda"))
        self.batch: Batch | None = None
        self.clock = Clock(args.device)
        plant_boxes(self.run.teacher, self.clock, "teacher network", self.teacher_objects)

    def teacher_objects(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The batch's boxes, in pixels of the teacher's images, and labels."""
        scales = [boxes.new_tensor([there[1] / here[1], there[0] / here[0]]).repeat(2)
                  for boxes, here, there in zip(self.batch.boxes, self.batch.sizes, self.batch.teacher_sizes)]
        return [boxes * scale for boxes, scale in zip(self.batch.boxes, scales)], self.batch.labels

    def step(self) -> float:
        """One iteration; returns seconds, without those of planting boxes."""
        self.clock.seconds.clear()
        start = self.clock.now()
        with self.clock.part("data wait"):
            self.batch = next(self.loader).to(self.run.device)
        with self.clock.part("rest"):
            train.train_step(self.run, [self.batch], 10, False)
        return self.clock.now() - start - self.clock.seconds.pop("not counted")


def convolution_rate(device: torch.device, dtype: torch.dtype | None, rounds: int) -> float:
    """FLOP/s of a 3 x 3 convolution of 256 channels over 2 x 120 x 160 cells, in the faster of two memory layouts."""
    works = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        layer = torch.nn.Conv2d(256, 256, 3, padding=1).to(device, dtype, memory_format=layout)
        x = torch.rand(2, 256, 120, 160).to(device, dtype, memory_format=layout)
        works[str(layout)] = lambda layer=layer, x=x: layer(x)
    with torch.no_grad():
        seconds = medians(rounds, device, **works)
    return 2 * x.numel() * 256 * 9 / min(seconds.values())


# ------------------------------------------------------------------------------------------------- figures


def measure_step(args: argparse.Namespace, folder: Path, rank: int, world_size: int) -> dict:
    """Seconds of a step, and the memory that the process takes for steps. For tools/growth.py."""
    training, device = Training(args, folder, rank, world_size), args.device
    reset_peak(device)
    before = peak_memory(device)
    training.step()
    seconds = statistics.median(training.step() for _ in range(args.rounds))
    return {"seconds": seconds, "images a second": args.batch_size * world_size / seconds,
            "peak MiB": peak_memory(device) - before}


def measure_training(args: argparse.Namespace, folder: Path, rank: int, world_size: int) -> dict:
    """Seconds of a step, alternating with Y, and of its parts; memory; FLOPs and how near they come to the limit."""
    training, device = Training(args, folder, rank, world_size), args.device
    seconds, ys, parts = [], [], defaultdict(list)
    with FlopCounterMode(display=False) as flops:
        training.step()
    reset_peak(device)
    with Yardstick(args.batch_size, args.size, device) as y:
        for _ in range(args.rounds):
            ys.append(y.seconds())
            seconds.append(training.step())
    memory = peak_memory(device)
    with training.clock.watching(TRAINING | {(training.run.model, "forward"): "student network"}):
        for _ in range(args.rounds):  # apart from the timed rounds: on a GPU each look at the clock waits
            training.step()
            for name, value in training.clock.seconds.items():
                parts[name].append(value)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        training.step()
    step = statistics.median(seconds)
    # on a GPU an operation has the time of its kernels, which are listed once more as events of the device
    operations = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
    own = {event.key: event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
           for event in operations}
    convolutions = sum(time for name, time in own.items() if "conv" in name.lower()) / sum(own.values())
    rate = convolution_rate(device, pick_amp(args.amp, device), args.rounds)
    return {"seconds": step, "Y": statistics.median(ys), "in Y": step / statistics.median(ys),
            "images a second": args.batch_size * world_size / step, "peak MiB": memory,
            "TFLOP": flops.get_total_flops() / 1e12, "convolution TFLOP/s": rate / 1e12,
            "fraction of the limit": flops.get_total_flops() / rate / step,
            "share of convolutions": convolutions, "share outside the convolutions": 1 - convolutions,
            "parts": {name: statistics.median(values) for name, values in parts.items()}}


def measure_inference(args: argparse.Namespace, folder: Path) -> dict:
    """Seconds an image, from pixels to the run lengths of 100 detections, and of its parts. Y is that of a batch."""
    annotations = made_up_data(folder, 1, tuple(args.size), 200)
    device = args.device
    network = model.build_model(args.backbone, 80).eval().to(device)
    network.amp_dtype = pick_amp(args.amp, device)
    batch = evaluate.TestImages.collate([evaluate.TestImages(annotations, args.size[0], args.size[1])[0]]).to(device)
    clock, seconds, ys, parts = Clock(device), [], [], defaultdict(list)

    def predict(original_size: tuple[int, int]) -> float:
        """One image; returns seconds, without those of planting."""
        nonlocal results
        clock.seconds.clear()
        start = clock.now()
        with clock.part("rest"):
            found = model.predict(network, batch.images, batch.sizes, [original_size])
            results = evaluate.coco_results(1, found[0], annotations.classes)
        return clock.now() - start - clock.seconds.pop("not counted")

    results = []
    with (Yardstick(args.batch_size, args.size, device) as y,
          planted_inference(network, clock, "not counted", lambda: (batch.boxes, batch.labels))):
        predict(batch.original_sizes[0])
        for _ in range(args.rounds):
            ys.append(y.seconds())
            seconds.append(predict(batch.original_sizes[0]))
            for name, value in clock.seconds.items():
                parts[name].append(value)
        count, pasting = len(results), {}
        for scale in (0.5, 1, 2, 4):  # of the image's own size; the network's input stays the same
            size = tuple(round(scale * side) for side in args.size)
            predict(size), predict(size)  # the second time counts
            pasting[f"{size[0]} x {size[1]}"] = clock.seconds["pasting"] + clock.seconds["run lengths"]
    one, y = statistics.median(seconds), statistics.median(ys)
    return {"detections": count, "seconds": one, "Y": y, "in Y": one / y,
            "parts": {name: statistics.median(values) for name, values in parts.items()},
            "seconds of pasting into an image of": pasting}


def measure_evaluation(args: argparse.Namespace, folder: Path, count: int = 12) -> dict:
    """Seconds of evaluating `count` images with 100 detections each, and of its parts."""
    annotations = made_up_data(folder, count, tuple(args.size), 200)
    network = model.build_model(args.backbone, 80).eval().to(args.device)
    network.amp_dtype = pick_amp(args.amp, args.device)
    clock, images = Clock(args.device), iter(range(count))

    def objects() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        boxes, labels = annotations.image_boxes(next(images))
        return [torch.from_numpy(boxes).to(args.device)], [torch.from_numpy(labels).to(args.device)]

    start = clock.now()
    with planted_inference(network, clock, "made-up masks", objects), clock.part("loading and the rest"):
        results = evaluate.evaluate(network, annotations, min_size=args.size[0], max_size=args.size[1],
                                    workers=args.workers, device=args.device, progress=False)
        with clock.part("COCOeval"):
            evaluate.coco_metrics(annotations.json_path, results)
    seconds = clock.now() - start - clock.seconds.pop("not counted")
    return {"images": count, "detections": len(results), "seconds": seconds, "images a second": count / seconds,
            "parts": dict(clock.seconds)}


def measure_labels_of(args: argparse.Namespace, folder: Path) -> dict:
    network = model.build_model(args.backbone, 80).eval().to(args.device)
    network.amp_dtype = pick_amp(args.amp, args.device)
    return measure_labels(folder, network, tuple(args.size), args.rounds, args.device)


def measure_data(args: argparse.Namespace, folder: Path) -> dict:
    """Milliseconds an image in one process, for each --augment, and for decoding and resizing alone ("bare"): to the
    student's view and the teacher's, once if they are equal. At --size, and at the default sizes of train.py."""
    annotations, default = made_up_data(folder, 8, (480, 640), 7), training_arguments(["--out", str(folder)])
    student, longest = default.min_size, default.max_size
    figures = {}
    for title, (min_sizes, max_size, teacher_size) in {
            "": ([args.size[0]], args.size[1], tuple(args.teacher_size or args.size)),
            f", student {min(student)} to {max(student)}, teacher {default.teacher_min_size}":
                (student, longest, (default.teacher_min_size, default.teacher_max_size))}.items():
        works = {augment: TrainBatches(annotations, batch_size=8, min_sizes=min_sizes, max_size=max_size,
                                       teacher_size=teacher_size, augment=augment) for augment in AUGMENTATIONS}

        def bare(batches=works["none"]):
            for choices in (batches.choose(0, place, i) for place, i in enumerate(batches.order(0))):
                limits = {(choices.min_size, batches.max_size), batches.teacher_size}
                with Image.open(annotations.path(choices.image)) as image:
                    image = as_rgb(image)
                for limit in limits:
                    view(image, batches.resized_size(choices.image, *limit), False)

        seconds = medians(args.rounds, torch.device("cpu"), bare=bare,
                          **{name: lambda batches=batches: batches[0] for name, batches in works.items()})
        figures |= {"milliseconds an image" + title: {name: 1000 * s / 8 for name, s in seconds.items()},
                    "images a second" + title: {name: 8 / s for name, s in seconds.items()},
                    "rate relative to bare" + title: {name: seconds["bare"] / s for name, s in seconds.items()}}
    return figures


def measure_mask_memory(args: argparse.Namespace, size: tuple[int, int] = (800, 1344), instances: int = 128) -> dict:
    """MiB of tensors that the colour pairwise loss holds at its peak, forward and backward, for `instances` masks of
    two padded images of `size` (height, width), eight to a box."""
    device, (h, w), boxes = args.device, (size[0] // 4, size[1] // 4), max(instances // 8, 2)
    images = torch.rand(2, 3, *size, device=device) * 255
    inside = torch.zeros(boxes, h, w, dtype=torch.bool, device=device)
    inside[:, h // 4:h // 4 * 3, w // 4:w // 4 * 3] = True
    valid = torch.ones(2, h, w, dtype=torch.bool, device=device)
    image, box = torch.arange(boxes, device=device) % 2, torch.arange(instances, device=device) % boxes
    logits = torch.randn(instances, h, w, device=device, requires_grad=True)
    colors = similar_colors(images)

    def work():
        weights = pair_weights([same[image] for same in colors], MaskGrid(inside, valid, image))
        total, count = weighted_pairs(disagreement(logits), weights, box)
        (total.sum() / count.sum()).backward()

    return {"instances": instances, "cells": f"{h} x {w}", "peak MiB": tensor_peak(work, device)}


# ------------------------------------------------------------------------------------------------- showing


def show(title: str, figures: dict) -> None:
    """Print the figures as a table, and the parts with their share and, if it was measured, in Y."""
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


# -------------------------------------------------------------------------------------------- command line

MEASURES = {"training": measure_training, "mask-memory": lambda args, folder: measure_mask_memory(args),
            "inference": measure_inference, "evaluation": measure_evaluation, "labels": measure_labels_of,
            "data": measure_data,
            "export": lambda args, folder: measure_export(args.backbone, tuple(args.size), args.rounds),
            "annotations": lambda args, folder: measure_annotations(folder, args.annotated), "step": measure_step}
TOGETHER = ("training", "step")  # measured by all processes; the others by the first one


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(description="What training, inference and data cost on this device.",
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--device", **DEVICE)
    add("--backbone", choices=list(IMAGENET), default="r50", help="with random weights, but with norms and first stage "
        "frozen, as those of ImageNet have them")
    add("--size", nargs=2, type=positive, default=[480, 640], metavar=("H", "W"),
        help="of the images, pixels; the shorter side first")
    add("--teacher-size", nargs=2, type=positive, metavar=("H", "W"), help="of the teacher's images; None: --size")
    add("--batch-size", type=positive, default=2, help="images of one process in a step, and in Y")
    add("--instances", type=positive, default=7, help="boxes of an image in training; in inference and evaluation an "
        "image has 200, of which 100 are found")
    add("--amp", **AMP)
    add("--fit-steps", type=not_negative, default=0, help="as in train.py: pseudo masks are refined")
    add("--colors", choices=["on", "off"], default="off", help="as in train.py")
    add("--compile", action="store_true", help="compile the training step, as train.py does")
    add("--workers", type=not_negative, default=0, help="loading processes; 0: loading is part of a step's time")
    add("--rounds", type=positive, default=5, help="each figure is the median of that many")
    add("--only", nargs="+", choices=MEASURES, default=list(MEASURES)[:-3],
        help="measure only these; step: the time and memory of a step alone; annotations: what a long annotation file "
        "takes to load and to hold (Linux); export: a model as a file, on the CPU (pip install onnx onnxscript "
        "onnxruntime)")
    add("--annotated", type=positive, default=100000, help="images of that annotation file")
    add("--json", metavar="FILE", help="write all figures there")
    add("--growth", metavar="FILE", help="also measure how a step grows, and draw it there (PNG); takes a quarter of "
        "an hour on two cores; alone: --only step --growth FILE")
    add("--growth-instances", nargs="+", type=positive, default=[8, 128, 1000, 10000], help="boxes of an image")
    add("--growth-sizes", nargs="+", type=positive, default=[480, 640, 800, 1000], help="shorter sides, pixels")
    add("--growth-batches", nargs="+", type=positive, default=[1, 2, 4, 8], help="images of a step")
    args = parser.parse_args(argv)
    if args.size[0] > args.size[1]:
        parser.error("argument --size: first the shorter side, then the longer one")
    if args.growth and "RANK" in os.environ:
        parser.error("argument --growth: it starts its own processes, without torchrun")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with one_line_errors():
        rank, world_size, args.device = start_distributed(args.device)
        for path in (args.json, args.growth) if rank == 0 else ():
            output_file(path)
        gpu = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
        options = {name: str(value) if isinstance(value, torch.device) else value for name, value in vars(args).items()}
        figures = {"about": {"device": gpu, "processes": world_size, "threads": torch.get_num_threads(),
                             "torch": str(torch.__version__), "torchvision": torchvision.__version__,
                             "options": options}}
        if rank == 0:
            print(f"{world_size} x {gpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
                  f"{args.backbone}, {args.batch_size} images of {args.size[0]} x {args.size[1]}")
        for name in args.only:
            if rank and name not in TOGETHER:
                continue
            with tempfile.TemporaryDirectory() as folder:
                processes = (rank, world_size) if name in TOGETHER else ()
                figures[name] = MEASURES[name](args, Path(folder), *processes)
            if rank == 0:
                show(name, figures[name])
                write_json(args.json, figures)
        if args.growth:
            print("\ngrowth")
            figures["growth"] = measure_growth(options, args.growth_instances, args.growth_sizes, args.growth_batches)
            show_growth(figures["growth"])
            draw_growth(figures["growth"], args.growth)
            write_json(args.json, figures)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
