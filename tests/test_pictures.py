"""pictures.py: images decoded, turned and found."""
import json
import os
import socket
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from formats.coco import STORED, UPRIGHT, CocoBoxes, DataError, UndecodableImage, datasets
from formats.commands import main
from formats.pictures import (as_image, check_sizes, decoded_formats, files_in, find_images, header_of, left_out,
                              load_image, read_header, read_image, remarks)
from helpers import noise_image, write_set
from predict import Images


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1"])
def test_other_modes_become_rgb(tmp_path, mode):
    source = noise_image(0, 20, 30).convert(mode)
    path = str(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"))
    source.save(path)
    image = load_image(path, (20, 30))
    assert image.mode == "RGB" and np.array_equal(np.array(image), np.array(source.convert("RGB")))


# ----------------------------------------------------------------------------------------------- depth

NAN = float("nan")


@pytest.mark.parametrize("kind, values, tags, expected", [
    (np.uint16, [0, 256, 32768, 65535], {}, [0, 1, 128, 255]),
    (np.uint16, [0, 16, 2048, 4095], {}, [0, 1, 128, 255]),                      # 12 bits of a camera
    (np.uint16, [0, 1, 128, 255], {}, [0, 1, 128, 255]),
    (np.uint16, [0, 1, 0, 1], {}, [0, 1, 0, 1]),
    (np.uint16, [0, 0, 0, 0], {}, [0, 0, 0, 0]),
    (np.uint16, [0, 16, 512, 1024], {281: 4095}, [0, 1, 32, 64]),                # the file states the largest value
    (np.uint16, [0, 256, 32768, 65535], {281: 4095}, [0, 1, 128, 255]),          # and is wrong
    (np.uint16, [0, 256, 32768, 65535], {262: 0}, [255, 254, 127, 0]),           # 0 is white
    (np.int32, [0, 256, 32768, 65535], {}, [0, 1, 128, 255]),
    (np.int32, [0, 1, 128, 255], {}, [0, 1, 128, 255]),
    (np.int32, [0, 2**12, 2**19, 10**6], {}, [0, 1, 128, 244]),
    (np.int32, [0, -9999, 2048, 4095], {42113: "-9999"}, [0, 0, 128, 255]),
    (np.float32, [0, 0.25, 0.5, 1], {}, [0, 64, 128, 255]),
    (np.float32, [0, 0.25, 0.5, 1.02], {}, [0, 64, 128, 255]),                   # resampling went beyond
    (np.float32, [0, 1, 128, 255], {}, [0, 1, 128, 255]),
    (np.float32, [0, 2, 5000, 10000], {}, [0, 0, 78, 156]),
    (np.float32, [NAN, 0.25, 0.5, 1], {42113: "nan"}, [0, 64, 128, 255]),
    (np.float32, [-3.4028235e38, 64, 128, 255], {42113: "-3.40282346638529e+38"}, [0, 64, 128, 255]),
    (np.float32, [-np.inf, 64, 128, 255], {42113: "-1.7976931348623157e+308"}, [0, 64, 128, 255]),
    (np.float32, [NAN, NAN, NAN, NAN], {}, [0, 0, 0, 0])])
def test_more_than_eight_bits_are_scaled_not_clipped(tmp_path, kind, values, tags, expected):
    for suffix in ("tif", "png") if kind is np.uint16 and not tags else ("tif",):
        path = str(tmp_path / f"x.{suffix}")
        Image.fromarray(np.array([values], kind)).save(path, **{"tiffinfo": tags} if tags else {})
        if 262 in tags:                                           # which Pillow writes as it likes
            data = Path(path).read_bytes()
            Path(path).write_bytes(data.replace(struct.pack("<HHII", 262, 3, 1, 1), struct.pack("<HHII", 262, 3, 1, 0)))
        assert read_header(path).deep
        assert np.array(load_image(path, (1, 4)))[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("kind, values", [
    (np.int32, [-1, 0, 5, 9]), (np.float32, [-2, 0, 1, 2]), (np.float32, [0, 1, 2, float("inf")])])
def test_values_without_a_known_range_are_refused(tmp_path, kind, values):
    path = str(tmp_path / "x.tif")
    Image.fromarray(np.array([values], kind)).save(path)
    with pytest.raises(UndecodableImage, match="have no range that is known; convert it to 8 bits"):
        load_image(path)


def png(path: str, values: np.ndarray) -> None:
    """A PNG of 16 bits a value, (H, W, channels), which Pillow cannot write."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)),
              (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks))


def test_sixteen_bits_a_colour(tmp_path):
    path = str(tmp_path / "x.png")
    colour, full = [0x1000, 0x8000, 0xFFFF], 0xFFFF
    for values, expected in ((colour, [16, 128, 255]), ([*colour, full], [16, 128, 255]),
                             ([*colour, 0], [255] * 3), ([0x8000, full], [128] * 3), ([0x8000, 0], [255] * 3)):
        png(path, np.array([[values]]))
        header = read_header(path)
        assert header.deep and header.transparent == (len(values) != 3)
        assert np.array(load_image(path)).tolist() == [[expected]]
    for twelve_bits in ([0, 100, 4095], [0, 100, 4095, 4095], [0, 100, 4095, full], [0, 100, 4095, 0]):
        png(path, np.array([[twelve_bits]]))
        with pytest.raises(UndecodableImage, match="less than 14 of 16 bits.*convert it to 8 bits"):
            load_image(path)


@pytest.mark.parametrize("name, mode, options", [
    ("x.png", "RGBA", {}), ("x.png", "LA", {}), ("x.webp", "RGBA", {"lossless": True}), ("x.tif", "RGBA", {}),
    ("x.tif", "La", {}), ("x.png", "P", {"transparency": 0}), ("x.gif", "P", {"transparency": 0}),
    ("x.png", "L", {"transparency": 0}), ("x.png", "I;16", {"transparency": 0})])
def test_what_is_transparent_becomes_white(tmp_path, name, mode, options):
    """The left pixel is transparent black, the right one opaque and grey."""
    image = Image.fromarray(np.array([[[0, 0, 0, 0], [80, 80, 80, 255]]], np.uint8))
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1]], np.uint8), "L")
        image.putpalette([0, 0, 0, 80, 80, 80])
    elif mode == "I;16":
        image = Image.fromarray(np.array([[0, 80]], np.uint16))
    else:
        image = image.convert("LA").convert(mode.upper())
    image.save(tmp_path / name, **options)
    if mode == "La":                                              # multiplied by alpha, which Pillow cannot write
        data = (tmp_path / name).read_bytes()
        straight, multiplied = (struct.pack("<HHII", 338, 3, 1, value) for value in (2, 1))
        (tmp_path / name).write_bytes(data.replace(straight, multiplied))
        with Image.open(tmp_path / name) as image:
            assert image.mode == "La"
    assert read_header(tmp_path / name).transparent
    assert np.array(load_image(str(tmp_path / name)))[0].tolist() == [[255] * 3, [80] * 3]
    if mode != "I;16":
        with Image.open(tmp_path / name) as image:
            assert np.array(as_image(image))[0].tolist() == [[255] * 3, [80] * 3]


@pytest.mark.parametrize("name, several", [("x.gif", True), ("x.webp", True), ("x.tif", True), ("x.png", True),
                                           ("x.mpo", False)])
def test_of_several_pages_the_first_is_read(tmp_path, name, several):
    first, second = Image.new("RGB", (32, 24), "red"), Image.new("RGB", (32, 24), "blue")
    first.save(tmp_path / name, save_all=True, append_images=[second])
    header = read_header(tmp_path / name)
    assert header.several == several and header.size == (24, 32)
    red, green, blue = np.array(load_image(str(tmp_path / name))).reshape(-1, 3).mean(0)
    assert red > 250 and green < 5 and blue < 5
    first.save(tmp_path / name)
    assert not read_header(tmp_path / name).several


# --------------------------------------------------------------------------------------------- turning

BACK = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270}     # from the upright image to that which a file with this orientation stores


def save_turned(upright: Image.Image, orientation: int, path: Path) -> Image.Image:
    """Save an image with this orientation; "late.png" has it behind the pixels. Returns the stored image."""
    stored, exif = upright, Image.Exif()
    if orientation > 1:
        stored = upright.transpose(BACK[orientation])
    exif[0x0112] = orientation
    if path.name.endswith("late.png"):
        stored.save(path)
        data, block = path.read_bytes(), b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(block) - 4) + block + struct.pack(">I", zlib.crc32(block))
        path.write_bytes(data[:-12] + chunk + data[-12:])
    else:
        stored.save(path, exif=exif, **{"lossless": True} if path.suffix == ".webp" else {})
    return stored


@pytest.mark.parametrize("kind", ["png", "late.png", "webp", "tif", "lzw.tif"])
@pytest.mark.parametrize("height, width", [(24, 40), (32, 32)])
def test_every_program_turns_an_image_the_same_way(tmp_path, kind, height, width):
    """Eight orientations: header, check_sizes, pixels with and without a stated size, predict.py and YOLO."""
    upright = noise_image(0, height, width)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "classes.txt").write_text("mark\n")
    stored, paths = [], [tmp_path / "images" / f"{orientation}.{kind}" for orientation in BACK]
    for orientation, path in zip(BACK, paths):
        stored.append(save_turned(upright, orientation, path))
        (tmp_path / "labels" / f"{path.stem}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    images = {exif: Images([str(path) for path in paths], min(height, width), 64,
                           dict(exif=exif, max_pixels=10**6)) for exif in (UPRIGHT, STORED)}
    for i, (path, as_stored) in enumerate(zip(paths, stored)):
        header, name = read_header(path), str(path)
        assert header.orientation == i + 1 and header.upright == (height, width)
        assert header.size == (as_stored.height, as_stored.width)
        for exif, expected in ((UPRIGHT, upright), (STORED, as_stored)):
            assert np.array_equal(load_image(name, exif=exif), expected)
            assert np.array_equal(load_image(name, (expected.height, expected.width), exif), expected)
            if not header.ambiguous:                              # the size decides
                assert np.array_equal(load_image(name, (expected.height, expected.width)), expected)
            sample = images[exif][i]
            assert np.array_equal(sample.image, expected)
            assert sample.original_size == (expected.height, expected.width)
        with Image.open(path) as image:
            assert np.array_equal(as_image(image), upright)       # not decoded before
            assert np.array_equal(as_image(image), upright)       # decoded
    main(["yolo", str(tmp_path)])
    json_path, folder = datasets(str(tmp_path))[0]
    annotations, said = CocoBoxes(json_path, folder), []
    check_sizes(annotations, say=said.append)
    assert len(said) == 1 and f"{7 if height == width else 3} of 8 images are turned or mirrored by EXIF" in said[0]
    assert all(np.array_equal(read_image(annotations, i), upright) for i in range(8))
    annotations = CocoBoxes(json_path, folder, exif=STORED)
    order = [int(Path(annotations.path(i)).name[0]) for i in range(8)]
    for i, orientation in enumerate(order):
        ambiguous = read_header(annotations.path(i)).ambiguous
        assert np.array_equal(read_image(annotations, i), stored[orientation - 1] if ambiguous else upright)


@pytest.mark.parametrize("kind", ["png", "late.png", "jpg", "webp", "tif", "lzw.tif", "gif"])
def test_headers_are_read_without_decoding(tmp_path, monkeypatch, kind):
    path, turned = tmp_path / f"x.{kind}", 1 if kind == "gif" else 3
    save_turned(noise_image(0, 20, 30), turned, path)

    def load(image):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert read_header(path) == ((20, 30), turned, False, False, False)
    if path.suffix == ".png":
        with Image.open(path) as image:
            position = image.fp.tell()
            assert header_of(image).orientation == 3 and image.fp.tell() == position


def test_damaged_exif_is_no_exif(tmp_path):
    image = noise_image(0, 20, 30)
    image.save(tmp_path / "x.png", exif=b"Exif\0\0no such thing")
    assert read_header(tmp_path / "x.png").orientation == 1
    assert np.array_equal(load_image(str(tmp_path / "x.png")), image)
    path = tmp_path / "late.png"
    save_turned(image, 3, path)
    assert read_header(path).orientation == 3
    data = path.read_bytes()
    path.write_bytes(data[:-16] + bytes(4) + data[-12:])          # its check sum
    assert read_header(path).orientation == 1


def test_the_file_states_whether_its_boxes_are_of_stored_pixels(tmp_path):
    json_path, images = write_set(tmp_path, sizes=[(20, 30)], info={"exif": "stored"})
    upright = noise_image(5, 20, 30)
    stored = save_turned(upright, 3, Path(images) / "0.png")
    for exif, expected in ((None, stored), (UPRIGHT, upright), (STORED, stored)):
        assert np.array_equal(read_image(CocoBoxes(json_path, images, exif=exif), 0), expected)
    for info in ({}, None, "stored", {"exif": 1}):
        content = json.loads(Path(json_path).read_text()) | {"info": info}
        Path(json_path).write_text(json.dumps(content))
        assert np.array_equal(read_image(CocoBoxes(json_path, images), 0), upright)


# ----------------------------------------------------------------------------------- what there is to say

def test_remarks_count_each_kind(tmp_path):
    plain = noise_image(0, 20, 30)
    plain.save(tmp_path / "plain.png")
    for orientation in (2, 3, 4, 6):
        save_turned(plain, orientation, tmp_path / f"{orientation}.png")
    noise_image(0, 21, 30).save(tmp_path / "large.png")
    for name in ("clear1.png", "clear2.png"):
        plain.convert("RGBA").save(tmp_path / name)
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "deep.tif")
    plain.save(tmp_path / "pages.tif", save_all=True, append_images=[plain])
    headers = {path.name: read_header(path) for path in sorted(tmp_path.iterdir())}
    lines = remarks(headers, max_pixels=600)
    assert [line.split(" images ")[0] for line in lines] == ["3 of 10", "1 of 10", "1 of 10", "2 of 10", "1 of 10"]
    for line, words, names in zip(lines, ("taken upright; --exif stored", "only the first", "--max-pixels", "white",
                                          "more than 8 bits"),
                                  ("'2.png', '3.png', '4.png'", "'pages.tif'", "'large.png'",
                                   "'clear1.png', 'clear2.png'", "'deep.tif'")):
        assert words in line and line.endswith(f"({names})"), line
    assert "taken stored; --exif upright" in remarks(headers, STORED)[0]
    assert remarks(headers, None, 600) == lines[1:] and remarks(headers, levels=("note",)) == lines[3:]
    assert remarks({"plain.png": headers["plain.png"]}) == []


# --------------------------------------------------------------------------------------------- size

def test_the_limit_is_ours_and_pillows_stays_as_it_was(tmp_path, monkeypatch):
    """Pillow's own limit is an error at twice the number, and a warning below."""
    path, image = str(tmp_path / "x.png"), noise_image(0, 20, 30)
    image.save(path)
    for pillows in (100, 400):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
        assert read_header(path).size == (20, 30)
        assert np.array_equal(load_image(path), image) and np.array_equal(as_image(path), image)
        assert np.array_equal(load_image(path, max_pixels=600), image)
        with pytest.raises(UndecodableImage, match="its 30 x 20 pixels are more than 599; raise --max-pixels"):
            load_image(path, max_pixels=599)
        assert Image.MAX_IMAGE_PIXELS == pillows


# ----------------------------------------------------------------------------------- arrays and tensors

def test_arrays_and_tensors_of_every_usual_form():
    image = noise_image(0, 20, 30)
    rgb = np.array(image)
    for one in (rgb, rgb.tolist(), rgb.astype(np.int64), rgb.astype(np.uint16), rgb.astype(np.float32), rgb / 255,
                np.moveaxis(rgb, 2, 0), np.dstack([rgb, np.full((20, 30), 255, np.uint8)]),
                np.moveaxis(rgb, 2, 0).astype(np.float16), torch.from_numpy(rgb),
                torch.from_numpy(rgb).permute(2, 0, 1),
                (torch.from_numpy(rgb).permute(2, 0, 1) / 255).requires_grad_()):
        assert np.array_equal(as_image(one), image)
    coarse = as_image((torch.from_numpy(rgb).permute(2, 0, 1) / 255).bfloat16())
    assert np.abs(np.array(coarse).astype(int) - rgb).max() <= 2
    grey = rgb[..., 0]
    for one in (grey, grey[..., None], grey[None], grey.astype(np.uint16) * 257, grey / 255, torch.from_numpy(grey)):
        assert np.array_equal(as_image(one), np.repeat(grey[..., None], 3, 2))
    mask = grey > 128
    for one in (mask, np.stack([mask] * 3), torch.from_numpy(mask)):
        assert np.array_equal(as_image(one), np.repeat(mask[..., None] * np.uint8(255), 3, 2))
    clear = np.concatenate([rgb, np.zeros((20, 30, 1), np.uint8)], 2)
    for one in (clear, np.moveaxis(clear, 2, 0), clear / 255):
        assert np.array_equal(as_image(one), np.full_like(rgb, 255))


@pytest.mark.parametrize("source, why", [
    (np.zeros((3, 4, 5, 3)), "(3, 4, 5, 3)"), (np.zeros(7), "(7,)"), (np.zeros((7, 8, 2)), "(7, 8, 2)"),
    (np.zeros((0, 8, 3)), "(0, 8, 3)"), (np.zeros((0, 8)), "(0, 8)"), (np.float32(3), "()"),
    (torch.ones(3, 20, 30) - 2, "no range that is known"), (np.full((4, 4), np.nan), "NaN"),
    (np.array([[0, np.inf]]), "no range that is known"), (np.full((4, 4), -1), "no range that is known"),
    (None, "object"), (np.array([["a"]]), "type <U1"), (np.zeros((4, 4), complex), "complex"), ([[1], [1, 2]], "")])
def test_other_arrays_are_refused_and_told_what_is_wanted(source, why):
    with pytest.raises(ValueError) as error:
        as_image(source)
    assert why in str(error.value) and "an image is a path, a Pillow image, or an array" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_stated_size_decides_whether_exif_is_obeyed(tmp_path):
    path, exif = str(tmp_path / "x.png"), Image.Exif()
    exif[0x0112] = 6                                              # shown after a quarter turn to the right
    source = noise_image(0, 20, 30)
    source.save(path, exif=exif)
    assert np.array_equal(np.array(load_image(path, (20, 30))), np.array(source))
    turned = np.array(load_image(path, (30, 20)))
    assert np.array_equal(turned, np.rot90(np.array(source), -1))


def test_check_sizes_covers_the_first_to_the_last(tmp_path):
    json_path, images = write_set(tmp_path, sizes=[(20, 30)] * 9)
    annotations = CocoBoxes(json_path, images)
    Image.new("RGB", (9, 9)).save(os.path.join(images, "1.png"))
    check_sizes(annotations, at_most=3)                             # the images 0, 4 and 8
    for i in (0, 4, 8):
        Image.new("RGB", (9, 9)).save(os.path.join(images, f"{i}.png"))
    with pytest.raises(DataError, match="3 of 3"):
        check_sizes(annotations, at_most=3)


def test_images_are_found_once_and_results_are_not_input(tmp_path):
    for name in ("one/a.png", "two/a.png", "two/out/old.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    found, others = find_images([str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path / "one/../one/a.png")],
                                tmp_path / "two/out")
    assert not others and found == [(str(tmp_path / "one/a.png"), "a.png"), (str(tmp_path / "two/a.png"), "a.png")]
    assert len(find_images([str(tmp_path / "one")], tmp_path)[0]) == 1  # the results are outside the folder
    with pytest.raises(DataError, match="name another folder with --out"):
        find_images([str(tmp_path / "one")], tmp_path / "one")


def test_hidden_folders_and_links(tmp_path):
    """Links to folders are followed once, the folder itself first; not to those above, and not in circles."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for name in ("root/b/one.png", "root/.hidden/x.png", "root/b/@eaDir/x.png", "root/__MACOSX/x.png", "root/.x.png",
                 "root/b/.ipynb_checkpoints/x.png", "outside/deep/two.png", "root/top.png", "above.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for link, target in (("a", root / "b"), ("c", outside), ("d", outside), ("b/up", root), ("b/further", tmp_path),
                         ("gone.png", root / "none"), ("gone", root / "none")):
        (root / link).symlink_to(target)
    (outside / "deep" / "round").symlink_to(outside)
    names = [path.relative_to(root).as_posix() for path in files_in(root)]
    assert names == ["b/one.png", "c/deep/two.png", "gone", "gone.png", "top.png"]
    (tmp_path / "link").symlink_to(root)                          # the folder itself may be a link
    assert len(files_in(tmp_path / "link")) == 5


def test_other_files_are_named_with_what_to_do(tmp_path):
    for name in ("a.png", "b/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name in ("photo.HEIC", "raw.nef", "notes.txt", "b/boxes.json"):
        (tmp_path / name).write_text("x")
    Image.new("RGB", (8, 8)).save(tmp_path / "really.heic", "JPEG")
    Image.new("RGB", (8, 8)).save(tmp_path / "suffixless", "PNG")
    Image.new("L", (8, 8)).save(tmp_path / "raw.nef", "TIFF")     # raw files are TIFFs, with a preview as first page
    found, others = find_images([str(tmp_path)], tmp_path / "out")
    assert [name for _, name in found] == ["a.png", "b/c.jpg"]
    camera, rest = left_out(others)
    assert camera.startswith("3 files of a format that Pillow cannot read") and "convert to JPEG or PNG" in camera
    assert "photo.HEIC" in camera and "raw.nef" in camera
    assert rest.startswith("3 files not used") and "notes.txt" in rest and "boxes.json" in rest
    given = [str(tmp_path / name) for name in ("suffixless", "really.heic", "photo.HEIC", "raw.nef", "notes.txt")]
    found, others = find_images(given, tmp_path / "out")          # given by name, a file's content counts
    assert [path for path, _ in found] == given[:2] and others == given[2:]
    for path, what in ((given[2], "convert to JPEG or PNG"), (given[4], "1 file not used")):
        with pytest.raises(DataError, match="no images in ") as error:
            find_images([path], tmp_path / "out")
        assert what in str(error.value) and "\n" not in str(error.value)
    for path, what in ((given[3], "convert it to JPEG or PNG"), (given[4], "it is no image that Pillow can read")):
        with pytest.raises(UndecodableImage, match=what):
            load_image(path)
    with pytest.raises(UndecodableImage, match="none.png cannot be decoded: No such file or directory$"):
        load_image(str(tmp_path / "none.png"))


# ------------------------------------------------------------------------------------------ hostile files

@pytest.mark.parametrize("name, head", [("a.jpg", b""), ("a.png", b""), ("a.eps", b""), ("b.png", b"\x1c\x02\x00")])
def test_an_image_that_is_a_program_is_not_run(tmp_path, monkeypatch, name, head):
    """PostScript under any name: Pillow would start Ghostscript."""
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda *command, **_: started.append(command))
    path = tmp_path / name
    path.write_bytes(head + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 30\n%%EndComments\n%%EOF\n")
    for read in (load_image, read_header):
        with pytest.raises(UndecodableImage, match="no image that Pillow can read"):
            read(str(path))
    assert not started and not {"EPS", "IPTC"} & set(decoded_formats()) and {"JPEG", "PNG"} < set(decoded_formats())
    with pytest.raises(DataError, match="no images"):
        find_images([str(path.rename(tmp_path / "a.eps"))], tmp_path / "out")


def test_pipes_sockets_and_devices_are_not_opened(tmp_path, capsys):
    noise_image(0, 8, 8).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "socket.png"))
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "pipe").symlink_to("pipe.jpg")
    found, others = find_images([str(tmp_path)], tmp_path / "out")
    assert [name for _, name in found] == ["a.png"] and others == []
    assert capsys.readouterr().err == "warning: 4 left out: no files, or folders more than 100 deep ({})\n".format(
        ", ".join(repr(str(tmp_path / name)) for name in ("device.png", "pipe", "pipe.jpg", "socket.png")))
    for path in (tmp_path / "pipe.jpg", "/dev/zero"):
        for read in (load_image, read_header):
            with pytest.raises(UndecodableImage, match="no ordinary file"):
                read(str(path))
    with pytest.raises(DataError, match="no ordinary file"):
        CocoBoxes(str(tmp_path / "pipe.jpg"), str(tmp_path))


def test_links_to_themselves_and_deep_folders_are_left_out(tmp_path, capsys):
    noise_image(0, 8, 8).save(tmp_path / "a.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "loop").symlink_to("loop")
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1200):                               # a path of all of them is too long for the system
            os.mkdir("d")
            os.chdir("d")
        found, others = find_images([str(tmp_path)], tmp_path / "loop")
        for _ in range(1200):
            os.chdir("..")
            os.rmdir("d")
    finally:
        os.chdir(here)
    assert [name for _, name in found] == ["a.png", "loop.png"] and others == [str(tmp_path / "loop")]
    assert "1 left out" in (text := capsys.readouterr().err) and text.count("\n") == 1
    with pytest.raises(UndecodableImage, match="levels of symbolic links"):
        load_image(found[1][0])


def test_pillows_warnings_are_not_shown(tmp_path):
    """Under pytest every warning is an error."""
    tiff, palette, exif = (str(tmp_path / name) for name in ("a.tif", "a.png", "a.jpg"))
    noise_image(0, 8, 8).save(tiff, tiffinfo={270: "text"})
    content = Path(tiff).read_bytes()
    entry = content.index(struct.pack("<HHI", 270, 2, 5))
    Path(tiff).write_bytes(content[:entry + 4] + struct.pack("<I", 10 ** 6) + content[entry + 8:])   # truncated
    noise_image(0, 8, 8).quantize().save(palette, transparency=bytes(range(9)))
    noise_image(0, 8, 8).save(exif, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    for path in (tiff, palette, exif):
        assert read_header(path).size == (8, 8)
        assert load_image(path).size == (8, 8)
    with pytest.warns(UserWarning), Image.open(tiff) as image:
        image.load()
        image.getexif()
