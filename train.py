"""Train BoxTeacher from boxes alone (paper Sec. 3), or its two bounds: BoxInst and CondInst.

    python train.py --data food --method boxinst --backbone r18-slim --backbone-weights none ...  (see `make demo`)
    torchrun --nproc_per_node=8 train.py --backbone r50 --schedule 3x --augment strong            COCO, one machine
    torchrun --nnodes=2 --node_rank=N --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...

One iteration is the losses of a batch (boxteacher.py), a step of the optimiser and the EMA of the teacher.

Everything that changes during a run (images, learning rate, EMA momentum, ramps) is a function of the iteration. So a
run that was stopped or killed continues from its last checkpoint as if nothing had happened, on any number of
processes.
"""
import argparse
import contextlib
import itertools
import json
import platform
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import teacher
from boxteacher import Step, boxteacher_losses, condinst_losses, total_loss
from data import Batch, TrainBatches
from evaluate import coco_metrics, evaluate, print_tables
from formats import checkpoint
from formats.checkpoint import CheckpointError
from formats.coco import CocoBoxes
from formats.files import UserError, counted, one_line_errors, warn, write_whole
from model import CondInst, build_model, rescores
from recipe import RECIPES, choose, learning_rate, make_plan, parse_arguments, ramp_factor
from tools.batches import check_skipped, loaded_batches, open_data, training_batches
from tools.command_line import next_command, pick_amp
from tools.log import Log, draw_sheet, evaluated_at, summary_writer
from tools.processes import (StopSignals, agreed, ending_loaders, gathered, ignore_signals, joined,
                             lasting_output, read_by_first, same_command, same_data, same_everywhere,
                             start_distributed, together)
from tools.quality import measure
from tools.run_folder import RunFolder
from tools.start import OF_A_MACHINE, Start, config_of, initialise, load_backbone, start_backbone, starting_point


class TrainingError(UserError):
    """The run cannot go on; the message is one line for a person."""


# ------------------------------------------------------------------------------------------------ one iteration


class StepResult(NamedTuple):
    losses: dict[str, Tensor]   # means over the micro-steps, "loss" the total
    counts: dict[str, Tensor]   # sums over the micro-steps
    norm: Tensor                # of the gradient, before clipping
    finite: bool                # loss and gradient, on all processes; otherwise nothing was updated
    broken: bool                # not finite, and not a gradient that a lower fp16 scale may cure
    stop: bool                  # some process received a signal to stop


def train_step(run: "Run", batches: list[Batch], iteration: int, stop_asked: bool) -> StepResult:
    """One optimiser step over the micro-batches, then the EMA of the teacher.

    All processes skip both if the loss or the gradient of any of them is not finite.
    """
    args, plan = run.args, run.plan
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(iteration, plan)
    losses, counts = {}, {}
    statistics = [x.clone() for x in run.statistics]  # a forward pass changes them before its loss is known
    for number, batch in enumerate(batches, 1):
        if isinstance(run.student, DistributedDataParallel):
            run.student.require_backward_grad_sync = number == len(batches)  # gradients meet once a step
        step = run.losses(batch)
        loss = total_loss(step.losses, ramp_factor(iteration, plan), step.refined)
        run.scaler.scale(loss / len(batches)).backward()
        for name, value in (step.losses | {"loss": loss}).items():
            losses[name] = losses.get(name, 0) + value.detach() / len(batches)
        for name, value in measure(step, batch).items():
            counts[name] = counts.get(name, 0) + value

    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in run.parameters])
    if args.clip_grad:
        nn.utils.clip_grads_with_norm_(run.parameters, args.clip_grad, norm)
    loss_finite, norm_finite, go_on = agreed(losses["loss"].isfinite(), norm.isfinite(), not stop_asked,
                                             device=run.device)
    finite = loss_finite and norm_finite
    if finite:
        run.scaler.step(run.optimizer)
        if run.teacher is not None:
            teacher.update(run.teacher, run.model, teacher.ema_momentum(iteration + 1, args.ema),
                           statistics=args.method != "boxteacher")
    else:
        for now, before in zip(run.statistics, statistics):
            now.copy_(before)
    # fp16: a gradient may overflow although the loss is finite, and the scaler then halves its scale. At a scale of 1
    # or below that counts as broken; without fp16 get_scale() is 1.
    broken = not loss_finite or not norm_finite and run.scaler.get_scale() <= 1
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return StepResult(losses, counts, norm, finite, broken, not go_on)


# ------------------------------------------------------------------------------------------------------ the run


class Run:
    """The state of a run: models, optimiser, iteration. start: where its weights come from."""

    def __init__(self, args: argparse.Namespace, classes: list[dict], start: Start, rank: int, world_size: int,
                 device: torch.device):
        self.args, self.classes = args, classes
        self.out, self.iteration, self.saved = Path(args.out), 0, False
        self.rank, self.world_size, self.device = rank, world_size, device
        self.plan = make_plan(args.batch_size, args.optimizer, args.schedule, args.iters, args.lr, args.lr_decay,
                              args.warmup, args.ramp)
        self.amp_dtype = pick_amp(args.amp, device)
        self.spec = {"backbone": args.backbone, "num_classes": len(self.classes), "channels": args.channels,
                     "frozen": args.backbone_weights != "none"}
        self.spec |= start.conventions()

        torch.manual_seed(args.seed)
        self.model = build_model(**self.spec)
        if start.init is not None:
            initialise(self.model, self.classes, start.init, args.init)
            if rank == 0:
                print(f"starts from {args.init} (method {start.init['method']})")
        elif start.backbone is not None:
            start_backbone(self.model.backbone, start.backbone, args.backbone, args.backbone_weights)
        self.model.amp_dtype = self.amp_dtype
        self.model.to(device).train()
        averaged = args.method == "boxteacher" or args.average
        self.teacher = teacher.make_teacher(self.model) if averaged else None
        self.statistics = [x for model in (self.model, self.teacher) if model for module in model.modules()
                           if isinstance(module, nn.BatchNorm2d) for x in module.buffers()]

        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.decay = args.weight_decay if args.weight_decay is not None else RECIPES[args.optimizer][1]
        if args.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.parameters, self.plan.lr, momentum=0.9, weight_decay=self.decay)
        else:
            self.optimizer = torch.optim.AdamW(self.parameters, self.plan.lr, weight_decay=self.decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        if start.state is not None:
            with checkpoint.fitting(f"{self.out} holds a run that cannot go on"):
                self.resume(start.state)
        for network in (self.model, self.teacher) if args.compile else ():
            if network is not None:
                network.compile_convolutions()
        self.student = self.model

    def losses(self, batch: Batch) -> Step:
        """The losses of --method; boxinst is boxteacher without a teacher."""
        args = self.args
        if args.method == "condinst":
            return condinst_losses(self.student, batch)
        return boxteacher_losses(self.student, self.teacher if args.method == "boxteacher" else None, batch, args.score,
                                 args.pixel_loss, args.lambda_pixel, args.lambda_affinity, args.fit_steps,
                                 args.colors == "on")

    def evaluated(self) -> CondInst:
        """The network that is evaluated: the average of the weights if there is one."""
        return self.teacher or self.model

    def resume(self, state: dict) -> None:
        """Continue from a checkpoint of the same model. Other options may differ; the changes are printed."""
        old = {"colors": "off", "fit_steps": 0} | state["config"]  # earlier versions had the paper's pseudo masks alone
        for key, old_value, new_value in (
                ("model", state["model"], self.spec), ("classes", state["classes"], self.classes),
                ("method", state["method"], self.args.method), ("optimizer", old["optimizer"], self.args.optimizer),
                ("--average", state["teacher"] is not None, self.teacher is not None)):
            if old_value != new_value:
                if key == "classes":
                    old_value, new_value = ([c["name"] for c in classes] for classes in (old_value, new_value))
                raise CheckpointError(f"{self.out} holds a run with {'other' if key == 'classes' else 'another'} {key} "
                                      f"({str(old_value)[:120]}, now {str(new_value)[:120]}); choose another --out, or "
                                      "--fresh to move it aside")
        changed = [f"{k} {old.get(k)} -> {v}" for k, v in config_of(self.args).items()
                   if old.get(k, v) != v and k not in ("fresh", "init", "backbone_weights")]
        self.model.load_state_dict(state["student"])
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])
        for group in state["optimizer"]["param_groups"]:  # older checkpoints are of fused optimisers
            group |= {"weight_decay": self.decay, "fused": None, "foreach": None}
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty if the run had no fp16 so far
            self.scaler.load_state_dict(state["scaler"])
        self.iteration = state["iteration"]
        if self.rank == 0:
            print(f"resumed {self.out} at iteration {self.iteration}")
            if changed:
                print("changed since: " + ", ".join(changed))
            for option, value in (("--init", self.args.init), ("--backbone-weights", self.args.backbone_weights)):
                if value != old[option[2:].replace("-", "_")]:
                    print(f"{option} {value} is not used: the run continues with its own weights; --fresh starts anew")

    def save(self) -> None:
        """Write last.pt, and final.pt at the end. Only the first process writes; all have the same state.

        Where it cannot, all processes raise UserError, and the last good checkpoint stays.
        """
        with together("process 0 to write a checkpoint"):
            if self.rank > 0:
                return
            state = {"model": self.spec, "classes": self.classes, "method": self.args.method,
                     "config": config_of(self.args), "iteration": self.iteration, "torch": str(torch.__version__),
                     "student": self.model.state_dict(),
                     "teacher": None if self.teacher is None else self.teacher.state_dict()}
            if self.iteration >= self.plan.iterations:  # before last.pt: a complete run has a final.pt
                checkpoint.save(state, self.out / "final.pt")
            checkpoint.save(state | {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()},
                            self.out / "last.pt", self.out / "previous.pt", own=self.saved)
            self.saved = True


def make_run(args: argparse.Namespace, annotations: CocoBoxes, rank: int, world_size: int,
             device: torch.device) -> tuple[Run, list[str]]:
    """A run, from its checkpoint if there is one, and what was chosen for it, in words for a person; fills in `args`.

    What is wrong on one process is raised on all, also where their options differ.
    """
    start = read_by_first(lambda: starting_point(args), "process 0 to read a checkpoint")
    with together("all processes to choose their options"):
        choices = choose(args, annotations, start.model(), start.config())
    same_everywhere({name: value for name, value in config_of(args).items() if name not in OF_A_MACHINE})
    if start == Start() and args.backbone_weights != "none":
        start = read_by_first(lambda: load_backbone(args.backbone, args.backbone_weights),
                              "process 0 to read the weights of the backbone")
    with together("all processes to make their networks"):
        run = Run(args, annotations.classes, start, rank, world_size, device)
    run.student = joined(run.model, device)
    return run, choices


def evaluate_and_draw(run: Run, log: Log, annotations: CocoBoxes, validation: CocoBoxes | None) -> None:
    """Draw masks on training images and evaluate, uncompiled: these images are not padded to few sizes. Training goes
    on, whatever fails."""
    args, teacher_size = run.args, (run.args.teacher_min_size, run.args.teacher_max_size)
    with torch.compiler.set_stance("force_eager") if args.compile else contextlib.nullcontext():
        if run.rank == 0:
            draw_sheet(run.out / f"labels-{run.iteration:07}.png", f"their masks at iteration {run.iteration}",
                       run.evaluated(), annotations, score=args.score, min_sizes=args.min_size,
                       max_size=args.max_size, teacher_size=teacher_size, fit_steps=args.fit_steps,
                       colors=args.colors == "on")
        try:
            if validation is not None:
                results = evaluate(run.evaluated(), validation, min_size=teacher_size[0], max_size=teacher_size[1],
                                   rescore=rescores(args.method), workers=args.workers, device=run.device,
                                   worker_init_fn=ignore_signals)
                if run.rank == 0:
                    metrics = coco_metrics(validation.json_path, results)
                    log.evaluation(run.iteration, metrics)
                    print_tables(metrics)
        except Exception as error:  # of any kind: a broken image, out of memory
            warn(f"no evaluation at iteration {run.iteration}: {checkpoint.first_line(error)}")
    gathered(None, "process 0 to compute AP")
    log.reset()  # this time is not that of an iteration


def report_nonfinite(run: Run, batches: list[Batch], result: StepResult) -> None:
    """Write the images and losses of each process to nonfinite.json; raise TrainingError. The last checkpoint stays."""
    own = {"rank": run.rank, "image_ids": [i for batch in batches for i in batch.image_ids],
           "gradient_norm": str(float(result.norm)),
           "losses": {name: str(float(value)) for name, value in result.losses.items()}}  # JSON has no NaN
    everyone = gathered(own, "all processes to say what was not finite")
    path = run.out / "nonfinite.json"
    if run.rank == 0:
        write_whole(path, json.dumps({"iter": run.iteration, "lr": learning_rate(run.iteration, run.plan),
                                      "processes": everyone}, indent=1).encode())
    raise TrainingError(f"loss or gradient not finite three times in a row at iteration {run.iteration}: image ids and "
                        f"losses are in {path}; a smaller --lr, a longer --warmup or --clip-grad 10 usually help")


def save(run: Run, log: Log) -> None:
    """Save the run, after its log: the iterations of a checkpoint are not logged again."""
    log.sync()
    run.save()


def load_step(run: Run, log: Log, micro_batches: Iterator[Batch], broken: set[str], images: int) -> list[Batch]:
    """The micro-batches of a step. Where a process cannot load them, the run is saved and the error raised on all."""
    problem = None
    try:
        micro = [batch.to(run.device) for batch in itertools.islice(micro_batches, run.args.accumulate)]
        check_skipped(micro, broken, images)
    except (UserError, OSError) as error:
        problem = error
    (all_have_them,) = agreed(problem is None, device=run.device)
    if not all_have_them:
        save(run, log)
        with together("the images of a step"):
            if problem is not None:
                raise problem
    return micro


def train(run: Run, batches: TrainBatches, validation: CocoBoxes | None, signals: StopSignals, evaluating: bool) -> int:
    """Train from run.iteration to the end, after an evaluation if one is missing: `evaluating`. Returns the signal that
    stopped the loop, or 0."""
    args, plan, k = run.args, run.plan, run.args.accumulate
    undecodable, broken_in_a_row = set(), 0
    with together("process 0 to open the log"):
        log = Log(run.out, plan.iterations, run.iteration, run.rank, run.world_size, args.tensorboard)
    if evaluating:
        evaluate_and_draw(run, log, batches.annotations, validation)
    micro_batches = loaded_batches(batches, run.iteration * k, plan.iterations * k, args.workers, run.device)
    while run.iteration < plan.iterations:
        start = time.perf_counter()
        micro = load_step(run, log, micro_batches, undecodable, len(batches.annotations))
        waited = time.perf_counter() - start

        result = train_step(run, micro, run.iteration, bool(signals.asked))
        broken_in_a_row = broken_in_a_row + 1 if result.broken else 0
        if broken_in_a_row == 3:
            report_nonfinite(run, micro, result)
        log.step(result.losses, result.counts, result.finite, waited)
        run.iteration += 1
        pause = run.iteration == plan.iterations or run.iteration % args.eval_every == 0  # to evaluate
        logging = pause or run.iteration % args.log_every == 0
        saving = pause or run.iteration % args.checkpoint_every == 0
        if logging or result.stop:
            log.write(run.iteration, learning_rate(run.iteration - 1, plan), ramp_factor(run.iteration - 1, plan))
        if saving or result.stop:
            save(run, log)
        if result.stop:
            return signals.asked or signal.SIGTERM
        if pause:
            evaluate_and_draw(run, log, batches.annotations, validation)
    return 0


# ------------------------------------------------------------------------------------------------- the program


def describe(run: Run, annotations: CocoBoxes, choices: list[str]) -> None:
    """Print the first lines of a run and write config.json."""
    plan, gpu = run.plan, torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
    print(f"python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
          f"{run.world_size} x {gpu}, autocast {run.amp_dtype or 'off'}")
    print(f"{run.args.method}, {run.args.backbone}: {counted(len(annotations), 'image')}, "
          f"{counted(len(annotations.boxes), 'box')}, {counted(len(run.classes), 'class')} -> {run.out}", *choices,
          sep="\n")
    print(f"{plan.iterations} iterations of {run.args.batch_size} images, learning rate {plan.lr:g} after "
          f"{plan.warmup} of warm-up, {'cosine' if plan.cosine else f'a tenth at {plan.drops}'}; "
          f"ramp of the noisy losses {plan.ramp}")
    if run.iteration < plan.iterations:  # otherwise these options train nothing
        config = config_of(run.args) | {"plan": plan._asdict()}
        write_whole(run.out / "config.json", json.dumps(config, indent=1).encode())


def left_out(run: Run, validation: CocoBoxes | None) -> tuple[bool, bool]:
    """What the run lacks up to the iteration that it goes on from, because it was killed: whether the evaluation, and
    whether final.pt, also because --iters is now below that iteration."""
    complete = run.iteration >= run.plan.iterations
    due = run.iteration > 0 and (run.iteration == run.plan.iterations or run.iteration % run.args.eval_every == 0)
    return read_by_first(lambda: (due and validation is not None and not evaluated_at(run.out, run.iteration),
                                  complete and not (run.out / "final.pt").exists()), "process 0 to look at the run")


def main(argv: list[str] | None = None) -> None:
    args, stopped_by = parse_arguments(argv), 0
    with lasting_output(), ending_loaders(), one_line_errors():
        if args.tensorboard:
            summary_writer()  # raises before anything is done, on all processes alike
        rank, world_size, device = start_distributed(args.device)
        with StopSignals() as signals:  # to the end: torchrun forwards a signal when the run may have been saved
            with RunFolder(args.out, args.fresh, rank) as folder:
                with together("all processes to read the annotations"):
                    annotations, validation = open_data(args, rank)
                same_data(annotations, validation)
                run, choices = make_run(args, annotations, rank, world_size, device)
                with together("all processes to prepare their batches"):
                    batches = training_batches(args, annotations, rank, world_size)  # before anything is written
                with together("process 0 to prepare the folder of the run"):
                    if rank == 0:
                        folder.begin()
                        describe(run, annotations, choices)
                evaluating, saving = left_out(run, validation)
                if saving:
                    run.save()
                if evaluating or run.iteration < run.plan.iterations:
                    stopped_by = train(run, batches, validation, signals, evaluating)
                if dist.is_initialized():
                    dist.destroy_process_group()
            if rank == 0 and not stopped_by:
                print(f"{run.out} is complete: {run.iteration} iterations; "
                      f"{next_command(args, annotations, validation)}")
            if rank == 0 and stopped_by:
                print(f"stopped at iteration {run.iteration}, saved; to go on: {same_command(argv or sys.argv[1:])}")
            if stopped_by:
                sys.exit(128 + stopped_by)


if __name__ == "__main__":
    main()
