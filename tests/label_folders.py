"""Small folders in the layouts of Pascal VOC and YOLO, and the COCO files they are converted to."""
import json
from pathlib import Path

import pytest
from PIL import Image

from formats.coco import DataError


def put_image(path: Path, height: int = 20, width: int = 30, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path, **options)


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def xml_object(name="car", box=(3, 5, 12, 9), more="") -> str:
    edges = "".join(f"<{edge}>{value}</{edge}>" for edge, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>{name}</name>{more}<bndbox>{edges}</bndbox></object>"


def xml(*objects: str, filename="", size=(30, 20)) -> str:
    sides = "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{filename}</filename>{sides}{''.join(objects)}</annotation>"


def read(root: Path, split: str = "train") -> dict:
    return json.loads((root / "annotations" / f"instances_{split}2017.json").read_text())


def boxes(root: Path, split: str = "train") -> list[tuple]:
    """(file name, class, bbox) of every annotation."""
    content = read(root, split)
    files = {row["id"]: row["file_name"] for row in content["images"]}
    names = {row["id"]: row["name"] for row in content["categories"]}
    return [(files[row["image_id"]], names[row["category_id"]], row["bbox"]) for row in content["annotations"]]


def refused(write, root: Path, *parts: str) -> None:
    """The error is one line with all parts; nothing is written, and an earlier conversion stays."""
    def files():
        return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    before = files()
    with pytest.raises(DataError) as error:
        write(str(root))
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message
    assert files() == before
