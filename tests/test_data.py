"""data.py: views, the order of training, padded batches."""
import os

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from data import AUGMENTATIONS, Batch, Blur, TestImages, TrainBatches, resized_size, view_boxes, view_mask
from formats.coco import CocoBoxes, DataError, datasets
from formats.pictures import check_sizes
from helpers import annotation, noise_image, write_set


def batches(annotations, **options):
    return TrainBatches(annotations, **{"batch_size": 4, "min_sizes": [16, 24, 40], "max_size": 64} | options)


def assert_same(first: Batch, second: Batch):
    for name, a, b in zip(Batch._fields, first, second):
        assert type(a) is type(b), name
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), name
        elif isinstance(a, list) and a and isinstance(a[0], torch.Tensor):
            assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b)), name
        else:
            assert a == b, name


# ----------------------------------------------------------------------------------------------- views

@pytest.mark.parametrize("size, limits, expected", [
    ((480, 640), (800, 1333), (800, 1067)),      # 1066.67, rounded
    ((500, 375), (800, 1333), (1067, 800)),
    ((427, 1280), (800, 1333), (445, 1333)),     # limited by the longer side: 444.67
    ((100, 200), (25, 50), (25, 50)),
    ((2, 3), (3, 9), (3, 5)),                    # 4.5 is rounded up
    ((1, 5000), (800, 1333), (1, 1333)),         # at least one pixel
])
def test_resized_size(size, limits, expected):
    assert resized_size(*size, *limits) == expected


def test_boxes_are_scaled_and_mirrored():
    boxes = np.array([[2, 4, 10, 12]], np.float32)
    assert view_boxes(boxes, (20, 40), (40, 60), False).tolist() == [[3, 8, 15, 24]]
    mirrored = view_boxes(boxes, (20, 40), (40, 60), True)
    assert mirrored.tolist() == [[45, 8, 57, 24]]
    assert view_boxes(mirrored.numpy(), (40, 60), (40, 60), True).tolist() == [[3, 8, 15, 24]]
    assert view_boxes(np.zeros((0, 4), np.float32), (20, 40), (40, 60), True).shape == (0, 4)


def test_masks_are_sampled_at_the_pixels_2_6_10():
    mask = np.zeros((16, 24), np.uint8)
    mask[4:12, 3:7] = 1                    # rows 6, 10; column 6 of the columns 2, 6, 10, ...
    plain = view_mask(mask, (16, 24), False)
    assert plain.shape == (4, 6) and plain.nonzero().tolist() == [[1, 1], [2, 1]]
    # Mirrored, the mask covers the columns 17 to 20, and 18 is among 2, 6, 10, 14, 18, 22.
    assert view_mask(mask, (16, 24), True).nonzero().tolist() == [[1, 4], [2, 4]]
    assert torch.equal(view_mask(mask[:, ::-1], (16, 24), True), plain)
    # At twice the size it covers the rows 8 to 23 and the columns 6 to 13 of 32 x 48.
    doubled = view_mask(mask, (32, 48), False)
    assert doubled.nonzero().tolist() == [[r, c] for r in range(2, 6) for c in (1, 2)]
    noise = np.random.default_rng(0).integers(0, 2, (17, 23), dtype=np.uint8)
    for flip in (False, True):
        expected = [[noise[int((r + 0.5) * 17 / 29), int(((38 - c if flip else c) + 0.5) * 23 / 39)]
                     for c in range(2, 39, 4)] for r in range(2, 29, 4)]
        assert view_mask(noise, (29, 39), flip).tolist() == expected
    # Of an odd size: 15 rows contain the pixels 2, 6, 10 and 14.
    assert view_mask(mask, (15, 22), False).shape == (4, 5)


# --------------------------------------------------------------------------------------------- the order

def epoch_of(train, epoch=0):
    return [train.order(k) for k in range(epoch * train.epoch_length, (epoch + 1) * train.epoch_length)]


def test_an_epoch_is_a_permutation_that_drops_the_rest(tmp_path):
    coco = CocoBoxes(*write_set(tmp_path, sizes=[(4, 5), (5, 4), (4, 4)] * 6 + [(5, 4)]))      # 19 images
    train = batches(coco)
    first, second = epoch_of(train), epoch_of(train, 1)
    assert len(first) == 19 // 4
    for epoch in (first, second):
        images = sum(epoch, [])
        assert len(images) == len(set(images)) == 16 and set(images) <= set(range(19))
    assert first != second and epoch_of(batches(coco, seed=1)) != first
    assert sorted(map(sorted, first)) != sorted(map(sorted, second))       # the batches differ as well


def test_order_is_the_same_from_any_start_and_for_any_number_of_processes(tmp_path):
    coco = CocoBoxes(*write_set(tmp_path, sizes=[(4, 5), (5, 4)] * 7))
    straight = [batches(coco).order(k) for k in range(9)]
    train = batches(coco, rank=1, world_size=2)
    assert [train.order(k) for k in (8, 2, 5)] == [straight[k] for k in (8, 2, 5)]


def test_landscape_and_portrait_mix_only_in_the_leftovers(tmp_path):
    coco = CocoBoxes(*write_set(tmp_path, sizes=[(4, 5)] * 10 + [(5, 4)] * 11))
    places, dropped = set(), set()
    for epoch in range(8):
        plan = epoch_of(batches(coco), epoch)
        dropped |= {p < 10 for p in set(range(21)) - set(sum(plan, []))}
        mixed = [len({p < 10 for p in batch}) == 2 for batch in plan]
        assert sum(mixed) == 1                               # 2 landscape and 3 portrait images are left over
        places.add(mixed.index(True))
    assert len(places) > 2                                   # the batches are shuffled as well
    assert dropped == {True, False}                          # images of both shapes are dropped


def test_choices_differ_between_places_and_steps(tmp_path):
    train = batches(CocoBoxes(*write_set(tmp_path)))
    choices = [[train.choose(k, place, 0) for place in range(4)] for k in range(20)]
    assert len({one.colour_seed for step in choices for one in step}) == 80
    flips, sizes = zip(*((one.flip, one.min_size) for one in sum(choices, [])))
    assert set(sizes) == {16, 24, 40} and 20 < sum(flips) < 60
    assert train.choose(3, 1, 0) == choices[3][1] != batches(train.annotations, seed=1).choose(3, 1, 0)


def test_fewer_images_than_a_batch_needs(tmp_path):
    train = batches(CocoBoxes(*write_set(tmp_path)), batch_size=8)
    for k in range(3):
        counts = np.bincount(train.order(k), minlength=3)
        assert counts.sum() == 8 and counts.max() <= 3
    assert train[0].images.shape[0] == 8


def test_processes_share_the_batch_of_a_single_process(tmp_path):
    coco = CocoBoxes(*write_set(tmp_path, sizes=[(20, 30), (44, 20), (20, 30), (31, 20)]))
    options = {"augment": "strong", "teacher_size": (24, 64)}
    for k in range(4):
        whole = batches(coco, **options)[k]
        left, right = (batches(coco, rank=rank, world_size=2, **options)[k] for rank in (0, 1))
        for name, a, b, both in zip(Batch._fields, left, right, whole):
            if isinstance(both, torch.Tensor):
                assert torch.equal(torch.cat([a, b]), both), name              # and so has the padding
            elif both and isinstance(both[0], torch.Tensor):
                assert all(torch.equal(x, y) for x, y in zip(a + b, both)), name
            elif both is not None:
                assert a + b == both, name


def test_workers_change_nothing(tmp_path):
    coco = CocoBoxes(*write_set(tmp_path, sizes=[(20, 30), (30, 20)] * 3))
    train = batches(coco, batch_size=2, augment="strong-blur", teacher_size=(24, 64))
    alone, helped = (list(DataLoader(train, batch_size=None, sampler=range(3, 9), num_workers=workers,
                                      collate_fn=TrainBatches.collate))
                     for workers in (0, 2))
    assert len(alone) == len(helped) == 6
    for one, two, k in zip(alone, helped, range(3, 9)):
        assert_same(one, two)
        assert_same(one, train[k])


# --------------------------------------------------------------------------------------------- the batch

def test_padding_is_zero_and_the_true_sizes_are_kept(tmp_path):
    coco = CocoBoxes(*write_set(tmp_path, sizes=[(20, 30), (36, 44), (20, 30), (20, 21)]))
    batch = batches(coco, min_sizes=[20], max_size=64, teacher_size=(40, 90), augment="strong")[0]
    assert batch.images.dtype == batch.augmented.dtype == torch.uint8
    assert batch.images.shape == (4, 3, 32, 32) and batch.teacher_images.shape == (4, 3, 64, 64)
    assert sorted(batch.sizes) == [(20, 21), (20, 24), (20, 30), (20, 30)]
    assert sorted(batch.teacher_sizes) == [(40, 42), (40, 49), (40, 60), (40, 60)]
    assert sorted(batch.original_sizes) == [(20, 21), (20, 30), (20, 30), (36, 44)]
    for views, sizes in ((batch.images, batch.sizes), (batch.augmented, batch.sizes),
                         (batch.teacher_images, batch.teacher_sizes)):
        for image, (height, width) in zip(views, sizes):
            assert not image[:, height:].any() and not image[:, :, width:].any()
            assert image[:, :height, :width].sum(0).bool().any(0).all()   # no column of the image is empty


def test_flip_and_boxes_agree_and_the_teacher_is_flipped_alike(tmp_path):
    """A white box on black: in every view the box must cover exactly the white pixels."""
    json_path, folder = write_set(tmp_path, sizes=[(32, 64)], annotations=[annotation(1, 10, [4, 8, 12, 16])])
    white = np.zeros((32, 64, 3), np.uint8)
    white[8:24, 4:16] = 255
    Image.fromarray(white).save(os.path.join(folder, "0.png"))
    train = batches(CocoBoxes(json_path, folder), batch_size=1, min_sizes=[32, 64], max_size=128,
                    teacher_size=(64, 128))
    seen = set()
    for k in range(20):
        batch = train[k]
        scale = batch.sizes[0][0] / 32
        for image, factor in ((batch.images, 1), (batch.teacher_images, 64 / batch.sizes[0][0])):
            rows, columns = (image[0, 0] > 127).nonzero().unbind(1)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert torch.equal(torch.stack(edges).float(), batch.boxes[0][0] * factor)
        seen.add((scale, batch.boxes[0][0, 0].item() / scale))
    assert seen == {(1, 4), (2, 4), (1, 48), (2, 48)}            # both sizes, plain and mirrored (64 - 16)


def test_batches_are_channels_last_and_stay_so_in_workers_and_pinning(tmp_path):
    """With two images, since one cannot tell the layouts apart; pinning needs a CUDA device."""
    train = batches(CocoBoxes(*write_set(tmp_path)), batch_size=2, augment="strong", teacher_size=(24, 64))
    for workers in (0, 1):
        for batch in DataLoader(train, batch_size=None, sampler=range(2), num_workers=workers,
                                collate_fn=TrainBatches.collate, pin_memory=torch.cuda.is_available()):
            for views in (batch.images, batch.augmented, batch.teacher_images, batch.to("meta").images):
                assert views.is_contiguous(memory_format=torch.channels_last) and not views.is_contiguous()


def test_equal_views_of_student_and_teacher_are_made_once(tmp_path):
    coco = CocoBoxes(*write_set(tmp_path, sizes=[(20, 30), (30, 20), (20, 80)]))
    alike = batches(coco, min_sizes=[24], max_size=64, teacher_size=(24, 64))[0]
    assert alike.teacher_images is alike.images and alike.teacher_sizes == alike.sizes
    # (20, 80) becomes (16, 64) for both, limited by the longer side; the other images have two views
    apart = batches(coco, min_sizes=[24], max_size=64, teacher_size=(32, 64))[0]
    assert torch.equal(apart.images, alike.images) and apart.teacher_images.data_ptr() != apart.images.data_ptr()
    assert {(16, 64), (32, 48)} <= set(apart.teacher_sizes)
    narrow = apart.teacher_sizes.index((16, 64))
    assert torch.equal(apart.teacher_images[narrow, :, :16, :64], apart.images[narrow, :, :16, :64])


def test_no_views_for_a_missing_augmentation_or_teacher(tmp_path):
    batch = batches(CocoBoxes(*write_set(tmp_path)))[0]
    assert batch.augmented is None and batch.teacher_images is None and batch.teacher_sizes == []


@pytest.mark.parametrize("name", ["weak", "strong", "strong-blur"])
def test_augmentation_is_seeded_and_spares_the_clean_view(tmp_path, name):
    coco = CocoBoxes(*write_set(tmp_path))
    plain, train = batches(coco), batches(coco, augment=name)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    colourful = [train[k] for k in range(5)]
    assert torch.equal(torch.get_rng_state(), state)             # the global generator is not used
    torch.manual_seed(1)
    for k, batch in enumerate(colourful):
        assert torch.equal(batch.images, plain[k].images)
        assert torch.equal(batch.augmented, train[k].augmented)
    changed = sum(not torch.equal(a, b) for batch in colourful for a, b in zip(batch.images, batch.augmented))
    assert 0 < changed < 12 if name == "weak" else changed >= 12     # of 20, with p = 0.2, or 0.84 and more


def test_augmentations_are_those_of_table_9():
    strong, gray = AUGMENTATIONS["strong"].transforms
    weak = AUGMENTATIONS["weak"]
    assert (weak.p, strong.p, gray.p) == (0.2, 0.8, 0.2)
    for jitter, strength in ((weak.transforms[0], 0.2), (strong.transforms[0], 0.4)):
        for limits in (jitter.brightness, jitter.contrast, jitter.saturation):
            assert tuple(limits) == (1 - strength, 1 + strength)
        assert tuple(jitter.hue) == (-0.1, 0.1)
    *same, blur = AUGMENTATIONS["strong-blur"].transforms
    assert same == [strong, gray] and blur.p == 0.5
    assert tuple(blur.transforms[0].kernel_size) == (3, 3) and tuple(blur.transforms[0].sigma) == (0.1, 2.0)


@pytest.mark.parametrize("size", [(40, 60), (2, 9)])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_torchvisions(size, sigma):
    """Up to the rounding of sums that are almost a half."""
    image = noise_image(0, *size)
    ours = np.array(Blur(3, (sigma, sigma))(image)).astype(int)
    theirs = np.array(v2.GaussianBlur(3, (sigma, sigma))(image)).astype(int)
    assert abs(ours - theirs).max() <= 1 and (ours != theirs).mean() < 1e-3
    assert Blur(3, (sigma, sigma))(noise_image(1, 1, 5)).size == (5, 1)      # an error in torchvision's


def test_masks_follow_the_view(tmp_path):
    """Filled boxes as polygon, plain and compressed RLE: the masks are boxes too, False in the padding."""
    rectangle = np.zeros((32, 64), np.uint8, order="F")
    rectangle[8:24, 4:16] = 1
    compressed = coco_mask.encode(rectangle)
    flat = rectangle.flatten(order="F")
    runs = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])).tolist()
    forms = [[[4, 8, 16, 8, 16, 24, 4, 24]], {"size": [32, 64], "counts": runs},
             {"size": [32, 64], "counts": compressed["counts"].decode()}]
    rows = [annotation(1 + i, 10, [4, 8, 12, 16], segmentation=form) for i, form in enumerate(forms)]
    coco = CocoBoxes(*write_set(tmp_path, sizes=[(32, 64), (32, 64)], annotations=rows), masks=True)
    assert coco.rles.dtype == np.uint8
    train = batches(coco, batch_size=2, min_sizes=[32, 64], max_size=128)
    for k in range(8):
        batch = train[k]
        for image_id, size, masks, boxes in zip(batch.image_ids, batch.sizes, batch.masks, batch.boxes):
            quarter = [side // 4 for side in batch.images.shape[2:]]
            assert list(masks.shape) == [3 if image_id == 10 else 0, *quarter]
            for mask, (x0, y0, x1, y1) in zip(masks, boxes.tolist()):
                expected = torch.zeros_like(mask)
                y, x = torch.meshgrid(*(torch.arange(n) * 4 + 2 for n in mask.shape), indexing="ij")
                expected[(y >= y0) & (y < y1) & (x >= x0) & (x < x1)] = True
                assert torch.equal(mask, expected) and mask.any()


def test_an_undecodable_image_is_replaced_by_the_next_and_fits_the_canvas(tmp_path):
    json_path, folder = write_set(tmp_path, sizes=[(20, 20), (20, 60), (20, 20)])
    cut = os.path.join(folder, "0.png")
    open(cut, "r+b").truncate(600)
    coco = CocoBoxes(json_path, folder)
    train = batches(coco, batch_size=1, min_sizes=[20], max_size=64, teacher_size=(40, 128))
    k = next(k for k in range(10) if train.order(k) == [0])
    batch = train[k]
    assert batch.image_ids == [11] and batch.original_sizes == [(20, 60)]
    assert len(batch.skipped) == 1 and cut in batch.skipped[0] and "\n" not in batch.skipped[0]
    # The canvas was made for image 0; all 60 columns of its substitute and its boxes must fit.
    assert batch.images.shape == (1, 3, 32, 32) and batch.sizes == [(10, 32)]
    assert batch.teacher_images.shape == (1, 3, 64, 64) and batch.teacher_sizes == [(21, 64)]
    assert (batch.boxes[0][:, 2:] <= torch.tensor([32, 10])).all()
    other = next(k for k in range(10) if train.order(k) == [2])
    assert train[other].skipped == []


def test_images_without_boxes_are_trained_on(tmp_path):
    coco = CocoBoxes(*write_set(tmp_path, annotations=[annotation(1, 11, [1, 1, 9, 9])]))
    batch = batches(coco, batch_size=3)[0]
    assert sorted(len(boxes) for boxes in batch.boxes) == [0, 0, 1]
    assert all(boxes.shape[1] == 4 and boxes.dtype == torch.float32 for boxes in batch.boxes)
    assert all(labels.dtype == torch.int64 for labels in batch.labels)


def test_batch_to_keeps_sizes_as_tuples(tmp_path):
    batch = batches(CocoBoxes(*write_set(tmp_path)), teacher_size=(24, 64))[0]
    moved = batch.to("meta")
    for tensor in (moved.images, moved.teacher_images, *moved.boxes, *moved.labels):
        assert tensor.is_meta
    assert moved.sizes == batch.sizes and isinstance(moved.sizes[0], tuple) and moved.augmented is None


def test_evaluation_covers_all_images_with_scaled_boxes(tmp_path):
    coco = CocoBoxes(*write_set(tmp_path, annotations=[annotation(1, 11, [2, 3, 10, 8])]))
    loader = DataLoader(TestImages(coco, 40, 64), batch_size=2, collate_fn=TestImages.collate)
    first, last = list(loader)
    assert first.image_ids + last.image_ids == [10, 11, 12]
    assert first.sizes == [(40, 60), (60, 40)] and first.images.shape == (2, 3, 64, 64)
    assert last.images.shape == (1, 3, 64, 64) and first.boxes[0].shape == (0, 4)
    assert first.boxes[1].tolist() == [[4, 6, 24, 22]] and first.masks is None and first.teacher_sizes == []


def test_real_images(coco_mini):
    coco = CocoBoxes(*datasets(str(coco_mini))[0], masks=True)
    check_sizes(coco)
    batch = batches(coco, min_sizes=[160], max_size=256, teacher_size=(160, 256))[0]
    assert torch.equal(batch.images, batch.teacher_images)
    for masks, boxes in zip(batch.masks, batch.boxes):
        rows = torch.arange(masks.shape[1])[None, :, None] * 4 + 2
        x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)
        columns = torch.arange(masks.shape[2])[None, None] * 4 + 2
        # Within a pixel of the file, by which annotators' boxes and masks differ.
        near = (rows > y0 - 2) & (rows < y1 + 2) & (columns > x0 - 2) & (columns < x1 + 2)
        assert not (masks & ~near).any() and (masks.any() or not len(masks))


def test_only_training_needs_a_usable_box(tmp_path):
    coco = CocoBoxes(*write_set(tmp_path, annotations=[]))
    assert len(TestImages(coco, 20, 64)) == 3
    with pytest.raises(DataError, match="set.json has no usable box"):
        batches(coco)


def test_wrong_options():
    class Empty:
        boxes, sizes = np.zeros((1, 4)), np.ones((1, 2))
        def __len__(self):
            return 1
    with pytest.raises(ValueError, match="3 processes"):
        batches(Empty(), world_size=3)
    with pytest.raises(ValueError, match="strongest"):
        batches(Empty(), augment="strongest")
