"""Images on disk: headers read, pixels decoded, files found in folders. Sizes are (height, width) in pixels.

What a file leaves open is decided here, for every program alike: an image is turned upright as its EXIF orientation
requires (`is_turned`), transparent parts become white, more than 8 bits are scaled (`eight_bits`), of several pages or
frames the first is taken. `remarks` says which images of a data set that concerns.
"""
import contextlib
import functools
import io
import math
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from formats.coco import (MAX_PIXELS, STORED, UPRIGHT, CocoBoxes, DataError, UndecodableImage, first_five,
                          image_folder)
from formats.files import check_ordinary, positive, warn, write_whole

# EXIF's tag, its values for images that are stored with rows and columns exchanged, and what turns each kind upright
ORIENTATION, TRANSPOSED = 0x0112, (5, 6, 7, 8)
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}
TURNED_BACK = {**TURNS, 6: TURNS[8], 8: TURNS[6]}
# tags of a TIFF: its size; whether 0 is white; the largest value of a sample, as integer and as any number; GDAL's mark
# for "no data"
WIDTH, HEIGHT, PHOTOMETRIC, MAX_SAMPLE, ANY_MAX_SAMPLE, NO_DATA = 256, 257, 262, 281, 341, 42113
ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")       # Pillow's modes

HIDDEN = ("@eaDir", "@__thumb", "#recycle", "__MACOSX")              # folders of thumbnails and of other systems
# recognised by Pillow, never decoded; for PostScript (EPS), which IPTC may contain, it starts another program
NOT_PICTURES = ("BUFR", "GRIB", "HDF5", "MPEG", "EPS", "IPTC", "WMF")
DEEPEST = 100                                                        # folders within folders
CAMERA = ".heic .heif .hif .dng .cr2 .cr3 .nef .nrw .arw .raf .orf .rw2 .pef .srw .raw .jxl".split()
WANTED = ("a path, a Pillow image, or an array or tensor (height, width), (height, width, 1, 3 or 4) or (1, 3 or 4, "
          "height, width) of bool, integers from 0, or floats from 0 to 1 or to 255")


def image_options(add: Callable) -> None:
    """The options of the programs that read images: `exif` and `max_pixels`, as CocoBoxes takes them."""
    add("--exif", choices=[UPRIGHT, STORED], help="whether boxes are those of the upright image, as viewers show it, "
        "or of the stored pixels, where the size does not tell: EXIF mirrors the image, or turns it by 180 degrees, or "
        "it is square. None: as an annotation file that is read states in its info, else upright")
    add("--max-pixels", type=positive, default=MAX_PIXELS, metavar="N", help="images of more pixels are not read: a "
        "limit against files made to fill the memory")


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

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Pillow's image, not decoded yet, of any number of pixels: `load_image` has a limit of its own. Pillow's warnings,
    about tags that nothing here follows, are not shown."""
    check_ordinary(path)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=decoded_formats()) as image:
                if image.format == "TIFF" and is_camera_file(path):
                    raise ValueError("Pillow would read the preview of the raw image")
                yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@functools.cache
def decoded_formats() -> list[str]:
    Image.init()
    return [name for name in Image.ID if name not in NOT_PICTURES]


def header_of(image: Image.Image) -> Header:
    """The header of an image that is not decoded yet."""
    tags = getattr(image, "tag_v2", {})          # of a TIFF, whose size some versions of Pillow state as upright
    return Header((tags.get(HEIGHT, image.height), tags.get(WIDTH, image.width)), orientation_of(image),
                  image.mode in ALPHA or "transparency" in image.info,
                  # Pillow reads the upper 8 of 16 bits a colour
                  image.mode[0] in "IF" or bool(re.search("(RGB[AaX]?|LA|CMYK);16", str(getattr(image, "tile", "")))),
                  # the others have a preview behind the photograph, or layers
                  bool(getattr(image, "is_animated", False)) and image.format not in ("MPO", "PSD"))


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation of an image that is not decoded yet, 1 to 8; 1 too if its EXIF is damaged."""
    with contextlib.suppress(Exception):         # Pillow: SyntaxError, struct.error, ...
        # the base class's method: that of a PNG decodes the image to find what stands behind its pixels
        exif = Image.Image.getexif(image)
        if image.format == "PNG" and ORIENTATION not in exif:
            exif = last_exif(image)
        if exif.get(ORIENTATION) in TURNS:
            return exif[ORIENTATION]
    return 1


def last_exif(image: Image.Image) -> Image.Exif:
    """The EXIF at the end of a PNG, behind its pixels; empty if there is none."""
    file, exif = image.fp, Image.Exif()
    if file is None:                             # decoded by now
        exif.load(image.info.get("exif", b""))
        return exif
    position = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
    tail = file.read()
    file.seek(position)
    start = tail.rfind(b"eXIf")
    end = start + 4 + int.from_bytes(tail[max(0, start - 4):max(0, start)], "big")
    if start >= 4 and zlib.crc32(tail[start:end]) == int.from_bytes(tail[end:end + 4], "big"):
        exif.load(tail[start + 4:end])
    return exif


def read_header(path: str | Path) -> Header:
    """Raises UndecodableImage."""
    try:
        with opened(path) as image:
            return header_of(image)
    except Exception as error:                   # Pillow: OSError, SyntaxError, ValueError, struct.error, ...
        raise UndecodableImage(f"{path} cannot be decoded: {reason(path, error)}") from None


def readable_headers(paths: list[str]) -> dict[str, Header]:
    """The headers of images, by path, without those that cannot be read."""
    headers = {}
    for path in paths:
        with contextlib.suppress(UndecodableImage):
            headers[path] = read_header(path)
    return headers


def is_camera_file(path: str | Path) -> bool:
    return Path(path).suffix.lower() in CAMERA


def reason(path: str | Path, error: Exception) -> str:
    """Why an image cannot be decoded, and what to do about it where that is known."""
    if is_camera_file(path):
        return "Pillow cannot read this format; convert it to JPEG or PNG"
    if isinstance(error, UnidentifiedImageError):
        return "it is no image that Pillow can read; if it is one, convert it to JPEG or PNG"
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__


def is_turned(header: Header, path: str | Path, size: tuple[int, int], exif: str = UPRIGHT) -> bool:
    """Whether the image with the `size` that its annotation states is the upright one, not that of the stored pixels.

    `exif`, UPRIGHT or STORED, decides if both have that size. Raises DataError if neither has; turning the pixels
    anyway would hide a wrong annotation."""
    if size not in (header.size, header.upright):
        (height, width), (stated_height, stated_width) = header.size, size
        raise DataError(f"{path} is {width} x {height} pixels (width x height), "
                        f"but its annotation states {stated_width} x {stated_height}")
    return exif == UPRIGHT if header.size == header.upright else size == header.upright


def remarks(headers: dict[str, Header], exif: str | None = UPRIGHT, max_pixels: float = MAX_PIXELS,
            levels: tuple[str, ...] = ("warning", "note")) -> list[str]:
    """What reading these images changes or leaves out, a line for each kind of these `levels` (see check.py).

    headers: by file name. exif: UPRIGHT, STORED, or None for images without annotations."""
    other = STORED if exif == UPRIGHT else UPRIGHT
    kinds = (("warning", lambda h: exif and h.ambiguous, "are turned or mirrored by EXIF, and their size does not tell "
              f"whether the boxes are those of the upright image: taken {exif}; --exif {other} decides otherwise"),
             ("warning", lambda h: h.several, "have several pages or frames: only the first is read"),
             ("warning", lambda h: h.pixels > max_pixels, f"have more than {max_pixels} pixels and are not read: raise "
              "--max-pixels"),
             ("note", lambda h: h.transparent, "have an alpha channel: what is transparent becomes white"),
             ("note", lambda h: h.deep, "have more than 8 bits a value: scaled, so that white is 1 for fractions, else "
              "the smallest power of two above the largest value"))
    lines = []
    for level, concerns, what in kinds:
        names = [repr(name) for name, header in headers.items() if concerns(header)]
        if names and level in levels:
            lines.append(f"{len(names)} of {len(headers)} images {what} ({first_five(names)})")
    return lines


def check_sizes(annotations: CocoBoxes, at_most: int = 2000, say: Callable[[str], None] = warn) -> None:
    """Compare the headers of up to `at_most` images, evenly spaced, with the annotations. Raises DataError.

    An unreadable header is a warning: training skips the image, evaluation stops at it. say: what to do with the
    `remarks`."""
    checked = np.unique(np.linspace(0, len(annotations) - 1, min(at_most, len(annotations))).astype(int))
    wrong, headers = [], {}
    for path, size in ((annotations.path(i), annotations.size(i)) for i in checked):
        try:
            header = headers[os.path.relpath(path, annotations.image_dir)] = read_header(path)
            is_turned(header, path, size)
        except UndecodableImage as error:
            warn(str(error))
        except DataError as error:
            wrong.append(str(error))
    if wrong:
        raise DataError(f"{annotations.json_path}: {len(wrong)} of {len(checked)} images checked have another size "
                        f"than it states, the first: {wrong[0]}")
    for line in remarks(headers, annotations.exif, annotations.max_pixels):
        say(f"{annotations.json_path}: {line}")


# -------------------------------------------------------------------------------------------- decoding

def load_image(path: str, size: tuple[int, int] | None = None, exif: str = UPRIGHT,
               max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB image: with the `size` that its annotation states (see is_turned); without one, turned as `exif` says.

    Raises UndecodableImage, DataError."""
    try:
        with opened(path) as image:
            header = header_of(image)
            if header.pixels > max_pixels:
                raise ValueError(f"its {image.width} x {image.height} pixels are more than {max_pixels}; raise "
                                 "--max-pixels")
            return decoded(image, header, is_turned(header, path, size, exif) if size else exif == UPRIGHT)
    except DataError:
        raise
    except Exception as error:
        raise UndecodableImage(f"{path} cannot be decoded: {reason(path, error)}") from None


def read_image(annotations: CocoBoxes, i: int) -> Image.Image:
    """Image i of a data set, RGB, with the size that the annotations state. Raises UndecodableImage, DataError."""
    return load_image(annotations.path(i), annotations.size(i), annotations.exif, annotations.max_pixels)


def decoded(image: Image.Image, header: Header, turned: bool) -> Image.Image:
    """The RGB image, upright if `turned`, else as the file stores it. Raises whatever Pillow does, ValueError."""
    image.load()
    if header.deep and image.mode[:3] == "RGB" and np.asarray(image)[..., :3].max() < 64:
        raise ValueError("its colours use less than 14 of 16 bits, of which Pillow reads the upper 8; convert it to 8 "
                         "bits")
    # Pillow itself turns a TIFF, and then drops the tag
    is_upright = image.format == "TIFF" and ORIENTATION not in Image.Image.getexif(image)
    image = as_rgb(image)
    if header.orientation != 1 and turned != is_upright:
        image = image.transpose((TURNS if turned else TURNED_BACK)[header.orientation])
    return image


def as_rgb(image: Image.Image) -> Image.Image:
    """Raises ValueError."""
    if image.mode[0] in "IF":                    # integers of 16 or 32 bits, floats: Pillow would clip them at 255
        tags, values = getattr(image, "tag_v2", {}), np.asarray(image)
        grey = eight_bits(values, tags.get(MAX_SAMPLE, tags.get(ANY_MAX_SAMPLE)), tags.get(NO_DATA))
        grey = 255 - grey if tags.get(PHOTOMETRIC) == 0 else grey
        image = Image.fromarray(np.where(values == image.info.get("transparency"), np.uint8(255), grey))
    elif image.mode in ALPHA or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")    # Pillow lacks La to RGBA
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def eight_bits(values: np.ndarray, largest: float | None = None, no_data: str | None = None) -> np.ndarray:
    """Brightness of any type as uint8. 0 is black; white is the `largest` value by the file. If it states none, or less
    than there is, white is 1 for floats below 2, else the smallest power of two, of 256 at least, above the values.

    NaN and the value `no_data`, which some files have outside of their image, are black. Raises ValueError for
    negative and infinite values, whose range is not known."""
    fractions = values.dtype.kind == "f"
    with np.errstate(over="ignore"):             # what float32 cannot hold becomes infinite
        values = values.astype(np.float32)
        blank = np.isnan(values) if no_data is None else np.isnan(values) | (values == np.float32(no_data))
    values[blank] = 0
    low, high = float(values.min()), float(values.max())
    if low < 0 or not math.isfinite(high):
        raise ValueError(f"its values from {low:g} to {high:g} have no range that is known; convert it to 8 bits")
    stated = 0 if largest is None else float(np.max(largest))
    if stated >= high > 0:
        white = stated
    else:
        white = 1 if fractions and high < 2 else 2 ** max(8, math.frexp(high)[1])
    return np.clip(values * (256 / white), 0, 255).astype(np.uint8)


def as_image(source) -> Image.Image:
    """An RGB image from a path or a Pillow image, both turned by EXIF, or an array or tensor (see `from_array`)."""
    if isinstance(source, (str, os.PathLike)):
        return load_image(os.fspath(source))
    if isinstance(source, Image.Image):
        return decoded(source, header_of(source), turned=True)
    try:
        return from_array(source)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error}; an image is {WANTED}") from None


def from_array(source) -> Image.Image:
    """An RGB image from an array or tensor that is WANTED; transparent parts become white. Raises ValueError."""
    if hasattr(source, "detach"):
        source = source.detach().cpu()
        source = source.float() if source.is_floating_point() else source        # numpy has no bfloat16
    values = np.asarray(source)
    shape, kind = values.shape, values.dtype.kind
    if kind not in "biuf":
        raise ValueError(f"values of type {values.dtype}")
    values = values[..., None] if len(shape) == 2 else values
    values = np.moveaxis(values, 0, 2) if len(shape) == 3 and shape[2] not in (1, 3, 4) else values
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4) or not values.size:
        raise ValueError(f"an array of shape {shape}")
    if np.isnan(values).any():
        raise ValueError("some values are NaN")
    values = values * np.uint8(255) if kind == "b" else values if values.dtype == np.uint8 else eight_bits(values)
    return as_rgb(Image.fromarray(values[..., 0] if values.shape[2] == 1 else values))


def save_image(image: Image.Image, path: str | Path, format: str, **options) -> None:
    """Write an image file, whole. It is encoded in memory: Pillow takes for success what a full disk cuts short.

    Raises OSError."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    write_whole(path, buffer.getvalue())


# ---------------------------------------------------------------------------------------------- finding

def files_in(folder: Path) -> list[Path]:
    """All files below a folder, sorted, without hidden ones. Links to folders are followed, but not to a folder above,
    and each folder is read once: by a link only if nothing else leads there."""
    seen, found, odd, waiting = set(map(str, Path(os.path.realpath(folder)).parents)), [], [], [(str(folder), 0)]
    while waiting:
        where, depth = waiting.pop(0)
        real = os.path.realpath(where)
        if real in seen:
            continue
        seen.add(real)
        folders = []
        with contextlib.suppress(OSError), os.scandir(where) as entries:     # one that may not be read is passed over
            for entry in sorted(entries, key=lambda entry: entry.name):
                kind = kind_of(entry)
                if entry.name[0] == "." or kind == "folder" and entry.name in HIDDEN:
                    continue
                if kind == "file":
                    found.append(Path(entry.path))
                elif kind is None or depth == DEEPEST:
                    odd.append(repr(entry.path))
                elif entry.is_symlink():
                    waiting.append((entry.path, depth + 1))
                else:
                    folders.append((entry.path, depth + 1))
        waiting[:0] = folders
    if odd:
        warn(f"{len(odd)} left out: no files, or folders more than {DEEPEST} deep ({first_five(odd)})")
    return sorted(found)


def kind_of(entry: os.DirEntry) -> str | None:
    """"folder", "file", which may be a link that leads to nothing or to itself, or None: a pipe, a socket, a device."""
    with contextlib.suppress(OSError):
        if entry.is_dir():
            return "folder"
        if not entry.is_file() and os.path.exists(entry.path):
            return None
    return "file"


def is_image(path: str | Path) -> bool:
    """Whether Pillow can decode it, judged by its suffix."""
    kind = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    return kind in Image.OPEN and kind not in NOT_PICTURES


def images_in(root: Path, folder: Path) -> list[str]:
    """The images below a folder as paths within root."""
    return [path.relative_to(root).as_posix() for path in files_in(folder) if is_image(path)]


def left_out(files: list[str]) -> list[str]:
    """What is to be said of files that are no images, and of nothing else that is read: a line for each kind."""
    lines = []
    for camera, what in ((True, "of a format that Pillow cannot read, left out: convert to JPEG or PNG"),
                         (False, "not used")):
        names = [repr(name) for name in files if is_camera_file(name) == camera]
        if names:
            lines.append(f"{len(names)} file{'s' * (len(names) > 1)} {what} ({first_five(names)})")
    return lines


def find_images(paths: list[str], out: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Images among `paths`, files or folders, each once as (path, path within the folder that was given), and the paths
    of other files.

    Leaves out `out`, which may hold the results of an earlier call. Raises DataError if a path does not exist, a
    folder is `out` itself, or no image is found."""
    found, others = {}, []
    for path in paths:
        if os.path.isdir(path):
            if resolved(path) == resolved(out):
                raise DataError(f"{path} would be read and written: name another folder with --out")
            folder, files = path, files_in(Path(path))
        elif os.path.exists(path):
            folder, files = os.path.dirname(path), [Path(path)]
        else:
            raise DataError(f"{path} does not exist")
        results = resolved(out) if resolved(folder) in resolved(out).parents else None
        for file in files:
            place, name = resolved(file), file.relative_to(folder).as_posix()
            if results in place.parents:
                continue
            if is_image(file) or path != folder and readable_headers([file]):
                found.setdefault(place, (os.path.join(folder, name), name))
            else:
                others.append(str(file))
    if not found:
        raise DataError("; ".join([f"no images in {', '.join(paths)}", *left_out(others)]))
    return list(found.values()), others


def resolved(path: str | Path) -> Path:
    """Without links; Path.resolve fails at one that leads to itself."""
    return Path(os.path.realpath(path))


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
