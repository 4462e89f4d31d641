"""What training, inference and data cost on this device, and where the time goes: python benchmark.py

    python benchmark.py                                  R-50, two images of 480 x 640, all but what follows
    python benchmark.py --size 800 1333 --device cuda    the paper's size
    python benchmark.py --only annotations               100,000 annotated images in memory
    python benchmark.py --growth growth.png              how the cost grows, too (growth.py)
    torchrun --nproc_per_node=2 benchmark.py --only training

Times are medians over alternating rounds, in seconds and in Y: one forward pass of torchvision's resnet50 (eval,
float32, no gradients) over the same number of images of the same size, with the same threads, in a process of its own
(measuring.Yardstick says why). Y makes machines comparable. The limit is what the convolutions of a step would take at
the speed of one large convolution, measured in the same run. The share of the convolutions is that of PyTorch's
operations with "conv" in their name, forward and backward, in the time of all operations of a step: what such an
operation does to its own input and output, such as oneDNN's change of layout, belongs to it. The images are made up.
Weights are random, so nothing would be found: `knowing` puts the boxes into the teacher's and the detector's answers,
and `drawing` the masks into the mask head's; their time is not counted, or is a part of its own in the evaluation.
"""
import argparse
import multiprocessing
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
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
from data import AUGMENTATIONS, COMPILED_STRIDE, STRIDE, Batch, TrainBatches, view
from formats.coco import CocoBoxes
from formats.files import one_line_errors
from formats.pictures import as_rgb
from formats.released import IMAGENET
from losses import disagreement, pair_weights, rgb_to_lab, similar_colors, weighted_pairs
from model import Predictions
from tools.command_line import AMP, DEVICE, not_negative, output_file, pick_amp, positive, start_distributed, write_json
from tools.growth import draw_growth, measure_growth, show_growth
from tools.measuring import (Clock, Yardstick, made_up_data, many_annotations, medians, peak_memory, process_memory,
                       reset_peak, tensor_peak)

# what is timed: (module, function) -> part of the step. A function's time is its own, less that of other parts in it.
TRAINING = {
    (boxteacher, "label"): "labelling", (boxteacher, "fcos_targets"): "detection losses",
    (boxteacher, "detection_losses"): "detection losses", (boxteacher, "batch_instances"): "mask head",
    (boxteacher, "mask_logits"): "mask head", (boxteacher, "box_masks"): "mask losses",
    (boxteacher, "valid_cells"): "mask losses", (boxteacher, "disagreement"): "mask losses",
    (boxteacher, "similar_colors"): "mask losses", (boxteacher, "pair_weights"): "mask losses",
    (boxteacher, "refine"): "mask losses", (boxteacher, "alike_labels"): "mask losses",
    (boxteacher, "box_supervised_losses"): "mask losses", (boxteacher, "mask_supervised_losses"): "mask losses",
    (torch.Tensor, "backward"): "backward", (torch.nn.utils, "get_total_norm"): "optimiser",
    (torch.optim.SGD, "step"): "optimiser", (torch.optim.AdamW, "step"): "optimiser", (teacher, "update"): "EMA"}
INFERENCE = {(model, "detect"): "detections", (model, "mask_logits"): "mask head", (model, "paste_masks"): "pasting",
             (masks, "encode"): "run lengths", (evaluate, "coco_metrics"): "COCOeval"}


# --------------------------------------------------------------------------------------------- what is timed


def knowing(predictions: Predictions, boxes: list[torch.Tensor], labels: list[torch.Tensor]) -> Predictions:
    """The same answers, but the locations that would learn a box have found it."""
    classes = predictions.class_logits.shape[-1]
    targets = fcos_targets(predictions.locations, boxes, labels, classes)
    found = targets.labels < classes
    logits = torch.full_like(predictions.class_logits, -6.0)
    logits[found, targets.labels[found]] = 1.0
    return predictions._replace(class_logits=logits, ltrb=targets.ltrb,
                                centerness=torch.where(found, 3.0, predictions.centerness))


def drawing(clock: Clock, part: str) -> Callable:
    """model.mask_logits for batches of one image, which draws an ellipse into each box, and counts that as `part`:
    random weights would draw noise all over the image."""
    look = model.mask_logits

    def mask_logits(predictions: Predictions, rows: list[torch.Tensor]) -> torch.Tensor:
        logits = look(predictions, rows)
        with clock.part(part):
            boxes = model.decode_boxes(predictions.ltrb[0], predictions.locations)[rows[0], :, None, None]
            (x0, y0, x1, y1), (h, w) = boxes.unbind(1), logits.shape[1:]
            y, x = (torch.arange(n, device=logits.device) * 4 + 2 for n in (h, w))
            a, b = (2 * x - x0 - x1) / (x1 - x0), (2 * y[:, None] - y0 - y1) / (y1 - y0)
            return 6 * (1 - (a.square() + b.square()).sqrt())

    return mask_logits


class Training:
    """A run of train.py's on made-up data, a step at a time."""

    def __init__(self, args: argparse.Namespace, folder: Path, rank: int, world_size: int):
        teacher_size = args.teacher_size or args.size
        options = ["--backbone", args.backbone, "--backbone-weights", "imagenet", "--out", str(folder / "run"),
                   "--batch-size", str(args.batch_size * world_size), "--amp", args.amp, "--min-size",
                   str(args.size[0]), "--max-size", str(args.size[1]), "--teacher-min-size", str(teacher_size[0]),
                   "--teacher-max-size", str(teacher_size[1]), "--iters", "100000", "--ramp", "1", "--lr", "1e-6",
                   *["--compile"] * args.compile]
        self.args = train.parse_arguments(options)
        self.args.device = args.device
        annotations = made_up_data(folder, 2 * args.batch_size * world_size, tuple(args.size), args.instances)
        with patch.object(train.checkpoint, "load_backbone", lambda *_: ({}, False)):  # random weights, frozen norms
            self.run = train.Run(self.args, annotations.classes, rank, world_size, args.device)
        batches = TrainBatches(annotations, batch_size=self.args.batch_size, min_sizes=self.args.min_size,
                               max_size=self.args.max_size, teacher_size=tuple(teacher_size), rank=rank,
                               world_size=world_size, stride=COMPILED_STRIDE if args.compile else STRIDE)
        self.loader = iter(DataLoader(batches, batch_size=None, sampler=range(100000), num_workers=args.workers,
                                      collate_fn=TrainBatches.collate, pin_memory=args.device.type == "cuda"))
        self.batch: Batch | None = None
        self.clock = Clock(args.device)
        self.look = self.run.teacher.forward
        self.run.teacher.forward = self.teacher_forward

    def teacher_forward(self, *inputs, **options) -> Predictions:
        with self.clock.part("teacher network"):
            predictions = self.look(*inputs, **options)
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


def convolution_rate(device: torch.device, dtype: torch.dtype | None, rounds: int) -> float:
    """FLOPs a second of a 3 x 3 convolution of 256 channels over 2 x 120 x 160 cells, in the better of the two memory
    layouts: as fast as it gets here."""
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
    """Seconds of a step, and the memory it takes above what the process had before its first one. For growth.py."""
    training, device = Training(args, folder, rank, world_size), args.device
    reset_peak(device)
    before = peak_memory(device)
    training.step()
    seconds = statistics.median(training.step() for _ in range(args.rounds))
    return {"seconds": seconds, "images a second": args.batch_size * world_size / seconds,
            "peak MiB": peak_memory(device) - before}


def measure_training(args: argparse.Namespace, folder: Path, rank: int, world_size: int) -> dict:
    """Seconds of a step and of its parts, in turn with Y; memory; FLOPs and how near they come to the limit."""
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
    with training.clock.watching(TRAINING, {training.run.model: "student network"}):
        for _ in range(args.rounds):  # by itself: on a GPU looking at the clock waits for the device
            training.step()
            for name, value in training.clock.seconds.items():
                parts[name].append(value)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        training.step()
    step = statistics.median(seconds)
    # operations alone: on a GPU each has the time of the kernels that it started, which are listed again by themselves
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
    """Seconds an image from pixels to 100 detections' run lengths, and its parts. Y is that of a batch, as above."""
    annotations = made_up_data(folder, 1, tuple(args.size), 200)
    device, classes = args.device, annotations.classes
    network = model.build_model(args.backbone, 80).eval().to(device)
    batch = evaluate.TestImages.collate([evaluate.TestImages(annotations, args.size[0], args.size[1])[0]]).to(device)
    clock, look, ys = Clock(device), network.forward, []

    def forward(*inputs, **options):
        with clock.part("network"):
            predictions = look(*inputs, **options)
        with clock.part("not counted"):
            return knowing(predictions, batch.boxes, batch.labels)

    network.forward = forward
    seconds, parts, count = [], defaultdict(list), 0
    amp = pick_amp(args.amp, device)
    with (Yardstick(args.batch_size, args.size, device) as y, clock.watching(INFERENCE, {}),
          patch.object(model, "mask_logits", drawing(clock, "not counted"))):
        for number in range(args.rounds + 1):
            ys.append(y.seconds())
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
        pasted = {}
        for scale in (0.5, 1, 2, 4):  # of the image's own sides; the network sees it at one size
            height, width = (round(scale * side) for side in args.size)
            for _ in range(2):
                clock.seconds.clear()
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    model.predict(network, batch.images, batch.sizes, [(height, width)])
            pasted[f"{height} x {width}"] = clock.seconds["pasting"] + clock.seconds["run lengths"]
    one = statistics.median(seconds)
    ys = statistics.median(ys[1:])
    return {"detections": count, "seconds": one, "Y": ys, "in Y": one / ys,
            "parts": {name: statistics.median(values) for name, values in parts.items()},
            "seconds of pasting into an image of": pasted}


def measure_evaluation(args: argparse.Namespace, folder: Path, count: int = 12) -> dict:
    """Seconds of evaluating `count` images of 100 detections, and of its parts, which overlap: together they are more
    than the whole."""
    annotations = made_up_data(folder, count, tuple(args.size), 200)
    network = model.build_model(args.backbone, 80).eval().to(args.device)
    clock, look = Clock(args.device), network.forward
    boxes = {annotations.image_ids[i]: annotations.image_boxes(i) for i in range(count)}
    queue = [(torch.from_numpy(b).to(args.device), torch.from_numpy(c).to(args.device)) for b, c in boxes.values()]

    def forward(*inputs, **options):
        with clock.part("network"):
            predictions = look(*inputs, **options)
        with clock.part("not counted"):
            b, c = queue.pop(0)
            return knowing(predictions, [b], [c])

    network.forward = forward
    start = clock.now()
    with (clock.watching(INFERENCE, {}), patch.object(model, "mask_logits", drawing(clock, "made-up masks")),
          clock.part("loading and the rest")):
        results = evaluate.evaluate(network, annotations, min_size=args.size[0], max_size=args.size[1],
                                    workers=args.workers, device=args.device, amp_dtype=pick_amp(args.amp, args.device),
                                    progress=False)
        evaluate.coco_metrics(annotations.json_path, results)
    took = clock.now() - start - clock.seconds.pop("not counted")
    return {"images": count, "detections": len(results), "seconds": took, "images a second": count / took,
            "parts": dict(clock.seconds)}


def measure_data(args: argparse.Namespace, folder: Path) -> dict:
    """Milliseconds an image of one process, beside the bare ones: decoding, and resizing to the student's and the
    teacher's view, once where these are equal. At --size, and at the sizes that train.py has by itself."""
    annotations, own = made_up_data(folder, 8, (480, 640), 7), train.parse_arguments(["--out", str(folder)])
    usual = own.min_size, own.max_size, (own.teacher_min_size, own.teacher_max_size)
    figures = {}
    for title, (min_sizes, max_size, teacher_size) in (
            ("", ([args.size[0]], args.size[1], tuple(args.teacher_size or args.size))),
            (f", student {min(usual[0])} to {max(usual[0])}, teacher {usual[2][0]}", usual)):
        works = {augment: TrainBatches(annotations, batch_size=8, min_sizes=min_sizes, max_size=max_size,
                                       teacher_size=teacher_size, augment=augment) for augment in AUGMENTATIONS}

        def bare(of=works["none"]):
            for choices in (of.choose(0, place, i) for place, i in enumerate(of.order(0))):
                limits = {(choices.min_size, of.max_size), of.teacher_size}
                with Image.open(annotations.path(choices.image)) as image:
                    image = as_rgb(image)
                for limit in limits:
                    view(image, of.resized_size(choices.image, *limit), False)

        seconds = medians(args.rounds, torch.device("cpu"), bare=bare,
                          **{name: lambda of=of: of[0] for name, of in works.items()})
        figures |= {"milliseconds an image" + title: {name: 1000 * s / 8 for name, s in seconds.items()},
                    "images a second" + title: {name: 8 / s for name, s in seconds.items()},
                    "rate against the bare one" + title: {name: seconds["bare"] / s for name, s in seconds.items()}}
    return figures


def measure_annotations(args: argparse.Namespace, folder: Path) -> dict:
    """Seconds and memory to load --annotated images' boxes; MiB of all processes, and of a worker's own, after a
    tenth of the batches that 0, 2 and 4 workers make, and after all."""
    path, before = many_annotations(folder, args.annotated), process_memory()["private"]
    clock = Clock(torch.device("cpu"))
    with clock.part("load"):
        annotations = CocoBoxes(path, folder)
    figures = {"images": len(annotations), "boxes": len(annotations.boxes), "load seconds": clock.seconds["load"],
               "MiB before": before, "MiB after": process_memory()["private"],
               "MiB of arrays": sum(x.nbytes for x in vars(annotations).values() if hasattr(x, "nbytes")) / 2 ** 20}
    batches = TrainBatches(annotations, batch_size=32, min_sizes=[48], max_size=64, teacher_size=(48, 64))
    steps = min(len(annotations) // 32, 1000)
    for workers in (0, 2, 4):
        found = {}
        loader = iter(DataLoader(batches, batch_size=None, sampler=range(steps), num_workers=workers,
                                 collate_fn=TrainBatches.collate))
        for number in range(1, steps - 10):  # workers end with their last batch
            next(loader)
            if number in (steps // 10, steps - 11):
                own = [process_memory(worker.pid) for worker in multiprocessing.active_children()]
                all_of_them = process_memory()["proportional"] + sum(one["proportional"] for one in own)
                found |= {f"all, batch {number}": all_of_them}
                if workers:
                    found[f"a worker's own, batch {number}"] = statistics.mean(one["private"] for one in own)
        figures[f"MiB with {workers} workers"] = found
        del loader
    return figures


def measure_mask_memory(args: argparse.Namespace, folder: Path, size: tuple[int, int] = (800, 1344),
                        instances: int = 128) -> dict:
    """MiB that the loss on pairs of cells holds at its most, forward and backward, for `instances` masks of two padded
    images of `size`, eight to a box: ours, and in the dense form of all 8 neighbours; and that both are equal."""
    torch.manual_seed(0)
    h, w, boxes = size[0] // 4, size[1] // 4, max(instances // 8, 2)
    images = F.interpolate(torch.rand(2, 3, h // 8, w // 8) * 255, size, mode="bilinear").to(args.device)
    corner = torch.rand(boxes, 2) * torch.tensor([h, w]) / 2
    y, x = torch.arange(h)[:, None], torch.arange(w)
    inside = torch.stack([(y >= top) & (y < top + h / 2) & (x >= left) & (x < left + w / 2) for top, left in corner])
    inside, valid = inside.to(args.device), torch.ones(2, h, w, dtype=torch.bool, device=args.device)
    image, gt = torch.arange(boxes, device=args.device) % 2, torch.arange(instances, device=args.device) % boxes
    logits = torch.randn(instances, h, w, device=args.device, requires_grad=True)
    colors, similar = similar_colors(images), dense_similarity(images)
    values = {}

    def ours():
        weights = pair_weights([c[image] for c in colors], inside, valid, image)
        total, count = weighted_pairs(disagreement(logits), weights, gt)
        values["ours"] = total.sum() / count.sum()
        values["ours"].backward()

    def dense():
        values["dense"] = dense_pair_loss(logits, similar[image][gt] * inside[gt][:, None])
        values["dense"].backward()

    mib = {}
    for work in (ours, dense):
        logits.grad = None
        mib[work.__name__] = tensor_peak(work, args.device)
    return {"instances": instances, "cells": f"{h} x {w}", "MiB": mib, "share": mib["ours"] / mib["dense"],
            "values": {name: value.item() for name, value in values.items()}}


def neighbours(x: torch.Tensor) -> torch.Tensor:
    """(N, h, w) -> (N, 8, h, w): the 8 cells at distance 2, 0 beyond the map."""
    around = F.unfold(x[:, None], 3, padding=2, dilation=2).unflatten(1, (9, 1)).unflatten(3, x.shape[1:])[:, :, 0]
    return torch.cat([around[:, :4], around[:, 5:]], 1)


def dense_similarity(images: torch.Tensor, threshold: float = 0.3) -> torch.Tensor:
    """losses.similar_colors for all 8 neighbours: (B, 8, h, w), 1 where alike, 0 where not or beyond the map."""
    lab = rgb_to_lab(F.avg_pool2d(images.float(), 4).floor())
    others = neighbours(lab.flatten(0, 1)).unflatten(0, lab.shape[:2])                            # (B, 3, 8, h, w)
    alike = torch.exp(-0.5 * (lab[:, :, None] - others).norm(dim=1)) >= threshold
    return alike * neighbours(torch.ones_like(lab[:, 0]))


def dense_pair_loss(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """BoxInst's pairwise loss as its released code has it, with weights (K, 8, h, w) for every instance (K, h, w): the
    log-probabilities of both labels, unfolded, and the logarithm of the sum of both cases."""
    yes, no = F.logsigmoid(logits), F.logsigmoid(-logits)
    both_yes, both_no = yes[:, None] + neighbours(yes), no[:, None] + neighbours(no)
    top = torch.maximum(both_yes, both_no)
    term = -(torch.log(torch.exp(both_yes - top) + torch.exp(both_no - top)) + top)
    return (term * weights).sum() / weights.sum()


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


# -------------------------------------------------------------------------------------------- command line

MEASURES = {"training": measure_training, "mask-memory": measure_mask_memory, "inference": measure_inference,
            "evaluation": measure_evaluation, "data": measure_data, "annotations": measure_annotations,
            "step": measure_step}
TOGETHER = ("training", "step")  # that all processes do; the others are the first one's


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What training, inference and data cost on this device.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--device", **DEVICE)
    add("--backbone", choices=list(IMAGENET), default="r50", help="as from ImageNet: norms and first stage frozen")
    add("--size", nargs=2, type=positive, default=[480, 640], metavar=("H", "W"),
        help="of the images, pixels; at least as wide as high")
    add("--teacher-size", nargs=2, type=positive, metavar=("H", "W"), help="of the teacher's; None: the same")
    add("--batch-size", type=positive, default=2, help="images a step and process, and in Y")
    add("--instances", type=positive, default=7, help="boxes an image in training; inference and evaluation have 200, "
        "of which 100 are found")
    add("--amp", **AMP)
    add("--compile", action="store_true", help="as in train.py, of training")
    add("--workers", type=not_negative, default=0, help="loading processes; 0: loading is in the step's own time")
    add("--rounds", type=positive, default=5, help="each figure is the median of so many")
    add("--only", nargs="+", choices=MEASURES, default=list(MEASURES)[:-2],
        help="measure these alone; step: no more than a step of training takes; annotations: what a long file of them "
        "takes to load and hold, on Linux")
    add("--annotated", type=positive, default=100000, help="images of the annotations to load")
    add("--json", metavar="FILE", help="write all figures there")
    add("--growth", metavar="FILE", help="measure how a step grows, too, and draw it there (PNG, growth.py); "
        "takes a quarter of an hour on two cores; alone: --only step --growth FILE")
    add("--growth-instances", nargs="+", type=positive, default=[8, 32, 128, 512], help="boxes an image")
    add("--growth-sizes", nargs="+", type=positive, default=[480, 640, 800, 1000], help="shorter sides, pixels")
    add("--growth-batches", nargs="+", type=positive, default=[1, 2, 4, 8], help="images a step")
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
        about = {"device": gpu, "processes": world_size, "threads": torch.get_num_threads(),
                 "torch": str(torch.__version__), "torchvision": torchvision.__version__,
                 "options": {k: v if isinstance(v, (int, str, list, type(None))) else str(v)
                             for k, v in vars(args).items()}}
        figures = {"about": about}
        if rank == 0:
            print(f"{world_size} x {gpu}, {about['threads']} threads, torch {about['torch']}, {args.backbone}, "
                  f"{args.batch_size} images of {args.size[0]} x {args.size[1]}")
        for name in args.only:
            if rank and name not in TOGETHER:
                continue
            with tempfile.TemporaryDirectory() as folder:
                where = (rank, world_size) if name in TOGETHER else ()
                figures[name] = MEASURES[name](args, Path(folder), *where)
            if rank == 0:
                show(name, figures[name])
                write_json(args.json, figures)
        if args.growth:
            print("\ngrowth")
            figures["growth"] = measure_growth(args)
            show_growth(figures["growth"])
            draw_growth(figures["growth"], args.growth)
            write_json(args.json, figures)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
