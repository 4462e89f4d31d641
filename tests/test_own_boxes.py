"""From one's own boxes to masks: the commands of README.md and docs/own-boxes.md, run as printed."""
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest
from PIL import Image

import predict
import train
from formats import commands
from formats.coco import CocoBoxes
from helpers import TINY

PROJECT = Path(__file__).resolve().parent.parent
PROGRAMS = {"data.py": commands, "train.py": train, "predict.py": predict}
SHORTER = {"train.py": [*TINY, "--iters", "3", "--eval-every", "2"], "predict.py": ["--workers", "0"]}


def block(page: str, start: str) -> list[str]:
    """The lines of the code block of a page that begins with `start`."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (PROJECT / page).read_text(), re.DOTALL | re.MULTILINE)
    return next(block for block in blocks if block.startswith(start)).splitlines()


FIVE = block("README.md", "python predict.py --boxes my-images")
CONVERT = block("docs/own-boxes.md", "python data.py voc my-images")


def as_voc(boxes: CocoBoxes, folder: Path) -> None:
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    for i in range(len(boxes)):
        stem = f"bild {i:02} ü"
        Image.open(boxes.path(i)).convert("RGB").save(folder / "JPEGImages" / f"{stem}.jpg")
        objects = "".join(
            f"<object><name>{escape(boxes.classes[label]['name'])}</name><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}"
            f"</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for (x0, y0, x1, y1), label in zip(boxes.image_boxes(i)[0].tolist(), boxes.image_boxes(i)[1].tolist()))
        (folder / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><filename>{stem}.jpg</filename><size><width>64</width><height>64</height></size>{objects}"
            "</annotation>", encoding="utf-8")


def as_yolo(boxes: CocoBoxes, folder: Path) -> None:
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for i in range(len(boxes)):
        Image.open(boxes.path(i)).convert("RGB").save(folder / "images" / f"{i:02}.png")
        (folder / "labels" / f"{i:02}.txt").write_text("".join(
            f"{label} {(x0 + x1) / 128:.6f} {(y0 + y1) / 128:.6f} {(x1 - x0) / 64:.6f} {(y1 - y0) / 64:.6f}\n"
            for (x0, y0, x1, y1), label in zip(boxes.image_boxes(i)[0].tolist(), boxes.image_boxes(i)[1].tolist())))
    (folder / "classes.txt").write_text("".join(c["name"] + "\n" for c in boxes.classes))


def run(command: str) -> None:
    """A line of a page in this process, with the options of SHORTER after its own."""
    python, program, *options = shlex.split(command, comments=True)
    assert python == "python"
    try:
        PROGRAMS[program].main([*options, *SHORTER.get(program, [])])
    except SystemExit as end:
        assert not end.code, end.code


@pytest.mark.parametrize("make, convert", [(as_voc, CONVERT[0]), (as_yolo, CONVERT[1])], ids=["voc", "yolo"])
def test_five_commands(make, convert, drawn, tmp_path, monkeypatch, capfd):
    boxes = CocoBoxes(drawn / "annotations/instances_train2017.json", drawn / "train2017")
    make(boxes, tmp_path / "my-images")
    monkeypatch.chdir(tmp_path)
    run(convert)
    content = json.loads((tmp_path / "my-images/annotations/instances_train2017.json").read_text())
    again = [row["bbox"] for row in content["annotations"]]
    x0, y0, x1, y1 = boxes.boxes.T.astype(float)
    assert np.array(again) == pytest.approx(np.stack([x0, y0, x1 - x0, y1 - y0], 1), abs=1e-3)

    at_once, check, train_line, label, review = FIVE
    run(at_once)
    first = json.loads((tmp_path / "first-masks/masks.json").read_text())["annotations"]
    assert len(first) == len(boxes.boxes) and all(row["source"] == "colours" for row in first)
    run(check)
    capfd.readouterr()
    run(train_line)
    assert len(list((tmp_path / "runs/mine").glob("labels-*.png"))) == 2
    run(label)
    labelled = json.loads((tmp_path / "my-masks/masks.json").read_text())
    assert len(labelled["annotations"]) == len(boxes.boxes) and all(r["segmentation"] for r in labelled["annotations"])
    assert len(list((tmp_path / "my-masks/pictures").rglob("*.jpg"))) == len(boxes)
    capfd.readouterr()
    subprocess.run(review, shell=True, check=True, env=os.environ | {"BROWSER": "echo opened %s"})
    opened = re.search(r"opened file://(\S+)", capfd.readouterr().out)[1]
    assert Path(opened) == tmp_path / "my-masks/review.html" and Path(opened).exists()


def test_the_readmes_program(drawn, warm, tmp_path, monkeypatch, capsys):
    code = block("README.md", "from model import load")
    assert len(code) == 4
    photo = min((drawn / "val2017").iterdir())
    copies = {"runs/demo/final.pt": warm, "datasets/food/val2017/0001.jpg": photo}
    for name, file in copies.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    exec("\n".join(code), {})
    assert "torch.Size([" in capsys.readouterr().out
