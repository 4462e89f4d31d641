"""formats/conventions.py: boxes of another convention are recognised by what contradicts them, and sound ones never."""
import numpy as np
import pytest

from formats.conventions import extent, other_convention
from helpers import rle

SIZE = np.array([120, 160])


def xywh_boxes(count: int = 40, size=SIZE, seed: int = 0) -> np.ndarray:
    """Boxes (count, 4) of at least 2 pixels, anywhere in their images."""
    rng = np.random.default_rng(seed)
    limits = np.array(size)[::-1]
    sides = 2 + rng.random((count, 2)) * (limits - 2) * 0.8
    return np.concatenate([rng.random((count, 2)) * (limits - sides), sides], 1)


def written(boxes: np.ndarray, form: str, unit: str, size=SIZE) -> np.ndarray:
    """xywh boxes in pixels as another convention has them."""
    scale = np.array(size)[::-1] / {"pixels": size[::-1], "percent": 100, "fractions": 1}[unit]
    x, y, w, h = (boxes / np.tile(scale, 2)).T
    return np.stack({"xywh": (x, y, w, h), "xyxy": (x, y, x + w, y + h),
                     "cxcywh": (x + w / 2, y + h / 2, w, h)}[form], 1)


def guess(bbox, areas=None, extents=None, size=SIZE) -> str | None:
    m = len(bbox)
    answer = other_convention(np.array(bbox, float), np.tile(size, (m, 1)),
                              np.full(m, np.nan) if areas is None else np.array(areas, float),
                              np.full((m, 4), np.nan) if extents is None else np.array(extents, float))
    return answer and answer[0]


def evidence(boxes: np.ndarray) -> dict[str, dict]:
    """What a file may say beside its xywh boxes: areas of boxes or of masks, masks, all or nothing."""
    shares = np.random.default_rng(5).uniform(0.4, 1, len(boxes))
    areas, extents = boxes[:, 2:].prod(1), np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    return {"area of boxes": {"areas": areas}, "area of masks": {"areas": areas * shares},
            "masks": {"extents": extents}, "both": {"areas": areas * shares, "extents": extents}, "none": {}}


FORMS = [(form, unit) for form in ("xywh", "xyxy", "cxcywh") for unit in ("pixels", "percent", "fractions")]


@pytest.mark.parametrize("form, unit", FORMS[1:])
@pytest.mark.parametrize("known", ["masks", "both"])
def test_masks_tell_every_convention(form, unit, known):
    boxes = xywh_boxes()
    answer = guess(written(boxes, form, unit), **evidence(boxes)[known])
    assert answer.startswith(form) and unit in answer


@pytest.mark.parametrize("form, unit, known", [
    ("xyxy", "pixels", "area of boxes"), ("xywh", "percent", "area of boxes"), ("xywh", "fractions", "area of boxes"),
    ("xyxy", "fractions", "area of masks"), ("cxcywh", "fractions", "area of masks"),
    ("xyxy", "pixels", "none"), ("cxcywh", "pixels", "none"), ("xywh", "fractions", "none")])
def test_areas_and_edges_tell_some(form, unit, known):
    boxes = xywh_boxes(200)
    answer = guess(written(boxes, form, unit), **evidence(boxes)[known])
    assert answer.startswith(form) and unit in answer


def test_an_area_of_the_four_numbers_themselves_tells_nothing():
    """A program that takes corners for xywh writes their area, too."""
    boxes = written(xywh_boxes(200), "xyxy", "pixels")
    assert guess(boxes, areas=boxes[:, 2:].prod(1)).startswith("xyxy")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [(120, 160), (8, 6), (100, 100), (1, 1), (30, 400)])
def test_sound_boxes_raise_no_suspicion(size, seed):
    """Nor rounded ones, whole images, boxes from a corner, or those that reach out a little."""
    boxes = xywh_boxes(12, size, seed)
    height, width = size
    for some in (boxes, boxes.round(), np.tile([0, 0, width, height], (12, 1)), boxes * (0, 0, 1, 1),
                 np.tile([1, 1, width, height], (12, 1)),
                 np.concatenate([(boxes[:, :2] - 1), boxes[:, 2:] + 2], 1), boxes[:1], boxes[:0].reshape(0, 4)):
        for known in evidence(some.astype(float)).values():
            assert guess(some, **known, size=size) is None, known


def test_a_few_bad_boxes_among_sound_ones_are_none_of_its_business():
    boxes = xywh_boxes(40)
    some = boxes.copy()
    some[:19] = written(boxes, "xyxy", "pixels")[:19]
    assert guess(some, **evidence(boxes)["masks"]) is None
    boxes[:30, 2] += 160                                             # three quarters reach far out
    assert guess(boxes) is None


def test_how_much_the_edges_must_show():
    """Corners read as xywh: the first box stays in its image, the second does not."""
    inside, out = [10, 10, 40, 40], [100, 50, 150, 110]
    assert guess([inside] * 8 + [out] * 7) is None and guess([inside] * 7 + [out] * 7).startswith("xyxy")
    assert guess([out] * 2) is None and guess([out] * 3).startswith("xyxy")
    assert guess([inside] * 10 + [[40, 40, 10, 10]] + [out] * 10) is None            # which corners cannot be
    assert guess([[30, 30, 60, 60]] * 12, size=(50, 50)) is None                       # might be percent, or nonsense


def test_areas_against_edges_and_alone():
    boxes = [[10, 10, 158, 118]] * 12
    assert guess(boxes).startswith("xyxy")
    assert guess(boxes, areas=[0.9 * 158 * 118] * 12) is None                          # too large for these corners
    large = xywh_boxes(size=(480, 640))
    assert guess(written(large, "xywh", "percent", (480, 640)), areas=0.7 * large[:, 2:].prod(1),
                 size=(480, 640)).endswith("percent of the image")
    assert guess([[10, 10, 40, 40]] * 12, areas=[900] * 12).startswith("xyxy")
    assert guess([[80, 60, 20, 20]] * 12, areas=[404] * 12) is None                    # rounded: nothing but xywh


def test_only_what_shows_it_is_named():
    boxes = xywh_boxes(40)
    boxes[3] = [0, 0, 50, 60]                                        # the same in both conventions
    _, shown = other_convention(written(boxes, "xyxy", "pixels"), np.tile(SIZE, (40, 1)), np.full(40, np.nan),
                                evidence(boxes)["masks"]["extents"])
    assert 3 not in shown and len(shown) > 30


def test_extents():
    assert np.isnan(extent(None, (9, 9))).all() and np.isnan(extent([], (9, 9))).all()
    assert extent([[1, 2, 5, 2, 5, 6], [7.5, 1, 8, 1, 8, 3], [0, 0]], (9, 9)) == [1, 1, 8, 6]
    mask = np.zeros((9, 12))
    assert np.isnan(extent(rle(mask), (9, 12))).all()
    mask[2:5, 3:10] = 1
    assert extent(rle(mask), (9, 12)) == [3, 2, 10, 5]
