"""Masks on their three grids: the network's at stride 4, the pixels of an image, COCO's run lengths.

    cells, box_masks     which cells at stride 4 lie in an image, and which in a box
    aligned_bilinear     enlarges a map with CondInst's alignment
    paste_masks          probabilities at stride 4 -> run lengths at the image's size, the form in which masks are kept
    encode, decode       pixels -> run lengths -> pixels
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

# ------------------------------------------------------------------------------------------------ stride 4


def cells(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the stride-4 grid within an image of this (height, width); cell i is pixel 4 i + 2."""
    return (size[0] + 1) // 4, (size[1] + 1) // 4


def box_masks(boxes: Tensor, height: int, width: int, stride: int = 4) -> Tensor:
    """Boxes (G, 4) xyxy pixels as masks (G, height, width) bool on the grid of a stride.

    As in BoxInst's code, a box covers pixel rows int(y0) ... int(y1 + 1) - 1, likewise columns; cell i of the grid is
    pixel i * stride + stride // 2.
    """
    y = torch.arange(height, device=boxes.device) * stride + stride // 2
    x = torch.arange(width, device=boxes.device) * stride + stride // 2
    x0, y0 = boxes[:, :2].trunc().unbind(1)
    x1, y1 = (boxes[:, 2:] + 1).trunc().unbind(1)
    rows = (y >= y0[:, None]) & (y < y1[:, None])
    columns = (x >= x0[:, None]) & (x < x1[:, None])
    return rows[:, :, None] & columns[:, None, :]


def aligned_bilinear(x: Tensor, factor: int) -> Tensor:
    """Enlarge (..., C, h, w) by `factor`: output cell p reads the input at (p - factor // 2) / factor.

    The authors' weights are trained with this alignment of CondInst; F.interpolate offers two others. With
    align_corners=True, a map padded by one cell on each side has the right spacing, 1 / factor; the cut puts it in
    the right place.
    """
    if factor == 1:
        return x
    h, w = x.shape[-2:]
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = F.interpolate(x, size=(factor * (h + 1) + 1, factor * (w + 1) + 1), mode="bilinear", align_corners=True)
    start = factor - factor // 2
    return x[..., start:start + factor * h, start:start + factor * w]


# ------------------------------------------------------------------------------------------------ the image


BAND = 128              # columns of a mask whose probabilities are in memory at once
CHUNK_PIXELS = 2 ** 26  # pixels of masks copied to the CPU at once: 64 MiB


@torch.no_grad()
def paste_masks(logits: Tensor, size: tuple[int, int], output_size: tuple[int, int], threshold: float = 0.5,
                within: Tensor | None = None) -> tuple[list[dict], Tensor]:
    """Masks (K, h, w) at stride 4 as run lengths at the image's size (H, W), and their quality (K,).

    size: the network's input without its padding. within (K, 4): masks are cut to pixels x0 ... x1 - 1, y0 ... y1 - 1.
    Quality is the mean probability of a mask's pixels. The definition of the masks, in the three steps of SAM:

        p = aligned_bilinear(logits.sigmoid()[None], 4)                                   # to the padded input
        p = p[..., :size[0], :size[1]]                                                    # without the padding
        masks = F.interpolate(p, size=output_size, mode="bilinear")[0] > threshold        # at the image's size

    Each pixel is thus a weighted mean of cells, p = vertical @ cells @ horizontal.T, and only pixels with a cell above
    the threshold among theirs are computed: a mask costs what it covers. With run lengths, 100 masks of an image of
    480 x 640 take 0.022 s instead of 0.30 s (docs/speed.md).
    """
    p = logits.sigmoid()
    vertical, horizontal = (resizing(*sizes, p.device) for sizes in zip(p.shape[1:], size, output_size))
    windows = mask_windows(p > threshold, vertical, horizontal)
    if within is not None:
        windows[:, :2] = np.maximum(windows[:, :2], within[:, :2].cpu().numpy())
        windows[:, 2:] = np.minimum(windows[:, 2:], within[:, 2:].cpu().numpy())
    w, h = (windows[:, 2:] - windows[:, :2]).clip(0).T
    rles, quality = [], p.new_zeros(len(p))
    for chunk in np.split(np.arange(len(p)), np.flatnonzero(np.diff(np.cumsum(w * h) // CHUNK_PIXELS)) + 1):
        areas = (w * h)[chunk].tolist()
        pixels = torch.empty(sum(areas), dtype=torch.bool, device=p.device)
        with torch.autocast(p.device.type, enabled=False):
            for k, mask in zip(chunk, pixels.split(areas)):
                if len(mask):
                    quality[k] = paste(p[k], vertical, horizontal, windows[k], threshold, mask.view(w[k], h[k]))
        for k, mask in zip(chunk, pixels.cpu().split(areas)):  # a GPU's masks in one copy
            rles.append(encode(mask.view(w[k], h[k]).numpy(), *windows[k, :2], output_size))
    return rles, quality


class Resizing(NamedTuple):
    """paste_masks along one axis: each of n pixels is a weighted mean of the cells first ... end - 1."""

    weights: Tensor     # (n, cells)
    first: np.ndarray   # (n,) ascending, like end
    end: np.ndarray

    def pixels(self, first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last + 1 of the pixels with any of the cells first ... end - 1 among theirs."""
        return np.searchsorted(self.end, first, "right"), np.searchsorted(self.first, end, "left")


def resizing(cells: int, size: int, output_size: int, device: torch.device) -> Resizing:
    """The weights are what the three steps make of unit vectors, one a cell."""
    x = aligned_bilinear(torch.eye(cells).view(1, cells, cells, 1), 4)[:, :, :size, :1]
    weights = F.interpolate(x, size=(output_size, 1), mode="bilinear")[0, :, :, 0].T.contiguous()
    return Resizing(weights.to(device), *spans(weights > 0).numpy().T)


def spans(x: Tensor) -> Tensor:
    """First and last + 1 index (N, 2) of what is true in each row (N, n); n and 0 in a row of nothing."""
    n, i = x.shape[1], torch.arange(x.shape[1], device=x.device)
    return torch.stack([torch.where(x, i, n).amin(1), torch.where(x, i + 1, 0).amax(1)], 1)


def mask_windows(above: Tensor, vertical: Resizing, horizontal: Resizing) -> np.ndarray:
    """The pixels x0 y0 x1 y1 (K, 4) that enclose each mask; above (K, h, w): the cells above the threshold."""
    x, y = torch.stack([spans(above.any(1)), spans(above.any(2))]).cpu().numpy()
    (x0, x1), (y0, y1) = horizontal.pixels(*x.T), vertical.pixels(*y.T)
    return np.stack([x0, y0, x1, y1], 1)


def paste(p: Tensor, vertical: Resizing, horizontal: Resizing, window: np.ndarray, threshold: float,
          out: Tensor) -> Tensor:
    """Write one mask's pixels in a window into `out` (width, height), from its p (h, w). Returns its quality."""
    (x0, y0, x1, y1), total = window.tolist(), 0.0
    a, b, c, d = vertical.first[y0], vertical.end[y1 - 1], horizontal.first[x0], horizontal.end[x1 - 1]
    strips = (vertical.weights[y0:y1, a:b] @ p[a:b, c:d]).T                          # (cells, height)
    for start in range(x0, x1, BAND):
        end = min(start + BAND, x1)
        first, last = horizontal.first[start], horizontal.end[end - 1]
        probability = horizontal.weights[start:end, first:last] @ strips[first - c:last - c]
        torch.gt(probability, threshold, out=out[start - x0:end - x0])
        total = total + F.threshold(probability, threshold, 0.0).sum()
    return total / (out.sum() + 1e-6)


# ------------------------------------------------------------------------------------------------ run lengths


def encode(columns: np.ndarray, left: int, top: int, size: tuple[int, int]) -> dict:
    """COCO's run lengths of the mask of an image of `size` (H, W) that is `columns` in a window, and empty elsewhere.

    columns (w, h) bool: the window's pixels, column by column; its first one is pixel (left, top) of the image.
    """
    height, width = size
    if columns.shape[1] == height:
        columns = columns.reshape(1, -1)  # a run that reaches the bottom continues at the top of the next column
    changes = np.diff(columns, axis=1, prepend=False, append=False)  # (w, h + 1): a run of 0 or 1 begins
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
