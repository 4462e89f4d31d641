"""Shared by test modules: comparison with golden numbers, predictions made up by hand, data sets, small runs."""
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask

import evaluate
import train
from data import Batch, TrainBatches
from formats.coco import CocoBoxes
from model import STRIDES, Controller, Predictions, make_locations
from train import Run, make_run, parse_arguments


# -------------------------------------------------------------------------------------------- golden numbers

CHECKED: dict[tuple[str, float], float] = {}  # (part, tolerance): the largest error so far, for the golden table


def relative_error(actual, expected) -> float:
    """The largest difference, relative to the largest expected value unless that is 0."""
    actual, expected = (torch.as_tensor(x).detach().double() for x in (actual, expected))
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    return float((actual - expected).abs().max() / (expected.abs().max() or 1.0))


def check(part: str, actual, expected, tolerance: float) -> None:
    """Assert that ours is within the tolerance of the golden numbers; 0 for what must be equal, such as indices."""
    error = relative_error(actual, expected)
    CHECKED[part, tolerance] = max(error, CHECKED.get((part, tolerance), 0.0))  # first: max(nan, 0.0) is nan
    assert error <= tolerance, f"golden {part}: error {error:.2g}, tolerance {tolerance:g}"


def head_maps(d: dict, name: str) -> list[torch.Tensor]:
    """The five levels of an output of the FCOS head in a golden file, as leaves with gradients."""
    return [d[f"{name}_{level}"].clone().requires_grad_() for level in range(5)]


# ---------------------------------------------------------------------------------- predictions made up by hand

def given_parameters(parameters: torch.Tensor, size: tuple[int, int]) -> dict:
    """The fields of Predictions that give mask heads `parameters` (B, L, P) at the locations of images of `size`: these
    are the box maps, and the controller copies its input."""
    controller = Controller(parameters.shape[2], parameters.shape[2], 3, padding=1).requires_grad_(False)
    torch.nn.init.dirac_(controller.weight)
    torch.nn.init.zeros_(controller.bias)
    sizes = [(-(-size[0] // s), -(-size[1] // s)) for s in STRIDES]
    levels = parameters.split([h * w for h, w in sizes], 1)
    return {"box_maps": [x.transpose(1, 2).unflatten(2, hw) for x, hw in zip(levels, sizes)], "controller": controller}


def predictions_of(logits: list, ltrb: list, centerness: list) -> Predictions:
    """Level maps (B, C, H, W) as Predictions, without anything for masks."""
    flat = [torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1) for maps in (logits, ltrb, centerness)]
    locations = make_locations([x.shape[-2:] for x in logits], torch.device("cpu"))
    return Predictions(flat[0], flat[1], flat[2].squeeze(-1), logits,
                       torch.zeros(len(flat[0]), 16, *logits[0].shape[-2:]), locations, torch.nn.Identity())


MASK_CONTROLLER = torch.zeros(16, 233)  # row c: a mask head that gives feature c, as relu(f) - relu(-f)
for c in range(16):
    w1, w2, w3 = torch.zeros(8, 18), torch.eye(8), torch.zeros(8)
    w1[0, 2 + c], w1[1, 2 + c] = 1, -1
    w3[0], w3[1] = 1, -1
    MASK_CONTROLLER[c, :216] = torch.cat([w1.flatten(), w2.flatten(), w3])


def made_up(images: list[list], size: tuple[int, int]) -> Predictions:
    """Predictions of padded images from (box, class probability, mask logits at stride 8) of each instance.

    Mask number c of an image is feature c. Each instance sits at the location of P3 nearest to its box's
    centre, with centerness 1; the other locations find nothing.
    """
    locations = make_locations([(-(-size[0] // s), -(-size[1] // s)) for s in STRIDES], torch.device("cpu"))
    batch, cells = len(images), len(locations.xy)
    class_logits, ltrb = torch.full((batch, cells, 3), -30.0), torch.zeros(batch, cells, 4)
    parameters, features = torch.zeros(batch, cells, 233), torch.zeros(batch, 16, size[0] // 8, size[1] // 8)
    for b, instances in enumerate(images):
        taken = locations.level != 0
        for c, (box, probability, mask) in enumerate(instances):
            box = torch.tensor(box, dtype=torch.float32)
            distance = (locations.xy - (box[:2] + box[2:]) / 2).norm(dim=1)
            row = torch.where(taken, torch.inf, distance).argmin()
            taken[row] = True
            ltrb[b, row] = torch.cat([locations.xy[row] - box[:2], box[2:] - locations.xy[row]]) / 8
            class_logits[b, row, c % 3] = torch.logit(torch.tensor(float(probability)))
            parameters[b, row], features[b, c] = MASK_CONTROLLER[c], mask
    return Predictions(class_logits, ltrb, torch.full((batch, cells), 30.0), mask_features=features,
                       locations=locations, **given_parameters(parameters, size))


def make_batch(boxes: list[list], size, teacher_size, padded) -> Batch:
    """What pseudo_label reads of a batch: boxes, sizes and the padded size of the student's images."""
    boxes = [torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in boxes]
    count = len(boxes)
    return Batch(images=torch.zeros(count, 3, *padded, dtype=torch.uint8), sizes=[size] * count,
                 original_sizes=[size] * count, image_ids=list(range(count)), boxes=boxes,
                 labels=[torch.zeros(len(b), dtype=torch.int64) for b in boxes], augmented=None,
                 teacher_images=None, teacher_sizes=[teacher_size] * count, masks=None, skipped=[])


def random_predictions(height: int, width: int, classes: int = 3, seed: int = 0) -> Predictions:
    """Random predictions of an image: no detection anywhere, but a random mask at every location."""
    g = torch.Generator().manual_seed(seed)
    locations = make_locations([(-(-height // s), -(-width // s)) for s in STRIDES], torch.device("cpu"))
    n = len(locations.xy)
    class_logits, parameters = torch.rand(1, n, classes, generator=g) - 9, torch.randn(1, n, 233, generator=g)
    features = torch.randn(1, 16, height // 8, width // 8, generator=g)
    return Predictions(class_logits, torch.zeros(1, n, 4), torch.zeros(1, n), mask_features=features,
                       locations=locations, **given_parameters(parameters, (height, width)))


def finding(annotations: CocoBoxes) -> Callable:
    """A stand-in for CondInst.forward that is given the images of a data set in order.

    It finds the boxes of the first four images but the first box of each, with more confidence from image to image.
    Every mask fills its image.
    """
    indices = iter(range(len(annotations)))

    def forward(network, images, sizes):
        everywhere, found = torch.full([n // 8 for n in images.shape[2:]], 6.0), []
        for _, i in zip(sizes, indices):
            boxes = annotations.image_boxes(i)[0][1:].tolist() if i < 4 else []
            found.append([(box, 0.5 + 0.1 * i, everywhere) for box in boxes])
        predictions = made_up(found, images.shape[2:])
        more = network.num_classes - predictions.class_logits.shape[2]
        return predictions._replace(class_logits=F.pad(predictions.class_logits, (0, more), value=-30.0))
    return forward


# ---------------------------------------------------------------------------------------------------- data sets

def real_images(name: str) -> Path:
    """The folder of a set of real images with masks, in COCO layout: food, coco-mini, nuclei or teacher.

    food is part of the project. The environment variable REAL_IMAGES names the folder of the others, COCO_MINI that of
    coco-mini alone; without them the test is skipped."""
    if name == "food":
        return Path(train.__file__).parent / "datasets/food"
    folder = Path(os.environ.get("REAL_IMAGES", "")) / name
    if name == "coco-mini" and os.environ.get("COCO_MINI"):
        folder = Path(os.environ["COCO_MINI"])
    if not (folder / "annotations").is_dir():
        pytest.skip(f"no {name} in the folder that REAL_IMAGES names")
    return folder


def noise_image(i: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(1, 256, (height, width, 3), dtype=np.uint8))


def write_set(folder, sizes=((20, 30), (30, 20), (20, 30)), annotations=None, categories=(3, 17, 90), **own):
    """A COCO set of PNGs of the given (height, width), ids 10, 11, ...; -> (json path, image folder)."""
    (folder / "images").mkdir(exist_ok=True)
    images = []
    for i, (height, width) in enumerate(sizes):
        noise_image(i, height, width).save(folder / "images" / f"{i}.png")
        images.append({"id": 10 + i, "file_name": f"{i}.png", "height": height, "width": width})
    if annotations is None:
        annotations = [annotation(1 + i, 10 + i, [2, 3, 10, 8], categories[0]) for i in range(len(sizes))]
    content = {"images": images, "annotations": annotations,
               "categories": [{"id": c, "name": f"class {c}"} for c in categories], **own}
    (folder / "set.json").write_text(json.dumps(content))
    return str(folder / "set.json"), str(folder / "images")


def annotation(number, image_id, bbox, category_id=3, **more):
    return {"id": number, "image_id": image_id, "bbox": bbox, "category_id": category_id, **more}


def rle(mask: np.ndarray) -> dict:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


CATEGORIES = [{"id": 90, "name": "blue"}, {"id": 3, "name": "red"}, {"id": 17, "name": "green"}]
CHANNEL = {3: 0, 17: 1, 90: 2}
SIZES = [(64, 96), (96, 64), (64, 64), (64, 128), (128, 64)]  # (height, width); batches of them are padded


def draw_dataset(folder: Path) -> tuple[Path, Path]:
    """Five images, two objects each but for the last, which has none; annotation ids begin at 0."""
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for number, (height, width) in enumerate(SIZES):
        pixels = np.zeros((height, width, 3), np.uint8)
        images.append({"id": 100 + number, "file_name": f"{number}.png", "height": height, "width": width})
        for k, category in enumerate([[3, 90], [17, 17], [3, 17], [90, 3], []][number]):
            x, y, w, h = 5 + 30 * k, 4 + 7 * number, 20 + number, 12 + 4 * k
            mask = np.zeros((height, width), bool)
            mask[y:y + h, x:x + w] = True
            mask[y, x + 3:x + w] = False  # not a rectangle: a mask is more than its box
            pixels[mask, CHANNEL[category]] = 255 - 60 * k
            annotations.append({"id": len(annotations), "image_id": 100 + number, "category_id": category,
                                "bbox": [x, y, w, h], "segmentation": rle(mask), "area": int(mask.sum()),
                                "iscrowd": 0})
        Image.fromarray(pixels).save(folder / "val2017" / f"{number}.png")
    path = folder / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return path, folder / "val2017"


def copy_set(drawn: Path, folder: Path, change=lambda content: None) -> Path:
    """A copy of the drawn set, its training annotations changed in place by `change`."""
    shutil.copytree(drawn, folder)
    path = folder / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


def rewrite(path: Path, change) -> Path:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


# --------------------------------------------------------------------------------------------------------- runs

TINY = ("--backbone r18-slim --channels 32 --backbone-weights none --min-size 64 --max-size 64 "
        "--teacher-min-size 64 --teacher-max-size 64 --workers 0 --device cpu --batch-size 4 "
        "--log-every 1").split()  # what else a small set needs is chosen
SMALL = [*TINY, "--schedule", "1x"]  # the paper's recipe
LOSSES = {"boxteacher": ("cls", "box", "centerness", "projection", "pairwise", "pixel", "affinity"),
          "boxinst": ("cls", "box", "centerness", "projection", "pairwise"),
          "condinst": ("cls", "box", "centerness", "mask")}


def one_batch(annotations: CocoBoxes, size: int = 4) -> Batch:
    return TrainBatches(annotations, batch_size=size, min_sizes=[64], max_size=64, teacher_size=(64, 64))[0]


def new_run(drawn: Path, out: Path, *options: str) -> tuple[Run, CocoBoxes]:
    args = parse_arguments(["--data", str(drawn), "--out", str(out), *SMALL, *options])
    annotations = CocoBoxes(drawn / "annotations/instances_train2017.json", drawn / "train2017")
    return make_run(args, annotations, 0, 1, torch.device("cpu"))[0], annotations


def command(*argv) -> int:
    """Run train.py in this process; returns its exit status."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        train.main([str(a) for a in argv])
        return 0
    except SystemExit as end:
        return end.code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def only_training(data: Path) -> list:
    """Options that name the training files of a set alone, so that nothing is evaluated."""
    return ["--train-json", data / "annotations/instances_train2017.json",
            "--train-images", data / "train2017"]


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# the browser that looks at review pages, if there is one
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def review_data(path: Path) -> dict:
    """What a review page shows."""
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def losses_of(out: Path) -> list[dict]:
    """The lines of iterations in metrics.jsonl, without their times."""
    return [{k: v for k, v in line.items() if not k.endswith("seconds")}
            for line in metrics(out) if "loss" in line]


def one_line_error(capsys) -> str:
    """stderr, which must be one line that starts with "error:"."""
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n"), text
    return text


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ------------------------------------------------------------------------------------------------ hostile files

FOREIGN_LINES = b"".join(line + b"\n" for line in (  # in a metrics.jsonl
    b"7", b"[]", b"null", b"no json", b"", b"{}", b'{"iter": null}', b'{"iter": "7"}', b'{"iter": true}',
    b'{"iter": 1.5}',
    b'{"iter": 0}', b'{"iter": 1, "loss": "x"}', b'{"iter": 1, "loss": NaN}', b'{"iter": 1, "loss": [1]}',
    b'{"iter": 1, "loss": 1' + b"0" * 400 + b"}", b'{"iter": 1, "los', b'{"iter": 1, "los\xff": 2}',
    b'{"iter": 1, "x": ' + b'{"x": ' * 5000 + b"1" + b"}" * 5001))


class Code:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# -------------------------------------------------------------------------------------------------- evaluate.py

class Looker(torch.nn.Module):
    """A network whose predictions are the images themselves."""

    def forward(self, images, sizes):
        return images


def evaluation(checkpoint, dataset, *more) -> list[str]:
    return ["--ckpt", str(checkpoint), "--val-json", str(dataset[0]), "--val-images", str(dataset[1]),
            "--workers", "0", "--device", "cpu", *map(str, more)]


def fails(arguments, capsys) -> str:
    """Run main, which must end with status 1 and one line on stderr; returns that line."""
    with pytest.raises(SystemExit) as exit:
        evaluate.main(arguments)
    captured = capsys.readouterr().err
    assert exit.value.code == 1 and captured.count("\n") == 1 and captured.startswith("error: ")
    return captured
