"""Checkpoints: one dictionary of plain types, written so that a crash at any moment leaves a good one.

    format      "boxteacher-1"
    model       the arguments of build_model: backbone, num_classes, channels, frozen, and, where the weights it
                began with have conventions of their own, mask_channels and stride_in_1x1
    classes     [{"id": category id, "name": str}], label i is classes[i]; None where a foreign file has no names
    method      boxteacher, boxinst or condinst
    config      every option of the run, and the sizes to test at
    iteration   finished iterations
    student     state dict
    teacher     state dict: the teacher, or with --average the average; None where there is neither
    optimizer, scaler   state dicts; in last.pt only, what a resume needs beyond the above

All load with weights_only=True: loading never runs code from the file. The checkpoints that BoxTeacher's authors and
AdelaiDet released load as if they were ours (pretrained.py).

    python -m formats.checkpoint CKPT                 says what a file is
    python -m formats.checkpoint CKPT --convert OUT   writes it in our format, without what only a resume needs
"""
import argparse
import os
import sys
import zipfile
from pathlib import Path

import torch

from formats.files import UserError, warn
from formats.released import read, read_backbone, read_checkpoint, summary
from model import CondInst, build_model

FORMAT = "boxteacher-1"
ENTRIES = {"model": dict, "classes": (list, type(None)), "method": str, "config": dict,
           "iteration": (int, type(None)), "student": dict, "teacher": (dict, type(None))}
RESUME_ONLY = ("optimizer", "scaler")


class CheckpointError(UserError):
    """A file cannot be used as a checkpoint; the message is one line for a person."""


def save(state: dict, path: str | Path, previous: str | Path | None = None) -> None:
    """Write `state` to `path` through a temporary file; what was there is kept as `previous`.

    The data is on the disk before the name changes, and names change in one step each: whenever the process is
    killed, `path` or `previous` is a whole checkpoint.
    """
    path = Path(path)
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if previous is not None and zipfile.is_zipfile(path):  # a truncated one must not take the place of a good one
        os.replace(path, previous)
    os.replace(temporary, path)


def load(path: str | Path) -> dict:
    """Read a checkpoint, ours or a released one, onto the CPU. A released one also has "dropped", the keys left out.

    Raises CheckpointError where it is missing, damaged or something else.
    """
    try:
        state = read(path)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {first_line(error)}") from None
    if isinstance(state, dict) and state.get("format") == FORMAT:
        wrong = [key for key, kind in ENTRIES.items() if key not in state or not isinstance(state[key], kind)]
        if wrong:
            raise CheckpointError(f"{path} says it is a checkpoint of this project, but its {wrong[0]!r} is not as it "
                                  "should be")
        return state
    try:
        return read_checkpoint(state)
    except Exception as error:  # the file may be anything
        raise CheckpointError(f"{path} cannot be used: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:240]


def load_latest(folder: str | Path) -> dict | None:
    """The state to go on from: last.pt, else previous.pt, else None where neither exists.

    Raises CheckpointError where there are such files but none can be read.
    """
    found = [path for path in (Path(folder) / "last.pt", Path(folder) / "previous.pt") if path.exists()]
    for path in found:
        try:
            state = load(path)
            if "optimizer" not in state:
                raise CheckpointError(f"{path} holds weights alone, no run to go on with (they go to --init)")
            return state
        except CheckpointError as error:
            warn(f"{error}; trying the previous one")
    if found:
        raise CheckpointError(f"no readable checkpoint in {folder}; start again with --fresh, which moves it aside")
    return None


def load_model(path: str | Path, weights: str | None = None) -> tuple[CondInst, dict]:
    """Build the model of a checkpoint, with the weights of "teacher", "student", or None: teacher where there is one.

    Returns (model in eval mode on the CPU, the rest of the checkpoint: classes, method, config, iteration, ..., and
    which "weights" these are).
    """
    state = load(path)
    weights = weights or ("teacher" if state["teacher"] is not None else "student")
    if state[weights] is None:
        raise CheckpointError(f"{path} holds no teacher (method {state['method']}); use --weights student")
    info = {key: value for key, value in state.items() if key not in ("student", "teacher", *RESUME_ONLY)}
    return network(path, state, weights).eval(), info | {"weights": weights}


def test_size(info: dict) -> tuple[int, int]:
    """The shorter and the longest side at which a checkpoint is tested, pixels: COCO's where it states none."""
    config = info["config"] or {}
    return config.get("test_min_size") or 800, config.get("test_max_size") or 1333


def network(path: str | Path, state: dict, weights: str) -> CondInst:
    """The network of a checkpoint with its "teacher" or "student" weights; CheckpointError where they do not fit."""
    try:
        model = build_model(**state["model"])
        model.load_state_dict(state[weights])
    except Exception as error:  # only where a file was tampered with
        reason = str(error).strip().splitlines()[-1].strip()[:240]
        raise CheckpointError(f"{path}: the {weights}'s weights do not fit the model it names: {reason}") from None
    return model


def initialise(model: CondInst, classes: list[dict], state: dict, path: str | Path) -> None:
    """Start `model` from a checkpoint's weights (`state`, as `load` gave it); its class layer only where the classes
    are the same.

    Any other difference in shape is a CheckpointError that names the first parameter.
    """
    weights, own = dict(state["teacher"] or state["student"]), model.state_dict()
    same_classes = state["classes"] == classes
    if not same_classes:
        weights = {name: w for name, w in weights.items() if not name.startswith("head.class_logits.")}
    its = state["model"]
    made = (f"--backbone {its['backbone']} --channels {its['channels']} "
            + ("without --backbone-weights none" if its["frozen"] else "--backbone-weights none"))
    wrong = [f"{name} {tuple(value.shape)}" for name, value in weights.items()
             if name not in own or own[name].shape != value.shape]
    wrong += [f"{name} is missing" for name in own
              if name not in weights and not name.startswith("head.class_logits.")]
    if wrong:
        raise CheckpointError(f"{path} does not fit this model: it was made with {made} (the first difference: "
                              f"{wrong[0]})")
    if not same_classes:
        warn(f"{path} " + ("does not name its classes" if state["classes"] is None else "was trained for other classes")
             + ": its class layer is left out")
    model.load_state_dict(weights, strict=False)


def load_backbone(name: str, source: str) -> tuple[dict, bool]:
    """Weights for a backbone and its stride_in_1x1, see read_backbone; says what of them is left out.

    All that may be wrong with a download or a file is a CheckpointError.
    """
    try:
        weights, stride_in_1x1, dropped = read_backbone(name, source)
    except Exception as error:  # the file may be anything
        raise CheckpointError(f"--backbone-weights {source}: {first_line(error)}") from None
    if dropped and os.environ.get("RANK", "0") == "0":
        print(f"--backbone-weights {source}: left out {'; '.join(summary(dropped))}")
    return weights, stride_in_1x1


# ------------------------------------------------------------------------------------------------- command line


def describe(path: str | Path, state: dict) -> str:
    """What a checkpoint is, one line a fact. Raises CheckpointError where its weights do not fit."""
    spec, released = state["model"], "dropped" in state
    origin = "BoxTeacher, as its authors released it" if state["teacher"] else "AdelaiDet"
    reports = "sqrt(detection score x mask quality)" if state["method"] == "boxteacher" else "the detection score"
    backbone = spec["backbone"] + ", stride in the first 1x1 convolution" * spec.get("stride_in_1x1", False)
    if released:
        backbone += ", made for BGR pixels less their mean: the first convolution now reads ours"
    present = [part for part in ("teacher", "student") if state[part] is not None]
    parameters = [sum(p.numel() for p in network(path, state, part).parameters()) for part in present][0]
    classes = state["classes"] or []
    names = ", ".join(c["name"] for c in classes[:5]) + ", ..." * (len(classes) > 5) or "no names in the file"
    facts = {"file": path,
             "format": origin if released else FORMAT + " (this project)",
             "method": f"{state['method']}: evaluation reports {reports}",
             "backbone": backbone,
             "channels": f"{spec['channels']}, mask branch {spec.get('mask_channels', 16)}",
             "classes": f"{spec['num_classes']}: {names}",
             "weights": f"{parameters / 1e6:.1f} million parameters in each of: {', '.join(present)}",
             "iteration": "not said" if state["iteration"] is None else state["iteration"],
             "test size": "{}, at most {} pixels".format(*test_size(state)),
             "resume": "yes, as last.pt of a run" if "optimizer" in state else "no, weights only",
             "dropped": ("\n" + " " * 11).join(summary(state.get("dropped", {}))) or "nothing"}
    return "\n".join(f"{name:11}{fact}" for name, fact in facts.items())


def convert(state: dict, path: str) -> None:
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        save({key: value for key, value in state.items() if key not in ("dropped", *RESUME_ONLY)}, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save calls a full disk
        raise CheckpointError(f"cannot write {path}: {first_line(error)}") from None


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Say what a checkpoint is; convert a released one.")
    parser.add_argument("ckpt", metavar="CKPT", help="a checkpoint of this project, BoxTeacher or AdelaiDet")
    parser.add_argument("--convert", metavar="OUT", help="write it there in this project's format, without the "
                        "optimiser's state; OUT must not exist yet")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        if args.convert and os.path.exists(args.convert):
            raise CheckpointError(f"{args.convert} exists already: choose another name")
        state = load(args.ckpt)
        print(describe(args.ckpt, state))
        if args.convert:
            convert(state, args.convert)
            print(f"written    {args.convert}")
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
