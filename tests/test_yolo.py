"""yolo.py: small folders in YOLO's layout as COCO files worked out by hand; names of classes."""
import os
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from formats.coco import CocoBoxes, DataError, datasets
from formats.commands import main
from formats.pictures import check_sizes, read_image
from formats.voc import write_voc
from formats.yolo import write_yolo
from label_folders import boxes, put, put_image, read, refused


def test_yolo_by_hand(yolo, capsys):
    """In 30 x 20 pixels, 0.2 x 0.4 around the middle is 6 x 8 from (12, 6); a polygon becomes its bounding box."""
    put(yolo / "labels" / "train" / "a.txt", "\ufeff1 0.5 0.5 0.2 0.4\r\n\n  0\t0.1 0.2  0.3 0.9 0.2 0.1 0.25 0.3\n")
    main(["yolo", str(yolo)])
    captured = capsys.readouterr()
    assert captured.out == (f"{yolo}/annotations/instances_train2017.json: 2 images, 3 boxes, 2 classes\n"
                            f"{yolo}/annotations/instances_val2017.json: 1 image, 0 boxes, 2 classes\n")
    assert captured.err == (
        f"warning: {yolo}: 1 image without a label file, so without objects ('images/val/b.png')\n"
        f"warning: {yolo}: 1 polygon of which the box was taken ('images/train/a.png')\n")
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
    put_image(yolo / "images" / "dev" / "d.png")
    put(yolo / "labels" / train_folder / "alone.txt", "0 0.5 0.5 1 1")
    write_yolo(str(yolo))
    assert [row[0] for row in boxes(yolo)] == [f"images/{train_folder}/{name}.png" for name in "ac"]
    assert [row["file_name"] for row in read(yolo, "val")["images"]] == [f"images/{val_folder}/b.png"]
    error = capsys.readouterr().err
    assert "1 image of the test part, left out ('images/test/t.png')" in error
    assert "1 image in neither train nor val, left out; folders that are understood: train: train," in error
    assert "('images/dev/d.png')" in error
    assert f"1 text file without an image, left out ('labels/{train_folder}/alone.txt')" in error


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
    assert "1 image of the test part, left out ('test/images/t.png')" in error
    assert "alone.txt" in error
    train_files, val_files = datasets(str(yolo))
    assert len(CocoBoxes(*train_files)) == 2 and len(CocoBoxes(*val_files)) == 1


def test_yolo_val_without_train_and_val_without_images(yolo, capsys):
    os.remove(yolo / "images" / "val" / "b.png")
    write_yolo(str(yolo))
    assert not (yolo / "annotations" / "instances_val2017.json").exists()
    for kind in ("images", "labels"):
        (yolo / kind / "train").rename(yolo / kind / "valid")
    refused(write_yolo, yolo, "nothing to train on")


def test_yolo_a_linked_folder_of_images(yolo, tmp_path):
    (yolo / "images" / "train").rename(tmp_path / "elsewhere")
    (yolo / "images" / "train").symlink_to(tmp_path / "elsewhere")
    write_yolo(str(yolo))
    assert [row[0] for row in boxes(yolo)] == ["images/train/a.png", "images/train/c.png"]


@pytest.mark.parametrize("line, part", [
    ("0 0.5 0.5 0.1", "4 numbers"), ("0", "'0'"), ("0 0.1 0.1 0.2 0.2 0.3 0.9 0.4", "8 numbers"),
    ("0 0.5 0.5 0.1 0.1 0.87", "confidence"),
    ("2 0.5 0.5 0.1 0.1", "not among the 2 that have a name (1): labels/train/a.txt, line 3: 2"),
    ("-1 0.5 0.5 0.1 0.1", "not a whole number (1): labels/train/a.txt, line 3: '-1'"),
    ("0.0 0.5 0.5 0.1 0.1", "'0.0'"),
    ("car 0.5 0.5 0.1 0.1", "'car'"),
    ("1" * 5000 + " 0.5 0.5 0.1 0.1", "'1111"), ("² 0.5 0.5 0.1 0.1", "'²'"),
    ("0 0.5 0,5 0.1 0.1", "'0,5'"), ("0 nan 0.5 0.1 0.1", "not numbers (1): labels/train/a.txt, line 3: 'nan'"),
    ("0 0.5 inf 0.1 0.1", "'inf'"),
    ("0 15 10 6 8", "no fraction (0 to 1) of the image's width or height (1): labels/train/a.txt, line 3: '15'"),
    ("0 0.5 0.5 -0.2 0.1", "'-0.2'"), ("0 0.5 0.5 -0.005 0.1", "negative"),
    ("0 0.1 0.1 0.2 1.2 0.3 0.9", "'1.2'"), ("0\x1b[2J 0.5 0.5 0.1 0.1", r"'0\x1b[2J'"),
])
def test_yolo_wrong_labels(yolo, line, part):
    write_yolo(str(yolo))
    put(yolo / "labels" / "train" / "a.txt", f"1 0.5 0.5 0.2 0.4\n\n{line}\n")
    refused(write_yolo, yolo, "1 image cannot", "labels/train/a.txt, line 3: ", part)
    put(yolo / "labels" / "train" / "c.txt", line)
    refused(write_yolo, yolo, "2 images cannot", "a.txt, line 3", "c.txt, line 1")
    with pytest.raises(DataError) as error:
        write_yolo(str(yolo))
    assert len(str(error.value)) < 500 and "\x1b" not in str(error.value)


def test_yolo_unreadable_files(yolo):
    put(yolo / "labels" / "train" / "a.txt", b"0 0.5 0.5 0.2 0.4 \xff\n")
    refused(write_yolo, yolo, "a.txt is not UTF-8")
    put(yolo / "labels" / "train" / "a.txt", "")
    put(yolo / "images" / "val" / "b.png", b"no image")
    refused(write_yolo, yolo, "1 image cannot", "b.png cannot be decoded")


def test_yolo_two_images_of_one_label_file(yolo, capsys):
    """All such pairs are named; --skip converts the others."""
    for name in "ac":
        put_image(yolo / "images" / "train" / f"{name}.jpg")
    put_image(yolo / "images" / "train" / "d.jpg")
    put(yolo / "labels" / "train" / "d.txt", "0 0.5 0.5 1 1\n")
    refused(write_yolo, yolo, "share a label file (2): 'images/train/a.jpg' and 'images/train/a.png', "
            "'images/train/c.jpg' and 'images/train/c.png'", "4 images cannot")
    write_yolo(str(yolo), skip=True)
    assert [row["file_name"] for row in read(yolo)["images"]] == ["images/train/d.jpg"]
    assert "4 images cannot be converted, left out: images that share" in capsys.readouterr().err


def test_yolo_all_faults_at_once(yolo, capsys):
    """The first five of each kind with file and line; --skip leaves these images out."""
    wrong = ["0 1.5 0.5 0.2 0.2", "0.0 0.5 0.5 0.2 0.2\n0 2 0.5 0.1 0.1", b"\xff", "9 0.5 0.5 0.2 0.2"]
    for i in range(8):
        put_image(yolo / "images" / "train" / f"w{i}.png")
        put(yolo / "labels" / "train" / f"w{i}.txt", wrong[i] if i < 4 else wrong[0])
    put(yolo / "images" / "train" / "c.png", b"no image")
    refused(write_yolo, yolo, "9 images cannot", "height (6): labels/train/w0.txt, line 1: '1.5', labels/train/w1.txt, "
            "line 2: '2', labels/train/w4", ", ...; ", "number (1): labels/train/w1.txt, line 1: '0.0'",
            "w2.txt is not UTF-8", "(1): labels/train/w3.txt, line 1: 9", "images/train/c.png cannot be decoded")
    write_yolo(str(yolo), skip=True)
    assert [row["file_name"] for row in read(yolo)["images"]] == ["images/train/a.png"]


def test_yolo_images_without_labels_and_with_empty_ones_are_told_apart(yolo, capsys):
    for name in "de":
        put_image(yolo / "images" / "train" / f"{name}.png")
    put(yolo / "labels" / "train" / "d.txt", "\n")
    put(yolo / "labels" / "train" / "c.txt", "0 0.5 0.5 0 0.2\n0 0.5 0.5 1 1")
    write_yolo(str(yolo))
    said = capsys.readouterr().err
    assert "2 images without a label file, so without objects ('images/train/e.png', 'images/val/b.png')" in said
    assert "1 image with an empty label file, so without objects ('images/train/d.png')" in said
    assert "1 box without area, which training drops ('images/train/c.png')" in said


def test_yolo_what_is_not_used_is_said(yolo, capsys):
    """Hidden files and thumbnails are left out in silence."""
    for name in (".ipynb_checkpoints/a-checkpoint.png", "@eaDir/a.png", "__MACOSX/a.png", ".thumb/a.png"):
        put_image(yolo / "images" / "train" / name)
    put(yolo / "images" / "train" / "phone.HEIC", b"")
    put(yolo / "weights.pt", b"")
    put_image(yolo / "runs" / "detect" / "a_drawn.png")
    put(yolo / "old" / "labels" / "train" / "a.txt", "9 9 9 9 9")
    put(yolo / "labels" / "train2" / "a.txt", "9 9 9 9 9")
    write_yolo(str(yolo))
    lines = capsys.readouterr().err.splitlines()
    assert len(boxes(yolo)) == 2 and len(lines) == 5
    for part in ("'images/train/phone.HEIC'", "not used ('weights.pt')", "without a label file",
                 "in folders without labels, left out ('runs/det"):
        assert sum(part in line for line in lines) == 1
    assert any("2 text files without an image, left out ('labels/train2/a.txt', 'old/labels/train/a.txt')" in line
               for line in lines)


def test_yolo_an_image_with_two_label_files(yolo, capsys):
    """labels/ comes before a file beside the image, and both before other folders."""
    put(yolo / "images" / "train" / "a.txt", "0 0.5 0.5 1 1\n")
    put(yolo / "backup" / "train" / "c.txt", "1 0.5 0.5 0.2 0.4\n")
    write_yolo(str(yolo))
    assert [row[1:] for row in boxes(yolo)] == [("bus", [12, 6, 6, 8]), ("car", [0, 0, 30, 20])]
    said = capsys.readouterr().err
    assert "1 label file of an image that has another one, left out ('images/train/a.txt')" in said
    assert "1 text file without an image, left out ('backup/train/c.txt')" in said and said.count(".txt") == 2


def test_yolo_labels_of_another_part_are_not_taken(yolo):
    """images/train/a and images/val/a are two images; a label of one is never that of the other."""
    put_image(yolo / "images" / "val" / "a.png")
    put_image(yolo / "train" / "x.png")
    put(yolo / "val" / "x.txt", "0 0.5 0.5 1 1")
    put_image(yolo / "val" / "y.png")
    write_yolo(str(yolo))
    assert [row[0] for row in boxes(yolo)] == ["images/train/a.png", "images/train/c.png"] and not boxes(yolo, "val")


@pytest.mark.parametrize("text, part", [
    ("train: images/nowhere\nval: images/val", "data.yaml: train: 'images/nowhere' is not in"),
    ("train: list.txt\nval: images/val", "list.txt: lines that name no file"),
])
def test_yaml_that_names_nothing_to_train_on(yolo, text, part):
    pytest.importorskip("yaml")
    put(yolo / "data.yaml", f"names: [car, bus]\n{text}")
    put(yolo / "list.txt", "images/train/a.png\nimages/train/z.png\n")
    refused(write_yolo, yolo, part)


def test_yaml_whose_validation_is_missing(yolo, capsys):
    """As Roboflow writes it for a set that has none."""
    pytest.importorskip("yaml")
    put(yolo / "data.yaml", "names: [car, bus]\ntrain: ../images/train\nval: ../valid/images")
    write_yolo(str(yolo))
    said = capsys.readouterr().err
    assert "no images to evaluate on" in said and "1 image in neither train nor val, left out" in said
    assert "data.yaml: val: '../valid/images' is not in" in said


POINTS = "0.6 0.5 0.7 0.45 0.65 0.6"                                       # three points in the box 0.7 0.55 0.3 0.4
SEEN = "0.6 0.5 2 0.7 0.45 1 0 0 0"                                        # with visibilities; the last is not labelled


@pytest.mark.parametrize("yaml, lines, bbox", [
    ("kpt_shape: [3, 2]", [f"0 0.7 0.55 0.3 0.4 {POINTS}"], [16.5, 7, 9, 8]),
    ("kpt_shape: [3, 3]", [f"0 0.7 0.55 0.3 0.4 {SEEN}"], [16.5, 7, 9, 8]),
    ("", [f"0 0.7 0.55 0.3 0.4 {SEEN}"], [16.5, 7, 9, 8]),                 # an even count, visibilities
    ("", [f"0 0.7 0.55 0.3 0.4 {SEEN} 0.7 0.6 2"], [16.5, 7, 9, 8]),
    ("", [f"0 0.7 0.55 0.1 0.1 {POINTS}"], [3, 2, 18, 10]),                # points outside of the box: a polygon
    ("", ["0 0.5 0.5 0.52 0.5 0.52 0.55 0.5 0.55"], [15, 10, 0.6, 1]),     # a small square in the middle
    ("", ["0 0.5 0.5 0.6 0.5 0.55 0.6"], [15, 10, 3, 2]),                  # a triangle
    ("", ["0 0.5 0.5 0.1 0.1 " + "0.5 0.5 " * 2, "0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2 0.1 0.1"], [3, 2, 12, 8]),
    ("", ["0 0.7 0.55 0.1 0.2 0.68 0.5 0.72 0.6"], [19.5, 9, 3, 4]),       # 0.1, 0.2 would be a corner far away
])
def test_key_points(yolo, yaml, lines, bbox):
    """A box and key points, or a polygon."""
    pytest.importorskip("yaml")
    put(yolo / "data.yaml", f"names: [car, bus]\n{yaml}")
    put(yolo / "labels" / "train" / "a.txt", "\n".join(lines))
    write_yolo(str(yolo))
    assert boxes(yolo)[0][2] == pytest.approx(bbox, abs=0.01)


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
    ("nc: 2\nnames: ['car, red', \"b\\u00fcs\" , it's]  # three\ntrain: images/train", ["car, red", "büs", "it's"]),
    ("names:   # all\n- car\n- C#\nnc: 2\n", ["car", "C#"]),
    ("train: images/train\nnames:\n  0: car\n  1: \"bus # 2\"  # no\n\nroboflow:\n  names: x", ["car", "bus # 2"]),
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
    """PyYAML is not needed if no YAML file says what is read."""
    monkeypatch.setitem(sys.modules, "yaml", None)
    put(yolo / "data.yaml", "path: images/train")
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
    capsys.readouterr()
    assert names_of(yolo) == [(0, "car"), (1, "bus")]
    assert "1 list of other classes than data.yaml, which was followed ('classes.txt')" in capsys.readouterr().err
    os.remove(yolo / "data.yaml")
    put(yolo / "hyper.yaml", "lr: 0.1")
    assert names_of(yolo) == [(0, "x"), (1, "y")]
    put(yolo / "more.yml", "names: [x, z]")
    refused(write_yolo, yolo, f"{yolo / 'more.yml'} and {yolo / 'other.yaml'} list different classes")
    put(yolo / "data.yaml", "train: images/train")
    assert names_of(yolo) == [(0, "eins"), (1, "zwei"), (2, "drei")]
    put(yolo / "labels" / "classes.txt", "eins\nzwo\n")
    refused(write_yolo, yolo, f"{yolo / 'classes.txt'} and {yolo / 'labels' / 'classes.txt'} list different classes")
    os.remove(yolo / "labels" / "classes.txt")
    put(yolo / "classes.txt", "eins\n\ndrei")
    refused(write_yolo, yolo, "classes.txt", "entry 1: ")
    os.remove(yolo / "classes.txt")
    capsys.readouterr()
    put(yolo / "labels" / "train" / "a.txt", "70 0.5 0.5 1 1\n")
    assert names_of(yolo) == [(0, "0"), (70, "70")]
    assert capsys.readouterr().err.count("named after their numbers") == 1


def test_yolo_a_label_is_that_of_the_nearest_image(yolo, capsys):
    """Drawings of a program are not the images, though labels/ would do for them, too."""
    put_image(yolo / "runs" / "train" / "a.png")
    write_yolo(str(yolo))
    assert [row[0] for row in boxes(yolo)] == ["images/train/a.png", "images/train/c.png"]


def test_yolo_data_yaml_of_a_folder_below(yolo, tmp_path):
    pytest.importorskip("yaml")
    os.remove(yolo / "classes.txt")
    put(yolo / "data.yaml", "names: [car, bus]\ntrain: images/train\nval: [images/val, images/train]")
    write_yolo(str(tmp_path))
    assert boxes(tmp_path) == boxes(tmp_path, "val") == [("yolo/images/train/a.png", "bus", [12, 6, 6, 8]),
                                                         ("yolo/images/train/c.png", "car", [0, 0, 30, 20])]


def test_options_of_the_command_line(yolo, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    put_image(yolo / "images" / "train" / "a.png", 20, 30, exif=exif)
    put(yolo / "labels" / "train" / "c.txt", "rubbish")
    main(["yolo", str(yolo), "--skip", "--exif", "stored", "--max-pixels", "599"])
    assert boxes(yolo) == [("images/train/a.png", "bus", [12, 6, 6, 8])]
    assert read(yolo)["info"]["exif"] == "stored"
    said = capsys.readouterr().err
    assert "have more than 599 pixels" in said and "those of the stored image; --exif" in said


def test_a_val_part_that_is_skipped_as_a_whole_is_no_file(yolo, capsys):
    put(yolo / "labels" / "val" / "b.txt", "rubbish")
    write_yolo(str(yolo), skip=True)
    assert not (yolo / "annotations" / "instances_val2017.json").exists()
    assert "no images to evaluate on" in capsys.readouterr().err


def test_yaml_and_data_files_of_other_programs(yolo):
    """DVC's params.yaml, what Ultralytics writes for a run, a binary file."""
    put(yolo / "params.yaml", "train:\n  lr: 0.01\nval: true\n")
    put(yolo / "runs" / "args.yaml", "train: x\nval: true\n")
    put(yolo / "x.data", b"\xff\x00train")
    write_yolo(str(yolo))
    assert [row[1] for row in boxes(yolo)] == ["bus", "car"]


def test_the_path_of_data_yaml(yolo, tmp_path):
    pytest.importorskip("yaml")
    put(tmp_path / "data.yaml", "names: [car, bus]\npath: yolo\ntrain: images/train\nval: images/val")
    put_image(tmp_path / "images" / "train" / "x.png")
    write_yolo(str(tmp_path))
    assert [row[0] for row in boxes(tmp_path)] == ["yolo/images/train/a.png", "yolo/images/train/c.png"]


def test_a_label_that_is_called_like_a_list(yolo):
    put_image(yolo / "train.png")
    put(yolo / "train.txt", "0 0.5 0.5 1 1\n")
    write_yolo(str(yolo))
    assert len(boxes(yolo)) == 2


def test_two_sets_side_by_side(tmp_path):
    """As Roboflow exports them, with equal classes: each data.yaml speaks of its own folder."""
    pytest.importorskip("yaml")
    for name in ("setA", "setB"):
        for part in ("train", "valid"):
            put_image(tmp_path / name / part / "images" / "1.jpg")
            put(tmp_path / name / part / "labels" / "1.txt", "0 0.5 0.5 1 1")
        put(tmp_path / name / "data.yaml", "names: [car]\ntrain: ../train/images\nval: ../valid/images")
    write_yolo(str(tmp_path))
    assert [row[0] for row in boxes(tmp_path, "val")] == ["setA/valid/images/1.jpg", "setB/valid/images/1.jpg"]
    assert len(boxes(tmp_path)) == 2
    put(tmp_path / "setB" / "data.yaml", "names: [bus]\ntrain: ../train/images")
    refused(write_yolo, tmp_path, "setA/data.yaml", "setB/data.yaml list different classes", "one by one")


def test_pictures_among_the_labels_do_not_matter(yolo, capsys):
    """Masks of the same names, a preview, a link that leads nowhere."""
    for name in ("a", "preview"):
        put_image(yolo / "labels" / "train" / f"{name}.png")
    write_yolo(str(yolo))
    assert "2 images in folders without labels, left out ('labels/train/a.png'" in capsys.readouterr().err
    (yolo / "labels" / "train" / "gone.jpg").symlink_to(yolo / "nowhere.jpg")
    before = [("images/train/a.png", "bus", [12, 6, 6, 8]), ("images/train/c.png", "car", [0, 0, 30, 20])]
    (yolo / "images" / "val" / "b.png").rename(yolo / "b.png")
    (yolo / "images" / "train").rename(yolo / "images" / "all")
    (yolo / "labels" / "train").rename(yolo / "labels" / "all")
    write_yolo(str(yolo))
    assert boxes(yolo) == [(name.replace("train", "all"), *rest) for name, *rest in before]
    assert "in folders without labels, left out ('b.png', 'labels/all/a.png'" in capsys.readouterr().err


@pytest.mark.parametrize("image, label, orphan", [
    ("images_val/9.png", None, "labels_train/9.txt"), ("images/train/9.png", None, "labels_old/train/9.txt"),
    ("images/train/9.png", None, "labels/train_old/9.txt"), ("depth_train/9.png", None, "labels_train/9.txt"),
    ("images_train/a.png", "labels_train/a.txt", "labels_val/a.txt")])
def test_labels_of_another_folder_are_not_taken(yolo, image, label, orphan, capsys):
    """Where the right folder has none for an image, an orphan of a similar folder is no substitute."""
    put_image(yolo / image)
    put_image(yolo / "images_train" / "1.png")
    put(yolo / "labels_train" / "1.txt", "0 0.5 0.5 1 1")
    put(yolo / orphan, "1 0.5 0.5 1 1")
    if label:
        put(yolo / label, "0 0.5 0.5 0.2 0.4")
    write_yolo(str(yolo))
    of_image = [row for split in ("train", "val") for row in boxes(yolo, split) if row[0] == image]
    assert of_image == ([(image, "car", [12, 6, 6, 8])] if label else [])
    assert orphan in capsys.readouterr().err


def test_names_that_differ_in_case_or_composition(tmp_path):
    for image, label in (("IMG_1.JPG", "img_1.txt"), ("IMG_2.jpg", "IMG_2.TXT"), ("u\u0308.jpg", "\u00fc.txt"),
                         ("x.jpg", "x.txt"), ("X.jpg", "X.txt")):
        put_image(tmp_path / "images" / image, format="JPEG")
        put(tmp_path / "labels" / label, "0 0.5 0.5 1 1" if image != "X.jpg" else "1 0.5 0.5 1 1")
    write_yolo(str(tmp_path))
    assert len(boxes(tmp_path)) == 5
    assert [row[1] for row in boxes(tmp_path) if row[0] in ("images/x.jpg", "images/X.jpg")] == ["1", "0"]


@pytest.mark.parametrize("train_folder, val_folder", [
    ("train_images", "val_images"), ("images-train", "images-validation"), ("training set", "validation set")])
def test_parts_beside_words_that_say_nothing(tmp_path, train_folder, val_folder):
    for name in (train_folder, val_folder):
        put_image(tmp_path / name / "1.jpg")
        put(tmp_path / name / "1.txt", "0 0.5 0.5 1 1")
    put_image(tmp_path / "train station" / "2.jpg")
    put(tmp_path / "train station" / "2.txt", "0 0.5 0.5 1 1")
    write_yolo(str(tmp_path))
    assert [row[0] for row in boxes(tmp_path)] == [f"{train_folder}/1.jpg"]
    assert [row[0] for row in boxes(tmp_path, "val")] == [f"{val_folder}/1.jpg"]


def test_lists_of_ultralytics(yolo):
    for part, name in (("train", "a"), ("val", "c"), ("test", "a")):
        put(yolo / f"autosplit_{part}.txt", f"./images/train/{name}.png\n")
    write_yolo(str(yolo))
    assert [row[0] for row in boxes(yolo)] == ["images/train/a.png"]
    assert [row[0] for row in boxes(yolo, "val")] == ["images/train/c.png"]


def test_tracks_are_no_triangles(yolo):
    put(yolo / "labels" / "train" / "a.txt", "0 0.25 0.5 0.3 0.5 0.93 1")
    refused(write_yolo, yolo, "the number of a track", "a.txt, line 1: '0.93 1'")


def test_labels_in_utf_16(yolo):
    put(yolo / "labels" / "train" / "a.txt", "1 0.5 0.5 0.2 0.4\r\n".encode("utf-16"))
    put(yolo / "classes.txt", "car\nbus\n".encode("utf-16"))
    write_yolo(str(yolo))
    assert boxes(yolo)[0] == ("images/train/a.png", "bus", [12, 6, 6, 8])


def test_where_a_label_was_sought(tmp_path):
    put_image(tmp_path / "images" / "cam" / "1.jpg")
    put(tmp_path / "labels" / "1.txt", "0 0.5 0.5 1 1")
    refused(write_yolo, tmp_path, "sought for 'images/cam/1.jpg': 'images/cam/1.txt' or 'labels/cam/1.txt' or "
            "'images/cam/labels/1.txt'")


def test_results_in_the_folder_are_not_read(yolo, voc, capsys):
    """Drawings and polygons of predict.py, drawings of a run."""
    for root, image in ((yolo, "images/train/a"), (voc, "JPEGImages/a")):
        for name in ("masks.json", "review.html"):
            put(root / "first-masks" / name, "{}")
        put_image(root / "first-masks" / "pictures" / f"{image}.jpg")
        put(root / "first-masks" / "labels-segment" / "a.txt", "0 0.1 0.1 0.5 0.5 0.9 0.1")
        put_image(root / "first-masks" / "SegmentationObject" / "a.png")
        for name in ("metrics.jsonl", "config.json"):
            put(root / "runs" / "mine" / name, "{}")
        put_image(root / "runs" / "mine" / "labels-0000002.png")
    write_yolo(str(yolo))
    write_voc(str(voc))
    said = capsys.readouterr().err
    assert said.count("2 folders of results of predict.py or train.py, not read ('first-masks', 'runs/mine')") == 2
    assert said.count("\n") == 3 and len(boxes(yolo)) == len(boxes(voc)) == 2
