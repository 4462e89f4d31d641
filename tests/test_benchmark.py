"""benchmark.py, measuring.py, growth.py: that the figures hang together. How large they are is for a person to judge,
never for a test."""
import argparse
import json
import math
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import benchmark
from helpers import random_predictions
from tools import growth
import losses
from masks import box_masks
from benchmark import knowing
from formats.coco import CocoBoxes, DataError
from tools.measuring import Clock, made_up_data, many_annotations, medians, process_memory, tensor_peak
from model import detect


def test_parts_within_parts():
    """Each part has its own time; together they are the whole."""
    clock = Clock(torch.device("cpu"))
    now = iter([0.0, 1.0, 3.0, 4.0, 6.0, 10.0])
    clock.now = lambda: next(now)
    with clock.part("outer"):
        with clock.part("inner"):
            pass
        with clock.part("inner"):
            pass
    assert clock.seconds == {"outer": 6.0, "inner": 4.0}


def test_threads_have_parts_of_their_own():
    """What another thread does is no inner part of what this one has open, and its time is not taken from it."""
    clock = Clock(torch.device("cpu"))
    with clock.part("waiting"):
        def work():
            with clock.part("work"):
                time.sleep(0.02)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert clock.seconds["waiting"] >= clock.seconds["work"] >= 0.02


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


def test_knowing_finds_the_boxes():
    """What the network would have learnt: with it the detector finds every box that FCOS's targets give a location."""
    image, boxes = random_predictions(96, 128), torch.tensor([[16.0, 24, 72, 64], [80, 30, 110, 70]])
    found = detect(knowing(image, [boxes], [torch.tensor([1, 2])]))
    assert found.labels.tolist() == [1, 2] or found.labels.tolist() == [2, 1]
    assert torch.allclose(found.boxes[found.labels.argsort()], boxes, atol=1e-3)


def test_drawing_draws_an_ellipse_into_each_box(monkeypatch):
    image, box = random_predictions(96, 128), torch.tensor([[16.0, 24, 80, 64]])
    known = knowing(image, [box], [torch.tensor([1])])
    monkeypatch.setattr(benchmark.model, "mask_logits", lambda *_: torch.randn(2, 24, 32))
    clock = Clock(torch.device("cpu"))
    masks = benchmark.drawing(clock, "part")(known, [detect(known).locations.repeat(2)[:2]]) > 0
    assert (masks & ~box_masks(box, 24, 32)).sum() == 0 and (masks.sum((1, 2)) * 16 / (64 * 40)).tolist() == \
        pytest.approx([math.pi / 4] * 2, abs=0.02)
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


def test_the_dense_loss_on_pairs_is_the_same_one(tmp_path):
    args = argparse.Namespace(device=torch.device("cpu"))
    figures = benchmark.measure_mask_memory(args, tmp_path, (96, 128), 8)
    assert figures["values"]["ours"] == pytest.approx(figures["values"]["dense"], rel=1e-5)
    assert figures["share"] == figures["MiB"]["ours"] / figures["MiB"]["dense"] < 1 / 3
    similar = benchmark.dense_similarity(image := torch.rand(1, 3, 64, 64) * 255)
    for place, offset, colors in zip((4, 6, 7, 5), losses.OFFSETS, losses.similar_colors(image)):
        assert torch.equal(losses.pair(similar[:, place], offset)[0].bool(), colors)      # (0, 2), (2, 0), (2, 2), ...


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark")
    benchmark.main(["--backbone", "r18", "--size", "64", "96", "--rounds", "1", "--instances", "3", "--device", "cpu",
                    "--annotated", "700", "--json", str(out / "f.json"),
                    "--only", "training", "inference", "evaluation", "data", "annotations"])
    return json.loads((out / "f.json").read_text())


def test_training_figures_hang_together(figures):
    of = figures["training"]
    assert set(of["parts"]) == {"data wait", "teacher network", "labelling", "student network", "detection losses",
                                "mask head", "mask losses", "backward", "optimiser", "EMA", "rest"}
    assert all(value > 0 for value in of["parts"].values())
    assert of["in Y"] == pytest.approx(of["seconds"] / of["Y"]) and of["peak MiB"] > 50
    assert 0 < of["share of convolutions"] == 1 - of["share outside the convolutions"] < 1 and of["TFLOP"] > 0
    assert of["fraction of the limit"] == pytest.approx(of["TFLOP"] / of["convolution TFLOP/s"] / of["seconds"])


def test_the_other_figures(figures):
    f = figures
    assert f["inference"]["detections"] > 3 and f["evaluation"]["detections"] > 12
    pasted = f["inference"]["seconds of pasting into an image of"]
    assert list(pasted) == ["32 x 48", "64 x 96", "128 x 192", "256 x 384"]
    # parts that overlap are more than the whole
    assert sum(f["evaluation"]["parts"].values()) > 0.95 * f["evaluation"]["seconds"]
    assert len(f["data"]) == 6
    for title, values in f["data"].items():
        assert set(values) == {"bare", "none", "weak", "strong", "strong-blur"}, title
    assert f["annotations"]["images"] == 700 and f["annotations"]["boxes"] == 4900
    for workers, own in ((0, 0), (2, 2), (4, 2)):
        assert len(f["annotations"][f"MiB with {workers} workers"]) == 2 + own


# --------------------------------------------------------------------------------------------------- growth


def options(**changed) -> argparse.Namespace:
    args = benchmark.parse_arguments(["--backbone", "r18", "--size", "64", "96", "--rounds", "1", "--instances", "3",
                                      "--device", "cpu", "--batch-size", "1"])
    return argparse.Namespace(**vars(args) | changed)


def test_a_point_of_a_curve_is_a_run_of_its_own():
    one, two = (growth.step(options(), processes=n) for n in (1, 2))
    assert two["images a second"] == pytest.approx(2 / two["seconds"])
    assert one["images a second"] == pytest.approx(1 / one["seconds"]) and one["peak MiB"] > 10
    with pytest.raises(DataError, match="invalid choice: 'r7'"):
        growth.step(options(backbone="r7"))


def test_growth(monkeypatch, tmp_path, capsys):
    """Every curve changes its own option alone, and has the exponent of what was measured."""
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
    found = growth.measure_growth(options(growth_instances=[2, 4, 16], growth_sizes=[64, 96], growth_batches=[1, 2]))
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
