"""Masks for the boxes of a data set, from a trained model or from boxes and colours alone (refine.py).

With a model, for one image, top to bottom:

    assigned    the model's detections go to the boxes by Alg. 1, in the order of the mask-aware score (Eq. 1)
    prompted    a box without a detection takes the best-scored mask among the locations that FCOS would train on it
    cut         masks are enlarged to the image's own size and cut to the box

tools/selftraining.py stops after the first step, as the paper's Sec. 2 does; predict.py --boxes runs both, so that
every box has a mask. `agreement` compares masks with those of the file, for measuring only.
"""
import json
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from assign import LEVEL_RANGES, SCORE_THRESHOLD, image_targets
from data import TestImages, pixels, readable_batches
from formats.coco import CocoBoxes, UndecodableImage
from formats.files import optional, warn
from formats.pictures import load_image
from masks import box_masks, cells, encode, paste_masks
from model import CondInst, Locations, Predictions, detect, mask_logits
from refine import color_masks, ellipse, pixel_masks
from teacher import mask_aware_score, match

ASSIGNED, PROMPTED, COLOURS = "assigned", "prompted", "colours"
CHUNK = 64        # masks in memory at once
CANDIDATES = 9    # locations tried for a box that FCOS would train none on: as many as 3 x 3 around its centre


class BoxMasks(NamedTuple):
    """The masks of the n boxes of an image, or of a data set."""

    rles: list[dict | None]    # COCO run lengths at the image's own size, within the box; None: no mask
    scores: np.ndarray         # (n,) how far to trust it; 0 without a mask
    sources: list[str | None]  # ASSIGNED, PROMPTED, COLOURS, or None without a mask


# ------------------------------------------------------------------------------------------------- one image


@torch.no_grad()
def label_image(image: Predictions, boxes: Tensor, size: tuple[int, int], original_size: tuple[int, int],
                score_threshold: float = SCORE_THRESHOLD, classes: Tensor | None = None) -> BoxMasks:
    """Masks for the boxes (G, 4) of one image, xyxy pixels of the network's input, whose true size is `size`.

    classes (G,): the class of each box in the model, -1 if unknown to it. With them, a box takes detections of this
    class alone, and boxes without one are prompted. None: Alg. 1 as in the paper, and nothing else.
    original_size: (height, width) of the masks.
    """
    locations, scores = assigned_locations(image, boxes, size, score_threshold, classes)
    rles = cut_masks(image, locations, boxes, size, original_size)
    left = torch.tensor([rle is None for rle in rles], dtype=torch.bool)
    locations[left], scores[left] = -1, 0
    sources = [None if is_left else ASSIGNED for is_left in left.tolist()]
    if classes is not None:
        locations, scores = prompt(image, boxes, classes, size, locations, scores)
        prompted = cut_masks(image, torch.where(left, locations, -1), boxes, size, original_size)
        for g in left.nonzero()[:, 0].tolist():
            sources[g], rles[g] = PROMPTED, prompted[g]
            if prompted[g] is None:  # an empty mask: the filled box, with a score that says so
                rles[g], scores[g] = filled_box(boxes[g], size, original_size), 0
    return BoxMasks(rles, scores.numpy(), sources)


def assigned_locations(image: Predictions, boxes: Tensor, size: tuple[int, int], score_threshold: float,
                       classes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Alg. 1: the location (G,) whose mask a box gets, or -1, and its mask-aware score (G,). Both on the CPU."""
    found = detect(image, limit=100 if classes is None else max(100, 2 * len(boxes)))
    matched = match(image, found, boxes, size, size, cells(size), classes=classes, score_threshold=score_threshold)
    given = matched.assigned >= 0
    locations, scores = torch.full((len(boxes),), -1), torch.zeros(len(boxes))
    locations[given] = matched.found.locations.cpu()[matched.assigned[given]]
    scores[given] = matched.scores.cpu()[matched.assigned[given]]
    if classes is not None:  # a location may be detected as two classes, but its one mask goes to one box
        taken = set()
        for g in scores.argsort(descending=True, stable=True).tolist():
            if int(locations[g]) in taken:
                locations[g], scores[g] = -1, 0
            taken.add(int(locations[g]))
    return locations, scores


def prompt(image: Predictions, boxes: Tensor, classes: Tensor, size: tuple[int, int], locations: Tensor,
           scores: Tensor) -> tuple[Tensor, Tensor]:
    """Fill in the boxes without a detection: locations and scores (G,) with a location for each -1.

    A box takes the best-scored mask among the locations that FCOS would train on it. FCOS has none for a box whose
    centre smaller boxes cover, or that lies between the locations of its level: such a box takes the best of the
    nearest free ones. No location serves two boxes, as long as there are more locations than boxes.
    """
    locations, scores = locations.clone(), scores.clone()
    everywhere = Locations(*(x.cpu() for x in image.locations))
    taken = torch.zeros(len(everywhere.xy), dtype=torch.bool)
    taken[locations[locations >= 0]] = True
    owner = owners(image.locations, boxes)                            # (L,) the box that FCOS would train there
    trained = ((owner >= 0) & ~taken).nonzero()[:, 0]
    trained = trained[locations[owner[trained]] < 0]
    trained_scores = prompt_scores(image, trained, owner[trained], boxes, classes, size)
    for k in trained_scores.argsort(stable=True).tolist():            # the best comes last, and stays
        locations[owner[trained[k]]], scores[owner[trained[k]]] = trained[k], trained_scores[k]
    taken[locations[locations >= 0]] = True
    for g in (locations < 0).nonzero()[:, 0].tolist():
        near = nearest(everywhere, boxes[g].cpu(), taken, owner >= 0)
        near_scores = prompt_scores(image, near, torch.full_like(near, g), boxes, classes, size)
        best = near_scores.argmax()
        locations[g], scores[g] = near[best], near_scores[best]
        taken[near[best]] = True
    return locations, scores


def owners(locations: Locations, boxes: Tensor) -> Tensor:
    """The number of the box that FCOS would train at each location (L,), or -1. On the CPU."""
    labels, part = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device), 2 ** 20 // max(len(boxes), 1) + 1
    parts = zip(*(x.split(part) for x in locations))  # thousands of boxes in an image must fit into memory
    return torch.cat([image_targets(Locations(*some), boxes, labels, 1)[2] for some in parts]).cpu()


def nearest(locations: Locations, box: Tensor, taken: Tensor, owned: Tensor) -> Tensor:
    """The CANDIDATES locations nearest to the centre of a box (4,): free ones of its level, preferably owned by no
    other box; if its level has none, of any level; if all are taken, taken ones."""
    center, half = (box[:2] + box[2:]) / 2, float((box[2:] - box[:2]).max()) / 2
    level = next(i for i, (_, high) in enumerate(LEVEL_RANGES) if half <= high)
    free = ~taken
    for choice in ((locations.level == level) & free & ~owned, (locations.level == level) & free, free,
                   torch.ones_like(taken)):
        if choice.any():
            chosen = choice.nonzero()[:, 0]
            return chosen[(locations.xy[chosen] - center).norm(dim=1).argsort(stable=True)[:CANDIDATES]]


def prompt_scores(image: Predictions, locations: Tensor, owner: Tensor, boxes: Tensor, classes: Tensor,
                  size: tuple[int, int]) -> Tensor:
    """Eq. 1 for the masks of locations (K,) within the boxes owner (K,). (K,) on the CPU.

    c is the confidence in the class of the box.
    """
    (h, w), scores = cells(size), [torch.zeros(0)]
    for l, g in zip(locations.to(boxes.device).split(CHUNK), owner.to(boxes.device).split(CHUNK)):
        p = image.class_logits[0, l].sigmoid()                                                     # (k, C)
        c = torch.where(classes[g] >= 0, p.gather(1, classes[g].clamp(min=0)[:, None])[:, 0], p.amax(1))
        c = (c * image.centerness[0, l].sigmoid()).sqrt()
        inside = box_masks(boxes[g], h, w)
        x, y = ((boxes[g, :2] + boxes[g, 2:]) / 8).long().unbind(1)   # a box between two cells has that of its centre
        inside[torch.arange(len(g), device=g.device), y.clamp(0, h - 1), x.clamp(0, w - 1)] = True
        scores.append(mask_aware_score(c, mask_logits(image, [l]).sigmoid()[:, :h, :w], inside, None).cpu())
    return torch.cat(scores)


def cut_masks(image: Predictions, locations: Tensor, boxes: Tensor, size: tuple[int, int],
              original_size: tuple[int, int]) -> list[dict | None]:
    """Run lengths of the masks of locations (G,) at original_size, cut to the boxes; None for a location of -1 and for
    a mask that is empty within the box."""
    rles, given = [None] * len(locations), (locations >= 0).nonzero()[:, 0]
    for some in given.split(CHUNK):
        some = some.to(boxes.device)
        logits = mask_logits(image, [locations.to(boxes.device)[some]])
        cut, _ = paste_masks(logits, size, original_size, within=box_pixels(boxes[some], size, original_size))
        for g, rle in zip(some.tolist(), cut):
            rles[g] = rle if coco_mask.area(rle) else None
    return rles


def box_pixels(boxes: Tensor, size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
    """The pixels x0 ... x1 - 1, y0 ... y1 - 1 (G, 4) of the image itself that boxes of the network's input touch."""
    (h, w), (height, width) = size, original_size
    boxes = (boxes * boxes.new_tensor([width / w, height / h]).repeat(2)).cpu()
    low, high = (boxes[:, :2] + 1e-2).floor(), (boxes[:, 2:] - 1e-2).ceil()  # rounding makes 1001.0001 of 1001
    return torch.cat([low, high], 1).long().clamp(min=0).minimum(torch.tensor([width, height]).repeat(2))


def filled_box(box: Tensor, size: tuple[int, int], original_size: tuple[int, int]) -> dict:
    x0, y0, x1, y1 = box_pixels(box[None], size, original_size)[0].tolist()
    return encode(np.ones((x1 - x0, y1 - y0), bool), x0, y0, original_size)


# -------------------------------------------------------------------------------------------------- a data set


def label_dataset(model: CondInst, annotations: CocoBoxes, *, min_size: int, max_size: int,
                  score_threshold: float = SCORE_THRESHOLD, classes: Tensor | None = None, batch_size: int = 1,
                  workers: int = 2, device: torch.device | str = "cpu") -> BoxMasks:
    """label_image for every box of a data set, in the order of annotations.boxes.

    classes: the model's class for each class of the data set, or -1; see label_image. An image that cannot be decoded
    is named, and its boxes have no mask.
    """
    n = len(annotations.boxes)
    rles, scores, sources = [None] * n, np.zeros(n), [None] * n
    place = {image_id: i for i, image_id in enumerate(annotations.image_ids.tolist())}
    images = TestImages(annotations, min_size, max_size)
    model.eval()
    for batch in readable_batches(images, "label", batch_size=batch_size, workers=workers, device=device):
        with torch.no_grad():
            predictions = model(batch.images, batch.sizes)
        for b, image_id in enumerate(batch.image_ids):
            own = None if classes is None else classes.to(device)[batch.labels[b]]
            k = slice(*annotations.offsets[place[image_id]:place[image_id] + 2])
            rles[k], scores[k], sources[k] = label_image(predictions.of_image(b), batch.boxes[b], batch.sizes[b],
                                                         batch.original_sizes[b], score_threshold, own)
    return BoxMasks(rles, scores, sources)


class ColourMasks(Dataset):
    """Item i is the masks and scores of the boxes of image i from refine.py, or what went wrong with the image."""

    def __init__(self, annotations: CocoBoxes):
        self.annotations = annotations

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, i: int) -> tuple[list[dict], np.ndarray] | str:
        size, boxes = self.annotations.size(i), torch.from_numpy(self.annotations.image_boxes(i)[0])
        try:
            image = pixels(load_image(self.annotations.path(i), size))
        except UndecodableImage as error:
            return str(error)
        guess = ellipse().expand(len(boxes), -1, -1)
        return pixel_masks(color_masks(image, boxes, guess), guess, boxes, size)

    @staticmethod
    def collate(item):
        """An item as it is; the DataLoader's own way would turn its arrays into tensors."""
        return item


def label_without_model(annotations: CocoBoxes, workers: int = 2) -> BoxMasks:
    """Masks from boxes and colours alone, in the order of annotations.boxes, as in label_dataset."""
    n = len(annotations.boxes)
    rles, scores, sources = [None] * n, np.zeros(n), [None] * n
    loader = DataLoader(ColourMasks(annotations), batch_size=None, num_workers=workers,
                        collate_fn=ColourMasks.collate)
    for i, item in enumerate(tqdm(loader, desc="label", unit="image", disable=None)):
        if isinstance(item, str):
            warn(f"{item}; it is left out")
        else:
            k = slice(*annotations.offsets[i:i + 2])
            rles[k], scores[k], sources[k] = *item, [COLOURS] * len(item[0])
    return BoxMasks(rles, scores, sources)


def model_classes(trained: list[dict] | None, classes: list[dict]) -> Tensor:
    """The model's class of the same name for each class of a data set; -1 for a name that the model lacks."""
    places = {} if trained is None else {c["name"]: i for i, c in enumerate(trained)}
    return torch.tensor([places.get(c["name"], -1) for c in classes])


def with_masks(annotations: CocoBoxes, labels: BoxMasks, min_score: float = 0.0) -> dict:
    """The annotation file with `segmentation`, `area`, `score` and `source` of the boxes replaced, the rest unchanged.

    A box without a mask, or whose mask scores below min_score, has the segmentation [] and its old area: training with
    masks then learns its box alone. Crowds are left as they are.
    """
    with open(annotations.json_path, encoding="utf-8-sig") as file:
        content = json.load(file)
    for annotation in content["annotations"]:
        if not annotation.get("iscrowd"):
            annotation |= {"segmentation": [], "score": 0.0, "source": None}
    for row, rle, score, source in zip(annotations.rows.tolist(), labels.rles, labels.scores.tolist(), labels.sources):
        content["annotations"][row] |= {"score": score, "source": source}
        if rle is not None and score >= min_score:
            content["annotations"][row] |= {"segmentation": rle, "area": int(coco_mask.area(rle))}
    return content


def polygons(rle: dict) -> list[list[float]]:
    """The outlines of a mask as COCO polygons, x and y in turn, pixels; holes are filled. Raises UserError if OpenCV is
    missing.

    OpenCV's contours run through the middles of the outer pixels. Those of the mask enlarged four times lie an eighth
    of a pixel inside its edge, near enough for pycocotools to draw the same pixels.
    """
    cv2 = optional("cv2", "--polygons")
    mask = coco_mask.decode(rle).repeat(4, 0).repeat(4, 1)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [((contour.reshape(-1) + 0.5) / 4).tolist() for contour in contours]


# --------------------------------------------------------------------------- against masks that the file has


def agreement(annotations: CocoBoxes, rles: list[dict | None]) -> tuple[np.ndarray, np.ndarray]:
    """IoU with the masks of the annotations, (m,): of the masks `rles`, and of the filled boxes."""
    masks, filled = np.zeros(len(rles)), np.zeros(len(rles))
    for i, k in ((i, k) for i in range(len(annotations)) for k in range(*annotations.offsets[i:i + 2])):
        truth = annotations.rle(i, k)
        x0, y0, x1, y1 = annotations.boxes[k].astype(float)
        box = coco_mask.frPyObjects(np.array([[x0, y0, x1 - x0, y1 - y0]]), *annotations.size(i))
        filled[k] = coco_mask.iou(box, [truth], [0])[0, 0]
        masks[k] = 0 if rles[k] is None else coco_mask.iou([rles[k]], [truth], [0])[0, 0]
    return masks, filled


def report_agreement(annotations: CocoBoxes, labels: BoxMasks) -> None:
    """Print the quality of the masks by source, size (COCO's ranges of area) and score."""
    masks, filled = agreement(annotations, labels.rles)
    given, sources = np.array([rle is not None for rle in labels.rles], bool), np.array(labels.sources, object)
    best_first = np.flatnonzero(given)[np.argsort(-labels.scores[given], kind="stable")]
    quarter = max(1, len(best_first) // 4)
    sides = np.sqrt((annotations.boxes[:, 2:] - annotations.boxes[:, :2]).prod(1))
    rows = [("all boxes", np.ones(len(masks), bool)), ("boxes without a mask", ~given), ("boxes with a mask", given)]
    made_by = [COLOURS] if COLOURS in labels.sources else [ASSIGNED, PROMPTED]
    rows += [(f"    {source}", sources == source) for source in made_by]
    rows += [(f"    {text}", given & (low <= sides) & (sides < high)) for text, low, high in (
        ("under 32 x 32 pixels", 0, 32), ("32 x 32 to 96 x 96", 32, 96), ("larger", 96, np.inf))]
    rows += [("    the quarter of the best scores", np.isin(np.arange(len(masks)), best_first[:quarter])),
             ("    the quarter of the worst scores", np.isin(np.arange(len(masks)), best_first[-quarter:]))]
    print(f"mean IoU with the masks that the file has\n{'':36}{'number':>8}{'filled':>8}{'mask':>8}")
    for text, of in rows:
        cells = [f"{values[of].mean():8.3f}" if of.any() else f"{'-':>8}" for values in (filled, masks)]
        print(f"{text:36}{of.sum():8}" + "".join(cells))
    print(f"masks, boxes filled where there is none: {np.where(given, masks, filled).mean():.3f}")
