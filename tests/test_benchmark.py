"""benchmark.py, tools/measuring.py and tools/growth.py: that the figures fit together. Whether they are good is for a
person to judge, never for a test."""
import json
import math
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import benchmark
import boxteacher
import losses
from benchmark import with_planted_boxes, with_planted_masks
from formats.coco import CocoBoxes
from formats.files import UserError
from helpers import random_predictions
from masks import box_masks
from model import build_model, detect
from tools import growth, measuring
from tools.measuring import (Clock, imported_functions, made_up_data, many_annotations, measure_labels, medians,
                             process_memory, tensor_peak)


def test_parts_within_parts():
    """A part does not contain the time of its inner parts; together they are the whole."""
    clock = Clock(torch.device("cpu"))
    now = iter([0.0, 1.0, 3.0, 4.0, 6.0, 10.0])
    clock.now = lambda: next(now)
    with clock.part("outer"):
        with clock.part("inner"):
            pass
        with clock.part("inner"):
            pass
    assert clock.seconds == {"outer": 6.0, "inner": 4.0}


def test_watched_functions_are_timed_wherever_they_are_called_and_must_exist():
    clock, module = Clock(torch.device("cpu")), types.ModuleType("module")
    module.double = lambda x: 2 * x
    with clock.watching({(module, "double"): "doubling"}):
        assert module.double(3) == 6
    assert list(clock.seconds) == ["doubling"]
    with pytest.raises(AttributeError, match="halve"), clock.watching({(module, "halve"): "halving"}):
        pass


def test_imported_functions_are_those_of_the_projects_other_files():
    found = imported_functions(boxteacher)
    assert found[boxteacher, "detection_losses"] == "losses.py" and set(found.values()) >= {"assign.py", "teacher.py"}
    names = {name for _, name in found}
    assert not names & {"total_loss", "CondInst", "torch"}       # its own, a class, a module


def test_tensors_are_counted_at_their_most():
    def work():
        a = torch.ones(2 ** 18)                     # 1 MiB
        b = torch.cat([a, a])                       # 2 more; then 1 is freed
        del a
        return b.sum()
    assert tensor_peak(work, torch.device("cpu")) == pytest.approx(3, abs=0.01)


def test_medians_take_turns_and_leave_the_first_round_out(monkeypatch):
    order, clock = [], iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    found = medians(3, torch.device("cpu"), a=lambda: order.append("a"), b=lambda: [next(clock) for _ in range(9)])
    assert order == ["a"] * 4 and found == {"a": 1, "b": 10}


def test_planted_boxes_are_found():
    """As if they had been learnt: the detector finds every box that has a location among FCOS's targets."""
    image, boxes = random_predictions(96, 128), torch.tensor([[16.0, 24, 72, 64], [80, 30, 110, 70]])
    found = detect(with_planted_boxes(image, [boxes], [torch.tensor([1, 2])]))
    assert found.labels.tolist() == [1, 2] or found.labels.tolist() == [2, 1]
    assert torch.allclose(found.boxes[found.labels.argsort()], boxes, atol=1e-3)


def test_a_planted_mask_is_an_ellipse_in_its_box():
    image, box = random_predictions(96, 128), torch.tensor([[16.0, 24, 80, 64]])
    planted, clock = with_planted_boxes(image, [box], [torch.tensor([1])]), Clock(torch.device("cpu"))
    mask_logits = with_planted_masks(lambda *_: torch.randn(2, 24, 32), clock, "part")
    masks = mask_logits(planted, [detect(planted).locations.repeat(2)[:2]]) > 0
    assert (masks & ~box_masks(box, 24, 32)).sum() == 0
    assert (masks.sum((1, 2)) * 16 / (64 * 40)).tolist() == pytest.approx([math.pi / 4] * 2, abs=0.02)
    assert list(clock.seconds) == ["part"]


def test_made_up_data_are_a_data_set(tmp_path):
    annotations = made_up_data(tmp_path, 2, (96, 128), 5)
    assert len(annotations) == 2 and len(annotations.boxes) == 10 and annotations.size(0) == (96, 128)
    assert (annotations.boxes[:, 2:] <= torch.tensor([128, 96]).numpy() + 1e-3).all()


def test_many_annotations_are_a_data_set(tmp_path):
    annotations = CocoBoxes(many_annotations(tmp_path, 5, 3), tmp_path)
    assert len(annotations) == 5 and annotations.offsets.tolist() == [0, 3, 6, 9, 12, 15]
    assert annotations.boxes[1].tolist() == [1.25, 1.5, 11.75, 11]


def test_memory_of_a_process_is_its_own_and_its_part_of_the_shared():
    memory = process_memory()
    assert 50 < memory["private"] <= memory["proportional"]


# -------------------------------------------------------------------- the loss on pairs of cells beside its dense form


def neighbours(x: torch.Tensor) -> torch.Tensor:
    """(N, h, w) -> (N, 8, h, w): the 8 cells at distance 2, 0 outside the map."""
    around = F.unfold(x[:, None], 3, padding=2, dilation=2).unflatten(1, (9, 1)).unflatten(3, x.shape[1:])[:, :, 0]
    return torch.cat([around[:, :4], around[:, 5:]], 1)


def dense_pair_loss(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """BoxInst's pairwise loss on all 8 neighbours at once. logits (K, h, w), weights (K, 8, h, w)."""
    yes, no = F.logsigmoid(logits), F.logsigmoid(-logits)
    both_yes, both_no = yes[:, None] + neighbours(yes), no[:, None] + neighbours(no)
    return -(torch.logaddexp(both_yes, both_no) * weights).sum() / weights.sum()


def test_four_offsets_are_the_eight_neighbours_in_a_third_of_the_memory():
    torch.manual_seed(0)
    h, w = 24, 32
    inside, values = torch.zeros(2, h, w, dtype=torch.bool), {}
    inside[0, 4:16, 2:20] = inside[1, 0:12, 10:32] = True
    image, box, valid = torch.arange(2), torch.arange(8) % 2, torch.ones(2, h, w, dtype=torch.bool)
    logits = torch.randn(8, h, w, requires_grad=True)

    def ours():
        every_pair = [torch.ones_like(losses.pair(inside, offset)[0]) for offset in losses.OFFSETS]
        weights = losses.pair_weights(every_pair, losses.MaskGrid(inside, valid, image))
        total, count = losses.weighted_pairs(losses.disagreement(logits), weights, box)
        values["ours"] = total.sum() / count.sum()
        values["ours"].backward()

    def dense():
        values["dense"] = dense_pair_loss(logits, inside[box][:, None] * neighbours(torch.ones(8, h, w)))
        values["dense"].backward()

    mib = {}
    for work in (ours, dense):
        logits.grad = None
        mib[work] = tensor_peak(work, torch.device("cpu"))
    assert values["ours"].item() == pytest.approx(values["dense"].item(), rel=1e-5)
    assert mib[ours] < mib[dense] / 3
    args = types.SimpleNamespace(device=torch.device("cpu"))
    assert benchmark.measure_mask_memory(args, (4 * h, 4 * w), 8)["peak MiB"] == pytest.approx(mib[ours], rel=0.1)


# ------------------------------------------------------------------------------------------------- the figures


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark")
    benchmark.main(["--backbone", "r18", "--size", "64", "96", "--rounds", "1", "--instances", "3", "--device", "cpu",
                    "--annotated", "700", "--json", str(out / "f.json"),
                    "--only", "training", "inference", "evaluation", "data", "annotations"])
    return json.loads((out / "f.json").read_text())


def test_training_figures_hang_together(figures):
    of = figures["training"]
    assert set(of["parts"]) == {"data wait", "teacher network", "student network", "backward", "optimiser", "EMA",
                                "rest", *imported_functions(boxteacher).values()}
    assert all(value > 0 for value in of["parts"].values())
    assert of["in Y"] == pytest.approx(of["seconds"] / of["Y"]) and of["peak MiB"] > 50
    assert 0 < of["share of convolutions"] == 1 - of["share outside the convolutions"] < 1 and of["TFLOP"] > 0
    assert of["fraction of the limit"] == pytest.approx(of["TFLOP"] / of["convolution TFLOP/s"] / of["seconds"])


def test_the_other_figures(figures):
    f, parts = figures, {"network", "detections", "mask head", "pasting", "run lengths"}
    assert f["inference"]["detections"] > 3 and f["evaluation"]["detections"] > 12
    assert set(f["inference"]["parts"]) == parts | {"rest"}
    assert set(f["evaluation"]["parts"]) == parts | {"made-up masks", "loading and the rest", "COCOeval"}
    pasted = f["inference"]["seconds of pasting into an image of"]
    assert list(pasted) == ["32 x 48", "64 x 96", "128 x 192", "256 x 384"]
    assert sum(f["evaluation"]["parts"].values()) == pytest.approx(f["evaluation"]["seconds"], rel=0.05)
    assert len(f["data"]) == 6
    for title, values in f["data"].items():
        assert set(values) == {"bare", "none", "weak", "strong", "strong-blur"}, title
    assert f["annotations"]["images"] == 700 and f["annotations"]["boxes"] == 4900
    for workers, own in ((0, 0), (2, 2), (4, 2)):
        assert len(f["annotations"][f"MiB with {workers} workers"]) == 2 + own


# --------------------------------------------------------------------------------------------------- growth


OPTIONS = {"backbone": "r18", "size": [64, 96], "teacher_size": None, "batch_size": 1, "instances": 3, "amp": "auto",
           "workers": 0, "rounds": 1, "device": "cpu", "compile": False}


def test_a_point_of_a_curve_is_a_run_of_its_own():
    one, two = (growth.measure_point(**OPTIONS, processes=n) for n in (1, 2))
    assert two["images a second"] == pytest.approx(2 / two["seconds"])
    assert one["images a second"] == pytest.approx(1 / one["seconds"]) and one["peak MiB"] > 10
    with pytest.raises(UserError, match="invalid choice: 'r7'"):
        growth.measure_point(**OPTIONS | {"backbone": "r7"})


def test_growth(monkeypatch, tmp_path, capsys):
    """A curve changes one option only, and has the exponent of what was measured."""
    def run(command, **how):
        value = {name: command[command.index("--" + name) + 1] for name in ("instances", "size", "batch-size", "json")}
        processes = [word for word in command if word.startswith("--nproc")]
        threads = "OMP_NUM_THREADS" in how["env"] and how["env"]["OMP_NUM_THREADS"] == "1"
        seen.append((int(value["instances"]), int(value["size"]), int(value["batch-size"]), processes))
        assert not processes or threads
        step = {"seconds": int(value["size"]) ** 2 / 1000, "images a second": 1.0,
                "peak MiB": 5.0 * int(value["instances"])}
        Path(value["json"]).write_text(json.dumps({"step": step}))
        return subprocess.CompletedProcess(command, 0)

    seen = []
    monkeypatch.setattr(subprocess, "run", run)
    found = growth.measure_growth(OPTIONS, instances=[2, 4, 16], sizes=[64, 96], batches=[1, 2])
    assert seen == [(2, 64, 1, []), (4, 64, 1, []), (16, 64, 1, []), (3, 64, 1, []), (3, 96, 1, []), (3, 64, 1, []),
                    (3, 64, 2, []), (3, 64, 1, ["--nproc_per_node=1"]), (3, 64, 1, ["--nproc_per_node=2"])]
    assert {name: [row["x"] for row in curve["rows"]] for name, curve in found.items()} == {
        "instances": [2, 4, 16], "shorter side": [64, 96], "batch": [1, 2], "processes": [1, 2]}
    assert found["shorter side"]["exponents"]["seconds"] == pytest.approx(2)
    assert found["instances"]["exponents"] == pytest.approx({"seconds": 0, "peak MiB": 1}, abs=1e-9)
    growth.draw_growth(found, str(tmp_path / "g.png"))
    assert Image.open(tmp_path / "g.png").size[0] > 1200
    growth.show_growth(found)
    assert "shorter side: seconds ~ x ^ 2.00" in capsys.readouterr().out


def test_wrong_options_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(["--json", str(tmp_path)])
    assert end.value.code == 1 and "cannot write" in capsys.readouterr().err


def test_labels_are_measured_for_each_number_of_boxes(tmp_path):
    network = build_model("r18-slim", 80, channels=32, frozen=False).eval()
    figures = measure_labels(tmp_path, network, (64, 96), 1, torch.device("cpu"), counts=(1, 3))
    assert set(figures["seconds"]) == {"network", *(f"{n} boxes, {how} a network" for n in (1, 3)
                                                    for how in ("with", "without"))}
    for how in ("with", "without"):
        seconds = figures["seconds"][f"3 boxes, {how} a network"]
        assert figures[f"milliseconds a box, {how} a network"]["3"] == pytest.approx(1000 * seconds / 3)
    assert all(mib > 0 for mib in figures["peak MiB for 3 boxes"].values())


def test_the_file_of_a_model_is_timed_with_as_many_threads_as_the_program(monkeypatch):
    """With stand-ins for the files, which take a minute to make (tests/test_export.py)."""
    options, runs = types.SimpleNamespace(), []
    session = types.SimpleNamespace(run=lambda names, inputs: runs.append(inputs["images"].shape))
    runtime = types.SimpleNamespace(SessionOptions=lambda: options, InferenceSession=lambda *given: session)
    for package in ("onnxruntime", "onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, runtime)
    monkeypatch.setattr(torch.export, "load", lambda file: types.SimpleNamespace(
        module=lambda: lambda images: runs.append(len(file.getvalue()))))
    for name, content in (("traced", None), ("as_onnx", bytes(2 * 10 ** 6)), ("as_pt2", bytes(3 * 10 ** 6))):
        monkeypatch.setattr(measuring, name, lambda *given, content=content: content)
    figures = measuring.measure_export("r18-slim", (60, 90), 2)
    assert runs == [3 * 10 ** 6, (1, 3, 64, 96)] * 3 and options.intra_op_num_threads == torch.get_num_threads()
    assert list(figures["seconds"]) == ["program", "pt2", "onnxruntime"] and min(figures["seconds"].values()) >= 0
    assert figures["MB"]["onnx"] == 2 and figures["MB"]["pt2"] == 3 and figures["MB"]["weights"] > 10


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_package_that_export_lacks_is_named_before_the_work(package, monkeypatch):
    monkeypatch.setattr(measuring, "traced", None)
    for present in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, present, None if present == package else sys)
    with pytest.raises(UserError, match=f"pip install {package}$"):
        measuring.measure_export("r18-slim", (60, 90), 1)
