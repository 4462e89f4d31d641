"""Masks for the boxes of a data set. For one image:

    assigned_masks   the model's detections go to the boxes by Alg. 1, as in the paper: tools/selftraining.py
    model_masks      every box gets the mask that its mask heads draw, fitted to it, and then its colours (refine.py)
    ColorMasks       the same without a model, from an ellipse in the box

`agreement` compares masks with those of the file, for measuring only.
"""
import json
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from assign import SCORE_THRESHOLD
from data import Batch, TestImages, pixels, readable_batches
from formats.coco import CocoBoxes, UndecodableImage, first_five, stated_exif
from formats.files import optional, warn
from formats.pictures import read_image
from masks import cells, paste_masks
from model import CondInst, Predictions, detect, mask_logits
from refine import FIT_STEPS, color_masks, ellipse, fitted_masks, pixel_masks, rounded
from teacher import match

ASSIGNED, MODEL, COLOURS = "assigned", "model", "colours"
MEASURED = 20  # boxes of a class whose masks are measured apart, at least


class BoxMasks(NamedTuple):
    """The masks of the n boxes of an image, or of a data set."""

    rles: list[dict | None]    # COCO run lengths at the image's own size, within the box; None: no mask
    scores: np.ndarray         # (n,) how far to trust it; 0 without a mask
    sources: list[str | None]  # ASSIGNED, MODEL, COLOURS, or None without a mask


# ------------------------------------------------------------------------------------------------- one image


@torch.no_grad()
def assigned_masks(image: Predictions, batch: Batch, b: int, boxes: Tensor,
                   score_threshold: float = SCORE_THRESHOLD) -> BoxMasks:
    """Alg. 1 for image b of a batch, and nothing else: a box without a detection has no mask.

    image: the predictions of the image. boxes (G, 4): xyxy pixels of the image itself. A score is the mask-aware one
    (Eq. 1).
    """
    size, original_size = batch.sizes[b], batch.original_sizes[b]
    matched = match(image, detect(image), batch.boxes[b], size, size, cells(size), score_threshold=score_threshold)
    boxes_found = (matched.assigned >= 0).nonzero()[:, 0]
    chosen = matched.assigned[boxes_found].to(matched.scores.device)
    masks, _ = paste_masks(mask_logits(image, [matched.found.locations[chosen]]), size, original_size,
                           within=rounded(boxes, original_size)[boxes_found])
    labels = BoxMasks([None] * len(boxes), np.zeros(len(boxes)), [None] * len(boxes))
    for g, rle, score in zip(boxes_found.tolist(), masks, matched.scores[chosen].tolist()):
        if coco_mask.area(rle):
            labels.rles[g], labels.scores[g], labels.sources[g] = rle, score, ASSIGNED
    return labels


def model_masks(image: Predictions, batch: Batch, b: int, boxes: Tensor, classes: Tensor, fit_steps: int = FIT_STEPS,
                colors: float = 1.0) -> BoxMasks:
    """A mask for every box of image b of a batch, whose teacher's view is the image itself.

    image: the predictions of the image. boxes (G, 4): xyxy pixels of the image itself. classes: the model's class for
    each class of the data set, -1: unknown. fit_steps, and colors, their strength: 0 leaves the step out.
    """
    masks = fitted_masks(image, batch.boxes[b], batch.sizes[b], classes[batch.labels[b]], fit_steps)
    height, width = batch.original_sizes[b]
    return at_pixels(batch.teacher_images[b, :, :height, :width], boxes, masks, colors, (height, width), MODEL)


def at_pixels(picture: Tensor, boxes: Tensor, guess: Tensor, colors: float, size: tuple[int, int],
              source: str) -> BoxMasks:
    """The masks of the first guess (G, n, n) and of the colours, of this strength, of picture (3, H, W) RGB 0..255."""
    picture = picture.float().contiguous() if colors else None
    masks = color_masks(picture, boxes.to(picture.device), guess, colors) if colors else guess
    rles, scores = pixel_masks(masks, guess, boxes, size, picture)
    return BoxMasks(rles, scores, [source] * len(rles))


# -------------------------------------------------------------------------------------------------- a data set


def label_dataset(model: CondInst, annotations: CocoBoxes, label: Callable, *, min_size: int, max_size: int,
                  batch_size: int = 1, workers: int = 2, device: torch.device | str = "cpu") -> BoxMasks:
    """The masks of every box of a data set, in the order of annotations.boxes.

    label: assigned_masks or model_masks, with its options. An image that cannot be decoded is named, and its boxes
    have no mask.
    """
    labels = no_masks(annotations)
    place = {image_id: i for i, image_id in enumerate(annotations.image_ids.tolist())}
    images = TestImages(annotations, min_size, max_size, whole=True)
    model.eval()
    for batch in readable_batches(images, "label", batch_size=batch_size, workers=workers, device=device):
        with torch.no_grad():
            predictions = model(batch.images, batch.sizes)
        for b, image_id in enumerate(batch.image_ids):
            i = place[image_id]
            boxes = torch.from_numpy(annotations.image_boxes(i)[0])
            fill_in(labels, annotations, i, label(predictions.of_image(b), batch, b, boxes))
    return labels


def no_masks(annotations: CocoBoxes) -> BoxMasks:
    n = len(annotations.boxes)
    return BoxMasks([None] * n, np.zeros(n), [None] * n)


def fill_in(labels: BoxMasks, annotations: CocoBoxes, i: int, of_image: BoxMasks) -> None:
    """Write the masks of image i into those of its data set."""
    k = slice(*annotations.offsets[i:i + 2])
    labels.rles[k], labels.scores[k], labels.sources[k] = of_image


class ColorMasks(Dataset):
    """Item i is the masks of the boxes of image i without a model, or what went wrong with the image."""

    def __init__(self, annotations: CocoBoxes, colors: float):
        self.annotations, self.colors = annotations, colors

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, i: int) -> BoxMasks | str:
        size, boxes = self.annotations.size(i), torch.from_numpy(self.annotations.image_boxes(i)[0])
        try:
            picture = pixels(read_image(self.annotations, i))
        except UndecodableImage as error:
            return str(error)
        return at_pixels(picture, boxes, ellipse().expand(len(boxes), -1, -1), self.colors, size, COLOURS)

    @staticmethod
    def collate(item):
        """An item as it is; the DataLoader's own way would turn its arrays into tensors."""
        return item


def label_without_model(annotations: CocoBoxes, colors: float = 1.0, workers: int = 2) -> BoxMasks:
    """Masks from boxes and colours alone, in the order of annotations.boxes, as in label_dataset."""
    labels = no_masks(annotations)
    loader = DataLoader(ColorMasks(annotations, colors), batch_size=None, num_workers=workers,
                        collate_fn=ColorMasks.collate)
    for i, item in enumerate(tqdm(loader, desc="label", unit="image", disable=None)):
        if isinstance(item, str):
            warn(f"{item}; it is left out")
        else:
            fill_in(labels, annotations, i, item)
    return labels


def model_classes(trained: list[dict] | None, classes: list[dict]) -> Tensor:
    """The model's class for each class of a data set: that of its id and name, else the first of its name, with a
    warning if there are more; -1 for a name that the model lacks."""
    exact, first = {}, {}
    for i, c in enumerate(trained or []):
        exact[c["id"], c["name"]] = i
        first.setdefault(c["name"], i)
    uses = Counter(name for _, name in exact) | Counter(c["name"] for c in classes)   # the larger count of the two
    unclear = [f"{c['name']!r} (id {c['id']})" for c in classes
               if (c["id"], c["name"]) not in exact and c["name"] in first and uses[c["name"]] > 1]
    if unclear:
        warn("several classes have the same name, and their ids do not tell which is meant: the model's first of that "
             f"name is taken for {first_five(unclear)}")
    return torch.tensor([exact.get((c["id"], c["name"]), first.get(c["name"], -1)) for c in classes])


def with_masks(annotations: CocoBoxes, labels: BoxMasks, min_score: float = 0.0) -> dict:
    """The annotation file with `segmentation`, `area`, `score` and `source` of the boxes replaced, the rest unchanged.

    A box without a mask, or whose mask scores below min_score, has the segmentation [] and its old area: training with
    masks then learns its box alone. Crowds are left as they are. If the images were read otherwise than the file states
    (--exif), its info says so from now on.
    """
    with open(annotations.json_path, encoding="utf-8-sig") as file:
        content = json.load(file)
    if annotations.exif != stated_exif(content):
        info = content.get("info")
        content["info"] = (info if isinstance(info, dict) else {}) | {"exif": annotations.exif}
    for annotation in content["annotations"]:
        if not annotation.get("iscrowd"):
            annotation |= {"segmentation": [], "score": 0.0, "source": None}
    for row, rle, score, source in zip(annotations.rows.tolist(), labels.rles, labels.scores.tolist(), labels.sources):
        content["annotations"][row] |= {"score": score, "source": source}
        if rle is not None and score >= min_score:
            content["annotations"][row] |= {"segmentation": rle, "area": int(coco_mask.area(rle))}
    return content


def polygons(rle: dict) -> list[list[float]]:
    """The outlines of a mask as COCO polygons, x and y in turn, pixels; holes are filled. Raises UserError if OpenCV is
    missing.

    OpenCV's contours run through the middles of the outer pixels. Those of the mask enlarged four times lie an eighth
    of a pixel inside its edge, near enough for pycocotools to draw the same pixels.
    """
    cv2 = optional("cv2", "--polygons")
    x, y, w, h = coco_mask.toBbox(rle).astype(int).tolist()
    mask = coco_mask.decode(rle)[y:y + h, x:x + w].repeat(4, 0).repeat(4, 1)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=(4 * x, 4 * y))
    return [((contour.reshape(-1) + 0.5) / 4).tolist() for contour in contours]


# --------------------------------------------------------------------------- against masks that the file has


def agreement(annotations: CocoBoxes, rles: list[dict | None]) -> tuple[np.ndarray, np.ndarray]:
    """IoU with the masks of the annotations, (m,): of the masks `rles`, and of the filled boxes."""
    masks, filled = np.zeros(len(rles)), np.zeros(len(rles))
    for i, k in ((i, k) for i in range(len(annotations)) for k in range(*annotations.offsets[i:i + 2])):
        truth = annotations.rle(i, k)
        x0, y0, x1, y1 = annotations.boxes[k].astype(float)
        box = coco_mask.frPyObjects(np.array([[x0, y0, x1 - x0, y1 - y0]]), *annotations.size(i))
        filled[k] = coco_mask.iou(box, [truth], [0])[0, 0]
        masks[k] = 0 if rles[k] is None else coco_mask.iou([rles[k]], [truth], [0])[0, 0]
    return masks, filled


def report_agreement(annotations: CocoBoxes, labels: BoxMasks) -> None:
    """Print the quality of the masks by size (COCO's ranges of area), score and class (of MEASURED boxes or more)."""
    masks, filled = agreement(annotations, labels.rles)
    given = np.array([rle is not None for rle in labels.rles], bool)
    best_first = np.flatnonzero(given)[np.argsort(-labels.scores[given], kind="stable")]
    quarter = max(1, len(best_first) // 4)
    sides = np.sqrt((annotations.boxes[:, 2:] - annotations.boxes[:, :2]).prod(1))
    rows = [("all boxes", np.ones(len(masks), bool)), ("boxes without a mask", ~given), ("boxes with a mask", given)]
    rows += [(f"    {text}", given & (low <= sides) & (sides < high)) for text, low, high in (
        ("under 32 x 32 pixels", 0, 32), ("32 x 32 to 96 x 96", 32, 96), ("larger", 96, np.inf))]
    rows += [("    the quarter of the best scores", np.isin(np.arange(len(masks)), best_first[:quarter])),
             ("    the quarter of the worst scores", np.isin(np.arange(len(masks)), best_first[-quarter:]))]
    rows += [(f"    {c['name']}", given & (annotations.labels == label)) for label, c in enumerate(annotations.classes)
             if (annotations.labels == label).sum() >= MEASURED]
    print(f"mean IoU with the masks that the file has\n{'':36}{'number':>8}{'filled':>8}{'mask':>8}")
    for text, of in rows:
        cells = [f"{values[of].mean():8.3f}" if of.any() else f"{'-':>8}" for values in (filled, masks)]
        print(f"{text:36}{of.sum():8}" + "".join(cells))
    print(f"masks, boxes filled where there is none: {np.where(given, masks, filled).mean():.3f}")
