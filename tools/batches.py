"""What a run trains and is evaluated on: the splits of a data set, checked; batches, loaded whatever happens meanwhile.

    open_data          both splits
    training_batches   the batches of the first; loaded_batches loads them
"""
import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from data import COMPILED_STRIDE, STRIDE, Batch, TrainBatches, canvas_of
from formats.coco import (NAMES, CocoBoxes, DataError, category_problems, datasets, first_five, other_files,
                          raise_first)
from formats.files import UserError
from formats.pictures import check_sizes, undecodable_limit
from tools.processes import ignore_signals, loaded

PATIENCE = 20  # seconds that the folder of the images may be away; less than the 30 of torchrun before it kills


def open_data(args: argparse.Namespace, rank: int) -> tuple[CocoBoxes, CocoBoxes | None]:
    """Both splits, checked. The second is None if the options, or the folder, have training files alone."""
    train_files, val_files = datasets(args.data, args.train_json, args.train_images, args.val_json, args.val_images)
    annotations = CocoBoxes(*train_files, masks=args.method == "condinst" or args.measure_labels, exif=args.exif,
                            max_pixels=args.max_pixels)
    validate = bool(args.val_json or not args.train_json)
    if validate and not args.val_json and args.data not in NAMES and not os.path.exists(val_files[0]):
        validate = False
        if rank == 0:
            others = other_files(train_files[0], val_files[0])
            print(f"no evaluation: there is no {val_files[0]}" + (
                f"; not used: {first_five(others)} (--val-json, --val-images)" if others else ""))
    validation = CocoBoxes(*val_files, evaluated=True, exif=args.exif, max_pixels=args.max_pixels) if validate else None
    for split in (annotations, validation):
        if rank == 0 and split is not None:
            check_sizes(split)
    if validation is not None:
        raise_first(category_problems(train_files[0], annotations.classes, val_files[0], validation.classes))
    return annotations, validation


def training_batches(args: argparse.Namespace, annotations: CocoBoxes, rank: int, world_size: int) -> TrainBatches:
    """Raises UserError."""
    teacher_size = (args.teacher_min_size, args.teacher_max_size) if args.method == "boxteacher" else None
    batches = TrainBatches(annotations, batch_size=args.batch_size // args.accumulate, min_sizes=args.min_size,
                           max_size=args.max_size, teacher_size=teacher_size, augment=args.augment, seed=args.seed,
                           rank=rank, world_size=world_size, stride=COMPILED_STRIDE if args.compile else STRIDE)
    sizes = [(size, args.max_size) for size in args.min_size] + [teacher_size] * (teacher_size is not None)
    if args.backbone_weights == "none" and batches.batch_size == 1 and any(
            canvas_of([batches.resized_size(i, *size)], batches.stride) == (STRIDE, STRIDE)
            for size in sizes if min(size) <= STRIDE for i in range(len(annotations))):
        raise UserError(f"an image of {STRIDE} pixels alone in its batch is a single value for the last batch norm, "
                        f"which learns from more: --batch-size {2 * args.accumulate}, or larger sizes")
    return batches


def loaded_batches(batches: TrainBatches, start: int, stop: int, workers: int, device: torch.device) -> Iterator[Batch]:
    """Items start to stop, see `loaded` and Patient."""
    images = Patient(batches)

    def loader_from(i: int) -> DataLoader:
        return DataLoader(images, batch_size=None, sampler=range(i, stop), num_workers=workers,
                          collate_fn=TrainBatches.collate, worker_init_fn=ignore_signals,
                          pin_memory=device.type == "cuda")

    return loaded(loader_from, start, stop)


def check_skipped(batches: list[Batch], broken: set[str], images: int) -> None:
    """Name each undecodable image once. Raises DataError beyond `undecodable_limit`."""
    for note in {note for batch in batches for note in batch.skipped} - broken:
        print(f"warning: {note}; another image takes its place", file=sys.stderr, flush=True)
        broken.add(note)
    if len(broken) > undecodable_limit(images):
        raise DataError(f"{len(broken)} images cannot be decoded, the last: {note}")


class Patient(Dataset):
    """TrainBatches that waits up to PATIENCE seconds for a folder of images that is away, as one on a network may be,
    instead of taking its images for broken ones. Raises UserError after that time.

    A sub-folder that this process has never seen is not away: the images that a file names there are broken.
    """

    def __init__(self, batches: Dataset):
        self.batches, self.broken, self.seen = batches, set(), {str(batches.annotations.image_dir)}

    def __getitem__(self, k: int):
        until = time.monotonic() + PATIENCE
        folders = self.batches.folders(k)
        self.seen.update(filter(os.path.isdir, folders))
        with contextlib.suppress(UserError):
            batch = self.batches[k]
            if self.broken.issuperset(batch.skipped):
                return batch
        while gone := [folder for folder in folders & self.seen if not listed(folder)]:
            if time.monotonic() > until:
                raise UserError(f"the images in {gone[0]} have been away for {PATIENCE} seconds")
            time.sleep(1)
        batch = self.batches[k]  # once more: the folder may have come back meanwhile
        self.broken.update(batch.skipped)
        return batch


def listed(folder: str) -> bool:
    """Whether the folder can be read and has anything in it: the place of a lost mount is empty."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False
