"""Masks as COCO writes them: run lengths down the columns, of an image of (height, width).

`encode` makes them of the window of the image that holds the mask, so that a small object of a large image costs
what it covers. Found masks are kept in no other form; `decode` gives their pixels.
"""
import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor


def encode(columns: np.ndarray, left: int, top: int, size: tuple[int, int]) -> dict:
    """The mask of an image of `size` (H, W) that is `columns` within a window and nothing outside.

    columns (w, h) bool: the window's pixels column by column; its first one is pixel (left, top) of the image.
    """
    height, width = size
    if columns.shape[1] == height:
        columns = columns.reshape(1, -1)  # a run that reaches the bottom goes on at the top of the next column
    changes = np.diff(columns, axis=1, prepend=False, append=False)  # (w, h + 1): where a run of either kind begins
    x, y = np.divmod(np.flatnonzero(changes), changes.shape[1])
    starts = (left + x) * height + top + y
    counts = np.diff(starts, prepend=0, append=height * width)       # pixels outside, inside, outside ... in turn
    if len(starts) and starts[-1] == height * width:
        counts = counts[:-1]
    counts = coco_mask.frPyObjects({"size": size, "counts": counts}, height, width)["counts"]
    return {"size": [height, width], "counts": counts.decode("ascii")}


def decode(rles: list[dict], size: tuple[int, int]) -> Tensor:
    """Masks (N, H, W) bool of an image of `size` (H, W)."""
    masks = torch.zeros(len(rles), *size, dtype=torch.bool)
    for mask, rle in zip(masks, rles):
        mask.copy_(torch.from_numpy(coco_mask.decode(rle)))
    return masks
