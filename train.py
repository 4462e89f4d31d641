"""Train BoxTeacher from boxes alone (paper Sec. 3), or its two bounds: BoxInst and CondInst.

    python train.py --data shapes --backbone r18-slim --backbone-weights none --channels 64 ...   (see `make demo`)
    torchrun --nproc_per_node=8 train.py --backbone r50 --schedule 3x --augment strong            COCO, one machine
    torchrun --nnodes=2 --node_rank=N --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...

One iteration: the losses of a batch (boxteacher.py), a step of the optimiser, the EMA of the teacher.

Everything that changes over a run (pictures, learning rate, EMA momentum, ramps) is a function of the iteration, so
a run that is stopped, killed or started on other processes goes on from its last checkpoint as if nothing had been.
"""
import argparse
import itertools
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import checkpoint
import teacher as teacher_module
from backbone import BACKBONES
from boxteacher import compute_losses, total_loss
from checkpoint import CheckpointError
from coco import NAMES, CocoBoxes, DataError, category_problems, datasets, raise_first
from data import (AUGMENTATIONS, COMPILED_STRIDE, STRIDE, Batch, TrainBatches, check_sizes, ignore_signals,
                  positive)
from evaluate import (coco_metrics, evaluate, output_file, pick_amp, pick_device, print_tables, probability,
                      start_distributed)
from log import Log, LogError, draw_sheet, summary_writer
from model import CondInst, build_model
from pretrained import IMAGENET
from schedule import RECIPES, SCHEDULES, learning_rate, make_plan, ramp_factor


class TrainingError(Exception):
    """The run cannot go on; the message is one line for a person."""


# ------------------------------------------------------------------------------------------------ one iteration


class StepResult(NamedTuple):
    """All on the device: to ask for a number is to wait until the device has done the step."""

    losses: dict[str, Tensor]   # means over the micro-steps, "loss" the total
    counts: dict[str, Tensor]   # sums over the micro-steps
    norm: Tensor                # of the gradient, before clipping
    skipped: Tensor             # bool: loss or gradient not finite on some process: nothing was updated
    broken: Tensor              # bool: skipped, and not because fp16's scaler is still looking for its scale
    stop: Tensor                # bool: some process was asked to stop


def train_step(run: "Run", batches: list[Batch], iteration: int, stop_asked: bool) -> StepResult:
    """One optimiser step over the micro-batches, then the teacher's EMA."""
    args, plan = run.args, run.plan
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(iteration, plan)
    losses, counts = {}, {}
    statistics = [x.clone() for x in run.statistics]
    for number, batch in enumerate(batches, 1):
        last = number == len(batches)
        if isinstance(run.student, DistributedDataParallel):
            run.student.require_backward_grad_sync = last  # gradients meet once a step, not once a micro-step
        labeller = run.teacher if args.method == "boxteacher" else None
        part, count = compute_losses(run.student, labeller, batch, args, run.autocast())
        loss = part["loss"] = total_loss(part, ramp_factor(iteration, plan))
        # a loss that is not finite spoils the whole gradient, and with it those of all processes: all skip the step
        run.scaler.scale(loss * (1 + 0 * loss.detach()) / len(batches)).backward()
        for name, value in part.items():
            losses[name] = losses.get(name, 0) + value.detach() / len(batches)
        for name, value in count.items():
            counts[name] = counts.get(name, 0) + value

    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in run.parameters])
    if args.clip_grad:
        nn.utils.clip_grads_with_norm_(run.parameters, args.clip_grad, norm)
    skipped = ~norm.isfinite()
    if not run.scaler.is_enabled():  # else the scaler says the same
        run.optimizer.found_inf = skipped.float()  # where this is 1 a fused optimiser leaves all as it is
    run.scaler.step(run.optimizer)
    for now, before in zip(run.statistics, statistics):
        now.copy_(torch.where(skipped, before, now))
    if run.teacher is not None:
        alpha = torch.full((), teacher_module.ema_momentum(iteration + 1, args.ema), dtype=torch.float64, device=run.device)
        teacher_module.update(run.teacher, run.model, torch.where(skipped, 1.0, alpha),
                              statistics=args.method != "boxteacher")
    # with fp16 a gradient may overflow while the loss is finite: the scaler then scales less, down to 1 in earnest
    excused = run.scaler.is_enabled() and run.scaler.get_scale() > 1
    broken = ~losses["loss"].isfinite() if excused else skipped
    flags = torch.stack([broken, torch.full_like(broken, stop_asked)]).float()
    if run.world_size > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return StepResult(losses, counts, norm, skipped, *flags.bool())


class Verdict:
    """What a step's `broken` and `stop` say, once their copy has reached the host: it waits for that alone, not for
    what the device was given to do since."""

    def __init__(self, result: StepResult):
        self.flags = torch.stack([result.broken, result.stop]).to("cpu", non_blocking=True)
        self.copied = torch.cuda.Event() if result.broken.is_cuda else None
        if self.copied:
            self.copied.record()

    def read(self) -> tuple[bool, bool]:
        if self.copied:
            self.copied.synchronize()
        return tuple(self.flags.tolist())


# ------------------------------------------------------------------------------------------------------ the run


class Run:
    """What a run owns: the models, the optimiser, where it stands."""

    def __init__(self, args: argparse.Namespace, classes: list[dict], rank: int, world_size: int, device: torch.device):
        self.args, self.classes, self.plan = args, classes, make_plan(args)
        self.rank, self.world_size, self.device = rank, world_size, device
        self.out, self.iteration = Path(args.out), 0
        self.amp_dtype = pick_amp(args.amp, device)
        self.spec = {"backbone": args.backbone, "num_classes": len(classes), "channels": args.channels,
                     "frozen": args.backbone_weights != "none"}

        # weights to go on from or to start with, and the conventions of the network that they are made for
        state, start, backbone = None if args.fresh else checkpoint.load_latest(self.out), None, None
        if state is None and args.init:
            start = checkpoint.load(args.init)
        elif state is None and args.backbone_weights != "none":
            backbone, self.spec["stride_in_1x1"] = checkpoint.load_backbone(args.backbone, args.backbone_weights)
        its = (state or start or {"model": {}})["model"]
        self.spec |= {key: its[key] for key in ("mask_channels", "stride_in_1x1") if key in its}

        torch.manual_seed(args.seed)
        self.model = build_model(**self.spec)
        if start is not None:
            checkpoint.initialise(self.model, classes, start, args.init)
            if rank == 0:
                print(f"starts from {args.init} (method {start['method']})")
        elif backbone is not None:
            self.model.backbone.load_state_dict(backbone, strict=False)
        self.model.to(device).train()
        averaged = args.method == "boxteacher" or args.average
        self.teacher = teacher_module.make_teacher(self.model) if averaged else None
        # batch norm's averages, which the forward pass moves before a loss is known to be finite
        self.statistics = [x for model in (self.model, self.teacher) if model for module in model.modules()
                           if isinstance(module, nn.BatchNorm2d) for x in module.buffers()]

        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.decay = args.weight_decay if args.weight_decay is not None else RECIPES[args.optimizer][1]
        # fused: in one pass over memory, and the device itself skips a step (train_step)
        if args.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.parameters, self.plan.lr, momentum=0.9, weight_decay=self.decay,
                                             fused=True)
            for p in self.parameters:  # where the first step is skipped torch would leave them as memory happened to be
                self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        else:
            self.optimizer = torch.optim.AdamW(self.parameters, self.plan.lr, weight_decay=self.decay, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        if state is not None:
            self.resume(state)
        for network in (self.model, self.teacher) if args.compile else ():
            if network is not None:
                network.compile_convolutions()
        self.student = self.model
        if world_size > 1:
            devices = [device] if device.type == "cuda" else None
            self.student = DistributedDataParallel(self.model, devices, broadcast_buffers=False,
                                                   gradient_as_bucket_view=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def evaluated(self) -> CondInst:
        return self.teacher or self.model

    def resume(self, state: dict) -> None:
        """Go on from a checkpoint of the same model; other options may differ and are named."""
        old = state["config"]
        for key, was, here in (("model", state["model"], self.spec), ("classes", state["classes"], self.classes),
                               ("method", state["method"], self.args.method),
                               ("optimizer", old["optimizer"], self.args.optimizer),
                               ("--average", state["teacher"] is not None, self.teacher is not None)):
            if was != here:
                raise CheckpointError(f"{self.out} holds a run with another {key} ({str(was)[:120]}, now "
                                      f"{str(here)[:120]}); choose another --out, or --fresh to move it aside")
        changed = [f"{k} {old.get(k)} -> {v}" for k, v in self.config().items()
                   if old.get(k, v) != v and k not in ("fresh", "init", "backbone_weights")]
        self.model.load_state_dict(state["student"])
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["weight_decay"], group["fused"], group["foreach"] = self.decay, True, False
        for p, its in self.optimizer.state.items():  # fused optimisers go through memory: it shall be laid out alike
            for name, value in its.items():
                its[name] = torch.empty_like(p).copy_(value) if value.shape == p.shape else value
        if state["scaler"]:  # empty where the run had no fp16 so far
            self.scaler.load_state_dict(state["scaler"])
        self.iteration = state["iteration"]
        if self.rank == 0:
            print(f"resumed {self.out} at iteration {self.iteration}")
            if changed:
                print("changed since: " + ", ".join(changed))
            for option, here in (("--init", self.args.init), ("--backbone-weights", self.args.backbone_weights)):
                if here != old[option[2:].replace("-", "_")]:
                    print(f"{option} {here} is not used: the run goes on from its own weights; --fresh starts anew")

    def config(self) -> dict:
        """Every option as plain types; the teacher's size is also the size to test at."""
        plain = (int, float, str, list, type(None))
        options = {k: v if isinstance(v, plain) else str(v) for k, v in vars(self.args).items()}
        return options | {"test_min_size": self.args.teacher_min_size, "test_max_size": self.args.teacher_max_size}

    def save(self) -> None:
        """last.pt, and final.pt at the end. Only the first process writes; all have the same state."""
        if self.rank == 0:
            state = {"model": self.spec, "classes": self.classes, "method": self.args.method, "config": self.config(),
                     "iteration": self.iteration, "torch": str(torch.__version__), "student": self.model.state_dict(),
                     "teacher": None if self.teacher is None else self.teacher.state_dict()}
            if self.iteration >= self.plan.iterations:  # first: where last.pt is complete, final.pt shall be there
                checkpoint.save(state, self.out / "final.pt")
            checkpoint.save(state | {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()},
                            self.out / "last.pt", self.out / "previous.pt")
        if self.world_size > 1:
            dist.barrier()


def run_evaluation(run: Run, log: Log, annotations: CocoBoxes) -> None:
    results = evaluate(run.evaluated(), annotations, min_size=run.args.teacher_min_size,
                       max_size=run.args.teacher_max_size, rescore=run.args.method == "boxteacher",
                       workers=run.args.workers, device=run.device, amp_dtype=run.amp_dtype,
                       worker_init_fn=ignore_signals)
    if run.rank == 0:
        metrics = coco_metrics(annotations.json_path, results)
        print_tables(metrics)
        log.evaluation(run.iteration, metrics)


def draw_labels(run: Run, log: Log, annotations: CocoBoxes) -> None:
    if run.rank == 0:
        draw_sheet(run.out / f"labels-{run.iteration:07}.png", f"their masks at iteration {run.iteration}",
                   run.evaluated(), annotations, run.args, run.autocast())
        log.reset()  # its time is not that of an iteration


class StopSignals:
    """SIGTERM or SIGINT: remember it, so that the step in hand is finished and saved. A second one ends at once."""

    def __enter__(self) -> "StopSignals":
        self.asked = 0
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():  # whoever called us, and its children, are stopped as before
            signal.signal(number, handler)

    def ask(self, number: int, frame) -> None:
        self.asked = number
        signal.signal(number, signal.SIG_DFL)


def check_skipped(batches: list[Batch], broken: set[str], pictures: int) -> None:
    """Name each undecodable picture once; TrainingError when there are more than 1 % (at least 10), or 100."""
    for note in {note for batch in batches for note in batch.skipped} - broken:
        print(f"warning: {note}; another picture takes its place", file=sys.stderr, flush=True)
        broken.add(note)
    if len(broken) > min(100, max(10, pictures // 100)):
        raise TrainingError(f"{len(broken)} pictures cannot be decoded, the last: {note}")


def report_nonfinite(run: Run, iteration: int, batches: list[Batch], result: StepResult) -> None:
    """Write what each process saw to nonfinite.json and end the run. The checkpoint before it stays as it is."""
    seen = {"rank": run.rank, "image_ids": [i for batch in batches for i in batch.image_ids],
            "gradient_norm": str(float(result.norm)),
            "losses": {name: str(float(value)) for name, value in result.losses.items()}}  # JSON has no NaN
    everyone = [seen]
    if run.world_size > 1:
        everyone = [None] * run.world_size
        dist.all_gather_object(everyone, seen)
    path = run.out / "nonfinite.json"
    if run.rank == 0:
        path.write_text(json.dumps({"iter": iteration, "lr": learning_rate(iteration, run.plan),
                                    "processes": everyone}, indent=1))
    raise TrainingError(f"loss or gradient not finite three times in a row at iteration {iteration}: image ids and "
                        f"losses are in {path}; a smaller --lr, a longer --warmup or --clip-grad 10 usually help")


def train(run: Run, batches: TrainBatches, validation: CocoBoxes | None, signals: StopSignals) -> int:
    """The loop from run.iteration to the end. Returns the signal that stopped it, or 0."""
    args, plan, k = run.args, run.plan, run.args.accumulate
    loader = DataLoader(batches, batch_size=None, sampler=range(run.iteration * k, plan.iterations * k),
                        num_workers=args.workers, collate_fn=TrainBatches.collate, worker_init_fn=ignore_signals,
                        pin_memory=run.device.type == "cuda")
    undecodable, bad_in_a_row, unread = set(), 0, []
    log = Log(run.out, plan, run.iteration, run.rank, run.world_size, args.tensorboard)
    micro_batches = iter(loader)
    while run.iteration < plan.iterations:
        waiting = time.perf_counter()
        now = [batch.to(run.device) for batch in itertools.islice(micro_batches, k)]
        waited = time.perf_counter() - waiting
        check_skipped(now, undecodable, len(batches.annotations))

        result = train_step(run, now, run.iteration, bool(signals.asked))
        unread.append((run.iteration, now, result, Verdict(result)))
        log.step(result.losses, result.counts, result.skipped, waited)
        run.iteration += 1
        pause = run.iteration == plan.iterations or run.iteration % args.eval_every == 0  # to look at the model
        due = pause or run.iteration % args.log_every == 0

        # each verdict is read a step later, so that the device has work meanwhile; the log waits for it anyway
        stop = False
        while len(unread) > (0 if due else 1):
            iteration, *seen, verdict = unread.pop(0)
            broken, asked = verdict.read()
            bad_in_a_row, stop = bad_in_a_row + 1 if broken else 0, stop or asked
            if bad_in_a_row == 3:
                report_nonfinite(run, iteration, *seen)

        if due or stop:
            log.write(run.iteration)
        if run.iteration % args.checkpoint_every == 0 or pause or stop:
            run.save()
        if stop:
            return signals.asked or signal.SIGTERM
        if pause:
            draw_labels(run, log, batches.annotations)
        if pause and validation is not None:
            run_evaluation(run, log, validation)
    return 0


# ------------------------------------------------------------------------------------------------- command line


def not_negative(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return int(text)


def not_negative_float(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return float(text)


def positive_float(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return float(text)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train instance segmentation from boxes.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    add = parser.add_argument_group("data").add_argument
    add("--data", default="coco", help="coco, cityscapes, shapes (under datasets/), or a folder in COCO layout")
    add("--train-json", metavar="FILE", help="annotations to train on, in place of those of --data; boxes suffice")
    add("--train-images", metavar="DIR", help="the pictures of --train-json")
    add("--val-json", metavar="FILE", help="annotations to evaluate on; none: no evaluation with --train-json")
    add("--val-images", metavar="DIR", help="the pictures of --val-json")
    add("--min-size", type=positive, nargs="+", default=[640, 672, 704, 736, 768, 800], metavar="PIXELS",
        help="shorter sides to draw from, pixels")
    add("--max-size", type=positive, default=1333, metavar="PIXELS", help="longest side, pixels")
    add("--augment", choices=AUGMENTATIONS, default="none", help="colour augmentation of the student's view (Table 9)")
    add("--workers", type=not_negative, default=4, help="loading processes of each process")

    add = parser.add_argument_group("model").add_argument
    add("--method", choices=["boxteacher", "boxinst", "condinst"], default="boxteacher",
        help="boxinst: box losses only; condinst: the masks of the annotations")
    add("--backbone", choices=BACKBONES, default="r50",
        help="r18-slim is half as wide and has no ImageNet weights")
    add("--channels", type=positive, default=256, help="width of FPN and heads, a multiple of 32")
    add("--backbone-weights", default="imagenet", metavar="imagenet|none|FILE",
        help="imagenet: torchvision's; FILE: torchvision's too, detectron2's R-50.pkl or R-101.pkl of MSRA, or the "
        "Swin authors' .pth, the last two as BoxTeacher uses them; none: from scratch, all of it learns (a backbone of "
        "your own may bring its weights)")
    add("--init", metavar="CKPT", help="start from these weights, the averaged ones where there are any (not the class "
        "layer where classes differ); also released ones of BoxTeacher or AdelaiDet")

    add = parser.add_argument_group("teacher and losses").add_argument
    add("--teacher-min-size", type=positive, default=800, metavar="PIXELS",
        help="shorter side for the teacher and for tests, pixels")
    add("--teacher-max-size", type=positive, default=1333, metavar="PIXELS",
        help="longest side for the teacher and for tests, pixels")
    add("--ema", type=probability, default=0.999, help="momentum of the average of the weights: the teacher")
    add("--average", action="store_true", help="boxinst and condinst: average the weights too and evaluate these "
        "(Table 7); nothing is labelled")
    add("--score", choices=[*teacher_module.SCORES, "released"], default="mask-aware",
        help="weight of a pseudo mask (Table 5); released: the authors' program's, with its binary masks")
    add("--pixel-loss", choices=["dice", "bce", "avg", "none"], default="dice", help="on pseudo masks (Table 3)")
    add("--measure-labels", action="store_true", help="where the training annotations have masks, log the mean IoU of "
        "the teacher's with them, and of the student's (label_iou, student_iou); nothing is learnt from them")
    add("--lambda-pixel", type=not_negative_float, default=0.5, help="its weight (Eq. 2)")
    add("--lambda-affinity", type=not_negative_float, default=0.1, help="weight of the affinity loss (Eq. 2)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--schedule", choices=SCHEDULES, default="1x", help="90k, 180k or 270k iterations of 16 pictures")
    add("--iters", type=positive, help="number of iterations, in place of --schedule")
    add("--batch-size", type=positive, default=16,
        help="pictures per optimiser step, over all processes and micro-steps")
    add("--accumulate", type=positive, default=1, help="micro-steps per optimiser step")
    add("--optimizer", choices=RECIPES, help="sgd with momentum 0.9, or adamw; None: adamw for swin, else sgd")
    add("--lr", type=positive_float, help="peak learning rate; None: 0.01 (sgd) or 1e-4 (adamw) x batch size / 16")
    add("--lr-decay", choices=["steps", "cosine"], default="steps",
        help="steps: to a tenth where the schedule says, with --iters after 2/3 and 8/9")
    add("--warmup", type=not_negative, help="iterations of linear warm-up; None: 1000, at most a twentieth of the run")
    add("--ramp", type=positive, help="iterations in which the pairwise and pseudo-mask losses reach their full "
        "weight; None: 10000 of 16 pictures, at most a ninth of the run")
    add("--weight-decay", type=not_negative_float, help="None: 1e-4 (sgd) or 0.05 (adamw)")
    add("--clip-grad", type=positive_float, help="largest norm of the gradient; None: any")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto",
        help="auto: bf16 or else fp16 on CUDA, off on CPU")

    add("--compile", action="store_true", help="torch.compile for backbone, FPN and towers, and padding to multiples of "
        "128 pixels, so that there are few sizes: each one's first step takes minutes")

    add = parser.add_argument_group("run").add_argument
    add("--device", type=pick_device, default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1")
    add("--seed", type=not_negative, default=0,
        help="of the first weights, the order of pictures and their augmentation")
    add("--out", metavar="DIR", help="run folder; None: runs/<method>-<backbone>-<data>")
    add("--fresh", action="store_true", help="move an earlier run in OUT aside instead of going on with it")
    add("--eval-every", type=positive, default=10000, help="iterations between evaluations, and between drawings of "
        "masks on training pictures (OUT/labels-*.png); one more at the end")
    add("--checkpoint-every", type=positive, default=5000, help="iterations between checkpoints")
    add("--log-every", type=positive, default=20, help="iterations between log lines")
    add("--tensorboard", action="store_true", help="write what metrics.jsonl says for TensorBoard too, into "
        "OUT/tensorboard (pip install tensorboard)")

    args = parser.parse_args(argv)
    # torchrun starts all processes again with the same arguments when one has died: then the run goes on
    args.fresh = args.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    args.optimizer = args.optimizer or ("adamw" if args.backbone.startswith("swin") else "sgd")
    if args.average and args.method == "boxteacher":
        parser.error("--average is for --method boxinst and condinst: boxteacher's teacher is that average")
    if args.channels % 32:
        parser.error("--channels must be a multiple of 32")
    if args.batch_size % (args.accumulate * int(os.environ.get("WORLD_SIZE", 1))):
        parser.error("--batch-size must be a multiple of --accumulate times the number of processes")
    if args.init and args.backbone_weights not in ("imagenet", "none"):
        parser.error("--backbone-weights FILE and --init exclude each other: --init brings all weights")
    if args.backbone not in IMAGENET and args.backbone_weights == "imagenet":
        parser.error(f"--backbone {args.backbone} has no ImageNet weights here: add --backbone-weights none")
    for one, two in (("train_json", "train_images"), ("val_json", "val_images")):
        if (getattr(args, one) is None) != (getattr(args, two) is None):
            parser.error(f"--{one} and --{two} go together".replace("_", "-"))
    data = Path(args.train_json).stem if args.train_json else Path(args.data).name
    args.out = args.out or f"runs/{args.method}-{args.backbone}-{data}"
    return args


def open_data(args: argparse.Namespace, rank: int) -> tuple[CocoBoxes, CocoBoxes | None]:
    """Both splits, checked; no evaluation where only training files were named, or a folder that has only these."""
    train_files, val_files = datasets(args.data, args.train_json, args.train_images, args.val_json, args.val_images)
    annotations = CocoBoxes(*train_files, masks=args.method == "condinst" or args.measure_labels)
    validate = bool(args.val_json or not args.train_json)
    if validate and not args.val_json and args.data not in NAMES and not os.path.exists(val_files[0]):
        validate = False
        if rank == 0:
            print(f"no evaluation: there is no {val_files[0]}")
    validation = CocoBoxes(*val_files) if validate else None
    for split in (annotations, validation):
        if rank == 0 and split is not None:
            check_sizes(split)
    if validation is not None:
        raise_first(category_problems(train_files[0], annotations.classes, val_files[0], validation.classes))
    return annotations, validation


def training_batches(args: argparse.Namespace, annotations: CocoBoxes, rank: int, world_size: int) -> TrainBatches:
    teacher_size = (args.teacher_min_size, args.teacher_max_size) if args.method == "boxteacher" else None
    return TrainBatches(annotations, batch_size=args.batch_size // args.accumulate, min_sizes=args.min_size,
                        max_size=args.max_size, teacher_size=teacher_size, augment=args.augment, seed=args.seed,
                        rank=rank, world_size=world_size, stride=COMPILED_STRIDE if args.compile else STRIDE)


def open_out(args: argparse.Namespace, rank: int) -> None:
    """Make the run folder; with --fresh an earlier one becomes OUT.1, OUT.2, ..."""
    out = Path(args.out)
    if rank == 0:
        if args.fresh and out.exists():
            aside = next(p for i in itertools.count(1) if not (p := out.with_name(f"{out.name}.{i}")).exists())
            out.rename(aside)
            print(f"moved {out} to {aside}")
        output_file(str(out / "last.pt"))
    if dist.is_initialized():
        dist.barrier()


def describe(run: Run, annotations: CocoBoxes) -> None:
    """The first lines of a run, and config.json."""
    plan, gpu = run.plan, torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
    print(f"python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
          f"{run.world_size} x {gpu}, autocast {run.amp_dtype or 'off'}")
    print(f"{run.args.method}, {run.args.backbone}: {len(annotations)} pictures, {len(annotations.boxes)} boxes, "
          f"{len(run.classes)} classes -> {run.out}")
    print(f"{plan.iterations} iterations of {run.args.batch_size} pictures, learning rate {plan.lr:g} after "
          f"{plan.warmup} of warm-up, {'cosine' if plan.cosine else f'a tenth at {plan.drops}'}; "
          f"ramp of noisy losses {plan.ramp}")
    if run.iteration < plan.iterations:  # else these options train nothing
        (run.out / "config.json").write_text(json.dumps(run.config() | {"plan": plan._asdict()}, indent=1))


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        if args.tensorboard:
            summary_writer()  # raises before anything is done; in all processes, so that none waits for another
        rank, world_size, device = start_distributed(args.device)
        annotations, validation = open_data(args, rank)
        batches = training_batches(args, annotations, rank, world_size)  # raises before anything is written
        run = Run(args, annotations.classes, rank, world_size, device)
        open_out(args, rank)
        if rank == 0:
            describe(run, annotations)
        stopped_by = 0
        if run.iteration < run.plan.iterations:
            with StopSignals() as signals:
                stopped_by = train(run, batches, validation, signals)
        else:
            if not (run.out / "final.pt").exists():  # a run that is to be shorter than it already is
                run.save()
            if rank == 0:
                print(f"{run.out} is complete: {run.iteration} iterations; evaluate.py --ckpt {run.out / 'final.pt'}")
        if dist.is_initialized():
            dist.destroy_process_group()
    except (DataError, CheckpointError, LogError, TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        for child in multiprocessing.active_children():
            child.kill()  # loading processes ignore SIGTERM: an exit that waits for them would wait for ever
    if stopped_by:
        if rank == 0:
            print(f"stopped at iteration {run.iteration}, saved: the same command goes on from there")
        sys.exit(128 + stopped_by)


if __name__ == "__main__":
    main()
