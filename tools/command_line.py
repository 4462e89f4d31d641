"""What the command lines share: argument types, device, precision, output files and tables."""
import argparse
import json
import math
import os
import shlex
from collections.abc import Callable, Sequence

import torch

from formats.coco import MAX_PIXELS, CocoBoxes
from formats.files import UserError, beside, positive, printable, replacing
from formats.pictures import image_options
from model import rescores, test_size

# ------------------------------------------------------------------------------------------------ argument types


def not_negative(text: str) -> int:
    """An integer of at least 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return int(text)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    if not 0 < float(text) < math.inf:  # written so that NaN fails, here and below
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return float(text)


def not_negative_float(text: str) -> float:
    """A finite number of at least 0."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return float(text)


def probability(text: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def pick_device(name: str) -> torch.device:
    """--device: a device of this machine; auto is CUDA if there is any, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(f"this machine has no device {name!r}") from None
    return device


# options that several programs have: add("--device", **DEVICE)
DEVICE = dict(type=pick_device, default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1")
AMP = dict(choices=["auto", "off", "bf16", "fp16"], default="auto",
           help="mixed precision; auto: bf16 or else fp16 on CUDA, off on CPU")
RESCORE = dict(choices=["auto", "on", "off"], default="auto",
               help="report sqrt(detection score x mask probability); auto: on if the method is boxteacher")


def model_options(add: Callable) -> None:
    """Options of the programs that run a checkpoint on images; see `input_size` for two of them."""
    add("--weights", choices=["teacher", "student"], help="None: the teacher's if there are any")
    add("--min-size", type=positive, metavar="PIXELS",
        help="shorter side of the input; None: the checkpoint's test size, or 800")
    add("--max-size", type=positive, metavar="PIXELS",
        help="longest side of the input; None: the checkpoint's test size, or 1333")
    add("--device", **DEVICE)
    add("--workers", type=not_negative, default=2, help="loading processes of one process")
    image_options(add)


def image_words(args: argparse.Namespace) -> list[str]:
    """The options of `image_options` that differ from their defaults, for a command to run next."""
    words = ["--exif", args.exif] if args.exif else []
    return words + (["--max-pixels", str(args.max_pixels)] if args.max_pixels != MAX_PIXELS else [])


def input_size(args: argparse.Namespace, info: dict) -> tuple[int, int]:
    """Shorter and longest side of the input, pixels: --min-size and --max-size, or the checkpoint's own."""
    min_size, max_size = test_size(info)
    return args.min_size or min_size, args.max_size or max_size


def rescored(option: str, method: str) -> bool:
    """--rescore: whether scores are reported rescored. auto: as the checkpoint's method does."""
    return rescores(method) if option == "auto" else option == "on"


def go_together(parser: argparse.ArgumentParser, args: argparse.Namespace, *options: str) -> None:
    """End with argparse's error where some of the options are given and others are not."""
    given = [getattr(args, option[2:].replace("-", "_")) is not None for option in options]
    if any(given) and not all(given):
        parser.error(f"{' and '.join(options)} go together")


# --------------------------------------------------------------------------------------------------- precision


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast for --amp. auto: on CUDA bfloat16, or float16 where the GPU lacks it; on the CPU none."""
    if name == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def next_command(args: argparse.Namespace, annotations: CocoBoxes, validation: CocoBoxes | None) -> str:
    """What a person runs after a training run of `args`: the evaluation, or without anything to evaluate on the
    masks of the training images."""
    program, files = "evaluate.py", ["--data", args.data]
    if validation is None:
        program, files = "predict.py", ["--boxes", str(annotations.json_path), "--images", str(annotations.image_dir),
                                        "--out", os.path.join(args.out, "masks")]
    elif args.val_json:
        files = ["--val-json", args.val_json, "--val-images", args.val_images]
    return shlex.join(["python", program, "--ckpt", os.path.join(args.out, "final.pt"), *files, *image_words(args)])


# --------------------------------------------------------------------------------------- output files and tables


def output_file(path: str | None) -> None:
    """Make the folder of a file that will be written later, and try to write there. Raises UserError."""
    if path is None:
        return
    try:
        if os.path.isdir(path):
            raise IsADirectoryError("it is a folder")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        os.remove(beside(path))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def write_json(path: str | None, content: list | dict) -> None:
    """Write a JSON file, if a path is given."""
    if path is not None:
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file)


def print_table(title: str, columns: Sequence[str], rows: dict[str, Sequence[float | None]]) -> None:
    """Print rows of figures below their columns, "-" for None."""
    rows = [(printable(name)[:60], figures) for name, figures in rows.items()]
    width = max(map(len, ["class AP", title, *(name for name, _ in rows)]))
    print(f"{title:{width}}" + "".join(f"{column:>7}" for column in columns))
    for name, figures in rows:
        print(f"{name:{width}}" + "".join(f"{'-':>7}" if x is None else f"{x:7.1f}" for x in figures))
