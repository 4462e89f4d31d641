"""runlengths.py: what it makes of a window is what pycocotools makes of the whole image."""
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from runlengths import decode, encode


def of_the_whole(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


@pytest.mark.parametrize("seed", range(200))
def test_a_window_is_encoded_as_its_image_would_be(seed):
    """Windows of any height and width, also none and all of the image's, with any share of their pixels set."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 12, 2).tolist()
    h, w = (int(rng.choice([0, n, rng.integers(n + 1)])) for n in (height, width))
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    mask = np.zeros((height, width), bool)
    mask[top:top + h, left:left + w] = rng.random((h, w)) < rng.choice([0, 0.1, 0.5, 0.9, 1])
    rle = encode(mask[top:top + h, left:left + w].T, left, top, (height, width))
    assert rle == of_the_whole(mask)
    assert np.array_equal(decode([rle], (height, width))[0].numpy(), mask)


def test_columns_that_touch_at_the_images_edges():
    """A run that goes on from the bottom of a column to the top of the next; a window that only reaches one edge."""
    mask = np.zeros((4, 6), bool)
    mask[:, 1:3] = mask[2:, 4] = mask[:2, 5] = True
    assert encode(mask[:, 1:].T, 1, 0, (4, 6)) == of_the_whole(mask)
    mask[0] = False
    assert encode(mask[1:, 1:].T, 1, 1, (4, 6)) == of_the_whole(mask)


def test_one_pixel_the_whole_image_and_a_large_one():
    assert encode(np.ones((1, 1), bool), 0, 0, (1, 1)) == of_the_whole(np.ones((1, 1)))
    assert encode(np.ones((70, 50), bool), 0, 0, (50, 70)) == of_the_whole(np.ones((50, 70)))
    pixel = encode(np.ones((1, 1), bool), 5999, 3999, (4000, 6000))
    assert coco_mask.area(pixel) == 1 and coco_mask.toBbox(pixel).tolist() == [5999, 3999, 1, 1]


def test_no_mask_has_a_shape():
    assert decode([], (3, 5)).shape == (0, 3, 5) and decode([], (3, 5)).dtype == torch.bool
