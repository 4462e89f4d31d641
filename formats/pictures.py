"""Images on disk: headers read, pixels decoded, files found in folders. Sizes are (height, width) in pixels.

What a file leaves open is decided here, for every program alike: an image is turned upright as its EXIF orientation
requires (`is_turned`), transparent parts become white, more than 8 bits are scaled (`eight_bits`), of several pages or
frames the first is taken. `remarks` says which images of a data set that concerns.
"""
import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from formats.coco import (MAX_PIXELS, STORED, UPRIGHT, CocoBoxes, DataError, UndecodableImage, first_five,
                          image_folder)
from formats.files import warn

# EXIF's tag, and its values for images that are stored with rows and columns exchanged
ORIENTATION, TRANSPOSED = 0x0112, (5, 6, 7, 8)
# tags of a TIFF: the largest value of a sample, as integer and as any number, and GDAL's mark for "no data"
MAX_SAMPLE, ANY_MAX_SAMPLE, NO_DATA = 281, 341, 42113

HIDDEN = ("@eaDir", "@__thumb", "#recycle", "__MACOSX")              # folders of thumbnails and of other systems
NOT_PICTURES = ("BUFR", "GRIB", "HDF5", "MPEG")                      # recognised by Pillow, never decoded
CAMERA = (".heic .heif .hif .dng .cr2 .cr3 .nef .nrw .arw .raf .orf .rw2 .pef .srw .raw .jxl").split()


def undecodable_limit(images: int) -> int:
    """How many images of a data set training skips before it gives up: 1 %, but 10 at least and 100 at most."""
    return min(100, max(10, images // 100))


# --------------------------------------------------------------------------------------------- headers

class Header(NamedTuple):
    """What a file says of its image before it is decoded."""
    size: tuple[int, int]        # (height, width) as the file stores it
    orientation: int             # EXIF; 1: upright
    transparent: bool
    deep: bool                   # more than 8 bits a value
    several: bool                # pages or frames

    @property
    def upright(self) -> tuple[int, int]:
        """(height, width) of the upright image."""
        return self.size[::-1] if self.orientation in TRANSPOSED else self.size

    @property
    def ambiguous(self) -> bool:
        """Whether the image is turned or mirrored by EXIF and has the same size before and after."""
        return self.orientation != 1 and self.size == self.upright


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Pillow's image, not decoded yet, of any number of pixels: `load_image` has a limit of its own."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def header_of(image: Image.Image) -> Header:
    # the base class's method: that of a PNG decodes the image to find what stands behind its pixels
    orientation = Image.Image.getexif(image).get(ORIENTATION, 1)
    return Header((image.height, image.width), orientation if orientation in range(1, 9) else 1,
                  image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info,
                  image.mode[0] in "IF" or is_deep_colour(image),
                  # cameras store a preview behind the photograph (MPO)
                  bool(getattr(image, "is_animated", False)) and image.format != "MPO")


def read_header(path: str | Path) -> Header:
    """Raises UndecodableImage."""
    try:
        with opened(path) as image:
            return header_of(image)
    except Exception as error:                   # Pillow: OSError, SyntaxError, ValueError, struct.error, ...
        raise UndecodableImage(f"{path} cannot be decoded: {reason(path, error)}") from None


def reason(path: str | Path, error: Exception) -> str:
    """Why an image cannot be decoded, and what to do about it where that is known."""
    if Path(path).suffix.lower() in CAMERA:
        return "Pillow cannot read this format; convert it to JPEG or PNG"
    return str(error).split("\n")[0] or type(error).__name__


def is_turned(header: Header, path: str | Path, size: tuple[int, int], exif: str = UPRIGHT) -> bool:
    """Whether the image with the `size` that its annotation states is the upright one, not that of the stored pixels.

    `exif`, UPRIGHT or STORED, decides if both have that size. Raises DataError if neither has; turning the pixels
    anyway would hide a wrong annotation."""
    if size not in (header.size, header.upright):
        (height, width), (stated_height, stated_width) = header.size, size
        raise DataError(f"{path} is {width} x {height} pixels (width x height), "
                        f"but its annotation states {stated_width} x {stated_height}")
    return exif == UPRIGHT if header.size == header.upright else size == header.upright


def remarks(headers: dict[str, Header], exif: str = UPRIGHT, max_pixels: int = MAX_PIXELS) -> list[str]:
    """What reading these images changes or leaves out, a line for each kind. headers: by file name."""
    other = STORED if exif == UPRIGHT else UPRIGHT
    kinds = ((lambda h: h.ambiguous, "are turned or mirrored by EXIF, and their size does not tell whether the boxes "
              f"are those of the upright image: taken {exif}; --exif {other} decides otherwise"),
             (lambda h: h.several, "have several pages or frames: only the first is read"),
             (lambda h: h.transparent, "have an alpha channel: what is transparent becomes white"),
             (lambda h: h.deep, "have more than 8 bits a value: scaled, so that white is the smallest power of two "
              "above the largest value"),
             (lambda h: h.size[0] * h.size[1] > max_pixels, f"have more than {max_pixels} pixels and are not read: "
              "raise --max-pixels"))
    lines = []
    for concerns, what in kinds:
        names = [repr(name) for name, header in headers.items() if concerns(header)]
        if names:
            lines.append(f"{len(names)} of {len(headers)} images {what} ({first_five(names)})")
    return lines


def check_sizes(annotations: CocoBoxes, at_most: int = 2000) -> None:
    """Compare the headers of up to `at_most` images, evenly spaced, with the annotations. Raises DataError.

    An unreadable header is a warning: training skips the image, evaluation stops at it. So are the `remarks`."""
    checked = np.unique(np.linspace(0, len(annotations) - 1, min(at_most, len(annotations))).astype(int))
    wrong, headers = [], {}
    for path, size in ((annotations.path(i), annotations.size(i)) for i in checked):
        try:
            headers[path] = read_header(path)
            is_turned(headers[path], path, size)
        except UndecodableImage as error:
            warn(str(error))
        except DataError as error:
            wrong.append(str(error))
    if wrong:
        raise DataError(f"{annotations.json_path}: {len(wrong)} of {len(checked)} images checked have another size "
                        f"than it states, the first: {wrong[0]}")
    for line in remarks(headers, annotations.exif, annotations.max_pixels):
        warn(f"{annotations.json_path}: {line}")


# -------------------------------------------------------------------------------------------- decoding

def load_image(path: str, size: tuple[int, int] | None = None, exif: str = UPRIGHT,
               max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB image: with the `size` that its annotation states (see is_turned); without one, turned as `exif` says.

    Raises UndecodableImage, DataError."""
    try:
        with opened(path) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width} x {image.height} are more than {max_pixels} pixels; raise --max-pixels")
            deep_colour = is_deep_colour(image)
            image.load()
            header = header_of(image)
            turned = is_turned(header, path, size, exif) if size else exif == UPRIGHT
            image = as_rgb(ImageOps.exif_transpose(image) if turned and header.orientation != 1 else image)
            if deep_colour and np.asarray(image).max() < 64:
                raise ValueError("its colours use less than 14 of 16 bits, of which Pillow reads the upper 8; convert "
                                 "it to 8 bits")
            return image
    except DataError:
        raise
    except Exception as error:
        raise UndecodableImage(f"{path} cannot be decoded: {reason(path, error)}") from None


def read_image(annotations: CocoBoxes, i: int) -> Image.Image:
    """Image i of a data set, RGB, with the size that the annotations state. Raises UndecodableImage, DataError."""
    return load_image(annotations.path(i), annotations.size(i), annotations.exif, annotations.max_pixels)


def is_deep_colour(image: Image.Image) -> bool:
    """Whether an image that is not decoded yet has 16 bits a colour, of which Pillow reads the upper 8."""
    return re.search(r"(RGB[AX]?|LA|CMYK);16", str(getattr(image, "tile", ""))) is not None


def as_rgb(image: Image.Image) -> Image.Image:
    """Raises ValueError."""
    if image.mode[0] in "IF":                    # integers of 16 or 32 bits, floats: Pillow would clip them at 255
        tags = getattr(image, "tag_v2", {})
        image = Image.fromarray(eight_bits(np.asarray(image), tags.get(MAX_SAMPLE, tags.get(ANY_MAX_SAMPLE)),
                                           tags.get(NO_DATA)))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def eight_bits(values: np.ndarray, largest: float | None = None, no_data: str | None = None) -> np.ndarray:
    """Brightness of any type as uint8. 0 is black; white is the `largest` value by the file. If it states none, white
    is 1 for floats up to 1, else the smallest power of two, of 256 at least, above the values themselves.

    NaN and the value `no_data`, which some files have outside of their image, are black. Raises ValueError for
    negative and infinite values, whose range is not known."""
    whole = values.dtype.kind in "iu"
    values = np.where(np.isnan(values), 0, values).astype(np.float64)
    if no_data is not None:
        values[values == float(no_data)] = 0
    low, high = values.min(), values.max()
    if low < 0 or not np.isfinite(high):
        raise ValueError(f"its values from {low:g} to {high:g} have no range that is known; convert it to 8 bits")
    if largest is not None:
        white = float(np.max(largest)) + whole
    else:
        white = 1 if high <= 1 and not whole else 2 ** max(8, int(np.floor(np.log2(max(high, 1)))) + 1)
    return np.clip(values * (256 / white), 0, 255).astype(np.uint8)


def as_image(source) -> Image.Image:
    """An RGB image from a path or a Pillow image, both turned by EXIF, or uint8 values (height, width, 3)."""
    if isinstance(source, (str, os.PathLike)):
        return load_image(os.fspath(source))
    if isinstance(source, Image.Image):
        return as_rgb(ImageOps.exif_transpose(source))
    return as_rgb(Image.fromarray(np.asarray(source.cpu() if hasattr(source, "cpu") else source)))


# ---------------------------------------------------------------------------------------------- finding

def files_in(folder: Path) -> list[Path]:
    """All files below a folder, sorted, without hidden ones. Links to folders are followed, each folder once."""
    root, seen, found = os.path.realpath(folder), set(), []
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        around = where != str(folder) and os.path.commonpath([root, real]) == real     # a link to a folder above
        if real in seen or around:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted((name for name in folders if name[0] != "." and name not in HIDDEN),
                            key=lambda name: (os.path.islink(os.path.join(where, name)), name))
        found += [Path(where) / name for name in names if name[0] != "."]
    return sorted(found)


def is_image(path: Path) -> bool:
    """Whether Pillow can decode it, judged by its suffix."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    return kind in Image.OPEN and kind not in NOT_PICTURES


def images_in(root: Path, folder: Path) -> list[str]:
    """The images below a folder as paths within root."""
    return [path.relative_to(root).as_posix() for path in files_in(folder) if is_image(path)]


def left_out(files: list[str]) -> list[str]:
    """What is to be said of files that are no images, and of nothing else that is read: a line for each kind."""
    lines = []
    for camera, what in ((True, "are of a format that Pillow cannot read and are left out; convert them to JPEG or PNG"),
                         (False, "are left out: no images")):
        names = [repr(name) for name in files if (Path(name).suffix.lower() in CAMERA) == camera]
        if names:
            lines.append(f"{len(names)} files {what} ({first_five(names)})")
    return lines


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
