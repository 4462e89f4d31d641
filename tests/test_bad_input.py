"""Each mistake in a data set ends in one line that names the file and the image or box."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import predict
import train
from PIL import Image
from torch.utils.data import DataLoader

from formats.coco import CocoBoxes, DataError, UndecodableImage, datasets, is_ours
from data import Readable, TestImages, TrainBatches
from formats.commands import main
from evaluate import print_tables
from formats.folders import read_text
from formats.pictures import check_sizes
from formats.voc import LARGEST, read_xml, write_voc
from formats.yolo import write_yolo
from helpers import annotation, noise_image, review_data, write_set

HELP = "cocodataset.org", "python data.py shapes datasets/shapes"


def is_one_line(error, *parts: str) -> None:
    """The message is one line and contains all parts."""
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


def reading(folder, *parts: str, change=None, **content) -> None:
    """CocoBoxes refuses the set of `content`, edited by `change(content)`, in a message with the file and the parts."""
    json_path, images = write_set(folder, **content)
    if change:
        content = json.loads(Path(json_path).read_text())
        change(content)
        Path(json_path).write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        CocoBoxes(json_path, images)
    is_one_line(error, json_path, *parts)


def test_missing_file_and_folder_say_how_to_get_data(tmp_path):
    json_path, images = write_set(tmp_path)
    with pytest.raises(DataError) as error:
        CocoBoxes("datasets/none.json", images)
    is_one_line(error, "datasets/none.json", "missing", *HELP)
    with pytest.raises(DataError) as error:
        CocoBoxes(tmp_path / "none.json", images)
    is_one_line(error, str(tmp_path / "none.json"), "missing", "data.py voc", "data.py yolo")
    with pytest.raises(DataError) as error:
        CocoBoxes(json_path, tmp_path / "nowhere")
    is_one_line(error, str(tmp_path / "nowhere"), "missing", "data.py voc", "data.py yolo")
    with pytest.raises(DataError) as error:
        CocoBoxes(tmp_path, images)                 # a folder instead of a file
    is_one_line(error, str(tmp_path), "cannot be read")


@pytest.mark.parametrize("text, part", [
    ("", "not JSON"), ('{"images": [', "not JSON"), (b"\xff\xfe\x00", "not JSON"),
    ("[]", "'images'"), ("7", "'images'"),
    ('{"images": {}, "annotations": [], "categories": []}', "'images'"),
])
def test_files_that_are_not_coco(tmp_path, text, part):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as error:
        CocoBoxes(path, tmp_path)
    is_one_line(error, str(path), part)


@pytest.mark.parametrize("key", ["images", "categories"])
def test_missing_list(tmp_path, key):
    reading(tmp_path, f"'{key}'", change=lambda content: content.pop(key))


def test_training_without_annotations_is_one_line(tmp_path, capsys):
    """Images alone, as in COCO's test-dev, can be evaluated but not trained on."""
    json_path, images = write_set(tmp_path)
    content = json.loads(Path(json_path).read_text())
    del content["annotations"]
    Path(json_path).write_text(json.dumps(content))
    with pytest.raises(SystemExit) as end:
        train.main(["--train-json", str(json_path), "--train-images", str(images), "--out", str(tmp_path / "run"),
                    "--device", "cpu", "--backbone", "r18-slim", "--backbone-weights", "none"])
    error = capsys.readouterr().err
    assert end.value.code == 1 and "has no usable box" in error and error.count("\n") == 1


@pytest.mark.parametrize("key", ["images", "categories"])
def test_empty_list(tmp_path, key):
    reading(tmp_path, f"no {key}", annotations=[], **{key: []} if key == "images" else {"categories": ()})


@pytest.mark.parametrize("kind, key, named", [
    ("images", "id", "entry 1"), ("images", "file_name", "id 11"), ("images", "width", "id 11"),
    ("images", "height", "id 11"), ("annotations", "id", "entry 1"), ("annotations", "image_id", "id 2"),
    ("annotations", "category_id", "id 2"), ("annotations", "bbox", "id 2"), ("categories", "id", "entry 1"),
    ("categories", "name", "id 17"),
])
def test_missing_key(tmp_path, kind, key, named):
    reading(tmp_path, f"1 of 3 {kind}", f"'{key}'", named, change=lambda content: content[kind][1].pop(key))


@pytest.mark.parametrize("value", [True, "2", 2.0, None, 2**63, [2]])
@pytest.mark.parametrize("kind, key", [("images", "id"), ("annotations", "id"), ("annotations", "image_id"),
                                       ("annotations", "category_id"), ("categories", "id")])
def test_ids_are_integers(tmp_path, kind, key, value):
    reading(tmp_path, f"1 of 3 {kind}", f"'{key}'", "not an integer",
            change=lambda content: content[kind][1].__setitem__(key, value))


@pytest.mark.parametrize("value", [0, -4, 30.0, "30", True, None, 2**63])
@pytest.mark.parametrize("key", ["width", "height"])
def test_sizes_are_positive_integers(tmp_path, key, value):
    reading(tmp_path, "id 11", f"'{key}'", "positive",
            change=lambda content: content["images"][1].update({key: value}))


@pytest.mark.parametrize("name", ["/etc/passwd", "../1.png", "a/../../1.png", "a\\..\\1.png", "", 7, None])
def test_file_names_stay_in_the_folder(tmp_path, name):
    reading(tmp_path, "id 11", "file_name", "relative path without",
            change=lambda content: content["images"][1].update(file_name=name))


@pytest.mark.parametrize("kind, number", [("images", 10), ("annotations", 1), ("categories", 3)])
def test_ids_are_unique(tmp_path, kind, number):
    reading(tmp_path, f"1 of 3 {kind}", "id of an earlier", f"id {number}",
            change=lambda content: content[kind][2].update(id=number))


@pytest.mark.parametrize("key, value", [("image_id", 13), ("category_id", 4)])
def test_unknown_image_or_category(tmp_path, key, value):
    reading(tmp_path, "1 of 3 annotations", f"unknown {key}", "id 2",
            change=lambda content: content["annotations"][1].update({key: value}))


@pytest.mark.parametrize("bbox", [
    None, "1234", [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, "4"], [1, 2, 3, None], [1, 2, 3, True],
    [1, 2, 3, float("nan")], [1, 2, float("inf"), 4], [1, 2, 3, 10**400]])
def test_boxes_are_four_finite_numbers(tmp_path, bbox):
    reading(tmp_path, "1 of 3 annotations", "4 finite numbers", "id 2",
            change=lambda content: content["annotations"][1].update(bbox=bbox))


def test_entries_are_objects_and_five_are_named(tmp_path):
    reading(tmp_path, "1 of 4 annotations", "entry 3",
            change=lambda content: content["annotations"].append(7))
    rows = [annotation(100 + i, 10, [1, 2]) for i in range(9)]
    reading(tmp_path, "9 of 9", "(id 100, id 101, id 102, id 103, id 104, ...)", annotations=rows)


def test_missing_images(tmp_path):
    json_path, images = write_set(tmp_path)
    os.remove(os.path.join(images, "1.png"))
    os.remove(os.path.join(images, "2.png"))
    with pytest.raises(DataError) as error:
        CocoBoxes(json_path, images)
    is_one_line(error, "2 of 3 images", json_path, images, "'1.png'", "id 11")


@pytest.mark.parametrize("segmentation", [
    None, {}, "garbage", 7, [[]], [[1, 2]], [["a"] * 6], [1, 2, 3],
    {"size": [20, 30]}, {"counts": [5, 5]},
    {"size": [30, 20], "counts": [300, 300]}, {"size": [20, 30], "counts": [300, 301]},
    {"size": [20, 30], "counts": ["a"]}, {"size": [20, 30], "counts": 5}])
def test_masks_need_a_usable_segmentation(tmp_path, segmentation):
    rows = [annotation(1, 10, [1, 1, 9, 9], segmentation=[[1, 1, 9, 1, 9, 9]]),
            annotation(2, 10, [1, 1, 9, 9], segmentation=segmentation)]
    json_path, images = write_set(tmp_path, annotations=rows)
    with pytest.raises(DataError) as error:
        CocoBoxes(json_path, images, masks=True)
    is_one_line(error, json_path, "1 of 2 annotations have no usable segmentation", "(id 2)")


def test_only_usable_boxes_need_masks(tmp_path):
    rows = [annotation(1, 10, [1, 1, 9, 9], segmentation=[[1, 1, 9, 1, 9, 9]]),
            annotation(2, 10, [1, 1, 0, 9]), annotation(3, 10, [1, 1, 9, 9], iscrowd=1)]
    assert len(CocoBoxes(*write_set(tmp_path, annotations=rows), masks=True).rle_offsets) == 2


def loading(annotations, train: bool, workers: int):
    if train:
        dataset = TrainBatches(annotations, batch_size=3, min_sizes=[20], max_size=64)
        return list(DataLoader(dataset, batch_size=None, sampler=range(2), num_workers=workers,
                               collate_fn=TrainBatches.collate))
    dataset = TestImages(annotations, 20, 64)
    return list(DataLoader(dataset, num_workers=workers, collate_fn=TestImages.collate))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("train", [True, False])
def test_another_size_than_stated_stops_training_and_evaluation(tmp_path, train, workers):
    json_path, images = write_set(tmp_path, sizes=[(20, 30)] * 3)
    path = os.path.join(images, "1.png")
    Image.new("RGB", (20, 30)).save(path)                # the sides are swapped, without EXIF
    annotations = CocoBoxes(json_path, images)
    with pytest.raises(DataError) as error:
        check_sizes(annotations)
    is_one_line(error, json_path, "1 of 3", path, "20 x 30", "30 x 20")
    with pytest.raises(DataError) as error:              # one line also from a worker process
        loading(annotations, train, workers)
    is_one_line(error, path, "20 x 30", "30 x 20")
    assert str(error.value).startswith(path)


@pytest.mark.parametrize("suffix, size", [("jpg", 700), ("png", 900), ("png", 20), ("jpg", 0)])
def test_an_undecodable_image_is_skipped_in_training_and_stops_evaluation(tmp_path, capsys, suffix, size):
    json_path, images = write_set(tmp_path, sizes=[(20, 30)] * 3)
    path = os.path.join(images, "1.png")
    Image.open(os.path.join(images, "2.png")).save(path, format={"jpg": "JPEG", "png": "PNG"}[suffix])
    assert os.path.getsize(path) > size
    os.truncate(path, size)
    annotations = CocoBoxes(json_path, images)
    check_sizes(annotations)
    warned = capsys.readouterr().err
    header_is_there = size >= 700
    assert warned == "" if header_is_there else (path in warned and warned.count("\n") == 1)
    first, _ = loading(annotations, True, 0)
    assert sorted(first.image_ids) == [10, 12, 12]
    assert len(first.skipped) == 1 and first.skipped[0].startswith(f"{path} cannot be decoded: ")
    for workers in (0, 1) if size == 900 else (0,):
        with pytest.raises(UndecodableImage) as error:
            loading(annotations, False, workers)
        is_one_line(error, path, "cannot be decoded")
        assert str(error.value).startswith(path)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_over_the_limit_is_skipped_in_training_and_stops_evaluation(tmp_path, capsys, workers):
    json_path, images = write_set(tmp_path, sizes=[(10, 10), (10, 11), (10, 10)])
    annotations = CocoBoxes(json_path, images, max_pixels=100)
    check_sizes(annotations)
    assert "warning: " in (text := capsys.readouterr().err) and text.count("\n") == 1
    assert "1 of 3 images have more than 100 pixels and are not read: raise --max-pixels" in text
    first, _ = loading(annotations, True, workers)
    assert sorted(first.image_ids) == [10, 12, 12] and "raise --max-pixels" in first.skipped[0]
    with pytest.raises(UndecodableImage) as error:
        loading(annotations, False, workers)
    is_one_line(error, "1.png cannot be decoded: its 11 x 10 pixels are more than 100; raise --max-pixels")
    with pytest.raises(DataError) as error:
        loading(CocoBoxes(json_path, images, max_pixels=99), True, workers)
    is_one_line(error, "3 images in a row", "raise --max-pixels")


def test_processes_that_are_started_anew_have_the_options_too(tmp_path):
    """Nothing is global: with spawn a loading process imports everything again."""
    json_path, images = write_set(tmp_path, sizes=[(10, 10), (10, 11)])
    exif = Image.Exif()
    exif[0x0112] = 3
    noise_image(0, 10, 10).save(os.path.join(images, "0.png"), exif=exif)
    annotations = CocoBoxes(json_path, images, exif="stored", max_pixels=100)
    (batch, _), (none, (broken,)) = DataLoader(Readable(TestImages(annotations, 10, 64, whole=True)), num_workers=1,
                                               multiprocessing_context="spawn", collate_fn=Readable.collate)
    assert none is None and "raise --max-pixels" in broken
    assert np.array_equal(batch.teacher_images[0, :, :10, :10].permute(1, 2, 0), noise_image(0, 10, 10))


def test_training_ends_when_no_image_can_be_decoded(tmp_path):
    json_path, images = write_set(tmp_path)
    for name in os.listdir(images):
        os.truncate(os.path.join(images, name), 100)
    with pytest.raises(DataError) as error:
        loading(CocoBoxes(json_path, images), True, 0)
    is_one_line(error, "3 images in a row", ".png")


def test_command_line_of_the_shapes(tmp_path, capsys):
    main(["shapes", str(tmp_path / "set"), "--train", "3", "--val", "1", "--size", "64"])
    train, _ = datasets(str(tmp_path / "set"))
    assert len(CocoBoxes(*train)) == 3
    script = Path(__file__).resolve().parent.parent / "data.py"
    command = [sys.executable, script, "shapes", tmp_path / "set"]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.count("\n") == 1 and str(tmp_path / "set") in again.stderr
    for wrong, status in ((["shapes"], 2), (["shapes", "x", "--train", "0"], 1), (["shapes", "x", "--val", "many"], 2),
                          ([], 2)):
        with pytest.raises(SystemExit) as end:
            main(wrong)
        assert end.value.code == status


# ------------------------------------------------------------------------------------------ hostile files

def test_names_from_files_command_no_terminal_and_end_no_drawing(tmp_path, capsys):
    """Of classes and images, from the check to the drawings and the review page."""
    name = "cat\r\x1b[2J\n\x9b"
    json_path, images = write_set(tmp_path)
    content = json.loads(Path(json_path).read_text())
    for row in content["categories"]:
        row["name"] = name
    content["images"][0]["file_name"] = "a\x1b[2J\r.png"
    os.rename(os.path.join(images, "0.png"), os.path.join(images, "a\x1b[2J\r.png"))
    Path(json_path).write_text(json.dumps(content))
    main(["check", json_path, "--images", images])
    predict.main(["--boxes", json_path, "--images", images, "--out", str(tmp_path / "out"), "--workers", "0"])
    os.truncate(os.path.join(images, "a\x1b[2J\r.png"), 10)
    check_sizes(CocoBoxes(json_path, images))
    print_tables({"bbox": {}, "segm": None, "per_class": {name: {"bbox": 1.0, "segm": None}}})
    page = (tmp_path / "out/review.html").read_text()
    assert len(list((tmp_path / "out/pictures").iterdir())) == 3
    assert {item["name"] for item in review_data(tmp_path / "out/review.html")["items"]} == {r"cat\r\x1b[2J\n\x9b"}
    for text in (*capsys.readouterr(), page):
        assert text and not re.search(r"[^\n -~\u0100-\uffff]", text), text


@pytest.mark.parametrize("content, part", [
    (b"<annotation>" + b"x" * LARGEST, "more than 8 MiB"),
    (b"<!DOCTYPE a [<!ENTITY b 'x'>]><annotation>&b;</annotation>", "declares entities"),
    ("<!DOCTYPE a [<!ENTITY b 'x'>]><annotation>&b;</annotation>".encode("utf-16"), "declares entities"),
    (b"<annotation>" + b"<a>" * 10 ** 5 + b"</a>" * 10 ** 5 + b"</annotation>", None), (b"<a>" * 10 ** 5, "not XML")])
def test_xml_that_is_too_much(voc, content, part):
    path = voc / "Annotations/a.xml"
    path.write_bytes(content)
    if part is None:
        main(["voc", str(voc)])
    else:
        with pytest.raises(DataError, match=part) as error:
            write_voc(str(voc))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, part", [
    ("train: images/train\nnames: [" + "a" * 2 ** 20 + "]\n", "more than 1048576 characters"),
    ("names: [a, b]\na0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
     + "train: *a59\n", "expected a path"),
    ("names: " + "[" * 10 ** 4, "not YAML")])
def test_yaml_that_is_too_much(yolo, text, part):
    pytest.importorskip("yaml")
    (yolo / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=part) as error:
        write_yolo(str(yolo))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_texts_that_are_no_files_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_text, lambda path: read_xml(tmp_path, path.name), lambda path: CocoBoxes(path, tmp_path)):
        with pytest.raises(DataError, match="no ordinary file"):
            read(tmp_path / "pipe")
    assert not is_ours(tmp_path / "pipe")


def test_json_that_is_too_deep_is_one_line(tmp_path):
    (tmp_path / "a.json").write_text('{"images": ' + "[" * 10 ** 6)
    with pytest.raises(DataError, match="not JSON"):
        CocoBoxes(tmp_path / "a.json", tmp_path)


def test_five_hundred_hostile_files_are_read_or_refused_in_one_line(tmp_path):
    done = subprocess.run([sys.executable, Path(__file__).with_name("fuzz.py"), "500", "0", tmp_path],
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("500 files"), done.stderr[-2000:]
