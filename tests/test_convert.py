"""convert.py: small folders of Pascal VOC's and YOLO's layout as COCO files that were worked out by hand."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import train
from formats.coco import CocoBoxes, DataError, datasets
from formats.convert import numbered, turned_back, write_voc, write_yolo, yaml_names
from data import TrainBatches, check_sizes, load_image, main


def put_image(path: Path, height: int = 20, width: int = 30, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path, **options)


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def thing(name="car", box=(3, 5, 12, 9), more="") -> str:
    edges = "".join(f"<{edge}>{value}</{edge}>" for edge, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>{name}</name>{more}<bndbox>{edges}</bndbox></object>"


def xml(*things: str, filename="", size=(30, 20)) -> str:
    sides = "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{filename}</filename>{sides}{''.join(things)}</annotation>"


@pytest.fixture
def voc(tmp_path):
    """Images a, b (nothing in it) and c, with a box each in a and c; nothing says what is to train on."""
    root = tmp_path / "voc"
    for stem, things in (("a", [thing()]), ("b", []), ("c", [thing("bus")])):
        put_image(root / "JPEGImages" / f"{stem}.jpg")
        put(root / "Annotations" / f"{stem}.xml", xml(*things, filename=f"{stem}.jpg"))
    return root


@pytest.fixture
def yolo(tmp_path):
    """Images a and c, to train on, with a box each, and b, to evaluate on, without a label file."""
    root = tmp_path / "yolo"
    for name in ("train/a", "val/b", "train/c"):
        put_image(root / "images" / f"{name}.png")
    put(root / "labels" / "train" / "a.txt", "1 0.5 0.5 0.2 0.4\n")
    put(root / "labels" / "train" / "c.txt", "0 0.5 0.5 1 1\n")
    put(root / "data.yaml", "names: [car, bus]\n")
    return root


def read(root: Path, split: str = "train") -> dict:
    return json.loads((root / "annotations" / f"instances_{split}2017.json").read_text())


def boxes(root: Path, split: str = "train") -> list[tuple]:
    """(file name, class, bbox) of every annotation."""
    content = read(root, split)
    files = {row["id"]: row["file_name"] for row in content["images"]}
    names = {row["id"]: row["name"] for row in content["categories"]}
    return [(files[row["image_id"]], names[row["category_id"]], row["bbox"]) for row in content["annotations"]]


def refused(write, root: Path, *parts: str) -> None:
    """One line that holds all parts; nothing is written, and an earlier conversion stays as it is."""
    def files():
        return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    before = files()
    with pytest.raises(DataError) as error:
        write(str(root))
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message
    assert files() == before


# ---------------------------------------------------------------------------------------------- Pascal VOC

def test_voc_by_hand(voc, capsys):
    """Pixels count from 1 and the last is inside: 3..12 is ten pixels from 2 on."""
    content = xml(thing("dog", (1, 1, 30, 20), "<difficult>1</difficult><truncated>0</truncated><pose>Left</pose>"),
                  thing("aeroplane", ("8.5", " 7 ", "8.5", "7.25"),
                        "<part><name>head</name><bndbox><xmin>9</xmin></bndbox></part><polygon><x1>3</x1></polygon>"),
                  filename="a.jpg")
    put(voc / "Annotations" / "a.xml", content)
    main(["voc", str(voc)])
    captured = capsys.readouterr()
    assert captured.out == f"{voc}/annotations/instances_train2017.json: 3 images, 3 boxes, 3 classes\n"
    assert captured.err == ""
    assert [(row["id"], row["name"]) for row in read(voc)["categories"]] == [(1, "aeroplane"), (2, "bus"), (3, "dog")]
    assert read(voc)["images"] == [{"id": i, "file_name": f"JPEGImages/{name}.jpg", "width": 30, "height": 20}
                                   for i, name in enumerate("abc", 1)]
    assert read(voc)["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 3, "area": 600, "iscrowd": 0, "bbox": [0, 0, 30, 20], "difficult": 1,
         "truncated": 0},
        {"id": 2, "image_id": 1, "category_id": 1, "area": 1.25, "iscrowd": 0, "bbox": [7.5, 6, 1, 1.25]},
        {"id": 3, "image_id": 3, "category_id": 2, "area": 50, "iscrowd": 0, "bbox": [2, 4, 10, 5]}]
    assert [path.name for path in (voc / "annotations").iterdir()] == ["instances_train2017.json"]


def test_voc_parts(voc, capsys):
    """In the lists' order; the categories are the same in both; what is in no list is left out and counted."""
    for split, lines in (("train", "c\n"), ("val", " a \r\n\n")):
        put(voc / "ImageSets" / "Main" / f"{split}.txt", lines)
    write_voc(str(voc))
    assert boxes(voc) == [("JPEGImages/c.jpg", "bus", [2, 4, 10, 5])]
    assert boxes(voc, "val") == [("JPEGImages/a.jpg", "car", [2, 4, 10, 5])]
    assert read(voc)["categories"] == read(voc, "val")["categories"]
    captured = capsys.readouterr()
    assert "1 of 3 images are in no part and are left out ('b')" in captured.err and captured.err.count("\n") == 1
    assert "instances_val2017.json: 1 images, 1 boxes, 2 classes\n" in captured.out
    put(voc / "ImageSets" / "Main" / "val.txt", "a\nb\nc")
    write_voc(str(voc))
    assert "1 of 3 images are to train on and to evaluate on ('c')" in capsys.readouterr().err


def test_voc_images_of_any_name(voc, capsys):
    """The XML's own file name counts, whatever folder it names, or else the XML's name; no other folder is entered."""
    for name, filename, image in (("1", "C:\\photos\\Ärger 1.PNG", "Ärger 1.PNG"), ("2", "x/../../2.bmp", "2.bmp"),
                                    ("3", "2007_000003", "3.webp"), ("4", "../../secret.jpg", "4.gif")):
        put(voc / "Annotations" / f"{name}.xml", xml(filename=filename))
        put_image(voc / "JPEGImages" / image)
    put_image(voc.parent / "secret.jpg")
    put_image(voc / "JPEGImages" / "lonely.jpg")
    put(voc / "JPEGImages" / "._a.jpg", b"")
    put(voc / "JPEGImages" / "a.txt", b"")
    write_voc(str(voc))
    names = [row["file_name"].removeprefix("JPEGImages/") for row in read(voc)["images"]]
    assert names == ["Ärger 1.PNG", "2.bmp", "3.webp", "4.gif", "a.jpg", "b.jpg", "c.jpg"]
    assert "1 images have no XML and are left out ('JPEGImages/lonely.jpg')" in capsys.readouterr().err
    assert len(CocoBoxes(*datasets(str(voc))[0])) == 7


@pytest.mark.parametrize("size, expected", [((300, 200), (300, 200)), ((0, 0), (30, 20)), (("", ""), (30, 20)),
                                            (None, (30, 20)), ((300, 0), (30, 20)), (("300.0", "200"), (300, 200))])
def test_voc_size_of_the_xml_or_the_header(voc, size, expected):
    put(voc / "Annotations" / "a.xml", xml(thing(), filename="a.jpg", size=size))
    write_voc(str(voc))
    assert (read(voc)["images"][0]["width"], read(voc)["images"][0]["height"]) == expected


@pytest.mark.parametrize("content, part", [
    ("", "not XML"), (b"\xff\xd8", "not XML"), ("<annotation><object>", "not XML"), ("<kml/>", "no <annotation>"),
    ("<?xml version='1.0' encoding='none'?><annotation/>", "not XML"),
    ("<!DOCTYPE x [<!ENTITY a 'aaaaaaaaaa'>" + "".join(
        f"<!ENTITY {b} '{f'&{a};' * 10}'>" for a, b in zip("abcdefghi", "bcdefghij")) + "]>"
     "<annotation><filename>&j;</filename></annotation>", "not XML"),
    ("<!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><annotation>&a;</annotation>", "not XML"),
    (xml(thing("")), "object 1 has no name"),
    (xml(thing(), "<object><name>car</name></object>"), "object 2 has no bndbox/xmin"),
    (xml(thing(box=(1, 2, 3))), "no bndbox/ymax"),
    (xml(thing(box=(1, 2, "x", 4))), "bndbox/xmax 'x', which is no number"),
    (xml(thing(box=(1, 2, "nan", 4))), "'nan'"), (xml(thing(box=(1, "1e99", 3, 4))), "'1e99'"),
    (xml(thing(box=(1, 2, "1_0", 4))), "'1_0'"), (xml(thing(box=(5, 2, 4, 4))), "xmax is below xmin"),
    (xml(thing(more="<difficult>0.5</difficult>")), "difficult 0.5"),
    (xml(thing(more="<truncated>yes</truncated>")), "'yes'"),
    (xml(size=("x", 20)), "size/width 'x'"), (xml(size=(30.5, 20)), "30.5"), (xml(size=("9" * 5000, 20)), "'9999"),
])
def test_voc_wrong_annotations(voc, content, part):
    """The first is named and all are counted; the message stays short."""
    write_voc(str(voc))
    put(voc / "Annotations" / "b.xml", content)
    put(voc / "Annotations" / "c.xml", content)
    refused(write_voc, voc, "2 of 3", str(voc / "Annotations" / "b.xml"), part)
    with pytest.raises(DataError) as error:
        write_voc(str(voc))
    assert len(str(error.value)) < 600


def test_voc_missing_and_ambiguous_images(voc):
    os.rename(voc / "JPEGImages" / "c.jpg", voc / "JPEGImages" / "d.jpg")
    refused(write_voc, voc, "1 of 3", "c.xml", "'c.jpg'", "missing")
    put(voc / "Annotations" / "c.xml", xml(filename="a.jpg"))
    refused(write_voc, voc, "a.xml and c.xml are both of JPEGImages/a.jpg")
    for suffix in ("png", "bmp"):
        put_image(voc / "JPEGImages" / f"c.{suffix}")
    put(voc / "Annotations" / "c.xml", xml(filename="none"))
    refused(write_voc, voc, "c.xml", "2 images 'c'")


def test_voc_lists_that_name_no_xml(voc):
    put(voc / "ImageSets" / "Main" / "train.txt", "a\n\n../b\nc 1\n")
    refused(write_voc, voc, "train.txt", "2 lines", "line 3, '../b'")
    put(voc / "ImageSets" / "Main" / "train.txt", "\n")
    refused(write_voc, voc, "no images to train on")
    os.rename(voc / "ImageSets" / "Main" / "train.txt", voc / "ImageSets" / "Main" / "val.txt")
    put(voc / "ImageSets" / "Main" / "val.txt", "a")
    refused(write_voc, voc, "no images to train on")


# --------------------------------------------------------------------------------------------------- YOLO

def test_yolo_by_hand(yolo, capsys):
    """Of 30 x 20 pixels: 0.2 x 0.4 around the middle is 6 x 8 from (12, 6); a polygon has its bounding box."""
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


def test_yolo_without_parts(tmp_path, capsys):
    """All images are to train on, in whatever folders; names of classes may stand among the labels."""
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
def test_yolo_folders_of_the_parts(yolo, train_folder, val_folder, capsys):
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
    assert "1 of 4 images are in no part and are left out ('images/test/t.png')" in error
    assert f"1 label files have no image and are left out ({yolo / 'labels' / 'train' / 'alone.txt'})" in error


def test_yolo_parts_that_hold_images_and_labels(yolo, capsys):
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
    assert "1 of 4 images are in no part and are left out ('test/images/t.png')" in error and "alone.txt" in error
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
    ("0 0.5 0.5 0.1 0.1 0.87", "confidence"), ("2 0.5 0.5 0.1 0.1", "class 2 has no name among the 2"),
    ("-1 0.5 0.5 0.1 0.1", "'-1' is no whole number"), ("0.0 0.5 0.5 0.1 0.1", "'0.0'"),
    ("car 0.5 0.5 0.1 0.1", "'car'"),
    ("1" * 5000 + " 0.5 0.5 0.1 0.1", "'1111"), ("² 0.5 0.5 0.1 0.1", "'²'"),
    ("0 0.5 0,5 0.1 0.1", "'0,5' is no number"), ("0 nan 0.5 0.1 0.1", "'nan' is no number"),
    ("0 0.5 inf 0.1 0.1", "'inf'"),
    ("0 15 10 6 8", "'15' is no fraction"), ("0 0.5 0.5 -0.2 0.1", "'-0.2'"), ("0 0.5 0.5 -0.005 0.1", "negative"),
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
    refused(write_yolo, yolo, "1 of 3 images", "b.png cannot be read")


def test_yolo_two_images_of_one_label_file(yolo):
    put_image(yolo / "images" / "train" / "a.jpg")
    refused(write_yolo, yolo, "'images/train/a.jpg'", "'images/train/a.png'", "share")


def test_yolo_images_turned_by_exif(tmp_path):
    """Labels are of the image as a viewer shows it. Of a marked image in each of the eight orientations, of two
    shapes, the box must lie on the mark in what training sees of it."""
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
            with Image.open(path) as image:                                      # the test's own table is right
                assert (np.asarray(ImageOps.exif_transpose(image)) == np.asarray(upright)).all()
            put(tmp_path / "labels" / f"{width}-{orientation}.txt", label)
    write_yolo(str(tmp_path))
    annotations = CocoBoxes(*datasets(str(tmp_path))[0])
    check_sizes(annotations)
    for i in range(16):
        image = np.asarray(load_image(annotations.path(i), annotations.size(i)))
        (x0, y0, x1, y1), = annotations.image_boxes(i)[0].round().astype(int).tolist()
        inside = np.zeros(image.shape[:2], bool)
        inside[y0:y1, x0:x1] = True
        assert ((image > 128).all(2) == inside).all(), annotations.path(i)
    stated = {row["file_name"]: (row["width"], row["height"]) for row in read(tmp_path)["images"]}
    assert stated["images/40-6.png"] == (40, 24)


def test_turned_back_twice_is_as_before():
    box = 0.125, 0.25, 0.5, 0.875
    for orientation in (1, 2, 3, 4, 5, 7):                                       # those that are their own inverse
        assert turned_back(turned_back(box, orientation), orientation) == box
    assert turned_back(turned_back(box, 6), 8) == box


# ------------------------------------------------------------------------------------ names of YOLO's classes

@pytest.mark.parametrize("text, names", [
    ("names: [car, bus]", ["car", "bus"]),
    ("nc: 2\nnames: ['car, red', \"b\\u00fcs\" , it's]  # three\ntrain: x", ["car, red", "büs", "it's"]),
    ("names: [\n  car,  # first\n  # none\n  'it''s',\n]\nnc: 2", ["car", "it's"]),
    ("names:\n  - car\n  - traffic light # red\n\n  - 'a: b'\nnc: 3", ["car", "traffic light", "a: b"]),
    ("names:   # all\n- car\n- C#\nnc: 2\n- no", ["car", "C#"]),
    ("train: a\nnames:\n  0: car\n  1: \"bus # 2\"  # no\n  # no\n\nroboflow:\n  names: x", ["car", "bus # 2"]),
    ("names:\n  1: bus\n  0: car\n", {1: "bus", 0: "car"}), ("names: {0: car, 7: 'b}us'}", {0: "car", 7: "b}us"}),
    ("names:\n  0: 0\n  1: null\n---\n  2: no", ["0", "null"]), ("names:\n- a\n- b c", ["a", "b c"]),
])
def test_names_in_yaml(text, names):
    assert yaml_names(text) == (names if isinstance(names, dict) else dict(enumerate(names)))


@pytest.mark.parametrize("text", [
    "names:", "names: []", "names: 3", "names: car", "names: names.txt", "names: [car, bus", "names: [car, [bus]]",
    "names: [car] bus", "names: ['car]", "names: ['']", "names: ['a' b]", 'names: ["\\ud800"]', 'names: ["\\x41"]',
    "names:\n  - name: car", "names:\n  car: 0", "names:\n  0: car\n  0: bus", "names:\n  0: car\n  - bus",
    "names:\n  0:",
    "names:\n  - [a, b]", "names:\n  - |\n    car", "names:\n  - &a car", "names:\n  -", "names: *other",
    "names:\n  - 'car' 'bus'", "names: [a, , b]",
])
def test_names_that_are_not_understood(yolo, text):
    """An error, never a guess."""
    put(yolo / "data.yaml", text)
    refused(write_yolo, yolo, str(yolo / "data.yaml"), "no names of classes")


def test_numbered_counts_from_0():
    assert numbered([(None, "a"), (None, "b")]) == {0: "a", 1: "b"} and numbered([("5", "a")]) == {5: "a"}


def test_where_the_names_are_looked_for(yolo, capsys):
    """data.yaml, then another file with names, then classes.txt; at last the numbers that occur, with a warning."""
    def names():
        write_yolo(str(yolo))
        return [(row["id"], row["name"]) for row in read(yolo)["categories"]]
    put(yolo / "other.yaml", "names: [x, y]")
    put(yolo / "classes.txt", "eins\nzwei\ndrei\n")
    assert names() == [(0, "car"), (1, "bus")]
    os.remove(yolo / "data.yaml")
    put(yolo / "hyper.yaml", "lr: 0.1")
    assert names() == [(0, "x"), (1, "y")]
    put(yolo / "more.yml", "names: [x, y]")
    refused(write_yolo, yolo, "more.yml, other.yaml", "data.yaml")
    put(yolo / "data.yaml", "train: images/train")
    assert names() == [(0, "eins"), (1, "zwei"), (2, "drei")]
    put(yolo / "classes.txt", "eins\n\ndrei")
    refused(write_yolo, yolo, "classes.txt", "number 1 is empty")
    os.remove(yolo / "classes.txt")
    capsys.readouterr()
    put(yolo / "labels" / "train" / "a.txt", "70 0.5 0.5 1 1\n")
    assert names() == [(0, "0"), (70, "70")]
    assert capsys.readouterr().err.count("named after their numbers") == 1


# ----------------------------------------------------------------------------------------------- both layouts

def test_training_takes_the_folder(voc, yolo, capsys):
    """--data DIR finds the images; without a val file there is no evaluation, and one line says so."""
    write_yolo(str(yolo))
    annotations, validation = train.open_data(train.parse_arguments(["--data", str(yolo)]), 0)
    assert [c["id"] for c in annotations.classes] == [0, 1] and validation.classes == annotations.classes
    assert validation.path(0) == str(yolo / "images" / "val" / "b.png")
    batch = TrainBatches(annotations, batch_size=2, min_sizes=[20], max_size=64)[0]
    assert batch.images.shape == (2, 3, 32, 32) and not batch.skipped
    write_voc(str(voc))
    capsys.readouterr()
    annotations, validation = train.open_data(train.parse_arguments(["--data", str(voc)]), 0)
    assert validation is None and annotations.path(0) == str(voc / "JPEGImages" / "a.jpg")
    assert capsys.readouterr().out == f"no evaluation: there is no {voc / 'annotations' / 'instances_val2017.json'}\n"
    train.open_data(train.parse_arguments(["--data", str(voc)]), 1)
    assert capsys.readouterr().out == ""                                        # the first process alone says it


def test_only_a_folder_of_ones_own_goes_without_evaluation(voc, tmp_path, monkeypatch):
    """coco, cityscapes and shapes have a val file, and a --val-json that is named must be there."""
    write_voc(str(voc))
    with pytest.raises(DataError, match="none.json is missing"):
        train.open_data(train.parse_arguments(["--data", str(voc), "--val-json", "none.json", "--val-images", "."]), 0)
    monkeypatch.chdir(tmp_path)
    os.mkdir("datasets")
    os.rename(voc, "datasets/shapes")
    os.rename("datasets/shapes/JPEGImages", "datasets/shapes/train2017")
    os.mkdir("datasets/shapes/train2017/JPEGImages")
    for path in Path("datasets/shapes/train2017").glob("*.jpg"):
        path.rename(path.parent / "JPEGImages" / path.name)
    with pytest.raises(DataError, match="instances_val2017.json is missing"):
        train.open_data(train.parse_arguments(["--data", "shapes"]), 0)
    os.remove("datasets/shapes/annotations/instances_train2017.json")
    with pytest.raises(DataError, match="instances_train2017.json is missing"):
        train.open_data(train.parse_arguments(["--data", "datasets/shapes"]), 0)


def test_folders_of_images(voc, yolo):
    """DIR itself, for both parts, unless COCO's own folder is there."""
    for root, folder in ((voc, "JPEGImages"), (yolo, "images")):
        assert [images for _, images in datasets(str(root))] == [str(root)] * 2
        os.mkdir(root / "train2017")
        assert [images for _, images in datasets(str(root))] == [str(root / "train2017"), str(root / "val2017")]


def test_an_earlier_conversion_is_replaced_and_its_val_file_does_not_stay(voc, capsys):
    for split, lines in (("train", "c\nb\n"), ("val", "a\n")):
        put(voc / "ImageSets" / "Main" / f"{split}.txt", lines)
    write_voc(str(voc))
    assert train.open_data(train.parse_arguments(["--data", str(voc)]), 0)[1] is not None
    (voc / "ImageSets").rename(voc / "old")
    capsys.readouterr()
    write_voc(str(voc))
    val_json = voc / "annotations" / "instances_val2017.json"
    assert f"{val_json}: removed" in capsys.readouterr().out and not val_json.exists()
    assert len(read(voc)["images"]) == 3
    assert train.open_data(train.parse_arguments(["--data", str(voc)]), 0)[1] is None


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("content", ['{"images": [], "info": {}}', "", b"\xff\xfe"])
def test_annotation_files_of_another_origin_stay(yolo, split, content):
    (yolo / "labels" / "val").mkdir()
    put(yolo / "annotations" / f"instances_{split}2017.json", content)
    refused(write_yolo, yolo, f"instances_{split}2017.json", "move it away")


def test_folders_in_the_way(voc, yolo):
    """With them train.py would look for the images elsewhere."""
    for root, write in ((voc, write_voc), (yolo, write_yolo)):
        for folder in ("train2017", "leftImg8bit"):
            (root / folder).mkdir()
            refused(write, root, str(root / folder), "in the way")
            (root / folder).rmdir()


def test_missing_and_empty_folders(tmp_path):
    for write, folders in ((write_voc, ("Annotations", "JPEGImages")), (write_yolo, ("images", "labels"))):
        root = tmp_path / write.__name__
        for folder in folders:
            refused(write, root, str(root / folder), "missing", *folders)
            (root / folder).mkdir(parents=True)
        refused(write, root, str(root), "no images to train on")


def test_without_any_box_nothing_is_written(voc, yolo):
    for name in "ac":
        put(voc / "Annotations" / f"{name}.xml", xml(filename=f"{name}.jpg"))
        put(yolo / "labels" / "train" / f"{name}.txt", "\n")
    put(yolo / "labels" / "val" / "b.txt", "0 0.5 0.5 1 1")
    refused(write_voc, voc, "no image to train on has a box")
    refused(write_yolo, yolo, "no image to train on has a box")


def test_a_folder_that_cannot_be_written(voc):
    put(voc / "annotations", "a file")
    refused(write_voc, voc, "cannot write annotation file", "annotations")


def test_a_failed_write_leaves_the_old_pair(yolo, monkeypatch):
    """Both files are whole under other names before the first is replaced."""
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
    put(voc / "Annotations" / "a.xml", xml(*[thing()] * 10_000, filename="a.jpg"))
    write_voc(str(voc))
    assert len(boxes(voc)) == 10_001


def test_the_command_line_ends_with_one_line(tmp_path):
    for command in ("voc", "yolo"):
        with pytest.raises(SystemExit) as end:
            main([command, str(tmp_path / "none")])
        assert end.value.code.startswith("error: folder ") and "\n" not in end.value.code
