"""The drawn data set: the same images every time, annotations that agree with each other to the pixel."""
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from formats import shapes
from formats.coco import DataError
from formats.shapes import write_shapes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn") / "deep" / "shapes"
    write_shapes(root, train=40, val=10)
    return root


def read(root, split):
    return json.loads((root / "annotations" / f"instances_{split}2017.json").read_text())


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def images(root, split):
    return {path.name: path.read_bytes() for path in (root / f"{split}2017").iterdir()}


def by_image(root, split):
    """Each image's file name and decoded masks (n, H, W) bool with their annotations."""
    coco = COCO(str(root / "annotations" / f"instances_{split}2017.json"))
    for image in coco.loadImgs(coco.getImgIds()):
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        yield image, annotations, np.array([coco.annToMask(a) for a in annotations], bool)


def test_same_arguments_give_the_same_bytes(root, tmp_path):
    write_shapes(tmp_path / "again", train=40, val=10)
    assert files(tmp_path / "again") == files(root)


def test_a_smaller_set_is_a_prefix(root, tmp_path):
    write_shapes(tmp_path / "small", train=7, val=3)
    for split, count in (("train", 7), ("val", 3)):
        small, large = read(tmp_path / "small", split), read(root, split)
        assert len(small["images"]) == count
        assert small["images"] == large["images"][:count]
        assert small["annotations"] == large["annotations"][:len(small["annotations"])]
        assert large["annotations"][len(small["annotations"])]["image_id"] == count + 1
        assert images(tmp_path / "small", split).items() <= images(root, split).items()


def test_splits_and_seeds_differ(root, tmp_path):
    write_shapes(tmp_path / "other", train=10, val=1, seed=1)
    train, val = images(root, "train"), images(root, "val")
    other = images(tmp_path / "other", "train")
    assert len({*train.values(), *val.values(), *other.values()}) == 40 + 10 + 10


@pytest.mark.parametrize("split, count", [("train", 40), ("val", 10)])
def test_coco_layout(root, split, count):
    content = read(root, split)
    assert {"info", "licenses"} <= content.keys()
    assert [c["name"] for c in content["categories"]] == [
        "ellipse", "rectangle", "triangle", "star", "cross", "crescent"]
    assert [c["id"] for c in content["categories"]] == [1, 2, 3, 4, 5, 6]
    assert [image["id"] for image in content["images"]] == list(range(1, count + 1))
    assert [a["id"] for a in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))
    assert {image["file_name"] for image in content["images"]} == set(images(root, split))
    for image in content["images"]:
        with Image.open(root / f"{split}2017" / image["file_name"]) as photo:
            assert (photo.format, photo.mode) == ("JPEG", "RGB")
            assert photo.size == (image["width"], image["height"]) == (128, 128)


def test_annotations_agree_with_their_masks(root):
    for image, annotations, masks in by_image(root, "train"):
        assert 1 <= len(annotations) <= 8
        assert masks.sum(0).max() == 1  # visible parts: no pixel has two owners
        for annotation, mask in zip(annotations, masks):
            rows, columns = np.nonzero(mask)
            x, y, w, h = annotation["bbox"]
            assert (columns.min(), columns.max() + 1) == (x, x + w)
            assert (rows.min(), rows.max() + 1) == (y, y + h)
            assert 0 <= x and x + w <= image["width"] and 0 <= y and y + h <= image["height"]
            assert annotation["area"] == mask.sum() >= 20
            assert annotation["iscrowd"] == 0 and isinstance(annotation["segmentation"]["counts"], str)
            assert rle.toBbox(annotation["segmentation"]).tolist() == [x, y, w, h]


def test_annotation_by_hand():
    owner = np.zeros((6, 8), np.uint8)
    owner[1:3, 2:7] = 1
    owner[2:5, 5] = 2  # in front of the first
    first, second = shapes.annotate(owner, [4, 0])
    assert (first["category_id"], first["bbox"], first["area"]) == (5, [2, 1, 5, 2], 9)
    assert (second["category_id"], second["bbox"], second["area"]) == (1, [5, 2, 1, 3], 3)
    assert np.array_equal(rle.decode(first["segmentation"]), owner == 1)


def test_the_owner_map_matches_the_image(monkeypatch):
    """With a different colour for each object (dark or bright red, green, blue), its pixels are those it owns."""
    def colours(rng, beneath):
        colour = np.array([200 if next(order) >> bit & 1 else 10 for bit in (0, 1, 2)], np.float32)
        return colour, colour
    for seed in range(20):
        order = (k for k in range(8) for _ in range(3))
        monkeypatch.setattr(shapes, "object_colours", colours)
        image, owner, labels = shapes.draw_image(np.random.default_rng(seed), 128)
        shown = (image > 70) @ np.array([1, 2, 4])
        for k in range(len(labels)):
            assert (shown[owner == k + 1] == k).mean() > 0.7


def test_every_class_and_both_small_and_large(root):
    annotations = read(root, "train")["annotations"]
    assert min(Counter(a["category_id"] for a in annotations).get(k, 0) for k in range(1, 7)) >= 10
    sides = [max(a["bbox"][2:]) for a in annotations]
    assert min(sides) < 24 and 64 < max(sides) <= 0.64 * 128 + 2
    assert 0.5 < np.mean(np.array(sides) > 32) < 0.85


def test_boxes_do_not_determine_the_masks(root):
    filled = [a["area"] / (a["bbox"][2] * a["bbox"][3]) for a in read(root, "train")["annotations"]]
    assert 0.45 < np.mean(filled) < 0.60


def test_masks_lie_on_the_drawn_object(monkeypatch):
    """A white object on black without texture, noise or shading: bright exactly where the mask is."""
    monkeypatch.setattr(shapes, "object_colours", lambda rng, beneath: (np.float32(200), np.float32(200)))
    canvas = np.zeros((128, 128, 3), np.float32)
    shape = shapes.make_object(np.random.default_rng(3), 3, 128)
    shapes.paint(np.random.default_rng(0), canvas, shape, [0.0, 0.0], 1.0)
    mask = np.zeros((128, 128), bool)
    mask[shape.window] = shape.coverage >= 0.5
    assert mask.any() and np.array_equal(canvas[..., 0] >= 99.9, mask)


def test_coverage_of_a_square_by_hand():
    square = np.array([(2, 3), (6, 3), (6, 8.5), (2, 8.5)])  # columns 2..5, rows 3..7 and half of row 8
    (rows, columns), coverage = shapes.fill(square, 16)
    assert (rows.start, rows.stop, columns.start, columns.stop) == (3, 9, 2, 6)
    assert np.allclose(coverage[:5], 1) and np.allclose(coverage[5], 0.5, atol=0.01)
    assert np.allclose(shapes.fill(square + 0.25, 16)[1][0], [1, 1, 1, 1, 0.25], atol=0.01)
    rows, columns = shapes.fill(square - (4, 5), 16)[0]  # cut by the top left corner
    assert (rows.start, rows.stop, columns.start, columns.stop) == (0, 4, 0, 2)


@pytest.mark.parametrize("name", shapes.CLASSES)
def test_the_area_of_an_outline_equals_its_coverage(name):
    rng = np.random.default_rng(0)
    objects = [shapes.make_object(rng, shapes.CLASSES.index(name), 128) for _ in range(200)]
    whole = [t for t in objects if 12 < t.radius < min(*t.centre) and max(*t.centre) < 128 - t.radius]
    assert len(whole) > 10
    assert np.allclose([t.coverage.sum() / t.area for t in whole], 1, atol=0.12)


def test_every_object_is_visible_enough():
    for seed in range(60):
        objects, owner = shapes.place_objects(np.random.default_rng(seed), (64, 128)[seed % 2])
        visible = np.bincount(owner.ravel(), minlength=len(objects) + 1)[1:]
        assert len(visible) == len(objects)
        assert all(seen >= max(0.35 * shape.area, 20) for seen, shape in zip(visible, objects))


def test_objects_scale_with_the_size(root, tmp_path):
    write_shapes(tmp_path / "large", train=40, val=1, size=256)
    sides = [max(a["bbox"][2:]) for a in read(tmp_path / "large", "train")["annotations"]]
    reference = [max(a["bbox"][2:]) for a in read(root, "train")["annotations"]]
    assert np.mean(sides) / np.mean(reference) == pytest.approx(2, rel=0.15)
    for image, annotations, masks in by_image(tmp_path / "large", "val"):
        assert masks.shape[1:] == (256, 256)


def test_some_objects_are_camouflaged():
    beneath = np.full(3, 128, np.float32)
    rng = np.random.default_rng(0)
    shift = np.array([np.abs(shapes.object_colours(rng, beneath)[0] - beneath).mean() for _ in range(500)])
    assert 0.1 < (shift < 25).mean() < 0.4


def test_an_existing_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(DataError, match="mine: exists and is not an empty folder") as error:
        write_shapes(tmp_path / "mine", train=1, val=1)
    assert "\n" not in str(error.value)
    assert files(tmp_path) == {"mine/notes.txt": b"keep"}


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    write_shapes(tmp_path / "empty", train=2, val=1)
    assert len(images(tmp_path / "empty", "train")) == 2


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(DataError, match="file: exists"):
        write_shapes(tmp_path / "file", train=1, val=1)
    with pytest.raises(DataError, match="cannot write") as error:
        write_shapes(tmp_path / "file" / "below", train=1, val=1)
    assert "\n" not in str(error.value)
    assert files(tmp_path) == {"file": b"keep"}


@pytest.mark.parametrize("wrong", [{"train": 0}, {"val": 0}, {"seed": -1}, {"size": 63}])
def test_values_out_of_range(tmp_path, wrong):
    with pytest.raises(DataError, match=str(*wrong.values())):
        write_shapes(tmp_path / "set", **{"train": 1, "val": 1, **wrong})
    assert not list(tmp_path.iterdir())


def test_nothing_stays_behind_when_writing_stops(tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(shapes, "write_split", stop)
    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / "set", train=1, val=1)
    assert not list(tmp_path.iterdir())
