"""Figures for people: instances drawn over an image, and sheets of what models find.

`draw_instances` draws over one image. `sheet` places the panels of each image side by side: its boxes, the masks of one
model or several and, if the data set has them, the true masks. Colours tell instances apart and are the same in every
run; on a sheet a prediction takes the colour of the object that it overlaps.
"""
import colorsys
from collections.abc import Iterable, Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d
from torchvision.ops import box_iou
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from data import pixels, view
from formats.coco import CocoBoxes
from formats.files import printable
from formats.pictures import read_image, save_image
from masks import decode
from model import Instances, confident

COLOURS = [(230, 60, 60), (60, 150, 240), (70, 190, 80), (250, 170, 30), (170, 90, 220), (40, 200, 200),
           (240, 110, 190), (160, 110, 60), (190, 220, 50), (110, 120, 250), (0, 130, 110), (255, 215, 90)]
DRAWN = (480, 1600)        # limits of the longer side of a drawn image, pixels: names stay legible, files small
PANEL, GAP = 320, 6        # of a sheet, pixels: the longer side of a panel, the space between panels,
HEADER = 30                # and the height of a line of text above them
BACKGROUND = (24, 24, 28)


def draw_instances(image: Tensor, boxes: Tensor, labels: Tensor, scores: Tensor | None = None,
                   masks: Tensor | None = None, names: list[str] | None = None,
                   colours: list[int] | None = None) -> Tensor:
    """Draw N instances over an image (3, H, W) uint8; returns a new one.

    boxes (N, 4) xyxy, pixels of the image. With masks (N, H, W) bool an instance is a translucent fill with an
    outline, without them its box. names[label] and the score are written where they fit; with names = [], neither.
    colours: the number of each instance's colour (see colour_of), by default its position.
    """
    colours = [colour_of(c) for c in (range(len(boxes)) if colours is None else colours)]
    width = max(2, round(max(image.shape[1:]) / 400))
    if masks is None:
        if len(boxes):
            image = draw_bounding_boxes(image, boxes.round(), colors=colours, width=width)
    else:
        # one at a time: torchvision paints pixels that two masks share black if it gets both at once
        image = image.clone()
        windows = [(window(mask, width), mask, colour) for mask, colour in zip(masks, colours)][::-1]  # first on top
        for (y, x), mask, colour in windows:
            image[:, y, x] = fill_mask(image[:, y, x], mask[y, x], colour)
        for (y, x), mask, colour in windows:
            image[:, y, x] = outline_mask(image[:, y, x], mask[y, x], colour, width)
    if names == []:
        return image.clone()
    texts = [printable(names[label])[:100] if names else str(label) for label in labels.tolist()]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores.tolist())]
    return write_texts(image, boxes, texts, colours)


def draw_objects(image: Image.Image, objects: list[dict], classes: list[dict]) -> Image.Image:
    """Draw COCO results, each with bbox, category_id, score and segmentation (RLE), over an image resized to DRAWN."""
    longest = max(image.size)
    scale = min(max(longest, DRAWN[0]), DRAWN[1]) / longest
    size = max(1, round(image.height * scale)), max(1, round(image.width * scale))
    label = {c["id"]: i for i, c in enumerate(classes)}
    masks = [np.asarray(Image.fromarray(coco_mask.decode(o["segmentation"])).resize(size[::-1], Image.NEAREST))
             for o in objects]
    return to_pil_image(draw_instances(
        pixels(view(image, size, flip=False)), corners(objects) * scale,
        torch.tensor([label[o["category_id"]] for o in objects], dtype=torch.int64),
        torch.tensor([o["score"] for o in objects]), stack(masks, *size), [c["name"] for c in classes]))


def fill_mask(image: Tensor, mask: Tensor, colour: tuple) -> Tensor:
    return draw_segmentation_masks(image, mask, alpha=0.45, colors=colour)


def outline_mask(image: Tensor, mask: Tensor, colour: tuple, width: int) -> Tensor:
    """The mask's outline in its colour, `width` pixels wide, and a dark line around it, to be seen on bright images."""
    image = draw_segmentation_masks(image, outline(mask, width), alpha=1.0, colors=colour)
    return draw_segmentation_masks(image, outline(~mask, 1), alpha=0.5, colors="black")


def colour_of(number: int) -> tuple[int, int, int]:
    """RGB: first COLOURS, then hues that are a golden ratio of the colour circle apart, so that neighbours differ."""
    if number < len(COLOURS):
        return COLOURS[number]
    hue = number * 0.618034 % 1
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(hue, (0.55, 0.75, 0.95)[number % 3], 0.9))


def window(mask: Tensor, margin: int) -> tuple[slice, slice]:
    """Rows and columns that hold a mask (H, W) and `margin` pixels around it; one pixel if it is empty.

    Drawing in this window alone costs what the object covers.
    """
    y, x = mask.any(1).nonzero(), mask.any(0).nonzero()
    if not len(y):
        return slice(0, 1), slice(0, 1)
    return (slice(max(0, int(y[0]) - margin), int(y[-1]) + margin + 1),
            slice(max(0, int(x[0]) - margin), int(x[-1]) + margin + 1))


def outline(mask: Tensor, width: int) -> Tensor:
    """The pixels of a mask (H, W) within `width` pixels of the outside. The image's edge does not count as outside."""
    outside = max_pool2d((~mask)[None].float(), 2 * width + 1, stride=1, padding=width)[0] > 0
    return mask & outside


def write_texts(image: Tensor, boxes: Tensor, texts: list[str], colours: list[tuple]) -> Tensor:
    """Write each text at the upper left corner of its box (xyxy), unless it would cover an earlier one."""
    canvas = to_pil_image(image)
    draw = ImageDraw.Draw(canvas)
    font = text_font(max(11, round(max(canvas.size) / 64)))
    taken = []
    for (x0, y0, x1, y1), text, colour in zip(boxes.tolist(), texts, colours):
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        w, h = right + 4, bottom + 4
        x = max(0, min(x0, canvas.width - w))
        y = y0 - h if y0 >= h else y0  # above the box; inside it at the image's upper edge
        overlaps = any(x < r and l < x + w and y < b and t < y + h for l, t, r, b in taken)
        if overlaps or w > 2.5 * (x1 - x0):
            continue
        taken.append((x, y, x + w, y + h))
        draw.rectangle(taken[-1], fill=colour)
        dark = 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] > 140
        draw.text((x + 2, y + 1), text, fill="black" if dark else "white", font=font)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def text_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu where the system has it, since Pillow's own font lacks even umlauts."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def matching_colours(boxes: Tensor, found: Tensor) -> list[int]:
    """Colour numbers for predicted boxes `found` (N, 4): that of the object with a box IoU above 0.5, else a free one.

    Object i of `boxes` (G, 4) has colour i.
    """
    if not len(boxes) or not len(found):
        return list(range(len(boxes), len(boxes) + len(found)))
    best, index = (torch.cat(x) for x in zip(*(box_iou(some, boxes).max(dim=1) for some in found.split(100))))
    return [i if b > 0.5 else len(boxes) + n for n, (b, i) in enumerate(zip(best.tolist(), index.tolist()))]


class SheetRow(NamedTuple):
    """An image on a sheet: its objects and what was found. Each entry of `found` is a panel."""

    image: Tensor              # (3, H, W) uint8
    boxes: Tensor              # (G, 4) xyxy, pixels of the image
    labels: Tensor             # (G,)
    found: list[Instances]     # the predictions of each model, at the image's size
    true_masks: Tensor | None  # (G, H, W) bool; None: an object has no mask, the panel stays dark
    notes: Sequence[str] = ()  # a line above each panel, from the left


def sheet_rows(annotations: CocoBoxes, truth: COCO, results: list[list[dict]], count: int,
               order: Iterable[int] | None = None, notes: Sequence[Sequence[str]] | None = None) -> list[SheetRow]:
    """Up to `count` images that have objects, evenly spaced over the data set, with their results of each model.

    order: indices of images, to space them over this order rather than that of the data set. notes: of each image.
    """
    label = {c["id"]: i for i, c in enumerate(annotations.classes)}
    order = range(len(annotations)) if order is None else order
    with_objects = [i for i in order if len(annotations.image_boxes(i)[0])]
    choices = np.array(with_objects or range(len(annotations)))
    rows = []
    for i in choices[np.linspace(0, len(choices) - 1, min(count, len(choices))).round().astype(int)].tolist():
        image_id, (height, width) = int(annotations.image_ids[i]), annotations.sizes[i].tolist()
        objects = [a for a in truth.imgToAnns[image_id] if not a["iscrowd"]]
        masks = stack([truth.annToMask(a) for a in objects], height, width) \
            if all(a.get("segmentation") for a in objects) else None
        found = []
        for of_model in results:
            of_image = [r for r in of_model if r["image_id"] == image_id]
            found.append(Instances(corners(of_image), torch.tensor([r["score"] for r in of_image]),
                                   torch.tensor([label[r["category_id"]] for r in of_image], dtype=torch.int64),
                                   [r["segmentation"] for r in of_image], (height, width)))
        labels = torch.tensor([label[a["category_id"]] for a in objects], dtype=torch.int64)
        image = pixels(read_image(annotations, i))
        rows.append(SheetRow(image, corners(objects), labels, found, masks, notes[i] if notes else ()))
    return rows


def corners(objects: list[dict]) -> Tensor:
    """COCO's bbox (xywh) of N objects as (N, 4) xyxy."""
    boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32).reshape(-1, 4)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)


def stack(masks: list[np.ndarray], height: int, width: int) -> Tensor:
    """N masks (H, W) as one bool tensor (N, H, W), N = 0 too."""
    return torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, height, width))


def resized_masks(masks: Tensor, size: list[int]) -> Tensor:
    """masks (N, H, W) bool at another size (height, width), N = 0 too."""
    if not len(masks):
        return masks.new_zeros((0, *size))
    return interpolate(masks[:, None].float(), size, mode="nearest-exact")[:, 0].bool()


def panels(row: SheetRow, names: list[str] | None, threshold: float) -> list[Image.Image]:
    """The panels of an image: boxes, the masks of each model, true masks. The longer side becomes PANEL pixels."""
    scale = PANEL / max(row.image.shape[1:])
    size = [max(1, round(side * scale)) for side in row.image.shape[1:]]
    image = interpolate(row.image[None].float(), size, mode="bilinear", antialias=True)[0].round().byte()
    boxes = row.boxes * scale
    drawn = [draw_instances(image, boxes, row.labels, names=names)]
    for found in row.found:
        drawn.append(draw_found(image, boxes, confident(found, threshold), scale, names))
    drawn.append(image // 4 if row.true_masks is None else draw_instances(
        image, boxes, row.labels, masks=resized_masks(row.true_masks, size), names=names))
    return [to_pil_image(panel) for panel in drawn]


def draw_found(image: Tensor, boxes: Tensor, found: Instances, scale: float, names: list[str] | None) -> Tensor:
    """Predictions over an image that is already resized by `scale`, with its objects' boxes (G, 4)."""
    found_boxes, filled = found.boxes * scale, torch.tensor([coco_mask.area(rle) > 0 for rle in found.rles]).bool()
    masks = decode(list(compress(found.rles, filled)), found.size)
    colours = torch.tensor(matching_colours(boxes, found_boxes)).long()
    if not filled.all():  # an instance without a mask is a plain box: the room for names is left to the others
        image = draw_bounding_boxes(image, found_boxes[~filled].round(), width=2,
                                    colors=[colour_of(c) for c in colours[~filled].tolist()])
    return draw_instances(image, found_boxes[filled], found.labels[filled], found.scores[filled],
                          resized_masks(masks, image.shape[1:]), names, colours[filled].tolist())


def sheet(rows: list[SheetRow], path: str, names: list[str] | None = None, threshold: float = 0.6,
          titles: Sequence[str] = ()) -> None:
    """Write a PNG, or a JPEG if `path` ends so, with the panels of each image; two images side by side if there are
    more than four.

    The last panel, the true masks, is left out if no image has them. Predictions that score below the threshold are
    left out; of rescored ones, sqrt(d q), most below 0.6 are wrong. names: see draw_instances. titles: of the panels,
    by default those of one model.
    """
    titles = titles or ["input and its boxes", f"predicted masks, score >= {threshold:g}", "ground-truth masks"]
    per_line, with_truth = 2 if len(rows) > 4 else 1, any(row.true_masks is not None for row in rows)
    columns = 1 + max((len(row.found) for row in rows), default=1) + with_truth
    drawn = [(panels(row, names, threshold)[:columns], row.notes) for row in rows]
    lines = [drawn[i:i + per_line] for i in range(0, len(drawn), per_line)]
    heights = [max(panel.height for image, _ in line for panel in image) for line in lines]
    cell, note = PANEL + GAP, HEADER if any(row.notes for row in rows) else 0
    canvas = Image.new("RGB", (columns * per_line * cell + (per_line - 1) * 4 * GAP + GAP,
                               HEADER + sum(heights) + (note + GAP) * len(lines)), BACKGROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=16)
    y = HEADER
    for line, height in zip(lines, heights):
        for place, (image, notes) in enumerate(line):
            for column, (panel, title, text) in enumerate(zip(image, titles, [*notes, *[""] * columns])):
                x = GAP + place * (columns * cell + 4 * GAP) + column * cell
                if line is lines[0]:
                    draw.text((x + PANEL // 2, HEADER // 2), printable(title), fill="white", font=font, anchor="mm")
                draw.text((x + PANEL // 2, y + note // 2), printable(text), fill="white", font=font, anchor="mm")
                canvas.paste(panel, (x + (PANEL - panel.width) // 2, y + note + (height - panel.height) // 2))
        y += note + height + GAP
    save_image(canvas, path, "JPEG" if path.lower().endswith((".jpg", ".jpeg")) else "PNG", quality=85)
