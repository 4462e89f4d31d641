"""check.py: each finding on a small set that has no other, all rules of coco.py at once, folders, hostile files."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import train
from formats.check import check as check_paths
from formats.coco import CocoBoxes, DataError, content_problems
from formats.commands import main
from helpers import annotation, noise_image, real_images, write_set
from tools.batches import check_skipped, open_data, training_batches

SIZES = [(20, 30)] * 4                                   # (height, width) of images 10, 11, ...


def boxes(count: int, image_id: int = 10, category_id: int = 3, first: int = 100) -> list[dict]:
    """Sound boxes; up to 600 in an image are all different."""
    return [annotation(first + i, image_id, [i % 20, i // 20 % 10, 4, 3 + i // 200], category_id) for i in range(count)]


def sound(folder, annotations=(), sizes=SIZES, **own):
    """A set of one class without findings: ten boxes in each image, and those given."""
    rows = [row for i in range(len(sizes)) for row in boxes(10, 10 + i, first=100 + 10 * i)]
    folder.mkdir(exist_ok=True)
    return write_set(folder, sizes=sizes, annotations=[*rows, *annotations], categories=(3,), **own)


def change(json_path, edit) -> None:
    content = json.loads(Path(json_path).read_text())
    edit(content)
    Path(json_path).write_text(json.dumps(content))


@pytest.fixture
def check(capsys):
    """check(arguments of the command line...) -> exit status, findings, summaries."""
    def run(*arguments) -> tuple[int, list[str], list[str]]:
        status = 0
        try:
            main(["check", *map(str, arguments)])
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        findings = [line for line in lines if line.startswith(("error: ", "warning: ", "note: "))]
        assert lines[:len(findings)] == findings and captured.err == ""     # then the summaries, and nothing else
        return status, findings, lines[len(findings):]
    return run


def only(findings: list[str], *parts: str) -> None:
    """The only finding contains all parts."""
    assert len(findings) == 1 and all(part in findings[0] for part in parts), findings


# --------------------------------------------------------------------------------------------- one file

def test_a_sound_file_has_no_findings_and_nothing_is_written(tmp_path, check):
    json_path, images = sound(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert check(json_path, "--images", images) == (0, [], [f"{json_path}: 4 images, 40 boxes, 1 class"])
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("rows, level, parts", [
    ([annotation(7, 10, [25, 5, 9, 9])], "warning", ["1 of 41 boxes reach out", "(id 7)"]),
    ([annotation(7, 10, [-1, 5, 9, 9]), annotation(8, 11, [2, 12, 9, 9])], "warning", ["2 of 42", "(id 7, id 8)"]),
    ([annotation(7, 10, [5, 5, 0.5, 9])], "warning", ["1 of 41 boxes dropped", "(id 7)"]),
    ([annotation(7, 10, [40, 5, 9, 9])], "warning", ["1 of 41 boxes dropped", "(id 7)"]),
    ([annotation(i, 10, [40, i, 9, 9]) for i in range(6)], "warning",
     ["6 of 46", "(id 0, id 1, id 2, id 3, id 4, ...)"]),
    ([annotation(7, 10, [5, 5, -3, 9])], "warning", ["1 of 41 boxes dropped", "(id 7)"]),
    ([annotation(7, 10, [-9, 5, 99, 9], iscrowd=1)], "note", ["1 of 41 boxes are crowds", "(id 7)"]),
    ([annotation(i, 10, [3, 3, 11, 11]) for i in range(1, 9)], "warning",
     ["7 of 48 boxes are exact copies", "(id 2, id 3, id 4, id 5, id 6, ...)"]),
    ([annotation(1, 10, [3, 3, 11, 11]), annotation(2, 10, [3.0, 3, 11, 11])], "warning", ["1 of 42", "copies"]),
])
def test_boxes(tmp_path, check, rows, level, parts):
    json_path, images = sound(tmp_path, rows)
    status, findings, _ = check(json_path, "--images", images)
    only(findings, f"{level}: {json_path}", *parts)
    assert status == 0


@pytest.mark.parametrize("rows", [
    [annotation(1, 10, [3, 3, 11, 11]), annotation(2, 11, [3, 3, 11, 11])],                    # in another image
    [annotation(1, 10, [3, 3, 11, 11]), annotation(2, 10, [3, 3, 11, 12])],                    # another box
    [annotation(1, 10, [25, 15, 5.05, 5.05]), annotation(2, 10, [-0.05, 0, 9, 9])],            # rounded coordinates
])
def test_sound_boxes(tmp_path, check, rows):
    json_path, images = sound(tmp_path, rows)
    assert check(json_path, "--images", images)[:2] == (0, [])


def test_the_same_box_in_another_class_is_not_a_copy(tmp_path, check):
    rows = boxes(10, 10, 3) + boxes(10, 10, 17, first=200)
    json_path, images = write_set(tmp_path, SIZES[:1], rows, (3, 17))
    assert check(json_path, "--images", images)[:2] == (0, [])


def test_classes_with_few_boxes_and_images_with_none(tmp_path, check):
    names = {3: "car", 17: "one", 90: "no\x1b[2Jne"}
    rows = boxes(10) + boxes(9, 11, 17, first=300) + [annotation(7, 12, [1, 1, 9, 9], 17, iscrowd=1)]
    json_path, images = write_set(tmp_path, SIZES, rows)
    change(json_path, lambda content: content.update(categories=[{"id": i, "name": names[i]} for i in names]))
    status, (crowd, few, empty), _ = check(json_path, "--images", images)
    assert crowd.startswith("note") and status == 0
    assert few.startswith("warning")
    assert few.endswith(r"2 of 3 classes have fewer than 10 boxes: 'one' (9), 'no\x1b[2Jne' (0)")
    assert empty.startswith("note") and "2 of 4 images have no boxes (id 12, id 13)" in empty


@pytest.mark.parametrize("rows", [[], [annotation(1, 10, [1, 1, 0, 9])], [annotation(1, 10, [1, 1, 9, 9], iscrowd=1)]])
def test_no_usable_box_is_an_error(tmp_path, check, rows):
    json_path, images = write_set(tmp_path, SIZES, rows)
    status, findings, summaries = check(json_path, "--images", images)
    crowds = ": all 1 are crowds" if rows and rows[0].get("iscrowd") else ""
    assert status == 1 and f"error: {json_path} has no usable box{crowds}" in findings
    assert len(findings) == 1 + len(rows) and summaries == [f"{json_path}: 4 images, 0 boxes, 3 classes"]


# ---------------------------------------------------------------------------------------------- images

def test_missing_images_and_folders(tmp_path, check):
    json_path, images = sound(tmp_path)
    for name in ("1.png", "3.png"):
        os.remove(os.path.join(images, name))
    status, findings, _ = check(json_path, "--images", images)
    only(findings, "error: 2 of 4 images", json_path, images, "'1.png' (id 11, id 13)")
    assert status == 1
    only(check(json_path, "--images", tmp_path / "none")[1], "error: image folder", str(tmp_path / "none"))


def test_sizes_from_the_headers(tmp_path, check):
    """All images are read, and EXIF may turn them."""
    json_path, images = sound(tmp_path, sizes=[(20, 30)] * 8)
    for i in range(6):
        Image.new("RGB", (20, 30)).save(os.path.join(images, f"{i}.png"))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 30)).save(os.path.join(images, "6.png"), exif=exif)
    status, findings, _ = check(json_path, "--images", images)
    only(findings, f"error: {json_path}: 6 of 8 images have another size", "'0.png' is 20 x 30, not 30 x 20",
         "(id 10, id 11, id 12, id 13, id 14, ...)")
    assert status == 1


def test_unreadable_headers_warn_until_none_can_be_read(tmp_path, check):
    json_path, images = sound(tmp_path)
    for i in range(3):
        os.truncate(os.path.join(images, f"{i}.png"), 20)
    status, findings, _ = check(json_path, "--images", images)
    only(findings, f"warning: {json_path}: 3 of 4 images cannot be decoded (skipped in training)", "'0.png'",
         "(id 10, id 11, id 12)")
    assert status == 0
    Path(images, "3.png").write_bytes(b"")
    status, findings, _ = check(json_path, "--images", images)
    only(findings, "error: ", "4 of 4 images cannot be decoded")
    assert status == 1


def test_too_many_unreadable_headers_to_train_are_an_error(tmp_path, check):
    """The limit is check_skipped's, which accepts 10 of 15 but not 11."""
    json_path, images = sound(tmp_path, sizes=[(20, 30)] * 15)
    for i in range(11):
        assert check(json_path, "--images", images)[0] == 0
        os.truncate(os.path.join(images, f"{i}.png"), 20)
    status, findings, _ = check(json_path, "--images", images)
    only(findings, "error: ", "11 of 15 images", "too many to train")

    class Skipping:
        skipped = [f"{i}" for i in range(10)]
    check_skipped([Skipping], set(), 15)
    Skipping.skipped = [f"{i}" for i in range(11)]
    with pytest.raises(DataError):
        check_skipped([Skipping], set(), 15)


def rotated(path: str, orientation: int = 3) -> None:
    """Let the file say that it is shown turned by 180 degrees, or another way."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(path) as image:
        image.save(path, exif=exif)


def test_images_whose_size_does_not_tell_whether_they_are_upright(tmp_path, check):
    json_path, images = sound(tmp_path, sizes=[*SIZES, (20, 20)])
    for name, orientation in (("1.png", 3), ("3.png", 2), ("4.png", 6)):
        rotated(os.path.join(images, name), orientation)
    start = f"warning: {json_path}: 3 of 5 images are turned or mirrored by EXIF"
    for options, taken in (((), "upright"), (("--exif", "upright"), "upright"), (("--exif", "stored"), "stored")):
        status, findings, _ = check(json_path, "--images", images, *options)
        only(findings, start, f"taken {taken}; --exif", "('1.png', '3.png', '4.png')")
        assert status == 0
    change(json_path, lambda content: content.update(info={"exif": "stored"}))
    only(check(json_path, "--images", images)[1], start, "taken stored; --exif upright")
    only(check(json_path, "--images", images, "--exif", "upright")[1], start, "taken upright; --exif stored")


def test_pages_alpha_and_depth(tmp_path, check):
    json_path, images = sound(tmp_path)
    image = noise_image(0, 20, 30)
    image.save(os.path.join(images, "0.png"), save_all=True, append_images=[noise_image(1, 20, 30)])
    image.convert("RGBA").save(os.path.join(images, "1.png"))
    image.convert("I;16").save(os.path.join(images, "2.png"))
    status, findings, _ = check(json_path, "--images", images)
    starts = [f"{level}: {json_path}: 1 of 4 images have" for level in ("warning", "note", "note")]
    assert [finding[:len(start)] for finding, start in zip(findings, starts, strict=True)] == starts and status == 0
    for finding, what in zip(findings, ("only the first is read ('0.png')", "becomes white ('1.png')", "('2.png')")):
        assert finding.endswith(what)


def test_images_over_the_limit_count_as_undecodable(tmp_path, check):
    json_path, images = sound(tmp_path, sizes=[(20, 30)] * 12 + [(20, 20)] * 3)
    assert check(json_path, "--images", images, "--max-pixels", 600)[:2] == (0, [])
    os.truncate(os.path.join(images, "14.png"), 20)
    for name in ("0.png", "1.png", "2.png"):
        os.remove(os.path.join(images, name))
        change(json_path, lambda content: content["images"].pop(0))
    change(json_path, lambda content: content.update(annotations=content["annotations"][30:]))
    status, (unreadable, too_large), _ = check(json_path, "--images", images, "--max-pixels", 599)
    assert status == 0 and unreadable.startswith("warning: ") and "1 of 12 images cannot be decoded" in unreadable
    assert too_large == (f"warning: {json_path}: 9 of 12 images have more than 599 pixels, raise --max-pixels (skipped "
                         "in training), the first: '3.png' (id 13, id 14, id 15, id 16, id 17, ...)")
    os.truncate(os.path.join(images, "13.png"), 20)                # 11 are too many
    status, findings, _ = check(json_path, "--images", images, "--max-pixels", 599)
    assert status == 1 and all(finding.startswith("error: ") and "too many to train" in finding for finding in findings)


def test_a_set_of_images_over_the_limit_alone_is_an_error(tmp_path, check):
    json_path, images = sound(tmp_path)
    status, findings, _ = check(json_path, "--images", images, "--max-pixels", 599)
    only(findings, "error: ", "4 of 4 images have more than 599 pixels, raise --max-pixels (too many to train)")
    assert status == 1


def test_two_entries_of_one_file(tmp_path, check):
    json_path, images = sound(tmp_path)
    change(json_path, lambda content: content["images"][2].update(file_name="0.png"))
    os.remove(os.path.join(images, "2.png"))
    status, findings, _ = check(json_path, "--images", images)
    only(findings, f"warning: {json_path}: 1 of 4 images have the file of an earlier one", "'0.png' (id 12)")
    assert status == 0


@pytest.mark.parametrize("json_path, folder", [
    ("annotations/instances_mine.json", "mine"), ("annotations/instances_mine.json", "."),
    ("annotations/instances_train2017.json", "train2017"), ("annotations/instances_val2017.json", "leftImg8bit/val"),
    ("annotations/instances_mine.json", "annotations"), ("annotations/mine.json", "annotations/images"),
    ("mine.json", "."), ("mine.json", "images"), ("some/mine.json", "some/images")])
def test_images_are_found_in_the_usual_places(tmp_path, check, monkeypatch, json_path, folder):
    """By an absolute path, a relative one, and from the file's folder."""
    json_path = tmp_path / "set" / json_path
    json_path.parent.mkdir(parents=True)
    source, images = sound(tmp_path / "source")
    os.rename(source, json_path)
    (tmp_path / "set" / folder).mkdir(parents=True, exist_ok=True)
    for path in Path(images).iterdir():
        path.rename(tmp_path / "set" / folder / path.name)
    for here, path in ((tmp_path, json_path), (tmp_path, json_path.relative_to(tmp_path)),
                       (json_path.parent, json_path.name)):
        monkeypatch.chdir(here)
        assert check(path)[:2] == (0, [])


def test_images_that_are_not_found(tmp_path, check):
    json_path, images = sound(tmp_path)
    os.rename(images, tmp_path / "elsewhere")
    status, findings, _ = check(json_path)
    only(findings, f"error: {json_path}", "'0.png'", "--images", str(tmp_path))
    assert status == 1


# ---------------------------------------------------------------------- what coco.py refuses, all of it

@pytest.mark.parametrize("text, part", [
    ("", "not JSON"), (b"\xff\xfe\x00", "not JSON"), ("[" * 100_000, "not JSON"), ("1" + "0" * 5000, "not JSON"),
    ("[]", "no list 'images'"), ('{"images": [], "annotations": []}', "no list 'categories'"),
])
def test_files_that_are_not_coco(tmp_path, check, text, part):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    status, findings, summaries = check(path)
    assert status == 1 and findings[0].startswith(f"error: {path}") and any(part in finding for finding in findings)
    assert len(summaries) == 1 and summaries[0].startswith(f"{path}: ")
    with pytest.raises(DataError) as error:
        CocoBoxes(path, tmp_path)
    assert findings[0] == f"error: {error.value}"


def test_missing_file(tmp_path, check):
    status, findings, summaries = check(tmp_path / "none.json")
    only(findings, "error: annotation file", "none.json is missing")
    assert status == 1 and summaries == [f"{tmp_path / 'none.json'}: not readable"]


def test_all_rules_at_once(tmp_path, check):
    """A set that breaks every rule: each rule has its line, whatever else is wrong with the same entry, and the sound
    entries are still examined."""
    json_path, images = sound(tmp_path, [annotation(7, 10, [25, 5, 9, 9])])

    def spoil(content):
        content["categories"] += [{"id": 4}, {"id": 3, "name": "again"}, {"id": 5, "name": "\ud800"}, 7]
        content["images"] += [
            {"id": 20, "file_name": "../0.png", "width": 30, "height": 20},
            {"id": 2**63, "file_name": "0.png", "width": "30", "height": 20.0},
            {"id": 22, "file_name": "0.png", "width": 30}, {"id": 10, "file_name": "1.png", "width": 30, "height": 20},
            {"id": 23, "file_name": "none\x1b[2J.png", "width": 30, "height": 20},
            {"id": 24, "file_name": "\ud800.png", "width": 30, "height": 20}]
        content["annotations"] += [
            annotation(1, 10, ["1", 2, 3, 4]), annotation(1, 10, [1, 2, 3, 4, 5]), annotation(3, 99, [1, 1, 9, 9]),
            annotation(4, 11, [1, 1, 9, 9], 2.5), annotation(5, 12, [1, 1, 9, 9], 8), {"id": "\x1b[2J", "bbox": None},
            annotation(6, None, [float("nan")] * 4), annotation(10**400, 10, [1, 1, 9, 9]), None]

    change(json_path, spoil)
    status, findings, summaries = check(json_path, "--images", images)
    expected = [
        "2 of 10 images have an invalid 'file_name': not a relative path without '..' (id 20, id 24)",
        "1 of 10 images have an invalid 'id': not an integer (id 9223372036854775808)",
        "1 of 10 images have an invalid 'width': not a positive integer (id 9223372036854775808)",
        "1 of 10 images have no 'height' (id 22)",
        "1 of 10 images have an invalid 'height': not a positive integer (id 9223372036854775808)",
        "1 of 10 images have the id of an earlier one (id 10)",
        "1 of 5 categories are not objects (entry 4)", "1 of 5 categories have no 'name' (id 4)",
        "1 of 5 categories have an invalid 'name': not a text (id 5)",
        "1 of 5 categories have the id of an earlier one (id 3)",
        "1 of 50 annotations are not objects (entry 49)", "1 of 50 annotations have no 'image_id'",
        "1 of 50 annotations have no 'category_id'", "2 of 50 annotations have an invalid 'id': not an integer",
        "1 of 50 annotations have an invalid 'image_id': not an integer (id 6)",
        "1 of 50 annotations have an invalid 'category_id': not an integer (id 4)",
        "4 of 50 annotations have an invalid 'bbox': not a list of 4 finite numbers (id 1, id 1, id '\\x1b[2J', id 6)",
        "1 of 50 annotations have the id of an earlier one (id 1)",
        "1 of 50 annotations have an unknown image_id (id 3)", "1 of 50 annotations have an unknown category_id (id 5)",
        "'none\\x1b[2J.png' (id 23)", "boxes reach out of their image: clipped (id 7)"]
    for part in expected:
        assert sum(part in finding for finding in findings) == 1, part
    assert status == 1 and all(ord(character) >= 32 for finding in findings for character in finding)
    assert summaries == [f"{json_path}: 6 images, 41 boxes, 2 classes"]
    with pytest.raises(DataError) as error:                        # reading raises the first of the same lines
        CocoBoxes(json_path, images)
    assert f"error: {error.value}" == findings[0]


def test_reading_raises_what_is_listed_first(tmp_path):
    """read_coco raises the first of content_problems, and accepts everything else."""
    json_path, images = sound(tmp_path)
    content = json.loads(Path(json_path).read_text())
    assert list(content_problems(json_path, content)) == []
    for kind in ("images", "annotations", "categories"):
        for key in content[kind][0]:
            for value in (None, -1, "x" * 5, [], 2.5):
                spoilt = json.loads(json.dumps(content))
                spoilt[kind][0][key] = value
                problems = list(content_problems(json_path, spoilt))
                Path(json_path).write_text(json.dumps(spoilt))
                if problems:
                    with pytest.raises(DataError) as error:
                        CocoBoxes(json_path, images)
                    assert str(error.value) == problems[0]
                elif key != "file_name":                           # "xxxxx" is a valid name of a missing image
                    CocoBoxes(json_path, images)


# ----------------------------------------------------------------------------------------------- folders

@pytest.fixture
def folder(tmp_path):
    """A sound folder in COCO layout."""
    root = tmp_path / "set"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        json_path, images = sound(tmp_path / split)
        os.rename(json_path, root / "annotations" / f"instances_{split}2017.json")
        os.rename(images, root / f"{split}2017")
    return root


def files(root: Path) -> list[str]:
    return [str(root / "annotations" / f"instances_{split}2017.json") for split in ("train", "val")]


def test_both_files_of_a_folder(folder, check):
    summaries = [f"{path}: 4 images, 40 boxes, 1 class" for path in files(folder)]
    assert check(folder) == (0, [], summaries)
    assert check(folder, folder) == (0, [], summaries * 2)
    os.remove(folder / "val2017" / "2.png")
    status, findings, _ = check(folder)
    only(findings, "error: 1 of 4 images", files(folder)[1])
    assert status == 1


def test_a_folder_without_val_is_fine_and_without_train_is_not(folder, check):
    train_json, val_json = files(folder)
    os.remove(val_json)
    status, findings, summaries = check(folder)
    only(findings, f"note: {val_json} is missing")
    assert status == 0 and len(summaries) == 1
    os.remove(train_json)
    status, findings, _ = check(folder)
    assert status == 1 and findings[0].startswith(f"error: annotation file {train_json} is missing")


def test_the_two_files_need_the_same_categories(folder, check):
    change(files(folder)[1], lambda content: content["categories"][0].update(name="other"))
    status, findings, _ = check(folder)
    only(findings, f"error: {files(folder)[1]} has other categories than {files(folder)[0]}")
    assert status == 1
    with pytest.raises(DataError) as error:
        open_data(train.parse_arguments(["--data", str(folder)]), 0)
    assert findings[0] == f"error: {error.value}"


def test_findings_about_evaluation(folder, check):
    """An undecodable image ends it; without boxes there is no AP, but nothing ends."""
    os.truncate(folder / "val2017" / "1.png", 20)
    status, findings, _ = check(folder)
    only(findings, "error: ", files(folder)[1], "evaluation would end", "(id 11)")
    assert status == 1
    noise_image(1, 20, 30).save(folder / "val2017" / "1.png")
    change(files(folder)[1], lambda content: content.update(annotations=[]))
    status, findings, _ = check(folder)
    only(findings, f"warning: {files(folder)[1]} has no usable box")
    assert status == 0


def test_named_data_and_images_given_for_a_data_set(folder, check, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    os.mkdir("datasets")
    os.rename(folder, "datasets/shapes")
    assert check("shapes")[0] == 0
    os.remove("datasets/shapes/annotations/instances_val2017.json")
    assert check("shapes")[0] == 1                        # as train.py --data shapes
    with pytest.raises(SystemExit) as end:
        main(["check", "datasets/shapes", "--images", "datasets"])
    error = capsys.readouterr().err
    assert end.value.code == 1 and "--images" in error and "datasets/shapes" in error


def test_the_status_of_the_program(folder):
    os.remove(folder / "train2017" / "0.png")
    script = Path(__file__).resolve().parent.parent / "data.py"
    run = subprocess.run([sys.executable, script, "check", folder], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr == "" and run.stdout.count("\n") == 3
    assert run.stdout.startswith("error: 1 of 4 images")


# ------------------------------------------------------------------------------------------- large files

def test_many_boxes_in_one_image(tmp_path, check):
    """100,000 annotations, 10,000 of them equal boxes in one image."""
    rows = [annotation(i, 10 + max(0, i // 100 - 99), [i % 7, 2, 9, 9] if i >= 10_000 else [1, 2, 9, 9])
            for i in range(100_000)]
    json_path, images = write_set(tmp_path, [(20, 30)], rows, (3,))
    change(json_path, lambda content: content.update(images=[
        {"id": 10 + i, "file_name": "0.png", "width": 30, "height": 20} for i in range(1000)]))
    status, findings, summaries = check(json_path, "--images", images)
    copies = next(finding for finding in findings if "copies" in finding)
    assert status == 0 and summaries == [f"{json_path}: 1000 images, 100000 boxes, 1 class"]
    assert f"{9_999 + 900 * 93} of 100000 boxes are exact copies" in copies and "(id 1, id 2," in copies


# ------------------------------------------------------------------------- fields that only evaluation reads

@pytest.mark.parametrize("key, value", [("iscrowd", None), ("iscrowd", 0), ("iscrowd", False), ("iscrowd", 0.0),
                                        ("area", None), ("area", 0), ("area", 36.5)])
def test_sound_crowd_marks_and_areas(folder, check, key, value):
    for path in files(folder):
        change(path, lambda content: content["annotations"][4].update({key: value}))
    assert check(folder)[:2] == (0, [])


@pytest.mark.parametrize("key, value, form", [
    *(("iscrowd", value, "0 or 1") for value in ("0", "false", "", 2, -1, [], float("nan"))),
    *(("area", value, "a finite number of at least 0")
      for value in ("36", -36, True, [], float("nan"), float("inf"), 10**400))])
def test_other_crowd_marks_and_areas_are_errors_for_everybody(folder, check, key, value, form):
    """The boxes of these annotations are examined all the same."""
    for path in files(folder):
        change(path, lambda content: [row.update({key: value}) for row in content["annotations"][1:3]])
        status, findings, summaries = check(folder)
        assert status == 1 and summaries[0] == f"{files(folder)[0]}: 4 images, 40 boxes, 1 class"
        line = f"{path}: 2 of 40 annotations have an invalid '{key}': not {form} (id 101, id 102)"
        assert f"error: {line}" in findings
        with pytest.raises(DataError) as error:
            CocoBoxes(path, folder / "train2017")
        assert str(error.value) == line


BAD_MASK = [[2, 3, 9, 9]]


def test_a_flawed_mask_is_an_error_where_it_is_evaluated_and_a_warning_where_only_boxes_are_learnt(folder, check):
    train_json, val_json = files(folder)
    change(train_json, lambda content: content["annotations"][3].update(segmentation=BAD_MASK))
    status, findings, _ = check(folder)
    only(findings, f"warning: {train_json}: 1 of 40 annotations have no usable segmentation: no polygon of 3 points "
         "(id 103)", "--method condinst would refuse it")
    assert status == 0
    arguments = ["--data", str(folder)]
    open_data(train.parse_arguments(arguments), 0)
    for more in (["--method", "condinst"], ["--measure-labels"]):
        with pytest.raises(DataError, match="no usable segmentation"):
            open_data(train.parse_arguments([*arguments, *more]), 0)
    change(val_json, lambda content: [row.update(segmentation=BAD_MASK, iscrowd=1)
                                      for row in content["annotations"][5:7]])
    status, findings, _ = check(folder)
    line = f"{val_json}: 2 of 40 annotations have no usable segmentation: no polygon of 3 points (id 105, id 106)"
    assert status == 1 and f"error: {line}" in findings
    with pytest.raises(DataError) as error:
        open_data(train.parse_arguments(arguments), 0)
    assert str(error.value) == line


def test_each_flaw_of_masks_has_its_line(folder, check):
    masks = [[2, 3, 9, 3, 9, 9], [[]], "text", {"size": [30, 20], "counts": [600]}, [[2, 3, 9, 3, 9, float("nan")]],
             [[]], None, [], [[2, 3, 9, 3, 9, 9]]]

    def spoil(content):
        for row, mask in zip(content["annotations"], masks):
            row["segmentation"] = mask

    change(files(folder)[1], spoil)
    _, findings, _ = check(folder)
    assert len(findings) == 5 and all("no usable segmentation" in finding for finding in findings)
    assert any("2 of 40" in finding and "(id 101, id 105)" in finding for finding in findings)


def test_polygons_that_are_left_out_are_counted(folder, check, capsys):
    val_json = files(folder)[1]
    change(val_json, lambda content: content["annotations"][3].update(segmentation=[[3, 0, 7, 0, 7, 3, 3, 3], [5, 5]]))
    status, findings, _ = check(folder)
    only(findings, f"warning: {val_json}: 1 of 40 annotations have polygons of fewer than 3 points", "(id 103)")
    assert status == 0
    open_data(train.parse_arguments(["--data", str(folder)]), 0)
    assert findings[0] + "\n" == capsys.readouterr().err


def test_crowds_alone(folder, check):
    for path in files(folder):
        change(path, lambda content: [row.update(iscrowd=1) for row in content["annotations"]])
    _, findings, _ = check(folder)
    assert f"error: {files(folder)[0]} has no usable box: all 40 are crowds" in findings
    assert f"warning: {files(folder)[1]} has no usable box: all 40 are crowds" in findings
    with pytest.raises(DataError, match="no usable box: all 40 are crowds"):
        args = train.parse_arguments(["--data", str(folder), "--batch-size", "1", "--min-size", "32"])
        training_batches(args, open_data(args, 0)[0], 0, 1)


# ------------------------------------------------------------------------------------- conventions, names, keys

def test_boxes_of_another_convention(tmp_path, check):
    json_path, images = sound(tmp_path)

    def corners(content):
        for row in content["annotations"]:
            x, y, w, h = row["bbox"]
            row.update(bbox=[x, y, x + w, y + h], segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]])

    change(json_path, corners)
    _, findings, _ = check(json_path, "--images", images)
    guessed = [finding for finding in findings if "look like" in finding]
    only(guessed, f"warning: {json_path}: ", "of 40 boxes look like xyxy (two corners) in pixels, not like COCO's xywh",
         "(id 104, ")
    change(json_path, lambda content: [row.update(iscrowd=1) for row in content["annotations"]])
    assert not any("look like" in finding for finding in check(json_path, "--images", images)[1])


@pytest.mark.parametrize("name", ["coco-mini", "food", "nuclei", "teacher"])
def test_boxes_of_real_sets_are_not_suspected(name, check):
    status, findings, _ = check(real_images(name))
    assert status == 0 and not any(part in finding for finding in findings
                                   for part in ("look like", "segmentation", "name", "followed", "polygons"))


def test_names_that_are_alike(folder, check):
    names = {3: "red", 4: "blue", 5: "red", 6: "Red ", 7: "blue", 8: "green"}
    for path in files(folder):
        change(path, lambda content: content.update(
            categories=[{"id": i, "name": name} for i, name in names.items()],
            annotations=content["annotations"] + [
                annotation(900 + 20 * i + k, 10, [k, 9, 5, i], i) for i in names for k in range(10)]))
    status, findings, _ = check(folder)
    assert status == 0 and findings[:2] == [
        f"warning: {files(folder)[0]}: 3 classes have names that differ only in case or blanks ('red' id 3, "
        "'red' id 5, 'Red ' id 6)", f"warning: {files(folder)[0]}: 2 classes have one name ('blue' id 4, 'blue' id 7)"]
    assert len(findings) == 4


def test_keys_that_are_not_followed(tmp_path, check):
    json_path, images = sound(tmp_path)
    values = [{"rotation": 0.0, "ignore": 0}, {"rotation": 12.5}, {"attributes": {"rotation": 300.0}}, {"ignore": 1},
              {"attributes": {"rotation": 0, "occluded": True}}, {"attributes": "rotation"}, {"rotation": None},
              {"attributes": {"difficult": True}}, {"rotation": 5, "attributes": {"rotation": 5}}, {"angle": [1]},
              {"attributes": {"ignore": "false", "difficult": "False"}}]
    change(json_path, lambda content: [row.update(more) for row, more in zip(content["annotations"], values)])
    status, findings, _ = check(json_path, "--images", images)
    assert status == 0 and [finding.split(": ", 2)[2] for finding in findings] == [
        "3 of 40 annotations have 'rotation', which is not followed: the box stays upright (id 101, id 102, id 108)",
        "1 of 40 annotations have 'angle', which is not followed: the box stays upright (id 109)",
        "1 of 40 annotations have 'ignore', which is not followed: the box counts as others do (id 103)",
        "1 of 40 annotations have 'difficult', which is not followed: the box counts as others do (id 107)"]


# --------------------------------------------------------------------------------------- seen and not used

def test_a_folder_of_predict_is_named(tmp_path):
    (tmp_path / "masks.json").write_text("{}")
    with pytest.raises(DataError, match=f"name {tmp_path}/masks.json, and its images with --images"):
        check_paths([str(tmp_path)])


def test_other_annotation_files_are_named(folder, check, capsys):
    """Beside the two that are read; where one of these is missing, by train.py too."""
    annotations, arguments = folder / "annotations", train.parse_arguments(["--data", str(folder)])
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        (folder / hidden).mkdir()
        (folder / hidden / "x.json").write_text("{}")
    assert check(folder)[1] == []
    (annotations / "instances_val2017.json").rename(annotations / "instances_validate2017.json")
    other = str(annotations / "instances_validate2017.json")
    missing, unused = check(folder)[1]
    assert missing.startswith("note: ") and "is missing" in missing
    assert unused.startswith(f"note: 1 other JSON file not used ({other})") and "--val-json" in unused
    open_data(arguments, 0)
    assert f"; not used: {other} (--val-json, --val-images)\n" in capsys.readouterr().out
    (folder.parent / "beside.json").write_text("{}")
    hint = check(folder / "none.json")[1][0]
    assert "beside.json" not in hint
    (annotations / "instances_train2017.json").rename(folder / "all.json")
    (folder / "valid").mkdir()
    (folder / "valid/_annotations.coco.json").write_text("{}")
    names = ", ".join(sorted([other, str(folder / "all.json"), str(folder / "valid/_annotations.coco.json")]))
    for hint in (check(folder)[1][0], str(pytest.raises(DataError, train.open_data, arguments, 0).value)):
        assert "is missing" in hint and f"; found {names} (train.py takes others with --train-json or" in hint


def test_images_that_no_file_lists(folder, check):
    noise_image(0, 9, 9).save(folder / "train2017/more.png")
    noise_image(0, 9, 9).save(folder / "train2017/MORE.JPG", format="JPEG")
    for name in (".hidden.png", "notes.txt", "page.pdf"):
        (folder / "train2017" / name).write_text("")
    status, findings, _ = check(folder)
    only(findings, "note: 2 images beside those of the annotations are in no file "
         f"({folder}/train2017/MORE.JPG, {folder}/train2017/more.png)")
    assert status == 0
    json_path = files(folder)[0]
    change(json_path, lambda content: content["images"][1].update(file_name="./1.png"))
    only(check(json_path, "--images", f"{folder}/train2017/")[1], "note: 2 images")


def test_two_files_may_share_an_image_folder(tmp_path, check):
    """Each file alone leaves out what the other lists."""
    json_path, images = sound(tmp_path)
    (tmp_path / "annotations").mkdir()
    for split, part in (("train", slice(0, 2)), ("val", slice(2, 4))):
        content = json.loads(Path(json_path).read_text())
        content["images"] = content["images"][part]
        kept = {row["id"] for row in content["images"]}
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] in kept]
        (tmp_path / f"annotations/instances_{split}2017.json").write_text(json.dumps(
            content | {"images": [row | {"file_name": "images/" + row["file_name"]} for row in content["images"]]}))
    os.remove(json_path)
    assert check(tmp_path)[:2] == (0, [])
    only(check(tmp_path / "annotations/instances_val2017.json", "--images", tmp_path)[1], "note: 2 images beside")


def test_findings_about_a_converted_folder_name_files(tmp_path, check):
    """Nobody knows the ids that the conversion gave."""
    json_path, images = sound(tmp_path, [annotation(7, 10, [25, 5, 9, 9.5]), annotation(8, 11, [5, 5, 0, 9])],
                              info={"description": "boxes converted by: python data.py yolo"})
    os.remove(os.path.join(images, "2.png"))
    _, (missing, small, outside), _ = check(json_path, "--images", images)
    assert "the first: '2.png' ('2.png')" in missing
    assert "1 of 42 boxes dropped" in small and "('1.png': 'class 3' [5, 5, 0, 9])" in small
    assert outside.endswith("clipped ('0.png': 'class 3' [25, 5, 9, 9.5])")


@pytest.mark.parametrize("info", [None, "boxes", {"description": "mine"}, {"description": 7}, {}])
def test_findings_about_other_files_name_ids(tmp_path, check, info):
    json_path, images = sound(tmp_path, [annotation(7, 10, [25, 5, 9, 9])], info=info)
    only(check(json_path, "--images", images)[1], "(id 7)")


def test_one_of_each(tmp_path, check):
    json_path, images = write_set(tmp_path, SIZES[:1], [annotation(1, 10, [1, 1, 9, 9])], (3,))
    assert check(json_path, "--images", images)[2] == [f"{json_path}: 1 image, 1 box, 1 class"]


def test_boxes_that_are_not_those_of_their_masks(tmp_path, check):
    """Of no convention that can be guessed, as y and x in the wrong order."""
    def exchange(content):
        for row in content["annotations"]:
            x, y, w, h = row["bbox"]
            row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            row["bbox"] = [y, x, h, w]
    rows = [annotation(i, 10 + i % 4, [10 + i, 3, 5, 9]) for i in range(12)]
    json_path, images = write_set(tmp_path, sizes=[(40, 60)] * 4, annotations=rows, categories=(3,))
    change(json_path, exchange)
    only(check(json_path, "--images", images)[1], f"warning: {json_path}: 12 of 12 boxes are not those of their masks")
