"""Which prediction answers for which box: the two assignments of BoxTeacher.

fcos_targets      student: which location learns which ground-truth box (FCOS Sec. 3.1, centre sampling)
batch_instances   student: which of those locations also learn a mask, at most 64 an image
assign_masks      teacher: which predicted mask becomes the pseudo mask of which box (paper Alg. 1)
"""
from typing import NamedTuple

import torch
from torch import Tensor

from model import Locations, Predictions, constant

LEVEL_RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, float("inf")))  # largest of ltrb, pixels
CENTER_RADIUS = 1.5  # strides


class Targets(NamedTuple):
    """What each of the L locations of B images shall predict. C classes; the label C is background."""

    labels: Tensor  # (B, L) int64
    ltrb: Tensor    # (B, L, 4) strides; 0 at background
    boxes: Tensor   # (B, L) int64: the box, counted over the whole batch, or -1 at background


def fcos_targets(locations: Locations, boxes: list[Tensor], labels: list[Tensor], num_classes: int) -> Targets:
    """FCOS targets of a batch. boxes[b] (G_b, 4) xyxy pixels of the network's input, labels[b] (G_b,)."""
    first, images = 0, []
    for b, l in zip(boxes, labels):
        images.append(image_targets(locations, b, l, num_classes, first))
        first += len(b)
    return Targets(*map(torch.stack, zip(*images)))


def image_targets(locations: Locations, boxes: Tensor, labels: Tensor, num_classes: int,
                    first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """One image of fcos_targets; `first` is the number of its first box within the batch.

    A location is a candidate for a box that (1) holds it, strictly, within 1.5 strides of the box's centre, and
    (2) has its farthest side at a distance of the location's level. Among several boxes the smallest wins.
    """
    xy, stride = locations.xy, locations.stride
    if len(boxes) == 0:
        nothing = torch.full_like(locations.level, -1)
        return torch.full_like(nothing, num_classes), xy.new_zeros(len(xy), 4), nothing

    (x, y), (x0, y0, x1, y1) = xy[:, None].unbind(2), boxes.unbind(1)                           # (L, 1), (G,)
    center_x, center_y, reach = (x0 + x1) / 2, (y0 + y1) / 2, CENTER_RADIUS * stride[:, None]
    inside = ((x > torch.maximum(x0, center_x - reach)) & (x < torch.minimum(x1, center_x + reach))
              & (y > torch.maximum(y0, center_y - reach)) & (y < torch.minimum(y1, center_y + reach)))
    farthest = torch.maximum(torch.maximum(x - x0, x1 - x), torch.maximum(y - y0, y1 - y))      # (L, G)
    low, high = constant(LEVEL_RANGES, xy.device)[locations.level, :, None].unbind(1)           # (L, 1)
    in_range = (farthest >= low) & (farthest <= high)

    area = torch.where(inside & in_range, (x1 - x0) * (y1 - y0), torch.inf)                     # (L, G)
    smallest, box = area.min(1)
    positive = smallest < torch.inf
    ltrb = torch.cat([xy - boxes[box, :2], boxes[box, 2:] - xy], 1) / stride[:, None]
    return (torch.where(positive, labels[box], num_classes), ltrb * positive[:, None],
            torch.where(positive, box + first, -1))


@torch.no_grad()
def batch_instances(predictions: Predictions, targets: Targets, boxes: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The instances of a batch, see select_instances: rows[b] of image b, and gt (K,), the box of each of all K,
    counted over the batch, or -1 where it only fills up. An image without boxes has none."""
    rows, gt = [], []
    for b, image_boxes in enumerate(boxes):
        image_rows, chosen = select_instances(predictions.class_logits[b], predictions.centerness[b],
                                                targets.boxes[b], limit=64 if len(image_boxes) else 0)
        rows.append(image_rows)
        gt.append(torch.where(chosen, targets.boxes[b, image_rows], -1))
    return rows, torch.cat(gt)


def select_instances(class_logits: Tensor, centerness: Tensor, boxes: Tensor, limit: int = 64) -> tuple[Tensor, Tensor]:
    """The positive locations of one image whose masks are learnt, at most `limit`.

    class_logits (L, C), centerness (L,) logits, boxes (L,) the assigned box or -1. Every box with positives
    gets the same share of the limit, at least one, filled with its most confident locations; where there are
    more boxes than the limit, the most confident of these remain. Returns rows (limit,), most confident first, and
    for each whether it is one of them (limit,): how many there are only the device knows, and the host shall not wait
    for it, so others fill up. (Fewer rows where there are fewer locations.)
    """
    confidence = class_logits.amax(1).sigmoid() * centerness.sigmoid()
    order = torch.where(boxes >= 0, confidence, -1.0).argsort(descending=True, stable=True)
    grouped, by_box = boxes[order].sort(stable=True)         # background, then box by box, confident first within each
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(grouped, grouped)
    num_boxes = ((rank == 0) & (grouped >= 0)).sum()
    share = (limit // num_boxes.clamp(min=1)).clamp(min=1)
    chosen = torch.empty_like(grouped, dtype=torch.bool).scatter(0, by_box, (rank < share) & (grouped >= 0))
    first = chosen.int().argsort(descending=True, stable=True)[:limit]
    return order[first], chosen[first]


def assign_masks(iou: Tensor, scores: Tensor, iou_threshold: float = 0.5, score_threshold: float = 0.05) -> Tensor:
    """Alg. 1: give predicted masks to ground-truth boxes.

    iou (N, G) of predicted and ground-truth boxes, scores (N,) mask-aware. Returns (G,) int64: the prediction
    whose mask a box gets, or -1. Predictions take turns, best score first (those below score_threshold have
    none); each takes the box that it overlaps most among those still free, if by at least iou_threshold.

    A box once taken stays taken, as the listing intends; the authors' program tests `index > 0` with 0-based indices,
    which lets the best prediction's box be taken over. The turns depend on one another, so they are a loop, but one in
    which the host asks the device nothing.
    """
    boxes = torch.arange(iou.shape[1], device=iou.device)
    assigned = torch.full_like(boxes, -1)
    able = (iou >= iou_threshold) & (scores >= score_threshold)[:, None]
    order = scores.argsort(descending=True, stable=True)
    if iou.numel():
        for i, overlaps in zip(order, torch.where(able, iou, 0.0)[order]):
            u, v = torch.where(assigned < 0, overlaps, 0.0).flip(0).max(0)
            v = len(boxes) - 1 - v  # `>=` in the listing: of equal overlaps the last box wins
            assigned = torch.where((boxes == v) & (u > 0), i, assigned)
    return assigned
