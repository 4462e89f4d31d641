"""Images on disk: decoded, turned as their annotation states, found in folders. Sizes are (height, width) in pixels."""
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from formats.coco import CocoBoxes, DataError, UndecodableImage, image_folder
from formats.files import warn

# EXIF's tag, and its values for images that are stored with rows and columns exchanged
ORIENTATION, TRANSPOSED = 0x0112, (5, 6, 7, 8)


def undecodable_limit(images: int) -> int:
    """How many images of a data set training skips before it gives up: 1 %, but 10 at least and 100 at most."""
    return min(100, max(10, images // 100))


# --------------------------------------------------------------------------------------------- decoding

def as_stated(image: Image.Image, path: str, size: tuple[int, int]) -> Image.Image:
    """The image with the `size` that its annotation states: as the file stores it, or else turned by EXIF.

    Raises DataError if neither has that size; turning the pixels anyway would hide a wrong annotation."""
    height, width = size
    if image.size == (width, height):
        return image
    if image.getexif().get(ORIENTATION) in TRANSPOSED and image.size == (height, width):
        return ImageOps.exif_transpose(image)
    raise DataError(f"{path} is {image.width} x {image.height} pixels (width x height), "
                    f"but its annotation states {width} x {height}")


def as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):               # 16 bits a pixel: Pillow would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def load_image(path: str, size: tuple[int, int] | None = None) -> Image.Image:
    """An RGB image of the `size` that its annotation states; without one, turned by EXIF.

    Raises UndecodableImage, DataError."""
    try:
        with Image.open(path) as image:
            return as_rgb(as_stated(image, path, size) if size else ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Exception as error:                   # Pillow: OSError, SyntaxError, ValueError, struct.error, ...
        raise UndecodableImage(f"{path} cannot be decoded: {str(error) or type(error).__name__}") from None


def as_image(source) -> Image.Image:
    """An RGB image from a path or a Pillow image, both turned by EXIF, or uint8 values (height, width, 3)."""
    if isinstance(source, (str, os.PathLike)):
        return load_image(os.fspath(source))
    if isinstance(source, Image.Image):
        return as_rgb(ImageOps.exif_transpose(source))
    return as_rgb(Image.fromarray(np.asarray(source.cpu() if hasattr(source, "cpu") else source)))


def read_header(path: Path) -> tuple[tuple[int, int], int]:
    """(height, width) as the file stores the image, and its EXIF orientation (1: upright). Raises DataError."""
    try:
        with Image.open(path) as image:
            return (image.height, image.width), image.getexif().get(ORIENTATION, 1)
    except Exception as error:
        raise DataError(f"image {path} cannot be read: {str(error) or type(error).__name__}") from None


def check_sizes(annotations: CocoBoxes, at_most: int = 2000) -> None:
    """Compare the headers of up to `at_most` images, evenly spaced, with the annotations. Raises DataError.

    An unreadable header is a warning: training skips the image, evaluation stops at it."""
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
        raise DataError(f"{annotations.json_path}: {len(wrong)} of {len(checked)} images checked have another size "
                        f"than it states, the first: {wrong[0]}")


# ---------------------------------------------------------------------------------------------- finding

def files_in(folder: Path) -> list[Path]:
    """All files below a folder, sorted, without hidden ones."""
    return sorted(Path(where) / name for where, _, names in os.walk(folder) for name in names if name[0] != ".")


def images_in(root: Path, folder: Path) -> list[str]:
    """The images below a folder, judged by suffix, as paths within root."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return [path.relative_to(root).as_posix() for path in files_in(folder) if path.suffix.lower() in suffixes]


def find_images(paths: list[str], out: Path) -> list[tuple[str, str]]:
    """Images among `paths`, files or folders, each once: (path, path within the folder that was given).

    Leaves out `out`, which may hold the results of an earlier call. Raises DataError if a path does not exist, a
    folder is `out` itself, or no image is found."""
    found = {}
    for path in paths:
        if os.path.isdir(path):
            if Path(path).resolve() == out.resolve():
                raise DataError(f"{path} would be read and written: name another folder with --out")
            names = images_in(Path(path), Path(path))
        elif os.path.exists(path):
            path, names = os.path.split(path)
            names = [names]
        else:
            raise DataError(f"{path} does not exist")
        left_out = out.resolve() if Path(path).resolve() in out.resolve().parents else None
        for name in names:
            resolved = Path(path, name).resolve()
            if left_out not in resolved.parents:
                found.setdefault(resolved, (os.path.join(path, name), name))
    if not found:
        raise DataError(f"no images in {', '.join(paths)}")
    return list(found.values())


def folder_of_images(json_path: str, first: str) -> str | None:
    """The usual folder of an annotation file's images that contains its `first` image; None if none does."""
    return next((folder for folder in usual_folders(json_path) if os.path.isfile(os.path.join(folder, first))), None)


def usual_folders(json_path: str) -> list[str]:
    folder, name = os.path.split(json_path)
    folders = [folder, os.path.join(folder, "images")]
    split = re.fullmatch(r"instances_(.+)\.json", name)
    if split and os.path.basename(os.path.abspath(folder)) == "annotations":
        root = os.path.normpath(os.path.join(folder, os.pardir))
        images = image_folder(root, root, split[1].removesuffix("2017"))
        folders = [os.path.join(root, split[1]), images, root, *folders]
    return [folder or os.curdir for folder in dict.fromkeys(folders)]
