"""Masks for the boxes of a data set from a trained model.

For one image, top to bottom:

    assigned    the model's detections go to the boxes by Alg. 1, in the order of the mask-aware score (Eq. 1)
    prompted    a box that got none asks the mask head itself: at the locations that would learn this box
                (FCOS's targets, assign.py), of whose masks it takes the one with the best score
    cut         at the image's own size, to the box

selftraining.py stops after the first step, as the paper's Sec. 2 does; predict.py --boxes takes both, so that every
box gets a mask. `agreement` compares masks with those that a file has, for measuring only.
"""
import json
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops import box_iou

from assign import LEVEL_RANGES, assign_masks, image_targets
from data import TestImages, readable_batches
from formats.coco import CocoBoxes, DataError
from masks import box_masks, cells, encode, paste_masks
from model import CondInst, Detections, Locations, Predictions, detect, mask_logits
from teacher import mask_aware_score

ASSIGNED, PROMPTED = "assigned", "prompted"
CHUNK = 64        # masks in memory at once
CANDIDATES = 9    # locations that are asked for a box that has none of its own: as many as 3 x 3 around its centre


class Labels(NamedTuple):
    """What the n boxes of an image, or of a data set, are given."""

    rles: list[dict | None]    # COCO run lengths at the image's own size, within the box; None: no mask
    scores: np.ndarray         # (n,) how far to trust it; 0 where there is no mask
    sources: list[str | None]  # ASSIGNED, PROMPTED, or None where there is no mask


# ------------------------------------------------------------------------------------------------- one image


@torch.no_grad()
def label_image(image: Predictions, boxes: Tensor, size: tuple[int, int], original_size: tuple[int, int],
                  score_threshold: float = 0.05, classes: Tensor | None = None) -> Labels:
    """Masks for the boxes (G, 4) of one image, xyxy pixels of the network's input, whose true size is `size`.

    classes (G,): the class of each box in the model, -1 where it knows none. With them each box takes detections of
    its own class alone, and those left over are prompted; None: Alg. 1 as the paper has it, and nothing else.
    original_size: (height, width) of the masks.
    """
    rows, scores = assigned_rows(image, boxes, size, score_threshold, classes)
    rles = cut_masks(image, rows, boxes, size, original_size)
    left = torch.tensor([rle is None for rle in rles], dtype=torch.bool)
    rows[left], scores[left] = -1, 0
    sources = [None if is_left else ASSIGNED for is_left in left.tolist()]
    if classes is not None:
        rows, scores = prompt(image, boxes, classes, size, rows, scores)
        asked = cut_masks(image, torch.where(left, rows, -1), boxes, size, original_size)
        for g in left.nonzero()[:, 0].tolist():
            sources[g], rles[g] = PROMPTED, asked[g]
            if asked[g] is None:  # the head sees nothing in this box: the box itself, and a score that says so
                rles[g], scores[g] = filled_box(boxes[g], size, original_size), 0
    return Labels(rles, scores.numpy(), sources)


def assigned_rows(image: Predictions, boxes: Tensor, size: tuple[int, int], score_threshold: float,
                  classes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Alg. 1: the location (G,) whose mask a box is given, -1 for none, and its mask-aware score (G,). On the CPU."""
    found = detect(image, limit=100 if classes is None else max(100, 2 * len(boxes)))
    iou = box_iou(found.boxes, boxes)
    if classes is not None:
        iou = iou * ((found.labels[:, None] == classes) | (classes < 0))
    able = (iou >= 0.5).any(1)
    found, iou = Detections(*(x[able] for x in found)), iou[able]
    logits, (h, w) = mask_logits(image, [found.locations]), cells(size)
    s = mask_aware_score(found.scores, logits.sigmoid()[:, :h, :w], box_masks(found.boxes, h, w), iou)
    match = assign_masks(iou, s, score_threshold=score_threshold).cpu()
    rows = torch.where(match >= 0, torch.cat([found.locations.cpu(), torch.tensor([-1])])[match], -1)
    scores = torch.where(match >= 0, torch.cat([s.cpu(), torch.zeros(1)])[match], 0.0)
    if classes is not None:  # a location may be found as two classes, but its one mask goes to one box
        taken = set()
        for g in scores.argsort(descending=True, stable=True).tolist():
            if int(rows[g]) in taken:
                rows[g], scores[g] = -1, 0
            taken.add(int(rows[g]))
    return rows, scores


def prompt(image: Predictions, boxes: Tensor, classes: Tensor, size: tuple[int, int], rows: Tensor,
           scores: Tensor) -> tuple[Tensor, Tensor]:
    """rows and scores (G,) with those that are -1 filled in: the locations that FCOS would have learn a box are asked.

    These are of the box's own level, and of no other box. A box has none where smaller ones cover its centre, or
    where it lies between the locations of its level: then the nearest that are free. No location answers twice, as
    long as there are more of them than boxes.
    """
    rows, scores = rows.clone(), scores.clone()
    locations = Locations(*(x.cpu() for x in image.locations))
    taken = torch.zeros(len(locations.xy), dtype=torch.bool)
    taken[rows[rows >= 0]] = True
    owner = owners(image.locations, boxes)                          # (L,) the box that a location would learn
    own = ((owner >= 0) & ~taken).nonzero()[:, 0]
    own = own[rows[owner[own]] < 0]
    own_scores = prompt_scores(image, own, owner[own], boxes, classes, size)
    for k in own_scores.argsort(stable=True).tolist():                # the best comes last, and stays
        rows[owner[own[k]]], scores[owner[own[k]]] = own[k], own_scores[k]
    taken[rows[rows >= 0]] = True
    for g in (rows < 0).nonzero()[:, 0].tolist():
        near = nearest(locations, boxes[g].cpu(), taken, owner >= 0)
        near_scores = prompt_scores(image, near, torch.full_like(near, g), boxes, classes, size)
        best = near_scores.argmax()
        rows[g], scores[g] = near[best], near_scores[best]
        taken[near[best]] = True
    return rows, scores


def owners(locations: Locations, boxes: Tensor) -> Tensor:
    """FCOS's targets: for each location (L,) the number of the box that it would learn, or -1. On the CPU."""
    labels, part = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device), 2 ** 20 // max(len(boxes), 1) + 1
    parts = zip(*(x.split(part) for x in locations))  # thousands of boxes on an image must fit into memory
    return torch.cat([image_targets(Locations(*some), boxes, labels, 1)[2] for some in parts]).cpu()


def nearest(locations: Locations, box: Tensor, taken: Tensor, owned: Tensor) -> Tensor:
    """The CANDIDATES locations to ask for a box (4,): free ones of its level near its centre, first those that no
    other box owns; where its level has none, of any level; where there is none at all, taken ones."""
    center, half = (box[:2] + box[2:]) / 2, float((box[2:] - box[:2]).max()) / 2
    level = next(i for i, (_, high) in enumerate(LEVEL_RANGES) if half <= high)
    free = ~taken
    for choice in ((locations.level == level) & free & ~owned, (locations.level == level) & free, free,
                   torch.ones_like(taken)):
        if choice.any():
            rows = choice.nonzero()[:, 0]
            return rows[(locations.xy[rows] - center).norm(dim=1).argsort(stable=True)[:CANDIDATES]]


def prompt_scores(image: Predictions, rows: Tensor, owner: Tensor, boxes: Tensor, classes: Tensor,
                  size: tuple[int, int]) -> Tensor:
    """Eq. 1 for the masks of locations rows (K,), asked for the boxes owner (K,): c is the confidence in the box's own
    class, and the mask counts within that box. (K,) on the CPU."""
    (h, w), scores = cells(size), [torch.zeros(0)]
    for r, g in zip(rows.to(boxes.device).split(CHUNK), owner.to(boxes.device).split(CHUNK)):
        p = image.class_logits[0, r].sigmoid()                                                     # (k, C)
        c = torch.where(classes[g] >= 0, p.gather(1, classes[g].clamp(min=0)[:, None])[:, 0], p.amax(1))
        c = (c * image.centerness[0, r].sigmoid()).sqrt()
        inside = box_masks(boxes[g], h, w)
        x, y = ((boxes[g, :2] + boxes[g, 2:]) / 8).long().unbind(1)   # a box between two cells has that of its centre
        inside[torch.arange(len(g), device=g.device), y.clamp(0, h - 1), x.clamp(0, w - 1)] = True
        scores.append(mask_aware_score(c, mask_logits(image, [r]).sigmoid()[:, :h, :w], inside, None).cpu())
    return torch.cat(scores)


def cut_masks(image: Predictions, rows: Tensor, boxes: Tensor, size: tuple[int, int],
              original_size: tuple[int, int]) -> list[dict | None]:
    """Run lengths of the masks of locations rows (G,) at original_size, cut to the boxes; None where the row is -1 and
    where nothing of the mask lies in the box."""
    rles, given = [None] * len(rows), (rows >= 0).nonzero()[:, 0]
    for some in given.split(CHUNK):
        some = some.to(boxes.device)
        logits = mask_logits(image, [rows.to(boxes.device)[some]])
        cut, _ = paste_masks(logits, size, original_size, within=box_pixels(boxes[some], size, original_size))
        for g, rle in zip(some.tolist(), cut):
            rles[g] = rle if coco_mask.area(rle) else None
    return rles


def box_pixels(boxes: Tensor, size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
    """The pixels x0 ... x1 - 1, y0 ... y1 - 1 (G, 4) of the image itself that boxes of the network's input touch."""
    (h, w), (height, width) = size, original_size
    boxes = (boxes * boxes.new_tensor([width / w, height / h]).repeat(2)).cpu()
    low, high = (boxes[:, :2] + 1e-2).floor(), (boxes[:, 2:] - 1e-2).ceil()  # rounding makes 1001.0001 of 1001
    return torch.cat([low, high], 1).long().clamp(min=0).minimum(torch.tensor([width, height]).repeat(2))


def filled_box(box: Tensor, size: tuple[int, int], original_size: tuple[int, int]) -> dict:
    x0, y0, x1, y1 = box_pixels(box[None], size, original_size)[0].tolist()
    return encode(np.ones((x1 - x0, y1 - y0), bool), x0, y0, original_size)


# -------------------------------------------------------------------------------------------------- a data set


def label_dataset(model: CondInst, annotations: CocoBoxes, *, min_size: int, max_size: int,
                  score_threshold: float = 0.05, classes: Tensor | None = None, batch_size: int = 1, workers: int = 2,
                  device: torch.device | str = "cpu", amp_dtype: torch.dtype | None = None) -> Labels:
    """label_image for every box of a data set, in the order of annotations.boxes.

    classes: the class in the model of each of the data set's, -1 for none; see label_image. An image that cannot
    be decoded is named, and its boxes have no mask.
    """
    device = torch.device(device)
    rles, scores, sources = [None] * len(annotations.boxes), np.zeros(len(annotations.boxes)), [None] * len(
        annotations.boxes)
    place = {image_id: i for i, image_id in enumerate(annotations.image_ids.tolist())}
    images = TestImages(annotations, min_size, max_size)
    model.eval()
    for batch in readable_batches(images, "label", batch_size=batch_size, workers=workers, device=device):
        with torch.no_grad(), torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            predictions = model(batch.images, batch.sizes)
        for b, image_id in enumerate(batch.image_ids):
            own = None if classes is None else classes.to(device)[batch.labels[b]]
            labels = label_image(predictions.of_image(b), batch.boxes[b], batch.sizes[b], batch.original_sizes[b],
                                   score_threshold, own)
            k = slice(*annotations.offsets[place[image_id]:place[image_id] + 2])
            rles[k], scores[k], sources[k] = labels
    return Labels(rles, scores, sources)


def model_classes(trained: list[dict] | None, classes: list[dict]) -> Tensor:
    """Which class of the model each of a data set's classes is, by its name; -1 for one that it does not know."""
    places = {} if trained is None else {c["name"]: i for i, c in enumerate(trained)}
    return torch.tensor([places.get(c["name"], -1) for c in classes])


def with_masks(annotations: CocoBoxes, labels: Labels, min_score: float = 0.0) -> dict:
    """The annotation file with `segmentation`, `area`, `score` and `source` of the boxes replaced; the rest as it was.

    A box without a mask, or with one that is scored below min_score, has the segmentation [] and its old area: training
    with masks then learns its box alone. Crowds are left as they are.
    """
    with open(annotations.json_path, encoding="utf-8-sig") as file:
        content = json.load(file)
    for annotation in content["annotations"]:
        if not annotation.get("iscrowd"):
            annotation |= {"segmentation": [], "score": 0.0, "source": None}
    for row, rle, score, source in zip(annotations.rows.tolist(), labels.rles, labels.scores.tolist(), labels.sources):
        content["annotations"][row] |= {"score": score, "source": source}
        if rle is not None and score >= min_score:
            content["annotations"][row] |= {"segmentation": rle, "area": int(coco_mask.area(rle))}
    return content


def opencv():
    """The package cv2, for --polygons alone. Raises DataError where it is not installed."""
    try:
        import cv2
    except ImportError:
        raise DataError("polygons need OpenCV: pip install opencv-python-headless") from None
    return cv2


def polygons(rle: dict) -> list[list[float]]:
    """A mask's outlines as COCO polygons, x and y in turn, pixels; its holes are filled.

    OpenCV's contours run through the middles of the outer pixels. Those of the mask enlarged four times lie an eighth
    of a pixel inside its edge, near enough for pycocotools to draw the same pixels.
    """
    cv2 = opencv()
    mask = coco_mask.decode(rle).repeat(4, 0).repeat(4, 1)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [((contour.reshape(-1) + 0.5) / 4).tolist() for contour in contours]


# --------------------------------------------------------------------------- against masks that the file has


def agreement(annotations: CocoBoxes, rles: list[dict | None]) -> tuple[np.ndarray, np.ndarray]:
    """IoU with the masks that the annotations have, of the masks `rles` and of the boxes filled: (m,) each."""
    masks, filled = np.zeros(len(rles)), np.zeros(len(rles))
    for i, k in ((i, k) for i in range(len(annotations)) for k in range(*annotations.offsets[i:i + 2])):
        truth = annotations.rle(i, k)
        x0, y0, x1, y1 = annotations.boxes[k].astype(float)
        box = coco_mask.frPyObjects(np.array([[x0, y0, x1 - x0, y1 - y0]]), *annotations.size(i))
        filled[k] = coco_mask.iou(box, [truth], [0])[0, 0]
        masks[k] = 0 if rles[k] is None else coco_mask.iou([rles[k]], [truth], [0])[0, 0]
    return masks, filled


def report_agreement(annotations: CocoBoxes, labels: Labels) -> None:
    """Print how good the masks are, for which boxes (COCO's ranges of area), and whether their scores tell."""
    masks, filled = agreement(annotations, labels.rles)
    given, sources = np.array([rle is not None for rle in labels.rles], bool), np.array(labels.sources, object)
    best_first = np.flatnonzero(given)[np.argsort(-labels.scores[given], kind="stable")]
    quarter = max(1, len(best_first) // 4)
    sides = np.sqrt((annotations.boxes[:, 2:] - annotations.boxes[:, :2]).prod(1))
    rows = [("all boxes", np.ones(len(masks), bool)), ("boxes without a mask", ~given), ("boxes with a mask", given)]
    rows += [(f"    {source}", sources == source) for source in (ASSIGNED, PROMPTED)]
    rows += [(f"    {text}", given & (low <= sides) & (sides < high)) for text, low, high in (
        ("under 32 x 32 pixels", 0, 32), ("32 x 32 to 96 x 96", 32, 96), ("larger", 96, np.inf))]
    rows += [("    the quarter of the best scores", np.isin(np.arange(len(masks)), best_first[:quarter])),
             ("    the quarter of the worst scores", np.isin(np.arange(len(masks)), best_first[-quarter:]))]
    print(f"mean IoU with the masks that the file has\n{'':36}{'number':>8}{'filled':>8}{'mask':>8}")
    for text, of in rows:
        cells = [f"{values[of].mean():8.3f}" if of.any() else f"{'-':>8}" for values in (filled, masks)]
        print(f"{text:36}{of.sum():8}" + "".join(cells))
    print(f"masks, boxes filled where there is none: {np.where(given, masks, filled).mean():.3f}")
