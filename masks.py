"""Masks from the network's grid to the image: enlarged, resized, cut at the threshold, written as run lengths.

    aligned_bilinear   the alignment of CondInst, by which every map of masks is enlarged
    paste_masks        probabilities at stride 4 -> COCO's run lengths (runlengths.py) at the image's own size
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from runlengths import encode


def aligned_bilinear(x: Tensor, factor: int) -> Tensor:
    """Enlarge (..., C, h, w) by `factor`: output cell p reads the input at (p - factor // 2) / factor.

    That is the alignment of CondInst, with which the authors' weights are trained, and neither of the two that
    interpolate has. But align_corners=True over a map that is one cell larger on each side has the right spacing,
    1 / factor, and only needs to be cut at the right place.
    """
    if factor == 1:
        return x
    h, w = x.shape[-2:]
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = F.interpolate(x, size=(factor * (h + 1) + 1, factor * (w + 1) + 1), mode="bilinear", align_corners=True)
    start = factor - factor // 2
    return x[..., start:start + factor * h, start:start + factor * w]


BAND = 128       # columns of a mask whose probabilities exist at once
CHUNK_PIXELS = 2 ** 26  # pixels of masks that go to the CPU at once: 64 MiB


@torch.no_grad()
def paste_masks(logits: Tensor, size: tuple[int, int], output_size: tuple[int, int], threshold: float = 0.5,
                within: Tensor | None = None) -> tuple[list[dict], Tensor]:
    """Masks (K, h, w) at stride 4 as run lengths at the image's own size (H, W), and their quality (K,).

    Their probabilities are enlarged to the padded input, the padding is cut off (true `size`), the rest is resized to
    output_size, and then comes the threshold: any other order shifts the masks. Quality is the mean probability of the
    pixels above the threshold. within (K, 4): masks are cut to these pixels x0 ... x1 - 1, y0 ... y1 - 1.

    All three steps are rows @ p @ columns.T at once, and a pixel is a mean of the cells that it is made of. So what is
    not made of a cell above the threshold is not computed: a mask costs what it covers, not what the image has.
    """
    p = logits.sigmoid()
    rows, columns = (Resizing.of(*sizes, p.device) for sizes in zip(p.shape[1:], size, output_size))
    windows = mask_windows(p > threshold, rows, columns)
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
                    quality[k] = paste(p[k], rows, columns, windows[k].tolist(), threshold, mask.view(w[k], h[k]))
        for k, mask in zip(chunk, pixels.cpu().split(areas)):  # of a GPU: all of them in one copy
            rles.append(encode(mask.view(w[k], h[k]).numpy(), *windows[k, :2], output_size))
    return rles, quality


class Resizing(NamedTuple):
    """What paste_masks does along one side: each of n pixels is a weighted mean of cells first ... end - 1."""

    weights: Tensor     # (n, cells)
    first: np.ndarray   # (n,) ascending, as is end
    end: np.ndarray

    @classmethod
    def of(cls, cells: int, size: int, output_size: int, device: torch.device) -> "Resizing":
        """By doing it to an image for each cell, in which that cell alone is 1."""
        x = aligned_bilinear(torch.eye(cells).view(1, cells, cells, 1), 4)[:, :, :size, :1]
        weights = F.interpolate(x, size=(output_size, 1), mode="bilinear", align_corners=False)[0, :, :, 0].T
        return cls(weights.contiguous().to(device), *ends(weights > 0).numpy().T)

    def pixels(self, first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pixels, first and end, in which any of the cells first ... end - 1 has a part."""
        return np.searchsorted(self.end, first, "right"), np.searchsorted(self.first, end, "left")


def ends(some: Tensor) -> Tensor:
    """First and last + 1 place (N, 2) of what is true in each row (N, n); n and 0 where nothing is."""
    n = some.shape[1]
    place = torch.arange(n, device=some.device)
    return torch.stack([torch.where(some, place, n).amin(1), torch.where(some, place + 1, 0).amax(1)], 1)


def mask_windows(over: Tensor, rows: Resizing, columns: Resizing) -> np.ndarray:
    """The pixels (K, 4), x0 y0 x1 y1, outside of which no mask is, as (K, h, w) cells are above the threshold."""
    spans = torch.cat([ends(over.any(1)), ends(over.any(2))], 1).cpu().numpy()
    (x0, x1), (y0, y1) = columns.pixels(*spans[:, :2].T), rows.pixels(*spans[:, 2:].T)
    return np.stack([x0, y0, x1, y1], 1)


def paste(p: Tensor, rows: Resizing, columns: Resizing, window: list[int], threshold: float, out: Tensor) -> Tensor:
    """Write a window's pixels of one mask, from probabilities p (h, w), into `out` (columns, rows); -> its quality."""
    (x0, y0, x1, y1), total = window, 0.0
    a, b, c, d = rows.first[y0], rows.end[y1 - 1], columns.first[x0], columns.end[x1 - 1]
    strips = (rows.weights[y0:y1, a:b] @ p[a:b, c:d]).T                                   # (cells, rows)
    for start in range(x0, x1, BAND):
        end = min(start + BAND, x1)
        first, last = columns.first[start], columns.end[end - 1]
        probability = columns.weights[start:end, first:last] @ strips[first - c:last - c]
        torch.gt(probability, threshold, out=out[start - x0:end - x0])
        total = total + F.threshold(probability, threshold, 0.0).sum()
    return total / (out.sum() + 1e-6)
