"""voc.py: small folders in Pascal VOC's layout as COCO files worked out by hand."""
import os

import pytest
from PIL import Image

from formats.coco import CocoBoxes, DataError, datasets
from formats.commands import main
from formats.voc import write_voc
from label_folders import boxes, put, put_image, read, refused, xml_object, xml


def test_voc_by_hand(voc, capsys):
    """Pixels count from 1, and the last is inside: 3..12 are the ten pixels from 2 on."""
    dog = xml_object("dog", (1, 1, 30, 20), "<difficult>1</difficult><truncated>0</truncated><pose>Left</pose>")
    more = "<part><name>head</name><bndbox><xmin>9</xmin></bndbox></part><polygon><x1>3</x1></polygon>"
    content = xml(dog, xml_object("aeroplane", ("8", " 7 ", "8", "9"), more), filename="a.jpg")
    put(voc / "Annotations" / "a.xml", content)
    main(["voc", str(voc)])
    captured = capsys.readouterr()
    assert captured.out == (
        f"{voc}/annotations/instances_train2017.json: 3 images, 3 boxes, 3 classes\n"
        f"{voc}: no part to evaluate on, everything is training data; it would be a list, or folders, named val, "
        "val2017, valid, validation, validate\n"
        f"{voc}: edges of boxes count from 1 in 3 files (nothing tells otherwise); --pixels-from decides otherwise: 1 "
        "counts pixels, as VOC does, 0 the lines between them, as labelImg and CVAT do\n")
    assert captured.err == f"warning: {voc}: 1 box marked difficult, learnt like the others ('Annotations/a.xml')\n"
    assert [(row["id"], row["name"]) for row in read(voc)["categories"]] == [(1, "aeroplane"), (2, "bus"), (3, "dog")]
    assert read(voc)["images"] == [{"id": i, "file_name": f"JPEGImages/{name}.jpg", "width": 30, "height": 20}
                                   for i, name in enumerate("abc", 1)]
    assert read(voc)["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 3, "area": 600, "iscrowd": 0, "bbox": [0, 0, 30, 20], "difficult": 1,
         "truncated": 0},
        {"id": 2, "image_id": 1, "category_id": 1, "area": 3, "iscrowd": 0, "bbox": [7, 6, 1, 3]},
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
    assert "1 XML file in neither train nor val, left out; " in captured.err and "('Annotations/b.xml')" in captured.err
    assert captured.err.count("\n") == 1
    assert "instances_val2017.json: 1 image, 1 box, 2 classes\n" in captured.out
    put(voc / "ImageSets" / "Main" / "val.txt", "a\nb\nc")
    write_voc(str(voc))
    assert "1 XML file both in train and in val ('Annotations/c.xml')" in capsys.readouterr().err


def test_voc_images_of_any_name(voc, capsys):
    """The image has the stem of the XML, or else the name in <filename>, without its folder."""
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
    assert "1 image without XML, left out ('JPEGImages/lonely.jpg')" in (said := capsys.readouterr().err)
    assert "('JPEGImages/a.txt')" in said and said.count("\n") == 2
    assert len(CocoBoxes(*datasets(str(voc))[0])) == 7


@pytest.mark.parametrize("size, expected", [((30, 20), (30, 20)), ((0, 0), (30, 20)), (("", ""), (30, 20)),
                                            (None, (30, 20)), ((300, 0), (30, 20)), (("30.0", "20"), (30, 20))])
def test_voc_size_of_the_xml_or_the_header(voc, size, expected):
    put(voc / "Annotations" / "a.xml", xml(xml_object(), filename="a.jpg", size=size))
    write_voc(str(voc))
    assert (read(voc)["images"][0]["width"], read(voc)["images"][0]["height"]) == expected
    put(voc / "Annotations" / "a.xml", xml(xml_object(), filename="a.jpg", size=(300, 200)))
    refused(write_voc, voc, "another size", "Annotations/a.xml: 300 x 200, not 30 x 20")


@pytest.mark.parametrize("source, box, given, expected", [
    ("The VOC2007 Database", (1, 2, 10, 12), None, [0, 1, 10, 11]),            # pixels, the last inside
    ("The VOC2007 Database", (1.5, 2, 10, 12), None, [0.5, 1, 9.5, 11]),       # VOC2011 has some of half a pixel
    ("The VOC2007 Database", (0, 2, 10, 12), None, [0, 2, 10, 10]),            # VOC has no pixel 0
    ("Unknown", (1, 2, 10, 12), None, [1, 2, 9, 10]),                          # labelImg, CVAT
    (None, (1, 2, 10, 12), None, [0, 1, 10, 11]),
    (None, (1.5, 2, 10, 12), None, [1.5, 2, 8.5, 10]), (None, (1, 0, 10, 12), None, [1, 0, 9, 12]),
    ("Unknown", (1, 2, 10, 12), 1, [0, 1, 10, 11]), (None, (1, 2, 10, 12), 0, [1, 2, 9, 10]),
])
def test_what_edges_count_from(voc, source, box, given, expected, capsys):
    """Decided for all files of a source; c has the one box that tells."""
    for stem, edges in (("a", (3, 4, 12, 14)), ("c", box)):
        content = xml(xml_object(box=edges), filename=f"{stem}.jpg")
        if source:
            content = content.replace("<size>", f"<source><database>{source}</database></source><size>")
        put(voc / "Annotations" / f"{stem}.xml", content)
    os.remove(voc / "Annotations" / "b.xml")
    write_voc(str(voc), pixels_from=given)
    start = box[0] - expected[0]
    assert boxes(voc) == [("JPEGImages/a.jpg", "car", [3 - start, 4 - start, 9 + start, 10 + start]),
                          ("JPEGImages/c.jpg", "car", expected)]
    assert f"count from {start:g} in 2 files" in capsys.readouterr().out


def test_files_of_two_sources_count_each_their_own_way(voc, capsys):
    for stem, source in (("a", "The VOC2012 Database"), ("c", "Unknown")):
        put(voc / "Annotations" / f"{stem}.xml", xml(xml_object(box=(3, 4, 12, 14)), filename=f"{stem}.jpg").replace(
            "<size>", f"<source><database>{source}</database></source><size>"))
    write_voc(str(voc))
    assert [row[2] for row in boxes(voc)] == [[2, 3, 10, 11], [3, 4, 9, 10]]
    assert "from 1 in 1 file (Pascal VOC's)" in capsys.readouterr().out


def test_rotations_are_said_to_be_ignored(voc, capsys):
    def turned(angle):
        return xml_object(more="<attributes><attribute><name>rotation</name>"
                               f"<value>{angle}</value></attribute></attributes>")
    put(voc / "Annotations" / "a.xml", xml(turned("30.5"), turned("0.0"), turned(0), filename="a.jpg"))
    write_voc(str(voc))
    assert "1 box with a rotation, which is ignored ('Annotations/a.xml')" in capsys.readouterr().err
    box = "<object><name>car</name><robndbox><cx>9</cx><cy>9</cy><w>4</w><h>3</h><angle>1</angle></robndbox></object>"
    put(voc / "Annotations" / "a.xml", xml(box, filename="a.jpg"))
    refused(write_voc, voc, "Annotations/a.xml: object 1 is a rotated box (robndbox)")


def test_voc_images_turned_by_exif(voc, capsys):
    """The stated size tells which of the two an annotation is of; for the same size --exif does, and it is written."""
    for stem, (height, width), orientation in (("a", (20, 30), 3), ("b", (20, 20), 6), ("c", (30, 20), 8)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        put_image(voc / "JPEGImages" / f"{stem}.jpg", height, width, exif=exif)
        size = (20, 20) if stem == "b" else (30, 20)
        put(voc / "Annotations" / f"{stem}.xml", xml(xml_object(), filename=f"{stem}.jpg", size=size))
    write_voc(str(voc))
    said = capsys.readouterr().err
    assert "2 of 3 images are turned or mirrored by EXIF" in said and "'JPEGImages/a.jpg', 'JPEGImages/b.jpg'" in said
    assert CocoBoxes(*datasets(str(voc))[0]).exif == "upright"
    write_voc(str(voc), exif="stored")
    assert CocoBoxes(*datasets(str(voc))[0]).exif == "stored"
    assert [row["width"] for row in read(voc)["images"]] == [30, 20, 30]


@pytest.mark.parametrize("content, part", [
    ("", "not XML"), (b"\xff\xd8", "not XML"), ("<annotation><object>", "not XML"),
    ("<kml/>", "not <annotation>"),
    ("<?xml version='1.0' encoding='none'?><annotation/>", "not XML"),
    ("<!DOCTYPE x [<!ENTITY a 'aaaaaaaaaa'>" + "".join(
        f"<!ENTITY {b} '{f'&{a};' * 10}'>" for a, b in zip("abcdefghi", "bcdefghij")) + "]>"
     "<annotation><filename>&j;</filename></annotation>", "not XML"),
    ("<!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><annotation>&a;</annotation>", "not XML"),
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
    """The message has the count and the first five, and stays short."""
    write_voc(str(voc))
    put(voc / "Annotations" / "b.xml", content)
    put(voc / "Annotations" / "c.xml", content)
    refused(write_voc, voc, "2 XML files cannot", "(2): Annotations/b.xml: ", "Annotations/c.xml: ", part)
    with pytest.raises(DataError) as error:
        write_voc(str(voc))
    assert len(str(error.value)) < 700


def test_voc_missing_and_ambiguous_images(voc):
    os.rename(voc / "JPEGImages" / "c.jpg", voc / "JPEGImages" / "d.jpg")
    refused(write_voc, voc, "1 XML file cannot", "without an image", "c.xml ('c.jpg')")
    write_voc(str(voc), skip=True)
    assert [row["file_name"] for row in read(voc)["images"]] == ["JPEGImages/a.jpg", "JPEGImages/b.jpg"]
    put(voc / "Annotations" / "c.xml", xml(filename="a.jpg"))
    refused(write_voc, voc, "2 XML files cannot", "JPEGImages/a.jpg: Annotations/a.xml and Annotations/c.xml")
    for suffix in ("png", "bmp"):
        put_image(voc / "JPEGImages" / f"c.{suffix}")
    put(voc / "Annotations" / "c.xml", xml(filename="none"))
    refused(write_voc, voc, "several images", "c.xml: 'JPEGImages/c.bmp' and 'JPEGImages/c.png'")
    put(voc / "Annotations" / "c.xml", xml(filename="c.png"))
    write_voc(str(voc))
    assert read(voc)["images"][2]["file_name"] == "JPEGImages/c.png"


def test_voc_all_faults_at_once(voc, capsys):
    """Of every kind, whatever it hides behind; --skip leaves these out and says so."""
    for stem in "defghij":
        put_image(voc / "JPEGImages" / f"{stem}.jpg")
    for stem, content in (("d", xml()), ("e", "<kml/>"), ("f", xml(xml_object(""), xml_object(box=(5, 2, 4, 4)))),
                          ("g", xml(size=(31, 20))), ("h", xml()), ("i", xml()), ("j", xml())):
        put(voc / "Annotations" / f"{stem}.xml", content)
    os.remove(voc / "JPEGImages" / "d.jpg")
    put(voc / "JPEGImages" / "h.jpg", b"no image")
    for split, lines in (("train", "a\nb\nc\nd\ne\nf\ng\nh\ni"), ("val", "j")):
        put(voc / "ImageSets" / "Main" / f"{split}.txt", lines)
    refused(write_voc, voc, "5 XML files cannot", "d.xml ('')", "e.xml: its root", "f.xml: object 1 has no name",
            "f.xml: object 2 has a box whose", "g.xml: 31 x 20, not 30 x 20", "JPEGImages/h.jpg cannot be decoded")
    capsys.readouterr()
    write_voc(str(voc), skip=True)
    assert [row["file_name"][11] for row in read(voc)["images"]] == [*"abci"]
    assert "5 XML files cannot be converted, left out: " in capsys.readouterr().err


def test_voc_lists_that_name_no_xml(voc):
    put(voc / "ImageSets" / "Main" / "train.txt", "a\n\n../b\nc 1\nx\n")
    refused(write_voc, voc, "train.txt: ", "name no file", "(2): line 4, 'c 1', line 5, 'x'")
    put(voc / "ImageSets" / "Main" / "train.txt", "\n")
    refused(write_voc, voc, "nothing to train on")
    os.rename(voc / "ImageSets" / "Main" / "train.txt", voc / "ImageSets" / "Main" / "val.txt")
    put(voc / "ImageSets" / "Main" / "val.txt", "a")
    refused(write_voc, voc, "nothing to train on")


def test_voc_an_image_is_never_that_of_another_part(tmp_path):
    """train/2.xml has lost its image, val/2.jpg its XML."""
    for stem in ("train/1", "val/1", "val/2"):
        put_image(tmp_path / f"{stem}.jpg")
    for stem in ("train/1", "val/1", "train/2"):
        put(tmp_path / f"{stem}.xml", xml(xml_object(), filename=f"{stem[-1]}.jpg"))
    refused(write_voc, tmp_path, "1 XML file cannot", "without an image", "train/2.xml")
    put(tmp_path / "val" / "2.xml", xml(xml_object("bus"), filename="2.jpg"))
    write_voc(str(tmp_path), skip=True)
    assert [row[:2] for row in boxes(tmp_path, "val")] == [("val/1.jpg", "car"), ("val/2.jpg", "bus")]


def test_voc_the_nearest_xml_has_the_image(tmp_path, capsys):
    """And of two that are equally near neither has it."""
    for folder in ("a", "b", "c"):
        put(tmp_path / "xml" / folder / "1.xml", xml(xml_object(folder), filename="1.jpg"))
    put_image(tmp_path / "images" / "b" / "1.jpg")
    put_image(tmp_path / "images" / "d" / "2.jpg")
    put_image(tmp_path / "images" / "3.jpg")
    put(tmp_path / "xml" / "3.xml", xml(filename="3.jpg"))
    refused(write_voc, tmp_path, "2 XML files cannot", "images/b/1.jpg: xml/a/1.xml and xml/b/1.xml and xml/c/1.xml")
    write_voc(str(tmp_path), skip=True)
    assert boxes(tmp_path) == [("images/b/1.jpg", "b", [2, 4, 10, 5])]
    assert "1 image without XML, left out ('images/d/2.jpg')" in capsys.readouterr().err
    os.remove(tmp_path / "xml" / "b" / "1.xml")
    put(tmp_path / "xml" / "3.xml", xml(xml_object(), filename="3.jpg"))
    refused(write_voc, tmp_path, "2 XML files cannot", "images/b/1.jpg: xml/a/1.xml and xml/c/1.xml")


def test_voc_lists_without_the_suffix_of_photo_jpg_xml(tmp_path):
    for stem in ("a", "b"):
        put_image(tmp_path / f"{stem}.jpg")
        put(tmp_path / f"{stem}.jpg.xml", xml(xml_object(), filename=""))
    put(tmp_path / "train.txt", "a\n")
    put(tmp_path / "val.txt", "b.jpg\n")
    write_voc(str(tmp_path))
    assert boxes(tmp_path)[0][0] == "a.jpg" and boxes(tmp_path, "val")[0][0] == "b.jpg"


def test_options_of_the_command_line(voc, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    put_image(voc / "JPEGImages" / "a.jpg", 20, 20, exif=exif)
    put(voc / "Annotations" / "a.xml", xml(xml_object(), filename="a.jpg", size=(20, 20)))
    put(voc / "Annotations" / "c.xml", "no XML")
    main(["voc", str(voc), "--skip", "--pixels-from", "0", "--exif", "stored", "--max-pixels", "500"])
    assert boxes(voc) == [("JPEGImages/a.jpg", "car", [3, 5, 9, 4])]
    assert read(voc)["info"]["exif"] == "stored"
    assert "have more than 500 pixels" in capsys.readouterr().err


def test_voc_masks_beside_the_xml_are_not_the_photographs(tmp_path):
    """As in Oxford-IIIT Pet: annotations/trimaps is nearer to annotations/xmls than images."""
    put_image(tmp_path / "images" / "1.jpg")
    put_image(tmp_path / "annotations" / "trimaps" / "1.png")
    put(tmp_path / "annotations" / "xmls" / "1.xml", xml(xml_object(), filename="1.jpg"))
    write_voc(str(tmp_path))
    assert [row[0] for row in boxes(tmp_path)] == ["images/1.jpg"]


def test_voc_lists_of_two_years_with_the_same_stems(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        for stem in ("1", "2"):
            put_image(tmp_path / year / "JPEGImages" / f"{stem}.jpg")
            put(tmp_path / year / "Annotations" / f"{stem}.xml", xml(xml_object(), filename=f"{stem}.jpg"))
        put(tmp_path / year / "ImageSets" / "Main" / "train.txt", "1")
        put(tmp_path / year / "ImageSets" / "Main" / "val.txt", "2")
    write_voc(str(tmp_path))
    assert [row[0] for row in boxes(tmp_path)] == [f"{year}/JPEGImages/1.jpg" for year in ("VOC2007", "VOC2012")]
    assert [row[0] for row in boxes(tmp_path, "val")] == [f"{year}/JPEGImages/2.jpg" for year in ("VOC2007", "VOC2012")]


def test_voc_names_that_differ_in_case(tmp_path):
    for image, name in (("IMG_1.JPG", "img_1.xml"), ("u\u0308.jpg", "\u00fc.xml"), ("x.jpg", "x.xml"),
                        ("X.jpg", "X.XML")):
        put_image(tmp_path / image, format="JPEG")
        put(tmp_path / name, xml(xml_object("car" if name != "X.XML" else "bus"), filename=""))
    write_voc(str(tmp_path))
    assert [row[1] for row in boxes(tmp_path) if row[0] in ("x.jpg", "X.jpg")] == ["bus", "car"]
    assert len(boxes(tmp_path)) == 4
