"""tools/log.py: lines of metrics.jsonl, the same figures in TensorBoard, and sheets, which must not change the run."""
import json
import os
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from formats.checkpoint import load
from formats.coco import CocoBoxes
from helpers import (FOREIGN_LINES, SMALL, command, copy_set, metrics, new_run, one_line_error, only_training,
                     same)
from masks import encode
from model import Instances
from teacher import PseudoLabels
from tools import draw, log
from tools.draw import GAP, HEADER, PANEL
from tools.log import Log, draw_sheet, sheet_images

CELL = PANEL + GAP


# ---------------------------------------------------------------------------------------------------- figures


def step(one: Log, loss: float, skipped: bool = False, waited: float = 0.0, **counts: float) -> None:
    one.step({"loss": torch.tensor(loss)}, {name: torch.tensor(value) for name, value in counts.items()},
             not skipped, waited)


def test_a_line_holds_the_means_of_its_iterations(tmp_path, capsys):
    one = Log(tmp_path, 100, iteration=60)
    step(one, 2.0, pseudo_masks=1, label_iou=0.5, waited=0.25)
    step(one, float("nan"), skipped=True, pseudo_masks=9, label_iou=9.0)
    step(one, 4.0, pseudo_masks=3, label_iou=2.5, waited=0.5)
    one.write(63, 0.01, 1.0)
    step(one, 8.0, skipped=True, pseudo_masks=1, label_iou=1.0)
    one.write(64, 0.01, 1.0)
    step(one, 5.0, pseudo_masks=0, label_iou=0.0)
    one.write(65, 0.01, 1.0)
    first, second, third = metrics(tmp_path)
    assert first.pop("seconds") > 0
    assert first == {"iter": 63, "lr": 0.01, "ramp": 1.0, "loss": 3.0, "pseudo_masks": 2.0,
                     "label_iou": 3.0 / 4, "skipped_steps": 1, "data_seconds": 0.25}
    assert (second["iter"], second["loss"], second["skipped_steps"]) == (64, None, 1)
    assert (third["loss"], third["label_iou"], third["skipped_steps"]) == (5.0, None, 0)  # no box had a mask
    assert "63/100 loss 3.000 | " in capsys.readouterr().out


def test_lines_past_the_checkpoint_are_dropped(tmp_path):
    lines = [json.dumps({"iter": i, "loss": 1.0}) for i in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"iter": 4']))
    one = Log(tmp_path, 100, iteration=20)
    one.evaluation(20, {"segm": {"AP": 7.0}})
    assert metrics(tmp_path) == [*map(json.loads, lines[:2]), {"iter": 20, "eval": {"segm": {"AP": 7.0}}}]


def test_foreign_lines_are_dropped_with_a_warning(tmp_path, capsys):
    path, line = tmp_path / "metrics.jsonl", b'{"iter": 1, "loss": null, "eval": {"segm": null}}\n'
    path.write_bytes(FOREIGN_LINES + line + FOREIGN_LINES)
    Log(tmp_path, 100, iteration=20)
    count = 2 * FOREIGN_LINES.count(b"\n")
    assert capsys.readouterr().err == f"warning: {path}: {count} lines not of a run's log, left out\n"
    assert path.read_bytes() == line


def test_only_the_first_process_writes(tmp_path):
    one = Log(tmp_path, 100, 0, rank=1, tensorboard=True)
    step(one, 1.0)
    one.write(1, 0.1, 1.0)
    assert list(tmp_path.iterdir()) == []


def read_scalars(out: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a run: tag -> step -> value. No step may appear twice."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(out / "tensorboard")).Reload()
    found = {tag: [(x.step, x.value) for x in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert all(len(points) == len(dict(points)) for points in found.values()), found
    return {tag: dict(points) for tag, points in found.items()}


def flat(lines: list[dict]) -> dict[str, dict[int, float]]:
    """The figures of metrics.jsonl in the form of `read_scalars`."""
    found = {}
    for line in lines:
        groups = line.get("eval") or {"train": {k: v for k, v in line.items() if k != "iter"}}
        for group, figures in groups.items():
            for name, value in figures.items():
                for tag, x in ([(f"{name}/{k}", v) for k, v in value.items()] if isinstance(value, dict)
                               else [(name, value)]):
                    if x is not None:
                        found.setdefault(f"{group}/{tag}", {})[line["iter"]] = pytest.approx(x, rel=1e-6)
    return found


def test_tensorboard_shows_the_figures_of_metrics_jsonl_also_after_a_resume(drawn, warm, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    options = ["--data", drawn, "--out", out, *SMALL, "--init", warm, "--iters", 4, "--eval-every", 2,
               "--tensorboard"]
    assert command(*options) == 0
    scalars = read_scalars(out)
    assert scalars == flat(metrics(out))
    assert {"train/loss", "train/lr", "train/loss_pixel", "train/pseudo_masks", "bbox/AP", "segm/AP50",
            "per_class/star/segm"} <= scalars.keys()
    assert scalars["train/loss"].keys() == {1, 2, 3, 4} and scalars["segm/AP"].keys() == {2, 4}

    # as if the process had been killed before the last checkpoint; the resumed run has other figures
    (out / "final.pt").unlink()
    (out / "previous.pt").replace(out / "last.pt")
    assert load(out / "last.pt")["iteration"] == 2
    assert command(*options, "--lambda-pixel", 2) == 0
    again = read_scalars(out)
    assert again == flat(metrics(out)) and again["train/loss"].keys() == {1, 2, 3, 4}
    pixel, before = again["train/loss_pixel"], scalars["train/loss_pixel"]
    assert pixel[1] == before[1] and pixel[3] == pytest.approx(4 * before[3], rel=1e-4) and pixel[3] > 0


def test_without_its_package_tensorboard_is_an_error_of_one_line(drawn, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if re.match(r"(torch\.utils\.)?tensorboard\b", name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)                      # for `import`: not installed
    options = [*only_training(drawn), "--out", tmp_path / "out", *SMALL, "--iters", 1]
    assert command(*options, "--tensorboard") == 1
    assert "pip install tensorboard" in one_line_error(capsys) and list(tmp_path.iterdir()) == []
    assert command(*options) == 0 and not (tmp_path / "out/tensorboard").exists()


# --------------------------------------------------------------------------------------------------- sheets


def sheet_size(images: int, columns: int) -> tuple[int, int]:
    """(width, height) of a sheet of square images."""
    per_line = 2 if images > 4 else 1
    return (columns * per_line * CELL + (per_line - 1) * 4 * GAP + GAP,
            HEADER + -(-images // per_line) * CELL)


def draw_labels(run, annotations: CocoBoxes, path: Path) -> None:
    args = run.args
    draw_sheet(path, "masks", run.evaluated(), annotations, score=args.score, min_sizes=args.min_size,
               max_size=args.max_size, teacher_size=(args.teacher_min_size, args.teacher_max_size))


def drawn_by(run, annotations: CocoBoxes, path: Path) -> np.ndarray:
    """The sheet of a run as (height, width, 3) integers."""
    draw_labels(run, annotations, path)
    return np.asarray(Image.open(path)).astype(int)


def panel(image: np.ndarray, column: int) -> np.ndarray:
    """(PANEL, PANEL, 3), of the first image."""
    x = GAP + column * CELL
    return image[HEADER:HEADER + PANEL, x:x + PANEL]


@pytest.mark.parametrize("method", ["boxteacher", "boxinst", "condinst"])
def test_a_sheet_shows_what_the_model_has_learnt(drawn, warm, tmp_path, method):
    """At first only boxes, after 30 steps masks too."""
    start, annotations = new_run(drawn, tmp_path, "--method", method)
    later, _ = new_run(drawn, tmp_path, "--method", method, "--init", str(warm))
    before, after = (drawn_by(run, annotations, tmp_path / "x.png") for run in (start, later))
    assert before.shape == after.shape == (*sheet_size(8, 2)[::-1], 3)
    assert (drawn_by(later, annotations, tmp_path / "x.png") == after).all()      # the same images each time
    for column in (0, 2):                                                         # beside each other: two images
        x = GAP + (column // 2) * (2 * CELL + 4 * GAP)
        left, right = (slice(x + k * CELL, x + k * CELL + PANEL) for k in (0, 1))
        assert (before[:, left] == after[:, left]).all()
        changed = (before[:, right] != after[:, right]).any(2)
        assert 0.05 < changed.mean() < 0.95


def test_masks_are_drawn_where_they_are(drawn, tmp_path, monkeypatch):
    """One box of 32 x 32 pixels in the middle, enlarged 5 times, with a mask in its left half or with none."""
    def change(content):
        content["images"] = content["images"][:1]
        content["annotations"] = [content["annotations"][0] | {"image_id": 1, "bbox": [16, 16, 32, 32]}]

    seen = []

    def label(model, batch, score):
        seen.append((model.training, model.amp_dtype, batch.augmented, tuple(batch.sizes),
                     tuple(batch.teacher_sizes)))
        masks = torch.zeros(1, 16, 16)
        masks[0, 4:12, 4:8] = 0.9 if given else 0
        return PseudoLabels(masks, torch.tensor([0]), torch.tensor([given]))

    run, _ = new_run(drawn, tmp_path, "--amp", "bf16", "--augment", "strong", "--min-size", "32", "64", "128",
                     "--teacher-min-size", "96", "--teacher-max-size", "96")
    data = copy_set(drawn, tmp_path / "set", change)
    annotations = CocoBoxes(data / "annotations/instances_train2017.json", data / "train2017")
    monkeypatch.setattr(log, "pseudo_label", label)
    sheets = []
    for given in (0.0, 0.75, 0.5):
        sheets.append(drawn_by(run, annotations, tmp_path / "x.png"))
    assert seen == [(False, torch.bfloat16, None, ((64, 64),), ((96, 96),))] * 3
    bare, sure, unsure = (panel(image, 1) for image in sheets)
    assert (panel(sheets[0], 0) == panel(sheets[1], 0)).all()
    changed, inside = (bare != sure).any(2), slice(85, 235)
    assert changed[inside, 85:155].mean() > 0.99 and not changed[inside, 165:235].any()
    assert (sure[inside, 155:160] == draw.COLOURS[0]).all(2).any(1).all()    # its outline is the box's colour
    assert (bare[inside, 79:82] == draw.COLOURS[0]).all(2).any(1).all()      # that of a box without a fill
    rows = (sure != unsure).any((1, 2)).nonzero()[0]                              # the score, above the box
    assert len(rows) and 50 < rows.min() <= rows.max() < 80


def test_refined_masks_stand_beside_those_of_alg_1(drawn, warm, tmp_path):
    run, annotations = new_run(drawn, tmp_path, "--init", str(warm))
    args, path = run.args, tmp_path / "x.png"
    plain, sheets = drawn_by(run, annotations, path), []
    for options in ({"colors": True}, {"fit_steps": 3}, {"colors": True, "fit_steps": 3}):
        draw_sheet(path, "masks", run.evaluated(), annotations, score=args.score, min_sizes=args.min_size,
                   max_size=args.max_size, teacher_size=(args.teacher_min_size, args.teacher_max_size), **options)
        sheets.append(np.asarray(Image.open(path)).astype(int))
    assert all(image.shape == (*sheet_size(8, 3)[::-1], 3) for image in sheets)
    assert all((panel(image, 1) == panel(plain, 1)).all() for image in sheets)
    refined = [panel(image, 2) for image in sheets]
    assert all((refined[i] != refined[j]).any() for i, j in ((0, 1), (0, 2), (1, 2)))
    assert (refined[0] != panel(plain, 1)).any()


def test_true_masks_have_a_panel_if_the_data_set_has_them(drawn, warm, tmp_path):
    for number, options in enumerate((["--method", "condinst"], ["--measure-labels"])):
        out = tmp_path / str(number)
        assert command(*only_training(drawn), "--out", out, *SMALL, "--init", warm, "--iters", 1, *options) == 0
        image = Image.open(out / "labels-0000001.png")
        assert image.size == sheet_size(8, 3)
        assert (panel(np.asarray(image), 2) != panel(np.asarray(image), 1)).any()


def test_a_sheet_has_three_panels_only_with_true_masks(tmp_path):
    image, boxes = torch.full((3, 64, 64), 100, dtype=torch.uint8), torch.tensor([[8.0, 8, 40, 40]])
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, 8:40, 8:40] = True
    rles = [encode(np.ones((32, 32), bool), 8, 8, (64, 64))]
    found, label = Instances(boxes, torch.tensor([0.9]), torch.tensor([0]), rles, (64, 64)), torch.tensor([0])
    path, titled = str(tmp_path / "x.png"), str(tmp_path / "y.png")
    for truths, columns in (([None, None], 2), ([None, masks], 3), ([masks, masks], 3)):
        draw.sheet([draw.SheetRow(image, boxes, label, [found], truth) for truth in truths], path)
        assert Image.open(path).size == sheet_size(2, columns)
    for to, options in ((path, {}), (titled, {"titles": ["input and its boxes", "something else"]})):
        draw.sheet([draw.SheetRow(image, boxes, label, [found], None)], to, **options)
    differs = (np.asarray(Image.open(path)) != np.asarray(Image.open(titled))).any((0, 2)).nonzero()[0]
    assert GAP + CELL <= differs.min() <= differs.max() < GAP + CELL + PANEL      # of the middle panel's title


def test_drawing_does_not_change_the_run(drawn, warm, tmp_path):
    """A network trained from scratch has batch-norm averages, which a forward pass in training mode would update."""
    for every in (1, 100):
        assert command(*only_training(drawn), "--out", tmp_path / str(every), *SMALL, "--init", warm, "--iters", 4,
                       "--augment", "strong", "--eval-every", every) == 0
    often, once = (load(tmp_path / str(every) / "last.pt") for every in (1, 100))
    assert same(often["student"], once["student"]) and same(often["teacher"], once["teacher"])
    names = [[path.name for path in sorted((tmp_path / every).glob("labels-*"))] for every in ("1", "100")]
    assert names == [[f"labels-000000{i}.png" for i in (1, 2, 3, 4)], ["labels-0000004.png"]]

    run, annotations = new_run(drawn, tmp_path / "new", "--init", str(warm))

    def state():
        return (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(),
                [module.training for model in (run.model, run.teacher) for module in model.modules()])

    before, weights = state(), {k: v.clone() for k, v in run.teacher.state_dict().items()}
    drawn_by(run, annotations, tmp_path / "x.png")
    assert state() == before and run.teacher.training and same(weights, run.teacher.state_dict())


def test_images_are_evenly_spaced_over_those_with_boxes():
    def chosen(boxes: list[int]) -> list[int]:
        return sheet_images(SimpleNamespace(offsets=np.cumsum([0, *boxes])))

    assert chosen([1] * 15) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert chosen([0, 2, 0, 1, 0, 0, 3]) == [1, 3, 6]
    assert chosen([0, 1, 1] * 50)[:2] == [1, 22] and chosen([0, 1, 1] * 50)[-1] == 149


def test_an_image_that_cannot_be_read_is_left_out(drawn, tmp_path, capsys):
    def change(content):
        content["images"] = content["images"][:3]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] <= 3]

    data, path = copy_set(drawn, tmp_path / "set", change), tmp_path / "x.png"
    run, _ = new_run(drawn, tmp_path)
    annotations = CocoBoxes(data / "annotations/instances_train2017.json", data / "train2017")
    whole = drawn_by(run, annotations, path)
    os.truncate(data / "train2017/000000000002.jpg", 500)
    part = drawn_by(run, annotations, path)
    assert part.shape == (*sheet_size(2, 2)[::-1], 3)
    assert (part[HEADER:HEADER + CELL] == whole[HEADER:HEADER + CELL]).all()
    assert (part[HEADER + CELL:] == whole[HEADER + 2 * CELL:]).all()
    for broken in (data / "train2017").iterdir():
        os.truncate(broken, 10)
    path.unlink()
    draw_labels(run, annotations, path)
    assert not path.exists() and capsys.readouterr().err == ""


def test_a_sheet_that_cannot_be_written_is_a_warning(drawn, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "labels-0000002.png").mkdir(parents=True)
    assert command(*only_training(drawn), "--out", out, *SMALL, "--iters", 3, "--eval-every", 1) == 0
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {out / 'labels-0000002.png'} was not written: ") and warning.count("\n") == 1
    assert (out / "labels-0000001.png").exists() and (out / "labels-0000003.png").exists()
    assert len(metrics(out)) == 3
