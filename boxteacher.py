"""BoxTeacher on one page: from a batch of images with boxes to its losses (paper Fig. 2 and Sec. 3).

    batch -> teacher -> pseudo masks (Alg. 1) -> student -> L_det + L_box-sup + L_mask-sup

Without a teacher this is BoxInst; with the annotations' masks in place of the boxes it is CondInst: the paper's bounds.
"""
from typing import NamedTuple

import torch
from torch import Tensor, nn

from assign import batch_instances, fcos_targets
from data import Batch
from losses import (affinity_pairs, box_supervised_losses, color_pairs, detection_losses, dice_loss, disagreement,
                    mask_grid, mask_supervised_losses, over_processes)
from model import CondInst, mask_logits
from teacher import PseudoLabels, pseudo_label


class Step(NamedTuple):
    """The losses of a batch, and what they were computed from."""

    losses: dict[str, Tensor]     # before the ramp, lambdas included
    positives: Tensor             # number of locations that learn a box
    logits: Tensor                # (K, h, w) masks of the instances, at stride 4
    box: Tensor                   # (K,) the box of each instance, counted over the batch
    pseudo: PseudoLabels | None   # the teacher's masks of the boxes


def boxteacher_losses(student: nn.Module, teacher: CondInst | None, batch: Batch, score: str = "mask-aware",
                      pixel_loss: str = "dice", lambda_pixel: float = 0.5, lambda_affinity: float = 0.1) -> Step:
    """Fig. 2 from left to right. Without a teacher this is BoxInst.

    student: the network, or DDP around it; score: one of teacher.SCORES; pixel_loss: one of losses.PIXEL_LOSSES.
    """
    pseudo = None if teacher is None else pseudo_label(teacher, batch, score)       # Eq. 1, Alg. 1

    losses, positives, logits, box = detect_and_segment(student, batch)             # L_det

    grid = mask_grid(batch, *logits.shape[-2:])
    costs = disagreement(logits)                                                    # of each pair of cells
    losses |= box_supervised_losses(logits, costs, grid.inside, color_pairs(batch.images, grid), box)    # L_box-sup

    if pseudo is not None:                                                          # L_mask-sup, Eq. 2
        noisy = mask_supervised_losses(logits, costs, pseudo.masks, pseudo.scores, affinity_pairs(pseudo.masks, grid),
                                       box, pixel_loss)
        losses |= {"loss_pixel": lambda_pixel * noisy["loss_pixel"],
                   "loss_affinity": lambda_affinity * noisy["loss_affinity"]}
    return Step(losses, positives, logits, box, pseudo)


def condinst_losses(student: nn.Module, batch: Batch) -> Step:
    """The mask-supervised bound: dice against the annotations' masks."""
    losses, positives, logits, box = detect_and_segment(student, batch)
    dice = dice_loss(logits.sigmoid(), torch.cat(batch.masks)[box])
    losses["loss_mask"] = dice.sum() / over_processes(dice.new_tensor(len(dice)))
    return Step(losses, positives, logits, box, None)


def detect_and_segment(student: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """The student's detection losses, and the masks of its K instances.

    Returns the losses, the number of positive locations, mask logits (K, h, w) and the box of each instance (K,).
    """
    predictions = student(batch.images if batch.augmented is None else batch.augmented, batch.sizes)
    targets = fcos_targets(predictions.locations, batch.boxes, batch.labels, predictions.class_logits.shape[-1])
    locations, box = batch_instances(predictions, targets)
    return detection_losses(predictions, targets), (targets.boxes >= 0).sum(), mask_logits(predictions, locations), box


RAMPED = ("loss_pairwise", "loss_pixel", "loss_affinity")  # misleading while masks are poor


def total_loss(losses: dict[str, Tensor], ramp: float) -> Tensor:
    """The sum that is minimised; `ramp`, 0 to 1, scales the losses of RAMPED."""
    return sum(loss * (ramp if name in RAMPED else 1.0) for name, loss in losses.items())
