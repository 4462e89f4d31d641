"""Real images: masks from boxes alone are better than any simple shape in the box; the embedded set is sound."""
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

import predict
import train
from formats import check
from formats.coco import CocoBoxes, datasets
from helpers import real_images
from tools.batches import open_data
from tools.compare import read_masks
from tools.label import agreement

FOOD = real_images("food")


# ------------------------------------------------------------------------------------------ masks without training


def some_images(root: Path, count: int, folder: Path) -> tuple[Path, Path]:
    """The files of `count` images to evaluate on, evenly spaced: with their true masks, and with boxes alone."""
    content = json.loads((root / "annotations/instances_val2017.json").read_text())
    images = content["images"]
    content["images"] = [images[i] for i in np.linspace(0, len(images) - 1, count).round().astype(int).tolist()]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    truth, boxes = folder / "truth.json", folder / "boxes.json"
    truth.write_text(json.dumps(content))
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    boxes.write_text(json.dumps(content))
    return truth, boxes


def ellipses(annotations: CocoBoxes) -> list[dict]:
    """The largest ellipse in each box."""
    rles = []
    for i in range(len(annotations)):
        height, width = annotations.size(i)
        y, x = np.mgrid[:height, :width] + 0.5
        for x0, y0, x1, y1 in annotations.image_boxes(i)[0].tolist():
            inside = ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1
            rles.append(coco_mask.encode(np.asfortranarray(inside, np.uint8)))
    return rles


@pytest.mark.parametrize("name, count, lead", [("food", 12, 0.05), ("teacher", 12, 0.05), ("nuclei", 6, 0.05),
                                               ("coco-mini", 12, 0.02)])
def test_masks_without_training_beat_the_filled_box_and_the_ellipse_in_it(name, count, lead, tmp_path):
    """By `lead` in mean IoU, about half of what it is."""
    root = real_images(name)
    truth_file, boxes_file = some_images(root, count, tmp_path)
    predict.main([str(x) for x in ("--boxes", boxes_file, "--images", root / "val2017", "--out", tmp_path,
                                   "--workers", 0)])
    truth = CocoBoxes(truth_file, root / "val2017", masks=True)
    masks = [annotation["segmentation"] for annotation in read_masks(tmp_path / "masks.json", truth)]
    ours, filled = agreement(truth, masks)
    ellipse, _ = agreement(truth, ellipses(truth))
    assert ours.mean() > max(filled.mean(), ellipse.mean()) + lead


# ----------------------------------------------------------------------------------------------- the embedded set


@pytest.fixture
def in_project(monkeypatch):
    monkeypatch.chdir(FOOD.parents[1])


def test_the_embedded_set_has_nothing_to_complain_of(in_project, capsys):
    assert not check.check(["food"])
    assert capsys.readouterr().out.splitlines() == [
        f"datasets/food/annotations/instances_{split}2017.json: {images} images, {boxes} boxes, 6 classes"
        for split, images, boxes in (("train", 90, 482), ("val", 24, 140))]
    assert sum(path.stat().st_size for path in FOOD.rglob("*")) < 4e6
    assert "MIT License" in (FOOD / "README.md").read_text()


def test_a_box_of_the_embedded_set_is_the_smallest_around_its_mask(in_project):
    for json_path, _ in datasets("food"):
        for annotation in json.loads(Path(json_path).read_text())["annotations"]:
            assert coco_mask.toBbox(annotation["segmentation"]).tolist() == annotation["bbox"]
            assert coco_mask.area(annotation["segmentation"]) == annotation["area"] > 0


def test_no_photograph_is_in_both_parts():
    digests = [{hashlib.sha256(path.read_bytes()).digest() for path in (FOOD / f"{split}2017").iterdir()}
               for split in ("train", "val")]
    assert list(map(len, digests)) == [90, 24] and not digests[0] & digests[1]


def test_the_embedded_set_is_found_by_its_name(in_project):
    annotations, validation = open_data(train.parse_arguments(["--data", "food", "--method", "boxinst"]), 0)
    assert len(annotations.boxes) == 482 and len(validation.boxes) == 140
    assert annotations.rles is None                                # boxes alone are read
