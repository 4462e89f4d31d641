"""Masks for images, and masks for boxes.

    python predict.py --ckpt CKPT images/ photo.jpg --out found                       finds objects in images
    python predict.py --ckpt CKPT --boxes boxes.json --images images/ --out masks     gives each box its mask
    python predict.py --boxes boxes.json --images images/ --out masks                 the same without any training
    python predict.py --apply decisions.json masks/masks.json --out final.json        leaves out what a person rejected

The first writes `predictions.json` (COCO results, each with its `file_name`) and a drawing of each image. The second
writes `masks.json`, the annotation file with masks, their scores and their source (tools/label.py), a drawing of each
image in `pictures/`, and `review.html`, the least certain masks first (tools/review.py); with `--yolo` and `--voc`
also the files of these formats (tools/label_files.py). The decisions that a person saves on that page are for
`--apply`.
"""
import argparse
import os
import shlex
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import Sample, readable_batches, resized_size, view
from evaluate import coco_results
from formats.coco import UPRIGHT, CocoBoxes, DataError, UndecodableImage, first_five
from formats.files import CommandLine, counted, one_line_errors, optional, warn
from formats.pictures import check_sizes, find_images, left_out, load_image, readable_headers, remarks, save_image
from model import CondInst, default_threshold, load_model, predict_confident
from refine import FIT_STEPS
from tools.command_line import (AMP, RESCORE, go_together, image_words, input_size, model_options, not_negative,
                                output_file, pick_amp, positive, positive_float, probability, rescored, write_json)
from tools.draw import draw_objects
from tools.label import (BoxMasks, label_dataset, label_without_model, model_classes, model_masks, polygons,
                         report_agreement, with_masks)
from tools.label_files import VOC, YOLO, voc_files, write_voc_objects, write_yolo_labels, yolo_files
from tools.review import apply_decisions, write_review


# -------------------------------------------------------------------------------------------- finding objects


class Images(Dataset):
    """Item i is image i at the test size, without boxes; its image_id is i + 1. reading: `exif` and `max_pixels`."""

    def __init__(self, paths: list[str], min_size: int, max_size: int, reading: dict):
        self.paths, self.min_size, self.max_size, self.reading = paths, min_size, max_size, reading

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Sample:
        image = load_image(self.paths[i], **self.reading)
        size = resized_size(image.height, image.width, self.min_size, self.max_size)
        return Sample(view(image, size, flip=False), None, None, None, torch.zeros(0, 4),
                      torch.zeros(0, dtype=torch.int64), (image.height, image.width), i + 1, [])


def find_objects(model: CondInst, images: Images, classes: list[dict], *, score_threshold: float, rescore: bool,
                 device: torch.device, batch_size: int, workers: int) -> tuple[list[dict], int]:
    """The confident detections of all images in COCO's results format, and how many images could be decoded."""
    results, seen = [], 0
    for batch in readable_batches(images, "predict", batch_size=batch_size, workers=workers, device=device):
        found = predict_confident(model, batch.images, batch.sizes, batch.original_sizes, score_threshold, rescore)
        for image_id, instances in zip(batch.image_ids, found):
            results += coco_results(image_id, instances, classes)
        seen += len(found)
    return results, seen


# ------------------------------------------------------------------------------------------------- drawings


class Drawing(NamedTuple):
    """An image with its objects, to be drawn."""

    path: str
    size: tuple[int, int] | None  # (height, width) that the annotation states; None: the file's own
    objects: list[dict]           # COCO results: bbox, category_id, score, segmentation (RLE)
    out: str                      # the JPEG to write


class Drawings(Dataset):
    """Item i writes drawing i and is what went wrong, or "". As a data set its work is shared by loading processes."""

    def __init__(self, drawings: list[Drawing], classes: list[dict], reading: dict):
        self.drawings, self.classes, self.reading = drawings, classes, reading

    def __len__(self) -> int:
        return len(self.drawings)

    def __getitem__(self, i: int) -> str:
        path, size, objects, out = self.drawings[i]
        try:
            image = load_image(path, size, **self.reading)
        except UndecodableImage:
            return ""  # the user has been warned already
        try:
            os.makedirs(os.path.dirname(out), exist_ok=True)
            save_image(draw_objects(image, objects, self.classes), out, "JPEG", quality=90)
        except OSError as error:
            return f"cannot write {out}: {error.strerror or error}"
        return ""


def draw_all(drawings: list[Drawing], classes: list[dict], workers: int, reading: dict) -> None:
    """Write all drawings that can be written. Raises DataError if some cannot. reading: options of load_image."""
    loader = DataLoader(Drawings(drawings, classes, reading), batch_size=None, num_workers=workers)
    problems = [problem for problem in tqdm(loader, desc="draw", unit="image", disable=None) if problem]
    if problems:
        raise DataError(f"{len(problems)} of {counted(len(drawings), 'image')} not drawn, the first: {problems[0]}")


def drawing_names(names: list[str]) -> list[str]:
    """The JPEG of each image's drawing: the image's name, numbered if two would be the same."""
    taken = set()
    return [free_name(os.path.splitext(name)[0] + ".jpg", taken) for name in names]


def free_name(name: str, names: set[str]) -> str:
    """`name`, or the first of name-2, name-3, ... that is not among `names` yet, which it joins."""
    stem, suffix = os.path.splitext(name)
    number, free = 2, name
    while free in names:
        free, number = f"{stem}-{number}{suffix}", number + 1
    names.add(free)
    return free


def check_outputs(outputs: list[Path], inputs: list[str]) -> None:
    """Raises DataError if an output would overwrite an input."""
    read = {os.path.realpath(path) for path in inputs}
    for path in outputs:
        if os.path.realpath(path) in read:
            raise DataError(f"{path} is an input and would be overwritten: name another place with --out")


# ------------------------------------------------------------------------------------------- command line


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(description="Find objects and their masks in images, or give boxes their masks.",
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="IMAGE_OR_FOLDER", help="images, and folders of images at any depth; "
        "with --apply the masks.json")
    add("--ckpt", metavar="FILE", help="a checkpoint of this project, or a released one; without one, --boxes gives "
        "masks from boxes and colours alone")
    add("--out", required=True, metavar="DIR", help="folder of the results, made if missing; with --apply the file to "
        "write")
    model_options(add)
    add("--amp", **AMP)
    add("--batch-size", type=positive, default=1, help="images per forward pass")

    add = parser.add_argument_group("with images").add_argument
    add("--score-threshold", type=probability, help="leave out objects whose reported score is below it (0 to 1); "
        "None: 0.6 for rescored scores, else 0.3")
    add("--rescore", **RESCORE)

    add = parser.add_argument_group("with --boxes").add_argument
    add("--boxes", metavar="FILE", help="instead of images: give each box of this COCO annotation file a mask")
    add("--images", metavar="DIR", help="the images of --boxes")
    add("--fit-steps", type=not_negative, default=FIT_STEPS, help="steps in which the mask heads of a model are fitted "
        "to their box")
    add("--colors", choices=["on", "off"], default="on", help="refine masks by the colours of their image; without "
        "--ckpt, off leaves an ellipse in each box")
    add("--color-strength", type=positive_float, default=1.0, help="how much colours count beside the first guess")
    add("--min-score", type=probability, help="leave out masks below this score (0 to 1) and list their boxes on the "
        "review page; None: keep all")
    add("--polygons", action="store_true", help="write polygons instead of run lengths (holes are filled); needs "
        "OpenCV: pip install opencv-python-headless")
    add("--yolo", action="store_true", help=f"also write {YOLO}/, a label file of polygons for each image, to train a "
        "YOLO segmenter; needs OpenCV, too")
    add("--voc", action="store_true", help=f"also write {VOC}/, Pascal VOC's PNG of each image: object k has the value "
        "k")
    add("--measure", action="store_true", help="if the boxes have masks already, print how well the new ones agree "
        "with them")
    add("--review-count", type=positive, help="masks on the review page, the least certain; None: 200")

    add = parser.add_argument_group("after a review").add_argument
    add("--apply", metavar="FILE", help="instead of images: write masks.json again, without the masks that these "
        "decisions, saved by its review page, reject")
    args = parser.parse_args(argv)
    check_options(parser, args)
    return args


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with argparse's error where options do not go together."""
    if args.apply:
        return check_apply_options(parser, args)
    if bool(args.inputs) == bool(args.boxes):
        parser.error("either images (files or folders) or --boxes FILE is needed, not both")
    go_together(parser, args, "--boxes", "--images")
    if args.colors == "off" and args.color_strength != parser.get_default("color_strength"):
        parser.error("argument --color-strength: only with --colors on")
    if not args.ckpt and not args.boxes:
        parser.error("--ckpt FILE is needed to find objects in images")
    for name in () if args.ckpt else ("weights", "min_size", "max_size", "amp", "batch_size", "fit_steps"):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"argument --{name.replace('_', '-')}: only with --ckpt")
    others = ["score_threshold", "rescore"] if args.boxes else ["fit_steps", "colors", "color_strength", "min_score",
                                                                "polygons", "yolo", "voc", "measure", "review_count"]
    for name in others:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"argument --{name.replace('_', '-')}: only with {'images' if args.boxes else '--boxes'}")


def check_apply_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if len(args.inputs) != 1:
        parser.error("--apply FILE needs one masks.json")
    defaults = vars(parser.parse_args(["--out=."]))
    for name, value in vars(args).items():
        if name not in ("apply", "inputs", "out") and value != defaults[name]:
            parser.error(f"argument --{name.replace('_', '-')}: not with --apply")


def predict_images(args: argparse.Namespace, model: CondInst, info: dict, size: tuple[int, int],
                   options: dict) -> None:
    """predict.py IMAGE_OR_FOLDER...: predictions.json first, then the drawings, then what was left out."""
    out, reading = Path(args.out), dict(exif=args.exif or UPRIGHT, max_pixels=args.max_pixels)
    found, others = find_images(args.inputs, out)
    paths, names = map(list, zip(*found))
    drawings = [out / name for name in drawing_names(names)]
    check_outputs(drawings, paths)
    output_file(str(out / "predictions.json"))
    classes = info["classes"] or [{"id": i, "name": str(i)} for i in range(model.num_classes)]
    rescore, threshold = rescored(args.rescore, info["method"]), args.score_threshold
    if threshold is None:
        threshold = default_threshold(rescore)
    results, seen = find_objects(model, Images(paths, *size, reading), classes, score_threshold=threshold,
                                 rescore=rescore, **options)
    if not seen:
        raise DataError(f"none of {counted(len(paths), 'image')} can be decoded")
    objects = [[] for _ in paths]
    for result in results:
        result["file_name"] = paths[result["image_id"] - 1]
        objects[result["image_id"] - 1].append(result)
    write_json(str(out / "predictions.json"), results)
    print(f"{out / 'predictions.json'}: {counted(len(results), 'object')} of score >= {threshold:g} in "
          f"{counted(seen, 'image')}")
    draw_all([Drawing(*one) for one in zip(paths, [None] * len(paths), objects, map(str, drawings))], classes,
             args.workers, reading)
    print(f"{out}: drawings of {counted(seen, 'image')}")
    for line in [*remarks(readable_headers(paths), exif=None, max_pixels=args.max_pixels), *left_out(others)]:
        warn(line)


def color_strength(args: argparse.Namespace) -> float:
    """How much colours count; 0 with --colors off."""
    return args.color_strength if args.colors == "on" else 0.0


def masks_of_model(args: argparse.Namespace, annotations: CocoBoxes, model: CondInst, info: dict,
                   size: tuple[int, int], options: dict) -> BoxMasks:
    """predict.py --boxes with --ckpt."""
    classes = model_classes(info["classes"], annotations.classes)
    unknown = [c["name"] for c, known in zip(annotations.classes, classes.tolist()) if known < 0]
    if unknown:
        warn(f"{args.ckpt} was not trained for {first_five(list(map(repr, unknown)))}: these boxes take the best mask "
             "of any class")
    label = partial(model_masks, classes=classes.to(args.device), fit_steps=args.fit_steps, colors=color_strength(args))
    return label_dataset(model, annotations, label, min_size=size[0], max_size=size[1], **options)


def label_boxes(args: argparse.Namespace, *model) -> None:
    """predict.py --boxes: masks.json first, then the review page and the drawings. model: what masks_of_model takes."""
    out, min_score, seen = Path(args.out), args.min_score or 0.0, []
    annotations = CocoBoxes(args.boxes, args.images, masks=args.measure, exif=args.exif, max_pixels=args.max_pixels)
    if not len(annotations.boxes):
        warn(f"{annotations.no_box}; there is nothing to give a mask")
    check_sizes(annotations, len(annotations), seen.append)  # all images: a wrong one must not end the work halfway
    paths = [annotations.path(i) for i in range(len(annotations))]
    names = [os.path.relpath(path, args.images) for path in paths]
    drawings = [os.path.join("pictures", name) for name in drawing_names(names)]
    texts, pngs = yolo_files(names) if args.yolo else [], voc_files(names) if args.voc else []
    check_outputs([out / name for name in ("masks.json", *drawings, *texts, *pngs)], [args.boxes, *paths])
    for name in ("masks.json", *texts[:1], *pngs[:1]):
        output_file(str(out / name))
    if model:
        labels = masks_of_model(args, annotations, *model)
    else:
        labels = label_without_model(annotations, color_strength(args), args.workers)
        print("no --ckpt: masks from " + ("boxes and colours alone" if args.colors == "on" else "boxes alone")
              + "; a model may give better ones, trained by "
              + shlex.join(["python", "train.py", "--train-json", args.boxes, "--train-images", args.images,
                            *image_words(args)]))
    content, rows = with_masks(annotations, labels, min_score), annotations.rows.tolist()
    labelled = [content["annotations"][row] for row in rows]
    kept = [annotation["segmentation"] for annotation in labelled]
    if args.polygons:
        for annotation in labelled:
            annotation["segmentation"] = annotation["segmentation"] and polygons(annotation["segmentation"])
    write_json(str(out / "masks.json"), content)
    none = labels.sources.count(None)
    print(f"{out / 'masks.json'}: masks for {len(rows) - none} of {counted(len(rows), 'box')}")
    if args.measure:
        report_agreement(annotations, labels)
    if min_score:
        low = (labels.scores < min_score).sum()
        print(f"{low} of them score below {min_score:g}" + ": their segmentation stays empty" * bool(low))
    if args.yolo:
        write_yolo_labels(annotations, content, kept, out, names)
    if args.voc:
        write_voc_objects(annotations, content, kept, out, names)
    pages = write_review(annotations, labels, [annotation["id"] for annotation in labelled],
                         list(zip(names, drawings)), out, args.review_count or 200, min_score)
    print(f"{pages[0]}: the least certain masks first" + f", on {len(pages)} pages" * (len(pages) > 1))

    objects = [annotation | {"segmentation": rle} for annotation, rle in zip(labelled, labels.rles)]
    draw_all([Drawing(paths[i], annotations.size(i),
                      [one for one in objects[slice(*annotations.offsets[i:i + 2])] if one["segmentation"]],
                      str(out / drawings[i])) for i in range(len(paths))], annotations.classes, args.workers,
             dict(exif=annotations.exif, max_pixels=args.max_pixels))
    print(f"{out / 'pictures'}: drawings of the images with their masks")
    for line in seen:
        warn(line)


def apply_review(args: argparse.Namespace) -> None:
    """predict.py --apply."""
    masks_path, = args.inputs
    check_outputs([Path(args.out)], [args.apply, masks_path])
    content, numbers = apply_decisions(args.apply, masks_path)
    output_file(args.out)
    write_json(args.out, content)
    print(f"{args.out}: {numbers}")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with one_line_errors():
        if args.apply:
            return apply_review(args)
        for option in ("polygons", "yolo"):
            if getattr(args, option):
                optional("cv2", f"--{option}")  # raises before the work, not after it
        if not args.ckpt:
            return label_boxes(args)
        model, info = load_model(args.ckpt, args.weights)
        model.amp_dtype = pick_amp(args.amp, args.device)
        options = dict(device=args.device, batch_size=args.batch_size, workers=args.workers)
        work = label_boxes if args.boxes else predict_images
        work(args, model.to(args.device), info, input_size(args, info), options)


if __name__ == "__main__":
    main()
