"""COCO box and mask AP of a checkpoint (Sec. 4).

    python evaluate.py --ckpt runs/boxteacher-r50-coco/final.pt --data coco
    torchrun --nproc_per_node=8 evaluate.py --ckpt ... --results detections.json --metrics metrics.json
    python evaluate.py --ckpt ... --data cityscapes --cityscapes-results runs/for-cityscapes
    python evaluate.py --curves curves.png runs/boxinst-r50-coco runs/boxteacher-r50-coco

`evaluate` runs a model over a data set and returns its detections in COCO's results format, `coco_metrics` scores them
with pycocotools, and `print_tables` prints the figures. train.py calls the same three.
"""
import argparse
import contextlib
from collections import Counter
from collections.abc import Callable
from types import ModuleType

import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import Batch, TestImages
from formats.checkpoint import check_classes
from formats.coco import NAMES, CocoBoxes, datasets, ground_truth
from formats.files import CommandLine, UserError, one_line_errors
from formats.pictures import check_sizes
from model import Instances, Predictions, find_instances, load_model
from tools import cityscapes_score
from tools.command_line import (AMP, RESCORE, go_together, input_size, model_options, output_file, pick_amp, positive,
                                print_table, probability, rescored, write_json)
from tools.curves import draw_curves
from tools.draw import sheet, sheet_rows
from tools.processes import gathered, loaded, start_distributed
from tools.quality import matches, report

FIGURES = ["AP", "AP50", "AP75", "APs", "APm", "APl"]  # the first six numbers of COCOeval.stats


def evaluate(model: torch.nn.Module, annotations: CocoBoxes, *, score_threshold: float = 0.05, rescore: bool = True,
             **options) -> list[dict]:
    """The detections of all images, in the order of the images, in COCO's results format (see `coco_results`).

    options: sizes, batches and device, see `over_images`.
    """
    def detections(predictions: Predictions, batch: Batch) -> list[dict]:
        instances = find_instances(predictions, batch.sizes, batch.original_sizes, score_threshold, rescore)
        return [result for image_id, one in zip(batch.image_ids, instances)
                for result in coco_results(image_id, one, annotations.classes)]

    return over_images(model, annotations, "evaluate", detections, **options)


@torch.no_grad()
def over_images(model: torch.nn.Module, annotations: CocoBoxes, title: str,
                work: Callable[[Predictions, Batch], list], *, min_size: int = 800, max_size: int = 1333,
                batch_size: int = 1, workers: int = 2, device: torch.device | str = "cpu",
                progress: bool = True, worker_init_fn=None) -> list:
    """Call `work` with the predictions of each batch, in eval mode, and join its lists in the order of the images.

    min_size and max_size: shorter and longest side of the input, pixels. Under torch.distributed each process takes
    every world_size-th batch, and all return the whole list. An image's padding depends on its batch, so whole batches
    are dealt out: the number of processes does not change the results. Raises DataError for an image that cannot be
    decoded. What is raised on one process ends the evaluation of all.
    """
    device = torch.device(device)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    indices = range(len(annotations))
    batches = [indices[i:i + batch_size] for i in range(0, len(indices), batch_size)][rank::world_size]
    images = TestImages(annotations, min_size, max_size)

    def loader_from(i: int) -> DataLoader:
        return DataLoader(images, batch_sampler=batches[i:], collate_fn=TestImages.collate, num_workers=workers,
                          worker_init_fn=worker_init_fn, pin_memory=device.type == "cuda")

    silent = True if rank or not progress else None  # None: silent unless stderr is a terminal
    found, problem, was_training = [], None, model.training
    model.eval()
    try:
        for batch in tqdm(loaded(loader_from, 0, len(batches)), title, len(batches), unit="batch", disable=silent):
            batch = batch.to(device)
            found.append(work(model(batch.images, batch.sizes), batch))
    except Exception as error:  # the others must not wait for this process
        problem = error
    finally:
        model.train(was_training)
    return gather(found, problem)


def coco_results(image_id: int, instances: Instances, classes: list[dict]) -> list[dict]:
    """The instances of an image in COCO's results format: category ids of the data set, bbox xywh in pixels, RLE."""
    boxes = instances.boxes.double()
    boxes[:, 2:] -= boxes[:, :2]  # xyxy -> xywh
    rows = zip(instances.labels.tolist(), instances.scores.tolist(), boxes.tolist(), instances.rles)
    return [{"image_id": image_id, "category_id": classes[label]["id"], "score": score, "bbox": box,
             "segmentation": rle} for label, score, box, rle in rows]


def gather(found: list[list], problem: Exception | None = None) -> list:
    """Join the results of all batches: batch k of process r is batch k * world_size + r of all. Raises `problem`, or
    UserError for that of another process."""
    everyone = gathered(found if problem is None else str(problem), "the predictions of all processes")
    if problem is not None:
        raise problem
    for rank, results in enumerate(everyone):
        if isinstance(results, str):
            raise UserError(f"process {rank}: {results}")
    return [result for k in range(len(everyone[0]))  # the first process has the most batches
            for batches in everyone if k < len(batches) for result in batches[k]]


def coco_metrics(json_path: str, results: list[dict]) -> dict:
    """Figures in percent: {"bbox": {"AP", ..., "APl"}, "segm": the same, "per_class": {name: {"bbox", "segm"}}}.

    A figure is None without ground truth (no large object, say), and segm is None if an annotation has no mask.
    """
    truth = ground_truth(json_path)
    objects = truth.dataset["annotations"]
    without_mask = sum(not annotation.get("segmentation") for annotation in objects)
    if without_mask:
        print(f"segm AP skipped: {without_mask} of {len(objects)} annotations have no mask")
    box, box_classes = coco_figures(truth, results, "bbox")
    segm, segm_classes = (None, {}) if without_mask else coco_figures(truth, results, "segm")
    categories = truth.dataset["categories"]
    uses = Counter(c["name"] for c in categories)
    names = {c["id"]: c["name"] if uses[c["name"]] == 1 else f"{c['name']} ({c['id']})" for c in categories}
    per_class = {names[i]: {"bbox": box_classes[i], "segm": segm_classes.get(i)} for i in sorted(names)}
    return {"bbox": box, "segm": segm, "per_class": per_class}


def coco_figures(truth: COCO, results: list[dict], kind: str) -> tuple[dict, dict]:
    """Run COCOeval for "bbox" or "segm". Returns the six FIGURES and the AP by category id, percent or None."""
    # For masks, APs, APm and APl go by the area of the mask; if a result has a "bbox", loadRes takes that of the box.
    left_out = {"bbox": "segmentation", "segm": "bbox"}[kind]
    results = [{key: value for key, value in result.items() if key != left_out} for result in results]
    with contextlib.redirect_stdout(None):
        found = truth.loadRes(results) if results else COCO()  # loadRes refuses an empty list
        scorer = COCOeval(truth, found, kind)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    figures = {name: percent(value) for name, value in zip(FIGURES, scorer.stats)}
    precision = scorer.eval["precision"][:, :, :, 0, -1]  # (IoUs, recalls, classes), all areas
    per_class = {i: percent(precision[:, :, k].mean()) for k, i in enumerate(scorer.params.catIds)}
    return figures, per_class


def percent(value: float) -> float | None:
    """COCOeval gives -1 without ground truth; here that is None."""
    return None if value < 0 else 100 * float(value)


def print_tables(metrics: dict) -> None:
    """The box table, the mask table and the AP of each class, in percent."""
    for kind, title in (("bbox", "box"), ("segm", "mask")):
        print_table(title, FIGURES, {"": [(metrics[kind] or {}).get(name) for name in FIGURES]})
    print_table("class AP", ("box", "mask"), {name: (figures["bbox"], figures["segm"])
                                              for name, figures in metrics["per_class"].items()})


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(description="Box and mask AP of a checkpoint.",
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ckpt", metavar="FILE", help="a checkpoint of this project, or one that BoxTeacher's authors or AdelaiDet "
        "released (BoxTeacher, BoxInst, CondInst)")
    add("--curves", nargs="+", metavar=("FILE", "RUN"), help="instead of --ckpt: draw the losses, label quality and AP "
        "of these run folders over the iterations (PNG)")
    add("--data", default="coco", help=f"{', '.join(NAMES)} (under datasets/), or a folder in COCO layout")
    add("--val-json", metavar="FILE", help="annotations in COCO format, instead of those of --data")
    add("--val-images", metavar="DIR", help="the images of --val-json")
    model_options(add)
    add("--amp", **AMP)
    add("--batch-size", type=positive, default=1, help="images per forward pass of one process")
    add("--score-threshold", type=probability, default=0.05, help="drop detections below it (0 to 1)")
    add("--rescore", **RESCORE)
    add("--results", metavar="FILE", help="write the detections there, in COCO results format (JSON)")
    add("--metrics", metavar="FILE", help="write all figures there, AP in percent (JSON)")
    add("--cityscapes-results", metavar="DIR", help="write the detections there in the format of Cityscapes' own "
        "scripts, and report their AP too if the package cityscapesscripts is installed")
    add("--sheet", metavar="FILE", help="draw boxes, predictions and ground truth there (PNG or JPEG)")
    add("--sheet-count", type=positive, default=12, help="number of images on the sheet")
    add("--score-quality", metavar="FILE", help="correlate the scores of Table 5 with the IoU of the masks, and draw "
        "one against the other there (PNG); runs the model a second time")
    args = parser.parse_args(argv)
    if (args.ckpt is None) == (args.curves is None):
        parser.error("either --ckpt FILE or --curves FILE RUN... is needed, not both")
    if args.curves and len(args.curves) < 2:
        parser.error("argument --curves: expected FILE RUN..., the figure to write and at least one run's folder")
    if args.curves and any((args.results, args.metrics, args.sheet, args.score_quality, args.cityscapes_results)):
        parser.error("argument --curves: nothing is evaluated, so no other output can be written")
    go_together(parser, args, "--val-json", "--val-images")
    return args


def run(args: argparse.Namespace) -> None:
    """Evaluate --ckpt. Everything that may be wrong with the options is found before the evaluation."""
    rank, _, device = start_distributed(args.device)
    if rank == 0:
        for path in (args.results, args.metrics, args.sheet, args.score_quality):
            output_file(path)
    _, (json_path, image_dir) = datasets(args.data, val_json=args.val_json, val_images=args.val_images)
    model, info = load_model(args.ckpt, args.weights)
    annotations = CocoBoxes(json_path, image_dir, masks=args.score_quality is not None, evaluated=True, exif=args.exif,
                            max_pixels=args.max_pixels)
    check_classes(args.ckpt, info, json_path, annotations.classes)
    rescore = rescored(args.rescore, info["method"])
    min_size, max_size = input_size(args, info)
    scripts = None
    if rank == 0:
        check_sizes(annotations)
        if args.cityscapes_results:
            scripts = cityscapes_score.prepare(annotations, args.cityscapes_results)
        print(f"{info['method']} {info['model']['backbone']}, {info['weights']}'s weights, scores "
              f"{'rescored by masks' if rescore else 'of the detector'}: {len(annotations)} images at "
              f"{min_size}/{max_size} pixels", flush=True)

    options = dict(min_size=min_size, max_size=max_size, batch_size=args.batch_size, workers=args.workers,
                   device=device)
    model.amp_dtype = pick_amp(args.amp, device)
    results = evaluate(model.to(device), annotations, rescore=rescore, score_threshold=args.score_threshold, **options)
    pairs = None
    if args.score_quality:
        pairs = over_images(model, annotations, "score quality",
                            lambda predictions, batch: matches(predictions, batch, args.score_threshold), **options)
    if rank == 0:
        write_outputs(args, annotations, results, pairs, scripts)
    if dist.is_initialized():
        dist.destroy_process_group()


def write_outputs(args: argparse.Namespace, annotations: CocoBoxes, results: list[dict], pairs: list | None,
                  scripts: ModuleType | None) -> None:
    """Print the tables and write the files that the options name.

    pairs: of score and IoU, for --score-quality; scripts: those of Cityscapes, if they are installed.
    """
    write_json(args.results, results)
    if not len(annotations.boxes):
        print(f"{annotations.no_box}; no AP")
    metrics = coco_metrics(annotations.json_path, results)
    write_json(args.metrics, metrics)  # before anything else may fail
    print_tables(metrics)
    if args.score_quality:
        metrics["score_quality"] = report(pairs, args.score_quality)
    write_json(args.metrics, metrics)  # also if the scripts of Cityscapes fail
    if args.cityscapes_results:
        cityscapes_score.export(results, annotations, args.cityscapes_results)
    if scripts is not None:
        print(f"cityscapesscripts scores {len(annotations)} images", flush=True)
        metrics["cityscapes"] = cityscapes_score.official_ap(scripts, annotations, args.cityscapes_results)
        cityscapes_score.print_table(metrics["cityscapes"])
        write_json(args.metrics, metrics)
    if args.sheet:
        rows = sheet_rows(annotations, ground_truth(annotations.json_path), [results], args.sheet_count)
        sheet(rows, args.sheet, [c["name"] for c in annotations.classes])
        print(f"sheet: {args.sheet}")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with one_line_errors():
        if args.curves:
            path, *runs = args.curves
            output_file(path)
            draw_curves(runs, path)
            print(f"curves: {path}")
        else:
            run(args)


if __name__ == "__main__":
    main()
