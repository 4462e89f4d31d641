"""Training curves of several runs in one figure: losses, label quality and AP over the iterations. Not in the paper.

    python evaluate.py --curves curves.png runs/boxinst-r50-coco runs/boxteacher-r50-coco

The curves are read from the metrics.jsonl of each run. There is a panel for each quantity that some run has, and a
colour for each run. AP is that of train.py's evaluations: rescored by the masks for BoxTeacher, of the averaged weights
if the run averages. tools/quality.py and tools/growth.py draw on `axes` too.
"""
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from formats.files import UserError, printable
from formats.pictures import save_image
from tools.log import read_metrics

# title, and the name among the scalars of a line of metrics.jsonl
PANELS = (("mask AP", "eval/segm/AP"), ("box AP", "eval/bbox/AP"), ("IoU of pseudo masks", "label_iou"),
          ("IoU of the student's masks", "student_iou"), ("class loss", "loss_cls"), ("box loss", "loss_box"),
          ("centerness loss", "loss_centerness"), ("projection loss", "loss_projection"),
          ("pairwise loss", "loss_pairwise"), ("mask loss", "loss_mask"), ("pixel loss", "loss_pixel"),
          ("affinity loss", "loss_affinity"), ("total loss", "loss"))
COLOURS = ((30, 90, 200), (210, 70, 40), (40, 150, 70), (150, 80, 190), (200, 140, 20), (20, 150, 160), (90, 90, 100))
INK, GRID = (40, 40, 46), (226, 226, 230)
WIDTH, HEIGHT = 270, 170                  # of a panel's axes, pixels
LEFT, TOP, RIGHT, BOTTOM = 56, 34, 16, 34  # around them
PER_LINE = 4                              # panels side by side
LEGEND = 24                               # height of a line of the legend


def draw_curves(runs: list[str], path: str) -> None:
    """Write the PNG. Raises UserError for more runs than COLOURS, no metrics.jsonl, or nothing to draw."""
    if len(runs) > len(COLOURS):
        raise UserError(f"{len(runs)} runs are too many to tell apart in one figure: name at most {len(COLOURS)}")
    lines = [figures_of(run) for run in runs]
    panels = [(title, [series(of_run, key) for of_run in lines]) for title, key in PANELS]
    panels = [(title, curves) for title, curves in panels if any(curves)]
    if not panels:
        raise UserError(f"{', '.join(runs)}: no iterations were logged yet")
    columns, font, large = min(PER_LINE, len(panels)), ImageFont.load_default(size=12), ImageFont.load_default(size=14)
    cell = LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM
    top, names = LEGEND * len(runs) + 8, [printable(run) for run in runs]
    width = max(columns * cell[0], LEFT + 50 + math.ceil(max(map(large.getlength, names))))
    canvas = Image.new("RGB", (width, top + math.ceil(len(panels) / columns) * cell[1]), "white")
    draw = ImageDraw.Draw(canvas)
    for k, name in enumerate(names):
        y = LEGEND * k + LEGEND // 2 + 4
        draw.line([(LEFT, y), (LEFT + 26, y)], COLOURS[k], 3)
        draw.text((LEFT + 34, y), name, INK, large, "lm")
    last = max(x for _, curves in panels for curve in curves for x, _ in curve)
    for k, (title, curves) in enumerate(panels):
        left, y = (k % columns) * cell[0] + LEFT, top + (k // columns) * cell[1] + TOP
        draw_panel(canvas, left, y, title, curves, last, font)
    save_image(canvas, path, "PNG")


def figures_of(run: str) -> list[dict[str, float]]:
    """The scalars of each line of a run's metrics.jsonl. Raises UserError."""
    path = Path(run) / "metrics.jsonl"
    try:
        return [figures for _, figures in read_metrics(path)]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name the folder of a run") from None


def series(lines: list[dict], key: str) -> list[tuple[int, float]]:
    """(iteration, value) of each line with this key."""
    return [(line["iter"], line[key]) for line in lines if key in line]


def draw_panel(canvas: Image.Image, left: int, top: int, title: str, curves: list[list[tuple[int, float]]],
               last: int, font: ImageFont.FreeTypeFont) -> None:
    """Draw one quantity of all runs, from iteration 0 to `last`. (left, top): upper left corner of the axes, pixels."""
    values = np.array([y for curve in curves for _, y in curve])
    low, high = values.min(), values.max()
    if title.endswith("loss"):  # an outlier at the start would flatten the rest
        high = max(np.quantile(values, 0.98), *(curve[-1][1] for curve in curves if curve))
    x_ticks, y_ticks = ticks(0, last), ticks(low, high)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
    axes(canvas, left, top, WIDTH, HEIGHT, [(x / last, f"{x:g}") for x in x_ticks],
         [((y - low) / (high - low), f"{y:g}") for y in y_ticks], "", "", font)
    draw = ImageDraw.Draw(canvas)
    draw.text((left + WIDTH // 2, top - 12), title, INK, ImageFont.load_default(size=14), "mm")
    for k, curve in enumerate(curves):
        xy = [(left + x / last * WIDTH, top + (1 - min((y - low) / (high - low), 1.0)) * HEIGHT) for x, y in curve]
        if len(xy) > 1:
            draw.line(xy, COLOURS[k], 2, joint="curve")
        for x, y in xy if len(xy) <= 20 else []:
            draw.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), COLOURS[k])


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers that span `low` to `high`."""
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
    return [round(step * i, 10) for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def axes(canvas: Image.Image, left: int, top: int, width: int, height: int, x_ticks: list[tuple[float, str]],
         y_ticks: list[tuple[float, str]], x_label: str, y_label: str, font: ImageFont.FreeTypeFont) -> None:
    """Draw a frame with grid, numbers and labels. A tick is a position from 0 (left, bottom) to 1, and its text."""
    draw, bottom = ImageDraw.Draw(canvas), top + height
    for place, text in x_ticks:
        x = int(left + place * width + 0.5)
        if place <= 1.001:
            draw.line([(x, top), (x, bottom + 4)], GRID)
            draw.text((x, bottom + 8), text, INK, font, "mt")
    for place, text in y_ticks:
        y = int(top + (1 - place) * height + 0.5)
        draw.line([(left - 4, y), (left + width, y)], GRID)
        draw.text((left - 8, y), text, INK, font, "rm")
    draw.rectangle((left, top, left + width, bottom), outline=INK)
    draw.text((left + width // 2, bottom + 28), x_label, INK, font, "mt")
    upright = Image.new("L", (height, 20))
    ImageDraw.Draw(upright).text((height // 2, 10), y_label, 255, font, "mm")
    canvas.paste(INK, (left - 52, top), upright.rotate(90, expand=True))
