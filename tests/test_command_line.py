"""tools/command_line.py: argument types, device, precision, the process group, tables."""
import argparse

import pytest
import torch

import evaluate
import predict
import train
from formats.coco import CocoBoxes, DataError
from helpers import one_line_error, only_training
from tools import batches, compare, selftraining
from tools.command_line import (go_together, image_words, not_negative, not_negative_float, pick_amp, pick_device,
                                positive, positive_float, print_table, probability, rescored)
from tools.processes import start_distributed


@pytest.mark.parametrize("kind, good, bad", [
    (positive, "1 20", "0 -3 2.5 many"), (not_negative, "0 7", "-1 0.5 x"),
    (positive_float, "1e-3 2", "0 -1 nan inf x"), (not_negative_float, "0 0.5", "-0.1 nan inf"),
    (probability, "0 0.3 1", "-0.1 1.01 nan")])
def test_numbers(kind, good, bad):
    assert [kind(text) for text in good.split()] == [float(text) for text in good.split()]
    for text in bad.split():
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            kind(text)


def test_a_device_must_exist():
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("abacus", "cuda:99", "meta:x"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"no device '{name}'"):
            pick_device(name)


def test_amp_by_device(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pick_amp("auto", cpu) is None and pick_amp("off", cuda) is None
    assert pick_amp("bf16", cpu) is torch.bfloat16
    assert pick_amp("fp16", cuda) is torch.float16
    for supported, dtype in [(True, torch.bfloat16), (False, torch.float16)]:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: including_emulation or supported)
        assert pick_amp("auto", cuda) is dtype


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert start_distributed(torch.device("cpu")) == (0, 1, torch.device("cpu"))


def test_options_that_go_together(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--val-json"), parser.add_argument("--val-images")
    for both in ([], ["--val-json", "a", "--val-images", "b"]):
        go_together(parser, parser.parse_args(both), "--val-json", "--val-images")
    with pytest.raises(SystemExit) as end:
        go_together(parser, parser.parse_args(["--val-images", "b"]), "--val-json", "--val-images")
    assert end.value.code == 2 and "--val-json and --val-images go together" in capsys.readouterr().err


@pytest.mark.parametrize("program, files", [
    (train, "--data {set} --out {out}"), (evaluate, "--ckpt {ckpt} --data {set} --device cpu"),
    (predict, "--boxes {train} --images {set}/train2017 --out {out}"),
    (selftraining, "--ckpt {ckpt} --data {set} --out {out}/labels.json --device cpu"),
    (compare, "{train} --truth {train} --images {set}/train2017")])
def test_every_program_reads_images_as_told(program, files, drawn, checkpoint, tmp_path, monkeypatch, capsys):
    """The files to evaluate on, too."""
    count, seen, read = 2 if program is train else 1, [], CocoBoxes

    def spy(*paths, **options):
        seen.append({name: options.get(name) for name in ("exif", "max_pixels")})
        if len(seen) == count:
            raise DataError("stop")
        return read(*paths, **options)

    monkeypatch.setattr(batches if program is train else program, "CocoBoxes", spy)
    words = files.format(set=drawn, out=tmp_path / "out", ckpt=checkpoint,
                         train=drawn / "annotations/instances_train2017.json").split()
    with pytest.raises(SystemExit):
        program.main([*words, "--exif", "stored", "--max-pixels", "77"])
    assert one_line_error(capsys) == "error: stop\n" and seen == [{"exif": "stored", "max_pixels": 77}] * count
    for wrong in (["--exif", "turned"], ["--max-pixels", "0"]):
        with pytest.raises(SystemExit) as end:
            program.main([*words, *wrong])
        assert end.value.code == 2
    capsys.readouterr()


def test_options_of_images_in_the_command_to_run_next(drawn):
    given = ["--exif", "stored", "--max-pixels", "4096"]
    for words in ([], given, given[:2], given[2:]):
        assert image_words(train.parse_arguments([*map(str, only_training(drawn)), *words])) == words


def test_rescoring_follows_the_method_unless_it_is_chosen():
    assert [rescored("auto", method) for method in ("boxteacher", "boxinst", "condinst")] == [True, False, False]
    assert rescored("on", "boxinst") and not rescored("off", "boxteacher")


def test_a_table_is_aligned_whatever_its_names(capsys):
    print_table("score", ("AP", "AP50"), {"a long class name": (100.0, None), "b": (0, 3.14159)})
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[-2:] for line in lines] == [["AP", "AP50"], ["100.0", "-"], ["0.0", "3.1"]]
