"""The network of BoxTeacher: CondInst, that is FCOS with a dynamic mask head (paper Sec. 3.1 and 4).

From top to bottom, the way of an image:

    pixels -> backbone (C3-C5) -> FPN (P3-P7) -> FCOS head -> class, ltrb, centerness at each location
                                     |               |
                                     |               +-> controller -> parameters of an instance's mask head
                                     +-> mask branch -> mask features at stride 8
    mask head, mask features -> mask logits at stride 4
    detections, mask logits -> paste_masks (masks.py) -> Instances of the image

Teacher and student are two such networks with different weights. Sources: FCOS (Tian et al., ICCV 2019),
CondInst (Tian et al., ECCV 2020).
"""
import contextlib
import math
import os
from itertools import compress
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from backbone import BatchNorm, make_backbone
from data import canvas_of, padded, pixels, resized_size, view
from formats import checkpoint
from formats.checkpoint import CheckpointError
from formats.pictures import as_image
from masks import aligned_bilinear, decode, paste_masks

STRIDES = (8, 16, 32, 64, 128)                     # of P3 ... P7, pixels
SIZES_OF_INTEREST = (64, 128, 256, 512, 1024)      # scale of the relative coordinates at P3 ... P7, pixels
PIXEL_MEAN = (123.675, 116.28, 103.53)             # RGB, of ImageNet
PIXEL_STD = (58.395, 57.12, 57.375)


class Locations(NamedTuple):
    """The L locations at which FCOS predicts, level by level, row by row."""

    xy: Tensor      # (L, 2) pixels of the network's input
    stride: Tensor  # (L,) pixels
    level: Tensor   # (L,) 0 for P3 ... 4 for P7


class Predictions(NamedTuple):
    """What the network predicts for a batch of B images, before any threshold; float32, but for box_maps."""

    class_logits: Tensor    # (B, L, classes)
    ltrb: Tensor            # (B, L, 4) distances to the box's left, top, right, bottom, in strides, >= 0
    centerness: Tensor      # (B, L) logits
    box_maps: list[Tensor]  # (B, C, h, w) of each level: the box tower, the controller's input
    mask_features: Tensor   # (B, 16, H/8, W/8)
    locations: Locations
    controller: nn.Module   # the Controller, which is applied to box_maps only where masks are drawn

    def of_image(self, index: int) -> "Predictions":
        """The predictions of one image, as a batch of one."""
        one = slice(index, index + 1)
        return Predictions(self.class_logits[one], self.ltrb[one], self.centerness[one],
                           [x[one] for x in self.box_maps], self.mask_features[one], self.locations, self.controller)


class Detections(NamedTuple):
    """Boxes of one image after NMS, best first."""

    boxes: Tensor      # (N, 4) xyxy pixels of the network's input, not clipped to it
    scores: Tensor     # (N,) sqrt(class probability * centerness), the detector's confidence
    labels: Tensor     # (N,)
    locations: Tensor  # (N,) the location, 0 ... L-1, that found it


class Instances(NamedTuple):
    """The instances found in one image, on the CPU, at the image's size."""

    boxes: Tensor          # (N, 4) xyxy pixels
    scores: Tensor         # (N,)
    labels: Tensor         # (N,)
    rles: list[dict]       # the N masks as COCO's run lengths
    size: tuple[int, int]  # (H, W)

    @property
    def masks(self) -> Tensor:
        """(N, H, W) bool, decoded at each access."""
        return decode(self.rles, self.size)


# ------------------------------------------------------------------------------------------ pyramid and heads


class FPN(nn.Module):
    """Feature pyramid P3-P7, all `channels` wide; P6 and P7 are made from P5."""

    def __init__(self, inputs: list[int], channels: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in inputs)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in inputs)
        self.p6 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for conv in [*self.lateral, *self.output, self.p6, self.p7]:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [lateral(x) for lateral, x in zip(self.lateral, maps)]
        for i in (1, 0):  # top-down
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[-2:], mode="nearest")
        p3, p4, p5 = (output(x) for output, x in zip(self.output, maps))
        p6 = self.p6(p5)
        return [p3, p4, p5, p6, self.p7(F.relu(p6))]


def tower(channels: int, depth: int = 4) -> nn.Sequential:
    """3x3 convolutions with group norm. A group has two channels at least: P7 may be one cell, one value a channel."""
    groups = min(32, channels // 2)
    layers = []
    for _ in range(depth):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(groups, channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class FCOSHead(nn.Module):
    """The head of FCOS (Sec. 3), shared by all levels, with CondInst's controller on the box tower."""

    def __init__(self, channels: int, num_classes: int, num_params: int):
        super().__init__()
        self.class_tower, self.box_tower = tower(channels), tower(channels)
        self.class_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.ltrb = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.controller = Controller(channels, num_params, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))  # of ltrb, one learnt factor a level
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        # every class starts at probability 0.01, so that the background does not dominate the first steps
        nn.init.constant_(self.class_logits.bias, -math.log(99))
        # every side starts at one stride, like FCOS's exp(0): around 0 the ReLU would block half of the gradients
        nn.init.ones_(self.ltrb.bias)

    def forward(self, pyramid: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """The first four fields of Predictions."""
        class_maps, box_maps = self.towers(pyramid)
        class_logits = [self.class_logits(x) for x in class_maps]
        ltrb = [F.relu(scale * self.ltrb(x)) for scale, x in zip(self.scales, box_maps)]
        centerness = [self.centerness(x) for x in box_maps]
        return (by_location(class_logits).float(), by_location(ltrb).float(),
                by_location(centerness).float().squeeze(-1), box_maps)

    def towers(self, pyramid: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [self.class_tower(x) for x in pyramid], [self.box_tower(x) for x in pyramid]


def by_location(maps: list[Tensor]) -> Tensor:
    """Maps (B, C, h, w) of the levels as (B, L, C)."""
    return torch.cat([m.permute(0, 2, 3, 1).flatten(1, 2) for m in maps], 1)


class Controller(nn.Conv2d):
    """A 3x3 convolution of the box tower: the parameters of each instance's mask head (CondInst Sec. 3.1).

    At most 100 of thousands of locations draw a mask, so it runs only there. Everywhere, it would be a tenth of the
    head's cost.
    """

    def at(self, maps: list[Tensor], locations: list[Tensor]) -> Tensor:
        """Parameters (K, P), float32, at locations[b] (k_b,) of image b, in that order; maps (B, C, h, w) by level."""
        cells = F.pad(by_location(maps), (0, 0, 1, 0))                             # (B, 1 + L, C): zeros lie outside
        sizes = [x.shape[-2:] for x in maps]
        numbers = torch.arange(1.0, cells.shape[1], device=cells.device).split([h * w for h, w in sizes])
        around = torch.cat([F.unfold(n.view(1, 1, *size), 3, padding=1)[0] for n, size in zip(numbers, sizes)], 1)
        around = around.T.long()                                                   # (L, 9) cells; outside a level 0
        patches = torch.cat([x[around[place]] for x, place in zip(cells, locations)])              # (K, 9, C)
        weight = self.weight.permute(0, 2, 3, 1)                                   # (P, 3, 3, C)
        with torch.autocast(cells.device.type, enabled=False):
            return F.linear(patches.flatten(1).float(), weight.flatten(1), self.bias)


class MaskBranch(nn.Module):
    """P3-P5 refined and summed at stride 8, four convolutions, 16 channels for the mask heads (CondInst Sec. 3.2)."""

    def __init__(self, inputs: int, width: int, outputs: int):
        super().__init__()
        self.refine = nn.ModuleList(self._block(inputs, width) for _ in range(3))
        self.tower = nn.Sequential(*(self._block(width, width) for _ in range(4)))
        self.output = nn.Conv2d(width, outputs, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
        nn.init.zeros_(self.output.bias)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Sequential:
        """Its batch norm is trained, also with a frozen backbone."""
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), BatchNorm(outputs),
                             nn.ReLU(inplace=True))

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        p3, p4, p5 = (refine(x) for refine, x in zip(self.refine, pyramid))
        x = p3 + aligned_bilinear(p4, 2) + aligned_bilinear(p5, 4)
        return self.output(self.tower(x)).float()


MASK_HEAD_WIDTH = 8


def num_mask_params(channels: int) -> int:
    """Weights and biases of a mask head of 1x1 layers (channels + 2) -> 8 -> 8 -> 1: 233 for 16 channels."""
    n = MASK_HEAD_WIDTH
    return (channels + 2) * n + n * n + n + n + n + 1


def dynamic_mask_head(mask_features: Tensor, parameters: Tensor, xy: Tensor, size_of_interest: Tensor,
                      counts: list[int]) -> Tensor:
    """Each instance's mask head on the mask features of its image (CondInst Sec. 3.1).

    mask_features (B, C, H, W) at stride 8; the K instances as in mask_heads. Returns logits (K, 2H, 2W) at stride 4.
    """
    batch, _, h, w = mask_features.shape
    x = torch.arange(w, device=xy.device).mul(8).add(4.0).expand(h, w)
    y = torch.arange(h, device=xy.device).mul(8).add(4.0)[:, None].expand(h, w)
    points = torch.stack([x, y]).expand(batch, 2, h, w).flatten(2)
    logits = mask_heads(mask_features.flatten(2), points, parameters, xy, size_of_interest, counts)
    return aligned_bilinear(logits.view(-1, 1, h, w), 2)[:, 0]


def mask_heads(features: Tensor, points: Tensor, parameters: Tensor, xy: Tensor, size_of_interest: Tensor,
               counts: list[int]) -> Tensor:
    """Each instance's three-layer mask head at M points of its image: logits (K, M).

    features (B, C, M) at points (B, 2, M), x and y in pixels; of the K instances, ordered by image, counts[b] in image
    b: parameters (K, P), locations xy (K, 2) in pixels, and size_of_interest (K,) in pixels.

    Layer 1 reads the features and the relative coordinate (xy - point) / size_of_interest. In the form xy / size -
    point / size, the first term is a bias, and the second reads coordinates, which all instances share. So layer 1 of
    all instances of an image is ONE matrix product with the image's map.
    """
    n, c = MASK_HEAD_WIDTH, features.shape[1]
    with torch.autocast(features.device.type, enabled=False):
        w1, w2, w3, b1, b2, b3 = parameters.float().split([n * (c + 2), n * n, n, n, n, 1], dim=1)
        w1, w2, w3 = w1.unflatten(1, (n, c + 2)), w2.unflatten(1, (n, n)), w3.unflatten(1, (1, n))
        w_xy = w1[:, :, :2] / size_of_interest.view(-1, 1, 1)
        b1 = b1 + (w_xy * xy[:, None]).sum(-1)
        w1 = torch.cat([-w_xy, w1[:, :, 2:]], dim=2)
        features = torch.cat([points, features.float()], 1)

        hidden = [torch.addmm(b.reshape(-1, 1), weight.reshape(-1, c + 2), image)   # (8 k, M)
                  for image, weight, b in zip(features, w1.split(counts), b1.split(counts))]
        hidden = F.relu(torch.cat(hidden)).view(len(parameters), n, features.shape[2])
        hidden = F.relu(torch.baddbmm(b2[:, :, None], w2, hidden))
        return torch.baddbmm(b3[:, :, None], w3, hidden)[:, 0]


# ------------------------------------------------------------------------------------------- the network


class CondInst(nn.Module):
    """FCOS with a dynamic mask head.

    backbone: a module that returns [C3, C4, C5] and names their widths in `channels`.
    channels: width of FPN and heads, a multiple of 32 (GroupNorm). The mask branch is min(128, channels) wide.
    """

    amp_dtype: torch.dtype | None = None  # mixed precision of forward; masks and losses are computed in float32

    def __init__(self, backbone: nn.Module, num_classes: int, channels: int = 256, mask_channels: int = 16):
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone
        self.fpn = FPN(backbone.channels, channels)
        self.head = FCOSHead(channels, num_classes, num_mask_params(mask_channels))
        self.mask_branch = MaskBranch(channels, min(128, channels), mask_channels)
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)  # 5 % faster on CPUs, docs/speed.md

    def forward(self, images: Tensor, sizes: list[tuple[int, int]]) -> Predictions:
        """images (B, 3, H, W) RGB 0..255, padded to multiples of 32; sizes: each image's true (height, width)."""
        with torch.autocast(images.device.type, self.amp_dtype) if self.amp_dtype else contextlib.nullcontext():
            pyramid = self.fpn(self.backbone(self.normalise(images, sizes)))
            locations = make_locations([p.shape[-2:] for p in pyramid], images.device)
            return Predictions(*self.head(pyramid), self.mask_branch(pyramid[:3]), locations, self.head.controller)

    def compile_convolutions(self, backend: str = "inductor") -> None:
        """Let torch.compile compile backbone, FPN and towers, once for each size of padded images.

        Each size takes minutes, so images are padded to few sizes (data.COMPILED_STRIDE).
        """
        torch._dynamo.config.cache_size_limit = 64  # sizes; torch 2.6 has no public option for it
        for part in (self.backbone, self.fpn):
            part.compile(backend=backend, dynamic=False)
        self.head.towers = torch.compile(self.head.towers, backend=backend, dynamic=False)

    def normalise(self, images: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """Centre and scale the pixels; the padding becomes 0, the mean colour."""
        images = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        for image, (h, w) in zip(images, sizes):
            image[:, h:] = 0
            image[:, :, w:] = 0
        return images


def mask_logits(predictions: Predictions, locations: list[Tensor]) -> Tensor:
    """Mask logits (K, H/4, W/4) of the instances at locations[b] (k_b,) of image b, in that order."""
    parameters, places = predictions.controller.at(predictions.box_maps, locations), torch.cat(locations)
    xy, _, level = (x[places] for x in predictions.locations)
    sizes = torch.tensor(SIZES_OF_INTEREST, device=level.device)[level]
    return dynamic_mask_head(predictions.mask_features, parameters, xy, sizes, [len(x) for x in locations])


def make_locations(level_sizes: list[tuple[int, int]], device: torch.device) -> Locations:
    """Cell (row, column) of a level of stride s is at pixel (column * s + s // 2, row * s + s // 2)."""
    xy, stride, level = [], [], []
    for i, ((h, w), s) in enumerate(zip(level_sizes, STRIDES)):
        y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        xy.append(torch.stack([x, y], -1).view(-1, 2) * s + s // 2)
        stride.append(torch.full((h * w,), s, device=device))
        level.append(torch.full((h * w,), i, device=device))
    return Locations(torch.cat(xy).float(), torch.cat(stride).float(), torch.cat(level))


def build_model(backbone: str, num_classes: int, channels: int = 256, frozen: bool = True, mask_channels: int = 16,
                stride_in_1x1: bool = False) -> CondInst:
    """A CondInst with random weights. backbone, frozen and stride_in_1x1: see backbone.py.

    A checkpoint holds these arguments as "model".
    """
    return CondInst(make_backbone(backbone, frozen, stride_in_1x1), num_classes, channels, mask_channels)


# -------------------------------------------------------------------------------------------- inference


def decode_boxes(ltrb: Tensor, locations: Locations) -> Tensor:
    """Distances (..., L, 4) in strides to boxes (..., L, 4) xyxy pixels."""
    ltrb = ltrb * locations.stride[:, None]
    return torch.cat([locations.xy - ltrb[..., :2], locations.xy + ltrb[..., 2:]], -1)


SCORE_THRESHOLD, PER_LEVEL, NMS_THRESHOLD, LIMIT = 0.05, 1000, 0.6, 100  # of `detect`


@torch.no_grad()
def detect(one: Predictions, score_threshold: float = SCORE_THRESHOLD, per_level: int = PER_LEVEL,
           nms_threshold: float = NMS_THRESHOLD, limit: int = LIMIT) -> Detections:
    """Detections from the predictions of one image, see Predictions.of_image (FCOS Sec. 3.3).

    A (location, class) pair is a candidate if class probability * centerness > score_threshold, and among the
    `per_level` best of its level. NMS runs class by class over all levels; the `limit` best remain.
    """
    quality, locations, labels = best_pairs(one, per_level)
    chosen = quality > score_threshold
    scores, locations, labels = quality[chosen].sqrt(), locations[chosen], labels[chosen]
    boxes = decode_boxes(one.ltrb[0], one.locations)[locations]
    # batched_nms shifts each class by the largest coordinate: classes would overlap if some were negative
    keep = batched_nms(boxes - boxes.min() if len(boxes) else boxes, scores, labels, nms_threshold)[:limit]
    return Detections(boxes[keep], scores[keep], labels[keep], locations[keep])


def best_pairs(one: Predictions, per_level: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `per_level` best (location, class) pairs of each level: class probability * centerness, location and class.

    A level of fewer pairs is filled up with pairs of quality 0: their number does not depend on the image's size.
    """
    quality = one.class_logits[0].sigmoid() * one.centerness[0].sigmoid()[:, None]                     # (L, C)
    num_classes, first, values, pairs = quality.shape[1], 0, [], []
    for level in quality.split([x[0, 0].numel() for x in one.box_maps]):
        best = F.pad(level.flatten(), (0, per_level)).topk(per_level)
        values.append(best.values)
        pairs.append(best.indices + first)
        first += level.numel()
    pairs = torch.cat(pairs)
    return torch.cat(values), pairs // num_classes, pairs % num_classes


@torch.no_grad()
def find_instances(predictions: Predictions, sizes: list[tuple[int, int]], original_sizes: list[tuple[int, int]],
                   score_threshold: float = 0.05, rescore: bool = True) -> list[Instances]:
    """The instances of each image of a batch, from the network's predictions; see `predict`."""
    instances = []
    for i, ((h, w), (height, width)) in enumerate(zip(sizes, original_sizes)):
        one = predictions.of_image(i)
        found = detect(one, score_threshold)
        boxes = found.boxes * found.boxes.new_tensor([width / w, height / h, width / w, height / h])
        boxes = clip_boxes_to_image(boxes, (height, width))
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        rles, quality = paste_masks(mask_logits(one, [found.locations[keep]]), (h, w), (height, width))
        scores = (found.scores[keep] * quality).sqrt() if rescore else found.scores[keep]
        instances.append(Instances(boxes[keep].cpu(), scores.cpu(), found.labels[keep].cpu(), rles, (height, width)))
    return instances


@torch.no_grad()
def predict(model: CondInst, images: Tensor, sizes: list[tuple[int, int]], original_sizes: list[tuple[int, int]],
            score_threshold: float = 0.05, rescore: bool = True) -> list[Instances]:
    """The instances of each image of a padded batch (as in CondInst.forward), model in eval mode.

    original_sizes: the (height, width) of the returned boxes and masks. rescore: report sqrt(d * q) of the detector's
    score d and the mean probability q of the mask's pixels, as the authors' code does, instead of d.
    """
    return find_instances(model(images, sizes), sizes, original_sizes, score_threshold, rescore)


# ---------------------------------------------------------------------------------------- a trained model


def load_model(path: str | os.PathLike, weights: str | None = None) -> tuple[CondInst, dict]:
    """The model of a checkpoint, ours or a released one, with the weights of "teacher", "student", or None: the
    teacher's if there are any.

    Returns (model in eval mode on the CPU, the rest of the checkpoint: classes, method, config, iteration, ..., and
    which "weights" these are). Raises CheckpointError.
    """
    state = checkpoint.load(path, PIXEL_STD)
    weights = weights or ("teacher" if state["teacher"] is not None else "student")
    if state[weights] is None:
        raise CheckpointError(f"{path} holds no teacher (method {state['method']}); use --weights student")
    info = {key: value for key, value in state.items() if key not in ("student", "teacher", *checkpoint.RESUME_ONLY)}
    return restore(path, state, weights).eval(), info | {"weights": weights}


def restore(path: str | os.PathLike, state: dict, weights: str) -> CondInst:
    """The network of a checkpoint's `state` with its "teacher" or "student" weights. CheckpointError: not a match."""
    with checkpoint.fitting(f"{path}: the {weights}'s weights do not fit the model it names"):
        model = build_model(**state["model"])
        checkpoint.load_weights(model, state[weights])
        return model


def test_size(info: dict) -> tuple[int, int]:
    """The shorter and the longest side at which a checkpoint is tested, pixels: COCO's unless it states others."""
    config = info["config"] or {}
    return config.get("test_min_size") or 800, config.get("test_max_size") or 1333


def rescores(method: str) -> bool:
    """Whether a method reports rescored scores, sqrt(d q): BoxTeacher does, BoxInst and CondInst report d."""
    return method == "boxteacher"


def default_threshold(rescore: bool) -> float:
    """Most detections that score below this are false. Rescored ones score higher: sqrt(d q) > d for most of them."""
    return 0.6 if rescore else 0.3


def predict_confident(model: CondInst, images: Tensor, sizes: list[tuple[int, int]],
                      original_sizes: list[tuple[int, int]], score_threshold: float, rescore: bool) -> list[Instances]:
    """`predict`, filtered by the score that is reported."""
    found = predict(model, images, sizes, original_sizes, min(0.05, score_threshold), rescore)
    return [confident(instances, score_threshold) for instances in found]


def confident(instances: Instances, score: float) -> Instances:
    """The instances with at least this score."""
    keep = instances.scores >= score
    boxes, scores, labels, rles, size = instances
    return Instances(boxes[keep], scores[keep], labels[keep], list(compress(rles, keep.tolist())), size)


class Predictor:
    """What `load` returns: a trained model that takes images. classes: the name of each label."""

    def __init__(self, network: CondInst, classes: list[str], size: tuple[int, int], rescore: bool):
        self.network, self.classes, self.size, self.rescore = network, classes, size, rescore

    def predict(self, image, score_threshold: float | None = None) -> Instances:
        """The instances of one image whose reported score is at least score_threshold (None: 0.6 with rescoring,
        else 0.3).

        image: a file's path, a Pillow image (both turned as their EXIF orientation requires), or an array or tensor
        (height, width), (height, width, 1, 3 or 4) or (1, 3 or 4, height, width): grey, RGB, or RGB and alpha, composed
        on white; bool, integers from 0, or floats from 0 to 1 or to 255. Raises ValueError for others, and
        UndecodableImage for a file.
        """
        image = as_image(image)
        if score_threshold is None:
            score_threshold = default_threshold(self.rescore)
        height, width = image.height, image.width
        size = resized_size(height, width, *self.size)
        padded_image = padded(pixels(view(image, size, flip=False)), canvas_of([size]))
        images = padded_image[None].to(self.network.mean.device)
        return predict_confident(self.network, images, [size], [(height, width)], score_threshold, self.rescore)[0]


def load(ckpt: str | os.PathLike, device: str = "cpu", weights: str | None = None) -> Predictor:
    """A trained model from a checkpoint; see load_model."""
    network, info = load_model(ckpt, weights)
    classes = info["classes"] or [{"name": str(label)} for label in range(network.num_classes)]
    return Predictor(network.to(device), [c["name"] for c in classes], test_size(info), rescores(info["method"]))
