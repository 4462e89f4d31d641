"""Masks in the formats that boxes came from: predict.py --boxes ... --yolo and --voc.

    OUT/labels-segment/*.txt        YOLO: a line `class x y x y ...` for each mask, fractions of the image's sides
    OUT/SegmentationObject/*.png    Pascal VOC: the pixels of the image's object k have the value k

Polygons are (n, 2), x and y in pixels, closed: the last point is joined to the first. Sizes are (height, width).
"""
import os
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from formats.coco import CocoBoxes, DataError, converted_from, first_five
from formats.files import warn, write_whole
from formats.pictures import TURNS, is_turned, read_header, save_image
from tools.label import polygons

YOLO, VOC = "labels-segment", "SegmentationObject"  # folders
CLASSES = "classes.txt"
MOST_OBJECTS = 254  # of a PNG with a palette: 0 is the background and 255 void
# VOC's 256 colours, red, green and blue in turn: bit 3 j + c of a number is bit 7 - j of its colour c
PALETTE = [sum((number >> 3 * j + c & 1) << 7 - j for j in range(3)) for number in range(256) for c in range(3)]


def yolo_files(names: list[str]) -> list[str]:
    """The label file of each image, as files_of."""
    return files_of(names, YOLO, "images", ".txt")


def voc_files(names: list[str]) -> list[str]:
    """The PNG of each image, as files_of."""
    return files_of(names, VOC, "JPEGImages", ".png")


def files_of(names: list[str], folder: str, left_out: str, suffix: str) -> list[str]:
    """A file in a folder for each image: the image's path, without the first folder `left_out`, with the suffix.

    Raises DataError if two would be the same, or one would be that of the classes."""
    image_of = {os.path.join(folder, CLASSES): "the list of classes"}
    for name in names:
        parts = list(Path(name).parts)
        if left_out in parts[:-1]:
            parts.remove(left_out)
        file = str(Path(folder, *parts).with_suffix(suffix))
        if file in image_of:
            raise DataError(f"{image_of[file]} and {name!r} would both be {file}: rename an image, or list it once")
        image_of[file] = repr(name)
    return list(image_of)[1:]


# ----------------------------------------------------------------------------------------------------- YOLO


def write_yolo_labels(annotations: CocoBoxes, content: dict, rles: list[dict | None], out: Path,
                      names: list[str]) -> None:
    """Write a label file for each image into a folder of `out`. rles: the masks of annotations.boxes; no mask, no line.

    names: of the images within their folder. Categories of `python data.py yolo` keep their numbers; others are counted
    from 0 in the order of their ids, and classes.txt names them."""
    converted = converted_from(content) == "yolo"
    numbers = [c["id"] if converted else i for i, c in enumerate(annotations.classes)]
    if not converted:
        write_text(out / YOLO / CLASSES, "".join(" ".join(c["name"].split()) + "\n" for c in annotations.classes))
    files = yolo_files(names)
    for i, file in enumerate(tqdm(files, desc=YOLO, unit="image", disable=None)):
        masks = [k for k in range(*annotations.offsets[i:i + 2]) if rles[k]]
        turn = orientation(annotations, i) if masks else 1
        write_text(out / file, "".join(
            yolo_line(numbers[annotations.labels[k]], turned(rles[k], turn)) for k in masks))
    none = sum(not rle for rle in rles)
    print(f"{out / YOLO}: polygons of {len(rles) - none} of {len(rles)} boxes"
          + f" ({none} have no mask and no line: a segmenter takes them for background)" * bool(none)
          + f" in {len(files)} files; to train a YOLO segmenter, copy what is in "
          + ", ".join(f"{out / YOLO / source} to {target}"
                      for source, target in yolo_places(annotations.image_dir, names).items())
          + ", over the label files of the same names")


def yolo_places(image_dir: str, names: list[str]) -> dict[Path, Path]:
    """Where YOLO looks for the labels of the images: {folder within labels-segment: folder}.

    It takes `labels` for `images` in the path of an image; without `images`, labels are beside the image."""
    places = {}
    for folders in dict.fromkeys(Path(name).parts[:-1] for name in names):
        if "images" in folders:
            before = folders[:folders.index("images")]
            places[Path(*before)] = Path(image_dir, *before, "labels")
        else:
            parts = list(Path(image_dir).parts)
            if "images" in parts:
                parts[-1 - parts[::-1].index("images")] = "labels"
            places[Path()] = Path(*parts)
    return places


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())


def orientation(annotations: CocoBoxes, i: int) -> int:
    """The EXIF orientation in which the masks of image i must be turned to be upright; 1: not at all.

    YOLO reads upright images. Masks lie on the image of the size that its annotation states; where the size does not
    tell, they stay as the boxes are (--exif)."""
    header, path = read_header(annotations.path(i)), annotations.path(i)
    upright = header.ambiguous or is_turned(header, path, annotations.size(i))
    return 1 if upright else header.orientation


def turned(rle: dict, turn: int) -> dict:
    """A mask turned as its image is by its EXIF orientation."""
    if turn == 1:
        return rle
    return coco_mask.encode(np.asfortranarray(Image.fromarray(coco_mask.decode(rle)).transpose(TURNS[turn])))


def yolo_line(number: int, rle: dict) -> str:
    height, width = rle["size"]
    points = np.clip(one_polygon(polygons(rle)) / (width, height), 0, 1)
    return f"{number} " + " ".join(f"{value:.6f}" for value in points.flatten()) + "\n"


def one_polygon(parts: list[list[float]]) -> np.ndarray:
    """The parts of a mask, each x y x y ..., as one polygon: the largest first, bridges of no width to the others."""
    first, *others = sorted((np.reshape(part, (-1, 2)) for part in parts), key=lambda part: -np.ptp(part, 0).prod())
    for part in others:
        first = bridged(first, part)
    return first


def bridged(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Two polygons as one, which goes from a near corner of one to the nearest of the other, around it and back."""
    def nearest(corners, place):
        return ((corners - place) ** 2).sum(1).argmin()
    j = nearest(two, one[nearest(one, two.mean(0))])
    i = nearest(one, two[j])
    return np.concatenate([one[:i + 1], two[j:], two[:j + 1], one[i:]])


# ------------------------------------------------------------------------------------------------------ VOC


def write_voc_objects(annotations: CocoBoxes, content: dict, rles: list[dict | None], out: Path,
                      names: list[str]) -> None:
    """Write a PNG for each image, of the size that its annotation states, into a folder of `out`. rles: the masks of
    annotations.boxes.

    Objects are counted from 1, as the file lists those of the image, with or without a mask. Warns of images with more
    objects than a palette has colours."""
    mask_of, objects = dict(zip(annotations.rows.tolist(), rles)), {}
    for row, annotation in enumerate(content["annotations"]):
        objects.setdefault(annotation["image_id"], []).append((annotation["bbox"], mask_of.get(row)))
    files = voc_files(names)
    for image_id, size, file in zip(annotations.image_ids.tolist(), annotations.sizes.tolist(),
                                    tqdm(files, desc=VOC, unit="image", disable=None)):
        image = Image.fromarray(object_numbers(size, objects.get(image_id, [])))
        if image.mode == "L":
            image.putpalette(PALETTE)
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        save_image(image, out / file, "PNG")
    many = [repr(name) for name, image_id in zip(names, annotations.image_ids.tolist())
            if len(objects.get(image_id, [])) > MOST_OBJECTS]
    if many:
        warn(f"{out / VOC}: {len(many)} of {len(files)} images have more than {MOST_OBJECTS} objects: their PNG has 16 "
             f"bits and no palette ({first_five(many)})")
    print(f"{out / VOC}: {len(files)} PNGs; object k of an image has the value k")


def object_numbers(size: tuple[int, int], objects: list[tuple[list[float], dict | None]]) -> np.ndarray:
    """The number of the object at each pixel, 0: none, uint8, or uint16 for more than MOST_OBJECTS. An object is its
    box, xywh, and its mask.

    Of masks that overlap the smaller is in front, of equally large ones the later, so that an object on another is
    seen."""
    numbers = np.zeros(size, np.uint8 if len(objects) <= MOST_OBJECTS else np.uint16)
    # VOC leaves void, which counts as nothing, what is hard to tell: a border of 5 pixels around each object, and
    # objects that nobody outlined, such as crowds. The border is left out, since readers can widen an edge but not
    # undo that, and small objects would be nothing but border; boxes without a mask are void.
    for (x, y, w, h), rle in objects:
        if not rle:
            (x0, x1), (y0, y1) = (np.rint(np.clip(ends, 0, side)).astype(int)
                                  for ends, side in (((x, x + w), size[1]), ((y, y + h), size[0])))
            numbers[y0:y1, x0:x1] = np.iinfo(numbers.dtype).max
    masks = [(k, rle) for k, (_, rle) in enumerate(objects, 1) if rle]
    for k, rle in sorted(masks, key=lambda one: -int(coco_mask.area(one[1]))):
        numbers[coco_mask.decode(rle) > 0] = k
    return numbers
