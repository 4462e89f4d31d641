"""Which prediction is assigned to which box.

fcos_targets      student: which location learns which ground-truth box (FCOS Sec. 3.1, centre sampling)
batch_instances   student: which of those locations also learn a mask, at most 64 an image (as in CondInst's code)
assign_masks      teacher: which predicted mask becomes the pseudo mask of which box (paper Alg. 1)
"""
from typing import NamedTuple

import torch
from torch import Tensor

from model import STRIDES, Locations, Predictions

LEVEL_RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, float("inf")))  # largest of ltrb, pixels
CENTER_RADIUS = 1.5  # strides
IOU_THRESHOLD, SCORE_THRESHOLD = 0.5, 0.05  # tau_iou and tau_c of Alg. 1


class Targets(NamedTuple):
    """What each of the L locations of B images should predict. C classes; the label C is background."""

    labels: Tensor  # (B, L) int64
    ltrb: Tensor    # (B, L, 4) strides; 0 at background
    boxes: Tensor   # (B, L) int64: index of the box in torch.cat(boxes), or -1 at background


def fcos_targets(locations: Locations, boxes: list[Tensor], labels: list[Tensor], num_classes: int) -> Targets:
    """FCOS targets of a batch. boxes[b] (G_b, 4) xyxy pixels of the network's input, labels[b] (G_b,)."""
    first, images = 0, []
    for b, l in zip(boxes, labels):
        images.append(image_targets(locations, b, l, num_classes, first))
        first += len(b)
    return Targets(*map(torch.stack, zip(*images)))


def image_targets(locations: Locations, boxes: Tensor, labels: Tensor, num_classes: int,
                  first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """fcos_targets of one image; `first` is the number of its first box within the batch.

    A location is a candidate for a box if (1) it lies strictly inside the box, within 1.5 strides of its centre,
    and (2) its largest distance to a side is in the range of its level. Of several boxes the smallest wins, of equal
    ones the first.
    """
    xy, stride, level = locations
    if len(boxes) == 0:
        nothing = torch.full_like(level, -1)
        return torch.full_like(nothing, num_classes), xy.new_zeros(len(xy), 4), nothing

    # numbered by area, so that the lowest number among the candidates of a location is its smallest box
    smallest_first = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).argsort(stable=True)
    boxes, labels = boxes[smallest_first], labels[smallest_first]
    at, near = near_centers(locations, boxes)                     # N pairs of a location and a box near it: two (N,)
    (x, y), (x0, y0, x1, y1), reach = xy[at].T, boxes[near].T, CENTER_RADIUS * stride[at]
    center_x, center_y = (x0 + x1) / 2, (y0 + y1) / 2
    inside = ((x > torch.maximum(x0, center_x - reach)) & (x < torch.minimum(x1, center_x + reach))
              & (y > torch.maximum(y0, center_y - reach)) & (y < torch.minimum(y1, center_y + reach)))
    farthest = torch.maximum(torch.maximum(x - x0, x1 - x), torch.maximum(y - y0, y1 - y))
    low, high = xy.new_tensor(LEVEL_RANGES)[level[at]].T
    candidate = inside & (farthest >= low) & (farthest <= high)

    box_at = torch.full_like(level, len(boxes)).scatter_reduce(0, at[candidate], near[candidate], "amin")   # (L,)
    positive = box_at < len(boxes)
    box = box_at.clamp(max=len(boxes) - 1)
    ltrb = torch.cat([xy - boxes[box, :2], boxes[box, 2:] - xy], 1) / stride[:, None]
    return (torch.where(positive, labels[box], num_classes), ltrb * positive[:, None],
            torch.where(positive, smallest_first[box] + first, -1))


def near_centers(locations: Locations, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of a location and a box (G, 4): on each level, the 3 x 3 cells around the box's centre that its map has.

    No other cell is within CENTER_RADIUS = 1.5 strides of the centre, so not all locations are compared with all boxes
    (docs/speed.md).
    """
    stride = boxes.new_tensor(STRIDES)[:, None]                                      # (5, 1)
    ends = locations.level.bincount().cumsum(0)                                      # (5,) of each level in locations
    width, height = (locations.xy[ends - 1] / stride + 0.5).long().T[..., None]      # (5, 1) cells, from the last one
    center = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    nearest = ((center - stride / 2) / stride).round().long()                        # (G, 5, 2) column and row
    around = torch.arange(-1, 2, device=boxes.device)
    x, y = (nearest[:, :, None] + torch.cartesian_prod(around, around)).unbind(3)    # (G, 5, 9)
    on_map = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    at = ends[:, None] - width * height + y * width + x
    return at[on_map], on_map.nonzero()[:, 0]


@torch.no_grad()
def batch_instances(predictions: Predictions, targets: Targets) -> tuple[list[Tensor], Tensor]:
    """The K instances of a batch, chosen by select_instances.

    Returns locations[b] (k_b,) of image b, and box (K,), the index of each instance's box in torch.cat(boxes).
    """
    locations = [select_instances(*image)
                 for image in zip(predictions.class_logits, predictions.centerness, targets.boxes)]
    return locations, torch.cat([boxes[chosen] for boxes, chosen in zip(targets.boxes, locations)])


def select_instances(class_logits: Tensor, centerness: Tensor, boxes: Tensor, limit: int = 64) -> Tensor:
    """The positive locations of one image whose masks are learnt (k,), most confident first, k <= limit.

    class_logits (L, C), centerness (L,) logits, boxes (L,) the assigned box or -1. Every box keeps its most confident
    locations, an equal share of the limit and at least one; of all these the `limit` most confident remain.
    """
    positive = (boxes >= 0).nonzero()[:, 0]                                          # (P,)
    confidence = class_logits[positive].amax(1).sigmoid() * centerness[positive].sigmoid()
    positive = positive[confidence.argsort(descending=True, stable=True)]
    box, by_box = boxes[positive].sort(stable=True)                                  # confident first within each box
    rank = torch.arange(len(box), device=box.device) - torch.searchsorted(box, box)  # 0, 1, ... within each box
    share = max(limit // max(len(box.unique()), 1), 1)
    return positive[by_box[rank < share].sort().values][:limit]


def assign_masks(iou: Tensor, scores: Tensor, iou_threshold: float = IOU_THRESHOLD,
                 score_threshold: float = SCORE_THRESHOLD) -> Tensor:
    """Alg. 1: give predicted masks to ground-truth boxes.

    iou (N, G) of predicted and ground-truth boxes, scores (N,) mask-aware. Returns (G,) int64 on the CPU: the
    prediction whose mask a box gets, or -1.

    Each box gets one mask, as the listing intends. The authors' program tests `index > 0` for "taken" with 0-based
    indices, so another prediction may take over the box of prediction 0, the best.
    """
    iou, scores = iou.cpu(), scores.cpu()                        # each turn depends on the one before
    assigned = torch.full((iou.shape[1],), -1)                   # A
    if len(assigned) == 0:
        return assigned
    order = scores.argsort(descending=True, stable=True)         # S: the best score first
    for i in order[scores[order] >= score_threshold]:            # not a score of NaN
        free = iou[i].masked_fill(assigned >= 0, -1.0)
        u = free.max()
        if u >= iou_threshold:
            v = (free == u).nonzero()[-1]                        # `>=` in the listing: of equal overlaps the last
            assigned[v] = i
    return assigned
