"""formats/released.py and tools/checkpoint.py: files in every layout that others released, good and bad."""
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import evaluate
import train
from backbone import WindowAttention, make_backbone
from formats.checkpoint import FORMAT, CheckpointError, load, load_weights, save
from formats.coco import COCO_CLASSES
from formats.released import CHECKPOINT, our_name, read_backbone, read_checkpoint
from helpers import Code, relative_error
from model import PIXEL_MEAN, PIXEL_STD, build_model, load_model, predict
from released_files import BOTTOM_UP, LAYOUTS, SWIN_B, network, released
from tools import checkpoint
from tools.start import load_backbone, start_backbone
from weights import picture as image_of


@pytest.fixture(scope="module")
def r50() -> dict:
    """A released R-50 file's content; tests may replace entries, not change tensors."""
    return released("boxteacher_r50")


@pytest.fixture(scope="module")
def r50_path(r50, tmp_path_factory):
    path = tmp_path_factory.mktemp("r50") / "boxteacher_r50.pth"
    torch.save(r50, path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two of the photos in golden/, 128 x 160 and 96 x 160, in COCO layout with COCO's classes."""
    folder = tmp_path_factory.mktemp("photos")
    images, annotations = [], []
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
    (folder / "annotations").mkdir()
    for number, (h, w) in enumerate([(128, 160), (96, 160)]):
        image, boxes, labels = image_of(h, w, 3, str(number))
        for split in ("train2017", "val2017"):
            Image.fromarray(np.ascontiguousarray(image[::-1].transpose(1, 2, 0))).save(folder / split / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": h, "width": w})
        for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist()):
            annotations.append({"id": len(annotations) + 1, "image_id": number, "bbox": [x0, y0, x1 - x0, y1 - y0],
                                "category_id": COCO_CLASSES[label]["id"], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0})
    content = {"images": images, "annotations": annotations, "categories": COCO_CLASSES}
    for split in ("train2017", "val2017"):
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def evaluated(path, images, tmp_path, *more) -> list[dict]:
    results = tmp_path / "results.json"
    evaluate.main([str(x) for x in ("--ckpt", path, "--data", images, "--results", results, "--workers", 0,
                                    "--min-size", 128, "--device", "cpu", *more)])
    return json.loads(results.read_text())


def refused(main, arguments, capsys) -> str:
    """The one line with which a command ends, without "error: "."""
    with pytest.raises(SystemExit) as end:
        main([str(x) for x in arguments])
    line = capsys.readouterr().err
    assert end.value.code == 1 and line.startswith("error: ") and line.count("\n") == 1, line
    return line.removeprefix("error: ").rstrip()


# ---------------------------------------------------------------------------------------- released checkpoints

BACKBONE_OF = {"boxteacher_r50": "r50", "boxteacher_r101": "r101", "boxteacher_r101_dcn": "r101-dcn",
               "boxteacher_swin_b": "swin-b", "boxinst_r50": "r50", "condinst_r50": "r50"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_released_layout_is_inspected_and_evaluated(layout, images, tmp_path, capsys):
    """Both commands take the file; what is special about it shows in the network and in the scores."""
    content = released(layout)
    path = tmp_path / f"{layout}.pth"
    torch.save(content, path)
    checkpoint.main([str(path)])
    printed = capsys.readouterr().out
    method = layout.split("_")[0]
    msra = BACKBONE_OF[layout] in ("r50", "r101")
    facts = {line[:11].strip(): line[11:] for line in printed.replace("\n" + " " * 11, "; ").splitlines()}
    assert facts["dropped"].endswith("1 x optimizer: no weights")
    assert facts["method"].startswith(f"{method}: ") and facts["iteration"] == "90000"
    assert facts["backbone"].startswith(BACKBONE_OF[layout] + ",") and "BGR" in facts["backbone"]
    assert ("first 1x1" in facts["backbone"]) == msra
    assert facts["classes"].startswith("80: person, bicycle, ") and "sizes_of_interest" in facts["dropped"]
    assert facts["weights"].endswith("teacher, student" if method == "boxteacher" else ": student")
    assert ("mask_branch.logits" in facts["dropped"]) == ("semantic" in facts["dropped"]) == (method == "condinst")

    results = evaluated(path, images, tmp_path)
    assert len(results) == 200 and len({r["segmentation"]["counts"] for r in results}) > 100
    assert {r["category_id"] for r in results} <= {c["id"] for c in COCO_CLASSES}
    off = evaluated(path, images, tmp_path, "--rescore", "off")
    assert (results == off) == (method != "boxteacher")  # the score form follows the file

    model, info = load_model(path)
    spec = info["model"]
    assert spec["mask_channels"] == (8 if method == "condinst" else 16) and spec["stride_in_1x1"] == msra
    assert model.head.controller.out_channels == (169 if method == "condinst" else 233)
    own = sum(p.numel() for p in model.parameters()) + sum(x.numel() for x in model.buffers() if x.dim() > 0)
    own -= 6 + sum(m.relative_position_index.numel() for m in model.modules() if isinstance(m, WindowAttention))
    networks = 2 if method == "boxteacher" else 1
    used = sum(value.numel() for key, value in content["model"].items() if key not in info["dropped"] and value.dim())
    assert used == networks * own  # not a number of the file is lost


def test_teacher_and_student_keep_apart(r50, r50_path):
    bias = "proposal_generator.fcos_head.cls_logits.bias"
    teacher, student = (load_model(r50_path, which)[0].head.class_logits.bias for which in ("teacher", "student"))
    assert torch.equal(teacher, r50["model"][f"teacher.{bias}"])
    assert torch.equal(student, r50["model"][f"student.{bias}"]) and not torch.equal(teacher, student)
    assert torch.equal(load_model(r50_path)[0].head.class_logits.bias, teacher)


def test_pixels_folded_into_the_first_convolution_change_nothing(r50, r50_path):
    """RGB over std into ours = BGR less its mean into theirs."""
    model, _ = load_model(r50_path)
    image = torch.from_numpy(image_of(64, 96, 4)[0].astype(np.float32))[None]  # BGR
    theirs = F.conv2d(image - torch.tensor(PIXEL_MEAN).flip(0).view(3, 1, 1),
                      r50["model"][f"teacher.{BOTTOM_UP}stem.conv1.weight"], stride=2, padding=3)
    ours = model.backbone.body["stem"][0](model.normalise(image.flip(1), [(64, 96)]))
    assert relative_error(ours, theirs) <= 1e-6


def without_prefix(content: dict) -> dict:
    return {"model": {key.removeprefix("teacher."): value for key, value in content["model"].items()
                      if key.startswith("teacher.")}}


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_bare_state_dict_and_the_old_file_format_load_as_well(r50, tmp_path, wrapped):
    content = without_prefix(r50)
    path = tmp_path / "old.pth"
    torch.save(content if wrapped else content["model"], path, _use_new_zipfile_serialization=False)
    state = load(path, PIXEL_STD)
    assert (state["method"], state["teacher"], state["iteration"]) == ("boxinst", None, 0)


def test_numbers_of_numpy_and_half_precision_are_admitted(r50, tmp_path):
    content = without_prefix(r50)
    weights = {key: value.half() if value.is_floating_point() else value.numpy()
               for key, value in content["model"].items()}
    bias = "controller.bias"
    weights[bias] = weights[bias].numpy()
    torch.save({"model": weights, "best": np.float64(32.6), "order": np.arange(3)}, tmp_path / "a.pth")
    state = load(tmp_path / "a.pth", PIXEL_STD)
    expected = read_checkpoint(content, PIXEL_STD)["student"]
    assert all(x.dtype in (torch.float32, torch.int64) for x in state["student"].values())
    assert max(relative_error(x, expected[name]) for name, x in state["student"].items()) < 2e-3


@pytest.mark.parametrize("layout", ["boxteacher_r50", "boxteacher_swin_b"])
def test_every_key_counts(layout):
    """A key that is missing, misshapen or unknown is named, as in the file or as in our network; unused ones may be
    missing."""
    content = released(layout)["model"]
    state = read_checkpoint({"model": content}, PIXEL_STD)
    dropped = set(state["dropped"])
    with torch.device("meta"):
        model = build_model(**state["model"])
    keys = [key for key in content if key.startswith("student.")]
    for key in keys[::29] + [key for key in keys if "bottom_up" not in key][::9]:
        rest = {k: v for k, v in content.items() if k != key}
        if key in dropped:
            assert key not in read_checkpoint({"model": rest}, PIXEL_STD)["dropped"]
            continue
        for wrong in (rest, content | {key: torch.zeros(2, 3, 5, 7, 9)}):
            theirs = key.removeprefix("student.")
            with pytest.raises(ValueError) as error:
                load_weights(model, read_checkpoint({"model": wrong}, PIXEL_STD)["student"])
            message = str(error.value)
            assert theirs in message or our_name(theirs, CHECKPOINT) in message
            assert "missing" in message or "has the shape" in message
    for extra in ("student.backbone.bottom_up.res6.0.conv1.weight", "teacher.mask_branch.tower.5.weight", "pixel_mean"):
        with pytest.raises(ValueError, match=extra.split(".", 1)[-1]):
            read_checkpoint({"model": content | {extra: torch.zeros(3)}}, PIXEL_STD)
    with pytest.raises(ValueError, match="no array of numbers"):
        read_checkpoint({"model": content | {keys[0]: "text"}}, PIXEL_STD)


def test_backbones_that_we_do_not_have_are_named(r50):
    content = without_prefix(r50)["model"]
    shallow = {key: value for key, value in content.items() if ".res4.5." not in key}
    with pytest.raises(ValueError, match="backbone is none of r50, r101, r101-dcn, swin-t, swin-s and swin-b"):
        read_checkpoint({"model": shallow}, PIXEL_STD)


# ------------------------------------------------------------------------------------------------ bad files


def test_bad_files_are_refused_in_one_line_and_run_nothing(r50, r50_path, images, tmp_path, capsys):
    ran = tmp_path / "ran"
    whole = r50_path.read_bytes()
    (tmp_path / "truncated.pth").write_bytes(whole[:len(whole) * 2 // 3])
    torch.save({"epoch": 3, "state_dict": {"conv1.weight": torch.zeros(3)}}, tmp_path / "foreign.pth")
    torch.save({"model": r50["model"] | {"student.x": Code(ran)}}, tmp_path / "code.pth")
    torch.save({"model": r50["model"], "optimizer": Code(ran)}, tmp_path / "code_beside.pth")
    (tmp_path / "code.pkl").write_bytes(pickle.dumps({"model": {"stem.conv1.weight": Code(ran)}}))
    cls = "proposal_generator.fcos_head.cls_logits."
    fewer = {key: value[:7] if cls in key else value for key, value in r50["model"].items()}
    torch.save({"model": fewer}, tmp_path / "seven.pth")
    (tmp_path / "page.pth").write_text("<html>404</html>")
    for name, part in (("truncated.pth", "it is truncated"), ("foreign.pth", "no checkpoint of"),
                       ("page.pth", "it is a web page"), ("code.pth", "wants to run"),
                       ("code_beside.pth", "wants to run"), ("code.pkl", "wants to run"),
                       ("seven.pth", "trained for 7 classes"), ("no.pth", "no checkpoint at")):
        path = tmp_path / name
        line = refused(evaluate.main, ["--ckpt", path, "--data", images, "--device", "cpu"], capsys)
        assert str(path) in line and part in line
        if name != "seven.pth":
            assert part in refused(checkpoint.main, [path], capsys)
    assert not ran.exists()


def test_odd_keys_and_values_are_one_line(r50, tmp_path):
    weights = without_prefix(r50)["model"]
    for more, part in (({"a\n\x1b[31m": torch.zeros(1)}, "no name of a weight"),
                       ({"controller.bias": torch.zeros(233, dtype=torch.complex64)}, "controller.bias is no array"),
                       ({"controller.bias": torch.zeros(233).to_sparse()}, "controller.bias is no array"),
                       ({"controller.bias": np.zeros(233, np.longdouble)}, "not"),
                       ({"head.weight": torch.zeros(1)}, "head.weight has no place"),
                       ({"controller.bias_momentum": torch.zeros(1)}, "bias_momentum has no place"),
                       ({"proposal_generator.fcos_head.cls_logits.weight": torch.zeros(80, 0, 3, 3)}, "not that of")):
        torch.save({"model": weights | more}, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match=part) as error:
            load(tmp_path / "a.pth", PIXEL_STD)
        assert str(error.value).isprintable() and str(tmp_path / "a.pth") in str(error.value)
    teacher = {key: value for key, value in r50["model"].items() if key.startswith("teacher.")}
    with pytest.raises(ValueError, match="teacher alone"):
        read_checkpoint({"model": teacher}, PIXEL_STD)


def test_the_classes_of_coco(coco_mini):
    with open(coco_mini / "annotations" / "instances_val2017.json") as file:
        assert COCO_CLASSES == [{"id": row["id"], "name": row["name"]} for row in json.load(file)["categories"]]


# ------------------------------------------------------------------------------------------- ImageNet backbones


def msra_file(path, weights: dict) -> None:
    """A detectron2 .pkl with the names of Caffe2; a batch norm is a factor and a term that contain its statistics."""
    parts = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}
    blobs = {"fc1000_w": np.zeros((1000, 2048), np.float32), "fc1000_b": np.zeros(1000, np.float32),
             "conv1_b": np.zeros(64, np.float32), "conv1_w_momentum": np.zeros(3, np.float32)}
    for key, value in weights.items():
        words = key.removeprefix(BOTTOM_UP).split(".")
        if words[-1].startswith("running"):
            continue
        norm = {"weight": "bn_s", "bias": "bn_b"}[words[-1]] if "norm" in words else "w"
        stem = "res_conv1_" if "norm" in words else "conv1_"
        blobs[stem + norm if words[0] == "stem" else f"{words[0]}_{words[1]}_{parts[words[2]]}_{norm}"] = value.numpy()
    path.write_bytes(pickle.dumps(blobs, protocol=2))


def merged(weights: dict) -> dict:
    """The backbone's part of a released network, with mean 0 and variance 1 (less the norm's eps) in its norms."""
    backbone = {key: value for key, value in weights.items() if key.startswith(BOTTOM_UP)}
    return {key: torch.zeros_like(value) if key.endswith("running_mean") else
            torch.ones_like(value) - 1e-5 if key.endswith("running_var") else value for key, value in backbone.items()}


@pytest.mark.parametrize("names", ["caffe2", "detectron2"])
def test_msra_weights_are_those_of_a_released_network(r50, tmp_path, names):
    """A network that starts from the .pkl has the weights of one that was released with them."""
    weights = without_prefix(r50)["model"]
    backbone, path = merged(weights), tmp_path / "R-50.pkl"
    if names == "caffe2":
        msra_file(path, backbone)
    else:
        arrays = {key.removeprefix(BOTTOM_UP): value.numpy() for key, value in backbone.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "MSRA", "matching_heuristics": True}))
    state, stride_in_1x1, _ = read_backbone("r50", path, PIXEL_STD)
    expected = read_checkpoint({"model": weights | backbone}, PIXEL_STD)["student"]
    assert stride_in_1x1
    assert set(state) == {name.removeprefix("backbone.") for name in expected if name.startswith("backbone.")}
    assert all(torch.equal(value, expected["backbone." + name]) for name, value in state.items())


def test_torchvisions_weights_in_detectron2s_names_keep_torchvisions_conventions(r50, tmp_path):
    arrays = {key.removeprefix(BOTTOM_UP): value.numpy() for key, value in without_prefix(r50)["model"].items()
              if key.startswith(BOTTOM_UP)}
    arrays |= {"stem.fc.weight": np.zeros((1000, 2048), np.float32), "stem.fc.bias": np.zeros(1000, np.float32)}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "torchvision"}))
    state, stride_in_1x1, dropped = read_backbone("r50", tmp_path / "R-50.pkl", PIXEL_STD)
    assert dropped == {"stem.fc.weight": "the classifier", "stem.fc.bias": "the classifier"}
    assert not stride_in_1x1 and np.array_equal(state["body.stem.0.weight"], arrays["stem.conv1.weight"])


def test_deformable_networks_start_from_plain_weights(tmp_path):
    """MSRA R-101 for r101-dcn: the offsets start at zero and the stride stays in the 3x3."""
    weights = network("boxteacher_r101_3x")
    msra_file(tmp_path / "R-101.pkl", merged(weights))
    state, stride_in_1x1, _ = read_backbone("r101-dcn", str(tmp_path / "R-101.pkl"), PIXEL_STD)
    backbone = make_backbone("r101-dcn", True)
    assert not stride_in_1x1 and set(backbone.state_dict()) - set(state) == {
        name for name in backbone.state_dict() if ".offset." in name}
    backbone.load_state_dict(state, strict=False)
    assert not any(x.any() for name, x in backbone.state_dict().items() if ".offset." in name)
    assert read_backbone("r101", str(tmp_path / "R-101.pkl"), PIXEL_STD)[1]


def test_swin_weights_are_those_of_a_released_network(tmp_path):
    weights = network(SWIN_B)
    file = {key.removeprefix(BOTTOM_UP): value for key, value in weights.items()
            if key.startswith(BOTTOM_UP) and not key.startswith((BOTTOM_UP + "norm1", BOTTOM_UP + "norm2",
                                                                 BOTTOM_UP + "norm3"))}
    file |= {"norm.weight": torch.ones(1024), "norm.bias": torch.ones(1024), "head.weight": torch.ones(1000, 1024),
             "head.bias": torch.ones(1000), "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}
    torch.save({"model": file}, tmp_path / "swin.pth")
    state, _, _ = read_backbone("swin-b", tmp_path / "swin.pth", PIXEL_STD)
    expected = read_checkpoint({"model": weights}, PIXEL_STD)["student"]
    assert set(state) == {name.removeprefix("backbone.") for name in expected
                          if name.startswith("backbone.") and ".norms." not in name}
    assert all(torch.equal(value, expected["backbone." + name]) for name, value in state.items())


@pytest.mark.parametrize("name, theirs", [("r18", "resnet18"), ("r50", "resnet50"), ("swin-t", "swin_t")])
def test_torchvisions_weights_give_torchvisions_maps(name, theirs, tmp_path):
    torch.manual_seed(0)
    net = getattr(torchvision.models, theirs)(weights=None).eval()
    torch.save(net.state_dict(), tmp_path / "a.pth")
    state, stride_in_1x1, _ = read_backbone(name, tmp_path / "a.pth", PIXEL_STD)
    backbone = make_backbone(name, True).eval()
    missing = backbone.load_state_dict(state, strict=False).missing_keys
    x = torch.randn(1, 3, 256, 288)  # C5 of more than one window
    with torch.no_grad():
        ours = backbone(x)[2]
        if name.startswith("swin"):
            expected = F.layer_norm(net.features(x), [768]).permute(0, 3, 1, 2)
        else:
            expected = net.layer4(net.layer3(net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x))))))))
    assert not stride_in_1x1 and all(name.startswith("norms.") for name in missing)
    assert relative_error(ours, expected) <= 1e-5


def test_imagenet_means_torchvisions_download(monkeypatch):
    asked = []
    net = torchvision.models.resnet18(weights=None)

    class Weights:
        url = "the address"

        def get_state_dict(self, progress):
            if len(asked) > 1:
                raise OSError("no route")
            return net.state_dict()

    class Known:
        IMAGENET1K_V1 = Weights()

    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: asked.append(name) or Known)
    state, _, _ = read_backbone("r18", "imagenet", PIXEL_STD)
    assert torch.equal(state["body.c5.1.conv2.weight"], net.layer4[1].conv2.weight)
    with pytest.raises(CheckpointError, match="imagenet: cannot download .*no route.*fetch the address elsewhere"):
        load_backbone("swin-b", "imagenet")
    with pytest.raises(CheckpointError, match="cannot download"):
        load_backbone("r101-dcn", "imagenet")
    assert asked == ["resnet18", "swin_b", "resnet101"]


def test_wrong_backbone_files_name_the_key(r50, tmp_path):
    backbone = merged(without_prefix(r50)["model"])
    msra_file(tmp_path / "R-50.pkl", backbone)
    msra_file(tmp_path / "short.pkl", {key: x for key, x in backbone.items() if "res3.1.conv2.weight" not in key})
    torch.save({"patch_embed.proj.weight": torch.zeros(3)}, tmp_path / "swin.pth")
    swin = {key.removeprefix(BOTTOM_UP): x for key, x in network(SWIN_B).items() if key.startswith(BOTTOM_UP)}
    torch.save({key: x for key, x in swin.items() if key != "norm2.bias"}, tmp_path / "half.pth")
    (tmp_path / "code.pkl").write_bytes(pickle.dumps({"conv1_w": Code(tmp_path / "ran")}))
    torch.save(r50, tmp_path / "whole.pth")
    save(read_checkpoint(r50, PIXEL_STD), tmp_path / "ours.pt")
    for name, file, part in (("r101", "R-50.pkl", "the weights of r101: body.c4.6.conv1.weight is missing"),
                             ("r18", "R-50.pkl", "body.c2.0.conv1.weight has the shape .64, 64, 1, 1. instead of "),
                             ("r50", "short.pkl", "body.c3.1.conv2.weight is missing"),
                             ("swin-b", "R-50.pkl", "body.c2.0.bn1.bias has no place"),
                             ("swin-t", "swin.pth", "features.0.0.weight has the shape"),
                             ("swin-b", "half.pth", "norms.1.bias is missing"),
                             ("r50", "code.pkl", "wants to run"), ("r50", "no.pth", "No such file"),
                             ("r50", "whole.pth", "whole checkpoint.*--init"), ("r50", "ours.pt", "--init")):
        with pytest.raises(CheckpointError, match=part) as error:
            weights = load_backbone(name, str(tmp_path / file)).backbone
            start_backbone(make_backbone(name, True), weights, name, file)
        assert "\n" not in str(error.value) and file in str(error.value)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------- inspect, convert, train, go on


def same_detections(one, two) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, two) for a, b in zip(x[:3], y[:3])) and \
        [x.rles for x in one] == [y.rles for y in two]


def detections(path):
    model, _ = load_model(path)
    images = torch.from_numpy(image_of(96, 128, 3)[0][::-1].copy())[None]
    return predict(model, images, [(96, 128)], [(96, 128)], score_threshold=0.001)


def test_converting_a_released_file_changes_no_bit(r50_path, tmp_path, capsys):
    out = tmp_path / "ours.pt"
    checkpoint.main([str(r50_path), "--convert", str(out)])
    assert f"written    {out}\n" in capsys.readouterr().out
    before, after = load(r50_path, PIXEL_STD), load(out)
    assert after["format"] == FORMAT and "dropped" not in after
    assert all(torch.equal(before[part][name], x) for part in ("teacher", "student") for name, x in after[part].items())
    assert len(detections(out)[0].boxes) == 100 and same_detections(detections(r50_path), detections(out))
    checkpoint.main([str(out)])
    again = capsys.readouterr().out
    assert "boxteacher-1 (this project)" in again and "stride in the first 1x1" in again and "90000" in again
    assert "exists already" in refused(checkpoint.main, [r50_path, "--convert", out], capsys)
    assert "cannot write" in refused(checkpoint.main, [r50_path, "--convert", out / "a.pt"], capsys)
    checkpoint.main([str(out), "--convert", str(tmp_path / "new" / "folder" / "a.pt")])
    assert (tmp_path / "new" / "folder" / "a.pt").exists()


def train_options(images, out, *more) -> list[str]:
    return [str(x) for x in ("--data", images, "--out", out, "--min-size", 64, "--max-size", 96, "--teacher-min-size",
                             64, "--teacher-max-size", 96, "--batch-size", 2, "--workers", 0, "--device", "cpu",
                             "--log-every", 1, *more)]


def test_round_trip_of_a_trained_model(images, tmp_path, capsys):
    """Trained, saved, described, converted and loaded, a model has the same detections to the bit."""
    options = "--backbone", "r18-slim", "--backbone-weights", "none", "--channels", 32, "--iters", 3
    train.main(train_options(images, tmp_path / "run", *options))
    last, out = tmp_path / "run" / "last.pt", tmp_path / "converted.pt"
    checkpoint.main([str(last), "--convert", str(out)])
    printed = capsys.readouterr().out
    assert "iteration  3\n" in printed and "yes, as last.pt" in printed and "dropped    nothing" in printed
    assert "optimizer" in load(last) and "optimizer" not in load(out)
    for which in ("final.pt", "last.pt"):
        assert same_detections(detections(tmp_path / "run" / which), detections(out))
    assert len(detections(out)[0].boxes) > 0


@pytest.mark.parametrize("layout", ["boxteacher_r50", "condinst_r50"])
def test_fine_tuning_keeps_the_conventions_of_a_released_file(layout, images, tmp_path, capsys):
    """--init: strided layer and mask channels come with the weights; the run resumes, and its result is evaluated."""
    path, out = tmp_path / "released.pth", tmp_path / "run"
    torch.save(released(layout), path)
    options = train_options(images, out, "--init", path, "--lr", 1e-6)
    train.main([*options, "--iters", "1"])
    path.unlink()  # not needed to go on
    train.main([*options, "--iters", "2"])
    printed = capsys.readouterr()
    assert f"resumed {out} at iteration 1" in printed.out and printed.err == ""
    assert f"starts from {path} (method {layout.split('_')[0]})" in printed.out
    train.main([*options, "--iters", "2", "--init", "another.pth"])
    assert "--init another.pth is not used" in capsys.readouterr().out
    state = load(out / "final.pt")
    assert state["model"]["stride_in_1x1"] and state["model"]["mask_channels"] == (8 if "cond" in layout else 16)
    expected = read_checkpoint(released(layout), PIXEL_STD)
    expected = expected["teacher"] or expected["student"]
    frozen = [name for name in expected if name.startswith(("backbone.body.stem", "backbone.body.c2"))]
    assert frozen and all(torch.equal(state["teacher"][name], expected[name]) for name in frozen)
    assert relative_error(state["teacher"]["head.controller.weight"], expected["head.controller.weight"]) < 1e-3
    assert len(evaluated(out / "final.pt", images, tmp_path)) > 50


def test_training_from_the_msra_file_keeps_its_stride_place(r50, images, tmp_path, capsys):
    msra_file(tmp_path / "R-50.pkl", merged(without_prefix(r50)["model"]))
    options = train_options(images, tmp_path / "run", "--backbone-weights", tmp_path / "R-50.pkl")
    train.main([*options, "--iters", "1"])
    train.main([*options, "--iters", "2"])
    assert "at iteration 1" in capsys.readouterr().out
    model, info = load_model(tmp_path / "run" / "final.pt")
    block = model.backbone.body["c3"][0]
    assert info["model"]["stride_in_1x1"] and block.conv1.stride == (2, 2) and block.conv2.stride == (1, 1)
