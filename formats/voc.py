"""A folder in Pascal VOC's layout: COCO annotation files for its boxes.

    python data.py voc DIR          Annotations/*.xml, JPEGImages/, perhaps ImageSets/Main/train.txt and val.txt
    python train.py --data DIR

Boxes are xywh in pixels of the image, sizes (height, width).
"""
import re
from pathlib import Path
from xml.etree import ElementTree

from formats.coco import DataError, first_five
from formats.files import warn
from formats.folders import Labelled, as_number, check_folders, check_root, checked_splits, read_all, read_text, write_splits
from formats.pictures import images_in, read_header


def write_voc(root: str) -> None:
    """Write the annotation files of a folder in Pascal VOC's layout. Categories are sorted by name, ids from 1.

    Raises DataError."""
    root = Path(root)
    check_folders(root, "Annotations", "JPEGImages")
    check_root(root)
    stems = sorted(path.stem for path in (root / "Annotations").glob("*.xml") if not path.name.startswith("."))
    splits = checked_splits(root, voc_splits(root, stems), stems)
    there = {}
    for image in images_in(root, root / "JPEGImages"):
        there.setdefault(Path(image).stem, []).append(image)
    found = read_all(root, splits, lambda stem: read_xml(root, stem, there))
    owners = {}
    for stem, image in found.items():
        other = owners.setdefault(image.file_name, stem)
        if other != stem:
            raise DataError(f"{root / 'Annotations'}: {other}.xml and {stem}.xml are both of {image.file_name}")
    alone = [name for stem in sorted({*there} - {*stems}) for name in there[stem] if name not in owners]
    if alone:
        warn(f"{root}: {len(alone)} images have no XML and are left out ({first_five(list(map(repr, alone)))})")
    names = sorted({box["class"] for image in found.values() for box in image.boxes})
    write_splits(root, "voc", {split: [found[stem] for stem in part] for split, part in splits.items()},
                 {name: {"id": number, "name": name} for number, name in enumerate(names, 1)})


def voc_splits(root: Path, stems: list[str]) -> dict[str, list[str]]:
    """The stems of the parts as ImageSets/Main lists them. Raises DataError where a line names no XML."""
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


def read_xml(root: Path, stem: str, there: dict[str, list[str]]) -> Labelled:
    """`there`: the images of each stem, as paths within root. Raises DataError."""
    path = root / "Annotations" / f"{stem}.xml"
    try:
        tree = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
        raise DataError(f"{path}: not XML: {error}") from None
    if tree.tag != "annotation":
        raise DataError(f"{path}: not of Pascal VOC: it holds <{tree.tag!r:.40}>, no <annotation>")
    name = re.split(r"[/\\]", (tree.findtext("filename") or "").strip())[-1]
    images = [image for image in there.get(Path(name).stem, []) if Path(image).name == name]
    images = images or there.get(stem, [])
    if len(images) != 1:
        raise DataError(f"{path}: its image is missing: {root / 'JPEGImages'} has no {name!r:.80} and "
                        f"{len(images) or 'no'} images {stem!r} of any suffix")
    boxes = []
    for number, thing in enumerate(tree.findall("object"), 1):
        try:
            boxes.append(voc_box(thing))
        except ValueError as error:
            raise DataError(f"{path}: object {number} {error}") from None
    return Labelled(images[0], voc_size(tree, path, root / images[0]), boxes)


def voc_box(thing: ElementTree.Element) -> dict:
    """An <object>. VOC counts pixels from 1, and xmax is the last one inside. Raises ValueError."""
    name = (thing.findtext("name") or "").strip()
    if not name:
        raise ValueError("has no name")
    x0, y0, x1, y1 = (number_of(thing, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax"))
    if x1 < x0 or y1 < y0:
        raise ValueError("has a box whose xmax is below xmin, or ymax below ymin")
    given = [flag for flag in ("difficult", "truncated") if (thing.findtext(flag) or "").strip()]
    flags = {flag: number_of(thing, flag) for flag in given}
    wrong = next((flag for flag, value in flags.items() if type(value) is not int), None)
    if wrong:
        raise ValueError(f"has the {wrong} {flags[wrong]}, which is no integer")
    bbox = [round(value, 3) for value in (x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1)]
    return {"class": name, "bbox": bbox, **flags}


def voc_size(tree: ElementTree.Element, path: Path, image: Path) -> tuple[int, int]:
    """As the XML states it, or else the image's header. Raises DataError."""
    if not all((tree.findtext(f"size/{side}") or "").strip() for side in ("height", "width")):
        return read_header(image)[0]
    try:
        height, width = (number_of(tree, f"size/{side}") for side in ("height", "width"))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    if type(height) is not int or type(width) is not int:
        raise DataError(f"{path}: its size, {width} x {height}, is not in whole pixels")
    return (height, width) if min(height, width) > 0 else read_header(image)[0]


def number_of(element: ElementTree.Element, tag: str) -> int | float:
    """Raises ValueError where there is no such element or no number in it."""
    text = element.findtext(tag)
    if text is None:
        raise ValueError(f"has no {tag}")
    try:
        return as_number(text)
    except ValueError:
        raise ValueError(f"has the {tag} {text!r:.40}, which is no number") from None
