"""tools/label.py: masks for boxes, assigned or prompted, and their agreement with known masks."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from assign import image_targets
from formats.coco import CocoBoxes
from helpers import given_parameters, made_up, random_predictions
from tools.label import (ASSIGNED, PROMPTED, BoxMasks, agreement, assigned_locations, box_pixels, cut_masks,
                         label_dataset, label_image, model_classes, owners, polygons, prompt, report_agreement,
                         with_masks)
from masks import box_masks
from model import build_model, mask_logits

EVERYWHERE = torch.full((12, 16), 6.0)


def decoded(rles: list) -> torch.Tensor:
    return torch.from_numpy(np.stack([coco_mask.decode(rle) for rle in rles])).bool()


# ------------------------------------------------------------------------------------------------ Alg. 1 alone


def test_masks_go_to_their_boxes_and_are_cut_there():
    """Three boxes: one found twice, one found, one missed. The image's own size is twice that of the input."""
    size, boxes = (96, 128), [[16.0, 24, 72, 64], [80, 30, 110, 70], [4, 70, 40, 90]]
    vague = torch.full((12, 16), 0.4)
    predictions = made_up([[(boxes[0], 0.5, vague), (boxes[0], 0.5, EVERYWHERE), (boxes[1], 0.3, EVERYWHERE)]], size)
    labels = label_image(predictions, torch.tensor(boxes), size, (192, 256))
    x0, y0, x1, y1 = (2 * torch.tensor(boxes)).int().T.tolist()
    for i in range(2):  # the whole box, and not a pixel more
        expected = torch.zeros(192, 256, dtype=torch.bool)
        expected[y0[i]:y1[i], x0[i]:x1[i]] = True
        assert torch.equal(decoded([labels.rles[i]])[0], expected)
    assert labels.rles[2] is None and labels.sources == [ASSIGNED, ASSIGNED, None]
    q = torch.tensor(6.0).sigmoid().item()
    assert labels.scores.tolist() == pytest.approx([math.sqrt(math.sqrt(0.5) * q), math.sqrt(math.sqrt(0.3) * q), 0],
                                                   abs=1e-4)
    labels = label_image(predictions, torch.tensor(boxes), size, size, score_threshold=0.8)
    assert labels.rles[0] and labels.rles[1] is None and labels.scores[1] == 0
    labels = label_image(predictions, torch.zeros(0, 4), size, size)
    assert labels.rles == [] and labels.scores.shape == (0,)


def test_a_box_touches_the_pixels_that_it_covers_in_part():
    boxes = torch.tensor([[1.5, 2, 3, 4.25], [0, 0, 8, 8], [-3, 4, 20, 9]])
    assert box_pixels(boxes, (8, 8), (8, 8)).tolist() == [[1, 2, 3, 5], [0, 0, 8, 8], [0, 4, 8, 8]]
    sides = box_pixels(torch.tensor([[10.0, 20, 40, 30]]), (100, 100), (50, 300))  # each side has its own scale
    assert sides.tolist() == [[30, 10, 120, 15]]


def test_a_box_that_was_made_smaller_and_larger_again_is_the_same():
    """Whole pixels of an image of 4000, resized to 1333: 1001.0001 is 1001 but for rounding, and no pixel more."""
    x1 = torch.arange(1, 4001, 7, dtype=torch.float32)
    boxes = torch.stack([torch.zeros_like(x1), torch.zeros_like(x1), x1 * (1333 / 4000), torch.ones_like(x1)], 1)
    assert box_pixels(boxes, (1, 1333), (1, 4000))[:, 2].tolist() == x1.tolist()


def test_a_box_takes_detections_of_its_class_and_a_location_serves_one_box():
    """The detection has class 1. A location detected as two classes gives two detections with one mask."""
    size, box = (96, 128), torch.tensor([[16.0, 24, 72, 64]])
    predictions = made_up([[(box[0].tolist(), 0.01, EVERYWHERE), (box[0].tolist(), 0.5, EVERYWHERE)]], size)

    def rows(boxes, classes):
        return assigned_locations(predictions, boxes, size, 0.05, classes)[0].tolist()

    row = int(predictions.class_logits[0, :, 1].argmax())
    assert rows(box, None) == rows(box, torch.tensor([1])) == rows(box, torch.tensor([-1])) == [row]
    assert rows(box, torch.tensor([2])) == [-1]
    predictions.class_logits[0, row, 2] = 0.2
    assert rows(box.repeat(2, 1), None) == [row, row]
    assert rows(box.repeat(2, 1), torch.tensor([1, 2])) == [-1, row]  # 2 is the surer one
    labels = label_image(predictions, box.repeat(2, 1), size, size, classes=torch.tensor([1, 2]))
    assert labels.sources == [PROMPTED, ASSIGNED]


# --------------------------------------------------------------------------------------------------- prompting


def test_the_best_location_of_the_box_is_chosen():
    """Scores by hand, from the class of the box, the centerness and the mask inside the box."""
    size, boxes = (96, 128), torch.tensor([[16.0, 24, 72, 64], [80, 30, 110, 70]])
    image, classes = random_predictions(*size), torch.tensor([1, -1])
    owner = image_targets(image.locations, boxes, classes, 3)[2]
    rows, scores = prompt(image, boxes, classes, size, torch.full((2,), -1), torch.zeros(2))
    for g, of in enumerate((lambda p: p[:, 1], lambda p: p.amax(1))):
        own = (owner == g).nonzero()[:, 0]
        assert len(own) > 4
        p = mask_logits(image, [own]).sigmoid()
        inside = (p > 0.5) & box_masks(boxes[g:g + 1], *p.shape[1:])
        c = (of(image.class_logits[0, own].sigmoid()) * 0.5).sqrt()
        expected = (c * (p * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)).sqrt()
        assert rows[g] == own[expected.argmax()] and scores[g] == pytest.approx(expected.max().item(), rel=1e-5)


def test_owners_in_parts_are_fcos_targets():
    """With this many boxes the locations are processed in parts; of equal boxes the first is the owner."""
    image, boxes = random_predictions(96, 128), torch.rand(50, 4, generator=torch.Generator().manual_seed(1))
    boxes = torch.cat([boxes[:, :2] * 60, boxes[:, :2] * 60 + 10 + boxes[:, 2:] * 30], 1)
    whole = image_targets(image.locations, boxes, torch.zeros(50, dtype=torch.int64), 1)[2]
    assert torch.equal(owners(image.locations, boxes), whole) and len(whole.unique()) > 10
    many = owners(image.locations, boxes.repeat(2 ** 9, 1))
    assert 2 ** 20 // (50 * 2 ** 9) < len(whole) // 4 and torch.equal(torch.where(many < 0, many, many % 50), whole)


def test_two_boxes_never_share_a_location():
    """Equal boxes, boxes within boxes, boxes between locations: each gets another location of its level."""
    boxes = torch.tensor([[16.0, 24, 72, 64]] * 12 + [[30.0, 30, 33, 33]] * 3 + [[0.0, 0, 2, 1], [127, 95, 128, 96]])
    image, size = random_predictions(96, 128), (96, 128)
    rows, scores = prompt(image, boxes, torch.zeros(len(boxes), dtype=torch.int64), size,
                          torch.full((len(boxes),), -1), torch.zeros(len(boxes)))
    assert len(rows.unique()) == len(boxes) and (rows >= 0).all() and (scores > 0).all()
    assert (image.locations.level[rows] == 0).all()
    distance = (image.locations.xy[rows] - (boxes[:, :2] + boxes[:, 2:]) / 2).abs().amax(1)
    assert (distance < 40).all() and (distance[12:] < 20).all()


def test_assigned_masks_stay_and_prompted_boxes_take_other_locations():
    """Three equal boxes and one beside: one is found at their best location, which the others then cannot take."""
    size, boxes = (96, 128), torch.tensor([[16.0, 24, 72, 64]] * 3 + [[80, 30, 110, 70]])
    image, classes = random_predictions(*size), torch.zeros(4, dtype=torch.int64)
    best = int(prompt(image, boxes[:1], classes[:1], size, torch.tensor([-1]), torch.zeros(1))[0])
    x, y = image.locations.xy[best]
    image.ltrb[0, best] = torch.stack([x - 16, y - 24, 72 - x, 64 - y]) / image.locations.stride[best]
    image.class_logits[0, best, 0] = 3
    before, before_scores = assigned_locations(image, boxes, size, 0.05, classes)
    assert (before == best).sum() == 1 and (before >= 0).sum() == 1
    rows, scores = prompt(image, boxes, classes, size, before, before_scores)
    found = before >= 0
    assert torch.equal(rows[found], before[found]) and torch.equal(scores[found], before_scores[found])
    assert len(rows.unique()) == 4 and (rows >= 0).all()
    labels = label_image(image, boxes, size, size, classes=classes)
    assert labels.sources.count(ASSIGNED) == 1 and labels.sources.count(PROMPTED) == 3
    other = int((owners(image.locations, boxes[2:]) == 0).nonzero()[0])  # found at one of its locations, not the best
    assert other != best
    rows, scores = prompt(image, boxes[2:], classes[:2], size, torch.tensor([other, -1]), torch.tensor([0.1, 0]))
    assert rows[0] == other and scores[0] == pytest.approx(0.1) and rows[1] not in (-1, other)


def test_nearly_as_many_boxes_as_locations_share_none():
    boxes = torch.rand(80, 4, generator=torch.Generator().manual_seed(0)) * 40
    boxes[:, 2:] = boxes[:, :2] + 8 + boxes[:, 2:] / 4
    image = random_predictions(64, 64)
    assert len(image.locations.xy) == 86 and (owners(image.locations, boxes) >= 0).sum() > 40
    rows, _ = prompt(image, boxes, torch.zeros(80, dtype=torch.int64), (64, 64), torch.full((80,), -1),
                     torch.zeros(80))
    assert len(rows.unique()) == 80


def test_a_box_whose_assigned_mask_lies_outside_is_prompted():
    """The detection overlaps the box enough, but its mask is entirely outside: the box's locations give another."""
    size, box = (96, 128), torch.tensor([[16.0, 24, 56, 64]])
    right = torch.full((12, 16), -6.0)
    right[:, 8:] = 6
    image = made_up([[([16, 24, 90, 64], 0.9, right)]], size)
    row = int(image.class_logits[0, :, 0].argmax())
    assert assigned_locations(image, box, size, 0.05, torch.tensor([0]))[0].tolist() == [row]
    parameters = image.controller.at(image.box_maps, [torch.full_like(image.locations.level, row)])[None]
    parameters[0, :, -1] += 20                     # the others see something everywhere
    parameters[0, row, -1] -= 20
    image = image._replace(**given_parameters(parameters, (96, 128)))
    labels = label_image(image, box, size, size, classes=torch.tensor([0]))
    assert labels.sources == [PROMPTED] and decoded(labels.rles).sum() == 40 * 40


def test_more_boxes_than_locations_still_all_have_a_mask():
    boxes = torch.rand(300, 4, generator=torch.Generator().manual_seed(0)) * 30
    boxes[:, 2:] += boxes[:, :2] + 1
    image = random_predictions(64, 64)
    assert len(image.locations.xy) < 300
    labels = label_image(image, boxes, (64, 64), (64, 64), classes=torch.zeros(300, dtype=torch.int64))
    assert labels.sources == [PROMPTED] * 300
    masks, pixels = decoded(labels.rles), box_pixels(boxes, (64, 64), (64, 64))
    assert masks.any(2).any(1).all() and not (masks & ~box_masks(pixels - torch.tensor([0, 0, 1, 1]), 64, 64, 1)).any()


def test_without_a_positive_pixel_the_box_is_the_mask_and_its_score_is_0():
    size, box = (96, 128), torch.tensor([[16.0, 24, 72, 64]])
    image = made_up([[(box[0].tolist(), 0.01, -EVERYWHERE)]], size)
    labels = label_image(image, box, size, size, classes=torch.tensor([0]))
    assert decoded(labels.rles).sum() == 56 * 40 and labels.scores.tolist() == [0] and labels.sources == [PROMPTED]


def test_chunks_of_masks_change_nothing(monkeypatch):
    image, boxes = random_predictions(96, 128), torch.tensor([[16.0, 24, 72, 64], [80, 30, 110, 70], [4, 70, 40, 90]])
    rows = torch.tensor([5, -1, 40])
    whole = cut_masks(image, rows, boxes, (96, 128), (50, 70))
    monkeypatch.setattr("tools.label.CHUNK", 1)
    apart = cut_masks(image, rows, boxes, (96, 128), (50, 70))
    assert (decoded([apart[0], apart[2]]) != decoded([whole[0], whole[2]])).sum() <= 3 and apart[1] is None
    assert whole[1] is None and whole[0]["size"] == [50, 70] and whole[0] != whole[2]


# ------------------------------------------------------------------------------------------------- a data set


def test_a_data_set_in_batches(drawn):
    """Every box of every image, in the file's order; an image of another shape is padded and changes nothing."""
    torch.manual_seed(0)
    model = build_model("r18-slim", 8, channels=32, frozen=False)
    annotations = CocoBoxes(drawn / "annotations/instances_train2017.json", drawn / "train2017")
    classes = torch.arange(len(annotations.classes))
    one, four = (label_dataset(model, annotations, min_size=64, max_size=64, classes=classes, batch_size=n, workers=0)
                 for n in (1, 4))
    assert one.sources == four.sources == [PROMPTED] * len(annotations.boxes)
    assert np.allclose(one.scores, four.scores, atol=1e-5) and one.scores.std() > 0
    same = coco_mask.iou([one.rles[0]], [four.rles[0]], [0])
    assert same > 0.98
    x, y, w, h = np.array([coco_mask.toBbox(rle) for rle in one.rles]).T
    x0, y0, x1, y1 = annotations.boxes.T
    assert (x >= np.floor(x0)).all() and (x + w <= np.ceil(x1)).all()
    assert (y >= np.floor(y0)).all() and (y + h <= np.ceil(y1)).all()


def test_an_undecodable_image_is_named_and_its_boxes_have_no_mask(drawn, tmp_path, capsys):
    shutil.copytree(drawn, tmp_path / "set")
    broken = sorted((tmp_path / "set/train2017").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:200])
    model = build_model("r18-slim", 8, channels=32, frozen=False)
    annotations = CocoBoxes(tmp_path / "set/annotations/instances_train2017.json", tmp_path / "set/train2017")
    labels = label_dataset(model, annotations, min_size=64, max_size=64, workers=0, batch_size=4,
                           classes=torch.arange(len(annotations.classes)))
    own = range(*annotations.offsets[3:5])
    assert [k for k, source in enumerate(labels.sources) if source is None] == [*own] and len(own)
    assert all(labels.rles[k] is None and labels.scores[k] == 0 for k in own)
    assert str(broken) in capsys.readouterr().err


def test_classes_meet_by_name():
    ours = [{"id": 7, "name": "dog"}, {"id": 8, "name": "gnu"}, {"id": 9, "name": "cat"}]
    assert model_classes([{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}], ours).tolist() == [1, -1, 0]
    assert model_classes(None, ours).tolist() == [-1, -1, -1]


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
    new = with_masks(annotations, BoxMasks([rle, rle], np.array([0.7, 0.2]), [ASSIGNED, PROMPTED]), min_score=0.5)
    own = [{"segmentation": rle, "area": 30, "score": 0.7, "source": ASSIGNED},
           {"segmentation": [], "score": 0.2, "source": PROMPTED},
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


def test_agreement_by_hand(drawn, tmp_path, capsys):
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
    sources = [ASSIGNED, None, PROMPTED, *[ASSIGNED] * (len(rles) - 3)]
    report_agreement(annotations, BoxMasks(rles, scores, sources))
    lines = capsys.readouterr().out.splitlines()
    values = {line[:36].strip(): line[36:].split() for line in lines[2:-1]}

    def means(of) -> list[str]:
        return [str(of.sum()), *(f"{x[of].mean():.3f}" if of.any() else "-" for x in (filled, masks))]

    n, given = len(rles), scores > 0
    assert values["prompted"] == ["1", *[f"{filled[2]:.3f}"] * 2] and values["assigned"][0] == str(n - 2)
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
    report_agreement(annotations, BoxMasks([None] * n, np.zeros(n), [None] * n))
    assert capsys.readouterr().out.count("       -       -\n") == 8
