"""folders.py: what both layouts share, and what training makes of the converted folders."""
import json
import os
from pathlib import Path

import pytest

import train
from data import TrainBatches
from formats.coco import DataError, datasets
from formats.commands import main
from formats.voc import write_voc
from formats.yolo import write_yolo
from tools.batches import open_data
from label_folders import boxes, put, put_image, read, refused, xml_object, xml


def test_training_takes_the_folder(voc, yolo, capsys):
    """--data DIR finds the images; without a val file there is no evaluation, but one line about it."""
    write_yolo(str(yolo))
    annotations, validation = open_data(train.parse_arguments(["--data", str(yolo)]), 0)
    assert [c["id"] for c in annotations.classes] == [0, 1] and validation.classes == annotations.classes
    assert validation.path(0) == str(yolo / "images" / "val" / "b.png")
    batch = TrainBatches(annotations, batch_size=2, min_sizes=[20], max_size=64)[0]
    assert batch.images.shape == (2, 3, 32, 32) and not batch.skipped
    write_voc(str(voc))
    capsys.readouterr()
    annotations, validation = open_data(train.parse_arguments(["--data", str(voc)]), 0)
    assert validation is None and annotations.path(0) == str(voc / "JPEGImages" / "a.jpg")
    assert capsys.readouterr().out == f"no evaluation: there is no {voc / 'annotations' / 'instances_val2017.json'}\n"
    open_data(train.parse_arguments(["--data", str(voc)]), 1)
    assert capsys.readouterr().out == ""                                        # only the first process prints it


def test_only_a_users_folder_trains_without_evaluation(voc, tmp_path, monkeypatch):
    """A named data set must have its val file, and --val-json must exist."""
    write_voc(str(voc))
    with pytest.raises(DataError, match="none.json is missing"):
        open_data(train.parse_arguments(["--data", str(voc), "--val-json", "none.json", "--val-images", "."]), 0)
    monkeypatch.chdir(tmp_path)
    os.mkdir("datasets")
    os.rename(voc, "datasets/shapes")
    os.rename("datasets/shapes/JPEGImages", "datasets/shapes/train2017")
    os.mkdir("datasets/shapes/train2017/JPEGImages")
    for path in Path("datasets/shapes/train2017").glob("*.jpg"):
        path.rename(path.parent / "JPEGImages" / path.name)
    with pytest.raises(DataError, match="instances_val2017.json is missing"):
        open_data(train.parse_arguments(["--data", "shapes"]), 0)
    os.remove("datasets/shapes/annotations/instances_train2017.json")
    with pytest.raises(DataError, match="instances_train2017.json is missing"):
        open_data(train.parse_arguments(["--data", "datasets/shapes"]), 0)


def test_image_folders(voc, yolo):
    """DIR itself for a file that a conversion wrote, whatever the folders are called."""
    for root, write in ((voc, write_voc), (yolo, write_yolo)):
        os.mkdir(root / "train2017")
        assert datasets(str(root))[0][1] == str(root / "train2017")
        write(str(root))
        assert datasets(str(root))[0][1] == str(root)
    assert datasets(str(yolo))[1][1] == str(yolo)


def test_an_earlier_conversion_is_replaced_and_its_val_file_does_not_stay(voc, capsys):
    for split, lines in (("train", "c\nb\n"), ("val", "a\n")):
        put(voc / "ImageSets" / "Main" / f"{split}.txt", lines)
    write_voc(str(voc))
    assert open_data(train.parse_arguments(["--data", str(voc)]), 0)[1] is not None
    (voc / "ImageSets").rename(voc / "old")
    capsys.readouterr()
    write_voc(str(voc))
    val_json = voc / "annotations" / "instances_val2017.json"
    assert f"{val_json}: removed" in capsys.readouterr().out and not val_json.exists()
    assert len(read(voc)["images"]) == 3
    assert open_data(train.parse_arguments(["--data", str(voc)]), 0)[1] is None


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("content", ['{"images": [], "info": {}}', "", b"\xff\xfe"])
def test_annotation_files_of_another_origin_stay(yolo, split, content):
    (yolo / "labels" / "val").mkdir()
    put(yolo / "annotations" / f"instances_{split}2017.json", content)
    refused(write_yolo, yolo, f"instances_{split}2017.json", "move it away")


def test_what_was_found_where_nothing_is_understood(tmp_path):
    for write, wanted in ((write_voc, "no XML files"), (write_yolo, "no label file (.txt) belongs to an image")):
        refused(write, tmp_path / "none", f"folder {tmp_path / 'none'} is missing")
        root = tmp_path / write.__name__
        root.mkdir()
        refused(write, root, wanted, "found: nothing")
        for name in "ab":
            put_image(root / "pictures" / f"{name}.jpg")
        put(root / "far" / "away" / "labels.json", "{}")
        refused(write, root, wanted, "found: 2 .jpg in pictures, 1 .json in far/away")


def test_without_any_box_nothing_is_written(voc, yolo):
    for name in "ac":
        put(voc / "Annotations" / f"{name}.xml", xml(filename=f"{name}.jpg"))
        put(yolo / "labels" / "train" / f"{name}.txt", "\n")
    put(yolo / "labels" / "val" / "b.txt", "0 0.5 0.5 1 1")
    refused(write_voc, voc, "no training image has a box")
    refused(write_yolo, yolo, "no training image has a box")


def test_a_folder_that_cannot_be_written(voc):
    put(voc / "annotations", "a file")
    refused(write_voc, voc, "cannot write annotation file", "annotations")


def test_a_failed_write_leaves_the_old_pair(yolo, monkeypatch):
    """Both files are complete under temporary names before the first is replaced."""
    write_yolo(str(yolo))
    put(yolo / "labels" / "train" / "a.txt", "0 0.5 0.5 0.3 0.3\n")
    dump = json.dump

    def full(content, file):
        if "val2017" in file.name:
            raise OSError(28, "No space left on device")
        dump(content, file)
    monkeypatch.setattr(json, "dump", full)
    refused(write_yolo, yolo, "instances_val2017.json", "No space left on device")


def test_many_boxes_on_one_image(yolo, voc):
    put(yolo / "labels" / "train" / "a.txt", "1 0.5 0.5 0.2 0.4\n" * 10_000)
    write_yolo(str(yolo))
    assert len(boxes(yolo)) == 10_001 and boxes(yolo)[9_999] == ("images/train/a.png", "bus", [12, 6, 6, 8])
    put(voc / "Annotations" / "a.xml", xml(*[xml_object()] * 10_000, filename="a.jpg"))
    write_voc(str(voc))
    assert len(boxes(voc)) == 10_001


def test_the_command_line_ends_with_one_line(tmp_path, capsys):
    for command in ("voc", "yolo"):
        with pytest.raises(SystemExit) as end:
            main([command, str(tmp_path / "none")])
        error = capsys.readouterr().err
        assert end.value.code == 1 and error.startswith("error: folder ") and error.count("\n") == 1
