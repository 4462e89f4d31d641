"""predict.py and `from model import load`: from the command line to files, drawings and the review page."""
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from formats import checkpoint
import evaluate
import predict
import train
from formats.coco import CocoBoxes
from helpers import SMALL, losses_of, noise_image, one_line_error, review_data
from model import Instances, default_threshold, load
from predict import drawing_names, free_name
from tools.draw import COLOURS, colour_of, draw_objects, window


@pytest.fixture(scope="session")
def sure(warm, tmp_path_factory):
    """The briefly trained network, whose masks are now diamonds of radius 14 pixels around each location."""
    path = tmp_path_factory.getbasetemp() / "sure.pt"
    if not path.exists():
        state = checkpoint.load(warm)
        for part in ("student", "teacher"):
            w1, w2, w3, rest = torch.zeros(8, 18), torch.eye(8), torch.full((8,), -40.0), torch.zeros(17)
            w1[0, 0], w1[1, 0], w1[2, 1], w1[3, 1] = 1, -1, 1, -1    # |x| and |y|, from the location
            rest[16] = 40 * 14 / 64
            state[part]["head.controller.weight"].mul_(0.01)
            state[part]["head.controller.bias"] = torch.cat([w1.flatten(), w2.flatten(), w3, rest])
        checkpoint.save(state, path)
    return path


def failing(*arguments) -> int:
    with pytest.raises(SystemExit) as end:
        predict.main([str(a) for a in arguments])
    return end.value.code


# -------------------------------------------------------------------------------------------- finding objects


def test_images_of_all_kinds_in_folders_below(drawn, sure, tmp_path, capsys):
    """A drawing for each image, results as from evaluate.py, a warning for the broken file."""
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    source = sorted((drawn / "val2017").iterdir())
    shutil.copy(source[0], folder / "a.jpg")
    Image.open(source[1]).save(folder / "deep" / "a.png")
    Image.open(source[2]).convert("L").save(folder / "deep" / "grüße.TIFF")
    (folder / "b.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("nor is this")
    predict.main(["--ckpt", str(sure), str(folder), str(source[0]), "--out", str(out), "--workers", "0",
                  "--score-threshold", "0.05", "--batch-size", "2"])
    assert f"{folder / 'b.png'} cannot be decoded" in capsys.readouterr().err
    images = {str(file.relative_to(out)) for file in out.rglob("*.jpg")}
    assert images == {"a.jpg", "deep/a.jpg", "deep/grüße.jpg", source[0].name}
    assert max(Image.open(out / "a.jpg").size) == 480  # enlarged from 64 pixels, to be read

    results = json.loads((out / "predictions.json").read_text())
    names = {result["file_name"] for result in results}
    assert names <= {str(folder / name) for name in ("a.jpg", "deep/a.png", "deep/grüße.TIFF")} | {str(source[0])}
    assert len(names) >= 2
    assert results and set(results[0]) == {"image_id", "category_id", "score", "bbox", "segmentation", "file_name"}
    evaluate.main(["--ckpt", str(sure), "--data", str(drawn), "--workers", "0", "--results", str(tmp_path / "r.json"),
                   "--device", "cpu"])
    same = [r for r in json.loads((tmp_path / "r.json").read_text()) if r["image_id"] == 1 and r["score"] >= 0.05]
    ours = [r for r in results if r["file_name"] == str(source[0])]
    assert len(ours) == len(same) > 20
    for one in ours[:20]:  # the batch size differs, and with it the last digits: equal scores may change places
        others = [r for r in same if r["category_id"] == one["category_id"]
                  and r["bbox"] == pytest.approx(one["bbox"], abs=1e-3)]
        assert others
        assert max(coco_mask.iou([one["segmentation"]], [r["segmentation"]], [0])[0, 0] for r in others) > 0.99
    capsys.readouterr()
    assert failing("--ckpt", sure, folder / "b.png", "--out", tmp_path / "none", "--workers", 0) == 1
    assert "none of 1 image can be decoded" in capsys.readouterr().err
    assert not (tmp_path / "none" / "predictions.json").exists()


def test_drawings_never_share_a_name():
    """Neither for images in two folders nor for two formats."""
    assert drawing_names(["a.png", "a.png", "a.tif", "x/a.png", "a-2.gif"]) == [
        "a.jpg", "a-2.jpg", "a-3.jpg", "x/a.jpg", "a-2-2.jpg"]
    names = set()
    assert [free_name("a.b.c", names) for _ in range(3)] == ["a.b.c", "a.b-2.c", "a.b-3.c"]


def test_inputs_are_never_overwritten(drawn, sure, boxes, tmp_path, capsys):
    """Neither an image beside the results, nor the user's own folder pictures/, nor a masks.json as --boxes."""
    path, content = boxes
    shutil.copytree(drawn / "train2017", tmp_path / "pictures")
    shutil.copy(sorted((drawn / "val2017").iterdir())[0], tmp_path / "one.jpg")
    shutil.copy(path, tmp_path / "masks.json")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    files = ["--images", tmp_path / "pictures", "--out", tmp_path, "--workers", 0]
    for arguments in ([tmp_path / "one.jpg", "--out", tmp_path, "--workers", 0], ["--boxes", path, *files],
                      ["--boxes", tmp_path / "masks.json", "--images", drawn / "train2017", "--out", tmp_path]):
        assert failing("--ckpt", sure, *arguments) == 1 and "overwritten" in one_line_error(capsys)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def same_instances(a: Instances, b: Instances) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3])) and a[3:] == b[3:]


def test_an_image_is_turned_as_its_exif_states(sure, tmp_path):
    photo = Image.fromarray((np.random.default_rng(0).random((40, 80, 3)) * 255).astype(np.uint8))
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.png", exif=exif)
    photo.rotate(-90, expand=True).save(tmp_path / "upright.png")
    predict.main(["--ckpt", str(sure), str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "0",
                  "--score-threshold", "0.01"])
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    one, two = ([{k: r[k] for k in ("bbox", "segmentation")} for r in results if r["file_name"].endswith(name)]
                for name in ("turned.png", "upright.png"))
    model = load(sure)
    answers = [model.predict(image, 0.01) for image in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png"))]
    assert len(answers[0].boxes) == len(one) and same_instances(*answers)
    assert one == two and one and one[0]["segmentation"]["size"] == [80, 40]


def test_what_is_read_otherwise_or_left_out_is_said_at_the_end(drawn, sure, tmp_path, capsys):
    folder, exif = tmp_path / "in", Image.Exif()
    folder.mkdir()
    exif[0x0112] = 3
    photo = Image.open(sorted((drawn / "val2017").iterdir())[0]).convert("RGB")
    photo.save(folder / "turned.png", exif=exif)
    photo.convert("RGBA").save(folder / "clear.png")
    photo.convert("L").convert("I").save(folder / "deep.tif")
    photo.save(folder / "pages.gif", save_all=True, append_images=[photo.rotate(90)])
    photo.resize((65, 64)).save(folder / "large.png")
    (folder / "notes.txt").write_text("")
    (folder / "phone.heic").write_text("")
    predict.main(["--ckpt", str(sure), str(folder), "--out", str(tmp_path / "out"), "--workers", "0", "--max-pixels",
                  "4096"])
    large, *lines = capsys.readouterr().err.splitlines()
    assert "large.png cannot be decoded" in large and "raise --max-pixels; left out" in large
    assert not (tmp_path / "out/large.jpg").exists() and (tmp_path / "out/turned.jpg").exists()
    for line, words in zip(lines, ("1 of 5 images have several pages", "1 of 5 images have more than 4096 pixels",
                                   "1 of 5 images have an alpha", "1 of 5 images have more than 8 bits",
                                   "1 file of a format that Pillow cannot read, left out: convert to JPEG or PNG",
                                   "1 file not used"), strict=True):
        assert line.startswith(f"warning: {words}"), line


def test_exif_stored_is_for_images_without_boxes_too(drawn, sure, tmp_path):
    """Predictions and drawings are those of the pixels as they are stored."""
    photo, exif = noise_image(0, 40, 64), Image.Exif()
    exif[0x0112] = 3
    photo.save(tmp_path / "turned.png", exif=exif)
    photo.save(tmp_path / "plain.png")
    found = {}
    for name, options in (("turned", ["--exif", "stored"]), ("plain", [])):
        predict.main(["--ckpt", str(sure), str(tmp_path / f"{name}.png"), "--out", str(tmp_path / name), "--workers",
                      "0", "--score-threshold", "0.01", *options])
        results = json.loads((tmp_path / name / "predictions.json").read_text())
        found[name] = [{k: v for k, v in row.items() if k != "file_name"} for row in results]
    assert found["turned"] == found["plain"] != []
    drawings = [np.asarray(Image.open(tmp_path / name / f"{name}.jpg")) for name in found]
    assert np.array_equal(*drawings)


@pytest.mark.parametrize("with_model", [False, True])
def test_masks_state_whether_they_are_of_stored_images(drawn, sure, boxes, tmp_path, capsys, with_model):
    """So that a program that reads masks.json takes the same pixels."""
    path, content = boxes
    images, exif = tmp_path / "images", Image.Exif()
    shutil.copytree(drawn / "train2017", images)
    exif[0x0112] = 3
    name = images / content["images"][3]["file_name"]
    with Image.open(name) as image:
        plain = image.convert("RGB")
    out, masks, pictures = tmp_path / "m", {}, {}
    for key, source, *options in (("plain", None), ("upright", path), ("stored", path, "--exif", "stored"),
                                  ("again", out / "again.json"), ("back", out / "again.json", "--exif", "upright")):
        plain.save(name, "PNG", **{"exif": exif} if source else {})
        predict.main([*["--ckpt", str(sure)] * with_model, "--boxes", str(source or path), "--images", str(images),
                      "--out", str(out), "--workers", "0", *options])
        new = json.loads((out / "masks.json").read_text())
        if key == "stored":
            (out / "again.json").write_text(json.dumps(new))
        masks[key] = [row["segmentation"] for row in new["annotations"]]
        pictures[key] = (out / "pictures" / name.with_suffix(".jpg").name).read_bytes()
        info = {"by": "me"} | {"stored": {"exif": "stored"}, "again": {"exif": "stored"},
                               "back": {"exif": "upright"}}.get(key, {})
        assert new["info"] == info and {k: v for k, v in new.items() if k not in ("annotations", "info")} == {
            k: v for k, v in content.items() if k not in ("annotations", "info")}
        last = capsys.readouterr().err.splitlines()
        assert len(last) == bool(source) and all("1 of 12 images are turned or mirrored" in line for line in last)
    assert masks["stored"] == masks["again"] == masks["plain"] != masks["upright"] == masks["back"]
    assert pictures["stored"] == pictures["again"] == pictures["plain"] != pictures["upright"] == pictures["back"]


# -------------------------------------------------------------------------------------------------- drawing


def test_drawing_large_and_small_images():
    """At every size the object is filled where its mask is, and the text can be read."""
    classes = [{"id": 4, "name": "thing"}]
    for width, height, drawn_width in ((60, 30, 480), (4000, 2000, 1600), (800, 400, 800)):
        mask = np.zeros((height, width), np.uint8, order="F")
        mask[height // 2:, width // 2:] = 1
        one = {"bbox": [width / 2, height / 2, width / 2, height / 2], "category_id": 4, "score": 0.5,
               "segmentation": coco_mask.encode(mask)}
        image = np.asarray(draw_objects(Image.new("RGB", (width, height), (90, 90, 90)), [one], classes))
        assert image.shape == (drawn_width // 2, drawn_width, 3)
        h, w = image.shape[:2]
        assert (image[h * 3 // 4, w * 3 // 4] != 90).any() and (image[h // 8, w // 4] == 90).all()
        text = (image[:h // 2] != 90).any(2)
        assert 10 < text.any(1).sum() and (image[:h // 2].max(2) == 255).any()


def test_colours_stay_distinct_and_are_the_same_every_time():
    colours = [colour_of(i) for i in range(40)]
    assert colours[:len(COLOURS)] == COLOURS and len(set(colours)) == 40
    assert colours == [colour_of(i) for i in range(40)]


def test_the_window_of_a_mask():
    mask = torch.zeros(20, 30, dtype=torch.bool)
    assert window(mask, 3) == (slice(0, 1), slice(0, 1))
    mask[5:7, 1] = True
    y, x = window(mask, 3)
    assert (y, x) == (slice(2, 10), slice(0, 5)) and mask[y, x].sum() == mask.sum()


# --------------------------------------------------------------------------------------- masks for one's boxes


@pytest.fixture
def boxes(drawn, tmp_path):
    """The annotations of the drawn images without masks, with a large id and a user's further keys."""
    content = json.loads((drawn / "annotations/instances_train2017.json").read_text())
    content |= {"info": {"by": "me"}, "licenses": [{"id": 1, "name": "CC"}]}
    for row in content["annotations"]:
        del row["segmentation"]
        row["attributes"] = {"seen": True}
    content["annotations"][0]["id"] = 2 ** 60
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    return tmp_path / "boxes.json", content


def test_every_box_gets_a_mask_a_score_and_a_source(drawn, sure, boxes, tmp_path, capsys):
    path, content = boxes
    out, images = tmp_path / "masks", drawn / "train2017"
    predict.main(["--ckpt", str(sure), "--boxes", str(path), "--images", str(images), "--out", str(out), "--workers",
                  "0", "--review-count", "5"])
    new = json.loads((out / "masks.json").read_text())
    own = {"segmentation", "area", "score", "source"}
    assert {k: v for k, v in new.items() if k != "annotations"} == {
        k: v for k, v in content.items() if k != "annotations"}
    for old, row in zip(content["annotations"], new["annotations"], strict=True):
        assert {k: v for k, v in row.items() if k not in own} == {k: v for k, v in old.items() if k not in own}
        assert row["area"] == coco_mask.area(row["segmentation"]) > 0 and 0 <= row["score"] <= 1
    sources = [row["source"] for row in new["annotations"]]
    assert set(sources) == {"model"} and f"masks for {len(sources)} of {len(sources)} boxes" in capsys.readouterr().out
    assert len(COCO(out / "masks.json").anns) == len(sources)  # pycocotools reads it
    assert len(list((out / "pictures").iterdir())) == 12

    train.main(["--train-json", str(out / "masks.json"), "--train-images", str(images), *SMALL, "--iters", "2",
                "--method", "condinst", "--out", str(tmp_path / "run")])
    assert losses_of(tmp_path / "run")[-1]["loss_mask"] < 1

    items = review_data(out / "review.html")["items"]
    assert len(items) == 5 and all((out / item["drawing"]).exists() for item in items)
    assert all(item["photo"] and item["mask"] for item in items)
    assert [item["score"] for item in items] == sorted(row["score"] for row in new["annotations"])[:5]


def test_each_step_can_be_left_out(drawn, sure, boxes, tmp_path, capsys):
    """Fitting, colours, their strength: each changes masks, with a checkpoint and, but for fitting, without one."""
    def masks(*options) -> list[str]:
        predict.main(["--boxes", str(boxes[0]), "--images", str(drawn / "train2017"), "--out", str(tmp_path / "m"),
                      "--workers", "0", *options])
        return [row["segmentation"]["counts"] for row in
                json.loads((tmp_path / "m/masks.json").read_text())["annotations"]]

    for with_model in (["--ckpt", str(sure)], []):
        changes = [["--colors", "off"], ["--color-strength", "0.3"]] + [["--fit-steps", "0"]] * bool(with_model)
        results = [masks(*with_model, *options) for options in ([], *changes)]
        assert all(results[0] != changed for changed in results[1:]) and len(set(map(tuple, results))) == len(results)
    capsys.readouterr()
    assert failing("--boxes", boxes[0], "--images", drawn, "--out", tmp_path, "--colors", "off", "--color-strength",
                   "2") == 2
    assert "--color-strength: only with --colors on" in capsys.readouterr().err


def test_a_folder_above_the_images_ends_in_a_line_that_names_theirs(drawn, tmp_path, capsys):
    assert failing("--boxes", drawn / "annotations/instances_train2017.json", "--images", drawn, "--out",
                   tmp_path / "m") == 1
    assert f"name {drawn / 'train2017'} instead" in one_line_error(capsys)


def test_a_folder_above_the_images_of_one_name_ends_in_a_line_that_names_those_of_the_file(drawn, boxes, tmp_path,
                                                                                           capsys):
    for split in ("train2017", "val2017"):
        shutil.copytree(drawn / "train2017", tmp_path / split)
    for name, named in (("instances_val2017.json", "val2017 instead"),
                        ("our.json", f"train2017 or {tmp_path / 'val2017'} instead")):
        (tmp_path / name).write_text(json.dumps(boxes[1]))
        assert failing("--boxes", tmp_path / name, "--images", tmp_path, "--out", tmp_path / "m") == 1
        assert f"; name {tmp_path}/{named}" in one_line_error(capsys)


def test_low_scores_are_left_out_and_listed(drawn, sure, boxes, tmp_path, capsys):
    path, content = boxes
    out, images = tmp_path / "masks", drawn / "train2017"
    command = ["--ckpt", str(sure), "--boxes", str(path), "--images", str(images), "--out", str(out), "--workers", "0"]
    predict.main(command)
    scores = np.array([row["score"] for row in json.loads((out / "masks.json").read_text())["annotations"]])
    limit = float(np.quantile(scores, 0.9))
    predict.main([*command, "--min-score", str(limit), "--review-count", "3"])
    rows = json.loads((out / "masks.json").read_text())["annotations"]
    low = [row["score"] < limit for row in rows]
    assert 40 < sum(low) < 64 and all((row["segmentation"] == []) == is_low for row, is_low in zip(rows, low))
    assert f"{sum(low)} of them score below" in capsys.readouterr().out
    page = review_data(out / "review.html")
    assert len(page["items"]) == 3 and len(page["others"]) == sum(low) - 3
    named = [item["id"] for item in page["items"]] + re.findall(r", box (\d+),", "\n".join(page["others"]))
    assert set(map(int, named)) == {row["id"] for row, is_low in zip(rows, low) if is_low}
    train.main(["--train-json", str(out / "masks.json"), "--train-images", str(images), *SMALL, "--iters", "1",
                "--method", "condinst", "--out", str(tmp_path / "run")])  # such a box is learnt without its mask


def test_polygons_instead_of_run_lengths(drawn, sure, boxes, tmp_path):
    pytest.importorskip("cv2")
    path, _ = boxes
    command = ["--ckpt", str(sure), "--boxes", str(path), "--images", str(drawn / "train2017"), "--workers", "0"]
    predict.main([*command, "--out", str(tmp_path / "a")])
    predict.main([*command, "--out", str(tmp_path / "b"), "--polygons"])
    one, two = COCO(tmp_path / "a/masks.json"), COCO(tmp_path / "b/masks.json")
    assert all(type(row["segmentation"]) is list for row in two.anns.values())
    ious = [coco_mask.iou([one.annToRLE(one.anns[i])], [two.annToRLE(two.anns[i])], [0])[0, 0] for i in one.anns]
    assert np.mean(ious) > 0.95
    CocoBoxes(tmp_path / "b/masks.json", drawn / "train2017", masks=True)


def test_polygons_without_opencv(drawn, sure, boxes, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert failing("--ckpt", sure, "--boxes", boxes[0], "--images", drawn / "train2017", "--out", tmp_path / "m",
                   "--polygons") == 1
    assert "pip install opencv-python-headless" in one_line_error(capsys) and not (tmp_path / "m").exists()


def test_masks_are_compared_with_those_of_the_file(drawn, sure, tmp_path, capsys):
    predict.main(["--ckpt", str(sure), "--boxes", str(drawn / "annotations/instances_val2017.json"), "--images",
                  str(drawn / "val2017"), "--out", str(tmp_path), "--workers", "0", "--measure"])
    lines = capsys.readouterr().out.splitlines()
    assert "boxes without a mask                       0" in "\n".join(lines)


def test_a_checkpoint_of_other_classes_labels_with_a_warning(drawn, sure, boxes, tmp_path, capsys):
    path, content = boxes
    content["categories"][0]["name"] = "gadget"
    path.write_text(json.dumps(content))
    predict.main(["--ckpt", str(sure), "--boxes", str(path), "--images", str(drawn / "train2017"), "--out",
                  str(tmp_path / "m"), "--workers", "0"])
    assert "was not trained for 'gadget'" in capsys.readouterr().err
    assert all(row["segmentation"] for row in json.loads((tmp_path / "m/masks.json").read_text())["annotations"])


def test_a_thousand_boxes_in_one_image(drawn, sure, tmp_path):
    content = json.loads((drawn / "annotations/instances_val2017.json").read_text())
    rng = np.random.default_rng(0)
    corners = rng.random((1000, 2)) * 55
    sides = 2 + rng.random((1000, 2)) * 6
    content["annotations"] = [
        {"id": i, "image_id": content["images"][0]["id"], "category_id": content["categories"][0]["id"],
         "bbox": [*corner, *side]} for i, (corner, side) in enumerate(zip(corners.tolist(), sides.tolist()))]
    content["images"] = content["images"][:1]
    (tmp_path / "many.json").write_text(json.dumps(content))
    predict.main(["--ckpt", str(sure), "--boxes", str(tmp_path / "many.json"), "--images", str(drawn / "val2017"),
                  "--out", str(tmp_path / "m"), "--workers", "0"])
    rows = json.loads((tmp_path / "m/masks.json").read_text())["annotations"]
    assert len(rows) == 1000 and all(row["segmentation"] for row in rows)


HOSTILE = {
    "traversal": (lambda c: c["images"][0].update(file_name="../../etc/passwd"), "not a relative path without '..'"),
    "huge id": (lambda c: c["images"][0].update(id=10 ** 30), "not an integer"),
    "text for a number": (lambda c: c["annotations"][0].update(bbox=["1", 2, 3, 4]), "4 finite numbers"),
    "missing image": (lambda c: c["images"][0].update(file_name="gone.jpg"), "'gone.jpg'"),
    "wrong size": (lambda c: c["images"][0].update(width=65), "another size"),
    "unknown image": (lambda c: c["annotations"][0].update(image_id=777), "unknown image_id"),
    "no lists": (lambda c: c.clear(), "not a COCO annotation file"),
}


@pytest.mark.parametrize("change, message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_one_line_and_nothing_is_written(change, message, drawn, sure, boxes, tmp_path,
                                                           capsys):
    path, content = boxes
    change(content)
    path.write_text(json.dumps(content))
    out = tmp_path / "m"
    assert failing("--ckpt", sure, "--boxes", path, "--images", drawn / "train2017", "--out", out) == 1
    line = one_line_error(capsys)
    assert message in line and str(path) in line and not out.exists()


def test_zero_boxes_are_a_file_with_no_masks(drawn, sure, boxes, tmp_path, capsys):
    path, content = boxes
    content["annotations"] = []
    path.write_text(json.dumps(content))
    predict.main(["--ckpt", str(sure), "--boxes", str(path), "--images", str(drawn / "train2017"), "--out",
                  str(tmp_path / "m"), "--workers", "0"])
    assert json.loads((tmp_path / "m/masks.json").read_text()) == content
    assert review_data(tmp_path / "m/review.html")["items"] == []


@pytest.mark.parametrize("arguments, message", [
    (["--out", "x"], "images"), (["a.jpg", "--boxes", "b.json", "--images", "i", "--out", "x"], "either"),
    (["--boxes", "b.json", "--out", "x"], "--images go together"), (["a.jpg", "--workers", "-1", "--out", "x"], "-1"),
    (["a.jpg", "--min-score", "2", "--out", "x"], "between 0 and 1"),
    (["a.jpg", "--min-score", "0.5", "--out", "x"], "--min-score: only with --boxes"),
    (["--boxes", "b.json", "--images", "i", "--score-threshold", "0.5", "--out", "x"], "only with images")])
def test_wrong_options(arguments, message, sure, capsys):
    assert failing("--ckpt", sure, *arguments) == 2 and message in capsys.readouterr().err


def test_wrong_paths_are_one_line(drawn, sure, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for arguments, message in ((["gone", "--out", tmp_path / "o"], "gone does not exist"),
                               ([tmp_path / "empty", "--out", tmp_path / "o"], "no images in"),
                               ([drawn / "val2017", "--out", tmp_path / "file"], "cannot write")):
        assert failing("--ckpt", sure, *arguments, "--workers", 0) == 1 and message in one_line_error(capsys)
    assert failing("--ckpt", tmp_path / "no.pt", drawn, "--out", tmp_path / "o") == 1


# ----------------------------------------------------------------------------------------- in one's own program


def test_a_model_accepts_images_in_every_form(drawn, sure):
    model = load(sure)
    path = sorted((drawn / "val2017").iterdir())[0]
    photo = Image.open(path).convert("RGB")
    answers = [model.predict(image, score_threshold=0.05) for image in (
        path, str(path), photo, np.asarray(photo), torch.from_numpy(np.array(photo)))]
    first = answers[0]
    assert len(first.boxes) and first.masks.shape == (len(first.boxes), 64, 64)
    content = json.loads((drawn / "annotations/instances_val2017.json").read_text())
    assert model.classes == [c["name"] for c in content["categories"]] and model.classes[first.labels[0]]
    assert all(same_instances(first, other) for other in answers[1:])
    limit = float(first.scores.median())
    assert (model.predict(path).scores >= default_threshold(rescore=True)).all() and model.rescore
    few = model.predict(path, score_threshold=limit)
    assert torch.equal(few.boxes, first.boxes[first.scores >= limit]) and 0 < len(few.boxes) < len(first.boxes)
