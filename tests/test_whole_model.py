"""The whole network beside the authors' program: golden 11 (R-50) and 15 (Swin-B) from pixels to detections, and
golden 12, one training step. The weights go in through the released key names."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import boxteacher
from data import Batch
from helpers import check
from model import PIXEL_STD, build_model, detect, load_model, mask_logits, predict
from masks import aligned_bilinear, paste_masks
from formats.released import CHECKPOINT, our_name, read_checkpoint
from released_files import GOLDEN, SWIN_B, network, released
from recipe import make_plan, ramp_factor
from teacher import make_teacher, pseudo_label


def sampled(part: str, actual: torch.Tensor, d: dict, name: str, tolerance: float = 1e-4) -> None:
    """Compare a tensor with one of which a golden file holds some elements."""
    assert list(actual.shape) == d[f"{name}__shape"].tolist()
    check(part, actual.flatten()[d[f"{name}__idx"]], d[f"{name}__val"], tolerance)


def padded(images: list[torch.Tensor]) -> torch.Tensor:
    height, width = (-(-max(image.shape[k] for image in images) // 32) * 32 for k in (1, 2))
    return torch.stack([F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images])


def same_order(boxes, labels, d: dict) -> torch.Tensor:
    """Of each of ours, the place in the golden file of the detection with the same class and about the same box."""
    distance = (boxes[:, None] - d["det_boxes"]).abs().amax(2)
    distance[labels[:, None] != d["det_classes"]] = math.inf
    place = distance.argmin(1)
    assert len(place) == len(d["det_boxes"]) == len(place.unique())
    return place


@pytest.fixture(scope="module")
def r50_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "boxteacher_r50.pth"
    torch.save(released("boxteacher_r50"), path)
    return path


@pytest.mark.parametrize("part, file", [("11 R-50", "11_full_eval"), ("15 Swin-B", "15_swin_eval")])
def test_golden_11_and_15_from_pixels_to_detections(golden, r50_file, part, file):
    """All levels of the network, then what evaluation reports: boxes, rescored scores, masks."""
    d = golden(file)
    if "R-50" in part:
        model, info = load_model(r50_file)
        assert (info["method"], info["iteration"], info["model"]["stride_in_1x1"]) == ("boxteacher", 90_000, True)
    else:
        state = read_checkpoint({"model": {f"{which}.{key}": value for key, value in network(SWIN_B).items()
                                           for which in ("teacher", "student")}}, PIXEL_STD)
        model = build_model(**state["model"]).eval()
        model.load_state_dict(state["teacher"])
    image = d["image_bgr"].flip(0)
    size, output_size = tuple(image.shape[1:]), tuple(d["output_hw"].tolist())
    images = padded([image])
    assert list(images.shape[2:]) == d["padded_hw"].tolist()

    with torch.no_grad():
        maps = model.backbone(model.normalise(images, [size]))
        pyramid = model.fpn(maps)
        predictions = model(images, [size])
    stages = [name for name in d if name.startswith("bottomup") and name.endswith("__shape")]
    for name, x in zip(stages, maps):
        sampled(f"{part} C3 to C5", x, d, name.removesuffix("__shape"))
    for level, x in enumerate(pyramid):
        sampled(f"{part} FPN", x, d, f"fpn_p{level + 3}")
    if "mask_feats__shape" in d:
        sampled(f"{part} mask features", predictions.mask_features, d, "mask_feats")
        locations = [torch.arange(len(predictions.locations.xy))]
        params = predictions.controller.at(predictions.box_maps, locations)[None]
        for level, x in enumerate(pyramid):
            here = predictions.locations.level == level
            for name, ours in (("logits", predictions.class_logits), ("ltrb", predictions.ltrb),
                               ("ctr", predictions.centerness[..., None]), ("params", params)):
                ours = ours[:, here].transpose(1, 2).unflatten(2, x.shape[-2:])
                sampled(f"{part} head: {name}", ours, d, f"head_{name}_{level}")

    found = predict(model, images, [size], [output_size])[0]
    place = same_order(found.boxes, found.labels, d)
    check(f"{part} detections: boxes", found.boxes, d["det_boxes"][place], 1e-4)
    check(f"{part} detections: scores", found.scores, d["det_scores"][place], 1e-4)
    detections = detect(predictions.of_image(0))
    assert len(detections.locations) == len(place)  # no box lies outside of the image: all are in the file
    locations, level = predictions.locations.xy[detections.locations], predictions.locations.level[detections.locations]
    check(f"{part} detections: locations", locations, d["det_locations"][place], 0)
    check(f"{part} detections: levels", level, d["det_levels"][place], 0)

    logits = mask_logits(predictions, [detections.locations])
    p = aligned_bilinear(logits.sigmoid()[None], 4)[..., :size[0], :size[1]]
    p = F.interpolate(p, size=output_size, mode="bilinear")[0]
    certain, possible = p > 0.5 + 3e-5, p > 0.5 - 3e-5  # between the two, rounding decides
    assert (certain <= found.masks).all() and (found.masks <= possible).all()
    expected, low, high = d["det_mask_pixels"][place], certain.sum((1, 2)), possible.sum((1, 2))
    check(f"{part} detections: pixels of a mask", expected.clamp(low, high), expected, 0)
    if "det_masks_32" in d:
        expected = d["det_masks_32"][place].float()
        low, high = (F.adaptive_avg_pool2d(x.float()[:, None], 32)[:, 0] * 255 for x in (certain, possible))
        check(f"{part} detections: masks in 32 x 32 bins", expected.clamp(low, high), expected, 1 / 255)
        quality = paste_masks(logits, size, output_size)[1]
        check(f"{part} detections: weight as pseudo mask", (detections.scores.sqrt() * quality).sqrt(),
              d["det_mask_score"][place], 1e-4)


def batch_of_golden_12(d: dict) -> Batch:
    """The student's two images, and the teacher's made as the authors' program makes them: out of the student's."""
    images = [d[f"image_bgr_{i}"].flip(0).float() for i in range(2)]
    large = []
    for image in images:
        h, w = image.shape[1:]
        scale = min(800 / min(h, w), 1333 / max(h, w))
        size = (int(h * scale + 0.5), int(w * scale + 0.5))
        large.append(F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0])
    return Batch(images=padded(images), sizes=[tuple(x.shape[1:]) for x in images],
                 original_sizes=[tuple(d[f"orig_hw_{i}"].tolist()) for i in range(2)], image_ids=[0, 1],
                 boxes=[d[f"boxes_{i}"] for i in range(2)], labels=[d[f"classes_{i}"] for i in range(2)],
                 augmented=None, teacher_images=padded(large), teacher_sizes=[tuple(x.shape[1:]) for x in large],
                 masks=None, skipped=[])


THEIRS = {"loss_cls": "fcos_cls", "loss_box": "fcos_loc", "loss_centerness": "fcos_ctr", "loss_projection": "prj",
          "loss_pairwise": "pairwise", "loss_pixel": "mask", "loss_affinity": "mask_affinity"}


def ramp_at(iteration: int) -> float:
    """Of the 1x schedule. Their counter starts at 1, our iterations at 0."""
    return ramp_factor(iteration - 1, make_plan(schedule="1x"))


with np.load(GOLDEN / "12_train_step.npz") as file:  # their names are text, which tensors cannot hold
    GROUPS, PARAMETERS, BATCH_NORMS = (file[key].tolist() for key in ("grad_group_names", "param_names", "bn_names"))


@pytest.fixture(scope="module")
def step(golden, r50_file):
    """One step in training mode: golden numbers, batch, networks, losses, positives and the labels of both kinds."""
    d, seen = golden("12_train_step"), []

    def both_labels(teacher, batch, score):
        with torch.no_grad():
            predictions = teacher(batch.teacher_images, batch.teacher_sizes)
            seen.extend(pseudo_label(lambda *_: predictions, batch, kind) for kind in (score, "mask-aware"))
        return seen[0]

    student = load_model(r50_file)[0].train()  # golden 12 has the same weights for both
    teacher, batch = make_teacher(student), batch_of_golden_12(d)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boxteacher, "pseudo_label", both_labels)
        losses, positives = boxteacher.boxteacher_losses(student, teacher, batch, "released")[:2]
    return SimpleNamespace(d=d, batch=batch, student=student, teacher=teacher, losses=losses, positives=positives,
                           labels=seen[0], paper=seen[1])


def test_golden_12_labels(step):
    """What the teacher says of the twelve boxes with `--score released`, and what our default says, which follows the
    paper: it labels the same boxes, one of them with another mask, and lets them weigh less."""
    weights = torch.cat([step.d[f"pseudo_flags_{i}"] for i in range(2)])
    check("12 weights of pseudo masks", step.labels.scores, weights, 1e-4)
    pixels = torch.cat([step.d[f"pseudo_s4_pixels_{i}"] for i in range(2)])
    ours, paper = (labels.of(torch.arange(len(weights)))[0] for labels in (step.labels, step.paper))
    check("12 cells of pseudo masks", ours.sum((1, 2)), pixels, 0)
    assert ((step.paper.scores > 0) == (weights > 0)).all() and (weights > 0).sum() == 10
    assert (step.paper.scores < weights)[weights > 0].all()
    assert ((paper > 0.5).sum((1, 2)) == pixels).sum() == 11
    assert ours.unique().tolist() == [0, 1] and len(paper.unique()) > 100


def test_golden_12_losses(step):
    ramp = ramp_at(5000)
    for name, theirs in THEIRS.items():
        ours = step.losses[name] * (ramp if name in boxteacher.RAMPED else 1)
        check(f"12 {name}", ours, step.d[f"loss_{theirs}"], 1e-5)
    check("12 sum of the losses", boxteacher.total_loss(step.losses, ramp), step.d["loss_total"], 1e-5)
    check("12 number of positives", step.positives, step.d["num_positive_locations"], 0)


def test_golden_12_batch_norms(step):
    """Both networks move their own averages, the teacher's from its own images."""
    for which in ("teacher", "student"):
        state = getattr(step, which).state_dict()
        for name, expected in zip(BATCH_NORMS, step.d[f"bn_{which}_after"]):
            check(f"12 batch norms of the {which}", state[name], expected, 1e-5)


def test_golden_12_gradients(step, r50_file, monkeypatch):
    """In float64: a maximum or a ReLU that decides between nearly equal numbers may decide otherwise when rounding
    changes, and then, in float32, a norm moves by up to 1e-3 from one kernel of a convolution to the next."""
    d = step.d
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    labels = step.labels._replace(masks=step.labels.masks.double(), scores=step.labels.scores.double())
    monkeypatch.setattr(boxteacher, "pseudo_label", lambda *_: labels)
    images = step.batch.images.double()
    batch = step.batch._replace(images=images, boxes=[boxes.double() for boxes in step.batch.boxes])
    student = load_model(r50_file)[0].train().double()
    losses = boxteacher.boxteacher_losses(student, step.teacher, batch, "released").losses
    boxteacher.total_loss(losses, ramp_at(5000)).backward()

    gradients = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    ours = {key: gradients[our_name(key, CHECKPOINT)] for key in PARAMETERS}
    ours |= {f"proposal_generator.fcos_head.scales.{i}.scale": x for i, x in enumerate(student.head.scales.grad)}
    assert set(ours) == set(PARAMETERS) and {our_name(key, CHECKPOINT) for key in ours} == set(gradients)
    norms = torch.stack([ours[name].norm() for name in PARAMETERS])
    expected = d["param_grad_norms"].double()
    none = expected < 1e-6  # such as biases before a batch norm
    check("12 gradient norm of every parameter", (norms / expected)[~none], torch.ones(len(norms))[~none], 1e-4)
    assert none.sum() < 10 and norms[none].max() < 1e-6
    for group, expected in zip(GROUPS, d["grad_group_norms"]):
        squares = [norm ** 2 for name, norm in zip(PARAMETERS, norms) if group in name]
        check("12 gradient norm of every part", sum(squares).sqrt() / expected, torch.ones(()), 1e-5)
