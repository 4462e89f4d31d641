"""What voc.py and yolo.py share on the way from a labelled folder to COCO annotation files.

They add DIR/annotations/instances_{train,val}2017.json and touch nothing else: the images stay in place, and their
file names are paths within DIR (coco.image_folder). Without a division into parts all images are training data, and
there is no val file. All labels are read before anything is written, so a mistake in one of them leaves DIR as it was.
"""
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from formats.coco import DataError, first_five, write_files
from formats.files import warn

MADE_BY = "boxes converted by: python data.py "    # the file begins with it, so `is_ours` reads no more than that


class Labelled(NamedTuple):
    """An image with its boxes."""
    file_name: str            # path within DIR
    size: tuple[int, int]     # (height, width)
    boxes: list[dict]         # "class": name or number, "bbox": xywh, and further keys of the COCO annotation


def check_folders(root: Path, *folders: str) -> None:
    """Raises DataError if one of the layout's folders is missing."""
    for folder in folders:
        if not (root / folder).is_dir():
            raise DataError(f"folder {root / folder} is missing; this layout has {' and '.join(folders)} in {root}")


def check_root(root: Path) -> None:
    """Raises DataError if training would look for the images elsewhere, or would lose annotation files of another
    origin."""
    for folder in ("train2017", "leftImg8bit"):
        if (root / folder).exists():
            raise DataError(f"{root / folder} is in the way: training would look for the images there; move it away")
    for split in ("train", "val"):
        path = target(root, split)
        if path.exists() and not is_ours(path):
            raise DataError(f"{path} exists and was not made by data.py voc or yolo; move it away")


def target(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}2017.json"


def is_ours(path: Path) -> bool:
    """Whether an earlier conversion wrote this annotation file."""
    start = json.dumps({"info": {"description": MADE_BY}}).rstrip('"}')
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(len(start)) == start
    except (OSError, ValueError):
        return False


def checked_splits(root: Path, splits: dict[str, list[str]], names: list[str]) -> dict[str, list[str]]:
    """The splits without an empty val. Warns of the folder's `names` that are in none of them, and of those in both.

    Raises DataError if there is no training image."""
    if not splits.get("train"):
        raise DataError(f"{root}: no images to train on")
    train, val = set(splits["train"]), set(splits.get("val", ()))
    if "val" in splits and not val:
        warn(f"{root}: no images to evaluate on")
    for problem, affected in (("are in neither train nor val and are left out", {*names} - train - val),
                              ("are both in train and in val", train & val)):
        if affected:
            warn(f"{root}: {len(affected)} of {len(names)} images {problem} "
                 f"({first_five(list(map(repr, sorted(affected))))})")
    return {split: part for split, part in splits.items() if part}


def read_text(path: Path) -> str:
    """Raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from None


def as_number(text: str) -> int | float:
    """An int if the value is whole. Raises ValueError, also for nan, inf and 1_0, which float() accepts."""
    value = float(text.replace("_", "?"))
    if not abs(value) < 1e9:
        raise ValueError(text)
    return int(value) if value == int(value) else value


def read_all(root: Path, splits: dict[str, list[str]], read: Callable[[str], Labelled]) -> dict[str, Labelled]:
    """`read(name)` for each name in the splits. Raises DataError with the count of failures and the first of them."""
    labelled, problems = {}, []
    for name in tqdm(sorted({name for names in splits.values() for name in names}), "reading", unit="image",
                     disable=None):
        try:
            labelled[name] = read(name)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(f"{root}: {len(problems)} of {len(problems) + len(labelled)} images cannot be converted, "
                        f"nothing was written; the first: {problems[0]}")
    return labelled


def write_splits(root: Path, layout: str, splits: dict[str, list[Labelled]], classes: dict[str | int, dict]) -> None:
    """Write the annotation files; `classes` maps the "class" of a box to its COCO category.

    Replaces the files of an earlier conversion. Without a val split it removes the old val file, which training would
    still evaluate on. Raises DataError."""
    if not any(image.boxes for image in splits["train"]):
        raise DataError(f"{root}: no training image has a box; nothing was written")
    contents = {str(target(root, split)): {
        "info": {"description": MADE_BY + layout}, "licenses": [], "categories": list(classes.values()),
        **images_and_annotations(images, classes)} for split, images in splits.items()}
    write_files(contents)
    for path, content in contents.items():
        print(f"{path}: {len(content['images'])} images, {len(content['annotations'])} boxes, {len(classes)} classes")
    stale = target(root, "val")
    if "val" not in splits and stale.exists():
        try:
            stale.unlink()
        except OSError as error:
            raise DataError(f"cannot remove {stale} of an earlier conversion: {error.strerror}") from None
        print(f"{stale}: removed, an earlier conversion wrote it")


def images_and_annotations(labelled: list[Labelled], classes: dict[str | int, dict]) -> dict[str, list[dict]]:
    """The two lists of a COCO file. Ids count from 1."""
    images, annotations = [], []
    for number, (file_name, (height, width), boxes) in enumerate(labelled, 1):
        images.append({"id": number, "file_name": file_name, "width": width, "height": height})
        for box in boxes:
            row = {"id": len(annotations) + 1, "image_id": number, "category_id": classes[box["class"]]["id"],
                   "area": round(box["bbox"][2] * box["bbox"][3], 3), "iscrowd": 0}
            annotations.append(row | {key: value for key, value in box.items() if key != "class"})
    return {"images": images, "annotations": annotations}
