"""Data: images in, batches of uint8 views out (paper: A.1, Table 9).

The way of an image, top to bottom: `load_image` (formats/pictures.py) decodes it; `TrainBatches` makes the batch of micro-step k, with the
student's clean and colour-augmented views and the teacher's clean view; `TestImages` makes the images of an
evaluation. Their boxes come from coco.py. Boxes are xyxy in pixels, sizes (height, width).

    python data.py shapes datasets/shapes              # writes the small embedded data set
    python data.py cityscapes datasets/cityscapes      # writes COCO annotation files for Cityscapes
    python data.py voc DIR                             # the same for a folder in Pascal VOC's layout
    python data.py yolo DIR                            # and for one in YOLO's
    python data.py check DIR_OR_JSON...                # says what is wrong with a data set
"""
import math
import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

from formats.coco import CocoBoxes, DataError, UndecodableImage
from formats.files import warn
from formats.pictures import load_image

STRIDE = 32      # batches are padded to a multiple of it: the stride of the backbone's last stage, pixels
COMPILED_STRIDE = 128  # the same with train.py --compile: fewer sizes, and all levels of the pyramid divide them

# ----------------------------------------------------------------------------------------------- views

def resized_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """(height, width) with the shorter side at min_size, unless the longer one would then pass max_size."""
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def fitted_size(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """`size`, shrunk where it does not fit into `canvas`; both (height, width)."""
    shrink = min(1, canvas[0] / size[0], canvas[1] / size[1])
    return max(1, int(size[0] * shrink)), max(1, int(size[1] * shrink))


def canvas_of(sizes: list[tuple[int, int]], stride: int = STRIDE) -> tuple[int, int]:
    """(height, width) of the padded batch that holds all of `sizes`."""
    return tuple(-(-max(sides) // stride) * stride for sides in zip(*sizes))


def view(image: Image.Image, size: tuple[int, int], flip: bool) -> Image.Image:
    """The image at `size` (height, width), mirrored left to right if `flip`."""
    image = image.resize(size[::-1], Image.BILINEAR)             # Pillow averages where it shrinks
    return image.transpose(Image.FLIP_LEFT_RIGHT) if flip else image


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)    # (3, height, width) uint8


def view_boxes(boxes: np.ndarray, original: tuple[int, int], size: tuple[int, int], flip: bool) -> Tensor:
    """(G,4) xyxy in pixels of a file of size `original` -> in pixels of its view."""
    height, width = size
    boxes = torch.from_numpy(boxes) * torch.tensor([width / original[1], height / original[0]] * 2)
    x0, y0, x1, y1 = boxes.unbind(1)
    return torch.stack([width - x1, y0, width - x0, y1], 1) if flip else boxes


def view_mask(mask: np.ndarray, size: tuple[int, int], flip: bool) -> Tensor:
    """(height, width) mask of a file -> bool at stride 4 of its view: pixels 2, 6, 10, ... both ways."""
    (height, width), (file_height, file_width) = size, mask.shape
    rows, columns = np.arange(2, height, 4), np.arange(2, width, 4)
    if flip:
        columns = width - 1 - columns
    # The file's pixel under the centre of the view's: no mask is ever resized as a whole.
    rows = ((rows + 0.5) * file_height / height).astype(int)
    columns = ((columns + 0.5) * file_width / width).astype(int)
    return torch.from_numpy(mask[np.ix_(rows, columns)].astype(bool))


def view_masks(annotations: CocoBoxes, i: int, size: tuple[int, int], flip: bool) -> Tensor | None:
    """view_mask of every box of image i, (G, h/4, w/4); None where the annotations were read without masks."""
    if annotations.rles is None:
        return None
    masks = [view_mask(annotations.mask(i, box), size, flip) for box in range(*annotations.offsets[i:i + 2])]
    return torch.stack(masks) if masks else torch.zeros(0, 1, 1, dtype=torch.bool)


class Blur(v2.GaussianBlur):
    """torchvision's blur, 3 x 3, one axis after the other: a fifth of its time, the same but for the last bit of the
    sums (one value in a million is rounded to the other side)."""

    def transform(self, image: Image.Image, params: dict) -> Image.Image:
        side = math.exp(-0.5 / params["sigma"][0] ** 2)
        centre, side = np.float32([1, side]) / (1 + 2 * side)
        x = np.pad(np.asarray(image), ((1, 1), (1, 1), (0, 0)), "reflect").astype(np.float32)
        x = centre * x[1:-1] + side * (x[:-2] + x[2:])
        x = centre * x[:, 1:-1] + side * (x[:, :-2] + x[:, 2:])
        return Image.fromarray(x.round().astype(np.uint8))


# The student's colour augmentations (Table 9, hue 0.1 in both; strong-blur: the released 3x recipe). They
# take Pillow's images: faster than tensors, and no sum in them depends on the number of threads.
STRONG = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2)]
AUGMENTATIONS = {
    "none": None,
    "weak": v2.RandomApply([v2.ColorJitter(0.2, 0.2, 0.2, 0.1)], 0.2),
    "strong": v2.Compose(STRONG),
    "strong-blur": v2.Compose([*STRONG, v2.RandomApply([Blur(3, (0.1, 2.0))], 0.5)]),
}


# ----------------------------------------------------------------------------------------------- batches

class Batch(NamedTuple):
    """Images are uint8 RGB, channels last in memory, padded with zeros at the right and at the bottom to a multiple
    of STRIDE, or COMPILED_STRIDE."""
    images: Tensor                          # (B,3,H,W) clean view at the student's size
    sizes: list[tuple[int, int]]            # true (height, width) within images
    original_sizes: list[tuple[int, int]]   # (height, width) of the files
    image_ids: list[int]
    boxes: list[Tensor]                     # (G,4) float32 xyxy in pixels of images
    labels: list[Tensor]                    # (G,) int64
    augmented: Tensor | None                # (B,3,H,W) colour-augmented for the student; None: it sees images
    teacher_images: Tensor | None           # (B,3,Ht,Wt) clean view at the teacher's size, flipped alike
    teacher_sizes: list[tuple[int, int]]    # true (height, width) within teacher_images; [] without a teacher
    masks: list[Tensor] | None              # (G,H/4,W/4) bool ground truth at pixels 2, 6, 10, ... of images
    skipped: list[str]                      # "path ...: why" of undecodable images that others stand in for

    def to(self, device) -> "Batch":
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":        # for the DataLoader, whose own way turns the sizes into lists
        return self._each_tensor(Tensor.pin_memory)

    def _each_tensor(self, change) -> "Batch":
        done = {}                           # images and teacher_images may be one tensor, and stay one

        def changed(value):
            if isinstance(value, list):
                return [changed(item) for item in value]
            if not isinstance(value, Tensor):
                return value
            if id(value) not in done:
                done[id(value)] = change(value)
            return done[id(value)]
        return Batch(*map(changed, self))


class Sample(NamedTuple):
    """One image on its way into a Batch, not padded yet."""
    image: Image.Image                      # the views, RGB
    augmented: Image.Image | None
    teacher_image: Image.Image | None       # `image` itself where both are of one size
    masks: Tensor | None                    # (G, h/4, w/4) bool
    boxes: Tensor
    labels: Tensor
    original_size: tuple[int, int]
    image_id: int
    skipped: list[str]


def padded(tensor: Tensor, canvas: tuple[int, int]) -> Tensor:
    return pad(tensor, (0, canvas[1] - tensor.shape[-1], 0, canvas[0] - tensor.shape[-2]))


def collate(samples: Iterable[Sample], count: int, canvas: tuple[int, int],
            teacher_canvas: tuple[int, int] | None) -> Batch:
    """Pads the views of `count` samples to their canvas, (height, width).

    A sample's views are written straight into their places among zeros before the next sample is made: Pillow then has
    the memory of the last one again, and fresh memory costs as much as a copy. Channels are last, as in Pillow."""
    canvases = {"image": canvas, "augmented": canvas, "teacher_image": teacher_canvas}
    views, sizes, others = {}, {"teacher_image": []}, []
    for i, sample in enumerate(samples):
        for name, image in zip(canvases, sample):
            if image is not None:
                if name not in views:
                    views[name], sizes[name] = np.zeros((count, *canvases[name], 3), np.uint8), []
                views[name][i, :image.height, :image.width] = image
                sizes[name].append((image.height, image.width))
        others.append(sample[len(canvases):])
    views = {name: torch.from_numpy(view).permute(0, 3, 1, 2) for name, view in views.items()}
    masks, boxes, labels, originals, image_ids, skipped = map(list, zip(*others))
    quarter = canvas[0] // 4, canvas[1] // 4
    return Batch(views["image"], sizes["image"], originals, image_ids, boxes, labels, views.get("augmented"),
                 views.get("teacher_image"), sizes["teacher_image"],
                 None if masks[0] is None else [padded(mask, quarter) for mask in masks], sum(skipped, []))


class Choices(NamedTuple):
    """What chance decides of a sample, known before its image is opened."""
    image: int
    min_size: int
    flip: bool
    colour_seed: int


class TrainBatches(torch.utils.data.Dataset):
    """Item k is this process's Batch of micro-step k of the run, for any k >= 0.

    batch_size: images of a micro-step over all world_size processes, a multiple of it; min_sizes: shorter
    sides to draw from, max_size: longest side, teacher_size: (shorter, longest) side or None, all in pixels;
    augment: one of AUGMENTATIONS; stride: batches are padded to a multiple of it. Raises ValueError for these,
    DataError where there is no box to learn from, for an image that has not the stated size, and for 100
    undecodable images in a row.

    Which images item k has follows from (seed, k, batch_size); their sizes, flips and colours from (seed,
    k, place in the batch). So workers, restarts and the number of processes change nothing, and no state of
    the loader is saved. For DataLoader(batches, batch_size=None, sampler=range(start, stop),
    collate_fn=TrainBatches.collate, ...)."""

    def __init__(self, annotations: CocoBoxes, *, batch_size: int, min_sizes: list[int], max_size: int,
                 teacher_size: tuple[int, int] | None = None, augment: str = "none", seed: int = 0,
                 rank: int = 0, world_size: int = 1, stride: int = STRIDE):
        if batch_size % world_size:
            raise ValueError(f"{batch_size} images a micro-step do not divide among {world_size} processes")
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augment is one of {', '.join(AUGMENTATIONS)}, not {augment!r}")
        if not len(annotations.boxes):
            raise DataError(f"{annotations.json_path} has no usable box to train on")
        self.annotations, self.batch_size, self.seed = annotations, batch_size, seed
        self.min_sizes, self.max_size, self.teacher_size = list(min_sizes), max_size, teacher_size
        self.augment, self.stride = AUGMENTATIONS[augment], stride
        share = batch_size // world_size
        self.own = slice(rank * share, (rank + 1) * share)
        self.wide = annotations.sizes[:, 1] >= annotations.sizes[:, 0]
        self.repeats = -(-batch_size // len(annotations))        # a tiny set is gone through more than once
        self.epoch_length = len(annotations) * self.repeats // batch_size
        self.epoch, self.batches = -1, None

    def __getitem__(self, k: int) -> Batch:
        choices = [self.choose(k, place, image) for place, image in enumerate(self.order(k))]
        # Padded for the images of all processes, not for this one's alone: padding has a say in the
        # features, so a step would depend on the number of processes. And all have the same work to do.
        canvas = canvas_of([self.resized_size(one.image, one.min_size, self.max_size) for one in choices], self.stride)
        teacher_canvas = None
        alike = all((one.min_size, self.max_size) == self.teacher_size for one in choices)
        if self.teacher_size and not alike:
            teacher_canvas = canvas_of([self.resized_size(one.image, *self.teacher_size) for one in choices],
                                       self.stride)
        own = choices[self.own]
        batch = collate((self.sample(one, canvas, teacher_canvas) for one in own), len(own), canvas, teacher_canvas)
        return batch._replace(teacher_images=batch.images, teacher_sizes=batch.sizes) if alike else batch

    @staticmethod
    def collate(batch: Batch) -> Batch:
        return batch                     # the DataLoader's own conversion would turn the sizes into lists

    def order(self, k: int) -> list[int]:
        """The images of micro-step k, of all processes: batch_size numbers."""
        epoch, batch = divmod(k, self.epoch_length)
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, self.epoch_order(epoch)
        return self.batches[batch].tolist()

    def epoch_order(self, epoch: int) -> np.ndarray:
        """(epoch_length, batch_size) images, each once, without those that do not fill a last batch.

        Landscape and portrait images have batches of their own, for less padding; only leftovers mix."""
        rng = np.random.default_rng([self.seed, epoch, self.batch_size])     # no sample has so high a place
        order = np.concatenate([rng.permutation(len(self.annotations)) for _ in range(self.repeats)])
        groups = order[self.wide[order]], order[~self.wide[order]]
        filled = [len(group) - len(group) % self.batch_size for group in groups]
        rest = rng.permutation(np.concatenate([group[n:] for group, n in zip(groups, filled)]))
        rest = rest[:len(rest) - len(rest) % self.batch_size]
        batches = np.concatenate([*(group[:n] for group, n in zip(groups, filled)), rest])
        return rng.permutation(batches.reshape(-1, self.batch_size))

    def choose(self, k: int, place: int, image: int) -> Choices:
        rng = np.random.default_rng([self.seed, k, place])
        return Choices(image, self.min_sizes[rng.integers(len(self.min_sizes))], bool(rng.random() < 0.5),
                       int(rng.integers(2**62)))

    def resized_size(self, image: int, min_size: int, max_size: int) -> tuple[int, int]:
        return resized_size(*self.annotations.size(image), min_size, max_size)

    def decode(self, image: int) -> tuple[Image.Image, int, list[str]]:
        """-> the image, or the next one that can be decoded; its number; what is wrong with the skipped."""
        skipped = []
        for i in range(image, image + min(len(self.annotations), 100)):
            i %= len(self.annotations)
            try:
                return load_image(self.annotations.path(i), self.annotations.size(i)), i, skipped
            except UndecodableImage as error:
                skipped.append(str(error))
        raise DataError(f"{len(skipped)} images in a row cannot be decoded, the first: {skipped[0]}")

    def sample(self, choices: Choices, canvas: tuple[int, int], teacher_canvas: tuple[int, int] | None) -> Sample:
        image, i, skipped = self.decode(choices.image)
        # Fitted for an image that stands in for a broken one: the canvas is fixed, and the others' too.
        size = fitted_size(self.resized_size(i, choices.min_size, self.max_size), canvas)
        student, teacher = view(image, size, choices.flip), None
        if teacher_canvas:
            teacher_size = fitted_size(self.resized_size(i, *self.teacher_size), teacher_canvas)
            teacher = student if teacher_size == size else view(image, teacher_size, choices.flip)
        boxes, labels = self.annotations.image_boxes(i)
        return Sample(student, self.coloured(student, choices.colour_seed), teacher,
                      view_masks(self.annotations, i, size, choices.flip),
                      view_boxes(boxes, self.annotations.size(i), size, choices.flip), torch.tensor(labels),
                      self.annotations.size(i), int(self.annotations.image_ids[i]), skipped)

    def coloured(self, image: Image.Image, seed: int) -> Image.Image | None:
        if self.augment is None:
            return None
        with torch.random.fork_rng(devices=[]):                  # torchvision draws from the global generator
            torch.manual_seed(seed)
            return self.augment(image)


class TestImages(torch.utils.data.Dataset):
    """Item i is image i at the test size with its boxes; `TestImages.collate` makes a Batch of several.

    min_size: shorter side, unless the longer one would pass max_size, pixels. With the objects' masks where the
    annotations were read with them. Raises DataError."""

    __test__ = False                # pytest goes by names and would take it for a test

    def __init__(self, annotations: CocoBoxes, min_size: int, max_size: int):
        self.annotations, self.min_size, self.max_size = annotations, min_size, max_size

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, i: int) -> Sample:
        original = self.annotations.size(i)
        size = resized_size(*original, self.min_size, self.max_size)
        image = view(load_image(self.annotations.path(i), original), size, flip=False)
        boxes, labels = self.annotations.image_boxes(i)
        return Sample(image, None, None, view_masks(self.annotations, i, size, flip=False),
                      view_boxes(boxes, original, size, flip=False), torch.tensor(labels), original,
                      int(self.annotations.image_ids[i]), [])

    @staticmethod
    def collate(samples: list[Sample]) -> Batch:
        sizes = [(sample.image.height, sample.image.width) for sample in samples]
        return collate(samples, len(samples), canvas_of(sizes), None)


class Readable(torch.utils.data.Dataset):
    """The items of another data set; where an image cannot be decoded, the message that says so."""

    def __init__(self, images: torch.utils.data.Dataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Sample | str:
        try:
            return self.images[i]
        except UndecodableImage as error:
            return str(error)

    @staticmethod
    def collate(items: list[Sample | str]) -> tuple[Batch | None, list[str]]:
        samples = [item for item in items if isinstance(item, Sample)]
        batch = TestImages.collate(samples) if samples else None
        return batch, [item for item in items if isinstance(item, str)]


def readable_batches(images: torch.utils.data.Dataset, title: str, *, batch_size: int = 1, workers: int = 2,
                     device: torch.device | str = "cpu") -> Iterator[Batch]:
    """Batches of Samples on the device, with a progress bar; undecodable images are named and left out."""
    loader = DataLoader(Readable(images), batch_size=batch_size, num_workers=workers, collate_fn=Readable.collate,
                        pin_memory=torch.device(device).type == "cuda")
    for batch, broken in tqdm(loader, desc=title, unit="batch", disable=None):
        for message in broken:
            warn(f"{message}; it is left out")
        if batch is not None:
            yield batch.to(device)


def ignore_signals(worker: int) -> None:
    """For a training run's loading processes: torchrun, Slurm and Ctrl-C signal them too, but the step or the
    evaluation in hand is finished first and needs their batches."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":          # python data.py shapes | cityscapes | voc | yolo | check
    from formats.commands import main
    main()
