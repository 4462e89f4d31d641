"""Fixtures of several test modules, the path to the modules, and the golden table: how far ours is from the authors'
program. `python -m pytest -q tests -k golden` prints it alone.
"""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)  # small tensors: more threads only get in each other's way
pytest.register_assert_rewrite("helpers", "review_page")

from label_folders import put, put_image, xml_object, xml  # noqa: E402
from formats.checkpoint import save  # noqa: E402
from formats.shapes import write_shapes  # noqa: E402
from helpers import CHECKED, CHROMIUM, draw_dataset, new_run, one_batch, real_images, rewrite  # noqa: E402
from model import build_model  # noqa: E402
from review_page import BIG, label  # noqa: E402
from train import train_step  # noqa: E402


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
    """A folder of real COCO images."""
    return real_images("coco-mini")


@pytest.fixture
def voc(tmp_path):
    """Images a, b and c without splits; a and c have a box, b is empty."""
    root = tmp_path / "voc"
    for stem, objects in (("a", [xml_object()]), ("b", []), ("c", [xml_object("bus")])):
        put_image(root / "JPEGImages" / f"{stem}.jpg")
        put(root / "Annotations" / f"{stem}.xml", xml(*objects, filename=f"{stem}.jpg"))
    return root


@pytest.fixture
def yolo(tmp_path):
    """Training images a and c with a box each; image b to evaluate on, without a label file."""
    root = tmp_path / "yolo"
    for name in ("train/a", "val/b", "train/c"):
        put_image(root / "images" / f"{name}.png")
    put(root / "labels" / "train" / "a.txt", "1 0.5 0.5 0.2 0.4\n")
    put(root / "labels" / "train" / "c.txt", "0 0.5 0.5 1 1\n")
    put(root / "classes.txt", "car\nbus\n")
    return root


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """12 drawn images of 64 x 64 pixels to train on, 3 to evaluate on."""
    folder = tmp_path_factory.getbasetemp() / "drawn"
    write_shapes(folder, train=12, val=3, size=64)
    return folder


@pytest.fixture(scope="session")
def warm(drawn, tmp_path_factory) -> Path:
    """The checkpoint of 30 steps on all 12 images at once, their losses beside it in losses.json.

    Its teacher finds about 40 of the 64 boxes (38 to 46 with other weights to start from), so every batch of 4 images
    has pseudo masks, whatever the last digits of a machine's arithmetic are.
    """
    folder = tmp_path_factory.mktemp("warm")
    run, annotations = new_run(drawn, folder, "--optimizer", "adamw", "--lr", "2e-3", "--ema", "0.9",
                               "--clip-grad", "10", "--iters", "900", "--warmup", "0")
    batch, history = one_batch(annotations, len(annotations)), []
    for iteration in range(30):
        losses = train_step(run, [batch], iteration, False).losses
        history.append({name: float(value) for name, value in losses.items()})
    run.iteration = 30
    run.save()
    (folder / "losses.json").write_text(json.dumps(history))
    return folder / "last.pt"


@pytest.fixture
def dataset(tmp_path):
    return draw_dataset(tmp_path / "set")


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.pt"
    torch.manual_seed(0)
    model = dict(backbone="r18-slim", num_classes=3, channels=64, frozen=False)
    classes = [{"id": 3, "name": "red"}, {"id": 17, "name": "green"}, {"id": 90, "name": "blue"}]
    weights = build_model(**model).state_dict()
    save({"model": model, "classes": classes, "method": "boxteacher", "iteration": 7, "student": weights,
          "teacher": weights, "config": {"test_min_size": 64, "test_max_size": 128}}, path)
    return path


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> Path:
    """The folder with masks.json and review.html of eight boxes in four images; one id is BIG."""
    folder = tmp_path_factory.mktemp("review")
    json_path, images = draw_dataset(folder / "set")
    rewrite(json_path, lambda content: content["annotations"][3].update(id=BIG))
    return label(folder / "masks", json_path, images)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no browser test without: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium or Chrome is installed")
    with sync_api.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def person(browser):
    """A browser of someone who has decided nothing yet. What goes wrong on a page fails the test."""
    context, problems = browser.new_context(viewport={"width": 1280, "height": 800}), []
    context.on("weberror", lambda error: problems.append(str(error.error)))
    context.on("console", lambda message: problems.append(message.text))
    context.on("dialog", lambda dialog: problems.append(dialog.message))
    yield context
    context.close()
    assert not problems


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


# Warnings that are no fault of ours; every other one fails its test. (message, category)
HARMLESS = (
    ("__array__", "DeprecationWarning"),                        # pycocotools under numpy 2
    ("unclosed", "ResourceWarning"),                            # images that tests open and drop
    ("This DataLoader will create", "UserWarning"),             # more loading processes than this machine has cores
    ("The .grad attribute of a Tensor that is not a leaf", "UserWarning"),  # torch.compile, while it traces
)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    for message, category in HARMLESS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}:{category}")
