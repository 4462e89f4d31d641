"""`python data.py check DIR_OR_JSON...`: what is wrong with a data set, before training finds it.

Each finding is one line: an `error:` would end training, a `warning:` changes what is learnt, a `note:` is worth
knowing. The rules for a file are in coco.py, and all its `..._problems` are listed here. The sound entries are examined
further: the headers of their images (nothing is decoded, so only training finds a file that is cut off after its
header), their boxes and their classes. Names from a file are printed as Python literals: they may contain control
characters.
"""
import math
import os
from collections import Counter
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from formats.coco import (FORMS, KEYS, MAX_PIXELS, NAMES, DataError, UndecodableImage, category_problems, clipped,
                          content_problems, datasets, image_problems, line_about, load_json, small_problems,
                          sorted_classes, stated_exif)
from formats.pictures import folder_of_images, is_turned, read_header, remarks, undecodable_limit, usual_folders

FEW = 10         # boxes; a class with fewer is a finding
OUTSIDE = 0.1    # pixels that a box may reach out of its image, as rounded coordinates do


def check(paths: list[str], images: str | None = None, exif: str | None = None, max_pixels: int = MAX_PIXELS) -> bool:
    """Print the findings of each path, then a summary of each file. Returns whether any finding is an error.

    A path is what --data of train.py takes, or an annotation file, whose images are in the folder `images` (None: in
    a usual place). exif, max_pixels: see CocoBoxes. Raises DataError if `images` is given for a data set."""
    failed, summaries = False, []
    for path in paths:
        data_set = path in NAMES or os.path.isdir(path)
        if data_set and images:
            raise DataError(f"--images is for an annotation file; {path} is a data set with its own images")
        reading = dict(exif=exif, max_pixels=max_pixels)
        findings, lines = check_data_set(path, **reading) if data_set else check_file(path, images, **reading)[:2]
        for finding in findings:
            print(finding)
        failed |= any(finding.startswith("error: ") for finding in findings)
        summaries += lines
    print(*summaries, sep="\n")
    return failed


def check_data_set(data: str, **reading) -> tuple[list[str], list[str]]:
    """Findings and summaries of the train and val files. reading: `exif` and `max_pixels`."""
    (path, images), (val_path, val_images) = datasets(data)
    findings, summaries, classes = check_file(path, images, **reading)
    if data not in NAMES and not os.path.exists(val_path):
        return [*findings, f"note: {val_path} is missing: training runs without evaluation"], summaries
    val_findings, val_summaries, val_classes = check_file(val_path, val_images, evaluated=True, **reading)
    findings += val_findings
    if classes and val_classes:
        findings += errors(category_problems(path, classes, val_path, val_classes))
    return findings, summaries + val_summaries


def check_file(path: str, image_dir: str | None, evaluated: bool = False, exif: str | None = None,
               max_pixels: int = MAX_PIXELS) -> tuple[list[str], list[str], list[dict]]:
    """Findings, summary and classes (see CocoBoxes) of a file to train on, or to evaluate on if `evaluated`."""
    try:
        content = load_json(path)
    except DataError as error:
        return [f"error: {error}"], [f"{path}: not readable"], []
    findings = errors(content_problems(path, content))
    images, categories, annotations = (sound(content, kind) for kind in ("images", "categories", "annotations"))
    sizes, labels = {row["id"]: (row["height"], row["width"]) for row in images}, {row["id"] for row in categories}
    annotations = [row for row in annotations if row["image_id"] in sizes and row["category_id"] in labels]
    classes = sorted_classes(categories)
    if images:
        image_dir = image_dir or folder_of_images(path, images[0]["file_name"])
        findings += image_findings(path, images, image_dir, evaluated, exif or stated_exif(content), max_pixels)
    about_boxes, usable = box_findings(path, annotations, sizes)
    findings += about_boxes
    if usable:
        findings += class_findings(path, usable, images, classes)
    elif evaluated:
        findings.append(f"warning: {path} has no box to evaluate on")
    else:
        findings.append(f"error: {path} has no usable box to train on")
    return findings, [f"{path}: {len(images)} images, {len(usable)} boxes, {len(classes)} classes"], classes


def errors(problems: Iterator[str]) -> list[str]:
    return [f"error: {problem}" for problem in problems]


def sound(content, kind: str) -> list[dict]:
    """The entries of one list of a COCO file that have all its KEYS in their FORMS."""
    rows = content.get(kind) if isinstance(content, dict) else None
    forms = [(key, FORMS[key][0]) for key in KEYS[kind]]
    return [row for row in rows if type(row) is dict and all(key in row and right(row[key]) for key, right in forms)
            ] if isinstance(rows, list) else []


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
