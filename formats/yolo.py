"""A folder in YOLO's layout: COCO annotation files for its boxes.

    python data.py yolo DIR         images/ and labels/, flat or with train/ and val/, or both within train/ and valid/;
                                    data.yaml or classes.txt
    python train.py --data DIR

Boxes are xywh in pixels of the image, sizes (height, width).
"""
import json
import re
from pathlib import Path

from formats.coco import DataError, first_five, is_name
from formats.files import warn
from formats.folders import Labelled, as_number, check_folders, check_root, checked_splits, read_all, read_text, write_splits
from formats.pictures import TRANSPOSED, files_in, images_in, read_header


FOLDERS = {"train": ("train", "train2017"), "val": ("val", "valid", "val2017")}      # in images/ and labels/

# EXIF's orientations (1: upright) by what becomes of an upright image in the file: rows and columns are exchanged,
# then left and right, then top and bottom.
MIRRORED_X, MIRRORED_Y = (2, 3, 7, 8), (3, 4, 6, 7)                          # and TRANSPOSED


def write_yolo(root: str) -> None:
    """Write the annotation files of a folder in YOLO's layout. The ids of categories are the numbers of the classes.

    Raises DataError."""
    root = Path(root)
    parts = [root] if (root / "images").is_dir() else [path.parent for path in sorted(root.glob("*/images"))] or [root]
    for part in parts:
        check_folders(part, "images", "labels")
    check_root(root)
    everything = [name for part in parts for name in images_in(root, part / "images")]
    splits = checked_splits(root, yolo_splits(root, everything), everything)
    names = class_names(root)
    check_labels(root, [part / "labels" for part in parts],
                 sorted({*everything, *(name for names in splits.values() for name in names)}))
    found = read_all(root, splits, lambda name: read_txt(root, name, names))
    if names is None:
        names = {box["class"]: str(box["class"]) for image in found.values() for box in image.boxes}
        warn(f"{root}: no data.yaml with names and no classes.txt: the classes are named after their numbers")
    write_splits(root, "yolo", {split: [found[name] for name in part] for split, part in splits.items()},
                 {number: {"id": number, "name": names[number]} for number in sorted(names)})


def yolo_splits(root: Path, everything: list[str]) -> dict[str, list[str]]:
    """Images of each part: of folders in images/, or that have an images/ of their own; or all are to train on."""
    folders = {split: [folder for name in names for folder in (root / "images" / name, root / name / "images")
                       if folder.is_dir()] for split, names in FOLDERS.items()}
    if not any(folders.values()):
        return {"train": everything}
    return {split: [name for folder in some for name in images_in(root, folder)]
            for split, some in folders.items() if some}


def label_file(root: Path, image: str) -> Path:
    parts = list(Path(image).parts)
    parts[parts.index("images")] = "labels"
    return root.joinpath(*parts).with_suffix(".txt")


def check_labels(root: Path, folders: list[Path], images: list[str]) -> None:
    """Warns of label files below `folders` without an image. Raises DataError where two images share one."""
    owners = {}
    for image in images:
        other = owners.setdefault(label_file(root, image), image)
        if other != image:
            raise DataError(f"{root}: {other!r} and {image!r} share one label file, {label_file(root, image)}")
    alone = sorted(str(path) for folder in folders for path in files_in(folder)
                   if path.suffix == ".txt" and path not in owners and path.name != "classes.txt")
    if alone:
        warn(f"{root}: {len(alone)} label files have no image and are left out ({first_five(alone)})")


def read_txt(root: Path, name: str, names: dict[int, str] | None) -> Labelled:
    """An image and its label file; without one it has no boxes. Raises DataError."""
    (height, width), orientation = read_header(root / name)
    # Labels are of the upright image. The size stated is its size, by which as_stated knows to turn the image;
    # where its size does not tell, the image will be used as the file has it, and the boxes are turned instead.
    seen = (width, height) if orientation in TRANSPOSED else (height, width)
    if seen != (height, width):
        orientation = 1
    path, boxes = label_file(root, name), []
    for number, line in enumerate(read_text(path).split("\n") if path.exists() else [], 1):
        fields = line.split()
        try:
            if fields:
                x0, y0, x1, y1 = turned_back(yolo_box(fields), orientation)
                label = yolo_class(fields[0], names)
                boxes.append({"class": label, "bbox": [round(value, 3) for value in (
                    x0 * seen[1], y0 * seen[0], (x1 - x0) * seen[1], (y1 - y0) * seen[0])]})
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    return Labelled(name, seen, boxes)


def yolo_class(text: str, names: dict[int, str] | None) -> int:
    """Raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"the class {text!r:.40} is no whole number")
    if names is not None and int(text) not in names:
        raise ValueError(f"class {text} has no name among the {len(names)} that there are")
    return int(text)


def yolo_box(fields: list[str]) -> tuple[float, float, float, float]:
    """`class cx cy width height` or `class x y x y x y ...`, fractions of the image -> x0, y0, x1, y1, such too.

    Raises ValueError."""
    if len(fields) == 6:
        raise ValueError("the 6th number is a confidence: these are a model's detections; if they are to be learnt, "
                         "leave it out: cut -d ' ' -f 1-5")
    if len(fields) < 5 or len(fields) % 2 == 0:
        raise ValueError(f"{len(fields)} numbers: a box has 5, a polygon an odd count of 7 or more")
    values = []
    for text in fields[1:]:
        try:
            values.append(as_number(text))
        except ValueError:
            raise ValueError(f"{text!r:.40} is no number") from None
        if not -0.01 <= values[-1] <= 1.01:                           # rounded ones may be a little outside
            raise ValueError(f"{text!r:.40} is no fraction of the image's width or height (0 to 1)")
    if len(values) > 4:
        return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    x, y, width, height = values
    if width < 0 or height < 0:
        raise ValueError("its width or height is negative")
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def turned_back(box: tuple[float, float, float, float], orientation: int) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1, fractions of the upright image -> of the image as its file has it."""
    x0, y0, x1, y1 = box
    if orientation in TRANSPOSED:
        x0, y0, x1, y1 = y0, x0, y1, x1
    if orientation in MIRRORED_X:
        x0, x1 = 1 - x1, 1 - x0
    if orientation in MIRRORED_Y:
        y0, y1 = 1 - y1, 1 - y0
    return x0, y0, x1, y1


# ---------------------------------------------------------------------------------- names of classes

# As much of YAML as names need: a list or a mapping of numbers, in brackets or one entry a line.
GAP = r"(?:\s|#[^\n]*)*"                             # blanks and comments
QUOTED = r"""'(?:[^'\n]|'')*'|"(?:[^"\\\n]|\\.)*\""""
IN_BRACKETS = re.compile(rf"""{GAP}(?:([0-9]+)\s*:\s+)?({QUOTED}|[^\s,\[\]{{}}'"#][^,\[\]{{}}\n]*){GAP}"""
                         r"(?:,|(?=[\]}]))")
ON_A_LINE = re.compile(rf"""\s*(?:-|([0-9]+)\s*:)\s+({QUOTED}|[^\s'"\[{{#&*!|>].*)\s*(?:#.*)?""")


def class_names(root: Path) -> dict[int, str] | None:
    """Names by number: of data.yaml, or the one other .yaml with names, or classes.txt; else None. Raises DataError."""
    files = [root / "data.yaml"] if (root / "data.yaml").exists() else [*root.glob("*.yaml"), *root.glob("*.yml")]
    texts = {path: read_text(path) for path in sorted(files)}
    texts = {path: text for path, text in texts.items() if re.search(r"^names\s*:", text, re.MULTILINE)}
    if len(texts) > 1:
        raise DataError(f"{root}: several files have names of classes ({first_five([path.name for path in texts])}): "
                        "call the right one data.yaml")
    lists = [path for path in (root / "classes.txt", root / "labels" / "classes.txt") if path.exists()]
    try:
        for path, text in texts.items():
            return yaml_names(text)
        for path in lists:
            return numbered([(None, line.strip()) for line in read_text(path).rstrip().split("\n")])
    except ValueError as error:
        raise DataError(f"{path}: no names of classes: {error}") from None
    return None


def yaml_names(text: str) -> dict[int, str]:
    """The value of `names`. Raises ValueError."""
    value = re.split(r"^names\s*:", text, maxsplit=1, flags=re.MULTILINE)[1]
    value = re.split(r"^(?![\s#\]}]|-\s|$)", value, maxsplit=1, flags=re.MULTILINE)[0]           # up to the next key
    bracket, found = re.match(GAP + r"[\[{]", value), []
    if bracket:
        end = bracket.end()
        while entry := IN_BRACKETS.match(value, end):
            found.append(entry)
            end = entry.end()
        if not re.fullmatch(GAP + r"[\]}]" + GAP, value[end:]):
            raise ValueError(f"{value[end:].strip()!r:.60} is not understood; write one a line, as 0: name")
    else:
        for line in value.split("\n"):
            if not re.fullmatch(GAP, line):
                entry = ON_A_LINE.fullmatch(line)
                if not entry:
                    raise ValueError(f"{line.strip()!r:.60} is not understood; write one a line, as 0: name")
                found.append(entry)
    return numbered([(entry[1], unquoted(entry[2])) for entry in found])


def unquoted(text: str) -> str:
    """Raises ValueError."""
    if text[0] == "'":
        return text[1:-1].replace("''", "'")
    if text[0] == '"':
        return json.loads(text)
    text = re.sub(r"\s#.*", "", text).strip()
    if re.search(r":(\s|$)", text):
        raise ValueError(f"{text!r:.60} is not understood; write one a line, as 0: name")
    return text


def numbered(entries: list[tuple[str | None, str]]) -> dict[int, str]:
    """(number or None, name): all have one, or none has and they count from 0. Raises ValueError."""
    names = {i if number is None else int(number): name for i, (number, name) in enumerate(entries)}
    if len({number is None for number, _ in entries}) > 1 or len(names) != len(entries):
        raise ValueError("numbers are missing or stand there twice")
    wrong = next((number for number, name in names.items() if not is_name(name)), None)
    if wrong is not None or not names:
        raise ValueError("there are none" if not names else f"that of number {wrong} is empty or cannot be printed")
    return names
