"""The recipe of Sec. 4.1 and that of small sets: every option of train.py, the learning rate, the ramps of the losses.

    make_plan            length, learning rate and ramp of a run, as functions of the iteration
    small_set_recipe     what is chosen for a folder of somebody's own images
    parse_arguments      the options; `choose` fills in those that depend on the data set

Everything that changes during a run is a function of the iteration, so resuming needs no scheduler state. (The
momentum of the EMA is in teacher.py, the order of the images in data.py.)
"""
import argparse
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from backbone import BACKBONES
from boxteacher import REFINED_WEIGHT
from data import AUGMENTATIONS
from formats.coco import NAMES, CocoBoxes
from formats.files import CommandLine
from formats.pictures import image_options
from formats.released import IMAGENET
from losses import PIXEL_LOSSES
from teacher import SCORES
from tools.command_line import (AMP, DEVICE, go_together, not_negative, not_negative_float, positive, positive_float,
                                probability)

# name: iterations of 16 images, and the two at which the learning rate falls to a tenth
SCHEDULES = {"1x": (90_000, 60_000, 80_000), "2x": (180_000, 120_000, 160_000), "3x": (270_000, 210_000, 250_000)}
PAPER_SETS = ("coco", "cityscapes", "shapes")  # they have this recipe, other data with --schedule alone
RECIPES = {"sgd": (0.01, 1e-4), "adamw": (1e-4, 0.05)}  # optimizer: learning rate for 16 images, weight decay
PAPER = {"schedule": "1x", "backbone": "r50", "channels": 256, "batch_size": 16, "lr_decay": "steps", "ema": 0.999,
         "min_size": [640, 672, 704, 736, 768, 800], "max_size": 1333, "teacher_min_size": 800,
         "teacher_max_size": 1333, "colors": "off", "eval_every": 10_000, "checkpoint_every": 5_000, "log_every": 20}


class Plan(NamedTuple):
    """The length of a run, its learning rate and its ramp."""

    iterations: int
    lr: float               # at its peak
    warmup: int             # iterations of linear warm-up
    drops: tuple[int, int]  # iterations at which the learning rate falls to a tenth; not used with cosine
    cosine: bool
    ramp: int               # iterations until the noisy losses (boxteacher.total_loss) reach their full weight


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


# -------------------------------------------------------------------------------------------------- small sets

# Microseconds that one core (AMD EPYC with AVX-512, float32) trains for each pixel of an image: the backbone and, at 64
# channels, FPN and heads with the teacher
CPU_BACKBONES, CPU_HEADS = {"r18-slim": 1.5, "r18": 2.6, "r34": 5.5, "r50": 6.5}, 1.2
CPU_BUDGET = 2 * 3600e6  # microseconds of one core: an hour on two


class SmallSet(NamedTuple):
    """What the choices for a small set are made from. A run keeps it, so that it goes on with the same choices."""

    images: int
    box: float     # median over the boxes: shorter side of the box / shorter side of its image
    aspect: float  # mean over the images: longer / shorter side
    device: str    # cpu, cuda, ...


def small_set(annotations: CocoBoxes, device: str) -> SmallSet:
    """The facts of a data set. Without any box, `box` is 1."""
    low, high = annotations.sizes.min(1), annotations.sizes.max(1)
    widths, heights = (annotations.boxes[:, 2:] - annotations.boxes[:, :2]).T
    relative = np.minimum(widths, heights) / np.repeat(low, np.diff(annotations.offsets))
    box = float(np.median(relative)) if len(relative) else 1.0
    return SmallSet(len(annotations), round(box, 4), round(float((high / low).mean()), 4), device)


def small_backbone(device: str, backbone_weights: str) -> str:
    """The backbone for a small set. A file of weights is mostly one of r50."""
    small = {"imagenet": "r18", "none": "r18-slim"}
    return "r50" if device != "cpu" else small.get(backbone_weights, "r50")


def cpu_microseconds(backbone: str, channels: int, method: str) -> float:
    """What one core takes to train on a pixel of an image, roughly: machines differ by a factor of two."""
    cost = CPU_BACKBONES.get(backbone, CPU_BACKBONES["r50"]) + CPU_HEADS * (channels / 64) ** 1.5
    return cost * (1 if method == "boxteacher" else 0.75)  # the others have no teacher


def small_set_recipe(images: int, box: float, aspect: float, device: str, given: dict, multiple: int = 1) -> dict:
    """The options of train.py that a small set needs, {name: value}; the first parameters are those of SmallSet.

    given: options with a value, among them backbone_weights, method and init; they stay, and the others are chosen
    around them. multiple: the batch must be one of it.

    Measured on CPUs (EXPERIMENTS.md): 90 images, from random weights, batches of 8, and 288 images, a frozen backbone,
    batches of 4. The number of images that a run sees grows with the root of the set's size: both lie on that curve.
    """
    value = {name: v for name, v in given.items() if v is not None}
    pick, cpu, init = value.setdefault, device == "cpu", "init" in value
    scratch = value["backbone_weights"] == "none" and not init
    backbone = pick("backbone", small_backbone(device, value["backbone_weights"]))
    channels = pick("channels", 64 if cpu else 256)
    batch = pick("batch_size", -(-(4 if cpu and not scratch else 8) // multiple) * multiple)

    seen, aspect = (750 if cpu else 3000) * math.sqrt(images), min(aspect, 5 / 3)
    budget = CPU_BUDGET / cpu_microseconds(backbone, channels, value["method"]) / aspect if cpu else math.inf
    smallest = 192 if cpu else 384
    side = min(max(math.ceil((32 if cpu else 64) / box / 32) * 32, smallest), 800)
    if cpu and "iters" not in value:  # smaller images rather than fewer than 8,000 of them
        side = max(min(side, int(math.sqrt(budget / min(seen, 8000))) // 32 * 32), smallest)
    side = min(side, value.get("max_size", side))
    side = max(pick("min_size", [*range(math.ceil(side * 0.8 / 32) * 32, side + 1, 32)] or [side]))
    longest = pick("max_size", side * 5 // 3)
    teacher = pick("teacher_min_size", side)
    pick("teacher_max_size", longest if teacher == side else teacher * 5 // 3)

    iters = pick("iters", max(10, round(min(seen, budget / side ** 2) / batch / 10) * 10))
    # with a short ramp the pairwise loss wins before masks exist; a checkpoint has masks from the start
    pick("ramp", max(1, min(160_000 // batch, iters // 20 if init else iters * 5 // 9)))
    if pick("optimizer", "adamw") == "adamw" and not backbone.startswith("swin"):
        pick("lr", batch * (2.5e-4 if scratch else 2.5e-5))  # weights that have learnt bear a tenth
    if value["method"] == "boxteacher":
        pick("colors", "on" if value["score"] == "mask-aware" else "off")  # other scores rate the paper's masks
    pick("lr_decay", "cosine")
    pick("clip_grad", 10.0)
    pick("ema", 0.999 if iters >= 10_000 else 0.99)
    pick("eval_every", math.ceil(iters / 4))
    pick("checkpoint_every", min(1000, math.ceil(iters / 10)))
    pick("log_every", max(1, min(20, iters // 50)))
    return value


def as_option(name: str, value) -> str:
    words = [f"{word:g}" if isinstance(word, float) else str(word) for word in np.atleast_1d(value).tolist()]
    return f"--{name.replace('_', '-')} {' '.join(words)}"


def explained(value: dict, facts: SmallSet, given: dict, cores: int) -> list[str]:
    """Lines that say what `small_set_recipe` chose and why, and what it will take. cores: that train, of a CPU."""
    images, box, aspect, device = facts
    side, cpu, seen = max(value["min_size"]), device == "cpu", value["iters"] * value["batch_size"]
    start = ("a checkpoint" if value.get("init") else "random weights" if value["backbone_weights"] == "none" else
             "a trained backbone")
    reasons = {
        "backbone channels": "small, for a CPU" if value["channels"] < 256 else "as in the paper",
        "min_size max_size teacher_min_size teacher_max_size":
            f"half of the boxes become at least {box * side:.0f} pixels wide and high",
        "batch_size optimizer lr lr_decay clip_grad ema": f"for a short run from {start}",
        "colors": "better pseudo masks than the paper's" if value.get("colors") == "on" else
                  f"--score {value['score']} rates the paper's pseudo masks",
        "iters": f"{seen / images:.3g} passes over {images} images",
        "ramp": "the checkpoint has learnt masks" if value.get("init") else
                "masks must form before similar colours count in full",
        "eval_every checkpoint_every log_every": "so that four evaluations show how it learns"}
    lines = ["chosen, since not given (--schedule 1x is the paper's recipe):"]
    for names, reason in reasons.items():
        chosen = [as_option(name, value[name]) for name in names.split() if given.get(name) is None and name in value]
        if chosen:
            lines.append(f"  {' '.join(chosen)}: {reason}")
    time = "the log shows the time left"
    if cpu and value["backbone"] in CPU_BACKBONES:
        cost = cpu_microseconds(value["backbone"], value["channels"], value["method"])
        minutes = seen * side ** 2 * min(aspect, 5 / 3) * cost / cores / 60e6
        time = f"roughly {minutes:.0f} minutes on {cores} core{'s' * (cores > 1)}; {time}"
    return [*lines, "  " + time]


def choose(args: argparse.Namespace, annotations: CocoBoxes, model: dict, config: dict | None) -> list[str]:
    """Fill in the options of `args` that depend on the data set; returns lines that say so, for a person.

    model: that of the checkpoint to start from or to go on from, {} without one. config: the options of the run to go
    on with, or None. Its choices are made again from what they were made from; a run of the paper's recipe, as all were
    once, keeps that.
    """
    if not args.schedule and config is not None and not config.get("chosen_from"):
        use_paper(args)
    if args.schedule:
        return []
    if config is not None and args.method == "boxteacher" and args.score == "mask-aware":
        args.colors = args.colors or config.get("colors") or "off"  # runs of earlier versions have the paper's masks
    given = {name: model.get(name) for name in ("backbone", "channels")}
    given |= {name: v for name, v in vars(args).items() if v is not None}
    facts = SmallSet(*config["chosen_from"]) if config else small_set(annotations, args.device.type)
    value = small_set_recipe(*facts, given, args.accumulate * int(os.environ.get("WORLD_SIZE", 1)))
    vars(args).update(value, chosen_from=list(facts))
    return explained(value, facts, given, min(2, torch.get_num_threads()))


def use_paper(args: argparse.Namespace) -> None:
    """Give every option of `args` that was not given the paper's value."""
    for name, value in PAPER.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.optimizer = args.optimizer or ("adamw" if args.backbone.startswith("swin") else "sgd")


# ------------------------------------------------------------------------------------------------- the options


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(description="Train instance segmentation from boxes. For coco, cityscapes, shapes, and with "
                         "--schedule, defaults are the paper's. For other data many are chosen from the number of "
                         "images, the sizes of the boxes and the device, and printed at the start.",
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    add = parser.add_argument_group("data").add_argument
    add("--data", default="coco", help=f"{', '.join(NAMES)} (under datasets/), or a folder in COCO layout")
    add("--train-json", metavar="FILE", help="annotations to train on, instead of those of --data; boxes suffice")
    add("--train-images", metavar="DIR", help="the images of --train-json")
    add("--val-json", metavar="FILE", help="annotations to evaluate on; with --train-json alone nothing is evaluated")
    add("--val-images", metavar="DIR", help="the images of --val-json")
    add("--min-size", type=positive, nargs="+", metavar="PIXELS",
        help="shorter sides, of which each image gets a random one, pixels; None: 640 672 704 736 768 800, or chosen")
    add("--max-size", type=positive, metavar="PIXELS",
        help="longest side, pixels; None: 1333, or, if chosen, 5/3 of the largest --min-size")
    add("--augment", choices=AUGMENTATIONS, default="none", help="colour augmentation of the student's view (Table 9)")
    add("--workers", type=not_negative, default=4, help="loading processes of each process")
    image_options(add)

    add = parser.add_argument_group("model").add_argument
    add("--method", choices=["boxteacher", "boxinst", "condinst"], default="boxteacher",
        help="boxinst: box losses only; condinst: learns the masks of the annotations")
    add("--backbone", choices=BACKBONES, help="r18-slim is half as wide and has no ImageNet weights; None: r50, or, if "
        "chosen on a CPU, r18, without weights r18-slim")
    add("--channels", type=positive,
        help="width of FPN and heads, a multiple of 32; None: 256, or, if chosen on a CPU, 64")
    add("--backbone-weights", default="imagenet", metavar="imagenet|none|FILE",
        help="imagenet: torchvision's; FILE: torchvision's, MSRA's R-50.pkl or R-101.pkl from detectron2, or the Swin "
        "authors' .pth (BoxTeacher uses the last two); none: train all of it from scratch, or with the weights that a "
        "backbone that you added brings")
    add("--init", metavar="CKPT", help="start from the weights of this checkpoint, the averaged ones if it has any, "
        "without the class layer if the classes differ; also a released one of BoxTeacher or AdelaiDet")

    add = parser.add_argument_group("teacher and losses").add_argument
    add("--teacher-min-size", type=positive, metavar="PIXELS",
        help="shorter side for the teacher and for evaluation, pixels; None: 800, or, if chosen, the --min-size")
    add("--teacher-max-size", type=positive, metavar="PIXELS",
        help="longest side for the teacher and for evaluation, pixels; None: 1333, or, if chosen, --max-size")
    add("--ema", type=probability, help="momentum of the moving average of the weights, the teacher, after a warm-up; "
        "None: 0.999, or, if chosen for less than 10,000 iterations, 0.99")
    add("--average", action="store_true", help="boxinst and condinst: average the weights too, and evaluate the "
        "average (Table 7), which labels nothing")
    add("--score", choices=[*SCORES, "released"], default="mask-aware",
        help="weight of a pseudo mask (Table 5); released: that of the authors' program, with its binary masks")
    add("--fit-steps", type=not_negative, default=0, help="steps in which mask heads are fitted to each box "
        "(predict.py: 20). With this or --colors on, pseudo masks are not the paper's but refined (refine.py)")
    add("--colors", choices=["on", "off"], help="correct pseudo masks by the colours of the image; None: off, or, if "
        "chosen, on")
    add("--pixel-loss", choices=PIXEL_LOSSES, default="dice", help="loss on pseudo masks (Table 3)")
    add("--lambda-pixel", type=not_negative_float, default=0.5, help="weight of the pixel loss (Eq. 2); refined pseudo "
        f"masks weigh {REFINED_WEIGHT:g} times as much")
    add("--lambda-affinity", type=not_negative_float, default=0.1, help="weight of the affinity loss (Eq. 2); as above")
    add("--measure-labels", action="store_true", help="if the training annotations have masks, log the mean IoU of the "
        "teacher's and of the student's masks with them (label_iou, student_iou); they are not learnt")

    add = parser.add_argument_group("optimisation").add_argument
    add("--schedule", choices=SCHEDULES, help="the paper's recipe, with 90k, 180k or 270k iterations of 16 images; "
        "None: 1x for coco, cityscapes and shapes, otherwise that of small sets")
    add("--iters", type=positive, help="number of iterations; None: that of --schedule, or chosen")
    add("--batch-size", type=positive, help="images per optimiser step, over all processes and micro-steps; "
        "None: 16, or, if chosen, 8, and 4 to fine-tune on a CPU")
    add("--accumulate", type=positive, default=1, help="micro-steps per optimiser step")
    add("--optimizer", choices=RECIPES,
        help="sgd with momentum 0.9, or adamw; None: adamw if chosen or for swin, else sgd")
    add("--lr", type=positive_float, help="peak learning rate; None: 0.01 (sgd) or 1e-4 (adamw) x batch size / 16, or, "
        "if chosen for adamw, 2.5e-4 x batch size from random weights and 2.5e-5 x batch size from trained ones")
    add("--lr-decay", choices=["steps", "cosine"], help="steps: to a tenth twice, where the schedule states it, with "
        "--iters after 2/3 and 8/9; None: cosine if chosen, else steps")
    add("--warmup", type=not_negative, help="iterations of linear warm-up; None: 1000, at most a twentieth of the run")
    add("--ramp", type=positive, help="iterations in which the pairwise loss, and those of the paper's pseudo masks, "
        "reach their full weight; None: 10000 of 16 images, at most a ninth of the run, or, if chosen, 5/9, with "
        "--init a twentieth")
    add("--weight-decay", type=not_negative_float, help="weight decay; None: 1e-4 (sgd) or 0.05 (adamw)")
    add("--clip-grad", type=positive_float, help="largest norm of the gradient; None: unlimited, or, if chosen, 10")
    add("--amp", **AMP)
    add("--compile", action="store_true", help="torch.compile backbone, FPN and towers, and pad to multiples of 128 "
        "pixels: compiling takes minutes for each size, so few sizes are better")

    add = parser.add_argument_group("run").add_argument
    add("--device", **DEVICE)
    add("--seed", type=not_negative, default=0,
        help="of the initial weights, the order of the images and their augmentation")
    add("--out", metavar="DIR", help="run folder; None: runs/<method>-<backbone>-<data>")
    add("--fresh", action="store_true", help="move an earlier run in OUT aside instead of resuming it")
    add("--eval-every", type=positive, help="iterations between evaluations, and between figures of masks on "
        "training images (OUT/labels-*.png); the last iteration has both too; None: 10000, or, if chosen, a quarter of "
        "the run")
    add("--checkpoint-every", type=positive,
        help="iterations between checkpoints; None: 5000, or, if chosen, a tenth of the run, at most 1000")
    add("--log-every", type=positive, help="iterations between log lines; None: 20, or fewer in a short run")
    add("--tensorboard", action="store_true", help="write the figures of metrics.jsonl for TensorBoard too, to "
        "OUT/tensorboard (pip install tensorboard)")

    args = parser.parse_args(argv)
    # torchrun restarts processes, and Slurm a job, with the same arguments: then the run is resumed
    restarts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    args.fresh = args.fresh and all(os.environ.get(name, "0") == "0" for name in restarts)
    args.chosen_from = None  # of a small set
    if args.schedule or args.data in PAPER_SETS and not args.train_json:
        use_paper(args)
    if args.average and args.method == "boxteacher":
        parser.error("--average is for --method boxinst and condinst: boxteacher's teacher is that average")
    if args.fit_steps or args.colors == "on":
        if args.method != "boxteacher":
            parser.error("--fit-steps and --colors refine the pseudo masks of --method boxteacher")
        if args.score != parser.get_default("score"):
            parser.error("--score rates the paper's pseudo masks: leave it out, or --fit-steps and --colors on")
    if (args.channels or 32) % 32:
        parser.error("--channels must be a multiple of 32")
    if (args.batch_size or 0) % (args.accumulate * int(os.environ.get("WORLD_SIZE", 1))):
        parser.error("--batch-size must be a multiple of --accumulate times the number of processes")
    if args.init and args.backbone_weights not in ("imagenet", "none"):
        parser.error("--backbone-weights FILE and --init exclude each other: --init has all weights")
    backbone = args.backbone or small_backbone(args.device.type, args.backbone_weights)
    if backbone not in IMAGENET and args.backbone_weights == "imagenet":
        parser.error(f"--backbone {backbone} has no ImageNet weights here: add --backbone-weights none")
    go_together(parser, args, "--train-json", "--train-images")
    go_together(parser, args, "--val-json", "--val-images")
    data = Path(args.train_json).stem if args.train_json else Path(args.data).name
    args.out = args.out or f"runs/{args.method}-{backbone}-{data}"
    return args
