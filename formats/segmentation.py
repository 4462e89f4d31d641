"""The `segmentation` of a COCO annotation: a list of polygons [x, y, x, y, ...], or run lengths (RLE).

Some numbers make pycocotools end the process or take all memory, and it reads a list of 4 numbers as a box: it must be
given nothing that has a `flaw`. Sizes are (height, width) in pixels.
"""
import re
from collections.abc import Sequence

from pycocotools import mask as coco_mask

POINTS = 3   # a polygon has at least
FAR = 10     # longer sides of its image: nothing of a polygon is further from the corner
SHORT = f"have polygons of fewer than {POINTS} points beside others: these are left out"


def flaw(segmentation, size: Sequence[int]) -> str | None:
    """What is wrong with a segmentation for an image of `size`; None if it is sound.

    SHORT alone is no reason to refuse it. An empty list is no polygon at all, so ask about that before."""
    if type(segmentation) is dict:
        return rle_flaw(segmentation, size)
    if type(segmentation) is not list:
        return "neither polygons nor an RLE"
    limit = FAR * max(size)
    for polygon in segmentation:
        if type(polygon) is not list or not set(map(type, polygon)) <= {int, float}:
            return "not a list of polygons [x, y, x, y, ...]"
        # min and max may pass over NaN, the sum does not
        if polygon and not (-limit <= min(polygon) <= max(polygon) <= limit and sum(polygon) == sum(polygon)):
            return "coordinates that are not finite, or far outside of the image"
        if len(polygon) >= 2 * POINTS and len(polygon) % 2:
            return "a polygon with an odd number of coordinates"
    long = len(polygons(segmentation))
    return f"no polygon of {POINTS} points" if not long else SHORT if long < len(segmentation) else None


def rle_flaw(rle: dict, size: Sequence[int]) -> str | None:
    counts, text = rle.get("counts"), type(rle.get("counts")) is str
    if type(rle.get("size")) is not list or not text and type(counts) is not list:
        return "neither polygons nor an RLE"
    if rle["size"] != list(size):
        return "an RLE of another size than the image"
    # 5 bits a character, at most 7 characters a count, the last of which is under "P"
    sound = re.fullmatch("([P-o]{0,6}[0-O])*", counts) if text else set(map(type, counts)) <= {int}
    counts = run_lengths(counts) if sound and text else counts
    if not sound or min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
        return "an RLE whose counts are not those of a mask of this size"
    return None


def run_lengths(text: str) -> list[int]:
    """The counts of an RLE from pycocotools' text for them: each is written with the lowest 5 bits first, and from the
    fourth on less the count two before."""
    counts, value, shift = [], 0, 0
    for code in text.encode():
        value |= (code - 48 & 31) << shift
        shift += 5
        if code < 80:                                                      # the last of its count
            value -= (code - 48 & 16) << shift - 4                         # which begins with the sign
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    return counts


def polygons(segmentation: list[list[float]]) -> list[list[float]]:
    """Those that have POINTS points."""
    return [polygon for polygon in segmentation if len(polygon) >= 2 * POINTS]


def compressed(segmentation, size: Sequence[int]) -> dict:
    """pycocotools' RLE of a segmentation without a flaw, or of an empty list, which is an empty mask."""
    if not segmentation:
        segmentation = {"counts": [size[0] * size[1]]}
    if type(segmentation) is list:
        return coco_mask.merge(coco_mask.frPyObjects(polygons(segmentation), *size))
    counts = segmentation["counts"]
    return (coco_mask.frPyObjects({"size": size, "counts": counts}, *size) if type(counts) is list
            else {"size": list(size), "counts": counts.encode()})
