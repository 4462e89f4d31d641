"""tools/quality.py: correlations and matches by hand, the dots of the figure, evaluate.py --score-quality."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from helpers import Looker, evaluation, fails, made_up, make_batch, rewrite
from tools import quality
from formats.coco import CocoBoxes
from teacher import SCORES, pseudo_label

PADDED, SIZE = (96, 128), (90, 120)  # (height, width); the stride-4 grid of an image is 22 x 30 cells


# ---------------------------------------------------------------------------------------------- correlations


def test_pearson_by_hand():
    """From the means: x -1.5 -0.5 0.5 1.5, y -1.5 0.5 -0.5 1.5; 2.25 - 0.25 - 0.25 + 2.25 = 4 of 5."""
    x, y = np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])
    assert quality.pearson(x, y) == pytest.approx(0.8)
    assert quality.pearson(x, -y / 7 + 3) == pytest.approx(-0.8)
    assert type(quality.pearson(x, y)) is float


def test_equal_values_share_the_mean_of_their_ranks():
    assert quality.ranks(np.array([3.0, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2]
    assert quality.ranks(np.array([5.0, 5, 5])).tolist() == [2, 2, 2]
    assert quality.ranks(np.array([0.3, 0.1, 0.2])).tolist() == [3, 1, 2]
    assert quality.ranks(np.array([])).tolist() == []


def test_spearman_sees_the_order_alone_and_ties_by_hand(tmp_path):
    """x ranks 1.5 1.5 3 4, y 1 2 3 4; from their mean 2.5: 1.5 + 0.5 + 0.25 + 2.25 = 4.5 of sqrt(4.5 * 5)."""
    x, y = [0.1, 0.1, 0.2, 0.3], [0.01, 0.02, 0.03, 1.0]
    tied, equal = (quality.report([[v] * 4 + [w] for v, w in zip(values, y)], str(tmp_path / "dots.png"))["scores"]
                   for values in (x, [0.5, 0.6, 0.7, 0.71]))
    assert tied["iou"]["spearman"] == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert equal["iou"]["spearman"] == pytest.approx(1) and equal["iou"]["pearson"] < 0.8


@pytest.mark.parametrize("x, y", [([], []), ([0.5], [0.5]), ([0.5, 0.5], [0.1, 0.2]), ([0.1, 0.2], [0.5, 0.5])])
def test_no_correlation_of_too_few_values_or_of_a_constant(x, y):
    assert quality.pearson(np.array(x), np.array(y)) is None


def test_report_prints_a_dash_where_there_is_no_correlation(tmp_path, capsys):
    rows = [[0.1, 0.5, 0.3, 0.9, 0.2], [0.2, 0.5, 0.2, 0.8, 0.4], [0.4, 0.5, 0.1, 0.7, 0.8]]
    answer = quality.report(rows, str(tmp_path / "dots.png"))
    lines = capsys.readouterr().out.splitlines()
    assert "3 pseudo masks" in lines[0] and lines[1].split() == ["Pearson", "Spearman"]
    assert [line.split() for line in lines[2:6]] == [
        ["mask-aware", "1.000", "1.000"], ["cls", "-", "-"], ["iou", "-0.982", "-1.000"],
        ["mean-entropy", "-0.982", "-1.000"]]
    assert len({len(line) for line in lines[1:6]}) == 1
    assert answer["matches"] == 3 and list(answer["scores"]) == list(SCORES)
    assert answer["scores"]["cls"] == {"pearson": None, "spearman": None}
    json.dumps(answer, allow_nan=False)  # plain floats

    for few in ([], rows[:1]):
        answer = quality.report(few, str(tmp_path / "dots.png"))
        assert answer["matches"] == len(few) and answer["scores"]["iou"] == {"pearson": None, "spearman": None}


# ---------------------------------------------------------------------------------- matches, made up by hand


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def left_part(p: float, column: int) -> torch.Tensor:
    """Mask logits at stride 8: probability p left of a column, lower than 0.5 from there on.

    Enlarged, cell i reads (i - 1) / 2: at stride 4 the columns to 2 * column - 1 have the logit x of p, the next
    one is half way from x to -3x, that is at -x, and the others have -3x.
    """
    mask = torch.full((12, 16), -3 * logit(p))
    mask[:, :column] = logit(p)
    return mask


def entropy_score(*parts: tuple[float, int]) -> float:
    """1 + mean of p log p + (1 - p) log(1 - p), of (logit, number of columns)."""
    total = 0.0
    for x, columns in parts:
        p = 1 / (1 + math.exp(-x))
        total += columns * (p * math.log(p) + (1 - p) * math.log(1 - p))
    return 1 + total / sum(columns for _, columns in parts)


def cells(rows: slice, *columns: slice) -> torch.Tensor:
    mask = torch.zeros(PADDED[0] // 4, PADDED[1] // 4, dtype=torch.bool)
    for some in columns:
        mask[rows, some] = True
    return mask


def by_hand():
    """Three images: two pseudo masks and two detections that give none; no box; an object without a cell.

    Box 0 covers the cell rows and columns 4 to 15 and 4 to 19, box 1 the rows 4 to 12 and the same columns.
    Detection A, 32 pixels high, overlaps box 0 by 32/48 and box 1 by 32/36: it is box 1's. Its mask has 6 of the 16
    columns, the object 4 of these: IoU 2/3. Detection B is box 0 exactly, its mask all 16 columns, the object 12 of
    them: IoU 3/4. C overlaps box 0 by 28/48 and comes too late. The objects go on outside their boxes, where nothing
    is compared.
    """
    boxes = [[[16, 16, 80, 64], [16, 16, 80, 52]], [], [[16, 16, 80, 64]]]
    a, b, c, reaches_none = [16, 16, 80, 48], [16, 16, 80, 64], [16, 36, 80, 64], [90, 60, 118, 88]
    everywhere = torch.full((12, 16), logit(0.6))
    predictions = made_up([[(a, 0.81, left_part(0.8, 5)), (b, 0.49, everywhere), (c, 0.25, everywhere),
                            (reaches_none, 0.64, everywhere)],
                           [(b, 0.49, everywhere)], [(b, 0.49, everywhere)]], PADDED)
    truth = [torch.stack([cells(slice(0, 24), slice(4, 16), slice(20, 30)), cells(slice(2, 20), slice(4, 8))]),
             torch.zeros(0, 24, 32, dtype=torch.bool), cells(slice(0, 3), slice(0, 30))[None]]
    batch = make_batch(boxes, SIZE, SIZE, PADDED)._replace(masks=truth)
    x = logit(0.8)
    rows = [[math.sqrt(0.7 * 0.6), 0.7, 1.0, entropy_score((logit(0.6), 30)), 3 / 4],
            [math.sqrt(0.9 * 0.8), 0.9, 8 / 9, entropy_score((x, 10), (-x, 1), (-3 * x, 19)), 2 / 3]]
    return predictions, batch, rows


def test_scores_and_mask_iou_of_the_masks_that_algorithm_1_gives():
    predictions, batch, rows = by_hand()
    found = quality.matches(predictions, batch)
    assert len(found) == 2
    assert np.abs(np.array(found) - rows).max() < 1e-5
    above = quality.matches(predictions, batch, score_threshold=0.8)
    assert above == found[1:]


def test_scores_are_those_of_pseudo_label():
    generator = torch.Generator().manual_seed(0)
    box = [[16.0, 24, 72, 64], [80, 30, 110, 70]]
    moved = [[19.0, 22, 75, 66], [78, 30, 108, 75]]
    noise = torch.randn(2, 12, 16, generator=generator)
    predictions = made_up([[(moved[k], 0.9 - 0.3 * k, noise[k]) for k in (0, 1)]], PADDED)
    batch = make_batch([box], SIZE, SIZE, PADDED)._replace(masks=[torch.ones(2, 24, 32, dtype=torch.bool)])
    table = torch.tensor(quality.matches(predictions, batch))
    for k, score in enumerate(SCORES):
        assert (table[:, k] - pseudo_label(lambda *_: predictions, batch, score).scores).abs().max() < 1e-5, score


# ------------------------------------------------------------------------------------------------ the image


def layer(path, panel: int) -> np.ndarray:
    """How blue each pixel of a panel's square is, its edge of 5 pixels included: 0 for paper, grid and ink."""
    image = np.array(Image.open(path).convert("RGB")).astype(int)
    left, top = quality.LEFT + panel * quality.PANEL, quality.TOP
    square = image[top - 5:top + quality.PLOT + 6, left - 5:left + quality.PLOT + 6]
    return np.clip(square[..., 2] - square[..., 0] - 6, 0, None)  # the ink is a little blue too


def test_dots_are_where_score_and_iou_say(tmp_path):
    path = tmp_path / "dots.png"
    rows = [[0.1, 0.3, 0.5, 0.9, 0.25], [0.7, 0.7, 0.7, 0.7, 0.9], [0.7, 0.7, 0.7, 0.7, 0.9]]
    quality.report(rows, str(path))
    image = Image.open(path)
    assert image.format == "PNG" and image.size == (4 * quality.PANEL, quality.TOP + quality.PLOT + quality.BOTTOM)
    assert not (tmp_path / "dots.png.tmp").exists()
    for panel in range(4):
        blue = layer(path, panel)
        y, x = np.mgrid[:blue.shape[0], :blue.shape[1]] - 5
        low = y > quality.PLOT / 2  # the dot of the first row, of IoU 0.25
        for part, score, iou in [(low, rows[0][panel], 0.25), (~low, 0.7, 0.9)]:
            weight = blue * part
            center = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
            assert center == pytest.approx((score * quality.PLOT, (1 - iou) * quality.PLOT), abs=0.5)
            assert 20 < (weight > 0).sum() < 60  # a dot, of about pi (RADIUS + 0.5)^2 = 38 pixels
        one, two = blue[low].max(), blue[~low].max()
        full = quality.DOT[2] - quality.DOT[0]  # where nothing shines through; two dots let 0.4 * 0.4 through
        assert (one, two) == pytest.approx((0.6 * full - 6, 0.84 * full - 6), abs=2)
        assert len(np.unique(blue[low])) > 4  # a smooth edge


def test_dots_at_the_corners_are_whole_and_many_are_faint(tmp_path):
    corners = quality.dots(quality.place(3, np.array([0.0, 1]), np.array([0.0, 1])), 4 * quality.PANEL,
                           quality.TOP + quality.PLOT + quality.BOTTOM, 0.5)
    inside = quality.dots(quality.place(3, np.array([0.25, 0.75]), np.array([0.5, 0.5])), *corners.size, 0.5)
    assert np.array(corners, int).sum() == np.array(inside, int).sum() > 0
    assert quality.opacity(0) == quality.opacity(100) == 0.6 and quality.opacity(2500) == pytest.approx(0.3)
    assert quality.opacity(10**7) == 0.04


# ------------------------------------------------------------------------------------------- the command line


def test_command_line_from_checkpoint_to_image(checkpoint, dataset, tmp_path, capsys):
    """The boxes of an untrained network reach about a stride from their locations: they are 16 pixels wide on P3."""
    def at_locations(content):
        for k, row in enumerate(content["annotations"]):
            row["bbox"] = [12 + 32 * (k % 2), 12, 16, 16]

    rewrite(dataset[0], at_locations)
    path, metrics = tmp_path / "new" / "quality.png", tmp_path / "metrics.json"
    options = ("--score-threshold", 0, "--metrics", metrics, "--score-quality", path)
    evaluate.main(evaluation(checkpoint, dataset, *options))
    out, written = capsys.readouterr().out, json.loads(metrics.read_text())
    answer = written["score_quality"]
    assert 2 < answer["matches"] <= len(CocoBoxes(*dataset).boxes) and list(answer["scores"]) == list(SCORES)
    assert all(-1 <= r <= 1 for one in answer["scores"].values() for r in one.values())
    assert f"{answer['matches']} pseudo masks" in out and f"score quality: {path}" in out and "\nmask-aware " in out
    assert layer(path, 2).max() > 50 and written["bbox"]["AP"] is not None

    evaluate.main(evaluation(checkpoint, dataset, *options[:-2]))
    assert "score quality" not in capsys.readouterr().out
    assert {**json.loads(metrics.read_text()), "score_quality": answer} == written  # the rest is as without


def test_masks_of_an_evaluation_are_those_of_its_images(dataset, monkeypatch):
    """`matches` gets the masks of each image. The objects of this data set are painted: an image shows its masks."""
    seen = []

    def look(_, batch):
        for image, size, masks, boxes in zip(batch.images, batch.sizes, batch.masks, batch.boxes):
            painted = image.amax(0)[2::4, 2::4] > 100
            seen.append((size, len(masks), (painted != masks.any(0)).sum().item()))
            assert len(masks) == len(boxes) and (not len(masks) or masks.any(2).any(1).all())
        return []

    evaluate.over_images(Looker(), CocoBoxes(*dataset, masks=True), "look", look, min_size=128,
                           max_size=256, batch_size=2, workers=0, progress=False)
    assert [size for size, _, _ in seen] == [(128, 192), (192, 128), (128, 128), (128, 256), (256, 128)]
    assert [n for _, n, _ in seen] == [2, 2, 2, 2, 0] and max(differ for _, _, differ in seen) <= 12


def test_without_masks_one_line_says_so(checkpoint, dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: pytest.fail("evaluated"))
    rewrite(dataset[0], lambda c: c["annotations"][3].pop("segmentation"))
    line = fails(evaluation(checkpoint, dataset, "--score-quality", tmp_path / "quality.png"), capsys)
    assert str(dataset[0]) in line and "(id 3)" in line and "segmentation" in line and "learns" not in line
    assert not (tmp_path / "quality.png").exists()
