"""What voc.py and yolo.py share on the way from a labelled folder to COCO annotation files.

They add DIR/annotations/instances_{train,val}2017.json and touch nothing else: the images stay in place, and their
file names are paths within DIR (coco.image_folder). How files are laid out is read off the folder: a label belongs to
an image by its name, and the parts of the data set are told by lists, or by folders with the names of PARTS. Without
either all images are training data, and there is no val file. All labels are read before anything is written, so a
mistake in one of them leaves DIR as it was. All names are paths within DIR, with "/".
"""
import errno
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from formats.coco import MADE_BY, STORED, DataError, UndecodableImage, first_five, is_ours, write_files
from formats.files import check_ordinary, counted, printable, warn
from formats.pictures import Header, files_in, is_image, read_header

# Names of folders and lists of the parts, and words that may be beside them, as in train_images; a test is left out.
PARTS = {"train": ("train", "train2017", "training"), "val": ("val", "val2017", "valid", "validation", "validate"),
         "test": ("test", "test2017", "testing")}
BESIDE = {"images", "image", "imgs", "img", "labels", "label", "annotations", "set", "data", "split", "autosplit"}
RESULTS = (("masks.json", "review.html"), ("predictions.json",), ("metrics.jsonl", "config.json"))   # of our programs


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

    def __init__(self, root: Path, skip: bool, noun: str):
        self.root, self.skip, self.noun, self.bad, self.faults = root, skip, noun, set(), []
        self.said, self.facts = [], []               # warnings, and what else is good to know

    def say(self, noun: str, what: str, names: Iterable[str]) -> None:
        """One line about files, or whatever the noun is; none if there are no names."""
        names = list(names)
        if names:
            self.said.append(f"{counted(len(names), noun)} {what} ({first_five(list(map(repr, names)))})")

    def fault(self, names: Iterable[str], *faults: tuple[str, str]) -> None:
        """Keep faults, (kind, place) each, of the files of these names."""
        self.bad.update(names)
        self.faults += faults

    def read_all(self, names: Iterable[str], read: Callable) -> dict:
        """{name: read(name)} of all names but those that raise Faults, which are kept."""
        found = {}
        for name in tqdm(sorted(set(names)), "reading", unit=self.noun, disable=None):
            try:
                found[name] = read(name)
            except Faults as error:
                self.fault([name], *error.faults)
        return found

    def refuse(self) -> None:
        """Raises DataError with all faults, or says them if they are to be skipped."""
        if not self.bad:
            return
        line = f"{counted(len(self.bad), self.noun)} cannot be converted"
        if not self.skip:
            raise DataError(f"{self.root}: {line}, nothing was written (--skip leaves them out): "
                            f"{by_kind(self.faults)}")
        self.said.append(f"{line}, left out: {by_kind(self.faults)}")


# --------------------------------------------------------------------------------------- what is in the folder

def names_in(report: Report) -> list[str]:
    """All files of a folder but what our programs wrote: earlier annotation files, and folders of results, which hold
    drawings. Raises DataError."""
    root = report.root
    if not root.is_dir():
        raise DataError(f"folder {root} is missing")
    ours = [json_path(root, split) for split in ("train", "val")]
    for path in ours:
        if path.exists() and not is_ours(path):
            raise DataError(f"{path} exists and was not made by data.py voc or yolo; move it away")
    names = [path.relative_to(root).as_posix() for path in files_in(root) if path not in ours]
    known = {*names}
    results = {folder for folder in {folder_of(name) for name in names} if folder and any(
        known >= {"/".join((*folder, file)) for file in files} for files in RESULTS)}
    report.say("folder", "of results of predict.py or train.py, not read", map("/".join, sorted(results)))
    return [name for name in names if not any(folder_of(name)[:len(folder)] == folder for folder in results)]


def json_path(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}2017.json"


def images_among(names: list[str]) -> list[str]:
    return [name for name in names if is_image(name)]


def inventory(names: list[str], layout: str) -> str:
    """The end of an error: what a folder contains, the most frequent kinds of file first, and what may suit them,
    which is not this layout."""
    kinds = Counter((Path(name).suffix.lower() or "other", str(PurePosixPath(name).parent)) for name in names)
    found = ", ".join(f"{count} {suffix} in {folder}" for (suffix, folder), count in kinds.most_common(8)) or "nothing"
    suffixes = {suffix for suffix, _ in kinds}
    hints = {".xml": "python data.py voc DIR", ".txt": "python data.py yolo DIR",
             ".json": "if it is COCO's, python train.py --train-json FILE --train-images DIR"}
    return f"; found: {found}" + "".join(f"; {suffix}: {hint}" for suffix, hint in hints.items()
                                         if suffix in suffixes and layout not in hint)


def stem_of(name: str) -> str:
    return PurePosixPath(name).stem


def folded(text: str) -> str:
    """The text without differences of case, and of how letters with accents are composed."""
    return unicodedata.normalize("NFC", text).casefold()


def folder_of(name: str) -> tuple[str, ...]:
    return PurePosixPath(name).parts[:-1]


# ------------------------------------------------------------------------------------------ parts of a data set

def parts_by_folder(folders: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """The names of each part, told by the `folders` that lead to them; all are training data if none says."""
    parts = {}
    for name, leading in folders.items():
        parts.setdefault(part_of(leading), []).append(name)
    if "train" in parts or "val" in parts:
        return {part: parts[part] for part in ("train", "val") if part in parts}
    return {"train": parts.get("", [])}


def part_of(folders: tuple[str, ...]) -> str:
    """The part of the first folder that has the name of one, alone or beside words that say nothing, else ""."""
    for words in (set(re.split(r"[ _-]+", folder.lower())) for folder in folders):
        for part, known in PARTS.items():
            if words & {*known} and words <= {*known, *BESIDE}:
                return part
    return ""


class Tails:
    """Finds names by what a list from another computer says of them, with or without folders and suffix."""

    def __init__(self, names: Iterable[str]):
        self.names = {}
        for name in names:
            parts = folded(bare(name)).split("/")
            for start in range(len(parts)):
                self.names.setdefault("/".join(parts[start:]), []).append(name)

    def find(self, text: str) -> list[str]:
        """The names that agree with the text in as many folders as possible: in one at least, where both have some."""
        parts, found = path_parts(bare(text)), []
        for start in range(len(parts)):
            found = self.names.get(folded("/".join(parts[start:])), [])
            if 0 < start == len(parts) - 1:
                found = [name for name in found if "/" not in name]
            if found:
                break
        exact = [name for name in found if PurePosixPath(name).name == path_parts(text)[-1]]
        return exact or found


def bare(name: str) -> str:
    """The name without .xml and the suffix of an image: a/photo of a/photo.jpg.xml."""
    name = name.removesuffix(".xml")
    return str(PurePosixPath(name).with_suffix("")) if is_image(name) else name


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


def checked_splits(splits: dict[str, list[str]], names: Iterable[str], listed: bool,
                   report: Report) -> dict[str, list[str]]:
    """The splits, each name once. Says which `names` are in none of them, and which in both. listed: lists divide them.

    Raises DataError if there is no training image."""
    splits = {split: list(dict.fromkeys(part)) for split, part in splits.items()}
    train, val = set(splits.get("train", ())), set(splits.get("val", ()))
    rest = sorted({*names} - train - val)
    tests = [name for name in rest if not listed and part_of(folder_of(name)) == "test"]
    understood = "no list has them" if listed else "folders that are understood: " + "; ".join(
        f"{part}: {', '.join(known)}" for part, known in PARTS.items())
    if not train:
        where = sorted({"/".join(folder_of(name)) or "." for name in {*rest} | val})
        raise DataError(f"{report.root}: nothing to train on; {counted(len(val), report.noun)} to evaluate on, "
                        f"{len(rest)} in neither part; they are in {first_five(where) or 'no folder'}; {understood}")
    report.say(report.noun, "of the test part, left out", tests)
    report.say(report.noun, f"in neither train nor val, left out; {understood}", sorted({*rest} - {*tests}))
    report.say(report.noun, "both in train and in val", sorted(train & val))
    if "val" not in splits:
        report.facts.append("no part to evaluate on, everything is training data; it would be a list, or folders, "
                            f"named {', '.join(PARTS['val'])}")
    return splits


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
        data = read_bytes(path, limit)
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from None


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
    if splits.get("val") == []:
        report.said.append("no images to evaluate on")
    splits = {split: images for split, images in splits.items() if images or split == "train"}
    flat = [image.file_name for part in splits.values() for image in part for box in image.boxes
            if min(box["bbox"][2:]) <= 0]
    report.say("box", "without area, which training drops", flat)
    if not any(image.boxes for image in splits["train"]):
        raise DataError(f"{root}: no training image has a box; nothing was written" + "".join(
            f"; {line}" for line in report.said))
    info = {"description": MADE_BY + layout} | ({"exif": STORED} if exif == STORED else {})
    contents = {str(json_path(root, split)): {"info": info, "licenses": [], "categories": list(classes.values()),
                                           **images_and_annotations(images, classes)}
                for split, images in splits.items()}
    write_files(contents)
    for path, content in contents.items():
        print(printable(f"{path}: {counted(len(content['images']), 'image')}, "
                        f"{counted(len(content['annotations']), 'box')}, {counted(len(classes), 'class')}"))
    stale = json_path(root, "val")
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
