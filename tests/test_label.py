"""tools/label.py: masks for boxes, by Alg. 1 or by a model's mask heads, and their agreement with known masks."""
import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from data import TestImages, pixels
from formats.coco import CocoBoxes
from formats.pictures import load_image
from helpers import draw_dataset, made_up, make_batch, random_predictions
from refine import ellipse
from tools.label import (ASSIGNED, MODEL, BoxMasks, agreement, assigned_masks, at_pixels, label_dataset,
                         model_classes, model_masks, polygons, report_agreement, with_masks)
from model import build_model

EVERYWHERE = torch.full((12, 16), 6.0)


def decoded(rles: list) -> torch.Tensor:
    return torch.from_numpy(np.stack([coco_mask.decode(rle) for rle in rles])).bool()


# ------------------------------------------------------------------------------------------------ Alg. 1 alone


def test_masks_go_to_their_boxes_and_are_cut_there():
    """Three boxes: one found twice, one found, one missed. The image's own size is twice that of the input."""
    size, boxes = (96, 128), [[16.0, 24, 72, 64], [80, 30, 110, 70], [4, 70, 40, 90]]
    vague = torch.full((12, 16), 0.4)
    predictions = made_up([[(boxes[0], 0.5, vague), (boxes[0], 0.5, EVERYWHERE), (boxes[1], 0.3, EVERYWHERE)]], size)
    batch = make_batch([boxes], size, size, size)
    twice = batch._replace(original_sizes=[(192, 256)])
    own = 2 * torch.tensor(boxes) + torch.tensor([0.4, -0.4, 0.4, -0.4])     # cut to the nearest pixels
    labels = assigned_masks(predictions, twice, 0, own)
    x0, y0, x1, y1 = (2 * torch.tensor(boxes)).int().T.tolist()
    for i in range(2):  # the whole box, and not a pixel more
        expected = torch.zeros(192, 256, dtype=torch.bool)
        expected[y0[i]:y1[i], x0[i]:x1[i]] = True
        assert torch.equal(decoded([labels.rles[i]])[0], expected)
    assert labels.rles[2] is None and labels.sources == [ASSIGNED, ASSIGNED, None]
    q = torch.tensor(6.0).sigmoid().item()
    assert labels.scores.tolist() == pytest.approx([math.sqrt(math.sqrt(0.5) * q), math.sqrt(math.sqrt(0.3) * q), 0],
                                                   abs=1e-4)
    labels = assigned_masks(predictions, batch, 0, torch.tensor(boxes), score_threshold=0.8)
    assert labels.rles[0] and labels.rles[1] is None and labels.scores[1] == 0
    labels = assigned_masks(predictions, make_batch([[]], size, size, size), 0, torch.zeros(0, 4))
    assert labels.rles == [] and labels.scores.shape == (0,)


def test_a_detection_whose_mask_lies_outside_its_box_gives_none():
    size, box = (96, 128), [16.0, 24, 56, 64]
    right = torch.full((12, 16), -6.0)
    right[:, 8:] = 6
    image = made_up([[([16, 24, 90, 64], 0.9, right)]], size)
    labels = assigned_masks(image, make_batch([[box]], size, size, size), 0, torch.tensor([box]))
    assert labels.rles == [None] and labels.sources == [None] and labels.scores.tolist() == [0]


# ------------------------------------------------------------------------------------------------- mask heads


def picture_batch(boxes: list, size: tuple[int, int]):
    """A batch of one grey image, which is its teacher's view too."""
    batch = make_batch([boxes], size, size, size)
    return batch._replace(teacher_images=torch.full((1, 3, *size), 90, dtype=torch.uint8))


def test_every_box_has_a_mask_within_it_even_with_more_boxes_than_locations():
    boxes = torch.rand(300, 4, generator=torch.Generator().manual_seed(0)) * 30
    boxes[:, 2:] += boxes[:, :2] + 1
    image, size = random_predictions(64, 64), (64, 64)
    assert len(image.locations.xy) < 300
    labels = model_masks(image, picture_batch(boxes.tolist(), size), 0, boxes, torch.tensor([0]), fit_steps=1)
    assert labels.sources == [MODEL] * 300
    masks, (x0, y0, x1, y1) = decoded(labels.rles), (boxes + 0.5).floor().int().T.tolist()
    for k, mask in enumerate(masks):
        inside = mask[y0[k]:max(y1[k], y0[k] + 1), x0[k]:max(x1[k], x0[k] + 1)]
        assert inside.any() and inside.sum() == mask.sum()


def test_fitting_and_colours_can_be_left_out():
    """A head that sees the left half of a box, of which three quarters are red: fitting stretches it to the right edge,
    colours add the third quarter."""
    size, box = (96, 128), [16.0, 16, 80, 80]
    left = torch.full((12, 16), -6.0)
    left[:, :6] = 6
    image, batch = made_up([[(box, 0.9, left)]], size), picture_batch([box], size)
    batch.teacher_images[0, :, 16:80, 16:64] = torch.tensor([200, 40, 40], dtype=torch.uint8)[:, None, None]

    def quarters(**options) -> list[float]:
        """How much of the box's quarters, from left to right, is mask."""
        rles = model_masks(image, batch, 0, torch.tensor([box]), torch.tensor([0]), **options).rles
        return decoded(rles)[0, 16:80, 16:80].float().unflatten(1, (4, 16)).mean((0, 2)).tolist()

    assert quarters(fit_steps=0, colors=False) == pytest.approx([1, 1, 0, 0], abs=0.25)  # and some of the ellipse
    assert quarters(fit_steps=30, colors=False)[3] > 0.05
    assert quarters(fit_steps=0, colors=True)[2] > 0.9


def test_the_picture_is_made_contiguous_before_boxes_are_read(monkeypatch):
    """roi_align would copy a picture whose colours are last in memory for every chunk of boxes, and every large box."""
    seen = []
    monkeypatch.setattr("tools.label.color_masks", lambda image, boxes, guess, strength: seen.append(image) or guess)
    picture = torch.zeros(40, 50, 3, dtype=torch.uint8).permute(2, 0, 1)
    at_pixels(picture, torch.tensor([[5.0, 5, 30, 30]]), ellipse()[None], 1.0, (40, 50), MODEL)
    assert seen[0].is_contiguous() and seen[0].dtype == torch.float32 and not picture.is_contiguous()


def test_the_padding_of_a_picture_is_not_seen():
    """A red object at the lower right corner of a picture that is padded with red for its batch."""
    size, box = (96, 128), [80.0, 50, 128, 96]
    image, batch = made_up([[(box, 0.9, torch.zeros(12, 16))]], size), picture_batch([box], size)
    batch.teacher_images[0, :, 60:, 90:] = torch.tensor([200, 40, 40], dtype=torch.uint8)[:, None, None]
    padded = torch.tensor([200, 40, 40], dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, 160, 160)
    padded[:, :, :96, :128] = batch.teacher_images
    one, two = (model_masks(image, batch._replace(teacher_images=images), 0, torch.tensor([box]), torch.tensor([0]), 0)
                for images in (batch.teacher_images, padded))
    assert one.rles == two.rles and one.scores == two.scores


def test_a_mask_that_is_empty_is_the_box_and_its_score_is_0():
    size, box = (96, 128), [16.0, 24, 72, 64]
    image = made_up([[(box, 0.01, -EVERYWHERE)]], size)
    labels = model_masks(image, picture_batch([box], size), 0, torch.tensor([box]), torch.tensor([0]), 0, False)
    assert decoded(labels.rles).sum() == 56 * 40 and labels.scores.tolist() == [0]


# ------------------------------------------------------------------------------------------------- a data set


def test_a_data_set_in_batches(tmp_path):
    """Every box of every image, in the file's order; images of other shapes are padded, and masks hardly change."""
    torch.manual_seed(0)
    model = build_model("r18-slim", 3, channels=32, frozen=False)
    annotations = CocoBoxes(*draw_dataset(tmp_path))
    label = partial(model_masks, classes=torch.arange(len(annotations.classes)), fit_steps=3)
    one, four = (label_dataset(model, annotations, label, min_size=64, max_size=128, batch_size=n, workers=0)
                 for n in (1, 4))
    assert one.sources == four.sources == [MODEL] * len(annotations.boxes)
    ious = [coco_mask.iou([a], [b], [0])[0, 0] for a, b in zip(one.rles, four.rles)]
    assert np.mean(ious) > 0.9 and one.scores.std() > 0
    x, y, w, h = np.array([coco_mask.toBbox(rle) for rle in one.rles]).T
    x0, y0, x1, y1 = annotations.boxes.T
    assert (x >= np.floor(x0)).all() and (x + w <= np.ceil(x1)).all()
    assert (y >= np.floor(y0)).all() and (y + h <= np.ceil(y1)).all()


def test_the_whole_image_comes_beside_its_view(tmp_path):
    """Padded on the right and at the bottom; without `whole` there is none."""
    annotations = CocoBoxes(*draw_dataset(tmp_path))
    for whole in (True, False):
        images = TestImages(annotations, 32, 64, whole=whole)
        batch = TestImages.collate([images[0], images[1]])
        assert batch.sizes == [(32, 48), (48, 32)] and (batch.teacher_images is not None) == whole
        for b in range(2) if whole else ():
            height, width = batch.original_sizes[b]
            own = pixels(load_image(annotations.path(b), (height, width)))
            assert torch.equal(batch.teacher_images[b, :, :height, :width], own)


def test_an_undecodable_image_is_named_and_its_boxes_have_no_mask(drawn, tmp_path, capsys):
    shutil.copytree(drawn, tmp_path / "set")
    broken = sorted((tmp_path / "set/train2017").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:200])
    model = build_model("r18-slim", 8, channels=32, frozen=False)
    annotations = CocoBoxes(tmp_path / "set/annotations/instances_train2017.json", tmp_path / "set/train2017")
    label = partial(model_masks, classes=torch.arange(len(annotations.classes)), fit_steps=0)
    labels = label_dataset(model, annotations, label, min_size=64, max_size=64, workers=0, batch_size=4)
    own = range(*annotations.offsets[3:5])
    assert [k for k, source in enumerate(labels.sources) if source is None] == [*own] and len(own)
    assert all(labels.rles[k] is None and labels.scores[k] == 0 for k in own)
    assert str(broken) in capsys.readouterr().err


def test_classes_meet_by_name(capsys):
    ours = [{"id": 7, "name": "dog"}, {"id": 8, "name": "gnu"}, {"id": 9, "name": "cat"}]
    assert model_classes([{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}], ours).tolist() == [1, -1, 0]
    assert model_classes(None, ours).tolist() == [-1, -1, -1]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("names, found", [
    ({1: "red", 2: "blue", 3: "red"}, [0, 1, 2]), ({0: "red", 1: "red", 2: "blue"}, [0, 1, 2]),
    ({1: "red", 2: "red"}, [0, 1])])
def test_classes_of_one_name_meet_by_id(names, found, capsys):
    classes = [{"id": i, "name": name} for i, name in names.items()]
    assert model_classes(classes, classes).tolist() == found
    assert model_classes(classes, classes[::-1]).tolist() == found[::-1] and capsys.readouterr().err == ""


@pytest.mark.parametrize("trained, ours, found, unclear", [
    ({1: "red", 2: "blue", 3: "red"}, {7: "red", 8: "blue"}, [0, 1], "'red' (id 7)"),          # twice in the model
    ({1: "red", 2: "blue"}, {1: "red", 5: "red"}, [0, 0], "'red' (id 5)"),                     # twice in the data set
    ({4: "red", 5: "red"}, {1: "red", 5: "red", 6: "red"}, [0, 1, 0], "'red' (id 1), 'red' (id 6)"),
    ({1: "blue"}, {1: "red", 2: "red"}, [-1, -1], None), ({2: "red"}, {1: "red", 2: "blue"}, [0, -1], None)])
def test_a_name_that_ids_do_not_settle_takes_the_first_and_one_warning(trained, ours, found, unclear, capsys):
    trained, ours = ([{"id": i, "name": name} for i, name in some.items()] for some in (trained, ours))
    assert model_classes(trained, ours).tolist() == found
    warned = capsys.readouterr().err
    assert warned.count("\n") == bool(unclear) and (not unclear or f"is taken for {unclear}\n" in warned)


def test_the_file_keeps_what_it_had(tmp_path):
    """A mask below --min-score is left out, its score is not; unused boxes get no mask; crowds stay as they are."""
    boxes = [[2, 2, 10, 10], [20, 2, 10, 10], [5, 5, 0.2, 9], [1, 1, 30, 30]]
    content = {"info": {"year": 2026}, "licenses": [{"id": 1}],
               "images": [{"id": 5, "file_name": "a.png", "width": 40, "height": 30, "date": "today"}],
               "categories": [{"id": 3, "name": "x", "supercategory": "y"}],
               "annotations": [{"id": 10 + i, "image_id": 5, "category_id": 3, "bbox": box, "attributes": {"i": i}}
                               | {"area": 99} for i, box in enumerate(boxes)]}
    content["annotations"][3] |= {"iscrowd": 1, "segmentation": "of old"}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    annotations = CocoBoxes(tmp_path / "boxes.json", tmp_path)
    rle = coco_mask.encode(np.asfortranarray(np.eye(30, 40, dtype=np.uint8)))
    rle = {"size": rle["size"], "counts": rle["counts"].decode()}
    new = with_masks(annotations, BoxMasks([rle, rle], np.array([0.7, 0.2]), [MODEL, MODEL]), min_score=0.5)
    own = [{"segmentation": rle, "area": 30, "score": 0.7, "source": MODEL},
           {"segmentation": [], "score": 0.2, "source": MODEL},
           {"segmentation": [], "score": 0.0, "source": None}, {}]
    assert new == content | {"annotations": [row | mine for row, mine in zip(content["annotations"], own)]}


def test_polygons_draw_the_same_pixels():
    pytest.importorskip("cv2")
    mask = np.zeros((40, 50), np.uint8)
    mask[5:20, 10:30] = mask[25:26, 40:41] = 1  # a rectangle, and one pixel
    y, x = np.mgrid[:40, :50]
    mask[(y - 30) ** 2 + (x - 15) ** 2 < 49] = 1
    shapes = polygons(coco_mask.encode(np.asfortranarray(mask)))
    assert len(shapes) == 3 and all(len(shape) >= 6 and len(shape) % 2 == 0 for shape in shapes)
    again = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(shapes, 40, 50)))
    assert (again != mask).sum() <= 4 and again[25, 40]


# ------------------------------------------------------------------------------------------------- measuring


def test_agreement_by_hand(drawn, tmp_path, capsys, monkeypatch):
    """A mask equal to the hidden one, an empty one, and one that fills the box; and the table that is printed."""
    annotations = CocoBoxes(drawn / "annotations/instances_train2017.json", drawn / "train2017", masks=True)
    content = json.loads((drawn / "annotations/instances_train2017.json").read_text())
    hidden = [content["annotations"][row]["segmentation"] for row in annotations.rows.tolist()]
    hidden = [{"size": one["size"], "counts": one["counts"]} for one in hidden]
    x0, y0, x1, y1 = annotations.boxes[2].astype(int)
    box = np.zeros((64, 64), np.uint8, order="F")
    box[y0:y1, x0:x1] = 1
    rles = [*hidden[:2], coco_mask.encode(box), *hidden[3:]]
    rles[1] = None
    masks, filled = agreement(annotations, rles)
    assert masks[0] == 1 and masks[1] == 0 and masks[2] == filled[2] and (masks[3:] == 1).all()
    area = annotations.mask(0, 2).sum() / ((x1 - x0) * (y1 - y0))  # of the box: the drawn boxes are tight
    assert filled[2] == pytest.approx(area) and (0 < filled).all() and (filled <= 1).all()

    scores = np.linspace(0.9, 0.5, len(rles))
    scores[1] = 0
    report_agreement(annotations, BoxMasks(rles, scores, [MODEL, None, *[MODEL] * (len(rles) - 2)]))
    lines = capsys.readouterr().out.splitlines()
    values = {line[:36].strip(): line[36:].split() for line in lines[2:-1]}

    def means(of) -> list[str]:
        return [str(of.sum()), *(f"{x[of].mean():.3f}" if of.any() else "-" for x in (filled, masks))]

    n, given = len(rles), scores > 0
    quarter = (n - 1) // 4
    assert values["all boxes"] == means(np.ones(n, bool)) and values["boxes with a mask"] == means(given)
    assert values["boxes without a mask"] == ["1", f"{filled[1]:.3f}", "0.000"]
    best, worst = np.delete(np.arange(n), 1)[:quarter], np.arange(n)[-quarter:]
    assert values["the quarter of the best scores"] == means(np.isin(np.arange(n), best))
    assert values["the quarter of the worst scores"] == means(np.isin(np.arange(n), worst))
    assert values["the quarter of the best scores"][2] != "1.000" == values["the quarter of the worst scores"][2]
    area = (annotations.boxes[:, 2:] - annotations.boxes[:, :2]).prod(1)
    assert values["under 32 x 32 pixels"] == means(given & (area < 32 ** 2)) != means(given)
    assert values["32 x 32 to 96 x 96"] == means(given & (area >= 32 ** 2)) and values["larger"] == ["0", "-", "-"]
    assert lines[-1].endswith(f": {(masks[given].sum() + filled[1]) / n:.3f}")
    common = np.bincount(annotations.labels).max()
    monkeypatch.setattr("tools.label.MEASURED", common)
    report_agreement(annotations, BoxMasks(rles, scores, [MODEL] * n))
    shown = capsys.readouterr().out
    for label, c in enumerate(annotations.classes):
        of = given & (annotations.labels == label)
        line = f"\n    {c['name']:32}{of.sum():8}{filled[of].mean():8.3f}{masks[of].mean():8.3f}\n"
        assert (line in shown) == ((annotations.labels == label).sum() == common)
    monkeypatch.setattr("tools.label.MEASURED", n + 1)
    report_agreement(annotations, BoxMasks([None] * n, np.zeros(n), [None] * n))
    assert capsys.readouterr().out.count("       -       -\n") == 6
