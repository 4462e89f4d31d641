"""recipe.py: the plan of a run, its learning rate and ramps, and the options of train.py."""
import inspect
import math
import re

import pytest
import torch

import recipe
from boxteacher import total_loss
from formats.coco import CocoBoxes
from recipe import (PAPER, Plan, SmallSet, choose, learning_rate, make_plan, parse_arguments, ramp_factor, small_set,
                    small_set_recipe)


@pytest.mark.parametrize("options, expected", [
    ("", Plan(90_000, 0.01, 1000, (60_000, 80_000), False, 10_000)),
    ("--schedule 2x", Plan(180_000, 0.01, 1000, (120_000, 160_000), False, 10_000)),
    ("--schedule 3x", Plan(270_000, 0.01, 1000, (210_000, 250_000), False, 10_000)),
    ("--batch-size 8", Plan(180_000, 0.005, 1000, (120_000, 160_000), False, 20_000)),
    ("--batch-size 32 --schedule 3x", Plan(135_000, 0.02, 1000, (105_000, 125_000), False, 5_000)),
    ("--batch-size 8 --lr 0.02", Plan(180_000, 0.02, 1000, (120_000, 160_000), False, 20_000)),
    ("--iters 900", Plan(900, 0.01, 45, (600, 800), False, 100)),
    ("--iters 900 --warmup 7 --lr-decay cosine", Plan(900, 0.01, 7, (600, 800), True, 100)),
    ("--iters 900 --batch-size 8 --optimizer adamw", Plan(900, 5e-5, 45, (600, 800), False, 100)),
    ("--iters 5", Plan(5, 0.01, 0, (3, 4), False, 1)),
])
def test_plan(options, expected):
    args = vars(parse_arguments(options.split()))
    plan = make_plan(**{name: args[name] for name in inspect.signature(make_plan).parameters})
    assert plan._replace(lr=0) == expected._replace(lr=0)
    assert plan.lr == pytest.approx(expected.lr, rel=1e-12)


@pytest.mark.parametrize("iteration, expected", [
    (0, 1e-5), (500, 0.01 * (0.001 + 0.999 / 2)), (1000, 0.01), (59_999, 0.01), (60_000, 0.001),
    (79_999, 0.001), (80_000, 1e-4), (89_999, 1e-4)])
def test_learning_rate_warms_up_and_falls_twice(iteration, expected):
    plan = Plan(90_000, 0.01, 1000, (60_000, 80_000), False, 10_000)
    assert learning_rate(iteration, plan) == pytest.approx(expected, rel=1e-9)


def test_learning_rate_with_cosine_and_without_warm_up():
    plan = Plan(100, 0.2, 0, (50, 60), True, 1)
    assert [learning_rate(i, plan) for i in (0, 25, 50, 100)] == pytest.approx(
        [0.2, 0.1 * (1 + math.sqrt(0.5)), 0.1, 0.0])
    warming = plan._replace(warmup=10)
    assert learning_rate(5, warming) == pytest.approx(0.1 * (1 + math.cos(math.pi / 20)) * 0.5005)


def test_ramp_reaches_one_and_stays():
    plan = Plan(90_000, 0.01, 1000, (60_000, 80_000), False, 10_000)
    assert [ramp_factor(i, plan) for i in (0, 4999, 9999, 50_000)] == [1e-4, 0.5, 1.0, 1.0]


def test_only_the_noisy_losses_are_ramped():
    losses = {"loss_cls": 1.0, "loss_projection": 2.0, "loss_mask": 4.0, "loss_pairwise": 8.0, "loss_pixel": 16.0,
              "loss_affinity": 32.0}
    assert total_loss(losses, 0.5) == 1 + 2 + 4 + 4 + 8 + 16


# -------------------------------------------------------------------------------------------------- small sets


FOOD = SmallSet(90, 0.1885, 1.0, "cpu")      # tried by hand: 900 iterations of 8 images at 160 and 192 pixels
COCO = SmallSet(288, 0.0904, 1.4175, "cpu")  # 2600 of 4 at 320, 352 and 384 (EXPERIMENTS.md has both)
SETS = [facts._replace(images=images, box=box, device=device) for facts in (FOOD, COCO) for images in (50, 500, 5000)
        for box in (0.02, 0.1, 0.5, 1.0) for device in ("cpu", "cuda")]


def chosen(facts: SmallSet, options: str = "", multiple: int = 1) -> dict:
    """What is chosen with these options of train.py."""
    return small_set_recipe(*facts, vars(parse_arguments(["--data", "food", *options.split()])), multiple)


def test_what_was_measured_is_chosen():
    food, coco = chosen(FOOD, "--backbone-weights none"), chosen(COCO)
    shared = {"channels": 64, "optimizer": "adamw", "lr_decay": "cosine", "clip_grad": 10.0, "ema": 0.99}
    assert food == food | shared | {"backbone": "r18-slim", "min_size": [160, 192], "teacher_min_size": 192,
                                    "batch_size": 8, "lr": 2e-3, "iters": 890, "ramp": 494}
    assert coco == coco | shared | {"backbone": "r18", "min_size": [320, 352, 384], "batch_size": 4, "iters": 2270}


@pytest.mark.parametrize("facts", SETS)
def test_choices_are_sensible(facts):
    value = chosen(facts)
    side, cpu, seen = max(value["min_size"]), facts.device == "cpu", value["iters"] * value["batch_size"]
    assert (value["backbone"], value["channels"]) == (("r18", 64) if cpu else ("r50", 256))
    assert (192 if cpu else 384) <= side <= 800 and all(s % 32 == 0 for s in value["min_size"])
    assert value["teacher_min_size"] == side < value["max_size"] == value["teacher_max_size"]
    assert facts.box * side >= (32 if cpu else 64) or side == 800 or cpu and seen <= 9600
    assert facts.images ** 0.5 * (750 if cpu else 3000) + 40 >= seen
    assert 0.5 < value["ramp"] / value["iters"] < 0.6
    assert value["eval_every"] <= value["iters"] >= value["checkpoint_every"] and value["log_every"] >= 1
    if cpu:
        micros = recipe.cpu_microseconds(value["backbone"], 64, "boxteacher")
        assert seen * side ** 2 * facts.aspect * micros < 1.02 * 2 * 3600e6  # an hour on two cores


def test_more_images_mean_more_iterations_and_fewer_passes():
    for device in ("cpu", "cuda"):
        iters = [chosen(FOOD._replace(images=n, device=device))["iters"] for n in (50, 500, 5000)]
        assert iters[0] < iters[1] < iters[2] < 100 * iters[0]


@pytest.mark.parametrize("options, expected", [
    ("--iters 1800", {"iters": 1800, "ramp": 1000, "eval_every": 450, "checkpoint_every": 180}),
    ("--iters 12", {"iters": 12, "ramp": 6, "eval_every": 3, "checkpoint_every": 2, "log_every": 1}),
    ("--iters 1", {"iters": 1, "ramp": 1, "eval_every": 1, "checkpoint_every": 1, "log_every": 1}),
    ("--iters 18000", {"ramp": 10_000, "ema": 0.999, "checkpoint_every": 1000, "min_size": [320, 352, 384]}),
    ("--batch-size 16", {"batch_size": 16, "lr": 4e-4, "iters": 570, "ramp": 316}),
    ("--batch-size 16 --lr 0.5", {"lr": 0.5}),
    ("--backbone-weights none", {"backbone": "r18-slim", "batch_size": 8, "lr": 2e-3}),
    ("--backbone-weights none --backbone r18", {"backbone": "r18", "batch_size": 8, "lr": 2e-3}),
    ("--backbone r50", {"backbone": "r50", "channels": 64, "min_size": [224, 256], "lr": 1e-4}),
    ("--init a.pt --backbone-weights none", {"batch_size": 4, "lr": 1e-4, "ramp": 159}),
    ("--optimizer sgd", {"lr": None, "optimizer": "sgd", "clip_grad": 10.0}),
    ("--colors off", {"colors": "off"}),
    ("--method boxinst", {"colors": None}),
    ("--score cls", {"colors": "off"}),
    ("--iters 50", {"colors": "on"}),
    ("--backbone swin-t", {"lr": None, "optimizer": "adamw"}),
    ("--min-size 200 100", {"min_size": [200, 100], "max_size": 333, "teacher_min_size": 200, "teacher_max_size": 333}),
    ("--max-size 256", {"min_size": [224, 256], "max_size": 256, "teacher_min_size": 256, "teacher_max_size": 256}),
    ("--max-size 50", {"min_size": [50], "teacher_min_size": 50}),
    ("--teacher-min-size 500", {"min_size": [320, 352, 384], "teacher_min_size": 500, "teacher_max_size": 833}),
    ("--ramp 5 --ema 0.5 --clip-grad 1 --channels 32 --lr-decay steps",
     {"ramp": 5, "ema": 0.5, "clip_grad": 1.0, "channels": 32, "lr_decay": "steps"}),
    ("--eval-every 7 --checkpoint-every 8 --log-every 9", {"eval_every": 7, "checkpoint_every": 8, "log_every": 9})])
def test_what_is_given_stays_and_the_rest_follows(options, expected):
    value = chosen(COCO, options)
    if value.get("lr"):
        value["lr"] = round(value["lr"], 9)
    assert {name: value.get(name) for name in expected} == expected


def test_the_batch_is_a_multiple_of_processes_and_micro_steps():
    assert [chosen(COCO, multiple=n)["batch_size"] for n in (1, 2, 3, 8)] == [4, 4, 6, 8]
    assert chosen(COCO, multiple=8)["lr"] == pytest.approx(2 * chosen(COCO)["lr"])


def test_facts_of_a_set(drawn):
    annotations = CocoBoxes(drawn / "annotations/instances_train2017.json", drawn / "train2017")
    facts = small_set(annotations, "cpu")
    sides = sorted(min(x1 - x0, y1 - y0) / 64 for x0, y0, x1, y1 in annotations.boxes.tolist())
    assert facts.images == 12 and facts.aspect == 1 and facts.device == "cpu"
    assert facts.box == pytest.approx((sides[31] + sides[32]) / 2, abs=1e-4) and len(sides) == 64
    annotations.boxes, annotations.offsets = annotations.boxes[:0], 0 * annotations.offsets
    assert small_set(annotations, "cpu").box == 1  # TrainBatches refuses such a set


def test_every_choice_is_printed_with_its_reason(drawn):
    annotations = CocoBoxes(drawn / "annotations/instances_train2017.json", drawn / "train2017")
    for options in ([], ["--iters", "90", "--backbone", "swin-t", "--init", "a.pt"]):
        args = parse_arguments(["--data", str(drawn), "--device", "cpu", *options])
        before = dict(vars(args))
        first, *lines = choose(args, annotations, {}, None)
        assert "--schedule 1x" in first and all(": " in line and len(line) < 200 for line in lines[:-1])
        text = " ".join(lines)
        for name, value in vars(args).items():
            if name not in ("chosen_from", "lr"):
                shown = f"--{name.replace('_', '-')} " in text
                assert shown == (before[name] is None and value is not None), name
        assert ("minutes on 1 core" in text) == (not options) and "time left" in text


@pytest.mark.parametrize("own, now, expected", [(None, None, "off"), ("off", None, "off"), ("on", None, "on"),
                                                (None, "on", "on"), ("on", "off", "off")])
def test_a_run_goes_on_with_its_pseudo_masks(own, now, expected, drawn):
    """A run of an earlier version, which had no such option (None), with the paper's."""
    config = {"chosen_from": list(FOOD)} | ({"colors": own} if own else {})
    args = parse_arguments(["--data", str(drawn), "--device", "cpu", *(["--colors", now] if now else [])])
    annotations = CocoBoxes(drawn / "annotations/instances_train2017.json", drawn / "train2017")
    choose(args, annotations, {}, config)
    assert args.colors == expected
    if now is None:
        other = parse_arguments(["--data", str(drawn), "--device", "cpu", "--score", "iou"])
        assert "--score iou rates the paper's" in " ".join(choose(other, annotations, {}, config))
        assert other.colors == "off"  # the score would have no use
        boxinst = parse_arguments(["--data", str(drawn), "--device", "cpu", "--method", "boxinst"])
        choose(boxinst, annotations, {}, config)
        assert boxinst.colors is None


@pytest.mark.parametrize("options", ["--data cityscapes", "--data my-images --schedule 1x",
                                     "--train-json a.json --train-images b --schedule 1x"])
def test_the_papers_recipe_for_named_sets_and_with_a_schedule(options, drawn):
    args, default = parse_arguments(options.split()), vars(parse_arguments([]))
    expected = dict(vars(args))
    assert choose(args, None, {}, None) == [] and vars(args) == expected
    apart = ("data", "out", "train_json", "train_images")
    assert all(expected[name] == default[name] for name in default if name not in apart)


# ------------------------------------------------------------------------------------------------- the options


DEFAULTS = {
    "data": "coco", "train_json": None, "train_images": None, "val_json": None, "val_images": None,
    "method": "boxteacher", "backbone": "r50", "channels": 256, "optimizer": "sgd",
    "backbone_weights": "imagenet", "init": None, "schedule": "1x", "iters": None, "batch_size": 16,
    "accumulate": 1, "lr": None, "min_size": [640, 672, 704, 736, 768, 800], "max_size": 1333,
    "teacher_min_size": 800, "teacher_max_size": 1333, "augment": "none", "pixel_loss": "dice",
    "lambda_pixel": 0.5, "lambda_affinity": 0.1, "score": "mask-aware", "ema": 0.999, "amp": "auto",
    "workers": 4, "seed": 0, "out": "runs/boxteacher-r50-coco", "fresh": False, "eval_every": 10_000,
    "checkpoint_every": 5_000, "log_every": 20, "tensorboard": False}


def test_every_option_of_the_contract_and_its_default(capsys):
    """The options that depend on the data have no default of argparse's; their help states the paper's."""
    args = vars(parse_arguments([]))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS
    assert args["device"] == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for name in (*DEFAULTS, "device"):
        assert f" --{name.replace('_', '-')} " in text, name
    for default in ("coco", "boxteacher", "imagenet", "dice", "mask-aware", "0.5", "0.1"):
        assert f"(default: {default})" in text, default
    for name, value in PAPER.items():
        name = name.replace("_", "-")
        option = re.search(rf" --{name} [A-Z{{].*?\(default: None\)", text[text.index(" options: "):])[0]
        words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        assert words in option and "None: " in option, name
    folder = vars(parse_arguments(["--data", "my-images"]))
    assert all(folder[name] is None for name in PAPER)


@pytest.mark.parametrize("option, values", [
    ("method", "boxteacher boxinst condinst"), ("optimizer", "sgd adamw"),
    ("backbone", "r18 r34 r50 r101 r101-dcn swin-t swin-s swin-b"), ("schedule", "1x 2x 3x"),
    ("augment", "none weak strong strong-blur"), ("pixel-loss", "dice bce avg none"),
    ("score", "mask-aware cls iou mean-entropy released"), ("amp", "auto off bf16 fp16")])
def test_choices_of_the_contract(option, values):
    for value in values.split():
        assert getattr(parse_arguments([f"--{option}", value]), option.replace("-", "_")) == value


def test_swin_has_its_own_optimiser():
    assert parse_arguments(["--backbone", "swin-b"]).optimizer == "adamw"
    assert parse_arguments("--backbone swin-b --optimizer sgd".split()).optimizer == "sgd"


def test_run_folder_is_named_after_method_backbone_and_data():
    args = parse_arguments("--data /x/birds --method boxinst --backbone r18".split())
    assert args.out == "runs/boxinst-r18-birds"
    files = "--train-json a/b.json --train-images p".split()
    assert parse_arguments([*files, "--schedule", "1x"]).out == "runs/boxteacher-r50-b"
    assert parse_arguments([*files, "--device", "cpu"]).out == "runs/boxteacher-r18-b"  # chosen


@pytest.mark.parametrize("options", [
    "--method maskrcnn", "--backbone r51", "--channels 48", "--channels 0", "--optimizer adam",
    "--schedule 4x", "--iters 0", "--iters many", "--batch-size 0", "--batch-size 16 --accumulate 3",
    "--accumulate 0", "--lr 0", "--lr nan", "--warmup -1", "--weight-decay -1", "--weight-decay nan",
    "--clip-grad 0", "--min-size", "--min-size 0", "--max-size -5", "--teacher-min-size x", "--augment heavy",
    "--pixel-loss l1", "--score best", "--ema 1.5", "--lambda-pixel -1", "--lambda-affinity nan", "--amp on",
    "--device nonsense", "--workers -1", "--seed -1", "--log-every 0", "--eval-every 0",
    "--checkpoint-every 0", "--train-json a.json", "--val-images p", "--backbone r18-slim",
    "--init a.pt --backbone-weights b.pkl", "--average --ema 0.9", "--no-such-option",
    "--fit-steps -1", "--colors maybe", "--colors on --method boxinst", "--fit-steps 3 --method condinst",
    "--colors on --score cls"])
def test_wrong_values_end_with_status_2(options, capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(options.split())
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "error: " in last and options.split()[0].removesuffix("-json") in last


def test_the_batch_must_divide_among_processes_and_micro_steps(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse_arguments("--batch-size 8 --accumulate 2".split()).batch_size == 8
    with pytest.raises(SystemExit) as end:
        parse_arguments("--batch-size 12 --accumulate 2".split())
    assert end.value.code == 2 and "--batch-size must be a multiple" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_with_the_same_arguments_resumes(monkeypatch, name):
    monkeypatch.setenv(name, "0")
    assert parse_arguments(["--fresh"]).fresh
    monkeypatch.setenv(name, "1")
    assert not parse_arguments(["--fresh"]).fresh
