"""The losses of BoxTeacher, L = L_det + L_box-sup + L_mask-sup (paper Sec. 3.1 and 3.2).

L_det        focal, GIoU and centerness losses of FCOS                                detection_losses
L_box-sup    max-projection and colour pairwise losses of BoxInst, from boxes alone   box_supervised_losses
L_mask-sup   noise-aware dice and affinity losses from the teacher's masks (Eq. 2)    mask_supervised_losses

Each is a function of tensors. Mask losses live on the stride-4 grid (h, w). K is the number of instances (locations
that learn a mask), G that of the ground-truth boxes of the batch, and gt (K,) says which box an instance has; -1: none,
it only fills up (see assign.select_instances) and counts nothing.

Sums are divided by counts over all processes (see `over_processes`), so that a batch gives the same loss however
many processes hold it. No boxes, no instances: every sum is an empty one, zero, and still connected to the network,
so that no process waits for a gradient that never comes.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from assign import Targets
from model import Predictions, constant

# A pair of cells (i, j) at distance 2; with its mirror (j, i) each stands for two of the 8 neighbours. (dy, dx)
OFFSETS = ((0, 2), (2, 0), (2, 2), (2, -2))


def over_processes(count: Tensor, least: float = 1.0) -> Tensor:
    """The mean of a count over all processes, at least `least`: divide a process's own sum by it.

    DDP averages gradients over processes, so sum / mean(count) becomes total sum / total count.
    """
    count = count.detach().float()
    if dist.is_initialized():
        count = count.clone()
        dist.all_reduce(count)
        count /= dist.get_world_size()
    return count.clamp(min=least)


# --------------------------------------------------------------------------------------- L_det (FCOS Sec. 3)


def detection_losses(predictions: Predictions, targets: Targets) -> dict[str, Tensor]:
    """Focal loss over all locations; GIoU (weighted by centerness) and centerness over the positive ones.

    All is computed everywhere and weighted: to pick the positive ones the host would have to wait for their number.
    """
    num_classes = predictions.class_logits.shape[-1]
    one_hot = F.one_hot(targets.labels, num_classes + 1)[..., :num_classes].float()
    focal = sigmoid_focal_loss(predictions.class_logits, one_hot, alpha=0.25, gamma=2.0, reduction="sum")

    positive = targets.labels < num_classes                                          # (B, L)
    num_positives = over_processes(positive.sum())
    ltrb = torch.where(positive[..., None], targets.ltrb, 1.0)  # a box at the background too: whatever, but not 0 / 0
    centerness = centerness_of(ltrb) * positive
    # what is said of the background does not matter either, not even where it is not finite
    box = (centerness * giou_loss(torch.where(positive[..., None], predictions.ltrb, 1.0), ltrb)).sum()
    center = F.binary_cross_entropy_with_logits(torch.where(positive, predictions.centerness, 0.0), centerness,
                                                reduction="none")
    return {"loss_cls": focal / num_positives,
            "loss_box": box / over_processes(centerness.sum(), 1e-6),
            "loss_centerness": (center * positive).sum() / num_positives}


def centerness_of(ltrb: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)): 1 at the box's centre, 0 at its border. (..., 4) -> (...)"""
    l, t, r, b = ltrb.unbind(-1)
    return (torch.minimum(l, r) / torch.maximum(l, r) * torch.minimum(t, b) / torch.maximum(t, b)).sqrt()


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - GIoU of boxes given as ltrb (..., 4) in strides around the same location; (...).

    The IoU is (intersection + 1) / (union + 1), as in the authors' code: kinder to boxes of less than a stride.
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
    """A mask and its box have the same shadow on either axis: dice of the maxima over rows and columns. -> (K,)"""
    box = box.to(p.dtype)
    # max, not amax: of equal cells one gets the gradient, as in the authors' code; amax would share it among them
    return dice_loss(p.max(2).values, box.amax(2)) + dice_loss(p.max(1).values, box.amax(1))


def average_projection_loss(p: Tensor, g: Tensor) -> Tensor:
    """The same with means instead of maxima, for coarse masks g (Table 3, L_avg). (K, h, w) -> (K,)"""
    g = g.to(p.dtype)
    return dice_loss(p.mean(2), g.mean(2)) + dice_loss(p.mean(1), g.mean(1))


def bce_loss(logits: Tensor, g: Tensor) -> Tensor:
    """Binary cross entropy, mean over the grid (Table 3, bce). (K, h, w) -> (K,)"""
    return F.binary_cross_entropy_with_logits(logits, g.to(logits.dtype), reduction="none").mean((1, 2))


# ---------------------------------------------------------------------------------------- losses on pairs of cells


def pair(x: Tensor, offset: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(x_i, x_j) for all cells i of (..., h, w) whose neighbour j at +offset is in the map: two views, no copy."""
    (dy, dx), (h, w) = offset, x.shape[-2:]
    left, right = max(dx, 0), max(-dx, 0)  # columns that the other one of the pair is off by
    return x[..., :h - dy, right:w - left], x[..., dy:, left:w - right]


def disagreement(logits: Tensor) -> list[Tensor]:
    """-log(p_i p_j + (1 - p_i)(1 - p_j)), the cost of two cells not having one label, for each of OFFSETS.

    With logits a and b of p_i and p_j this is softplus(a) + softplus(b) - softplus(a + b): no product of
    probabilities, so no log(0). logits (K, h, w) -> 4 x (K, h', w').
    """
    one = F.softplus(logits)
    terms = []
    for offset in OFFSETS:
        (a, b), (sa, sb) = pair(logits, offset), pair(one, offset)
        terms.append(sa + sb - F.softplus(a + b))
    return terms


def pair_weights(alike: list[Tensor], inside: Tensor, valid: Tensor, image: Tensor) -> list[Tensor]:
    """How often each pair counts, 0, 1 or 2, for every box: 4 x (G, h', w') uint8.

    (i, j) counts where the two are `alike` (4 x (G, h', w') bool), i is `inside` the box (G, h, w) and j is a
    `valid` cell of the image (B, h, w); its mirror (j, i) counts likewise. image (G,): each box's image.
    """
    weights = []
    for same, offset in zip(alike, OFFSETS):
        (in_i, in_j), (ok_i, ok_j) = pair(inside, offset), pair(valid, offset)
        weights.append(((in_i & ok_j[image]).byte() + (in_j & ok_i[image]).byte()) * same)
    return weights


def weighted_pairs(terms: list[Tensor], weights: list[Tensor], gt: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of weight * term and sum of weights of each instance, both (K,)."""
    total = sum((term * weight[gt]).sum((1, 2)) for term, weight in zip(terms, weights))
    count = sum(weight.sum((1, 2), dtype=torch.float32) for weight in weights)[gt]
    return total * (gt >= 0), count * (gt >= 0)


# ------------------------------------------------------------------------------------- L_box-sup (BoxInst Sec. 3)


def box_supervised_losses(logits: Tensor, terms: list[Tensor], inside: Tensor, color_weights: list[Tensor],
                          gt: Tensor) -> dict[str, Tensor]:
    """Max-projection and colour pairwise loss. logits (K, h, w), terms = disagreement(logits), inside (G, h, w)."""
    projection = projection_loss(logits.sigmoid(), inside[gt]) * (gt >= 0)
    total, count = weighted_pairs(terms, color_weights, gt)
    return {"loss_projection": projection.sum() / over_processes((gt >= 0).sum()),
            "loss_pairwise": total.sum() / over_processes(count.sum())}


@torch.no_grad()
def similar_colors(images: Tensor, threshold: float = 0.3) -> list[Tensor]:
    """Pairs of cells of similar colour, exp(-|Lab_i - Lab_j| / 2) >= threshold: 4 x (B, h', w') bool.

    images (B, 3, 4h, 4w) RGB 0..255, not augmented. A cell's colour is the mean of its 4x4 pixels, in whole
    numbers. BoxInst's threshold: 0.3 is that of its code and of the authors', its paper says 0.1.
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
    to_xyz, white = (constant(x, rgb.device).to(rgb.dtype) for x in (TO_XYZ, WHITE))
    xyz = torch.einsum("dc,bc...->bd...", to_xyz / white[:, None], rgb)
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def valid_cells(sizes: list[tuple[int, int]], original_sizes: list[tuple[int, int]], height: int, width: int,
                device: torch.device) -> Tensor:
    """Cells (B, height, width) of the stride-4 grid that lie in the image and may be a neighbour.

    The bottom 10 pixel rows of the file (scaled) are left out, as in BoxInst: many images end in a black bar.
    """
    y = torch.arange(height, device=device)[:, None] * 4 + 2
    x = torch.arange(width, device=device) * 4 + 2
    return torch.stack([(y < h - int(10 * h / file_h)) & (x < w)
                        for (h, w), (file_h, _) in zip(sizes, original_sizes)])


# ------------------------------------------------------------------------------------ L_mask-sup (paper Sec. 3.2)


def mask_supervised_losses(logits: Tensor, terms: list[Tensor], masks: Tensor, scores: Tensor,
                           affinity_weights: list[Tensor], gt: Tensor, pixel_loss: str = "dice") -> dict[str, Tensor]:
    """The two noise-aware sums of Eq. 2, (1 / N_p) sum_i s_i L(m_i^p, m_i^g), before their lambdas.

    masks (G, h, w) the teacher's probabilities, 0 outside the box; scores (G,), 0 where a box has no pseudo mask.
    N_p is the number of instances with one. pixel_loss: dice (the paper's), bce, avg or none (Table 3).
    """
    s = scores[gt] * (gt >= 0)
    valid_masks = over_processes((s > 0).sum())
    target = (masks > 0.5)[gt]
    if pixel_loss == "bce":
        pixel = bce_loss(logits, target)
    elif pixel_loss == "none":
        pixel = 0.0 * logits.sum((1, 2))
    else:
        pixel = {"dice": dice_loss, "avg": average_projection_loss}[pixel_loss](logits.sigmoid(), target)
    total, count = weighted_pairs(terms, affinity_weights, gt)
    affinity = total / count.clamp(min=1)
    return {"loss_pixel": (s * pixel).sum() / valid_masks, "loss_affinity": (s * affinity).sum() / valid_masks}


@torch.no_grad()
def refine(g: Tensor) -> Tensor:
    """Eq. 3: half the probability itself, half the mean of its 3x3 surroundings (itself included). (G, h, w)"""
    return (g + F.avg_pool2d(g[:, None], 3, stride=1, padding=1)[:, 0]) / 2


@torch.no_grad()
def alike_labels(g: Tensor, threshold: float = 0.5) -> list[Tensor]:
    """Eq. 4: pairs with affinity mu_ij = g_i g_j + (1 - g_i)(1 - g_j) > tau_a, g refined: 4 x (G, h', w') bool.

    Eq. 5 is then `disagreement` averaged over these pairs. As printed it would be -(log(p_i p_j) +
    log((1 - p_i)(1 - p_j))), whose minimum is p = 1/2 everywhere: it would erase masks. The authors' code and
    BoxInst have -log(p_i p_j + (1 - p_i)(1 - p_j)), which falls when neighbours agree. It also averages over an
    instance's pairs at once, not cell by cell. We follow it in both.
    """
    alike = []
    for offset in OFFSETS:
        a, b = pair(g, offset)
        alike.append(a * b + (1 - a) * (1 - b) > threshold)
    return alike
