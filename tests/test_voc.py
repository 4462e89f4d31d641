"""voc.py: small folders in Pascal VOC's layout as COCO files worked out by hand."""
import os

import pytest

from formats.coco import CocoBoxes, DataError, datasets
from formats.commands import main
from formats.voc import write_voc
from label_folders import boxes, put, put_image, read, refused, xml_object, xml


def test_voc_by_hand(voc, capsys):
    """Pixels count from 1, and the last is inside: 3..12 are the ten pixels from 2 on."""
    dog = xml_object("dog", (1, 1, 30, 20), "<difficult>1</difficult><truncated>0</truncated><pose>Left</pose>")
    more = "<part><name>head</name><bndbox><xmin>9</xmin></bndbox></part><polygon><x1>3</x1></polygon>"
    content = xml(dog, xml_object("aeroplane", ("8.5", " 7 ", "8.5", "7.25"), more), filename="a.jpg")
    put(voc / "Annotations" / "a.xml", content)
    main(["voc", str(voc)])
    captured = capsys.readouterr()
    assert captured.out == f"{voc}/annotations/instances_train2017.json: 3 images, 3 boxes, 3 classes\n"
    assert captured.err == ""
    assert [(row["id"], row["name"]) for row in read(voc)["categories"]] == [(1, "aeroplane"), (2, "bus"), (3, "dog")]
    assert read(voc)["images"] == [{"id": i, "file_name": f"JPEGImages/{name}.jpg", "width": 30, "height": 20}
                                   for i, name in enumerate("abc", 1)]
    assert read(voc)["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 3, "area": 600, "iscrowd": 0, "bbox": [0, 0, 30, 20], "difficult": 1,
         "truncated": 0},
        {"id": 2, "image_id": 1, "category_id": 1, "area": 1.25, "iscrowd": 0, "bbox": [7.5, 6, 1, 1.25]},
        {"id": 3, "image_id": 3, "category_id": 2, "area": 50, "iscrowd": 0, "bbox": [2, 4, 10, 5]}]
    assert [path.name for path in (voc / "annotations").iterdir()] == ["instances_train2017.json"]


def test_voc_splits(voc, capsys):
    """In the order of the lists, with the same categories in both; images in no list are left out with a warning."""
    for split, lines in (("train", "c\n"), ("val", " a \r\n\n")):
        put(voc / "ImageSets" / "Main" / f"{split}.txt", lines)
    write_voc(str(voc))
    assert boxes(voc) == [("JPEGImages/c.jpg", "bus", [2, 4, 10, 5])]
    assert boxes(voc, "val") == [("JPEGImages/a.jpg", "car", [2, 4, 10, 5])]
    assert read(voc)["categories"] == read(voc, "val")["categories"]
    captured = capsys.readouterr()
    assert "1 of 3 images are in neither train nor val and are left out ('b')" in captured.err
    assert captured.err.count("\n") == 1
    assert "instances_val2017.json: 1 images, 1 boxes, 2 classes\n" in captured.out
    put(voc / "ImageSets" / "Main" / "val.txt", "a\nb\nc")
    write_voc(str(voc))
    assert "1 of 3 images are both in train and in val ('c')" in capsys.readouterr().err


def test_voc_images_of_any_name(voc, capsys):
    """The image is named by <filename>, without its folder, or else by the XML; no other folder is searched."""
    for name, filename, image in (("1", "C:\\photos\\Ärger 1.PNG", "Ärger 1.PNG"), ("2", "x/../../2.bmp", "2.bmp"),
                                    ("3", "2007_000003", "3.webp"), ("4", "../../secret.jpg", "4.gif")):
        put(voc / "Annotations" / f"{name}.xml", xml(filename=filename))
        put_image(voc / "JPEGImages" / image)
    put_image(voc.parent / "secret.jpg")
    put_image(voc / "JPEGImages" / "lonely.jpg")
    put(voc / "JPEGImages" / "._a.jpg", b"")
    put(voc / "JPEGImages" / "a.txt", b"")
    write_voc(str(voc))
    names = [row["file_name"].removeprefix("JPEGImages/") for row in read(voc)["images"]]
    assert names == ["Ärger 1.PNG", "2.bmp", "3.webp", "4.gif", "a.jpg", "b.jpg", "c.jpg"]
    assert "1 images have no XML and are left out ('JPEGImages/lonely.jpg')" in capsys.readouterr().err
    assert len(CocoBoxes(*datasets(str(voc))[0])) == 7


@pytest.mark.parametrize("size, expected", [((300, 200), (300, 200)), ((0, 0), (30, 20)), (("", ""), (30, 20)),
                                            (None, (30, 20)), ((300, 0), (30, 20)), (("300.0", "200"), (300, 200))])
def test_voc_size_of_the_xml_or_the_header(voc, size, expected):
    put(voc / "Annotations" / "a.xml", xml(xml_object(), filename="a.jpg", size=size))
    write_voc(str(voc))
    assert (read(voc)["images"][0]["width"], read(voc)["images"][0]["height"]) == expected


@pytest.mark.parametrize("content, part", [
    ("", "is not XML"), (b"\xff\xd8", "is not XML"), ("<annotation><object>", "is not XML"),
    ("<kml/>", "not <annotation>"),
    ("<?xml version='1.0' encoding='none'?><annotation/>", "is not XML"),
    ("<!DOCTYPE x [<!ENTITY a 'aaaaaaaaaa'>" + "".join(
        f"<!ENTITY {b} '{f'&{a};' * 10}'>" for a, b in zip("abcdefghi", "bcdefghij")) + "]>"
     "<annotation><filename>&j;</filename></annotation>", "is not XML"),
    ("<!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><annotation>&a;</annotation>", "is not XML"),
    (xml(xml_object("")), "object 1 has no name"),
    (xml(xml_object(), "<object><name>car</name></object>"), "object 2 has no bndbox/xmin"),
    (xml(xml_object(box=(1, 2, 3))), "no bndbox/ymax"),
    (xml(xml_object(box=(1, 2, "x", 4))), "bndbox/xmax 'x', which is not a number"),
    (xml(xml_object(box=(1, 2, "nan", 4))), "'nan'"), (xml(xml_object(box=(1, "1e99", 3, 4))), "'1e99'"),
    (xml(xml_object(box=(1, 2, "1_0", 4))), "'1_0'"), (xml(xml_object(box=(5, 2, 4, 4))), "xmax is below xmin"),
    (xml(xml_object(more="<difficult>0.5</difficult>")), "difficult 0.5"),
    (xml(xml_object(more="<truncated>yes</truncated>")), "'yes'"),
    (xml(size=("x", 20)), "size/width 'x'"), (xml(size=(30.5, 20)), "30.5"), (xml(size=("9" * 5000, 20)), "'9999"),
])
def test_voc_wrong_annotations(voc, content, part):
    """The message has the count and the first one, and stays short."""
    write_voc(str(voc))
    put(voc / "Annotations" / "b.xml", content)
    put(voc / "Annotations" / "c.xml", content)
    refused(write_voc, voc, "2 of 3", str(voc / "Annotations" / "b.xml"), part)
    with pytest.raises(DataError) as error:
        write_voc(str(voc))
    assert len(str(error.value)) < 600


def test_voc_missing_and_ambiguous_images(voc):
    os.rename(voc / "JPEGImages" / "c.jpg", voc / "JPEGImages" / "d.jpg")
    refused(write_voc, voc, "1 of 3", "c.xml", "'c.jpg'", "missing")
    put(voc / "Annotations" / "c.xml", xml(filename="a.jpg"))
    refused(write_voc, voc, "a.xml and c.xml both describe JPEGImages/a.jpg")
    for suffix in ("png", "bmp"):
        put_image(voc / "JPEGImages" / f"c.{suffix}")
    put(voc / "Annotations" / "c.xml", xml(filename="none"))
    refused(write_voc, voc, "c.xml", "2 images 'c'")


def test_voc_lists_that_name_no_xml(voc):
    put(voc / "ImageSets" / "Main" / "train.txt", "a\n\n../b\nc 1\n")
    refused(write_voc, voc, "train.txt", "2 lines", "line 3, '../b'")
    put(voc / "ImageSets" / "Main" / "train.txt", "\n")
    refused(write_voc, voc, "no images to train on")
    os.rename(voc / "ImageSets" / "Main" / "train.txt", voc / "ImageSets" / "Main" / "val.txt")
    put(voc / "ImageSets" / "Main" / "val.txt", "a")
    refused(write_voc, voc, "no images to train on")
