"""Folders in the layout of Pascal VOC or YOLO: what voc.py and yolo.py share on the way to COCO annotation files.

`write_voc` and `write_yolo` add DIR/annotations/instances_{train,val}2017.json and nothing else: the images stay
where they are, their names in those files are paths within DIR, and `coco.datasets` looks for them there. Where a
folder is not divided, all its images are to train on, and there is no val file.

All annotations are read before anything is written; the first of them that cannot be used is named by a DataError.
"""
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from formats.coco import DataError, first_five, write_files
from formats.files import warn

MADE_BY = "boxes converted by: python data.py "    # begins the description in a file, which begins the file


class Labelled(NamedTuple):
    file_name: str            # path within DIR
    size: tuple[int, int]     # (height, width)
    boxes: list[dict]         # "class": name or number, "bbox": xywh, and what else COCO's annotation is to have


def check_folders(root: Path, *folders: str) -> None:
    """Raises DataError where one is missing."""
    for folder in folders:
        if not (root / folder).is_dir():
            raise DataError(f"folder {root / folder} is missing; this layout has {' and '.join(folders)} in {root}")


def check_root(root: Path) -> None:
    """Raises DataError where images would be looked for elsewhere, and where annotation files are there that no
    conversion has made."""
    for folder in ("train2017", "leftImg8bit"):
        if (root / folder).exists():
            raise DataError(f"{root / folder} is in the way: with it the images are looked for there; move it away")
    for split in ("train", "val"):
        if target(root, split).exists() and not is_ours(target(root, split)):
            raise DataError(f"{target(root, split)} is there and was not made by data.py voc or yolo; move it away")


def target(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}2017.json"


def is_ours(path: Path) -> bool:
    """Whether an annotation file is an earlier conversion's, by its first characters: others may be large."""
    start = json.dumps({"info": {"description": MADE_BY}}).rstrip('"}')
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(len(start)) == start
    except (OSError, ValueError):
        return False


def checked_splits(root: Path, splits: dict[str, list[str]], everything: list[str]) -> dict[str, list[str]]:
    """The parts, less a val without images; what is in neither or in both is warned of. Raises DataError."""
    if not splits.get("train"):
        raise DataError(f"{root}: there are no images to train on")
    train, val = set(splits["train"]), set(splits.get("val", ()))
    if "val" in splits and not val:
        warn(f"{root}: there are no images to evaluate on")
    for why, names in (("are in no part and are left out", {*everything} - train - val),
                       ("are to train on and to evaluate on", train & val)):
        if names:
            some = first_five(list(map(repr, sorted(names))))
            warn(f"{root}: {len(names)} of {len(everything)} images {why} ({some})")
    return {split: names for split, names in splits.items() if names}


def read_text(path: Path) -> str:
    """Raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from None


def as_number(text: str) -> int | float:
    """An integer where it is one. Raises ValueError, also for other things that float() takes: nan, inf, 1_0."""
    value = float(text.replace("_", "?"))
    if not abs(value) < 1e9:
        raise ValueError(text)
    return int(value) if value == int(value) else value


def read_all(root: Path, splits: dict[str, list[str]], read: Callable[[str], Labelled]) -> dict[str, Labelled]:
    """`read` of each name in the parts. Raises DataError: the first that `read` raises, and how many there are."""
    images, problems = {}, []
    for name in tqdm(sorted({name for names in splits.values() for name in names}), "reading", unit="image",
                     disable=None):
        try:
            images[name] = read(name)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(f"{root}: {len(problems)} of {len(problems) + len(images)} images cannot be converted, "
                        f"nothing was written; the first: {problems[0]}")
    return images


def write_splits(root: Path, layout: str, splits: dict[str, list[Labelled]], classes: dict[str | int, dict]) -> None:
    """Write the annotation files; `classes` gives the category for each "class" of a box. An earlier conversion's are
    replaced, and its val file is removed where there is none now: training would go on evaluating with it.

    Raises DataError."""
    if not any(image.boxes for image in splits["train"]):
        raise DataError(f"{root}: no image to train on has a box; nothing was written")
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
            raise DataError(f"{stale} of an earlier conversion cannot be removed: {error.strerror}") from None
        print(f"{stale}: removed, it was an earlier conversion's")


def images_and_annotations(labelled: list[Labelled], classes: dict[str | int, dict]) -> dict[str, list[dict]]:
    """The lists of a COCO file. Ids count from 1."""
    images, annotations = [], []
    for number, (file_name, (height, width), boxes) in enumerate(labelled, 1):
        images.append({"id": number, "file_name": file_name, "width": width, "height": height})
        for box in boxes:
            row = {"id": len(annotations) + 1, "image_id": number, "category_id": classes[box["class"]]["id"],
                   "area": round(box["bbox"][2] * box["bbox"][3], 3), "iscrowd": 0}
            annotations.append(row | {key: value for key, value in box.items() if key != "class"})
    return {"images": images, "annotations": annotations}
