"""Checkpoints: one dictionary of plain types, written so that a crash at any moment leaves a good one.

    format      "boxteacher-1"
    model       what build_model needs: backbone, num_classes, channels, frozen
    classes     [{"id": category id, "name": str}], label i is classes[i]
    method      boxteacher, boxinst or condinst
    config      every option of the run, and the sizes to test at
    iteration   finished iterations
    student     state dict
    teacher     state dict, or None where the method has no teacher
    optimizer, scaler   state dicts; in last.pt only, what a resume needs beyond the above

All load with weights_only=True: loading never runs code from the file.
"""
import os
import warnings
import zipfile
from pathlib import Path

import torch

from coco import warn
from model import CondInst, build_model

FORMAT = "boxteacher-1"


class CheckpointError(Exception):
    """A file cannot be used as a checkpoint; the message is one line for a person."""


def save(state: dict, path: str | Path, previous: str | Path | None = None) -> None:
    """Write `state` to `path` through a temporary file; what was there is kept as `previous`.

    The data is on the disk before the name changes, and names change in one step each: whenever the process is
    killed, `path` or `previous` is a whole checkpoint.
    """
    path = Path(path)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    if previous is not None and zipfile.is_zipfile(path):  # a truncated one must not take the place of a good one
        os.replace(path, previous)
    os.replace(temporary, path)


def load(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU. Raises CheckpointError where it is missing, damaged or something else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a foreign file might be: the error says enough
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        reason = str(error).strip().split("\n")[0][:120]
        raise CheckpointError(f"{path} is not a readable checkpoint (truncated, or not one at all): {reason}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is a PyTorch file but not a checkpoint of this project ({FORMAT})")
    return state


def load_latest(folder: str | Path) -> dict | None:
    """The state to go on from: last.pt, else previous.pt, else None where neither exists.

    Raises CheckpointError where there are such files but none can be read.
    """
    found = [path for path in (Path(folder) / "last.pt", Path(folder) / "previous.pt") if path.exists()]
    for path in found:
        try:
            return load(path)
        except CheckpointError as error:
            warn(f"{error}; trying the previous one")
    if found:
        raise CheckpointError(f"no readable checkpoint in {folder}; start again with --fresh, which moves it aside")
    return None


def load_model(path: str | Path, weights: str | None = None) -> tuple[CondInst, dict]:
    """Build the model of a checkpoint, with the weights of "teacher", "student", or None: teacher where there is one.

    Returns (model in eval mode on the CPU, the rest of the checkpoint: classes, method, config, iteration, ...).
    """
    state = load(path)
    weights = weights or ("teacher" if state["teacher"] is not None else "student")
    if state[weights] is None:
        raise CheckpointError(f"{path} holds no teacher (method {state['method']}); use --weights student")
    model = build_model(**state["model"])
    model.load_state_dict(state[weights])
    return model.eval(), {key: value for key, value in state.items() if key not in ("student", "teacher", "optimizer")}


def initialise(model: CondInst, classes: list[dict], path: str | Path) -> None:
    """Start `model` from the weights in a checkpoint; its class layer only where the classes are the same.

    Any other difference in shape is a CheckpointError that names the first parameter.
    """
    state = load(path)
    weights = dict(state["teacher"] or state["student"])
    if state["classes"] != classes:
        warn(f"{path} was trained for other classes: its class layer is left out")
        weights = {name: w for name, w in weights.items() if not name.startswith("head.class_logits.")}

    def misfit(why: str) -> CheckpointError:
        its = state["model"]
        norm = "ImageNet weights or a file" if its["frozen"] else "--backbone-weights none"
        return CheckpointError(f"{path} does not fit this model: {why}; it was made with --backbone {its['backbone']} "
                               f"--channels {its['channels']} and {norm}")

    own = model.state_dict()
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            raise misfit(f"{name} {tuple(value.shape)}")
    missing = [name for name in own if name not in weights and not name.startswith("head.class_logits.")]
    if missing:
        raise misfit(f"{missing[0]} is missing")
    model.load_state_dict(weights, strict=False)
