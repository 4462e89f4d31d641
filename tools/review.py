"""The review page of predict.py --boxes, and the decisions made on it, for predict.py --apply.

review.html, beside this file, is the page: the least certain masks first, each to be kept or rejected. Here the boxes
and their pictures are put into it, so it loads nothing from elsewhere, opens from disk and can be sent to someone. It
saves its decisions as a file that names the masks.json they are about by its SHA-256.
"""
import base64
import hashlib
import io
import itertools
import json
import os
import shlex
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

from formats.coco import CocoBoxes, DataError, UndecodableImage, first_five, read_coco
from formats.files import check_ordinary, counted, printable, write_whole
from formats.pictures import read_image
from tools.draw import outline
from tools.label import COLOURS, BoxMasks

SIDES = (240, 400)  # the longer side of a cut-out lies between these, pixels
LISTED = 20_000     # boxes below --min-score that the page lists without a picture, at most
LARGEST = 30e6      # characters of the pictures of a page, at most; further boxes have pages of their own
PALETTE = [(0, 0, 0, 0), (60, 150, 240, 115), (60, 150, 240, 255), (0, 0, 0, 128)]  # RGBA: outside a mask, inside it,
#                                                       its outline, and a dark line around it for bright photographs
KEEP, REJECT = "keep", "reject"


# --------------------------------------------------------------------------------------------------- the page


def write_review(annotations: CocoBoxes, labels: BoxMasks, ids: list[int], links: list[tuple[str, str]], out: Path,
                 count: int, min_score: float) -> list[Path]:
    """Write the pages about out/masks.json with the `count` lowest-scored masks, and a list of further boxes below
    min_score. Returns their paths: review.html, and review-2.html, ... if the pictures are too much for one. Removes
    those that an earlier review had beyond them.

    ids: of the annotation of each box. links: for each image its name and the path of its drawing from the page.
    """
    order = np.argsort(labels.scores, kind="stable")
    shown, low = order[:count].tolist(), int((labels.scores < min_score).sum())
    image_of = (np.searchsorted(annotations.offsets, np.arange(len(order)), side="right") - 1).tolist()
    pictures = cut_outs(annotations, labels, shown, image_of)

    def described(k: int) -> dict:
        name, drawing = links[image_of[k]]
        return {"id": str(ids[k]), "name": printable(annotations.classes[annotations.labels[k]]["name"]),
                "source": labels.sources[k], "score": float(labels.scores[k]), "file": printable(name),
                "drawing": quote(os.fsencode(drawing))}

    items = [described(k) | {"given": labels.rles[k] is not None and bool(labels.scores[k] >= min_score)} | pictures[k]
             for k in shown]
    rest = [described(k) for k in order[len(shown):max(low, len(shown))][:LISTED].tolist()]
    content = {"masks_sha256": digest(out / "masks.json"), "masks": printable(shlex.quote(str(out / "masks.json"))),
               "summary": summary(labels, len(shown), low, min_score),
               "total": sum(item["given"] for item in items),
               "others": [f"{one['score']:.2f} {one['name']}, box {one['id']}, {one['file']}" for one in rest]}
    pages = split(items)
    paths = [out / (f"review-{page}.html" if page else "review.html") for page in (0, *range(2, len(pages) + 1))]
    for page, path in enumerate(paths):
        write_page(path, content | {"items": pages[page], "page": page, "pages": [path.name for path in paths]})
    for number in itertools.count(max(2, len(pages) + 1)):  # of an earlier review: about another masks.json
        try:
            (out / f"review-{number}.html").unlink()
        except FileNotFoundError:
            return paths


def summary(labels: BoxMasks, shown: int, low: int, min_score: float) -> str:
    number, none = len(labels.rles), labels.sources.count(None)
    if not number:
        return ""
    return (f"{counted(number, 'box')}, {number - none} with a mask"
            + ", made without a model" * (COLOURS in labels.sources) + f"; {none} have none" * bool(none) + ". "
            + f"Half of the scores are above {np.median(labels.scores):.2f}. "
            + f"Masks below {min_score:g} were left out of the file: {low}. " * bool(low)
            + ("All are here." if shown == number else f"Here are the lowest {shown}."))


def split(items: list[dict]) -> list[list[dict]]:
    """The boxes of each page, in order, so that the pictures of a page are LARGEST characters or a single box's."""
    pages, size = [[]], 0
    for item in items:
        size += len(item["photo"]) + len(item["mask"])
        if size > LARGEST and pages[-1]:
            pages.append([])
            size = len(item["photo"]) + len(item["mask"])
        pages[-1].append(item)
    return pages


def write_page(path: Path, content: dict) -> None:
    """Write review.html with its content. "<" is escaped, so that no name from a file can end the script element."""
    text = json.dumps(content).replace("<", r"\u003c")
    template = Path(__file__).with_name("review.html").read_text(encoding="utf-8")
    write_whole(path, template.replace(">DATA<", f">{text}<").encode())


def cut_outs(annotations: CocoBoxes, labels: BoxMasks, boxes: list[int], image_of: list[int]) -> dict[int, dict]:
    """For each of the numbered boxes its surroundings as a JPEG, "photo", and its mask as a PNG to lay over it, "mask",
    in base64; "" if the image cannot be read or there is no mask."""
    found = {k: {"photo": "", "mask": ""} for k in boxes}
    by_image = {}
    for k in boxes:
        by_image.setdefault(image_of[k], []).append(k)
    for i, of_image in tqdm(by_image.items(), desc="review", unit="image", disable=None):
        try:
            image = read_image(annotations, i)
        except UndecodableImage:
            continue
        for k in of_image:
            photo, mask = cut_out(image, annotations.boxes[k], labels.rles[k])
            found[k]["photo"] = in_base64(photo, "JPEG", quality=85)
            if mask is not None:
                found[k]["mask"] = in_base64(overlay(mask), "PNG", bits=2, transparency=bytes(c[3] for c in PALETTE))
    return found


def in_base64(image: Image.Image, format: str, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def cut_out(image: Image.Image, box: np.ndarray, rle: dict | None) -> tuple[Image.Image, Tensor | None]:
    """Crop a box (4,) xyxy and a margin of a fifth from an image, resize it to SIDES and draw the box.

    Returns it with the mask on the same grid, (H, W) bool."""
    x0, y0, x1, y1 = box.tolist()
    margin = max(6, 0.2 * max(x1 - x0, y1 - y0))
    frame = [int(max(0, x0 - margin)), int(max(0, y0 - margin)),
             int(min(image.width, x1 + margin) + 0.999), int(min(image.height, y1 + margin) + 0.999)]
    width, height = frame[2] - frame[0], frame[3] - frame[1]
    scale = min(max(max(width, height), SIDES[0]), SIDES[1]) / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    part = torch.from_numpy(np.array(image.crop(frame).resize(size, Image.BICUBIC))).permute(2, 0, 1)
    corners = (torch.tensor([[x0, y0, x1, y1]]) - torch.tensor(frame[:2]).repeat(2)) * scale
    part = draw_bounding_boxes(part, corners.clamp(min=0), colors=(250, 170, 30), width=1)
    mask = None
    if rle is not None:
        mask = Image.fromarray(coco_mask.decode(rle)[frame[1]:frame[3], frame[0]:frame[2]])
        mask = torch.from_numpy(np.array(mask.resize(size, Image.NEAREST))).bool()
    return Image.fromarray(part.permute(1, 2, 0).numpy()), mask


def overlay(mask: Tensor) -> Image.Image:
    """A mask (H, W) bool as an image of the numbers of PALETTE."""
    numbers = mask.to(torch.uint8)
    numbers[outline(mask, 2)], numbers[outline(~mask, 1)] = 2, 3
    image = Image.fromarray(numbers.numpy())
    image.putpalette([value for colour in PALETTE for value in colour[:3]])
    return image


# --------------------------------------------------------------------------------------------- its decisions


def digest(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits. Raises OSError."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_decisions(path: str) -> tuple[str, dict[str, str]]:
    """The digest of the masks.json that a decisions file is about, and KEEP or REJECT for annotation ids, as texts.

    Raises DataError if it is no such file."""
    try:
        check_ordinary(path)
        content = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing: name the decisions.json that the review page saved, mostly in the folder "
                        "of your downloads") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        content = None
    decisions = content.get("decisions") if isinstance(content, dict) else None
    if not (isinstance(decisions, dict) and isinstance(content.get("masks_sha256"), str)
            and all(decision in (KEEP, REJECT) for decision in decisions.values())):
        raise DataError(f"{path} is not a file of decisions as the review page saves it")
    return content["masks_sha256"], decisions


def check_masks(path: str) -> None:
    """Raises DataError if there is no file, with what was meant."""
    if not os.path.isfile(path):
        inside = os.path.join(path, "masks.json")
        what = "is a folder" if os.path.isdir(path) else "is no file" if os.path.exists(path) else "is missing"
        raise DataError(f"{path} {what}: name " + (inside if os.path.isfile(inside) else
                        "the masks.json beside the review page that the decisions were made on"))


def apply_decisions(path: str, masks_path: str) -> tuple[dict, str]:
    """The content of masks.json with the rejected masks emptied, and how many were, in words.

    A rejected annotation is like one that has only a box: `segmentation` [] and the area of the box. `score` and
    `source` stay, as for masks below --min-score: they are about the mask that was made. Raises DataError and OSError.
    """
    about, decisions = read_decisions(path)
    check_masks(masks_path)
    content = read_coco(masks_path)
    if about != digest(masks_path):
        raise DataError(f"{path} is about another file than {masks_path}, or that has changed since its review page "
                        "was written: the SHA-256 differs")
    boxes = {str(row["id"]): row for row in content["annotations"] if not row.get("iscrowd")}
    unknown = [printable(name)[:40] for name in decisions if name not in boxes]
    if unknown:
        raise DataError(f"{path} decides about {counted(len(unknown), 'annotation')} that {masks_path} does not have "
                        f"(id {first_five(unknown)})")
    left = sum(bool(row.get("segmentation")) and name not in decisions for name, row in boxes.items())
    rejected = [boxes[name] for name, decision in decisions.items() if decision == REJECT]
    for row in rejected:
        row |= {"segmentation": [], "area": row["bbox"][2] * row["bbox"][3]}
    kept = counted(len(decisions) - len(rejected), "mask")
    return content, f"{kept} kept, {len(rejected)} rejected, {left} not looked at"
