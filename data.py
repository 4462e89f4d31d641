"""Batches of uint8 views of the images (paper: A.1, Table 9).

`TrainBatches` makes the batch of micro-step k: of each image the student's clean and colour-augmented views and the
teacher's clean view. `TestImages` makes the images of an evaluation. Images are decoded by formats/pictures.py, boxes
come from formats/coco.py. Boxes are xyxy in pixels, sizes (height, width).

    python data.py shapes datasets/shapes              # draw the small data set
    python data.py cityscapes datasets/cityscapes      # write COCO annotation files for Cityscapes,
    python data.py voc DIR                             # for a folder in Pascal VOC's layout
    python data.py yolo DIR                            # or in YOLO's
    python data.py check DIR_OR_JSON...                # list what is wrong with a data set
"""
import math
import os
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
from formats.pictures import read_image

STRIDE = 32            # batches are padded to a multiple of this, the stride of the backbone's last stage, in pixels
ORDER = 1              # the version of TrainBatches' random choices; raise it with any change of them
COMPILED_STRIDE = 128  # and to this with train.py --compile: fewer sizes, all divisible by the pyramid's strides

# ----------------------------------------------------------------------------------------------- views

def resized_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """(height, width) with the shorter side min_size, or with the longer side max_size if it would exceed that."""
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def fitted_size(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """`size`, shrunk if it exceeds `canvas`; both (height, width)."""
    shrink = min(1, canvas[0] / size[0], canvas[1] / size[1])
    return max(1, int(size[0] * shrink)), max(1, int(size[1] * shrink))


def canvas_of(sizes: list[tuple[int, int]], stride: int = STRIDE) -> tuple[int, int]:
    """(height, width) of the padded batch that images of `sizes` need."""
    return tuple(-(-max(sides) // stride) * stride for sides in zip(*sizes))


def view(image: Image.Image, size: tuple[int, int], flip: bool) -> Image.Image:
    """The image at `size` (height, width), mirrored left to right if `flip`."""
    image = image.resize(size[::-1], Image.BILINEAR)             # Pillow averages when it shrinks
    return image.transpose(Image.FLIP_LEFT_RIGHT) if flip else image


def pixels(image: Image.Image) -> Tensor:
    """(3, height, width) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def view_boxes(boxes: np.ndarray, original: tuple[int, int], size: tuple[int, int], flip: bool) -> Tensor:
    """Boxes (G,4) xyxy in pixels of an image of size `original` -> in pixels of its view."""
    height, width = size
    boxes = torch.from_numpy(boxes) * torch.tensor([width / original[1], height / original[0]] * 2)
    x0, y0, x1, y1 = boxes.unbind(1)
    return torch.stack([width - x1, y0, width - x0, y1], 1) if flip else boxes


def view_mask(mask: np.ndarray, size: tuple[int, int], flip: bool) -> Tensor:
    """Mask (height, width) of an image -> bool at stride 4 of its view: its pixels 2, 6, 10, ... in both directions."""
    (height, width), (original_height, original_width) = size, mask.shape
    rows, columns = np.arange(2, height, 4), np.arange(2, width, 4)
    if flip:
        columns = width - 1 - columns
    # sample the image's pixel under the centre of the view's pixel, instead of resizing the whole mask
    rows = ((rows + 0.5) * original_height / height).astype(int)
    columns = ((columns + 0.5) * original_width / width).astype(int)
    return torch.from_numpy(mask[np.ix_(rows, columns)].astype(bool))


def view_masks(annotations: CocoBoxes, i: int, size: tuple[int, int], flip: bool) -> Tensor | None:
    """view_mask of every box of image i, (G, h, w) at stride 4; None if the annotations were read without masks."""
    if annotations.rles is None:
        return None
    masks = [view_mask(annotations.mask(i, box), size, flip) for box in range(*annotations.offsets[i:i + 2])]
    return torch.stack(masks) if masks else torch.zeros(0, 1, 1, dtype=torch.bool)


class Blur(v2.GaussianBlur):
    """torchvision's 3 x 3 blur, one axis at a time: five times faster; one value in a million rounds differently."""

    def transform(self, image: Image.Image, params: dict) -> Image.Image:
        side = math.exp(-0.5 / params["sigma"][0] ** 2)
        centre, side = np.float32([1, side]) / (1 + 2 * side)
        x = np.pad(np.asarray(image), ((1, 1), (1, 1), (0, 0)), "reflect").astype(np.float32)
        x = centre * x[1:-1] + side * (x[:-2] + x[2:])
        x = centre * x[:, 1:-1] + side * (x[:, :-2] + x[:, 2:])
        return Image.fromarray(x.round().astype(np.uint8))


# The student's colour augmentations (Table 9, with the released code's hue of 0.1 in both; strong-blur is its 3x
# recipe). Pillow images are faster here than tensors, and do not depend on the number of threads.
STRONG = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2)]
AUGMENTATIONS = {
    "none": None,
    "weak": v2.RandomApply([v2.ColorJitter(0.2, 0.2, 0.2, 0.1)], 0.2),
    "strong": v2.Compose(STRONG),
    "strong-blur": v2.Compose([*STRONG, v2.RandomApply([Blur(3, (0.1, 2.0))], 0.5)]),
}


# ----------------------------------------------------------------------------------------------- batches

class Batch(NamedTuple):
    """Images are uint8 RGB, channels last in memory, padded with zeros on the right and at the bottom."""
    images: Tensor                          # (B,3,H,W) clean view at the student's size
    sizes: list[tuple[int, int]]            # true (height, width) within images
    original_sizes: list[tuple[int, int]]   # (height, width) before resizing
    image_ids: list[int]
    boxes: list[Tensor]                     # (G,4) float32 xyxy in pixels of images
    labels: list[Tensor]                    # (G,) int64
    augmented: Tensor | None                # (B,3,H,W) colour-augmented for the student; None: it gets images
    teacher_images: Tensor | None           # (B,3,Ht,Wt) clean view at the teacher's size, flipped as images
    teacher_sizes: list[tuple[int, int]]    # true (height, width) within teacher_images; [] without a teacher
    masks: list[Tensor] | None              # (G,H/4,W/4) bool ground truth at pixels 2, 6, 10, ... of images
    skipped: list[str]                      # "path ...: why" of each undecodable image that another replaces

    def to(self, device) -> "Batch":
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":        # called by the DataLoader, which would turn the sizes into lists itself
        return self._each_tensor(Tensor.pin_memory)

    def _each_tensor(self, change) -> "Batch":
        results = {}                        # images and teacher_images may be one tensor, and must stay one

        def changed(value):
            if isinstance(value, list):
                return [changed(item) for item in value]
            if not isinstance(value, Tensor):
                return value
            if id(value) not in results:
                results[id(value)] = change(value)
            return results[id(value)]
        return Batch(*map(changed, self))


class Sample(NamedTuple):
    """One image of a Batch, before padding."""
    image: Image.Image                      # the student's clean view, RGB
    augmented: Image.Image | None
    teacher_image: Image.Image | None       # `image` itself if both sizes are equal
    masks: Tensor | None                    # (G, h, w) bool, stride 4
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

    The views of a sample are copied into the batch before the next sample is made, so that Pillow can reuse their
    memory: fresh memory costs as much as a copy."""
    canvases = {"image": canvas, "augmented": canvas, "teacher_image": teacher_canvas}
    views, sizes, rest = {}, {"teacher_image": []}, []
    for i, sample in enumerate(samples):
        for name in canvases:
            image = getattr(sample, name)
            if image is not None:
                if name not in views:
                    views[name], sizes[name] = np.zeros((count, *canvases[name], 3), np.uint8), []
                views[name][i, :image.height, :image.width] = image
                sizes[name].append((image.height, image.width))
        rest.append(sample._replace(image=None, augmented=None, teacher_image=None))
    views = {name: torch.from_numpy(view).permute(0, 3, 1, 2) for name, view in views.items()}
    quarter = canvas[0] // 4, canvas[1] // 4
    return Batch(
        images=views["image"], sizes=sizes["image"], original_sizes=[sample.original_size for sample in rest],
        image_ids=[sample.image_id for sample in rest], boxes=[sample.boxes for sample in rest],
        labels=[sample.labels for sample in rest], augmented=views.get("augmented"),
        teacher_images=views.get("teacher_image"), teacher_sizes=sizes["teacher_image"],
        masks=None if rest[0].masks is None else [padded(sample.masks, quarter) for sample in rest],
        skipped=[note for sample in rest for note in sample.skipped])


class Choices(NamedTuple):
    """The random choices for a sample, made before its image is opened."""
    image: int
    min_size: int
    flip: bool
    colour_seed: int


class TrainBatches(torch.utils.data.Dataset):
    """Item k is this process's Batch of micro-step k of the run, for any k >= 0.

    batch_size: images of a micro-step over all world_size processes, a multiple of it; min_sizes: shorter sides to
    draw from, max_size: longest side, teacher_size: (shorter, longest) side or None, all in pixels; augment: one of
    AUGMENTATIONS; stride: batches are padded to a multiple of it. Raises ValueError for these values; DataError if no
    box can be learnt, an image has another size than stated, or 100 images in a row cannot be decoded.

    The images of item k are a function of (seed, k, batch_size), their sizes, flips and colours of (seed, k, place in
    the batch). So workers, restarts and the number of processes change nothing, and a loader has no state to save. Use
    DataLoader(batches, batch_size=None, sampler=range(start, stop), collate_fn=TrainBatches.collate, ...)."""

    def __init__(self, annotations: CocoBoxes, *, batch_size: int, min_sizes: list[int], max_size: int,
                 teacher_size: tuple[int, int] | None = None, augment: str = "none", seed: int = 0,
                 rank: int = 0, world_size: int = 1, stride: int = STRIDE):
        if batch_size % world_size:
            raise ValueError(f"{batch_size} images a micro-step do not divide among {world_size} processes")
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augment is one of {', '.join(AUGMENTATIONS)}, not {augment!r}")
        if not len(annotations.boxes):
            raise DataError(annotations.no_box)
        self.annotations, self.batch_size, self.seed = annotations, batch_size, seed
        self.min_sizes, self.max_size, self.teacher_size = list(min_sizes), max_size, teacher_size
        self.augment, self.stride = AUGMENTATIONS[augment], stride
        share = batch_size // world_size
        self.share = slice(rank * share, (rank + 1) * share)     # this process's part of a micro-step
        self.wide = annotations.sizes[:, 1] >= annotations.sizes[:, 0]
        self.repeats = -(-batch_size // len(annotations))        # a tiny set fills a batch more than once
        self.epoch_length = len(annotations) * self.repeats // batch_size
        self.epoch, self.batches = -1, None

    def __getitem__(self, k: int) -> Batch:
        chosen = [self.choose(k, place, image) for place, image in enumerate(self.order(k))]
        # Pad for the images of all processes. Padding affects the features, so a step would otherwise depend on the
        # number of processes; and this way all processes have the same amount of work.
        canvas = canvas_of([self.resized_size(c.image, c.min_size, self.max_size) for c in chosen], self.stride)
        teacher_canvas = None
        one_size = all((c.min_size, self.max_size) == self.teacher_size for c in chosen)
        if self.teacher_size and not one_size:
            teacher_canvas = canvas_of([self.resized_size(c.image, *self.teacher_size) for c in chosen], self.stride)
        share = chosen[self.share]
        batch = collate((self.sample(c, canvas, teacher_canvas) for c in share), len(share), canvas, teacher_canvas)
        return batch._replace(teacher_images=batch.images, teacher_sizes=batch.sizes) if one_size else batch

    @staticmethod
    def collate(batch: Batch) -> Batch:
        return batch                     # the default conversion would turn the sizes into lists

    def order(self, k: int) -> list[int]:
        """The batch_size indices of the images of micro-step k, of all processes."""
        epoch, batch = divmod(k, self.epoch_length)
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, self.epoch_order(epoch)
        return self.batches[batch].tolist()

    def folders(self, k: int) -> set[str]:
        """Of the images of micro-step k that this process reads."""
        return {os.path.dirname(self.annotations.path(i)) for i in self.order(k)[self.share]}

    def epoch_order(self, epoch: int) -> np.ndarray:
        """(epoch_length, batch_size) indices of images in random order, without those that do not fill a last batch.

        Landscape and portrait images are in separate batches, for less padding; only the leftovers mix."""
        rng = np.random.default_rng([self.seed, epoch, self.batch_size])     # `choose` has place < batch_size
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
        """The image, or the next that can be decoded; its index; what is wrong with those that were skipped."""
        skipped = []
        for i in range(image, image + min(len(self.annotations), 100)):
            i %= len(self.annotations)
            try:
                return read_image(self.annotations, i), i, skipped
            except UndecodableImage as error:
                skipped.append(str(error))
        raise DataError(f"{len(skipped)} images in a row cannot be decoded, the first: {skipped[0]}")

    def sample(self, choices: Choices, canvas: tuple[int, int], teacher_canvas: tuple[int, int] | None) -> Sample:
        image, i, skipped = self.decode(choices.image)
        # a substitute for a broken image may be larger than the canvas, which is fixed by now
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
        with torch.random.fork_rng(devices=[]):                  # torchvision uses the global generator
            torch.manual_seed(seed)
            return self.augment(image)


class TestImages(torch.utils.data.Dataset):
    """Item i is the Sample of image i at the test size (see `resized_size`); `TestImages.collate` makes a Batch.

    It has masks if the annotations were read with them; whole: its teacher's view is the image at its own size.
    Raises DataError."""

    __test__ = False                # or pytest would collect it because of its name

    def __init__(self, annotations: CocoBoxes, min_size: int, max_size: int, whole: bool = False):
        self.annotations, self.min_size, self.max_size, self.whole = annotations, min_size, max_size, whole

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, i: int) -> Sample:
        original = self.annotations.size(i)
        size = resized_size(*original, self.min_size, self.max_size)
        image = read_image(self.annotations, i)
        boxes, labels = self.annotations.image_boxes(i)
        return Sample(view(image, size, flip=False), None, image if self.whole else None,
                      view_masks(self.annotations, i, size, flip=False), view_boxes(boxes, original, size, flip=False),
                      torch.tensor(labels), original, int(self.annotations.image_ids[i]), [])

    @staticmethod
    def collate(samples: list[Sample]) -> Batch:
        sizes = [(sample.image.height, sample.image.width) for sample in samples]
        whole = canvas_of([sample.original_size for sample in samples])
        return collate(samples, len(samples), canvas_of(sizes), whole)


class Readable(torch.utils.data.Dataset):
    """Wraps a data set: an image that cannot be decoded comes back as its error message."""

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
    """Batches of Samples on the device, with a progress bar. Undecodable images are left out with a warning."""
    loader = DataLoader(Readable(images), batch_size=batch_size, num_workers=workers, collate_fn=Readable.collate,
                        pin_memory=torch.device(device).type == "cuda")
    for batch, broken in tqdm(loader, desc=title, unit="batch", disable=None):
        for message in broken:
            warn(f"{message}; left out")
        if batch is not None:
            yield batch.to(device)


if __name__ == "__main__":          # python data.py shapes | cityscapes | voc | yolo | check
    from formats.commands import main
    main()
