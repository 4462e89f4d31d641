"""model.py: the dynamic mask head, inference from head outputs to pasted masks, the network's parts."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model as model_module
from helpers import check, head_maps, predictions_of, relative_error
from model import (SIZES_OF_INTEREST, STRIDES, Controller, Detections, Instances, build_model, confident, detect,
                   dynamic_mask_head, mask_logits, num_mask_params, predict)
from masks import aligned_bilinear, decode, encode, paste_masks


# ------------------------------------------------------------------------------------------------ controller


def test_the_controller_at_locations_is_the_convolution_of_whole_maps():
    """Values and gradients, at borders and in a level of one cell too; without locations; names of the parameters."""
    torch.manual_seed(0)
    layer = Controller(4, 6, 3, padding=1)
    maps = [torch.randn(2, 4, h, w, requires_grad=True) for h, w in ((3, 5), (2, 1), (1, 1))]
    dense = torch.cat([layer(x).flatten(2).transpose(1, 2) for x in maps], 1)            # (2, 18, 6)
    locations = [torch.arange(17, -1, -1), torch.tensor([3, 17, 3])]                     # one twice
    sparse = layer.at(maps, locations)
    expected = torch.cat([x[place] for x, place in zip(dense, locations)])
    assert relative_error(sparse.detach(), expected.detach()) <= 1e-6
    weight, leaves = torch.randn_like(sparse), [*maps, layer.weight, layer.bias]
    for ours, theirs in zip(*(torch.autograd.grad((x * weight).sum(), leaves) for x in (sparse, expected))):
        assert relative_error(ours, theirs) <= 1e-6
    assert {"head.controller.weight", "head.controller.bias"} <= set(build_model("r18-slim", 3, 32).state_dict())
    nothing = layer.at(maps, [torch.arange(0)] * 2)
    assert nothing.shape == (0, 6) and not torch.autograd.grad(nothing.sum(), layer.weight)[0].any()  # for DDP


# ------------------------------------------------------------------------------------------ dynamic mask head


def test_golden_04_mask_head(golden):
    d = golden("04_mask_head")
    order = d["im_inds"].argsort(stable=True)  # ours takes the instances image by image
    features, params = d["mask_feats"].requires_grad_(), d["params"][order].requires_grad_()
    sizes = torch.tensor(SIZES_OF_INTEREST)[d["levels"][order]].float()
    logits = dynamic_mask_head(features, params, d["locations"][order].float(), sizes,
                               d["im_inds"].bincount(minlength=2).tolist())
    check("04 number of parameters", num_mask_params(16), d["weight_nums"].sum() + d["bias_nums"].sum(), 0)
    check("04 sizes of interest", SIZES_OF_INTEREST, d["sizes_of_interest"], 0)
    check("04 mask logits", logits, d["mask_logits"][order, 0], 1e-4)
    logits.sigmoid().square().sum().backward()
    check("04 gradient norms of parameters", params.grad.norm(dim=1), d["gradnorm_params"][order], 1e-4)
    check("04 gradient norm of features", features.grad.norm(), d["gradnorm_feats"], 1e-4)


def naive_mask_head(features, params, xy, size, counts):
    """One instance at a time: relative coordinates written out, three 1x1 convolutions."""
    channels, (h, w) = features.shape[1], features.shape[-2:]
    y, x = torch.meshgrid(torch.arange(h) * 8 + 4, torch.arange(w) * 8 + 4, indexing="ij")
    images = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    logits = []
    for image, p, (x0, y0), s in zip(images, params, xy, size):
        w1, w2, w3, b1, b2, b3 = p.split([8 * (channels + 2), 64, 8, 8, 8, 1])
        cells = torch.cat([torch.stack([(x0 - x) / s, (y0 - y) / s]), features[image]])[None]
        cells = F.relu(F.conv2d(cells, w1.view(8, -1, 1, 1), b1))
        cells = F.relu(F.conv2d(cells, w2.view(8, 8, 1, 1), b2))
        logits.append(aligned_bilinear(F.conv2d(cells, w3.view(1, 8, 1, 1), b3), 2)[0, 0])
    return torch.stack(logits)


@pytest.mark.parametrize("channels, counts", [(16, [3, 4]), (8, [0, 5, 1]), (16, [2, 0])])
def test_mask_head_equals_its_naive_form(channels, counts):
    generator = torch.Generator().manual_seed(0)
    k = sum(counts)
    features = torch.randn(len(counts), channels, 9, 13, generator=generator)
    params = 0.3 * torch.randn(k, num_mask_params(channels), generator=generator)
    xy = torch.rand(k, 2, generator=generator) * torch.tensor([104, 72])
    size = torch.tensor(SIZES_OF_INTEREST)[torch.arange(k) % 5].float()
    results = []
    for head in (dynamic_mask_head, naive_mask_head):
        leaves = [x.clone().requires_grad_() for x in (features, params)]
        logits = head(*leaves, xy, size, counts)
        logits.sigmoid().square().sum().backward()
        results.append((logits, *(x.grad for x in leaves)))
    for ours, naive in zip(*results):
        assert relative_error(ours, naive.detach()) <= 1e-5


def test_mask_head_without_instances_is_empty_and_connected():
    features, params = torch.randn(2, 16, 4, 5, requires_grad=True), torch.zeros(0, 233, requires_grad=True)
    logits = dynamic_mask_head(features, params, torch.zeros(0, 2), torch.zeros(0), [0, 0])
    assert logits.shape == (0, 8, 10)
    logits.sum().backward()
    assert (features.grad == 0).all() and params.grad.shape == (0, 233)


# -------------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("setting", ["", "nothreshctr_"])
def test_golden_03_detect(golden, setting, image):
    """Class probability * centerness is compared with 0.05, as in BoxTeacher's setting. The other setting,
    nothreshctr, compares the class probability. The 100 best are the same for these images; the candidates of the next
    test tell the two apart."""
    d = golden("03_fcos_inference")
    predictions = predictions_of(*(head_maps(d, name) for name in ("logits", "ltrb_pred", "ctr_pred")))
    found, locations = detect(predictions.of_image(image)), predictions.locations
    assert (found.scores.diff() <= 0).all()
    names = ("boxes", "scores", "classes", "locations", "levels")
    expected = {name: d[f"{setting}{name}_{image}"] for name in names}
    order = expected["scores"].argsort(descending=True, stable=True)
    part = "03 nothreshctr" if setting else "03 detections"
    check(f"{part}: scores", found.scores, expected["scores"][order], 1e-5)
    check(f"{part}: boxes", found.boxes, expected["boxes"][order], 1e-4)
    check(f"{part}: classes", found.labels, expected["classes"][order], 0)
    check(f"{part}: locations", locations.xy[found.locations], expected["locations"][order], 0)
    check(f"{part}: levels", locations.level[found.locations], expected["levels"][order], 0)


@pytest.mark.parametrize("image", [0, 1])
def test_golden_03_counts(golden, image):
    """The number above the threshold on each level, and the number that NMS keeps of the 1000 best of each level."""
    d = golden("03_fcos_inference")
    predictions = predictions_of(*(head_maps(d, name) for name in ("logits", "ltrb_pred", "ctr_pred")))
    one, level = predictions.of_image(image), predictions.locations.level
    candidates = detect(one, per_level=10 ** 6, nms_threshold=1.0, limit=10 ** 6)
    check("03 candidates of each level", level[candidates.locations].bincount(minlength=5),
          d["candidates_per_level_image"][:, image], 0)
    assert (one.class_logits.sigmoid() > 0.05).sum() > len(candidates.locations)  # those of nothreshctr
    check("03 number after NMS", len(detect(one, limit=10 ** 6).scores), d[f"num_after_nms_{image}"], 0)


def test_nms_keeps_classes_apart_at_negative_coordinates():
    """Two classes whose boxes lie beyond the image; torchvision's shift by class would lay one upon
    the other."""
    centre, far = torch.full((1, 4, 1, 1), 0.0), torch.full((1, 4, 1, 1), 0.0)
    logits = torch.full((1, 2, 1, 2), -30.0)
    logits[0, 0, 0, 0], logits[0, 1, 0, 1] = 3, 2                     # locations (4, 4) and (12, 4)
    centre[0, :, 0, 0] = torch.tensor([44, 44, 6, 6]) / 8.0   # box (-40, -40, 10, 10), class 0
    far[0, :, 0, 0] = torch.tensor([63, 55, -13, -5]) / 8.0   # box (-51, -51, -1, -1), class 1: that - 11
    nothing = [torch.full((1, c, 1, 1), -30.0) for c in (2, 4, 1)]
    p3 = logits, torch.cat([centre, far], 3), torch.full((1, 1, 1, 2), 30.0)
    predictions = predictions_of(*([first, *[other] * 4] for first, other in zip(p3, nothing)))
    found = detect(predictions.of_image(0))
    assert found.labels.tolist() == [0, 1]
    assert found.boxes.tolist() == [[-40, -40, 10, 10], [-51, -51, -1, -1]]


def paste_through_predict(monkeypatch, d: dict, rescore: bool):
    """predict() with detections and masks of golden 09 in the place of a network's; labels are their
    numbers."""
    k, size = len(d["boxes_in"]), tuple(d["input_hw"].tolist())
    found = Detections(d["boxes_in"], d["scores_in"], torch.arange(k), torch.arange(k))
    monkeypatch.setattr(model_module, "detect", lambda one, threshold: found)
    monkeypatch.setattr(model_module, "mask_logits",
                        lambda predictions, locations: torch.logit(d["global_masks"][locations[0], 0]))
    output_size = tuple(d["output_hw"].tolist())
    network = predictions_of(*([torch.zeros(1, c, 1, 1)] * 5 for c in (2, 4, 1)))
    return predict(lambda images, sizes: network, None, [size], [output_size], rescore=rescore)[0]


def case_of(golden, case: str) -> dict:
    return {key.removeprefix(case): x for key, x in golden("09_postprocess").items() if key.startswith(case)}


@pytest.mark.parametrize("case", ["test_", "teacher_"])
def test_golden_09_predict(golden, monkeypatch, case):
    d = case_of(golden, case)
    answer = paste_through_predict(monkeypatch, d, rescore=True)
    assert len(d["kept"]) < len(d["boxes_in"]) and answer.masks.dtype == torch.bool
    check("09 kept", answer.labels, d["kept"], 0)
    check("09 boxes", answer.boxes, d["boxes"], 1e-5)
    check("09 scores", answer.scores, d["scores"], 1e-4)
    check("09 pixels of masks that differ", (answer.masks != d["masks"]).sum(), 0, 3)
    plain = paste_through_predict(monkeypatch, d, rescore=False)
    check("09 scores without rescoring", plain.scores, d["scores_in"][d["kept"]], 0)


def test_golden_09_quality_without_threshold(golden, monkeypatch):
    """All pixels count. sqrt(sqrt(c) * q) weighs a pseudo mask in the authors' program; Eq. 1 does in ours, see
    test_teacher.py."""
    d = case_of(golden, "float_")
    answer = paste_through_predict(monkeypatch, d, rescore=True)  # with a threshold: only its boxes matter here
    check("09 kept", answer.labels, d["kept"], 0)
    check("09 boxes", answer.boxes, d["boxes"], 1e-5)
    logits = torch.logit(d["global_masks"][d["kept"], 0])
    size, output_size = tuple(d["input_hw"].tolist()), tuple(d["output_hw"].tolist())
    rles, quality = paste_masks(logits, size, output_size, threshold=-1)
    assert decode(rles, output_size).all()
    c = d["scores_in"][d["kept"]]
    check("09 scores without threshold", (c * quality).sqrt(), d["scores"], 1e-4)
    check("09 weights without threshold", (c.sqrt() * quality).sqrt(), d["mask_score"], 1e-4)
    for threshold in (0.2, 0.5, 0.8):  # of the probabilities of the authors' program
        masks = decode(paste_masks(logits, size, output_size, threshold)[0], output_size)
        check("09 pixels of probabilities that differ", (masks != (d["masks"] > threshold)).sum(), 0, 3)


@pytest.fixture(scope="module")
def small():
    """A small network whose outputs vary; those of an untrained head are almost constant, and nothing is detected."""
    torch.manual_seed(0)
    network = build_model("r18-slim", 3, channels=32, frozen=False)
    head = network.head
    for conv in (head.class_logits, head.ltrb, head.controller, head.centerness):
        nn.init.normal_(conv.weight, std=0.1)
    nn.init.constant_(network.head.ltrb.bias, 2.0)
    nn.init.zeros_(network.head.class_logits.bias)
    return network.eval()


def images_of(*seeds, size=(64, 96)) -> torch.Tensor:
    return torch.stack([torch.randint(0, 256, (3, *size), dtype=torch.uint8,
                                      generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def test_confident_instances_keep_their_own_masks():
    masks = torch.eye(3, dtype=torch.bool).view(3, 1, 3)
    rles = [encode(mask.T.numpy(), 0, 0, (1, 3)) for mask in masks]
    found = Instances(torch.arange(12.0).view(3, 4), torch.tensor([0.5, 0.2, 0.9]), torch.arange(3), rles, (1, 3))
    assert torch.equal(found.masks, masks)
    few = confident(found, 0.5)
    assert torch.equal(few.masks, masks[[0, 2]]) and few.labels.tolist() == [0, 2] and few.size == (1, 3)
    assert few.boxes[:, 0].tolist() == [0, 8] and len(few.scores) == 2


def test_nothing_found_is_typed_and_empty(small):
    answer = predict(small, images_of(0, 1), [(64, 96)] * 2, [(50, 75), (64, 96)], score_threshold=1.0)
    tensors = [(*one[:3], one.masks) for one in answer]
    assert [tuple(x.shape) for x in tensors[0]] == [(0, 4), (0,), (0,), (0, 50, 75)]
    assert [x.dtype for x in tensors[1]] == [torch.float32, torch.float32, torch.int64, torch.bool]


def test_an_image_is_independent_of_its_neighbour(small):
    """Image 0 beside 1, beside 2, and second after 1; its true size is smaller than the batch's."""
    a, other = (60, 90), (64, 96)
    original = [(120, 180)] * 2
    answers = [predict(small, images_of(*seeds), sizes, original)[i] for seeds, sizes, i in
               (((0, 1), [a, other], 0), ((0, 2), [a, other], 0), ((1, 0), [other, a], 1))]
    assert len(answers[0].boxes) > 20 and answers[0].masks.any()
    for answer in answers[1:]:
        assert torch.equal(answer.labels, answers[0].labels)
        assert torch.allclose(answer.boxes, answers[0].boxes, atol=1e-3)
        assert torch.allclose(answer.scores, answers[0].scores, atol=1e-5)
        assert (answer.masks != answers[0].masks).float().mean() < 1e-4


def test_masks_of_predict_belong_to_their_boxes(small):
    """predict's masks are those of the mask head at the locations of the detections, image by image."""
    images, sizes = images_of(0, 1), [(64, 96)] * 2
    with torch.no_grad():
        predictions = small(images, sizes)
    answers = predict(small, images, sizes, sizes, rescore=False)
    locations = [detect(predictions.of_image(i)).locations for i in range(2)]
    together = mask_logits(predictions, locations).split([len(x) for x in locations])
    for answer, logits, i in zip(answers, together, range(2)):
        found = detect(predictions.of_image(i))
        clipped = found.boxes.clone()
        clipped[:, 0::2], clipped[:, 1::2] = clipped[:, 0::2].clamp(0, 96), clipped[:, 1::2].clamp(0, 64)
        keep = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
        assert torch.equal(answer.boxes, clipped[keep])
        pasted = decode(paste_masks(logits[keep], (64, 96), (64, 96))[0], (64, 96))
        assert (answer.masks != pasted).float().mean() < 1e-4


def test_padding_becomes_the_mean_colour(small):
    clean = images_of(0)
    clean[..., 60:, :], clean[..., 90:] = 0, 0
    dirty = clean.clone()
    dirty[..., 60:, :], dirty[..., 90:] = 255, 7
    normalised = small.normalise(clean, [(60, 90)])
    assert (normalised[..., 60:, :] == 0).all() and (normalised[..., 90:] == 0).all()
    assert torch.equal(normalised, small.normalise(dirty, [(60, 90)]))
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(255 - 123.675) / 58.395, -116.28 / 57.12, -103.53 / 57.375]  # RGB, ImageNet
    assert small.normalise(red, [(1, 1)]).flatten().tolist() == pytest.approx(expected)
    assert red.dtype == torch.uint8 and red.flatten().tolist() == [255, 0, 0]  # not in place


# ------------------------------------------------------------------------------------------------ the network


def test_shapes_of_the_network(small):
    with torch.no_grad():
        predictions = small(images_of(0, 1), [(64, 96)] * 2)
    cells = sum(-(-64 // s) * -(-96 // s) for s in STRIDES)
    shapes = [tuple(x.shape) for x in (*predictions[:3], predictions.mask_features)]
    assert shapes == [(2, cells, 3), (2, cells, 4), (2, cells), (2, 16, 8, 12)]
    parameters = predictions.controller.at(predictions.box_maps, [torch.arange(3), torch.arange(0)])
    assert parameters.shape == (3, 233) and parameters.dtype == torch.float32
    assert predictions.locations.xy.shape == (cells, 2) and (predictions.ltrb >= 0).all()
    assert predictions.locations.xy[[0, 1, 12]].tolist() == [[4, 4], [12, 4], [4, 12]]
    assert not [name for name in small.state_dict() if name in ("mean", "std")]  # constants are no weights


@pytest.mark.parametrize("training", [True, False])
def test_one_small_image_alone(training):
    """P7 is one cell, and group norm must still have more than one value in a narrow head."""
    network = build_model("r18-slim", 3, channels=32, frozen=False).train(training)
    predictions = network(images_of(0, size=(128, 128)), [(128, 128)])
    assert predictions.locations.level.bincount().tolist() == [256, 64, 16, 4, 1]
    assert predictions.class_logits.isfinite().all() and predictions.mask_features.isfinite().all()


def test_maps_and_weights_have_the_channels_last():
    """From the pixels to the heads: any map in another layout would be copied twice."""
    network, layouts = build_model("r18", 5, channels=32).train(), []
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in network.modules()
               if isinstance(m, nn.Conv2d))
    for part in (network.backbone.body.values(), network.fpn.lateral, network.fpn.output, network.head.class_tower,
                 network.head.box_tower, [network.head.ltrb, network.mask_branch.refine[0][0]]):
        for module in part:
            module.register_forward_pre_hook(lambda _, inputs: layouts.append(
                inputs[0].is_contiguous(memory_format=torch.channels_last)))
    network(images_of(0, 1), [(64, 96), (60, 90)])
    assert len(layouts) > 40 and all(layouts)


def test_p6_and_p7_come_from_p5(small):
    """One convolution of stride 2 each, with a ReLU between the two."""
    with torch.no_grad():
        maps = [torch.randn(1, c, 64 // s, 96 // s) for c, s in ((64, 1), (128, 2), (256, 4))]
        p3, p4, p5, p6, p7 = small.fpn(maps)
        assert torch.equal(p6, small.fpn.p6(p5)) and p6.min() < 0
        assert torch.equal(p7, small.fpn.p7(p6.clamp(min=0)))
    assert [x.shape[-2:] for x in (p3, p4, p5, p6, p7)] == [(64, 96), (32, 48), (16, 24), (8, 12), (4, 6)]
