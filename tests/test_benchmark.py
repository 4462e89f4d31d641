"""benchmark.py: that its figures hang together. How large they are is for a person to judge, never for a test."""
import json
import time

import pytest
import torch
from PIL import Image

import benchmark
from benchmark import Clock, knowing, made_up_data, medians
from model import detect
from test_label import random_picture


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


def test_medians_take_turns_and_leave_the_first_round_out(monkeypatch):
    order, clock = [], iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    found = medians(3, torch.device("cpu"), a=lambda: order.append("a"), b=lambda: [next(clock) for _ in range(9)])
    assert order == ["a"] * 4 and found == {"a": 1, "b": 10}


def test_knowing_finds_the_boxes():
    """What the network would have learnt: with it the detector finds every box that FCOS's targets give a location."""
    picture, boxes = random_picture(96, 128), torch.tensor([[16.0, 24, 72, 64], [80, 30, 110, 70]])
    found = detect(knowing(picture, [boxes], [torch.tensor([1, 2])]))
    assert found.labels.tolist() == [1, 2] or found.labels.tolist() == [2, 1]
    assert torch.allclose(found.boxes[found.labels.argsort()], boxes, atol=1e-3)


def test_made_up_data_are_a_data_set(tmp_path):
    annotations = made_up_data(tmp_path, 2, (96, 128), 5)
    assert len(annotations) == 2 and len(annotations.boxes) == 10 and annotations.size(0) == (96, 128)
    assert (annotations.boxes[:, 2:] <= torch.tensor([128, 96]).numpy() + 1e-3).all()


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark")
    benchmark.main(["--backbone", "r18", "--size", "64", "96", "--rounds", "1", "--instances", "3", "--device", "cpu",
                    "--json", str(out / "f.json"), "--growth", str(out / "g.png"), "--growth-instances", "2", "4",
                    "--growth-sizes", "64", "96", "--growth-batches", "1", "2"])
    return json.loads((out / "f.json").read_text()), out / "g.png"


def test_training_figures_hang_together(figures):
    of = figures[0]["training"]
    assert set(of["parts"]) == {"data wait", "teacher network", "labelling", "student network", "detection losses",
                                "mask head", "mask losses", "backward", "optimiser", "EMA", "rest"}
    assert all(value > 0 for value in of["parts"].values())
    assert of["in Y"] == pytest.approx(of["seconds"] / of["Y"]) and of["peak MiB"] > 50
    assert 0 < of["share of convolutions"] < 1 and of["TFLOP"] > 0
    assert of["fraction of the limit"] == pytest.approx(of["TFLOP"] / of["convolution TFLOP/s"] / of["seconds"])


def test_the_other_figures(figures):
    f, picture = figures
    assert f["inference"]["detections"] > 3 and f["evaluation"]["detections"] > 12
    assert sum(f["evaluation"]["parts"].values()) == pytest.approx(f["evaluation"]["seconds"], rel=0.05)
    assert set(f["data"]["milliseconds a picture"]) == {"decode and resize", "none", "weak", "strong", "strong-blur"}
    assert {name: [row["x"] for row in of["rows"]] for name, of in f["growth"].items()} == {
        "instances": [2, 4], "size": [64, 96], "batch_size": [1, 2]}
    assert Image.open(picture).size[0] > 900


def test_wrong_options_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(["--json", str(tmp_path)])
    assert end.value.code == 1 and "cannot write" in capsys.readouterr().err
