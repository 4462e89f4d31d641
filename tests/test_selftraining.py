"""tools/selftraining.py: its two stages; and the quality of masks, measured in training. The masks: test_label.py."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from helpers import SMALL, copy_set, finding, losses_of, one_line_error, only_training
from tools import selftraining
import train
from masks import box_masks
from formats.checkpoint import load
from formats.coco import CocoBoxes
from model import CondInst
from teacher import PseudoLabels
from tools.quality import mask_quality


@pytest.fixture
def found(drawn, monkeypatch):
    """found(): from now on a network finds the boxes of four images but the first of each; returns their number."""
    annotations = CocoBoxes(drawn / "annotations/instances_train2017.json", drawn / "train2017")

    def plant() -> int:
        monkeypatch.setattr(CondInst, "forward", finding(annotations))
        return int(annotations.offsets[4]) - 4
    return plant


def test_both_stages_from_the_command_line(drawn, warm, found, tmp_path, capsys, monkeypatch):
    """The file keeps everything but its masks, and stage two learns from it."""
    expected = found()
    source = json.loads((drawn / "annotations/instances_train2017.json").read_text())
    source["info"] = {"note": "kept"}
    source["annotations"][0]["colour"] = "kept too"
    source["annotations"].insert(1, dict(source["annotations"][0], id=10 ** 6, iscrowd=1))
    (tmp_path / "boxes.json").write_text(json.dumps(source))
    images, out = str(drawn / "train2017"), tmp_path / "new" / "labels.json"
    options = ["--train-json", str(tmp_path / "boxes.json"), "--train-images", images, "--workers", "0"]
    selftraining.main(["--ckpt", str(warm), "--out", str(out), *options, "--device", "cpu"])
    labels = json.loads(out.read_text())
    own = {"segmentation", "area", "score", "source"}
    for old, new in zip(source["annotations"], labels["annotations"], strict=True):
        assert {k: v for k, v in old.items() if k not in own} == {k: v for k, v in new.items() if k not in own}
        if old.get("iscrowd"):
            assert old == new
        else:
            given = bool(new["segmentation"])
            assert new["area"] == (coco_mask.area(new["segmentation"]) if given else old["area"])
            assert given == (new["score"] > 0) == (new["source"] == "assigned")
    assert {k: v for k, v in labels.items() if k != "annotations"} == {
        k: v for k, v in source.items() if k != "annotations"}
    given = sum(row.get("score", 0) > 0 for row in labels["annotations"])
    assert given == expected
    assert f"{given} of {len(labels['annotations']) - 1} boxes have a mask" in capsys.readouterr().out
    annotations = CocoBoxes(out, images, masks=True)
    for i, row in enumerate(annotations.rows.tolist()):  # each mask lies in its own box
        if labels["annotations"][row]["segmentation"]:
            x, y, w, h = labels["annotations"][row]["bbox"]
            bx, by, bw, bh = coco_mask.toBbox(labels["annotations"][row]["segmentation"])
            assert bx >= int(x) and by >= int(y) and bx + bw < x + w + 1 and by + bh < y + h + 1, i

    monkeypatch.undo()
    train.main(["--train-json", str(out), "--train-images", images, "--out", str(tmp_path / "run"), *SMALL,
                "--iters", "2", "--method", "condinst"])
    assert all(math.isfinite(line["loss_mask"]) for line in losses_of(tmp_path / "run"))


def test_measure_and_sheet_from_the_command_line(drawn, warm, found, tmp_path, capsys):
    out, sheet = tmp_path / "labels.json", tmp_path / "images" / "sheet.png"
    command = ["--ckpt", str(warm), "--out", str(out), *map(str, only_training(drawn)), "--workers", "0",
               "--device", "cpu"]
    expected = found()
    selftraining.main([*command, "--measure", "--sheet", str(sheet)])
    shown = capsys.readouterr().out
    assert f": {expected} of " in shown and "boxes have a mask\nmean IoU with the masks that the file has\n" in shown
    assert f"sheet: {sheet}" in shown
    image = np.asarray(Image.open(sheet))
    assert 4 * 320 < image.shape[0] < 5 * 320 and image.std() > 20  # of the images with masks

    content = json.loads((drawn / "annotations/instances_train2017.json").read_text())
    for row in content["annotations"]:
        del row["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    command[command.index("--train-json") + 1] = str(tmp_path / "boxes.json")
    found()
    selftraining.main([*command, "--sheet", str(sheet)])  # no old masks: no panels of them, the others as before
    alone = np.asarray(Image.open(sheet))
    assert alone.shape[0] == image.shape[0] and alone.shape[1] == image.shape[1] - 326
    assert (alone[40:] == image[40:, :alone.shape[1]]).all()
    out.unlink()
    with pytest.raises(SystemExit):
        selftraining.main([*command, "--measure"])
    assert not out.exists()


def test_old_masks_that_are_drawn_are_checked_before_the_work(drawn, warm, tmp_path, capsys):
    path = copy_set(drawn, tmp_path / "set", lambda content: content["annotations"][0].update(
        segmentation=[[1, 1, 5, 5]])) / "annotations/instances_train2017.json"
    with pytest.raises(SystemExit):
        selftraining.main(["--ckpt", str(warm), "--out", str(tmp_path / "labels.json"), "--train-json", str(path),
                           "--train-images", str(drawn / "train2017"), "--sheet", str(tmp_path / "sheet.png")])
    assert f"{path}: 1 of " in one_line_error(capsys) and not (tmp_path / "labels.json").exists()


def test_wrong_files_are_one_line(drawn, warm, tmp_path, capsys):
    data = [str(x) for x in only_training(drawn)]
    for arguments, part in ((["--ckpt", str(tmp_path / "no.pt"), "--out", str(tmp_path / "a.json"), *data], "no.pt"),
                            (["--ckpt", str(warm), "--out", str(tmp_path), *data], "cannot write")):
        with pytest.raises(SystemExit) as end:
            selftraining.main(arguments)
        assert end.value.code == 1 and part in one_line_error(capsys)


# ------------------------------------------------------------------------------- how good masks are, in training


def test_quality_by_hand():
    """Three boxes: one has a label and an instance of the student, one has no label, one has no instance."""
    boxes = torch.tensor([[0.0, 0, 32, 32], [0, 32, 32, 64], [32, 0, 64, 32]])
    truth = box_masks(boxes, 16, 16)
    truth[0, :, 4:] = False                          # the left half of box 0: 8 x 4 cells of 8 x 8
    logits = torch.full((3, 16, 16), 5.0)            # instances say "everywhere": cut to the box, IoU 1/2 of box 0
    logits[1, :, 2:] = -5                            # its second: 2 of 4 columns, IoU 1/2
    logits[2] = -5                                   # nothing of box 1
    pseudo = PseudoLabels(truth[[2, 0]].float() * 0.9, torch.tensor([2, 0]), torch.tensor([0.5, 0.0, 0.7]))
    pseudo.masks[0, :4] = 0.2                        # half of box 2
    quality = mask_quality(logits, torch.tensor([0, 0, 1]), truth, boxes, pseudo)
    assert {name: float(x) for name, x in quality.items()} == {
        "student_iou": 0.5, "student_boxes": 1, "label_iou": 1.5}
    alone = mask_quality(logits, torch.tensor([0, 0, 1]), truth, boxes, None)
    assert {name: float(x) for name, x in alone.items()} == {"student_iou": 0.5, "student_boxes": 2}


def test_measuring_changes_nothing_else(drawn, warm, tmp_path):
    """Losses and weights stay the same; the quality is in the log and between 0 and 1."""
    for name, more in (("plain", []), ("measured", ["--measure-labels"])):
        train.main([str(x) for x in (*only_training(drawn), "--out", tmp_path / name, *SMALL, "--iters", 2, "--init",
                                     warm, *more)])
    plain, measured = losses_of(tmp_path / "plain"), losses_of(tmp_path / "measured")
    for one, two in zip(plain, measured, strict=True):
        assert one.items() <= two.items() and set(two) - set(one) == {"label_iou", "student_iou", "student_boxes"}
        assert 0.2 < two["label_iou"] <= 1 and 0.2 < two["student_iou"] <= 1
        assert 0 < two["pseudo_masks"] <= two["boxes"] and two["student_boxes"] <= two["pseudo_masks"]
    a, b = (load(tmp_path / name / "final.pt") for name in ("plain", "measured"))
    assert all(torch.equal(x, b["student"][name]) for name, x in a["student"].items())
