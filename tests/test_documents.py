"""README.md and EXPERIMENTS.md: every command is one that the programs take; those that train, train a step."""
import math
import re
import shlex
from pathlib import Path

import pytest

import benchmark
from formats import checkpoint, commands
import evaluate
from tools import experiments
import predict
from tools import selftraining
import train
from backbone import BACKBONES
from formats.checkpoint import load
from test_train import SMALL, command, drawn, losses_of, same, warm  # noqa: F401

PROJECT = Path(__file__).resolve().parent.parent
PARSERS = {"train.py": train.parse_arguments, "evaluate.py": evaluate.parse_arguments,
           "tools.selftraining": selftraining.parse_arguments, "tools.experiments": experiments.parse_arguments,
           "formats.checkpoint": checkpoint.parse_arguments, "data.py": commands.parse_arguments,
           "predict.py": predict.parse_arguments, "benchmark.py": benchmark.parse_arguments}
TORCHRUN = re.compile(r"torchrun( --[a-z_]+=\S+)+ ")


def commands_of(document: str) -> list[list[str]]:
    """[program, option, ...] of every command, in a block or within a line, as a shell would see them."""
    text = (PROJECT / document).read_text()
    fenced = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fenced.findall(text) if not language]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`]+)`", fenced.sub("", text))
    variables = dict(re.findall(r'^([A-Z]+)="(.*)"$', "\n".join(lines), re.MULTILINE))
    found = []
    for line in lines:
        line = re.sub(r"\$([A-Z]+)", lambda m: variables.get(m[1], m[0]), line.strip())
        line = TORCHRUN.sub("python ", line)
        if re.match(r"python (\w+\.py|-m \w+\.\w+)( (?!--help)|$)", line):
            program, *options = shlex.split(line.replace("-m ", ""), comments=True)[1:]
            if program == "lite0.py":  # the README's script, which is these programs with a backbone of its own
                program, options = f"{options[0]}.py", options[1:]
            if program in PARSERS:
                found.append([program, *options])
    return found


EXPERIMENTS, README = commands_of("EXPERIMENTS.md"), commands_of("README.md")


@pytest.mark.parametrize("words", [*README, *EXPERIMENTS], ids=" ".join)
def test_command_is_understood(words, monkeypatch):
    monkeypatch.setitem(BACKBONES, "lite0", None)
    program, *options = words
    PARSERS[program](options)


def test_all_of_the_papers_rows_are_there():
    """The others of Tables 2 and 8 name methods that are not part of this project; one of Table 4's is ours."""
    text = (PROJECT / "EXPERIMENTS.md").read_text()
    parts = re.findall(r"^### (Table \d+|Figures)(.*?)(?=^### |\Z)", text, re.DOTALL | re.MULTILINE)
    rows = {number: len(re.findall(r"^\| (?!row|---|figure)", part, re.MULTILINE)) for number, part in parts}
    assert rows == {"Table 1": 4, "Table 2": 8, "Table 3": 5, "Table 4": 6, "Table 5": 4, "Table 6": 7, "Table 7": 2,
                    "Table 8": 6, "Table 9": 0, "Table 10": 10, "Figures": 5}


def test_commands_are_found():
    outs = {value(options, "--out") for _, *options in README}
    assert {"runs/one", "runs/two", "runs/mini", "runs/boxteacher-r50-3x", "runs/labels.json"} <= outs
    table_rows = re.findall(r"^\|.*`(?:\$TRAIN|python) .*", (PROJECT / "EXPERIMENTS.md").read_text(), re.MULTILINE)
    assert len(table_rows) >= 50 and len(EXPERIMENTS) >= len(table_rows)


@pytest.mark.parametrize("document, of_all", [(README, ("method", "schedule", "iters")), (EXPERIMENTS, None)],
                         ids=["README", "EXPERIMENTS"])
def test_one_run_folder_is_of_one_kind_of_run(document, of_all):
    """Else the second command would go on with the run of the first."""
    runs = {}
    for program, *options in document:
        if program == "train.py" and "lite0" not in options:
            args = vars(train.parse_arguments(options))
            kind = {name: args[name] for name in of_all or args}
            assert runs.setdefault(args["out"], kind) == kind


def value(options: list[str], name: str) -> str | None:
    return options[options.index(name) + 1] if name in options else None


def test_what_a_command_needs_another_one_makes():
    made = {value(options, "--out") for _, *options in EXPERIMENTS}
    for program, *options in EXPERIMENTS:
        for name in ("--init", "--ckpt", "--train-json"):
            path = value(options, name) or ""
            if path.startswith("runs/") and not path.startswith(("runs/experiments/", "runs/demo/")):  # of make
                assert path in made or str(Path(path).parent) in made, path


OF_SIZE = {"--amp", "--backbone", "--channels", "--schedule", "--iters", "--batch-size", "--lr", "--min-size",
           "--max-size", "--teacher-min-size", "--teacher-max-size", "--init", "--train-json", "--train-images",
           "--data", "--out"}


def without_size(options: list[str]) -> tuple[str, ...]:
    """Options less those that say how large and long a run is and where its files are."""
    kept, skipping = [], False
    for word in options:
        if word.startswith("--"):
            skipping = word in OF_SIZE
        if not skipping:
            kept.append(word)
    return tuple(kept)


@pytest.mark.parametrize("options", sorted({without_size(options) for program, *options in EXPERIMENTS
                                            if program == "train.py"}), ids=lambda o: " ".join(o) or "boxteacher")
def test_every_kind_of_training_trains_a_step(options, drawn, warm, tmp_path):  # noqa: F811
    files = ["--train-json", drawn / "annotations/instances_train2017.json", "--train-images", drawn / "train2017"]
    assert command(*files, *SMALL, "--init", warm, "--iters", 2, "--out", tmp_path, *options) == 0
    lines = losses_of(tmp_path)
    assert all(math.isfinite(v) for line in lines for v in line.values())
    final, method = load(tmp_path / "final.pt"), value([*options], "--method") or "boxteacher"
    assert not same(final["student"], load(warm)["student"])
    assert (lines[0]["pseudo_masks"] > 0) == (method == "boxteacher")
