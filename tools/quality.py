"""How good masks are, where the data set has true ones: during training, and against their scores (paper Fig. 3).

    python train.py --measure-labels ...                                  label_iou and student_iou in metrics.jsonl
    python evaluate.py --ckpt runs/boxteacher-r50-coco/final.pt --data coco --score-quality quality.png

The second draws "Mask Scores v.s. Mask IoU": a score is a good weight for pseudo masks if it is high for good masks.
Each pseudo mask that the images' boxes would get is one dot, with its score as x and its IoU with the true mask as y:

    detections   those of an evaluation: score threshold, NMS, the 100 best, images at the test size
    assigned     by Alg. 1 in the order of the mask-aware score, so that all four scores rate the same masks: at most
                 one a ground-truth box (no crowd, any class)
    x            teacher.SCORES
    y            IoU of the masks on the stride-4 grid, p > 0.5, both cut to the ground-truth box. An object smaller
                 than a cell has no true mask there and is left out

The score `iou` sees the ground-truth box, the others do not. The mask-aware score also chose the masks, which narrows
its own range and lowers its correlation.
"""
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from boxteacher import Step
from data import Batch
from formats.pictures import save_image
from masks import box_masks, cells
from model import Predictions, detect
from teacher import SCORES, PseudoLabels, match
from tools.curves import INK, axes

PLOT = 320                  # side of a panel's square from 0 to 1, pixels
LEFT, TOP = 58, 86          # from the image's edge to the first square, pixels
PANEL = LEFT + PLOT + 14    # from one square to the next, pixels
BOTTOM = 52                 # below the squares, pixels
RADIUS = 3.0                # of a dot, pixels
DOT = (30, 90, 200)


# ---------------------------------------------------------------------------------------------- during training


def measure(step: Step, batch: Batch) -> dict[str, Tensor]:
    """Counts of a training step, to be logged as sums; nothing is learnt from them.

    boxes, positives, pseudo_masks: numbers of boxes, of locations that learn one, of boxes with a pseudo mask. If the
    batch of a box-supervised step carries true masks, also sums over boxes of the masks' IoU with them: student_iou
    over student_boxes, and label_iou over pseudo_masks.
    """
    boxes = torch.cat(batch.boxes)
    counts = {"boxes": boxes.new_tensor(len(boxes)), "positives": step.positives, "pseudo_masks": boxes.new_zeros(())}
    if step.pseudo is not None:
        counts["pseudo_masks"] = (step.pseudo.scores > 0).sum()
    if batch.masks is not None and "loss_projection" in step.losses:
        counts |= mask_quality(step.logits, step.box, torch.cat(batch.masks), boxes, step.pseudo)
    return counts


@torch.no_grad()
def mask_quality(logits: Tensor, box: Tensor, truth: Tensor, boxes: Tensor,
                 pseudo: PseudoLabels | None) -> dict[str, Tensor]:
    """Sums over boxes of the IoU of the student's and the teacher's masks with the true ones.

    logits (K, h, w) of instances of the boxes box (K,); truth (G, h, w) bool; boxes (G, 4) xyxy pixels. A box has the
    mean IoU of the masks of its instances, cut to the box as the teacher's are. With a teacher, the student's count
    only for boxes that have a pseudo mask, so that the two can be compared.
    """
    inside, zero = box_masks(boxes[box], *logits.shape[-2:]), logits.new_zeros(len(boxes))
    instances = zero.index_add(0, box, logits.new_ones(len(box)))
    student = zero.index_add(0, box, mask_iou((logits > 0) & inside, truth[box])) / instances.clamp(min=1)
    seen = instances > 0 if pseudo is None else (instances > 0) & (pseudo.scores > 0)
    quality = {"student_iou": (student * seen).sum(), "student_boxes": seen.sum()}
    if pseudo is not None:
        quality["label_iou"] = (mask_iou(pseudo.masks > 0.5, truth[pseudo.box]) * (pseudo.scores[pseudo.box] > 0)).sum()
    return quality


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of masks (N, h, w) bool, (N,); 0 for two empty ones."""
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1)


# ---------------------------------------------------------------------------------------------- against their scores


@torch.no_grad()
def matches(predictions: Predictions, batch: Batch, score_threshold: float = 0.05) -> list[list[float]]:
    """The pseudo masks of a batch that has ground-truth masks: rows of the scores, in the order of SCORES, and the mask
    IoU, all from 0 to 1. score_threshold as in `detect`.
    """
    rows = []
    for b, (boxes, true_masks, size) in enumerate(zip(batch.boxes, batch.masks, batch.sizes)):
        image, (h, w) = predictions.of_image(b), cells(size)
        matched = match(image, detect(image, score_threshold), boxes, size, size, (h, w))
        box = box_masks(matched.found.boxes, h, w)
        scores = [score(matched.found.scores, matched.masks, box, matched.iou) for score in SCORES.values()]

        given = (matched.assigned >= 0).nonzero()[:, 0]                                             # of the G boxes
        k, inside = matched.assigned[given], box_masks(boxes[given], h, w)
        mask, truth = (matched.masks[k] > 0.5) & inside, true_masks[given, :h, :w] & inside
        seen = truth.flatten(1).any(1)
        rows += torch.stack([*(s[k] for s in scores), mask_iou(mask, truth)], 1)[seen].tolist()
    return rows


def report(rows: list[list[float]], path: str) -> dict:
    """Of the rows of `matches`: print the correlations, draw the dots to a PNG, and return

    {"matches": N, "scores": {score: {"pearson": r, "spearman": r}}}; r is None if undefined.
    """
    table = np.array(rows, np.float64).reshape(-1, len(SCORES) + 1)
    iou = table[:, -1]
    scores = {name: {"pearson": pearson(x, iou), "spearman": pearson(ranks(x), ranks(iou))}
              for name, x in zip(SCORES, table.T)}
    print(f"score quality: correlation with the mask IoU, {len(table)} pseudo masks")
    print(f"{'':12}{'Pearson':>10}{'Spearman':>10}")
    for name, r in scores.items():
        print(f"{name:12}{shown(r['pearson'], 3):>10}{shown(r['spearman'], 3):>10}")
    scatter(table, scores, path)
    print(f"score quality: {path}")
    return {"matches": len(table), "scores": scores}


# ---------------------------------------------------------------------------------------------- correlations

def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Correlation of x and y (N,); None if either is constant, as with fewer than two values."""
    if not len(x) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def ranks(x: np.ndarray) -> np.ndarray:
    """Rank of each value of x (N,), from 1; equal values share the mean of theirs. Of ranks `pearson` is Spearman's."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def shown(r: float | None, digits: int) -> str:
    return "-" if r is None else f"{r:.{digits}f}"


# ------------------------------------------------------------------------------------------------- the image

def scatter(table: np.ndarray, scores: dict, path: str) -> None:
    """Write a PNG with a panel for each score: its column of `table` against the last column, the mask IoU.

    table (N, scores + 1); scores {name: {"pearson", "spearman"}}, for the titles.
    """
    canvas = Image.new("RGB", (len(scores) * PANEL, TOP + PLOT + BOTTOM), "white")
    draw = ImageDraw.Draw(canvas)
    large, small = ImageFont.load_default(size=17), ImageFont.load_default(size=13)
    draw.text((canvas.width // 2, 18), f"Score against mask IoU, {len(table)} pseudo masks", INK, large, "mm")
    fifths = [(tick, f"{tick:.1f}") for tick in np.linspace(0, 1, 6)]
    for k, (name, r) in enumerate(scores.items()):
        axes(canvas, LEFT + k * PANEL, TOP, PLOT, PLOT, fifths, fifths, f"{name} score", "mask IoU", small)
        middle = LEFT + k * PANEL + PLOT // 2
        draw.text((middle, TOP - 34), name, INK, large, "mm")
        correlations = f"Pearson {shown(r['pearson'], 2)}, Spearman {shown(r['spearman'], 2)}"
        draw.text((middle, TOP - 14), correlations, INK, small, "mm")
    xy = [place(k, table[:, k], table[:, -1]) for k in range(len(scores))]
    canvas.paste(DOT, mask=dots(np.concatenate(xy), *canvas.size, opacity(len(table))))
    save_image(canvas, path, "PNG")


def place(panel: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the points (x, y) (N,) of a panel are on the canvas: (N, 2) pixels, a pixel's middle being at + 0.5."""
    return np.stack([LEFT + panel * PANEL + x * PLOT, TOP + (1 - y) * PLOT], -1) + 0.5


def opacity(count: int) -> float:
    """Of one dot: many are faint, so that their density can be seen; few are plain."""
    return min(0.6, max(0.04, 15 / max(count, 1) ** 0.5))


def dots(xy: np.ndarray, width: int, height: int, alpha: float) -> Image.Image:
    """A layer ("L", its opacity) of dots at xy (N, 2) pixels, each of opacity alpha < 1 and more where they overlap.

    What is seen through a pile is the product of what each lets through, so logarithms are summed, for all dots at
    once. A pixel's share in a dot falls from 1 to 0 over the pixel around its edge: that smooths the edge.
    """
    corner, reach = np.floor(xy).astype(int), int(RADIUS) + 1
    log_through = np.zeros(height * width)
    for dx in range(-reach, reach + 1):
        for dy in range(-reach, reach + 1):
            pixel = corner + (dx, dy)
            share = np.clip(RADIUS + 0.5 - np.hypot(*(pixel + 0.5 - xy).T), 0, 1)
            log_through += np.bincount(pixel[:, 1] * width + pixel[:, 0], np.log1p(-alpha * share), height * width)
    return Image.fromarray((255 * (1 - np.exp(log_through))).round().astype(np.uint8).reshape(height, width))
