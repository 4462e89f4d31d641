"""tools/experiments.py: all of its runs at the smallest size, resuming, the table, and the options of every row."""
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import same
from tools import experiments
import train
from formats.checkpoint import load
from formats.files import UserError
from tools import processes
from tools.experiments import FROM_START, RECIPE, ROWS, RUNS, Experiments, parse_arguments, spread, table

SMALL = ("--backbone r18-slim --channels 32 --backbone-weights none --workers 0 --device cpu --batch-size 4 "
         "--log-every 1 --measure-labels").split()
SHORT = ("--min-size 64 --max-size 64 --teacher-min-size 64 --teacher-max-size 64 --start-iters 1 "
         "--iters 2").split()


@pytest.mark.parametrize("options, sizes, iters", [
    ("", ([128], 128, 160, 160), {"start": 2000, "refined-scratch": 2600, "": 600}),
    ("--min-size 160 192 --max-size 256 --teacher-min-size 192 --teacher-max-size 257 --start-iters 900 --iters 450",
     ([160, 192], 256, 192, 257), {"start": 900, "refined-scratch": 1350, "": 450})])
@pytest.mark.parametrize("run", RUNS)
def test_train_py_accepts_the_options_of_every_run(run, options, sizes, iters):
    given = Experiments(parse_arguments(["--data", "food", *options.split()]))
    length = ["--iters", str(given.iters[run])]
    args = train.parse_arguments([*RECIPE, *map(str, given.sizes), *FROM_START, *RUNS[run], *length])
    assert args.measure_labels
    assert (args.min_size, args.max_size, args.teacher_min_size, args.teacher_max_size) == sizes
    assert args.iters == iters.get(run, iters[""])


def test_rows_name_existing_runs_and_weights():
    for row in ROWS.values():
        args = train.parse_arguments([*RECIPE, *RUNS[row.run]])
        assert row.weights == "student" or args.method == "boxteacher" or args.average
    assert {row.run for row in ROWS.values()} == set(RUNS)
    ours = train.parse_arguments(RECIPE)
    assert RUNS["boxteacher"] == [] and ours.method == "boxteacher"
    assert (ours.lambda_pixel, ours.lambda_affinity, ours.score) == (0.5, 0.1, "mask-aware")  # the paper's
    assert (ours.fit_steps, ours.colors) == (0, "off")


@pytest.fixture
def small(drawn, warm, tmp_path, monkeypatch):
    """The experiments at the smallest size, with the programs called in this process. Returns options and calls."""
    calls = []

    def python(self, folder, script, *options):
        folder.mkdir(parents=True, exist_ok=True)
        calls.append((script, folder.name))
        module = importlib.import_module(script)
        module.main([str(option) for option in options])

    class NoSignals(train.StopSignals):  # only the main thread may set handlers, and runs have threads
        def __enter__(self):
            self.asked = 0
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(train, "StopSignals", NoSignals)
    # nor must train.main end what other tests' loaders have left, of which torch would tell this main thread
    monkeypatch.setattr(processes.multiprocessing, "active_children", list)
    monkeypatch.setattr(Experiments, "python", python)
    monkeypatch.setattr(experiments, "RECIPE", SMALL)
    monkeypatch.setitem(RUNS, "start", f"--method boxinst --init {warm}".split())
    monkeypatch.setattr(experiments, "FROM_START", "--lr 1e-3".split())
    return ["--data", str(drawn), "--out", str(tmp_path / "runs"), "--jobs", "1", "--amp", "off", *SHORT], calls


def test_runs_evaluates_and_tabulates_and_does_nothing_twice(small, tmp_path, capsys):
    options, calls = small
    chosen = ["--rows", "self-training", "boxinst-ema", "boxinst", "boxteacher", "refined", "--seeds", "3"]
    experiments.main([*options, *chosen])
    out, folder = capsys.readouterr().out, tmp_path / "runs/seed3"
    trained = [name for script, name in calls if script == "train"]
    assert trained == ["start", "boxinst", "self-training", "boxteacher", "refined"]
    assert calls.count(("tools.selftraining", "self-training")) == 1
    assert [name for script, name in calls if script == "evaluate"] == (
        ["start"] * 2 + ["boxinst"] * 4 + ["self-training"] * 2 + ["boxteacher"] * 2 + ["refined"] * 2)
    labels = json.loads((folder / "self-training/labels.json").read_text())
    assert any(row["score"] > 0 for row in labels["annotations"])  # what BoxInst found, not the true masks

    # every run begins where `start` ended; BoxInst is one run seen twice
    final = {name: load(folder / name / "final.pt") for name in ("start", "boxinst", "boxteacher", "refined")}
    assert all(load(folder / name / "final.pt")["config"]["init"] == str(folder / "start/final.pt")
               for name in ("boxinst", "self-training", "boxteacher", "refined"))
    assert final["refined"]["config"]["colors"] == "on"
    assert final["boxinst"]["teacher"] is not None and not same(final["boxinst"]["student"], final["start"]["student"])

    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 5
    assert lines[2].startswith(f"| {ROWS['self-training'].title} | 1 | ")  # in the order of --rows
    cells = [cell.strip() for cell in lines[-2].strip("|").split("|")]
    plain = json.loads((folder / "boxteacher/boxteacher-rescore-off.json").read_text())
    rescored = json.loads((folder / "boxteacher/boxteacher-rescore-on.json").read_text())
    last = json.loads((folder / "boxteacher/metrics.jsonl").read_text().splitlines()[-1])
    boxinst = json.loads((folder / "boxinst/boxinst-rescore-off.json").read_text())["segm"]["AP"]
    kept = json.loads((folder / "boxteacher/boxteacher-labels.json").read_text())
    assert kept["refined"] != kept["fused"] and 0 < kept["fused"] < 1
    assert cells[2:] == [f"{x:.1f}" for x in (plain["segm"]["AP"], plain["segm"]["AP"] - boxinst)] + ["–"] + [
        f"{x:.1f}" for x in (
            plain["segm"]["AP50"], plain["segm"]["AP75"], rescored["segm"]["AP"], plain["bbox"]["AP"],
            100 * last["label_iou"], 100 * last["student_iou"], 100 * kept["fused"], 100 * kept["refined"])]

    calls.clear()
    (folder / "boxteacher/boxteacher-rescore-on.json").unlink()
    (folder / "boxinst/final.pt").unlink()  # as if it had been stopped: train.py goes on from last.pt
    experiments.main([*options, *chosen])
    assert calls == [("train", "boxinst"), ("evaluate", "boxteacher")]
    assert same(load(folder / "boxinst/final.pt")["teacher"], final["boxinst"]["teacher"])
    calls.clear()
    experiments.main([*options, "--rows", "start", "--seeds", "4", "--eval-every", "1"])
    log = [json.loads(line) for line in (tmp_path / "runs/seed4/start/metrics.jsonl").read_text().splitlines()]
    assert "eval" in log[-1] and "loss" in log[0]
    calls.clear()
    experiments.main([*options, "--table", "--rows", "boxinst", "bce", "--seeds", "0"])
    assert not calls and "BoxInst" not in capsys.readouterr().out.splitlines()[-1]  # this seed has none


def test_a_failing_run_is_one_line_and_the_others_continue(small, tmp_path, monkeypatch, capsys):
    options, _ = small
    done = []

    def complete(self, run, seed, needed):
        for future in needed:
            future.result()
        if run == "condinst":
            raise UserError("train.py ended with status 1; see log.txt")
        done.append((run, seed))

    monkeypatch.setattr(Experiments, "complete", complete)
    with pytest.raises(SystemExit) as end:
        experiments.main([*options, "--rows", "condinst", "boxteacher", "self-training", "--seeds", "0", "1"])
    shown = capsys.readouterr()
    assert end.value.code == 1 and shown.err == "error: train.py ended with status 1; see log.txt\n"
    assert shown.out.startswith("| | seeds |")  # of what there is
    assert sorted(done) == sorted((run, seed) for run in ("start", "boxinst", "boxteacher", "self-training")
                                  for seed in (0, 1))


CODE = """
import subprocess, sys
from tools import experiments
popen = subprocess.Popen
def sleeper(command, **how):
    return popen([sys.executable, "-c", "import sys, time; print(1); sys.stdout.flush(); time.sleep(600)"], **how)
subprocess.Popen = sleeper
experiments.main(sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_programs_and_starts_no_more(drawn, tmp_path, number):
    """A program that never ends by itself stands in for train.py, which saves when it is terminated."""
    process = subprocess.Popen([sys.executable, "-c", CODE, "--data", str(drawn), "--out", str(tmp_path / "runs"),
                                "--jobs", "1", "--rows", "boxteacher", "--seeds", "0", "1"], start_new_session=True,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(Path(experiments.__file__).parents[1])})
    try:
        log, until = tmp_path / "runs/seed0/start/log.txt", time.monotonic() + 60
        while not (log.exists() and log.read_text().endswith("\n1\n")):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and out.startswith("| | seeds |")
    assert err == "error: stopped: the same command continues from there\n"
    assert not (tmp_path / "runs/seed1").exists()


def test_runs_of_different_recipes_are_not_mixed(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Experiments, "all", lambda *_: None)
    options = ["--data", str(drawn), "--out", str(tmp_path)]
    for more in ([], ["--seeds", "5"], ["--rows", "bce"], ["--jobs", "3"]):
        experiments.main([*options, *more])
    monkeypatch.setitem(RUNS, "new", ["--score", "iou"])  # a further row does not change the recipe
    experiments.main(options)
    capsys.readouterr()
    for change, name in ((lambda: options.extend(["--amp", "bf16"]), "amp"),
                         (lambda: monkeypatch.setitem(RUNS, "new", []), "new")):
        change()
        with pytest.raises(SystemExit):
            experiments.main(options)
        message = capsys.readouterr().err
        assert f"made with another {name}; choose another --out" in message and message.count("\n") == 1
        del options[4:]


@pytest.mark.parametrize("rows, seeds, share", [
    ({"boxinst": [40, 42], "condinst": [50, 50], "refined": [46, 46]}, [1, 2], "55.6"),  # 5 of 9, of the means
    ({"boxinst": [40], "condinst": [40], "refined": [46]}, [1], "–"),  # no gap
    ({"boxinst": [40], "refined": [46]}, [1], "–"), ({"condinst": [50], "refined": [46]}, [1], "–")])
def test_the_share_of_the_gap_is_that_of_the_means(tmp_path, monkeypatch, rows, seeds, share):
    runs = Experiments(parse_arguments(["--data", "food", "--out", str(tmp_path)]))
    for row, values in rows.items():
        for seed, ap in zip(seeds, values):
            folder = runs.folder(ROWS[row].run, seed)
            folder.mkdir(parents=True, exist_ok=True)
            figures = {"segm": {"AP": ap, "AP50": 0, "AP75": 0}, "bbox": {"AP": 0}}
            for rescore in ("off", "on"):
                runs.metrics(row, seed, rescore).write_text(json.dumps(figures))
            (folder / f"{row}-labels.json").write_text('{"fused": 0.5, "refined": 0.75}')
            (folder / "metrics.jsonl").write_text('{"iter": 1, "loss": 1}\n')
    line = table(runs, ["refined"], seeds).splitlines()[-1].split(" | ")
    assert line[4] == share and line[-2].startswith("50.0") and line[-1].startswith("75.0")


def test_self_training_learns_from_refined_masks_where_it_says_so(small, tmp_path):
    options, calls = small
    experiments.main([*options, "--rows", "self-training-refined", "--seeds", "1"])
    assert ("predict", "self-training-refined") in calls and ("train", "boxinst") in calls
    content = json.loads((tmp_path / "runs/seed1/self-training-refined/labels/masks.json").read_text())
    assert {row["source"] for row in content["annotations"]} == {"model"}
    config = load(tmp_path / "runs/seed1/self-training-refined/final.pt")["config"]
    assert config["train_json"].endswith("labels/masks.json") and config["method"] == "condinst"


@pytest.mark.parametrize("options", ["--max-size 0", "--iters 0", "--jobs 0", "--seeds -1", "--eval-every 0",
                                     "--rows all", "--amp on"])
def test_wrong_values_end_with_status_2(options, capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(options.split())
    assert end.value.code == 2 and options.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_an_unwritable_folder_is_one_line(drawn, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        experiments.main(["--data", str(drawn), "--out", str(tmp_path / "file")])
    assert end.value.code == 1 and capsys.readouterr().err.count("\n") == 1


def test_gains_are_differences_within_a_seed(tmp_path):
    """AP of BoxInst 40 and 50, of bce 41, 53 and, for a seed without BoxInst, 90."""
    one = Experiments(parse_arguments(["--out", str(tmp_path)]))
    for row, values in (("boxinst", (40, 50, None)), ("bce", (41, 53, 90))):
        for seed, ap in enumerate(values):
            folder = one.folder(ROWS[row].run, seed)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").write_text('{"iter": 1, "loss": 2}\n{"iter": 1, "eval": {}}\n')
            for rescore in ("off", "on"):
                if ap is not None:
                    figures = {"AP": ap, "AP50": 0, "AP75": 0}
                    one.metrics(row, seed, rescore).write_text(json.dumps({"segm": figures, "bbox": figures}))
    cells = [[c.strip() for c in table(one, ["boxinst", "bce"], seeds).splitlines()[3].split("|")[2:5]]
             for seeds in ([0, 1], [0, 1, 2])]
    assert cells == [["2", "47.0 ± 8.5", "2.0 ± 1.4"], ["3", "61.3 ± 25.5", "–"]]


def test_programs_write_their_output_to_the_log(drawn, tmp_path):
    args = parse_arguments(["--data", str(drawn), "--out", str(tmp_path), "--jobs", "64"])
    one = Experiments(args)
    assert one.environment["OMP_NUM_THREADS"] == "1"
    with pytest.raises(UserError, match=r"evaluate ended with status 1; see .*log\.txt"):
        one.python(tmp_path / "run", "evaluate", "--ckpt", tmp_path / "none.pt", "--data", drawn)
    log = (tmp_path / "run/log.txt").read_text()
    assert re.match(r"\$ .*-m evaluate --ckpt", log) and "error: no checkpoint at" in log


def test_spread_and_an_empty_table(tmp_path):
    assert spread([]) == "–" and spread([41.26]) == "41.3" and spread([40, 42, 44]) == "42.0 ± 2.0"
    one = Experiments(parse_arguments(["--out", str(tmp_path)]))
    assert len(table(one, list(ROWS), [0]).splitlines()) == 2
