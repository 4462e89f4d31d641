"""teacher.py: the moving average, and pseudo labels from predictions made up by hand."""
import math

import pytest
import torch
import torch.nn.functional as F

from helpers import check, made_up, make_batch, random_predictions, relative_error
from masks import aligned_bilinear, box_masks
from model import build_model, detect, mask_logits
from teacher import (SCORES, class_score, ema_momentum, iou_score, make_teacher, mask_aware_score, match,
                     mean_entropy_score, pseudo_label, refined_label, to_student_grid, update)


def small_model(seed: int = 0):
    torch.manual_seed(seed)
    return build_model("r18-slim", 3, channels=32, frozen=False)


# ---------------------------------------------------------------------------------------------------- average


def test_golden_14_momentum(golden):
    d = golden("14_ema")
    momentum = torch.tensor([ema_momentum(i) for i in d["iteration"].tolist()])
    check("14 momentum", momentum, d["momentum"], 1e-6)


def test_teacher_is_a_copy_that_does_not_learn():
    student = small_model()
    teacher = make_teacher(student)
    assert teacher.training and all(not p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    theirs = dict(student.state_dict())
    for name, x in teacher.state_dict().items():
        assert torch.equal(x, theirs[name]) and x.data_ptr() != theirs[name].data_ptr(), name


def test_first_update_copies_the_parameters_exactly():
    student, teacher = small_model(0), make_teacher(small_model(1))
    assert ema_momentum(0) == 0
    update(teacher, student, ema_momentum(0))
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters()))


def student_at(step: int):
    """The student's parameters after a step: newly initialised ones."""
    return list(small_model(100 + step).parameters())


@pytest.mark.parametrize("momentum, weights", [
    (ema_momentum, [1 / 5] * 5),  # young: the mean of all so far
    (lambda i: 0.9 if i else 0.0, [0.9 ** 4, *(0.1 * 0.9 ** (4 - i) for i in range(1, 5))]),
])
def test_average_in_closed_form(momentum, weights):
    """theta_k = sum over i of (1 - m_i) m_(i+1) ... m_k xi_i."""
    student = small_model()
    teacher = make_teacher(student)
    buffers = {name: x.clone() for name, x in teacher.named_buffers()}
    for step in range(5):
        with torch.no_grad():
            for p, new in zip(student.parameters(), student_at(step)):
                p.copy_(new)
            for x in student.buffers():
                x.add_(1)
        update(teacher, student, momentum(step))
    expected = [sum(w * p.detach().double() for w, p in zip(weights, steps))
                for steps in zip(*(student_at(step) for step in range(5)))]
    assert max(relative_error(p, e) for p, e in zip(teacher.parameters(), expected)) <= 1e-5
    # buffers are never averaged
    assert buffers and all(torch.equal(x, buffers[name]) for name, x in teacher.named_buffers())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("threshold, assigned", [(0.5, [-1]), (0.4, [0]), (0.3, [0])])
def test_the_iou_threshold_of_alg_1_is_a_parameter_of_match(threshold, assigned):
    """A detection of half the box's height and 0.9 of its width: IoU 0.45."""
    size = (96, 128)
    image = made_up([[([10.0, 10, 64, 42], 0.9, torch.full((12, 16), 5.0))]], size).of_image(0)
    matched = match(image, detect(image), torch.tensor([[10.0, 10, 70, 74]]), size, size, (24, 32),
                    iou_threshold=threshold)
    assert matched.assigned.tolist() == assigned
    assert len(matched.masks) == len(matched.iou) == (assigned != [-1])


# ----------------------------------------------------------------------------- pseudo labels, made up by hand


def plane(padded, scale, x0: float, y0: float) -> torch.Tensor:
    """Mask logits at stride 8 that rise along both axes and are 0 at (x0, y0), in pixels of the student's image.

    The mask head's enlargement puts cell i on cell 2i + 1 at stride 4, which is the middle of pixel 8i + 6.
    """
    y, x = ((torch.arange(n // 8) * 8 + 6.5) / s for n, s in zip(padded, scale))
    return ((x - x0)[None, :] + 0.5 * (y - y0)[:, None]) / 16


def expected_plane(padded, x0: float, y0: float) -> torch.Tensor:
    y, x = (torch.arange(n // 4) * 4 + 2.5 for n in padded)
    return (((x - x0)[None, :] + 0.5 * (y - y0)[:, None]) / 16).sigmoid()


def test_same_size_gives_the_teachers_own_map_cut_to_the_box():
    padded, size = (96, 128), (90, 120)
    boxes = [[[16.0, 24, 72, 64], [80, 30, 110, 70]], [[30, 10, 90, 80]]]
    noise = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    predictions = made_up([[(boxes[0][0], 0.9, noise[0]), (boxes[0][1], 0.8, noise[1])],
                           [(boxes[1][0], 0.7, noise[2])]], padded)
    rows = [(p.amax(1) > -20).nonzero()[:, 0] for p in predictions.class_logits]
    rows[0] = rows[0][(predictions.class_logits[0, rows[0], 0] > -20).argsort(descending=True)]  # 0, then 1
    own = mask_logits(predictions, rows).sigmoid()
    labels = pseudo_label(lambda *_: predictions, make_batch(boxes, size, size, padded))
    assert labels.masks.shape == (3, 24, 32)
    assert relative_error(labels.masks, own * box_masks(torch.tensor(sum(boxes, [])), 24, 32)) <= 1e-5
    for mask, score, p, box, c in zip(labels.masks, labels.scores, own, sum(boxes, []), (0.9, 0.8, 0.7)):
        inside = mask[mask > 0.5]
        assert score.item() == pytest.approx(math.sqrt(math.sqrt(c) * inside.mean().item()), abs=1e-5)


def test_released_labels_take_turns_by_one_number_and_weigh_by_another():
    """Two predictions on each of two boxes. Of the first two sqrt(c q) prefers what its weight sqrt(sqrt(c) q) does
    not, of the others what c does not."""
    padded = (96, 128)
    boxes = [[[16.0, 24, 72, 64], [80, 30, 110, 70]]]
    sure, vague = torch.full((12, 16), 6.0), torch.full((12, 16), 0.4)      # q 0.998 and 0.599
    image = [(boxes[0][0], 0.25, sure), (boxes[0][0], 0.81, vague),       # c is the root of these
               (boxes[0][1], 0.81, vague), (boxes[0][1], 0.49, sure)]
    labels = pseudo_label(lambda *_: made_up([image], padded), make_batch(boxes, padded, padded, padded), "released")
    expected = [math.sqrt(math.sqrt(0.9) * torch.sigmoid(torch.tensor(0.4)).item()),
                math.sqrt(math.sqrt(0.7) * torch.sigmoid(torch.tensor(6.0)).item())]
    assert labels.scores.tolist() == pytest.approx(expected, abs=1e-4)
    assert torch.equal(labels.masks.bool(), box_masks(torch.tensor(boxes[0]), 24, 32))


@pytest.mark.parametrize("size, padded, teacher_size, teacher_padded", [
    ((90, 120), (96, 128), (180, 240), (192, 256)),
    ((90, 120), (96, 128), (90, 120), (96, 128)),
    ((90, 120), (96, 128), (135, 181), (160, 192)),  # rounded: 181 is not 1.5 * 120
    ((180, 240), (192, 256), (90, 120), (96, 160)),
    ((90, 120), (96, 128), (180, 150), (192, 160)),
])
def test_a_teacher_of_another_size_lands_on_the_same_place(size, padded, teacher_size, teacher_padded):
    scale = [t / s for t, s in zip(teacher_size, size)]
    box, center = [20.0, 16, 100, 72], (60.0, 44.0)
    teacher_box = [v * scale[1 - i % 2] for i, v in enumerate(box)]
    predictions = made_up([[(teacher_box, 0.9, plane(teacher_padded, scale, *center))]], teacher_padded)
    labels = pseudo_label(lambda *_: predictions, make_batch([[box]], size, teacher_size, padded))
    inside = box_masks(torch.tensor([box]), padded[0] // 4, padded[1] // 4)

    def error(dx: float) -> float:
        difference = labels.masks[0] - expected_plane(padded, center[0] + dx, center[1])
        return difference[inside[0]].abs().max().item()

    assert (labels.masks[~inside] == 0).all() and labels.scores[0] > 0.7
    assert error(0) < 4e-3
    assert error(1) > 8e-3 and error(-1) > 8e-3  # one pixel beside is seen


@pytest.mark.parametrize("case", ["test_", "teacher_"])
def test_golden_09_on_the_students_grid(golden, case):
    """Maps at stride 4 equal the authors' full-size masks at every fourth pixel, but for a few on the outline."""
    d = golden("09_postprocess")
    size, out = (tuple(d[f"{case}{name}_hw"].tolist()) for name in ("input", "output"))
    height, width = (len(range(2, n, 4)) for n in out)
    grid = to_student_grid(d[f"{case}global_masks"][d[f"{case}kept"], 0], size, out, height, width)
    theirs = d[f"{case}masks"][:, 2::4, 2::4]
    assert theirs.any()
    check("09 share of stride-4 cells that differ", ((grid > 0.5) != theirs).float().mean(), 0, 0.005)


@pytest.mark.parametrize("case", ["test_", "teacher_"])
def test_golden_09_scores(golden, case):
    """The authors' program has no box in Eq. 1: it averages p > 0.5 over the whole image. Its predictions take
    turns by sqrt(c * q) and masks weigh sqrt(sqrt(c) * q); Eq. 1 over a box that holds all gives both. Ours follows
    the paper: one score for both, sqrt(c * q) with q inside the predicted box."""
    d = {key.removeprefix(case): x for key, x in golden("09_postprocess").items() if key.startswith(case)}
    (h, w), size = d["input_hw"].tolist(), tuple(d["output_hw"].tolist())
    p = aligned_bilinear(d["global_masks"][d["kept"]], 4)[..., :h, :w]
    p = F.interpolate(p, size=size, mode="bilinear", align_corners=False)[:, 0]
    c, everywhere, iou = d["scores_in"][d["kept"]], torch.ones_like(p, dtype=torch.bool), p.new_zeros(len(p), 0)
    check("09 Eq. 1 without a box, order", mask_aware_score(c, p, everywhere, iou), d["scores"], 1e-4)
    check("09 Eq. 1 without a box, weight", mask_aware_score(c.sqrt(), p, everywhere, iou), d["mask_score"], 1e-4)

    expected = []
    for k, (x0, y0, x1, y1) in enumerate(d["boxes"].tolist()):
        inside = p[k, int(y0):int(y1 + 1), int(x0):int(x1 + 1)]
        positive = inside[inside > 0.5]
        expected.append(math.sqrt(c[k] * positive.mean()) if len(positive) else 0.0)
    ours = mask_aware_score(c, p, box_masks(d["boxes"], *size, stride=1), iou)
    assert relative_error(ours, expected) <= 1e-5
    assert relative_error(ours, d["scores"]) > 1e-3 and relative_error(ours, d["mask_score"]) > 1e-2


def test_unassigned_boxes_get_nothing():
    padded = (96, 128)
    boxes = [[[10.0, 10, 60, 60], [70, 10, 110, 50], [70, 60, 110, 90]]]
    ones = torch.full((12, 16), 5.0)
    instances = [([14, 12, 58, 62], 0.9, ones), ([70, 40, 110, 80], 0.9, ones)]  # the other: IoU 0.14, 0.4
    predictions = made_up([instances], padded)
    labels = pseudo_label(lambda *_: predictions, make_batch(boxes, padded, padded, padded))
    assert (labels.scores > 0).tolist() == [True, False, False]
    assert labels.box.tolist() == [0] and len(labels.masks) == 1
    masks, scores = labels.of(torch.tensor([2, 0]))
    assert torch.equal(masks[1], labels.masks[0]) and masks[1].any() and not masks[0].any()
    assert torch.equal(scores, labels.scores[[2, 0]])


def test_predictions_beyond_the_image_are_clipped_before_they_are_matched():
    """A box ends at the border of its image. A prediction that reaches beyond it is clipped first, as in golden 09."""
    size = padded = (96, 128)
    beyond = [-60.0, 20, 50, 70]  # unclipped its IoU is 0.45
    predictions = made_up([[(beyond, 0.9, torch.full((12, 16), 3.0))]], padded)
    labels = pseudo_label(lambda *_: predictions, make_batch([[[0.0, 20, 50, 70]]], size, size, padded))
    assert labels.scores[0] > 0.5 and labels.masks.any()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("boxes", [[[], []], [[], [[10.0, 10, 60, 60]]]], ids=["none at all", "one image"])
def test_images_without_boxes(score, boxes):
    padded = (96, 128)
    instances = [([10.0, 10, 60, 60], 0.9, torch.full((12, 16), 5.0))]
    batch = make_batch(boxes, padded, padded, padded)
    labels = pseudo_label(lambda *_: made_up([instances, instances], padded), batch, score)
    count = len(boxes[1])
    assert labels.masks.shape == (count, 24, 32) and labels.scores.shape == (count,)
    assert labels.masks.dtype == labels.scores.dtype == torch.float32 and (labels.scores > 0).all()


@pytest.mark.parametrize("score", SCORES)
def test_no_prediction_at_all(score):
    padded = (96, 128)
    batch = make_batch([[[10.0, 10, 60, 60]]], padded, padded, padded)
    labels = pseudo_label(lambda *_: made_up([[]], padded), batch, score)
    assert labels.scores.tolist() == [0] and len(labels.masks) == len(labels.box) == 0


def test_the_best_mask_by_the_score_wins():
    """Two predictions for one box; the more confident one has the vaguer mask. The class score prefers one, Eq. 1 the
    other."""
    padded, box = (96, 128), [16.0, 16, 80, 80]
    instances = [(box, 0.8, torch.full((12, 16), 0.1)), ([16.0, 16, 80, 60], 0.6, torch.full((12, 16), 6.0))]
    batch = make_batch([[box]], padded, padded, padded)
    predictions = made_up([instances], padded)
    by_class, by_mask = (pseudo_label(lambda *_: predictions, batch, score) for score in ("cls", "mask-aware"))
    assert by_class.scores.item() == pytest.approx(math.sqrt(0.8), abs=1e-5)
    assert by_class.masks.max().item() == pytest.approx(1 / (1 + math.exp(-0.1)), abs=1e-5)
    assert by_mask.masks.max() > 0.99 and by_mask.scores.item() == pytest.approx(
        math.sqrt(math.sqrt(0.6) / (1 + math.exp(-6))), abs=1e-5)


def test_scores_by_hand():
    """Eq. 1 with the last cell outside the box, and 0.2 and 0.5 not positive: the mean of 0.9 and 0.7. Then the other
    three scores of Table 5."""
    c = torch.tensor([0.64, 0.5])
    p = torch.tensor([[[0.9, 0.7, 0.6], [0.2, 0.5, 1.0]], [[0.1, 0.2, 0.3], [0.2, 0.3, 0.9]]])
    box = torch.tensor([[[1, 1, 0], [1, 1, 0]]] * 2, dtype=torch.bool)
    iou = torch.tensor([[0.6, 0.9], [0.7, 0.1]])
    assert mask_aware_score(c, p, box, iou).tolist() == pytest.approx([math.sqrt(0.64 * 0.8), 0], abs=1e-6)
    assert class_score(c, p, box, iou).tolist() == c.tolist()
    assert iou_score(c, p, box, iou).tolist() == pytest.approx([0.9, 0.7])
    sure, unsure = torch.tensor([[0.0, 1.0]]), torch.full((1, 2), 0.5)
    entropy = mean_entropy_score(c, torch.stack([sure, unsure]), box, iou)
    assert entropy.tolist() == pytest.approx([1, 1 - math.log(2)])


def test_padding_does_not_reach_the_mean_entropy():
    """The mean of Table 5 is over the image, without the padding of its batch."""
    box, size, mask = [16.0, 16, 80, 80], (96, 128), torch.full((12, 16), 2.0)

    def score(padded, mask) -> float:
        batch = make_batch([[box]], size, size, padded)
        return pseudo_label(lambda *_: made_up([[(box, 0.9, mask)]], padded), batch, "mean-entropy").scores.item()

    undecided_beyond = F.pad(mask, (0, 16))
    assert score((96, 256), undecided_beyond) == pytest.approx(score(size, mask), abs=1e-6)


def test_label_needs_no_gradient_and_averages_no_buffer():
    """In training mode a pass of the teacher updates its batch norms, but no parameter."""
    teacher = make_teacher(small_model())
    images = torch.randint(0, 256, (1, 3, 96, 128), dtype=torch.uint8)
    batch = make_batch([[[10.0, 10, 60, 60]]], (96, 128), (96, 128), (96, 128))
    batch = batch._replace(teacher_images=images)
    before = [p.clone() for p in teacher.parameters()]
    running = teacher.mask_branch.tower[0][1].running_mean.clone()
    labels = pseudo_label(teacher, batch)
    assert labels.masks.shape == (len(labels.box), 24, 32) and labels.scores.shape == (1,)
    assert not any(x.requires_grad for x in labels)
    assert all(torch.equal(p, b) for p, b in zip(teacher.parameters(), before))
    assert not torch.equal(teacher.mask_branch.tower[0][1].running_mean, running)


# -------------------------------------------------------------------------------------------------- refined masks


def discs(size: tuple[int, int], padded: tuple[int, int], discs_of: list[list]) -> torch.Tensor:
    """Red discs on grey, (B, 3, H, W) uint8, zero beyond `size`; discs_of: (x, y, radius) of each, for each image."""
    images = torch.zeros(len(discs_of), 3, *padded, dtype=torch.uint8)
    y, x = (torch.arange(n)[:, None] + 0.5 for n in size)
    for image, these in zip(images, discs_of):
        image[:, :size[0], :size[1]] = 120
        for cx, cy, radius in these:
            inside = (x.T - cx) ** 2 + (y - cy) ** 2 < radius ** 2
            image[:, :size[0], :size[1]][:, inside] = torch.tensor([200, 30, 30], dtype=torch.uint8)[:, None]
    return images


DISCS = [[(40.0, 50.0, 24.0), (110.0, 40.0, 16.0)], [], [(80.0, 60.0, 36.0)]]  # of three images of 96 x 144 pixels


def disc_batch(scale: float = 1.0):
    """DISCS with a teacher's view `scale` times as large, and a teacher that sees nothing anywhere, in (B, 96, 160)."""
    boxes = [[[x - r, y - r, x + r, y + r] for x, y, r in image] for image in DISCS]
    batch = make_batch(boxes, (96, 144), (int(96 * scale), int(144 * scale)), (96, 160))
    larger = [[tuple(scale * v for v in disc) for disc in image] for image in DISCS]
    padded = (int(96 * scale), int(160 * scale))
    batch = batch._replace(teacher_images=discs(batch.teacher_sizes[0], padded, larger))
    one = random_predictions(*padded)
    alike = {name: torch.cat([getattr(one, name)] * 3) for name in (
        "class_logits", "ltrb", "centerness", "mask_features")}
    return batch, one._replace(**alike, box_maps=[x.expand(3, -1, -1, -1) for x in one.box_maps])


def true_cells(batch) -> torch.Tensor:
    """The discs at the middles of the cells (3, h, w)."""
    y, x = torch.arange(24)[:, None] * 4 + 2.5, torch.arange(40) * 4 + 2.5
    return torch.stack([(x - cx) ** 2 + (y - cy) ** 2 < r ** 2 for image in DISCS for cx, cy, r in image])


@pytest.mark.parametrize("scale", [1.0, 2.0, 4 / 3])
def test_refined_masks_are_those_of_the_colours_on_the_students_grid(scale):
    """Of boxes that no detection finds, whatever the size of the teacher's view."""
    batch, predictions = disc_batch(scale)
    pseudo = refined_label(lambda *_: predictions, batch, torch.arange(3), 2, True)
    masks, truth = pseudo.masks > 0.5, true_cells(batch)
    overlap = (masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))
    assert (overlap > 0.85).all() and (pseudo.scores > 0.9).all(), (overlap, pseudo.scores)
    assert pseudo.box.tolist() == [0, 1, 2] and pseudo.masks.shape == (3, 24, 40)
    assert not (pseudo.masks * ~box_masks(torch.cat(batch.boxes), 24, 40)).any()


def test_refined_masks_are_made_for_the_chosen_boxes_alone():
    batch, predictions = disc_batch()
    everyone = refined_label(lambda *_: predictions, batch, torch.arange(3), 0, True)
    some = refined_label(lambda *_: predictions, batch, torch.tensor([0, 2]), 0, True)
    assert torch.equal(some.masks, everyone.masks[[0, 2]])
    assert some.box.tolist() == [0, 2] and some.scores[1] == 0 and torch.equal(some.scores[[0, 2]],
                                                                              everyone.scores[[0, 2]])
    nobody = refined_label(lambda *_: predictions, batch, torch.tensor([], dtype=torch.int64), 3, True)
    assert nobody.masks.shape == (0, 24, 40) and not nobody.scores.any()


@pytest.mark.parametrize("chosen", [[0], [1], [0, 1]])
def test_boxes_that_learn_no_mask_own_their_locations(chosen):
    """A box does not draw with the mask heads of a smaller one within it, whether that one learns a mask or not."""
    boxes = [[8.0, 8, 72, 72], [20.0, 20, 60, 60]]
    batch = make_batch([boxes], (96, 96), (96, 96), (96, 96))._replace(
        teacher_images=torch.zeros(1, 3, 96, 96, dtype=torch.uint8))
    predictions = random_predictions(96, 96)
    everyone, some = (refined_label(lambda *_: predictions, batch, places, 0, False).masks
                      for places in (torch.arange(2), torch.tensor(chosen)))
    assert torch.allclose(some, everyone[chosen], atol=1e-6)


def test_masks_that_are_not_numbers_count_for_nothing():
    batch, predictions = disc_batch()
    broken = predictions._replace(mask_features=predictions.mask_features * torch.nan)
    pseudo = refined_label(lambda *_: broken, batch, torch.arange(3), 1, True)
    assert not pseudo.masks.any() and not pseudo.scores.any()


def test_steps_and_colours_refine_apart():
    batch, predictions = disc_batch()
    plain, fitted, coloured = (refined_label(lambda *_: predictions, batch, torch.arange(3), *how).masks
                               for how in ((0, False), (3, False), (0, True)))
    assert not torch.equal(plain, fitted) and not torch.equal(plain, coloured)
    grey = batch._replace(teacher_images=torch.full_like(batch.teacher_images, 120))
    assert torch.equal(refined_label(lambda *_: predictions, grey, torch.arange(3), 3, False).masks, fitted)


def test_refining_changes_nothing_of_the_teacher_and_repeats():
    batch, _ = disc_batch()
    teacher = small_model()  # whose parameters could learn
    before, teacher.amp_dtype = [x.clone() for x in teacher.parameters()], torch.bfloat16
    pseudo, again = (refined_label(teacher, batch, torch.arange(3), 2, True) for _ in range(2))
    assert all(map(torch.equal, before, teacher.parameters())) and all(p.grad is None for p in teacher.parameters())
    assert pseudo.masks.dtype == torch.float32 and not pseudo.masks.requires_grad
    assert torch.equal(pseudo.masks, again.masks) and torch.equal(pseudo.scores, again.scores)
