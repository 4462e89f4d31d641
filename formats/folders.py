"""What voc.py and yolo.py share on the way from a labelled folder to COCO annotation files.

They add DIR/annotations/instances_{train,val}2017.json and touch nothing else: the images stay in place, and their
file names are paths within DIR (coco.image_folder). How files are laid out is read off the folder: a label belongs to
an image by its name, and the parts of the data set are told by lists, or by folders with the names of PARTS. Without
either all images are training data, and there is no val file. All labels are read before anything is written, so a
mistake in one of them leaves DIR as it was. All names are paths within DIR, with "/".
"""
import errno
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from formats.coco import MADE_BY, STORED, DataError, UndecodableImage, first_five, is_ours, write_files
from formats.files import check_ordinary, counted, printable, warn
from formats.pictures import Header, files_in, is_image, read_header

PARTS = {"train": ("train", "train2017", "training"), "val": ("val", "val2017", "valid", "validation", "validate"),
         "test": ("test", "test2017", "testing")}    # names of folders and lists; the images of a test are left out


class Labelled(NamedTuple):
    """An image with its boxes."""
    file_name: str            # path within DIR
    size: tuple[int, int]     # (height, width)
    boxes: list[dict]         # "class": name or number, "bbox": xywh, and further keys of the COCO annotation


class Faults(DataError):
    """What is wrong with the labels of an image: (kind, place) of each fault; a kind is what several may share."""

    def __init__(self, *faults: tuple[str, str]):
        self.faults = faults
        super().__init__(by_kind(faults))


def by_kind(faults: Iterable[tuple[str, str]]) -> str:
    """One line: how many faults of each kind, and the places of the first five."""
    places = {}
    for kind, place in faults:
        places.setdefault(kind, []).append(place)
    return "; ".join(f"{kind} ({len(found)}): {first_five(found)}" for kind, found in places.items())


class Report:
    """Collects what a conversion meets: faults, which refuse it, and what was seen and is not used."""

    def __init__(self, root: Path, skip: bool):
        self.root, self.skip, self.bad, self.faults = root, skip, set(), []
        self.said, self.facts = [], []               # warnings, and what else is good to know

    def say(self, noun: str, what: str, names: Iterable[str]) -> None:
        """One line about files, or whatever the noun is; none if there are no names."""
        names = list(names)
        if names:
            self.said.append(f"{counted(len(names), noun)} {what} ({first_five(list(map(repr, names)))})")

    def read_all(self, names: Iterable[str], read: Callable) -> dict:
        """{name: read(name)} of all names but those that raise Faults, which are kept."""
        found = {}
        for name in tqdm(sorted(set(names)), "reading", unit="file", disable=None):
            try:
                found[name] = read(name)
            except Faults as error:
                self.bad.add(name)
                self.faults += error.faults
        return found

    def refuse(self) -> None:
        """Raises DataError with all faults, or says them if they are to be skipped."""
        if not self.bad:
            return
        line = f"{counted(len(self.bad), 'image')} cannot be converted"
        if not self.skip:
            raise DataError(f"{self.root}: {line}, nothing was written (--skip leaves them out): "
                            f"{by_kind(self.faults)}")
        self.said.append(f"{line}, left out: {by_kind(self.faults)}")


# --------------------------------------------------------------------------------------- what is in the folder

def names_in(root: Path) -> list[str]:
    """All files of a folder but the annotation files of an earlier conversion. Raises DataError."""
    if not root.is_dir():
        raise DataError(f"folder {root} is missing")
    ours = [target(root, split) for split in ("train", "val")]
    for path in ours:
        if path.exists() and not is_ours(path):
            raise DataError(f"{path} exists and was not made by data.py voc or yolo; move it away")
    return [path.relative_to(root).as_posix() for path in files_in(root) if path not in ours]


def target(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}2017.json"


def images_among(names: list[str]) -> list[str]:
    return [name for name in names if is_image(name)]


def inventory(names: list[str]) -> str:
    """The end of an error: what a folder contains, the most frequent kinds of file first, and what may suit them."""
    kinds = Counter((Path(name).suffix.lower() or "other", str(PurePosixPath(name).parent)) for name in names)
    found = ", ".join(f"{count} {suffix} in {folder}" for (suffix, folder), count in kinds.most_common(8)) or "nothing"
    suffixes = {suffix for suffix, _ in kinds}
    hints = {".xml": "python data.py voc DIR", ".txt": "python data.py yolo DIR",
             ".json": "python train.py --train-json FILE --train-images DIR for a COCO file"}
    return f"; found: {found}" + "".join(f"; {suffix}: {hint}" for suffix, hint in hints.items() if suffix in suffixes)


def stem_of(name: str) -> str:
    return PurePosixPath(name).stem


def folder_of(name: str) -> tuple[str, ...]:
    return PurePosixPath(name).parts[:-1]


# ------------------------------------------------------------------------------------------ parts of a data set

def parts_by_folder(folders: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """The names of each part, told by the `folders` that lead to them; all are training data if none says."""
    parts = {}
    for name, leading in folders.items():
        part = next((part for folder in leading for part, known in PARTS.items() if folder.lower() in known), "")
        parts.setdefault(part, []).append(name)
    if "train" in parts or "val" in parts:
        return {part: parts[part] for part in ("train", "val") if part in parts}
    return {"train": parts.get("", [])}


class Tails:
    """Finds names by what a list from another computer says of them, with or without folders and suffix."""

    def __init__(self, names: Iterable[str]):
        self.names = {}
        for name in names:
            parts = bare(name).split("/")
            for start in range(len(parts)):
                self.names.setdefault("/".join(parts[start:]), []).append(name)

    def find(self, text: str) -> list[str]:
        """The names that agree with the text in as many folders as possible: in one at least, where both have some."""
        parts, found = path_parts(bare(text)), []
        for start in range(len(parts)):
            found = self.names.get("/".join(parts[start:]), [])
            if 0 < start == len(parts) - 1:
                found = [name for name in found if "/" not in name]
            if found:
                break
        exact = [name for name in found if PurePosixPath(name).name == path_parts(text)[-1]]
        return exact or found


def bare(name: str) -> str:
    return str(PurePosixPath(name).with_suffix("")) if name.endswith(".xml") or is_image(name) else name


def path_parts(text: str) -> list[str]:
    """A path of any system without what leads out of the folder."""
    return [part for part in re.split(r"[/\\]+", text) if part not in ("", ".", "..")]


def within(root: Path, text: str) -> Path | None:
    """The longest end of a path, maybe of another computer, that exists in root; None if none does.

    The last name of a folder says too little (valid/images is not images), unless that of root stands before it."""
    parts = path_parts(text)
    for start in range(max(1, len(parts))):
        path = root.joinpath(*parts[start:])
        alone = 0 < start == len(parts) - 1 and parts[start - 1] != root.resolve().name
        if path.is_file() or path.is_dir() and not alone:
            return path
    return None


def listed(root: Path, path: str, tails: Tails) -> list[str]:
    """The names on the lines of a list. Raises DataError with the first five lines that name none, or several."""
    found, wrong = {}, []
    for number, line in enumerate(read_text(root / path).split("\n"), 1):
        if line.strip():
            names = tails.find(line.strip())
            found |= dict.fromkeys(names[:1])
            if len(names) != 1:
                wrong.append((f"lines that name {'several files' if names else 'no file'} of {root}",
                              f"line {number}, {line.strip()!r:.80}"))
    if wrong:
        raise DataError(f"{root / path}: {by_kind(wrong)}")
    return list(found)


def checked_splits(splits: dict[str, list[str]], names: Iterable[str], report: Report) -> dict[str, list[str]]:
    """The splits, each name once, without an empty val. Says which `names` are in none of them, and which in both.

    Raises DataError if there is no training image."""
    splits = {split: list(dict.fromkeys(part)) for split, part in splits.items()}
    train, val = set(splits.get("train", ())), set(splits.get("val", ()))
    rest = sorted({*names} - train - val)
    understood = "folders that are understood: " + "; ".join(
        f"{part}: {', '.join(known)}" for part, known in PARTS.items())
    if not train:
        where = sorted({"/".join(folder_of(name)) or "." for name in {*rest} | val})
        raise DataError(f"{report.root}: no images to train on; {counted(len(val), 'image')} to evaluate on, "
                        f"{len(rest)} in neither part; images are in {first_five(where) or 'no folder'}; {understood}")
    if "val" in splits and not val:
        report.said.append("no images to evaluate on")
    report.say("image", f"in neither train nor val, left out; {understood}", rest)
    report.say("image", "both in train and in val", sorted(train & val))
    return {split: part for split, part in splits.items() if part}


# ------------------------------------------------------------------------------------------------- reading

def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file of `limit` bytes at most, more than a real one of its kind has. Raises OSError."""
    check_ordinary(path)
    if path.stat().st_size > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit >> 20} MiB", str(path))
    return path.read_bytes()


def read_text(path: Path, limit: int = 2**28) -> str:
    """Raises DataError."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from None


def header_in(root: Path, image: str) -> Header:
    """Raises Faults."""
    try:
        return read_header(root / image)
    except UndecodableImage as error:
        raise Faults(("images that cannot be decoded", str(error).removeprefix(f"{root}/"))) from None


def as_number(text: str) -> int | float:
    """An int if the value is whole. Raises ValueError, also for nan, inf and 1_0, which float() accepts."""
    value = float(text.replace("_", "?"))
    if not abs(value) < 1e9:
        raise ValueError(text)
    return int(value) if value == int(value) else value


# ------------------------------------------------------------------------------------------------- writing

def write_splits(layout: str, splits: dict[str, list[Labelled]], classes: dict[str | int, dict],
                 exif: str, report: Report) -> None:
    """Write the annotation files; `classes` maps the "class" of a box to its COCO category. At last the report is
    printed, where a person reads it.

    Replaces the files of an earlier conversion. Without a val split it removes the old val file, which training would
    still evaluate on. Raises DataError."""
    root = report.root
    flat = [image.file_name for part in splits.values() for image in part for box in image.boxes
            if min(box["bbox"][2:]) <= 0]
    report.say("box", "without area, which training drops", flat)
    if not any(image.boxes for image in splits["train"]):
        raise DataError(f"{root}: no training image has a box; nothing was written" + "".join(
            f"; {line}" for line in report.said))
    info = {"description": MADE_BY + layout} | ({"exif": STORED} if exif == STORED else {})
    contents = {str(target(root, split)): {"info": info, "licenses": [], "categories": list(classes.values()),
                                           **images_and_annotations(images, classes)}
                for split, images in splits.items()}
    write_files(contents)
    for path, content in contents.items():
        print(printable(f"{path}: {counted(len(content['images']), 'image')}, "
                        f"{counted(len(content['annotations']), 'box')}, {counted(len(classes), 'class')}"))
    stale = target(root, "val")
    if "val" not in splits and stale.exists():
        try:
            stale.unlink()
        except OSError as error:
            raise DataError(f"cannot remove {stale} of an earlier conversion: {error.strerror}") from None
        print(printable(f"{stale}: removed, an earlier conversion wrote it"))
    for line in report.facts:
        print(printable(f"{root}: {line}"))
    for line in report.said:
        warn(f"{root}: {line}")


def images_and_annotations(labelled: list[Labelled], classes: dict[str | int, dict]) -> dict[str, list[dict]]:
    """The two lists of a COCO file. Ids count from 1."""
    images, annotations = [], []
    for number, (file_name, (height, width), boxes) in enumerate(labelled, 1):
        images.append({"id": number, "file_name": file_name, "width": width, "height": height})
        for box in boxes:
            row = {"id": len(annotations) + 1, "image_id": number, "category_id": classes[box["class"]]["id"],
                   "area": round(box["bbox"][2] * box["bbox"][3], 3), "iscrowd": 0}
            annotations.append(row | {key: value for key, value in box.items() if key != "class"})
    return {"images": images, "annotations": annotations}
