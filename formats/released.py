"""Weights that others trained, in our names: released checkpoints, and ImageNet weights for the backbones.

    read              a file onto the CPU, running nothing that it holds
    read_checkpoint   BoxTeacher's, and AdelaiDet's BoxInst and CondInst -> a checkpoint like our own (checkpoint.py)
    read_backbone     torchvision's, detectron2's MSRA ResNets, the Swin authors' -> a state dict of backbone.py

The released programs differ from ours in more than names. What becomes of it:

    pixels are BGR less their mean   ours are RGB, divided by a standard deviation too: the first convolution is turned
                                     round and multiplied by it, which makes it the same function (`fold_pixels`)
    ResNets of MSRA halve the map in the first 1x1 convolution, not in the 3x3        build_model's stride_in_1x1
    CondInst's mask branch has 8 channels, not 16                                     build_model's mask_channels
    BoxTeacher reports sqrt(detection score x mask quality), the others the former    "method", read by evaluate.py

Every key of a file finds its place in the network or is one that we know we can do without (UNUSED); any other, like a
missing or misshapen one, is an error that names it.
"""
import _codecs
import pickle
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor

from backbone import make_backbone
from formats.coco import COCO_CLASSES
from model import PIXEL_STD, build_model

# ------------------------------------------------------------------------------------------------- reading files

class PickledType:
    """Stands for numpy's dtype in a pickle: numbers of up to 8 bytes and nothing else."""

    def __init__(self, code: str, *_):
        if not re.fullmatch(r"[biuf][1248]", str(code)):
            raise ValueError(f"only arrays of numbers are admitted, not of {ascii(code):.40}")
        self.code = str(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise ValueError("an array has no byte order")
        self.code = state[1] + self.code


class PickledArray:
    """Stands for numpy's array in a pickle."""

    def __init__(self, *_):
        self.array = np.zeros(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        self.array = array_of(data, kind, shape, "F" if fortran else "C")


def array_of(data: bytes | str, kind: PickledType, shape: tuple = (), order: str = "C") -> np.ndarray:
    data = data.encode("latin1") if isinstance(data, str) else data  # str: written by Python 2
    array = np.frombuffer(data, kind.code).reshape(shape, order=order)
    return array.astype(array.dtype.newbyteorder("="))


def latin1(text: str, encoding: str) -> bytes:  # how protocol 2 writes bytes
    return text.encode("latin1")


class ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays and plain containers; anything else that a pickle might call is refused.

    Arrays are put together here: numpy's own unpickling trusts a file's word about memory.
    """

    PARTS = {"ndarray": PickledArray, "dtype": PickledType, "_reconstruct": PickledArray,
             "scalar": lambda kind, data: array_of(data, kind)[()],
             "_frombuffer": lambda data, kind, shape, order: array_of(data, kind, shape, order), "encode": latin1,
             "bytes": bytes}

    def find_class(self, module: str, name: str):
        places = ("numpy", "_codecs", "__builtin__", "builtins")
        if module.split(".")[0] not in places or name not in self.PARTS:
            raise ValueError(f"it wants to run {ascii(module + '.' + name):.80}; only arrays are admitted")
        return self.PARTS[name]


def unpacked(content):
    """The same with PickledArray replaced by arrays."""
    if isinstance(content, dict):
        return {key: unpacked(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [unpacked(value) for value in content]
    return content.array if isinstance(content, PickledArray) else content


def read(path: str | Path):
    """The content of a .pth or .pt (PyTorch) or .pkl (detectron2's arrays) file. Raises ValueError, which says why not.

    weights_only=True: PyTorch builds tensors and plain types, and here numpy's arrays and numbers, which released files
    hold here and there. Nothing else in a file is run.
    """
    if Path(path).is_dir():
        raise ValueError("it is a folder: name a file in it")
    try:
        with open(path, "rb") as file:
            start = file.read(1)
            file.seek(0)
            if start in (b"", b"<"):
                raise ValueError("it is empty" if start == b"" else "it is a web page, not what was to be downloaded")
            return read_arrays(file) if str(path).endswith(".pkl") else read_torch(file)
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:  # torch and pickle raise many kinds for a damaged or foreign file
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch's name for what a pickle wants to call
        if foreign:
            raise ValueError(f"it wants to run {foreign[1]}; only arrays are admitted") from None
        raise ValueError(f"it is truncated, or something else ({type(error).__name__}: {error})") from None


def read_arrays(file):
    return unpacked(ArrayUnpickler(file, encoding="latin1").load())


def read_torch(file):
    parts = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": np.zeros(1).__reduce__()[0],
             "scalar": np.float64().__reduce__()[0], "encode": _codecs.encode}
    admitted = [(part, f"{place}.{name}") for name, part in parts.items()
                for place in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "_codecs")]
    admitted += {type(np.dtype(kind)) for kind in "?bhilqBHILQefd"}
    with warnings.catch_warnings(), torch.serialization.safe_globals(admitted):
        warnings.simplefilter("ignore")  # of what a foreign file might be: the error says enough
        return torch.load(file, map_location="cpu", weights_only=True)


def tensors(state: dict) -> dict[str, Tensor]:
    """All values as tensors, floats as float32. Raises ValueError for a key or a value that is not a weight's."""
    result = {}
    for key, value in state.items():
        if not re.fullmatch(r"[\w.]{1,200}", str(key)):
            raise ValueError(f"{ascii(key):.100} is no name of a weight")
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype.itemsize <= 8:
            value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized \
                or value.is_complex():
            raise ValueError(f"{key} is no array of numbers but {type(value).__name__}")
        result[str(key)] = value.float() if value.is_floating_point() else value
    return result


# --------------------------------------------------------------------------------------------------------- names

# Pattern of our name of a parameter or buffer, theirs for it. Within a checkpoint the backbone's follow
# `backbone.bottom_up.`, and are named as in a file of ImageNet weights.
TORCHVISION = [
    (r"body\.stem\.0\.(.+)", r"conv1.\1"),
    (r"body\.stem\.1\.(.+)", r"bn1.\1"),
    (r"body\.c([2-5])\.(.+)", lambda m: f"layer{int(m[1]) - 1}.{m[2]}"),
    (r"(features\..+)", r"\1"),
]
DETECTRON2 = [
    (r"body\.stem\.0\.weight", r"stem.conv1.weight"),
    (r"body\.stem\.1\.(.+)", r"stem.conv1.norm.\1"),
    (r"body\.c(\d)\.(\d+)\.conv(\d)\.weight", r"res\1.\2.conv\3.weight"),
    (r"body\.c(\d)\.(\d+)\.conv2\.offset\.(.+)", r"res\1.\2.conv2_offset.\3"),
    (r"body\.c(\d)\.(\d+)\.bn(\d)\.(.+)", r"res\1.\2.conv\3.norm.\4"),
    (r"body\.c(\d)\.(\d+)\.downsample\.0\.weight", r"res\1.\2.shortcut.weight"),
    (r"body\.c(\d)\.(\d+)\.downsample\.1\.(.+)", r"res\1.\2.shortcut.norm.\3"),
]
SWIN = [  # ours counts patches, stages and mergings: features 0, 1 3 5 7 and 2 4 6
    (r"features\.0\.0\.(.+)", r"patch_embed.proj.\1"),
    (r"features\.0\.2\.(.+)", r"patch_embed.norm.\1"),
    (r"features\.([1357])\.(\d+)\.mlp\.([03])\.(.+)",
     lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}.mlp.fc{int(m[3]) // 3 + 1}.{m[4]}"),
    (r"features\.([1357])\.(.+)", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}"),
    (r"features\.([246])\.(.+)", lambda m: f"layers.{int(m[1]) // 2 - 1}.downsample.{m[2]}"),
    (r"norms\.(\d)\.(.+)", lambda m: f"norm{int(m[1]) + 1}.{m[2]}"),
]
BOTTOM_UP = "backbone.bottom_up."
CHECKPOINT = [
    (r"backbone\.(body.+)", lambda m: BOTTOM_UP + their_name(m[1], DETECTRON2)),
    (r"backbone\.(.+)", lambda m: BOTTOM_UP + their_name(m[1], SWIN)),
    (r"fpn\.(lateral|output)\.(\d)\.(.+)", lambda m: f"backbone.fpn_{m[1]}{int(m[2]) + 3}.{m[3]}"),
    (r"fpn\.(p[67]\..+)", r"backbone.top_block.\1"),
    (r"head\.class_tower\.(.+)", r"proposal_generator.fcos_head.cls_tower.\1"),
    (r"head\.box_tower\.(.+)", r"proposal_generator.fcos_head.bbox_tower.\1"),
    (r"head\.class_logits\.(.+)", r"proposal_generator.fcos_head.cls_logits.\1"),
    (r"head\.ltrb\.(.+)", r"proposal_generator.fcos_head.bbox_pred.\1"),
    (r"head\.centerness\.(.+)", r"proposal_generator.fcos_head.ctrness.\1"),
    (r"head\.scales\.(\d)", r"proposal_generator.fcos_head.scales.\1.scale"),
    (r"head\.(controller\..+)", r"\1"),
    (r"mask_branch\.output\.(.+)", r"mask_branch.tower.4.\1"),
    (r"(mask_branch\..+)", r"\1"),
]


def their_name(name: str, table: list) -> str:
    """What they call our `name`, by the first pattern that fits; without one, the same."""
    for pattern, replacement in table:
        match = re.fullmatch(pattern, name)
        if match:
            return replacement(match) if callable(replacement) else match.expand(replacement)
    return name


# What we know we can do without. Pattern of a whole key: what it is.
UNUSED = {
    r"mask_branch\.(seg_head|logits)\..+": "the semantic branch, of use in training only",
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


def translate(weights: dict[str, Tensor], table: list, expected: dict[str, Tensor], unused: dict[str, str],
              optional: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Their `weights` under our names, which are those of `expected`; and the keys that were dropped, with the reason.

    Raises ValueError naming the key where one is missing (unless our name of it matches `optional`, and all such are),
    has another shape, or has no place in the network and is none of `unused`.
    """
    ours, rest = {}, dict(weights)
    skip = re.compile(optional)
    if any(skip.fullmatch(name) and their_name(name, table) in weights for name in expected):
        skip = re.compile("")
    for name, parameter in expected.items():
        key = their_name(name, table)
        if key in rest:
            ours[name] = rest.pop(key)
            if ours[name].shape != parameter.shape:
                raise ValueError(f"{key} has the shape {tuple(ours[name].shape)} instead of {tuple(parameter.shape)}")
        elif not skip.fullmatch(name):
            raise ValueError(f"{key} {tuple(parameter.shape)} is missing")
    dropped = {key: next((why for pattern, why in unused.items() if re.fullmatch(pattern, key)), None) for key in rest}
    for key, why in dropped.items():
        if why is None:
            raise ValueError(f"{key} has no place in this network")
    return ours, dropped


def summary(dropped: dict[str, str]) -> list[str]:
    """One line a kind of key that was dropped: how many, numbers in them as *, and why."""
    found = Counter((re.sub(r"\d+", "*", key), why) for key, why in dropped.items())
    return [f"{n} x {key}: {why}" for (key, why), n in found.items()]


def fold_pixels(weights: dict[str, Tensor], prefix: str = "") -> None:
    """Make a backbone that reads BGR less the mean read RGB less the mean over PIXEL_STD: the same function, in place.

    The means are the same three numbers here and there.
    """
    for first in (prefix + "body.stem.0.weight", prefix + "features.0.0.weight"):
        if first in weights:
            weights[first] = weights[first].flip(1) * torch.tensor(PIXEL_STD).view(3, 1, 1)


# ---------------------------------------------------------------------------------------- released checkpoints


def read_checkpoint(content) -> dict:
    """The content of a released checkpoint as one of our own (see checkpoint.py); "dropped": keys left out, and why.

    Raises ValueError naming the key that is missing, misshapen or unknown.
    """
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not any("fcos_head" in str(key) for key in weights):
        raise ValueError("it is no checkpoint of this project, BoxTeacher or AdelaiDet (weights of a backbone alone go "
                         "to train.py --backbone-weights)")
    weights = tensors(weights)
    parts = {"teacher": {}, "student": {}, "": {}}  # AdelaiDet's files hold one network, without a prefix
    for key, value in weights.items():
        prefix, _, rest = key.partition(".")
        parts[prefix if prefix in parts else ""][rest if prefix in parts else key] = value
    single = parts.pop("")
    if single and (parts["teacher"] or parts["student"]):
        raise ValueError(f"{next(iter(single))} has no place beside a teacher and a student")
    if single:
        parts = {"teacher": None, "student": single}
    if not parts["student"]:
        raise ValueError("it holds a teacher alone: the keys of the student are missing")

    try:
        spec = network_of(parts["student"])
    except ValueError as error:
        raise ValueError(str(error) if single else f"student: {error}") from None
    method = "boxteacher" if not single else "condinst" if spec["mask_channels"] == 8 else "boxinst"
    classes = COCO_CLASSES if spec["num_classes"] == len(COCO_CLASSES) else None  # the file has no names
    result = {"model": spec, "classes": classes, "method": method, "config": {},
              "iteration": finished_iterations(content, parts["student"]), "dropped": {}}
    for part, its in parts.items():
        try:
            result[part], dropped = (None, {}) if its is None else released_network(its, spec)
        except ValueError as error:
            raise ValueError(str(error) if single else f"{part}: {error}") from None
        result["dropped"] |= dropped if single else {f"{part}.{key}": why for key, why in dropped.items()}
    if "model" in content:
        others = (key for key in content if key not in ("model", "iteration"))
        result["dropped"] |= {ascii(str(key))[1:-1][:40]: "no weights" for key in others}
    return result


def network_of(weights: dict[str, Tensor]) -> dict:
    """The arguments of build_model for a released network, from its keys and shapes."""
    def convolution(key: str) -> torch.Size:
        if key not in weights:
            raise ValueError(f"{key} is missing")
        if weights[key].dim() != 4:
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
    """How long a released network was trained, None where its file does not say."""
    counter = weights.get("mask_head._iter")
    if isinstance(content.get("iteration"), int):
        return content["iteration"] + 1  # detectron2 writes the number of the last one, from 0
    return int(counter.nan_to_num()) if counter is not None and counter.numel() == 1 else None


def released_network(weights: dict[str, Tensor], spec: dict) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A released network's state dict under our names, and the keys that were dropped, with the reason."""
    with torch.device("meta"):
        expected = build_model(**spec).state_dict()
    levels = len(expected.pop("head.scales"))  # theirs is one parameter a level
    expected |= {f"head.scales.{level}": torch.empty(1, device="meta") for level in range(levels)}
    ours, dropped = translate(weights, CHECKPOINT, expected, UNUSED)
    ours["head.scales"] = torch.cat([ours.pop(f"head.scales.{level}") for level in range(levels)])
    fold_pixels(ours, "backbone.")
    return ours, dropped


# -------------------------------------------------------------------------------------------- ImageNet backbones


def read_backbone(name: str, source: str) -> tuple[dict[str, Tensor], bool, dict[str, str]]:
    """Weights for make_backbone(name, frozen=True), its stride_in_1x1, and keys left out. source: file or "imagenet".

    "imagenet" is torchvision's, downloaded. Files: a state dict of torchvision; detectron2's R-50.pkl and
    R-101.pkl of MSRA; the Swin authors' .pth, which is used as BoxTeacher uses it, on BGR less its mean. Missing
    may be what no such file has: the offsets of deformable convolutions, the norms of Swin's outputs.
    Raises OSError where there is no file or no download, ValueError where the weights do not fit.
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
    weights = {caffe2_name(key): value for key, value in tensors(weights).items()}

    detectron2 = any(key.startswith("stem.conv1.") for key in weights)
    swin = any(key.startswith("patch_embed.") for key in weights)
    table = DETECTRON2 if detectron2 else SWIN if swin else TORCHVISION
    for key in [key for key in weights if key.endswith("norm.weight") and detectron2]:
        # MSRA merged the statistics into weight and bias: mean 0 and variance 1 (with the eps of the batch norm) remain
        weights.setdefault(key.replace("norm.weight", "norm.running_mean"), torch.zeros_like(weights[key]))
        weights.setdefault(key.replace("norm.weight", "norm.running_var"), torch.ones_like(weights[key]) - 1e-5)
    with torch.device("meta"):
        expected = make_backbone(name, frozen=True).state_dict()
    try:
        weights, dropped = translate(weights, table, expected, UNUSED_OF_IMAGENET, r"norms\..+|.+\.offset\.\w+")
    except ValueError as error:
        raise ValueError(f"it does not hold the weights of {name}: {error}") from None
    msra = detectron2 and author != "torchvision"  # whose weights detectron2 has under its own names, too
    if msra or swin:
        fold_pixels(weights)
    return weights, msra and name in ("r50", "r101"), dropped


IMAGENET = ("r18", "r34", "r50", "r101", "r101-dcn", "swin-t", "swin-s", "swin-b")  # torchvision has weights of these


def download(name: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights of a backbone."""
    theirs = name.replace("-", "_") if name.startswith("swin") else "resnet" + name.removesuffix("-dcn")[1:]
    found = torchvision.models.get_model_weights(theirs).IMAGENET1K_V1
    try:
        return found.get_state_dict(progress=False)
    except OSError as error:
        raise OSError(f"cannot download ImageNet weights ({error}); fetch {found.url} elsewhere and name the file "
                      "with --backbone-weights FILE, or learn from scratch with --backbone-weights none") from None
