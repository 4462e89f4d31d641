"""train.py: one step, and whole runs of all methods, on one process and on two. Its options: test_recipe.py.

Runs are as small as possible: images of 64 pixels, the narrowest network. Most start from `warm`, a briefly trained
model, because an untrained teacher finds nothing and its losses are zero. Resuming is tested in test_checkpoint.py.
"""
import json
import math
import operator
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from formats.checkpoint import CheckpointError, load
from formats.coco import CocoBoxes
from helpers import (LOSSES, SMALL, command, copy_set, losses_of, metrics, new_run, one_batch, one_line_error,
                     only_training, same)
from tools.log import Log
from model import CondInst, load_model
from tools.batches import training_batches
from boxteacher import RAMPED, total_loss
from train import train_step


def without_segmentation(content: dict) -> None:
    for annotation in content["annotations"]:
        del annotation["segmentation"], annotation["area"]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# --------------------------------------------------------------------------------------------------- one step


def test_thirty_steps_on_one_batch_lower_every_loss_of_boxes(warm):
    history = json.loads((warm.parent / "losses.json").read_text())

    def mean(name, *steps):
        return sum(history[i][f"loss_{name}"] for i in steps) / len(steps)

    for name in LOSSES["boxinst"]:
        assert mean(name, 27, 28, 29) < mean(name, 0, 1, 2), name
    for name in ("pixel", "affinity"):  # at first no mask of the teacher is good enough
        assert mean(name, 0) == 0 < mean(name, 29), name


def test_twenty_steps_on_one_batch_lower_the_losses_of_pseudo_masks(drawn, warm, tmp_path, monkeypatch):
    """A student with a new controller learns its masks again from the teacher. The teacher is held still: otherwise
    its labels, the target, would change from step to step."""
    monkeypatch.setattr(train.teacher, "update", lambda *_, **__: None)
    run, annotations = new_run(drawn, tmp_path, "--init", str(warm), "--optimizer", "adamw", "--lr", "5e-4",
                               "--iters", "100", "--warmup", "0", "--clip-grad", "10")
    torch.nn.init.normal_(run.model.head.controller.weight, std=0.01)
    batch = one_batch(annotations)
    results = [train_step(run, [batch], 40, False) for _ in range(21)]
    assert results[0].counts["pseudo_masks"] == results[-1].counts["pseudo_masks"] > 4
    for name in ("projection", "pixel"):  # of the new controller; the others start near where they end
        first, last = (results[i].losses[f"loss_{name}"] for i in (0, -1))
        assert 0 < last < first, name


@pytest.mark.parametrize("method", ["boxinst", "condinst"])
def test_twenty_steps_of_the_other_methods_lower_every_loss(drawn, tmp_path, method):
    run, _ = new_run(drawn, tmp_path, "--method", method, "--optimizer", "adamw", "--lr", "1e-3",
                     "--iters", "900", "--warmup", "0", "--clip-grad", "10")
    annotations = CocoBoxes(drawn / "annotations/instances_train2017.json", drawn / "train2017",
                            masks=method == "condinst")
    batch = one_batch(annotations)
    history = [train_step(run, [batch], i, False).losses for i in range(21)]
    assert history[0].keys() == {"loss", *(f"loss_{name}" for name in LOSSES[method])}
    for name in history[0]:
        assert sum(h[name] for h in history[18:]) < sum(h[name] for h in history[:3]), name


def test_sgd_by_hand(drawn, tmp_path):
    """Momentum 0.9 and, by default, weight decay 1e-4 (Sec. 4.1): v <- 0.9 v + g + decay p, p <- p - lr v."""
    run, _ = new_run(drawn, tmp_path)
    (group,) = run.optimizer.param_groups
    group["lr"] = 1.0
    p = run.model.head.controller.weight
    before = p.detach().clone()
    gradient = torch.empty_like(p).copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
    velocity = torch.zeros_like(p)
    for g in (torch.zeros_like(p), gradient, torch.zeros_like(p)):  # alone, the decay is not lost in rounding
        p.grad = g.clone()
        velocity = 0.9 * velocity + g + 1e-4 * before
        before -= velocity
        run.optimizer.step()
        torch.testing.assert_close(p.detach(), before, rtol=1e-6, atol=1e-9)


def test_clip_grad_bounds_the_step(drawn, tmp_path):
    """The first step of SGD without weight decay is -lr times the gradient: of norm --clip-grad, in its direction."""
    steps = []
    for more in ([], ["--clip-grad", "0.01"]):
        run, annotations = new_run(drawn, tmp_path, "--lr", "1", "--warmup", "0", "--weight-decay", "0", *more)
        before = torch.cat([p.detach().flatten() for p in run.parameters]).double()
        train_step(run, [one_batch(annotations)], 0, False)
        steps.append(torch.cat([p.detach().flatten() for p in run.parameters]).double() - before)
    plain, clipped = steps
    assert plain.norm() > 0.1 and float(clipped.norm()) == pytest.approx(0.01, rel=1e-3)
    assert float(plain @ clipped) == pytest.approx(float(plain.norm() * clipped.norm()), rel=1e-3)


def test_micro_steps_are_averaged(drawn, warm, tmp_path):
    """Two micro-steps with the same batch equal one step with it, to the last bit: halving is exact."""
    runs = [new_run(drawn, tmp_path, "--init", str(warm), "--iters", "100")[0] for _ in range(2)]
    batch = one_batch(new_run(drawn, tmp_path)[1])
    results = [train_step(run, [batch] * count, 50, False) for run, count in zip(runs, (1, 2))]
    assert results[0].losses == results[1].losses and results[0].counts["pseudo_masks"] > 0
    assert results[1].counts["positives"] == 2 * results[0].counts["positives"]
    start = torch.cat([p.flatten() for p in load_model(warm)[0].parameters()])
    one, two = (torch.cat([p.detach().flatten() for p in run.model.parameters()]) for run in runs)
    assert torch.equal(one, two) and not torch.equal(one, start)


def test_ema_follows_the_student(drawn, warm, tmp_path):
    """After a step, teacher <- alpha teacher + (1 - alpha) student, with alpha from the iteration and --ema."""
    run, annotations = new_run(drawn, tmp_path, "--init", str(warm), "--iters", "100", "--ema", "0.75")
    batch = one_batch(annotations)
    for iteration, alpha in ((0, 0.5), (50, 0.75)):
        before = [p.clone() for p in run.teacher.parameters()]
        train_step(run, [batch], iteration, False)
        for old, teacher, student in zip(before, run.teacher.parameters(), run.model.parameters()):
            expected = alpha * old + (1 - alpha) * student.detach()
            torch.testing.assert_close(teacher, expected, rtol=1e-5, atol=1e-7)


def test_average_of_boxinst_labels_nothing_and_is_evaluated(drawn, warm, tmp_path):
    """Table 7: averaging does not change the student; the average takes its batch-norm statistics."""
    options = ("--init", str(warm), "--method", "boxinst", "--iters", "100", "--ema", "0.75")
    averaged, annotations = new_run(drawn, tmp_path, *options, "--average")
    plain, _ = new_run(drawn, tmp_path, *options)
    batch = one_batch(annotations)
    for iteration in (50, 51):
        before = [p.clone() for p in averaged.teacher.parameters()]
        for run in (averaged, plain):
            train_step(run, [batch], iteration, False)
    assert same(averaged.model.state_dict(), plain.model.state_dict()) and plain.teacher is None
    for old, own, student in zip(before, averaged.teacher.parameters(), averaged.model.parameters()):
        torch.testing.assert_close(own, 0.75 * old + 0.25 * student.detach(), rtol=1e-5, atol=1e-7)
    assert all(map(torch.equal, averaged.teacher.buffers(), averaged.model.buffers()))
    assert averaged.evaluated() is averaged.teacher and plain.evaluated() is plain.model

    averaged.save()
    again, _ = new_run(drawn, tmp_path, *options, "--average")
    assert same(again.teacher.state_dict(), averaged.teacher.state_dict())
    with pytest.raises(CheckpointError, match=r"another --average \(True, now False\)"):
        new_run(drawn, tmp_path, *options)


def test_teacher_starts_as_a_copy_and_is_not_optimised(drawn, warm, tmp_path):
    run, _ = new_run(drawn, tmp_path, "--init", str(warm))
    assert same(run.teacher.state_dict(), run.model.state_dict())
    assert not any(p.requires_grad for p in run.teacher.parameters())
    optimised = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in run.model.parameters()}


def test_compiled_steps_are_the_same_steps(drawn, warm, tmp_path, monkeypatch):
    """Student and teacher traced by torch.compile, on padded images. (Compiling what it traced would take minutes.)"""
    compiled, traced, graphs = CondInst.compile_convolutions, [], []

    def as_it_is(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(CondInst, "compile_convolutions", lambda network: traced.append(network) or compiled(
        network, backend=as_it_is))
    runs = [new_run(drawn, tmp_path, "--init", str(warm), "--iters", "100", *more)[0] for more in ([], ["--compile"])]
    assert traced == [runs[1].model, runs[1].teacher]
    annotations = new_run(drawn, tmp_path)[1]
    batches = [training_batches(run.args, annotations, 0, 1) for run in runs]
    assert [one[0].images.shape[2:] for one in batches] == [(64, 64), (128, 128)]
    results = [train_step(run, [batches[1][0]], 50, False) for run in runs]
    assert results[0].counts["pseudo_masks"] == results[1].counts["pseudo_masks"] > 0
    for name, loss in results[0].losses.items():
        assert results[1].losses[name].item() == pytest.approx(loss.item(), rel=1e-4), name
    ours, theirs = (torch.cat([p.detach().flatten() for p in run.model.parameters()]) for run in runs)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert runs[0].model.state_dict().keys() == runs[1].model.state_dict().keys()  # a checkpoint is one all the same
    seen = len(graphs)
    train.evaluate_and_draw(runs[1], Log(tmp_path, runs[1].plan, 0), annotations, None)  # 64 pixels: a new size
    assert len(graphs) == seen >= 6 and (tmp_path / "labels-0000000.png").exists()


# --------------------------------------------------------------------------------- losses that are not finite


def spoil(monkeypatch, bad: set[int], how: str = "loss") -> list[tuple]:
    """Make the loss, or only the gradient, of the steps in `bad` not finite; returns the weights before each step."""
    original, step, calls, seen = train.Run.losses, train.train_step, [], []

    def losses(run, batch):
        result = original(run, batch)
        calls.append(None)
        if len(calls) - 1 in bad:
            zero = (next(run.model.parameters()) * 0).sum().sqrt()          # its gradient is nan
            result.losses["loss_cls"] = result.losses["loss_cls"] + (math.nan if how == "loss" else zero)
        return result

    def train_step(run, *rest):
        seen.append((weights(run.model), weights(run.teacher)))
        return step(run, *rest)

    monkeypatch.setattr(train.Run, "losses", losses)
    monkeypatch.setattr(train, "train_step", train_step)
    return seen


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(drawn, warm, tmp_path, monkeypatch, how):
    before = spoil(monkeypatch, {1}, how)
    out = tmp_path / "out"
    assert command(*only_training(drawn), "--out", out, *SMALL, "--iters", 4, "--init", warm) == 0
    lines = losses_of(out)
    assert [line["skipped_steps"] for line in lines] == [0, 1, 0, 0]
    assert all(same(*pair) for pair in zip(before[1], before[2]))          # batch norm statistics included
    assert not any(same(*pair) for pair in zip(before[0], before[1]))
    assert not any(same(*pair) for pair in zip(before[2], before[3]))
    assert not (out / "nonfinite.json").exists()
    assert "NaN" not in (out / "metrics.jsonl").read_text()            # it is not JSON


def test_a_skipped_step_does_not_spoil_the_line_it_is_part_of(drawn, warm, tmp_path, monkeypatch):
    spoil(monkeypatch, {1})
    options = ["--iters", 4, "--init", warm, "--log-every", 4]
    assert command(*only_training(drawn), "--out", tmp_path / "out", *SMALL, *options) == 0
    (line,) = losses_of(tmp_path / "out")
    assert line["skipped_steps"] == 1 and 0 < line["loss"] < 10 and line["positives"] > 0


def test_bad_steps_and_stops_count_between_two_lines_of_the_log(drawn, tmp_path, monkeypatch, capsys):
    """Three bad steps end the run before anything is logged; a signal ends it after the step in progress."""
    calls = spoil(monkeypatch, {1, 2, 3})
    options = [*only_training(drawn), *SMALL, "--iters", 9, "--log-every", 9]
    assert command(*options, "--out", tmp_path / "bad") == 1
    assert "three times in a row at iteration 3" in one_line_error(capsys) and len(calls) == 4
    monkeypatch.undo()
    step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda run, batches, i, _: step(run, batches, i, i == 2))
    assert command(*options, "--out", tmp_path / "stopped") == 128 + signal.SIGTERM
    assert load(tmp_path / "stopped/last.pt")["iteration"] == 3
    assert [line["iter"] for line in losses_of(tmp_path / "stopped")] == [3]


def test_the_step_that_ends_a_run_saves_nothing(drawn, tmp_path, monkeypatch, capsys):
    """Otherwise the same command would resume after it."""
    spoil(monkeypatch, {2, 3, 4})
    options = [*only_training(drawn), *SMALL, "--iters", 9, "--log-every", 9, "--checkpoint-every", 1]
    assert command(*options, "--out", tmp_path) == 1
    assert load(tmp_path / "last.pt")["iteration"] == 4 and "at iteration 4" in one_line_error(capsys)


def test_fp16_skips_what_overflows_and_scales_less(drawn, warm, tmp_path, monkeypatch):
    """If only the scaled gradient overflows, the step is skipped and the scale lowered, but the step is not broken."""
    run, annotations = new_run(drawn, tmp_path, "--init", str(warm), "--iters", "100", "--amp", "fp16")
    batch, before = one_batch(annotations), weights(run.model)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 120)
    results = [train_step(run, [batch], 50, False)]
    assert not results[0].finite and not results[0].broken and same(weights(run.model), before)
    assert run.scaler.get_scale() == 2.0 ** 119 and results[0].losses["loss"].isfinite()
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 10)
    assert train_step(run, [batch], 50, False).finite and not same(weights(run.model), before)
    monkeypatch.setattr(train, "total_loss", lambda *args: total_loss(*args) * math.nan)
    result, before = train_step(run, [batch], 50, False), weights(run.model)
    assert not result.finite and result.broken and run.scaler.get_scale() == 2.0 ** 9
    assert same(weights(run.model), before)


def test_a_first_step_that_is_skipped_leaves_no_momentum(drawn, warm, tmp_path, monkeypatch):
    run, annotations = new_run(drawn, tmp_path, "--init", str(warm), "--iters", "100")
    batch, before = one_batch(annotations), weights(run.model)
    with monkeypatch.context() as patch:
        patch.setattr(train, "total_loss", lambda *args: total_loss(*args) * math.inf)
        assert not train_step(run, [batch], 50, False).finite and same(weights(run.model), before)
    assert not run.optimizer.state
    assert train_step(run, [batch], 50, False).finite and not same(weights(run.model), before)


def test_two_in_a_row_go_on(drawn, tmp_path, monkeypatch):
    spoil(monkeypatch, {0, 1, 3, 4})
    assert command(*only_training(drawn), "--out", tmp_path / "out", *SMALL, "--iters", 6) == 0
    assert [line["skipped_steps"] for line in losses_of(tmp_path / "out")] == [1, 1, 0, 1, 1, 0]


def test_three_in_a_row_end_the_run(drawn, tmp_path, monkeypatch, capsys):
    before = spoil(monkeypatch, {2, 3, 4})
    out = tmp_path / "out"
    status = command(*only_training(drawn), "--out", out, *SMALL, "--iters", 8, "--checkpoint-every", 1)
    assert status == 1
    message = one_line_error(capsys)
    assert "three times in a row at iteration 4" in message and str(out / "nonfinite.json") in message
    report = json.loads((out / "nonfinite.json").read_text())
    (seen,) = report["processes"]
    assert report["iter"] == 4 and len(seen["image_ids"]) == 4 and set(seen["image_ids"]) <= set(range(1, 13))
    assert seen["losses"].keys() == {"loss", *(f"loss_{name}" for name in LOSSES["boxteacher"])}
    assert not math.isfinite(float(seen["losses"]["loss_cls"])) and math.isfinite(float(seen["losses"]["loss_box"]))
    last = load(out / "last.pt")
    assert last["iteration"] == 4
    assert same(last["student"], before[2][0]) and same(last["teacher"], before[2][1])


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("method", LOSSES)
def test_a_run_from_data_to_evaluation(drawn, warm, tmp_path, capsys, method):
    out = tmp_path / "out"
    status = command("--data", drawn, "--out", out, *SMALL, "--method", method, "--iters", 4,
                     "--eval-every", 2, "--init", warm)
    text = capsys.readouterr().out
    assert status == 0 and all(part in text for part in ("mask", "AP50", "4/4", "learning rate 0.0025"))
    lines = metrics(out)
    assert [(line["iter"], "eval" in line) for line in lines] == [
        (1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]
    for line in lines:
        if "eval" in line:
            assert line["eval"].keys() == {"bbox", "segm", "per_class"}
            assert line["eval"]["segm"]["AP"] is not None
        else:
            assert {"lr", "loss", "seconds", "data_seconds", "positives", "pseudo_masks"} <= line.keys()
            assert {k for k in line if k.startswith("loss_")} == {f"loss_{name}" for name in LOSSES[method]}
            total = sum(line[f"loss_{name}"] * (line["ramp"] if f"loss_{name}" in RAMPED else 1)
                        for name in LOSSES[method])
            assert line["loss"] == pytest.approx(total, rel=1e-5) and line["positives"] > 0 < line["seconds"]
            assert (line["pseudo_masks"] > 0) == (method == "boxteacher")
    assert [path.name for path in sorted(out.glob("labels-*"))] == ["labels-0000002.png", "labels-0000004.png"]
    config = json.loads((out / "config.json").read_text())
    assert config["method"] == method and config["batch_size"] == 4 and config["plan"]["iterations"] == 4
    model, info = load_model(out / "final.pt")
    assert info["iteration"] == 4 and info["method"] == method and model.num_classes == 6
    assert (info["config"]["test_min_size"], info["config"]["test_max_size"]) == (64, 64)


def test_signal_handlers_are_restored(drawn, warm, tmp_path):
    """Otherwise a process that has trained, and every process it forks, would ignore SIGTERM."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert command(*only_training(drawn), "--out", tmp_path / "out", *SMALL, "--iters", 1) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_only_condinst_needs_masks(drawn, warm, tmp_path, capsys):
    data = copy_set(drawn, tmp_path / "set", without_segmentation)
    for method in ("boxteacher", "boxinst"):
        options = ["--method", method, "--iters", 1, "--init", warm]
        assert command(*only_training(data), "--out", tmp_path / method, *SMALL, *options) == 0
    lines = losses_of(tmp_path / "boxteacher")
    options = ["--iters", 1, "--init", warm]
    assert command(*only_training(drawn), "--out", tmp_path / "with", *SMALL, *options) == 0
    assert losses_of(tmp_path / "with") == lines
    capsys.readouterr()
    options = ["--iters", 1, "--method", "condinst"]
    assert command(*only_training(data), "--out", tmp_path / "c", *SMALL, *options) == 1
    assert "no usable segmentation" in one_line_error(capsys) and not (tmp_path / "c").exists()


def test_an_undecodable_image_is_named_and_skipped(drawn, tmp_path, capsys):
    data = copy_set(drawn, tmp_path / "set")
    broken = data / "train2017/000000000005.jpg"
    os.truncate(broken, broken.stat().st_size // 2)
    assert command(*only_training(data), "--out", tmp_path / "out", *SMALL, "--iters", 6) == 0
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and str(broken) in warnings[0]
    assert "another image takes its place" in warnings[0]
    assert len(losses_of(tmp_path / "out")) == 6


def test_a_run_reads_images_as_its_options_say_and_goes_on_so(drawn, tmp_path, capsys):
    """An image over the limit is skipped; the options are kept, shown when they change, and in the next command."""
    data = copy_set(drawn, tmp_path / "set", lambda content: content["images"][4].update(width=65))
    large, exif = data / "train2017/000000000005.jpg", Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (65, 64)).save(large, exif=exif)
    run = [*only_training(data), "--out", tmp_path / "out", *SMALL, "--method", "boxinst"]
    options = ["--exif", "stored", "--max-pixels", 4096]
    assert command(*run, *options, "--iters", 3) == 0
    captured = capsys.readouterr()
    turned, limit, skipped = captured.err.splitlines()
    assert "1 of 12 images are turned or mirrored by EXIF" in turned and "taken stored" in turned
    assert "1 of 12 images have more than 4096 pixels" in limit and "raise --max-pixels" in limit
    assert str(large) in skipped and "another image takes its place" in skipped
    assert captured.out.splitlines()[-1].endswith("--exif stored --max-pixels 4096")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["exif"], config["max_pixels"]) == ("stored", 4096)
    assert command(*run, *options, "--iters", 4) == 0
    assert "changed since: iters 3 -> 4\n" in capsys.readouterr().out
    assert command(*run, "--max-pixels", 5000, "--iters", 5) == 0
    assert "exif stored -> None, max_pixels 4096 -> 5000" in capsys.readouterr().out


def test_too_many_undecodable_images_end_the_run(drawn, tmp_path, capsys):
    data = copy_set(drawn, tmp_path / "set")
    for broken in sorted((data / "train2017").iterdir())[1:]:
        os.truncate(broken, broken.stat().st_size // 2)
    assert command(*only_training(data), "--out", tmp_path / "out", *SMALL, "--iters", 8) == 1
    assert "error: 11 images cannot be decoded" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("method", LOSSES)
def test_images_and_batches_without_boxes_train_on(drawn, tmp_path, method):
    def change(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 3]

    data = copy_set(drawn, tmp_path / "set", change)
    assert command(*only_training(data), "--out", tmp_path / "out", *SMALL, "--method", method, "--iters", 6,
                   "--batch-size", 2) == 0
    lines = losses_of(tmp_path / "out")
    assert sorted(line["positives"] > 0 for line in lines) == [False] * 5 + [True]   # one epoch of 6 batches
    for line in lines:
        assert all(math.isfinite(value) for value in line.values()) and line["skipped_steps"] == 0
        if not line["positives"]:
            assert line["loss_cls"] > 0 and line["loss"] == pytest.approx(line["loss_cls"])


def test_bfloat16_is_close_to_float32(drawn, warm, tmp_path):
    for amp in ("off", "bf16"):
        # 96 pixels: on a CPU torch miscomputes the gradient of a strided bfloat16 convolution over a single
        # cell, which is what P6 of 64 pixels is
        options = ["--amp", amp, "--iters", 3, "--init", warm, "--lr", "1e-4",
                   "--min-size", 96, "--max-size", 96, "--teacher-min-size", 96, "--teacher-max-size", 96]
        assert command(*only_training(drawn), "--out", tmp_path / amp, *SMALL, *options) == 0
    for full, half in zip(losses_of(tmp_path / "off"), losses_of(tmp_path / "bf16")):
        assert half["loss"] != full["loss"] and half["loss"] == pytest.approx(full["loss"], rel=0.05)
        for name in LOSSES["boxinst"]:
            assert half[f"loss_{name}"] == pytest.approx(full[f"loss_{name}"], rel=0.1, abs=0.02), name


def no_images(content):
    content["images"], content["annotations"] = [], []


def no_boxes(content):
    content["annotations"] = []


def wrong_size(content):
    content["images"][3]["width"] = 65


def other_classes(content):
    content["categories"][0]["name"] = "blob"


def crowds(content):
    for row in content["annotations"]:
        row["iscrowd"] = 1


def text_area(content):
    content["annotations"][0]["area"] = "9"


@pytest.mark.parametrize("change, part", [
    (no_images, "instances_train2017.json has no images"), (no_boxes, "has no usable box"),
    (crowds, "are crowds"), (text_area, "'area'"),
    (wrong_size, "000000000004.jpg is 64 x 64 pixels"), (other_classes, "other categories")])
def test_bad_data_is_one_line_and_leaves_no_run_folder(drawn, tmp_path, capsys, change, part):
    data = copy_set(drawn, tmp_path / "set", change)
    assert command("--data", data, "--out", tmp_path / "out", *SMALL, "--iters", 2) == 1
    assert part in one_line_error(capsys) and not (tmp_path / "out").exists()


def test_missing_folder_as_a_user_sees_it(tmp_path):
    script = Path(train.__file__)
    answer = subprocess.run([sys.executable, script, "--data", "nowhere", "--out", "out"], cwd=tmp_path,
                            text=True, capture_output=True)
    assert answer.returncode == 1 and answer.stderr.count("\n") == 1 and answer.stdout == ""
    assert "nowhere/annotations/instances_train2017.json is missing" in answer.stderr
    assert "python data.py yolo DIR" in answer.stderr and list(tmp_path.iterdir()) == []


def test_backbone_weights_that_do_not_fit_are_one_line(drawn, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("missing", "text", "foreign", "list")}
    files["text"].write_text("no weights")
    torch.save({"conv1.weight": torch.zeros(3)}, files["foreign"])
    torch.save([1, 2], files["list"])
    for path in files.values():
        options = ["--backbone", "r18", "--backbone-weights", path, "--iters", 1]
        assert command(*only_training(drawn), "--out", tmp_path / "out", *SMALL, *options) == 1
        assert str(path) in one_line_error(capsys)


def test_an_unwritable_run_folder_is_one_line(drawn, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command(*only_training(drawn), "--out", tmp_path / "file/out", *SMALL, "--iters", 1) == 1
    assert "cannot write" in one_line_error(capsys)


# ---------------------------------------------------------------------------------------------- two processes

# Runs train.main for the options in a file, under torchrun, and compares the weights of the two processes after each.
# Each process works in a folder of its own, as on two machines that share none. In the last run the second process
# alone meets a loss that is not finite, then a signal to stop. All runs share one process group: torch hangs now and
# then where a group is started anew under the same torchrun.
DRIVER = """
import faulthandler, json, os, sys
import torch, torch.distributed as dist
import train

faulthandler.dump_traceback_later(120, exit=True)  # a process that waits for ever says where
torch.set_num_threads(1)
destroy, original, step, make = dist.destroy_process_group, train.Run.losses, train.train_step, train.make_run
group = train.start_distributed(torch.device("cpu"))
calls, runs = [], json.loads(open(sys.argv[1]).read())
os.makedirs(f"{sys.argv[2]}/{group[0]}", exist_ok=True)
os.chdir(f"{sys.argv[2]}/{group[0]}")

def make_run(*rest):
    train.last_run, choices = make(*rest)
    return train.last_run, choices

def losses(run, batch):
    result = original(run, batch)
    calls.append(None)
    if dist.get_rank() == 1 and len(calls) == 2:
        result.losses["loss_cls"] = result.losses["loss_cls"] * float("nan")
    return result

def train_step(run, batches, iteration, stop):
    return step(run, batches, iteration, dist.get_rank() == 1 and iteration == 3)

def compare():
    for model in (train.last_run.model, train.last_run.teacher):
        for name, value in (model.state_dict() if model else {}).items():
            if "num_batches" not in name:
                low, high = value.clone(), value.clone()
                dist.all_reduce(low, dist.ReduceOp.MIN)
                dist.all_reduce(high, dist.ReduceOp.MAX)
                assert torch.equal(low, high), f"{name} differs between the processes"

train.make_run, train.start_distributed, dist.destroy_process_group = make_run, lambda device: group, compare
for options, of_second, expected in runs:
    status = 0
    if expected == 143:
        train.Run.losses, train.train_step = losses, train_step
    try:
        train.main([str(word) for word in (*options, *(of_second if group[0] else []))])
    except SystemExit as end:
        status = end.code
    assert status == expected, (options, status)
assert train.last_run.iteration == 4
del train.last_run  # nothing that uses the group may outlive it
dist.barrier()
destroy()
"""


def torchrun(*argv, timeout: int = 300) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).parent)}
    return subprocess.run([*launch, *map(str, argv)], env=environment, text=True, capture_output=True,
                          timeout=timeout)


def largest_difference(one: list[dict], two: list[dict]) -> float:
    """The largest relative difference of a loss over all iterations."""
    assert len(one) == len(two) > 0
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        assert a["positives"] == b["positives"] and a["pseudo_masks"] == b["pseudo_masks"]
    return max(abs(a[name] - b[name]) / max(abs(a[name]), 1e-3)
               for a, b in zip(one, two) for name in a if name.startswith("loss"))


def test_two_processes_are_one_process_with_the_same_batch(drawn, warm, tmp_path):
    """From scratch (batch norm over both), resumed, with pseudo masks, and for all methods with no box on one, and on
    both. Where the two are told different things, both end before the first step."""
    def change(content):
        content["images"] = content["images"][:4]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 1]

    lone = copy_set(drawn, tmp_path / "lone", change)  # of two batches of two images one has boxes, in one image
    runs = {"scratch": [*only_training(drawn), *SMALL, "--iters", 5],
            "warm": [*only_training(drawn), *SMALL, "--iters", 5, "--init", warm,
                     "--accumulate", 2, "--batch-size", 8]}
    for method in LOSSES:
        runs[method] = [*only_training(lone), *SMALL, "--iters", 3, "--init", warm, "--method", method,
                        "--batch-size", 2]
    runs["refined"] = [*only_training(lone), *SMALL, "--iters", 3, "--init", warm, "--batch-size", 2, "--colors", "on",
                       "--fit-steps", 2]
    (tmp_path / "other.json").write_text((drawn / "annotations/instances_train2017.json").read_text() + " ")
    commands = [*runs.items(), ("scratch", [*runs["scratch"], "--iters", 7])]
    for name, options in commands:
        assert command(*options, "--out", tmp_path / "one" / name) == 0
    fresh = {"refined": ["--fresh"]}  # counts for process 0 alone
    lists = [[[*options, "--out", name], fresh.get(name, []), 0] for name, options in commands]
    lists += [[[*runs["scratch"], "--out", "bad"], different, 1]
              for different in (["--seed", 1], ["--train-json", tmp_path / "other.json"], ["--train-json", "missing"])]
    (tmp_path / "two/1/elsewhere").mkdir(parents=True)
    (tmp_path / "two/1/elsewhere/last.pt").touch()
    lists.append([[*runs["scratch"], "--out", "elsewhere"], [], 1])
    lists.append([[*runs["scratch"], "--out", "nan"], [], 143])
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "runs.json").write_text(json.dumps(lists, default=str))
    answer = torchrun(tmp_path / "driver.py", tmp_path / "runs.json", tmp_path / "two")
    assert answer.returncode == 0 and "Warning" not in answer.stderr, answer.stderr[-6000:]
    errors = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4 and all(map(operator.contains, errors, (
        "seed differs: 0 for process 0", "the content of the file to train on differs", "process 1: annotation file",
        "the run in elsewhere is that of process 1 on")))
    two_folder = tmp_path / "two/0"
    assert os.listdir(tmp_path / "two/1") == ["elsewhere"] and not (two_folder / "bad").exists()
    for name in runs:
        one, two = losses_of(tmp_path / "one" / name), losses_of(two_folder / name)
        difference = largest_difference(one, two)
        print(f"{name}: one and two processes differ by {difference:.2e} of a loss")
        assert difference < 1e-3, name
    assert losses_of(tmp_path / "one/warm")[0]["pseudo_masks"] > 0
    assert {line["boxes"] > 0 for line in losses_of(tmp_path / "one/boxinst")} == {True, False}
    assert (two_folder / "warm/labels-0000005.png").exists()
    assert [line["skipped_steps"] for line in losses_of(two_folder / "nan")] == [0, 1, 0, 0]
