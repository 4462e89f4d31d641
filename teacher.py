"""The teacher of BoxTeacher (paper Sec. 3.1): an average of the student over time that labels boxes with masks.

    update   theta <- alpha theta + (1 - alpha) xi, the exponential moving average (EMA)
    label    clean image -> teacher -> mask-aware scores (Eq. 1) -> Alg. 1 -> a pseudo mask for each box
"""
import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image

from assign import assign_masks
from data import Batch
from masks import box_masks, cells, decode, paste_masks
from model import CondInst, Detections, Predictions, detect, mask_logits

SCORES = ("mask-aware", "cls", "iou", "mean-entropy")  # Table 5; "released", see released_masks, is a way of its own


class PseudoLabels(NamedTuple):
    """A mask for each of the G boxes of a batch, on the stride-4 grid of the student's images."""

    masks: Tensor   # (G, h, w) probabilities, 0 outside the box
    scores: Tensor  # (G,) how far to trust it; 0: this box got none


def make_teacher(student: CondInst) -> CondInst:
    """An exact copy that no gradient reaches.

    Like the authors' it stays in training mode: its batch norms see their own batches and so keep statistics of
    the teacher's own features. Those buffers are never averaged; evaluation (eval mode) uses them.
    """
    return copy.deepcopy(student).requires_grad_(False).train()


def ema_momentum(iteration: int, ceiling: float = 0.999) -> float:
    """alpha of the update that precedes this 0-based iteration: young averages forget faster; 0 (a copy) at first."""
    return min(ceiling, 1 - 1 / (iteration + 1))


@torch.no_grad()
def update(teacher: CondInst, student: CondInst, momentum: float, statistics: bool = False,
           skipped: Tensor | None = None) -> None:
    """EMA of the parameters.

    statistics: take over the student's batch norm statistics, for an average that sees no images of its own.
    skipped: bool of one element, of which only the device knows whether it is true: then the parameters stay.
    """
    theta, xi = list(teacher.parameters()), list(student.parameters())
    weight = torch.full((), 1 - momentum, device=theta[0].device)
    torch._foreach_lerp_(theta, xi, [weight if skipped is None else weight * ~skipped] * len(theta))
    if statistics:
        for own, students in zip(teacher.buffers(), student.buffers()):
            own.copy_(students)


@torch.no_grad()
def label(teacher: CondInst, batch: Batch, score: str = "mask-aware") -> PseudoLabels:
    """Pseudo masks for all boxes of a batch."""
    predictions = teacher(batch.teacher_images, batch.teacher_sizes)
    return pseudo_labels(predictions, batch, score)


@torch.no_grad()
def pseudo_labels(predictions: Predictions, batch: Batch, score: str = "mask-aware") -> PseudoLabels:
    """From the teacher's predictions on batch.teacher_images to pseudo masks for batch.boxes.

    Only predictions that overlap some box enough to be assigned get a mask, at stride 4, not at full size (which
    `released` needs).
    """
    height, width = batch.images.shape[-2] // 4, batch.images.shape[-1] // 4
    masks, scores = [], []
    for b, (boxes, size, teacher_size) in enumerate(zip(batch.boxes, batch.sizes, batch.teacher_sizes)):
        image = predictions.of_image(b)
        found, iou = overlapping(detect(image), boxes, size, teacher_size)
        logits = mask_logits(image, [found.locations])
        if score == "released":
            p, order, s = released_masks(logits, found.scores, teacher_size, size, height, width)
        else:
            p = to_student_grid(logits.sigmoid(), teacher_size, size, height, width)                # (N, h, w)
            h, w = cells(size)  # padding has no part in a score
            order = s = SCORE_FUNCTIONS[score](found.scores, p[:, :h, :w], box_masks(found.boxes, h, w), iou)
        match = assign_masks(iou, order)                                                            # (G,)
        masks.append(F.pad(p, (0, 0, 0, 0, 0, 1))[match] * box_masks(boxes, height, width))         # at -1: nothing
        scores.append(F.pad(s, (0, 1))[match])
    return PseudoLabels(torch.cat(masks), torch.cat(scores))


def overlapping(found: Detections, boxes: Tensor, size: tuple[int, int],
                teacher_size: tuple[int, int]) -> tuple[Detections, Tensor]:
    """The detections that overlap some box enough to be assigned, in pixels of the student's image, and their IoU.

    Here the host waits for the teacher's network, as it does in `detect` for the candidates and for what NMS keeps.
    """
    x0, y0, x1, y1 = found.boxes.unbind(1)
    x, y = size[1] / teacher_size[1], size[0] / teacher_size[0]
    found = found._replace(boxes=clip_boxes_to_image(torch.stack([x0 * x, y0 * y, x1 * x, y1 * y], 1), size))
    iou = box_iou(found.boxes, boxes)                                                               # (N, G)
    able = (iou >= 0.5).any(1).nonzero()[:, 0]
    return Detections(*(x[able] for x in found)), iou[able]


def to_student_grid(p: Tensor, teacher_size: tuple[int, int], size: tuple[int, int], height: int,
                    width: int) -> Tensor:
    """Maps p (N, h', w') at stride 4 of the teacher's image, read on the student's stride-4 grid (height, width).

    Both sizes are the images' true (height, width). Cell i of the student's grid is the middle of pixel 4i + 2,
    at the fraction (4i + 2.5) / size of the image, which is pixel t = that * teacher_size - 0.5 of the teacher's,
    cell (t - 2) / 4 of its map. Where both images are of one size, that is cell i itself.
    """
    if len(p) == 0:
        return p.new_zeros(0, height, width)

    def normalised_coordinates(cells: int, size: int, teacher_size: int, teacher_cells: int) -> Tensor:
        t = (torch.arange(cells, device=p.device) * 4 + 2.5) * teacher_size / size - 0.5
        return (t - 2) / 4 * 2 / max(teacher_cells - 1, 1) - 1     # -1 and 1 are the middles of the outer cells

    y = normalised_coordinates(height, size[0], teacher_size[0], p.shape[1])
    x = normalised_coordinates(width, size[1], teacher_size[1], p.shape[2])
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]                      # (1, height, width, xy)
    return F.grid_sample(p[None], grid, mode="bilinear", padding_mode="border", align_corners=True)[0]


def released_masks(logits: Tensor, c: Tensor, teacher_size: tuple[int, int], size: tuple[int, int], height: int,
                   width: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the authors' program makes of the teacher's masks, in place of Eq. 1: `--score released`.

    logits (N, h', w') of the teacher, c (N,) the detector's confidence. Masks are pasted into the student's image,
    made binary there and sampled at stride 4. With q the mean probability of the whole mask, predictions take turns
    by sqrt(c q), and a mask weighs sqrt(sqrt(c) q). Returns masks (N, height, width) of 0 and 1, the order (N,) and
    the weights (N,).
    """
    rles, q = paste_masks(logits, teacher_size, size)
    masks = decode(rles, size)[:, 2::4, 2::4].to(logits)
    masks = F.pad(masks, (0, width - masks.shape[2], 0, height - masks.shape[1]))
    return masks, (c * q).sqrt(), (c.sqrt() * q).sqrt()


# ------------------------------------------------------------------- scores of pseudo masks (Eq. 1 and Table 5)
# Each takes the detector's confidence c (N,), mask probabilities p (N, h, w), the predicted boxes as masks
# (N, h, w) and the IoU with the ground truth (N, G), and gives (N,) within 0 ... 1.


def mask_aware_score(c: Tensor, p: Tensor, box: Tensor, iou: Tensor) -> Tensor:
    """Eq. 1: sqrt(c * mean probability of the mask's pixels (p > 0.5) inside the box).

    The box is the predicted one: the score orders Alg. 1, before any ground-truth box is known to be its own.
    (The authors' program differs: released_masks.)
    """
    positive = (p > 0.5) & box
    quality = (p * positive).sum((1, 2)) / positive.sum((1, 2)).clamp(min=1)
    return (c * quality).sqrt()


def class_score(c: Tensor, p: Tensor, box: Tensor, iou: Tensor) -> Tensor:
    return c


def iou_score(c: Tensor, p: Tensor, box: Tensor, iou: Tensor) -> Tensor:
    return F.pad(iou, (0, 1)).amax(1)  # the added column of zeros: there may be no box at all


def mean_entropy_score(c: Tensor, p: Tensor, box: Tensor, iou: Tensor) -> Tensor:
    """1 + mean over the image of p log p + (1 - p) log(1 - p)."""
    return 1 + (torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean((1, 2))


SCORE_FUNCTIONS = dict(zip(SCORES, (mask_aware_score, class_score, iou_score, mean_entropy_score)))
