"""losses.py: each loss beside its formula, its golden numbers and its properties."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses as losses_module
from assign import Targets, batch_instances, fcos_targets
from boxteacher import RAMPED
from helpers import check, head_maps, predictions_of, relative_error
from losses import (OFFSETS, MaskGrid, average_projection_loss, bce_loss, box_supervised_losses, centerness_of,
                    detection_losses, dice_loss, disagreement, giou_loss, mask_supervised_losses, mean_over_processes,
                    pair, pair_weights, projection_loss, refine, rgb_to_lab, similar_colors, similar_labels,
                    valid_cells, weighted_pairs)
from masks import box_masks
from model import STRIDES, build_model, make_locations, mask_logits
from recipe import Plan, ramp_factor

CPU = torch.device("cpu")
NEIGHBOURS = [(-2, -2), (-2, 0), (-2, 2), (0, -2), (0, 2), (2, -2), (2, 0), (2, 2)]  # as in the golden files
RELEASED_THRESHOLD = float(np.nextafter(np.float32(0.5), 0))  # > this is >= 0.5 in float32


def norm(x) -> torch.Tensor:
    return x.grad.norm()


def at_pairs(x: torch.Tensor, offset: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x (..., 8, h, w), a value for each cell and neighbour: the values of the pairs (i, j) at `offset`, and of
    (j, i)."""
    dy, dx = (2 * v // max(map(abs, offset)) for v in offset)  # at distance 1 their order is the same
    there, back = x[..., NEIGHBOURS.index((dy, dx)), :, :], x[..., NEIGHBOURS.index((-dy, -dx)), :, :]
    return pair(there, offset)[0], pair(back, offset)[1]


@pytest.fixture
def divisors(monkeypatch) -> list[torch.Tensor]:
    """The results of mean_over_processes, by which sums are divided, in the order of the code."""
    answers = []

    def recorded(*count):
        answers.append(mean_over_processes(*count))
        return answers[-1]

    monkeypatch.setattr(losses_module, "mean_over_processes", recorded)
    return answers


# -------------------------------------------------------------------------------------------------- detection


@pytest.mark.parametrize("empty", ["", "empty_"])
def test_golden_02_detection(golden, divisors, empty):
    d = golden("02_fcos_losses")
    maps = {name: head_maps(d, name) for name in ("logits", "ltrb_pred", "ctr_pred")}
    predictions = predictions_of(*maps.values())
    boxes, labels = [d["boxes_0"], d["boxes_1"]], [d["classes_0"], d["classes_1"]]
    if empty:
        boxes, labels = [b[:0] for b in boxes], [x[:0] for x in labels]
    targets = fcos_targets(predictions.locations, boxes, labels, 80)
    losses = detection_losses(predictions, targets)
    sum(losses.values()).backward()
    for name, theirs in (("loss_cls", "cls"), ("loss_box", "loc"), ("loss_centerness", "ctr")):
        check(f"02 {name}", losses[name], d[f"{empty}loss_fcos_{theirs}"], 1e-5)
    for name, leaves in zip(("logits", "ltrb", "ctr"), maps.values()):
        check(f"02 gradient norms of {name}", torch.stack([norm(x) for x in leaves]),
              d[f"{empty}gradnorm_{name}"], 1e-4)
    check("02 number of positives", (targets.boxes >= 0).sum(), d[f"{empty}num_pos"], 0)
    check("02 divisors, number of positives", divisors[0], d[f"{empty}num_pos"].clamp(min=1), 0)
    check("02 divisors, sum of centerness", divisors[1], d[f"{empty}ctr_target_sum_clamped"], 1e-5)


def test_golden_02_centerness(golden):
    d = golden("02_fcos_losses")
    locations = make_locations([(-(-192 // s), -(-256 // s)) for s in STRIDES], CPU)
    targets = fcos_targets(locations, [d["boxes_0"], d["boxes_1"]], [d["classes_0"], d["classes_1"]], 80)
    positive = [(targets.labels < 80) & (locations.level == i) for i in range(5)]
    ours = torch.cat([centerness_of(targets.ltrb[at]) for at in positive])  # level by level, as theirs
    check("02 centerness targets", ours, d["pos_ctr_targets"], 1e-5)
    image, location = (torch.cat(x) for x in zip(*(at.nonzero(as_tuple=True) for at in positive)))
    level_image_box = torch.stack([locations.level[location], image, targets.boxes[image, location]], 1)
    check("02 positives: level, image, box", level_image_box, d["pos_level_im_gt"], 0)
    check("02 positives: location", locations.xy[location], d["pos_locations"], 0)


def test_detection_by_hand():
    """One location, one class: focal 0.25 (1-p)^2 (-log p); centerness sqrt(1/3 * 1/2); boxes 3x3
    (overlap 3) of 4x3."""
    ltrb, target = torch.tensor([[1.0, 1, 2, 2]]), torch.tensor([[1.0, 1, 3, 2]])
    assert centerness_of(target).item() == pytest.approx(math.sqrt(1 / 6))
    assert giou_loss(ltrb, target).item() == pytest.approx(1 - 10 / 13)     # inside it: no part of C is waste
    assert giou_loss(torch.tensor([[0.0, 2, 1, 0]]), torch.tensor([[1.0, 0, 0, 2]])).item() == pytest.approx(
        1 - (1 / 5 - 4 / 8))                                                # apart: I 0, U 2 + 2, C 2 * 4
    undecided = torch.zeros(1, 1, 1, 1)
    predictions = predictions_of([undecided], [ltrb.view(1, 4, 1, 1)], [undecided])
    losses = detection_losses(predictions, Targets(torch.tensor([[0]]), target[None], torch.tensor([[0]])))
    assert losses["loss_cls"].item() == pytest.approx(0.25 * 0.25 * math.log(2))
    assert losses["loss_box"].item() == pytest.approx(3 / 13)               # the centerness weight cancels
    assert losses["loss_centerness"].item() == pytest.approx(math.log(2))


# ------------------------------------------------------------------------------------------ whole-mask losses


def test_golden_06_masks(golden):
    d = golden("06_mask_terms")
    logits, target = d["mask_logits"][:, 0].requires_grad_(), d["target"][:, 0]
    for name, loss in (("dice", dice_loss), ("projection", projection_loss),
                       ("average_projection", average_projection_loss)):
        check(f"06 {name}", loss(logits.sigmoid(), target), d[name], 1e-5)
    projection_loss(logits.sigmoid(), target).sum().backward()
    check("06 gradient norm of projection", norm(logits), d["gradnorm_projection"], 1e-4)


@pytest.mark.parametrize("distance", [1, 2])
def test_golden_06_pairs(golden, monkeypatch, distance):
    """Ours has pairs at distance 2, the authors' default; at 1 the same costs equal theirs.

    Near 0 the sum of three softplus has only an absolute precision, some 1e-6: compared with the largest term.
    """
    assert {max(map(abs, offset)) for offset in OFFSETS} == {2}
    d, offsets = golden("06_mask_terms"), [(dy * distance // 2, dx * distance // 2) for dy, dx in OFFSETS]
    monkeypatch.setattr(losses_module, "OFFSETS", offsets)
    logits, expected = d["mask_logits"][:, 0].requires_grad_(), d[f"pairwise_size3_dil{distance}"]
    costs = disagreement(logits)
    for term, offset in zip(costs, offsets):
        for ordered in at_pairs(expected, offset):
            check(f"06 pairs at distance {distance}", term, ordered, 1e-5)
    total = 2 * sum(term.double().sum() for term in costs)  # nothing left out: theirs is 0 beyond the border
    check(f"06 pairs at distance {distance}, sum", total, expected.double().sum(), 1e-5)
    if distance == 2:
        (2 * sum(term.sum() for term in costs)).backward()
        check("06 gradient norm of pairs", norm(logits), d["gradnorm_pairwise"], 1e-4)


def test_masks_by_hand():
    p, g = torch.tensor([[[0.5, 0.0], [1.0, 0.0]]]), torch.tensor([[[True, False], [True, False]]])
    assert dice_loss(p, g).item() == pytest.approx(1 - 3 / (1.25 + 2), abs=1e-5)
    # rows: maxima (0.5, 1) of (1, 1); columns: maxima (1, 0) of (1, 0)
    assert projection_loss(p, g).item() == pytest.approx(1 - 3 / 3.25, abs=1e-5)
    # rows: means (0.25, 0.5) of (0.5, 0.5); columns: (0.75, 0) of (1, 0)
    assert average_projection_loss(p, g).item() == pytest.approx(
        (1 - 0.75 / (0.3125 + 0.5)) + (1 - 1.5 / (0.5625 + 1)), abs=2e-5)
    assert bce_loss(torch.zeros(2, 3, 4), torch.ones(2, 3, 4)).tolist() == pytest.approx([math.log(2)] * 2)


def test_projection_is_zero_for_any_mask_that_fills_its_box():
    box = box_masks(torch.tensor([[8.0, 4, 43, 31]]), 12, 14)
    rows, columns = box[0].any(1), box[0].any(0)
    frame, half = box.clone(), box.clone()
    frame[0, 2:7, 3:10] = False                            # a hole: the shadows stay
    half[0, :, 6:] = False
    assert rows.sum() == 7 and columns.sum() == 9 and frame.sum() < box.sum()
    assert projection_loss(box.float(), box).abs() < 1e-5 and projection_loss(frame.float(), box).abs() < 1e-5
    assert projection_loss(half.float(), box) > 0.1        # too small
    assert projection_loss(torch.ones(1, 12, 14), box) > 0.1  # too large


# --------------------------------------------------------------------------------------------- pairs of cells


def test_disagreement_and_weights_equal_the_double_loop():
    """The sum over all cells i and their 8 neighbours j of similar(i, j) * inside_i * valid_j
    * -log(p_i p_j + (1-p_i)(1-p_j))."""
    generator = torch.Generator().manual_seed(0)
    logits, g = torch.randn(3, 5, 5, generator=generator) * 3, torch.rand(3, 5, 5, generator=generator)
    inside = torch.rand(3, 5, 5, generator=generator) > 0.4
    valid = torch.rand(2, 5, 5, generator=generator) > 0.3
    image = torch.tensor([0, 1, 1])
    p, total, count = logits.double().sigmoid(), torch.zeros(3).double(), torch.zeros(3).double()
    for k in range(3):
        for y in range(5):
            for x in range(5):
                for v, u in ((y + dy, x + dx) for dy, dx in NEIGHBOURS):
                    if not (0 <= v < 5 and 0 <= u < 5 and inside[k, y, x] and valid[image[k], v, u]):
                        continue
                    if g[k, y, x] * g[k, v, u] + (1 - g[k, y, x]) * (1 - g[k, v, u]) > 0.5:
                        a, b = p[k, y, x], p[k, v, u]
                        total[k] -= torch.log(a * b + (1 - a) * (1 - b))
                        count[k] += 1
    weights = pair_weights(similar_labels(g), MaskGrid(inside, valid, image))
    ours = weighted_pairs(disagreement(logits), weights, torch.arange(3))
    assert count.min() > 5
    assert relative_error(ours[0], total) <= 1e-5 and torch.equal(ours[1].double(), count)


def test_disagreement_is_finite_at_large_logits():
    signs = torch.tensor([[1.0, 1, 1, -1, -1, 0]]).T.expand(6, 6).contiguous()[None]
    logits = (100 * signs).requires_grad_()
    costs = disagreement(logits)
    sum(term.sum() for term in costs).backward()
    assert logits.grad.isfinite().all()
    down = costs[OFFSETS.index((2, 0))][0, :, 0]  # pairs of rows 0-2, 1-3, 2-4, 3-5
    assert down.tolist() == pytest.approx([0, 100 - math.log(2), 100 - math.log(2), math.log(2)], abs=1e-4)


@pytest.mark.parametrize("turn", [lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.mT],
                         ids=["left-right", "up-down", "transposed"])
def test_pair_losses_are_symmetric(turn):
    generator = torch.Generator().manual_seed(1)
    logits, g = torch.randn(2, 9, 11, generator=generator), torch.rand(2, 9, 11, generator=generator)
    inside, valid = torch.rand(2, 2, 9, 11, generator=generator) > 0.35
    colours = torch.randint(100, 106, (2, 3, 9, 11), generator=generator)
    colours = colours.repeat_interleave(4, 2).repeat_interleave(4, 3)

    def sums(change):
        images, index = change(colours), torch.arange(2)
        alike = [*zip(similar_labels(refine(change(g))), similar_colors(images))]
        weights = pair_weights([a & b for a, b in alike], MaskGrid(change(inside), change(valid), index))
        return weighted_pairs(disagreement(change(logits)), weights, index)

    (total, count), (turned_total, turned_count) = sums(lambda x: x), sums(turn)
    assert count.min() > 10 and torch.equal(count, turned_count)
    assert relative_error(turned_total, total) <= 1e-5


# ----------------------------------------------------------------------------------------- colours and refine


def test_golden_07_lab(golden):
    d = golden("07_color_similarity")
    check("07 Lab of a ramp", rgb_to_lab(d["ramp_rgb"]), d["ramp_lab"], 1e-5)
    check("07 Lab of the images", rgb_to_lab(d["pooled_rgb_truncated"].float()), d["lab"], 1e-5)


def test_golden_07_colour_of_a_cell(golden, monkeypatch):
    """similar_colors compares the means of 4 x 4 pixels, truncated to integers."""
    d, cells = golden("07_color_similarity"), []
    monkeypatch.setattr(losses_module, "rgb_to_lab", lambda rgb: cells.append(rgb) or rgb_to_lab(rgb))
    similar_colors(padded_rgb(d)[0])
    check("07 colours of cells", cells[0], d["pooled_rgb_truncated"], 0)


def padded_rgb(d: dict, prefix: str = "") -> tuple[torch.Tensor, list, list]:
    """The two images of golden 07 or 08 as a batch (2, 3, 128, 160) in RGB, their sizes, and their files' sizes."""
    images = [d[f"{prefix}image_bgr_{i}"].flip(0) for i in range(2)]
    sizes = [tuple(x.shape[1:]) for x in images]
    batch = torch.stack([F.pad(x, (0, 160 - x.shape[2], 0, 128 - x.shape[1])) for x in images])
    return batch, sizes, [(int(d[f"{prefix}orig_height_{i}"]), 0) for i in range(2)]


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98])
@pytest.mark.parametrize("name, prefix", [("07_color_similarity", ""), ("08_pseudo_losses", "bin_"),
                                          ("08_pseudo_losses", "soft_")])
def test_golden_07_08_similarity(golden, name, prefix, threshold):
    d = golden(name)
    images, sizes, original_sizes = padded_rgb(d, prefix)
    expected = torch.stack([d[f"{prefix}similarity_0"], d[f"{prefix}similarity_1"]])
    valid = valid_cells(sizes, original_sizes, 32, 40, CPU)
    for same, offset in zip(similar_colors(images, threshold), OFFSETS):
        for theirs, may in zip(at_pairs(expected, offset), reversed(pair(valid, offset))):  # of j
            clear = (theirs - threshold).abs() > 1e-5
            check(f"{name[:2]} similar colours", (same & may)[clear], (theirs >= threshold)[clear], 0)
            assert (~clear).sum() <= 2


def test_golden_07_valid_rows(golden):
    d = golden("07_color_similarity")
    _, sizes, original_sizes = padded_rgb(d)
    valid = valid_cells(sizes, original_sizes, 32, 40, CPU)
    for i in range(2):
        (h, w), removed = sizes[i], int(d[f"pixels_removed_{i}"])
        rows, columns = valid[i].any(1), valid[i].any(0)
        expected = len(range(2, h - removed, 4)), len(range(2, w, 4))
        check("07 valid rows and columns", (rows.sum(), columns.sum()), expected, 0)
        assert torch.equal(valid[i], rows[:, None] & columns)


def test_lab_of_known_colours():
    """Published CIE Lab (D65) of sRGB white, black, grey 119, red, green and blue."""
    rgb = 255.0 * torch.tensor([[1, 1, 1], [0, 0, 0], [119 / 255] * 3, [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    expected = torch.tensor([[100, 0, 0], [0, 0, 0], [50.03, 0, 0],
                             [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]])
    assert (rgb_to_lab(rgb) - expected).abs().max() < 0.02


def test_refine_by_hand():
    """Eq. 3 with zeros outside: a lone 1 becomes (1 + 1/9) / 2, its neighbours 1/18; a corner of a full map becomes
    (1 + 4/9) / 2."""
    lone = F.pad(torch.ones(1, 1, 1), (2, 2, 2, 2))
    expected = F.pad(torch.full((1, 3, 3), 1 / 18), (1, 1, 1, 1))
    expected[0, 2, 2] = 5 / 9
    assert relative_error(refine(lone), expected) <= 1e-6
    assert refine(torch.ones(1, 4, 4))[0, 0].tolist() == pytest.approx([13 / 18, 15 / 18, 15 / 18, 13 / 18])


def test_golden_08_affinity(golden):
    """mu of Eq. 4 through its threshold; theirs is 0 where j is not valid."""
    d = golden("08_pseudo_losses")
    for prefix in ("bin_", "soft_"):
        masks, valid = pseudo_masks(d, prefix), valid_cells(*padded_rgb(d, prefix)[1:], 32, 40, CPU)
        expected = torch.cat([d[f"{prefix}affinity_0"], d[f"{prefix}affinity_1"]])
        valid = valid.repeat_interleave(4, 0)
        for threshold in (RELEASED_THRESHOLD, 0.6, 0.75, 0.9):
            for same, offset in zip(similar_labels(refine(masks), threshold), OFFSETS):
                for theirs, may in zip(at_pairs(expected, offset), reversed(pair(valid, offset))):
                    clear = ((theirs - threshold).abs() > 1e-6) | (theirs == 0.5)
                    check("08 affinity above thresholds", (same & may)[clear], (theirs > threshold)[clear], 0)


# ------------------------------------------------------------------------- golden 08: all mask losses at once


def pseudo_masks(d: dict, prefix: str) -> torch.Tensor:
    """Pseudo masks (8, 32, 40) of both images at stride 4, cut to their boxes."""
    masks = []
    for i in range(2):
        full = d[f"{prefix}pseudo_masks_full_{i}"].float()
        full = F.pad(full, (0, 160 - full.shape[2], 0, 128 - full.shape[1]))
        masks.append(full[:, 2::4, 2::4] * box_masks(d[f"{prefix}boxes_{i}"], 32, 40))
    return torch.cat(masks)


def losses_of_golden_08(d: dict, prefix: str, pixel_loss="dice", threshold=RELEASED_THRESHOLD, raw=False):
    """Logits (a leaf) and all mask losses of golden 08, before warm-up and lambdas. raw: pairs weigh as much as
    their affinity."""
    images, sizes, original_sizes = padded_rgb(d, prefix)
    image, box = torch.arange(2).repeat_interleave(4), d[f"{prefix}gt_inds"]
    inside = box_masks(torch.cat([d[f"{prefix}boxes_0"], d[f"{prefix}boxes_1"]]), 32, 40)
    valid = valid_cells(sizes, original_sizes, 32, 40, CPU)
    masks, scores = pseudo_masks(d, prefix), torch.cat([d[f"{prefix}pseudo_scores_{i}"] for i in range(2)])
    check("08 pseudo masks", masks > 0.5, torch.cat([d[f"{prefix}pseudo_masks_s4_{i}"] for i in range(2)]), 0)
    logits = d[f"{prefix}mask_logits"][:, 0].clone().requires_grad_()
    costs = disagreement(logits)
    color_weights = pair_weights([same[image] for same in similar_colors(images)], MaskGrid(inside, valid, image))
    affinity_weights = pair_weights(similar_labels(refine(masks), threshold), MaskGrid(inside, valid, image))
    if raw:
        counts = pair_weights(similar_labels(refine(masks), -1), MaskGrid(inside, valid, image))
        g = [pair(refine(masks), offset) for offset in OFFSETS]
        affinity_weights = [count * (a * b + (1 - a) * (1 - b)) for count, (a, b) in zip(counts, g)]
    losses = box_supervised_losses(logits, costs, inside, color_weights, box)
    losses |= mask_supervised_losses(logits, costs, masks, scores, affinity_weights, box, pixel_loss)
    return logits, losses


LOSSES_OF_08 = {"loss_prj": ("loss_projection", 1.0), "loss_pairwise": ("loss_pairwise", 1.0),  # theirs: ours, lambda
                "loss_mask": ("loss_pixel", 0.5), "loss_mask_affinity": ("loss_affinity", 0.1)}
CHANGED_BY_OPTION = {"nofix_": ("loss_mask", "loss_mask_affinity"), "affraw_": ("loss_mask_affinity",)}


@pytest.mark.parametrize("variant", ["", "late_", "avg_", "nofix_", "affraw_"])
@pytest.mark.parametrize("prefix", ["bin_", "soft_"])
def test_golden_08_losses(golden, divisors, prefix, variant):
    """Theirs with lambda and ramp at iteration 3000 (late: 25000), which ours counts from 0, and with mu >= 0.5.

    Ours is their default "", like the paper's Eq. 2 (but with mu > 0.5, next test). Their options avg (which they
    add, in ours it is the pixel loss), nofix (divide by the sum of scores) and affraw (pairs weigh as much as their
    affinity) are made here of our pieces, to show that these are equal; training has no nofix and no affraw.
    """
    d = golden("08_pseudo_losses")
    ramp = ramp_factor(24_999 if variant == "late_" else 2_999, Plan(90_000, 0.01, 1000, (0, 0), False, 10_000))
    logits, losses = losses_of_golden_08(d, prefix, raw=variant == "affraw_")
    scores = torch.cat([d[f"{prefix}pseudo_scores_{i}"] for i in range(2)])[d[f"{prefix}gt_inds"]]
    number = divisors[2]  # after those of the projection and the colour pairs
    if variant == "nofix_":
        count, number = number, scores.sum() + 1e-6
        for ours in ("loss_pixel", "loss_affinity"):
            losses[ours] = losses[ours] * count / number
    check("08 number of pseudo masks", number, d[f"{prefix}{variant}num_pseudo_masks"], 1e-5)
    compared = [(theirs, logits, weight * losses[ours] * (ramp if ours in RAMPED else 1.0))
                for theirs, (ours, weight) in LOSSES_OF_08.items()]
    if variant == "avg_":
        leaf, losses = losses_of_golden_08(d, prefix, "avg")
        compared.append(("loss_avg", leaf, 0.1 * ramp * losses["loss_pixel"]))
    for theirs, leaf, loss in compared:
        name = f"08 {theirs}"
        if theirs in CHANGED_BY_OPTION.get(variant, ()):  # a separate line in the golden table
            name += f", {variant.rstrip('_')}"
        check(name, loss, d[f"{prefix}{variant}{theirs}"], 1e-4)
        gradient, = torch.autograd.grad(loss, leaf, retain_graph=True)
        check(f"{name}, gradient norm", gradient.norm(), d[f"{prefix}{variant}gradnorm_{theirs}"], 1e-4)


@pytest.mark.parametrize("prefix, same", [("bin_", True), ("soft_", False)])
def test_affinity_threshold_is_strict(golden, prefix, same):
    """Eq. 5 has mu > 0.5, the authors' program mu >= 0.5. They differ where mu is 0.5 exactly: where a
    refined probability is 1/2, which a few cells of the soft masks have."""
    d = golden("08_pseudo_losses")
    strict = losses_of_golden_08(d, prefix, threshold=0.5)[1]["loss_affinity"]
    default = similar_labels(refine(pseudo_masks(d, prefix)))
    assert all(torch.equal(a, b) for a, b in zip(default, similar_labels(refine(pseudo_masks(d, prefix)), 0.5)))
    assert (relative_error(0.03 * strict, d[f"{prefix}loss_mask_affinity"]) <= 1e-5) == same
    half = torch.full((1, 3, 3), 0.5)
    assert not any(x.any() for x in similar_labels(half))
    assert all(x.all() for x in similar_labels(half, RELEASED_THRESHOLD))


# ------------------------------------------------------------------------------------------------- L_mask-sup


def supervised_by(mask: torch.Tensor, logits: torch.Tensor, scores=(1.0,), **options) -> dict:
    """L_mask-sup of logits (K, h, w) where every cell is inside and valid; instance k has pseudo mask k."""
    everywhere = torch.ones_like(mask, dtype=torch.bool)
    image = torch.zeros(len(mask), dtype=torch.int64)
    weights = pair_weights(similar_labels(refine(mask)), MaskGrid(everywhere, everywhere[:1], image))
    return mask_supervised_losses(logits, disagreement(logits), mask, torch.tensor(scores), weights,
                                  torch.arange(len(mask)), **options)


def test_affinity_falls_when_neighbours_of_one_label_agree():
    """Eq. 5 as printed, -(log p_i p_j + log (1-p_i)(1-p_j)), is smallest at p = 1/2 and would erase every mask."""
    mask = torch.zeros(1, 12, 12)
    mask[:, 3:9, 3:9] = 1
    sure = 2 * mask - 1
    ours = [supervised_by(mask, scale * sure)["loss_affinity"].item() for scale in (0, 0.5, 1, 2, 4)]
    assert ours[0] == pytest.approx(math.log(2)) and all(a > b for a, b in zip(ours, ours[1:]))

    def printed(p_i: float, p_j: float) -> float:
        return -(math.log(p_i * p_j) + math.log((1 - p_i) * (1 - p_j)))

    grid = [i / 20 for i in range(1, 20)]
    assert min((printed(a, b), a, b) for a in grid for b in grid)[1:] == (0.5, 0.5)
    assert printed(0.9, 0.9) > printed(0.5, 0.5)
    term = disagreement(torch.logit(torch.tensor([[[0.9, 0.9, 0.9], [0.5, 0.5, 0.5], [0.1, 0.1, 0.1]]])))
    agree, undecided, agree_too = term[OFFSETS.index((0, 2))][0, :, 0].tolist()
    assert agree == pytest.approx(agree_too) == pytest.approx(-math.log(0.82)) and agree < undecided


def test_affinity_of_a_uniform_mask_counts_every_pair():
    loss = supervised_by(torch.ones(1, 6, 6), torch.zeros(1, 6, 6))["loss_affinity"]
    assert loss.item() == pytest.approx(math.log(2))  # all pairs alike, each costs -log(1/2)


def test_few_pairs_and_none():
    """The average over an instance's pairs divides by their number, or by 1 if it has none."""
    mask, logits = torch.ones(2, 3, 3), torch.zeros(2, 3, 3)
    image, inside, valid = torch.tensor([0, 0]), torch.zeros(2, 3, 3).bool(), torch.ones(1, 3, 3).bool()
    inside[0, 0, 0] = True                            # a corner: 3 pairs
    weights = pair_weights(similar_labels(mask), MaskGrid(inside, valid, image))
    loss = mask_supervised_losses(logits, disagreement(logits), mask, torch.ones(2), weights, torch.arange(2))
    assert loss["loss_affinity"].item() == pytest.approx(math.log(2) / 2)


def test_noise_aware_sum_by_hand():
    """Eq. 2: instances of dice 0 and 1 with scores 0.8 and 0.4. The third box has no pseudo mask: it is not counted."""
    mask = torch.zeros(3, 8, 8)
    mask[:2, 2:6, 2:6] = 0.7                          # above 1/2, so 1 as a target
    logits = 60 * (mask - 0.5)
    logits[0], logits[1] = 200 * (mask[0] - 0.5), -200 * (mask[1] - 0.5)
    loss = supervised_by(mask, logits, (0.8, 0.4, 0.0))
    assert loss["loss_pixel"].item() == pytest.approx((0.8 * 0 + 0.4 * 1) / 2, abs=1e-4)
    bce = supervised_by(mask, 0 * logits, (0.8, 0.4, 0.0), pixel_loss="bce")["loss_pixel"]
    assert bce.item() == pytest.approx(1.2 * math.log(2) / 2)
    assert supervised_by(mask, logits, (0.8, 0.4, 0.0), pixel_loss="none")["loss_pixel"].item() == 0
    nothing = supervised_by(mask, logits, (0.0, 0.0, 0.0))
    assert nothing["loss_pixel"].item() == nothing["loss_affinity"].item() == 0


# ---------------------------------------------------------------- everything on a network: no boxes, autocast


def all_losses(model, boxes: list, pixel_loss: str = "dice", autocast: bool = False) -> dict:
    """Every loss of a batch of two images 64 x 96 with the given boxes, pseudo masks made up."""
    generator, sizes = torch.Generator().manual_seed(0), [(64, 96)] * 2
    images = torch.randint(0, 256, (2, 3, 64, 96), generator=generator, dtype=torch.uint8)
    boxes = [torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in boxes]
    labels = [torch.zeros(len(b), dtype=torch.int64) for b in boxes]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        predictions = model(images, sizes)
        targets = fcos_targets(predictions.locations, boxes, labels, model.num_classes)
        locations, box = batch_instances(predictions, targets)
        logits = mask_logits(predictions, locations)
        inside, valid = box_masks(torch.cat(boxes), 16, 24), valid_cells(sizes, sizes, 16, 24, CPU)
        image = torch.repeat_interleave(torch.tensor([len(b) for b in boxes]))
        costs = disagreement(logits)
        color_weights = pair_weights([same[image] for same in similar_colors(images)], MaskGrid(inside, valid, image))
        affinity_weights = pair_weights(similar_labels(refine(inside.float())), MaskGrid(inside, valid, image))
        return (detection_losses(predictions, targets)
                | box_supervised_losses(logits, costs, inside, color_weights, box)
                | mask_supervised_losses(logits, costs, inside.float(), torch.ones(len(inside)),
                                         affinity_weights, box, pixel_loss))


@pytest.mark.parametrize("pixel_loss", ["dice", "bce", "avg", "none"])
@pytest.mark.parametrize("boxes", [[[], []], [[], [[10, 10, 50, 40]]], [[[10, 10, 50, 40]], []],
                                   [[[60, 60, 61, 61]], []]],  # the last one has no location within it
                         ids=["no boxes", "none in the first", "none in the second", "no positives"])
def test_without_boxes_every_parameter_still_gets_a_gradient(boxes, pixel_loss):
    torch.manual_seed(0)
    model = build_model("r18-slim", 3, channels=32, frozen=False)
    losses = all_losses(model, boxes, pixel_loss)
    assert len(losses) == 7 and all(x.isfinite() and x.shape == () for x in losses.values())
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_bf16_autocast_gives_finite_float32_losses():
    torch.manual_seed(0)
    model = build_model("r18-slim", 3, channels=32, frozen=False)
    boxes = [[[10, 10, 50, 40]], [[30, 5, 90, 60], [0, 0, 20, 20]]]
    half, full = all_losses(model, boxes, autocast=True), all_losses(model, boxes)
    assert all(x.dtype == torch.float32 and x.isfinite() for x in half.values())
    assert all(abs(half[name] - full[name]) < 0.05 * full[name] + 0.01 for name in full)
