"""The teacher of BoxTeacher (paper Sec. 3.1): an average of the student over time that labels boxes with masks.

    update         theta <- alpha theta + (1 - alpha) xi, the exponential moving average (EMA)
    pseudo_label   clean image -> teacher -> mask-aware scores (Eq. 1) -> Alg. 1 -> a pseudo mask for each box
    refined_label  clean image -> teacher -> what else a box tells (refine.py) -> the same; not from the paper
    match          scores and Alg. 1 for one image, also used to label the boxes of a data set (tools/label.py)
"""
import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image

from assign import IOU_THRESHOLD, SCORE_THRESHOLD, assign_masks
from data import Batch
from masks import box_masks, cells, decode, paste_masks
from model import CondInst, Detections, Predictions, detect, mask_logits
from refine import cell_masks, color_masks, fitted_masks


class PseudoLabels(NamedTuple):
    """Masks of the M boxes of a batch that have one, on the stride-4 grid of the student's images; G boxes in all."""

    masks: Tensor   # (M, h, w) probabilities, 0 outside the box
    box: Tensor     # (M,) the box of each mask, an index in torch.cat(batch.boxes)
    scores: Tensor  # (G,) how far to trust a box's mask; 0: it has none

    def of(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Masks (N, h, w), 0 for a box without one, and scores (N,) of some of the G boxes, given by index (N,)."""
        masks = self.masks.new_zeros(len(boxes), *self.masks.shape[1:])
        n, m = (boxes[:, None] == self.box).nonzero(as_tuple=True)
        masks[n] = self.masks[m]
        return masks, self.scores[boxes]


class Match(NamedTuple):
    """Alg. 1 for one image with G boxes: the N detections that overlap a box, and which box gets which."""

    found: Detections  # boxes in pixels of the student's image, clipped to it
    iou: Tensor        # (N, G) of their boxes with the ground truth
    masks: Tensor      # (N, h, w) probabilities on the student's grid
    scores: Tensor     # (N,) the weight of each mask
    assigned: Tensor   # (G,) on the CPU: the detection whose mask a box gets, or -1


def make_teacher(student: CondInst) -> CondInst:
    """An exact copy that no gradient reaches.

    Like the authors' it stays in training mode: batch norms normalise with the teacher's batches and keep running
    statistics of its features, which evaluation uses and which are never averaged; Swin drops paths at random.
    """
    return copy.deepcopy(student).requires_grad_(False).train()


def ema_momentum(iteration: int, ceiling: float = 0.999) -> float:
    """alpha of the update before a 0-based iteration: min(ceiling, 1 - 1 / (iteration + 1)).

    The paper has 0.999 from the start; this warm-up is that of the authors' code.
    """
    return min(ceiling, 1 - 1 / (iteration + 1))


@torch.no_grad()
def update(teacher: CondInst, student: CondInst, momentum: float, statistics: bool = False) -> None:
    """EMA of the parameters. statistics: copy the student's batch-norm statistics too, for an average that never runs
    on training images (train.py --average)."""
    for theta, xi in zip(teacher.parameters(), student.parameters()):
        theta.lerp_(xi, 1 - momentum)
    if statistics:
        for theta, xi in zip(teacher.buffers(), student.buffers()):
            theta.copy_(xi)


@torch.no_grad()
def pseudo_label(teacher: CondInst, batch: Batch, score: str = "mask-aware") -> PseudoLabels:
    """Pseudo masks for batch.boxes from the teacher's view of the images. score: one of SCORES, or "released"."""
    predictions = teacher(batch.teacher_images, batch.teacher_sizes)
    height, width = batch.images.shape[-2] // 4, batch.images.shape[-1] // 4
    masks, box, first = [], [], 0
    scores = batch.boxes[0].new_zeros(sum(map(len, batch.boxes)))
    for b, (boxes, size, teacher_size) in enumerate(zip(batch.boxes, batch.sizes, batch.teacher_sizes)):
        image = predictions.of_image(b)
        matched = match(image, detect(image), boxes, size, teacher_size, (height, width), score)
        assigned = matched.assigned.to(boxes.device)
        given = (assigned >= 0).nonzero()[:, 0]  # the other boxes have no mask and score 0: box losses alone
        masks.append(matched.masks[assigned[given]] * box_masks(boxes[given], height, width))
        box.append(first + given)
        scores[first + given] = matched.scores[assigned[given]]
        first += len(boxes)
    return PseudoLabels(torch.cat(masks), torch.cat(box), scores)


@torch.no_grad()
def refined_label(teacher: CondInst, batch: Batch, chosen: Tensor, fit_steps: int, colors: bool) -> PseudoLabels:
    """Pseudo masks for the boxes `chosen` (M,), ascending places in torch.cat(batch.boxes), from all that is known of a
    box: its sides, what the teacher sees and the colours of the image (refine.py). Not from the paper.

    Unlike Alg. 1 it serves the boxes that the teacher does not detect, too. A score is the mean probability of the mask
    where it is above 0.5. fit_steps: in which mask heads are fitted to their box; colors: whether colours count.
    """
    predictions = teacher(batch.teacher_images, batch.teacher_sizes)
    height, width = batch.images.shape[-2] // 4, batch.images.shape[-1] // 4
    masks, first = [batch.boxes[0].new_zeros(0, height, width)], 0
    scores = batch.boxes[0].new_zeros(sum(map(len, batch.boxes)))
    for b, (boxes, size, (h, w)) in enumerate(zip(batch.boxes, batch.sizes, batch.teacher_sizes)):
        own = chosen[(chosen >= first) & (chosen < first + len(boxes))] - first
        seen = boxes * boxes.new_tensor([w / size[1], h / size[0]] * 2)  # in pixels of the teacher's view
        p = fitted_masks(predictions.of_image(b), seen, (h, w), batch.labels[b], fit_steps, own)
        if colors:
            p = color_masks(batch.teacher_images[b, :, :h, :w].float().contiguous(), seen[own], p)
        p = p.nan_to_num(0.0)  # of a teacher that overflows in float16: no mask
        sure = p > 0.5
        scores[first + own] = (p * sure).sum((1, 2)) / sure.sum((1, 2)).clamp(min=1)
        masks.append(cell_masks(p, boxes[own], height, width))
        first += len(boxes)
    return PseudoLabels(torch.cat(masks), chosen, scores)


def match(image: Predictions, found: Detections, boxes: Tensor, size: tuple[int, int], teacher_size: tuple[int, int],
          grid: tuple[int, int], score: str = "mask-aware", iou_threshold: float = IOU_THRESHOLD,
          score_threshold: float = SCORE_THRESHOLD) -> Match:
    """Alg. 1 for one image: which detection's mask goes to which of the boxes (G, 4), xyxy pixels.

    image, found: the teacher's predictions and detections on its view of (height, width) teacher_size; size: that of
    the student's image, to which boxes and grid (h, w) belong. Masks are drawn only for detections that overlap a box
    by at least iou_threshold.
    """
    scale = found.boxes.new_tensor([size[1] / teacher_size[1], size[0] / teacher_size[0]] * 2)
    found = found._replace(boxes=clip_boxes_to_image(found.boxes * scale, size))
    iou = box_iou(found.boxes, boxes)                                                            # (N, G)
    eligible = (iou >= iou_threshold).any(1)
    found, iou = Detections(*(x[eligible] for x in found)), iou[eligible]

    logits = mask_logits(image, [found.locations])
    if score == "released":
        p, order, weight = released_masks(logits, found.scores, teacher_size, size, *grid)
    else:
        p, (h, w) = to_student_grid(logits.sigmoid(), teacher_size, size, *grid), cells(size)    # (N, h, w)
        order = weight = SCORES[score](found.scores, p[:, :h, :w], box_masks(found.boxes, h, w), iou)
    return Match(found, iou, p, weight, assign_masks(iou, order, iou_threshold, score_threshold))


def to_student_grid(p: Tensor, teacher_size: tuple[int, int], size: tuple[int, int], height: int,
                    width: int) -> Tensor:
    """Maps p (N, h', w') at stride 4 of the teacher's image, read on the student's stride-4 grid (height, width).

    Both sizes are the images' true (height, width). Cell i of the student's grid is the middle of pixel 4 i + 2:

        fraction of the image        f = (4 i + 2.5) / size
        pixel of the teacher's image t = f * teacher_size - 0.5
        cell of the teacher's map    (t - 2) / 4, which is i if the sizes are equal
    """
    if len(p) == 0:
        return p.new_zeros(0, height, width)

    def normalised_coordinates(count: int, size: int, teacher_size: int, teacher_cells: int) -> Tensor:
        t = (torch.arange(count, device=p.device) * 4 + 2.5) * teacher_size / size - 0.5
        return (t - 2) / 4 * 2 / max(teacher_cells - 1, 1) - 1     # -1 and 1 are the middles of the outer cells

    y = normalised_coordinates(height, size[0], teacher_size[0], p.shape[1])
    x = normalised_coordinates(width, size[1], teacher_size[1], p.shape[2])
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]                      # (1, height, width, xy)
    return F.grid_sample(p[None], grid, mode="bilinear", padding_mode="border", align_corners=True)[0]


def released_masks(logits: Tensor, c: Tensor, teacher_size: tuple[int, int], size: tuple[int, int], height: int,
                   width: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the authors' program makes of the teacher's masks, in place of Eq. 1: `--score released`.

    logits (N, h', w') of the teacher, c (N,) the detector's confidence. Masks are pasted into the student's image,
    made binary there and sampled at stride 4. With q the mean probability of the whole mask, Alg. 1 sorts by sqrt(c q)
    and the weight in the loss is sqrt(sqrt(c) q). Returns masks (N, height, width) of 0 and 1, the order (N,) and
    the weights (N,).
    """
    rles, q = paste_masks(logits, teacher_size, size)
    masks = decode(rles, size)[:, 2::4, 2::4].to(logits)
    masks = F.pad(masks, (0, width - masks.shape[2], 0, height - masks.shape[1]))
    return masks, (c * q).sqrt(), (c.sqrt() * q).sqrt()


# ------------------------------------------------------------------- scores of pseudo masks (Eq. 1 and Table 5)
# Each takes the detector's confidence c (N,), mask probabilities p (N, h, w) of the cells within the image, the
# predicted boxes as masks (N, h, w) and the IoU with the ground truth (N, G), and returns (N,) from 0 to 1.


def mask_aware_score(c: Tensor, p: Tensor, box: Tensor, iou: Tensor) -> Tensor:
    """Eq. 1: sqrt(c * mean probability of the mask's pixels (p > 0.5) inside the box).

    The paper says ground-truth box, but this score orders Alg. 1, when none is assigned yet: `box` is the predicted
    one. (The authors' program differs: released_masks.)
    """
    positive = (p > 0.5) & box
    quality = (p * positive).sum((1, 2)) / positive.sum((1, 2)).clamp(min=1)
    return (c * quality).sqrt()


def class_score(c: Tensor, p: Tensor, box: Tensor, iou: Tensor) -> Tensor:
    """The detector's confidence, sqrt(class probability * centerness)."""
    return c


def iou_score(c: Tensor, p: Tensor, box: Tensor, iou: Tensor) -> Tensor:
    """The largest IoU with any ground-truth box, since none is assigned yet."""
    return iou.amax(1) if iou.shape[1] else torch.zeros_like(c)


def mean_entropy_score(c: Tensor, p: Tensor, box: Tensor, iou: Tensor) -> Tensor:
    """1 + mean over the image of p log p + (1 - p) log(1 - p)."""
    return 1 + (torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean((1, 2))


SCORES = {"mask-aware": mask_aware_score, "cls": class_score, "iou": iou_score, "mean-entropy": mean_entropy_score}
