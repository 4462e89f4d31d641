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

Loading looks at every part: a file that is damaged, that holds other types or that declares a network larger than its
weights is refused, as are weights that are not finite. It runs no code from the file. The checkpoints that BoxTeacher's
authors and AdelaiDet released load as if they were ours (released.py).
"""
import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from formats.files import UserError, replacing, sync, warn
from formats.pickled import is_intact, read
from formats.released import check_finite, read_checkpoint

FORMAT = "boxteacher-1"
PLAIN = (bool, int, float, str, None)
FORMS = {"model": {str: (str, int, bool), "backbone": str, "num_classes": int, "channels": int, "frozen": bool},
         "classes": ([{"id": int, "name": str}], None), "method": str, "config": {str: (*PLAIN, [PLAIN])},
         "iteration": (int, None), "student": {str: Tensor}, "teacher": ({str: Tensor}, None)}
FORMS_OF_A_RUN = {"optimizer": {"state": {int: {str: (Tensor, int, float, None)}},
                                "param_groups": [{str: (*PLAIN, list, tuple)}]},
                  "scaler": {str: (int, float)}, "iteration": int}
RESUME_ONLY = ("optimizer", "scaler")
METHODS = ("boxteacher", "boxinst", "condinst")


class CheckpointError(UserError):
    """A file cannot be used as a checkpoint."""


def save(state: dict, path: str | Path, previous: str | Path | None = None, own: bool = False) -> None:
    """Write `state` to `path`; the checkpoint that was there is kept as `previous`, unless it cannot be read.

    own: this process has written the one that was there, so that it can be read if its checksums are right. The data is
    on the disk before the name changes, and each name changes in one step: whenever the process is killed, `path` or
    `previous` is a whole checkpoint. Raises CheckpointError if it cannot be written, or if it holds numbers that are
    not finite, which nobody could load; both stay as they were.
    """
    try:
        check_numbers(state)
        with replacing(path) as temporary:
            with open(temporary, "wb") as file:
                torch.save({"format": FORMAT, **state}, file)
                sync(file)
            if previous is not None and (is_intact(path) if own else is_whole_run(path)):
                os.replace(path, previous)
        sync_folder(Path(path).parent)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: how torch.save reports an OSError
        cause = error.__context__ if isinstance(error, RuntimeError) and error.__context__ else error
        raise CheckpointError(f"cannot write {path}, which stays as it was: {first_line(cause)}") from None


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where its file system can."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


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
    own = isinstance(state, dict) and state.get("format") == FORMAT
    if own:
        check_forms(path, state, FORMS)
    elif pixel_std is None:
        raise CheckpointError(f"{path} is no checkpoint of this project")
    try:
        state = state if own else read_checkpoint(state, pixel_std)
        check_network(state)
    except Exception as error:  # the file may be anything
        raise CheckpointError(f"{path} cannot be used: {first_line(error)}") from None
    return state


def load_run(path: str | Path) -> dict:
    """Read a checkpoint with all that a run needs to go on. Raises CheckpointError."""
    state = load(path)
    if "optimizer" not in state:
        raise CheckpointError(f"{path} holds weights alone, no run to go on with (they go to --init)")
    check_forms(path, state, FORMS_OF_A_RUN)
    chosen = state["config"].get("chosen_from")  # see recipe.py
    if chosen and not (fits(chosen, [(int, float, str)]) and len(chosen) == 4 and type(chosen[3]) is str
                       and all(type(number) is not str and number > 0 for number in chosen[:3])):
        raise CheckpointError(f"{path} has the format of this project, but its 'config' is damaged")
    try:
        check_numbers(state)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None
    return state


def is_whole_run(path: str | Path) -> bool:
    try:
        return bool(load_run(path))
    except CheckpointError:
        return False


@contextlib.contextmanager
def fitting(what: str) -> Iterator[None]:
    """Whatever goes wrong in the block, for a file may be of another version, is a CheckpointError that begins with
    `what`."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {first_line(error)}") from None


def check_forms(path: str | Path, state: dict, forms: dict) -> None:
    """Raises CheckpointError for an entry that is missing, or of another form."""
    for key, form in forms.items():
        if key not in state or not fits(state[key], form):
            raise CheckpointError(f"{path} has the format of this project, but its {key!r} is missing or damaged")


def fits(value, form) -> bool:
    """Whether a value has a form: a type, None, one of several forms (a tuple), a list of values of one form, or a
    dictionary: a name must be in it, with a value of that form; a type is that of all its keys, with that of their
    values."""
    if isinstance(form, tuple):
        return any(fits(value, one) for one in form)
    if isinstance(form, list):
        return type(value) is list and all(fits(one, form[0]) for one in value)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(
            name in value and fits(value[name], one) if isinstance(name, str) else
            all(type(key) is name and fits(item, one) for key, item in value.items()) for name, one in form.items())
    return value is None if form is None else type(value) is form


def check_network(state: dict) -> None:
    """Raises ValueError for weights that are not finite, a method or an iteration that no run has, and sizes that a
    network of so few weights cannot have: memory for it is taken before they are compared."""
    if state["method"] not in METHODS:
        raise ValueError(f"its method is {state['method']!r:.40}")
    if not 0 <= (state["iteration"] or 0) < 2**40:
        raise ValueError(f"its iteration is {state['iteration']!r:.40}")
    model, classes = state["model"], state["classes"]
    sizes = [model["num_classes"], model["channels"], model.get("mask_channels", 16)]
    held = sum(weight.numel() for weight in state["student"].values())
    # so many are in a convolution of the FPN and in that of the classes
    if min(sizes) < 1 or sizes[1] * (9 * sizes[1] + sizes[0]) > held or sizes[2] > max(16, held):
        raise ValueError(f"its {held} weights are too few for {sizes[1]} channels, {sizes[0]} classes and {sizes[2]} "
                         "channels of masks")
    if classes is not None and len(classes) != sizes[0]:
        raise ValueError(f"it names {len(classes)} of {sizes[0]} classes")
    for key in ("test_min_size", "test_max_size"):
        size = state["config"].get(key)
        if size is not None and (type(size) is not int or not 0 < size < 2**15):
            raise ValueError(f"its {key} is {size!r:.40}")
    check_weights(state)


def check_weights(state: dict) -> None:
    """Raises ValueError."""
    for part in ("student", "teacher"):
        check_finite(state[part] or {})


def check_numbers(state: dict) -> None:
    """Raises ValueError for a number that is not finite: of the weights, the optimiser or the scaler."""
    check_weights(state)
    for key in RESUME_ONLY:
        for name, value in entries(state.get(key)):
            if isinstance(value, Tensor):
                check_finite({f"the {key}'s {name}": value})
            elif isinstance(value, (int, float)) and not abs(value) < 1e39:
                raise ValueError(f"the {key}'s {name} is {value!r:.40}")


def entries(content, name: str = "") -> Iterator[tuple[str, object]]:
    """(name, value) of all that dictionaries, lists and tuples contain, at any depth: ("state.0.step", 7)."""
    if isinstance(content, (dict, list, tuple)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from entries(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, content


def first_line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0][:240]


def load_latest(folder: str | Path) -> dict | None:
    """The state to go on from: last.pt, else previous.pt, else None if neither exists.

    Raises CheckpointError if there are such files but none can be read.
    """
    found = [path for path in (Path(folder) / "last.pt", Path(folder) / "previous.pt") if path.exists()]
    for path in found:
        try:
            return load_run(path)
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
