"""What is wrong with a data set, said before training finds it: `python data.py check DIR_OR_JSON...`.

`check` prints a line for each finding: an `error:` would end training, a `warning:` changes what is learnt, a `note:`
is good to know. How a file must be is said in coco.py alone, whose `..._problems` are all listed here; the entries that
are sound in spite of them are looked at more closely: `image_findings` reads the headers of the images (they are
not decoded, so one that breaks off after its header is found in training only), then come boxes and classes.

Names that come from a file are printed as Python would write them, since they may hold control characters.
"""
import os
from collections import Counter
from collections.abc import Iterator

import numpy as np
from PIL import Image
from tqdm import tqdm

from formats.coco import (FORMS, KEYS, NAMES, DataError, category_problems, clipped, content_problems, datasets,
                          image_problems, load_json, named, small_problems)
from formats.pictures import as_stated, candidates, folder_of_images

FEW = 10         # boxes; a class of fewer is named
OUTSIDE = 0.1    # pixels by which a box may reach out of its image unnoticed: rounded coordinates do


def check(paths: list[str], images: str | None = None) -> bool:
    """Print the findings of each path and at the end a summary of each file; -> whether one is an error.

    A path is an annotation file, with its images in the folder `images` (None: looked for), or what --data of
    train.py takes. Raises DataError where `images` is given with a folder."""
    failed, summaries = False, []
    for path in paths:
        folder = path in NAMES or os.path.isdir(path)
        if folder and images:
            raise DataError(f"--images is for an annotation file; {path} is a folder with images of its own")
        findings, ends = check_folder(path) if folder else check_file(path, images)[:2]
        for finding in findings:
            print(finding)
        failed |= any(finding.startswith("error: ") for finding in findings)
        summaries += ends
    print(*summaries, sep="\n")
    return failed


def check_folder(data: str) -> tuple[list[str], list[str]]:
    """Findings and summaries of the file to train on and the file to evaluate on."""
    (path, images), (val_path, val_images) = datasets(data)
    findings, summaries, classes = check_file(path, images)
    if data not in NAMES and not os.path.exists(val_path):
        return [*findings, f"note: {val_path} is missing: training goes without evaluation"], summaries
    val_findings, val_summaries, val_classes = check_file(val_path, val_images, evaluated=True)
    findings += val_findings
    if classes and val_classes:
        findings += errors(category_problems(path, classes, val_path, val_classes))
    return findings, summaries + val_summaries


def check_file(path: str, image_dir: str | None, evaluated: bool = False) -> tuple[list[str], list[str], list[dict]]:
    """-> findings; the summary; the classes as in CocoBoxes. `evaluated`: nothing is learnt from this file."""
    try:
        content = load_json(path)
    except DataError as error:
        return [f"error: {error}"], [f"{path}: not readable"], []
    findings = errors(content_problems(path, content))
    images, categories, annotations = (sound(content, kind) for kind in ("images", "categories", "annotations"))
    sizes, labels = {row["id"]: (row["height"], row["width"]) for row in images}, {row["id"] for row in categories}
    annotations = [row for row in annotations if row["image_id"] in sizes and row["category_id"] in labels]
    classes = [{"id": row["id"], "name": row["name"]} for row in sorted(categories, key=lambda row: row["id"])]
    if images:
        image_dir = image_dir or folder_of_images(path, images[0]["file_name"])
        findings += image_findings(path, images, image_dir, evaluated)
    of_boxes, usable = box_findings(path, annotations, sizes)
    findings += of_boxes
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
    """The entries of one list of a COCO file that have all they need, each in its form."""
    rows = content.get(kind) if isinstance(content, dict) else None
    forms = [(key, FORMS[key][0]) for key in KEYS[kind]]
    return [row for row in rows if type(row) is dict and all(key in row and right(row[key]) for key, right in forms)
            ] if isinstance(rows, list) else []


# ---------------------------------------------------------------------------------------------- images



def image_findings(path: str, images: list[dict], image_dir: str | None, evaluated: bool) -> list[str]:
    """Images that are missing, cannot be read, have another size than stated, or stand in the file twice."""
    if image_dir is None:
        tried = ", ".join(candidates(path))
        return [f"error: {path}: its first image {images[0]['file_name']!r} is in none of {tried}: "
                "name the folder of the images with --images"]
    findings = errors(image_problems(path, images, image_dir))
    read, unreadable, wrong = 0, [], {}
    for i, row in enumerate(tqdm(images, "reading headers", unit="image", disable=None)):
        file = os.path.join(image_dir, row["file_name"])
        try:
            with Image.open(file) as image:
                width, height = image.size
                as_stated(image, file, (row["height"], row["width"]))
            read += 1
        except (FileNotFoundError, NotADirectoryError):
            continue                                        # among the missing
        except DataError:
            wrong[i] = f"{row['file_name']!r} is {width} x {height}, not {row['width']} x {row['height']} pixels"
        except Exception:                                   # Pillow: OSError, SyntaxError, ValueError, ...
            unreadable.append(i)
    if wrong:
        findings += errors(named(path, "images", images, list(wrong), "have another size than it states, the first: "
                                 + next(iter(wrong.values()))))
    if unreadable:
        # so many end a run (check_skipped in train.py), and an evaluation ends at the first
        too_many = not read and not wrong or len(unreadable) > min(100, max(10, len(images) // 100))
        end = "an evaluation ends there" if evaluated else "too many to train" if too_many else "skipped in training"
        why = f"cannot be decoded ({end}), the first: {images[unreadable[0]]['file_name']!r}"
        findings += [f"{'error' if too_many or evaluated else 'warning'}: {text}"
                     for text in named(path, "images", images, unreadable, why)]
    again = repeated([row["file_name"] for row in images])
    if again:
        why = f"have the file of another one, the first: {images[again[0]]['file_name']!r}"
        findings += [f"warning: {text}" for text in named(path, "images", images, again, why)]
    return findings


def repeated(values: list) -> list[int]:
    """The places of values that an earlier one equals."""
    first = {}
    return [i for i, value in enumerate(values) if first.setdefault(value, i) != i]


# -------------------------------------------------------------------------------------- boxes and classes

def box_findings(path: str, annotations: list[dict],
                 sizes: dict[int, tuple[int, int]]) -> tuple[list[str], list[dict]]:
    """-> boxes that are left out, clipped or repeated; the annotations to learn from. sizes: (height, width) of the
    images by their id."""
    limits = np.array([sizes[row["image_id"]] for row in annotations], np.int64).reshape(-1, 2)
    edges, crowd, small = clipped(annotations, limits)
    xywh = np.array([row["bbox"] for row in annotations], np.float64).reshape(-1, 4)
    drawn = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
    outside = (np.abs(drawn - edges) > OUTSIDE).any(1) & ~crowd & ~small
    usable = np.flatnonzero(~crowd & ~small)
    again = repeated([(annotations[i]["image_id"], annotations[i]["category_id"], *annotations[i]["bbox"])
                      for i in usable])
    findings = [f"warning: {problem}" for problem in small_problems(path, annotations, small)]
    for level, places, why in (("warning", np.flatnonzero(outside), "reach out of their image: clipped"),
                               ("warning", usable[again], "are exact copies of another one"),
                               ("note", np.flatnonzero(crowd), "are of crowds: left out")):
        findings += [f"{level}: {text}" for text in named(path, "boxes", annotations, places.tolist(), why)]
    return findings, [annotations[i] for i in usable]


def class_findings(path: str, usable: list[dict], images: list[dict], classes: list[dict]) -> list[str]:
    """Classes of few boxes, and images without any."""
    findings, count = [], Counter(row["category_id"] for row in usable)
    few = [f"{row['name']!r:.40} ({count[row['id']]})" for row in classes if count[row["id"]] < FEW]
    if few:
        names = ", ".join(few[:100]) + (", ..." if len(few) > 100 else "")
        findings.append(f"warning: {path}: {len(few)} of {len(classes)} classes have fewer than {FEW} boxes: {names}")
    filled = {row["image_id"] for row in usable}
    empty = [i for i, row in enumerate(images) if row["id"] not in filled]
    return findings + [f"note: {text}" for text in named(path, "images", images, empty, "have no boxes")]
