"""coco.py: annotation files as flat arrays of boxes and masks. What it refuses is in test_bad_input.py."""
import gc
import json
import os

import numpy as np
import pytest

from data import TrainBatches
from formats.coco import CocoBoxes, DataError, datasets, ground_truth
from helpers import annotation, write_set


def test_category_ids_become_labels_and_back(tmp_path):
    box = [0, 0, 5, 5]
    rows = [annotation(1, 10, box, 90), annotation(2, 10, box, 3), annotation(3, 11, box, 17)]
    coco = CocoBoxes(*write_set(tmp_path, annotations=rows, categories=(90, 3, 17)))
    assert coco.classes == [{"id": i, "name": f"class {i}"} for i in (3, 17, 90)]
    assert coco.image_boxes(0)[1].tolist() == [2, 0] and coco.image_boxes(1)[1].tolist() == [1]


def test_boxes_belong_to_their_image_in_any_order(tmp_path):
    rows = [annotation(1, 12, [1, 1, 4, 4]), annotation(2, 10, [2, 2, 4, 4]), annotation(3, 12, [3, 3, 4, 4])]
    coco = CocoBoxes(*write_set(tmp_path, annotations=rows))
    assert len(coco) == 3 and coco.image_ids.tolist() == [10, 11, 12] and coco.sizes.tolist()[1] == [30, 20]
    assert coco.image_boxes(0)[0].tolist() == [[2, 2, 6, 6]]
    assert coco.image_boxes(1)[0].shape == (0, 4)
    assert coco.image_boxes(2)[0].tolist() == [[1, 1, 5, 5], [3, 3, 7, 7]]
    assert coco.path(2) == str(tmp_path / "images" / "2.png")


def test_segmentation_is_never_read_without_masks(tmp_path):
    rows = [annotation(1, 10, [2, 3, 10, 8]), annotation(2, 11, [2, 3, 10, 8], segmentation="garbage")]
    coco = CocoBoxes(*write_set(tmp_path, annotations=rows))
    assert len(coco.boxes) == 2 and coco.rles is None
    assert TrainBatches(coco, batch_size=4, min_sizes=[16], max_size=64)[0].masks is None


def test_crowd_and_degenerate_boxes_are_left_out_with_one_warning(tmp_path, capsys):
    rows = [annotation(1, 10, [2, 3, 10, 8], iscrowd=1),
            annotation(2, 10, [-5, -5, 15, 15]),        # clipped to (0, 0, 10, 10)
            annotation(3, 10, [29.5, 2, 40, 10]),       # half a pixel is inside
            annotation(4, 10, [5, 5, 0, 9]), annotation(5, 10, [5, 5, -3, 9]),
            annotation(6, 11, [100, 5, 9, 9]),
            annotation(7, 10, [0.4, 5, 1, 1]),           # one pixel, up to rounding
            annotation(8, 10, [0, 0, 0, 0], iscrowd=1)]
    coco = CocoBoxes(*write_set(tmp_path, annotations=rows))
    assert coco.boxes.tolist() == [[0, 0, 10, 10], pytest.approx([0.4, 5, 1.4, 6])]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "4 of 8 boxes dropped" in error
    assert "(id 3, id 4, id 5, id 6)" in error and "set.json" in error


def test_no_python_object_is_kept_for_an_image_or_a_box(tmp_path):
    coco = CocoBoxes(*write_set(tmp_path, sizes=[(20, 30)] * 40), masks=False)
    for name, value in vars(coco).items():
        assert isinstance(value, (np.ndarray, str, int, type(None))) or name == "classes", name
        assert not isinstance(value, np.ndarray) or value.dtype != object, name
    assert len(coco.classes) == 3


def test_garbage_collection_is_on_again_after_reading(tmp_path):
    CocoBoxes(*write_set(tmp_path))
    assert gc.isenabled()
    with pytest.raises(DataError):
        CocoBoxes(str(tmp_path / "none.json"), str(tmp_path))
    assert gc.isenabled()


def test_file_names_with_folders_and_other_scripts(tmp_path):
    json_path, folder = write_set(tmp_path, sizes=[(20, 30)])
    os.mkdir(os.path.join(folder, "ü"))
    os.rename(os.path.join(folder, "0.png"), os.path.join(folder, "ü", "图.png"))
    content = json.loads(open(json_path).read())
    content["images"][0]["file_name"] = "ü/图.png"
    open(json_path, "w").write(json.dumps(content))
    assert os.path.exists(CocoBoxes(json_path, folder).path(0))


def test_datasets_names_folders_and_files():
    (train_json, train_images), (val_json, val_images) = datasets("shapes")
    assert train_json == os.path.join("datasets", "shapes", "annotations", "instances_train2017.json")
    assert val_images == os.path.join("datasets", "shapes", "val2017")
    files = datasets("/somewhere", train_json="a.json", val_images="images")
    assert files == (("a.json", "/somewhere/train2017"),
                     ("/somewhere/annotations/instances_val2017.json", "images"))


# ------------------------------------------------------------------------------ empty segmentations

def with_masks(folder, *segmentations):
    """An image with one box for each segmentation, read with masks."""
    rows = [annotation(i, 10, [1, 1, 8, 8], segmentation=segmentation) for i, segmentation in enumerate(segmentations)]
    return CocoBoxes(*write_set(folder, [(20, 30)], rows, (3,)), masks=True)


def test_an_empty_segmentation_is_an_empty_mask_and_a_warning(tmp_path, capsys):
    polygon = [[1, 1, 9, 1, 9, 9, 1, 9]]
    annotations = with_masks(tmp_path, [], polygon, *[[]] * 6)
    assert len(annotations.boxes) == 8
    masks = [annotations.mask(0, box) for box in range(8)]
    assert all(mask.shape == (20, 30) for mask in masks)
    assert [mask.any() for mask in masks] == [False, True] + [False] * 6
    error = capsys.readouterr().err
    assert "7 of 8 boxes have an empty segmentation: they train boxes and no masks" in error
    assert "(annotation id 0, 2, 3, 4, 5, ...)" in error
    assert error.count("\n") == 1 and error.startswith("warning: ")
    with_masks(tmp_path, polygon, polygon)
    assert capsys.readouterr().err == ""


def test_empty_segmentations_of_all_boxes_and_missing_ones_are_errors(tmp_path):
    with pytest.raises(DataError, match="all 2 boxes have an empty segmentation"):
        with_masks(tmp_path, [], [])
    for missing in (None, {}, "", [[]]):
        with pytest.raises(DataError, match=r"1 of 2 annotations have no usable segmentation: .*\(id 1\)"):
            with_masks(tmp_path, [], missing)


def test_condinst_learns_from_a_box_with_an_empty_mask(tmp_path):
    """The batch has a mask for each box, and the empty one stays empty."""
    annotations = with_masks(tmp_path, [], [[1, 1, 9, 1, 9, 9, 1, 9]])
    batch = TrainBatches(annotations, batch_size=1, min_sizes=[40], max_size=60)[0]
    assert [bool(mask.any()) for mask in batch.masks[0]] == [False, True] and len(batch.boxes[0]) == 2


# ------------------------------------------------------------------------------- what only evaluation reads

POLYGON = [1, 1, 9, 1, 9, 9, 1, 9]


@pytest.mark.parametrize("value", [None, "missing"])
def test_crowd_marks_and_areas_that_are_null_are_as_good_as_missing(tmp_path, value):
    more = {} if value == "missing" else {"iscrowd": value, "area": value}
    json_path, images = write_set(tmp_path, annotations=[annotation(5, 10, [1, 2, 8, 7], **more)])
    assert len(CocoBoxes(json_path, images, evaluated=True).boxes) == 1
    row, = ground_truth(json_path).dataset["annotations"]
    assert row["iscrowd"] == 0 and row["area"] == 56


def test_other_forms_of_crowd_marks_and_areas_are_kept(tmp_path):
    rows = [annotation(1, 10, [1, 2, 8, 7], iscrowd=True, area=0),
            annotation(2, 10, [1, 2, 8, 7], iscrowd=False, area=9)]
    json_path, images = write_set(tmp_path, annotations=rows)
    assert CocoBoxes(json_path, images).rows.tolist() == [1]
    assert [(row["iscrowd"], row["area"]) for row in ground_truth(json_path).dataset["annotations"]] == [(1, 0), (0, 9)]


def test_masks_are_checked_of_the_boxes_that_need_them_or_of_all_that_are_evaluated(tmp_path):
    """A crowd and a box of no area are evaluated, and train no mask."""
    rows = [annotation(1, 10, [1, 1, 8, 8], segmentation=[POLYGON]),
            annotation(2, 10, [1, 1, 8, 8], iscrowd=1, segmentation="x"),
            annotation(3, 10, [1, 1, 0, 8], segmentation="x")]
    files = write_set(tmp_path, annotations=rows)
    CocoBoxes(*files), CocoBoxes(*files, masks=True)
    for masks in (False, True):
        with pytest.raises(DataError, match=r"2 of 3 annotations have no usable segmentation: .* \(id 2, id 3\)"):
            CocoBoxes(*files, masks=masks, evaluated=True)


def test_evaluation_alone_needs_no_masks(tmp_path):
    files = write_set(tmp_path, annotations=[annotation(1, 10, [1, 1, 8, 8], segmentation=None),
                                             annotation(2, 10, [1, 1, 8, 8])])
    assert CocoBoxes(*files, evaluated=True).rles is None
    with pytest.raises(DataError, match=r"it is missing, and masks are needed \(id 1, id 2\)"):
        CocoBoxes(*files, masks=True, evaluated=True)
    rows = [annotation(1, 10, [1, 1, 8, 8], segmentation=[POLYGON]), annotation(2, 10, [1, 1, 8, 8], iscrowd=1)]
    assert len(CocoBoxes(*write_set(tmp_path, annotations=rows), masks=True, evaluated=True).boxes) == 1


def test_short_polygons_are_left_out_with_one_warning(tmp_path, capsys):
    rows = [annotation(i, 10, [1, 1, 8, 8], segmentation=[[1, 1, 9, 9], POLYGON, []]) for i in range(2)]
    json_path, images = write_set(tmp_path, annotations=rows)
    annotations = CocoBoxes(json_path, images, masks=True, evaluated=True)
    warned = capsys.readouterr().err
    assert warned.count("\n") == 1 and "2 of 2 annotations have polygons of fewer than 3 points" in warned
    assert annotations.mask(0, 0).sum() == 64
    truth = ground_truth(json_path)
    assert [truth.annToMask(row).sum() for row in truth.dataset["annotations"]] == [64, 64]
    CocoBoxes(json_path, images)
    assert capsys.readouterr().err == ""


def test_a_set_of_crowds_says_so(tmp_path):
    rows = [annotation(i, 10, [1, 1, 8, 8], iscrowd=1) for i in range(3)]
    json_path, images = write_set(tmp_path, annotations=rows)
    assert CocoBoxes(json_path, images).no_box == f"{json_path} has no usable box: all 3 are crowds"
    for rows in ([], [annotation(1, 10, [1, 1, 0, 8]), annotation(2, 10, [1, 1, 8, 8], iscrowd=1)]):
        assert CocoBoxes(*write_set(tmp_path, annotations=rows)).no_box == f"{json_path} has no usable box"
    assert CocoBoxes(*write_set(tmp_path)).no_box == ""


@pytest.mark.parametrize("name", ["labels", "labels/a.txt", "a.xml"])
def test_labels_of_another_format_are_met_with_what_converts_them(tmp_path, name):
    (tmp_path / "labels").mkdir()
    for path in (tmp_path / "labels" / "a.txt", tmp_path / "a.xml"):
        path.write_text("0 0.5 0.5 1 1")
    with pytest.raises(DataError, match="python data.py voc DIR, python data.py yolo DIR"):
        CocoBoxes(str(tmp_path / name), str(tmp_path))
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(DataError) as error:
        CocoBoxes(str(tmp_path / "a.json"), str(tmp_path))
    assert "data.py" not in str(error.value)
