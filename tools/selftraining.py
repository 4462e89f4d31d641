"""Naive self-training, stage one (Sec. 2, Table 6): a trained model gives the boxes of a data set masks.

    python train.py --method boxinst ...                                                    the labeller
    python -m tools.selftraining --ckpt runs/boxinst-r50-coco/final.pt --data coco --out runs/labels.json
    python train.py --method condinst --train-json runs/labels.json --train-images datasets/coco/train2017 ...

Alg. 1 gives the predicted masks to the boxes (tools/label.py), in the order of the mask-aware score (Sec. 2 takes the
detector's). The masks are cut to their boxes and written as a COCO annotation file, from which stage two learns as if
they were true. BoxTeacher does both at once and weights each mask with its score. A box without a mask trains the box
losses alone.

For a mask for every box, see predict.py --boxes.
"""
import argparse
from functools import partial

import numpy as np

from assign import SCORE_THRESHOLD
from formats.checkpoint import check_classes
from formats.coco import NAMES, CocoBoxes, datasets, ground_truth
from formats.files import CommandLine, one_line_errors
from formats.pictures import check_sizes
from model import load_model
from tools.command_line import go_together, input_size, model_options, output_file, probability, write_json
from tools.draw import sheet, sheet_rows
from tools.label import assigned_masks, label_dataset, report_agreement, with_masks


def draw_labels(annotations: CocoBoxes, content: dict, path: str) -> None:
    """Draw a sheet of 12 images, from the highest mean score of the masks to the lowest."""
    labelled = [content["annotations"][row] for row in annotations.rows.tolist()]
    labelled = [annotation for annotation in labelled if annotation["segmentation"]]
    scores = {}
    for annotation in labelled:
        scores.setdefault(annotation["image_id"], []).append(annotation["score"])
    index = {image_id: i for i, image_id in enumerate(annotations.image_ids.tolist())}
    order = [index[image_id] for image_id in sorted(scores, key=lambda image_id: -np.mean(scores[image_id]))]
    rows = sheet_rows(annotations, ground_truth(annotations.json_path), [labelled], 12, order)
    sheet(rows, path, [c["name"] for c in annotations.classes], threshold=0)
    print(f"sheet: {path}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(description="Give the boxes of a data set masks by Alg. 1 (naive self-training).",
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, metavar="FILE", help="checkpoint of the labeller")
    add("--out", required=True, metavar="FILE", help="the annotation file to write")
    add("--data", default="coco", help=f"label its training images: {', '.join(NAMES)}, or a folder")
    add("--train-json", metavar="FILE", help="boxes in COCO format, instead of those of --data")
    add("--train-images", metavar="DIR", help="the images of --train-json")
    model_options(add)
    add("--score-threshold", type=probability, default=SCORE_THRESHOLD, help="of the mask-aware score in Alg. 1")
    add("--measure", action="store_true", help="if the boxes have masks already, print how well the new ones agree "
        "with them")
    add("--sheet", metavar="FILE", help="draw the boxes, their new masks and the masks that they had (PNG or JPEG)")
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
        annotations = CocoBoxes(json_path, image_dir, masks=args.measure, evaluated=args.sheet is not None,
                                exif=args.exif, max_pixels=args.max_pixels)
        check_classes(args.ckpt, info, json_path, annotations.classes)
        check_sizes(annotations)
        min_size, max_size = input_size(args, info)
        labels = label_dataset(model.to(args.device), annotations,
                               partial(assigned_masks, score_threshold=args.score_threshold),
                               min_size=min_size, max_size=max_size, workers=args.workers, device=args.device)
        labelled = with_masks(annotations, labels)
        write_json(args.out, labelled)
        print(f"{args.out}: {sum(rle is not None for rle in labels.rles)} of {len(labels.rles)} boxes have a mask")
        if args.measure:
            report_agreement(annotations, labels)
        if args.sheet:
            draw_labels(annotations, labelled, args.sheet)


if __name__ == "__main__":
    main()
