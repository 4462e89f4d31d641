"""recipe.py: the plan of a run, its learning rate and ramps, and the options of train.py."""
import inspect
import math

import pytest
import torch

from boxteacher import total_loss
from recipe import Plan, learning_rate, make_plan, parse_arguments, ramp_factor



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
    args = vars(parse_arguments([]))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS
    assert args["device"] == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for name in (*DEFAULTS, "device"):
        assert f" --{name.replace('_', '-')} " in text, name
    for default in ("coco", "boxteacher", "r50", "256", "imagenet", "1x", "16", "1333", "800", "dice",
                    "0.999"):
        assert f"(default: {default})" in text, default


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
    assert parse_arguments("--train-json a/b.json --train-images p".split()).out == "runs/boxteacher-r50-b"


@pytest.mark.parametrize("options", [
    "--method maskrcnn", "--backbone r51", "--channels 48", "--channels 0", "--optimizer adam",
    "--schedule 4x", "--iters 0", "--iters many", "--batch-size 0", "--batch-size 16 --accumulate 3",
    "--accumulate 0", "--lr 0", "--lr nan", "--warmup -1", "--weight-decay -1", "--weight-decay nan",
    "--clip-grad 0", "--min-size", "--min-size 0", "--max-size -5", "--teacher-min-size x", "--augment heavy",
    "--pixel-loss l1", "--score best", "--ema 1.5", "--lambda-pixel -1", "--lambda-affinity nan", "--amp on",
    "--device nonsense", "--workers -1", "--seed -1", "--log-every 0", "--eval-every 0",
    "--checkpoint-every 0", "--train-json a.json", "--val-images p", "--backbone r18-slim",
    "--init a.pt --backbone-weights b.pkl", "--average --ema 0.9", "--no-such-option"])
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
