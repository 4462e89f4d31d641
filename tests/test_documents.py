"""README.md, EXPERIMENTS.md and docs/: their programs accept every command, and every kind of training trains."""
import math
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import benchmark
import evaluate
import predict
import train
from backbone import BACKBONES
from formats import commands
from formats.checkpoint import load
from helpers import SMALL, command, losses_of, same
from losses import PIXEL_LOSSES
from teacher import SCORES
from tools import checkpoint, compare, experiments, export, selftraining

PROJECT = Path(__file__).resolve().parent.parent


def overfit_arguments(options: list[str]) -> None:
    """tests/overfit.py FOLDER [--images ID ...] and options of train.py."""
    assert options[0] == "COCO_FOLDER"
    train.parse_arguments(options[1:])


PARSERS = {"train.py": train.parse_arguments, "evaluate.py": evaluate.parse_arguments,
           "predict.py": predict.parse_arguments, "data.py": commands.parse_arguments,
           "benchmark.py": benchmark.parse_arguments, "tools.selftraining": selftraining.parse_arguments,
           "tools.experiments": experiments.parse_arguments, "tools.checkpoint": checkpoint.parse_arguments,
           "tools.compare": compare.parse_arguments, "tools.export": export.parse_arguments,
           "tests/overfit.py": overfit_arguments, "tests/released_files.py": lambda options: None,
            "tests/storm.py": lambda options: None, "tests/review_speed.py": lambda options: None,
            "tests/exported.py": lambda options: None}
TORCHRUN = re.compile(r"torchrun( --[a-z_]+=\S+)+ ")
OURS = re.compile(r"python ((tests/)?\w+\.py|-m tools\.\w+)( (?!--help)|$)")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks_of(page: str) -> list[str]:
    """The blocks of commands and listings of a page, without those of another language."""
    return [block for language, block in FENCED.findall((PROJECT / page).read_text()) if not language]


def commands_of(page: str) -> list[list[str]]:
    """[program, option, ...] of every command, in a block or within a line, as a shell would see them."""
    lines = "\n".join(blocks_of(page)).replace("\\\n", " ").splitlines()
    prose = FENCED.sub("", (PROJECT / page).read_text())
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    variables = dict(re.findall(r'^([A-Z]+)="(.*)"$', "\n".join(lines), re.MULTILINE))
    found = []
    for line in lines:
        line = re.sub(r"\$([A-Z]+)", lambda m: variables.get(m[1], m[0]), line.strip())
        line = TORCHRUN.sub("python ", line)
        if OURS.match(line):
            program, *options = shlex.split(line.replace("-m ", ""), comments=True)[1:]
            if program == "lite0.py":  # the script of docs/forking.md: these programs with one more backbone
                program, options = f"{options[0]}.py", options[1:]
                program = {"selftraining.py": "tools.selftraining"}.get(program, program)
            found.append([program, *options])
    return found


PAGES = ["README.md", "EXPERIMENTS.md", *sorted(f"docs/{path.name}" for path in (PROJECT / "docs").glob("*.md"))]
COMMANDS = {page: commands_of(page) for page in PAGES}
ALL = [words for page in PAGES for words in COMMANDS[page]]
EXPERIMENTS = COMMANDS["EXPERIMENTS.md"]


@pytest.mark.parametrize("words", [pytest.param(words, id=f"{page}: {' '.join(words)}")
                                   for page in PAGES for words in COMMANDS[page]])
def test_command_is_understood(words, monkeypatch):
    monkeypatch.setitem(BACKBONES, "lite0", None)
    program, *options = words
    PARSERS[program](options)


def test_commands_are_found():
    outs = {value(options, "--out") for _, *options in ALL}
    assert {"runs/one", "runs/two", "runs/mini", "runs/mini-boxteacher", "runs/boxteacher-r50-3x",
            "runs/labels-r50.json", "runs/fine-tuned", "found"} <= outs
    assert {"tests/overfit.py", "tests/released_files.py", "tools.experiments"} <= {program for program, *_ in ALL}
    table_rows = re.findall(r"^\|.*`(?:\$TRAIN|python) .*", (PROJECT / "EXPERIMENTS.md").read_text(), re.MULTILINE)
    assert len(table_rows) >= 50 and len(EXPERIMENTS) >= len(table_rows)


def test_the_demo_is_what_experiments_describes():
    """But for its folder, --amp, which depends on the CPU, and files."""
    lines = subprocess.run(["make", "-n", "demo"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    lines = lines.replace("\\\n", " ").replace("runs/demo", "runs/food").splitlines()
    demo = [shlex.split(line.replace("-m ", ""))[1:] for line in lines if "runs/food" in line]
    described = [words for words in EXPERIMENTS if "runs/food" in " ".join(words)]
    assert [program for program, *_ in demo] == [program for program, *_ in described] and len(demo) == 5
    for (program, *one), (_, *two) in zip(demo, described):
        one, two = (vars(PARSERS[program](options)) for options in (one, two))
        assert {name for name in one if one[name] != two[name]} <= {"out", "amp", "metrics", "checkpoint_every"}


def test_all_of_the_papers_rows_are_there():
    """The others of Tables 2 and 8 name methods that are not part of this project; one of Table 4's is ours."""
    text = (PROJECT / "EXPERIMENTS.md").read_text()
    parts = re.findall(r"^### (Table \d+|Figures)(.*?)(?=^### |\Z)", text, re.DOTALL | re.MULTILINE)
    rows = {number: len(re.findall(r"^\| (?!row|---|figure)", part, re.MULTILINE)) for number, part in parts}
    assert rows == {"Table 1": 4, "Table 2": 8, "Table 3": 5, "Table 4": 6, "Table 5": 4, "Table 6": 7, "Table 7": 2,
                    "Table 8": 6, "Table 9": 0, "Table 10": 10, "Figures": 5}


@pytest.mark.parametrize("commands, of_all", [(ALL, ("method", "schedule", "iters")), (EXPERIMENTS, None)],
                         ids=["all pages", "EXPERIMENTS"])
def test_one_run_folder_is_of_one_kind_of_run(commands, of_all):
    """Else the second command would go on with the run of the first."""
    runs = {}
    for program, *options in commands:
        if program == "train.py" and "lite0" not in options:
            args = vars(train.parse_arguments(options))
            kind = {name: args[name] for name in of_all or args}
            assert runs.setdefault(args["out"], kind) == kind


def value(options: list[str], name: str) -> str | None:
    return options[options.index(name) + 1] if name in options else None


def test_what_a_command_needs_another_one_makes():
    made = {value(options, "--out") for _, *options in ALL}
    made |= {train.parse_arguments(options).out for program, *options in ALL
             if program == "train.py" and "lite0" not in options}
    for program, *options in ALL:
        for name in ("--init", "--ckpt", "--train-json"):
            path = value(options, name) or ""
            if path.startswith("runs/") and not path.startswith(("runs/experiments/", "runs/demo/")):  # of make
                assert path in made or str(Path(path).parent) in made, path


OF_SIZE = {"--amp", "--backbone", "--channels", "--schedule", "--iters", "--batch-size", "--lr", "--min-size",
           "--max-size", "--teacher-min-size", "--teacher-max-size", "--init", "--train-json", "--train-images",
           "--data", "--out", "--backbone-weights", "--eval-every", "--accumulate", "--val-json", "--val-images",
           "--warmup", "--ramp", "--log-every", "--workers"}


def without_size(options: list[str]) -> tuple[str, ...]:
    """Options without those that say how large and long a run is, where it starts and where its files are."""
    kept, skipping = [], False
    for word in options:
        if word.startswith("--"):
            skipping = word in OF_SIZE
        if not skipping:
            kept.append(word)
    return tuple(kept)


def kinds_of_training() -> list[tuple[str, ...]]:
    """Options of the commands that train, one of those that mean the same."""
    kinds = {}
    for program, *options in ALL:
        if program == "train.py":
            args = vars(train.parse_arguments(kept := without_size(options)))
            kinds.setdefault(str({name: value for name, value in args.items() if name != "out"}), kept)
    return list(kinds.values())


@pytest.mark.parametrize("options", kinds_of_training(), ids=lambda o: " ".join(o) or "boxteacher")
def test_every_kind_of_training_trains_a_step(options, drawn, warm, tmp_path):
    files = ["--train-json", drawn / "annotations/instances_train2017.json", "--train-images", drawn / "train2017"]
    assert command(*files, *SMALL, "--init", warm, "--iters", 2, "--out", tmp_path, *options) == 0
    lines = losses_of(tmp_path)
    assert all(math.isfinite(v) for line in lines for v in line.values())
    final, method = load(tmp_path / "final.pt"), value([*options], "--method") or "boxteacher"
    assert not same(final["student"], load(warm)["student"])
    assert (lines[0]["pseudo_masks"] > 0) == (method == "boxteacher")


def test_the_loss_and_the_score_of_the_forking_page_train(drawn, warm, tmp_path, monkeypatch):
    added = {"PIXEL_LOSSES": {}, "SCORES": {}}
    for language, block in FENCED.findall((PROJECT / "docs/forking.md").read_text()):
        if language and not block.startswith("# lite0.py"):  # that script is for test_backbone.py
            exec(block, added)
    monkeypatch.setitem(PIXEL_LOSSES, "tversky", added["PIXEL_LOSSES"]["tversky"])
    monkeypatch.setitem(SCORES, "certain", added["SCORES"]["certain"])
    files = ["--train-json", drawn / "annotations/instances_train2017.json", "--train-images", drawn / "train2017"]
    lines = {}
    for loss, score in (("dice", "mask-aware"), ("tversky", "mask-aware"), ("tversky", "certain")):
        out = tmp_path / f"{loss}-{score}"
        assert command(*files, *SMALL, "--init", warm, "--iters", 1, "--out", out, "--pixel-loss", loss, "--score",
                       score) == 0
        lines[loss, score] = losses_of(out)[0]
    values = [line["loss_pixel"] for line in lines.values()]
    assert all(0 < v < 1 for v in values) and len(set(values)) == 3
    assert all(line["pseudo_masks"] > 0 for line in lines.values())


# ------------------------------------------------------------------------------------------- the pages themselves


def test_readme_is_short():
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 130


def test_links_and_figures_lead_somewhere():
    """Files that a page links to exist, and their headings too."""
    def anchor(heading: str) -> str:
        return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")

    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", (PROJECT / page).read_text()):
            if not target.startswith("http"):
                name, _, heading = target.partition("#")
                path = (PROJECT / page).parent / name if name else PROJECT / page
                assert path.exists(), f"{page}: {target}"
                headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE) if heading else []
                assert not heading or heading in map(anchor, headings), f"{page}: {target}"


def test_the_readmes_tree_names_every_file_once():
    block = next(block for block in blocks_of("README.md") if block.startswith("boxteacher.py"))
    named, folder = [], ""
    for line in block.splitlines():
        names, _, _ = line.partition("  ") if not line.startswith(" ") else line.strip().partition("  ")
        if names.endswith("/"):
            folder = names
        else:
            named += [(folder if line.startswith(" ") else "") + name for name in names.split()]
    found = [str(path.relative_to(PROJECT)) for folder in (".", "formats", "tools")
             for path in (PROJECT / folder).glob("*.py") if path.name != "__init__.py"]
    assert sorted(named) == sorted(found)
