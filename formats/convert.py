"""Folders in the layout of Pascal VOC or YOLO: COCO annotation files for their boxes. Not from the paper.

    python data.py voc DIR          Annotations/*.xml, JPEGImages/, perhaps ImageSets/Main/train.txt and val.txt
    python data.py yolo DIR         images/ and labels/, flat or with train/ and val/, or both within train/ and valid/;
                                    data.yaml or classes.txt
    python train.py --data DIR

`write_voc` and `write_yolo` add DIR/annotations/instances_{train,val}2017.json and nothing else: the images stay
where they are, their names in those files are paths within DIR, and `coco.datasets` looks for them there. Where a
folder is not divided, all its images are to train on, and there is no val file.

All annotations are read before anything is written; the first of them that cannot be used is named by a DataError.
Boxes are xywh in pixels of the image, sizes (height, width).
"""
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from PIL import Image
from tqdm import tqdm

from formats.coco import DataError, first_five, is_name, write_files
from formats.files import warn

MADE_BY = "boxes converted by: python data.py "    # begins the description in a file, which begins the file


class Labelled(NamedTuple):
    file_name: str            # path within DIR
    size: tuple[int, int]     # (height, width)
    boxes: list[dict]         # "class": name or number, "bbox": xywh, and what else COCO's annotation is to have


# ------------------------------------------------------------------------------------------- Pascal VOC

def write_voc(root: str) -> None:
    """Write the annotation files of a folder in Pascal VOC's layout. Categories are sorted by name, ids from 1.

    Raises DataError."""
    root = Path(root)
    check_folders(root, "Annotations", "JPEGImages")
    check_root(root)
    stems = sorted(path.stem for path in (root / "Annotations").glob("*.xml") if not path.name.startswith("."))
    splits = checked_splits(root, voc_splits(root, stems), stems)
    there = {}
    for image in images_in(root, root / "JPEGImages"):
        there.setdefault(Path(image).stem, []).append(image)
    found = read_all(root, splits, lambda stem: read_xml(root, stem, there))
    owners = {}
    for stem, image in found.items():
        other = owners.setdefault(image.file_name, stem)
        if other != stem:
            raise DataError(f"{root / 'Annotations'}: {other}.xml and {stem}.xml are both of {image.file_name}")
    alone = [name for stem in sorted({*there} - {*stems}) for name in there[stem] if name not in owners]
    if alone:
        warn(f"{root}: {len(alone)} images have no XML and are left out ({first_five(list(map(repr, alone)))})")
    names = sorted({box["class"] for image in found.values() for box in image.boxes})
    write_splits(root, "voc", {split: [found[stem] for stem in part] for split, part in splits.items()},
                 {name: {"id": number, "name": name} for number, name in enumerate(names, 1)})


def voc_splits(root: Path, stems: list[str]) -> dict[str, list[str]]:
    """The stems of the parts as ImageSets/Main lists them. Raises DataError where a line names no XML."""
    lists = {split: root / "ImageSets" / "Main" / f"{split}.txt" for split in ("train", "val")}
    splits, known = {}, set(stems)
    for split, path in lists.items():
        if path.exists():
            lines = [line.strip() for line in read_text(path).split("\n")]
            unknown = [number for number, line in enumerate(lines, 1) if line and line not in known]
            if unknown:
                raise DataError(f"{path}: {len(unknown)} lines name no XML of {root / 'Annotations'}, the first: "
                                f"line {unknown[0]}, {lines[unknown[0] - 1]!r:.80}")
            splits[split] = list(dict.fromkeys(line for line in lines if line))
    return splits or {"train": stems}


def read_xml(root: Path, stem: str, there: dict[str, list[str]]) -> Labelled:
    """`there`: the images of each stem, as paths within root. Raises DataError."""
    path = root / "Annotations" / f"{stem}.xml"
    try:
        tree = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
        raise DataError(f"{path}: not XML: {error}") from None
    if tree.tag != "annotation":
        raise DataError(f"{path}: not of Pascal VOC: it holds <{tree.tag!r:.40}>, no <annotation>")
    name = re.split(r"[/\\]", (tree.findtext("filename") or "").strip())[-1]
    images = [image for image in there.get(Path(name).stem, []) if Path(image).name == name]
    images = images or there.get(stem, [])
    if len(images) != 1:
        raise DataError(f"{path}: its image is missing: {root / 'JPEGImages'} has no {name!r:.80} and "
                        f"{len(images) or 'no'} images {stem!r} of any suffix")
    boxes = []
    for number, thing in enumerate(tree.findall("object"), 1):
        try:
            boxes.append(voc_box(thing))
        except ValueError as error:
            raise DataError(f"{path}: object {number} {error}") from None
    return Labelled(images[0], voc_size(tree, path, root / images[0]), boxes)


def voc_box(thing: ElementTree.Element) -> dict:
    """An <object>. VOC counts pixels from 1, and xmax is the last one inside. Raises ValueError."""
    name = (thing.findtext("name") or "").strip()
    if not name:
        raise ValueError("has no name")
    x0, y0, x1, y1 = (number_of(thing, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax"))
    if x1 < x0 or y1 < y0:
        raise ValueError("has a box whose xmax is below xmin, or ymax below ymin")
    given = [flag for flag in ("difficult", "truncated") if (thing.findtext(flag) or "").strip()]
    flags = {flag: number_of(thing, flag) for flag in given}
    wrong = next((flag for flag, value in flags.items() if type(value) is not int), None)
    if wrong:
        raise ValueError(f"has the {wrong} {flags[wrong]}, which is no integer")
    bbox = [round(value, 3) for value in (x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1)]
    return {"class": name, "bbox": bbox, **flags}


def voc_size(tree: ElementTree.Element, path: Path, image: Path) -> tuple[int, int]:
    """As the XML states it, or else the image's header. Raises DataError."""
    if not all((tree.findtext(f"size/{side}") or "").strip() for side in ("height", "width")):
        return header(image)[0]
    try:
        height, width = (number_of(tree, f"size/{side}") for side in ("height", "width"))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    if type(height) is not int or type(width) is not int:
        raise DataError(f"{path}: its size, {width} x {height}, is not in whole pixels")
    return (height, width) if min(height, width) > 0 else header(image)[0]


def number_of(element: ElementTree.Element, tag: str) -> int | float:
    """Raises ValueError where there is no such element or no number in it."""
    text = element.findtext(tag)
    if text is None:
        raise ValueError(f"has no {tag}")
    try:
        return as_number(text)
    except ValueError:
        raise ValueError(f"has the {tag} {text!r:.40}, which is no number") from None


# ------------------------------------------------------------------------------------------------- YOLO

FOLDERS = {"train": ("train", "train2017"), "val": ("val", "valid", "val2017")}      # in images/ and labels/

# EXIF's orientations (1: upright) by what becomes of an upright image in the file: rows and columns are exchanged,
# then left and right, then top and bottom.
TRANSPOSED, MIRRORED_X, MIRRORED_Y = (5, 6, 7, 8), (2, 3, 7, 8), (3, 4, 6, 7)


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
    (height, width), orientation = header(root / name)
    # Labels are of the upright image. The size stated is its size, by which data.as_stated knows to turn the image;
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


# --------------------------------------------------------------------------------- YOLO's names of classes

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


# ----------------------------------------------------------------------------------------- both layouts

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


def files_in(folder: Path) -> list[Path]:
    """All files below a folder, sorted, less the hidden ones."""
    return sorted(Path(where) / name for where, _, names in os.walk(folder) for name in names if name[0] != ".")


def images_in(root: Path, folder: Path) -> list[str]:
    """Paths within root of the images below a folder: what Pillow can open, going by the suffix."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return [path.relative_to(root).as_posix() for path in files_in(folder) if path.suffix.lower() in suffixes]


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


def header(path: Path) -> tuple[tuple[int, int], int]:
    """(height, width) of the file and EXIF's orientation, 1 where it has none. Raises DataError."""
    try:
        with Image.open(path) as image:
            return (image.height, image.width), image.getexif().get(0x0112, 1)
    except Exception as error:                   # Pillow: OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"image {path} cannot be read: {str(error) or type(error).__name__}") from None


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
