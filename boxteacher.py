"""BoxTeacher on one page: from a batch of images with boxes to its losses (paper Fig. 2 and Sec. 3).

    batch -> teacher -> pseudo masks (Alg. 1) -> student -> L_det + L_box-sup + L_mask-sup

The same function without a teacher is BoxInst, and with the annotations' masks CondInst, the bounds of the paper.
"""
import argparse

import torch
from torch import Tensor, nn

from assign import batch_instances, fcos_targets
from data import Batch
from losses import (alike_labels, box_supervised_losses, detection_losses, dice_loss, disagreement,
                    mask_supervised_losses, over_processes, pair_weights, refine, similar_colors, valid_cells)
from masks import box_masks
from model import CondInst, mask_logits
from teacher import PseudoLabels, label


def compute_losses(student: nn.Module, teacher: CondInst | None, batch: Batch, args: argparse.Namespace,
                   autocast: torch.autocast) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The losses of a batch before the ramp, lambdas included, and counts. Fig. 2 from left to right.

    student: the network, or DDP around it. teacher: None for boxinst and condinst. Of args it reads method, score,
    pixel_loss, lambda_pixel, lambda_affinity. Networks run under `autocast`, masks and losses in float32.
    """
    # teacher: a mask and a score for each box
    pseudo = None
    if teacher is not None:
        with autocast:
            pseudo = label(teacher, batch, args.score)

    # student: detection
    with autocast:
        predictions = student(batch.images if batch.augmented is None else batch.augmented, batch.sizes)
    num_classes = predictions.class_logits.shape[-1]
    targets = fcos_targets(predictions.locations, batch.boxes, batch.labels, num_classes)
    losses = detection_losses(predictions, targets)

    # student: masks of K instances; gt (K,) is the box of each, counted over the batch as in `boxes`, or -1
    rows, gt = batch_instances(predictions, targets, batch.boxes)
    logits = mask_logits(predictions, rows)                                                    # (K, h, w) at stride 4
    counts = {"boxes": torch.full_like(gt.sum(), sum(map(len, batch.boxes))), "positives": (targets.boxes >= 0).sum(),
              "pseudo_masks": logits.new_zeros(())}
    if batch.masks is not None and args.method != "condinst":
        counts |= mask_quality(logits, gt, torch.cat(batch.masks), torch.cat(batch.boxes), pseudo)
    if args.method == "condinst":
        dice = dice_loss(logits.sigmoid(), torch.cat(batch.masks)[gt]) * (gt >= 0)
        losses["loss_mask"] = dice.sum() / over_processes((gt >= 0).sum())
        return losses, counts

    boxes, (h, w) = torch.cat(batch.boxes), logits.shape[-2:]
    image = torch.cat([torch.full_like(labels, i) for i, labels in enumerate(batch.labels)])       # (G,)
    inside = box_masks(boxes, h, w)                                                                # (G, h, w)
    valid = valid_cells(batch.sizes, batch.original_sizes, h, w, boxes.device)                     # (B, h, w)
    terms = disagreement(logits)
    color_weights = pair_weights([same[image] for same in similar_colors(batch.images)], inside, valid, image)
    losses |= box_supervised_losses(logits, terms, inside, color_weights, gt)

    if pseudo is not None:
        affinity_weights = pair_weights(alike_labels(refine(pseudo.masks)), inside, valid, image)
        pseudo_losses = mask_supervised_losses(logits, terms, pseudo.masks, pseudo.scores, affinity_weights, gt,
                                               args.pixel_loss)
        losses["loss_pixel"] = args.lambda_pixel * pseudo_losses["loss_pixel"]
        losses["loss_affinity"] = args.lambda_affinity * pseudo_losses["loss_affinity"]
        counts["pseudo_masks"] = (pseudo.scores > 0).sum()
    return losses, counts


@torch.no_grad()
def mask_quality(logits: Tensor, gt: Tensor, truth: Tensor, boxes: Tensor,
                 pseudo: PseudoLabels | None) -> dict[str, Tensor]:
    """Where the annotations' masks are at hand, how good the teacher's and the student's are: sums over boxes.

    logits (K, h, w) of instances of the boxes gt (K,); truth (G, h, w) bool; boxes (G, 4) xyxy pixels. A box has
    the mean IoU of its instances' masks, cut to the box as the teacher's are. The student's are looked at where the
    teacher gave a mask, so that the two can be compared. Nothing is learnt from this.
    """
    def iou(a: Tensor, b: Tensor) -> Tensor:
        return (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1)

    inside, zero = box_masks(boxes, *logits.shape[-2:]), logits.new_zeros(len(boxes))
    real, of = (gt >= 0).to(zero.dtype), gt.clamp(min=0)
    instances = zero.index_add(0, of, real)
    student = zero.index_add(0, of, real * iou((logits > 0) & inside[gt], truth[gt])) / instances.clamp(min=1)
    seen = instances > 0 if pseudo is None else (instances > 0) & (pseudo.scores > 0)
    quality = {"student_iou": (student * seen).sum(), "student_boxes": seen.sum()}
    if pseudo is not None:
        quality["label_iou"] = (iou(pseudo.masks > 0.5, truth) * (pseudo.scores > 0)).sum()
    return quality


RAMPED = ("loss_pairwise", "loss_pixel", "loss_affinity")  # misleading while masks are poor


def total_loss(losses: dict[str, Tensor], ramp: float) -> Tensor:
    """The sum that is minimised; `ramp`, 0 to 1, is the share of RAMPED that counts yet."""
    return sum(loss * (ramp if name in RAMPED else 1.0) for name, loss in losses.items())
