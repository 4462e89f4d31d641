"""Images on disk: decoded, turned as their annotation states, found in folders. Sizes are (height, width), pixels."""
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from formats.coco import CocoBoxes, DataError, UndecodableImage, image_folder
from formats.files import warn

# EXIF's tag and its values under which the file holds rows and columns exchanged.
ORIENTATION, TRANSPOSED = 0x0112, (5, 6, 7, 8)


def as_stated(image: Image.Image, path: str, size: tuple[int, int]) -> Image.Image:
    """The image turned as its annotation sees it: `size` (height, width) decides whether EXIF is obeyed.

    Raises DataError where neither way fits; to turn the pixels anyway would hide a wrong annotation."""
    height, width = size
    if image.size == (width, height):
        return image
    sideways = image.getexif().get(ORIENTATION) in TRANSPOSED
    if sideways and image.size == (height, width):
        return ImageOps.exif_transpose(image)
    raise DataError(f"{path} is {image.width} x {image.height} pixels (width x height), "
                    f"its annotation says {width} x {height}")


def as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):               # 16 bits a pixel, which Pillow would clip at 255, not scale
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def load_image(path: str, size: tuple[int, int] | None = None) -> Image.Image:
    """RGB image of the (height, width) that its annotation states; None: as it is, turned as EXIF says.

    Raises UndecodableImage, DataError."""
    try:
        with Image.open(path) as image:
            return as_rgb(as_stated(image, path, size) if size else ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Exception as error:                   # Pillow: OSError, SyntaxError, ValueError, struct.error, ...
        raise UndecodableImage(f"{path} cannot be decoded: {str(error) or type(error).__name__}") from None


def check_sizes(annotations: CocoBoxes, at_most: int = 2000) -> None:
    """Compares the headers of up to `at_most` images, evenly spaced, with the annotation. Raises DataError.

    An image without a readable header passes with a warning: training skips it, evaluation stops at it."""
    checked = np.unique(np.linspace(0, len(annotations) - 1, min(at_most, len(annotations))).astype(int))
    wrong = []
    for path, size in ((annotations.path(i), annotations.size(i)) for i in checked):
        try:
            with Image.open(path) as image:
                as_stated(image, path, size)
        except DataError as error:
            wrong.append(str(error))
        except Exception as error:
            warn(f"{path} cannot be decoded: {error}")
    if wrong:
        raise DataError(f"{annotations.json_path}: {len(wrong)} of {len(checked)} images looked at have "
                        f"another size than it states, the first: {wrong[0]}")


def read_header(path: Path) -> tuple[tuple[int, int], int]:
    """(height, width) of the file and EXIF's orientation, 1 where it has none. Raises DataError."""
    try:
        with Image.open(path) as image:
            return (image.height, image.width), image.getexif().get(ORIENTATION, 1)
    except Exception as error:                   # Pillow: OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"image {path} cannot be read: {str(error) or type(error).__name__}") from None


def files_in(folder: Path) -> list[Path]:
    """All files below a folder, sorted, less the hidden ones."""
    return sorted(Path(where) / name for where, _, names in os.walk(folder) for name in names if name[0] != ".")


def images_in(root: Path, folder: Path) -> list[str]:
    """Paths within root of the images below a folder: what Pillow can open, going by the suffix."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return [path.relative_to(root).as_posix() for path in files_in(folder) if path.suffix.lower() in suffixes]


def find_images(paths: list[str], out: Path) -> list[tuple[str, str]]:
    """(path, name within the folder that was given) of every image among `paths`, each file once.

    Folders are searched to the bottom, but for `out` and hidden files. Raises DataError where a path does not exist,
    a folder is `out` itself, or there is no image at all.
    """
    found = {}
    for path in paths:
        if os.path.isdir(path):
            if Path(path).resolve() == out.resolve():
                raise DataError(f"{path} is to be read and written: name another folder with --out")
            names = images_in(Path(path), Path(path))
        elif os.path.exists(path):
            path, names = os.path.split(path)
            names = [names]
        else:
            raise DataError(f"{path} does not exist")
        results = out.resolve() if Path(path).resolve() in out.resolve().parents else None  # of an earlier call
        for name in names:
            real = Path(path, name).resolve()
            if results not in real.parents:
                found.setdefault(real, (os.path.join(path, name), name))
    if not found:
        raise DataError(f"no images in {', '.join(paths)}")
    return list(found.values())


def folder_of_images(path: str, first: str) -> str | None:
    """The folder of an annotation file's images, going by the first of them; None where it is found nowhere."""
    return next((folder for folder in candidates(path) if os.path.isfile(os.path.join(folder, first))), None)


def candidates(path: str) -> list[str]:
    """Where the images of an annotation file usually are."""
    folder, name = os.path.split(path)
    found = [folder, os.path.join(folder, "images")]
    split = re.fullmatch(r"instances_(.+)\.json", name)
    if split and os.path.basename(os.path.abspath(folder)) == "annotations":
        root = os.path.normpath(os.path.join(folder, os.pardir))
        images = os.path.join(root, split[1]), image_folder(root, root, split[1].removesuffix("2017")), root
        found = [*images, *found]
    return [folder or os.curdir for folder in dict.fromkeys(found)]
