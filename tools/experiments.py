"""The comparisons of Tables 3 to 7 over several seeds, on drawn shapes or a data set with masks (EXPERIMENTS.md).

    python -m tools.experiments                              every row, seeds 1 2 3; continues where it was stopped
    python -m tools.experiments --seeds 4 5 6                the same with other seeds
    python -m tools.experiments --rows boxinst boxteacher    some rows
    python -m tools.experiments --table                      train nothing, print the table of the finished runs
    python -m tools.experiments --data food ...              another data set, of other sizes and lengths

A run is train.py with RECIPE and the options of RUNS, in OUT/seed<N>/<run>. It is evaluated twice, with the scores of
the detector and with scores rescored by the masks, so that rescoring is not mistaken for learning. Runs go side by
side, each on its share of the CPU cores. OUT/recipe.json holds their recipe, so that runs of different recipes do not
end up in one table.
"""
import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from formats.coco import CocoBoxes, datasets
from formats.files import CommandLine, UserError, one_line_errors, write_whole
from formats.shapes import write_shapes
from model import load_model, test_size
from tools.command_line import AMP, not_negative, positive
from tools.label import agreement, label_dataset, model_classes, model_masks

PROJECT = Path(__file__).resolve().parents[1]
RECIPE = ("--backbone r18-slim --backbone-weights none --channels 64 --batch-size 8 --optimizer adamw "
          "--lr-decay cosine --clip-grad 10 --ema 0.99 --workers 0 --log-every 50 --measure-labels").split()
FROM_START = "--lr 1e-3 --warmup 50 --ramp 1".split()  # the masks are good from the first step: no ramp
REFINED = "--colors on".split()
RUNS = {
    "start": "--method boxinst".split(),  # nearly every run starts from it, as from ImageNet elsewhere
    "condinst": "--method condinst".split(),
    "boxinst": "--method boxinst --average".split(),
    "self-training": "--method condinst".split(),  # from the masks of `boxinst` of the same seed
    "self-training-refined": "--method condinst".split(),  # from its refined masks, those of predict.py
    "boxteacher": [],
    "bce": "--pixel-loss bce --lambda-affinity 0".split(),
    "avg": "--pixel-loss avg --lambda-affinity 0".split(),
    "dice": "--pixel-loss dice --lambda-affinity 0".split(),
    "cls": "--score cls".split(),
    "iou": "--score iou".split(),
    "mean-entropy": "--score mean-entropy".split(),
    "weights-x4": "--lambda-pixel 2 --lambda-affinity 0.4".split(),
    "refined": REFINED,
    "refined-x1": [*REFINED, *"--lambda-pixel 0.125 --lambda-affinity 0.025".split()],  # the paper's weights
    "refined-scratch": REFINED,  # from random weights, as long as the start and a run from it together
}


class Row(NamedTuple):
    """A row of the table: which weights of which run it evaluates."""

    run: str
    weights: str  # teacher or student
    title: str


ROWS = {
    "start": Row("start", "student", "the start of all: BoxInst"),
    "condinst": Row("condinst", "student", "CondInst, from true masks"),
    "boxinst": Row("boxinst", "student", "BoxInst, from boxes alone"),
    "boxinst-ema": Row("boxinst", "teacher", "BoxInst, averaged weights (Table 7)"),
    "self-training": Row("self-training", "student", "CondInst, from BoxInst's masks (Table 6)"),
    "self-training-refined": Row("self-training-refined", "student", "CondInst, from BoxInst's masks, refined"),
    "bce": Row("bce", "teacher", "BoxTeacher, pixel loss bce, no affinity (Table 3)"),
    "avg": Row("avg", "teacher", "BoxTeacher, pixel loss avg, no affinity (Table 3)"),
    "dice": Row("dice", "teacher", "BoxTeacher, pixel loss dice, no affinity (Table 3)"),
    "cls": Row("cls", "teacher", "BoxTeacher, score cls (Table 5)"),
    "iou": Row("iou", "teacher", "BoxTeacher, score iou (Table 5)"),
    "mean-entropy": Row("mean-entropy", "teacher", "BoxTeacher, score mean-entropy (Table 5)"),
    "weights-x4": Row("weights-x4", "teacher", "BoxTeacher, weights 2.0 and 0.4 (Table 4)"),
    "boxteacher": Row("boxteacher", "teacher", "BoxTeacher: dice + affinity, mask-aware score"),
    "refined": Row("refined", "teacher", "BoxTeacher, refined masks"),
    "refined-x1": Row("refined-x1", "teacher", "BoxTeacher, refined masks with the paper's weights"),
    "refined-scratch": Row("refined-scratch", "teacher", "BoxTeacher, refined masks, from random weights"),
}


# ------------------------------------------------------------------------------------------------------- running


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Experiments:
    """The runs in a folder, and the programs that are training and evaluating them."""

    def __init__(self, args: argparse.Namespace):
        self.out, self.amp, self.eval_every = Path(args.out), args.amp, args.eval_every
        self.iters = {"start": args.start_iters, "refined-scratch": args.start_iters + args.iters}
        self.iters = {run: self.iters.get(run, args.iters) for run in RUNS}
        self.scratch = ["--lr", "2e-3", *(["--ramp", str(args.ramp)] if args.ramp else [])]
        self.sizes = ["--min-size", *args.min_size, "--max-size", args.max_size, "--teacher-min-size",
                      args.teacher_min_size, "--teacher-max-size", args.teacher_max_size]
        (self.train_json, self.train_images), (self.val_json, self.val_images) = datasets(args.data)
        self.environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores() // args.jobs))}
        self.stopped, self.running, self.lock = False, set(), threading.RLock()

    def python(self, folder: Path, program: str, *options) -> None:
        """Run a program of this project and append its output to folder/log.txt. Raises UserError if it fails."""
        command = [sys.executable, "-m", program, *map(str, options)]
        with self.lock:
            if self.stopped:
                raise UserError("stopped")
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "log.txt").open("a") as log:
                print("$", " ".join(command), file=log, flush=True)
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self.environment,
                                           cwd=PROJECT, start_new_session=True)  # Ctrl-C reaches it by `stop` only
            self.running.add(process)
        status = process.wait()
        self.running.discard(process)
        if status:
            raise UserError(f"{program} ended with status {status}; see {folder / 'log.txt'}")

    def stop(self, number: int, frame) -> None:
        """On SIGINT or SIGTERM: start no further program and terminate the running ones; train.py saves first."""
        with self.lock:
            self.stopped = True
        for process in list(self.running):
            process.terminate()

    def check_recipe(self) -> None:
        """Write OUT/recipe.json. Raises UserError if the runs that are there had another recipe."""
        recipe = {"amp": self.amp, "train": str(self.train_json), "recipe": RECIPE, "sizes": self.sizes,
                  "scratch": self.scratch, "from start": FROM_START,
                  "runs": {run: [*options, "--iters", str(self.iters[run])] for run, options in RUNS.items()}}
        path = self.out / "recipe.json"
        if path.exists():
            old = json.loads(path.read_text())
            changed = [key for key in recipe if key != "runs" and old.get(key) != recipe[key]]
            changed += [run for run, options in old["runs"].items() if recipe["runs"].get(run, options) != options]
            if changed:
                raise UserError(f"{self.out} holds runs that were made with another {changed[0]}; choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(recipe, indent=1))

    def folder(self, run: str, seed: int) -> Path:
        return self.out / f"seed{seed}" / run

    def complete(self, run: str, seed: int, needed: list[Future]) -> None:
        """When the `needed` runs are done, train a run to its end and evaluate its rows, unless that has been done."""
        for future in needed:
            future.result()
        folder, annotations = self.folder(run, seed), self.train_json
        labeller = ["--ckpt", self.folder("boxinst", seed) / "final.pt", "--weights", "student", "--workers", 0]
        if run == "self-training":
            annotations = folder / "labels.json"
            if not annotations.exists():
                self.python(folder, "tools.selftraining", "--train-json", self.train_json, "--train-images",
                            self.train_images, *labeller, "--out", annotations)
        if run == "self-training-refined":
            annotations = folder / "labels" / "masks.json"
            if not annotations.exists():
                self.python(folder, "predict", "--boxes", self.train_json, "--images", self.train_images, *labeller,
                            "--out", annotations.parent)
        validation = ["--val-json", self.val_json, "--val-images", self.val_images]
        if not (folder / "final.pt").exists():
            start = self.scratch if run in ("start", "refined-scratch") else [
                "--init", self.folder("start", seed) / "final.pt", *FROM_START]
            # with --train-json train.py evaluates only if --val-json is given too
            evaluation = [*validation, "--eval-every", self.eval_every] if self.eval_every else []
            self.python(folder, "train", "--train-json", annotations, "--train-images", self.train_images,
                        "--schedule", "1x", *evaluation, *RECIPE, *self.sizes, *start, *RUNS[run], "--iters",
                        self.iters[run], "--seed", seed, "--amp", self.amp, "--out", folder)
        for name, row in ROWS.items():
            for rescore in ("off", "on"):
                metrics = self.metrics(name, seed, rescore)
                if row.run == run and not metrics.exists():
                    self.python(folder, "evaluate", *validation, "--ckpt", folder / "final.pt", "--weights",
                                row.weights, "--rescore", rescore, "--metrics", metrics, "--batch-size", 8,
                                "--workers", 0)
            if row.run == run and not (folder / f"{name}-labels.json").exists():
                self.measure_labels(folder, name, row.weights)
        print(f"seed {seed}: {run} is complete", flush=True)

    def measure_labels(self, folder: Path, name: str, weights: str) -> None:
        """Write the mean IoU of the masks that a row gives to the held-out boxes, fused and refined (see label.py)."""
        annotations = CocoBoxes(self.val_json, self.val_images, masks=True)
        network, info = load_model(folder / "final.pt", weights)
        classes, size = model_classes(info["classes"], annotations.classes), test_size(info)
        iou = {}
        for kind, how in (("fused", {"fit_steps": 0, "colors": 0.0}), ("refined", {})):
            labels = label_dataset(network, annotations, partial(model_masks, classes=classes, **how),
                                   min_size=size[0], max_size=size[1], workers=0)
            iou[kind] = agreement(annotations, labels.rles)[0].mean()
        write_whole(folder / f"{name}-labels.json", json.dumps(iou).encode())

    def metrics(self, row: str, seed: int, rescore: str) -> Path:
        return self.folder(ROWS[row].run, seed) / f"{row}-rescore-{rescore}.json"

    def figures(self, row: str, seed: int, rescore: str) -> dict:
        return json.loads(self.metrics(row, seed, rescore).read_text())

    def gains(self, row: str, seeds: list[int]) -> list[float]:
        """Mask AP over BoxInst's of the same seed; [] if a seed lacks one of the two."""
        if not all(self.metrics(one, seed, "off").exists() for one in (row, "boxinst") for seed in seeds):
            return []
        return [self.figures(row, seed, "off")["segm"]["AP"] - self.figures("boxinst", seed, "off")["segm"]["AP"]
                for seed in seeds]

    def all(self, rows: list[str], seeds: list[int], jobs: int) -> None:
        """Do all runs, `jobs` at a time. If some fail the others continue, then the first error is raised."""
        needs = {run: ["start"] for run in RUNS} | {"start": [], "refined-scratch": [], "self-training": ["boxinst"],
                                                    "self-training-refined": ["boxinst"]}
        wanted = {ROWS[row].run for row in rows} | {"start"}
        wanted |= {other for run in wanted for other in needs[run]}
        futures = {}
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        with ThreadPoolExecutor(jobs) as pool:
            for run in RUNS:  # a run comes after those that it needs: no deadlock
                for seed in seeds:
                    if run in wanted:
                        needed = [futures[other, seed] for other in needs[run]]
                        futures[run, seed] = pool.submit(self.complete, run, seed, needed)
        for number, handler in before.items():
            signal.signal(number, handler)
        if self.stopped:
            raise UserError("stopped: the same command continues from there")
        for future in futures.values():
            future.result()


# ----------------------------------------------------------------------------------------------------- the table


def table(experiments: Experiments, rows: list[str], seeds: list[int]) -> str:
    """A Markdown table with a line for each row that has results: mean and standard deviation over the seeds.

    "over BoxInst" is the difference of mask AP within a seed, where both runs started from the same weights; "share" is
    its part of CondInst's, of the means. "held-out boxes" is the mean IoU of the masks that they get in the end, as the
    heads draw them and refined. "label IoU" and "student IoU" are of the training boxes in the last logged iterations:
    of the teacher's masks, and of the student's masks for the boxes that got one (without a teacher, for all boxes).
    """
    columns = ("seeds", "mask AP", "over BoxInst", "share", "AP50", "AP75", "mask AP, rescored", "box AP", "label IoU",
               "student IoU", "held-out boxes, fused", "refined")
    lines = ["| | " + " | ".join(columns) + " |", "|" + " --- |" * (1 + len(columns))]
    for row in rows:
        found = [seed for seed in seeds if experiments.metrics(row, seed, "on").exists()]
        if not found:
            continue
        plain, rescored = ([experiments.figures(row, seed, r) for seed in found] for r in ("off", "on"))
        last = [last_line(experiments.folder(ROWS[row].run, seed) / "metrics.jsonl") for seed in found]
        over = experiments.gains(row, found) if row not in ("start", "boxinst") else []
        bound = experiments.gains("condinst", found) if over and row != "condinst" else []
        cells = [[m["segm"][figure] for m in plain] for figure in ("AP", "AP50", "AP75")]
        gap = statistics.mean(bound) if bound else 0
        cells[1:1] = over, [100 * statistics.mean(over) / gap] if gap > 0 else []
        cells += [[m["segm"]["AP"] for m in rescored], [m["bbox"]["AP"] for m in plain]]
        cells += [[100 * line[name] for line in last if line.get(name) is not None]
                  for name in ("label_iou", "student_iou")]
        labels = [experiments.folder(ROWS[row].run, seed) / f"{row}-labels.json" for seed in found]
        cells += [[100 * json.loads(path.read_text())[kind] for path in labels if path.exists()]
                  for kind in ("fused", "refined")]
        lines.append(f"| {ROWS[row].title} | {len(found)} | " + " | ".join(map(spread, cells)) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation of a sample, as text."""
    if not values:
        return "–"
    text = f"{statistics.mean(values):.1f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.1f}"


def last_line(path: Path) -> dict:
    """The last line of a run's metrics.jsonl with losses."""
    lines = map(json.loads, path.read_text().splitlines())
    return [line for line in lines if "eval" not in line][-1]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(description="Train and compare the methods and ablations of the paper.",
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="of " + ", ".join(ROWS))
    add("--seeds", nargs="+", type=not_negative, default=[1, 2, 3], metavar="N",
        help="of weights, order and augmentation")
    add("--table", action="store_true", help="train nothing, print the table of the finished runs")
    add("--out", default="runs/experiments", metavar="DIR", help="folder of the runs")
    add("--data", default="shapes", help="shapes (under datasets/, drawn if missing), or a folder in COCO layout, with "
        "masks")
    add("--min-size", type=positive, nargs="+", default=[128], metavar="PIXELS", help="as in train.py")
    add("--max-size", type=positive, default=128, metavar="PIXELS", help="as in train.py")
    add("--teacher-min-size", type=positive, default=160, metavar="PIXELS", help="as in train.py, and of tests")
    add("--teacher-max-size", type=positive, default=160, metavar="PIXELS", help="as in train.py, and of tests")
    add("--start-iters", type=positive, default=2000, metavar="N", help="iterations of the start")
    add("--iters", type=positive, default=600, metavar="N", help="iterations of a run from it")
    add("--ramp", type=positive, metavar="N", help="that of train.py in runs from random weights; None: its default")
    add("--eval-every", type=positive, metavar="N", help="iterations between evaluations within a run, for curves of "
        "AP (rescored for boxteacher, of the averaged weights for boxinst); None: no such evaluations")
    add("--jobs", type=positive, default=cores(), help="runs side by side; take few if they share a GPU")
    add("--amp", **AMP | {"default": "off"})
    args = parser.parse_args(argv)
    args.rows, args.seeds = list(dict.fromkeys(args.rows)), list(dict.fromkeys(args.seeds))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with one_line_errors():
        experiments = Experiments(args)
        torch.set_num_threads(int(experiments.environment["OMP_NUM_THREADS"]))  # labels are measured in this process
        if not args.table:
            if args.data == "shapes" and not Path(experiments.train_json).exists():
                write_shapes(Path(experiments.train_json).parents[1])
            experiments.check_recipe()
        try:
            if not args.table:
                experiments.all(args.rows, args.seeds, args.jobs)
        finally:  # the table shows the other runs if one fails
            print(table(experiments, args.rows, args.seeds))


if __name__ == "__main__":
    main()
