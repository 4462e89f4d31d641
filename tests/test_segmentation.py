"""formats/segmentation.py: sound forms of `segmentation` are told from flawed ones, and pycocotools survives them."""
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from formats.segmentation import SHORT, compressed, flaw, polygons, run_lengths
from helpers import rle

SIZE = (20, 30)
SQUARE = [2, 3, 12, 3, 12, 11, 2, 11]
NAN, INF = float("nan"), float("inf")
PICTURE = np.zeros(SIZE, np.uint8)
PICTURE[3:11, 2:12] = 1
COUNTS = run_lengths(rle(PICTURE)["counts"])


def text(*counts: int) -> str:
    """pycocotools' text of run lengths that need not be those of a mask."""
    codes = []
    for i, count in enumerate(counts):
        count -= counts[i - 2] if i > 2 else 0
        more = True
        while more:
            low, count = count & 31, count >> 5
            more = count != (-1 if low & 16 else 0)
            codes.append(chr(48 + low + 32 * more))
    return "".join(codes)


@pytest.mark.parametrize("segmentation", [
    [SQUARE], [SQUARE, [15, 15, 20, 15, 20, 19]], [[2.5, 3, 12, 3.25, 12, 11]], [[-40, -40, 60, -40, 60, 60]],
    rle(PICTURE), rle(np.zeros(SIZE)), rle(np.ones(SIZE)), {"size": [20, 30], "counts": COUNTS},
    {"size": [20, 30], "counts": [600]}, {"size": [20, 30], "counts": [0, 600]},
    {"size": [20, 30], "counts": [10, 0, 0, 590]}, {"size": [20, 30], "counts": text(10, 0, 0, 590)}])
def test_sound_ones(segmentation):
    assert flaw(segmentation, SIZE) is None and flaw(segmentation, list(SIZE)) is None
    assert coco_mask.decode(compressed(segmentation, SIZE)).shape == SIZE


@pytest.mark.parametrize("segmentation, part", [
    ("text", "neither"), ("", "neither"), (7, "neither"), (True, "neither"), ({}, "neither"),
    ({"counts": [600]}, "neither"), ({"size": [20, 30]}, "neither"), ({"size": 20, "counts": [600]}, "neither"),
    ({"size": [20, 30], "counts": None}, "neither"), ({"size": [20, 30], "counts": {}}, "neither"),
    (SQUARE, "list of polygons"), ([[[2, 3], [12, 3], [12, 11]]], "list of polygons"), ([None], "list of polygons"),
    ([list(map(str, SQUARE))], "list of polygons"), ([SQUARE, "x"], "list of polygons"),
    ([[*SQUARE[:-1], None]], "list of polygons"), ([[*SQUARE[:-1], True]], "list of polygons"),
    ([{"x": 1}], "list of polygons"), ([SQUARE[:7]], "odd"), ([SQUARE, SQUARE[:7]], "odd"),
    ([[]], "3 points"), ([[2, 3, 12, 11]], "3 points"), ([[2, 3, 12, 11], [2, 3, 12, 11]], "3 points"),
    ([[2, 3], [12, 3], [12, 11]], "3 points"),
    ([[NAN, *SQUARE[1:]]], "not finite"), ([[*SQUARE[:-1], NAN]], "not finite"), ([[*SQUARE[:-1], INF]], "not finite"),
    ([[*SQUARE[:-1], -INF]], "not finite"), ([[*SQUARE[:-1], 1e9]], "far outside"), ([SQUARE, [NAN, 2]], "not finite"),
    ([[*SQUARE[:-1], 10**400]], "far outside"), ([[*SQUARE[:-1], -301]], "far outside"),
    (rle(PICTURE.T), "another size"), (rle(PICTURE[::2, ::2]), "another size"),
    ({"size": [30, 20], "counts": COUNTS}, "another size"), ({"size": [20], "counts": [20]}, "another size"),
    ({"size": ["20", "30"], "counts": COUNTS}, "another size"), ({"size": [NAN, 30], "counts": [600]}, "another size"),
    *(({"size": [20, 30], "counts": counts}, "counts") for counts in (
        [], [601], [599], [-1, 601], [10, -10, 600], [2**40], [300, 300.0], ["600"], [[600]], [None], [600, False],
        "", "garbage", "@@@@", "ü", "\0", "PPPPPPPPPPPP", "o" * 50, rle(PICTURE)["counts"][:-1],
        text(600)[:-1] + "P" * 8 + "0", rle(PICTURE)["counts"] + "P",
        rle(PICTURE)["counts"] + "1", text(601), text(-1, 601), text(10, -10, 600),
        text(0, 2**34, 600), text(2**32, 600 - 2**32), rle(PICTURE)["counts"] + "\n"))])
def test_flawed_ones(segmentation, part):
    assert part in flaw(segmentation, SIZE)


def test_short_polygons_are_left_out_beside_others():
    for short in ([], [5], [5, 5], [2, 3, 12, 11]):
        for segmentation in ([SQUARE, short], [short, SQUARE]):
            assert flaw(segmentation, SIZE) == SHORT and polygons(segmentation) == [SQUARE]
            assert (coco_mask.decode(compressed(segmentation, SIZE)) == PICTURE).all()


def test_masks_and_their_run_lengths():
    """Of every form, and with counts of one character to several and of either sign."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(1, 90, 2).tolist()
        mask = (rng.random((height, width)) < rng.choice([0, 0.01, 0.5, 0.99, 1])).astype(np.uint8)
        segmentation = rle(mask)
        counts = run_lengths(segmentation["counts"])
        assert text(*counts) == segmentation["counts"] and flaw(segmentation, (height, width)) is None
        pixels = np.concatenate([np.full(count, i % 2) for i, count in enumerate(counts)])
        assert (pixels.reshape(width, height).T == mask).all()
        for form in (segmentation, {"size": [height, width], "counts": counts}):
            assert (coco_mask.decode(compressed(form, (height, width))) == mask).all()
    assert (coco_mask.decode(compressed([SQUARE], SIZE)) == PICTURE).all()
    assert not coco_mask.decode(compressed([], SIZE)).any()
    large = np.zeros((3000, 2000), np.uint8)
    large[1500:, 1000:] = 1
    assert flaw(rle(large), large.shape) is None


def test_garbage_never_reaches_pycocotools():
    """What has no flaw is decoded to a mask of the size, whatever the text or the polygon."""
    rng, sound = np.random.default_rng(1), 0
    for _ in range(20_000):
        size = tuple(rng.integers(1, 4, 2).tolist())
        garbage = {"size": list(size), "counts": "".join(map(chr, rng.integers(46, 60, rng.integers(1, 4))))}
        if flaw(garbage, size) is None:
            sound += 1
            assert coco_mask.decode(compressed(garbage, size)).shape == size
    assert 100 < sound < 10_000
    for _ in range(300):
        size = tuple(rng.integers(1, 40, 2).tolist())
        limit = 10 * max(size)
        wild = [rng.uniform(-limit, limit, 2 * rng.integers(3, 9)).tolist() for _ in range(2)]
        assert flaw(wild, size) is None and coco_mask.decode(compressed(wild, size)).shape == size
