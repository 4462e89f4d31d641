"""Weights that others trained, under our names: released checkpoints, and ImageNet weights for the backbones.

    read_checkpoint   BoxTeacher's, and AdelaiDet's BoxInst and CondInst -> a checkpoint like ours (checkpoint.py)
    read_backbone     torchvision's, detectron2's MSRA ResNets, the Swin authors' -> a state dict of backbone.py

The released programs differ from ours in more than names:

    pixels are BGR less the mean                                      `fold_pixels` changes the first convolution
    MSRA's ResNets have the stride in the first 1x1 convolution       stride_in_1x1 of build_model
    CondInst's mask branch has 8 channels, not 16                     mask_channels of build_model
    BoxTeacher reports sqrt(detection score x mask quality),
    BoxInst and CondInst the detection score                          the checkpoint's "method"

Here a key is an error if it has no name of ours and is not UNUSED. Missing and misshapen weights are found when they
are loaded (checkpoint.load_weights).
"""
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor

from formats.coco import COCO_CLASSES
from formats.pickled import read


def tensors(state: dict) -> dict[str, Tensor]:
    """All values as tensors, floats as float32. Raises ValueError for a key or value that cannot be a weight's."""
    result = {}
    for key, value in state.items():
        if not re.fullmatch(r"[\w.]{1,200}", str(key)):
            raise ValueError(f"{ascii(key):.100} is no name of a weight")
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized \
                or value.is_complex():
            raise ValueError(f"{key} is no array of numbers but {type(value).__name__}")
        result[str(key)] = value.float() if value.is_floating_point() else value
    return result


def check_finite(weights: dict[str, Tensor]) -> None:
    """Raises ValueError with the first of the weights that has NaN or infinite values."""
    for name, weight in weights.items():
        if not weight.sum().isfinite() and not weight.isfinite().all():     # the sum is faster, but may overflow
            raise ValueError(f"{name} has values that are not finite")


# --------------------------------------------------------------------------------------------------------- names

# Their names (patterns) -> ours. In a checkpoint, names of DETECTRON2 or SWIN follow `backbone.bottom_up.`.
TORCHVISION = [
    (r"conv1\.(.+)", r"body.stem.0.\1"),
    (r"bn1\.(.+)", r"body.stem.1.\1"),
    (r"layer([1-4])\.(.+)", lambda m: f"body.c{int(m[1]) + 1}.{m[2]}"),
    (r"(.+)", r"\1"),                     # of Swin: the same
]
DETECTRON2 = [
    (r"stem\.conv1\.weight", r"body.stem.0.weight"),
    (r"stem\.conv1\.norm\.(\w+)", r"body.stem.1.\1"),
    (r"res([2-5])\.(\d+)\.conv([123])\.weight", r"body.c\1.\2.conv\3.weight"),
    (r"res([2-5])\.(\d+)\.conv2_offset\.(\w+)", r"body.c\1.\2.conv2.offset.\3"),
    (r"res([2-5])\.(\d+)\.conv([123])\.norm\.(\w+)", r"body.c\1.\2.bn\3.\4"),
    (r"res([2-5])\.(\d+)\.shortcut\.weight", r"body.c\1.\2.downsample.0.weight"),
    (r"res([2-5])\.(\d+)\.shortcut\.norm\.(\w+)", r"body.c\1.\2.downsample.1.\3"),
]
SWIN = [  # ours numbers patches, stages and mergings in one row: features 0, then 1 3 5 7 and 2 4 6
    (r"patch_embed\.proj\.(\w+)", r"features.0.0.\1"),
    (r"patch_embed\.norm\.(\w+)", r"features.0.2.\1"),
    (r"layers\.([0-3])\.blocks\.(\d+)\.mlp\.fc([12])\.(\w+)",
     lambda m: f"features.{2 * int(m[1]) + 1}.{m[2]}.mlp.{3 * int(m[3]) - 3}.{m[4]}"),
    (r"layers\.([0-3])\.blocks\.(.+)", lambda m: f"features.{2 * int(m[1]) + 1}.{m[2]}"),
    (r"layers\.([0-2])\.downsample\.(.+)", lambda m: f"features.{2 * int(m[1]) + 2}.{m[2]}"),
    (r"norm([123])\.(\w+)", lambda m: f"norms.{int(m[1]) - 1}.{m[2]}"),
]
BOTTOM_UP = "backbone.bottom_up."
CHECKPOINT = [
    (r"backbone\.bottom_up\.(.+)", lambda m: (name := our_name(m[1], DETECTRON2 + SWIN)) and "backbone." + name),
    (r"backbone\.fpn_(lateral|output)([345])\.(\w+)", lambda m: f"fpn.{m[1]}.{int(m[2]) - 3}.{m[3]}"),
    (r"backbone\.top_block\.(p[67]\.\w+)", r"fpn.\1"),
    (r"proposal_generator\.fcos_head\.cls_tower\.(.+)", r"head.class_tower.\1"),
    (r"proposal_generator\.fcos_head\.bbox_tower\.(.+)", r"head.box_tower.\1"),
    (r"proposal_generator\.fcos_head\.cls_logits\.(\w+)", r"head.class_logits.\1"),
    (r"proposal_generator\.fcos_head\.bbox_pred\.(\w+)", r"head.ltrb.\1"),
    (r"proposal_generator\.fcos_head\.ctrness\.(\w+)", r"head.centerness.\1"),
    (r"proposal_generator\.fcos_head\.scales\.\d\.scale", r"head.scales"),
    (r"(controller\.(weight|bias))", r"head.\1"),
    (r"mask_branch\.tower\.4\.(\w+)", r"mask_branch.output.\1"),
    (r"(mask_branch\.(refine\.[0-2]|tower\.[0-3])\..+)", r"\1"),
]


def our_name(key: str, table: list) -> str | None:
    """Our name of their `key`, by the first pattern that matches; None if none does."""
    for pattern, name in table:
        match = re.fullmatch(pattern, key)
        if match:
            return name(match) if callable(name) else match.expand(name)
    return None


# Keys that our networks do not need (patterns): what they hold.
UNUSED = {
    r"mask_branch\.(seg_head|logits)\..+": "the semantic branch, for training only",
    r"mask_head\.sizes_of_interest|backbone\.bottom_up\..+\.relative_position_index": "a constant",
    r"mask_head\._iter": "the position of the ramp",
}
UNUSED_OF_IMAGENET = {
    r"(stem\.)?(fc|head|fc1000)[._](weight|bias|w|b)|norm\.(weight|bias)": "the classifier",
    r".+\.(relative_position_index|attn_mask)": "a constant",
    r".+\.num_batches_tracked": "a counter",
    r"conv1_b|stem\.conv1\.bias": "a bias before a batch norm, which the authors' program drops as well",
    r"\w+_momentum": "the state of an optimiser",
}


def caffe2_name(key: str) -> str:
    """detectron2's name of a key of the MSRA files, which have those of Caffe2: res2_0_branch2a_bn_s and the like."""
    leaves = {"w": "weight", "b": "bias", "bn_s": "norm.weight", "bn_b": "norm.bias",
              "bn_rm": "norm.running_mean", "bn_riv": "norm.running_var"}
    parts = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
    stem = re.fullmatch(r"(?:res_)?conv1_(w|bn_s|bn_b|bn_rm|bn_riv)", key)
    block = re.fullmatch(r"res([2-5])_(\d+)_branch(1|2[abc])_(\w+)", key)
    if stem:
        return f"stem.conv1.{leaves[stem[1]]}"
    return f"res{block[1]}.{block[2]}.{parts[block[3]]}.{leaves.get(block[4], block[4])}" if block else key


def translate(weights: dict[str, Tensor], table: list, unused: dict[str, str],
              prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """`weights`, whose keys all begin with `prefix`, under our names; and the reason for each dropped key.

    Keys that share a name are parts of one vector, in the order of the keys. Raises ValueError for an unknown key.
    """
    parts, dropped = {}, {}
    for key in sorted(weights):
        theirs = key.removeprefix(prefix)
        reason = next((reason for pattern, reason in unused.items() if re.fullmatch(pattern, theirs)), None)
        name = our_name(theirs, table)
        if reason is not None:
            dropped[key] = reason
        elif name is not None:
            parts.setdefault(name, []).append(weights[key])
        else:
            raise ValueError(f"{key} has no place in this network")
    ours = {name: values[0] if len(values) == 1 else torch.cat([value.flatten() for value in values])
            for name, values in parts.items()}
    return ours, dropped


def summary(dropped: dict[str, str]) -> list[str]:
    """One line for each kind of dropped key: how many, the key with its numbers as *, the reason."""
    found = Counter((re.sub(r"\d+", "*", key), reason) for key, reason in dropped.items())
    return [f"{n} x {key}: {reason}" for (key, reason), n in found.items()]


def fold_pixels(weights: dict[str, Tensor], pixel_std: tuple, prefix: str = "") -> None:
    """Make a backbone that reads BGR - mean read (RGB - mean) / pixel_std, in place, as the same function.

    The mean is the same for both.
    """
    for first in (prefix + "body.stem.0.weight", prefix + "features.0.0.weight"):
        if first in weights and weights[first].dim() == 4 and weights[first].shape[1] == 3:
            weights[first] = weights[first].flip(1) * torch.tensor(pixel_std).view(3, 1, 1)


# ---------------------------------------------------------------------------------------- released checkpoints


def read_checkpoint(content, pixel_std: tuple) -> dict:
    """The content of a released checkpoint in the form of ours (checkpoint.py), for a network that divides its pixels
    by pixel_std. "dropped": the keys left out, and why.

    Raises ValueError naming an unknown key, or a missing one from which the network's architecture would be read.
    """
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not any("fcos_head" in str(key) for key in weights):
        raise ValueError("it is no checkpoint of this project, BoxTeacher or AdelaiDet (weights of a backbone alone go "
                         "to train.py --backbone-weights)")
    weights = tensors(weights)
    pair = {"teacher": "teacher.", "student": "student."}
    paired = any(key.startswith(tuple(pair.values())) for key in weights)
    prefixes = pair if paired else {"student": ""}                       # AdelaiDet's files contain one network
    networks = {part: {key: weight for key, weight in weights.items() if key.startswith(prefix)}
                for part, prefix in prefixes.items()}
    if not networks["student"]:
        raise ValueError("it holds a teacher alone: the keys of the student are missing")
    strangers = [key for key in weights if not any(key in network for network in networks.values())]
    if strangers:
        raise ValueError(f"{strangers[0]} has no place beside a teacher and a student")

    student = {key.removeprefix(prefixes["student"]): weight for key, weight in networks["student"].items()}
    spec = build_arguments(student)
    result = {"model": spec, "config": {}, "iteration": finished_iterations(content, student), "teacher": None,
              "dropped": {},
              "method": "boxteacher" if paired else "condinst" if spec["mask_channels"] == 8 else "boxinst",
              "classes": COCO_CLASSES if spec["num_classes"] == len(COCO_CLASSES) else None}  # the file has no names
    for part, prefix in prefixes.items():
        result[part], dropped = translate(networks[part], CHECKPOINT, UNUSED, prefix)
        fold_pixels(result[part], pixel_std, "backbone.")
        result["dropped"] |= dropped
    if "model" in content:
        others = (key for key in content if key not in ("model", "iteration"))
        result["dropped"] |= {ascii(str(key))[1:-1][:40]: "no weights" for key in others}
    return result


def build_arguments(weights: dict[str, Tensor]) -> dict:
    """The arguments of build_model for a released network, read from its keys and shapes."""
    def convolution(key: str) -> torch.Size:
        if key not in weights:
            raise ValueError(f"{key} is missing")
        if weights[key].dim() != 4 or weights[key].numel() == 0:
            raise ValueError(f"{key} has the shape {tuple(weights[key].shape)}, not that of a convolution")
        return weights[key].shape

    def blocks(stage: str) -> int:
        return len({key.removeprefix(stage).split(".")[0] for key in weights if key.startswith(stage)})

    num_classes, channels = convolution("proposal_generator.fcos_head.cls_logits.weight")[:2]
    if any(key.startswith(BOTTOM_UP + "patch_embed.") for key in weights):
        shape = convolution(BOTTOM_UP + "patch_embed.proj.weight")[0], blocks(BOTTOM_UP + "layers.2.blocks.")
        backbone = {(96, 6): "swin-t", (96, 18): "swin-s", (128, 18): "swin-b"}.get(shape)
    else:
        shape = blocks(BOTTOM_UP + "res4."), any(".conv2_offset." in key for key in weights)
        backbone = {(6, False): "r50", (23, False): "r101", (23, True): "r101-dcn"}.get(shape)
    if backbone is None:
        raise ValueError(f"its backbone is none of r50, r101, r101-dcn, swin-t, swin-s and swin-b: {shape}")
    mask_channels = convolution("mask_branch.tower.4.weight")[0]
    return {"backbone": backbone, "num_classes": num_classes, "channels": channels, "frozen": True,
            "mask_channels": mask_channels, "stride_in_1x1": backbone in ("r50", "r101")}


def finished_iterations(content: dict, weights: dict[str, Tensor]) -> int | None:
    """How long a released network was trained, None if its file does not say."""
    counter = weights.get("mask_head._iter")
    if isinstance(content.get("iteration"), int):
        return content["iteration"] + 1  # detectron2 writes the number of the last one, from 0
    return int(counter.nan_to_num()) if counter is not None and counter.numel() == 1 else None


# -------------------------------------------------------------------------------------------- ImageNet backbones


def read_backbone(name: str, source: str | Path, pixel_std: tuple) -> tuple[dict[str, Tensor], bool, dict[str, str]]:
    """Weights for make_backbone(name, frozen=True), its stride_in_1x1, and the keys left out.

    source: "imagenet" for torchvision's weights, downloaded, or a file: a state dict of torchvision; detectron2's
    R-50.pkl and R-101.pkl of MSRA; the Swin authors' .pth, which reads BGR - mean as in BoxTeacher. None of them has
    the offsets of deformable convolutions or the norms of Swin's outputs.
    The weights of any other backbone, such as one that you have added, keep their names.
    Raises OSError if there is no file or no download, ValueError if it holds no weights of a backbone.
    """
    content = download(name) if source == "imagenet" else read(source)
    weights, author = content, None
    if isinstance(content, dict):
        author = content.get("__author__")
        weights = next((content[key] for key in ("model", "state_dict", "blobs") if key in content), content)
    if not isinstance(weights, dict):
        raise ValueError("it holds no weights")
    if "student" in content or any("fcos_head" in str(key) for key in weights):
        raise ValueError("it is a whole checkpoint, not a backbone: give it to --init")
    weights = tensors(weights)
    check_finite(weights)
    if name not in IMAGENET:
        return weights, False, {}

    weights = {caffe2_name(key): value for key, value in weights.items()}
    detectron2 = any(key.startswith("stem.conv1.") for key in weights)
    swin = any(key.startswith("patch_embed.") for key in weights)
    for key in [key for key in weights if key.endswith("norm.weight") and detectron2]:
        # MSRA merged the statistics into weight and bias: what remains is mean 0, and variance 1 with the norm's eps
        weights.setdefault(key.replace("norm.weight", "norm.running_mean"), torch.zeros_like(weights[key]))
        weights.setdefault(key.replace("norm.weight", "norm.running_var"), torch.ones_like(weights[key]) - 1e-5)
    weights, dropped = translate(weights, DETECTRON2 if detectron2 else SWIN if swin else TORCHVISION,
                                 UNUSED_OF_IMAGENET)
    msra = detectron2 and author != "torchvision"  # whose weights also exist under detectron2's names
    if msra or swin:
        fold_pixels(weights, pixel_std)
    return weights, msra and name in ("r50", "r101"), dropped


IMAGENET = ("r18", "r34", "r50", "r101", "r101-dcn", "swin-t", "swin-s", "swin-b")  # torchvision has their weights


def download(name: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights of a backbone."""
    theirs = name.replace("-", "_") if name.startswith("swin") else "resnet" + name.removesuffix("-dcn")[1:]
    found = torchvision.models.get_model_weights(theirs).IMAGENET1K_V1
    try:
        return found.get_state_dict(progress=False)
    except OSError as error:
        raise OSError(f"cannot download ImageNet weights ({error}); fetch {found.url} elsewhere and name the file "
                      "with --backbone-weights FILE, or learn from scratch with --backbone-weights none") from None
