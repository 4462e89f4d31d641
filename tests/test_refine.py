"""refine.py: masks from boxes, colours and mask heads, made up; predict.py --boxes without a checkpoint."""
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

import predict
from assign import image_targets
from formats.coco import CocoBoxes
from helpers import random_predictions
from losses import projection_loss
from masks import decode
from model import Predictions, mask_logits
from refine import (POINTS, box_coordinates, box_heads, color_masks, ellipse, fitted_masks, inside_box,
                    pixel_masks, reach_sides, rounded)
from tools.label import ColorMasks, label_without_model

SIZE = (120, 160)


def painted(mask: torch.Tensor, inside: tuple, outside: tuple) -> torch.Tensor:
    """An image (3, H, W) of two colours with a little noise."""
    colours = torch.where(mask[None], torch.tensor(inside)[:, None, None], torch.tensor(outside)[:, None, None])
    noise = torch.randn(3, *mask.shape, generator=torch.Generator().manual_seed(0)) * 4
    return (colours + noise).clamp(0, 255).round()


def disc(x: float, y: float, radius: float) -> torch.Tensor:
    rows, columns = torch.arange(SIZE[0])[:, None], torch.arange(SIZE[1])
    return (columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 < radius ** 2


def masks_of(image: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
    guess = ellipse().expand(len(boxes), -1, -1)
    rles, scores = pixel_masks(color_masks(image, boxes, guess), guess, boxes, SIZE, image)
    return decode(rles, SIZE), scores


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


def shapes() -> dict[str, tuple[torch.Tensor, list[float]]]:
    """Masks and their boxes."""
    plus = torch.zeros(SIZE, dtype=torch.bool)
    plus[20:100, 55:90] = plus[45:80, 30:110] = True
    return {"disc": (disc(70, 60, 30), [40, 30, 100, 90]), "plus": (plus, [30, 20, 110, 100]),
            "small": (disc(20, 20, 6), [14, 14, 26, 26])}


@pytest.mark.parametrize("name", shapes())
@pytest.mark.parametrize("inside, outside", [((200, 60, 40), (60, 120, 60)), ((120, 120, 120), (90, 90, 90))],
                         ids=["vivid", "pale"])
def test_an_object_of_another_colour_is_found(name, inside, outside):
    mask, box = shapes()[name]
    found, scores = masks_of(painted(mask, inside, outside), torch.tensor([box], dtype=torch.float32))
    box_mask = torch.zeros(SIZE, dtype=torch.bool)
    box_mask[box[1]:box[3], box[0]:box[2]] = True
    assert iou(found[0], mask) > 0.85 > iou(box_mask, mask) and scores[0] > 0.8


def test_without_a_difference_in_colour_the_guess_remains():
    image = torch.full((3, *SIZE), 90.0)
    found, scores = masks_of(image, torch.tensor([[40.0, 30, 100, 90]]))
    guess, _ = pixel_masks(ellipse()[None], ellipse()[None], torch.tensor([[40.0, 30, 100, 90]]), SIZE)
    assert iou(found[0], decode(guess, SIZE)[0]) > 0.85                   # it may grow until it meets the sides
    sure = masks_of(painted(disc(70, 60, 30), (200, 60, 40), (60, 120, 60)), torch.tensor([[40.0, 30, 100, 90]]))[1]
    assert 0.5 < scores[0] < sure[0] - 0.01


def test_colours_count_as_much_as_their_strength_says():
    mask, box = shapes()["plus"]
    image, box, guess = painted(mask, (200, 60, 40), (60, 120, 60)), torch.tensor([box]).float(), ellipse()[None]
    ious = [iou(decode(pixel_masks(color_masks(image, box, guess, strength), guess, box, SIZE)[0], SIZE)[0], mask)
            for strength in (0.02, 1.0)]
    assert ious[0] < 0.85 < ious[1]


def test_boxes_do_not_see_each_other_and_results_repeat():
    (first, a), (second, b) = shapes()["disc"], shapes()["plus"]
    image = painted(first | second, (200, 60, 40), (60, 120, 60))
    boxes = torch.tensor([a, b] * 20, dtype=torch.float32)                # more than a chunk
    guess = ellipse().expand(len(boxes), -1, -1)
    together = color_masks(image, boxes, guess)
    assert torch.equal(together, color_masks(image, boxes, guess))
    alone = torch.cat([color_masks(image, boxes[k:k + 1], guess[:1]) for k in (0, 1)])
    assert (together[:2] - alone).abs().max() < 1e-4 and together.shape == (40, POINTS, POINTS)


def test_a_mask_reaches_the_sides_of_its_box():
    """A row whose surest point is below one half rises until it is above; a mask that reaches all sides stays."""
    inside = inside_box()
    logits = torch.full((2, POINTS, POINTS), -2.0)
    logits[0, 12:20, 12:20] = 4                                            # away from the sides
    logits[1, inside.any(1), 15:17] = logits[1, 15:17, :] = 4              # a cross
    risen = reach_sides(logits, inside) * inside
    assert (risen[0] > 0)[inside].view(inside.sum(0).max(), -1).any(1).all()
    assert torch.equal(risen[1], logits[1] * inside)


def test_a_large_mask_follows_the_edges_of_the_image():
    """A disc of 200 pixels has an outline finer than the points of a window, seven pixels apart."""
    size, box = (240, 240), torch.tensor([[20.0, 20, 220, 220]])
    y, x = torch.meshgrid(torch.arange(240) + 0.5, torch.arange(240) + 0.5, indexing="ij")
    mask = (x - 120) ** 2 + (y - 120) ** 2 < 100 ** 2
    mask &= ((x - 120).abs() > 6) | (y > 120)                              # with a notch
    image = painted(mask, (200, 60, 40), (60, 120, 60))
    guess = ellipse()[None]
    p = color_masks(image, box, guess)
    coarse, fine = (decode(pixel_masks(p, guess, box, size, edges)[0], size)[0] for edges in (None, image))
    assert iou(fine, mask) > 0.95 and 1 - iou(fine, mask) < 0.8 * (1 - iou(coarse, mask))


def test_masks_are_cut_to_the_nearest_pixels_of_their_box():
    boxes = torch.tensor([[10.4, 10.6, 30.5, 29.4], [150, 100, 170, 130], [-5, -5, 0.2, 0.2], [50, 50, 50.2, 50.3]])
    assert rounded(boxes, SIZE).tolist() == [[10, 11, 31, 29], [150, 100, 160, 120], [0, 0, 1, 1], [50, 50, 51, 51]]
    assert rounded(torch.tensor([[170.0, 130, 180, 140]]), SIZE).tolist() == [[159, 119, 160, 120]]  # wholly outside
    everywhere = torch.ones(4, POINTS, POINTS)
    rles, scores = pixel_masks(everywhere, everywhere, boxes, SIZE)
    assert [coco_mask.toBbox(rle).tolist() for rle in rles] == [
        [10, 11, 21, 18], [150, 100, 10, 20], [0, 0, 1, 1], [50, 50, 1, 1]] and (scores == 1).all()


def test_a_box_of_one_pixel_between_pixels_has_a_sure_mask():
    boxes = torch.tensor([[10.5, 1.5, 11.5, 2.5], [20.0, 20, 20.4, 20.3]])
    rles, scores = pixel_masks(ellipse().expand(2, -1, -1), ellipse().expand(2, -1, -1), boxes, SIZE)
    assert [coco_mask.toBbox(rle).tolist() for rle in rles] == [[11, 2, 1, 1], [20, 20, 1, 1]] and (scores > 0.5).all()


def test_a_mask_that_colours_erase_is_the_guess_and_an_empty_one_the_box():
    box, nothing = torch.tensor([[20.0, 20, 60, 60]]), torch.zeros(1, POINTS, POINTS)
    (erased, empty), size = (pixel_masks(nothing, x, box, SIZE) for x in (ellipse()[None], nothing)), SIZE
    assert iou(decode(erased[0], size)[0], disc(40, 40, 20)) > 0.95 and erased[1][0] > 0.5
    assert decode(empty[0], size).sum() == 40 * 40 and empty[1][0] == 0


def test_without_the_image_a_guess_is_cut_at_one_half():
    """An ellipse then is the largest in the box."""
    found = decode(pixel_masks(ellipse()[None], ellipse()[None], torch.tensor([[40.0, 30, 100, 90]]), SIZE)[0], SIZE)[0]
    assert iou(found, disc(70, 60, 30)) > 0.97


def test_what_lies_beyond_the_image_is_no_background():
    """A black disc that the left edge halves: roi_align reads black beyond it. As background this would cost 0.018."""
    mask = disc(0, 60, 30)
    found, _ = masks_of(painted(mask, (0, 0, 0), (120, 120, 120)), torch.tensor([[0.0, 30, 30, 90]]))
    assert iou(found[0], mask) > 0.985


def test_no_boxes():
    image = random_predictions(64, 64)
    assert fitted_masks(image, torch.zeros(0, 4), (64, 64)).shape == (0, POINTS, POINTS)
    boxes, guess = torch.zeros(0, 4), torch.zeros(0, POINTS, POINTS)
    assert color_masks(torch.zeros(3, 20, 20), boxes, guess).shape == (0, POINTS, POINTS)
    assert pixel_masks(guess, guess, boxes, (20, 20))[0] == []


# --------------------------------------------------------------------------------------------------- mask heads


def smooth_predictions() -> Predictions:
    """Random mask heads on mask features that change slowly, as those of a network do."""
    image = random_predictions(256, 320)
    coarse = torch.randn(1, 16, 9, 11, generator=torch.Generator().manual_seed(1))
    return image._replace(mask_features=F.interpolate(coarse, size=(32, 40), mode="bicubic"))


def test_the_heads_of_a_window_draw_what_they_draw_in_the_image(monkeypatch):
    """At the same place, although the image's masks pass two enlargements, each with a shift of its own; also for a
    window of more cells than points, and for one beyond the image's edge."""
    monkeypatch.setattr("refine.ELLIPSE", 0.0)
    size, boxes = (256, 320), torch.tensor([[40.0, 60, 110, 100], [8, 4, 316, 250], [-6, 200, 60, 270]])
    image = smooth_predictions()
    locations, weights = box_heads(image, boxes, None, 4)
    p = torch.stack([mask_logits(image, [at]).sigmoid() for at in locations])                      # (G, k, h, w)
    p = (weights[:, :, None, None] * p).sum(1)
    for number, (box, found) in enumerate(zip(boxes, fitted_masks(image, boxes, size, steps=0))):
        x, y = (t * (box[i + 2] - box[i]) / 2 + (box[i] + box[i + 2]) / 2 for i, t in enumerate(box_coordinates()))
        used = inside_box() & (x > 8) & (x < size[1] - 8) & (y > 8) & (y < size[0] - 8)
        errors = []
        for shift in (0, 2.5):  # cell i of the map lies at 4 i + 2.5; with the shift heads would be read in their place
            at = torch.stack([((x + shift - 2.5) / 4) / 79, ((y + shift - 2.5) / 4) / 63], -1) * 2 - 1
            expected = F.grid_sample(p[number][None, None], at[None], padding_mode="border", align_corners=True)[0, 0]
            errors.append((found - expected)[used].abs().mean())
        most = 0.7 if number == 1 else 1 / 3  # the second window reads every second cell
        assert used.sum() > 100 and errors[0] < most * errors[1], (number, errors)


def test_fitting_makes_the_shadow_of_a_mask_that_of_its_box():
    image, boxes = smooth_predictions(), torch.tensor([[40.0, 60, 110, 100], [150, 30, 300, 200]])
    box = inside_box().expand(2, -1, -1)
    losses = [projection_loss(fitted_masks(image, boxes, (256, 320), steps=n), box) for n in (0, 40)]
    assert (losses[1] < losses[0]).all()


def test_boxes_are_fitted_apart_and_results_repeat(monkeypatch):
    image, g = smooth_predictions(), torch.Generator().manual_seed(0)
    boxes = torch.rand(20, 4, generator=g) * 150
    boxes[:, 2:] = boxes[:, :2] + 4 + boxes[:, 2:]
    together = fitted_masks(image, boxes, (256, 320), steps=2)
    assert torch.equal(together, fitted_masks(image, boxes, (256, 320), steps=2))
    monkeypatch.setattr("refine.CHUNK", 1)
    assert (together - fitted_masks(image, boxes, (256, 320), steps=2)).abs().max() < 1e-3
    assert all(parameter.grad is None for parameter in image.controller.parameters())


def test_the_heads_of_a_box_are_those_that_fcos_trains():
    """The surest first, in the class of the box; a box without any takes the nearest of its level."""
    boxes, classes = torch.tensor([[16.0, 24, 72, 64], [80, 30, 110, 70], [30.0, 30, 33, 33]]), torch.tensor([1, -1, 0])
    image = random_predictions(96, 128)
    owner = image_targets(image.locations, boxes, torch.zeros(3, dtype=torch.int64), 1)[2]
    locations, weights = box_heads(image, boxes, classes, 4)
    p = image.class_logits[0].sigmoid()
    for g, confidence in enumerate((p[:, 1], p.amax(1))):
        own = (owner == g).nonzero()[:, 0]
        best = own[(confidence[own] * 0.5).sqrt().argsort(descending=True)[:4]]
        assert len(own) > 4 and locations[g].tolist() == best.tolist()
        expected = (confidence[best] * 0.5).sqrt()
        assert torch.allclose(weights[g], expected / expected.sum(), rtol=1e-3)
    assert not (owner == 2).any() and (image.locations.level[locations[2]] == 0).all()
    assert (owner[locations[2]] < 0).all() and weights.sum(1).tolist() == pytest.approx([1, 1, 1])
    free = (owner < 0) & (image.locations.level == 0)
    nearest = (image.locations.xy - 31.5).norm(dim=1).masked_fill(~free, 1e9).argmin()
    assert nearest == locations[2, 0]


# ------------------------------------------------------------------------------------- predict.py without a checkpoint


def test_boxes_get_masks_without_a_checkpoint(drawn, tmp_path, capsys):
    """All of them, better than their boxes filled; the file keeps all else; the page names the source."""
    path, out = drawn / "annotations/instances_train2017.json", tmp_path / "out"
    predict.main([str(x) for x in ("--boxes", path, "--images", drawn / "train2017", "--out", out, "--measure",
                                   "--workers", 0)])
    shown = capsys.readouterr().out
    assert "no --ckpt: masks from boxes and colours alone" in shown
    before, after = json.loads(path.read_text()), json.loads((out / "masks.json").read_text())
    assert after["images"] == before["images"] and len(after["annotations"]) == len(before["annotations"])
    filled, better = [], []
    for old, new in zip(before["annotations"], after["annotations"]):
        x, y, w, h = old["bbox"]
        box = coco_mask.frPyObjects([[x, y, x + w, y, x + w, y + h, x, y + h]], *new["segmentation"]["size"])[0]
        truth = old["segmentation"]
        if isinstance(truth, list):
            truth = coco_mask.merge(coco_mask.frPyObjects(truth, *new["segmentation"]["size"]))
        filled.append(coco_mask.iou([box], [truth], [0])[0, 0])
        better.append(coco_mask.iou([new["segmentation"]], [truth], [0])[0, 0])
        assert new["source"] == "colours" and 0 <= new["score"] <= 1 and new["bbox"] == old["bbox"]
    assert np.mean(better) > np.mean(filled) + 0.1
    assert "made without a model" in (out / "review.html").read_text()
    assert len(list((out / "pictures").iterdir())) == len(before["images"])


def test_images_need_a_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        predict.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert end.value.code == 2 and "--ckpt FILE is needed" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--weights", "student"], ["--min-size", "64"], ["--batch-size", "2"],
                                    ["--fit-steps", "5"]])
def test_options_of_a_model_need_a_checkpoint(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        predict.main(["--boxes", "b.json", "--images", "i", "--out", str(tmp_path / "out"), *option])
    assert end.value.code == 2 and f"argument {option[0]}: only with --ckpt" in capsys.readouterr().err


def test_loading_processes_give_the_same_masks(drawn):
    """Also where they are started afresh, which takes all that they receive through pickle."""
    annotations = CocoBoxes(drawn / "annotations/instances_train2017.json", drawn / "train2017")
    one, two = (label_without_model(annotations, workers=workers) for workers in (0, 1))
    assert one.rles == two.rles and (one.scores == two.scores).all()
    pickle.dumps((ColorMasks(annotations, True), ColorMasks.collate))


def test_an_image_that_cannot_be_decoded_is_named(drawn, tmp_path, capsys):
    content = json.loads((drawn / "annotations/instances_train2017.json").read_text())
    images = tmp_path / "images"
    images.mkdir()
    for image in content["images"]:
        data = (drawn / "train2017" / image["file_name"]).read_bytes()
        (images / image["file_name"]).write_bytes(data[:700] if image is content["images"][0] else data)
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    predict.main([str(x) for x in ("--boxes", tmp_path / "boxes.json", "--images", images, "--out", tmp_path / "out",
                                   "--workers", 0)])
    shown = capsys.readouterr()
    assert content["images"][0]["file_name"] in shown.err and " boxes\n" in shown.out
