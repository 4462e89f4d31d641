"""BoxTeacher on one page: from a batch of images with boxes to its losses (paper Fig. 2 and Sec. 3).

    batch -> teacher -> pseudo masks (Alg. 1) -> student -> L_det + L_box-sup + L_mask-sup

Without a teacher this is BoxInst. With ground-truth masks instead of the box losses it is CondInst, the fully
supervised upper bound.

Letters, here and in the files below: B images, L locations and C classes of FCOS, G boxes of the batch (G_b in image b;
the paper's K), N detections of an image, K instances, that is locations that learn a mask, (h, w) the stride-4 grid.
"""
from typing import NamedTuple

import torch
from torch import Tensor, nn

from assign import batch_instances, fcos_targets
from data import Batch
from losses import (affinity_pairs, box_supervised_losses, color_pairs, detection_losses, dice_loss, disagreement,
                    mask_grid, mask_supervised_losses, mean_over_processes)
from model import CondInst, mask_logits
from teacher import PseudoLabels, pseudo_label, refined_label


# The lambdas of Eq. 2 are multiplied by this for refined pseudo masks, which are nearer to the true ones than the
# teacher's own. Measured in EXPERIMENTS.md, not from the paper.
REFINED_WEIGHT = 4.0


class Step(NamedTuple):
    """The losses of a batch; the other fields are for measuring (tools/quality.py)."""

    losses: dict[str, Tensor]     # before the ramp, lambdas included
    positives: Tensor             # number of positive locations
    logits: Tensor                # (K, h, w) masks of the instances, at stride 4
    box: Tensor                   # (K,) index of the instance's box in torch.cat(batch.boxes)
    pseudo: PseudoLabels | None   # the teacher's masks of the boxes
    refined: bool = False         # whether these are refined ones, not the paper's


def boxteacher_losses(student: nn.Module, teacher: CondInst | None, batch: Batch, score: str = "mask-aware",
                      pixel_loss: str = "dice", lambda_pixel: float = 0.5, lambda_affinity: float = 0.1,
                      fit_steps: int = 0, colors: bool = False) -> Step:
    """Fig. 2 from left to right; the EMA follows the optimiser's step (train.train_step).

    student: the network, or DDP around it; teacher: None for BoxInst; score: one of teacher.SCORES, or "released";
    pixel_loss: one of losses.PIXEL_LOSSES. With fit_steps or colors pseudo masks are refined ones, see
    teacher.refined_label: these weigh REFINED_WEIGHT times as much, and `score` has no use.
    """
    refined = bool(fit_steps or colors)
    pseudo = None if teacher is None or refined else pseudo_label(teacher, batch, score)    # Eq. 1, Alg. 1

    losses, positives, logits, box = detect_and_segment(student, batch)             # L_det

    chosen, place = box.unique(return_inverse=True)         # the boxes that learn masks; (K,) places among them
    if teacher is not None and refined:     # for the boxes that learn a mask; not from the paper
        pseudo = refined_label(teacher, batch, chosen, fit_steps, colors)
    grid = mask_grid(batch, chosen, *logits.shape[-2:])
    costs = disagreement(logits)                                                    # of each pair of cells
    similar = color_pairs(batch.images, grid)                                       # of the clean view
    losses |= box_supervised_losses(logits, costs, grid.inside, similar, place)     # L_box-sup

    if pseudo is not None:                                                          # L_mask-sup, Eq. 2
        masks, scores = pseudo.of(chosen)
        affine = affinity_pairs(masks, grid)                                        # Eq. 3, 4
        noisy = mask_supervised_losses(logits, costs, masks, scores, affine, place, pixel_loss)     # Eq. 5
        weight = REFINED_WEIGHT if refined else 1.0
        losses |= {"loss_pixel": weight * lambda_pixel * noisy["loss_pixel"],
                   "loss_affinity": weight * lambda_affinity * noisy["loss_affinity"]}
    return Step(losses, positives, logits, box, pseudo, refined)


def condinst_losses(student: nn.Module, batch: Batch) -> Step:
    """The mask-supervised bound: dice against the annotations' masks."""
    losses, positives, logits, box = detect_and_segment(student, batch)
    dice = dice_loss(logits.sigmoid(), torch.cat(batch.masks)[box])
    losses["loss_mask"] = dice.sum() / mean_over_processes(dice.new_tensor(len(dice)))
    return Step(losses, positives, logits, box, None)


def detect_and_segment(student: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """The student's detection losses, and the masks of its K instances.

    Returns the losses, the number of positive locations, and logits (K, h, w) and box (K,) of the instances, see Step.
    """
    predictions = student(batch.images if batch.augmented is None else batch.augmented, batch.sizes)
    targets = fcos_targets(predictions.locations, batch.boxes, batch.labels, predictions.class_logits.shape[-1])
    locations, box = batch_instances(predictions, targets)
    return detection_losses(predictions, targets), (targets.boxes >= 0).sum(), mask_logits(predictions, locations), box


# misleading while masks are poor; the authors' code, not the paper, raises their weights from 0 as training starts
RAMPED = ("loss_pairwise", "loss_pixel", "loss_affinity")


def total_loss(losses: dict[str, Tensor], ramp: float, refined: bool = False) -> Tensor:
    """The sum that is minimised; `ramp`, 0 to 1, scales the losses of RAMPED.

    Refined pseudo masks need no trained network to be good, so they count in full from the first step.
    """
    ramped = set(RAMPED) - {"loss_pixel", "loss_affinity"} if refined else RAMPED
    return sum(loss * (ramp if name in ramped else 1.0) for name, loss in losses.items())
