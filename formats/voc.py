"""Pascal VOC's XML files to COCO annotation files.

    python data.py voc DIR     # any folder with XML files in it, and images beside them or anywhere below
    python train.py --data DIR

An XML file belongs to the image of its own stem, the nearest one by its folders; without one, to that which <filename>
names. ImageSets/Main/train.txt and val.txt, or folders named after the parts, divide the data set. Boxes are xywh in
pixels, sizes (height, width).
"""
import os
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from xml.etree import ElementTree

from formats.coco import MAX_PIXELS, UPRIGHT, DataError
from formats.files import counted
from formats.folders import (Faults, Labelled, Report, Tails, as_number, checked_splits, folded, folder_of, header_in,
                             images_among, inventory, listed, names_in, part_of, parts_by_folder, read_bytes, stem_of,
                             write_splits)
from formats.pictures import left_out, remarks


LARGEST = 2**23     # bytes of an XML file


class VocFile(NamedTuple):
    """What an XML file says, before it is known what its edges count from."""
    filename: str
    size: tuple[int, int] | None      # (height, width); None if it states none, or zeros
    database: str                     # of its <source>, "" without one
    boxes: list[dict]                 # "class", "edges": xmin ymin xmax ymax, "rotated", and VOC's flags


def write_voc(root: str, pixels_from: int | None = None, exif: str = UPRIGHT, skip: bool = False,
              max_pixels: int = MAX_PIXELS) -> None:
    """Write the annotation files of a folder. Category ids count from 1 in the order of the names.

    pixels_from: what edges count from (see `xywh`); None: read off the folder. exif: see pictures.is_turned. skip:
    leave out what cannot be converted, instead of refusing. Raises DataError."""
    root, headers = Path(root), {}
    report = Report(root, skip, "XML file")
    names = names_in(report)
    stems = [name for name in names if name.lower().endswith(".xml")]
    images = [name for name in images_among(names) if not in_masks(name)]
    if not stems:
        raise DataError(f"{root}: no XML files{inventory(names, 'voc')}")
    files = report.read_all(stems, lambda name: read_xml(root, name))
    image_of = images_of(files, images, report)
    splits, lists = voc_splits(root, names, {name: (*folder_of(name), *folder_of(image_of.get(name, "")))
                                             for name in stems})
    splits = checked_splits(splits, stems, bool(lists), report)
    count_from = edges_from({name: files[name] for name in image_of}, pixels_from, report)

    def labelled(name: str) -> Labelled:
        file, image = files[name], image_of[name]
        headers[image] = header = header_in(root, image)
        if file.size is not None and file.size not in (header.size, header.upright):
            raise Faults(("XML files that state another size than their image's", "{}: {} x {}, not {} x {}".format(
                name, *file.size[::-1], *header.size[::-1])))
        return Labelled(image, file.size or (header.upright if exif == UPRIGHT else header.size),
                        [xywh(box, count_from[name]) for box in file.boxes])

    found = report.read_all([name for part in splits.values() for name in part if name in image_of], labelled)
    report.refuse()
    splits = {split: [found[name] for name in part if name in found] for split, part in splits.items()}
    boxes = [(name, box) for name in found for box in files[name].boxes]
    report.say("box", "with a rotation, which is ignored", (name for name, box in boxes if box["rotated"]))
    report.say("box", "marked difficult, learnt like the others", (name for name, box in boxes if box.get("difficult")))
    report.said += remarks(headers, exif, max_pixels)
    skipped = {stem_of(name) for name in report.bad}
    report.say("image", "without XML, left out",
               [image for image in sorted({*images} - {*image_of.values()}) if stem_of(image) not in skipped])
    report.say("mask", "not read", filter(in_masks, names))
    report.said += left_out([name for name in names if name not in {*stems, *images, *lists} and not in_masks(name)])
    classes = sorted({box["class"] for image in found.values() for box in image.boxes})
    write_splits("voc", splits, {name: {"id": number, "name": name} for number, name in enumerate(classes, 1)}, exif,
                 report)


def in_masks(name: str) -> bool:
    return bool({*folder_of(name)} & {"SegmentationClass", "SegmentationObject"})


# ----------------------------------------------------------------------------------------------- the images

def images_of(files: dict[str, VocFile], images: list[str], report: Report) -> dict[str, str]:
    """The image of each XML file. Faults are XML files without an image, with several, or with that of another XML."""
    by_name, by_stem, other, claims = {}, {}, [], {}
    for image in images:
        by_name.setdefault(folded(PurePosixPath(image).name), []).append(image)
        by_stem.setdefault(folded(stem_of(image)), []).append(image)

    def image_of(name: str) -> str:
        filename, stem = files[name].filename, folded(stem_of(name))
        own = by_stem.get(stem) or by_name.get(stem, [])            # some write photo.jpg.xml
        named = by_name.get(folded(filename)) or by_stem.get(folded(stem_of(filename)), [])
        both = [image for image in own if PurePosixPath(image).name == filename]     # not the mask of that photograph
        found = nearest(name, both) or nearest(name, own) or nearest(name, named)
        found = [image for image in found if stem_of(image) == stem_of(name)] or found
        if not found:
            raise Faults(("XML files without an image of their stem or <filename>", f"{name} ({filename!r:.80})"))
        if len(found) > 1:
            raise Faults(("XML files with several images", f"{name}: {' and '.join(map(repr, found[:3]))}"))
        if found[0] in own and named and found[0] not in named:
            other.append(f"{name}: {filename}")
        claims.setdefault(found[0], []).append(name)
        return found[0]

    found = report.read_all(files, image_of)
    for image, names in claims.items():
        best = max(agreement(name, image) for name in names)
        right = [name for name in names if agreement(name, image) == best]
        wrong = set(names) - set(right if len(right) == 1 else ())
        if wrong:
            report.fault(wrong, ("images of several XML files", f"{image}: {' and '.join(names[:3])}"))
    report.say("XML file", "whose <filename> names another image that exists: that of their own stem was taken", other)
    return {name: image for name, image in found.items() if name not in report.bad}


def agreement(name: str, image: str) -> int:
    """How many folders of an XML file and an image agree, from both ends; more than that if all do, less than 0 if they
    are those of two parts."""
    a, b = folder_of(name), folder_of(image)
    if a == b:
        return 2 * len(a) + 1
    parts = {part_of(a), part_of(b)} - {""}
    return -1 if len(parts) > 1 else len(os.path.commonprefix([a, b])) + len(os.path.commonprefix([a[::-1], b[::-1]]))


def nearest(name: str, images: list[str]) -> list[str]:
    """Those of the images whose folders agree best with those of an XML file."""
    best = max((agreement(name, image) for image in images), default=-1)
    return [image for image in images if agreement(name, image) == best >= 0]


def voc_splits(root: Path, names: list[str], folders: dict[str, tuple[str, ...]]) -> tuple[dict, list[str]]:
    """The XML files of each split and the lists that say so: those in ImageSets/Main or in DIR; without any list the
    folders of XML files and images decide. Raises DataError if a line names no XML file."""
    lists = [name for name in names if name.endswith(".txt") and folder_of(name)[-2:] in ((), ("ImageSets", "Main"))]
    splits, used = {}, []
    for split in ("train", "val"):
        of_split = [name for name in lists if part_of((stem_of(name),)) == split]
        of_split = of_split or [name for name in lists if (split, stem_of(name)) == ("train", "trainval")]
        for name in of_split:
            above = folder_of(name)[:-2]                             # of VOC2007/ImageSets/Main: VOC2007
            tails = Tails(xml for xml in folders if folder_of(xml)[:len(above)] == above)
            splits.setdefault(split, []).extend(listed(root, name, tails))
        used += of_split
    return splits or parts_by_folder(folders), used


# ------------------------------------------------------------------------------------------------ XML files

def read_xml(root: Path, name: str) -> VocFile:
    """Raises Faults."""
    try:
        content = read_bytes(root / name, LARGEST)
        if b"<!ENTITY" in content.replace(b"\0", b""):     # zeros: UTF-16
            raise ValueError("it declares entities, which may stand for any amount of text")
        tree = ElementTree.fromstring(content)             # at once: in parts, a long text takes time by its square
    except OSError as error:
        raise Faults(("files that cannot be read", f"{name}: {error.strerror}")) from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise Faults(("files that are not XML", f"{name}: {error}")) from None
    if tree.tag != "annotation":
        raise Faults(("XML files that are not Pascal VOC's", f"{name}: its root is <{tree.tag!r:.40}>, not "
                      "<annotation>"))
    boxes, faults = [], []
    for number, element in enumerate(tree.findall("object"), 1):
        try:
            boxes.append(voc_box(element))
        except ValueError as error:
            faults.append(("wrong objects", f"{name}: object {number} {error}"))
    try:
        size = voc_size(tree)
    except ValueError as error:
        faults.append(("wrong sizes", f"{name}: {error}"))
    if faults:
        raise Faults(*faults)
    return VocFile(re.split(r"[/\\]", (tree.findtext("filename") or "").strip())[-1], size,
                (tree.findtext("source/database") or "").strip(), boxes)


def voc_box(element: ElementTree.Element) -> dict:
    """A box of VocFile from an <object>. Raises ValueError."""
    name = (element.findtext("name") or "").strip()
    if not name:
        raise ValueError("has no name")
    if element.find("bndbox") is None and element.find("robndbox") is not None:
        raise ValueError("is a rotated box (robndbox); convert it to a bndbox")
    x0, y0, x1, y1 = edges = [number_of(element, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")]
    if x1 < x0 or y1 < y0:
        raise ValueError("has a box whose xmax is below xmin, or ymax below ymin")
    flags = {flag: number_of(element, flag) for flag in ("difficult", "truncated")
             if (element.findtext(flag) or "").strip()}
    for flag, value in flags.items():
        if type(value) is not int:
            raise ValueError(f"has the {flag} {value}, which is not an integer")
    return {"class": name, "edges": edges, "rotated": is_rotated(element), **flags}


def is_rotated(element: ElementTree.Element) -> bool:
    """Whether CVAT's attribute says that the box is turned."""
    values = [attribute.findtext("value") or "0" for attribute in element.iter("attribute")
              if attribute.findtext("name") == "rotation"]
    return any(not re.fullmatch(r"\s*0*\.?0*\s*", value) for value in values)


def voc_size(tree: ElementTree.Element) -> tuple[int, int] | None:
    """(height, width) that the XML states; None if it states none, or zeros. Raises ValueError."""
    if not all((tree.findtext(f"size/{side}") or "").strip() for side in ("height", "width")):
        return None
    height, width = (number_of(tree, f"size/{side}") for side in ("height", "width"))
    if type(height) is not int or type(width) is not int:
        raise ValueError(f"its size, {width} x {height}, is not in whole pixels")
    return (height, width) if min(height, width) > 0 else None


def number_of(element: ElementTree.Element, tag: str) -> int | float:
    """The number in a child element. Raises ValueError if it is missing or not a number."""
    text = element.findtext(tag)
    if text is None:
        raise ValueError(f"has no {tag}")
    try:
        return as_number(text)
    except ValueError:
        raise ValueError(f"has the {tag} {text!r:.40}, which is not a number") from None


# --------------------------------------------------------------------------- what the edges of boxes count from

def xywh(box: dict, count_from: int) -> dict:
    """A box of Labelled from one of VocFile. From 1, as VOC does: pixels are counted, xmax is the last inside. From 0,
    as labelImg and CVAT do: the lines between pixels are counted, xmax is the edge behind the last."""
    x0, y0, x1, y1 = box["edges"]
    bbox = [x0 - count_from, y0 - count_from, x1 - x0 + count_from, y1 - y0 + count_from]
    return {"class": box["class"], "bbox": [round(value, 3) for value in bbox],
            **{key: value for key, value in box.items() if key in ("difficult", "truncated")}}


def edges_from(files: dict[str, VocFile], given: int | None, report: Report) -> dict[str, int]:
    """What the edges of each XML file count from.

    Files of one <source> are alike. VOC's own have no 0, so a 0 shows edges; a source other than VOC is a tool, which
    writes edges; a file that names no source is taken for VOC's unless it has a 0 or a fraction."""
    sources = {}
    for name, file in files.items():
        sources.setdefault("VOC" if "voc" in file.database.lower() else file.database, []).append(name)
    found, reasons = {}, []
    for source, names in sources.items():
        edges = [edge for name in names for box in files[name].boxes for edge in box["edges"]]
        zero = any(edge <= 0 for edge in edges)
        fraction = any(type(edge) is float for edge in edges)
        tool = source not in ("VOC", "")
        why = (f"source {source!r}" if tool else "there is a 0" if zero else "there is a fraction" if fraction
               else "Pascal VOC's" if source else "nothing tells otherwise")
        start = int(not (zero or tool or fraction and not source)) if given is None else given
        found |= dict.fromkeys(names, start)
        reasons.append(f"from {start} in {counted(len(names), 'file')} ({'as given' if given is not None else why})")
    report.facts.append(f"edges of boxes count {', '.join(reasons)}; --pixels-from decides otherwise: 1 counts pixels, "
                        "as VOC does, 0 the lines between them, as labelImg and CVAT do")
    return found
