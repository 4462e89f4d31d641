"""YOLO's label files to COCO annotation files.

    python data.py yolo DIR     # images and label files (.txt) beside them, in folders `labels`, or Darknet's
    python train.py --data DIR

The label file of an image has its stem and is in the same folder, or in one that differs in a single name: images/a/
and labels/a/, photos/ and photos/labels/, train/ and labels/train/. data.yaml or Darknet's .data file say what is to
train and to evaluate on; without them lists (train.txt, val.txt) or folders of these names do. Names of classes are in
data.yaml, classes.txt or Darknet's .names. Boxes are xywh in pixels, sizes (height, width).
"""
import os
import re
from pathlib import Path

from formats.coco import MAX_PIXELS, UPRIGHT, DataError, first_five, is_name
from formats.files import optional
from formats.folders import (PARTS, Faults, Labelled, Report, Tails, as_number, checked_splits, folder_of, header_in,
                             images_among, inventory, listed, names_in, parts_by_folder, read_text, stem_of, within,
                             write_splits)
from formats.pictures import left_out, remarks

LARGEST = 2**20     # characters of data.yaml
OUTSIDE = 0.01      # rounded fractions may be slightly below 0 or above 1
SAME = 2            # of nearness
INSIDE = 0.02       # key points may be this far out of their box, in parts of the image's side


def write_yolo(root: str, exif: str = UPRIGHT, skip: bool = False, max_pixels: int = MAX_PIXELS) -> None:
    """Write the annotation files of a folder. Category ids are the numbers of the classes.

    exif: whether labels refer to the upright image or to the stored pixels. skip: leave out what cannot be converted,
    instead of refusing. Raises DataError; UserError if a YAML file is needed and PyYAML is not installed."""
    root, headers = Path(root), {}
    report, names = Report(root, skip), names_in(root)
    config_name, config = read_config(root, names)
    classes, lists = class_names(root, names, config_name, config, report)
    images, texts = images_among(names), [name for name in names if name.endswith(".txt") and name not in lists]
    labels = label_files(images, texts, report)
    if not labels:
        raise DataError(f"{root}: no label file (.txt) belongs to an image{inventory(names)}")
    splits, parts_from = yolo_splits(root, names, images, labels, config_name, config, report)
    splits = checked_splits(splits, images, report)
    lines = report.read_all(sum(splits.values(), []), lambda image: read_lines(root, labels.get(image)))
    counts = key_points(config, [fields for of_image in lines.values() for _, fields in of_image], report)
    shared = sharing(lines, labels)

    def labelled(image: str) -> Labelled:
        if image in shared:
            raise Faults(*[("images that share a label file", " and ".join(map(repr, shared[image])))
                           ] * (image == shared[image][0]))         # once for all of them
        headers[image] = header = header_in(root, image)
        size = header.upright if exif == UPRIGHT else header.size
        return Labelled(image, size, yolo_boxes(labels.get(image), lines[image], size, classes, counts))

    found = report.read_all(lines, labelled)
    report.refuse()
    splits = {split: [found[image] for image in part if image in found] for split, part in splits.items()}
    without = [image for image in found if image not in labels]
    report.say("image", "without a label file, so without objects", without)
    report.say("image", "with an empty label file, so without objects",
               [image for image in found if not found[image].boxes and image not in without])
    report.say("polygon", "of which the box was taken", [image for image in found for _, fields in lines[image]
                                                         if len(fields) > 6 and len(fields) not in counts])
    # no size is stated here, so it never tells which image a label is drawn on
    report.say("image", f"turned or mirrored by EXIF, whose labels were taken for those of the {exif} image; --exif "
               "decides otherwise", [image for image in headers if headers[image].orientation != 1])
    report.said += remarks({image: headers[image]._replace(orientation=1) for image in headers}, exif, max_pixels)
    used = {*images, *labels.values(), *lists, *parts_from, config_name}
    report.say("text file", "without an image, left out", [name for name in texts if name not in used])
    report.said += left_out([name for name in names if name not in {*used, *texts}])
    if classes is None:
        classes = {box["class"]: str(box["class"]) for image in found.values() for box in image.boxes}
        report.said.append("no data.yaml with names and no classes.txt: the classes are named after their numbers")
    write_splits("yolo", splits, {number: {"id": number, "name": classes[number]} for number in sorted(classes)}, exif,
                 report)


# -------------------------------------------------------------------------------------------- files and parts

def label_files(images: list[str], texts: list[str], report: Report) -> dict[str, str]:
    """The label file of each image that has one.

    A folder without images may have the labels of one that differs in a name; `images` and `labels` come first."""
    by_stem, with_images = {}, {folder_of(image) for image in images}
    for text in texts:
        by_stem.setdefault(stem_of(text), []).append(text)
    pairs = ((nearness(folder_of(image), folder_of(text)), image, text) for image in images
             for text in by_stem.get(stem_of(image), []) + by_stem.get(Path(image).name, []))
    found, best, several = {}, {}, []
    for rank, image, text in sorted(pairs):
        if not rank or rank != SAME and folder_of(text) in with_images or best.setdefault(text, rank) < rank:
            continue                                             # it is that of a nearer image
        if image in found:
            several.append(f"{found[image]}, not {text}")
        else:
            found[image] = text
    report.say("image", "with several label files, of which one was taken", several)
    return found


def nearness(image: tuple[str, ...], label: tuple[str, ...]) -> int:
    """How well the folder of a label file suits that of an image: 1, images/ became labels/; SAME; 3 or 4, one name was
    replaced, put in or left out, by `labels` or another; 0, it does not."""
    if image == label:
        return SAME
    start = len(os.path.commonprefix([image, label]))
    end = len(os.path.commonprefix([image[start:][::-1], label[start:][::-1]]))
    old, new = image[start:len(image) - end], label[start:len(label) - end]
    if max(len(old), len(new)) > 1:
        return 0
    return 1 if (old, new) == (("images",), ("labels",)) else 3 if new == ("labels",) else 4


def labelled_folders(images: list[str], labels: dict[str, str]) -> list[str]:
    """The images of folders that have labels, or are named images or after a part: others may be anything."""
    with_labels = {folder_of(image) for image in labels}
    known = {"images", *sum(PARTS.values(), ())}
    return [image for image in images if folder_of(image) in with_labels
            or known & {folder.lower() for folder in folder_of(image)}]


def sharing(images: list[str], labels: dict[str, str]) -> dict[str, list[str]]:
    """The images that share a label file, each with all of them."""
    of_label = {}
    for image in images:
        if image in labels:
            of_label.setdefault(labels[image], []).append(image)
    return {image: group for group in of_label.values() if len(group) > 1 for image in group}


def yolo_splits(root: Path, names: list[str], images: list[str], labels: dict[str, str], config_name: str,
                config: dict, report: Report) -> tuple[dict[str, list[str]], list[str]]:
    """The images of each split, as the config, lists in DIR or else folders say; the lists that were followed.

    Raises DataError if an entry or a line names nothing in DIR."""
    entries = {split: config.get(split) for split in ("train", "val")}
    if not any(entries.values()):
        lists = {stem_of(name).lower(): name for name in names if not folder_of(name) and name.endswith(".txt")}
        entries = {split: [lists[known] for known in PARTS[split] if known in lists] for split in entries}
        config_name = "a list"
    if not any(entries.values()):
        return parts_by_folder({image: folder_of(image) for image in labelled_folders(images, labels)}), []
    tails, splits, used = Tails(images), {}, []
    for split, entry in entries.items():
        for text in [entry] if isinstance(entry, str) else entry or []:
            if not isinstance(text, str):               # aliases of YAML: it may be exponentially large
                raise DataError(f"{root / config_name}: {split}: expected a path, or a list of paths")
            path = within((root / config_name).parent, text) or within(root, text)
            if path is None and split == "train":
                raise DataError(f"{root / config_name}: {split}: {text!r:.80} is not in {root}; mend the line, or "
                                f"remove it and name folders train and val{inventory(names)}")
            splits.setdefault(split, [])
            if path is None:
                continue
            name = path.relative_to(root).as_posix()
            if path.is_file():
                splits[split] += listed(root, name, tails)
                used.append(name)
            else:
                splits[split] += [image for image in images if path == root or image.startswith(name + "/")]
    report.facts.append(f"parts as {config_name} says")
    return splits, used


# ------------------------------------------------------------------------------------------------ label files

def read_lines(root: Path, label: str | None) -> list[tuple[int, list[str]]]:
    """(number, fields) of the lines of a label file that are not empty. Raises Faults."""
    try:
        lines = read_text(root / label).split("\n") if label else []
    except DataError as error:
        raise Faults(("label files that cannot be read", str(error))) from None
    return [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]


def yolo_boxes(label: str | None, lines: list[tuple[int, list[str]]], size: tuple[int, int],
               classes: dict[int, str] | None, key_points: tuple[int, ...]) -> list[dict]:
    """Boxes of Labelled. size: (height, width); key_points: counts of numbers that are a box and key points. Raises
    Faults."""
    (height, width), boxes, faults = size, [], []
    for number, fields in lines:
        try:
            x0, y0, x1, y1 = yolo_box(fields[:5] if len(fields) in key_points else fields)
            bbox = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
            boxes.append({"class": yolo_class(fields[0], classes), "bbox": [round(value, 3) for value in bbox]})
        except ValueError as error:
            kind, *what = error.args
            faults.append((kind, f"{label}, line {number}: {what[0]}"))
    if faults:
        raise Faults(*faults)
    return boxes


def yolo_class(text: str, classes: dict[int, str] | None) -> int:
    """Raises ValueError of the kind of fault and what it is."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError("lines whose class is not a whole number", f"{text!r:.40}")
    if classes is not None and int(text) not in classes:
        raise ValueError(f"classes not among the {len(classes)} that have a name", text)
    return int(text)


def yolo_box(fields: list[str]) -> tuple[float, float, float, float]:
    """`class cx cy width height`, or a polygon `class x y x y x y ...` -> x0, y0, x1, y1; all are fractions of the
    image's sides. Raises ValueError of the kind of fault and what it is."""
    if len(fields) == 6:
        raise ValueError("lines whose 6th number is a confidence, so a model's detections; to train on them, remove it "
                         "(cut -d ' ' -f 1-5)", f"{fields[5]!r:.40}")
    if len(fields) < 5 or len(fields) % 2 == 0:
        raise ValueError("lines that are neither a box of 5 numbers nor a polygon of an odd count of 7 or more",
                         f"{len(fields)} numbers" if len(fields) > 1 else f"{fields[0]!r:.40}")
    values = []
    for text in fields[1:]:
        try:
            values.append(as_number(text))
        except ValueError:
            raise ValueError("values that are not numbers", f"{text!r:.40}") from None
        if not -OUTSIDE <= values[-1] <= 1 + OUTSIDE:
            raise ValueError("numbers that are no fraction (0 to 1) of the image's width or height", f"{text!r:.40}")
    if len(values) > 4:
        return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    x, y, width, height = values
    if width < 0 or height < 0:
        raise ValueError("boxes whose width or height is negative", f"{width} x {height}")
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


# ------------------------------------------------------------------------------------------------- key points

def key_points(config: dict, lines: list[list[str]], report: Report) -> tuple[int, ...]:
    """The counts of numbers in a line that are a box and key points, not a polygon.

    data.yaml's kpt_shape says so. Without it: if all lines beyond 5 numbers have one count, every box lies in its image
    and has its points inside, and the numbers cannot be a polygon's."""
    long = [fields for fields in lines if len(fields) > 6]
    try:
        count, dims = map(int, config.get("kpt_shape") or ())
        report.said += ["key points, as kpt_shape says: their boxes are taken"] if long else []
        return (5 + count * dims,)
    except (TypeError, ValueError):
        counts = {len(fields) for fields in long}
    if len(counts) == 1:
        (count,) = counts
        for dims in (3, 2):
            if (count - 5) % dims == 0 and are_key_points(long, dims):
                report.said.append(f"{len(long)} lines of {count} numbers, taken for a box and {(count - 5) // dims} "
                                   f"key points of {dims}; kpt_shape in data.yaml would say")
                return (count,)
    return ()


def are_key_points(lines: list[list[str]], dims: int) -> bool:
    """Whether the numbers from the sixth on are points in the box that the first five are, and of no polygon: the third
    number of a point is its visibility, 0, 1 or 2; or some width and height, as a corner of a polygon, would be farther
    off than all its other corners are wide. That takes two points, since corners of a triangle may be anywhere."""
    apart = dims == 3
    for fields in lines:
        try:
            x, y, width, height, *rest = map(as_number, fields[1:])
        except ValueError:
            return False
        points = [rest[i:i + dims] for i in range(0, len(rest), dims)]
        seen = [(px, py) for px, py, *_ in points if px or py]
        box = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        if min(box) < -INSIDE or max(box) > 1 + INSIDE or any(
                abs(px - x) > width / 2 + INSIDE or abs(py - y) > height / 2 + INSIDE for px, py in seen):
            return False
        if dims == 3 and any(visible not in (0, 1, 2) for *_, visible in points):
            return False
        for corner, corners in ((width, [x, *(px for px, _ in seen)]), (height, [y, *(py for _, py in seen)])):
            low, high = min(corners), max(corners)
            apart |= len(points) > 1 and max(low - corner, corner - high) > high - low
    return apart


# ------------------------------------------------------------------------------------------- names of classes

def read_config(root: Path, names: list[str]) -> tuple[str, dict]:
    """The name and content of data.yaml, of the only other YAML file with names, or of Darknet's .data file; else ("",
    {}). Every scalar stays text: a class may be called 7, no or null. Raises DataError; UserError without PyYAML."""
    yamls = {name: read_text(root / name) for name in names if name.endswith((".yaml", ".yml"))}
    yamls = {name: text for name, text in yamls.items()
             if re.search(r"^(names|kpt_shape|train|val)\s*:", text, re.MULTILINE)}
    top = [name for name in yamls if not folder_of(name)]
    files = ["data.yaml"] if "data.yaml" in yamls else top or list(yamls)
    if len(files) > 1:
        raise DataError(f"{root}: several files have names of classes ({first_five(files)}): rename the right one to "
                        "data.yaml, or name its folder")
    for name in files:
        yaml = optional("yaml", f"{root / name}, which lists the classes,")
        try:
            if len(yamls[name]) > LARGEST:
                raise yaml.YAMLError(f"it has more than {LARGEST} characters")
            content = yaml.load(yamls[name], yaml.BaseLoader)
        except (yaml.YAMLError, RecursionError) as error:
            raise DataError(f"{root / name}: no names of classes: not YAML: {' '.join(str(error).split())}") from None
        return name, content if isinstance(content, dict) else {"names": content}
    for name in [name for name in names if name.endswith(".data")]:
        pairs = [line.split("=", 1) for line in read_text(root / name).split("\n") if "=" in line]
        content = {key.strip(): value.strip() for key, value in pairs}
        return name, {split: content[key] for split, key in (("train", "train"), ("val", "valid")) if key in content}
    return "", {}


def class_names(root: Path, names: list[str], config_name: str, config: dict,
                report: Report) -> tuple[dict[int, str] | None, list[str]]:
    """Names by class number and the lists that were read: from the config, else from classes.txt or Darknet's .names in
    whatever folder; None without any. Raises DataError."""
    lists = [name for name in names if Path(name).name.lower() == "classes.txt"
             or name.endswith((".names", "_darknet.labels"))]
    texts = {name: [line.strip() for line in read_text(root / name).rstrip().split("\n")] for name in lists}
    found = {}
    for name, content in ({config_name: config["names"]} if "names" in config else {} | texts).items():
        try:
            found[name] = checked_names(content)
        except ValueError as error:
            raise DataError(f"{root / name}: no names of classes: {error}") from None
    first = next(iter(found), None)
    differ = [name for name in texts if dict(enumerate(texts[name])) != found[first]]
    if differ and first != config_name:
        raise DataError(f"{root / first} and {root / differ[0]} list different classes: remove the wrong one")
    report.say("list", f"of other classes than {config_name}, which was followed", differ)
    return found.get(first), lists


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
