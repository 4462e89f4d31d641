"""Cityscapes' own AP of our detections (paper: Sec. 4.3, Table 8), by the benchmark's program.

    python evaluate.py --ckpt ... --data cityscapes --cityscapes-results DIR

The program is the optional package cityscapesscripts. It is called, not rewritten, since its AP is not COCO's: it
ignores objects under 100 pixels and detections that lie mostly in a group or in void, and averages precision in
another way.
"""
import copy
import os
from collections import defaultdict
from types import ModuleType

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from formats.cityscapes import CLASSES, IMAGE, INSTANCE_MAP
from formats.coco import CocoBoxes, DataError
from formats.files import UserError, optional, write_whole
from formats.pictures import save_image
from tools import command_line


def prepare(annotations: CocoBoxes, folder: str) -> ModuleType | None:
    """Make `folder` and check, before the evaluation, whatever `export` and `official_ap` will need.

    Returns cityscapesscripts' program for instances; None, with a line on stdout, if it is not installed.
    Raises DataError if the data are not Cityscapes, or if the folder is not empty: masks of an earlier evaluation would
    count as this one's."""
    other = next((row for row in annotations.classes if row not in CLASSES), None)
    if other:
        raise DataError(f"{annotations.json_path}: Cityscapes does not score the category {other['id']} "
                        f"{other['name']!r}; make its files by: python data.py cityscapes ROOT")
    images = [annotations.path(i) for i in range(len(annotations))]
    wrong = next((path for path in images if not path.endswith(IMAGE)), None)
    if wrong:
        raise DataError(f"image {wrong} of {annotations.json_path} is not named as in Cityscapes, *{IMAGE}")
    try:
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder):
            raise FileExistsError("it is not empty; name a new folder")
        os.mkdir(os.path.join(folder, "masks"))
        os.rmdir(os.path.join(folder, "masks"))      # an interrupted evaluation leaves the folder usable
    except OSError as error:
        raise DataError(f"cannot write Cityscapes results to {folder}: {error.strerror or error}") from None
    try:
        scripts = optional("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling", "the AP of Cityscapes")
    except UserError as error:
        print(f"only writing the results in the format of Cityscapes: {error}")
        return None
    missing = [path for path in map(map_of, images) if not os.path.exists(path)]
    if missing:
        raise DataError(f"{len(missing)} of {len(images)} instance maps of {annotations.json_path} are missing, "
                        f"the first: {missing[0]}")
    return scripts


def map_of(image: str) -> str:
    """The path of the instance map of the image ROOT/leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png."""
    city, name = os.path.split(os.path.abspath(image))
    split, city = os.path.split(city)
    images, split = os.path.split(split)
    return os.path.join(os.path.dirname(images), "gtFine", split, city, name.removesuffix(IMAGE) + INSTANCE_MAP)


def prediction_of(image: str, folder: str) -> str:
    return os.path.join(folder, os.path.basename(image).removesuffix(IMAGE) + ".txt")


def export(results: list[dict], annotations: CocoBoxes, folder: str) -> None:
    """Write detections in COCO's results format as Cityscapes needs them: a text file for each image with lines
    "mask label score", and in the sub-folder masks a PNG of the image's size, one bit a pixel, for each line."""
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    os.makedirs(os.path.join(folder, "masks"))
    for i in tqdm(range(len(annotations)), "export", unit="image", disable=None):
        path, lines = prediction_of(annotations.path(i), folder), []
        for k, result in enumerate(by_image[int(annotations.image_ids[i])]):
            mask = f"masks/{os.path.basename(path).removesuffix('.txt')}_{k}.png"
            save_image(Image.fromarray(coco_mask.decode(result["segmentation"]).astype(bool)),
                       os.path.join(folder, mask), "PNG")
            lines.append(f"{mask} {result['category_id']} {result['score']}\n")
        write_whole(path, "".join(lines).encode())


def official_ap(scripts: ModuleType, annotations: CocoBoxes, folder: str) -> dict:
    """The scripts' figures, in percent, for the results that `export` wrote to `folder`: {"AP", "AP50", "per_class":
    {name: {"AP", "AP50"}}}; None for a class without objects. Raises DataError."""
    images = [annotations.path(i) for i in range(len(annotations))]
    folder = os.path.abspath(folder)
    predictions, maps = [prediction_of(path, folder) for path in images], [map_of(path) for path in images]
    options = copy.copy(scripts.args)
    options.quiet, options.predictionPath = True, folder
    if not hasattr(np, "in1d"):
        np.in1d = np.isin            # removed in numpy 2.4, but still called by version 2.3.0 of the scripts
    try:
        # The steps of the scripts' evaluateImgLists without its files: it would reuse the objects of the first ground
        # truth for every later one, and write ./matches.json, which fails with a recent numpy.
        scripts.setInstanceLabels(options)
        objects = scripts.instances2dict(maps, False)
        matches = scripts.matchGtWithPreds(predictions, maps, objects, options)
        averages = scripts.computeAverages(scripts.evaluateMatches(matches, options), options)
    except (Exception, SystemExit) as error:     # IndexError if all detections of a class lie in groups or in void
        why = f"{type(error).__name__}: {error}".split("\n")[0]
        raise DataError(f"cityscapesscripts cannot score the results in {folder}: {why}") from None
    figures = {"AP": percent(averages["allAp"]), "AP50": percent(averages["allAp50%"])}
    per_class = {name: {"AP": percent(row["ap"]), "AP50": percent(row["ap50%"])}
                 for name, row in averages["classes"].items()}
    return figures | {"per_class": per_class}


def percent(value: float) -> float | None:
    """None for nan, which the scripts give without ground truth."""
    return None if np.isnan(value) else 100 * float(value)


def print_table(figures: dict) -> None:
    """Print the figures of `official_ap`."""
    columns = "AP", "AP50"
    rows = {"all": figures, **figures["per_class"]}
    command_line.print_table("Cityscapes", columns, {name: [row[c] for c in columns] for name, row in rows.items()})
