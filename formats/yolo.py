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
from formats.files import counted, optional
from formats.folders import (Faults, Labelled, Report, Tails, as_number, checked_splits, folded, folder_of, header_in,
                             images_among, inventory, listed, names_in, part_of, parts_by_folder, read_text, stem_of,
                             within, write_splits)
from formats.pictures import Header, left_out, remarks

LARGEST = 2**20     # characters of data.yaml
OUTSIDE = 0.01      # rounded fractions may be slightly below 0 or above 1
BESIDE, OTHER = 3, 4    # of nearness, the last two
INSIDE = 0.02       # key points may be this far out of their box, in parts of the image's side


def write_yolo(root: str, exif: str = UPRIGHT, skip: bool = False, max_pixels: int = MAX_PIXELS) -> None:
    """Write the annotation files of a folder. Category ids are the numbers of the classes.

    exif: whether labels refer to the upright image or to the stored pixels. skip: leave out what cannot be converted,
    instead of refusing. Raises DataError; UserError if a YAML file is needed and PyYAML is not installed."""
    root, headers = Path(root), {}
    report = Report(root, skip, "image")
    names = names_in(report)
    configs = read_configs(root, names)
    classes, lists = class_names(root, names, configs, report)
    images, texts = images_among(names), [name for name in names if name.lower().endswith(".txt") and name not in lists]
    labels, others = label_files(images, texts)
    report.say("label file", "of an image that has another one, left out", others)
    if not labels:
        sought = f"; sought for {images[0]!r}: " + " or ".join(map(repr, sought_for(images[0]))) if images else ""
        raise DataError(f"{root}: no label file (.txt) belongs to an image{sought}{inventory(names, 'yolo')}")
    splits, parts_from = listed_splits(root, names, images, labels, configs, report)
    if not splits:
        all_images, images = images, labelled_folders(images, labels)
        report.say("image", "in folders without labels, left out", sorted({*all_images} - {*images}))
        splits = parts_by_folder({image: folder_of(image) for image in images})
    splits = checked_splits(splits, images, bool(parts_from), report)
    lines = report.read_all(sum(splits.values(), []), lambda image: read_lines(root, labels.get(image)))
    with_points = key_points(configs, [fields for of_image in lines.values() for _, fields in of_image], report)
    for group in sharing(lines, labels):
        report.fault(group, ("images that share a label file", " and ".join(map(repr, group))))

    def labelled(image: str) -> Labelled:
        headers[image] = header = header_in(root, image)
        size = header.upright if exif == UPRIGHT else header.size
        return Labelled(image, size, yolo_boxes(labels.get(image), lines[image], size, classes, with_points))

    found = report.read_all([image for image in lines if image not in report.bad], labelled)
    report.refuse()
    splits = {split: [found[image] for image in part if image in found] for split, part in splits.items()}
    polygons = [image for image in found for _, fields in lines[image]
                if len(fields) > 6 and len(fields) != with_points]
    say_of_images(report, found, labels, polygons)
    say_of_exif(report, headers, exif, max_pixels)
    used = {*images_among(names), *labels.values(), *others, *lists, *parts_from, *configs}
    report.say("text file", "without an image, left out", [name for name in texts if name not in used])
    report.said += left_out([name for name in names if name not in {*used, *texts}])
    if classes is None:
        classes = {box["class"]: str(box["class"]) for image in found.values() for box in image.boxes}
        report.said.append("no data.yaml with names and no classes.txt: the classes are named after their numbers")
    write_splits("yolo", splits, {number: {"id": number, "name": classes[number]} for number in sorted(classes)}, exif,
                 report)


def say_of_images(report: Report, found: dict[str, Labelled], labels: dict[str, str], polygons: list[str]) -> None:
    """Images without objects and, an image for each, polygons."""
    without = [image for image in found if image not in labels]
    empty = [image for image in found if image in labels and not found[image].boxes]
    report.say("image", "without a label file, so without objects", without)
    report.say("image", "with an empty label file, so without objects", empty)
    report.say("polygon", "of which the box was taken", polygons)


def say_of_exif(report: Report, headers: dict[str, Header], exif: str, max_pixels: int) -> None:
    """The remarks on images. No size is stated here, so it never tells which image a label is drawn on."""
    turned = [image for image, header in headers.items() if header.orientation != 1]
    report.say("image", f"turned or mirrored by EXIF, whose labels were taken for those of the {exif} image; --exif "
               "decides otherwise", turned)
    report.said += remarks({image: headers[image]._replace(orientation=1) for image in headers}, exif, max_pixels)


# -------------------------------------------------------------------------------------------- files and parts

def label_files(images: list[str], texts: list[str]) -> tuple[dict[str, str], list[str]]:
    """The label file of each image that has one, and the other label files of these images.

    Of all pairs of one name, in whatever case, the nearest count. A folder serves the nearest folders of images alone,
    and one of another name than `labels` only those that no other serves: txt/ has the labels of photos/, but not if
    labels/ has some. (It has no images, either: those may have lost theirs.)"""
    by_stem, with_images = {}, {folder_of(image) for image in images}
    for text in texts:
        by_stem.setdefault(folded(stem_of(text)), []).append(text)
    pairs = [(nearness(folder_of(image), folder_of(text)), stem_of(text) not in (stem_of(image), Path(image).name),
              image, text) for image in images
             for text in by_stem.get(folded(stem_of(image)), []) + by_stem.get(folded(Path(image).name), [])]
    pairs = sorted(pair for pair in pairs if pair[0])
    served = {folder_of(image) for rank, _, image, _ in pairs if rank < OTHER}
    found, best, nearest = {}, {}, {}
    for rank, other_case, image, text in pairs:
        folder = folder_of(text)
        if nearest.setdefault(folder, rank) < rank != BESIDE:
            continue
        if rank == OTHER and (folder_of(image) in served or folder in with_images):
            continue
        if best.setdefault(text, (rank, other_case)) == (rank, other_case):      # else it is that of a nearer image
            found.setdefault(image, text)
    return found, sorted({*best} - {*found.values()})


def nearness(image: tuple[str, ...], label: tuple[str, ...]) -> int:
    """How well the folder of a label file suits that of an image: 1, `images` in a name became `labels`, as in
    train_images/ and train_labels/; 2, a name was replaced by `labels`, or that put in; BESIDE, they are one; OTHER,
    another name was replaced, put in or left out; 0, it does not."""
    start = len(os.path.commonprefix([image, label]))
    end = len(os.path.commonprefix([image[start:][::-1], label[start:][::-1]]))
    old, new = ("/".join(x[start:len(x) - end]).lower() for x in (image, label))
    if image == label:
        return BESIDE
    if "/" in old + new or len({part_of(image), part_of(label)} - {""}) > 1:
        return 0
    return 1 if new and new == old.replace("image", "label") else 2 if new == "labels" else OTHER


def sought_for(image: str) -> list[str]:
    """Where the label file of an image would be, for an error."""
    folders, file = folder_of(image), f"{stem_of(image)}.txt"
    swapped = [folder.replace("image", "label") for folder in folders]
    return ["/".join((*each, file)) for each in dict.fromkeys([folders, tuple(swapped), (*folders, "labels")])]


def labelled_folders(images: list[str], labels: dict[str, str]) -> list[str]:
    """The images of folders that have labels, or are named images or after a part: others may be anything."""
    with_labels, found = {folder_of(image) for image in labels}, []
    for image in images:
        folders = list(map(str.lower, folder_of(image)))
        named = "images" in folders or part_of(folder_of(image)) and "labels" not in folders
        found += [image] * bool(folder_of(image) in with_labels or named)
    return found


def sharing(images: list[str], labels: dict[str, str]) -> list[list[str]]:
    """The groups of images that share a label file."""
    of_label = {}
    for image in images:
        if image in labels:
            of_label.setdefault(labels[image], []).append(image)
    return [group for group in of_label.values() if len(group) > 1]


def listed_splits(root: Path, names: list[str], images: list[str], labels: dict[str, str], configs: dict[str, dict],
                  report: Report) -> tuple[dict[str, list[str]], list[str]]:
    """The images of each split as the configs or lists in DIR say, and the files that do; empty if none does.

    Raises DataError if what is to be trained on is not in DIR."""
    entries = [(name, split, config[split]) for name, config in configs.items() for split in ("train", "val")
               if config.get(split)]
    if not entries:
        lists = {name: part_of((stem_of(name),)) for name in names if not folder_of(name) and name.endswith(".txt")}
        entries = [(name, part, name) for name, part in lists.items()
                   if part in ("train", "val") and name not in labels.values()]
    tails, splits, used = Tails(images), {}, []
    for name, split, entry in entries:
        for text in entry if isinstance(entry, list) else [entry]:
            if not isinstance(text, str):               # aliases of YAML: it may be exponentially large
                raise DataError(f"{root / name}: {split}: expected a path, or a list of paths")
            base, below = (root / name).parent, f"{configs.get(name, {}).get('path', '')}/{text}"
            path = within(base, below) or within(base, text) or within(root, text)
            missing = f"{name}: {split}: {text!r:.80} is not in {root}"
            splits.setdefault(split, [])
            used.append(name)
            if path is not None and path.is_file():
                used.append(path.relative_to(root).as_posix())
                splits[split] += listed(root, used[-1], tails)
            elif path is not None:
                folder = path.relative_to(root).parts
                splits[split] += [image for image in images if folder_of(image)[:len(folder)] == folder]
            elif split == "train":
                raise DataError(f"{missing}; mend the line, or remove it and name folders train and val"
                                + inventory(names, "yolo"))
            else:
                report.said.append(missing)
    if used:
        report.facts.append(f"parts as {first_five(list(dict.fromkeys(used)))} say")
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
               classes: dict[int, str] | None, with_points: int | None) -> list[dict]:
    """Boxes of Labelled. size: (height, width); with_points: the count of numbers of a box with key points. Raises
    Faults."""
    (height, width), boxes, faults = size, [], []
    for number, fields in lines:
        try:
            x0, y0, x1, y1 = yolo_box(fields[:5] if len(fields) == with_points else fields)
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
    if len(fields) == 7 and re.fullmatch("[0-9]+", fields[6]):
        raise ValueError("lines of a box, a confidence and the number of a track; to train on them, remove these (cut "
                         "-d ' ' -f 1-5)", f"{' '.join(fields[5:])!r:.40}")
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

def key_points(configs: dict[str, dict], lines: list[list[str]], report: Report) -> int | None:
    """The count of numbers in a line that are a box and key points, not a polygon; None if there are none.

    data.yaml's kpt_shape says so. Without it: if all lines beyond 5 numbers have one count, every box lies in its image
    and has its points inside, and the numbers cannot be a polygon's."""
    long = [fields for fields in lines if len(fields) > 6]
    try:
        points, dims = map(int, list(next(config["kpt_shape"] for config in configs.values() if "kpt_shape" in config)))
        count = 5 + points * dims
        taken = sum(len(fields) == count for fields in long)
        report.said += [f"{counted(taken, 'line')} with key points, of which the box was taken"] * bool(taken)
        return count
    except (StopIteration, TypeError, ValueError):
        counts = {len(fields) for fields in long}
    if len(counts) == 1:
        (count,) = counts
        for dims in (3, 2):
            if (count - 5) % dims == 0 and are_key_points(long, dims):
                report.said.append(f"{counted(len(long), 'line')} of {count} numbers, taken for a box and "
                                   f"{(count - 5) // dims} key points of {dims}; kpt_shape in data.yaml would say")
                return count
    return None


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

def read_configs(root: Path, names: list[str]) -> dict[str, dict]:
    """The content of data.yaml, or of the YAML files with names at the top or else below, or of Darknet's .data files,
    by name. Every scalar stays text: a class may be called 7, no or null.

    Raises DataError; UserError without PyYAML."""
    yamls = {name: read_text(root / name) for name in names if name.endswith((".yaml", ".yml"))}
    yamls = {name: text for name, text in yamls.items()
             if re.search(r"^(names|kpt_shape)\s*:", text, re.MULTILINE)
             or Path(name).name == "data.yaml" and re.search(r"^(train|val)\s*:", text, re.MULTILINE)}
    found = {}
    for name in ["data.yaml"] if "data.yaml" in yamls else [name for name in yamls if not folder_of(name)] or yamls:
        yaml = optional("yaml", f"{root / name}, which lists the classes,")
        try:
            if len(yamls[name]) > LARGEST:
                raise yaml.YAMLError(f"it has more than {LARGEST} characters")
            content = yaml.load(yamls[name], yaml.BaseLoader)
        except (yaml.YAMLError, RecursionError) as error:
            raise DataError(f"{root / name}: no names of classes: not YAML: {' '.join(str(error).split())}") from None
        found[name] = content if isinstance(content, dict) else {"names": content}
    for name in [] if found else [name for name in names if name.endswith(".data")]:
        text = (root / name).read_bytes()[:2**16].decode("utf-8", "ignore")
        entries = dict(re.findall(r"^\s*(train|valid)\s*=\s*(\S.*?)\s*$", text, re.MULTILINE))
        found |= {name: {"train": entries.get("train"), "val": entries.get("valid")}} if entries else {}
    return found


def class_names(root: Path, names: list[str], configs: dict[str, dict],
                report: Report) -> tuple[dict[int, str] | None, list[str]]:
    """Names by class number and the lists that were read: from the configs, else from classes.txt or Darknet's .names
    in whatever folder; None without any. Raises DataError, also where two differ."""
    lists = [name for name in names if Path(name).name.lower() == "classes.txt"
             or name.endswith((".names", "_darknet.labels"))]
    texts = {name: [line.strip() for line in read_text(root / name).rstrip().split("\n")] for name in lists}
    sources = {name: config["names"] for name, config in configs.items() if "names" in config} or texts
    found = {}
    for name, content in sources.items():
        try:
            found[name] = checked_names(content)
        except ValueError as error:
            raise DataError(f"{root / name}: no names of classes: {error}") from None
    first = next(iter(found), None)
    other = next((name for name in found if found[name] != found[first]), None)
    if other is not None:
        raise DataError(f"{root / first} and {root / other} list different classes: remove the wrong one, or convert "
                        "their folders one by one")
    report.say("list", f"of other classes than {first}, which was followed",
               [name for name in texts if dict(enumerate(texts[name])) != found[first]])
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
