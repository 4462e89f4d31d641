"""Cityscapes' own score of our detections (paper Sec. 4.3, Table 8).

    python evaluate.py --ckpt ... --data cityscapes --cityscapes-results DIR

`prepare`, `export` and `official_ap` hand detections to the benchmark's program (the package cityscapesscripts, which
nothing else needs). Its AP is not COCO's: objects of under 100 pixels do not count, nor do detections that lie mostly
in a group or in void, and precision is averaged over recall in another way. So it is called, never written anew.
"""
import copy
import importlib
import os
from collections import defaultdict
from types import ModuleType

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from formats.cityscapes import CLASSES, IMAGE, INSTANCE_MAP
from formats.coco import CocoBoxes, DataError
from tools import command_line


def prepare(annotations: CocoBoxes, folder: str) -> ModuleType | None:
    """Make `folder` and find all that `export` and `official_ap` will need, before the work of an evaluation.

    -> cityscapesscripts' program for instances; None, and a line on stdout, where it is not installed.
    Raises DataError for other data than Cityscapes and for a folder that is not empty: an older evaluation's masks
    would be taken for this one's."""
    other = [row for row in annotations.classes if row not in CLASSES]
    if other:
        raise DataError(f"{annotations.json_path}: category {other[0]['id']} {other[0]['name']!r} is none of the "
                        "classes that Cityscapes scores; its files are made by: python data.py cityscapes ROOT")
    images = [annotations.path(i) for i in range(len(annotations))]
    wrong = next((path for path in images if not path.endswith(IMAGE)), None)
    if wrong:
        raise DataError(f"image {wrong} of {annotations.json_path} is not named as in Cityscapes, *{IMAGE}")
    try:
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder):
            raise FileExistsError("it is not empty; name a new folder")
        os.mkdir(os.path.join(folder, "masks"))
        os.rmdir(os.path.join(folder, "masks"))      # so that an evaluation that is broken off can use the folder again
    except OSError as error:
        raise DataError(f"cannot write Cityscapes results to {folder}: {error.strerror or error}") from None
    try:
        scripts = importlib.import_module("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")
    except ImportError as error:
        print(f"no AP of Cityscapes' own, only the results in its format: {error} (pip install cityscapesscripts)")
        return None
    missing = [path for path in map(map_of, images) if not os.path.exists(path)]
    if missing:
        raise DataError(f"{len(missing)} of {len(images)} instance maps of {annotations.json_path} are missing, "
                        f"the first: {missing[0]}")
    return scripts


def map_of(image: str) -> str:
    """ROOT/leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png -> ROOT/gtFine/SPLIT/CITY/NAME_gtFine_..., its instance map."""
    city, name = os.path.split(os.path.abspath(image))
    split, city = os.path.split(city)
    images, split = os.path.split(split)
    return os.path.join(os.path.dirname(images), "gtFine", split, city, name.removesuffix(IMAGE) + INSTANCE_MAP)


def prediction_of(image: str, folder: str) -> str:
    return os.path.join(folder, os.path.basename(image).removesuffix(IMAGE) + ".txt")


def export(results: list[dict], annotations: CocoBoxes, folder: str) -> None:
    """Write detections in COCO's results format as Cityscapes wants them: one text file per image, of lines
    "mask label score"; the masks are PNGs of the image's size, a bit a pixel, in the sub-folder masks."""
    found = defaultdict(list)
    for result in results:
        found[result["image_id"]].append(result)
    os.makedirs(os.path.join(folder, "masks"))
    for i in tqdm(range(len(annotations)), "export", unit="image", disable=None):
        path, lines = prediction_of(annotations.path(i), folder), []
        for k, result in enumerate(found[int(annotations.image_ids[i])]):
            mask = f"masks/{os.path.basename(path).removesuffix('.txt')}_{k}.png"
            Image.fromarray(coco_mask.decode(result["segmentation"]).astype(bool)).save(os.path.join(folder, mask))
            lines.append(f"{mask} {result['category_id']} {result['score']}\n")
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(lines)


def official_ap(scripts: ModuleType, annotations: CocoBoxes, folder: str) -> dict:
    """What cityscapesscripts says of the results that `export` wrote into `folder`, in percent:
    {"AP", "AP50", "per_class": {name: {"AP", "AP50"}}}, None where there is no object. Raises DataError."""
    images = [annotations.path(i) for i in range(len(annotations))]
    folder = os.path.abspath(folder)
    predictions, maps = [prediction_of(path, folder) for path in images], [map_of(path) for path in images]
    options = copy.copy(scripts.args)
    options.quiet, options.predictionPath = True, folder
    if not hasattr(np, "in1d"):
        np.in1d = np.isin            # numpy 2.4 gave up the old name, which version 2.3.0 of the scripts still calls
    try:
        # The steps of the scripts' evaluateImgLists, less what it does with files: it keeps the objects of the first
        # ground truth it sees for every later one, and writes (with a new numpy fails to write) ./matches.json.
        scripts.setInstanceLabels(options)
        objects = scripts.instances2dict(maps, False)
        matches = scripts.matchGtWithPreds(predictions, maps, objects, options)
        averages = scripts.computeAverages(scripts.evaluateMatches(matches, options), options)
    except (Exception, SystemExit) as error:     # IndexError where all detections of a class lie in groups or in void
        why = f"{type(error).__name__}: {error}".split("\n")[0]
        raise DataError(f"cityscapesscripts cannot score the results in {folder}: {why}") from None
    figures = {"AP": percent(averages["allAp"]), "AP50": percent(averages["allAp50%"])}
    per_class = {name: {"AP": percent(row["ap"]), "AP50": percent(row["ap50%"])}
                 for name, row in averages["classes"].items()}
    return figures | {"per_class": per_class}


def percent(value: float) -> float | None:
    """The scripts say nan where there is no ground truth: None here."""
    return None if np.isnan(value) else 100 * float(value)


def print_table(figures: dict) -> None:
    """Print the figures of `official_ap`."""
    columns = "AP", "AP50"
    rows = {"all": figures, **figures["per_class"]}
    command_line.print_table("Cityscapes", columns, {name: [row[c] for c in columns] for name, row in rows.items()})
