"""What changes over a run, as pure functions of the iteration (paper Sec. 4.1): so a resumed run needs no state of it.

The EMA's momentum is in teacher.py, the order of images in data.py.
"""
import argparse
import math
from typing import NamedTuple

# name: iterations of 16 images, and after which of them the learning rate falls to a tenth
SCHEDULES = {"1x": (90_000, 60_000, 80_000), "2x": (180_000, 120_000, 160_000), "3x": (270_000, 210_000, 250_000)}
RECIPES = {"sgd": (0.01, 1e-4), "adamw": (1e-4, 0.05)}  # optimizer: learning rate for 16 images, weight decay


class Plan(NamedTuple):
    iterations: int
    lr: float                # its peak
    warmup: int              # iterations of linear warm-up
    drops: tuple[int, int]   # iterations at which the learning rate falls to a tenth; not used by cosine
    cosine: bool
    ramp: int                # iterations until the losses of RAMPED have their full weight


def make_plan(args: argparse.Namespace) -> Plan:
    """Fewer images a batch: the learning rate falls and a named schedule grows in proportion."""
    scale = 16 / args.batch_size
    if args.iters is None:
        iterations, *drops = (round(n * scale) for n in SCHEDULES[args.schedule])
    else:
        iterations, drops = args.iters, (args.iters * 2 // 3, args.iters * 8 // 9)
    lr = args.lr if args.lr is not None else RECIPES[args.optimizer][0] / scale
    warmup = args.warmup if args.warmup is not None else min(1000, iterations // 20)
    ramp = args.ramp if args.ramp is not None else max(1, min(round(10_000 * scale), iterations // 9))
    return Plan(iterations, lr, warmup, tuple(drops), args.lr_decay == "cosine", ramp)


def learning_rate(iteration: int, plan: Plan) -> float:
    factor = min(1.0, 0.001 + 0.999 * iteration / plan.warmup) if plan.warmup else 1.0
    if plan.cosine:
        return plan.lr * factor * (1 + math.cos(math.pi * iteration / plan.iterations)) / 2
    return plan.lr * factor * 0.1 ** sum(iteration >= drop for drop in plan.drops)


def ramp_factor(iteration: int, plan: Plan) -> float:
    return min((iteration + 1) / plan.ramp, 1.0)
