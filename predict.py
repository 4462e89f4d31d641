"""Masks for images, and masks for boxes: what a trained model is for.

    python predict.py --ckpt CKPT images/ photo.jpg --out found              finds objects in images
    python predict.py --ckpt CKPT --boxes boxes.json --images images/ --out masks     gives each box its mask

The first writes `predictions.json` (COCO results, with the `file_name` of each) and a drawn image for each image.
The second writes `masks.json`, the annotation file with masks, scores and where they come from (label.py); a drawn
image for each image; and `review.html`, the least certain masks first (review.py).
"""
import argparse
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import Sample, pixels, readable_batches, resized_size, view
from evaluate import coco_results
from formats.coco import CocoBoxes, DataError, UndecodableImage
from formats.files import one_line_errors, replacing, warn
from formats.pictures import check_sizes, find_images, load_image
from model import SCORE_THRESHOLD, CondInst, confident, load_model, predict, test_size
from tools.command_line import (AMP, DEVICE, go_together, not_negative, output_file, pick_amp, positive, probability,
                                write_json)
from tools.draw import corners, draw_instances, stack
from tools.label import ASSIGNED, PROMPTED, label_dataset, model_classes, opencv, polygons, report_agreement, with_masks
from tools.review import write_review

DRAWN = (480, 1600)  # the longer side of a drawn image lies between these, pixels: both small and huge ones are read


# ------------------------------------------------------------------------------------------- finding objects


def free_name(name: str, names: set[str]) -> str:
    """`name`, or the first of name-2, name-3, ... that is not among `names` yet, which it joins."""
    stem, suffix = os.path.splitext(name)
    number, free = 2, name
    while free in names:
        free, number = f"{stem}-{number}{suffix}", number + 1
    names.add(free)
    return free


class Images(Dataset):
    """Item i is image i at the test size, without boxes; its image_id is i + 1."""

    def __init__(self, paths: list[str], min_size: int, max_size: int):
        self.paths, self.min_size, self.max_size = paths, min_size, max_size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Sample:
        image = load_image(self.paths[i])
        size = resized_size(image.height, image.width, self.min_size, self.max_size)
        return Sample(view(image, size, flip=False), None, None, None, torch.zeros(0, 4),
                      torch.zeros(0, dtype=torch.int64), (image.height, image.width), i + 1, [])


@torch.no_grad()
def find_objects(model: CondInst, images: Dataset, classes: list[dict], *, score_threshold: float, rescore: bool,
                 device: torch.device, amp_dtype: torch.dtype | None, batch_size: int,
                 workers: int) -> tuple[list[dict], int]:
    """Detections of all images in COCO's results format, and how many images could be decoded."""
    results, seen, cut = [], 0, min(0.05, score_threshold)
    for batch in readable_batches(images, "predict", batch_size=batch_size, workers=workers, device=device):
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            answers = predict(model, batch.images, batch.sizes, batch.original_sizes, cut, rescore)
        for image_id, instances in zip(batch.image_ids, answers):
            results += coco_results(image_id, confident(instances, score_threshold), classes)
        seen += len(answers)
    return results, seen


# ----------------------------------------------------------------------------------------------- drawing


class Drawings(Dataset):
    """Item i draws image i and writes it: a data set, so that loading processes can share the work.

    images: (path, (height, width) or None for the file's own, objects, the file to write). An object has bbox,
    category_id, score and segmentation (RLE), as in COCO's results.
    """

    def __init__(self, images: list[tuple], classes: list[dict]):
        self.images = images
        self.names, self.label = [c["name"] for c in classes], {c["id"]: i for i, c in enumerate(classes)}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> str:
        """-> what went wrong, or nothing."""
        path, size, objects, out = self.images[i]
        try:
            image = load_image(path, size)
        except UndecodableImage:
            return ""  # named before
        try:
            os.makedirs(os.path.dirname(out), exist_ok=True)
            with replacing(out) as temporary:
                self.drawn(image, objects).save(temporary, "JPEG", quality=90)
        except OSError as error:
            return f"cannot write {out}: {error.strerror or error}"
        return ""

    def drawn(self, image: Image.Image, objects: list[dict]) -> Image.Image:
        longest = max(image.size)
        scale = min(max(longest, DRAWN[0]), DRAWN[1]) / longest
        size = max(1, round(image.height * scale)), max(1, round(image.width * scale))
        masks = [np.asarray(Image.fromarray(coco_mask.decode(one["segmentation"])).resize(size[::-1], Image.NEAREST))
                 for one in objects]
        canvas = draw_instances(
            pixels(view(image, size, flip=False)), corners(objects) * scale,
            torch.tensor([self.label[one["category_id"]] for one in objects], dtype=torch.int64),
            torch.tensor([one["score"] for one in objects]), stack(masks, *size), self.names)
        return Image.fromarray(canvas.permute(1, 2, 0).numpy())


def draw_all(drawings: Drawings, workers: int) -> None:
    loader = DataLoader(drawings, batch_size=None, num_workers=workers)
    problems = [problem for problem in tqdm(loader, desc="draw", unit="image", disable=None) if problem]
    if problems:
        raise DataError(f"{len(problems)} of {len(drawings)} images were not drawn, the first: {problems[0]}")


def drawn_names(names: list[str]) -> list[str]:
    """A file of its own for each image's drawing, of its name, as JPEG; a later one of the same name has a number."""
    taken = set()
    return [free_name(os.path.splitext(name)[0] + ".jpg", taken) for name in names]


def check_outputs(outputs: list[Path], inputs: list[str]) -> None:
    """Raises DataError where something that is read would be written over."""
    read = {os.path.realpath(path) for path in inputs}
    for path in outputs:
        if os.path.realpath(path) in read:
            raise DataError(f"{path} is among what is read, and would be written over: name another folder with --out")


# ------------------------------------------------------------------------------------------- command line


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find objects with their masks in images, or give boxes their "
                                     "masks.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="IMAGE_OR_FOLDER", help="images, and folders of them with all below")
    add("--ckpt", required=True, metavar="FILE", help="a checkpoint, of this project or a released one")
    add("--out", required=True, metavar="DIR", help="folder for the results, made where it is missing")
    add("--boxes", metavar="FILE", help="in place of images: give each box of this COCO annotation file a mask")
    add("--images", metavar="DIR", help="the images of --boxes")
    add("--min-score", type=probability, help="with --boxes: leave masks below this score (0 to 1) out and list their "
        "boxes for review; None: all are kept")
    add("--polygons", action="store_true", help="with --boxes: write polygons in place of run lengths (holes are "
        "filled); needs OpenCV: pip install opencv-python-headless")
    add("--measure", action="store_true", help="with --boxes that have masks already: print how well the new ones "
        "agree with them")
    add("--review-count", type=positive, help="with --boxes: masks on the review page, the least certain; None: 200")
    add("--score-threshold", type=probability, help="of images: objects whose score, as it is written, is below it "
        "(0 to 1) are left out; None: 0.6 where scores are rescored, else 0.3")
    add("--rescore", choices=["auto", "on", "off"], default="auto", help="of images: report sqrt(detection score x "
        "mask probability); auto: on where the method is boxteacher")
    add("--weights", choices=["teacher", "student"], help="None: the teacher's where there are any")
    add("--min-size", type=positive, metavar="PIXELS", help="shorter side; None: the checkpoint's test size, or 800")
    add("--max-size", type=positive, metavar="PIXELS", help="longest side; None: the checkpoint's test size, or 1333")
    add("--device", **DEVICE)
    add("--amp", **AMP)
    add("--batch-size", type=positive, default=1, help="images per forward pass")
    add("--workers", type=not_negative, default=2, help="processes that load and draw images")
    args = parser.parse_args(argv)
    if bool(args.inputs) == bool(args.boxes):
        parser.error("either images (files or folders) or --boxes FILE is needed")
    go_together(parser, args, "--boxes", "--images")
    others = dict(min_score=None, review_count=None, polygons=False, measure=False)
    if args.boxes:
        others = dict(score_threshold=None, rescore="auto")
    for name, default in others.items():
        if getattr(args, name) != default:
            mode = "images" if args.boxes else "--boxes"
            parser.error(f"argument --{name.replace('_', '-')}: it is for {mode}")
    return args


def predict_images(args: argparse.Namespace, model: CondInst, info: dict, sizes: tuple, how: dict) -> None:
    """predict.py IMAGE_OR_FOLDER...: predictions.json first, then the drawings."""
    out = Path(args.out)
    paths, names = map(list, zip(*find_images(args.inputs, out)))
    outs = [out / name for name in drawn_names(names)]
    check_outputs(outs, paths)
    classes = info["classes"] or [{"id": i, "name": str(i)} for i in range(model.num_classes)]
    rescore = info["method"] == "boxteacher" if args.rescore == "auto" else args.rescore == "on"
    threshold = args.score_threshold if args.score_threshold is not None else SCORE_THRESHOLD[rescore]
    output_file(str(out / "predictions.json"))
    results, seen = find_objects(model, Images(paths, *sizes), classes, rescore=rescore, score_threshold=threshold,
                                 **how)
    if not seen:
        raise DataError(f"none of the {len(paths)} images can be decoded")
    objects = [[] for _ in paths]
    for result in results:
        result["file_name"] = paths[result["image_id"] - 1]
        objects[result["image_id"] - 1].append(result)
    write_json(str(out / "predictions.json"), results)
    print(f"{out / 'predictions.json'}: {len(results)} objects of score >= {threshold:g} in {seen} images")
    draw_all(Drawings(list(zip(paths, [None] * len(paths), objects, map(str, outs))), classes), args.workers)
    print(f"{out}: {seen} images with what was found in them")


def label_boxes(args: argparse.Namespace, model: CondInst, info: dict, sizes: tuple, how: dict) -> None:
    """predict.py --boxes: masks.json first, then the review page and the drawings."""
    out, min_score = Path(args.out), args.min_score or 0.0
    annotations = CocoBoxes(args.boxes, args.images, masks=args.measure)
    check_sizes(annotations, len(annotations))  # all of them: none shall end the work when half of it is done
    names = [os.path.relpath(annotations.path(i), args.images) for i in range(len(annotations))]
    drawings = [os.path.join("pictures", name) for name in drawn_names(names)]
    check_outputs([out / "masks.json", *(out / name for name in drawings)],
                  [args.boxes, *(annotations.path(i) for i in range(len(annotations)))])
    output_file(str(out / "masks.json"))
    classes = model_classes(info["classes"], annotations.classes)
    unknown = [c["name"] for c, known in zip(annotations.classes, classes.tolist()) if known < 0]
    if unknown:
        warn(f"{args.ckpt} was not trained for {', '.join(map(repr, unknown[:5]))}{', ...' * (len(unknown) > 5)}: such "
             "boxes take what fits them of any class")
    labels = label_dataset(model, annotations, min_size=sizes[0], max_size=sizes[1], classes=classes, **how)
    content, rows = with_masks(annotations, labels, min_score), annotations.rows.tolist()
    if args.polygons:
        for annotation in (content["annotations"][row] for row in rows):
            if annotation["segmentation"]:
                annotation["segmentation"] = polygons(annotation["segmentation"])
    write_json(str(out / "masks.json"), content)
    assigned, prompted, none = map(labels.sources.count, (ASSIGNED, PROMPTED, None))
    print(f"{out / 'masks.json'}: {len(labels.rles)} boxes, {assigned} masks assigned, {prompted} prompted"
          + f", {none} boxes without a mask" * bool(none))
    if args.measure:
        report_agreement(annotations, labels)
    if (low := (labels.scores < min_score).sum()):
        print(f"{low} of them score below {min_score:g}: their segmentation stays empty")
    write_review(annotations, labels, [content["annotations"][row]["id"] for row in rows], list(zip(names, drawings)),
                 str(out / "review.html"), args.review_count or 200, min_score)
    print(f"{out / 'review.html'}: the least certain masks first")
    objects = [content["annotations"][row] | {"segmentation": rle} for row, rle in zip(rows, labels.rles)]
    images = [(annotations.path(i), annotations.size(i),
                 [one for one in objects[slice(*annotations.offsets[i:i + 2])] if one["segmentation"]],
                 str(out / drawings[i])) for i in range(len(annotations))]
    draw_all(Drawings(images, annotations.classes), args.workers)
    print(f"{out / 'pictures'}: the pictures with their masks")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with one_line_errors():
        if args.polygons:
            opencv()  # says that it is missing before the work, not after it
        model, info = load_model(args.ckpt, args.weights)
        sizes = args.min_size or test_size(info)[0], args.max_size or test_size(info)[1]
        how = dict(device=args.device, amp_dtype=pick_amp(args.amp, args.device), batch_size=args.batch_size,
                   workers=args.workers)
        (label_boxes if args.boxes else predict_images)(args, model.to(args.device), info, sizes, how)


if __name__ == "__main__":
    main()
