"""COCO-format annotation files: found, checked, and kept as flat arrays.

`datasets` says where the files are, `CocoBoxes` reads one. Everything that can be wrong with it is a DataError whose
message is one line: which file, which ids, what to do. Boxes are xyxy in pixels, sizes (height, width). Learning
from boxes never looks at `segmentation`; only `masks=True` does.
"""
import json
import os
import re
import sys

import numpy as np
from pycocotools import mask as coco_mask

# the 80 classes of COCO: their ids go to 90, with gaps
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

GET_DATA = ("put train2017/, val2017/ and annotations/ of cocodataset.org into datasets/coco, "
            "or make the small set: python data.py shapes datasets/shapes; "
            "or the files of Cityscapes: python data.py cityscapes datasets/cityscapes")


class DataError(Exception):
    """Something is wrong with the data; the message is one line for a person."""

    def __str__(self) -> str:
        # A DataLoader's worker hands its error on as a whole traceback, whose last line is the message.
        line = super().__str__().strip().split("\n")[-1]
        return line.removeprefix(f"{type(self).__module__}.{type(self).__name__}: ")


class UndecodableImage(DataError):
    """A picture cannot be decoded: skipped in training, an error in evaluation."""


def warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":       # under torchrun every process reads the same files
        print(f"warning: {message}", file=sys.stderr, flush=True)


def datasets(data: str, train_json=None, train_images=None, val_json=None, val_images=None):
    """-> ((train_json, train_images), (val_json, val_images)), the paths of `data`: coco, cityscapes, shapes or
    a folder in COCO layout, or in Cityscapes' (its pictures stay in leftImg8bit). Files given one by one win."""
    root = os.path.join("datasets", data) if data in ("coco", "cityscapes", "shapes") else data
    cityscapes = data == "cityscapes" or os.path.isdir(os.path.join(root, "leftImg8bit"))
    pictures = os.path.join("leftImg8bit", "{}") if cityscapes else "{}2017"
    return ((train_json or os.path.join(root, "annotations", "instances_train2017.json"),
             train_images or os.path.join(root, pictures.format("train"))),
            (val_json or os.path.join(root, "annotations", "instances_val2017.json"),
             val_images or os.path.join(root, pictures.format("val"))))


def first_five(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def refuse(path: str, kind: str, rows: list, broken, why: str) -> None:
    """Raises DataError if any of `broken`, one bool for each of `rows`, holds; names the first five."""
    def name(i):
        named = isinstance(rows[i], dict) and "id" in rows[i]
        return f"id {rows[i]['id']!r:.40}" if named else f"entry {i}"
    bad = [i for i, is_broken in enumerate(broken) if is_broken]
    if bad:
        names = first_five([name(i) for i in bad])
        raise DataError(f"{path}: {len(bad)} of {len(rows)} {kind} {why} ({names})")


def is_integer(value) -> bool:
    return type(value) is int and -2**63 <= value < 2**63        # to isinstance True is an integer too


def is_box(box) -> bool:
    # Compared, not asked whether it is finite: NaN fails, and so does an integer too large for a float.
    return (type(box) is list and len(box) == 4
            and all(type(v) in (int, float) and -1e30 < v < 1e30 for v in box))


def is_side(value) -> bool:
    return is_integer(value) and 0 < value < 2**31


def is_name(value) -> bool:
    return type(value) is str and value != ""


def is_inside(name) -> bool:
    return is_name(name) and not os.path.isabs(name) and ".." not in re.split(r"[/\\]", name)


FORMS = {"id": (is_integer, "an integer"), "image_id": (is_integer, "an integer"),
         "category_id": (is_integer, "an integer"), "name": (is_name, "a text"),
         "width": (is_side, "a positive integer"), "height": (is_side, "a positive integer"),
         "file_name": (is_inside, "a path inside the folder of pictures: absolute, with '..' or no text"),
         "bbox": (is_box, "a list of 4 finite numbers")}
KEYS = {"images": ("id", "file_name", "width", "height"), "categories": ("id", "name"),
        "annotations": ("id", "image_id", "category_id", "bbox")}


def read_coco(path: str) -> dict[str, list[dict]]:
    """A COCO file, checked: its `images`, `annotations`, `categories` have all their KEYS in the right form
    and an id of their own. COCO's test pictures come without annotations: then there are none. Raises DataError."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise DataError(f"annotation file {path} is missing; {GET_DATA}") from None
    except OSError as error:
        raise DataError(f"annotation file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if isinstance(content, dict) and "images" in content and "categories" in content:
        content.setdefault("annotations", [])
    for kind, keys in KEYS.items():
        if not isinstance(content, dict) or not isinstance(content.get(kind), list):
            raise DataError(f"{path} has no list '{kind}': it is not a COCO annotation file")
        check_rows(path, kind, content[kind], keys)
    return content


def check_rows(path: str, kind: str, rows: list, keys: tuple[str, ...]) -> None:
    refuse(path, kind, rows, (type(row) is not dict for row in rows), "are no objects")
    for key in keys:
        refuse(path, kind, rows, (key not in row for row in rows), f"have no '{key}'")
        right, form = FORMS[key]
        refuse(path, kind, rows, (not right(row[key]) for row in rows), f"have a '{key}' that is not {form}")
    first = np.unique([row["id"] for row in rows], return_index=True)[1]
    refuse(path, kind, rows, ~np.isin(np.arange(len(rows)), first), "have the id of another one")
    if not rows and kind != "annotations":
        raise DataError(f"{path} has no {kind}")


def check_pictures(path: str, images: list[dict], image_dir: str) -> None:
    """Raises DataError where the folder or a picture is missing."""
    if not os.path.isdir(image_dir):
        raise DataError(f"picture folder {image_dir} is missing; {GET_DATA}")
    # One listing of the folder instead of a question a picture: the folder may be on a network.
    there = {entry.name for entry in os.scandir(image_dir)}
    missing = [row for row in images if row["file_name"] not in there
               and not os.path.exists(os.path.join(image_dir, row["file_name"]))]
    if missing:
        raise DataError(f"{len(missing)} of {len(images)} pictures of {path} are missing in {image_dir}, "
                        f"the first: {missing[0]['file_name']!r} (id {missing[0]['id']})")


def compressed_rle(path: str, annotation: dict, size: tuple[int, int]) -> bytes:
    """Counts of the compressed RLE of an annotation's `segmentation`: polygons, or RLE, compressed or not.

    Raises DataError, also where an RLE has another size than its picture."""
    segmentation = annotation.get("segmentation")
    try:
        if not segmentation:
            raise ValueError("there is none, and masks are needed")
        if isinstance(segmentation, list):
            return coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))["counts"]
        counts, plain = segmentation["counts"], isinstance(segmentation["counts"], list)
        if tuple(segmentation["size"]) != size or plain and sum(counts) != size[0] * size[1]:
            raise ValueError("the RLE has another size than the picture")
        return coco_mask.frPyObjects(segmentation, *size)["counts"] if plain else counts.encode()
    except Exception as error:            # pycocotools raises what it trips over, plain Exception among it
        why = str(error).split("\n")[0]
        raise DataError(f"{path}: annotation id {annotation['id']}: no usable segmentation: {why}") from None


def packed(strings: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """-> the n strings in one uint8 array, and the (n+1,) offsets of each in it."""
    return np.frombuffer(b"".join(strings), np.uint8), np.cumsum([0, *map(len, strings)])


class CocoBoxes:
    """A COCO-format annotation file as flat arrays: n pictures, m boxes.

    image_ids (n,) int64; sizes (n,2) int32, (height, width) of the files; boxes (m,4) float32 xyxy, pixels of
    the file, clipped to it; labels (m,) int64 from 0, label i being classes[i], {"id", "name"}, sorted by id;
    offsets (n+1,): picture i has the boxes offsets[i] to offsets[i+1]; rows (m,): where in the file's list of
    annotations a box stands. With `masks` their masks too: `mask`.
    Crowd boxes are left out; those under 1 px after the clipping too, with a warning. Raises DataError.

    Arrays, since a Python object for each box would be copied into every worker that as much as counts it."""

    def __init__(self, json_path: str, image_dir: str, masks: bool = False):
        self.json_path, self.image_dir = str(json_path), str(image_dir)
        content = read_coco(self.json_path)
        images, annotations = content["images"], content["annotations"]
        check_pictures(self.json_path, images, self.image_dir)
        self.classes = [{"id": row["id"], "name": row["name"]}
                        for row in sorted(content["categories"], key=lambda row: row["id"])]
        self.image_ids = np.array([row["id"] for row in images], np.int64)
        self.sizes = np.array([(row["height"], row["width"]) for row in images], np.int32)
        self.name_bytes, self.name_offsets = packed([os.fsencode(row["file_name"]) for row in images])

        picture = self._positions(annotations, "image_id", self.image_ids)
        label = self._positions(annotations, "category_id", np.array([row["id"] for row in self.classes]))
        boxes, usable = self._usable_boxes(annotations, picture)
        kept = np.flatnonzero(usable)
        kept = kept[np.argsort(picture[kept], kind="stable")]
        self.boxes, self.labels, self.rows = boxes[kept], label[kept], kept
        self.offsets = np.searchsorted(picture[kept], np.arange(len(images) + 1))
        self.rles = None
        if masks:
            self.rles, self.rle_offsets = packed(
                [compressed_rle(self.json_path, annotations[i], self.size(picture[i])) for i in kept])

    def _positions(self, annotations: list[dict], key: str, ids: np.ndarray) -> np.ndarray:
        """Where in `ids` the `key` of each annotation stands."""
        values = np.array([row[key] for row in annotations], np.int64)
        refuse(self.json_path, "annotations", annotations, ~np.isin(values, ids), f"have an unknown {key}")
        order = np.argsort(ids)
        return order[np.searchsorted(ids, values, sorter=order)]

    def _usable_boxes(self, annotations: list[dict], picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """-> (all,4) float32 xyxy, clipped; (all,) bool, the boxes to learn from."""
        xywh = np.array([row["bbox"] for row in annotations], np.float64).reshape(-1, 4)
        limits = self.sizes[picture][:, ::-1]
        low, high = np.clip(xywh[:, :2], 0, limits), np.clip(xywh[:, :2] + xywh[:, 2:], 0, limits)
        crowd = np.array([bool(row.get("iscrowd")) for row in annotations], bool)
        small = (high - low < 1 - 1e-6).any(1) & ~crowd          # (0.4 + 1) - 0.4 is a little under 1
        if small.any():
            ids = first_five([str(annotations[i]["id"]) for i in np.flatnonzero(small)])
            warn(f"{self.json_path}: {small.sum()} of {len(annotations)} boxes dropped, "
                 f"less than 1 pixel wide or high within the image (annotation id {ids})")
        return np.concatenate([low, high], 1).astype(np.float32), ~crowd & ~small

    def __len__(self) -> int:
        return len(self.image_ids)

    def size(self, i: int) -> tuple[int, int]:
        return tuple(self.sizes[i].tolist())

    def path(self, i: int) -> str:
        name = self.name_bytes[self.name_offsets[i]:self.name_offsets[i + 1]].tobytes()
        return os.path.join(self.image_dir, os.fsdecode(name))

    def image_boxes(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """-> boxes (G,4) xyxy in pixels of the file, labels (G,) of picture i."""
        own = slice(self.offsets[i], self.offsets[i + 1])
        return self.boxes[own], self.labels[own]

    def mask(self, i: int, box: int) -> np.ndarray:
        """(height, width) uint8, 0 or 1: the mask of box number `box` of all m, one of picture i."""
        return coco_mask.decode(self.rle(i, box))

    def rle(self, i: int, box: int) -> dict:
        """The same as pycocotools' run lengths."""
        return {"size": self.size(i), "counts": self.rles[self.rle_offsets[box]:self.rle_offsets[box + 1]].tobytes()}
