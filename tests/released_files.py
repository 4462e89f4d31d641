"""Seeded files in each layout that others released: what the tests load, and a command to try them by hand.

    python tests/released_files.py DIR      writes LAYOUTS as DIR/<name>.pth, 1.2 GB in all

The keys and shapes are those of the authors' configurations (golden/11_state_dict_keys.json), R-101-DCN and
AdelaiDet's as released files are described; the weights come from golden/weights.py, so the networks detect something.
"""
import argparse
import json
import re
import sys
from pathlib import Path

import torch

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from weights import tensor_for  # noqa: E402

R50, R101, SWIN_B = "boxteacher_r50_1x", "boxteacher_r101_3x", "boxteacher_swin-base_3x"
LAYOUTS = ("boxteacher_r50", "boxteacher_r101", "boxteacher_r101_dcn", "boxteacher_swin_b", "boxinst_r50",
           "condinst_r50")
BOTTOM_UP = "backbone.bottom_up."


def network(config: str, change=None) -> dict[str, torch.Tensor]:
    """One network of a configuration, key by key; `change` may alter its {key: shape} first."""
    with open(GOLDEN / "11_state_dict_keys.json") as file:
        entries = json.load(file)[config]
    shapes = {key.removeprefix("teacher."): x["shape"] for key, x in entries.items() if key.startswith("teacher.")}
    constants = {key: x["dtype"] for key, x in entries.items() if x["kind"] == "buffer"}
    if change is not None:
        shapes = change(shapes)
    weights = {}
    for key, shape in shapes.items():
        array = tensor_for(key, shape)
        dtype = getattr(torch, constants.get("teacher." + key, "float32"))
        weights[key] = torch.zeros(shape, dtype=dtype) if array is None else torch.from_numpy(array)
    return weights


def deformable(shapes: dict) -> dict:
    """Each block of res3 to res5 has a conv2_offset."""
    more = {}
    for key, shape in shapes.items():
        if re.fullmatch(r".+\.res[345]\.\d+\.conv2\.weight", key):
            more[key.replace("conv2", "conv2_offset")] = [27, shape[1], 3, 3]
            more[key.replace("conv2", "conv2_offset").replace("weight", "bias")] = [27]
    return shapes | more


def of_condinst(shapes: dict) -> dict:
    """8 mask features, 169 dynamic parameters, a semantic branch, no iteration counter."""
    head = {"controller.weight": [169, 256, 3, 3], "controller.bias": [169],
            "mask_branch.tower.4.weight": [8, 128, 1, 1], "mask_branch.tower.4.bias": [8]}
    block = {"0.weight": [128, 128, 3, 3], "1.weight": [128], "1.bias": [128], "1.running_mean": [128],
             "1.running_var": [128], "1.num_batches_tracked": []}
    semantic = {f"mask_branch.seg_head.{i}.{name}": [128, 256, 3, 3] if i == 0 and len(shape) == 4 else shape
                for i in range(2) for name, shape in block.items()}
    semantic |= {"mask_branch.logits.weight": [80, 128, 1, 1], "mask_branch.logits.bias": [80]}
    return {key: shape for key, shape in (shapes | head | semantic).items() if key != "mask_head._iter"}


def released(layout: str) -> dict:
    """The content of a released file. BoxTeacher's student differs from its teacher in the class bias alone."""
    config = {"boxteacher_r101": R101, "boxteacher_r101_dcn": R101, "boxteacher_swin_b": SWIN_B}.get(layout, R50)
    change = {"boxteacher_r101_dcn": deformable, "condinst_r50": of_condinst}.get(layout)
    weights = network(config, change)
    if layout.startswith("boxteacher"):
        bias = "proposal_generator.fcos_head.cls_logits.bias"
        student = weights | {bias: weights[bias] + 0.25}
        weights = {f"{part}.{key}": value for part, its in (("teacher", weights), ("student", student))
                   for key, value in its.items()}
    return {"model": weights, "optimizer": {"state": {}, "param_groups": []}, "iteration": 89_999}


def main(folder: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for layout in LAYOUTS:
        path = Path(folder) / f"{layout}.pth"
        torch.save(released(layout), path)
        print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a seeded checkpoint in each released layout, 1.2 GB in all.")
    parser.add_argument("dir", metavar="DIR", help="folder to write them to")
    main(parser.parse_args().dir)
