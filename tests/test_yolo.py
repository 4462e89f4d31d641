"""yolo.py: small folders in YOLO's layout as COCO files worked out by hand; names of classes."""
import os
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from formats.coco import CocoBoxes, DataError, datasets
from formats.commands import main
from formats.pictures import check_sizes, read_image
from formats.yolo import write_yolo
from label_folders import boxes, put, put_image, read, refused


def test_yolo_by_hand(yolo, capsys):
    """In 30 x 20 pixels, 0.2 x 0.4 around the middle is 6 x 8 from (12, 6); a polygon becomes its bounding box."""
    put(yolo / "labels" / "train" / "a.txt", "\ufeff1 0.5 0.5 0.2 0.4\r\n\n  0\t0.1 0.2  0.3 0.9 0.2 0.1 0.25 0.3\n")
    main(["yolo", str(yolo)])
    captured = capsys.readouterr()
    assert captured.out == (f"{yolo}/annotations/instances_train2017.json: 2 images, 3 boxes, 2 classes\n"
                            f"{yolo}/annotations/instances_val2017.json: 1 images, 0 boxes, 2 classes\n")
    assert captured.err == ""
    assert read(yolo)["categories"] == [{"id": 0, "name": "car"}, {"id": 1, "name": "bus"}]
    assert read(yolo)["categories"] == read(yolo, "val")["categories"]
    assert read(yolo)["images"] == [{"id": i, "file_name": f"images/train/{name}.png", "width": 30, "height": 20}
                                    for i, name in enumerate("ac", 1)]
    assert read(yolo)["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 1, "area": 48, "iscrowd": 0, "bbox": [12, 6, 6, 8]},
        {"id": 2, "image_id": 1, "category_id": 0, "area": 96, "iscrowd": 0, "bbox": [3, 2, 6, 16]},
        {"id": 3, "image_id": 2, "category_id": 0, "area": 600, "iscrowd": 0, "bbox": [0, 0, 30, 20]}]
    assert read(yolo, "val")["images"][0]["file_name"] == "images/val/b.png" and not read(yolo, "val")["annotations"]


def test_yolo_without_splits(tmp_path, capsys):
    """All images are training images, in any sub-folder; classes.txt may be among the labels."""
    for name in ("a", "day 1/b", "Straße/ö"):
        put_image(tmp_path / "images" / f"{name}.JPG", format="JPEG")
        put(tmp_path / "labels" / f"{name}.txt", "0 0.5 0.5 0.2 0.4\n")
    put(tmp_path / "labels" / "classes.txt", "car\n two words \n\n")
    write_yolo(str(tmp_path))
    assert [row[:2] for row in boxes(tmp_path)] == [
        (f"images/{name}.JPG", "car") for name in ("Straße/ö", "a", "day 1/b")]
    assert [row["name"] for row in read(tmp_path)["categories"]] == ["car", "two words"]
    assert not (tmp_path / "annotations" / "instances_val2017.json").exists() and capsys.readouterr().err == ""
    assert len(CocoBoxes(*datasets(str(tmp_path))[0])) == 3


@pytest.mark.parametrize("train_folder, val_folder", [("train", "valid"), ("train2017", "val2017")])
def test_yolo_folders_of_the_splits(yolo, train_folder, val_folder, capsys):
    for kind in ("images", "labels"):
        for old, new in (("train", train_folder), ("val", val_folder)):
            if (yolo / kind / old).exists():
                (yolo / kind / old).rename(yolo / kind / new)
    put_image(yolo / "images" / "test" / "t.png")
    put(yolo / "labels" / "test" / "t.txt", "rubbish")
    put(yolo / "labels" / "train" / "alone.txt", "0 0.5 0.5 1 1")
    write_yolo(str(yolo))
    assert [row[0] for row in boxes(yolo)] == [f"images/{train_folder}/{name}.png" for name in "ac"]
    assert [row["file_name"] for row in read(yolo, "val")["images"]] == [f"images/{val_folder}/b.png"]
    error = capsys.readouterr().err
    assert "1 of 4 images are in neither train nor val and are left out ('images/test/t.png')" in error
    assert f"1 label files have no image and are left out ({yolo / 'labels' / 'train' / 'alone.txt'})" in error


def test_yolo_splits_with_images_and_labels_inside(yolo, capsys):
    """As Roboflow exports them: train/images and train/labels, valid/..., test/..."""
    for old, new in (("train", "train"), ("val", "valid")):
        for kind in ("images", "labels"):
            (yolo / new).mkdir(exist_ok=True)
            if (yolo / kind / old).exists():
                (yolo / kind / old).rename(yolo / new / kind)
            else:
                (yolo / new / kind).mkdir()
    for kind in ("images", "labels"):
        (yolo / kind / "val").exists() or (yolo / kind).rmdir()
    put_image(yolo / "test" / "images" / "t.png")
    put(yolo / "test" / "labels" / "t.txt", "rubbish")
    put(yolo / "train" / "labels" / "alone.txt", "0 0.5 0.5 1 1")
    write_yolo(str(yolo))
    assert [row[:2] for row in boxes(yolo)] == [("train/images/a.png", "bus"), ("train/images/c.png", "car")]
    assert [row["file_name"] for row in read(yolo, "val")["images"]] == ["valid/images/b.png"]
    error = capsys.readouterr().err
    assert "1 of 4 images are in neither train nor val and are left out ('test/images/t.png')" in error
    assert "alone.txt" in error
    train_files, val_files = datasets(str(yolo))
    assert len(CocoBoxes(*train_files)) == 2 and len(CocoBoxes(*val_files)) == 1
    (yolo / "valid" / "labels").rmdir()
    refused(write_yolo, yolo, f"{yolo / 'valid' / 'labels'} is missing")


def test_yolo_val_without_train_and_val_without_images(yolo, capsys):
    os.remove(yolo / "images" / "val" / "b.png")
    write_yolo(str(yolo))
    assert "no images to evaluate on" in capsys.readouterr().err
    assert not (yolo / "annotations" / "instances_val2017.json").exists()
    (yolo / "images" / "train").rename(yolo / "images" / "valid")
    refused(write_yolo, yolo, "no images to train on")


def test_yolo_a_linked_folder_of_images(yolo, tmp_path):
    (yolo / "images" / "train").rename(tmp_path / "elsewhere")
    (yolo / "images" / "train").symlink_to(tmp_path / "elsewhere")
    write_yolo(str(yolo))
    assert [row[0] for row in boxes(yolo)] == ["images/train/a.png", "images/train/c.png"]


@pytest.mark.parametrize("line, part", [
    ("0 0.5 0.5 0.1", "4 numbers"), ("0", "1 numbers"), ("0 0.1 0.1 0.2 0.2 0.3 0.9 0.4", "8 numbers"),
    ("0 0.5 0.5 0.1 0.1 0.87", "confidence"), ("2 0.5 0.5 0.1 0.1", "class 2 is not among the 2 that have a name"),
    ("-1 0.5 0.5 0.1 0.1", "'-1' is not a whole number"), ("0.0 0.5 0.5 0.1 0.1", "'0.0'"),
    ("car 0.5 0.5 0.1 0.1", "'car'"),
    ("1" * 5000 + " 0.5 0.5 0.1 0.1", "'1111"), ("² 0.5 0.5 0.1 0.1", "'²'"),
    ("0 0.5 0,5 0.1 0.1", "'0,5' is not a number"), ("0 nan 0.5 0.1 0.1", "'nan' is not a number"),
    ("0 0.5 inf 0.1 0.1", "'inf'"),
    ("0 15 10 6 8", "'15' is not a fraction"), ("0 0.5 0.5 -0.2 0.1", "'-0.2'"), ("0 0.5 0.5 -0.005 0.1", "negative"),
    ("0 0.1 0.1 0.2 1.2 0.3 0.9", "'1.2'"), ("0\x1b[2J 0.5 0.5 0.1 0.1", r"'0\x1b[2J'"),
])
def test_yolo_wrong_labels(yolo, line, part):
    write_yolo(str(yolo))
    put(yolo / "labels" / "train" / "a.txt", f"1 0.5 0.5 0.2 0.4\n\n{line}\n")
    refused(write_yolo, yolo, "1 of 3 images", str(yolo / "labels" / "train" / "a.txt") + ", line 3: ", part)
    put(yolo / "labels" / "train" / "c.txt", line)
    refused(write_yolo, yolo, "2 of 3 images", "a.txt, line 3")
    with pytest.raises(DataError) as error:
        write_yolo(str(yolo))
    assert len(str(error.value)) < 500 and "\x1b" not in str(error.value)


def test_yolo_unreadable_files(yolo):
    put(yolo / "labels" / "train" / "a.txt", b"0 0.5 0.5 0.2 0.4 \xff\n")
    refused(write_yolo, yolo, "a.txt is not UTF-8")
    put(yolo / "labels" / "train" / "a.txt", "")
    put(yolo / "images" / "val" / "b.png", b"no image")
    refused(write_yolo, yolo, "1 of 3 images", "b.png cannot be decoded")


def test_yolo_two_images_of_one_label_file(yolo):
    put_image(yolo / "images" / "train" / "a.jpg")
    refused(write_yolo, yolo, "'images/train/a.jpg'", "'images/train/a.png'", "share")


def test_yolo_images_turned_by_exif(tmp_path):
    """Labels refer to the image as a viewer shows it. In all eight orientations of two shapes the box must lie on the
    mark of the image that training gets."""
    (tmp_path / "classes.txt").write_text("mark\n")
    for width in (40, 24):                                                       # the second is square
        upright = Image.new("RGB", (width, 24))
        upright.paste((255, 255, 255), (4, 2, 14, 8))
        label = f"0 {9 / width} {5 / 24} {10 / width} {6 / 24}\n"
        for orientation, back in zip(range(1, 9), (
                None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
                Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE,
                Image.Transpose.ROTATE_270)):
            exif = Image.Exif()
            exif[0x0112] = orientation
            stored = upright if back is None else upright.transpose(back)
            path = tmp_path / "images" / f"{width}-{orientation}.png"
            path.parent.mkdir(exist_ok=True)
            stored.save(path, exif=exif)
            with Image.open(path) as image:                                      # the table above is right
                assert (np.asarray(ImageOps.exif_transpose(image)) == np.asarray(upright)).all()
            put(tmp_path / "labels" / f"{width}-{orientation}.txt", label)
    write_yolo(str(tmp_path))
    annotations = CocoBoxes(*datasets(str(tmp_path))[0])
    check_sizes(annotations)
    for i in range(16):
        image = np.asarray(read_image(annotations, i))
        (x0, y0, x1, y1), = annotations.image_boxes(i)[0].round().astype(int).tolist()
        inside = np.zeros(image.shape[:2], bool)
        inside[y0:y1, x0:x1] = True
        assert ((image > 128).all(2) == inside).all(), annotations.path(i)
    stated = {row["file_name"]: (row["width"], row["height"]) for row in read(tmp_path)["images"]}
    assert stated["images/40-6.png"] == (40, 24)


# ---------------------------------------------------------------------------------------- names of classes

def names_of(root) -> list[tuple[int, str]]:
    write_yolo(str(root))
    return [(row["id"], row["name"]) for row in read(root)["categories"]]


@pytest.mark.parametrize("text, names", [
    ("names: [car, bus]", ["car", "bus"]),
    ("nc: 2\nnames: ['car, red', \"b\\u00fcs\" , it's]  # three\ntrain: x", ["car, red", "büs", "it's"]),
    ("names:   # all\n- car\n- C#\nnc: 2\n", ["car", "C#"]),
    ("train: a\nnames:\n  0: car\n  1: \"bus # 2\"  # no\n\nroboflow:\n  names: x", ["car", "bus # 2"]),
    ("names:\n  1: bus\n  0: car\n", ["car", "bus"]),
    ("names: {0: car, 7: 'b}us', 1: x}", {0: "car", 1: "x", 7: "b}us"}),
    ("names: [0, null, no, 1.5]", ["0", "null", "no", "1.5"]),                   # text, whatever type YAML gives it
])
def test_names_in_yaml(yolo, text, names):
    pytest.importorskip("yaml")
    put(yolo / "data.yaml", text)
    assert names_of(yolo) == sorted((names if isinstance(names, dict) else dict(enumerate(names))).items())


@pytest.mark.parametrize("text", [
    "names:", "names: []", "names: 3", "names: car", "names: [car, bus", "names: [car, [bus]]", "names: [car] bus",
    "names: ['']", 'names: ["\\ud800"]', "names:\n  - name: car", "names:\n  car: 0", "names:\n  -1: car",
    "names:\n  0: car\n  - bus", "names:\n  0:", "names: *other", "names: [a, , b]", "'a\nnames: b'", "names: \x1b[2J",
    "names: " + "[" * 5000, "names: [a]\n---\nnames: [b]",
])
def test_names_that_are_not_understood(yolo, text):
    """An error, never a guess."""
    pytest.importorskip("yaml")
    put(yolo / "data.yaml", text)
    refused(write_yolo, yolo, str(yolo / "data.yaml"), "no names of classes")


def test_yaml_without_its_package_is_one_line(yolo, capsys, monkeypatch):
    """PyYAML is not needed if no YAML file lists names."""
    monkeypatch.setitem(sys.modules, "yaml", None)
    put(yolo / "data.yaml", "train: images/train")
    main(["yolo", str(yolo)])
    capsys.readouterr()
    put(yolo / "data.yaml", "names: [car, bus]")
    with pytest.raises(SystemExit) as end:
        main(["yolo", str(yolo)])
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.count("\n") == 1
    assert error.startswith(f"error: {yolo / 'data.yaml'}") and "pip install pyyaml" in error


def test_order_of_the_files_with_names(yolo, capsys):
    """data.yaml, then another YAML file with names, then classes.txt; without any, numbers and a warning."""
    pytest.importorskip("yaml")
    put(yolo / "data.yaml", "names: [car, bus]")
    put(yolo / "other.yaml", "names: [x, y]")
    put(yolo / "classes.txt", "eins\nzwei\ndrei\n")
    assert names_of(yolo) == [(0, "car"), (1, "bus")]
    os.remove(yolo / "data.yaml")
    put(yolo / "hyper.yaml", "lr: 0.1")
    assert names_of(yolo) == [(0, "x"), (1, "y")]
    put(yolo / "more.yml", "names: [x, y]")
    refused(write_yolo, yolo, "more.yml, other.yaml", "data.yaml")
    put(yolo / "data.yaml", "train: images/train")
    assert names_of(yolo) == [(0, "eins"), (1, "zwei"), (2, "drei")]
    put(yolo / "classes.txt", "eins\n\ndrei")
    refused(write_yolo, yolo, "classes.txt", "entry 1: ")
    os.remove(yolo / "classes.txt")
    capsys.readouterr()
    put(yolo / "labels" / "train" / "a.txt", "70 0.5 0.5 1 1\n")
    assert names_of(yolo) == [(0, "0"), (70, "70")]
    assert capsys.readouterr().err.count("named after their numbers") == 1
