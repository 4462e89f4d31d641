"""What a run shows while it trains: figures, and images of the masks that it gives to boxes.

    Log          metrics.jsonl (one JSON object a line), the progress bar, and TensorBoard where it is asked for
    draw_sheet   labels-<iteration>.png: some training images with their boxes, and with the masks of these

Only the first process writes. Nothing here has a say in what is learnt.
"""
import argparse
import datetime
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data import Batch, Choices, TrainBatches, canvas_of, collate
from formats.coco import CocoBoxes, DataError
from formats.files import UserError, warn
from masks import paste_masks
from model import CondInst, Instances
from runlengths import decode
from schedule import Plan, learning_rate, ramp_factor
from teacher import label
from tools.draw import SheetRow, sheet

IMAGES = 8  # on a sheet


class LogError(UserError):
    """The log that was asked for cannot be written; the message is one line for a person."""


# ---------------------------------------------------------------------------------------------------- figures


def logged_iteration(line: str) -> float:
    """The iteration of a line of metrics.jsonl; infinite where the process was killed in the midst of writing it."""
    try:
        return json.loads(line)["iter"]
    except ValueError:
        return math.inf


def summary_writer() -> type:
    """TensorBoard's writer of event files. Its package is nobody's need but --tensorboard's; without it LogError."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise LogError(f"--tensorboard needs a package that this Python lacks ({str(error).splitlines()[0]}): "
                       "pip install tensorboard") from None
    return SummaryWriter


def scalars(figures: dict, name: str = "") -> dict[str, float]:
    """Nested figures under TensorBoard's names: {"segm": {"AP": 31.0}} -> {"segm/AP": 31.0}; without those of None."""
    flat = {}
    for key, value in figures.items():
        if isinstance(value, dict):
            flat |= scalars(value, f"{name}{key}/")
        elif value is not None:
            flat[name + key] = value
    return flat


class Log:
    """metrics.jsonl, the progress bar and TensorBoard; sums stay on the device between two lines.

    out: the run's folder, which exists; iteration: where the run stands, what was logged beyond it is dropped;
    tensorboard: write event files too, in out/tensorboard. Raises LogError.
    """

    def __init__(self, out: Path, plan: Plan, iteration: int, rank: int = 0, world_size: int = 1,
                 tensorboard: bool = False):
        self.path, self.plan, self.world_size = out / "metrics.jsonl", plan, world_size
        self.bar = self.file = self.writer = None
        if rank == 0:
            # a killed run may have logged past its checkpoint: those iterations come again
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if logged_iteration(line) <= iteration]
            whole = self.path.with_suffix(".tmp")
            whole.write_text("".join(line + "\n" for line in kept))
            os.replace(whole, self.path)
            self.file = self.path.open("a", buffering=1)
            if tensorboard:  # event files are never rewritten: this tells their reader what to drop
                self.writer = summary_writer()(str(out / "tensorboard"), purge_step=iteration + 1)
            self.bar = tqdm(total=plan.iterations, initial=iteration, disable=None, smoothing=0.1, unit="it")
        self.reset()

    def reset(self) -> None:
        """Begin the next line: what came before, and the time that it took, have no part in it."""
        self.losses, self.counts, self.steps, self.skipped = {}, {}, 0, 0
        self.start, self.waited = time.perf_counter(), 0.0

    def step(self, losses: dict[str, Tensor], counts: dict[str, Tensor], skipped: Tensor, waited: float) -> None:
        """Add an iteration. skipped: bool, of one element; waited: seconds that it waited for its images."""
        self.steps, self.waited, self.skipped = self.steps + 1, self.waited + waited, self.skipped + skipped
        for sums, values in ((self.losses, losses), (self.counts, counts)):
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + torch.where(skipped, 0, value)
        if self.bar is not None:
            self.bar.update()

    def write(self, iteration: int) -> None:
        """One line: means since the last one, over all processes (counts: sums over them, per iteration).

        Skipped steps have no part in them; where all were skipped the means are null. Every process calls it.
        """
        values = torch.stack([v.float() for v in (*self.losses.values(), *self.counts.values())])
        skipped = int(self.skipped)  # the host waits here until the device has done all these iterations
        values /= self.steps - skipped
        if self.world_size > 1:
            dist.all_reduce(values)
            values[:len(self.losses)] /= self.world_size
        values = dict(zip((*self.losses, *self.counts), values.tolist()))
        for name, of in (("student_iou", "student_boxes"), ("label_iou", "pseudo_masks")):  # sums over boxes so far
            if name in values:
                values[name] = values[name] / values[of] if values[of] else math.nan
        seconds = (time.perf_counter() - self.start) / self.steps
        if self.file is not None:
            self.record(iteration, {
                "lr": learning_rate(iteration - 1, self.plan), "ramp": ramp_factor(iteration - 1, self.plan),
                **{name: v if math.isfinite(v) else None for name, v in values.items()},
                "skipped_steps": skipped, "seconds": seconds, "data_seconds": self.waited / self.steps})
            text = " ".join(f"{name.removeprefix('loss_')} {values[name]:.3f}" for name in self.losses)
            if self.bar.disable:
                left = datetime.timedelta(seconds=round(seconds * (self.plan.iterations - iteration)))
                print(f"{iteration}/{self.plan.iterations} {text} | {seconds:.3f} s/it, {left} left", flush=True)
            else:
                self.bar.set_postfix_str(text)
        self.reset()

    def evaluation(self, iteration: int, metrics: dict) -> None:
        """One line with the figures of an evaluation, see evaluate.coco_metrics. The first process calls it."""
        self.record(iteration, {"eval": metrics})
        self.reset()  # its time is not that of an iteration

    def record(self, iteration: int, figures: dict) -> None:
        """A line of metrics.jsonl, and the same figures to TensorBoard: train/loss, segm/AP, and so on."""
        self.file.write(json.dumps({"iter": iteration, **figures}) + "\n")
        if self.writer is not None:
            for name, value in scalars(figures.get("eval") or {"train": figures}).items():
                self.writer.add_scalar(name, value, iteration)
            self.writer.flush()  # its own thread would keep them for two minutes


# --------------------------------------------------------------------------------------------------- images


def draw_sheet(path: Path, title: str, model: CondInst, annotations: CocoBoxes, args: argparse.Namespace,
               autocast: torch.autocast) -> None:
    """Write a PNG of training images, the same each time: with their boxes, and with the masks that `model` gives
    these, as a teacher would (teacher.label); with true ones beside them where the annotations were read with masks.

    title: of the masks. Of args it reads score and the sizes. An image that cannot be read is left out, and a file
    that cannot be written is a warning: nobody shall lose a run for an image.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()  # to look must not move batch norm's averages, nor wait for processes that do not look
    try:
        rows = []
        for batch in clean_views(annotations, sheet_images(annotations), args):
            with autocast:
                pseudo = label(model, batch.to(device), args.score)
            (size,), (boxes,), (labels,) = batch.sizes, batch.boxes, batch.labels
            found = Instances(boxes, pseudo.scores.float().cpu(), labels, enlarged(pseudo.masks, size), size)
            truth = None if batch.masks is None else decode(enlarged(batch.masks[0].float(), size), size)
            rows.append(SheetRow(batch.images[0, :, :size[0], :size[1]], boxes, labels, found, truth))
        if rows:
            sheet(rows, str(path), [c["name"] for c in annotations.classes], threshold=0, title=title)
    except Exception as error:  # of the disk, of memory, of a drawing library: no other process waits for this one
        warn(f"{path} was not written: {str(error) or type(error).__name__}")
    finally:
        model.train(was_training)


def sheet_images(annotations: CocoBoxes) -> list[int]:
    """Up to IMAGES images that have boxes, evenly spaced over the data set."""
    with_boxes = np.flatnonzero(np.diff(annotations.offsets))
    places = np.linspace(0, len(with_boxes) - 1, min(IMAGES, len(with_boxes))).round().astype(int)
    return with_boxes[places].tolist()


def clean_views(annotations: CocoBoxes, images: list[int], args: argparse.Namespace) -> Iterator[Batch]:
    """Each image as a Batch of its own, as training would have it at the middle one of the student's sizes, neither
    mirrored nor recoloured. What cannot be read is left out: training names it."""
    middle = sorted(args.min_size)[len(args.min_size) // 2]
    views = TrainBatches(annotations, batch_size=1, min_sizes=[middle], max_size=args.max_size,
                         teacher_size=(args.teacher_min_size, args.teacher_max_size))
    for i in images:
        canvas = canvas_of([views.resized_size(i, middle, views.max_size)])
        teacher_canvas = canvas_of([views.resized_size(i, *views.teacher_size)])
        try:
            sample = views.sample(Choices(i, middle, flip=False, colour_seed=0), canvas, teacher_canvas)
        except DataError:
            continue
        if not sample.skipped:  # else it is another image
            yield collate([sample], 1, canvas, teacher_canvas)


def enlarged(p: Tensor, size: tuple[int, int]) -> list[dict]:
    """Probabilities (G, h, w) at stride 4 of an image of `size` (height, width) -> run lengths of G masks."""
    return paste_masks(p.logit(), size, size)[0]
