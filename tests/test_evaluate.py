"""evaluate.py and tools/draw.py: COCO figures, results, the command line, the sheet.

The data set made here is drawn so that its masks can be read off the pixels: class c paints channel c, every
object with its own value, on black. `read_colours` stands in for model.find_instances and finds all of them exactly.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import evaluate
from formats.checkpoint import save
from formats.coco import CocoBoxes, ground_truth
from helpers import SIZES, Looker, evaluation, fails, rewrite, rle
from model import CondInst, Instances, build_model
from tools import draw
from tools.processes import start_distributed

ROOT = Path(evaluate.__file__).parent


def read_colours(images, sizes, original_sizes, score_threshold, rescore):
    """A perfect model.find_instances for `draw_dataset`, after a Looker. Its scores depend on the padding, as a
    network's scores may."""
    answers = []
    for image, (height, width) in zip(images, sizes):
        found = [(label, image[label, :height, :width] == value) for label in range(3)
                 for value in image[label].unique().tolist() if value]
        corners = [(*mask.nonzero().min(0).values.flip(0), *mask.nonzero().max(0).values.flip(0) + 1)
                   for _, mask in found]
        padding = images.shape[2] * images.shape[3] / 1e6
        answers.append(Instances(torch.tensor(corners, dtype=torch.float32).reshape(-1, 4),
                                 torch.tensor([0.9 - padding - 0.1 * k for k in range(len(found))]),
                                 torch.tensor([label for label, _ in found], dtype=torch.int64),
                                 [rle(mask.numpy()) for _, mask in found], (height, width)))
    return answers


@pytest.fixture
def perfect(monkeypatch):
    monkeypatch.setattr(CondInst, "forward", Looker.forward)  # of a checkpoint
    monkeypatch.setattr(evaluate, "find_instances", read_colours)


def run_perfect(json_path, image_dir, **options):
    options = {"min_size": 64, "max_size": 200, "workers": 0, "progress": False, **options}
    return evaluate.evaluate(Looker(), CocoBoxes(json_path, image_dir), **options)


def as_results(json_path, score=0.9) -> list[dict]:
    """The ground truth as results, without crowds."""
    truth = ground_truth(json_path)
    return [{"image_id": a["image_id"], "category_id": a["category_id"], "score": score, "bbox": a["bbox"],
             "segmentation": rle(truth.annToMask(a))}
            for a in truth.dataset["annotations"] if not a["iscrowd"]]


# ------------------------------------------------------------------------------------------------ figures


def test_perfect_predictions_give_100_from_images_to_figures(dataset, perfect):
    metrics = evaluate.coco_metrics(dataset[0], run_perfect(*dataset))
    for kind in ("bbox", "segm"):
        assert metrics[kind]["AP"] == pytest.approx(100) and metrics[kind]["APs"] == pytest.approx(100)
        assert metrics[kind]["APl"] is None and list(metrics[kind]) == evaluate.FIGURES
    assert list(metrics["per_class"]) == ["red", "green", "blue"]
    assert all(v == pytest.approx(100) for figures in metrics["per_class"].values() for v in figures.values())
    json.dumps(metrics, allow_nan=False)  # plain floats


def test_perfect_predictions_on_real_images_with_crowds(coco_mini):
    path = coco_mini / "annotations" / "instances_val2017.json"
    assert any(a["iscrowd"] for a in json.loads(path.read_text())["annotations"])
    results = as_results(path)
    metrics = evaluate.coco_metrics(path, results)
    assert metrics["bbox"]["AP"] == pytest.approx(100) and metrics["segm"]["AP"] == pytest.approx(100)


def test_half_of_the_objects_found_gives_the_average_precision_by_hand(dataset):
    """Red has 3 objects: the best detection is right, the second one wrong, the third right.

    Precision at recall 1/3 is 1, at 2/3 it is 2/3; of the 101 recalls 0, 0.01, … the first 34 (0 to 0.33)
    read 1, the next 33 (to 0.66) 2/3, the rest 0.
    """
    def only_red(content):
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 3]

    rewrite(dataset[0], only_red)
    first, second, _ = as_results(dataset[0])
    wrong = {**first, "score": 0.8, "bbox": [0, 50, 8, 8], "segmentation": rle(np.eye(64, 96))}
    metrics = evaluate.coco_metrics(dataset[0], [{**second, "score": 0.7}, first, wrong])
    by_hand = 100 * (34 * 1 + 33 * 2 / 3) / 101
    assert metrics["bbox"]["AP50"] == pytest.approx(by_hand)
    assert metrics["segm"]["AP"] == pytest.approx(by_hand)
    assert metrics["per_class"]["red"]["segm"] == pytest.approx(by_hand)
    assert metrics["per_class"]["blue"] == {"bbox": None, "segm": None}  # no ground truth


def test_a_shifted_box_counts_up_to_its_iou(dataset):
    """A box of 20 x 12 moved by 2 pixels has IoU 18/22 = 0.818: right at 0.50 … 0.80, 7 of 10 thresholds."""
    rewrite(dataset[0], lambda c: c.update(annotations=c["annotations"][:1]))
    result, = as_results(dataset[0])
    x, y, w, h = result["bbox"]
    metrics = evaluate.coco_metrics(dataset[0], [{**result, "bbox": [x + 2, y, w, h]}])
    assert metrics["bbox"]["AP"] == pytest.approx(70) and metrics["bbox"]["AP75"] == pytest.approx(100)


def test_mask_figures_sort_objects_by_the_area_of_the_mask(dataset):
    """A wrong detection with a medium-sized box but a small mask hurts APs of masks, not APs of boxes."""
    results = as_results(dataset[0])
    wrong = {**results[0], "score": 0.99, "bbox": [0, 0, 96, 64],
             "segmentation": rle(np.pad(np.ones((4, 4)), ((60, 0), (92, 0))))}
    metrics = evaluate.coco_metrics(dataset[0], [wrong, *results])
    assert metrics["segm"]["APs"] < 99 and metrics["bbox"]["APs"] == pytest.approx(100)


def test_crowds_count_neither_for_nor_against(dataset):
    whole = rle(np.ones((64, 128)))
    crowd = {"id": 50, "image_id": 103, "category_id": 3, "bbox": [0, 0, 128, 64], "segmentation": whole,
             "area": 128 * 64, "iscrowd": 1}
    results = as_results(dataset[0])
    rewrite(dataset[0], lambda c: c["annotations"].append(crowd))
    assert evaluate.coco_metrics(dataset[0], results)["segm"]["AP"] == pytest.approx(100)
    inside = {**results[0], "image_id": 103, "score": 0.99, "bbox": [80, 30, 20, 20],
              "segmentation": rle(np.pad(np.ones((20, 20)), ((30, 14), (80, 28))))}
    metrics = evaluate.coco_metrics(dataset[0], [inside, *results])
    assert metrics["segm"]["AP"] == pytest.approx(100) and metrics["bbox"]["AP"] == pytest.approx(100)


def test_ground_truth_without_masks_skips_their_ap_with_a_message(dataset, perfect, capsys):
    def only_boxes(content):
        for annotation in content["annotations"][2:]:
            for key in ("segmentation", "area", "iscrowd"):
                del annotation[key]

    rewrite(dataset[0], only_boxes)
    metrics = evaluate.coco_metrics(dataset[0], run_perfect(*dataset))
    assert metrics["segm"] is None and metrics["bbox"]["AP"] == pytest.approx(100)
    assert metrics["per_class"]["green"] == {"bbox": pytest.approx(100), "segm": None}
    assert capsys.readouterr().out == "segm AP skipped: 6 of 8 annotations have no mask\n"
    evaluate.print_tables(metrics)
    mask_row = capsys.readouterr().out.splitlines()[3]
    assert mask_row.split() == ["-"] * 6


def test_no_detections_give_zeros(dataset):
    metrics = evaluate.coco_metrics(dataset[0], [])
    for kind in ("bbox", "segm"):
        assert metrics[kind] == {"AP": 0, "AP50": 0, "AP75": 0, "APs": 0, "APm": None, "APl": None}
    assert metrics["per_class"]["blue"] == {"bbox": 0, "segm": 0}


def test_no_ground_truth_gives_none(dataset):
    results = as_results(dataset[0])
    rewrite(dataset[0], lambda c: c.update(annotations=[]))
    for some in ([], results):
        assert set(evaluate.coco_metrics(dataset[0], some)["bbox"].values()) == {None}


def test_pycocotools_prints_nothing_and_the_results_stay_as_they_are(dataset, capsys):
    results = as_results(dataset[0])
    before = json.dumps(results)
    evaluate.coco_metrics(dataset[0], results)
    assert capsys.readouterr().out == "" and json.dumps(results) == before


def test_classes_of_the_same_name_are_kept_apart(dataset):
    rewrite(dataset[0], lambda c: [category.update(name="thing") for category in c["categories"]])
    per_class = evaluate.coco_metrics(dataset[0], [])["per_class"]
    assert list(per_class) == ["thing (3)", "thing (17)", "thing (90)"]


def test_tables_are_aligned(capsys):
    figures = dict.fromkeys(evaluate.FIGURES, 12.345)
    per_class = {"a long class name": {"bbox": 100.0, "segm": None}, "b": {"bbox": 0, "segm": 1}}
    evaluate.print_tables({"bbox": figures, "segm": {**figures, "APl": None}, "per_class": per_class})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["box", *evaluate.FIGURES] and lines[1].split() == ["12.3"] * 6
    assert lines[2].split() == ["mask", *evaluate.FIGURES] and lines[3].split() == ["12.3"] * 5 + ["-"]
    assert len({len(line) for line in lines[:4]}) == 1 and len({len(line) for line in lines[4:]}) == 1
    assert lines[5].split() == ["a", "long", "class", "name", "100.0", "-"]


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("info", [True, False])
def test_results_are_accepted_by_pycocotools(dataset, perfect, tmp_path, info):
    results = run_perfect(*dataset)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    if info:
        rewrite(dataset[0], lambda c: c.update(info={"description": "made up"}))
    truth = COCO(dataset[0]) if info else ground_truth(dataset[0])  # the file itself holds no info
    assert truth.dataset["info"] == ({"description": "made up"} if info else {})
    found = truth.loadRes(str(file))
    assert len(found.anns) == len(results) == 8
    scorer = COCOeval(ground_truth(dataset[0]), found, "segm")
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    assert scorer.stats[0] == pytest.approx(1)


def test_results_hold_category_ids_xywh_boxes_and_text_masks(dataset, perfect):
    results = run_perfect(*dataset)
    assert {r["category_id"] for r in results} == {3, 17, 90}
    truth = {(r["image_id"], tuple(r["bbox"])): r for r in as_results(dataset[0])}
    for result in results:
        same = truth[result["image_id"], tuple(result["bbox"])]
        assert result["category_id"] == same["category_id"] and result["segmentation"] == same["segmentation"]
        assert set(result) == {"image_id", "category_id", "score", "bbox", "segmentation"}
        assert 0.7 < result["score"] < 0.9  # the scores of read_colours
    assert [r["image_id"] for r in results] == [100, 100, 101, 101, 102, 102, 103, 103]


def test_evaluate_passes_its_options_on_and_restores_the_mode(dataset, monkeypatch):
    seen, asked = [], []

    class Spy(Looker):
        def forward(self, images, sizes):
            seen.append((self.training, torch.is_grad_enabled(), tuple(images.shape), sizes))
            return images

    def spy(images, sizes, *options):
        asked.append((sizes, *options))
        return read_colours(images[:, :, :1, :1] * 0, [(1, 1)] * len(sizes), None, 0, True)

    model = Spy()
    monkeypatch.setattr(evaluate, "find_instances", spy)
    annotations = CocoBoxes(*dataset)
    for training in (True, False):
        model.train(training)
        evaluate.evaluate(model, annotations, min_size=32, max_size=48, score_threshold=0.4, rescore=False,
                          batch_size=3, workers=0, progress=False)
        assert model.training is training
    shape, sizes = (3, 3, 64, 64), [(32, 48), (48, 32), (32, 32)]  # padded to a multiple of 32
    assert seen[0] == (False, False, shape, sizes) and len(seen) == 4
    assert asked[0] == (sizes, SIZES[:3], 0.4, False) and len(asked) == 4

    def broken(*args):
        raise RuntimeError("broken")

    monkeypatch.setattr(evaluate, "find_instances", broken)
    with pytest.raises(RuntimeError):
        evaluate.evaluate(model.train(), annotations, workers=0, progress=False)
    assert model.training


def one_process(rank, port, json_path, image_dir, out):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    assert start_distributed(torch.device("cpu")) == (rank, 2, torch.device("cpu"))
    evaluate.find_instances = read_colours
    answers = [run_perfect(json_path, image_dir, batch_size=size) for size in (1, 2, 8)]
    Path(f"{out}.{rank}").write_text(json.dumps(answers))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_results_of_one(dataset, perfect, tmp_path):
    """Five images over two processes, with batches of 1, of 2 (whose padding differs) and of all."""
    alone = [run_perfect(*dataset, batch_size=size) for size in (1, 2, 8)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, *map(str, dataset), str(tmp_path / "answers"))
    torch.multiprocessing.spawn(one_process, arguments, nprocs=2)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"answers.{rank}").read_text()) == alone


# ---------------------------------------------------------------------------------------- the command line


def test_command_line_writes_results_metrics_and_sheet(checkpoint, dataset, perfect, tmp_path, capsys):
    results, metrics, image = (tmp_path / "new" / name for name in ("results.json", "ap.json", "sheet.png"))
    more = "--results", results, "--metrics", metrics, "--sheet", image
    evaluate.main(evaluation(checkpoint, dataset, *more))
    assert json.loads(results.read_text()) == run_perfect(*dataset)
    assert json.loads(metrics.read_text()) == evaluate.coco_metrics(dataset[0], run_perfect(*dataset))
    out = capsys.readouterr().out
    what = "boxteacher r18-slim, teacher's weights, scores rescored by masks: 5 images at 64/128 pixels"
    assert out.startswith(f"{what}\nbox ") and "\nmask " in out and "\nclass AP" in out and f"sheet: {image}" in out
    assert Image.open(image).format == "PNG"
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.name.rsplit(".", 1)[-1]]


def test_images_without_annotations_give_results_to_upload(checkpoint, dataset, perfect, tmp_path, capsys):
    """Like COCO's test-dev, whose file lists only images and categories."""
    rewrite(dataset[0], lambda content: content.pop("annotations"))
    files = {name: tmp_path / name for name in ("results.json", "sheet.png")}
    evaluate.main(evaluation(checkpoint, dataset, "--results", files["results.json"], "--sheet", files["sheet.png"]))
    assert len(json.loads(files["results.json"].read_text())) > 3 and files["sheet.png"].exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{dataset[0]} has no usable box; no AP" and lines[3].split() == ["-"] * 6


def test_as_a_user_runs_it_with_a_real_model(checkpoint, dataset, tmp_path):
    """An untrained model that finds nothing above 0.999: zeros in the tables, an empty list, no traceback."""
    results = tmp_path / "results.json"
    arguments = evaluation(checkpoint, dataset, "--score-threshold", "0.999", "--results", results)
    run = subprocess.run([sys.executable, "evaluate.py", *arguments], cwd=ROOT, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr == "" and json.loads(results.read_text()) == []
    assert run.stdout.splitlines()[2].split() == ["0.0"] * 4 + ["-"] * 2


def test_sizes_scores_and_rescoring_come_from_the_checkpoint_or_the_options(checkpoint, dataset, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "evaluate",
                        lambda model, *_, **options: seen.append(options | {"amp_dtype": model.amp_dtype}) or [])
    state = torch.load(checkpoint, weights_only=True)
    evaluate.main(evaluation(checkpoint, dataset))
    evaluate.main(evaluation(checkpoint, dataset, "--min-size", 100, "--max-size", 200, "--rescore", "off",
                          "--score-threshold", 0.2, "--batch-size", 4, "--amp", "bf16"))
    save({**state, "method": "boxinst", "config": {}}, checkpoint)
    evaluate.main(evaluation(checkpoint, dataset))
    evaluate.main(evaluation(checkpoint, dataset, "--rescore", "on"))
    assert [(s["min_size"], s["max_size"], s["rescore"], s["score_threshold"]) for s in seen] == [
        (64, 128, True, 0.05), (100, 200, False, 0.2), (800, 1333, False, 0.05), (800, 1333, True, 0.05)]
    assert [(s["batch_size"], s["amp_dtype"]) for s in seen[:2]] == [(1, None), (4, torch.bfloat16)]


def test_weights_choose_between_teacher_and_student(checkpoint, dataset, monkeypatch):
    seen = []

    def first_weight(model, *_, **__):
        seen.append(next(iter(model.parameters())).mean().item())
        return []

    monkeypatch.setattr(evaluate, "evaluate", first_weight)
    state = torch.load(checkpoint, weights_only=True)
    first = next(iter(build_model(**state["model"]).named_parameters()))[0]
    state["teacher"] = {**state["teacher"], first: torch.full_like(state["teacher"][first], 7.0)}
    save(state, checkpoint)
    for choice in ([], ["--weights", "teacher"], ["--weights", "student"]):
        evaluate.main(evaluation(checkpoint, dataset, *choice))
    assert seen[:2] == [7, 7] and seen[2] < 1


@pytest.mark.parametrize("wrong", [
    ["--min-size", "0"], ["--max-size", "big"], ["--score-threshold", "1.5"], ["--score-threshold", "nan"],
    ["--batch-size", "0"], ["--workers", "-1"], ["--sheet-count", "0"], ["--rescore", "maybe"],
    ["--amp", "fp8"], ["--weights", "ema"], ["--device", "abacus"], ["--device", "cuda:99"], ["--nonsense"]])
def test_wrong_values_end_with_status_2(checkpoint, dataset, capsys, wrong):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(evaluation(checkpoint, dataset, *wrong))
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2 and "error: " in last_line and wrong[0] in last_line


def test_val_json_without_val_images_ends_with_status_2(checkpoint, dataset, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--ckpt", str(checkpoint), "--val-json", str(dataset[0])])
    assert exit.value.code == 2 and "--val-images" in capsys.readouterr().err


def test_bad_checkpoints(checkpoint, dataset, tmp_path, capsys):
    assert str(tmp_path / "nowhere.pt") in fails(evaluation(tmp_path / "nowhere.pt", dataset), capsys)
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:len(whole) // 2])
    assert str(checkpoint) in fails(evaluation(checkpoint, dataset), capsys)
    checkpoint.write_text("not a checkpoint")
    assert str(checkpoint) in fails(evaluation(checkpoint, dataset), capsys)


def test_other_classes_are_refused_and_both_are_named(checkpoint, dataset, capsys):
    def rename(content):
        content["categories"][1]["name"] = "crimson"

    rewrite(dataset[0], rename)
    line = fails(evaluation(checkpoint, dataset), capsys)
    assert "was trained for other classes" in line and str(checkpoint) in line and str(dataset[0]) in line
    assert "3 red" in line and "3 crimson" in line and "17 green" not in line


@pytest.mark.parametrize("key, value", [
    ("segmentation", [4, 4, 24, 4, 24, 16]), ("segmentation", [[]]), ("segmentation", [[4, 4, 24, 16]]),
    ("segmentation", "text"), ("segmentation", {"size": [64, 96], "counts": [64 * 96]}), ("iscrowd", "0"),
    ("segmentation", [[float("nan"), 4, 24, 4, 24, 16]]), ("area", "240"), ("area", -240), ("area", float("nan"))])
def test_fields_that_cannot_be_evaluated_are_named_before_work(checkpoint, dataset, monkeypatch, capsys, key, value):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **options: pytest.fail("it runs"))
    rewrite(dataset[0], lambda content: content["annotations"][2].update({key: value}))
    line = fails(evaluation(checkpoint, dataset), capsys)
    assert str(dataset[0]) in line and "1 of 8 annotations" in line and key in line and "(id 2)" in line


@pytest.mark.parametrize("key", ["iscrowd", "area"])
def test_perfect_predictions_of_a_file_with_null_fields(dataset, perfect, key):
    rewrite(dataset[0], lambda content: [row.update({key: None}) for row in content["annotations"]])
    metrics = evaluate.coco_metrics(dataset[0], run_perfect(*dataset))
    assert metrics["bbox"]["APs"] == pytest.approx(100) and metrics["segm"]["AP"] == pytest.approx(100)


def test_crowds_alone_are_said_to_give_no_ap(checkpoint, dataset, perfect, capsys):
    rewrite(dataset[0], lambda content: [row.update(iscrowd=1) for row in content["annotations"]])
    evaluate.main(evaluation(checkpoint, dataset))
    assert f"{dataset[0]} has no usable box: all 8 are crowds; no AP\n" in capsys.readouterr().out


def test_missing_data_is_named(checkpoint, tmp_path, capsys):
    line = fails(["--ckpt", str(checkpoint), "--data", str(tmp_path / "nowhere")], capsys)
    assert str(tmp_path / "nowhere" / "annotations" / "instances_val2017.json") in line


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named(checkpoint, dataset, perfect, capsys, workers):
    """Also by a worker process, whose error arrives with a traceback in its message."""
    image = dataset[1] / "3.png"
    image.write_bytes(image.read_bytes()[:60])
    results = dataset[1] / "results.json"
    line = fails([*evaluation(checkpoint, dataset, "--results", results), "--workers", str(workers)], capsys)
    assert str(image) in line and "Traceback" not in line
    assert sorted(path.name for path in dataset[1].iterdir()) == [f"{i}.png" for i in range(5)]


@pytest.mark.parametrize("option", ["--results", "--metrics", "--sheet", "--score-quality"])
def test_an_unwritable_output_is_reported_before_the_evaluation(checkpoint, dataset, tmp_path, monkeypatch,
                                                                capsys, option):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: pytest.fail("evaluated"))
    (tmp_path / "file").write_text("in the way")
    line = fails(evaluation(checkpoint, dataset, option, tmp_path / "file" / "out"), capsys)
    assert "cannot write" in line and str(tmp_path / "file" / "out") in line
    assert "it is a folder" in fails(evaluation(checkpoint, dataset, option, tmp_path), capsys)


# ------------------------------------------------------------------------------------------------ images


def rows_of(dataset, count=12, results=None):
    truth = ground_truth(dataset[0])
    results = as_results(dataset[0]) if results is None else results
    return draw.sheet_rows(CocoBoxes(*dataset), truth, [results], count)


def test_rows_have_images_with_objects_and_their_results(dataset):
    rows = rows_of(dataset)
    assert [tuple(row.image.shape[1:]) for row in rows] == SIZES[:4]  # the fifth has no object
    for row in rows:
        assert row.image.dtype == torch.uint8
        (found,) = row.found
        assert torch.equal(found.boxes, row.boxes) and torch.equal(found.labels, row.labels)
        assert torch.equal(found.masks, row.true_masks) and row.true_masks.shape == (2, *row.image.shape[1:])
        for label, mask in zip(row.labels, row.true_masks):
            assert (row.image[label][mask] > 0).all()
    assert [tuple(row.image.shape[1:]) for row in rows_of(dataset, count=2)] == [SIZES[0], SIZES[3]]


def test_sheet_has_three_panels_a_row(dataset, tmp_path):
    path, panel, gap = str(tmp_path / "sheet.png"), draw.PANEL, draw.GAP
    rows = rows_of(dataset, count=1)
    draw.sheet(rows, path, ["red", "green", "blue"])
    image = Image.open(path)
    assert image.size == (3 * (panel + gap) + gap, draw.HEADER + round(panel * 64 / 96) + gap)
    draw.sheet(rows * 5, path)  # two rows a line, three lines
    assert Image.open(path).size == (6 * (panel + gap) + 5 * gap,
                                     draw.HEADER + 3 * (round(panel * 64 / 96) + gap))
    assert not Path(path + ".tmp").exists()


def test_sheet_leaves_out_predictions_below_its_threshold(dataset, tmp_path):
    def middle(score, threshold):
        rows = rows_of(dataset, 1, as_results(dataset[0], score))
        return np.array(draw.panels(rows[0], None, threshold)[1])

    plain = middle(0.1, 0.3)
    assert set(np.unique((plain > 40).sum(2))) <= {0, 1}  # as in the image: one channel an object
    assert (plain != middle(0.5, 0.3)).any() and (plain != middle(0.1, 0.05)).any()


def test_sheet_without_masks_and_without_detections(dataset, tmp_path):
    rewrite(dataset[0], lambda c: [a.pop("segmentation") for a in c["annotations"]])
    rows = draw.sheet_rows(CocoBoxes(*dataset), ground_truth(dataset[0]), [[]], 4)
    assert all(row.true_masks is None and len(row.found[0].boxes) == 0 for row in rows)
    draw.sheet(rows, str(tmp_path / "sheet.png"), ["red", "green", "blue"])


def test_instances_are_drawn_where_they_are():
    image = torch.full((3, 60, 80), 100, dtype=torch.uint8)
    masks = torch.zeros(2, 60, 80, dtype=torch.bool)
    masks[0, 20:50, 10:50], masks[1, 30:58, 40:70] = True, True  # they overlap
    boxes = torch.tensor([[10, 20, 50, 50], [40, 30, 70, 58.0]])
    labels, scores = torch.tensor([0, 1]), torch.tensor([0.9, 0.8])
    drawn = draw.draw_instances(image, boxes, labels, scores, masks, ["a", "b"])
    assert drawn.shape == image.shape and drawn.dtype == torch.uint8 and (image == 100).all()
    changed = (drawn != 100).any(0)
    assert changed[20:50, 10:50].all() and changed[30:58, 40:70].all()
    assert not changed[52:, :38].any() and not changed[:, 75:].any()
    assert drawn[:, 49, 30].tolist() == list(draw.COLOURS[0])  # its outline
    assert drawn[:, 40, 45].sum() > 250  # the part that both share is not black
    nothing = draw.draw_instances(image, boxes[:0], torch.zeros(0, dtype=torch.int64))
    assert torch.equal(nothing, image)


def test_predictions_take_the_colour_of_their_object():
    boxes = torch.tensor([[0, 0, 10, 10], [20, 20, 40, 40.0]])
    found = torch.tensor([[21, 20, 40, 40], [30, 20, 50, 40], [0, 1, 10, 10.0]])
    assert draw.matching_colours(boxes, found) == [1, 3, 0]  # the second has an IoU of 1/3: its own
    assert draw.matching_colours(boxes[:0], found) == [0, 1, 2]
    assert draw.matching_colours(boxes, found[:0]) == []
