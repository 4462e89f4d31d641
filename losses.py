"""The losses of BoxTeacher, L = L_det + L_box-sup + L_mask-sup (paper Sec. 3.1 and 3.2).

L_det        focal, GIoU and centerness losses of FCOS                                detection_losses
L_box-sup    max-projection and colour pairwise losses of BoxInst, from boxes alone   box_supervised_losses
L_mask-sup   noise-aware dice and affinity losses from the teacher's masks (Eq. 2)    mask_supervised_losses

Each is a function of tensors, with the letters of boxteacher.py. Mask losses live on the stride-4 grid (h, w).

Sums are divided by counts over all processes (`mean_over_processes`), so a batch has the same loss however many
processes share it. Without boxes or instances every sum is empty: zero, and still connected to the network, because DDP
would wait for a missing gradient.
"""
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from assign import Targets
from data import Batch
from masks import box_masks
from model import Predictions

# Pairs of cells (i, j), two cells apart as in BoxInst (the paper gives no distance). Their costs are symmetric, so four
# offsets (o) cover the eight neighbours at half the memory:      . . .
#                                                                 . i o
#                                                                 o o o     (dy, dx)
OFFSETS = ((0, 2), (2, 0), (2, 2), (2, -2))


def mean_over_processes(count: Tensor, minimum: float = 1.0) -> Tensor:
    """The mean over all processes of a count whose total is at least `minimum`: a process divides its own sum by it.

    DDP averages gradients over processes, so sum / mean(count) becomes total sum / total count, however many they are.
    """
    total, processes = count.detach().float().clone(), 1
    if dist.is_initialized():
        dist.all_reduce(total)
        processes = dist.get_world_size()
    return total.clamp(min=minimum) / processes


# --------------------------------------------------------------------------------------- L_det (FCOS Sec. 3)


def detection_losses(predictions: Predictions, targets: Targets) -> dict[str, Tensor]:
    """Focal loss over all locations; GIoU (weighted by centerness) and centerness over the P positive ones."""
    num_classes = predictions.class_logits.shape[-1]
    one_hot = F.one_hot(targets.labels, num_classes + 1)[..., :num_classes].float()
    focal = sigmoid_focal_loss(predictions.class_logits, one_hot, alpha=0.25, gamma=2.0, reduction="sum")

    positive = targets.labels < num_classes                                          # (B, L)
    ltrb = targets.ltrb[positive]                                                    # (P, 4)
    centerness = centerness_of(ltrb)                                                 # (P,)
    giou = centerness * giou_loss(predictions.ltrb[positive], ltrb)
    center = F.binary_cross_entropy_with_logits(predictions.centerness[positive], centerness, reduction="sum")
    num_positives = mean_over_processes(positive.sum())
    return {"loss_cls": focal / num_positives,
            "loss_box": giou.sum() / mean_over_processes(centerness.sum(), 1e-6),
            "loss_centerness": center / num_positives}


def centerness_of(ltrb: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)): 1 at the box's centre, 0 at its edge. (..., 4) -> (...)"""
    l, t, r, b = ltrb.unbind(-1)
    return (torch.minimum(l, r) / torch.maximum(l, r) * torch.minimum(t, b) / torch.maximum(t, b)).sqrt()


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - GIoU of boxes given as ltrb (..., 4) in strides around the same location; (...).

    The IoU is (intersection + 1) / (union + 1), as in the authors' code, which is kinder to boxes below one stride.
    """
    def area(x: Tensor) -> Tensor:
        return (x[..., 0] + x[..., 2]) * (x[..., 1] + x[..., 3])

    intersection, enclosing = area(torch.minimum(predicted, target)), area(torch.maximum(predicted, target))
    union = area(predicted) + area(target) - intersection
    iou = (intersection + 1) / (union + 1)
    return 1 - (iou - (enclosing - union) / enclosing)


# --------------------------------------------------------------------------------- pixel losses on whole masks


def dice_loss(p: Tensor, g: Tensor) -> Tensor:
    """1 - 2 <p, g> / (|p|^2 + |g|^2) over all but the first dimension; probabilities p, target g, (K, ...) -> (K,)"""
    p, g = p.flatten(1), g.flatten(1).to(p.dtype)
    return 1 - 2 * (p * g).sum(1) / ((p * p).sum(1) + (g * g).sum(1) + 1e-5)


def projection_loss(p: Tensor, box: Tensor) -> Tensor:
    """A mask and its box cast the same shadow on each axis: dice of the maxima over rows and columns.

    p (K, h, w) probabilities, box (K, h, w) bool. Returns (K,).
    """
    box = box.to(p.dtype)
    # max, not amax: one of several equal cells gets the gradient, as in the authors' code; amax divides it among them
    return dice_loss(p.max(2).values, box.amax(2)) + dice_loss(p.max(1).values, box.amax(1))


def average_projection_loss(p: Tensor, g: Tensor) -> Tensor:
    """Dice of the means over rows and columns, for coarse masks g (Table 3, L_avg). (K, h, w) -> (K,)"""
    g = g.to(p.dtype)
    return dice_loss(p.mean(2), g.mean(2)) + dice_loss(p.mean(1), g.mean(1))


def bce_loss(logits: Tensor, g: Tensor) -> Tensor:
    """Binary cross entropy, mean over the grid (Table 3, bce). (K, h, w) -> (K,)"""
    return F.binary_cross_entropy_with_logits(logits, g.to(logits.dtype), reduction="none").mean((1, 2))


# ---------------------------------------------------------------------------------------- losses on pairs of cells


def pair(x: Tensor, offset: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(x_i, x_j) for all cells i of (..., h, w) whose neighbour j at +offset is in the map: two views, no copy."""
    (dy, dx), (h, w) = offset, x.shape[-2:]
    left, right = max(dx, 0), max(-dx, 0)  # columns to trim on each side
    return x[..., :h - dy, right:w - left], x[..., dy:, left:w - right]


def disagreement(logits: Tensor) -> list[Tensor]:
    """-log(p_i p_j + (1 - p_i)(1 - p_j)), the cost of two cells not having one label, for each of OFFSETS.

    With logits a and b of p_i and p_j this is softplus(a) + softplus(b) - softplus(a + b): no product of
    probabilities, so no log(0). logits (K, h, w) -> 4 x (K, h', w').
    """
    one = F.softplus(logits)
    costs = []
    for offset in OFFSETS:
        (a, b), (sa, sb) = pair(logits, offset), pair(one, offset)
        costs.append(sa + sb - F.softplus(a + b))
    return costs


class MaskGrid(NamedTuple):
    """Which cells of the stride-4 grid (h, w) of a batch may form pairs for which box."""

    inside: Tensor  # (G, h, w) bool: cells inside the box
    valid: Tensor   # (B, h, w) bool: cells that may be a neighbour, see valid_cells
    image: Tensor   # (G,) the image of each box


def mask_grid(batch: Batch, chosen: Tensor, height: int, width: int) -> MaskGrid:
    """The grid of masks (K, height, width) of a batch, for the G boxes that `chosen` (G,) picks of all its boxes."""
    boxes = torch.cat(batch.boxes)
    counts = torch.tensor([len(b) for b in batch.boxes])
    image = torch.arange(len(counts)).repeat_interleave(counts).to(boxes.device)
    return MaskGrid(box_masks(boxes[chosen], height, width),
                    valid_cells(batch.sizes, batch.original_sizes, height, width, boxes.device), image[chosen])


def valid_cells(sizes: list[tuple[int, int]], original_sizes: list[tuple[int, int]], height: int, width: int,
                device: torch.device) -> Tensor:
    """Cells (B, height, width) of the stride-4 grid that lie in the image and may be a neighbour.

    The bottom 10 pixel rows of the file (scaled) are left out, as in BoxInst: many images end in a black bar.
    """
    y = torch.arange(height, device=device)[:, None] * 4 + 2
    x = torch.arange(width, device=device) * 4 + 2
    return torch.stack([(y < h - int(10 * h / file_h)) & (x < w)
                        for (h, w), (file_h, _) in zip(sizes, original_sizes)])


def pair_weights(related: list[Tensor], grid: MaskGrid) -> list[Tensor]:
    """How often each pair counts for each box, 0, 1 or 2: 4 x (G, h', w') uint8.

    (i, j) counts if the two are `related` (4 x (G, h', w') bool), i lies inside the box and j is a valid cell of the
    image; its mirror image (j, i) counts likewise.
    """
    weights = []
    for same, offset in zip(related, OFFSETS):
        (in_i, in_j), (ok_i, ok_j) = pair(grid.inside, offset), pair(grid.valid, offset)
        weights.append(((in_i & ok_j[grid.image]).byte() + (in_j & ok_i[grid.image]).byte()) * same)
    return weights


def weighted_pairs(costs: list[Tensor], weights: list[Tensor], box: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of weight * cost and sum of weights of each instance, both (K,)."""
    total = sum((cost * weight[box]).sum((1, 2)) for cost, weight in zip(costs, weights))
    count = sum(weight.sum((1, 2), dtype=torch.float32) for weight in weights)[box]
    return total, count


# ------------------------------------------------------------------------------------- L_box-sup (BoxInst Sec. 3)


def box_supervised_losses(logits: Tensor, costs: list[Tensor], inside: Tensor, color_weights: list[Tensor],
                          box: Tensor) -> dict[str, Tensor]:
    """Max-projection and colour pairwise loss.

    logits (K, h, w), costs = disagreement(logits), inside (G, h, w), color_weights = color_pairs(...), box (K,).
    """
    projection = projection_loss(logits.sigmoid(), inside[box])
    total, count = weighted_pairs(costs, color_weights, box)
    return {"loss_projection": projection.sum() / mean_over_processes(logits.new_tensor(len(box))),
            "loss_pairwise": total.sum() / mean_over_processes(count.sum())}


def color_pairs(images: Tensor, grid: MaskGrid) -> list[Tensor]:
    """Weights of the pairs of similar colour, see pair_weights. images (B, 3, 4h, 4w) RGB 0..255, not augmented."""
    return pair_weights([same[grid.image] for same in similar_colors(images)], grid)


@torch.no_grad()
def similar_colors(images: Tensor, threshold: float = 0.3) -> list[Tensor]:
    """Pairs of cells of similar colour, exp(-|Lab_i - Lab_j| / 2) >= threshold: 4 x (B, h', w') bool.

    The colour of a cell is the mean of its 4x4 pixels, rounded down. The threshold is that of BoxInst's code and of the
    authors'; BoxInst's paper has 0.1.
    """
    lab = rgb_to_lab(F.avg_pool2d(images.float(), 4).floor())
    similar = []
    for offset in OFFSETS:
        a, b = pair(lab, offset)
        similar.append(torch.exp(-0.5 * (a - b).norm(dim=1)) >= threshold)
    return similar


TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)  # XYZ of D65


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB (B, 3, ...) 0..255 to CIE Lab with the white of D65."""
    rgb = rgb / 255
    rgb = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz, white = rgb.new_tensor(TO_XYZ), rgb.new_tensor(WHITE)
    xyz = torch.einsum("dc,bc...->bd...", to_xyz / white[:, None], rgb)
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


# ------------------------------------------------------------------------------------ L_mask-sup (paper Sec. 3.2)


PIXEL_LOSSES = {  # Table 3: of logits (K, h, w) and binary masks (K, h, w), -> (K,)
    "dice": lambda logits, g: dice_loss(logits.sigmoid(), g),
    "bce": bce_loss,
    "avg": lambda logits, g: average_projection_loss(logits.sigmoid(), g),
    "none": lambda logits, g: 0.0 * logits.sum((1, 2)),
}


def mask_supervised_losses(logits: Tensor, costs: list[Tensor], masks: Tensor, scores: Tensor,
                           affinity_weights: list[Tensor], box: Tensor, pixel_loss: str = "dice") -> dict[str, Tensor]:
    """The two noise-aware sums of Eq. 2, (1 / N_p) sum_i s_i L(m_i^p, m_i^g), before their lambdas.

    masks (G, h, w) the teacher's probabilities, 0 outside the box; scores (G,), 0 for a box without a pseudo mask.
    N_p is the number of instances with one. The pixel loss sees masks made binary, as in the authors' code; pixel_loss:
    one of PIXEL_LOSSES.
    """
    s = scores[box]                                                                  # (K,)
    pixel = PIXEL_LOSSES[pixel_loss](logits, (masks > 0.5)[box])
    affinity = affinity_loss(costs, affinity_weights, box)
    num_masks = mean_over_processes((s > 0).sum())
    return {"loss_pixel": (s * pixel).sum() / num_masks, "loss_affinity": (s * affinity).sum() / num_masks}


def affinity_loss(costs: list[Tensor], weights: list[Tensor], box: Tensor) -> Tensor:
    """Eq. 5: the mean cost of the pairs that Eq. 4 selects, (K,). costs: `disagreement`, weights: `affinity_pairs`.

    As printed, -(log(p_i p_j) + log((1 - p_i)(1 - p_j))) has its minimum at p = 1/2 everywhere and would erase masks.
    The authors' code and BoxInst have -log(p_i p_j + (1 - p_i)(1 - p_j)), which falls when neighbours agree. The
    authors also average over all pairs of an instance at once, not cell by cell. This code follows theirs in both.
    """
    total, count = weighted_pairs(costs, weights, box)
    return total / count.clamp(min=1)


def affinity_pairs(masks: Tensor, grid: MaskGrid) -> list[Tensor]:
    """Weights of the pairs with one label in the pseudo masks (G, h, w) (Eq. 3 and 4), see pair_weights."""
    return pair_weights(similar_labels(refine(masks)), grid)


@torch.no_grad()
def refine(g: Tensor) -> Tensor:
    """Eq. 3: half the probability, half the mean of the 3x3 cells around it, itself included. (G, h, w)

    Cells outside the map count as 0, as in the authors' code.
    """
    return (g + F.avg_pool2d(g[:, None], 3, stride=1, padding=1)[:, 0]) / 2


@torch.no_grad()
def similar_labels(g: Tensor, threshold: float = 0.5) -> list[Tensor]:
    """Eq. 4: pairs with affinity mu_ij = g_i g_j + (1 - g_i)(1 - g_j) > tau_a, g refined: 4 x (G, h', w') bool."""
    similar = []
    for offset in OFFSETS:
        a, b = pair(g, offset)
        similar.append(a * b + (1 - a) * (1 - b) > threshold)
    return similar
