"""tools/compare.py: masks of several runs beside true ones."""
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from formats.coco import CocoBoxes
from helpers import copy_set, one_line_error
from tools import compare
from tools.draw import GAP, HEADER, PANEL


@pytest.fixture
def runs(drawn, tmp_path):
    """Of the training images: masks.json with the true masks of every second box, and one with the filled boxes."""
    content = json.loads((drawn / "annotations/instances_train2017.json").read_text())
    for name in ("half", "boxes"):
        (tmp_path / name).mkdir()
        for annotation in content["annotations"]:
            if name == "boxes":
                x, y, w, h = annotation["bbox"]
                annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            elif annotation["id"] % 2:
                annotation["segmentation"] = []
        (tmp_path / name / "masks.json").write_text(json.dumps(content))
    return tmp_path / "half/masks.json", tmp_path / "boxes/masks.json"


def arguments(drawn, *more) -> list[str]:
    truth = drawn / "annotations/instances_train2017.json"
    return [str(x) for x in (*more, "--truth", truth, "--images", drawn / "train2017")]


def test_mean_ious_are_printed_and_drawn(drawn, runs, tmp_path, capsys):
    compare.main(arguments(drawn, *runs, "--out", tmp_path / "sheet.jpg", "--count", 3))
    shown = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:4])
    ids = [a["id"] for a in json.loads(runs[0].read_text())["annotations"]]
    assert float(shown["half"]) == pytest.approx(np.mean([i % 2 == 0 for i in ids]), abs=1e-3)
    assert shown["boxes"] == shown["filled boxes"] and 0.3 < float(shown["boxes"]) < 0.8
    image = Image.open(tmp_path / "sheet.jpg")
    assert image.format == "JPEG" and image.size == (4 * (PANEL + GAP) + GAP, HEADER + 3 * (HEADER + PANEL + GAP))


def test_without_a_sheet_figures_are_printed_alone(drawn, runs, capsys):
    compare.main(arguments(drawn, runs[1]))
    assert "sheet" not in capsys.readouterr().out


def test_masks_and_scores_are_those_of_the_file(drawn, runs):
    truth = CocoBoxes(drawn / "annotations/instances_train2017.json", drawn / "train2017", masks=True)
    annotations = compare.read_masks(runs[0], truth)
    given = {a["id"]: a for a in json.loads(runs[0].read_text())["annotations"]}
    assert [a["id"] for a in annotations] == [list(given)[row] for row in truth.rows]
    for i in range(len(truth)):
        for k in range(*truth.offsets[i:i + 2]):
            segmentation = annotations[k]["segmentation"]
            if given[annotations[k]["id"]]["segmentation"]:
                assert segmentation["counts"] == truth.rle(i, k)["counts"] and annotations[k]["score"] == 1
            assert (coco_mask.area(segmentation) > 0) == bool(given[annotations[k]["id"]]["segmentation"])


@pytest.mark.parametrize("change, message", [
    (lambda annotation: annotation["bbox"].__setitem__(2, annotation["bbox"][2] + 1), "has other boxes"),
    (lambda annotation: annotation.update(category_id=annotation["category_id"] % 6 + 1), "has other boxes"),
    (lambda annotation: annotation.pop("segmentation"), "no usable segmentation")],
    ids=["another box", "another class", "no mask"])
def test_a_file_that_cannot_be_compared_is_named(change, message, drawn, runs, capsys):
    content = json.loads(runs[1].read_text())
    change(content["annotations"][0])
    runs[1].write_text(json.dumps(content))
    with pytest.raises(SystemExit) as end:
        compare.main(arguments(drawn, *runs))
    error = one_line_error(capsys)
    assert end.value.code == 1 and str(runs[1]) in error and message in error


def test_masks_of_stored_images_are_not_compared_with_upright_ones(drawn, runs, capsys):
    content = json.loads(runs[1].read_text())
    runs[1].write_text(json.dumps(content | {"info": {"exif": "stored"}}))
    with pytest.raises(SystemExit):
        compare.main(arguments(drawn, *runs))
    assert f"{runs[1]} has masks of stored images" in (line := one_line_error(capsys)) and "add --exif stored" in line
    compare.main(arguments(drawn, runs[1], "--exif", "stored"))


def test_true_masks_that_are_drawn_are_checked(drawn, runs, tmp_path, capsys):
    """A box of no area is not compared, but drawn."""
    def flaw(content):
        content["annotations"][0] |= {"bbox": [1, 1, 0, 0], "segmentation": [[1, 1, 5, 5]]}

    data = copy_set(drawn, tmp_path / "set", flaw)
    with pytest.raises(SystemExit):
        compare.main(arguments(data, runs[0]))
    warned, error = capsys.readouterr().err.splitlines()
    assert "dropped" in warned and "no usable segmentation: no polygon" in error


def test_there_must_be_boxes(drawn, tmp_path, capsys):
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps(json.loads((drawn / "annotations/instances_train2017.json").read_text())
                                | {"annotations": []}))
    with pytest.raises(SystemExit):
        compare.main([str(x) for x in (empty, "--truth", empty, "--images", drawn / "train2017")])
    assert f"{empty} has no boxes" in one_line_error(capsys)


def test_files_of_one_folder_keep_their_own_names_and_no_input_is_overwritten(drawn, runs, tmp_path, capsys):
    second = tmp_path / "half/others.json"
    second.write_text(runs[1].read_text())
    compare.main(arguments(drawn, runs[0], second))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:4]] == ["masks", "others"]
    before = runs[0].read_text()
    with pytest.raises(SystemExit):
        compare.main(arguments(drawn, runs[0], "--out", runs[0]))
    assert "would be overwritten" in one_line_error(capsys) and runs[0].read_text() == before
