"""How far exported models are from the program, for any backbone: minutes each, so no part of the tests.

    python tests/exported.py r18-slim r50 r101-dcn swin-t

Needs onnx, onnxscript and onnxruntime. Prints, for three sizes of ONNX and of pt2, how many objects are found and the
largest differences of their boxes (pixels), scores and masks (probabilities). "input + 1e-5" is the program itself, its
pixels changed by so much: what rounding alone may do to these random weights.
"""
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import clip_boxes_to_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbone import DeformConv  # noqa: E402
from formats.files import optional  # noqa: E402
from model import CondInst, Predictor, build_model, detect, find_instances, mask_logits  # noqa: E402
from tools import export  # noqa: E402

SIZES = {"ONNX": [(64, 96), (256, 320), (480, 352)], "pt2": [(160, 192), (256, 320), (480, 352)]}


def blobs(height: int, width: int) -> Tensor:
    """Random pixels (1, 3, height, width) that differ at a scale of 8."""
    pixels = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(0)) * 255
    return F.interpolate(pixels, size=(height, width), mode="bilinear")


@torch.no_grad()
def network_of(backbone: str) -> CondInst:
    """Random weights with normal features and outputs that vary: they find about 90 objects of all classes."""
    torch.manual_seed(0)
    network = build_model(backbone, 3, 64, frozen=False)
    for module in network.modules():
        if isinstance(module, DeformConv):
            nn.init.normal_(module.offset.weight, std=1e-3)
        elif isinstance(module, Bottleneck):
            nn.init.constant_(module.bn3.weight, 0.3)  # or a hundred layers would enlarge every rounding
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = None                     # the mean of what it has seen
    network.train()(blobs(320, 320).repeat(2, 1, 1, 1), [])
    head, found = network.head, network.eval()(blobs(320, 320), [])
    head.class_logits.weight *= 2 / found.class_logits.std()
    head.class_logits.bias.fill_(-1.0)
    head.ltrb.weight *= 1 / found.ltrb.std()
    head.ltrb.bias.fill_(2.0)
    head.controller.weight *= 0.5 / head.controller(found.box_maps[0]).std()
    return network


@torch.no_grad()
def by_program(network: CondInst, images: Tensor) -> tuple[Tensor, ...]:
    """The four outputs of an exported model."""
    size = tuple(images.shape[2:])
    predictions = network(images, [size])
    found, detected = find_instances(predictions, [size], [size])[0], detect(predictions)
    boxes = clip_boxes_to_image(detected.boxes, size)
    seen = detected.locations[(boxes[:, 2:] > boxes[:, :2]).all(1)]
    return found.boxes, found.scores, found.labels, mask_logits(predictions, [seen]).sigmoid()


def compare(title: str, expected: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    """Pair the objects by class, box and score: rounding may exchange two of nearly the same score, and boxes that
    were clipped may be equal."""
    (boxes, scores, labels, masks), found = ([x[one[1] > 0] for x in one] for one in (expected, outputs))
    nearest = ((boxes[:, None] - found[0]).abs().amax(2) + (scores[:, None] - found[1]).abs()
               + 1e6 * (labels[:, None] != found[2])).argmin(1)
    print(f"{title:30} {len(scores)} and {len(found[1])} objects; boxes "
          f"{(boxes - found[0][nearest]).abs().max():.0e}, scores "
          f"{(scores - found[1][nearest]).abs().max():.0e}, masks {(masks - found[3][nearest]).abs().max():.0e}",
          flush=True)


def runs(network: CondInst) -> Iterator[tuple[str, Callable]]:
    """The two files, as functions of images."""
    program = export.traced(Predictor(network, ["a", "b", "c"], (64, 128), rescore=True))
    session = optional("onnxruntime", "tests/exported.py").InferenceSession(export.as_onnx(program, {}))
    yield "ONNX", lambda images: map(torch.from_numpy, session.run(export.OUTPUTS, {"images": images.numpy()}))
    yield "pt2", torch.export.load(io.BytesIO(export.as_pt2(program, {}))).module()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        model = network_of(name)
        for file, run in runs(model):
            for sides in SIZES[file]:
                least = 1 if file == "ONNX" else export.STRIDE * export.fewest_tiles(model)
                images = blobs(*(max(side, least) for side in sides))
                compare(f"{name} {file} {tuple(images.shape[2:])}", by_program(model, images), tuple(run(images)))
                if file == "ONNX":
                    compare("  input + 1e-5", by_program(model, images), by_program(model, images + 1e-5))
