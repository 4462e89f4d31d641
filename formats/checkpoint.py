"""Checkpoints: one dictionary of plain types, written so that a crash at any moment leaves a good one.

    format      "boxteacher-1"
    model       the arguments of build_model: backbone, num_classes, channels, frozen, and, if the first weights came
                with conventions that differ from ours, mask_channels and stride_in_1x1
    classes     [{"id": category id, "name": str}], label i is classes[i]; None if a foreign file has no names
    method      boxteacher, boxinst or condinst
    config      every option of the run, and the sizes to test at
    iteration   finished iterations
    student     state dict
    teacher     state dict: the teacher, or with --average the average; None without either
    optimizer, scaler   state dicts; in last.pt only, what a resume needs beyond the above

Loading runs no code from the file. The checkpoints that BoxTeacher's authors and AdelaiDet released load as if they
were ours (released.py).
"""
import os
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from formats.files import UserError, replacing, warn
from formats.pickled import read
from formats.released import read_checkpoint

FORMAT = "boxteacher-1"
ENTRIES = {"model": dict, "classes": (list, type(None)), "method": str, "config": dict,
           "iteration": (int, type(None)), "student": dict, "teacher": (dict, type(None))}
RESUME_ONLY = ("optimizer", "scaler")


class CheckpointError(UserError):
    """A file cannot be used as a checkpoint."""


def save(state: dict, path: str | Path, previous: str | Path | None = None) -> None:
    """Write `state` to `path`; the checkpoint that was there is kept as `previous`.

    The data is on the disk before the name changes, and each name changes in one step: whenever the process is killed,
    `path` or `previous` is a whole checkpoint.
    """
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and zipfile.is_zipfile(path):  # a damaged one must not replace a good one
            os.replace(path, previous)


def load(path: str | Path, pixel_std: tuple | None = None) -> dict:
    """Read a checkpoint onto the CPU. With pixel_std, by which the network divides its pixels, also a released one,
    which then has "dropped", the keys left out.

    Raises CheckpointError if it is missing, damaged or something else.
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
            raise CheckpointError(f"{path} has the format of this project, but its {wrong[0]!r} is missing or damaged")
        return state
    if pixel_std is None:
        raise CheckpointError(f"{path} is no checkpoint of this project")
    try:
        return read_checkpoint(state, pixel_std)
    except Exception as error:  # the file may be anything
        raise CheckpointError(f"{path} cannot be used: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:240]


def load_latest(folder: str | Path) -> dict | None:
    """The state to go on from: last.pt, else previous.pt, else None if neither exists.

    Raises CheckpointError if there are such files but none can be read.
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


def load_weights(network: nn.Module, weights: dict[str, Tensor], may_lack: str = "") -> None:
    """load_state_dict, with a ValueError of one line: the first parameter that does not fit.

    may_lack: pattern of names that may be missing, all or none of them.
    """
    own = network.state_dict()
    wrong = [f"{name} has no place in this network" if name not in own else
             f"{name} has the shape {tuple(value.shape)} instead of {tuple(own[name].shape)}"
             for name, value in weights.items() if name not in own or own[name].shape != value.shape]
    if any(re.fullmatch(may_lack, name) for name in weights):
        may_lack = ""
    wrong += [f"{name} is missing" for name in own if name not in weights and not re.fullmatch(may_lack, name)]
    if wrong:
        raise ValueError(wrong[0])
    network.load_state_dict(weights, strict=False)


def check_classes(checkpoint: str, info: dict, json_path: str, classes: list[dict]) -> None:
    """CheckpointError unless the checkpoint's classes (ids and names, in order) are the data set's.

    A released checkpoint of other classes than COCO's does not name them: then their number must be the same.
    """
    trained, number = info["classes"], info["model"]["num_classes"]
    if trained is None:
        if number != len(classes):
            raise CheckpointError(f"checkpoint {checkpoint} was trained for {number} classes; {json_path} has "
                                  f"{len(classes)}")
        return
    ours, theirs = ([f"{c['id']} {c['name']}" for c in some] for some in (trained, classes))
    if ours == theirs:
        return

    def only(some, others):
        extra = [c for c in some if c not in others]
        shown = ", ".join(extra[:5]) + ", …" * (len(extra) > 5)
        return f"{len(some)}, of them only there: {shown or 'none'}"

    raise CheckpointError(f"checkpoint {checkpoint} was trained for other classes: "
                          f"it has {only(ours, theirs)}; {json_path} has {only(theirs, ours)}")
