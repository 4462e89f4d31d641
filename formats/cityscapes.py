"""Cityscapes' instance maps to COCO annotation files (paper: Sec. 4.3, Table 8).

    python data.py cityscapes datasets/cityscapes

ROOT is the folder in which leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of cityscapes-dataset.com were
unpacked. Only ROOT/annotations/instances_{train,val}2017.json are added: the images stay in leftImg8bit/SPLIT/CITY/.
"""
import os
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from formats.coco import DataError, write_files
from formats.pictures import opened, read_header

# the eight classes that are scored as instances; category ids are Cityscapes' label ids
CLASSES = [{"id": 24, "name": "person"}, {"id": 25, "name": "rider"}, {"id": 26, "name": "car"},
           {"id": 27, "name": "truck"}, {"id": 28, "name": "bus"}, {"id": 31, "name": "train"},
           {"id": 32, "name": "motorcycle"}, {"id": 33, "name": "bicycle"}]
LABELS = {row["id"] for row in CLASSES}
LAST_LABEL = 33                                                         # the highest of all labels
IMAGE, INSTANCE_MAP = "_leftImg8bit.png", "_gtFine_instanceIds.png"   # after CITY/CITY_SEQUENCE_FRAME


def write_cityscapes(root: str) -> None:
    """Write the annotation files of train and val, after both have been read. Raises DataError."""
    contents = {split: read_split(Path(root), split) for split in ("train", "val")}
    folder = os.path.join(root, "annotations")
    paths = {split: os.path.join(folder, f"instances_{split}2017.json") for split in contents}
    write_files({path: contents[split] for split, path in paths.items()})
    for split, path in paths.items():
        groups = sum(row["iscrowd"] for row in contents[split]["annotations"])
        print(f"{path}: {len(contents[split]['images'])} images, "
              f"{len(contents[split]['annotations']) - groups} objects, {groups} groups")


def read_split(root: Path, split: str) -> dict:
    """The content of a split's COCO file. Ids count from 1, in the order of paths and of instance ids.

    Raises DataError."""
    images, annotations = [], []
    for name in tqdm(paired_names(root, split), f"reading {split}", unit="image", disable=None):
        image = root / "leftImg8bit" / split / (name + IMAGE)
        height, width = read_header(image).size
        images.append({"id": len(images) + 1, "file_name": name + IMAGE, "width": width, "height": height})
        for annotation in annotate(read_map(root / "gtFine" / split / (name + INSTANCE_MAP), image, (height, width))):
            annotations.append({"id": len(annotations) + 1, "image_id": len(images), **annotation})
    return {"info": {"description": f"Cityscapes {split}, fine annotations"}, "licenses": [],
            "categories": CLASSES, "images": images, "annotations": annotations}


def paired_names(root: Path, split: str) -> list[str]:
    """Sorted CITY/CITY_SEQUENCE_FRAME of images and instance maps. Raises DataError if one lacks the other."""
    kinds = {"image": (root / "leftImg8bit" / split, IMAGE),
             "instance map": (root / "gtFine" / split, INSTANCE_MAP)}
    found = {}
    for kind, (folder, ending) in kinds.items():
        if not folder.is_dir():
            raise DataError(f"folder {folder} is missing: unpack leftImg8bit_trainvaltest.zip and "
                            f"gtFine_trainvaltest.zip of cityscapes-dataset.com in {root}")
        found[kind] = {path.relative_to(folder).as_posix().removesuffix(ending) for path in folder.glob("*/*" + ending)}
    for kind, other in (("image", "instance map"), ("instance map", "image")):
        unpaired = sorted(found[kind] - found[other])
        if unpaired:
            (folder, ending), (other_folder, _) = kinds[kind], kinds[other]
            raise DataError(f"{len(unpaired)} of {len(found[kind])} {kind}s of {folder} have no {other} in "
                            f"{other_folder}, the first: {unpaired[0] + ending}")
    if not found["image"]:
        raise DataError(f"{kinds['image'][0]} contains no image CITY/*{IMAGE}")
    return sorted(found["image"])


def read_map(path: Path, image_path: Path, size: tuple[int, int]) -> np.ndarray:
    """Instance ids (height, width), of the `size` of their image. Raises DataError."""
    try:
        with opened(path) as image:
            mode, stored = image.mode, image.size[::-1]
            ids = np.asarray(image) if stored == size else None
    except Exception as error:
        raise DataError(f"instance map {path} cannot be read: {str(error) or type(error).__name__}") from None
    if mode != "L" and not mode.startswith("I"):
        raise DataError(f"instance map {path} has mode {mode}, not integers of 8 or 16 bits")
    if stored != size:
        raise DataError(f"instance map {path} is {stored[1]} x {stored[0]} pixels (width x height), "
                        f"its image {image_path} is {size[1]} x {size[0]}")
    highest = int(ids.max())
    if label_of(highest) > LAST_LABEL:
        raise DataError(f"instance map {path} contains the id {highest}, not of a label from 0 to {LAST_LABEL}")
    return ids


def label_of(instance: int) -> int:
    """The label of an instance id: label x 1000 + number, or the label itself for stuff and for groups."""
    return instance // 1000 if instance >= 1000 else instance


def annotate(ids: np.ndarray) -> list[dict]:
    """COCO annotations, still without ids, of the instance ids (height, width) in rising order.

    A plain label of one of the CLASSES marks a group whose objects could not be told apart: COCO's crowd."""
    ids, annotations = np.asfortranarray(ids), []            # RLE runs down the columns
    for instance in np.unique(ids).tolist():
        label = label_of(instance)
        if label not in LABELS:
            continue
        rle = coco_mask.encode(np.asfortranarray(ids == instance, np.uint8))
        annotations.append({"category_id": label, "iscrowd": int(instance == label), "area": int(coco_mask.area(rle)),
                            "bbox": [int(value) for value in coco_mask.toBbox(rle)],
                            "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}})
    return annotations
