"""Cityscapes: its annotations as COCO files, its own score of our detections (paper Sec. 4.3, Table 8).

    python data.py cityscapes datasets/cityscapes
    python evaluate.py --ckpt ... --data cityscapes --cityscapes-results DIR

ROOT is the folder into which leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of cityscapes-dataset.com were
unpacked. `write_cityscapes` adds ROOT/annotations/instances_{train,val}2017.json and nothing else: the images stay
in ROOT/leftImg8bit/{train,val}/CITY/, and `coco.datasets` looks for them there wherever a folder has a leftImg8bit.

`prepare`, `export` and `official_ap` hand detections to the benchmark's program (the package cityscapesscripts, which
nothing else needs). Its AP is not COCO's: objects of under 100 pixels do not count, nor do detections that lie mostly
in a group or in void, and precision is averaged over recall in another way. So it is called, never written anew.
"""
import copy
import importlib
import os
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from formats.coco import CocoBoxes, DataError, write_files

# the eight classes that are scored as objects; their category ids are Cityscapes' label ids
CLASSES = [{"id": 24, "name": "person"}, {"id": 25, "name": "rider"}, {"id": 26, "name": "car"},
           {"id": 27, "name": "truck"}, {"id": 28, "name": "bus"}, {"id": 31, "name": "train"},
           {"id": 32, "name": "motorcycle"}, {"id": 33, "name": "bicycle"}]
LABELS = {row["id"] for row in CLASSES}
LAST_LABEL = 33                                                         # of all that Cityscapes knows
IMAGE, INSTANCE_MAP = "_leftImg8bit.png", "_gtFine_instanceIds.png"   # what follows CITY/CITY_SEQUENCE_FRAME


# ------------------------------------------------------------------------------------------ to COCO files

def write_cityscapes(root: str) -> None:
    """Write the annotation files of both splits of ROOT; an earlier pair is replaced.

    Raises DataError; nothing is written before both splits have been read without one."""
    contents = {split: read_split(Path(root), split) for split in ("train", "val")}
    folder = os.path.join(root, "annotations")
    paths = {split: os.path.join(folder, f"instances_{split}2017.json") for split in contents}
    write_files({path: contents[split] for split, path in paths.items()})
    for split, path in paths.items():
        groups = sum(row["iscrowd"] for row in contents[split]["annotations"])
        print(f"{path}: {len(contents[split]['images'])} images, "
              f"{len(contents[split]['annotations']) - groups} objects, {groups} groups")


def read_split(root: Path, split: str) -> dict:
    """The content of a split's COCO file. Ids count from 1: images by sorted path, annotations by image and
    instance id. Raises DataError."""
    images, annotations = [], []
    for name in tqdm(paired_names(root, split), f"reading {split}", unit="image", disable=None):
        image = root / "leftImg8bit" / split / (name + IMAGE)
        height, width = image_size(image)
        images.append({"id": len(images) + 1, "file_name": name + IMAGE, "width": width, "height": height})
        for annotation in annotate(read_map(root / "gtFine" / split / (name + INSTANCE_MAP), image, (height, width))):
            annotations.append({"id": len(annotations) + 1, "image_id": len(images), **annotation})
    return {"info": {"description": f"Cityscapes {split}, fine annotations"}, "licenses": [],
            "categories": CLASSES, "images": images, "annotations": annotations}


def paired_names(root: Path, split: str) -> list[str]:
    """Sorted CITY/CITY_SEQUENCE_FRAME that have an image and an instance map. Raises DataError where one is alone."""
    kinds = {"image": (root / "leftImg8bit" / split, IMAGE),
             "instance map": (root / "gtFine" / split, INSTANCE_MAP)}
    found = {}
    for kind, (folder, ending) in kinds.items():
        if not folder.is_dir():
            raise DataError(f"folder {folder} is missing: unpack leftImg8bit_trainvaltest.zip and "
                            f"gtFine_trainvaltest.zip of cityscapes-dataset.com in {root}")
        found[kind] = {path.relative_to(folder).as_posix().removesuffix(ending) for path in folder.glob("*/*" + ending)}
    for kind, other in (("image", "instance map"), ("instance map", "image")):
        alone = sorted(found[kind] - found[other])
        if alone:
            (folder, ending), (other_folder, _) = kinds[kind], kinds[other]
            raise DataError(f"{len(alone)} of {len(found[kind])} {kind}s of {folder} have no {other} in "
                            f"{other_folder}, the first: {alone[0] + ending}")
    if not found["image"]:
        raise DataError(f"{kinds['image'][0]} holds no image CITY/*{IMAGE}")
    return sorted(found["image"])


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) by the header alone. Raises DataError."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception as error:                   # Pillow: OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"image {path} cannot be read: {str(error) or type(error).__name__}") from None


def read_map(path: Path, image_path: Path, size: tuple[int, int]) -> np.ndarray:
    """(height, width) of instance ids, checked against the `size` of its image. Raises DataError."""
    try:
        with Image.open(path) as image:
            mode, ids = image.mode, np.asarray(image)
    except Exception as error:
        raise DataError(f"instance map {path} cannot be read: {str(error) or type(error).__name__}") from None
    if mode != "L" and not mode.startswith("I"):
        raise DataError(f"instance map {path} is an image of mode {mode}, not one of whole numbers (8 or 16 bits)")
    if ids.shape != size:
        raise DataError(f"instance map {path} is {ids.shape[1]} x {ids.shape[0]} pixels (width x height), "
                        f"its image {image_path} is {size[1]} x {size[0]}")
    highest = int(ids.max())
    if label_of(highest) > LAST_LABEL:
        raise DataError(f"instance map {path} holds the id {highest}, of no label of Cityscapes (0 to {LAST_LABEL})")
    return ids


def label_of(instance: int) -> int:
    """An object's id is its label x 1000 + a number; what has no objects, or several in one, has the label itself."""
    return instance // 1000 if instance >= 1000 else instance


def annotate(ids: np.ndarray) -> list[dict]:
    """COCO annotations of instance ids (height, width), by rising id, without ids of their own.

    An id that is the plain label of one of the CLASSES marks objects that nobody could tell apart: COCO's crowd."""
    ids, annotations = np.asfortranarray(ids), []            # RLE runs down the columns
    for instance in np.unique(ids).tolist():
        label = label_of(instance)
        if label not in LABELS:
            continue
        rle = coco_mask.encode(np.asfortranarray(ids == instance, np.uint8))
        annotations.append({"category_id": label, "iscrowd": int(instance == label), "area": int(coco_mask.area(rle)),
                            "bbox": [int(value) for value in coco_mask.toBbox(rle)],
                            "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}})
    return annotations


# ------------------------------------------------------------------------------------ the benchmark's score

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
    """The answer of `official_ap`, "-" where there is no figure."""
    print(f"{'Cityscapes':12}{'AP':>7}{'AP50':>7}")
    for name, row in {"all": figures, **figures["per_class"]}.items():
        print(f"{name:12}" + "".join(f"{'-':>7}" if row[key] is None else f"{row[key]:7.1f}" for key in ("AP", "AP50")))
