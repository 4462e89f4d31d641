"""tools/export.py: the files give what the program gives, and docs/onnx_example.py runs one without the project."""
import ast
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor

from backbone import ResNet
from helpers import made_up, one_line_error, random_predictions
from masks import decode, paste_masks
from model import Instances, detect, find_instances, load, mask_logits
from tools import export

EXAMPLE = Path(__file__).parents[1] / "docs/onnx_example.py"
LOW = 0.2  # a threshold for the few steps of `warm`


@pytest.fixture(scope="module")
def packages() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def program(warm) -> torch.export.ExportedProgram:
    """Traced once, which takes ten seconds."""
    return export.traced(load(warm))


def exported(warm: Path, program: torch.export.ExportedProgram, out: Path) -> Path:
    with patch.multiple(export, traced=lambda model: program, default_threshold=lambda rescore: LOW):
        export.main(["--ckpt", str(warm), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def pt2(warm, program, tmp_path_factory) -> Path:
    return exported(warm, program, tmp_path_factory.mktemp("pt2") / "new/model.pt2")


@pytest.fixture(scope="module")
def onnx(packages, warm, program, tmp_path_factory) -> Path:
    return exported(warm, program, tmp_path_factory.mktemp("onnx") / "model.ONNX")


@pytest.fixture(scope="module")
def session(onnx):
    return sys.modules["onnxruntime"].InferenceSession(onnx)


@pytest.fixture(scope="module")
def loaded(pt2):
    return torch.export.load(pt2).module()


def tiled(drawn: Path, height: int, width: int) -> Tensor:
    """Images (1, 3, height, width) of the kind that `warm` was trained on, side by side."""
    rows = [np.concatenate([np.asarray(Image.open(path))] * 6, 1) for path in sorted((drawn / "train2017").iterdir())]
    return torch.from_numpy(np.concatenate(rows[:6])[:height, :width]).permute(2, 0, 1)[None].float()


def by_program(warm: Path, images: Tensor) -> tuple[Instances, Tensor]:
    """What the program finds and reports, and the probabilities of its masks at stride 4."""
    model, size = load(warm), tuple(images.shape[2:])
    with torch.no_grad():
        predictions = model.network(images, [size])
        found, = find_instances(predictions, [size], [size], rescore=model.rescore)
        return found, mask_logits(predictions, [detect(predictions).locations]).sigmoid()


def check_equal(warm: Path, images: Tensor, boxes: Tensor, scores: Tensor, labels: Tensor, masks: Tensor) -> None:
    found, probabilities = by_program(warm, images)
    height, width, number = *images.shape[2:], len(found.scores)
    assert (boxes.shape, scores.shape, labels.shape) == ((100, 4), (100,), (100,))
    assert masks.shape == (100, height // 4, width // 4)
    assert (found.scores.max() > 0.5 or number < 100) and not scores[number:].any()
    assert torch.equal(labels[:number], found.labels)
    torch.testing.assert_close(boxes[:number], found.boxes, rtol=0, atol=1e-2)
    # a pixel at the threshold belongs to a mask or not, by the last digit: a thousandth of a small mask's quality
    torch.testing.assert_close(scores[:number], found.scores, rtol=0, atol=1e-3)
    torch.testing.assert_close(masks[:number], probabilities, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 64), (64, 96), (320, 256)])
def test_onnx_gives_what_the_program_gives(warm, drawn, session, size):
    images = tiled(drawn, *size)
    check_equal(warm, images, *map(torch.from_numpy, session.run(export.OUTPUTS, {"images": images.numpy()})))


@pytest.mark.parametrize("size", [(160, 160), (160, 192), (256, 288), (320, 256)])
def test_pt2_gives_what_the_program_gives(warm, drawn, loaded, size):
    images = tiled(drawn, *size)
    check_equal(warm, images, *loaded(images))


def test_an_image_in_which_nothing_is_found(pt2):
    model, images = torch.export.load(pt2).module(), torch.zeros(1, 3, 160, 160)
    model.get_parameter("network.head.class_logits.bias").data.fill_(-30)
    _, scores, labels, masks = model(images)
    assert not scores.any() and masks.shape == (100, 40, 40) and set(labels.tolist()) == {0}


def test_the_files_say_nothing_of_where_they_were_made(onnx, pt2):
    """torch notes for each node in which line of which file it was made."""
    for file in (onnx, pt2):
        content = file.read_bytes()
        assert str(EXAMPLE.parents[1]).encode() not in content and b"export.py" not in content


def test_rows_without_a_detection_have_score_0():
    instances = [([8, 8, 40, 40], 0.9, torch.zeros(8, 12)), ([10, 8, 41, 40], 0.8, torch.zeros(8, 12)),
                 ([8, 8, 40, 40], 0.7, torch.zeros(8, 12)), ([10, 8, 41, 41], 0.6, torch.zeros(8, 12))]
    for one in (random_predictions(64, 96), made_up([instances], (64, 96)), random_predictions(32, 32)):
        expected, found = detect(one), export.detect(one)
        number = len(expected.scores)
        assert {len(x) for x in found} == {100} and not found.scores[number:].any()
        assert all(torch.equal(x[:number], y) for x, y in zip(found, expected))
    assert len(detect(made_up([instances], (64, 96))).scores) == 3  # the fourth has the first's class


def test_quality_is_that_of_pasted_masks():
    logits = torch.randn(40, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    logits = 4 * F.interpolate(logits, size=(24, 32), mode="bilinear")[:, 0]
    logits[0] = -9.0
    _, quality = paste_masks(logits, (96, 128), (96, 128))
    assert quality[0] == 0 and (quality[1:] > 0.5).all()
    torch.testing.assert_close(export.mask_quality(logits.sigmoid()), quality, rtol=0, atol=1e-4)


def test_attention_has_the_four_dimensions_that_onnx_takes(monkeypatch):
    q, k, v = torch.randn(3, 1, 6, 2, 49, 8, generator=torch.Generator().manual_seed(0))
    attend, dimensions = F.scaled_dot_product_attention, []
    monkeypatch.setattr(export, "scaled_dot_product_attention",
                        lambda *x, **options: dimensions.extend(y.dim() for y in x) or attend(*x, **options))
    for bias in (torch.randn(1, 2, 49, 49), torch.randn(6, 2, 49, 49)):  # of all windows, and of each of a shifted map
        found = export.attention(q, k, v, attn_mask=bias)
        torch.testing.assert_close(found, attend(q, k, v, attn_mask=bias))
        assert found.is_contiguous() and dimensions == [4] * len(dimensions)


def test_without_rescoring_the_score_is_the_detectors(warm, drawn):
    model, images = load(warm), tiled(drawn, 64, 96)
    with torch.no_grad():
        _, scores, _, _ = export.Exported(model.network, rescore=False)(images)
        found = detect(model.network(images, [(64, 96)]))
    assert torch.allclose(scores[:len(found.scores)], found.scores) and not scores[len(found.scores):].any()


def test_the_files_describe_themselves(warm, onnx, pt2, session):
    extra = {"description.json": ""}
    torch.export.load(pt2, extra_files=extra)
    facts = json.loads(extra["description.json"])
    model = load(warm)
    assert facts["format"] == "boxteacher-1" and facts["classes"] == model.classes
    assert (facts["min_size"], facts["max_size"]) == model.size == (64, 64) and facts["score_threshold"] == LOW
    assert "mask quality" in facts["score"] and facts["padding"] == [123.675, 116.28, 103.53]
    metadata = session.get_modelmeta().custom_metadata_map
    assert {name: json.loads(text) for name, text in metadata.items()} == facts | {"min_side": 32}
    assert facts["min_side"] == 160
    assert [path.name for file in (onnx, pt2) for path in file.parent.iterdir()] == ["model.ONNX", "model.pt2"]


@pytest.mark.parametrize("size", [(300, 320), (256, 324)])
def test_sides_that_are_no_multiples_of_32_are_named(session, loaded, size):
    images = torch.zeros(1, 3, *size)
    with pytest.raises(Exception, match="sides_must_be_multiples_of_32.*{1,3,%d,%d}" % size):
        session.run(None, {"images": images.numpy()})
    with pytest.raises(AssertionError, match=r"^Guard failed: images.size\(\)\[\d\] % 32 == 0$"):
        loaded(images)
    with pytest.raises(AssertionError, match=r"^Guard failed: images.size\(\)\[\d\] >= 160$"):
        loaded(images[:, :, :128, :128])


# ------------------------------------------------------------------------------------------------ the example


@pytest.fixture
def example(packages) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE)))


def test_the_example_stands_alone():
    nodes = list(ast.walk(ast.parse(EXAMPLE.read_text())))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert modules == {"json", "sys", "numpy", "onnxruntime", "PIL"}


@pytest.mark.parametrize("size", [(64, 64), (80, 100), (150, 96)])
def test_the_example_finds_what_the_program_finds(warm, drawn, session, example, size):
    """At the training size, and at sizes that are resized and padded."""
    image = Image.fromarray(tiled(drawn, 64, 64)[0].byte().permute(1, 2, 0).numpy()).resize(size[::-1])
    model = load(warm)
    expected, found = model.predict(image, LOW), example.find(session, image)
    boxes, labels = torch.tensor([box for _, _, box, _ in found]), [model.classes.index(name) for name, *_ in found]
    sure = (expected.scores > LOW + 0.1).nonzero()[:, 0].tolist()  # about the threshold the scores differ
    assert len(sure) > 5 and len(found) <= (expected.scores > 0).sum()
    for k in sure:
        near = (boxes - expected.boxes[k]).abs().amax(1) + 9 * (torch.tensor(labels) != expected.labels[k])
        _, score, _, mask = found[near.argmin()]
        wanted = decode([expected.rles[k]], size)[0].numpy()
        assert near.min() < 0.05
        # quality counts what of a mask lies in the padding, with `warm` much
        assert score == pytest.approx(float(expected.scores[k]), abs=1e-3 if size == (64, 64) else 0.1)
        assert (mask & wanted).sum() >= 0.99 * (mask | wanted).sum() > 0
    assert example.draw(image.copy(), found) != image


def test_the_example_draws_the_surest_object_on_top(example):
    masks = np.zeros((2, 60, 80), bool)
    masks[0, 5:45, 10:70] = masks[1, 20:30, 40:60] = True
    found = [("sure", 0.9, [0, 50, 9, 59], masks[0]), ("doubtful", 0.4, [0, 50, 9, 59], masks[1])]
    image, other = (example.draw(Image.new("RGB", (80, 60)), some) for some in (found, found[::-1]))
    doubtful, sure = (np.array(ImageColor.getrgb(colour)) for colour in example.COLOURS[:2])
    assert image == other and image.getpixel((5, 25)) == (0, 0, 0)
    assert np.abs(np.array(image.getpixel((20, 25))) - sure / 2).max() < 2
    assert np.abs(np.array(image.getpixel((50, 25))) - (sure / 2 + doubtful / 4)).max() < 3


def test_the_example_without_arguments_says_how(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["onnx_example.py"])
    with pytest.raises(SystemExit, match="^usage: .* model.onnx photo.jpg found.png$"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_the_example_as_a_program_sees_what_is_transparent_as_white(drawn, onnx, tmp_path, monkeypatch, capsys):
    """As the program does, which composes it on white, too."""
    image = Image.fromarray(tiled(drawn, 64, 96)[0].byte().permute(1, 2, 0).numpy())
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 30, 64))
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=alpha)
    image.putalpha(alpha)
    for name, one in {"transparent": image, "white": white}.items():
        one.save(tmp_path / f"{name}.png")
        monkeypatch.setattr(sys, "argv", ["", *map(str, (onnx, tmp_path / f"{name}.png", tmp_path / f"{name}.bmp"))])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    found = (tmp_path / "white.bmp").read_bytes()
    assert found == (tmp_path / "transparent.bmp").read_bytes()
    white.save(tmp_path / "white.bmp")
    assert found != (tmp_path / "white.bmp").read_bytes()  # something is drawn
    assert re.search(rf"objects found: [1-9]\d*, drawn in {tmp_path}/white.bmp\n$", capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------- bad input


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as end:
        export.main([str(argument) for argument in arguments])
    line = one_line_error(capsys)
    assert end.value.code == (2 if line.startswith("error: argument") else 1)
    return line


def test_what_cannot_be_exported_is_one_line_and_no_file(warm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "traced", None)
    (tmp_path / "file").write_text("no checkpoint")
    assert "must end with .onnx or .pt2" in refused(capsys, "--ckpt", warm, "--out", tmp_path / "a/model.pth")
    assert "not a readable checkpoint" in refused(capsys, "--ckpt", tmp_path / "file", "--out", tmp_path / "a/m.pt2")
    assert "cannot write" in refused(capsys, "--ckpt", warm, "--out", tmp_path / "file/model.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_backbone_that_torch_cannot_translate_is_one_line(warm, tmp_path, capfd, monkeypatch):
    def branching(self, x):
        return usual(self, x) if x.sum() > 0 else usual(self, -x)
    usual = ResNet.forward
    monkeypatch.setattr(ResNet, "forward", branching)
    line = refused(capfd, "--ckpt", warm, "--out", tmp_path / "model.pt2")
    assert str(warm) in line and "data-dependent expression" in line and not list(tmp_path.iterdir())


def test_what_onnx_lacks_is_named(warm, tmp_path, capsys, monkeypatch):
    """torch raises an error of many lines, and what it met is the cause of its cause."""
    def as_onnx(program, facts):
        try:
            raise KeyError("the operation")
        except KeyError as error:
            raise RuntimeError("Failed to convert") from error
    monkeypatch.setattr(export, "traced", lambda model: None)
    monkeypatch.setitem(export.WRITERS, ".onnx", as_onnx)
    monkeypatch.setattr(export, "optional", lambda *_: None)
    assert "('the operation')" in refused(capsys, "--ckpt", warm, "--out", tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_before_the_work(package, warm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "load", None)
    for present in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, present, None if present == package else sys)
    assert f"pip install {package}\n" in refused(capsys, "--ckpt", warm, "--out", tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_an_export_that_fails_leaves_the_old_file(warm, program, tmp_path, monkeypatch):
    (tmp_path / "model.pt2").write_text("old")
    monkeypatch.setattr("formats.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(SystemExit):
        exported(warm, program, tmp_path / "model.pt2")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
