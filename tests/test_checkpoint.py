"""Checkpoint files that survive a kill at any moment, and runs that resume from them to the bit."""
import itertools
import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import recipe
import train
from formats import checkpoint
from formats.checkpoint import CheckpointError, load, load_latest, save
from helpers import (SMALL, TINY, Code, command, losses_of, metrics, new_run, one_batch, one_line_error, only_training,
                     same)
from model import PIXEL_STD, build_model, load_model
from tools.checkpoint import convert, describe
from tools.start import initialise

CLASSES = [{"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}]


def state_of(iteration: int = 5, teacher: bool = True, classes=CLASSES, channels: int = 32, **more) -> dict:
    """A checkpoint's dictionary; student and teacher have different weights."""
    spec = {"backbone": "r18-slim", "num_classes": len(classes), "channels": channels, "frozen": False}
    torch.manual_seed(iteration)
    student, other = build_model(**spec).state_dict(), build_model(**spec).state_dict()
    return {"model": spec, "classes": classes, "method": "boxteacher" if teacher else "boxinst", "config": {},
            "iteration": iteration, "student": student, "teacher": other if teacher else None, **more}


def tiny(iteration: int, **more) -> dict:
    """The smallest checkpoint of a run."""
    spec = {"backbone": "r18-slim", "num_classes": 1, "channels": 1, "frozen": False}
    return {"model": spec, "classes": CLASSES[:1], "method": "boxinst", "config": {}, "iteration": iteration,
            "student": {"a": torch.zeros(10)}, "teacher": None, "optimizer": {"state": {}, "param_groups": []},
            "scaler": {}, **more}


# ------------------------------------------------------------------------------------------------------ files


def test_a_saved_checkpoint_is_loaded_and_the_previous_one_is_kept(tmp_path):
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for iteration in (1, 2, 3):
        save(tiny(iteration, x=torch.arange(iteration)), last, previous)
    assert load(last)["x"].tolist() == [0, 1, 2] and load(previous)["iteration"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    assert load_latest(tmp_path)["iteration"] == 3


def test_file_and_folder_are_on_the_disk_when_a_save_returns(tmp_path, monkeypatch):
    last, previous, synced = tmp_path / "last.pt", tmp_path / "previous.pt", []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((os.path.isdir(f"/proc/self/fd/{number}"),
                                                                   last.exists() and load(last)["iteration"])))
    save(tiny(1), last, previous)
    save(tiny(2), last, previous)
    assert synced == [(False, False), (True, 1), (False, 1), (True, 2)]   # a file, then its name


def write(state: dict, path: Path) -> None:
    """As `save` does, also what that refuses."""
    torch.save({"format": checkpoint.FORMAT, **state}, path)


def unusable_files(folder: Path) -> dict[str, str]:
    """Written into the folder; {name: a part of the message}."""
    save(tiny(1, x=torch.zeros(1000)), folder / "good.pt")
    content = (folder / "good.pt").read_bytes()
    for share in (0, 1, 50, 99):
        (folder / f"cut{share}.pt").write_bytes(content[:len(content) * share // 100])
    (folder / "text.pt").write_text("not a checkpoint\n" * 100)
    (folder / "code.pkl").write_bytes(pickle.dumps({"format": Code(folder / "ran")}))
    torch.save({"format": checkpoint.FORMAT, "x": Code(folder / "ran")}, folder / "code.pt")
    torch.save({"model": {"conv.weight": torch.zeros(3)}}, folder / "foreign.pt")
    torch.save([1, 2, 3], folder / "list.pt")
    torch.save({"format": checkpoint.FORMAT}, folder / "empty.pt")
    write(tiny(1) | {"teacher": "mine"}, folder / "text_as_teacher.pt")
    state = state_of()
    save(state | {"student": {}, "teacher": None}, folder / "no_weights.pt")
    save(state | {"model": state["model"] | {"backbone": "r51"}}, folder / "unknown.pt")
    save(tiny(1) | {"model": {"backbone": "r18"}}, folder / "half_a_model.pt")
    for key, value in (("channels", 8192), ("num_classes", 10 ** 9), ("mask_channels", 10 ** 9), ("channels", -1)):
        save(state | {"classes": None, "model": state["model"] | {key: value}}, folder / f"{key}{value}.pt")
    save(state | {"classes": CLASSES[:1]}, folder / "class.pt")
    save(state | {"config": {"test_max_size": 10 ** 9}}, folder / "size.pt")
    for name in ("student", "teacher"):
        weights = {key: weight.clone() for key, weight in state[name].items()}
        weights["fpn.p6.bias"][3] = float("nan" if name == "student" else "inf")
        write(state | {name: weights}, folder / f"{name}.pt")
    for number, value in enumerate((-1, 10 ** 30)):
        write(state | {"iteration": value}, folder / f"iteration{number}.pt")
    write(state | {"method": "magic"}, folder / "method.pt")
    (folder / "folder.pt").mkdir()
    damaged = {f"cut{share}.pt": "truncated" if share else "it is empty" for share in (0, 1, 50, 99)}
    return damaged | {"missing.pt": "no checkpoint at", "text.pt": "not a readable",
                      "code.pkl": "wants to run", "code.pt": "wants to run",
                      "foreign.pt": "no checkpoint of this project",
                      "list.pt": "no checkpoint of this project", "folder.pt": "it is a folder",
                      "empty.pt": "its 'model' is missing or damaged",
                      "text_as_teacher.pt": "its 'teacher' is missing or damaged",
                      "no_weights.pt": "0 weights are too few", "unknown.pt": "do not fit the model it names",
                      "half_a_model.pt": "its 'model' is missing or damaged", "channels8192.pt": "are too few for 8192",
                      "num_classes1000000000.pt": "are too few", "mask_channels1000000000.pt": "are too few",
                      "channels-1.pt": "are too few", "class.pt": "it names 1 of 2 classes",
                      "size.pt": "its test_max_size is 1000000000", "iteration0.pt": "its iteration is -1",
                      "iteration1.pt": "its iteration is 1000000000", "method.pt": "its method is 'magic'",
                      "student.pt": "fpn.p6.bias has values that are not finite",
                      "teacher.pt": "fpn.p6.bias has values that are not finite"}


def test_other_files_are_refused_in_one_line_and_run_no_code(tmp_path):
    for name, part in unusable_files(tmp_path).items():
        for use in (load_model, lambda path: describe(path, load(path, PIXEL_STD))):
            with pytest.raises(CheckpointError) as error:
                use(tmp_path / name)
            message = str(error.value)
            assert part in message and str(tmp_path / name) in message and "\n" not in message, message
    assert not (tmp_path / "ran").exists()


def test_latest_falls_back_to_the_previous_one_and_says_so(tmp_path, capsys):
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    assert load_latest(tmp_path) is None
    for iteration in (1, 2):
        save(tiny(iteration), last, previous)
    os.truncate(last, last.stat().st_size // 2)
    assert load_latest(tmp_path)["iteration"] == 1
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and str(last) in warning and warning.count("\n") == 1
    save(tiny(3, x=torch.zeros(9999)), last, previous)    # the damaged one is not kept
    assert load(last)["iteration"] == 3 and load(previous)["iteration"] == 1
    for number, damage in enumerate((
            flipped, lambda path: write(state_of(4), path),
            lambda path: write(tiny(4, student={"a": torch.full((10,), torch.nan)}), path),
            lambda path: write(tiny(4, optimizer={"state": {0: {"x": torch.tensor(torch.inf)}}, "param_groups": []}),
                               path),
            lambda path: write(tiny(4, optimizer={"state": {}, "param_groups": [{"momentum": math.nan}]}), path),
            lambda path: write(tiny(4, optimizer={"state": {}, "param_groups": [{"betas": (0.9, math.inf)}]}), path),
            lambda path: write(tiny(4, optimizer={"state": {}, "param_groups": [{"lr": 10 ** 400}]}), path),
            lambda path: write(tiny(4) | {"scaler": {"scale": math.inf}}, path),
            lambda path: write(tiny(4) | {"scaler": None}, path))):
        damage(last)
        assert load_latest(tmp_path)["iteration"] == 1, number
        assert capsys.readouterr().err.count("trying the previous one") == 1
        save(tiny(3, x=torch.zeros(9999)), last, previous)
        assert load(last)["iteration"] == 3 and load(previous)["iteration"] == 1, number
    last.unlink()                                                   # killed between the two renames
    assert load_latest(tmp_path)["iteration"] == 1
    os.truncate(previous, 10)
    with pytest.raises(CheckpointError, match="no readable checkpoint in .* --fresh") as error:
        load_latest(tmp_path)
    assert "\n" not in str(error.value)


def flipped(path: Path, byte: int | None = None, bit: int = 0) -> None:
    """Change one bit of a file, by default amid its numbers."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if byte is None else byte] ^= 1 << bit
    path.write_bytes(content)


def test_a_flipped_bit_is_noticed_wherever_it_matters(tmp_path):
    path, seeds = tmp_path / "a.pt", random.Random(0)
    state, refused = tiny(1, x=torch.arange(4000)), 0
    for _ in range(100):
        save(state, path)
        flipped(path, seeds.randrange(path.stat().st_size), seeds.randrange(8))
        try:
            assert torch.equal(load(path)["x"], state["x"])
        except CheckpointError as error:
            refused += "\n" not in str(error) and str(path) in str(error)
    assert refused >= 90                                            # others lie in padding and dates


VALUES = [None, True, -1, float("nan"), "text", b"x", [1], {"a": 1}, {1: {2: 3}}, (1, 2), [[[{}]]],
          [{"id": "1", "name": 2}], torch.zeros(2), {"a": torch.zeros(0)}]


def test_every_field_may_be_anything(tmp_path):
    """Each entry, and each entry of the entries, replaced or left out: loaded, or refused in one line."""
    config = {"optimizer": "sgd", "chosen_from": [9, 0.5, 1.0, "cpu"], "test_min_size": 64, "min_size": [64]}
    state, path, refused = {"format": checkpoint.FORMAT, **tiny(1, config=config)}, tmp_path / "last.pt", 0
    changes = [state | {key: value} for key in state for value in VALUES]
    changes += [state | {key: state[key] | {inner: value}} for key in ("model", "config", "optimizer")
                for inner in state[key] for value in VALUES]
    changes += [{key: value for key, value in state.items() if key != left_out} for left_out in state]
    for change in changes:
        torch.save(change, path)
        for use in (load_model, lambda _: load_latest(tmp_path)):
            try:
                use(path)
            except CheckpointError as error:
                refused += 1
                assert "\n" not in str(error), change
    assert refused > 1.5 * len(changes)


def test_a_run_of_other_options_is_one_line(drawn, tmp_path, capsys):
    run, _ = new_run(drawn, tmp_path)
    run.save()
    state = load(tmp_path / "last.pt")
    for change in ({"config": {}}, {"student": state["student"] | {"head.scales": torch.ones(4)}},
                   {"optimizer": {"state": {}, "param_groups": []}}):
        save(state | change, tmp_path / "last.pt")
        assert command(*only_training(drawn), *SMALL, "--out", tmp_path) == 1
        assert f"{tmp_path} holds a run that cannot go on" in one_line_error(capsys)


def test_a_foreign_checkpoint_is_not_resumed(tmp_path, capsys):
    torch.save({"model": {"proposal_generator.fcos_head.cls_logits.weight": torch.zeros(3)}}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        load_latest(tmp_path)
    assert f"{tmp_path / 'last.pt'} is no checkpoint of this project; trying" in capsys.readouterr().err


def test_weights_alone_are_not_resumed(tmp_path):
    save(state_of(), tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        load_latest(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    save(tiny(1), tmp_path / "a.pt")
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("unexpected pos")))
    with pytest.raises(CheckpointError, match="cannot write .*unexpected pos"):
        convert(load(tmp_path / "a.pt"), str(tmp_path / "b.pt"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_full_disk_is_one_line_and_leaves_the_last_good_checkpoint(tmp_path):
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for iteration in (1, 2):
        save(tiny(iteration), last, previous)
    code = ("import resource, signal, sys, torch; from test_checkpoint import save, tiny\n"
            "from formats.files import one_line_errors\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
            "with one_line_errors(): save(tiny(3, x=torch.zeros(10 ** 5)), sys.argv[1], sys.argv[2])")
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(train.__file__).parent)])
    done = subprocess.run([sys.executable, "-c", code, last, previous], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 1 and done.stderr == (
        f"error: cannot write {last}, which stays as it was: File too large\n")
    assert load_latest(tmp_path)["iteration"] == 2 and load(previous)["iteration"] == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_checkpoint_of_this_process_is_not_kept_either(tmp_path):
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for iteration in (1, 2):
        save(tiny(iteration, x=torch.zeros(1000)), last, previous, own=True)
    for damage in (flipped, lambda path: os.truncate(path, 100), lambda path: path.write_bytes(b"")):
        damage(last)
        save(tiny(3, x=torch.zeros(1000)), last, previous, own=True)
        assert load(last)["iteration"] == 3 and load(previous)["iteration"] == 1


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for iteration in (1, 2):
        save(tiny(iteration), last, previous)
    for change in ({"student": {"a": torch.full((10,), torch.nan)}}, {"scaler": {"scale": math.nan}},
                   {"optimizer": {"state": {0: {"momentum_buffer": torch.tensor(torch.inf)}}, "param_groups": []}}):
        with pytest.raises(CheckpointError, match="cannot write .*last.pt, which stays as it was: .* (nan|not finite)"):
            save(tiny(3) | change, last, previous)
    assert load(last)["iteration"] == 2 and load(previous)["iteration"] == 1


def test_a_run_reads_its_checkpoint_back_once_at_most(drawn, tmp_path, monkeypatch):
    """Then its checksums suffice."""
    whole, read = [], checkpoint.is_whole_run
    monkeypatch.setattr(checkpoint, "is_whole_run", lambda path: whole.append(path) or read(path))
    options = [*only_training(drawn), "--out", tmp_path, *SMALL, "--checkpoint-every", 1]
    for iterations in (3, 6):
        assert command(*options, "--iters", iterations) == 0
    assert len(whole) == 2 and load(tmp_path / "previous.pt")["iteration"] == 5


def test_a_process_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path, capsys):
    """kill -9 at 30 random moments of a process that does nothing but save."""
    last, previous, final = (tmp_path / name for name in ("last.pt", "previous.pt", "final.pt"))
    reached, seeds = 0, random.Random(0)

    def written(path: Path) -> int | None:
        return path.stat().st_mtime_ns if path.exists() else None

    for _ in range(30):
        before, child = written(final), os.fork()
        if child == 0:
            try:
                for iteration in itertools.count(reached + 1):
                    state = tiny(iteration, x=torch.full((200_000,), float(iteration)))
                    save(state, last, previous)
                    save(state, final)
            finally:
                os._exit(1)                                         # never return into pytest
        while written(final) == before:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "saving failed"
            time.sleep(0.001)
        time.sleep(seeds.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        latest = load_latest(tmp_path)
        assert latest["iteration"] >= max(reached, 1)               # nothing that was saved is lost
        assert all((state["x"] == state["iteration"]).all() for state in (latest, load(final)))
        reached = latest["iteration"]
    assert reached >= 30 and capsys.readouterr().err == ""          # no file was ever damaged


# ----------------------------------------------------------------------------------------------------- models


def test_model_has_the_teachers_weights_unless_asked_for_the_students(tmp_path):
    state = state_of(optimizer={"x": 1})
    save(state, tmp_path / "a.pt")
    for weights, expected in ((None, "teacher"), ("teacher", "teacher"), ("student", "student")):
        model, info = load_model(tmp_path / "a.pt", weights)
        assert same(model.state_dict(), state[expected]) and not model.training
    assert info["classes"] == CLASSES and info["iteration"] == 5
    assert "student" not in info and "optimizer" not in info


def test_a_run_without_teacher_gives_the_students_weights(tmp_path):
    state = state_of(teacher=False)
    save(state, tmp_path / "a.pt")
    assert same(load_model(tmp_path / "a.pt")[0].state_dict(), state["student"])
    with pytest.raises(CheckpointError, match="no teacher .*--weights student"):
        load_model(tmp_path / "a.pt", "teacher")


def test_initialise_takes_all_weights_where_classes_are_the_same(tmp_path, capsys):
    state = state_of()
    save(state, tmp_path / "a.pt")
    model = build_model(**state["model"])
    initialise(model, CLASSES, load(tmp_path / "a.pt"), tmp_path / "a.pt")
    assert same(model.state_dict(), state["teacher"]) and capsys.readouterr().err == ""


@pytest.mark.parametrize("classes", [CLASSES[:1], [CLASSES[0], {"id": 18, "name": "dog"}]])
def test_initialise_leaves_the_class_layer_out_where_classes_differ(tmp_path, capsys, classes):
    state = state_of()
    save(state, tmp_path / "a.pt")
    torch.manual_seed(99)
    model = build_model("r18-slim", len(classes), 32, False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    initialise(model, classes, load(tmp_path / "a.pt"), tmp_path / "a.pt")
    for name, value in model.state_dict().items():
        expected = before if name.startswith("head.class_logits.") else state["teacher"]
        assert torch.equal(value, expected[name]), name
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "other classes: its class layer is left out" in warning


def test_initialise_refuses_another_network_in_one_line(tmp_path):
    save(state_of(), tmp_path / "a.pt")
    for model in (build_model("r18-slim", 2, 64, False), build_model("r18", 2, 32, False),
                  build_model("r18-slim", 2, 32, True)):
        with pytest.raises(CheckpointError, match="does not fit this model: .*--backbone") as error:
            initialise(model, CLASSES, load(tmp_path / "a.pt"), tmp_path / "a.pt")
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- resuming

ITERATIONS = 8


def options_of(drawn, warm, out, *more) -> list[str]:
    """Options of 8 iterations with a checkpoint after each, from `warm`: its teacher gives pseudo masks."""
    return [str(x) for x in (*only_training(drawn), "--out", out, *SMALL, "--iters", ITERATIONS, "--init",
                             warm,
                             "--checkpoint-every", 1, *more)]


def stop_after(monkeypatch, iteration: int) -> None:
    """Ask the run to stop, as a signal does, in the step that ends `iteration`."""
    step = train.train_step
    monkeypatch.setattr(train, "train_step",
                        lambda run, batches, i, stop: step(run, batches, i, i + 1 == iteration))


def assert_same_runs(one: Path, two: Path) -> None:
    """All losses and all final weights are equal to the last bit."""
    a, b = losses_of(one), losses_of(two)
    assert [line["iter"] for line in a] == list(range(1, ITERATIONS + 1)) and a == b
    assert all(line["pseudo_masks"] > 0 for line in a[:2]) and len({line["loss"] for line in a}) == ITERATIONS
    a, b = load(one / "final.pt"), load(two / "final.pt")
    assert same(a["student"], b["student"]) and same(a["teacher"], b["teacher"])
    assert not same(a["student"], a["teacher"])


@pytest.fixture(scope="module")
def straight(drawn, warm, tmp_path_factory) -> Path:
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("straight") / "out"
    assert command(*options_of(drawn, warm, out)) == 0
    return out


def launch(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, train.__file__, *arguments], start_new_session=True, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for_lines(out: Path, count: int) -> None:
    """Wait until metrics.jsonl has `count` lines."""
    until = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < count:
        assert time.monotonic() < until, "the run wrote nothing"
        time.sleep(0.002)


def test_killed_at_a_random_moment_and_started_again(drawn, warm, straight, tmp_path, capsys):
    out = tmp_path / "out"
    process = launch(options_of(drawn, warm, out))
    wait_for_lines(out, random.randint(2, 5))  # the second line is written when the first checkpoint is
    time.sleep(random.uniform(0, 1.5) * metrics(out)[-1]["seconds"])
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (out / "final.pt").exists()
    assert command(*options_of(drawn, warm, out)) == 0
    assert re.search(rf"^resumed {out} at iteration [1-8]$", capsys.readouterr().out, re.MULTILINE)
    assert_same_runs(straight, out)


def test_sigterm_to_all_its_processes_finishes_the_step_and_saves(drawn, warm, straight, tmp_path, capsys):
    """torchrun and Slurm signal the whole process group, with the loading processes in it."""
    out = tmp_path / "out"
    process = launch([*options_of(drawn, warm, out), "--workers", "2", "--checkpoint-every", "100"])
    wait_for_lines(out, 1)
    os.killpg(process.pid, signal.SIGTERM)
    text, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in errors, errors
    iteration = metrics(out)[-1]["iter"]
    assert 1 <= iteration < ITERATIONS and load(out / "last.pt")["iteration"] == iteration
    stopped = f"stopped at iteration {iteration}, saved; to go on: python {train.__file__} --train-json "
    assert text.splitlines()[-1].startswith(stopped)
    assert command(*options_of(drawn, warm, out)) == 0
    printed = capsys.readouterr().out
    assert f"resumed {out} at iteration {iteration}\n" in printed
    assert "changed since: workers 2 -> 0, checkpoint_every 100 -> 1\n" in printed
    assert_same_runs(straight, out)


@pytest.mark.parametrize("more", [
    [], ["--accumulate", 2, "--optimizer", "adamw", "--lr", "1e-4"], ["--augment", "strong", "--seed", 3]])
def test_four_iterations_and_four_more_are_eight(drawn, warm, straight, tmp_path, monkeypatch, capsys, more):
    once, twice = straight, tmp_path / "twice"
    if more:
        once = tmp_path / "once"
        assert command(*options_of(drawn, warm, once, *more)) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert command(*options_of(drawn, warm, twice, *more)) == 128 + signal.SIGTERM
    assert load(twice / "last.pt")["iteration"] == 4 and not (twice / "final.pt").exists()
    capsys.readouterr()
    assert command(*options_of(drawn, warm, twice, *more)) == 0
    printed = capsys.readouterr().out
    assert f"resumed {twice} at iteration 4\n" in printed and "changed since" not in printed
    assert_same_runs(once, twice)
    if more:
        assert losses_of(once) != losses_of(straight)


def test_a_run_goes_on_with_what_was_chosen_for_it(drawn, warm, tmp_path, monkeypatch, capsys):
    """Whatever has become of the data set, and on whatever device."""
    facts, once, twice = recipe.SmallSet(50, 0.3, 1.0, "cpu"), tmp_path / "once", tmp_path / "twice"
    options = [*only_training(drawn), *TINY, "--iters", ITERATIONS, "--init", warm]
    monkeypatch.setattr(recipe, "small_set", lambda *_: facts)
    assert command(*options, "--out", once) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert command(*options, "--out", twice) == 128 + signal.SIGTERM
    monkeypatch.setattr(recipe, "small_set", lambda *_: facts._replace(images=5000, device="cuda"))
    capsys.readouterr()
    assert command(*options, "--out", twice) == 0
    printed = capsys.readouterr().out
    assert "resumed" in printed and "chosen, since" in printed and "changed since" not in printed
    assert_same_runs(once, twice)
    config = load(twice / "final.pt")["config"]
    assert config["chosen_from"] == [50, 0.3, 1.0, "cpu"] and (config["optimizer"], config["ramp"]) == ("adamw", 1)
    written = json.loads((twice / "config.json").read_text())
    assert {name: written[name] for name in config} == config


def test_runs_from_before_the_choices_keep_the_papers_recipe(drawn, warm, straight, tmp_path, monkeypatch, capsys):
    out, words = tmp_path / "out", options_of(drawn, warm, tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert command(*words) == 128 + signal.SIGTERM
    state = load(out / "last.pt")
    del state["config"]["chosen_from"]
    save(state, out / "last.pt")
    capsys.readouterr()
    del words[words.index("--schedule"):words.index("--schedule") + 2]
    assert command(*words) == 0
    printed = capsys.readouterr().out
    assert "resumed" in printed and "chosen" not in printed and "changed since" not in printed
    assert_same_runs(straight, out)


def test_init_names_the_network(drawn, warm, tmp_path):
    """warm's is neither the one nor the width that would be chosen."""
    options = [*only_training(drawn), "--init", warm, "--backbone-weights", "none", "--iters", 1, "--min-size", 64]
    assert command(*options, "--device", "cpu", "--workers", 0, "--out", tmp_path) == 0
    state = load(tmp_path / "final.pt")
    assert state["model"]["channels"] == state["config"]["channels"] == 32
    assert state["config"]["backbone"] == "r18-slim" and state["config"]["test_min_size"] == 64


def test_a_truncated_checkpoint_costs_one_iteration(drawn, warm, straight, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        command(*options_of(drawn, warm, out))
    os.truncate(out / "last.pt", 1_000_000)
    with (out / "metrics.jsonl").open("a") as file:                 # killed while it wrote a line
        file.write('{"iter": 4, "eval": {"bbox": {"AP": 1.0}')
    capsys.readouterr()
    assert command(*options_of(drawn, warm, out)) == 0
    printed = capsys.readouterr()
    assert f"resumed {out} at iteration 3\n" in printed.out
    assert printed.err.startswith(f"warning: {out / 'last.pt'} is not a readable checkpoint")
    assert_same_runs(straight, out)


def test_no_readable_checkpoint_ends_with_status_1(drawn, warm, tmp_path, capsys):
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"PK\3\4 garbage")
    assert command(*options_of(drawn, warm, tmp_path)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["warning", "warning", "error"]
    assert f"no readable checkpoint in {tmp_path}" in lines[-1] and "--fresh" in lines[-1]
    assert not (tmp_path / "config.json").exists()


def test_killed_between_the_two_files_at_the_end(drawn, warm, straight, tmp_path, monkeypatch):
    """final.pt and last.pt are written one after the other; a kill between the two must not lose final.pt."""
    out, original, ends = tmp_path / "out", checkpoint.save, []

    class Killed(BaseException):
        pass

    def save_and_die(state, path, *rest, **more):
        original(state, path, *rest, **more)
        if state["iteration"] == ITERATIONS:
            ends.append(path.name)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            command(*options_of(drawn, warm, out))
    assert len(ends) == 1 and command(*options_of(drawn, warm, out)) == 0
    assert_same_runs(straight, out)


def test_a_complete_run_says_so_and_changes_nothing(drawn, warm, straight, capsys):
    before = {path.name: path.read_bytes() for path in straight.iterdir()}
    assert command(*options_of(drawn, warm, straight)) == 0
    shown = capsys.readouterr().out
    assert f"{straight} is complete: 8 iterations; python predict.py --ckpt {straight / 'final.pt'} --boxes" in shown
    assert {path.name: path.read_bytes() for path in straight.iterdir()} == before


def test_final_checkpoint_holds_plain_types_and_no_optimiser(straight):
    plain = (str, int, float, bool, type(None), torch.Tensor)

    def check(value, where):
        if isinstance(value, dict):
            for key, item in value.items():
                assert type(key) in plain, where
                check(item, f"{where}.{key}")
        elif type(value) in (list, tuple):
            for item in value:
                check(item, where)
        else:
            assert type(value) in plain, f"{where}: {type(value)}"

    for name, own in (("final.pt", set()), ("last.pt", {"optimizer", "scaler"})):
        state = torch.load(straight / name, weights_only=True)
        assert state.keys() == {"format", "model", "classes", "method", "config", "iteration", "torch",
                                "student", "teacher", *own}
        check({key: value for key, value in state.items() if key != "optimizer"}, name)
    assert state["classes"][0] == {"id": 1, "name": "ellipse"} and state["iteration"] == ITERATIONS
    assert state["config"]["test_min_size"] == 64 and json.dumps(state["config"])
    assert same(load_model(straight / "final.pt")[0].state_dict(), state["teacher"])


def test_another_model_or_method_in_the_same_folder_is_refused(drawn, warm, straight, tmp_path, capsys):
    before = (straight / "last.pt").read_bytes()
    for key, more in (("method", ["--method", "boxinst"]), ("model", ["--backbone", "r18"]),
                      ("model", ["--channels", 64])):
        assert command(*options_of(drawn, warm, straight, *more)) == 1
        message = one_line_error(capsys)
        assert f"{straight} holds a run with another {key}" in message and "--fresh" in message
    content = json.loads((drawn / "annotations/instances_train2017.json").read_text())
    content["categories"][0]["name"] = "egg"
    (tmp_path / "set.json").write_text(json.dumps(content))
    assert command(*options_of(drawn, warm, straight, "--train-json", tmp_path / "set.json")) == 1
    assert "other classes" in one_line_error(capsys)
    assert (straight / "last.pt").read_bytes() == before


def test_fresh_moves_earlier_runs_aside_and_a_longer_run_goes_on(drawn, warm, tmp_path, capsys):
    out = tmp_path / "out"
    one = ["--iters", 1]
    assert command(*options_of(drawn, warm, out, *one, "--fresh")) == 0
    assert not (tmp_path / "out.1").exists()                        # nothing there yet
    assert command(*options_of(drawn, warm, out, "--iters", 2)) == 0
    printed = capsys.readouterr().out
    assert f"resumed {out} at iteration 1\n" in printed and "changed since: iters 1 -> 2" in printed
    assert load(out / "final.pt")["iteration"] == 2
    for aside in ("out.1", "out.2"):
        assert command(*options_of(drawn, warm, out, *one, "--fresh")) == 0
        printed = capsys.readouterr().out
        assert f"moved {out} to {tmp_path / aside}\n" in printed and "resumed" not in printed
    assert [load(tmp_path / name / "last.pt")["iteration"] for name in ("out.1", "out.2", "out")] == [2, 1, 1]


def test_init_from_the_command_line(drawn, warm, tmp_path, capsys):
    out = tmp_path / "out"
    save(state_of(), tmp_path / "other.pt")
    assert command(*options_of(drawn, warm, out, "--init", tmp_path / "other.pt", "--iters", 1)) == 0
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "other classes: its class layer is left out" in warning
    for number, more in enumerate((["--channels", 64], ["--init", tmp_path / "none.pt"], ["--init",
                                                                                          __file__])):
        assert command(*options_of(drawn, warm, tmp_path / str(number), *more)) == 1
        assert str(more[-1] if number else warm) in one_line_error(capsys)


@pytest.mark.parametrize("change, message", [(["--optimizer", "adamw"], "another optimizer (sgd, now adamw)"),
                                             (["--method", "boxinst"], "another method (boxteacher, now boxinst)")])
def test_a_run_is_not_continued_with_another_optimiser_or_method(drawn, warm, straight, capsys, change, message):
    assert command(*options_of(drawn, warm, straight, *change)) == 1
    assert message in one_line_error(capsys)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_older_checkpoint_goes_on(drawn, warm, tmp_path, optimizer):
    """One with a fused optimiser, and its state in another memory layout, as before the weights had channels last."""
    options = ("--init", str(warm), "--iters", "100", "--optimizer", optimizer)
    run, annotations = new_run(drawn, tmp_path, *options)
    batch = one_batch(annotations)
    train.train_step(run, [batch], 50, False)
    run.iteration = 51
    run.save()
    state = load(tmp_path / "last.pt")
    for kept in state["optimizer"]["state"].values():
        for key, value in kept.items():
            kept[key] = value.contiguous()
    for group in state["optimizer"]["param_groups"]:
        group |= {"fused": True, "foreach": False}
    torch.save(state, tmp_path / "last.pt")
    again, _ = new_run(drawn, tmp_path, *options)
    for one in (run, again):
        train.train_step(one, [batch], 51, False)
    assert same(run.model.state_dict(), again.model.state_dict()) and not again.optimizer.param_groups[0]["fused"]


def test_going_on_with_another_weight_decay_and_precision(drawn, warm, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        command(*options_of(drawn, warm, tmp_path / "out"))
    decays = []
    step = train.train_step

    def seen(run, *rest):
        decays.append((run.optimizer.param_groups[0]["weight_decay"], run.scaler.is_enabled()))
        return step(run, *rest)._replace(stop=True)

    monkeypatch.setattr(train, "train_step", seen)
    command(*options_of(drawn, warm, tmp_path / "out", "--weight-decay", "0.01", "--amp", "fp16"))
    assert decays == [(0.01, True)] and "changed since: " in capsys.readouterr().out


def test_an_unforeseen_error_does_not_leave_the_process_waiting_for_its_workers(drawn, warm, tmp_path):
    code = ("import sys, train\ntrain.train_step = lambda *a: 1 / 0\n"
            "train.main(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", code, *options_of(drawn, warm, tmp_path / "out", "--workers", 1)],
                          cwd=Path(train.__file__).parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
