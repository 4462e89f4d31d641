"""Does learning from boxes find the masks? Train on one batch of four real images, compare with the hidden masks.

    python tests/overfit.py datasets/coco --out runs/overfit [--images ID ID ID ID] [any option of train.py]

Hands train.py the boxes of four images (`segmentation` removed), then prints each loss at the start and at the
end, and the mean IoU with the hidden masks of (a) the boxes, filled, and (b) the masks that the trained model gives
to those boxes: for each box, at the location among its FCOS targets where the box's class scores best.

The default images were chosen by eye: an airplane, a dog with a frisbee, a bear, a stop sign, which stand out from
what is behind them. On four images colour is all there is to learn from; what an object is takes many.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from assign import fcos_targets
from formats.coco import CocoBoxes
from data import TestImages
from model import load_model, mask_logits
from masks import decode, paste_masks

IMAGES = (81, 394, 502, 525891)


def part_of(content: dict, ids: list[int]) -> dict:
    """The part of a COCO file that belongs to some images, without crowds."""
    return {"images": [image for image in content["images"] if image["id"] in ids],
            "categories": content["categories"],
            "annotations": [a for i in ids for a in content["annotations"] if a["image_id"] == i and not a["iscrowd"]]}


@torch.no_grad()
def masks_of_boxes(model, annotations: CocoBoxes, min_size: int, max_size: int) -> list[np.ndarray]:
    """For every box, in the order of `annotations`: its mask (H, W) bool at the image's size, cut to the box."""
    masks, images = [], TestImages(annotations, min_size, max_size)
    for i in range(len(annotations)):
        batch = TestImages.collate([images[i]])
        predictions = model(batch.images, batch.sizes)
        owner = fcos_targets(predictions.locations, batch.boxes, batch.labels, model.num_classes).boxes[0]
        score = predictions.class_logits[0].sigmoid() * predictions.centerness[0].sigmoid()[:, None]
        for g, (box, label) in enumerate(zip(*annotations.image_boxes(i))):
            at = (owner == g).nonzero()[:, 0]
            mask = np.zeros(batch.original_sizes[0], bool)
            if len(at):  # a box that no location is assigned to counts with IoU 0
                best = at[score[at, label].argmax()][None]
                rles, _ = paste_masks(mask_logits(predictions, [best]), batch.sizes[0], batch.original_sizes[0])
                x0, y0, x1, y1 = np.round(box).astype(int)
                mask[y0:y1, x0:x1] = decode(rles, mask.shape)[0].numpy()[y0:y1, x0:x1]
            masks.append(mask)
    return masks


def mean_iou(masks: list[np.ndarray], truth: list[np.ndarray]) -> tuple[float, list[float]]:
    ious = [(m & t).sum() / (m | t).sum() for m, t in zip(masks, truth)]
    return float(np.mean(ious)), ious


def main(folder: str, out: str, chosen: list[int], options: list[str]) -> None:
    annotation_file, images = Path(folder) / "annotations/instances_train2017.json", Path(folder) / "train2017"
    hidden = part_of(json.loads(annotation_file.read_text()), chosen)
    boxes_only = {**hidden, "annotations": [{k: v for k, v in a.items() if k != "segmentation"}
                                            for a in hidden["annotations"]]}
    Path(out).mkdir(parents=True, exist_ok=True)
    boxes_json = Path(out) / "boxes.json"
    boxes_json.write_text(json.dumps(boxes_only))

    start = time.time()
    train.main(["--train-json", str(boxes_json), "--train-images", str(images), "--out", f"{out}/run",
                "--batch-size", str(len(chosen)), "--log-every", "10", "--fresh", *options])
    seconds = time.time() - start

    model, info = load_model(f"{out}/run/final.pt")
    annotations = CocoBoxes(boxes_json, images)
    masks = masks_of_boxes(model, annotations, info["config"]["test_min_size"], info["config"]["test_max_size"])
    coco = COCO()
    coco.dataset = hidden
    coco.createIndex()
    order = [a for image in annotations.image_ids for a in hidden["annotations"] if a["image_id"] == image]
    truth = [coco.annToMask(a).astype(bool) for a in order]
    filled = [coco_mask.decode(coco_mask.frPyObjects(np.array([a["bbox"]]), *t.shape))[..., 0].astype(bool)
              for a, t in zip(order, truth)]

    log = [json.loads(line) for line in open(f"{out}/run/metrics.jsonl")]
    log = [line for line in log if "loss" in line]
    for name in (name for name in log[0] if name.startswith("loss")):
        print(f"{name:18} {log[0][name]:8.4f} -> {log[-1][name]:8.4f}")
    names = {c["id"]: c["name"] for c in hidden["categories"]}
    for a, filled_iou, iou in zip(order, mean_iou(filled, truth)[1], mean_iou(masks, truth)[1]):
        print(f"image {a['image_id']:6} {names[a['category_id']]:14} filled box {filled_iou:.3f}   mask {iou:.3f}")
    print(f"mean IoU of {len(truth)} boxes: filled {mean_iou(filled, truth)[0]:.3f}, "
          f"masks {mean_iou(masks, truth)[0]:.3f}, after {info['iteration']} iterations in {seconds:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="a set in COCO layout, with masks")
    parser.add_argument("--out", default="runs/overfit", help="run folder")
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES, metavar="ID", help="image ids")
    ours, theirs = parser.parse_known_args()
    main(ours.folder, ours.out, list(ours.images), theirs)
