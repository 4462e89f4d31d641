"""cityscapes.py: a made-up city as COCO files worked out by hand. cityscapes_score.py: our export and its official AP.

The city's streets are 64 x 128 pixels of road (7). The official scripts ignore objects under 100 pixels, so those that
count here have 500 (25 x 20).
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from formats import cityscapes
import evaluate
import train
from formats.checkpoint import save
from formats.coco import CocoBoxes, DataError, datasets
from formats.commands import main as data_main
from formats.pictures import check_sizes
from data import TrainBatches
from model import build_model
from tools import cityscapes_score

HEIGHT, WIDTH = 64, 128
A, B, C = ((slice(10, 30), slice(left, left + 25)) for left in (5, 45, 90))     # three places of 20 x 25 pixels
D = slice(40, 60), slice(5, 30)                                                 # below A
BOX = {"A": [5, 10, 25, 20], "B": [45, 10, 25, 20], "D": [5, 40, 25, 20]}


def street(*objects) -> np.ndarray:
    """Instance ids (64, 128) uint16 of road and of objects, given as (id, place); later ones cover earlier ones."""
    ids = np.full((HEIGHT, WIDTH), 7, np.uint16)
    for instance, place in objects:
        ids[place] = instance
    return ids


def put(root: Path, split: str, name: str, ids: np.ndarray) -> tuple[Path, Path]:
    """Write the image CITY_SEQUENCE_FRAME and its instance map. Returns their paths."""
    city = name.split("_")[0]
    image = root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png"
    instances = root / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png"
    for path, pixels in ((image, np.zeros((*ids.shape, 3), np.uint8)), (instances, ids)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return image, instances


@pytest.fixture
def city(tmp_path):
    """train: ulm with a person in front of a car, then a group of people, a caravan (29, not scored) and a one-pixel
    bicycle; aachen, which comes first, is empty. val: frankfurt, three streets to be scored."""
    root = tmp_path / "city"
    corner = np.s_[15:25, 20:40]
    put(root, "train", "ulm_000001_000019", street((26001, A), (24000, corner)))
    put(root, "train", "ulm_000000_000019", street((24, B), (29000, C), (33007, np.s_[63, 127]), (26, D)))
    put(root, "train", "aachen_000000_000019", street())
    put(root, "val", "frankfurt_000000_000019", street((24000, A), (24001, B), (24, C)))
    put(root, "val", "frankfurt_000000_000020", street((26000, A), (28000, B)))
    put(root, "val", "frankfurt_000000_000021", street())
    return root


@pytest.fixture
def val(city):
    """The val split as CocoBoxes."""
    cityscapes.write_cityscapes(str(city))
    return CocoBoxes(*datasets(str(city))[1])


def rle(place) -> dict:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[place] = 1
    encoded = coco_mask.encode(mask)
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


def detection(image_id: int, category_id: int, place, score: float) -> dict:
    segmentation = rle(place)
    return {"image_id": image_id, "category_id": category_id, "score": score, "segmentation": segmentation,
            "bbox": coco_mask.toBbox(segmentation).tolist()}


PERFECT = [detection(1, 24, A, 0.9), detection(1, 24, B, 0.8), detection(2, 26, A, 0.7), detection(2, 28, B, 0.6)]


# ------------------------------------------------------------------------------------------ to COCO files


def test_the_files_by_hand(city, capsys):
    """Images by sorted path, annotations by instance id. The person hides part of the car, whose box stays whole:
    25 x 20 - 10 x 10 (columns 20 to 29 are the car's) = 400 pixels."""
    data_main(["cityscapes", str(city)])
    out = capsys.readouterr().out
    assert "instances_train2017.json: 3 images, 3 objects, 2 groups" in out
    assert "instances_val2017.json: 3 images, 4 objects, 1 groups" in out
    content = json.loads((city / "annotations" / "instances_train2017.json").read_text())
    assert [(c["id"], c["name"]) for c in content["categories"]] == [
        (24, "person"), (25, "rider"), (26, "car"), (27, "truck"), (28, "bus"), (31, "train"), (32, "motorcycle"),
        (33, "bicycle")]
    assert content["images"] == [
        {"id": i, "file_name": f"{name}_leftImg8bit.png", "width": 128, "height": 64} for i, name in enumerate(
            ("aachen/aachen_000000_000019", "ulm/ulm_000000_000019", "ulm/ulm_000001_000019"), 1)]
    rows = [[a[key] for key in ("id", "image_id", "category_id", "iscrowd", "area", "bbox")]
            for a in content["annotations"]]
    assert rows == [[1, 2, 24, 1, 500, BOX["B"]], [2, 2, 26, 1, 500, BOX["D"]], [3, 2, 33, 0, 1, [127, 63, 1, 1]],
                    [4, 3, 24, 0, 200, [20, 15, 20, 10]], [5, 3, 26, 0, 400, BOX["A"]]]
    masks = [coco_mask.decode(a["segmentation"]).astype(bool) for a in content["annotations"]]
    ids = street((26001, A), (24000, np.s_[15:25, 20:40]))
    assert (masks[3] == (ids == 24000)).all() and (masks[4] == (ids == 26001)).all()
    assert not list(city.rglob("*.tmp")) and len(list((city / "annotations").iterdir())) == 2


def test_boxes_are_those_of_the_pixels():
    """Random pixels against their outermost rows and columns; ids go up to 33,999."""
    rng = np.random.default_rng(0)
    ids = np.where(rng.random((30, 50)) < 0.01, rng.choice([24001, 26000, 33999], (30, 50)), 4).astype(np.uint16)
    for row, instance in zip(cityscapes.annotate(ids), (24001, 26000, 33999), strict=True):
        rows, columns = np.nonzero(ids == instance)
        assert row["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert row["area"] == len(rows) and row["category_id"] == instance // 1000
    json.dumps(cityscapes.annotate(ids))


def test_training_reads_the_files(city, val):
    """Without the groups; --data finds the images where Cityscapes keeps them."""
    assert len(val) == 3 and [c["id"] for c in val.classes] == [24, 25, 26, 27, 28, 31, 32, 33]
    assert [val.image_boxes(i)[1].tolist() for i in range(3)] == [[0, 0], [2, 4], []]
    assert val.image_boxes(0)[0].tolist() == [[5, 10, 30, 30], [45, 10, 70, 30]]
    assert val.path(0) == str(city / "leftImg8bit" / "val" / "frankfurt" / "frankfurt_000000_000019_leftImg8bit.png")
    check_sizes(val)
    annotations, validation = train.open_data(train.parse_arguments(["--data", str(city), "--method", "condinst"]), 0)
    assert len(annotations.boxes) == 3 and validation.classes == annotations.classes
    assert (annotations.mask(2, 2) == (street((26001, A), (24000, np.s_[15:25, 20:40])) == 26001)).all()
    batch = TrainBatches(annotations, batch_size=3, min_sizes=[64], max_size=128)[0]
    assert batch.images.shape == (3, 3, 64, 128) and sorted(len(boxes) for boxes in batch.boxes) == [0, 1, 2]


def test_paths_of_the_named_data_set():
    (train_json, train_images), (_, val_images) = datasets("cityscapes")
    root = os.path.join("datasets", "cityscapes")
    assert train_json == os.path.join(root, "annotations", "instances_train2017.json")
    assert train_images == os.path.join(root, "leftImg8bit", "train")
    assert val_images == os.path.join(root, "leftImg8bit", "val")


# ------------------------------------------------------------------------------------------ what can be wrong


def refused(root: Path, *parts: str) -> None:
    """The error is one line with all parts; no file is written, and an existing one stays."""
    old = root / "annotations" / "instances_train2017.json"
    old.parent.mkdir(exist_ok=True)
    old.write_text("old")
    with pytest.raises(DataError) as error:
        cityscapes.write_cityscapes(str(root))
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message
    assert old.read_text() == "old" and list(old.parent.iterdir()) == [old]


def test_missing_folders_say_where_to_get_them(city):
    (city / "gtFine" / "val").rename(city / "gtFine" / "other")
    refused(city, str(city / "gtFine" / "val"), "missing", "cityscapes-dataset.com")
    (city / "leftImg8bit" / "train").rename(city / "other")
    refused(city, str(city / "leftImg8bit" / "train"), "missing", "cityscapes-dataset.com")
    (city / "leftImg8bit" / "train").mkdir()
    (city / "gtFine" / "train").rename(city / "gtFine" / "more")
    (city / "gtFine" / "train").mkdir()
    refused(city, str(city / "leftImg8bit" / "train"), "no image")


def test_an_image_without_a_map_and_a_map_without_an_image(city):
    image, instances = put(city, "val", "bonn_000000_000001", street())
    instances.unlink()
    refused(city, "1 of 4 images", str(city / "gtFine" / "val"), "bonn/bonn_000000_000001_leftImg8bit.png")
    put(city, "val", "bonn_000000_000001", street())
    image.unlink()
    refused(city, "1 of 4 instance maps", str(city / "leftImg8bit" / "val"),
            "bonn/bonn_000000_000001_gtFine_instanceIds.png")


def test_unreadable_and_wrong_images_are_named(city):
    image, instances = put(city, "val", "bonn_000000_000001", street())
    whole = instances.read_bytes()
    for broken in (b"", b"no image", whole[:60]):
        instances.write_bytes(broken)
        refused(city, str(instances), "cannot be read")
    Image.new("RGB", (WIDTH, HEIGHT)).save(instances)
    refused(city, str(instances), "mode RGB")
    Image.fromarray(street().T.copy()).save(instances)
    refused(city, str(instances), "64 x 128", str(image), "128 x 64")
    Image.fromarray(street((34000, A))).save(instances)
    refused(city, str(instances), "34000")
    instances.write_bytes(whole)
    image.write_bytes(b"")
    refused(city, str(image), "cannot be decoded")


def test_a_folder_that_cannot_be_written(city):
    (city / "annotations").write_text("a file")
    with pytest.raises(DataError, match="cannot write annotation file .*annotations"):
        cityscapes.write_cityscapes(str(city))


def test_the_command_line_ends_with_one_line(tmp_path):
    script = Path(cityscapes.__file__).parents[1] / "data.py"
    run = subprocess.run([sys.executable, script, "cityscapes", tmp_path / "none"], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and run.stderr.startswith("error: ")


# ------------------------------------------------------------------------------------ the benchmark's format


def test_export_by_hand(val, tmp_path):
    """A text file for every image, even without detections; each line names a mask of the image's size."""
    folder = tmp_path / "new" / "results"
    cityscapes_score.prepare(val, str(folder))
    cityscapes_score.export([*PERFECT, detection(1, 25, C, 0.123456789)], val, str(folder))
    files = {path.name: path.read_text().splitlines() for path in folder.glob("*.txt")}
    stem = "frankfurt_000000_0000"
    assert files == {f"{stem}19.txt": [f"masks/{stem}19_0.png 24 0.9", f"masks/{stem}19_1.png 24 0.8",
                                       f"masks/{stem}19_2.png 25 0.123456789"],
                     f"{stem}20.txt": [f"masks/{stem}20_0.png 26 0.7", f"masks/{stem}20_1.png 28 0.6"],
                     f"{stem}21.txt": []}
    assert len(list((folder / "masks").iterdir())) == 5
    mask = np.asarray(Image.open(folder / "masks" / f"{stem}19_1.png").convert("L"))
    assert ((mask == 255) == (street((1, B)) == 1)).all()


def test_prepare_refuses_what_cannot_be_exported(city, val, tmp_path):
    def fails(annotations, folder, *parts):
        with pytest.raises(DataError) as error:
            cityscapes_score.prepare(annotations, str(folder))
        assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), str(error.value)

    fails(val, city, str(city), "not empty")
    (tmp_path / "file").write_text("")
    fails(val, tmp_path / "file", str(tmp_path / "file"), "cannot write")
    path = city / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "pedestrian"
    path.write_text(json.dumps(content))
    fails(CocoBoxes(*datasets(str(city))[1]), tmp_path / "new", str(path), "24 'pedestrian'")
    content["categories"][0]["name"] = "person"
    content["images"][1]["file_name"] = "other.png"
    Image.new("RGB", (WIDTH, HEIGHT)).save(city / "leftImg8bit" / "val" / "other.png")
    path.write_text(json.dumps(content))
    fails(CocoBoxes(*datasets(str(city))[1]), tmp_path / "new", "other.png", str(path))


# -------------------------------------------------------------------------------------- the official scripts


@pytest.fixture
def official(val, tmp_path):
    """score(detections) -> official_ap of their export."""
    pytest.importorskip("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")

    def score(detections):
        folder = str(tmp_path / f"results{len(list(tmp_path.iterdir()))}")
        scripts = cityscapes_score.prepare(val, folder)
        before = Path(scripts.args.gtInstancesFile).exists(), sorted(os.listdir()), os.getcwd()
        cityscapes_score.export(detections, val, folder)
        figures = cityscapes_score.official_ap(scripts, val, folder)
        assert before == (Path(scripts.args.gtInstancesFile).exists(), sorted(os.listdir()), os.getcwd())
        return figures
    return score


def test_classes_are_those_that_the_scripts_score(official):
    from cityscapesscripts.helpers.labels import labels
    scored = [{"id": label.id, "name": label.name} for label in labels if label.hasInstances and not label.ignoreInEval]
    assert cityscapes.CLASSES == scored and cityscapes.LAST_LABEL == max(label.id for label in labels)


def test_perfect_detections_have_100_and_absent_classes_none(official):
    figures = official(PERFECT)
    assert figures["AP"] == figures["AP50"] == pytest.approx(100)
    for name, row in figures["per_class"].items():
        expected = 100 if name in ("person", "car", "bus") else None
        assert row == {"AP": expected, "AP50": expected} or row["AP"] == row["AP50"] == pytest.approx(expected)
    json.dumps(figures, allow_nan=False)


def test_missing_and_wrong_detections_have_the_ap_by_hand(official):
    """The scripts sum precision x (recall of the point before - recall of the point after) / 2 over the points of the
    curve by rising score, the first having itself before it; the last is artificial: precision 1, recall 0.

    person: one of two is found, nothing is wrong: points (precision 1, recall 1/2), (1, 0); after the last comes 0.
        1 x (1/2 - 0)/2 + 1 x (1/2 - 0)/2 = 1/2. The detection in the group, of the highest score, does not count.
    car: found with score 0.6, and a wrong one on the road with 0.9: points (1/2, 1), (0, 0), (1, 0).
        1/2 x (1 - 0)/2 + 0 x (1 - 0)/2 + 1 x (0 - 0)/2 = 1/4.
    bus: 18 of its 25 columns, IoU 0.72: right at 0.5, 0.55, 0.6, 0.65 and 0.7, five of ten thresholds, so 1/2; right
        at 0.5, so AP50 is 1.
    The mean of the classes: AP (50 + 25 + 50) / 3, AP50 (50 + 25 + 100) / 3."""
    figures = official([detection(1, 24, A, 0.8), detection(1, 24, C, 0.95), detection(2, 26, A, 0.6),
                        detection(2, 26, C, 0.9), detection(2, 28, (B[0], slice(45, 63)), 0.5)])
    by_hand = {"person": (50, 50), "car": (25, 25), "bus": (50, 100)}
    for name, row in figures["per_class"].items():
        assert (row["AP"], row["AP50"]) == pytest.approx(by_hand.get(name, (None, None))), name
    assert figures["AP"] == pytest.approx(125 / 3) and figures["AP50"] == pytest.approx(175 / 3)


def test_no_detection_has_zero(official, capsys):
    figures = official([])
    assert figures["AP"] == figures["AP50"] == 0 and figures["per_class"]["truck"]["AP"] is None
    cityscapes_score.print_table(figures)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [["Cityscapes", "AP", "AP50"], ["all", "0.0", "0.0"]] and ["truck", "-", "-"] in lines
    assert len(lines) == 10


def test_a_failure_of_the_scripts_is_one_line(official):
    """The only detection of a person is in the group: the scripts then index an empty list."""
    with pytest.raises(DataError, match="^cityscapesscripts cannot score the results in .*results.*: IndexError: .*$"):
        official([detection(1, 24, C, 0.9)])


def test_missing_instance_maps_are_named_before_the_evaluation(city, val, tmp_path, official):
    path = city / "gtFine" / "val" / "frankfurt" / "frankfurt_000000_000020_gtFine_instanceIds.png"
    path.unlink()
    with pytest.raises(DataError, match="1 of 3 instance maps") as error:
        cityscapes_score.prepare(val, str(tmp_path / "new"))
    assert str(path) in str(error.value)


# ------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def arguments(city, val, tmp_path, monkeypatch):
    """Arguments of evaluate.py on the city; the model's detections are PERFECT."""
    torch.manual_seed(0)
    model = dict(backbone="r18-slim", num_classes=8, channels=64, frozen=False)
    weights = build_model(**model).state_dict()
    save({"model": model, "classes": cityscapes.CLASSES, "method": "boxteacher", "iteration": 7, "student": weights,
          "teacher": weights, "config": {"test_min_size": 64, "test_max_size": 128}}, tmp_path / "model.pt")
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **options: PERFECT)
    return ["--ckpt", str(tmp_path / "model.pt"), "--data", str(city), "--device", "cpu",
            "--metrics", str(tmp_path / "ap.json"), "--cityscapes-results", str(tmp_path / "results")]


def test_evaluate_gives_both_ap(arguments, tmp_path, capsys):
    pytest.importorskip("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")
    evaluate.main(arguments)
    metrics = json.loads((tmp_path / "ap.json").read_text())
    assert metrics["segm"]["AP"] == pytest.approx(100) and metrics["cityscapes"]["AP"] == pytest.approx(100)
    assert metrics["cityscapes"]["per_class"]["train"] == {"AP": None, "AP50": None}
    assert ["all", "100.0", "100.0"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_without_the_package_the_results_are_written_with_one_line_about_it(arguments, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "cityscapesscripts"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cityscapesscripts", None)
    evaluate.main(arguments)
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if "pip install cityscapesscripts" in line]) == 1
    metrics = json.loads((tmp_path / "ap.json").read_text())
    assert metrics["segm"]["AP"] == pytest.approx(100) and "cityscapes" not in metrics
    assert len(list((tmp_path / "results").glob("*.txt"))) == 3


def test_the_package_is_imported_only_with_its_option(arguments):
    """In a new process, where no other test has imported it."""
    code = ("import sys, evaluate; evaluate.evaluate = lambda *_, **options: []; evaluate.main(sys.argv[1:]); "
            "assert not [name for name in sys.modules if name.startswith('cityscapesscripts')]")
    run = subprocess.run([sys.executable, "-c", code, *arguments[:-2]], cwd=Path(evaluate.__file__).parent,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
