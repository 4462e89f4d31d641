"""Pascal VOC's layout to COCO annotation files.

    python data.py voc DIR     # Annotations/*.xml, JPEGImages/; optional: ImageSets/Main/train.txt and val.txt
    python train.py --data DIR

Boxes are xywh in pixels, sizes (height, width).
"""
import re
from pathlib import Path
from xml.etree import ElementTree

from formats.coco import DataError, first_five
from formats.files import warn
from formats.folders import (Labelled, as_number, check_folders, check_root, checked_splits, read_all, read_text,
                             write_splits)
from formats.pictures import images_in, read_header


def write_voc(root: str) -> None:
    """Write the annotation files of a folder. Category ids count from 1 in the order of the names.

    Raises DataError."""
    root = Path(root)
    check_folders(root, "Annotations", "JPEGImages")
    check_root(root)
    stems = sorted(path.stem for path in (root / "Annotations").glob("*.xml") if not path.name.startswith("."))
    splits = checked_splits(root, voc_splits(root, stems), stems)
    images = {}
    for image in images_in(root, root / "JPEGImages"):
        images.setdefault(Path(image).stem, []).append(image)
    labelled = read_all(root, splits, lambda stem: read_xml(root, stem, images))
    stem_of = {}
    for stem, image in labelled.items():
        other = stem_of.setdefault(image.file_name, stem)
        if other != stem:
            raise DataError(f"{root / 'Annotations'}: {other}.xml and {stem}.xml both describe {image.file_name}")
    unlabelled = [name for stem in sorted({*images} - {*stems}) for name in images[stem] if name not in stem_of]
    if unlabelled:
        warn(f"{root}: {len(unlabelled)} images have no XML and are left out "
             f"({first_five(list(map(repr, unlabelled)))})")
    names = sorted({box["class"] for image in labelled.values() for box in image.boxes})
    write_splits(root, "voc", {split: [labelled[stem] for stem in part] for split, part in splits.items()},
                 {name: {"id": number, "name": name} for number, name in enumerate(names, 1)})


def voc_splits(root: Path, stems: list[str]) -> dict[str, list[str]]:
    """The stems that ImageSets/Main lists for each split. Raises DataError if a line names no XML file."""
    lists = {split: root / "ImageSets" / "Main" / f"{split}.txt" for split in ("train", "val")}
    splits, known = {}, set(stems)
    for split, path in lists.items():
        if path.exists():
            lines = [line.strip() for line in read_text(path).split("\n")]
            unknown = [number for number, line in enumerate(lines, 1) if line and line not in known]
            if unknown:
                raise DataError(f"{path}: {len(unknown)} lines name no XML of {root / 'Annotations'}, the first: "
                                f"line {unknown[0]}, {lines[unknown[0] - 1]!r:.80}")
            splits[split] = list(dict.fromkeys(line for line in lines if line))
    return splits or {"train": stems}


def read_xml(root: Path, stem: str, images: dict[str, list[str]]) -> Labelled:
    """Annotations/STEM.xml. `images`: paths within root by stem. Raises DataError.

    The image is the one that <filename> names, in whatever folder, else the one with the XML's own stem."""
    path = root / "Annotations" / f"{stem}.xml"
    try:
        tree = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
        raise DataError(f"{path} is not XML: {error}") from None
    if tree.tag != "annotation":
        raise DataError(f"{path} is not Pascal VOC's: its root is <{tree.tag!r:.40}>, not <annotation>")
    name = re.split(r"[/\\]", (tree.findtext("filename") or "").strip())[-1]
    found = [image for image in images.get(Path(name).stem, []) if Path(image).name == name] or images.get(stem, [])
    if len(found) != 1:
        raise DataError(f"{path}: its image is missing: {root / 'JPEGImages'} has no {name!r:.80} and "
                        f"{len(found) or 'no'} images {stem!r} of any suffix")
    boxes = []
    for number, element in enumerate(tree.findall("object"), 1):
        try:
            boxes.append(voc_box(element))
        except ValueError as error:
            raise DataError(f"{path}: object {number} {error}") from None
    return Labelled(found[0], voc_size(tree, path, root / found[0]), boxes)


def voc_box(element: ElementTree.Element) -> dict:
    """A box of Labelled from an <object>. VOC counts pixels from 1, xmax being the last inside. Raises ValueError."""
    name = (element.findtext("name") or "").strip()
    if not name:
        raise ValueError("has no name")
    x0, y0, x1, y1 = (number_of(element, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax"))
    if x1 < x0 or y1 < y0:
        raise ValueError("has a box whose xmax is below xmin, or ymax below ymin")
    flags = {flag: number_of(element, flag) for flag in ("difficult", "truncated")
             if (element.findtext(flag) or "").strip()}
    for flag, value in flags.items():
        if type(value) is not int:
            raise ValueError(f"has the {flag} {value}, which is not an integer")
    bbox = [round(value, 3) for value in (x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1)]
    return {"class": name, "bbox": bbox, **flags}


def voc_size(tree: ElementTree.Element, path: Path, image: Path) -> tuple[int, int]:
    """(height, width) that the XML states; if it states none, or zeros, that of the image. Raises DataError."""
    if not all((tree.findtext(f"size/{side}") or "").strip() for side in ("height", "width")):
        return read_header(image).upright
    try:
        height, width = (number_of(tree, f"size/{side}") for side in ("height", "width"))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    if type(height) is not int or type(width) is not int:
        raise DataError(f"{path}: its size, {width} x {height}, is not in whole pixels")
    return (height, width) if min(height, width) > 0 else read_header(image).upright


def number_of(element: ElementTree.Element, tag: str) -> int | float:
    """The number in a child element. Raises ValueError if it is missing or not a number."""
    text = element.findtext(tag)
    if text is None:
        raise ValueError(f"has no {tag}")
    try:
        return as_number(text)
    except ValueError:
        raise ValueError(f"has the {tag} {text!r:.40}, which is not a number") from None
