"""pictures.py: images decoded, turned and found."""
import os

import numpy as np
import pytest
from PIL import Image

from formats.coco import CocoBoxes, DataError
from formats.pictures import check_sizes, find_images, load_image
from helpers import noise_image, write_set


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1"])
def test_other_modes_become_rgb(tmp_path, mode):
    source = noise_image(0, 20, 30).convert(mode)
    path = str(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"))
    source.save(path)
    image = load_image(path, (20, 30))
    assert image.mode == "RGB" and np.array_equal(np.array(image), np.array(source.convert("RGB")))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16)).save(tmp_path / "x.png")
    assert np.array(load_image(str(tmp_path / "x.png"), (1, 4)))[0, :, 1].tolist() == [0, 1, 128, 255]
    Image.fromarray(np.array([[0, 256, 32768, 65535]], np.int32)).save(tmp_path / "x.tif")
    assert np.array(load_image(str(tmp_path / "x.tif"), (1, 4)))[0, :, 1].tolist() == [0, 1, 128, 255]


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
