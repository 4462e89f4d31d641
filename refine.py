"""Masks from what is known about a box. Not from the paper; docs/own-boxes.md has the figures.

    the box      an object lies inside its box, most often around the middle            ellipse
                 and reaches all four sides: each row and column holds a part of it     fitted_masks, reach_sides
    the network  what the mask heads of the box's locations see                         fitted_masks
    the colours  it has other colours than what surrounds the box, in this image        color_masks
    the edges    neighbours of one colour belong together                               color_masks, follow_edges
    the pixels   people draw boxes at whole pixels                                      pixel_masks

The first guess is an ellipse or what a network sees; colours and edges correct it; then it is read at the pixels, or
at the cells of a network that learns from it (teacher.refined_label). Each box is seen in a window: the box and MARGIN
of its sides around it, read at POINTS x POINTS points, so that large boxes cost hardly more than small ones. Functions
are batched over the G boxes of an image; n is POINTS; float32, and deterministic.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from assign import LEVEL_RANGES, image_targets
from losses import projection_loss, rgb_to_lab
from masks import box_masks, encode
from model import SIZES_OF_INTEREST, Predictions, mask_heads

POINTS = 32       # of a window, along each side; even
MARGIN = 0.2      # of the sides of a box, around it
CHUNK = 16        # boxes in memory at once: their pairs of points are n^4 / 4 floats each

HEADS = 4         # mask heads that draw a box
FIT_STEPS = 20
FINE = 2 * POINTS  # points at which a mask is compared with its box
ELLIPSE = 0.3     # weight of the ellipse beside what a network sees

BANDWIDTH = 0.19  # of colours, in units of their spread in the window
PRIOR = 0.3       # weight of the first guess beside the colours
CLAMP = 3.0       # the most that the colours of a point count, as a logit
COUPLING = 8.0    # the most that the neighbours of a point count, as a logit
RADIUS = 2        # of the neighbours of a point, points
ROUNDS = 3        # of estimating the colours of both sides
TURNS = 3         # of settling with the neighbours, in each round
THRESHOLD = 0.4   # of a mask: a pixel of probability p raises the IoU J expected if p > J / (1 + J); J is about 0.7


def chunks(count: int) -> list[slice]:
    """Slices of at most CHUNK of `count` boxes."""
    return [slice(first, first + CHUNK) for first in range(0, count, CHUNK)]


def windows(boxes: Tensor) -> Tensor:
    """The windows (G, 4) of boxes (G, 4), xyxy."""
    side = MARGIN * (boxes[:, 2:] - boxes[:, :2])
    return torch.cat([boxes[:, :2] - side, boxes[:, 2:] + side], 1)


def box_coordinates(device: torch.device | str = "cpu", points: int = POINTS) -> tuple[Tensor, Tensor]:
    """(x, y) of the points of a window, both (n, n): -1 and 1 are the edges of the box."""
    t = ((torch.arange(points, device=device) + 0.5) / points * 2 - 1) * (1 + 2 * MARGIN)
    y, x = torch.meshgrid(t, t, indexing="ij")
    return x, y


def inside_box(device: torch.device | str = "cpu", points: int = POINTS) -> Tensor:
    """Which points of a window lie in its box, (n, n) bool."""
    return torch.stack(box_coordinates(device, points)).abs().amax(0) <= 1


def within_image(boxes: Tensor, size: tuple[int, int], points: int = POINTS) -> Tensor:
    """Which points of the windows of boxes (G, 4) lie in the image of (height, width) size, (G, n, n) bool."""
    x, y = ((boxes[:, i] + boxes[:, i + 2])[:, None, None] / 2 + (boxes[:, i + 2] - boxes[:, i])[:, None, None] / 2 * t
            for i, t in enumerate(box_coordinates(boxes.device, points)))
    return (x > 0) & (x < size[1]) & (y > 0) & (y < size[0])


def ellipse(device: torch.device | str = "cpu") -> Tensor:
    """The first guess for any box (n, n): the probability falls from the middle to 0.5 at the ellipse in the box."""
    x, y = box_coordinates(device)
    return (1 - (x ** 2 + y ** 2) / 2).clamp(0.05, 0.95)


# ------------------------------------------------------------------------------------------------- a network


@torch.no_grad()
def fitted_masks(image: Predictions, boxes: Tensor, size: tuple[int, int], classes: Tensor | None = None,
                 steps: int = FIT_STEPS, chosen: Tensor | None = None) -> Tensor:
    """Probabilities (G, n, n) in the windows of boxes (G, 4), xyxy pixels of the network's input of (height, width)
    size: what the mask heads of each box see there, fitted to the box.

    image: the predictions of one image. classes (G,): of the boxes in the model, -1: unknown. chosen: places of the
    boxes that get masks, whose number is then G; the others still own locations. For the k heads h_j of a
    box, with weights w_j of sum one (see box_heads), and the mask features F,

        p = sum_j w_j sigmoid(h_j(F)).

    A mask that is right casts the box's own shadow on both axes. So `steps` steps of Adam change the parameters of the
    heads, and nothing else of the network, until projection_loss(p, box) is small. In the end the first guess without
    a network has a say: logit p becomes (1 - ELLIPSE) logit p + ELLIPSE logit ellipse.
    """
    locations, weights = box_heads(image, boxes, classes, chosen=chosen)                        # (G, k) both
    boxes = boxes if chosen is None else boxes[chosen]
    parameters = image.controller.at(image.box_maps, [locations.flatten()]).unflatten(0, locations.shape)
    xy, sizes = image.locations.xy[locations], boxes.new_tensor(SIZES_OF_INTEREST)[image.locations.level[locations]]
    fine = boxes.new_empty(len(boxes), FINE, FINE)
    by_size = (boxes[:, 2:] - boxes[:, :2]).amax(1).argsort()  # the largest box of a chunk says how many cells it takes
    for some in (by_size[chunk] for chunk in chunks(len(boxes))):
        fine[some] = fit(image.mask_features[0], boxes[some], size, parameters[some], xy[some], sizes[some],
                         weights[some], steps)
    p, prior = F.avg_pool2d(fine[:, None], FINE // POINTS)[:, 0], ellipse(boxes.device)
    return ((1 - ELLIPSE) * p.logit(1e-3) + ELLIPSE * prior.logit()).sigmoid() * inside_box(boxes.device)


def fit(mask_features: Tensor, boxes: Tensor, size: tuple[int, int], parameters: Tensor, xy: Tensor, sizes: Tensor,
        weights: Tensor, steps: int) -> Tensor:
    """The fitted probabilities (g, n, n) of g boxes with k heads each; n is FINE.

    mask_features (C, h, w); boxes (g, 4) pixels; parameters (g, k, P), locations xy (g, k, 2) and sizes of interest
    (g, k), pixels, and weights (g, k) of the heads. The heads are applied to the m x m cells around each box, which
    are then interpolated at the points of its window.
    """
    low, high = windows(boxes).split(2, 1)
    count = min(FINE, int((high - low).max() / 8) + 3)
    (columns, across), (rows, down) = (window_cells(low[:, i], high[:, i], count, mask_features.shape[2 - i])
                                       for i in (0, 1))                                         # (g, m), (g, n, m)
    features = mask_features[:, rows[:, :, None], columns[:, None]].transpose(0, 1).flatten(2)  # (g, C, m m)
    cells = torch.stack(torch.broadcast_tensors(columns[:, None], rows[:, :, None]), 1).flatten(2) * 8.0 + 4
    seen = within_image(boxes, size, FINE)                                                      # (g, n, n)
    box = inside_box(boxes.device, FINE) & seen

    def fused(parameters: Tensor) -> Tensor:
        logits = mask_heads(features, cells, parameters.flatten(0, 1), xy.flatten(0, 1), sizes.flatten(),
                            [weights.shape[1]] * len(boxes)).view(*weights.shape, count, count)
        p = (down[:, None] @ logits @ across[:, None].transpose(2, 3)).sigmoid()                # (g, k, n, n)
        return (weights[:, :, None, None] * p).sum(1) * seen

    parameters = parameters.clone().requires_grad_()
    adam = torch.optim.Adam([parameters], lr=0.03)
    with torch.enable_grad():
        for _ in range(steps):
            adam.zero_grad()
            projection_loss(fused(parameters), box).sum().backward()
            adam.step()
    return fused(parameters).detach()


def window_cells(low: Tensor, high: Tensor, count: int, cells: int) -> tuple[Tensor, Tensor]:
    """One axis of windows from low to high (g,), pixels, on a map of `cells` cells at stride 8: the `count` cells that
    stand for each window (g, m), and the weights (g, n, m) that interpolate them at its points.

    A window of more cells than that takes every second, third, ... of them. The mask of cell i lies at pixel 8 i + 6.5:
    there aligned_bilinear and paste_masks put it, twice enlarged and then four times.
    """
    step = ((high - low) / 8 / (count - 2)).ceil()
    first = (((low + high) / 2 - 6.5) / 8 - step * (count - 1) / 2).round()
    number, point = (torch.arange(n, device=low.device) for n in (count, FINE))
    at = low[:, None] + (high - low)[:, None] * (point + 0.5) / FINE                            # pixels
    at = (((at - 6.5) / 8).clamp(0, cells - 1) - first[:, None]) / step[:, None]                # the chosen cells
    weights = (1 - (at[:, :, None] - number).abs()).clamp(min=0)
    return (first[:, None] + step[:, None] * number).clamp(0, cells - 1).long(), weights


def box_heads(image: Predictions, boxes: Tensor, classes: Tensor | None, count: int = HEADS,
              chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `count` locations (G, k) whose mask heads draw each box (G, 4), or each of the `chosen` ones, and their
    weights (G, k), of sum 1.

    They are the surest of those that FCOS would train on the box, weighted by the confidence in its class (classes
    (G,), -1 or None: in any), sqrt(class probability * centerness). FCOS trains none on a box whose centre smaller
    boxes cover, or that lies between the locations of its level: such a box takes the nearest of its level, preferably
    such that no other box owns.
    """
    xy, _, level = image.locations
    probability, centerness = image.class_logits[0].sigmoid(), image.centerness[0].sigmoid()
    numbers, count = torch.arange(len(boxes), device=boxes.device), min(count, len(xy))
    owner = image_targets(image.locations, boxes, torch.zeros_like(numbers), 1)[2]              # (L,)
    numbers = numbers if chosen is None else chosen
    locations, weights = [owner.new_zeros(0, count)], [boxes.new_zeros(0, count)]
    for some in (numbers[chunk] for chunk in chunks(len(numbers))):
        of = probability.amax(1).expand(len(boxes[some]), -1)                                   # (g, L)
        if classes is not None:
            known = classes[some] >= 0
            of = torch.where(known[:, None], probability[:, classes[some].clamp(min=0)].T, of)
        confidence = (of * centerness).sqrt()
        center, half = (boxes[some, :2] + boxes[some, 2:]) / 2, (boxes[some, 2:] - boxes[some, :2]).amax(1) / 2
        own_level = torch.searchsorted(boxes.new_tensor([high for _, high in LEVEL_RANGES]), half)
        far = torch.cdist(center, xy) + 1e5 * (owner >= 0) + 1e6 * (level != own_level[:, None])
        rank, best = torch.where(owner == some[:, None], confidence, -far).topk(count)
        usable = (rank > 0) | (rank[:, :1] <= 0)  # a box with locations of its own draws with these alone
        weight = confidence.gather(1, best) * usable + 1e-6 * usable
        locations.append(best)
        weights.append(weight / weight.sum(1, keepdim=True))
    return torch.cat(locations), torch.cat(weights)


# ------------------------------------------------------------------------------------------- colours and edges


@torch.no_grad()
def color_masks(image: Tensor, boxes: Tensor, guess: Tensor, strength: float = 1.0) -> Tensor:
    """Probabilities (G, n, n) in the windows of boxes (G, 4), xyxy pixels of image (3, H, W) RGB 0..255, which is float
    and contiguous: roi_align would copy any other image for each chunk of boxes.

    guess (G, n, n): the probability p_i of point i before its colour is known, within 0.001 ... 0.999. c_i is its
    colour in units of the bandwidth, K_ij = exp(-|c_i - c_j|^2 / 2) the similarity of two colours. The object's colours
    have the density f_i = 1e-4 + sum_j K_ij x_j / sum_j x_j at point i; the background's, b_i, has 1 - x_j in place of
    x_j; points beyond the edge of the image count for neither. Starting from x = p inside the box and 0 outside, ROUNDS
    times

        u_i = PRIOR logit p_i + s mean over 3 x 3 points of clamp(log(f_i / b_i), -CLAMP, CLAMP)
        x_i = sigmoid(u_i), and then TURNS times
        x_i = sigmoid(reach_sides(u_i + s COUPLING mean over the points j around i of w_ij (2 x_j - 1)))

    inside the box; outside of it x stays 0. The last line is the mean field of a conditional random field. w_ij, at
    most 1, is the similarity of neighbouring colours, 0 for i itself. s: `strength`.
    """
    inside, masks = inside_box(image.device), [guess.new_zeros(0, POINTS, POINTS)]
    for some in chunks(len(boxes)):
        p, (colors, bandwidth) = guess[some], window_colors(image, boxes[some])
        seen = within_image(boxes[some], image.shape[1:])                                           # (g, n, n)
        colors = (colors - colors.mean((2, 3), keepdim=True)) / bandwidth
        # The sums over j run over means of 2 x 2 points: a quarter of the pairs, and the same masks.
        kernel = color_kernel(columns(colors), columns(F.avg_pool2d(colors, 2)))                    # (g, n n, n n / 4)
        alike = neighbour_similarity(colors)
        prior = PRIOR * p.logit(1e-3)
        x = p * inside
        for _ in range(ROUNDS):
            weights = columns(F.avg_pool2d(torch.stack([x, 1 - x], 1) * seen[:, None], 2))          # (g, n n / 4, 2)
            density = kernel @ (weights / weights.sum(1, keepdim=True).clamp(min=1e-6)) + 1e-4
            evidence = (density[..., 0] / density[..., 1]).log().clamp(-CLAMP, CLAMP).view_as(x)
            evidence = F.avg_pool2d(F.pad(evidence[:, None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[:, 0]
            logits = prior + strength * evidence
            x = logits.sigmoid() * inside
            for _ in range(TURNS):
                agreed = (alike * neighbours(2 * x[:, None] - 1)[:, 0]).mean(1)
                x = reach_sides(logits + strength * COUPLING * agreed, inside).sigmoid() * inside
        masks.append(x)
    return torch.cat(masks)


def window_colors(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Lab (g, 3, n, n) in the windows of boxes (g, 4) of an image (3, H, W), and bandwidths (g, 1, 1, 1), which go with
    the spread of the colours in the window, so that pale images count as much as vivid ones."""
    colors = rgb_to_lab(roi_align(image[None], [windows(boxes)], POINTS, sampling_ratio=2, aligned=True))
    spread = colors.var((2, 3), correction=0, keepdim=True).sum(1, keepdim=True).sqrt()      # units of Lab
    return colors, BANDWIDTH * spread.clamp(min=1.0)


def columns(maps: Tensor) -> Tensor:
    """Maps (g, c, h, w) as points (g, h w, c)."""
    return maps.flatten(2).transpose(1, 2)


def color_kernel(a: Tensor, b: Tensor) -> Tensor:
    """K_ij = exp(-|a_i - b_j|^2 / 2) of points a (g, k, 3) and b (g, m, 3), as (g, k, m).

    The square is multiplied out, which makes it one matrix product.
    """
    half_a, half_b = (x.square().sum(-1, keepdim=True) / 2 for x in (a, b))
    one_a, one_b = (torch.ones_like(x[..., :1]) for x in (a, b))
    return (torch.cat([a, half_a, one_a], -1) @ torch.cat([b, -one_b, -half_b], -1).transpose(1, 2)).exp_()


def neighbours(maps: Tensor) -> Tensor:
    """The points around each point of maps (g, c, n, n): (g, c, k, n, n), k = (2 RADIUS + 1)^2, itself among them."""
    g, c, n, _ = maps.shape
    padded = F.pad(maps, (RADIUS,) * 4, mode="replicate")
    return F.unfold(padded, 2 * RADIUS + 1).view(g, c, -1, n, n)


def neighbour_similarity(colors: Tensor) -> Tensor:
    """w_ij (g, k, n, n) of the colours (g, 3, n, n) of a point and its neighbours, 0 for the point itself.

    exp(-|c_i - c_j|^2 / 4): neighbours may differ by more than the bandwidth, and still be one surface.
    """
    w = (-(neighbours(colors) - colors[:, :, None]).square().sum(1) / 4).exp_()
    w[:, w.shape[1] // 2] = 0
    return w


def reach_sides(logits: Tensor, inside: Tensor) -> Tensor:
    """Logits (g, n, n) of a mask that reaches the sides of its box, inside (n, n): the projection loss as a rule.

    Each row and each column of the box holds a part of the object. Where the surest point of one has a logit of -d,
    below 0, the whole row or column rises by 5 d, with d at most 4; where both do, by the larger.
    """
    surest = logits.masked_fill(~inside, -20.0)
    lack = torch.maximum(*((-surest.amax(d, keepdim=True)).clamp(0, 4).expand_as(logits) for d in (1, 2)))
    return logits + 5 * lack


def pixel_masks(p: Tensor, guess: Tensor, boxes: Tensor, size: tuple[int, int],
                image: Tensor | None = None) -> tuple[list[dict], np.ndarray]:
    """Run lengths of probabilities p (G, n, n) at the pixels of an image of `size` (H, W), and scores (G,).

    Masks are cut to the boxes (G, 4), xyxy pixels, rounded to whole pixels. With the image (3, H, W), as color_masks
    takes it, the threshold is THRESHOLD, and masks of large boxes follow its edges, see follow_edges; without it, 0.5.
    A mask that is less than 0.3 of its guess (G, n, n) is that guess, and an empty one is the box. A score is the mean
    probability of the points above 0.5.
    """
    rles, scores, threshold = [], np.zeros(len(boxes)), 0.5 if image is None else THRESHOLD
    p, guess, boxes, image = p.cpu(), guess.cpu(), boxes.cpu(), None if image is None else image.cpu()
    for k, (box, edges) in enumerate(zip(boxes, rounded(boxes, size))):
        x0, y0, x1, y1 = edges.tolist()
        grid = window_coordinates(box, edges)
        candidates = torch.stack([p[k], guess[k]])[:, None]
        at_pixels = F.grid_sample(candidates, grid.expand(2, -1, -1, -1), padding_mode="border", align_corners=False)
        mask, first = at_pixels[0, 0] > threshold, at_pixels[1, 0] > 0.5                              # (h, w) each
        if image is not None and (1 + 2 * MARGIN) * max(mask.shape) > POINTS:  # pixels are finer than points
            mask = follow_edges(mask, p[k], grid, image, box, edges)
        chosen = 0 if mask.sum() >= 0.3 * first.sum() else 1
        mask = (mask, first)[chosen]
        if mask.any():
            points = candidates[chosen][candidates[chosen] > 0.5]
            scores[k] = float(points.mean()) if len(points) else 0.5
        else:
            mask = torch.ones_like(mask)
        rles.append(encode(mask.numpy().T, x0, y0, size))
    return rles, scores


def follow_edges(mask: Tensor, p: Tensor, grid: Tensor, image: Tensor, box: Tensor, edges: Tensor) -> Tensor:
    """`mask` (h, w), probabilities p (n, n) interpolated at the pixels `edges` (4,) of an image (3, H, W), sharpened.

    grid (h, w, xy): see window_coordinates. Where pixels are finer than points, interpolation blurs the outline. So
    the weights of the 2 x 2 points around a pixel also fall with the difference of their colours from the pixel's
    (joint bilateral upsampling): a pixel follows the points that look like it. This matters only for pixels between
    points on either side of THRESHOLD, so only these are computed.
    """
    row, column = ((t + 1) / 2 * POINTS - 0.5 for t in (grid[:, 0, 1], grid[0, :, 0]))       # (h,), (w,) in points
    top, left = (t.floor().long().clamp(0, POINTS - 2) for t in (row, column))
    above = (p > THRESHOLD).float()[None]
    mixed = F.max_pool2d(above, 2, 1)[0] > -F.max_pool2d(-above, 2, 1)[0]                    # of 2 x 2 points
    y, x = mixed[top][:, left].nonzero().unbind(1)                                           # (m,) each
    colors, bandwidth = (t[0] for t in window_colors(image, box[None]))
    own = rgb_to_lab(image[None, :, edges[1] + y, edges[0] + x])[0]                          # (3, m)
    total, weight = torch.zeros(2, len(y))
    for i, j in ((top[y] + a, left[x] + b) for a in (0, 1) for b in (0, 1)):
        near = (1 - (row[y] - i).abs()) * (1 - (column[x] - j).abs())
        alike = (-((colors[:, i, j] - own) / bandwidth[0]).square().sum(0) / 4).exp() + 1e-3
        total += near * alike * p[i, j]
        weight += near * alike
    mask = mask.clone()
    mask[y, x] = total > THRESHOLD * weight
    return mask


def rounded(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (G, 4) as pixels x0 ... x1 - 1, y0 ... y1 - 1 (G, 4) int64 within an image of `size`, at least one."""
    limit = torch.tensor([size[1], size[0]])
    low, high = (boxes.cpu() + 0.5).floor().long().split(2, 1)
    low = low.clamp(min=0).minimum(limit - 1)
    return torch.cat([low, torch.maximum(high.minimum(limit), low + 1)], 1)


def window_coordinates(box: Tensor, edges: Tensor) -> Tensor:
    """Where the middles of the pixels `edges` (4,) lie in the window of a box (4,), -1 ... 1: (h, w, xy)."""
    (x0, y0, x1, y1), (left, top, right, bottom) = box.tolist(), edges.tolist()

    def axis(low: float, high: float, first: int, end: int) -> Tensor:
        t = (torch.arange(first, end) + 0.5 - low) / (high - low) * 2 - 1
        return t / (1 + 2 * MARGIN) if len(t) > 1 else t * 0  # rounding may move the only pixel of a box to its edge

    return torch.stack(torch.meshgrid(axis(x0, x1, left, right), axis(y0, y1, top, bottom), indexing="xy"), -1)


# ------------------------------------------------------------------------------------------- the stride-4 grid


def cell_masks(p: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Probabilities p (G, n, n) interpolated at the cells of a stride-4 grid (G, height, width), 0 outside the boxes.

    boxes (G, 4): xyxy pixels of the image of this grid.
    """
    low, high = windows(boxes).split(2, 1)

    def weights(low: Tensor, high: Tensor, count: int) -> Tensor:
        middles = torch.arange(count, device=p.device) * 4 + 2.5                                # pixels
        at = (middles - low[:, None]) / (high - low)[:, None] * POINTS - 0.5                    # points
        return (1 - (at[:, :, None] - torch.arange(POINTS, device=p.device)).abs()).clamp(min=0)

    down, across = (weights(low[:, i], high[:, i], count) for i, count in ((1, height), (0, width)))  # (G, cells, n)
    return down @ p @ across.transpose(1, 2) * box_masks(boxes, height, width)
