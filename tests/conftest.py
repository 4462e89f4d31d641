"""What the tests share: the path to the modules, golden numbers, real images where there are any, small
helpers. `python -m pytest -q tests -k golden` ends with the golden table: how far ours is from the authors' program.
"""
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)  # small tensors: more threads only get in each other's way

from label_folders import put, put_image, thing, xml  # noqa: E402
from model import STRIDES, Controllers, Predictions, make_locations  # noqa: E402


@pytest.fixture(scope="session")
def golden():
    """golden("01_fcos_targets") -> {name: tensor}, numbers of the authors' program; integers become int64."""
    def load(name: str) -> dict[str, torch.Tensor]:
        with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind != "U"}
        return {key: x.long() if x.dtype in (torch.int32, torch.int64) else x for key, x in arrays.items()}
    return load


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    """The folder of real COCO images that the environment variable COCO_MINI names."""
    if not os.environ.get("COCO_MINI"):
        pytest.skip("COCO_MINI names no folder of real images")
    return Path(os.environ["COCO_MINI"])


def relative_error(actual, expected) -> float:
    """Largest difference as a share of the largest expected value; without such a value, the difference
    itself."""
    actual, expected = torch.as_tensor(actual).detach().double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    return float((actual - expected).abs().max() / (expected.abs().max() or 1.0))


CHECKED: dict[tuple[str, float], float] = {}  # (part, tolerance): the largest error so far, for the golden table


def check(part: str, actual, expected, tolerance: float) -> None:
    """Ours is within the tolerance of the golden numbers; 0 is for what must be the same, such as indices."""
    error = relative_error(actual, expected)
    CHECKED[part, tolerance] = max(error, CHECKED.get((part, tolerance), 0.0))  # first: max(nan, 0.0) is nan
    assert error <= tolerance, f"golden {part}: error {error:.2g}, tolerance {tolerance:g}"


def head_maps(d: dict, name: str) -> list[torch.Tensor]:
    """The five levels of an output of the FCOS head in a golden file, as leaves that collect gradients."""
    return [d[f"{name}_{level}"].clone().requires_grad_() for level in range(5)]


def given_controllers(parameters: torch.Tensor, size: tuple[int, int]) -> Controllers:
    """Controllers that are `parameters` (B, L, P) at the locations of images of `size`: the layer hands on what it is
    given."""
    layer = torch.nn.Conv2d(parameters.shape[2], parameters.shape[2], 3, padding=1).requires_grad_(False)
    torch.nn.init.dirac_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    sizes = [(-(-size[0] // s), -(-size[1] // s)) for s in STRIDES]
    levels = parameters.split([h * w for h, w in sizes], 1)
    return Controllers([x.transpose(1, 2).unflatten(2, hw) for x, hw in zip(levels, sizes)], layer)


def predictions_of(logits: list, ltrb: list, centerness: list) -> Predictions:
    """Level maps (B, C, H, W) as Predictions, without anything for masks."""
    flat = [torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1) for maps in (logits, ltrb, centerness)]
    locations = make_locations([x.shape[-2:] for x in logits], torch.device("cpu"))
    return Predictions(flat[0], flat[1], flat[2].squeeze(-1), Controllers(logits, torch.nn.Identity()),
                       torch.zeros(len(flat[0]), 16, *logits[0].shape[-2:]), locations)


@pytest.fixture
def voc(tmp_path):
    """Images a, b (nothing in it) and c, with a box each in a and c; nothing says what is to train on."""
    root = tmp_path / "voc"
    for stem, things in (("a", [thing()]), ("b", []), ("c", [thing("bus")])):
        put_image(root / "JPEGImages" / f"{stem}.jpg")
        put(root / "Annotations" / f"{stem}.xml", xml(*things, filename=f"{stem}.jpg"))
    return root


@pytest.fixture
def yolo(tmp_path):
    """Images a and c, to train on, with a box each, and b, to evaluate on, without a label file."""
    root = tmp_path / "yolo"
    for name in ("train/a", "val/b", "train/c"):
        put_image(root / "images" / f"{name}.png")
    put(root / "labels" / "train" / "a.txt", "1 0.5 0.5 0.2 0.4\n")
    put(root / "labels" / "train" / "c.txt", "0 0.5 0.5 1 1\n")
    put(root / "classes.txt", "car\nbus\n")
    return root


def pytest_terminal_summary(terminalreporter):
    """The golden table, where golden numbers were compared."""
    if not CHECKED:
        return
    width = max(len(part) for part, _ in CHECKED)
    terminalreporter.section("golden table: distance from the authors' program")
    terminalreporter.line(f"{'part':<{width}}  {'tolerance':>9}  {'largest error':>13}")
    for (part, tolerance), error in sorted(CHECKED.items()):
        shown = "exact" if tolerance == error == 0 else f"{error:.2g}"
        terminalreporter.line(f"{part:<{width}}  {tolerance:>9g}  {shown:>13}")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:pycocotools")
