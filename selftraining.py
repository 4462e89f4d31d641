"""Naive self-training, stage one (paper Sec. 2, Table 6): a trained model gives the boxes of a data set masks.

    python train.py --method boxinst ...                                                    the labeller
    python selftraining.py --ckpt runs/boxinst-r50-coco/final.pt --data coco --out runs/labels.json
    python train.py --method condinst --train-json runs/labels.json --train-images datasets/coco/train2017 ...

Its predictions are given to the boxes by Alg. 1, in the order of the mask-aware score (Sec. 2 takes the detector's),
the masks cut to the boxes and written as a COCO annotation file, from which stage two learns as from true masks.
BoxTeacher does both at once, and weighs each mask with its score.
"""
import argparse
import json
import sys

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader
from torchvision.ops import box_iou
from tqdm import tqdm

from assign import assign_masks, box_masks
from checkpoint import CheckpointError, load_model
from coco import CocoBoxes, DataError, datasets
from data import TestImages, check_sizes, positive
from evaluate import check_classes, ground_truth, output_file, pick_device, probability, write_json
from model import CondInst, Predictions, detect, mask_logits, paste_masks
from teacher import mask_aware_score
from visualize import sheet, sheet_rows


@torch.no_grad()
def label_picture(picture: Predictions, boxes: torch.Tensor, size: tuple[int, int], original_size: tuple[int, int],
                  score_threshold: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks for the boxes (G, 4) of one picture, xyxy pixels of the network's input, whose true size is `size`.

    Returns masks (G, H, W) bool on the CPU at original_size, cut to the boxes and empty where Alg. 1 gave none, and
    scores (G,), 0 there.
    """
    found = detect(picture)
    logits, iou = mask_logits(picture, [found.rows]), box_iou(found.boxes, boxes)
    h, w = (size[0] + 1) // 4, (size[1] + 1) // 4
    s = mask_aware_score(found.scores, logits.sigmoid()[:, :h, :w], box_masks(found.boxes, h, w), iou)
    match = assign_masks(iou, s, score_threshold=score_threshold)                                   # (G,)
    given = match >= 0
    masks = torch.zeros(len(boxes), *original_size, dtype=torch.bool)
    masks[given] = paste_masks(logits[match[given].to(logits.device)], size, original_size)[0]
    scale = torch.tensor([original_size[1] / size[1], original_size[0] / size[0]]).repeat(2)
    scores = torch.zeros(len(boxes)).masked_scatter(given, s.cpu()[match[given]])
    return masks & box_masks(boxes.cpu() * scale, *original_size, stride=1), scores


def label_dataset(model: CondInst, annotations: CocoBoxes, *, min_size: int, max_size: int,
                  score_threshold: float = 0.05, workers: int = 2,
                  device: torch.device | str = "cpu") -> tuple[list[dict], np.ndarray]:
    """label_picture for every box of a data set, in the order of annotations.boxes: RLE masks and scores."""
    loader = DataLoader(TestImages(annotations, min_size, max_size), batch_size=1, collate_fn=TestImages.collate,
                        num_workers=workers)
    model.eval()
    rles, scores = [], []
    for batch in tqdm(loader, desc="label", unit="picture", disable=None):
        batch = batch.to(device)
        with torch.no_grad():
            predictions = model(batch.images, batch.sizes)
        masks, s = label_picture(predictions, batch.boxes[0], batch.sizes[0], batch.original_sizes[0], score_threshold)
        columns = masks.to(torch.uint8).transpose(1, 2).contiguous().numpy()  # RLE runs down the columns
        encoded = coco_mask.encode(columns.transpose(2, 1, 0)) if len(columns) else []
        rles += [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in encoded]
        scores.append(s.numpy())
    return rles, np.concatenate(scores) if scores else np.zeros(0)


def with_masks(annotations: CocoBoxes, rles: list[dict], scores: np.ndarray) -> dict:
    """The annotation file with `segmentation`, `area` and `score` of the boxes replaced; the rest as it was.

    A box that got no mask has an empty one: dice is constant against that, so stage two learns its box alone.
    """
    with open(annotations.json_path, encoding="utf-8") as file:
        content = json.load(file)
    for row, rle, score in zip(annotations.rows.tolist(), rles, scores.tolist()):
        content["annotations"][row] |= {"segmentation": rle, "area": int(coco_mask.area(rle)), "score": score}
    return content


def agreement(annotations: CocoBoxes, rles: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """IoU with the masks that the annotations have, of the masks `rles` and of the boxes filled: (m,) each."""
    masks, filled = np.zeros(len(rles)), np.zeros(len(rles))
    for i, k in ((i, k) for i in range(len(annotations)) for k in range(*annotations.offsets[i:i + 2])):
        truth = annotations.rle(i, k)
        x0, y0, x1, y1 = annotations.boxes[k].astype(float)
        box = coco_mask.frPyObjects(np.array([[x0, y0, x1 - x0, y1 - y0]]), *annotations.size(i))
        masks[k], filled[k] = coco_mask.iou([rles[k], *box], [truth], [0])[:, 0]
    return masks, filled


def report_agreement(annotations: CocoBoxes, rles: list[dict], scores: np.ndarray) -> None:
    """Print how good the masks are, for which boxes (COCO's ranges of area), and whether their scores tell."""
    masks, filled = agreement(annotations, rles)
    given = scores > 0
    best_first = np.flatnonzero(given)[np.argsort(-scores[given], kind="stable")]
    quarter = max(1, len(best_first) // 4)
    sides = np.sqrt((annotations.boxes[:, 2:] - annotations.boxes[:, :2]).prod(1))
    rows = [("all boxes", np.ones(len(masks), bool)), ("boxes without a mask", ~given), ("boxes with a mask", given)]
    rows += [(f"    {text}", given & (low <= sides) & (sides < high)) for text, low, high in (
        ("under 32 x 32 pixels", 0, 32), ("32 x 32 to 96 x 96", 32, 96), ("larger", 96, np.inf))]
    rows += [("    the quarter of the best scores", np.isin(np.arange(len(masks)), best_first[:quarter])),
             ("    the quarter of the worst scores", np.isin(np.arange(len(masks)), best_first[-quarter:]))]
    print(f"mean IoU with the masks that the file has\n{'':36}{'number':>8}{'filled':>8}{'mask':>8}")
    for text, of in rows:
        cells = [f"{values[of].mean():8.3f}" if of.any() else f"{'-':>8}" for values in (filled, masks)]
        print(f"{text:36}{of.sum():8}" + "".join(cells))
    print(f"masks, boxes filled where there is none: {np.where(given, masks, filled).mean():.3f}")


def draw_labels(annotations: CocoBoxes, content: dict, path: str) -> None:
    """A sheet of 12 pictures from those with the surest masks to those with the least sure: boxes, masks, old masks."""
    results = [content["annotations"][row] for row in annotations.rows.tolist()]
    results = [row for row in results if row["score"] > 0]
    scores = {}
    for row in results:
        scores.setdefault(row["image_id"], []).append(row["score"])
    place = {image_id: i for i, image_id in enumerate(annotations.image_ids.tolist())}
    order = [place[image_id] for image_id, _ in sorted(scores.items(), key=lambda one: -np.mean(one[1]))]
    rows = sheet_rows(annotations, ground_truth(annotations.json_path), results, 12, order)
    sheet(rows, path, [c["name"] for c in annotations.classes], threshold=0)
    print(f"sheet: {path}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Give the boxes of a data set masks by Alg. 1 (naive self-training).",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, metavar="FILE", help="checkpoint of the labeller")
    add("--out", required=True, metavar="FILE", help="the annotation file to write")
    add("--measure", action="store_true", help="where the boxes have masks already, print how well the new ones agree "
        "with them")
    add("--sheet", metavar="FILE", help="draw boxes, their new masks and the masks that they had (PNG)")
    add("--data", default="coco", help="its training part is labelled: coco, cityscapes, shapes, or a folder")
    add("--train-json", metavar="FILE", help="boxes in COCO format, in place of those of --data")
    add("--train-images", metavar="DIR", help="the pictures of --train-json")
    add("--weights", choices=["teacher", "student"], help="None: the teacher's where there are any")
    add("--min-size", type=positive, metavar="PIXELS", help="shorter side; None: the checkpoint's test size, or 800")
    add("--max-size", type=positive, metavar="PIXELS", help="longest side; None: the checkpoint's test size, or 1333")
    add("--score-threshold", type=probability, default=0.05, help="of the mask-aware score in Alg. 1")
    add("--device", type=pick_device, default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1")
    add("--workers", type=int, default=2, help="loading processes")
    args = parser.parse_args(argv)
    if (args.train_json is None) != (args.train_images is None):
        parser.error("--train-json and --train-images go together")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        (json_path, image_dir), _ = datasets(args.data, args.train_json, args.train_images)
        output_file(args.out)
        output_file(args.sheet)
        model, info = load_model(args.ckpt, args.weights)
        annotations = CocoBoxes(json_path, image_dir, masks=args.measure)
        check_classes(args.ckpt, info, json_path, annotations.classes)
        check_sizes(annotations)
        rles, scores = label_dataset(
            model.to(args.device), annotations, score_threshold=args.score_threshold, workers=args.workers,
            min_size=args.min_size or info["config"].get("test_min_size") or 800,
            max_size=args.max_size or info["config"].get("test_max_size") or 1333, device=args.device)
        labelled = with_masks(annotations, rles, scores)
        write_json(args.out, labelled)
        print(f"{args.out}: {(scores > 0).sum()} of {len(scores)} boxes have a mask")
        if args.measure:
            report_agreement(annotations, rles, scores)
        if args.sheet:
            draw_labels(annotations, labelled, args.sheet)
    except (DataError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
