"""What a run starts from: its options as a checkpoint keeps them, and a checkpoint or the weights of a backbone."""
import argparse
import os
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from data import ORDER
from formats import checkpoint
from formats.checkpoint import CheckpointError
from formats.files import warn
from formats.released import read_backbone, summary
from model import PIXEL_STD, CondInst

# options that may differ between the machines of a run: their files lie elsewhere, or process 0 alone uses them
OF_A_MACHINE = ("data", "train_json", "train_images", "val_json", "val_images", "out", "init", "backbone_weights",
                "device", "fresh", "workers", "tensorboard")


def config_of(args: argparse.Namespace) -> dict:
    """All options as plain types, the size to test at, which is the teacher's, and how images are drawn."""
    plain = (int, float, str, list, type(None))
    options = {k: v if isinstance(v, plain) else str(v) for k, v in vars(args).items()}
    return options | {"test_min_size": args.teacher_min_size, "test_max_size": args.teacher_max_size, "order": ORDER}


class Start(NamedTuple):
    """At most one of the three; none of them: random weights."""
    state: dict | None = None                 # the checkpoint of the run to go on with
    init: dict | None = None                  # the checkpoint of --init
    backbone: dict[str, Tensor] | None = None
    stride_in_1x1: bool | None = None         # of the backbone's weights, see read_backbone

    def model(self) -> dict:
        """How the network of the checkpoint is made (see formats/checkpoint.py), {} without one."""
        return (self.state or self.init or {"model": {}})["model"]

    def config(self) -> dict | None:
        """The options of the run to go on with."""
        return self.state and self.state["config"]

    def conventions(self) -> dict:
        """Those that the weights were trained in, where they may differ from this project's."""
        if self.backbone is not None:
            return {"stride_in_1x1": self.stride_in_1x1}
        return {key: value for key, value in self.model().items() if key in ("mask_channels", "stride_in_1x1")}


def starting_point(args: argparse.Namespace) -> Start:
    """The checkpoint of the run to go on with, else that of --init, else nothing. Raises CheckpointError."""
    state = None if args.fresh else checkpoint.load_latest(args.out)
    return Start(state, checkpoint.load(args.init, PIXEL_STD) if state is None and args.init else None)


def initialise(model: CondInst, classes: list[dict], state: dict, path: str | Path) -> None:
    """--init: start `model` from a checkpoint's `state`, without its class layer if the classes differ.

    Any other difference is a CheckpointError that names the first parameter.
    """
    weights, spec = state["teacher"] or state["student"], state["model"]
    if state["classes"] != classes:
        weights = {name: w for name, w in weights.items() if not name.startswith("head.class_logits.")}
    try:
        checkpoint.load_weights(model, weights, may_lack=r"head\.class_logits\..+")
    except ValueError as error:
        options = (f"--backbone {spec['backbone']} --channels {spec['channels']} "
                   + ("without --backbone-weights none" if spec["frozen"] else "--backbone-weights none"))
        raise CheckpointError(f"{path} does not fit this model: it was made with {options} (the first difference: "
                              f"{error})") from None
    if state["classes"] != classes:
        warn(f"{path} " + ("does not name its classes" if state["classes"] is None else "was trained for other classes")
             + ": its class layer is left out")


def load_backbone(name: str, source: str) -> Start:
    """--backbone-weights: a backbone's weights, see read_backbone; prints what is left out.

    Whatever is wrong with a download or a file is a CheckpointError.
    """
    try:
        weights, stride_in_1x1, dropped = read_backbone(name, source, PIXEL_STD)
    except Exception as error:  # the file may be anything
        raise CheckpointError(f"--backbone-weights {source}: {checkpoint.first_line(error)}") from None
    if dropped and os.environ.get("RANK", "0") == "0":
        print(f"--backbone-weights {source}: left out {'; '.join(summary(dropped))}")
    return Start(backbone=weights, stride_in_1x1=stride_in_1x1)


def start_backbone(backbone: nn.Module, weights: dict, name: str, source: str) -> None:
    """Load what `load_backbone` read. No such file has the offsets of deformable convolutions or Swin's last norms."""
    try:
        checkpoint.load_weights(backbone, weights, may_lack=r"norms\..+|.+\.offset\.\w+")
    except ValueError as error:
        raise CheckpointError(f"--backbone-weights {source}: it does not hold the weights of {name}: {error}") from None
