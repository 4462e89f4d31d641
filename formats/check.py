"""`python data.py check DIR_OR_JSON...`: what is wrong with a data set, before training finds it.

Each finding is one line: an `error:` would end training, a `warning:` changes what is learnt, a `note:` is worth
knowing. The rules for a file are in coco.py, and all its `..._problems` are listed here. The sound entries are examined
further: the headers of their images (nothing is decoded, so only training finds a file that is cut off after its
header), their boxes and their classes. Names from a file are printed as Python literals: they may contain blanks
and quotes.
"""
import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from formats.coco import (FORMS, KEYS, MAX_PIXELS, NAMES, OPTIONAL, SHOWN, DataError, UndecodableImage,
                          category_problems, clipped, content_problems, converted_from, datasets, first_five,
                          image_problems, line_about, load_json, mask_flaws, mask_problems, mask_warnings,
                          no_usable_box, other_files, small_problems, sorted_classes, stated_exif)
from formats.conventions import differs, extent, other_convention
from formats.files import counted, printable
from formats.pictures import (folder_of_images, is_image, is_turned, read_header, remarks, undecodable_limit,
                              usual_folders)

FEW = 10         # boxes; a class with fewer is a finding
OUTSIDE = 0.1    # pixels that a box may reach out of its image, as rounded coordinates do
# keys with a meaning elsewhere, of annotations or of their "attributes", and what happens to these
UNUSED = {"rotation": "the box stays upright", "angle": "the box stays upright",
          "ignore": "the box counts as others do", "difficult": "the box counts as others do"}


def check(paths: list[str], images: str | None = None, exif: str | None = None, max_pixels: int = MAX_PIXELS) -> bool:
    """Print the findings of each path, then a summary of each file. Returns whether any finding is an error.

    A path is what --data of train.py takes, or an annotation file, whose images are in the folder `images` (None: in
    a usual place). exif, max_pixels: see CocoBoxes. Raises DataError if `images` is given for a data set."""
    failed, summaries = False, []
    for path in paths:
        data_set = path in NAMES or os.path.isdir(path)
        masks = os.path.join(path, "masks.json")
        if data_set and os.path.isfile(masks) and not os.path.exists(os.path.join(path, "annotations")):
            raise DataError(f"{path} is what predict.py wrote: name {masks}, and its images with --images")
        if data_set and images:
            raise DataError(f"--images is for an annotation file; {path} is a data set with its own images")
        reading = dict(exif=exif, max_pixels=max_pixels)
        if data_set:
            findings, lines = check_data_set(path, **reading)
        else:
            findings, lines, _, listed = check_file(path, images, **reading)
            findings += unlisted_images(listed)
        for finding in findings:
            print(printable(finding))
        failed |= any(finding.startswith("error: ") for finding in findings)
        summaries += lines
    print(*map(printable, summaries), sep="\n")
    return failed


def check_data_set(data: str, **reading) -> tuple[list[str], list[str]]:
    """Findings and summaries of the train and val files. reading: `exif` and `max_pixels`."""
    (path, images), (val_path, val_images) = datasets(data)
    findings, summaries, classes, listed = check_file(path, images, **reading)
    if data not in NAMES and not os.path.exists(val_path):
        findings.append(f"note: {val_path} is missing: training runs without evaluation")
    else:
        val_findings, val_summaries, val_classes, val_listed = check_file(val_path, val_images, True, **reading)
        findings, summaries, listed = findings + val_findings, summaries + val_summaries, listed | val_listed
        if classes and val_classes:
            findings += errors(category_problems(path, classes, val_path, val_classes))
    others = other_files(path, val_path)
    if others:
        findings.append(f"note: {counted(len(others), 'other JSON file')} not used ({first_five(others)}): train.py "
                        "takes them with --train-json and --train-images, --val-json and --val-images")
    return findings + unlisted_images(listed), summaries


def check_file(path: str, image_dir: str | None, evaluated: bool = False, exif: str | None = None,
               max_pixels: int = MAX_PIXELS) -> tuple[list[str], list[str], list[dict], set[str]]:
    """Findings, summary, classes (see CocoBoxes) and paths of the images of a file to train on, or to evaluate on if
    `evaluated`."""
    try:
        content = load_json(path)
    except DataError as error:
        return [f"error: {error}"], [f"{path}: not readable"], [], set()
    findings = errors(content_problems(path, content))
    images, categories, annotations = (sound(content, kind) for kind in ("images", "categories", "annotations"))
    sizes, labels = {row["id"]: (row["height"], row["width"]) for row in images}, {row["id"] for row in categories}
    annotations = [row for row in annotations if row["image_id"] in sizes and row["category_id"] in labels]
    classes = sorted_classes(categories)
    if converted_from(content):
        show_names(images, classes, annotations)
    if images:
        image_dir = image_dir or folder_of_images(path, images[0]["file_name"])
        findings += image_findings(path, images, image_dir, evaluated, exif or stated_exif(content), max_pixels)
    about_boxes, usable = box_findings(path, annotations, sizes)
    findings += about_boxes + mask_findings(path, annotations, sizes, evaluated)
    findings += unused_keys(path, annotations) + name_findings(path, classes)
    if usable:
        findings += class_findings(path, usable, images, classes)
    else:
        findings.append(f"{'warning' if evaluated else 'error'}: {no_usable_box(path, annotations)}")
    summary = f"{counted(len(images), 'image')}, {counted(len(usable), 'box')}, {counted(len(classes), 'class')}"
    listed = {os.path.normpath(os.path.join(image_dir, row["file_name"])) for row in images if image_dir}
    return findings, [f"{path}: {summary}"], classes, listed


def errors(problems: Iterator[str]) -> list[str]:
    return [f"error: {problem}" for problem in problems]


def sound(content, kind: str) -> list[dict]:
    """The entries of one list of a COCO file that have all its KEYS in their FORMS, without an OPTIONAL one that is
    not."""
    rows = content.get(kind) if isinstance(content, dict) else None
    forms, optional = ([(key, FORMS[key][0]) for key in keys.get(kind, ())] for keys in (KEYS, OPTIONAL))
    return [row | {key: None for key, right in optional if not right(row.get(key))} for row in rows
            if type(row) is dict and all(key in row and right(row[key]) for key, right in forms)
            ] if isinstance(rows, list) else []


def show_names(images: list[dict], classes: list[dict], annotations: list[dict]) -> None:
    """Let messages name files, classes and boxes: in a converted file nobody but the conversion knows the ids."""
    files, names = {row["id"]: row["file_name"] for row in images}, {row["id"]: row["name"] for row in classes}
    for row in images:
        row[SHOWN] = repr(row["file_name"])
    for row in annotations:
        bbox = ", ".join(map("{:g}".format, row["bbox"]))
        row[SHOWN] = f"{files[row['image_id']]!r}: {names[row['category_id']]!r:.40} [{bbox}]"


# ---------------------------------------------------------------------------------------------- images

def image_findings(path: str, images: list[dict], image_dir: str | None, evaluated: bool, exif: str,
                   max_pixels: int) -> list[str]:
    """Images that are missing, unreadable, too large, of another size than stated, or listed twice, and `remarks`."""
    if image_dir is None:
        tried = ", ".join(usual_folders(path))
        return [f"error: {path}: its first image {images[0]['file_name']!r} is in none of {tried}: "
                "name its folder with --images"]
    findings = errors(image_problems(path, images, image_dir))
    sound_images, unreadable, too_large, wrong_size, headers = 0, [], [], {}, {}
    for i, row in enumerate(tqdm(images, "reading headers", unit="image", disable=None)):
        file = os.path.join(image_dir, row["file_name"])
        if not os.path.exists(file):
            continue                                        # image_problems has listed it
        try:
            headers[row["file_name"]] = header = read_header(file)
            is_turned(header, file, (row["height"], row["width"]))
            sound_images += header.pixels <= max_pixels
            too_large += [i] * (header.pixels > max_pixels)
        except UndecodableImage:
            unreadable.append(i)
        except DataError:
            height, width = header.size
            wrong_size[i] = f"{row['file_name']!r} is {width} x {height}, not {row['width']} x {row['height']} pixels"
    if wrong_size:
        why = f"have another size than it states, the first: {next(iter(wrong_size.values()))}"
        findings += errors(line_about(path, "images", images, list(wrong_size), why))
    undecodable = len(unreadable) + len(too_large)
    too_many = not sound_images and not wrong_size or undecodable > undecodable_limit(len(images))
    effect = "evaluation would end" if evaluated else "too many to train" if too_many else "skipped in training"
    for indices, why in ((unreadable, "cannot be decoded"), (too_large, f"have more than {max_pixels} pixels, raise "
                                                             "--max-pixels")):
        if indices:
            why = f"{why} ({effect}), the first: {images[indices[0]]['file_name']!r}"
            findings += [f"{'error' if too_many or evaluated else 'warning'}: {text}"
                         for text in line_about(path, "images", images, indices, why)]
    findings += [f"{level}: {path}: {line}" for level in ("warning", "note")
                 for line in remarks(headers, exif, math.inf, (level,))]
    copies = repeated([row["file_name"] for row in images])
    if copies:
        why = f"have the file of an earlier one, the first: {images[copies[0]]['file_name']!r}"
        findings += [f"warning: {text}" for text in line_about(path, "images", images, copies, why)]
    return findings


def unlisted_images(listed: set[str]) -> list[str]:
    """A note of images that are in a folder of those listed, but not among them. Only these folders are looked into."""
    found = []
    for folder in sorted({os.path.dirname(path) for path in listed}):
        with contextlib.suppress(OSError):          # a missing folder has its own finding
            paths = [os.path.join(folder, name) for name in os.listdir(folder or os.curdir) if name[0] != "."]
            found += [path for path in paths if path not in listed and is_image(path)]
    verb = "is" if len(found) == 1 else "are"
    return [f"note: {counted(len(found), 'image')} beside those of the annotations {verb} in no file "
            f"({first_five(sorted(found))})"] if found else []


def repeated(values: list) -> list[int]:
    """The indices of values that equal an earlier one."""
    first = {}
    return [i for i, value in enumerate(values) if first.setdefault(value, i) != i]


# -------------------------------------------------------------------------------------- boxes and classes

def box_findings(path: str, annotations: list[dict],
                 sizes: dict[int, tuple[int, int]]) -> tuple[list[str], list[dict]]:
    """Findings about boxes that are left out, clipped or repeated, and the annotations to learn from.

    sizes: (height, width) by image id."""
    limits = np.array([sizes[row["image_id"]] for row in annotations], np.int64).reshape(-1, 2)
    edges, crowd, small = clipped(annotations, limits)
    xywh = np.array([row["bbox"] for row in annotations], np.float64).reshape(-1, 4)
    stated = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
    outside = (np.abs(stated - edges) > OUTSIDE).any(1) & ~crowd & ~small
    usable = np.flatnonzero(~crowd & ~small)
    copies = repeated([(annotations[i]["image_id"], annotations[i]["category_id"], *annotations[i]["bbox"])
                       for i in usable])
    findings = [f"warning: {problem}" for problem in small_problems(path, annotations, small)]
    for level, indices, why in (("warning", np.flatnonzero(outside), "reach out of their image: clipped"),
                                ("warning", usable[copies], "are exact copies of an earlier one"),
                                ("note", np.flatnonzero(crowd), "are crowds: left out")):
        findings += [f"{level}: {text}" for text in line_about(path, "boxes", annotations, indices.tolist(), why)]
    return findings, [annotations[i] for i in usable]


def class_findings(path: str, usable: list[dict], images: list[dict], classes: list[dict]) -> list[str]:
    """Classes with few boxes and images with none."""
    findings, count = [], Counter(row["category_id"] for row in usable)
    few = [f"{row['name']!r:.40} ({count[row['id']]})" for row in classes if count[row["id"]] < FEW]
    if few:
        names = ", ".join(few[:100]) + (", ..." if len(few) > 100 else "")
        findings.append(f"warning: {path}: {len(few)} of {len(classes)} classes have fewer than {FEW} boxes: {names}")
    filled = {row["image_id"] for row in usable}
    empty = [i for i, row in enumerate(images) if row["id"] not in filled]
    return findings + [f"note: {text}" for text in line_about(path, "images", images, empty, "have no boxes")]


def mask_findings(path: str, annotations: list[dict], sizes: dict[int, tuple[int, int]], evaluated: bool) -> list[str]:
    """Masks that cannot be used, and boxes that masks, areas and edges show to follow another convention."""
    of_rows = [sizes[row["image_id"]] for row in annotations]
    flaws = mask_flaws(annotations, of_rows, range(len(annotations)))
    level, effect = ("error", "") if evaluated else (
        "warning", "; training from boxes does not read it, evaluation and --method condinst would refuse it")
    findings = [f"{level}: {problem}{effect}" for problem in mask_problems(path, annotations, flaws)]
    findings += [f"warning: {text}" for text in mask_warnings(path, annotations, flaws)]
    flawed = {i for bad in flaws.values() for i in bad}
    boxes = [i for i, row in enumerate(annotations) if not row.get("iscrowd") and i not in flawed]
    rows = [annotations[i] for i in boxes]
    bbox = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    extents = np.array([extent(row.get("segmentation"), of_rows[i]) for i, row in zip(boxes, rows)]).reshape(-1, 4)
    guess = rows and other_convention(bbox, np.array([of_rows[i] for i in boxes]),
                                      np.array([row.get("area") for row in rows], np.float64), extents)
    corners = np.concatenate([bbox[:, :2], bbox[:, :2] + bbox[:, 2:]], 1)
    off = np.flatnonzero(differs(corners, extents, 0.25)).tolist()
    if guess:
        findings += [f"warning: {text}" for text in line_about(
            path, "boxes", rows, guess[1], f"look like {guess[0]}, not like COCO's xywh in pixels")]
    elif len(off) > len(rows) / 2:
        findings += [f"warning: {text}"
                     for text in line_about(path, "boxes", rows, off, "are not those of their masks")]
    return findings


def unused_keys(path: str, annotations: list[dict]) -> list[str]:
    """Keys that say what the programs do not follow."""
    findings = []
    for key, effect in UNUSED.items():
        rows = {i for i, row in enumerate(annotations) for holder in (row, row.get("attributes"))
                if type(holder) is dict and holder.get(key) not in (None, False, 0, "", "0", "false", "False")}
        findings += [f"warning: {text}" for text in line_about(path, "annotations", annotations, sorted(rows),
                                                               f"have {key!r}, which is not followed: {effect}")]
    return findings


def name_findings(path: str, classes: list[dict]) -> list[str]:
    """Classes whose names are equal, or differ only in case or in blanks around them."""
    alike = {}
    for row in classes:
        alike.setdefault(row["name"].strip().casefold(), []).append(row)
    return [f"warning: {path}: {len(rows)} classes have "
            + ("one name" if len({row["name"] for row in rows}) == 1 else "names that differ only in case or blanks")
            + " (" + first_five([f"{row['name']!r:.40} id {row['id']}" for row in rows]) + ")"
            for rows in alike.values() if len(rows) > 1]
