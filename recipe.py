"""The recipe of Sec. 4.1: every option of train.py with its default, the learning rate, the ramps of the losses.

Everything that changes during a run is a function of the iteration, so resuming needs no scheduler state. (The
momentum of the EMA is in teacher.py, the order of the images in data.py.)
"""
import argparse
import math
import os
from pathlib import Path
from typing import NamedTuple

from backbone import BACKBONES
from data import AUGMENTATIONS
from formats.coco import NAMES
from formats.files import CommandLine
from formats.released import IMAGENET
from losses import PIXEL_LOSSES
from teacher import SCORES
from tools.command_line import (AMP, DEVICE, go_together, not_negative, not_negative_float, positive, positive_float,
                                probability)

# name: iterations of 16 images, and the two at which the learning rate falls to a tenth
SCHEDULES = {"1x": (90_000, 60_000, 80_000), "2x": (180_000, 120_000, 160_000), "3x": (270_000, 210_000, 250_000)}
RECIPES = {"sgd": (0.01, 1e-4), "adamw": (1e-4, 0.05)}  # optimizer: learning rate for 16 images, weight decay


class Plan(NamedTuple):
    """The length of a run, its learning rate and its ramp."""

    iterations: int
    lr: float               # at its peak
    warmup: int             # iterations of linear warm-up
    drops: tuple[int, int]  # iterations at which the learning rate falls to a tenth; not used with cosine
    cosine: bool
    ramp: int               # iterations until the pairwise and pseudo-mask losses reach their full weight


def make_plan(batch_size: int = 16, optimizer: str = "sgd", schedule: str = "1x", iters: int | None = None,
              lr: float | None = None, lr_decay: str = "steps", warmup: int | None = None,
              ramp: int | None = None) -> Plan:
    """The plan for these values of train.py's options.

    The learning rate is proportional to the batch size. The length of a named schedule is inversely proportional, so
    that every batch size sees the same number of images.
    """
    scale = 16 / batch_size
    if iters is None:
        iters, *drops = (round(n * scale) for n in SCHEDULES[schedule])
    else:
        drops = iters * 2 // 3, iters * 8 // 9
    if lr is None:
        lr = RECIPES[optimizer][0] / scale
    if warmup is None:
        warmup = min(1000, iters // 20)
    if ramp is None:
        ramp = max(1, min(round(10_000 * scale), iters // 9))
    return Plan(iters, lr, warmup, tuple(drops), lr_decay == "cosine", ramp)


def learning_rate(iteration: int, plan: Plan) -> float:
    """The learning rate at an iteration, counted from 0: linear warm-up from a thousandth, then decay."""
    factor = min(1.0, 0.001 + 0.999 * iteration / plan.warmup) if plan.warmup else 1.0
    if plan.cosine:
        return plan.lr * factor * (1 + math.cos(math.pi * iteration / plan.iterations)) / 2
    return plan.lr * factor * 0.1 ** sum(iteration >= drop for drop in plan.drops)


def ramp_factor(iteration: int, plan: Plan) -> float:
    """The factor of the ramped losses at an iteration, counted from 0: it rises linearly to 1."""
    return min((iteration + 1) / plan.ramp, 1.0)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(description="Train instance segmentation from boxes.",
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    add = parser.add_argument_group("data").add_argument
    add("--data", default="coco", help=f"{', '.join(NAMES)} (under datasets/), or a folder in COCO layout")
    add("--train-json", metavar="FILE", help="annotations to train on, instead of those of --data; boxes suffice")
    add("--train-images", metavar="DIR", help="the images of --train-json")
    add("--val-json", metavar="FILE", help="annotations to evaluate on; with --train-json alone nothing is evaluated")
    add("--val-images", metavar="DIR", help="the images of --val-json")
    add("--min-size", type=positive, nargs="+", default=[640, 672, 704, 736, 768, 800], metavar="PIXELS",
        help="shorter sides, of which each image gets a random one, pixels")
    add("--max-size", type=positive, default=1333, metavar="PIXELS", help="longest side, pixels")
    add("--augment", choices=AUGMENTATIONS, default="none", help="colour augmentation of the student's view (Table 9)")
    add("--workers", type=not_negative, default=4, help="loading processes of each process")

    add = parser.add_argument_group("model").add_argument
    add("--method", choices=["boxteacher", "boxinst", "condinst"], default="boxteacher",
        help="boxinst: box losses only; condinst: learns the masks of the annotations")
    add("--backbone", choices=BACKBONES, default="r50",
        help="r18-slim is half as wide and has no ImageNet weights")
    add("--channels", type=positive, default=256, help="width of FPN and heads, a multiple of 32")
    add("--backbone-weights", default="imagenet", metavar="imagenet|none|FILE",
        help="imagenet: torchvision's; FILE: torchvision's, MSRA's R-50.pkl or R-101.pkl from detectron2, or the Swin "
        "authors' .pth (BoxTeacher uses the last two); none: train all of it from scratch, or with the weights that a "
        "backbone that you added brings")
    add("--init", metavar="CKPT", help="start from the weights of this checkpoint, the averaged ones if it has any, "
        "without the class layer if the classes differ; also a released one of BoxTeacher or AdelaiDet")

    add = parser.add_argument_group("teacher and losses").add_argument
    add("--teacher-min-size", type=positive, default=800, metavar="PIXELS",
        help="shorter side for the teacher and for evaluation, pixels")
    add("--teacher-max-size", type=positive, default=1333, metavar="PIXELS",
        help="longest side for the teacher and for evaluation, pixels")
    add("--ema", type=probability, default=0.999, help="momentum of the moving average of the weights, the teacher, "
        "after a warm-up")
    add("--average", action="store_true", help="boxinst and condinst: average the weights too, and evaluate the "
        "average (Table 7), which labels nothing")
    add("--score", choices=[*SCORES, "released"], default="mask-aware",
        help="weight of a pseudo mask (Table 5); released: that of the authors' program, with its binary masks")
    add("--pixel-loss", choices=PIXEL_LOSSES, default="dice", help="loss on pseudo masks (Table 3)")
    add("--lambda-pixel", type=not_negative_float, default=0.5, help="weight of the pixel loss (Eq. 2)")
    add("--lambda-affinity", type=not_negative_float, default=0.1, help="weight of the affinity loss (Eq. 2)")
    add("--measure-labels", action="store_true", help="if the training annotations have masks, log the mean IoU of the "
        "teacher's and of the student's masks with them (label_iou, student_iou); they are not learnt")

    add = parser.add_argument_group("optimisation").add_argument
    add("--schedule", choices=SCHEDULES, default="1x", help="90k, 180k or 270k iterations of 16 images")
    add("--iters", type=positive, help="number of iterations, instead of --schedule")
    add("--batch-size", type=positive, default=16,
        help="images per optimiser step, over all processes and micro-steps")
    add("--accumulate", type=positive, default=1, help="micro-steps per optimiser step")
    add("--optimizer", choices=RECIPES, help="sgd with momentum 0.9, or adamw; None: adamw for swin, else sgd")
    add("--lr", type=positive_float, help="peak learning rate; None: 0.01 (sgd) or 1e-4 (adamw) x batch size / 16")
    add("--lr-decay", choices=["steps", "cosine"], default="steps",
        help="steps: to a tenth twice, where the schedule states it, with --iters after 2/3 and 8/9")
    add("--warmup", type=not_negative, help="iterations of linear warm-up; None: 1000, at most a twentieth of the run")
    add("--ramp", type=positive, help="iterations in which the pairwise and pseudo-mask losses reach their full "
        "weight; None: 10000 of 16 images, at most a ninth of the run")
    add("--weight-decay", type=not_negative_float, help="weight decay; None: 1e-4 (sgd) or 0.05 (adamw)")
    add("--clip-grad", type=positive_float, help="largest norm of the gradient; None: unlimited")
    add("--amp", **AMP)
    add("--compile", action="store_true", help="torch.compile backbone, FPN and towers, and pad to multiples of 128 "
        "pixels: compiling takes minutes for each size, so few sizes are better")

    add = parser.add_argument_group("run").add_argument
    add("--device", **DEVICE)
    add("--seed", type=not_negative, default=0,
        help="of the initial weights, the order of the images and their augmentation")
    add("--out", metavar="DIR", help="run folder; None: runs/<method>-<backbone>-<data>")
    add("--fresh", action="store_true", help="move an earlier run in OUT aside instead of resuming it")
    add("--eval-every", type=positive, default=10000, help="iterations between evaluations, and between figures of "
        "masks on training images (OUT/labels-*.png); the last iteration has both too")
    add("--checkpoint-every", type=positive, default=5000, help="iterations between checkpoints")
    add("--log-every", type=positive, default=20, help="iterations between log lines")
    add("--tensorboard", action="store_true", help="write the figures of metrics.jsonl for TensorBoard too, to "
        "OUT/tensorboard (pip install tensorboard)")

    args = parser.parse_args(argv)
    # if a process dies, torchrun restarts all with the same arguments: then the run is resumed
    args.fresh = args.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    args.optimizer = args.optimizer or ("adamw" if args.backbone.startswith("swin") else "sgd")
    if args.average and args.method == "boxteacher":
        parser.error("--average is for --method boxinst and condinst: boxteacher's teacher is that average")
    if args.channels % 32:
        parser.error("--channels must be a multiple of 32")
    if args.batch_size % (args.accumulate * int(os.environ.get("WORLD_SIZE", 1))):
        parser.error("--batch-size must be a multiple of --accumulate times the number of processes")
    if args.init and args.backbone_weights not in ("imagenet", "none"):
        parser.error("--backbone-weights FILE and --init exclude each other: --init has all weights")
    if args.backbone not in IMAGENET and args.backbone_weights == "imagenet":
        parser.error(f"--backbone {args.backbone} has no ImageNet weights here: add --backbone-weights none")
    go_together(parser, args, "--train-json", "--train-images")
    go_together(parser, args, "--val-json", "--val-images")
    data = Path(args.train_json).stem if args.train_json else Path(args.data).name
    args.out = args.out or f"runs/{args.method}-{args.backbone}-{data}"
    return args
