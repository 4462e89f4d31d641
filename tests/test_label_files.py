"""tools/label_files.py: masks back to YOLO and Pascal VOC, read again by a parser of their own rules and by Pillow."""
import contextlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import predict
from formats import files
from formats.coco import CocoBoxes
from formats.voc import write_voc
from formats.yolo import write_yolo
from helpers import one_line_error
from label_folders import put, put_image, read, xml, xml_object
from tools import label_files
from tools.label import BoxMasks
from tools.label_files import bridged, object_numbers, one_polygon, yolo_files, yolo_line, yolo_places


def as_rle(mask: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def blocks(size: tuple[int, int], *parts: tuple[int, int, int, int]) -> np.ndarray:
    """A mask (bool) of rectangles x0 y0 x1 y1."""
    mask = np.zeros(size, bool)
    for x0, y0, x1, y1 in parts:
        mask[y0:y1, x0:x1] = True
    return mask


def iou(one: dict, two: dict) -> float:
    return float(coco_mask.iou([one], [two], [0])[0, 0])


def yolo_objects(text: str, size: tuple[int, int]) -> list[tuple[int, dict]]:
    """(class, mask) of each line of a label file, by YOLO's rules: a whole number, then at least three x y of 0..1."""
    found = []
    for line in text.splitlines():
        assert re.fullmatch(r"\d+( [01]\.\d+ [01]\.\d+){3,}", line), line
        number, *values = line.split(" ")
        xy = np.array(values, float).reshape(-1, 2)
        assert (xy >= 0).all() and (xy <= 1).all()
        polygon = (xy * [size[1], size[0]]).flatten().tolist()
        found.append((int(number), coco_mask.merge(coco_mask.frPyObjects([polygon], *size))))
    return found


def by_image(json_path: Path) -> dict[str, list[dict]]:
    """The annotations of each image, by its file name."""
    content = json.loads(json_path.read_text())
    return {image["file_name"]: [row for row in content["annotations"] if row["image_id"] == image["id"]]
            for image in content["images"]}


def label(json_path: Path, images: Path, out: Path, *options) -> None:
    predict.main(["--boxes", str(json_path), "--images", str(images), "--out", str(out), "--workers", "0",
                  *map(str, options)])


def failing(*arguments) -> int:
    with pytest.raises(SystemExit) as end:
        predict.main([*map(str, arguments)])
    return end.value.code


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def coco_file(folder: Path, names: list[str], objects: list[list[dict]], size=(20, 30)) -> Path:
    """boxes.json and images/; objects: of each image, boxes xywh with what else their annotation has."""
    images, annotations = [], []
    for number, (name, rows) in enumerate(zip(names, objects), 1):
        put_image(folder / "images" / name, *size)
        images.append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
        annotations += [{"id": len(annotations) + k, "image_id": number, "category_id": 7, **row}
                        for k, row in enumerate(rows)]
    path = folder / "boxes.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations,
                                "categories": [{"id": 7, "name": "big  cat"}, {"id": 2, "name": "dog"}]}))
    return path


@pytest.fixture
def given(monkeypatch):
    """given([mask or None, ...], scores) makes predict.py find these masks."""
    def give(masks: list[np.ndarray | None], scores: list[float] | None = None) -> list[dict | None]:
        rles = [None if mask is None else as_rle(mask) | {"counts": as_rle(mask)["counts"].decode()} for mask in masks]
        labels = BoxMasks(rles, np.array([1.0] * len(rles) if scores is None else scores),
                          [None if rle is None else "colours" for rle in rles])
        monkeypatch.setattr(predict, "label_without_model", lambda *_: labels)
        return rles
    return give


# ----------------------------------------------------------------------------------------------------- YOLO


@pytest.mark.parametrize("layout", ["images/{split}/{name}", "{split}/images/{name}", "images/{name}"])
def test_yolo_and_back(layout, drawn, tmp_path, capsys):
    """Boxes of two splits to COCO, masks, labels; these in the place that is named, to boxes again."""
    pytest.importorskip("cv2"), pytest.importorskip("yaml")
    root, out, boxes = tmp_path / "set", tmp_path / "out", CocoBoxes(drawn / "annotations/instances_train2017.json",
                                                                     drawn / "train2017")
    numbers = [3, 0, 9, 4, 11, 7, 20, 5][:len(boxes.classes)]
    for i in range(len(boxes)):
        split = ("train", "val")[i % 2]
        image = root / layout.format(split=split, name=f"{i}.png")
        image.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(boxes.path(i), image)
        put(root / layout.replace("images", "labels").format(split=split, name=f"{i}.txt"), "".join(
            f"{numbers[k]} {(x0 + x1) / 128} {(y0 + y1) / 128} {(x1 - x0) / 64} {(y1 - y0) / 64}\n"
            for (x0, y0, x1, y1), k in zip(boxes.image_boxes(i)[0].tolist(), boxes.image_boxes(i)[1].tolist())))
    put(root / "data.yaml", "names:\n" + "".join(
        f"  {number}: {c['name']}\n" for number, c in sorted(zip(numbers, boxes.classes), key=lambda one: one[0])))
    write_yolo(str(root))
    splits = ["train", "val"] if "{split}" in layout else ["train"]
    files, masks = set(), {}
    for split in splits:
        capsys.readouterr()
        label(root / f"annotations/instances_{split}2017.json", root, out, "--yolo")
        where = re.search(r"labels-segment: polygons of (\d+) of \1 boxes in \d+ files; to train a YOLO segmenter, "
                          r"copy what is in (\S+) to (\S+), over the label files", capsys.readouterr().out)
        files |= {re.sub(r"(^|/)images/", r"\1", str(Path(name).with_suffix(".txt")))
                  for name in by_image(out / "masks.json")}
        for name, rows in by_image(out / "masks.json").items():
            text = (out / "labels-segment" / re.sub(r"(^|/)images/", r"\1", name)).with_suffix(".txt").read_text()
            lines = yolo_objects(text, (64, 64))
            assert [number for number, _ in lines] == [row["category_id"] for row in rows]
            assert all(iou(mask, row["segmentation"]) >= 0.97 for (_, mask), row in zip(lines, rows))
        masks[split] = by_image(out / "masks.json")
        shutil.copytree(where[2], where[3], dirs_exist_ok=True)
    assert files_below(out / "labels-segment") == files and len(files) == len(boxes)

    write_yolo(str(root))
    for split in splits:
        again = by_image(root / f"annotations/instances_{split}2017.json")
        assert again.keys() == masks[split].keys() and sum(map(len, again.values())) > 10
        for name, rows in again.items():
            for row, old in zip(rows, masks[split][name], strict=True):
                assert row["category_id"] == old["category_id"]
                assert row["bbox"] == pytest.approx(coco_mask.toBbox(old["segmentation"]), abs=0.26)


SHAPES = {
    "one pixel": blocks((20, 30), (7, 9, 8, 10)),
    "one pixel in each corner": blocks((20, 30), (0, 0, 1, 1), (29, 0, 30, 1), (0, 19, 1, 20), (29, 19, 30, 20)),
    "the whole image": blocks((20, 30), (0, 0, 30, 20)),
    "a frame's right and lower edge": blocks((20, 30), (29, 0, 30, 20), (0, 19, 30, 20)),
    "three parts": blocks((20, 30), (1, 1, 28, 5), (10, 8, 14, 12), (20, 15, 30, 20)),
    "parts that touch at a corner": blocks((20, 30), (3, 3, 6, 6), (6, 6, 9, 9)),
    "lines": blocks((20, 30), (2, 2, 28, 3), (5, 6, 6, 19), (9, 6, 10, 19)),
}


@pytest.mark.parametrize("mask", SHAPES.values(), ids=SHAPES)
def test_a_line_draws_its_mask(mask):
    pytest.importorskip("cv2")
    (number, drawn), = yolo_objects(yolo_line(4, as_rle(mask)), mask.shape)
    assert number == 4 and np.array_equal(coco_mask.decode(drawn), mask)


def test_speckles_and_filled_holes():
    """Parts at random: their bridges change no pixel. A hole becomes part of its mask."""
    pytest.importorskip("cv2")
    rng, counts = np.random.default_rng(0), []
    for _ in range(20):
        mask = np.zeros((60, 80), bool)
        for x, y, w, h in zip(*(rng.integers(0, high, 12) for high in (70, 50, 12, 12))):
            mask[y:y + h + 1, x:x + w + 1] = True
        counts.append(len(label_files.polygons(as_rle(mask))))
        (_, drawn), = yolo_objects(yolo_line(0, as_rle(mask)), mask.shape)
        filled = coco_mask.merge(coco_mask.frPyObjects(label_files.polygons(as_rle(mask)), 60, 80))
        assert iou(drawn, filled) == 1
    assert max(counts) > 5
    ring = blocks((20, 30), (5, 5, 25, 15)) & ~blocks((20, 30), (8, 8, 20, 12))
    (_, drawn), = yolo_objects(yolo_line(0, as_rle(ring)), ring.shape)
    assert np.array_equal(coco_mask.decode(drawn), blocks((20, 30), (5, 5, 25, 15)))


def area(polygon: np.ndarray) -> float:
    (x, y), (next_x, next_y) = polygon.T, np.roll(polygon, -1, 0).T
    return abs((x * next_y - next_x * y).sum()) / 2


def length(polygon: np.ndarray) -> float:
    return float(np.linalg.norm(np.roll(polygon, -1, 0) - polygon, axis=1).sum())


def test_bridges_have_no_width():
    """They go from one to the other's nearest corner and back, in both orders."""
    wide = np.array([[0, 0], [100, 0], [100, 10], [0, 10]], float)
    small = np.array([[60, 12], [80, 12], [80, 20], [60, 20]], float)
    for one, two in ((wide, small), (small, wide)):
        joined = bridged(one, two)
        assert area(joined) == area(one) + area(two)
        assert length(joined) == pytest.approx(length(one) + length(two) + 2 * np.hypot(20, 2))
    far = small + [0, 20]
    parts = [part.flatten().tolist() for part in (small, far, wide)]
    joined = one_polygon(parts)
    assert area(joined) == sum(map(area, (far, small, wide))) and joined[0].tolist() == [0, 0]  # the largest first


@pytest.mark.parametrize("size", [(20, 30), (24, 24)], ids=["oblong", "square"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_labels_are_of_the_upright_image(turn, size, tmp_path):
    """As `data.py yolo` reads them: what comes back lies on the masks again, whatever EXIF states."""
    pytest.importorskip("cv2")
    root, out = tmp_path / "set", tmp_path / "out"
    exif = Image.Exif()
    exif[0x0112] = turn
    put_image(root / "images/a.png", *size, exif=exif)
    put(root / "labels/a.txt", "0 0.3 0.25 0.4 0.2\n")
    put(root / "classes.txt", "car\n")
    write_yolo(str(root))
    before = read(root)
    label(root / "annotations/instances_train2017.json", root, out, "--yolo")
    row, = by_image(out / "masks.json")["images/a.png"]
    shutil.copytree(out / "labels-segment", root / "labels", dirs_exist_ok=True)
    write_yolo(str(root))
    assert read(root)["images"] == before["images"]
    assert read(root)["annotations"][0]["bbox"] == pytest.approx(coco_mask.toBbox(row["segmentation"]), abs=0.26)
    stored = (before["images"][0]["height"], before["images"][0]["width"])
    fractions = [float(value) for value in (out / "labels-segment/a.txt").read_text().split()[1:]]
    assert 0.09 < min(fractions[::2]) < 0.2 and 0.4 < max(fractions[::2]) < 0.51, stored
    assert 0.14 < min(fractions[1::2]) < 0.25 and 0.25 < max(fractions[1::2]) < 0.36, stored


def test_boxes_without_a_mask_have_no_line_and_images_without_boxes_an_empty_file(tmp_path, given, capsys):
    pytest.importorskip("cv2")
    path = coco_file(tmp_path, ["a.png", "b.png"], [[{"bbox": [2, 3, 9, 8], "category_id": 2},
                                                     {"bbox": [12, 3, 9, 8]}, {"bbox": [4, 3, 9, 8]}], []])
    rles = given([None, blocks((20, 30), (12, 3, 21, 11)), blocks((20, 30), (4, 3, 13, 11))], [0, 0.9, 0.2])
    label(path, tmp_path / "images", tmp_path / "out", "--yolo", "--min-score", "0.5", "--polygons")
    printed = capsys.readouterr().out
    assert "labels-segment: polygons of 1 of 3 boxes (2 have no mask and no line" in printed
    assert f"copy what is in {tmp_path}/out/labels-segment to {tmp_path}/labels, over" in printed
    folder = tmp_path / "out/labels-segment"
    assert files_below(folder) == {"a.txt", "b.txt", "classes.txt"} and (folder / "b.txt").read_text() == ""
    (number, mask), = yolo_objects((folder / "a.txt").read_text(), (20, 30))
    assert number == 1 and iou(mask, rles[1]) == 1  # the second in the order of ids
    assert (folder / "classes.txt").read_text() == "dog\nbig cat\n"
    given([blocks((20, 30), (2, 3, 9, 8))] * 3)
    label(path, tmp_path / "images", tmp_path / "out", "--yolo")
    assert "polygons of 3 of 3 boxes in 2 files" in capsys.readouterr().out
    assert [n for n, _ in yolo_objects((folder / "a.txt").read_text(), (20, 30))] == [0, 1, 1]


@pytest.mark.parametrize("images, names, places", [
    ("set", ["images/a.jpg", "images/train/a.jpg"], {".": "set/labels"}),
    ("set", ["train/images/a.jpg", "valid/images/x/a.jpg"], {"train": "set/train/labels", "valid": "set/valid/labels"}),
    ("images/set/images/train", ["a.jpg"], {".": "images/set/labels/train"}),
    ("set/photos", ["a.jpg", "x/a.jpg"], {".": "set/photos"}), (".", ["images/images/a.jpg"], {".": "labels"})])
def test_where_yolo_looks_for_labels(images, names, places):
    assert yolo_places(images, names) == {Path(one): Path(other) for one, other in places.items()}


def test_only_a_folder_is_left_out():
    assert yolo_files(["x/images/images", "x.y/images.b.jpg", "z"]) == [
        "labels-segment/x/images.txt", "labels-segment/x.y/images.b.txt", "labels-segment/z.txt"]
    assert yolo_files(["x/images"]) == ["labels-segment/x/images.txt"]


# ------------------------------------------------------------------------------------------------------ VOC


def test_voc_and_its_pngs(drawn, tmp_path):
    """From XML files to PNGs: the size, the palette, and object k where the mask of the k-th box is."""
    root, out = tmp_path / "set", tmp_path / "out"
    boxes = CocoBoxes(drawn / "annotations/instances_train2017.json", drawn / "train2017")
    for i in range(len(boxes)):
        put_image(root / f"JPEGImages/sub/{i}.jpg", 1, 1)
        Image.open(boxes.path(i)).convert("RGB").save(root / f"JPEGImages/sub/{i}.jpg")
        put(root / f"Annotations/{i}.xml", xml(*(
            xml_object(boxes.classes[k]["name"], (x0 + 1, y0 + 1, x1, y1))
            for (x0, y0, x1, y1), k in zip(*(array.tolist() for array in boxes.image_boxes(i)))), size=(64, 64)))
    write_voc(str(root))
    label(root / "annotations/instances_train2017.json", root, out, "--voc")
    assert files_below(out / "SegmentationObject") == {f"sub/{i}.png" for i in range(len(boxes))}
    overlaps = 0
    for name, rows in by_image(out / "masks.json").items():
        image = Image.open(out / "SegmentationObject/sub" / (Path(name).stem + ".png"))
        assert image.mode == "P" and image.size == (64, 64)
        values, masks = np.asarray(image), [coco_mask.decode(row["segmentation"]) > 0 for row in rows]
        assert ((values == 0) == ~np.any(masks, 0)).all() and values.max() <= len(rows)
        covered = np.sum(masks, 0)
        overlaps += (covered > 1).sum()
        for k, mask in enumerate(masks, 1):
            assert ((values == k) <= mask).all() and (values[mask & (covered == 1)] == k).all()
    assert overlaps


def test_the_palette_is_vocs():
    """Colours of the devkit: aeroplane, bicycle, person, tv monitor, and the cream of void."""
    colours = np.reshape(label_files.PALETTE, (256, 3)).tolist()
    assert [colours[k] for k in (0, 1, 2, 7, 8, 15, 20, 255)] == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 128], [64, 0, 0], [192, 128, 128], [0, 64, 128],
        [224, 224, 192]]
    assert len(set(map(tuple, colours))) == 256


def test_smaller_masks_are_in_front_and_numbers_stay(tmp_path, given):
    """A crowd and a box without a mask are void where no mask is, and have numbers; the palette is in the file."""
    objects = [{"bbox": [1, 1, 4, 4]}, {"bbox": [20, 10, 1e20, 99], "iscrowd": 1},
               {"bbox": [0, 0, 20, 16]}, {"bbox": [-9, 17.6, 12, 9]}, {"bbox": [22, 12, 2, 2]},
               {"bbox": [22, 12, 2, 2]}, {"bbox": [5, 5, 0.2, 9]}]
    path = coco_file(tmp_path, ["JPEGImages/x/a.png", "b.png"], [objects, []])
    shapes = [(1, 1, 5, 5), (0, 0, 20, 16), None, (22, 12, 24, 14), (22, 12, 24, 14)]
    given([shape and blocks((20, 30), shape) for shape in shapes])
    label(path, tmp_path / "images", tmp_path / "out", "--voc")
    assert files_below(tmp_path / "out/SegmentationObject") == {"x/a.png", "b.png"}
    image = Image.open(tmp_path / "out/SegmentationObject/x/a.png")
    expected = np.zeros((20, 30), int)
    expected[10:, 20:] = expected[18:, :3] = 255
    expected[:16, :20], expected[1:5, 1:5], expected[12:14, 22:24] = 3, 1, 6
    assert image.mode == "P" and image.getpalette() == label_files.PALETTE
    assert np.array_equal(np.asarray(image), expected)
    assert not np.asarray(Image.open(tmp_path / "out/SegmentationObject/b.png")).any()


@pytest.mark.parametrize("count, mode, void", [(254, "P", 255), (255, "I;16", 65535)])
def test_more_objects_than_colours(count, mode, void, tmp_path, given, capsys):
    path = coco_file(tmp_path, ["many.png", "one.png"], [[{"bbox": [0, 0, 1, 1]}] * count, [{"bbox": [0, 0, 3, 3]}]])
    mine = [blocks((20, 30), (k % 30, k // 30, k % 30 + 1, k // 30 + 1)) for k in range(count)]
    given([None, *mine[1:], blocks((20, 30), (0, 0, 3, 3))])
    label(path, tmp_path / "images", tmp_path / "out", "--voc")
    image = Image.open(tmp_path / "out/SegmentationObject/many.png")
    assert image.mode == mode and Image.open(tmp_path / "out/SegmentationObject/one.png").mode == "P"
    assert np.asarray(image).flatten()[:count + 1].tolist() == [void, *range(2, count + 1), 0]
    warned = "1 of 2 images have more than 254 objects: their PNG has 16 bits and no palette ('many.png')"
    assert (warned in capsys.readouterr().err) == (count > 254)


def test_no_objects():
    assert object_numbers((3, 4), []).tolist() == [[0] * 4] * 3


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("option", ["--yolo", "--voc"])
def test_only_with_boxes(option, capsys):
    assert failing("--ckpt", "a.pt", "a.jpg", "--out", "x", option) == 2
    assert f"argument {option}: only with --boxes" in one_line_error(capsys)


@pytest.mark.parametrize("option, names, message", [
    ("--yolo", ["a.jpg", "a.png"], "'a.jpg' and 'a.png' would both be labels-segment/a.txt"),
    ("--yolo", ["images/b/a.png", "b/images/a.png"], "would both be labels-segment/b/a.txt"),
    ("--yolo", ["classes.jpg"], "the list of classes and 'classes.jpg' would both be"),
    ("--voc", ["a.jpg", "JPEGImages/a.jpg"], "would both be SegmentationObject/a.png")])
def test_two_images_of_one_file_end_before_the_work(option, names, message, tmp_path, monkeypatch, capsys):
    pytest.importorskip("cv2")
    monkeypatch.setattr(predict, "label_without_model", lambda *_: pytest.fail("has begun"))
    path = coco_file(tmp_path, names, [[{"bbox": [2, 3, 9, 8]}]] * len(names))
    assert failing("--boxes", path, "--images", tmp_path / "images", "--out", tmp_path / "out", option) == 1
    assert message in one_line_error(capsys) and not (tmp_path / "out").exists()


def test_inputs_stay_and_folders_that_cannot_be_written_end_before_the_work(tmp_path, monkeypatch, capsys):
    pytest.importorskip("cv2")
    monkeypatch.setattr(predict, "label_without_model", lambda *_: pytest.fail("has begun"))
    path = coco_file(tmp_path, ["a.png"], [[{"bbox": [2, 3, 9, 8]}]])
    shutil.copytree(tmp_path / "images", tmp_path / "SegmentationObject")
    shutil.copytree(tmp_path / "images", tmp_path / "labels-segment")
    shutil.copy(path, tmp_path / "labels-segment/a.txt")
    for boxes, images, option in ((path, "SegmentationObject", "--voc"),
                                  (tmp_path / "labels-segment/a.txt", "images", "--yolo")):
        assert failing("--boxes", boxes, "--images", tmp_path / images, "--out", tmp_path, option) == 1
        assert "is an input and would be overwritten" in one_line_error(capsys)
    for folder, option in (("labels-segment", "--yolo"), ("SegmentationObject", "--voc")):
        out = tmp_path / f"out{option}"
        put(out / folder, "no folder")
        assert failing("--boxes", path, "--images", tmp_path / "images", "--out", out, option) == 1
        assert "cannot write" in one_line_error(capsys)


def test_yolo_needs_opencv_and_says_so_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cv2", None)
    path = coco_file(tmp_path, ["a.png"], [[{"bbox": [2, 3, 9, 8]}]])
    files = ["--boxes", path, "--images", tmp_path / "images", "--out", tmp_path / "out"]
    assert failing(*files, "--yolo") == 1 and not (tmp_path / "out").exists()
    assert "--yolo needs a package" in (line := one_line_error(capsys)) and "opencv-python-headless" in line
    label(path, tmp_path / "images", tmp_path / "out", "--voc")  # needs none


def test_every_file_is_whole(tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    replaced = []

    @contextlib.contextmanager
    def spy(path):
        replaced.append(Path(path))
        yield f"{path}.new"
        Path(f"{path}.new").rename(path)

    monkeypatch.setattr(files, "replacing", spy)
    path = coco_file(tmp_path, ["a.png"], [[{"bbox": [2, 3, 9, 8]}]])
    label(path, tmp_path / "images", tmp_path / "out", "--voc", "--yolo")
    folders = ("labels-segment", "SegmentationObject")
    assert {file for folder in folders for file in (tmp_path / "out" / folder).rglob("*.*")} <= {*replaced}
