"""COCO annotation files: found (`datasets`), checked, read into flat arrays (`CocoBoxes`) and written (`write_files`).

The functions named `..._problems` yield everything that is wrong with a file, one line each, with the file, the ids and
what to do: check.py prints them all, reading raises the first as a DataError. Boxes are xyxy in pixels, sizes (height,
width). `segmentation` is read only with `masks` or `evaluated`, never for learning from boxes.
"""
import contextlib
import gc
import json
import os
import re
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from formats.files import UserError, check_ordinary, replacing, warn
from formats.segmentation import SHORT, compressed, flaw, polygons

# the 80 classes of COCO; their ids go up to 90, with gaps
COCO_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush").split(", ")
COCO_IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
COCO_CLASSES = [{"id": number, "name": name} for number, name in zip(COCO_IDS, COCO_NAMES)]

# Where the images of a split are. Another data set that --data finds by its name in datasets/ is one line here ...
NAMES = {"coco": "{split}2017", "cityscapes": "leftImg8bit/{split}", "food": "{split}2017", "shapes": "{split}2017"}
# ... and another layout of folders, told by the first of these that exists, is one here; "" is the folder itself.
LAYOUTS = {"leftImg8bit": "leftImg8bit/{split}", "train2017": "{split}2017", "images": ""}
MADE_BY = "boxes converted by: python data.py "    # such a file begins with it, so `is_ours` reads no more than that

CONVERT = ("labels in the layout of Pascal VOC or YOLO become COCO files by: python data.py voc DIR, "
           "python data.py yolo DIR")
GET_DATA = ("put train2017/, val2017/ and annotations/ of cocodataset.org into datasets/coco, "
            "or draw the small set: python data.py shapes datasets/shapes; "
            "or convert Cityscapes: python data.py cityscapes datasets/cityscapes")
SHOWN = ("shown",)      # a key that no JSON file has: what messages call an entry in place of its id


def advice(path: str) -> str:
    """What to do about a missing file or folder."""
    return GET_DATA if str(path).startswith("datasets" + os.sep) else CONVERT


# How images are read: --exif, for those whose size does not tell whether their boxes are those of the upright image or
# of the pixels as stored; --max-pixels, a limit against files made to fill the memory (Pillow's own).
UPRIGHT, STORED = "upright", "stored"
MAX_PIXELS = 178_956_970


class DataError(UserError):
    """A mistake in the data, as one line for the user."""


class UndecodableImage(DataError):
    """An image cannot be decoded: skipped in training, an error in evaluation."""


def datasets(data: str, train_json=None, train_images=None, val_json=None, val_images=None):
    """The files of `data`, one of NAMES or a folder: ((train_json, train_images), (val_json, val_images)), paths.

    Paths that are given replace those."""
    root = os.path.join("datasets", data) if data in NAMES else data
    return ((train_json or os.path.join(root, "annotations", "instances_train2017.json"),
             train_images or image_folder(data, root, "train")),
            (val_json or os.path.join(root, "annotations", "instances_val2017.json"),
             val_images or image_folder(data, root, "val")))


def converted_from(content) -> str:
    """The layout that data.py made this content from, "voc" or "yolo"; "" if it did not."""
    info = content.get("info") if isinstance(content, dict) else None
    made_by = str(info.get("description")) if isinstance(info, dict) else ""
    return made_by.removeprefix(MADE_BY) if made_by.startswith(MADE_BY) else ""


def other_files(*used: str) -> list[str]:
    """The JSON files beside the annotation files `used`: in the folder of their data set or one below if these are in
    its annotations/, else in their own folder."""
    found = set()
    for folder in {Path(path).parent for path in used}:
        below = folder.name == "annotations"
        root = folder.parent if below else folder
        found |= {path for pattern in ["*.json", "*/*.json"][:1 + below] for path in root.glob(pattern)
                  if not path.relative_to(root).parts[0].startswith((".", "@", "__"))}
    return sorted(str(path) for path in found - {Path(path) for path in used})


def image_folder(data: str, root: str, split: str) -> str:
    """The folder that the file names of a split are relative to: the folder itself if a conversion wrote the file."""
    if data not in NAMES and is_ours(os.path.join(root, "annotations", f"instances_{split}2017.json")):
        return root
    layouts = (layout for folder, layout in LAYOUTS.items() if os.path.isdir(os.path.join(root, folder)))
    layout = NAMES[data] if data in NAMES else next(layouts, "{split}2017")
    return os.path.join(root, layout.format(split=split)) if layout else root


def is_ours(path: str | os.PathLike) -> bool:
    """Whether `data.py voc` or `yolo` wrote this annotation file."""
    start = json.dumps({"info": {"description": MADE_BY}}).rstrip('"}')
    try:
        check_ordinary(path)
        with open(path, encoding="utf-8") as file:
            return file.read(len(start)) == start
    except (OSError, ValueError):
        return False


def first_five(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def first_rows(rows: list, some: list[int]) -> str:
    """How messages name the first five of the entries at the indices `some`: as check.py wants them SHOWN, or by id."""
    def name(i):
        row = rows[i] if isinstance(rows[i], dict) else {}
        return row.get(SHOWN) or (f"id {row['id']!r:.40}" if "id" in row else f"entry {i}")
    return first_five([name(i) for i in some[:6]])


def line_about(path: str, kind: str, rows: list, bad: list[int], why: str) -> Iterator[str]:
    """One line about the rows at the indices `bad`, with the names of the first five; none if all are good."""
    if bad:
        yield f"{path}: {len(bad)} of {len(rows)} {kind} {why} ({first_rows(rows, bad)})"


def raise_first(problems: Iterable[str]) -> None:
    for problem in problems:
        raise DataError(problem)


def is_integer(value) -> bool:
    return type(value) is int and -2**63 <= value < 2**63        # isinstance(True, int) is True


def is_box(box) -> bool:
    # comparing instead of math.isfinite also rejects an integer that is too large for a float
    return (type(box) is list and len(box) == 4
            and all(type(v) in (int, float) and -1e30 < v < 1e30 for v in box))


def is_side(value) -> bool:
    return is_integer(value) and 0 < value < 2**31


def is_name(value) -> bool:
    return type(value) is str and value != "" and not re.search(r"[\ud800-\udfff]", value)   # half of a surrogate pair


def is_inside(name) -> bool:
    # \udc80 to \udcff stand for the bytes of a file name that is not UTF-8; other lone surrogates stand for nothing
    return (type(name) is str and name != "" and not os.path.isabs(name) and ".." not in re.split(r"[/\\]", name)
            and not re.search(r"[\ud800-\udc7f\udd00-\udfff]", name))


def is_flag(value) -> bool:
    return value in (None, 0, 1)                                  # True == 1, 0.0 == 0


def is_area(value) -> bool:
    return value is None or type(value) in (int, float) and 0 <= value < 1e30


FORMS = {"id": (is_integer, "an integer"), "image_id": (is_integer, "an integer"),
         "category_id": (is_integer, "an integer"), "name": (is_name, "a text"),
         "width": (is_side, "a positive integer"), "height": (is_side, "a positive integer"),
         "file_name": (is_inside, "a relative path without '..'"),
         "bbox": (is_box, "a list of 4 finite numbers"),
         "iscrowd": (is_flag, "0 or 1"), "area": (is_area, "a finite number of at least 0")}
KEYS = {"images": ("id", "file_name", "width", "height"), "categories": ("id", "name"),
        "annotations": ("id", "image_id", "category_id", "bbox")}
OPTIONAL = {"annotations": ("iscrowd", "area")}     # null or missing: no crowd, the area of the box


def read_coco(path: str) -> dict[str, list[dict]]:
    """The content of a COCO file, checked: KEYS and OPTIONAL in their FORMS, unique ids, and no annotation of an
    unknown image or category. Raises DataError."""
    content = load_json(path)
    raise_first(content_problems(path, content))
    return content


def load_json(path: str):
    """The content of a JSON file, unchecked; COCO's files of test images get an empty list of annotations.

    Raises DataError."""
    try:
        check_ordinary(path)
        with open(path, encoding="utf-8-sig") as file:  # some editors put a byte order mark first
            content = json.load(file)
    except FileNotFoundError:
        found = other_files(path)
        hint = f"found {first_five(found)} (train.py takes others with --train-json or --val-json); " if found else ""
        raise DataError(f"annotation file {path} is missing; {hint}{advice(path)}") from None
    except OSError as error:
        raise DataError(f"annotation file {path} cannot be read: {error.strerror}{hint_of(path)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}{hint_of(path)}") from None
    if isinstance(content, dict) and "images" in content and "categories" in content:
        content.setdefault("annotations", [])
    return content


def hint_of(path: str) -> str:
    """What to do with labels of another format."""
    return "" if str(path).endswith(".json") else f"; {CONVERT}"


def content_problems(path: str, content) -> Iterator[str]:
    """Everything that keeps the content of a JSON file from being that of a COCO annotation file."""
    lists = {kind: content.get(kind) for kind in KEYS} if isinstance(content, dict) else {"images": None}
    for kind, rows in lists.items():
        if isinstance(rows, list):
            yield from row_problems(path, kind, rows)
        else:
            yield f"{path} has no list '{kind}', so it is not a COCO annotation file"
    if all(isinstance(rows, list) for rows in lists.values()):
        for key, kind in (("image_id", "images"), ("category_id", "categories")):
            known = {number for _, number in integers(lists[kind], "id")}
            unknown = [i for i, number in integers(lists["annotations"], key) if number not in known]
            yield from line_about(path, "annotations", lists["annotations"], unknown, f"have an unknown {key}")


def integers(rows: list, key: str) -> list[tuple[int, int]]:
    """(index, value) of the rows whose `key` is an integer."""
    return [(i, row[key]) for i, row in enumerate(rows) if type(row) is dict and is_integer(row.get(key))]


def row_problems(path: str, kind: str, rows: list) -> Iterator[str]:
    """What is wrong with one list of a COCO file. Rows that break a rule are left out of the rules that build on it."""
    objects = [i for i, row in enumerate(rows) if type(row) is dict]
    others = [i for i, row in enumerate(rows) if type(row) is not dict]
    yield from line_about(path, kind, rows, others, "are not objects")
    for key in (*KEYS[kind], *OPTIONAL.get(kind, ())):
        right, form = FORMS[key]
        if key in KEYS[kind]:
            yield from line_about(path, kind, rows, [i for i in objects if key not in rows[i]], f"have no '{key}'")
        invalid = [i for i in objects if key in rows[i] and not right(rows[i][key])]
        yield from line_about(path, kind, rows, invalid, f"have an invalid '{key}': not {form}")
    ids = integers(rows, "id")
    first = {number: i for i, number in reversed(ids)}
    copies = [i for i, number in ids if first[number] != i]
    yield from line_about(path, kind, rows, copies, "have the id of an earlier one")
    if not rows and kind != "annotations":
        yield f"{path} has no {kind}"


def image_problems(path: str, images: list[dict], image_dir: str) -> Iterator[str]:
    """Whether the image folder or images in it are missing."""
    if not os.path.isdir(image_dir):
        yield f"image folder {image_dir} is missing; {advice(image_dir)}"
        return
    try:
        # one listing instead of a lookup per image: the folder may be on a network
        listed = {entry.name for entry in os.scandir(image_dir)}
    except OSError as error:
        yield f"image folder {image_dir} cannot be read: {error.strerror}"
        return
    missing = [i for i, row in enumerate(images) if row["file_name"] not in listed
               and not os.path.exists(os.path.join(image_dir, row["file_name"]))]
    if missing:
        name = images[missing[0]]["file_name"]
        elsewhere = sorted(entry.name for entry in os.scandir(image_dir)
                           if os.path.isdir(entry) and os.path.exists(os.path.join(entry.path, name)))
        # train2017/ and val2017/ may hold other images of the same names
        elsewhere = [folder for folder in elsewhere if folder in os.path.basename(path)] or elsewhere
        folders = " or ".join(os.path.join(image_dir, folder) for folder in elsewhere[:3])
        hint = f"; name {folders} instead" if elsewhere else ""
        yield (f"{len(missing)} of {len(images)} images of {path} are missing in {image_dir}, "
               f"the first: {name!r} ({first_rows(images, missing)}){hint}")


def stated_exif(content: dict) -> str:
    """UPRIGHT, or STORED if a COCO file says in its info that its boxes are those of the stored pixels."""
    info = content.get("info")
    return STORED if isinstance(info, dict) and info.get("exif") == STORED else UPRIGHT


def category_problems(path: str, classes: list[dict], val_path: str, val_classes: list[dict]) -> Iterator[str]:
    """Whether the files to train and to evaluate on differ in their `classes` (see CocoBoxes)."""
    if classes != val_classes:
        yield f"{val_path} has other categories than {path}: both must list the same ids and names"


def sorted_classes(categories: list[dict]) -> list[dict]:
    return [{"id": row["id"], "name": row["name"]} for row in sorted(categories, key=lambda row: row["id"])]


def mask_flaws(annotations: list[dict], sizes: list, rows: Iterable[int], needed: Container[int] = ()) -> dict:
    """{what is wrong with a `segmentation`, see `flaw`: the indices of the annotations}, of those in `rows`.

    sizes: of the image of each annotation. A missing one is wrong where it is `needed`, an empty list never."""
    flaws = {}
    for i in rows:
        segmentation = annotations[i].get("segmentation")
        if segmentation is None:
            why = "it is missing, and masks are needed" if i in needed else None
        else:
            why = None if segmentation == [] else flaw(segmentation, sizes[i])
        if why:
            flaws.setdefault(why, []).append(i)
    return flaws


def mask_problems(path: str, annotations: list[dict], flaws: dict[str, list[int]]) -> Iterator[str]:
    """What keeps the masks from being used, given the `mask_flaws`."""
    for why, bad in flaws.items():
        if why != SHORT:
            yield from line_about(path, "annotations", annotations, bad, f"have no usable segmentation: {why}")


def mask_warnings(path: str, annotations: list[dict], flaws: dict[str, list[int]]) -> Iterator[str]:
    """What is left out of masks that are used."""
    yield from line_about(path, "annotations", annotations, flaws.get(SHORT, []), SHORT)


def positions(values: list[int], ids: np.ndarray) -> np.ndarray:
    """The index in `ids` of each value; all are among them."""
    order = np.argsort(ids)
    return order[np.searchsorted(ids, np.array(values, np.int64), sorter=order)]


def packed(strings: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """n strings as one uint8 array and their offsets in it (n+1,)."""
    return np.frombuffer(b"".join(strings), np.uint8), np.cumsum([0, *map(len, strings)])


def clipped(annotations: list[dict], sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes clipped to their images of `sizes` (m,2): (m,4) float64 xyxy, and as (m,) bool the crowds and the others
    that are under 1 pixel wide or high."""
    xywh = np.array([row["bbox"] for row in annotations], np.float64).reshape(-1, 4)
    limits = sizes[:, ::-1]
    low, high = np.clip(xywh[:, :2], 0, limits), np.clip(xywh[:, :2] + xywh[:, 2:], 0, limits)
    crowd = np.array([bool(row.get("iscrowd")) for row in annotations], bool)
    small = (high - low < 1 - 1e-6).any(1) & ~crowd              # (0.4 + 1) - 0.4 is slightly under 1
    return np.concatenate([low, high], 1), crowd, small


def no_usable_box(path: str, annotations: list[dict]) -> str:
    """What to say of a file of whose annotations no box is left."""
    crowds = annotations and all(row.get("iscrowd") for row in annotations)
    return f"{path} has no usable box" + (f": all {len(annotations)} are crowds" if crowds else "")


def small_problems(path: str, annotations: list[dict], small: np.ndarray) -> Iterator[str]:
    yield from line_about(path, "boxes", annotations, np.flatnonzero(small).tolist(),
                          "dropped, less than 1 pixel wide or high within the image")


@contextlib.contextmanager
def no_garbage_collection():
    """Parsed rows contain no cycles, yet Python would search a million of them again and again: without it 100,000
    images with 700,000 boxes are read in 4.4 instead of 6.6 s."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class CocoBoxes:
    """A COCO-format annotation file as flat arrays: n images, m boxes.

    image_ids (n,) int64; sizes (n,2) int32, (height, width); boxes (m,4) float32 xyxy in pixels of the image, clipped
    to it; labels (m,) int64, label i being classes[i], {"id", "name"}, sorted by id; offsets (n+1,): image i has the
    boxes offsets[i] to offsets[i+1]; rows (m,): the index of a box in the file's list of annotations.

    Leaves out crowds and, with a warning, boxes under 1 pixel. With `masks`, `mask` and `rle` give the mask of a box.
    evaluated: the masks that the file has will be compared or drawn. no_box: what to say if no box is left, else "".
    exif, UPRIGHT or STORED (None: as the file states in its info, else UPRIGHT), and max_pixels are for pictures.py.
    Raises DataError.

    Flat arrays: touching a Python object changes its reference count, which copies its memory page into every worker.
    """

    @no_garbage_collection()
    def __init__(self, json_path: str, image_dir: str, masks: bool = False, evaluated: bool = False,
                 exif: str | None = None, max_pixels: int = MAX_PIXELS):
        self.json_path, self.image_dir, self.max_pixels = str(json_path), str(image_dir), max_pixels
        content = read_coco(self.json_path)
        images, annotations = content["images"], content["annotations"]
        self.exif = exif or stated_exif(content)
        raise_first(image_problems(self.json_path, images, self.image_dir))
        self.classes = sorted_classes(content["categories"])
        self.image_ids = np.array([row["id"] for row in images], np.int64)
        self.sizes = np.array([(row["height"], row["width"]) for row in images], np.int32)
        self.name_bytes, self.name_offsets = packed([os.fsencode(row["file_name"]) for row in images])

        image = positions([row["image_id"] for row in annotations], self.image_ids)
        label = positions([row["category_id"] for row in annotations], np.array([row["id"] for row in self.classes]))
        boxes, crowd, small = clipped(annotations, self.sizes[image])
        for problem in small_problems(self.json_path, annotations, small):
            warn(problem)
        kept = np.flatnonzero(~crowd & ~small)
        kept = kept[np.argsort(image[kept], kind="stable")]
        self.boxes, self.labels, self.rows = boxes[kept].astype(np.float32), label[kept], kept
        self.offsets = np.searchsorted(image[kept], np.arange(len(images) + 1))
        self.no_box = "" if len(kept) else no_usable_box(self.json_path, annotations)
        sizes = self.sizes[image].tolist()
        flaws = mask_flaws(annotations, sizes, range(len(annotations)) if evaluated else kept if masks else (),
                           set(kept.tolist()) if masks else ())
        raise_first(mask_problems(self.json_path, annotations, flaws))
        for warning in mask_warnings(self.json_path, annotations, flaws):
            warn(warning)
        self.rles = None
        if masks:
            self._check_masks([annotations[i] for i in kept])
            self.rles, self.rle_offsets = packed(
                [compressed(annotations[i]["segmentation"], sizes[i])["counts"] for i in kept])

    def _check_masks(self, annotations: list[dict]) -> None:
        """Warns of empty masks: the dice loss is constant for them, so such an annotation trains a box and no mask.
        Raises DataError if all are empty."""
        empty = [str(row["id"]) for row in annotations if row.get("segmentation") == []]
        if empty and len(empty) == len(annotations):
            raise DataError(f"{self.json_path}: all {len(empty)} boxes have an empty segmentation: no mask to learn")
        if empty:
            warn(f"{self.json_path}: {len(empty)} of {len(annotations)} boxes have an empty segmentation: "
                 f"they train boxes and no masks (annotation id {first_five(empty)})")

    def __len__(self) -> int:
        return len(self.image_ids)

    def size(self, i: int) -> tuple[int, int]:
        return tuple(self.sizes[i].tolist())

    def path(self, i: int) -> str:
        name = self.name_bytes[self.name_offsets[i]:self.name_offsets[i + 1]].tobytes()
        return os.path.join(self.image_dir, os.fsdecode(name))

    def image_boxes(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (G,4) xyxy in pixels of the file and labels (G,) of image i."""
        boxes = slice(self.offsets[i], self.offsets[i + 1])
        return self.boxes[boxes], self.labels[boxes]

    def mask(self, i: int, box: int) -> np.ndarray:
        """The mask of image i's box with index `box` in `boxes`: (height, width) uint8, 0 or 1."""
        return coco_mask.decode(self.rle(i, box))

    def rle(self, i: int, box: int) -> dict:
        """The mask as pycocotools' run lengths."""
        return {"size": self.size(i), "counts": self.rles[self.rle_offsets[box]:self.rle_offsets[box + 1]].tobytes()}


def ground_truth(json_path: str) -> COCO:
    """An annotation file that CocoBoxes has read, `evaluated`, as pycocotools' COCO: with the keys filled in that a
    file of boxes alone may lack, and without polygons of too few points."""
    with open(json_path, encoding="utf-8-sig") as file:
        dataset = json.load(file)
    dataset.setdefault("info", {})
    dataset.setdefault("annotations", [])
    for number, annotation in enumerate(dataset["annotations"], 1):
        annotation["id"] = number  # new ids from 1: COCOeval takes 0 for "no match"
        annotation["iscrowd"] = int(bool(annotation.get("iscrowd")))
        if annotation.get("area") is None:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        if isinstance(annotation.get("segmentation"), list):
            annotation["segmentation"] = polygons(annotation["segmentation"])
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(None):
        coco.createIndex()
    return coco


def write_files(contents: dict[str, dict]) -> None:
    """Write COCO files, {path: content}. None is replaced before all are written. Raises DataError."""
    try:
        with contextlib.ExitStack() as replacements:
            for path, content in contents.items():
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(replacements.enter_context(replacing(path)), "w", encoding="utf-8") as file:
                    json.dump(content, file)
    except OSError as error:
        raise DataError(f"cannot write annotation file {path}: {error.strerror}") from None
