"""YOLO's layout to COCO annotation files.

    python data.py yolo DIR     # images/ and labels/: flat, with train/ and val/ inside, or inside train/ and valid/;
                                # names of classes in data.yaml or classes.txt
    python train.py --data DIR

Boxes are xywh in pixels, sizes (height, width).
"""
import re
from pathlib import Path

from formats.coco import DataError, first_five, is_name
from formats.files import optional, warn
from formats.folders import (Labelled, as_number, check_folders, check_root, checked_splits, read_all, read_text,
                             write_splits)
from formats.pictures import files_in, images_in, read_header

FOLDERS = {"train": ("train", "train2017"), "val": ("val", "valid", "val2017")}      # of a split


def write_yolo(root: str) -> None:
    """Write the annotation files of a folder. Category ids are the numbers of the classes.

    Raises DataError; UserError if the names are in YAML and PyYAML is not installed."""
    root = Path(root)
    parts = [root] if (root / "images").is_dir() else [path.parent for path in sorted(root.glob("*/images"))] or [root]
    for part in parts:
        check_folders(part, "images", "labels")
    check_root(root)
    images = [image for part in parts for image in images_in(root, part / "images")]
    splits = checked_splits(root, yolo_splits(root, images), images)
    names = class_names(root)
    check_labels(root, [part / "labels" for part in parts], sorted({*images, *sum(splits.values(), [])}))
    labelled = read_all(root, splits, lambda image: read_txt(root, image, names))
    if names is None:
        names = {box["class"]: str(box["class"]) for image in labelled.values() for box in image.boxes}
        warn(f"{root}: no data.yaml with names and no classes.txt: the classes are named after their numbers")
    write_splits(root, "yolo", {split: [labelled[image] for image in part] for split, part in splits.items()},
                 {number: {"id": number, "name": names[number]} for number in sorted(names)})


def yolo_splits(root: Path, images: list[str]) -> dict[str, list[str]]:
    """The images of each split, found in images/SPLIT or SPLIT/images; without such folders all are training images."""
    folders = {split: [folder for name in names for folder in (root / "images" / name, root / name / "images")
                       if folder.is_dir()] for split, names in FOLDERS.items()}
    if not any(folders.values()):
        return {"train": images}
    return {split: [image for folder in paths for image in images_in(root, folder)]
            for split, paths in folders.items() if paths}


def label_file(root: Path, image: str) -> Path:
    parts = list(Path(image).parts)
    parts[parts.index("images")] = "labels"
    return root.joinpath(*parts).with_suffix(".txt")


def check_labels(root: Path, folders: list[Path], images: list[str]) -> None:
    """Warns of label files in `folders` without an image. Raises DataError if two images share a label file."""
    image_of = {}
    for image in images:
        other = image_of.setdefault(label_file(root, image), image)
        if other != image:
            raise DataError(f"{root}: {other!r} and {image!r} share one label file, {label_file(root, image)}")
    unused = sorted(str(path) for folder in folders for path in files_in(folder)
                    if path.suffix == ".txt" and path not in image_of and path.name != "classes.txt")
    if unused:
        warn(f"{root}: {len(unused)} label files have no image and are left out ({first_five(unused)})")


def read_txt(root: Path, image: str, names: dict[int, str] | None) -> Labelled:
    """An image and its label file; without one it has no boxes. Raises DataError."""
    height, width = read_header(root / image).upright
    path, boxes = label_file(root, image), []
    for number, line in enumerate(read_text(path).split("\n") if path.exists() else [], 1):
        fields = line.split()
        try:
            if fields:
                x0, y0, x1, y1 = yolo_box(fields)
                bbox = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
                boxes.append({"class": yolo_class(fields[0], names), "bbox": [round(value, 3) for value in bbox]})
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    return Labelled(image, (height, width), boxes)


def yolo_class(text: str, names: dict[int, str] | None) -> int:
    """Raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"the class {text!r:.40} is not a whole number")
    if names is not None and int(text) not in names:
        raise ValueError(f"class {text} is not among the {len(names)} that have a name")
    return int(text)


def yolo_box(fields: list[str]) -> tuple[float, float, float, float]:
    """`class cx cy width height`, or a polygon `class x y x y x y ...` -> x0, y0, x1, y1; all are fractions of the
    image's sides. Raises ValueError."""
    if len(fields) == 6:
        raise ValueError("the 6th number is a confidence, so these are a model's detections; to train on them, "
                         "remove it: cut -d ' ' -f 1-5")
    if len(fields) < 5 or len(fields) % 2 == 0:
        raise ValueError(f"{len(fields)} numbers: a box has 5, a polygon an odd count of 7 or more")
    values = []
    for text in fields[1:]:
        try:
            values.append(as_number(text))
        except ValueError:
            raise ValueError(f"{text!r:.40} is not a number") from None
        if not -0.01 <= values[-1] <= 1.01:                           # rounded numbers may be slightly outside
            raise ValueError(f"{text!r:.40} is not a fraction (0 to 1) of the image's width or height")
    if len(values) > 4:
        return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    x, y, width, height = values
    if width < 0 or height < 0:
        raise ValueError("the width or height is negative")
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def class_names(root: Path) -> dict[int, str] | None:
    """Names by class number, from data.yaml, from the only other YAML file with names, or from classes.txt; else None.

    Raises DataError, UserError."""
    files = [root / "data.yaml"] if (root / "data.yaml").exists() else [*root.glob("*.yaml"), *root.glob("*.yml")]
    texts = {path: read_text(path) for path in sorted(files)}
    texts = {path: text for path, text in texts.items() if re.search(r"^names\s*:", text, re.MULTILINE)}
    if len(texts) > 1:
        raise DataError(f"{root}: several files have names of classes ({first_five([path.name for path in texts])}): "
                        "rename the right one to data.yaml")
    lists = [path for path in (root / "classes.txt", root / "labels" / "classes.txt") if path.exists()]
    try:
        for path, text in texts.items():
            return checked_names(yaml_names(path, text))
        for path in lists:
            return checked_names([line.strip() for line in read_text(path).rstrip().split("\n")])
    except ValueError as error:
        raise DataError(f"{path}: no names of classes: {error}") from None
    return None


def yaml_names(path: Path, text: str) -> object:
    """The value of `names` in a YAML file. Every scalar stays text: a class may be called 7, no or null.

    Raises ValueError; UserError without PyYAML."""
    yaml = optional("yaml", f"{path}, which lists the classes,")
    try:
        content = yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None
    return content.get("names") if isinstance(content, dict) else None


def checked_names(names: object) -> dict[int, str]:
    """A list, or a mapping of numbers, as {number: name}. Raises ValueError."""
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise ValueError("expected a list of names, or a mapping of numbers to names")
    for number, name in names.items():
        if not re.fullmatch(r"[0-9]{1,9}", str(number)) or not is_name(name):
            raise ValueError(f"entry {number!r:.40}: expected a number and a name that is not empty")
    return {int(number): name for number, name in names.items()}
