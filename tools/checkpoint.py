"""What a checkpoint is, ours or a released one.

    python -m tools.checkpoint CKPT                 prints what the file contains
    python -m tools.checkpoint CKPT --convert OUT   writes it in our format, without what only a resume needs
"""
import argparse
import os
from pathlib import Path

from formats.checkpoint import FORMAT, RESUME_ONLY, CheckpointError, load, save
from formats.files import CommandLine, one_line_errors, printable
from formats.released import summary
from model import PIXEL_STD, rescores, restore, test_size
from tools.command_line import output_file


def describe(path: str | Path, state: dict) -> str:
    """One line for each fact about a checkpoint. Raises CheckpointError if its weights do not fit its network."""
    spec, released = state["model"], "dropped" in state
    origin = "BoxTeacher, as its authors released it" if state["teacher"] else "AdelaiDet"
    reports = "sqrt(detection score x mask quality)" if rescores(state["method"]) else "the detection score"
    backbone = spec["backbone"] + ", stride in the first 1x1 convolution" * bool(spec.get("stride_in_1x1"))
    if released:
        backbone += ", made for BGR pixels less their mean: the first convolution now reads ours"
    present = [part for part in ("teacher", "student") if state[part] is not None]
    parameters = [sum(p.numel() for p in restore(path, state, part).parameters()) for part in present][0]
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
    return "\n".join(f"{name:11}{fact if name == 'dropped' else printable(fact)}" for name, fact in facts.items())


def convert(state: dict, path: str) -> None:
    output_file(path)
    save({key: value for key, value in state.items() if key not in ("dropped", *RESUME_ONLY)}, path)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(description="Print what a checkpoint is; convert a released one.")
    parser.add_argument("ckpt", metavar="CKPT", help="a checkpoint of this project, BoxTeacher or AdelaiDet")
    parser.add_argument("--convert", metavar="OUT", help="write it there in this project's format, without the "
                        "optimiser's state; OUT must not exist yet")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with one_line_errors():
        if args.convert and os.path.exists(args.convert):
            raise CheckpointError(f"{args.convert} exists already: choose another name")
        state = load(args.ckpt, PIXEL_STD)
        print(describe(args.ckpt, state))
        if args.convert:
            convert(state, args.convert)
            print(f"written    {args.convert}")


if __name__ == "__main__":
    main()
