"""masks.py: boxes at stride 4, pasting against its three-line definition, run lengths against pycocotools."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch.utils._python_dispatch import TorchDispatchMode

import masks as masks_module
from helpers import check, relative_error
from masks import aligned_bilinear, box_masks, cells, decode, encode, paste_masks


# ------------------------------------------------------------------------------------------------ stride 4


@pytest.mark.parametrize("size", [(1, 2), (3, 4), (32, 33), (34, 35), (57, 90)])
def test_cells_are_those_whose_pixel_is_in_the_image(size):
    assert cells(size) == tuple(len(range(2, n, 4)) for n in size)


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("name, prefix", [("07_color_similarity", ""), ("08_pseudo_losses", "bin_"),
                                          ("08_pseudo_losses", "soft_")])
def test_golden_07_08_box_masks(golden, name, prefix, image):
    d = golden(name)
    masks = box_masks(d[f"{prefix}boxes_{image}"], 32, 40)
    check(f"{name[:2]} boxes as masks", masks, d[f"{prefix}box_bitmasks_{image}"], 0)


def test_box_mask_by_hand():
    """Cells are pixels 2, 6, 10, ... A box from 2.9 to 9.0 covers pixels 2 ... 9, one from 3 to 9.99 pixels 3 ... 9."""
    masks = box_masks(torch.tensor([[2.9, 3.0, 9.0, 9.99], [0, 0, 0, 0]]), 3, 4)
    assert masks[0].int().tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert not masks[1].any()
    assert box_masks(torch.zeros(0, 4), 3, 4).shape == (0, 3, 4)


@pytest.mark.parametrize("case", range(4))
def test_golden_05_aligned_bilinear(golden, case):
    d = golden("05_aligned_bilinear")
    check("05 aligned bilinear", aligned_bilinear(d[f"x_{case}"], int(d[f"factor_{case}"])), d[f"y_{case}"], 1e-5)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_aligned_bilinear_keeps_a_ramp(factor):
    """Output cell p reads the input at (p - factor // 2) / factor, no farther than its border."""
    h, w = 5, 7
    ramp = 3 * torch.arange(h)[:, None] + torch.arange(w) * 1.0
    at = [((torch.arange(n * factor) - factor // 2) / factor).clamp(0, n - 1) for n in (h, w)]
    large = aligned_bilinear(ramp[None, None], factor)[0, 0]
    assert relative_error(large, 3 * at[0][:, None] + at[1]) <= 1e-6


# ------------------------------------------------------------------------------------------------ the image


def rectangle_logits(box, size, padded, scale):
    """A mask at stride 4 of a padded input whose probability is 1/2 on the outline of `box` (pixels of the output)."""
    y, x = ((torch.arange(n // 4) * 4 + 2.5) * s for n, s in zip(padded, scale))  # middles of 4i + 2
    across, down = torch.minimum(x - box[0], box[2] - x), torch.minimum(y - box[1], box[3] - y)
    depth = torch.minimum(across[None, :], down[:, None])
    return torch.logit((0.5 + depth / 100).clamp(0.01, 0.99))[None]


@pytest.mark.parametrize("output_size", [(200, 280), (300, 420), (300, 560), (100, 140)])
def test_a_rectangle_is_pasted_in_its_place(output_size):
    """Input 200 x 280, padded to 224 x 288. The sides of the outline are exact to the pixel, its corners are round."""
    size, padded = (200, 280), (224, 288)
    scale = [out / inside for out, inside in zip(output_size, size)]
    box = [int(v) for v in (60 * scale[1], 40 * scale[0], 230 * scale[1], 150 * scale[0])]
    rles, quality = paste_masks(rectangle_logits(box, size, padded, scale), size, output_size)
    masks = decode(rles, output_size)
    expected = torch.zeros(output_size, dtype=torch.bool)
    expected[box[1]:box[3], box[0]:box[2]] = True
    assert masks.shape == (1, *output_size)
    assert torch.equal(masks[0].any(0), expected.any(0)) and torch.equal(masks[0].any(1), expected.any(1))
    union = (masks[0] | expected).sum()
    assert (masks[0] & expected).sum() / union > 0.99 and 0.5 < quality[0] <= 1


def test_a_mask_of_one_half_is_empty():
    """The threshold is strict, and an empty mask has quality 0."""
    rles, quality = paste_masks(torch.zeros(1, 8, 8), (30, 32), (30, 32))
    assert not decode(rles, (30, 32)).any() and quality.tolist() == [0]


@pytest.mark.parametrize("output_size", [(57, 90), (200, 333), (19, 30), (1, 1), (58, 29)])
def test_pasting_is_its_three_line_definition(output_size):
    """Sparse, dense, empty and full masks, single cells at corners and in the padding, enlarged and reduced."""
    size, g = (57, 90), torch.Generator().manual_seed(0)
    logits = torch.cat([torch.randn(3, 16, 24, generator=g) - torch.tensor([3.0, 0, -3]).view(3, 1, 1),
                        torch.full((6, 16, 24), -4.0), torch.full((1, 16, 24), 4.0)])
    for k, (row, column) in enumerate([(0, 0), (14, 22), (15, 23), (5, 9), (0, 22)], start=3):
        logits[k, row, column] = 5
    rles, quality = paste_masks(logits, size, output_size)

    p = aligned_bilinear(logits.sigmoid()[None], 4)
    p = p[..., :size[0], :size[1]]
    p = F.interpolate(p, size=output_size, mode="bilinear")[0]
    masks = p > 0.5

    clear = (p - 0.5).abs() > 1e-6  # elsewhere the last digit decides
    assert (decode(rles, output_size) == masks)[clear].all() and clear.float().mean() > 0.9999
    assert masks[9].all() and not masks[5].any()
    assert relative_error(quality, (p * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)) <= 1e-6


def test_masks_cost_what_they_cover():
    """One mask of 3 x 3 cells and one empty mask, in an image of 40 x 40 pixels a cell."""
    class Computed(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            if function is torch.ops.aten.mm.default:
                self.numbers += out.numel()
            return out

    logits = torch.full((2, 32, 32), -4.0)
    logits[0, 10:13, 20:23] = 4
    with Computed() as computed:
        rles, _ = paste_masks(logits, (128, 128), (1280, 1280))
    pixels = decode(rles, (1280, 1280)).sum()
    assert pixels > 110 ** 2  # from the half of 4 cells to the half of 4 more
    assert pixels < computed.numbers < 170 ** 2 + 170 * 6  # 4 cells across, and what they are made of


def test_a_large_mask_is_computed_band_by_band_and_chunk_by_chunk(monkeypatch):
    logits = 3 * torch.randn(5, 16, 16, generator=torch.Generator().manual_seed(0))
    logits[3] = -9
    rles, quality = paste_masks(logits, (64, 50), (300, 400))
    monkeypatch.setattr(masks_module, "BAND", 7)
    monkeypatch.setattr(masks_module, "CHUNK_PIXELS", 2 * 300 * 400)
    bands, made, empty = [], [], torch.empty
    monkeypatch.setattr(torch, "gt", lambda *args, gt=torch.gt, **kw: bands.append(len(args[0])) or gt(*args, **kw))
    monkeypatch.setattr(torch, "empty", lambda n, **kw: made.append(n) or empty(n, **kw))
    again, q = paste_masks(logits, (64, 50), (300, 400))
    differing = decode(again, (300, 400)) != decode(rles, (300, 400))
    assert differing.sum() <= 3 and relative_error(q, quality) <= 1e-6  # of 600,000, some within a last digit of 1/2
    assert max(bands) == 7 and len(made) > 1 and 0 < max(made) <= 3 * 300 * 400 < sum(made)


def test_masks_are_cut_to_pixels():
    logits = torch.full((4, 16, 16), 2.0)
    within = torch.tensor([[3, 5, 30, 9], [0, 0, 70, 40], [8, 8, 8, 20], [69, 0, 70, 1]])
    rles, _ = paste_masks(logits, (64, 64), (40, 70), within=within)
    for mask, (x0, y0, x1, y1) in zip(decode(rles, (40, 70)), within.tolist()):
        expected = torch.zeros(40, 70, dtype=torch.bool)
        expected[y0:y1, x0:x1] = True
        assert torch.equal(mask, expected)


def test_autocast_does_not_move_masks():
    logits = 3 * torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    rles, quality = paste_masks(logits, (64, 50), (300, 400))
    with torch.autocast("cpu", torch.bfloat16):
        assert paste_masks(logits, (64, 50), (300, 400))[0] == rles


# ------------------------------------------------------------------------------------------------ run lengths


def encoded_by_pycocotools(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


@pytest.mark.parametrize("seed", range(200))
def test_a_window_is_encoded_as_its_image_would_be(seed):
    """Windows of any height and width, from nothing to the whole image, with any share of their pixels set."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 12, 2).tolist()
    h, w = (int(rng.choice([0, n, rng.integers(n + 1)])) for n in (height, width))
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    mask = np.zeros((height, width), bool)
    mask[top:top + h, left:left + w] = rng.random((h, w)) < rng.choice([0, 0.1, 0.5, 0.9, 1])
    rle = encode(mask[top:top + h, left:left + w].T, left, top, (height, width))
    assert rle == encoded_by_pycocotools(mask)
    assert np.array_equal(decode([rle], (height, width))[0].numpy(), mask)


def test_columns_that_touch_at_the_images_edges():
    """A run from the bottom of a column to the top of the next one; a window that reaches one edge only."""
    mask = np.zeros((4, 6), bool)
    mask[:, 1:3] = mask[2:, 4] = mask[:2, 5] = True
    assert encode(mask[:, 1:].T, 1, 0, (4, 6)) == encoded_by_pycocotools(mask)
    mask[0] = False
    assert encode(mask[1:, 1:].T, 1, 1, (4, 6)) == encoded_by_pycocotools(mask)


def test_one_pixel_the_whole_image_and_a_large_one():
    assert encode(np.ones((1, 1), bool), 0, 0, (1, 1)) == encoded_by_pycocotools(np.ones((1, 1)))
    assert encode(np.ones((70, 50), bool), 0, 0, (50, 70)) == encoded_by_pycocotools(np.ones((50, 70)))
    pixel = encode(np.ones((1, 1), bool), 5999, 3999, (4000, 6000))
    assert coco_mask.area(pixel) == 1 and coco_mask.toBbox(pixel).tolist() == [5999, 3999, 1, 1]


def test_no_mask_has_a_shape():
    assert decode([], (3, 5)).shape == (0, 3, 5) and decode([], (3, 5)).dtype == torch.bool
