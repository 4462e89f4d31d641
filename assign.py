"""Which prediction answers for which box: the two assignments of BoxTeacher.

fcos_targets      student: which location learns which ground-truth box (FCOS Sec. 3.1, centre sampling)
select_instances  student: which of those locations also learn a mask, at most 64 a picture
assign_masks      teacher: which predicted mask becomes the pseudo mask of which box (paper Alg. 1)
"""
from typing import NamedTuple

import torch
from torch import Tensor

from model import Locations

LEVEL_RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, float("inf")))  # largest of ltrb, pixels
CENTER_RADIUS = 1.5  # strides


class Targets(NamedTuple):
    """What each of the L locations of B pictures shall predict. C classes; the label C is background."""

    labels: Tensor  # (B, L) int64
    ltrb: Tensor    # (B, L, 4) strides; 0 at background
    boxes: Tensor   # (B, L) int64: the box, counted over the whole batch, or -1 at background


def fcos_targets(locations: Locations, boxes: list[Tensor], labels: list[Tensor], num_classes: int) -> Targets:
    """FCOS targets of a batch. boxes[b] (G_b, 4) xyxy pixels of the network's input, labels[b] (G_b,)."""
    first, pictures = 0, []
    for b, l in zip(boxes, labels):
        pictures.append(picture_targets(locations, b, l, num_classes, first))
        first += len(b)
    return Targets(*map(torch.stack, zip(*pictures)))


def picture_targets(locations: Locations, boxes: Tensor, labels: Tensor, num_classes: int,
                    first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """One picture of fcos_targets; `first` is the number of its first box within the batch.

    A location is a candidate for a box that (1) holds it, strictly, within 1.5 strides of the box's centre, and
    (2) has its farthest side at a distance of the location's level. Among several boxes the smallest wins.
    """
    xy, stride = locations.xy, locations.stride
    if len(boxes) == 0:
        nothing = torch.full_like(locations.level, -1)
        return torch.full_like(nothing, num_classes), xy.new_zeros(len(xy), 4), nothing

    ltrb = torch.cat([xy[:, None] - boxes[:, :2], boxes[:, 2:] - xy[:, None]], 2)              # (L, G, 4)
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    reach = CENTER_RADIUS * stride[:, None, None]
    low, high = torch.maximum(boxes[:, :2], center - reach), torch.minimum(boxes[:, 2:], center + reach)
    inside = ((xy[:, None] > low) & (xy[:, None] < high)).all(2)                                # (L, G)
    ranges = xy.new_tensor(LEVEL_RANGES)[locations.level]                                       # (L, 2)
    farthest = ltrb.amax(2)
    in_range = (farthest >= ranges[:, :1]) & (farthest <= ranges[:, 1:])

    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    area = torch.where(inside & in_range, area, torch.inf)                                      # (L, G)
    smallest, box = area.min(1)
    positive = smallest < torch.inf
    ltrb = ltrb[torch.arange(len(xy), device=xy.device), box] / stride[:, None]
    return (torch.where(positive, labels[box], num_classes), ltrb * positive[:, None],
            torch.where(positive, box + first, -1))


@torch.no_grad()
def select_instances(class_logits: Tensor, centerness: Tensor, boxes: Tensor, limit: int = 64) -> Tensor:
    """The positive locations of one picture whose masks are learnt, at most `limit`.

    class_logits (L, C), centerness (L,) logits, boxes (L,) the assigned box or -1. Every box with positives
    gets the same share of the limit, at least one, filled with its most confident locations; where there are
    more boxes than the limit, the most confident of these remain. Returns rows (K,), most confident first.
    """
    rows = (boxes >= 0).nonzero()[:, 0]
    confidence = class_logits[rows].amax(1).sigmoid() * centerness[rows].sigmoid()
    rows = rows[confidence.argsort(descending=True, stable=True)]
    by_box = boxes[rows].argsort(stable=True)                    # grouped by box, confident first within it
    grouped = boxes[rows][by_box].contiguous()
    rank = torch.arange(len(rows), device=rows.device) - torch.searchsorted(grouped, grouped)
    num_boxes = len(grouped.unique())
    chosen = by_box[rank < max(limit // max(num_boxes, 1), 1)]
    return rows[chosen.sort().values][:limit]


def assign_masks(iou: Tensor, scores: Tensor, iou_threshold: float = 0.5, score_threshold: float = 0.05) -> Tensor:
    """Alg. 1: give predicted masks to ground-truth boxes.

    iou (N, G) of predicted and ground-truth boxes, scores (N,) mask-aware. Returns (G,) int64: the prediction
    whose mask a box gets, or -1. Predictions take turns, best score first (those below score_threshold have
    none); each takes the box that it overlaps most among those still free, if by at least iou_threshold.

    The turns depend on one another, so they are a loop; each is one row of the matrix, and predictions that
    reach no box take none. A box once taken stays taken, as the listing intends; the authors' program tests
    `index > 0` with 0-based indices, which lets the best prediction's box be taken over.
    """
    assigned = torch.full((iou.shape[1],), -1, dtype=torch.int64)
    iou, scores = iou.cpu(), scores.cpu()
    able = (iou >= iou_threshold).any(1) & (scores >= score_threshold)
    order = scores.argsort(descending=True, stable=True)
    for i in order[able[order]]:
        free = torch.where(assigned < 0, iou[i], -1.0)
        u = free.max()
        if u >= iou_threshold:
            v = (free == u).nonzero()[-1]  # `>=` in the listing: of equal overlaps the last box wins
            assigned[v] = i
    return assigned


def box_masks(boxes: Tensor, height: int, width: int, stride: int = 4) -> Tensor:
    """Boxes (G, 4) xyxy pixels as masks (G, height, width) bool on the grid of a stride.

    A box covers pixel rows int(y0) ... int(y1 + 1) - 1, likewise columns; cell i of the grid is pixel
    i * stride + stride // 2.
    """
    y = torch.arange(height, device=boxes.device) * stride + stride // 2
    x = torch.arange(width, device=boxes.device) * stride + stride // 2
    x0, y0 = boxes[:, :2].trunc().unbind(1)
    x1, y1 = (boxes[:, 2:] + 1).trunc().unbind(1)
    rows = (y >= y0[:, None]) & (y < y1[:, None])
    columns = (x >= x0[:, None]) & (x < x1[:, None])
    return rows[:, :, None] & columns[:, None, :]
