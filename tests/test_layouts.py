"""voc.py and yolo.py: folders as programs and people leave them, each converted without renaming anything.

One scene in many layouts: the boxes must be equal to 0.01 pixels, and the parts those of the layout.
"""
import json

import numpy as np
import pytest

from formats.coco import CocoBoxes, datasets
from formats.voc import write_voc
from formats.yolo import write_yolo
from label_folders import put, put_image, xml, xml_object

SIZE = (120, 160)                                            # (height, width)
CLASSES = ["car", "bus"]
SCENE = {"a": [("bus", (20, 30, 60, 50))], "b": [("car", (10, 2, 40, 33)), ("bus", (80, 60, 160, 120))],
         "c": [("car", (0, 0, 159, 119))], "d": [("bus", (7, 8, 9, 10))]}            # xyxy of the images a to d
TRAIN, VAL = "ab", "cd"


def txt(stem: str) -> str:
    """The label file of an image of the scene."""
    (height, width), lines = SIZE, []
    for name, (x0, y0, x1, y1) in SCENE[stem]:
        numbers = (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height
        lines.append(" ".join([str(CLASSES.index(name)), *(f"{number:.7f}" for number in numbers)]))
    return "\n".join(lines) + "\n"


def voc_xml(stem: str, start: int, filename: str | None = None, source: str = "") -> str:
    """The XML file of an image of the scene, whose edges count from `start`."""
    objects = [xml_object(name, (x0 + start, y0 + start, x1, y1)) for name, (x0, y0, x1, y1) in SCENE[stem]]
    content = xml(*objects, filename=f"{stem}.jpg" if filename is None else filename, size=SIZE[::-1])
    return content.replace("<size>", f"<source><database>{source}</database></source><size>")


def place(root, image: str, label: str, content=txt, suffix: str = ".jpg", stems: str = TRAIN + VAL) -> None:
    """Images and their labels at the paths that the two patterns give: "{s}" is the stem, "{p}" train or val."""
    for stem in stems:
        names = {"s": stem, "p": "train" if stem in TRAIN else "val", "v": "train" if stem in TRAIN else "valid"}
        put_image(root / (image.format(**names) + suffix), *SIZE)
        put(root / label.format(**names), content(stem))


def yaml(root, text: str) -> None:
    pytest.importorskip("yaml")
    put(root / "data.yaml", f"names: [car, bus]\n{text}")


def names(root, path: str = "classes.txt") -> None:
    put(root / path, "car\nbus\n")


# ---------------------------------------------------------------------------------------------- YOLO

def ultralytics(root):
    place(root, "images/{p}/{s}", "labels/{p}/{s}.txt")
    yaml(root, "path: ../datasets/mine\ntrain: images/train\nval: images/val\n")


def roboflow(root):
    place(root, "{v}/images/{s}", "{v}/labels/{s}.txt")
    put(root / "README.roboflow.txt", "exported")
    yaml(root, "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nroboflow:\n  license: MIT\n")


def darknet(root):
    place(root, "obj_train_data/{s}", "obj_train_data/{s}.txt")
    names(root, "obj.names")
    put(root / "obj.data", "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n")
    put(root / "train.txt", "".join(f"data/obj_train_data/{stem}.jpg\n" for stem in TRAIN))
    put(root / "valid.txt", "".join(f"data/obj_train_data/{stem}.jpg\n" for stem in VAL))


def roboflow_darknet(root):
    place(root, "{v}/{s}", "{v}/{s}.txt")
    for part in ("train", "valid"):
        names(root, f"{part}/_darknet.labels")


def label_img(root):
    place(root, "{s}", "{s}.txt")
    names(root)


def label_studio(root):
    place(root, "images/{s}", "labels/{s}.txt")
    names(root)
    put(root / "notes.json", json.dumps({"categories": []}))


def labels_beside_a_folder_of_any_name(root):
    place(root, "photos of May/{s}", "labels/{s}.txt")
    names(root, "labels/classes.txt")


def labels_within_the_folder(root):
    place(root, "photos/{s}", "photos/labels/{s}.txt")
    names(root)


def labels_first(root):
    place(root, "{p}/{s}", "labels/{p}/{s}.txt")
    names(root)


def labels_first_and_images_first_by_site(root):
    place(root, "images/site {s}/cam/{s}", "labels/site {s}/cam/{s}.txt")
    names(root)


def deep_images_folder(root):
    place(root, "2026/images/{p}/{s}", "2026/labels/{p}/{s}.txt")
    names(root, "2026/classes.txt")


def capital_letters_and_suffixes(root):
    place(root, "Images/{s}", "Labels/{s}.txt", suffix=".JPEG")
    names(root)


def yaml_of_another_computer(root):
    place(root, "images/batch{p}/{s}", "labels/batch{p}/{s}.txt")
    yaml(root, "train: C:\\Users\\ann\\set\\images\\batchtrain\nval: /content/set/images/batchval\n")


def yaml_with_lists_of_folders(root):
    place(root, "images/{s}/{s}", "labels/{s}/{s}.txt")
    yaml(root, "train: [images/a, images/b]\nval:\n- images/c\n- ./images/d/\n")


def yaml_with_lists_of_images(root):
    place(root, "images/{s}", "labels/{s}.txt")
    put(root / "lists" / "mine.txt", "".join(f"./images/{stem}.jpg\n" for stem in TRAIN))
    put(root / "lists" / "other.txt", "".join(f"/data/x/images/{stem}.jpg\n" for stem in VAL))
    yaml(root, "train: lists/mine.txt\nval: lists/other.txt\n")


def yaml_against_the_folders_names(root):
    place(root, "images/val/{s}", "labels/val/{s}.txt", stems=TRAIN)
    place(root, "images/train/{s}", "labels/train/{s}.txt", stems=VAL)
    yaml(root, "train: images/val\nval: images/train\n")


def lists_without_yaml(root):
    place(root, "images/{s}", "labels/{s}.txt")
    names(root)
    put(root / "train.txt", "images/a.jpg\nimages/b.jpg\n")
    put(root / "val.txt", "c.jpg\nd.jpg\n")


def validation_spelt_out(root):
    place(root, "images/training/{s}", "labels/training/{s}.txt", stems=TRAIN)
    place(root, "images/validation/{s}", "labels/validation/{s}.txt", stems=VAL)
    names(root)


def name_with_suffix(root):
    place(root, "images/{s}.v2", "labels/{s}.v2.jpg.txt")
    names(root)


YOLO = {ultralytics: True, roboflow: True, darknet: True, roboflow_darknet: True, label_img: False, label_studio: False,
        labels_beside_a_folder_of_any_name: False, labels_within_the_folder: False, labels_first: True,
        labels_first_and_images_first_by_site: False, deep_images_folder: True, capital_letters_and_suffixes: False,
        yaml_of_another_computer: True, yaml_with_lists_of_folders: True, yaml_with_lists_of_images: True,
        yaml_against_the_folders_names: True, lists_without_yaml: True, validation_spelt_out: True,
        name_with_suffix: False}                                             # whether the layout has a validation part


# ----------------------------------------------------------------------------------------------- VOC

def pascal(root):
    place(root, "JPEGImages/{s}", "Annotations/{s}.xml", lambda s: voc_xml(s, 1, source="The VOC2007 Database"))
    for folder in ("SegmentationClass", "SegmentationObject"):
        put_image(root / folder / "a.png", *SIZE)
    put(root / "ImageSets/Main/train.txt", "a\nb\n")
    put(root / "ImageSets/Main/val.txt", "c\nd\n")
    put(root / "ImageSets/Main/car_train.txt", "a  -1\nb   1\n")


def voc_devkit(root):
    for year, stems in (("VOC2007", "ac"), ("VOC2012", "bd")):
        place(root / "VOCdevkit" / year, "JPEGImages/{s}", "Annotations/{s}.xml",
              lambda s, year=year: voc_xml(s, 1, source=f"The {year} Database"), stems=stems)
        put(root / "VOCdevkit" / year / "ImageSets/Main/train.txt", stems[0])
        put(root / "VOCdevkit" / year / "ImageSets/Main/val.txt", stems[1])


def label_img_xml(root):
    place(root, "{s}", "{s}.xml", lambda s: voc_xml(s, 0, source="Unknown"))


def annotations_and_images(root):
    place(root, "images/{s}", "annotations/{s}.xml", lambda s: voc_xml(s, 1, filename=""), suffix=".png")


def annots(root):
    place(root, "images/{s}", "annots/{s}.xml", lambda s: voc_xml(s, 1))


def roboflow_voc(root):
    place(root, "{v}/{s}", "{v}/{s}.xml", lambda s: voc_xml(s, 0, source="roboflow.com"))


def cvat(root):
    place(root, "JPEGImages/{p}/{s}", "Annotations/{p}/{s}.xml",
          lambda s: voc_xml(s, 0, f"train/{s}.jpg", source="Unknown"))
    put(root / "ImageSets/Main/default.txt", "a\nb\nc\nd\n")
    put(root / "labelmap.txt", "# label:color_rgb:parts:actions\n")


def parts_above(root):
    place(root, "{p}/images/{s}", "{p}/annotations/{s}.xml", lambda s: voc_xml(s, 1))


def the_same_stems_at_two_sites(root):
    """001.jpg of each site; the XML of a site belongs to the image of its own."""
    for stem in TRAIN + VAL:
        put_image(root / "pics" / f"site_{stem}" / "001.jpg", *SIZE)
        put(root / "xml" / f"site_{stem}" / "001.xml", voc_xml(stem, 1, "001.jpg"))


def renamed_with_their_images(root):
    """<filename> still says the name of the next image."""
    place(root, "JPEGImages/{s}", "Annotations/{s}.xml",
          lambda s: voc_xml(s, 1, f"{'abcd'['abcd'.index(s) - 1]}.jpg"))


def filename_only(root):
    place(root, "pictures/{s}", "xml/annotation_{s}.xml", lambda s: voc_xml(s, 1, f"C:\\pictures\\{s}.jpg"))


VOC = {pascal: True, voc_devkit: True, label_img_xml: False, annotations_and_images: False, annots: False,
       roboflow_voc: True, cvat: True, parts_above: True, the_same_stems_at_two_sites: False,
       renamed_with_their_images: False, filename_only: False}


def stem(path: str) -> str:
    """The scene's image: its stem, or the site of its folder."""
    name = path.rsplit("/", 1)[-1].split(".")[0]
    return name if name in SCENE else path.split("site_")[1][0]


@pytest.mark.parametrize("layout", [*YOLO, *VOC], ids=lambda layout: layout.__name__)
def test_layout(tmp_path, layout):
    layout(tmp_path)
    (write_yolo if layout in YOLO else write_voc)(str(tmp_path))
    train, val = datasets(str(tmp_path))
    parts = {train: TRAIN, val: VAL} if {**YOLO, **VOC}[layout] else {train: TRAIN + VAL}
    for files, stems in parts.items():
        found = CocoBoxes(*files)                            # and its images are where the file says
        assert sorted(stem(found.path(i)) for i in range(len(found))) == sorted(stems)
        for i in range(len(found)):
            boxes, labels = found.image_boxes(i)
            of_image = SCENE[stem(found.path(i))]
            assert [found.classes[label]["name"] for label in labels] == [name for name, _ in of_image]
            assert boxes == pytest.approx(np.array([box for _, box in of_image]), abs=0.01)
    assert not (tmp_path / "annotations/instances_val2017.json").exists() or val in parts
