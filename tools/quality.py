"""How well the scores of Table 5 know the quality of a mask (paper Fig. 3, "Mask Scores v.s. Mask IoU").

    python evaluate.py --ckpt runs/boxteacher-r50-coco/final.pt --data coco --score-quality quality.png

A score is worth something as a weight of pseudo masks if it is high where the mask is good. So each pseudo mask that
the images' boxes would get is one dot: x is the score, y the IoU of the mask with the ground truth's. In detail:

    detections   those of an evaluation: score threshold, NMS, the 100 best, images at the test size
    assigned     Alg. 1 in the order of the mask-aware score, so that all four scores are asked about the same masks:
                 at most one a ground-truth box (no crowd, any class)
    x            teacher.SCORE_FUNCTIONS, with the arguments that teacher.pseudo_labels gives them
    y            IoU of the two masks as Alg. 1 hands them on: the stride-4 grid, p > 0.5, both cut to the ground-truth
                 box. An object too small for a cell of the grid has nothing to compare with and is left out

`iou` is told the ground-truth box, the others are not; that the mask-aware score also chose the masks makes its own
values vary less and lowers its correlation. Read on: `matches` makes the dots of a batch, `report`
correlates, prints and draws them.
"""
import os

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.ops import box_iou, clip_boxes_to_image

from assign import assign_masks
from data import Batch
from masks import box_masks, cells
from model import Detections, Predictions, detect, mask_logits
from teacher import SCORE_FUNCTIONS, SCORES
from tools.curves import INK, axes

PLOT = 320                  # side of a panel's square from 0 to 1, pixels
LEFT, TOP = 58, 86          # from the image's edge to the first square, pixels
PANEL = LEFT + PLOT + 14    # from one square to the next, pixels
BOTTOM = 52                 # below the squares, pixels
RADIUS = 3.0                # of a dot, pixels
DOT = (30, 90, 200)


@torch.no_grad()
def matches(predictions: Predictions, batch: Batch, score_threshold: float = 0.05) -> list[list[float]]:
    """The pseudo masks of a batch that has ground-truth masks: rows of the scores, as in SCORES, and the mask IoU.

    score_threshold as in `detect`. All numbers are within 0 ... 1.
    """
    rows = []
    for b, (boxes, true_masks, size) in enumerate(zip(batch.boxes, batch.masks, batch.sizes)):
        image = predictions.of_image(b)
        found = detect(image, score_threshold)
        found = found._replace(boxes=clip_boxes_to_image(found.boxes, size))
        iou = box_iou(found.boxes, boxes)                                                           # (N, G)
        able = (iou >= 0.5).any(1)
        if not able.any():
            continue
        found, iou = Detections(*(x[able] for x in found)), iou[able]

        h, w = cells(size)  # padding has no part in a score
        p = mask_logits(image, [found.locations]).sigmoid()[:, :h, :w]                                 # (N', h, w)
        box = box_masks(found.boxes, h, w)
        scores = [score(found.scores, p, box, iou) for score in SCORE_FUNCTIONS.values()]  # mask-aware first

        match = assign_masks(iou, scores[0])                                     # (G,)
        given, inside = match >= 0, box_masks(boxes, h, w)
        mask, truth = (p[match] > 0.5) & inside, true_masks[:, :h, :w] & inside                     # (G, h, w)
        union = (mask | truth).sum((1, 2)).clamp(min=1)
        mask_iou = (mask & truth).sum((1, 2)) / union
        rows += torch.stack([*(s[match] for s in scores), mask_iou], 1)[given & truth.any(2).any(1)].tolist()
    return rows


def report(rows: list[list[float]], path: str) -> dict:
    """Of the rows of `matches`: print the correlations, draw the dots to a PNG, and return

    {"matches": N, "scores": {score: {"pearson": r, "spearman": r}}}; r is None where there is none.
    """
    table = np.array(rows, np.float64).reshape(-1, len(SCORES) + 1)
    mask_iou = table[:, -1]
    scores = {name: {"pearson": pearson(x, mask_iou), "spearman": pearson(ranks(x), ranks(mask_iou))}
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
    """Correlation of x and y (N,); None where either does not vary, as with fewer than two values."""
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
    canvas.save(path + ".tmp", format="PNG")
    os.replace(path + ".tmp", path)


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
