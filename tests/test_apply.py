"""predict.py --apply: decisions of a review page that come as a file."""
import json
import os
import shutil
from pathlib import Path

import pytest

import predict
from helpers import one_line_error
from review_page import BIG, applied
from tools.review import digest


def decide(labelled: Path, path: Path, decisions: dict, masks_sha256=None) -> Path:
    path.write_text(json.dumps({"masks_sha256": masks_sha256 or digest(labelled / "masks.json"),
                                "decisions": decisions}))
    return path


def test_no_decision_changes_no_byte(labelled, tmp_path, capsys):
    applied(decide(labelled, tmp_path / "d.json", {}), labelled / "masks.json", tmp_path / "final.json")
    assert (tmp_path / "final.json").read_bytes() == (labelled / "masks.json").read_bytes()
    assert "0 masks kept, 0 rejected, 8 not looked at" in capsys.readouterr().out


def test_a_rejected_box_trains_as_one_without_a_mask(labelled, tmp_path):
    row = applied(decide(labelled, tmp_path / "d.json", {str(BIG): "reject", "0": "keep"}), labelled / "masks.json",
                  tmp_path / "final.json")[BIG]
    assert row["segmentation"] == [] and row["area"] == row["bbox"][2] * row["bbox"][3]
    assert 0 < row["score"] <= 1 and row["source"] == "colours"


NONE = "not a file of decisions"


@pytest.mark.parametrize("decisions, about, message", [
    ({"777": "reject", "0": "keep"}, None, "decides about 1 annotation that"), ({"00": "reject"}, None, "(id 00)"),
    ({"\x1b[2J": "keep"}, None, r"(id \x1b[2J)"), ({"0": "reject"}, "0" * 64, "is about another file than"),
    ({"0": "reject"}, 7, NONE), ([["0", "keep"]], None, NONE), ({"0": "burn"}, None, NONE), ({"0": None}, None, NONE),
    ({"0": ["keep"]}, None, NONE)])
def test_decisions_that_do_not_fit_are_one_line(decisions, about, message, labelled, tmp_path, capsys):
    path = decide(labelled, tmp_path / "d.json", decisions, about)
    refused(path, labelled / "masks.json", tmp_path / "deep/final.json", message, capsys)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[" * 10 ** 6, b"[]", b"null", b'{"images": []}'])
def test_files_that_are_no_decisions_are_one_line(content, labelled, tmp_path, capsys):
    (tmp_path / "d.json").write_bytes(content)
    refused(tmp_path / "d.json", labelled / "masks.json", tmp_path / "deep/final.json", NONE, capsys)


def refused(decisions: Path, masks: Path, out: Path, message: str, capsys) -> None:
    """One line, exit status 1, and every file as it was."""
    def files():
        return {path: path.read_bytes() for path in decisions.parent.rglob("*") if path.is_file()}
    before = files()
    with pytest.raises(SystemExit) as end:
        predict.main(["--apply", str(decisions), str(masks), "--out", str(out)])
    assert end.value.code == 1 and message in one_line_error(capsys) and files() == before


def test_files_that_are_away_or_cannot_be_written(labelled, tmp_path, capsys):
    good, masks = decide(labelled, tmp_path / "d.json", {"0": "reject"}), labelled / "masks.json"
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "gone.json", masks, tmp_path / "deep/final.json", "gone.json is missing: name the decis", capsys)
    refused(tmp_path / "pipe", masks, tmp_path / "deep/final.json", "no ordinary file", capsys)
    for path, message in ((tmp_path / "gone.json", "gone.json is missing: name the masks.json beside the review page"),
                          (tmp_path / "folder", "folder is a folder: name the masks.json beside the review page"),
                          (labelled, f"masks is a folder: name {labelled}/masks.json\n"),
                          (tmp_path / "pipe", "pipe is no file: name the masks.json")):
        refused(good, path, tmp_path / "deep/final.json", message, capsys)
    refused(good, good, tmp_path / "deep/final.json", "not a COCO annotation file", capsys)
    refused(good, masks, tmp_path / "folder", "cannot write", capsys)
    refused(good, masks, tmp_path / "file/final.json", "cannot write", capsys)
    copy = shutil.copy(masks, tmp_path / "masks.json")
    refused(good, copy, copy, "would be overwritten", capsys)
    refused(good, copy, good, "would be overwritten", capsys)


@pytest.mark.parametrize("options, message", [
    ([], "needs one masks.json"), (["a.json", "b.json"], "needs one masks.json"),
    *[(["a.json", *more], f"{more[0]}: not with --apply") for more in (
        ["--ckpt", "c.pt"], ["--boxes", "b.json"], ["--images", "i"], ["--polygons"], ["--min-score", "0.5"],
        ["--review-count", "3"], ["--workers", "0"], ["--device", "meta"], ["--score-threshold", "0.5"])]])
def test_options_that_do_not_go_with_apply(options, message, capsys):
    with pytest.raises(SystemExit) as end:
        predict.main(["--apply", "d.json", *options, "--out", "x"])
    assert end.value.code == 2 and message in one_line_error(capsys)
