"""Masks from what is known about a box, without a network. Not from the paper; docs/own-boxes.md has the figures.

    the box      an object lies inside its box, most often around the middle         ellipse
    the colours  it has other colours than what surrounds the box, in this image     color_masks
    the pixels   people draw boxes at whole pixels                                   pixel_masks

Each box is seen in a window: the box and MARGIN of its sides around it, read at POINTS x POINTS points, so that all
boxes cost the same. Functions are batched over the G boxes of an image; n is POINTS; float32, and deterministic.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from losses import rgb_to_lab
from masks import encode

POINTS = 32       # of a window, along each side
MARGIN = 0.2      # of the sides of a box, around it
BANDWIDTH = 0.25  # of colours, in units of their spread in the window
PRIOR = 0.3       # weight of the first guess beside the colours
CLAMP = 3.0       # the most that the colours of a point count, as a logit
ROUNDS = 3
CHUNK = 16        # boxes whose pairs of points, n^4 floats each, are in memory at once


def box_coordinates(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(x, y) of the points of a window, both (n, n): -1 and 1 are the edges of the box."""
    t = ((torch.arange(POINTS, device=device) + 0.5) / POINTS * 2 - 1) * (1 + 2 * MARGIN)
    y, x = torch.meshgrid(t, t, indexing="ij")
    return x, y


def ellipse(device: torch.device | str = "cpu") -> Tensor:
    """The first guess for any box (n, n): the probability falls from the middle and is 0.5 ... 0.6 at its ellipse."""
    x, y = box_coordinates(device)
    return (1.1 - (x ** 2 + y ** 2) / 2).clamp(0.05, 0.95)


@torch.no_grad()
def color_masks(image: Tensor, boxes: Tensor, guess: Tensor) -> Tensor:
    """Probabilities (G, n, n) in the windows of boxes (G, 4), xyxy pixels of image (3, H, W) RGB 0..255.

    guess (G, n, n): the probability p_i of point i before its colour is known. K_ij is the similarity of two colours,
    see color_kernel. The object's colours have the density f_i = sum_j K_ij x_j / sum_j x_j at point i; the
    background's, b_i, has 1 - x_j in place of x_j. Starting from x = p inside the box and 0 outside, ROUNDS times

        x_i = sigmoid(PRIOR logit p_i + mean over 3 x 3 points of clamp(log(f_i / b_i), -CLAMP, CLAMP)) inside the box.
    """
    lab = rgb_to_lab(image[None].float())
    side = boxes[:, 2:] - boxes[:, :2]
    windows = torch.cat([boxes[:, :2] - MARGIN * side, boxes[:, 2:] + MARGIN * side], 1).to(lab)
    inside = torch.stack(box_coordinates(image.device)).abs().amax(0) <= 1                          # (n, n)
    masks = [guess.new_zeros(0, POINTS, POINTS)]
    for window, p in zip(windows.split(CHUNK), guess.split(CHUNK)):
        colors = roi_align(lab, [window], POINTS, sampling_ratio=2, aligned=True).flatten(2).transpose(1, 2)
        kernel = color_kernel(colors)                                                               # (g, n n, n n)
        prior = PRIOR * p.logit(1e-3)
        x = p * inside
        for _ in range(ROUNDS):
            weights = torch.stack([x, 1 - x], -1).flatten(1, 2)                                     # (g, n n, 2)
            density = kernel @ (weights / weights.sum(1, keepdim=True).clamp(min=1e-6)) + 1e-4
            evidence = (density[..., 0] / density[..., 1]).log().clamp(-CLAMP, CLAMP).view_as(x)
            evidence = F.avg_pool2d(F.pad(evidence[:, None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[:, 0]
            x = (prior + evidence).sigmoid() * inside
        masks.append(x)
    return torch.cat(masks)


def color_kernel(lab: Tensor) -> Tensor:
    """K_ij = exp(-|Lab_i - Lab_j|^2 / 2 s^2) of m points lab (g, m, 3), as (g, m, m).

    s is BANDWIDTH times the spread of the colours in the window, so that pale images count as much as vivid ones. The
    square is multiplied out, which makes it one matrix product.
    """
    lab = lab - lab.mean(1, keepdim=True)
    spread = lab.square().sum(-1).mean(1).sqrt().clamp(min=1.0)                                     # (g,) units of Lab
    a = lab / (BANDWIDTH * spread)[:, None, None]
    half, one = a.square().sum(-1, keepdim=True) / 2, torch.ones_like(a[..., :1])
    return (torch.cat([a, half, one], -1) @ torch.cat([a, -one, -half], -1).transpose(1, 2)).exp_()


def pixel_masks(p: Tensor, guess: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[list[dict], np.ndarray]:
    """Run lengths of probabilities p (G, n, n) at the pixels of an image of `size` (H, W), and scores (G,).

    Masks are cut to the boxes (G, 4), xyxy pixels, rounded to whole pixels. A mask that is less than 0.3 of its guess
    (G, n, n) is that guess, and an empty one is the box. A score is the mean probability of a mask's points.
    """
    rles, scores = [], np.zeros(len(boxes))
    for k, (box, edges) in enumerate(zip(boxes.cpu(), rounded(boxes, size))):
        x0, y0, x1, y1 = edges.tolist()
        grid = window_coordinates(box, edges)
        candidates = torch.stack([p[k], guess[k]])[:, None].cpu()
        at_pixels = F.grid_sample(candidates, grid.expand(2, -1, -1, -1), padding_mode="border", align_corners=False)
        mask, first = at_pixels[:, 0] > 0.5                                                        # (h, w) each
        chosen = 0 if mask.sum() >= 0.3 * first.sum() else 1
        mask = (mask, first)[chosen]
        if mask.any():
            points = candidates[chosen][candidates[chosen] > 0.5]
            scores[k] = float(points.mean()) if len(points) else 0.5
        else:
            mask = torch.ones_like(mask)
        rles.append(encode(mask.numpy().T, x0, y0, size))
    return rles, scores


def rounded(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (G, 4) as pixels x0 ... x1 - 1, y0 ... y1 - 1 (G, 4) int64 within an image of `size`, at least one."""
    limit = torch.tensor([size[1], size[0]])
    low, high = (boxes.cpu() + 0.5).floor().long().split(2, 1)
    low = low.clamp(min=0).minimum(limit - 1)
    return torch.cat([low, torch.maximum(high.minimum(limit), low + 1)], 1)


def window_coordinates(box: Tensor, edges: Tensor) -> Tensor:
    """Where the middles of the pixels `edges` (4,) lie in the window of a box (4,), -1 ... 1: (h, w, xy)."""
    (x0, y0, x1, y1), (left, top, right, bottom) = box.tolist(), edges.tolist()
    x = ((torch.arange(left, right) + 0.5 - x0) / (x1 - x0) * 2 - 1) / (1 + 2 * MARGIN)
    y = ((torch.arange(top, bottom) + 0.5 - y0) / (y1 - y0) * 2 - 1) / (1 + 2 * MARGIN)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
