"""Masks for the same boxes from several runs, side by side with true ones.

    python -m tools.compare first/masks.json second/masks.json --truth instances.json --images images/ --out sheet.jpg

Prints the mean IoU of each file's masks with the true ones, and of the filled boxes, and draws a sheet with the mean of
each image. A file is what predict.py --boxes has written, or any COCO annotation file with the boxes of --truth; it is
named after its folder.
"""
import argparse
import os

import numpy as np

from formats.coco import CocoBoxes, DataError, ground_truth, mask_flaws, mask_problems, raise_first, read_coco
from formats.files import CommandLine, one_line_errors
from formats.pictures import check_sizes, image_options
from formats.segmentation import compressed
from tools.command_line import output_file, positive
from tools.draw import sheet, sheet_rows
from tools.label import agreement


def read_masks(path: str, truth: CocoBoxes) -> list[dict]:
    """The annotations of the boxes of `truth`, in their order, with run lengths as `segmentation`; a box without a mask
    has an empty one. Raises DataError if the file has other boxes or classes, or no masks."""
    boxes, content = CocoBoxes(path, truth.image_dir), read_coco(path)
    same = all(np.array_equal(getattr(boxes, name), getattr(truth, name))
               for name in ("image_ids", "sizes", "offsets", "boxes", "labels", "classes"))
    if boxes.exif != truth.exif:
        raise DataError(f"{path} has masks of {boxes.exif} images, but {truth.json_path} is read with {truth.exif} "
                        f"ones: add --exif {boxes.exif}")
    if not same:
        raise DataError(f"{path} has other boxes than {truth.json_path}: compare masks that were made for its boxes")
    annotations = [{"score": 1.0} | content["annotations"][row] for row in boxes.rows.tolist()]
    sizes, rows = np.repeat(truth.sizes, np.diff(truth.offsets), axis=0).tolist(), range(len(annotations))
    raise_first(mask_problems(path, annotations, mask_flaws(annotations, sizes, rows, needed=rows)))
    return [annotation | {"segmentation": compressed(annotation["segmentation"], size)}
            for annotation, size in zip(annotations, sizes)]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(description="Compare the masks that several runs made for the same boxes with true ones.",
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("masks", nargs="+", metavar="MASKS", help="COCO annotation files, such as the masks.json of predict.py --boxes")
    add("--truth", required=True, metavar="FILE", help="the same annotations with true masks")
    add("--images", required=True, metavar="DIR", help="the images of all files")
    add("--out", metavar="FILE", help="draw boxes, the masks of each file and true masks there (PNG or JPEG)")
    add("--count", type=positive, default=4, help="images on the sheet, evenly spaced over the data set")
    image_options(add)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with one_line_errors():
        if args.out and os.path.realpath(args.out) in map(os.path.realpath, [*args.masks, args.truth]):
            raise DataError(f"{args.out} is an input and would be overwritten: name another file with --out")
        output_file(args.out)
        truth = CocoBoxes(args.truth, args.images, masks=True, evaluated=True, exif=args.exif,
                          max_pixels=args.max_pixels)
        if not len(truth.boxes):
            raise DataError(f"{args.truth} has no boxes: nothing to compare with")
        check_sizes(truth, len(truth))
        runs = [read_masks(path, truth) for path in args.masks]
        ious = [agreement(truth, [annotation["segmentation"] for annotation in run]) for run in runs]
        ious = [ious[0][1], *(of_masks for of_masks, _ in ious)]   # (m,) each, of the filled boxes first
        names = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in args.masks]
        if len(set(names)) < len(names):  # of one folder: their own names tell them apart
            names = [os.path.splitext(os.path.basename(path))[0] for path in args.masks]
        names = ["filled boxes", *names]
        print(f"mean IoU with {args.truth}, {len(truth.boxes)} boxes")
        for name, of_boxes in zip(names, ious):
            print(f"{name:24}{of_boxes.mean():6.3f}")
        if args.out:
            images = [slice(*truth.offsets[i:i + 2]) for i in range(len(truth))]
            notes = [[f"on this image: {of_boxes[own].mean():.2f}" for of_boxes in ious if own.start < own.stop]
                     for own in images]
            rows = sheet_rows(truth, ground_truth(args.truth), runs, args.count, notes=notes)
            titles = [f"{name}: mean IoU {of_boxes.mean():.3f}" for name, of_boxes in zip(names, ious)]
            sheet(rows, args.out, names=[], threshold=0, titles=[*titles, "true masks"])
            print(f"sheet: {args.out}")


if __name__ == "__main__":
    main()
