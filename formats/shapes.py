"""The data set `shapes`: drawn images with exact masks, in COCO layout. Not from the paper.

With it all of the code can be tried within minutes and without a download. An image has 1 to 8 solid objects of six
classes, rotated at random, from a seventh to six tenths of its side, later ones in front of earlier ones. What makes
masks hard to learn from boxes is independent of the class: textures, two colours, shading, clutter, and colours close
to the background. So every class has high-contrast and camouflaged objects. No object has a hole, since losses from
boxes alone cannot find holes.

Lengths are in pixels; those for a 128-pixel image are multiplied by `unit` = size / 128. Points and directions are
(x, y); arrays are indexed [row, column].
"""
import functools
import json
import math
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as rle
from tqdm import tqdm

from formats.coco import DataError
from formats.files import write_whole
from formats.pictures import save_image

SPLITS = ("train", "val")
SUPERSAMPLE = 4      # outlines are filled on a grid this much finer, for soft edges and masks exact to the pixel
MIN_VISIBLE = 0.7    # share of each object's area that must stay visible
MIN_PIXELS = 20      # smallest visible part of an object
TRIES = 12           # placements of an object before it is left out


def write_shapes(root: str | os.PathLike, train: int = 3000, val: int = 200, size: int = 128,
                 seed: int = 0) -> None:
    """Write `train` + `val` images of size x size pixels in the layout of COCO 2017.

    Image i of a split is a function of (seed, split, i) and size, so a smaller set is the beginning of a larger one.
    The folder appears when it is complete. Raises DataError if a value is out of range or root is not empty or cannot
    be written."""
    if train < 1 or val < 1 or seed < 0:
        raise DataError(f"shapes: needs train >= 1, val >= 1 and seed >= 0, not {train}, {val} and {seed}")
    if size < 64:
        raise DataError(f"shapes: size {size} is too small for the objects; use 64 or more")
    root = Path(root).resolve()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DataError(f"{root}: exists and is not an empty folder; remove it or name another")
    unfinished = root.with_name(f"{root.name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        for split, count in zip(SPLITS, (train, val)):
            write_split(unfinished, split, count, size, seed)
        unfinished.rename(root)
    except OSError as error:
        raise DataError(f"{root}: cannot write the shapes: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_split(root: Path, split: str, count: int, size: int, seed: int) -> None:
    """Write one split: its images (on all cores) and its annotation file."""
    (root / "annotations").mkdir(exist_ok=True)
    folder = root / f"{split}2017"
    folder.mkdir()
    write = functools.partial(write_image, folder, seed, SPLITS.index(split), size)
    with multiprocessing.Pool() as pool:
        drawn = pool.imap(write, range(count), chunksize=16)
        per_image = list(tqdm(drawn, f"drawing {split}", count, disable=None))
        pool.close()
        pool.join()  # let the workers finish: leaving the block would terminate them
    annotations = [annotation for image in per_image for annotation in image]
    images = [{"id": i + 1, "file_name": file_name(i), "width": size, "height": size} for i in range(count)]
    categories = [{"id": k + 1, "name": name, "supercategory": "shape"} for k, name in enumerate(CLASSES)]
    content = {
        "info": {"description": "shapes: drawn images with exact masks", "seed": seed},
        "licenses": [],
        "categories": categories,
        "images": images,
        "annotations": [{"id": k + 1, **annotation} for k, annotation in enumerate(annotations)],
    }
    write_whole(root / "annotations" / f"instances_{split}2017.json", json.dumps(content).encode())


def file_name(index: int) -> str:
    return f"{index + 1:012d}.jpg"


def write_image(folder: Path, seed: int, split: int, size: int, index: int) -> list[dict]:
    """Draw and write image `index`. Returns its annotations, without ids."""
    image, owner, labels = draw_image(np.random.default_rng([seed, split, index]), size)
    save_image(Image.fromarray(image), folder / file_name(index), "JPEG", quality=95, subsampling=0)
    return [{"image_id": index + 1, **annotation} for annotation in annotate(owner, labels)]


def annotate(owner: np.ndarray, labels: list[int]) -> list[dict]:
    """COCO annotations of the visible parts: object k is seen where owner (H, W) is k + 1."""
    annotations = []
    for k, label in enumerate(labels):
        mask = owner == k + 1
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        segmentation = rle.encode(np.asfortranarray(mask, np.uint8))
        annotations.append({
            "category_id": label + 1,
            "bbox": [int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1],
            "area": int(mask.sum()),
            "segmentation": {"size": segmentation["size"], "counts": segmentation["counts"].decode("ascii")},
            "iscrowd": 0,
        })
    return annotations


def draw_image(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Image (size, size, 3) uint8; owner (size, size) uint8, 1 + the object seen there, or 0; labels of the objects."""
    objects, owner = place_objects(rng, size)
    canvas = draw_background(rng, size)
    light = direction(rng).tolist()  # one for the whole image
    for shape in objects:
        paint(rng, canvas, shape, light, size / 128)
    canvas += rng.uniform(1, 5) * rng.standard_normal((size, size, 1), np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8), owner, [shape.label for shape in objects]


# ------------------------------------------------------------------------------------------- placement

class Shape(NamedTuple):
    label: int                   # index into CLASSES
    centre: tuple[float, float]  # (x, y), pixels
    radius: float                # pixels, to the farthest point of the outline
    area: float                  # pixels, including what is hidden or cut off
    window: tuple[slice, slice]  # rows and columns of the image that the outline reaches
    coverage: np.ndarray         # (h, w) float32: the share of each pixel of the window that is inside, 0..1


def place_objects(rng: np.random.Generator, size: int) -> tuple[list[Shape], np.ndarray]:
    """1 to 8 objects from back to front, each visible enough, and their owner map (see `draw_image`)."""
    objects, owner = [], np.zeros((size, size), np.uint8)
    for label in rng.integers(len(CLASSES), size=rng.integers(1, 9)):
        for _ in range(TRIES):
            shape = make_object(rng, int(label), size)
            candidate = owner.copy()
            candidate[shape.window][shape.coverage >= 0.5] = len(objects) + 1
            visible = np.bincount(candidate.ravel(), minlength=len(objects) + 2)[1:]
            areas = np.array([other.area for other in (*objects, shape)])
            if (visible >= np.maximum(MIN_VISIBLE * areas, MIN_PIXELS)).all():
                objects.append(shape)
                owner = candidate
                break
    return objects, owner


def make_object(rng: np.random.Generator, label: int, size: int) -> Shape:
    """An object with random position, size, aspect and rotation."""
    points = OUTLINES[CLASSES[label]](rng) * (1, rng.uniform(0.75, 1))
    along = direction(rng)
    points = points @ np.array([along, (-along[1], along[0])])
    radius = size * (0.075 + 0.245 * rng.random())
    points *= radius / np.hypot(*points.T).max()
    x, y = points.T
    area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2  # the shoelace formula
    centre = rng.uniform(0.6 * radius, size - 0.6 * radius, 2)  # hardly ever cut beyond recognition
    window, coverage = fill(points + centre, size)
    return Shape(label, tuple(centre.tolist()), radius, area, window, coverage)


def fill(points: np.ndarray, size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """Window and coverage (see Shape) of a polygon (n, 2) in pixels of the image."""
    low = np.clip(np.floor(points.min(0)), 0, size - 1).astype(int)
    high = np.clip(np.ceil(points.max(0)), low + 1, size).astype(int)
    fine = Image.new("L", tuple(((high - low) * SUPERSAMPLE).tolist()))
    corners = (points - low) * SUPERSAMPLE - 0.5  # for PIL whole numbers are the centres of pixels
    ImageDraw.Draw(fine).polygon(corners.ravel().tolist(), fill=255)
    coverage = np.asarray(fine.reduce(SUPERSAMPLE), np.float32) / 255
    return (slice(low[1], high[1]), slice(low[0], high[0])), coverage


def direction(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * math.pi)
    return np.array([math.cos(angle), math.sin(angle)])


# -------------------------------------------- outlines: polygons (n, 2) around the origin, any scale

def arc(start: float, stop: float, count: int) -> np.ndarray:
    """`count` points on the unit circle from angle start to angle stop (radians, excluded)."""
    angles = np.linspace(start, stop, count, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def ellipse(rng):
    return arc(0, 2 * math.pi, 48) * (1, rng.uniform(0.6, 1))


def rectangle(rng):
    return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (1, rng.uniform(0.4, 1))


def triangle(rng):
    angles = np.radians([90, 210, 330]) + rng.uniform(-0.35, 0.35, 3)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def star(rng):
    tips = int(rng.integers(5, 7))
    points = arc(0, 2 * math.pi, 2 * tips)
    points[1::2] *= rng.uniform(0.42, 0.58)
    return points


def cross(rng):
    a = rng.uniform(0.25, 0.42)
    arm = np.array([(1, -a), (1, a), (a, a)])
    turns = [np.array([(c, s), (-s, c)]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return np.concatenate([arm @ turn for turn in turns])


def crescent(rng):
    """The unit disc without a second disc of `radius` whose centre is `shift` to the right."""
    radius, shift = rng.uniform(0.75, 0.95), rng.uniform(0.45, 0.65)
    x = (1 - radius ** 2 + shift ** 2) / (2 * shift)  # where the circles meet
    outer, inner = math.acos(x), math.acos((x - shift) / radius)
    back = arc(2 * math.pi - inner, inner, 24) * radius + (shift, 0)
    return np.concatenate([arc(outer, 2 * math.pi - outer, 32), back])


OUTLINES = {f.__name__: f for f in (ellipse, rectangle, triangle, star, cross, crescent)}
CLASSES = tuple(OUTLINES)


# ------------------------------------------------------------------------------------------ appearance

def draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Clutter without an outline that resembles an object's: (size, size, 3) float32 in 0..255."""
    coarse = 32  # smooth parts are drawn on a small grid and enlarged
    x, y = np.meshgrid(np.linspace(-1, 1, coarse), np.linspace(-1, 1, coarse))
    first, second = random_colour(rng), random_colour(rng)
    a, b = direction(rng)
    ramp = (a * x + b * y + 1.4) / 2.8
    canvas = first + (second - first) * rng.uniform(0.2, 1) * ramp[..., None]
    for _ in range(rng.integers(0, 5)):
        (a, b), spread = rng.uniform(-1, 1, 2), rng.uniform(0.15, 0.5)
        blob = rng.uniform(0.4, 0.9) * np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * spread ** 2))
        canvas += blob[..., None] * (random_colour(rng) - canvas)
    cells = int(rng.integers(4, 17))
    noise = rng.normal(0, rng.uniform(0, 20), (cells, cells, 3)).clip(-127, 127) + 128
    canvas += np.asarray(enlarge(noise, coarse), np.float32) - 128
    image = enlarge(canvas, 2 * size)
    draw_strokes(rng, image)
    canvas = np.asarray(image.reduce(2), np.float32).copy()
    if rng.random() < 0.25:
        rows, columns = np.mgrid[:size, :size].astype(np.float32) - size / 2
        contrast = rng.normal(0, 14, 3).astype(np.float32)
        canvas += contrast * pattern(rng, columns, rows, size / 128, size / 2)[..., None]
    return canvas


def enlarge(array: np.ndarray, side: int) -> Image.Image:
    """A smooth image of side x side from (h, w, 3) values of 0..255."""
    image = Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))
    return image.resize((side, side), Image.Resampling.BICUBIC)


def draw_strokes(rng: np.random.Generator, image: Image.Image) -> None:
    """Draw thin, long, bent lines in any colour into the image; thick or short ones would resemble crescents."""
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 6)):
        heading = rng.uniform(0, 2 * math.pi) + np.cumsum(rng.normal(0, 0.3, 10))
        steps = np.stack([np.cos(heading), np.sin(heading)], 1) * rng.uniform(0.04, 0.1) * image.width
        points = np.cumsum(steps, 0) + rng.uniform(0, image.width, 2)
        colour = tuple(random_colour(rng).astype(int).tolist())
        width = max(2, round(rng.uniform(0.6, 1.5) * image.width / 128))
        pen.line(points.ravel().tolist(), colour, width, joint="curve")


def random_colour(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(15, 240, 3).astype(np.float32)


def paint(rng: np.random.Generator, canvas: np.ndarray, shape: Shape, light: list[float],
          unit: float) -> None:
    """Draw one object on the canvas (H, W, 3), in place: two colours mixed by a pattern, then shaded."""
    patch = canvas[shape.window]
    rows, columns = (np.arange(s.start, s.stop, dtype=np.float32) + 0.5 for s in shape.window)
    x, y = np.meshgrid(columns - shape.centre[0], rows - shape.centre[1])
    first, second = object_colours(rng, patch[shape.coverage >= 0.5].mean(0))
    colour = first + (second - first) * pattern(rng, x, y, unit, shape.radius)[..., None]
    shade = 1 + rng.uniform(0, 0.4) * (x * light[0] + y * light[1]) / shape.radius
    patch += shape.coverage[..., None] * (colour * shade[..., None] - patch)


def object_colours(rng: np.random.Generator, beneath: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two colours for an object over the mean colour `beneath`: most contrast with it, some hardly do."""
    if rng.random() < 0.15:
        first = beneath + rng.normal(0, 16, 3)
    else:
        first = max((random_colour(rng) for _ in range(2)), key=lambda colour: np.abs(colour - beneath).sum())
    second = random_colour(rng) if rng.random() < 0.35 else first + rng.normal(0, 30, 3)
    return first.astype(np.float32), second.astype(np.float32)


def pattern(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, unit: float, radius: float) -> np.ndarray:
    """The share of the second colour in each pixel, 0..1; x, y (h, w) in pixels from the middle."""
    kinds = ["plain", "ramp", "halves", "stripes", "checks", "speckle"]
    kind = rng.choice(kinds, p=[0.4, 0.2, 0.12, 0.12, 0.08, 0.08])
    if kind == "plain":
        return np.zeros_like(x)
    if kind == "speckle":
        return (rng.random(x.shape, np.float32) < 0.3).astype(np.float32)
    a, b = direction(rng).tolist()
    along, across = a * x + b * y, a * y - b * x
    if kind == "ramp":
        return np.clip(0.5 + along / (2 * radius), 0, 1)
    if kind == "halves":
        return np.clip(0.5 + along - rng.uniform(-0.4, 0.4) * radius, 0, 1)
    wave = 2 * math.pi / (rng.uniform(4, 12) * unit)
    if kind == "stripes":
        return np.clip(0.5 + 2 * np.sin(along * wave), 0, 1)
    return np.clip(0.5 + 3 * np.sin(along * wave) * np.sin(across * wave), 0, 1)
