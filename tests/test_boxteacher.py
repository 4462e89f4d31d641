"""boxteacher.py: which view of an image each part of the method reads, what its arguments change."""
import pytest
import torch

import boxteacher
from boxteacher import RAMPED, boxteacher_losses, condinst_losses, total_loss
from data import Batch
from model import build_model
from teacher import PseudoLabels

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
    return PseudoLabels(masks, torch.tensor([0.8]))


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


def test_the_pixel_loss_is_a_parameter(student, batch, monkeypatch):
    monkeypatch.setattr(boxteacher, "pseudo_label", pseudo_mask)
    student.eval()
    found = [float(boxteacher_losses(student, student, batch, pixel_loss=name).losses["loss_pixel"].detach())
             for name in ("dice", "bce", "avg", "none")]
    assert len(set(found)) == 4 and found[-1] == 0


def test_the_ramp_scales_what_misleads_at_first():
    losses = dict.fromkeys(("loss_cls", "loss_projection", *RAMPED), torch.tensor(1.0))
    assert float(total_loss(losses, 0.25)) == 2 + 3 * 0.25
