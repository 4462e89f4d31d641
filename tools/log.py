"""What a run shows while it trains: its figures, and the masks that it gives to boxes.

    Log          metrics.jsonl (one JSON object a line), the progress bar and, with --tensorboard, event files
    draw_sheet   labels-<iteration>.png: some training images with their boxes and the masks of these

Only the first process writes, and nothing here changes what is learnt.
"""
import contextlib
import datetime
import json
import math
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
from formats.files import counted, optional, replacing, sync, warn
from masks import decode, encode, paste_masks
from model import CondInst, Instances
from teacher import PseudoLabels, pseudo_label, refined_label
from tools.draw import SheetRow, sheet

IMAGES = 8  # on a sheet


# ---------------------------------------------------------------------------------------------------- figures


def read_metrics(path: Path) -> list[tuple[str, dict[str, float]]]:
    """The lines of a metrics.jsonl, each with its `scalars`. Others, such as half a line that a full disk left, are
    dropped with a warning. Raises OSError."""
    rows, lines = path.read_bytes().splitlines(), []
    for row in rows:
        with contextlib.suppress(ValueError, KeyError, AttributeError, RecursionError):
            figures = scalars(json.loads(row.decode()))
            numbers = all(type(x) in (int, float) and abs(x) < 1e39 for x in figures.values())
            if numbers and type(figures["iter"]) is int and figures["iter"] > 0:
                lines.append((row.decode(), figures))
    if len(lines) < len(rows):
        warn(f"{path}: {counted(len(rows) - len(lines), 'line')} not of a run's log, left out")
    return lines


def evaluated_at(out: Path, iteration: int) -> bool:
    """Whether the metrics.jsonl of a run folder has the figures of an evaluation at this iteration, as a whole line."""
    path, start = out / "metrics.jsonl", json.dumps({"iter": iteration, "eval": {}})[:-2]
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return any(line.startswith(start) and line.endswith("}}}") for line in lines)


def summary_writer() -> type:
    """TensorBoard's writer of event files. Raises UserError if its package is missing."""
    return optional("torch.utils.tensorboard", "--tensorboard").SummaryWriter


def scalars(figures: dict, name: str = "") -> dict[str, float]:
    """Nested figures under TensorBoard's names, {"segm": {"AP": 31.0}} -> {"segm/AP": 31.0}, without those of None."""
    flat = {}
    for key, value in figures.items():
        if isinstance(value, dict):
            flat |= scalars(value, f"{name}{key}/")
        elif value is not None:
            flat[name + key] = value
    return flat


class Log:
    """metrics.jsonl, the progress bar and TensorBoard. Sums stay on the device from one line to the next.

    out: the run's folder, which exists. iterations: of the whole run. iteration: where the run goes on; lines beyond it
    are dropped, since a killed run may have logged past its checkpoint. tensorboard: write event files to
    out/tensorboard too. Raises UserError.
    """

    def __init__(self, out: Path, iterations: int, iteration: int, rank: int = 0, world_size: int = 1,
                 tensorboard: bool = False):
        self.path, self.iterations, self.world_size = out / "metrics.jsonl", iterations, world_size
        self.bar = self.file = self.writer = None
        if rank == 0:
            lines = read_metrics(self.path) if self.path.exists() else []
            kept = [line for line, figures in lines if figures["iter"] <= iteration]
            with replacing(self.path) as temporary, open(temporary, "w", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in kept)
                sync(file)
            self.file = self.path.open("a", buffering=1, encoding="utf-8")
            if tensorboard:  # event files are never rewritten: purge_step tells their reader what to drop
                self.writer = summary_writer()(str(out / "tensorboard"), purge_step=iteration + 1)
            self.bar = tqdm(total=iterations, initial=iteration, disable=None, smoothing=0.1, unit="it")
        self.reset()

    def reset(self) -> None:
        """Begin the next line of metrics.jsonl; sums and time so far are forgotten."""
        self.losses, self.counts, self.steps, self.skipped = {}, {}, 0, 0
        self.start, self.waited = time.perf_counter(), 0.0

    def step(self, losses: dict[str, Tensor], counts: dict[str, Tensor], finite: bool, waited: float) -> None:
        """Add an iteration. finite: the step was taken, not skipped; waited: seconds of waiting for images."""
        self.steps, self.waited, self.skipped = self.steps + 1, self.waited + waited, self.skipped + (not finite)
        for sums, values in ((self.losses, losses), (self.counts, counts)):
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + (value if finite else torch.zeros_like(value))
        if self.bar is not None:
            self.bar.update()

    def write(self, iteration: int, lr: float, ramp: float) -> None:
        """Write a line: losses are means over iterations and processes, counts means over iterations of the sum over
        processes. Skipped steps do not count; if all were skipped, the values are null. Every process calls this.
        """
        values = torch.stack([v.float() for v in (*self.losses.values(), *self.counts.values())])
        values /= self.steps - self.skipped
        if self.world_size > 1:
            dist.all_reduce(values)
            values[:len(self.losses)] /= self.world_size
        values = dict(zip((*self.losses, *self.counts), values.tolist()))
        for name, count in (("student_iou", "student_boxes"), ("label_iou", "pseudo_masks")):  # sums over boxes so far
            if name in values:
                values[name] = values[name] / values[count] if values[count] else math.nan
        seconds = (time.perf_counter() - self.start) / self.steps
        if self.file is not None:
            self.record(iteration, {
                "lr": lr, "ramp": ramp,
                **{name: v if math.isfinite(v) else None for name, v in values.items()},
                "skipped_steps": self.skipped, "seconds": seconds, "data_seconds": self.waited / self.steps})
            text = " ".join(f"{name.removeprefix('loss_')} {values[name]:.3f}" for name in self.losses)
            if self.bar.disable:
                left = datetime.timedelta(seconds=round(seconds * (self.iterations - iteration)))
                print(f"{iteration}/{self.iterations} {text} | {seconds:.3f} s/it, {left} left", flush=True)
            else:
                self.bar.set_postfix_str(text)
        self.reset()

    def evaluation(self, iteration: int, metrics: dict) -> None:
        """Write a line with the figures of an evaluation (evaluate.coco_metrics). Only the first process calls this."""
        self.record(iteration, {"eval": metrics})
        self.reset()  # the time of an evaluation is not that of iterations

    def sync(self) -> None:
        """Bring what was written to the disk: a run that goes on from a checkpoint does not log earlier iterations
        again. What cannot be written is a warning."""
        try:
            if self.file is not None:
                sync(self.file)
        except OSError as error:
            warn(f"{self.path} cannot be written: {error.strerror}; the run goes on")

    def record(self, iteration: int, figures: dict) -> None:
        """Write a line of metrics.jsonl, and the same figures for TensorBoard (train/loss, segm/AP, ...).

        What cannot be written is a warning.
        """
        try:
            self.file.write(json.dumps({"iter": iteration, **figures}) + "\n")
        except OSError as error:  # the line stays in the buffer of the file, which the next one writes too
            warn(f"{self.path} cannot be written: {error.strerror}; the run goes on")
        try:
            if self.writer is not None:
                for name, value in scalars(figures.get("eval") or {"train": figures}).items():
                    self.writer.add_scalar(name, value, iteration)
                self.writer.flush()  # by itself the writer keeps them for up to two minutes
        except Exception as error:  # of any kind: TensorBoard has its own
            warn(f"nothing more is written for TensorBoard: {error}")
            self.writer = None


# ---------------------------------------------------------------------------------------------------- sheets


def draw_sheet(path: Path, title: str, model: CondInst, annotations: CocoBoxes, *, score: str, min_sizes: list[int],
               max_size: int, teacher_size: tuple[int, int], fit_steps: int = 0, colors: bool = False) -> None:
    """Write a PNG of training images, the same ones each time, with their boxes and with the masks that `model` as a
    teacher gives these: those of Alg. 1 and, with fit_steps or colors, the refined ones. If the annotations were read
    with masks, the true ones stand beside them.

    title: of the masks. score as in pseudo_label; sizes, in pixels, as in TrainBatches; fit_steps and colors as in
    refined_label. An image that cannot be read is left out. A sheet that cannot be drawn or written is a warning: it
    must not end the run.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()  # drawing must not update batch-norm averages, nor wait for the processes that do not draw
    try:
        rows = []
        for batch in clean_views(annotations, sheet_images(annotations), min_sizes, max_size, teacher_size):
            (size,), (boxes,), (labels,), there = batch.sizes, batch.boxes, batch.labels, batch.to(device)
            pseudo = [pseudo_label(model, there, score)]
            if fit_steps or colors:
                everyone = torch.arange(len(boxes), device=device)
                pseudo.append(refined_label(model, there, everyone, fit_steps, colors))
            found = [Instances(boxes, masks.scores.float().cpu(), labels, at_image_size(masks, len(boxes), size), size)
                     for masks in pseudo]
            truth = None if batch.masks is None else decode(enlarged(batch.masks[0].float(), size), size)
            rows.append(SheetRow(batch.images[0, :, :size[0], :size[1]], boxes, labels, found, truth))
        if rows:
            sheet(rows, str(path), [c["name"] for c in annotations.classes], threshold=0,
                  titles=["images and their boxes", title, *["refined"] * (len(pseudo) - 1), "true masks"])
    except Exception as error:  # of any kind: disk full, out of memory, a font that is missing
        warn(f"{path} was not written: {str(error) or type(error).__name__}")
    finally:
        model.train(was_training)


def at_image_size(pseudo: PseudoLabels, count: int, size: tuple[int, int]) -> list[dict]:
    """Run lengths of the masks of `count` boxes, in an image of (height, width) size; empty for one without a mask."""
    rles = [encode(np.zeros((0, 0), bool), 0, 0, size)] * count
    for g, rle in zip(pseudo.box.tolist(), enlarged(pseudo.masks, size)):
        rles[g] = rle
    return rles


def sheet_images(annotations: CocoBoxes) -> list[int]:
    """Up to IMAGES images that have boxes, evenly spaced over the data set."""
    with_boxes = np.flatnonzero(np.diff(annotations.offsets))
    places = np.linspace(0, len(with_boxes) - 1, min(IMAGES, len(with_boxes))).round().astype(int)
    return with_boxes[places].tolist()


def clean_views(annotations: CocoBoxes, images: list[int], min_sizes: list[int], max_size: int,
                teacher_size: tuple[int, int]) -> Iterator[Batch]:
    """Each image as a Batch of one, at the middle one of min_sizes, neither mirrored nor recoloured.

    An image that cannot be read is left out; training names it.
    """
    middle = sorted(min_sizes)[len(min_sizes) // 2]
    views = TrainBatches(annotations, batch_size=1, min_sizes=[middle], max_size=max_size, teacher_size=teacher_size)
    for i in images:
        canvas = canvas_of([views.resized_size(i, middle, max_size)])
        teacher_canvas = canvas_of([views.resized_size(i, *teacher_size)])
        try:
            sample = views.sample(Choices(i, middle, flip=False, colour_seed=0), canvas, teacher_canvas)
        except DataError:
            continue
        if not sample.skipped:  # otherwise another image took its place
            yield collate([sample], 1, canvas, teacher_canvas)


def enlarged(p: Tensor, size: tuple[int, int]) -> list[dict]:
    """Run lengths at `size` (height, width) of probabilities p (G, h, w) at stride 4 of an image of that size."""
    return paste_masks(p.logit(), size, size)[0]
