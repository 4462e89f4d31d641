"""How the cost of a training step grows with instances, image size, batch and processes: numbers and a figure.

    python benchmark.py --growth growth.png

Each point is a run of `benchmark.py --only step` in new processes, so that no point inherits the memory of another. A
curve's exponent is that of the power of x that fits its points best: 1 if the cost is proportional to x, 0 if it does
not depend on x. On the curve of processes each one has a thread and the same number of images, so 0 is perfect.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from formats.files import UserError
from formats.pictures import save_image
from tools.curves import COLOURS, INK, axes, ticks

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmark.py"


OPTIONS = ("backbone", "size", "teacher_size", "batch_size", "instances", "amp", "workers", "rounds", "device")


def measure_growth(options: dict, instances: list[int], sizes: list[int], batches: list[int]) -> dict:
    """{curve: {"rows": [{"x", "seconds", "peak MiB", ...}, ...], "exponents": {"seconds", "peak MiB"}}}

    options: those of benchmark.py (OPTIONS and compile) that a curve does not change, as plain values. instances: boxes
    of an image; sizes: shorter sides, pixels; batches: images of a step.
    """
    processes = [1, 2]
    if options["device"].startswith("cuda"):
        processes = [n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()]
    curves = {"instances": [(n, {"instances": n}) for n in instances],
              "shorter side": [(n, {"size": [n, round(n * 4 / 3)]}) for n in sizes],
              "batch": [(n, {"batch_size": n}) for n in batches],
              "processes": [(n, {"processes": n}) for n in processes]}
    growth = {}
    for name, points in curves.items():
        rows = []
        for x, changed in points:
            rows.append({"x": x} | measure_point(**options | changed))
            print(f"    {name} {x}: {rows[-1]['seconds']:.2f} s, {rows[-1]['peak MiB']:.0f} MiB, "
                  f"{rows[-1]['images a second']:.2f} images a second", flush=True)
        growth[name] = {"rows": rows, "exponents": {key: exponent(rows, key) for key in ("seconds", "peak MiB")}}
    return growth


def measure_point(processes: int | None = None, **options) -> dict:
    """The figures of `--only step` with these options. processes: start that many with torchrun, of one thread each."""
    command, environment = [sys.executable], dict(os.environ)
    if processes is not None:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        options["device"], environment["OMP_NUM_THREADS"] = options["device"].split(":")[0], "1"
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "step.json")
        command += [str(BENCHMARK), "--only", "step", "--json", out]
        for name in OPTIONS:
            if (value := options[name]) is not None:
                command += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
        command += ["--compile"] * options["compile"]
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        if run.returncode:
            why = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
            raise UserError(f"{' '.join(command)} failed: {why[-1]}")
        return json.loads(Path(out).read_text())["step"]


def exponent(rows: list[dict], key: str) -> float | None:
    """Of the power of x that fits row[key] best, by least squares of logarithms; None for a single row."""
    if len(rows) < 2:
        return None
    return float(np.polyfit(np.log([row["x"] for row in rows]), np.log([row[key] for row in rows]), 1)[0])


def show_growth(growth: dict) -> None:
    for name, curve in growth.items():
        fits = [f"{key} ~ x ^ {e:.2f}" for key, e in curve["exponents"].items() if e is not None]
        first, last = curve["rows"][0], curve["rows"][-1]
        rate = last["images a second"] / first["images a second"]
        print(f"    {name}: {', '.join(fits)}; {rate:.2f} times the images a second at {last['x']} as at {first['x']}")


def draw_growth(growth: dict, path: str) -> None:
    """Write a PNG with a column for each curve, time above and memory below."""
    font, width, height = ImageFont.load_default(size=12), 280, 180
    canvas = Image.new("RGB", (len(growth) * (width + 90) + 10, 2 * (height + 90)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, (name, curve) in enumerate(growth.items()):
        for line, (key, unit) in enumerate((("seconds", "seconds a step"), ("peak MiB", "peak memory, MiB"))):
            left, top = 70 + column * (width + 90), 40 + line * (height + 90)
            xs, ys = [row["x"] for row in curve["rows"]], [row[key] for row in curve["rows"]]
            x_ticks, y_ticks = ticks(0, max(xs)), ticks(0, max(ys))
            axes(canvas, left, top, width, height, [(x / x_ticks[-1], f"{x:g}") for x in x_ticks],
                 [(y / y_ticks[-1], f"{y:g}") for y in y_ticks], name, "", font)
            fit = "" if curve["exponents"][key] is None else f": x ^ {curve['exponents'][key]:.2f}"
            draw.text((left + width // 2, top - 14), unit + fit, INK, font, "mm")
            points = [(left + x / x_ticks[-1] * width, top + (1 - y / y_ticks[-1]) * height) for x, y in zip(xs, ys)]
            draw.line(points, COLOURS[line], 2)
            for x, y in points:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), COLOURS[line])
    save_image(canvas, path, "PNG")
