"""Naive self-training, stage one (paper Sec. 2, Table 6): a trained model gives the boxes of a data set masks.

    python train.py --method boxinst ...                                                    the labeller
    python -m tools.selftraining --ckpt runs/boxinst-r50-coco/final.pt --data coco --out runs/labels.json
    python train.py --method condinst --train-json runs/labels.json --train-images datasets/coco/train2017 ...

Its predictions are given to the boxes by Alg. 1 (label.py), in the order of the mask-aware score (Sec. 2 takes the
detector's), the masks cut to the boxes and written as a COCO annotation file, from which stage two learns as from true
masks. BoxTeacher does both at once, and weighs each mask with its score. A box that got no mask learns its box alone.

For masks of every box, to keep or to look at, see predict.py --boxes.
"""
import argparse

import numpy as np

from evaluate import check_classes
from formats.checkpoint import load_model, test_size
from formats.coco import CocoBoxes, datasets, ground_truth
from formats.files import one_line_errors
from formats.pictures import check_sizes
from tools.command_line import DEVICE, go_together, not_negative, output_file, positive, probability, write_json
from tools.draw import sheet, sheet_rows
from tools.label import label_dataset, report_agreement, with_masks


def draw_labels(annotations: CocoBoxes, content: dict, path: str) -> None:
    """A sheet of 12 images from those with the surest masks to those with the least sure: boxes, masks, old masks."""
    results = [content["annotations"][row] for row in annotations.rows.tolist()]
    results = [row for row in results if row["segmentation"]]
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
    add("--train-images", metavar="DIR", help="the images of --train-json")
    add("--weights", choices=["teacher", "student"], help="None: the teacher's where there are any")
    add("--min-size", type=positive, metavar="PIXELS", help="shorter side; None: the checkpoint's test size, or 800")
    add("--max-size", type=positive, metavar="PIXELS", help="longest side; None: the checkpoint's test size, or 1333")
    add("--score-threshold", type=probability, default=0.05, help="of the mask-aware score in Alg. 1")
    add("--device", **DEVICE)
    add("--workers", type=not_negative, default=2, help="loading processes")
    args = parser.parse_args(argv)
    go_together(parser, args, "--train-json", "--train-images")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with one_line_errors():
        (json_path, image_dir), _ = datasets(args.data, args.train_json, args.train_images)
        output_file(args.out)
        output_file(args.sheet)
        model, info = load_model(args.ckpt, args.weights)
        annotations = CocoBoxes(json_path, image_dir, masks=args.measure)
        check_classes(args.ckpt, info, json_path, annotations.classes)
        check_sizes(annotations)
        labels = label_dataset(
            model.to(args.device), annotations, score_threshold=args.score_threshold, workers=args.workers,
            min_size=args.min_size or test_size(info)[0],
            max_size=args.max_size or test_size(info)[1], device=args.device)
        labelled = with_masks(annotations, labels)
        write_json(args.out, labelled)
        given = sum(rle is not None for rle in labels.rles)
        print(f"{args.out}: {given} of {len(labels.rles)} boxes have a mask")
        if args.measure:
            report_agreement(annotations, labels)
        if args.sheet:
            draw_labels(annotations, labelled, args.sheet)


if __name__ == "__main__":
    main()
