"""boxteacher.py: which view of an image each part of the method reads, what its arguments change, that a batch may be
split among processes, and what crowded images cost."""
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import boxteacher
from boxteacher import RAMPED, boxteacher_losses, condinst_losses, total_loss
from data import Batch
from helpers import given_parameters, make_batch, random_predictions, relative_error
from losses import (affinity_pairs, box_supervised_losses, color_pairs, disagreement, mask_grid,
                    mask_supervised_losses)
from model import STRIDES, Predictions, build_model, make_locations
from teacher import PseudoLabels
from tools.measuring import tensor_peak
from tools.quality import measure

SIZE = (64, 96)  # (height, width)


@pytest.fixture
def batch() -> Batch:
    """One image with one box; its clean, augmented and teacher's views are different noise."""
    def noise(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (1, 3, *SIZE), generator=generator, dtype=torch.uint8)

    inside = torch.zeros(1, 16, 24, dtype=torch.bool)
    inside[0, 3:12, 3:16] = True
    return Batch(images=noise(0), sizes=[SIZE], original_sizes=[SIZE], image_ids=[1],
                 boxes=[torch.tensor([[12.0, 12, 64, 48]])], labels=[torch.tensor([1])], augmented=noise(1),
                 teacher_images=noise(2), teacher_sizes=[SIZE], masks=[inside], skipped=[])


@pytest.fixture
def student():
    torch.manual_seed(0)
    return build_model("r18-slim", 3, channels=32, frozen=False)


def pseudo_mask(*_) -> PseudoLabels:
    masks = torch.zeros(1, 16, 24)
    masks[0, 4:10, 4:14] = 0.9
    return PseudoLabels(masks, torch.tensor([0]), torch.tensor([0.8]))


def seen_by(network, losses) -> torch.Tensor:
    """The images that a forward pass of the network gets while `losses` are computed."""
    images = []
    handle = network.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0]))
    losses()
    handle.remove()
    assert len(images) == 1
    return images[0]


def test_the_student_sees_the_augmented_view_if_there_is_one(student, batch):
    clean = batch._replace(augmented=None)
    for losses in (lambda b: boxteacher_losses(student, None, b), lambda b: condinst_losses(student, b)):
        assert torch.equal(seen_by(student, lambda: losses(batch)), batch.augmented)
        assert torch.equal(seen_by(student, lambda: losses(clean)), batch.images)


def test_the_teacher_sees_its_clean_view(student, batch):
    teacher = build_model("r18-slim", 3, channels=32, frozen=False)
    assert torch.equal(seen_by(teacher, lambda: boxteacher_losses(student, teacher, batch)), batch.teacher_images)


def test_colours_are_those_of_the_clean_view(student, batch):
    """A clean view in which no two cells of a pair have one colour has no pairwise loss, whatever the augmented one."""
    y, x = torch.meshgrid(torch.arange(64) // 8 % 2, torch.arange(96) // 8 % 2, indexing="ij")
    colours = torch.tensor([[0, 255, 0, 255], [0, 0, 255, 255], [255, 0, 0, 255]], dtype=torch.uint8)
    checked, plain = colours[:, 2 * y + x][None], torch.full((1, 3, 64, 96), 90, dtype=torch.uint8)
    for clean, augmented, pairs in ((checked, plain, False), (plain, checked, True)):
        step = boxteacher_losses(student, None, batch._replace(images=clean, augmented=augmented))
        assert (step.losses["loss_pairwise"] > 0) == pairs


def test_lambdas_scale_their_loss_and_no_other(student, batch, monkeypatch):
    monkeypatch.setattr(boxteacher, "pseudo_label", pseudo_mask)
    student.eval()
    with torch.no_grad():
        one = boxteacher_losses(student, student, batch, lambda_pixel=1, lambda_affinity=1).losses
        paper = boxteacher_losses(student, student, batch).losses
    ratio = {name: float(paper[name] / one[name]) for name in one}
    assert ratio == pytest.approx(dict.fromkeys(one, 1.0) | {"loss_pixel": 0.5, "loss_affinity": 0.1})
    assert all(one[name] > 0 for name in ("loss_pixel", "loss_affinity"))
    monkeypatch.setattr(boxteacher, "refined_label", pseudo_mask)  # the same masks, taken for refined ones
    with torch.no_grad():
        refined = boxteacher_losses(student, student, batch, colors=True).losses
    ratio = {name: float(refined[name] / one[name]) for name in one}
    assert ratio == pytest.approx(dict.fromkeys(one, 1.0) | {"loss_pixel": 2.0, "loss_affinity": 0.4})


def test_the_pixel_loss_is_a_parameter(student, batch, monkeypatch):
    monkeypatch.setattr(boxteacher, "pseudo_label", pseudo_mask)
    student.eval()
    found = [float(boxteacher_losses(student, student, batch, pixel_loss=name).losses["loss_pixel"].detach())
             for name in ("dice", "bce", "avg", "none")]
    assert len(set(found)) == 4 and found[-1] == 0


@pytest.mark.parametrize("how", [{"fit_steps": 2}, {"colors": True}])
def test_refined_masks_take_the_place_of_those_of_alg_1(student, batch, monkeypatch, how):
    """For the boxes that learn masks; neither Alg. 1 nor the score plays a part."""
    given = []

    def refined(teacher, batch, chosen, *rest) -> PseudoLabels:
        given.append((chosen.tolist(), rest))
        return pseudo_mask()

    monkeypatch.setattr(boxteacher, "pseudo_label", lambda *_: pytest.fail("the masks of Alg. 1"))
    monkeypatch.setattr(boxteacher, "refined_label", refined)
    two = torch.tensor([[12.0, 12, 64, 48], [1.0, 1, 2, 2]])  # the second lies between the locations
    both = batch._replace(boxes=[two], labels=[torch.tensor([1, 1])])
    assert boxteacher_losses(student, student, both, **how).losses["loss_pixel"] > 0
    assert boxteacher_losses(student, student, both, **how).refined and len(given) == 2 and given.pop()
    assert given == [([0], (how.get("fit_steps", 0), how.get("colors", False)))]
    boxteacher_losses(student, None, batch, **how)  # BoxInst has no pseudo masks
    assert len(given) == 1


def test_the_masks_of_alg_1_are_the_default(student, batch, monkeypatch):
    monkeypatch.setattr(boxteacher, "refined_label", lambda *_: pytest.fail("refined"))
    monkeypatch.setattr(boxteacher, "pseudo_label", pseudo_mask)
    assert boxteacher_losses(student, student, batch).losses["loss_pixel"] > 0


def test_the_ramp_scales_what_misleads_at_first():
    losses = dict.fromkeys(("loss_cls", "loss_projection", *RAMPED), torch.tensor(1.0))
    assert float(total_loss(losses, 0.25)) == 2 + 3 * 0.25
    assert float(total_loss(losses, 0.25, refined=True)) == 4 + 0.25  # of the pairwise loss alone


# ----------------------------------------------------------------------------------- one batch, several processes


def random_batch(generator: torch.Generator, count: int, most: int = 3) -> tuple[Batch, list, PseudoLabels]:
    """Images with 0 to `most` boxes, half of them without; what a student predicts on them, as leaves; pseudo masks."""
    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    counts = [max(int(random(1) * (2 * most + 1)) - most, 0) for _ in range(count)]
    boxes = [random(n, 2, 2).sort(1).values.flatten(1) * 64 for n in counts]
    colours = (random(count, 3, 16, 16) > 0.5).byte().repeat_interleave(4, 2).repeat_interleave(4, 3) * 99
    batch = make_batch([b.tolist() for b in boxes], (64, 64), (64, 64), (64, 64))._replace(
        images=colours, masks=[random(len(b), 16, 16) > 0.5 for b in boxes])
    locations = make_locations([(-(-64 // s),) * 2 for s in STRIDES], batch.images.device)
    leaves = [random(count, len(locations.xy), *shape) for shape in ((3,), (4,), (), (233,))]
    leaves[3], features, total = leaves[3] - 0.5, random(count, 16, 8, 8) - 0.5, sum(map(len, boxes))
    scores = random(total) * (random(total) > 0.5)
    given = scores.nonzero()[:, 0]
    pseudo = PseudoLabels(random(len(given), 16, 16), given, scores)
    return batch, [x.requires_grad_() for x in (*leaves, features)], pseudo


def predictions_on(images: slice, leaves: list) -> Predictions:
    class_logits, ltrb, centerness, parameters, features = (x[images] for x in leaves)
    locations = make_locations([(-(-64 // s),) * 2 for s in STRIDES], class_logits.device)
    return Predictions(class_logits, ltrb, centerness, mask_features=features, locations=locations,
                       **given_parameters(parameters, (64, 64)))


def losses_on(images: slice, batch: Batch, leaves: list, pseudo: PseudoLabels) -> tuple[dict, dict]:
    """Every loss of all methods on some images of a random batch, and the counts that are logged."""
    predictions = predictions_on(images, leaves)
    share = batch._replace(**{name: getattr(batch, name)[images] for name in (
        "images", "sizes", "original_sizes", "image_ids", "boxes", "labels", "masks")})
    first, end = (sum(map(len, batch.boxes[:i])) for i in (images.start, images.stop))
    here = (pseudo.box >= first) & (pseudo.box < end)
    own = PseudoLabels(pseudo.masks[here], pseudo.box[here] - first, pseudo.scores[first:end])
    with patch.object(boxteacher, "pseudo_label", lambda *_: own):
        step = boxteacher_losses(lambda *_: predictions, "teacher", share)
    return step.losses | condinst_losses(lambda *_: predictions, share).losses, measure(step, share)


@pytest.mark.parametrize("seed", range(10))
def test_losses_do_not_depend_on_the_number_of_processes(seed, monkeypatch):
    """However a batch is split: the mean of its processes' losses, and its gradient, which DDP averages, are those of
    one process. all_reduce is played: a first run of each process notes its counts, which a second one gets summed."""
    generator = torch.Generator().manual_seed(seed)
    batch, leaves, pseudo = random_batch(generator, 4)
    expected, counts = losses_on(slice(0, 4), batch, leaves, pseudo)
    gradients = torch.autograd.grad(sum(expected.values()), leaves)
    for processes in (2, 3, 4):
        cuts = [0, *sorted((torch.randperm(3, generator=generator)[:processes - 1] + 1).tolist()), 4]
        shares, noted = [slice(*cut) for cut in zip(cuts, cuts[1:])], []
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: processes)
        for share in shares:
            noted.append([])
            monkeypatch.setattr(dist, "all_reduce", lambda count: noted[-1].append(count.clone()))
            losses_on(share, batch, leaves, pseudo)
        assert len({len(counts) for counts in noted}) == 1  # or they would wait for each other for ever
        found = []
        for share in shares:
            totals = iter([torch.stack(counts).sum(0) for counts in zip(*noted)])
            monkeypatch.setattr(dist, "all_reduce", lambda count: count.copy_(next(totals)))
            found.append(losses_on(share, batch, leaves, pseudo))
        monkeypatch.undo()
        means = {name: sum(losses[name] for losses, _ in found) / processes for name in expected}
        for name, loss in expected.items():
            assert relative_error(means[name], loss) < 1e-5, (name, processes)
        for ours, gradient in zip(torch.autograd.grad(sum(means.values()), leaves), gradients):
            assert relative_error(ours, gradient) < 1e-4, processes
        for name, count in counts.items():
            assert relative_error(sum(x[name] for _, x in found), count) < 1e-5, name


# ------------------------------------------------------------------------------------------------ crowded images


@pytest.mark.parametrize("seed", range(5))
def test_masks_of_boxes_that_learn_none_are_not_missed(seed):
    """To the bit, losses and gradients are those with the masks and pairs of all boxes."""
    batch, leaves, pseudo = random_batch(torch.Generator().manual_seed(seed), 8, 60)
    predictions, every = predictions_on(slice(0, 8), leaves), torch.arange(len(pseudo.scores))
    with patch.object(boxteacher, "pseudo_label", lambda *_: pseudo):
        ours, _, logits, box, *_ = boxteacher_losses(lambda *_: predictions, "teacher", batch)
    assert 10 < len(box.unique()) < len(every) - 10
    grid, costs = mask_grid(batch, every, *logits.shape[-2:]), disagreement(logits)
    masks, scores = pseudo.of(every)
    noisy = mask_supervised_losses(logits, costs, masks, scores, affinity_pairs(masks, grid), box)
    plain = {name: ours[name] for name in ("loss_cls", "loss_box", "loss_centerness")} | box_supervised_losses(
        logits, costs, grid.inside, color_pairs(batch.images, grid), box)
    plain |= {"loss_pixel": 0.5 * noisy["loss_pixel"], "loss_affinity": 0.1 * noisy["loss_affinity"]}
    assert ours.keys() == plain.keys() and all(torch.equal(ours[name], plain[name]) for name in ours)
    found, expected = (torch.autograd.grad(sum(losses.values()), leaves, retain_graph=True) for losses in (ours, plain))
    assert all(torch.equal(*pair) for pair in zip(found, expected))


def test_thousands_of_boxes_fit_into_memory():
    """3,000 boxes take 12 MiB for one byte of each of their cells; a step needs less than that in addition."""
    size = (256, 256)
    predictions, generator = random_predictions(*size), torch.Generator().manual_seed(0)
    boxes = torch.rand(3000, 2, 2, generator=generator).sort(1).values.flatten(1) * 256
    peaks = []
    for count in (100, 3000):
        batch = make_batch([boxes[:count].tolist()], size, size, size)
        work = lambda: measure(boxteacher_losses(lambda *_: predictions, lambda *_: predictions, batch), batch)
        peaks.append(tensor_peak(work, torch.device("cpu")))
    assert peaks[1] < peaks[0] + 12
