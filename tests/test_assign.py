"""assign.py: FCOS targets, the choice of at most 64 instances, Alg. 1."""
import inspect
import math

import pytest
import torch
from torchvision.ops import box_iou

from assign import LEVEL_RANGES, assign_masks, fcos_targets, image_targets, select_instances
from helpers import check
from model import STRIDES, make_locations
from tools.measuring import tensor_peak

CPU = torch.device("cpu")


def locations_of(height: int, width: int):
    return make_locations([(-(-height // s), -(-width // s)) for s in STRIDES], CPU)


def targets_of(boxes: list, labels: list, height: int = 128, width: int = 128):
    """Locations of one image and its (labels, ltrb, boxes); three classes."""
    locations = locations_of(height, width)
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    targets = fcos_targets(locations, [boxes], [torch.tensor(labels, dtype=torch.int64)], 3)
    return locations, *(x[0] for x in targets)


# ----------------------------------------------------------------------------------------------- FCOS targets


def test_golden_01_targets(golden):
    d = golden("01_fcos_targets")
    locations = locations_of(*d["image_hw"].tolist())
    check("01 locations", locations.xy, torch.cat([d[f"locations_{i}"].reshape(-1, 2) for i in range(5)]), 0)
    check("01 strides", locations.stride.unique(), d["strides"], 0)
    boxes, labels = ([d[f"{name}_{b}"] for b in range(3)] for name in ("boxes", "classes"))
    targets = fcos_targets(locations, boxes, labels, 80)
    expected = {name: torch.cat([d[f"{name}_{i}"].flatten(1, 2) for i in range(5)], 1)
                for name in ("labels", "ltrb", "gt_index")}
    check("01 labels", targets.labels, expected["labels"], 0)
    check("01 boxes of locations", targets.boxes, expected["gt_index"], 0)
    check("01 ltrb", targets.ltrb, expected["ltrb"], 1e-5)
    check("01 number of positives", (targets.labels < 80).sum(), d["num_pos"], 0)


def test_one_box_by_hand():
    """Box (20, 36, 52, 60), centre (36, 48). On P3, within 12 of it: x 28 36 44, y 44 52; 36 and 60 are its border."""
    locations, labels, ltrb, boxes = targets_of([[20, 36, 52, 60]], [1])
    positive = labels == 1
    assert locations.xy[positive].tolist() == [[28, 44], [36, 44], [44, 44], [28, 52], [36, 52], [44, 52]]
    assert (locations.level[positive] == 0).all()
    assert ltrb[positive][0].tolist() == [1, 1, 3, 2]
    assert ltrb[positive][5].tolist() == [3, 2, 1, 1]
    assert (boxes[positive] == 0).all() and (boxes[~positive] == -1).all()
    assert (labels[~positive] == 3).all() and (ltrb[~positive] == 0).all()


@pytest.mark.parametrize("x0, p3, p4", [
    (4, {68}, {56, 72, 88}), (8, set(), {56, 72, 88}), (0, set(), {56, 72})])
def test_both_ends_of_a_level_range_count(x0, p3, p4):
    """A box 128 wide: the column of its centre has 64 px on either side, which is on P3 and on P4; all other columns
    are on P4 only."""
    locations, labels, _, _ = targets_of([[x0, 10, x0 + 128, 110]], [0], 128, 256)
    for level, columns in enumerate((p3, p4, set())):
        at = (locations.level == level) & (labels == 0)
        assert set(locations.xy[at, 0].tolist()) == columns


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_smallest_box_wins(order):
    """Candidates on P3: x, y of 28 36 for the small box, of 28 36 44 for the large one, which keeps 9 - 4."""
    two = [[20.0, 20, 44, 44], [12.0, 20, 60, 52]]
    locations, labels, _, boxes = targets_of([two[i] for i in order], order)
    positive = labels < 3
    small = (locations.xy < 44).all(1)[positive]
    assert (locations.level[positive] == 0).all() and len(small) == 9 and small.sum() == 4
    assert torch.equal(labels[positive], torch.where(small, 0, 1))
    assert torch.equal(boxes[positive], torch.where(small, order.index(0), order.index(1)))


def random_boxes(count: int, height: int, width: int, seed: int) -> torch.Tensor:
    corners = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed))
    a, b = corners * torch.tensor([width, height])
    return torch.cat([torch.minimum(a, b), torch.maximum(a, b) + 1], 1)


def plain_targets(locations, boxes: torch.Tensor, labels: torch.Tensor, num_classes: int):
    """image_targets as FCOS states it: all L locations against all G boxes at once."""
    (x, y), (x0, y0, x1, y1) = locations.xy[:, None].unbind(2), boxes.unbind(1)                  # (L, 1), (G,)
    center_x, center_y, reach = (x0 + x1) / 2, (y0 + y1) / 2, 1.5 * locations.stride[:, None]
    inside = ((x > torch.maximum(x0, center_x - reach)) & (x < torch.minimum(x1, center_x + reach))
              & (y > torch.maximum(y0, center_y - reach)) & (y < torch.minimum(y1, center_y + reach)))
    farthest = torch.stack([x - x0, x1 - x, y - y0, y1 - y]).amax(0)                            # (L, G)
    low, high = torch.tensor(LEVEL_RANGES)[locations.level, :, None].unbind(1)
    area = torch.where(inside & (farthest >= low) & (farthest <= high), (x1 - x0) * (y1 - y0), torch.inf)
    smallest, box = area.min(1)
    positive = smallest < torch.inf
    ltrb = torch.cat([locations.xy - boxes[box, :2], boxes[box, 2:] - locations.xy], 1) / locations.stride[:, None]
    return torch.where(positive, labels[box], num_classes), ltrb * positive[:, None], torch.where(positive, box, -1)


@pytest.mark.parametrize("height, width", [(32, 32), (64, 608), (480, 640), (800, 1344)])
@pytest.mark.parametrize("grid", [0, 0.5, 4, 16, 64])
def test_targets_are_those_of_all_locations_against_all_boxes(height, width, grid):
    """To the bit, with equal boxes too. On a grid, locations lie at the very edge of boxes and of their centres."""
    locations, generator = locations_of(height, width), torch.Generator().manual_seed(height)
    for count in (1, 4, 200):
        boxes = torch.rand(count, 2, 2, generator=generator) * torch.tensor([width, height])
        if grid:
            boxes = (boxes / grid).round() * grid
        boxes = torch.cat([boxes.amin(1), boxes.amax(1)], 1)
        boxes[count // 2:] = boxes[:count - count // 2].flip(0)
        labels = torch.randint(0, 9, (count,), generator=generator)
        for ours, plain in zip(image_targets(locations, boxes, labels, 9), plain_targets(locations, boxes, labels, 9)):
            assert torch.equal(ours, plain) and ours.dtype == plain.dtype


def test_targets_of_thousands_of_boxes_fit_into_memory():
    """All locations against all of them would be 13 million pairs: 51 MiB for a single float of each."""
    locations, boxes = locations_of(256, 320), random_boxes(8000, 256, 320, 0)
    work = lambda: image_targets(locations, boxes, torch.zeros(8000, dtype=torch.int64), 1)
    assert tensor_peak(work, CPU) < 40 and (work()[2] >= 0).sum() > 1000


@pytest.mark.parametrize("seed", range(3))
def test_flipped_image_has_flipped_targets(seed):
    height, width = 256, 384
    locations = locations_of(height, width)
    boxes, labels = random_boxes(12, height, width, seed).round(), torch.arange(12)
    flipped = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    a, b = (fcos_targets(locations, [x], [labels], 12) for x in (boxes, flipped))
    sizes = [(height // s, width // s) for s in STRIDES]
    mirror = torch.cat([x.view(h, w).flip(1).flatten() for x, (h, w) in
                        zip(torch.arange(len(locations.xy)).split([h * w for h, w in sizes]), sizes)])
    assert (a.labels < 12).sum() > 20
    assert torch.equal(a.labels[:, mirror], b.labels) and torch.equal(a.boxes[:, mirror], b.boxes)
    assert torch.equal(a.ltrb[:, mirror][..., [2, 1, 0, 3]], b.ltrb)


def test_boxes_are_counted_over_the_batch_and_empty_images_add_none():
    box, nothing = torch.tensor([[20.0, 20, 52, 52]]), torch.zeros(0, 4)
    one, none = torch.tensor([2]), torch.zeros(0, dtype=torch.int64)
    targets = fcos_targets(locations_of(64, 64), [nothing, box, nothing, box], [none, one, none, one], 3)
    assert [sorted(set(x.tolist())) for x in targets.boxes] == [[-1], [-1, 0], [-1], [-1, 1]]
    assert [set(x.tolist()) for x in targets.labels] == [{3}, {2, 3}, {3}, {2, 3}]
    assert all(x.dtype == torch.int64 for x in (targets.labels, targets.boxes))


# ------------------------------------------------------------------------------------------- select_instances


def test_golden_13_selection(golden):
    d = golden("13_topk_selection")
    chosen = []
    for image in d["im_inds"].unique():
        boxes = torch.where(d["im_inds"] == image, d["gt_inds"], -1)
        chosen += select_instances(d["logits"], d["ctr"], boxes).tolist()
    check("13 chosen locations", sorted(chosen), d["selected_rows"].sort().values, 0)
    check("13 limit of an image", inspect.signature(select_instances).parameters["limit"].default,
          d["budget_per_image"], 0)


@pytest.mark.parametrize("num_boxes", [1, 3, 20, 64, 100, 300])
def test_never_more_than_the_limit(num_boxes):
    generator = torch.Generator().manual_seed(num_boxes)
    boxes = torch.arange(1000) % (num_boxes + 1) - 1  # -1 is background
    logits, centerness = torch.randn(1000, 5, generator=generator), torch.randn(1000, generator=generator)
    rows = select_instances(logits, centerness, boxes)
    counts = boxes[rows].bincount(minlength=num_boxes)
    confidence = logits.amax(1).sigmoid() * centerness.sigmoid()
    share = max(64 // num_boxes, 1)
    assert len(rows) == len(rows.unique()) == min(64, share * num_boxes) and (boxes[rows] >= 0).all()
    assert counts.max() <= share
    assert (confidence[rows].diff() <= 0).all()
    best = [torch.where(boxes == g, confidence, -1).argmax().item() for g in range(num_boxes)]
    best.sort(key=lambda i: -confidence[i])
    assert set(best[:64]) <= set(rows.tolist())  # each box's best; of more boxes than the limit, the best 64


def test_fewer_positives_than_the_limit_are_all_chosen():
    rows = select_instances(torch.randn(6, 2), torch.randn(6), torch.tensor([-1, 4, -1, 4, 9, -1]))
    assert sorted(rows.tolist()) == [1, 3, 4]
    assert select_instances(torch.randn(6, 2), torch.randn(6), torch.full((6,), -1)).tolist() == []


# ----------------------------------------------------------------------------------------------------- Alg. 1


def listing(iou: torch.Tensor, scores: torch.Tensor, iou_threshold: float, score_threshold: float,
            taken_from: int = 0) -> list[int]:
    """Alg. 1 line by line, 0-based. taken_from=1 is the authors' program: prediction 0 does not keep its box."""
    assigned = [-1] * iou.shape[1]
    for i in scores.argsort(descending=True, stable=True).tolist():
        if scores[i] < score_threshold:
            continue
        u, v = -1.0, -1
        for j in range(iou.shape[1]):
            if assigned[j] >= taken_from:
                continue
            if iou[i, j] >= iou_threshold and iou[i, j] >= u:
                u, v = float(iou[i, j]), j
        if v >= 0:
            assigned[v] = i
    return assigned


@pytest.mark.parametrize("case", range(6))
def test_golden_10_assignment(golden, case):
    """`released_*` tests `index > 0` with 0-based indices: the box of prediction 0, the best, still counts as
    free and a worse prediction takes it over. We follow `paper_*`, where a box once taken stays taken."""
    every, end = golden("10_assignment"), f"_{case}"
    d = {key.removesuffix(end): x for key, x in every.items() if key.endswith(end)}
    check("10 IoU", box_iou(d["pred_boxes"], d["gt_boxes"]), d["iou"], 1e-5)
    thresholds = float(d["iou_thr"]), float(d["score_thr"])
    match = assign_masks(d["iou"], d["pred_scores"], *thresholds)
    released = torch.tensor(listing(d["iou"], d["pred_scores"], *thresholds, taken_from=1))
    for name, part, assigned in (("paper", "Alg. 1", match), ("released", "Alg. 1 with the quirk", released)):
        check(f"10 {part}", assigned, d[f"{name}_assigned"], 0)
        weight = torch.where(assigned >= 0, d["pred_mask_score"][assigned], 0.0)
        check(f"10 {part}, weights", weight, d[f"{name}_weight"], 1e-5)
    check("10 the quirk matters", not torch.equal(released, match), every["quirk_changes_answer"][case], 0)


@pytest.mark.parametrize("iou, scores, expected", [
    ([[0.6, 0.9]], [0.9], [-1, 0]),                               # the larger overlap
    ([[0.7, 0.7]], [0.9], [-1, 0]),                               # of equal ones the last
    ([[0.5], [0.9]], [0.9, 0.8], [0]),                            # prediction 0 keeps its box; 0.5 is enough
    ([[0.9], [0.5]], [0.8, 0.9], [1]),                            # the score decides, not the overlap
    ([[0.9, 0.6], [0.8, 0.55]], [0.9, 0.8], [0, 1]),              # the second one's best is taken: its next
    ([[0.9, 0.4], [0.8, 0.45]], [0.9, 0.8], [0, -1]),             # its next is too far off
    ([[0.9], [0.9]], [0.04, 0.03], [-1]),                         # not confident enough
    ([[0.9]], [0.05], [0]),
    ([[0.49, 0.2]], [1.0], [-1, -1]),
])
def test_assignment_by_hand(iou, scores, expected):
    assert assign_masks(torch.tensor(iou), torch.tensor(scores)).tolist() == expected


def test_a_score_of_nan_gives_no_mask_and_takes_no_turn():
    iou, scores = torch.tensor([[0.9, 0.6], [0.8, 0.7]]), torch.tensor([math.nan, 0.5])
    assert assign_masks(iou, scores).tolist() == [1, -1]


@pytest.mark.parametrize("n, g", [(0, 0), (0, 3), (5, 0)])
def test_assignment_without_predictions_or_boxes(n, g):
    match = assign_masks(torch.zeros(n, g), torch.rand(n))
    assert match.tolist() == [-1] * g and match.dtype == torch.int64


@pytest.mark.parametrize("seed", range(40))
def test_assignment_follows_the_listing(seed):
    generator = torch.Generator().manual_seed(seed)
    n, g = torch.randint(1, 12, (2,), generator=generator).tolist()
    iou = torch.rand(n, g, generator=generator).mul(10).round() / 10  # many equal overlaps
    scores = torch.rand(n, generator=generator).mul(20).round() / 20  # and equal scores
    match = assign_masks(iou, scores, 0.4, 0.2)
    assert match.tolist() == listing(iou, scores, 0.4, 0.2)
    given = match[match >= 0]
    assert len(given.unique()) == len(given)  # injective: no mask twice
    assert (iou[given, (match >= 0).nonzero()[:, 0]] >= 0.4).all() and (scores[given] >= 0.2).all()
    idle = [i for i in range(n) if i not in given and scores[i] >= 0.2]
    assert not (iou[idle][:, match < 0] >= 0.4).any()  # nobody who could serve a free box is left over
