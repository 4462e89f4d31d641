"""tools/curves.py: ticks, reading metrics.jsonl, and where evaluate.py --curves draws its lines."""
import json

import numpy as np
import pytest
from PIL import Image

from helpers import FOREIGN_LINES, LOSSES
from tools import curves
import evaluate
from formats.files import UserError
from tools.curves import HEIGHT, LEFT, LEGEND, TOP, WIDTH, draw_curves, figures_of, series, ticks


@pytest.mark.parametrize("low, high, expected", [
    (0, 2000, [0, 500, 1000, 1500, 2000]), (0, 1, [0, 0.5, 1]), (0.31, 0.49, [0.3, 0.35, 0.4, 0.45, 0.5]),
    (3, 3, [2.5, 3, 3.5]), (-0.2, 0.2, [-0.2, -0.1, 0, 0.1, 0.2]), (0, 7e-4, [0, 0.0002, 0.0004, 0.0006, 0.0008])])
def test_ticks_are_round_and_span_the_range(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def write_run(folder, lines: list[dict], end: str = "") -> str:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return str(folder)


def evaluation(iteration: int, box: float, mask: float | None) -> dict:
    return {"iter": iteration, "eval": {"bbox": {"AP": box}, "segm": None if mask is None else {"AP": mask}}}


def test_reading_metrics(tmp_path, capsys):
    run = write_run(tmp_path / "run", [{"iter": 10, "loss": 2.0, "label_iou": None}, evaluation(10, 7, None),
                                       {"iter": 20, "loss": None, "label_iou": 0.5}, evaluation(20, 9, 8)])
    lines = figures_of(run)
    assert series(lines, "loss") == [(10, 2.0)] and series(lines, "label_iou") == [(20, 0.5)]
    assert series(lines, "eval/segm/AP") == [(20, 8)] and series(lines, "eval/bbox/AP") == [(10, 7), (20, 9)]
    assert series(lines, "loss_cls") == [] and capsys.readouterr().err == ""
    with pytest.raises(UserError, match="none/metrics.jsonl: No such file"):
        figures_of(str(tmp_path / "none"))


def test_foreign_lines_are_left_out_with_a_warning(tmp_path, capsys):
    run = write_run(tmp_path / "run", [{"iter": 100, "loss_cls": 1.0}])
    with open(tmp_path / "run/metrics.jsonl", "ab") as file:
        file.write(FOREIGN_LINES + b'{"iter": 400, "loss_cls": 0.0}\n{"iter": 500, "lo')
    draw_curves([run], str(tmp_path / "x.png"))
    assert capsys.readouterr().err == (f"warning: {run}/metrics.jsonl: {FOREIGN_LINES.count(b'%c' % 10) + 1} lines not "
                                       "of a run's log, left out\n")
    assert figures_of(run) == [{"iter": 100, "loss_cls": 1.0}, {"iter": 400, "loss_cls": 0.0}]


def colour_at(image: np.ndarray, x: float, y: float) -> tuple:
    return tuple(image[round(y), round(x)].tolist())


def test_lines_go_through_their_points(tmp_path, capsys):
    """Two runs, two quantities: first mask AP from 0 to 40, beside it the class loss from 1 to 0."""
    one = write_run(tmp_path / "one", [{"iter": 100, "loss_cls": 1.0}, evaluation(100, 0, 0),
                                       {"iter": 400, "loss_cls": 0.0}, evaluation(400, 0, 40)])
    two = write_run(tmp_path / "two", [{"iter": 200, "loss_cls": 0.5}, {"iter": 400, "loss_cls": 0.5}])
    path = tmp_path / "new" / "curves.png"
    evaluate.main(["--curves", str(path), one, two])
    assert capsys.readouterr().out == f"curves: {path}\n"
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    cell, top = LEFT + WIDTH + curves.RIGHT, 2 * LEGEND + 8 + TOP
    first, second = curves.COLOURS[:2]
    # the box AP, all 0, is the second panel; the class loss the third
    assert colour_at(image, LEFT + WIDTH * 100 / 400, top + HEIGHT) == first
    assert colour_at(image, LEFT + WIDTH * 250 / 400, top + HEIGHT / 2) == first
    assert colour_at(image, 2 * cell + LEFT + WIDTH * 300 / 400, top + HEIGHT / 2) == second
    assert colour_at(image, 2 * cell + LEFT + WIDTH * 150 / 400, top + HEIGHT / 2) != second  # it begins later
    assert colour_at(image, 2 * cell + LEFT + WIDTH * 175 / 400, top + HEIGHT / 4) == first
    assert image.shape[1] == 3 * cell


def test_the_best_figure_is_not_cut_off(tmp_path):
    """One run reaches an AP of 40 twice, the other has most of its points at 20."""
    one = write_run(tmp_path / "one", [evaluation(i, 0, 40) for i in (50, 100)])
    two = write_run(tmp_path / "two", [evaluation(i, 0, 20) for i in range(1, 101)])
    draw_curves([one, two], str(tmp_path / "x.png"))
    image = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    top = 2 * LEGEND + 8 + TOP
    assert colour_at(image, LEFT + WIDTH * 0.75, top) == curves.COLOURS[0]
    assert colour_at(image, LEFT + WIDTH * 0.75, top + HEIGHT) == curves.COLOURS[1]


def test_every_loss_has_a_panel():
    keys = {key for _, key in curves.PANELS}
    assert {f"loss_{name}" for names in LOSSES.values() for name in names} | {"loss"} == {
        key for key in keys if isinstance(key, str) and key.startswith("loss")}
    with pytest.raises(UserError, match="at most 7"):
        draw_curves(["run"] * 8, "x.png")


@pytest.mark.parametrize("options, message", [
    (["--curves", "a.png", "b", "--sheet", "c.png"], "nothing is evaluated"),
    ([], "either --ckpt FILE or --curves"), (["--curves", "a.png"], "expected FILE RUN"),
    (["--curves", "a.png", "b", "--ckpt", "c.pt"], "either --ckpt FILE or --curves")])
def test_wrong_options_end_with_status_2(options, message, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main(options)
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_nothing_to_draw_is_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "run", [])
    with pytest.raises(UserError, match="no iterations were logged"):
        draw_curves([run], str(tmp_path / "x.png"))
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--curves", str(tmp_path / "x.png"), str(tmp_path / "none")])
    assert end.value.code == 1 and capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "x.png").exists()
