"""refine.py: masks from boxes and colours, on made-up images; predict.py --boxes without a checkpoint."""
import json
import pickle

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

import predict
from formats.coco import CocoBoxes
from masks import decode
from refine import POINTS, color_masks, ellipse, pixel_masks, rounded
from tools.label import ColourMasks, label_without_model

SIZE = (120, 160)


def painted(mask: torch.Tensor, inside: tuple, outside: tuple) -> torch.Tensor:
    """An image (3, H, W) of two colours with a little noise."""
    colours = torch.where(mask[None], torch.tensor(inside)[:, None, None], torch.tensor(outside)[:, None, None])
    noise = torch.randn(3, *mask.shape, generator=torch.Generator().manual_seed(0)) * 4
    return (colours + noise).clamp(0, 255).byte()


def disc(x: float, y: float, radius: float) -> torch.Tensor:
    rows, columns = torch.arange(SIZE[0])[:, None], torch.arange(SIZE[1])
    return (columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 < radius ** 2


def masks_of(image: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
    guess = ellipse().expand(len(boxes), -1, -1)
    rles, scores = pixel_masks(color_masks(image, boxes, guess), guess, boxes, SIZE)
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
    image = torch.full((3, *SIZE), 90, dtype=torch.uint8)
    found, scores = masks_of(image, torch.tensor([[40.0, 30, 100, 90]]))
    guess, _ = pixel_masks(ellipse()[None], ellipse()[None], torch.tensor([[40.0, 30, 100, 90]]), SIZE)
    assert iou(found[0], decode(guess, SIZE)[0]) > 0.9
    sure = masks_of(painted(disc(70, 60, 30), (200, 60, 40), (60, 120, 60)), torch.tensor([[40.0, 30, 100, 90]]))[1]
    assert scores[0] < 0.8 < sure[0]


def test_boxes_do_not_see_each_other_and_results_repeat():
    (first, a), (second, b) = shapes()["disc"], shapes()["plus"]
    image = painted(first | second, (200, 60, 40), (60, 120, 60))
    boxes = torch.tensor([a, b] * 20, dtype=torch.float32)                # more than a chunk
    guess = ellipse().expand(len(boxes), -1, -1)
    together = color_masks(image, boxes, guess)
    assert torch.equal(together, color_masks(image, boxes, guess))
    alone = torch.cat([color_masks(image, boxes[k:k + 1], guess[:1]) for k in (0, 1)])
    assert (together[:2] - alone).abs().max() < 1e-4 and together.shape == (40, POINTS, POINTS)


def test_masks_are_cut_to_the_nearest_pixels_of_their_box():
    boxes = torch.tensor([[10.4, 10.6, 30.5, 29.4], [150, 100, 170, 130], [-5, -5, 0.2, 0.2], [50, 50, 50.2, 50.3]])
    assert rounded(boxes, SIZE).tolist() == [[10, 11, 31, 29], [150, 100, 160, 120], [0, 0, 1, 1], [50, 50, 51, 51]]
    everywhere = torch.ones(4, POINTS, POINTS)
    rles, scores = pixel_masks(everywhere, everywhere, boxes, SIZE)
    assert [coco_mask.toBbox(rle).tolist() for rle in rles] == [
        [10, 11, 21, 18], [150, 100, 10, 20], [0, 0, 1, 1], [50, 50, 1, 1]] and (scores == 1).all()


def test_a_mask_that_colours_erase_is_the_guess_and_an_empty_one_the_box():
    box, nothing = torch.tensor([[20.0, 20, 60, 60]]), torch.zeros(1, POINTS, POINTS)
    guess = ellipse()[None]
    (erased, empty), size = (pixel_masks(nothing, x, box, SIZE) for x in (guess, nothing)), SIZE
    assert erased[0] == pixel_masks(guess, guess, box, size)[0] and erased[1][0] > 0.5
    assert decode(empty[0], size).sum() == 40 * 40 and empty[1][0] == 0


def test_no_boxes():
    boxes, guess = torch.zeros(0, 4), torch.zeros(0, POINTS, POINTS)
    assert color_masks(torch.zeros(3, 20, 20, dtype=torch.uint8), boxes, guess).shape == (0, POINTS, POINTS)
    assert pixel_masks(guess, guess, boxes, (20, 20))[0] == []


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
    assert "masks are from boxes and colours alone" in (out / "review.html").read_text()
    assert len(list((out / "pictures").iterdir())) == len(before["images"])


def test_images_need_a_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        predict.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert end.value.code == 2 and "--ckpt FILE is needed" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--weights", "student"], ["--min-size", "64"], ["--batch-size", "2"]])
def test_options_of_a_model_need_a_checkpoint(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        predict.main(["--boxes", "b.json", "--images", "i", "--out", str(tmp_path / "out"), *option])
    assert end.value.code == 2 and f"argument {option[0]}: only with --ckpt" in capsys.readouterr().err


def test_loading_processes_give_the_same_masks(drawn):
    """Also where they are started afresh, which takes all that they receive through pickle."""
    annotations = CocoBoxes(drawn / "annotations/instances_train2017.json", drawn / "train2017")
    one, two = (label_without_model(annotations, workers) for workers in (0, 1))
    assert one.rles == two.rles and (one.scores == two.scores).all()
    pickle.dumps((ColourMasks(annotations), ColourMasks.collate))


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
    assert content["images"][0]["file_name"] in shown.err and "boxes without a mask" in shown.out
