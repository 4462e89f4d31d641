"""A trained model as one file that runs without this project.

    python -m tools.export --ckpt CKPT --out model.onnx     for onnxruntime, see docs/onnx_example.py
    python -m tools.export --ckpt CKPT --out model.pt2      for torch.export.load, with torch and torchvision

    images (1, 3, H, W) float32    RGB 0 to 255, padded with "padding" to multiples of 32, at least "min_side"
    boxes (100, 4)                 xyxy pixels of the input
    scores (100,)                  those that the program reports, of BoxTeacher sqrt(detection score * mask quality)
                                   (model.rescores); 0: nothing was found, and the row's other values mean nothing
    labels (100,)                  places in "classes"
    masks (100, H/4, W/4)          probabilities

The file also holds a description: "classes", "padding" and what else `description` lists.
"""
import argparse
import contextlib
import io
import json
import os
import warnings
from collections.abc import Iterator
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention
from torchvision.ops import clip_boxes_to_image, nms

from backbone import ResNet
from data import STRIDE
from formats.checkpoint import FORMAT, first_line
from formats.files import CommandLine, UserError, one_line_errors, optional, write_whole
from masks import aligned_bilinear
from model import (LIMIT, NMS_THRESHOLD, PER_LEVEL, PIXEL_MEAN, SCORE_THRESHOLD, CondInst, Detections, Predictions,
                   Predictor, best_pairs, decode_boxes, default_threshold, load, mask_logits)
from tools.command_line import output_file

OUTPUTS = ["boxes", "scores", "labels", "masks"]
MOST_TILES = 256      # of 32 pixels, a side
MASK_THRESHOLD = 0.5  # of masks.paste_masks
PART = 20             # masks at the input's size that are in memory at once


class Exported(nn.Module):
    """The network and what follows it, from images (1, 3, H, W) to the OUTPUTS. All sizes but H and W are fixed."""

    def __init__(self, network: CondInst, rescore: bool):
        super().__init__()
        self.network, self.rescore = network, rescore

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        height, width = images.shape[2:]
        predictions = self.network(checked(images), [])  # no sizes: whatever is padding is the mean colour already
        found = detect(predictions)
        masks = mask_logits(predictions, [found.locations]).sigmoid()
        boxes = clip_boxes_to_image(found.boxes, (height, width))
        scores = found.scores * (boxes[:, 2:] > boxes[:, :2]).all(1)
        if self.rescore:
            scores = (scores * torch.cat([mask_quality(part) for part in masks.split(PART)])).sqrt()
        return boxes, scores, found.labels, masks


def checked(images: Tensor) -> Tensor:
    """The images as they are; fails if a side is no multiple of 32."""
    height, width = images.shape[2:]
    assert height % STRIDE == 0 and width % STRIDE == 0
    # ONNX has no assertions, but there this fails, with a message that shows the sides
    return images.view(1, 3, height // STRIDE, STRIDE, width // STRIDE, STRIDE).view(images.shape)


def detect(one: Predictions) -> Detections:
    """model.detect with LIMIT rows whatever is found; the rows that are left have score 0."""
    quality, locations, labels = best_pairs(one, PER_LEVEL)
    chosen = quality > SCORE_THRESHOLD
    # two more pairs, which stand for nothing: the last row fills up the others. The one before has a class of its own,
    # since a .pt2 fails where NMS keeps less than two boxes
    classes = F.pad(F.pad(labels[chosen], (0, 1), value=-1), (0, 1))
    scores, locations, labels = (F.pad(x[chosen], (0, 2)) for x in (quality.sqrt(), locations, labels))
    boxes = decode_boxes(one.ltrb[0], one.locations)[locations]
    shifted = boxes - boxes.min()  # class by class, as batched_nms
    keep = nms(shifted + (classes * (shifted.max() + 1))[:, None], scores, NMS_THRESHOLD)
    keep = F.pad(keep, (0, LIMIT), value=-1)[:LIMIT]
    return Detections(boxes[keep], scores[keep], labels[keep], locations[keep])


def mask_quality(p: Tensor) -> Tensor:
    """The quality (K,) of masks p (K, h, w) at stride 4, as masks.paste_masks into an image of the input's size.

    The mean of the pixels above the threshold is the threshold and the mean of what exceeds it."""
    excess = F.relu(aligned_bilinear(p[None], 4)[0] - MASK_THRESHOLD)
    pixels = excess.ceil().sum((1, 2))
    return (excess.sum((1, 2)) + MASK_THRESHOLD * pixels) / (pixels + 1e-6)


# ------------------------------------------------------------------------------------------------ files


def attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """F.scaled_dot_product_attention of Swin's (1, windows, heads, 49, C), for ONNX's with the windows as the batch.

    In one layout, since torch has several ways to compute it."""
    x = scaled_dot_product_attention(*(x.flatten(0, -4) for x in (q, k, v)), **options)
    return x.contiguous().unflatten(0, q.shape[:-3])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of torch and torchvision about themselves, and without the graph that torch prints of a
    network that it refuses."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def fewest_tiles(network: CondInst) -> int:
    """The least side: to torch.export one cell of P7 or one window of Swin, 224 pixels, would be a constant."""
    return 5 if isinstance(network.backbone, ResNet) else 8


@quiet()
def traced(model: Predictor) -> ExportedProgram:
    """The model for all input sizes, without what torch notes about each node: lines of code and where they are."""
    fewest = fewest_tiles(model.network)
    rows, columns = (STRIDE * Dim(name, min=fewest, max=MOST_TILES) for name in ("rows", "columns"))
    example = torch.zeros(1, 3, 8 * STRIDE, 10 * STRIDE)
    with torch.no_grad(), patch.object(F, "scaled_dot_product_attention", attention):
        program = torch.export.export(Exported(model.network, model.rescore).eval(), (example,),
                                      dynamic_shapes=({2: rows, 3: columns},), strict=False)
    for part in program.graph_module.modules():  # what runs without autocast is a part of its own
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            node.meta.pop("stack_trace", None)
            node.meta.pop("nn_module_stack", None)
    return program


def description(model: Predictor, pt2: bool) -> dict:
    """What a program that runs the file needs to know. Sizes are in pixels."""
    min_size, max_size = model.size
    return {"format": FORMAT, "classes": model.classes, "min_size": min_size, "max_size": max_size, "stride": STRIDE,
            "min_side": STRIDE * fewest_tiles(model.network) if pt2 else STRIDE, "padding": PIXEL_MEAN,
            "score": "sqrt(detection score x mask quality)" if model.rescore else "detection score",
            "score_threshold": default_threshold(model.rescore), "mask_threshold": MASK_THRESHOLD,
            "candidate_threshold": SCORE_THRESHOLD, "nms_threshold": NMS_THRESHOLD}


@quiet()
def as_onnx(program: ExportedProgram, facts: dict) -> bytes:
    """The content of an ONNX file. Its metadata are the facts, each in JSON."""
    onnx = torch.onnx.export(program, (), dynamo=True, verbose=False, input_names=["images"], output_names=OUTPUTS)
    shaping = [node for node in onnx.model.graph if node.op_type == "Reshape" and node.inputs[0].name == "images"]
    shaping[0].name = "sides_must_be_multiples_of_32"  # see `checked`: onnxruntime's message names the node
    onnx.model.metadata_props.update({name: json.dumps(fact) for name, fact in facts.items()})
    return onnx.model_proto.SerializeToString()


@quiet()
def as_pt2(program: ExportedProgram, facts: dict) -> bytes:
    """The content of a file for torch.export.load. The facts are its extra file description.json."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"description.json": json.dumps(facts)})
    return file.getvalue()


WRITERS = {".onnx": as_onnx, ".pt2": as_pt2}


@contextlib.contextmanager
def translating(ckpt: str, out: str) -> Iterator[None]:
    """Raises UserError for whatever torch raises in the block: not every backbone can be translated."""
    try:
        yield
    except (MemoryError, OSError):
        raise
    except Exception as error:
        while error.__cause__:  # what torch raises last does not say what it met
            error = error.__cause__
        raise UserError(f"{out} cannot be written: torch cannot translate the network of {ckpt} ({first_line(error)}); "
                        "docs/export.md says what a backbone may do") from None


# ----------------------------------------------------------------------------------------- command line


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(description="Write a trained model as one file that runs without this project.")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="a checkpoint of this project, or a released one")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write: FILE.onnx for onnxruntime and "
                        "others (pip install onnx onnxscript); FILE.pt2 for torch.export.load")
    parser.add_argument("--weights", choices=["teacher", "student"], help="None: the teacher's if there are any")
    args = parser.parse_args(argv)
    if ending(args.out) not in WRITERS:
        parser.error(f"argument --out: {args.out} must end with {' or '.join(WRITERS)}")
    return args


def ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with one_line_errors():
        for package in ("onnx", "onnxscript") if ending(args.out) == ".onnx" else ():
            optional(package, f"--out {args.out}")
        model = load(args.ckpt, weights=args.weights)
        output_file(args.out)
        print(f"writing {args.out} takes about a minute, with Swin some minutes", flush=True)
        with translating(args.ckpt, args.out):
            content = WRITERS[ending(args.out)](traced(model), description(model, ending(args.out) == ".pt2"))
        write_whole(args.out, content)
        print(f"{args.out}: {len(model.classes)} classes, {len(content) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
