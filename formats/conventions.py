"""A guess for check.py: boxes that look like another convention than COCO's, x, y, width and height in pixels.

Other readings of the four numbers are held against the annotation's `area`, the extent of its `segmentation` and the
edges of its image.
"""
import itertools

import numpy as np
from pycocotools import mask as coco_mask

from formats.segmentation import compressed, polygons

# xyxy from the four columns of boxes (m, 4)
READINGS = {"xywh": lambda a, b, c, d: (a, b, a + c, b + d),
            "xyxy (two corners)": lambda a, b, c, d: (a, b, c, d),
            "cxcywh (the centre first)": lambda a, b, c, d: (a - c / 2, b - d / 2, a + c / 2, b + d / 2)}
PERCENT = "percent of the image"
UNITS = {"pixels": None, PERCENT: 100, "fractions of the image": 1}     # the image's side in this unit
FEW, SHARE = 3, 0.5       # boxes that must contradict COCO's reading if only the image's edges do


def other_convention(bbox: np.ndarray, sizes: np.ndarray, areas: np.ndarray,
                     extents: np.ndarray) -> tuple[str, list[int]] | None:
    """The reading that boxes (m, 4) seem to follow, in words, and the indices of those that show it; None if COCO's
    stands.

    sizes (m, 2): height and width of the images; areas (m,) and extents (m, 4), xyxy pixels: NaN where unknown. It
    takes most boxes to contradict COCO's reading by area or extent and to fit the other; or, for corners, centres and
    fractions, a share of them by the image's edges while all fit the other."""
    limits = sizes[:, ::-1].astype(float)
    stated = bbox[:, 2:].prod(1)
    areas = np.where(np.abs(areas - stated) > 1e-3 * areas, areas, np.nan)     # others tell nothing
    ours = np.stack(READINGS["xywh"](*bbox.T), 1)
    with np.errstate(invalid="ignore"):
        off = differs(ours, extents, 0.25) | (areas > 1.2 * (bbox[:, 2:] + 2).prod(1))
        out = outside(ours, limits) | (bbox[:, 2:] < 1).any(1)
        best, answer = 0, None
        for unit, name in list(itertools.product(UNITS, READINGS))[1:]:                     # the first is COCO's
            scale = np.tile(limits / UNITS[unit], 2) if UNITS[unit] else 1
            boxes = np.stack(READINGS[name](*bbox.T), 1) * scale
            sides = boxes[:, 2:] - boxes[:, :2]
            fits = ~(outside(boxes, limits) | (sides < 1).any(1) | differs(boxes, extents, 0.1)
                     | (areas > (sides + 2).prod(1)))
            exact = (np.abs(areas - sides.prod(1)) < 0.02 * areas) & (np.abs(areas - stated) > 0.1 * areas)
            by_content = fits & (off | exact)
            by_edges = fits & out if fits.all() and unit != PERCENT else np.zeros(len(bbox), bool)
            enough = by_content.sum() > len(bbox) / 2 or by_edges.sum() >= max(FEW, SHARE * len(bbox))
            shown = by_content | by_edges
            if enough and shown.sum() > best:
                best, answer = shown.sum(), (f"{name} in {unit}", np.flatnonzero(shown).tolist())
    return answer


def outside(boxes: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Which xyxy boxes (m, 4) reach out of 0..limits (m, 2) by more than a pixel and 2 %: (m,)."""
    margin = 1 + 0.02 * limits
    return (boxes[:, :2] < -margin).any(1) | (boxes[:, 2:] > limits + margin).any(1)


def differs(boxes: np.ndarray, extents: np.ndarray, share: float) -> np.ndarray:
    """Which xyxy boxes (m, 4) have an edge more than 2 pixels and this share of the side from their extent: (m,)."""
    margin = 2 + share * np.tile(extents[:, 2:] - extents[:, :2], 2)
    return (np.abs(boxes - extents) > margin).any(1)


def extent(segmentation, size: tuple[int, int]) -> list[float]:
    """xyxy of a segmentation without a flaw, or of none: NaN."""
    if not segmentation:
        return [np.nan] * 4
    if type(segmentation) is list:
        x, y = (sum((polygon[axis::2] for polygon in polygons(segmentation)), []) for axis in (0, 1))
        return [min(x), min(y), max(x), max(y)]
    x, y, width, height = coco_mask.toBbox(compressed(segmentation, size)).tolist()
    return [x, y, x + width, y + height] if width else [np.nan] * 4
