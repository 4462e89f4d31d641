"""Hostile files, made at random: each must be read, or refused in one line, within a GiB of memory.

    python tests/fuzz.py 500 0 DIR      so many files, a seed, an empty folder to work in

What is not right ends in a traceback that names the file, which stays in DIR.
"""
import contextlib
import copy
import io
import json
import random
import re
import resource
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from formats.coco import CocoBoxes, ground_truth  # noqa: E402
from formats.commands import main  # noqa: E402
from formats.files import UserError  # noqa: E402
from formats.pictures import check_sizes, find_images, load_image, read_header  # noqa: E402
from model import load_model  # noqa: E402

MEMORY = 2 ** 30      # bytes beyond what Python and torch have at the start
VALUES = [None, True, -1, 0, 0.5, 2 ** 31 - 1, 2 ** 63, 10 ** 400, 1e308, float("nan"), "", "x" * 10000, "\x1b[2J\r\n",
          "7", "../x", "/dev/zero", "\ud800", [], {}, [[]], [[{}]], {"id": 1}, [1, 2, 3, 4], [0, 0, 1e9, 1e9],
          [[0, 0, 1e9, 0, 1e9, 1e9]], [[0, 0, 1e7, 0, 1e7, 1e7]], [[1, 1, 5, 1, 5]], [[1, 2, 3, 4, float("inf"), 6]],
          {"size": [20, 30], "counts": "oVoV"}, {"size": [20, 30], "counts": [600, 2 ** 40, -2 ** 40]},
          {"size": [2 ** 30, 2 ** 30], "counts": [2 ** 60]}, {"size": [20, 30], "counts": [0] * 1000 + [600]}]
PARTS = [b"\0", b"\xff" * 9, b"\x1b[2J", b"<" * 999, b"&a;" * 99, b"nan", b"1e999", b"-", b"9" * 5000, b"[" * 5000,
         b"<!DOCTYPE a [<!ENTITY a 'b'>]>", b"<a>" * 5000, b"%!PS-Adobe-3.0", b"\n- &a [*a, *a]", b"\r", b"{", b"}",
         b"'"]


def places(content) -> list[tuple]:
    """(container, key) of everything in a JSON file."""
    found, waiting = [], [content]
    while waiting:
        one = waiting.pop()
        if isinstance(one, (dict, list)):
            found += [(one, key) for key in (one if isinstance(one, dict) else range(len(one)))]
            waiting += one.values() if isinstance(one, dict) else one
    return found


def changed_json(rng: random.Random, content: dict) -> bytes:
    content = json.loads(json.dumps(content))
    for _ in range(rng.choice((1, 1, 2, 4))):
        where, key = rng.choice(places(content))
        if rng.random() < 0.15:
            where.pop(key)
        else:
            where[key] = copy.deepcopy(rng.choice(VALUES))
        if not places(content):
            break
    data = json.dumps(content).encode()
    return changed_bytes(rng, data) if rng.random() < 0.2 else data


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        place = rng.randrange(len(data) + 1)
        how = rng.randrange(4)
        if how == 0:
            del data[place:place + rng.choice((1, 4, len(data)))]
        elif how == 1 and place < len(data):
            data[place] = rng.randrange(256)
        else:
            data[place:place + how - 2] = rng.choice(PARTS)
    return bytes(data)


def coco(rng: random.Random, folder: Path) -> None:
    rows = [{"id": i, "image_id": i % 3, "category_id": 1, "bbox": [2, 3, 10, 8], "area": 80, "iscrowd": 0,
             "segmentation": rng.choice(([[2, 3, 12, 3, 12, 11]], {"size": [20, 30], "counts": [200, 100, 300]}))}
            for i in range(4)]
    content = {"images": [{"id": i, "file_name": f"{i}.png", "width": 30, "height": 20} for i in range(3)],
               "annotations": rows, "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}
    path = folder / "annotations/instances_train2017.json"
    put(path, changed_json(rng, content))
    for i in range(3):
        put_image(folder / f"train2017/{i}.png")
    for arguments in (["check", str(path), "--images", str(folder / "train2017")], ["check", str(folder)]):
        ends(lambda: main(arguments))
    for kind in ({"evaluated": True}, {"masks": True}, {"evaluated": True, "masks": True}):
        boxes = ends(lambda: CocoBoxes(str(path), str(folder / "train2017"), **kind))
        if boxes is not None and ends(lambda: check_sizes(boxes) or True):
            for i in range(len(boxes)) if "masks" in kind else ():
                for box in range(*boxes.offsets[i:i + 2]):
                    boxes.mask(i, box)
            if "evaluated" in kind:
                truth = ground_truth(str(path))
                [truth.annToMask(row) for row in truth.dataset["annotations"] if row.get("segmentation")]


def voc(rng: random.Random, folder: Path) -> None:
    put_image(folder / "a.png")
    box = "<bndbox><xmin>3</xmin><ymin>5</ymin><xmax>12</xmax><ymax>9</ymax></bndbox>"
    text = (f"<annotation><filename>a.png</filename><size><width>30</width><height>20</height></size><object><name>car"
            f"</name>{box}</object></annotation>")
    put(folder / "a.xml", changed_bytes(rng, text.encode()))
    ends(lambda: main(["voc", str(folder)]))


def yolo(rng: random.Random, folder: Path) -> None:
    put_image(folder / "images/a.png")
    files = {"labels/a.txt": b"1 0.5 0.5 0.2 0.4\n0 0.1 0.1 0.1 0.1\n", "classes.txt": b"car\nbus\n",
             "data.yaml": b"train: images\nval: [images]\nnames: {0: car, 1: bus}\n"}
    chosen = rng.choice(list(files))
    for name, data in files.items():
        put(folder / name, changed_bytes(rng, data) if name == chosen else data)
    ends(lambda: main(["yolo", str(folder)]))


def image(rng: random.Random, folder: Path) -> None:
    kind = rng.choice(("JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP", "PPM", "TGA", "ICO", "JPEG2000", "PCX"))
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(
        buffer, kind, **{"exif": exif} if kind in ("JPEG", "PNG", "TIFF", "WEBP") else {})
    put(folder / rng.choice(("a.jpg", "a.tif", "a\x1b[2J\r.png", "a.txt", "a")), changed_bytes(rng, buffer.getvalue()))
    found = ends(lambda: find_images([str(folder)], folder / "out"))
    for path, _ in found[0] if found else ():
        ends(lambda: read_header(path))
        ends(lambda: load_image(path, max_pixels=10 ** 7))


def checkpoint(rng: random.Random, folder: Path) -> None:
    buffer = io.BytesIO()
    spec = {"backbone": "r18-slim", "num_classes": 1, "channels": rng.choice((1, 8192)), "frozen": False}
    state = {"format": "boxteacher-1", "model": spec, "classes": None, "method": "boxinst", "config": {},
             "iteration": 1, "student": {"a": torch.zeros(10)}, "teacher": None}
    where, key = rng.choice(places(state) + [(state, key) for key in state] * 2)
    tensors = [torch.zeros(1).expand(10 ** 9), torch.zeros(2, 3)]
    where[key] = copy.deepcopy(rng.choice(VALUES)) if rng.random() < 0.9 else rng.choice(tensors)
    torch.save(state, buffer, _use_new_zipfile_serialization=rng.random() < 0.7)
    data = buffer.getvalue()
    put(folder / rng.choice(("a.pt", "a.pkl")), changed_bytes(rng, data) if rng.random() < 0.7 else data)
    ends(lambda: load_model(next(folder.iterdir())))


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def put_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20)).save(path)


def ends(work):
    """What the work returns; None if it is refused. Whatever it says is printable lines."""
    said, result = io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            result = work()
        except UserError as error:
            print(error)
            assert "\n" not in str(error), repr(str(error))
        except SystemExit as end:
            assert end.code in (0, 1), end.code
    assert not re.search(r"[^\n -~\x80-\uffff]|[\x80-\x9f]|Traceback|Warning:", re.sub(".*\r", "", said.getvalue())), (
        said.getvalue())                                                     # \r: progress bars
    return result


def run(count: int, seed: int, folder: Path) -> None:
    with open("/proc/self/status") as status:
        now = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY, now + MEMORY))
    kinds = [coco] * 5 + [voc, yolo, image, checkpoint]
    for number in range(count):
        kinds[number % len(kinds)](random.Random(f"{seed} {number}"), folder / str(number))
    print(f"{count} files, each read or refused in one line")


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
