"""The review page of predict.py --boxes: one HTML file for a person to go through, the least certain masks first.

The pictures are inside the file, and it loads nothing from elsewhere, so it opens from disk and can be sent to someone.
Names from files are escaped: an annotation file can put nothing but text on the page.
"""
import base64
import html
import io
import os
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision.utils import draw_bounding_boxes

from formats.coco import CocoBoxes, UndecodableImage
from formats.files import printable, write_whole
from formats.pictures import read_image
from tools.draw import fill_mask, outline_mask
from tools.label import COLOURS, BoxMasks

SIDES = (190, 320)  # the longer side of a cut-out lies between these, pixels
LISTED = 20_000     # boxes below --min-score that the page lists without a picture, at most

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Review of masks</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --soft: #8882; }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 1500px; }}
h1 {{ font-size: 1.3rem; margin: 0 0 .3rem; }}
p {{ margin: 0 0 1rem; max-width: 60rem; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(200px, 44vw), 1fr)); gap: .8rem; }}
figure {{ margin: 0; border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }}
figure a, figure .none {{ display: flex; height: 190px; align-items: center; justify-content: center;
  background: var(--soft); }}
figure img {{ max-width: 100%; max-height: 100%; }}
figcaption {{ padding: .5rem .6rem; overflow-wrap: anywhere; font-size: .85rem; }}
figcaption b {{ font-size: 1rem; }}
.score {{ float: right; font-variant-numeric: tabular-nums; }}
li {{ overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>Masks to look at, the least certain first</h1>
<p>{summary}</p>
<main>
{figures}
</main>
{rest}</body>
</html>
"""

FIGURE = """<figure>{picture}<figcaption><span class="score">{score:.2f}</span><b>{name}</b><br>{source}, box {id}<br>
{file}</figcaption></figure>"""


def write_review(annotations: CocoBoxes, labels: BoxMasks, ids: list, links: list[tuple[str, str]], path: str,
                 count: int, min_score: float) -> None:
    """Write the page with the `count` lowest-scored masks, and a list of further boxes below min_score.

    ids: of the annotation of each box. links: for each image its name and the path of its drawing from the page.
    """
    order = np.argsort(labels.scores, kind="stable")
    shown, low = order[:count].tolist(), int((labels.scores < min_score).sum())
    image_of = (np.searchsorted(annotations.offsets, np.arange(len(order)), side="right") - 1).tolist()
    pictures = cut_outs(annotations, labels, shown, image_of)

    def described(k: int) -> dict[str, str]:
        return {"name": escaped(annotations.classes[annotations.labels[k]]["name"]), "id": escaped(ids[k]),
                "source": labels.sources[k] or "no mask", "score": float(labels.scores[k]),
                "file": escaped(links[image_of[k]][0])}

    figures = []
    for k in shown:
        inside = '<span class="none">the image cannot be read</span>'
        if pictures[k]:
            inside = (f'<a href="{quote(os.fsencode(links[image_of[k]][1]))}"><img alt="{described(k)["name"]}" '
                      f'loading="lazy" src="data:image/jpeg;base64,{pictures[k]}"></a>')
        figures.append(FIGURE.format(picture=inside, **described(k)))
    none = labels.sources.count(None)
    summary = (f"{len(order)} boxes, {len(order) - none} with a mask"
               + ", made without a model" * (COLOURS in labels.sources) + f"; {none} have none" * bool(none) + ". "
               + f"Half of the scores are above {np.median(labels.scores) if len(order) else 0:.2f}. "
               + f"{low} are below {min_score:g}: these masks were left out of the file. " * bool(low)
               + f"Below are the lowest {len(shown)}. Click a picture to see the whole image.")
    rest = [described(k) for k in order[len(shown):max(low, len(shown))][:LISTED].tolist()]
    lines = "\n".join(f"<li>{one['score']:.2f} {one['name']}, box {one['id']}, {one['file']}</li>" for one in rest)
    rest = f"<h1>Left out as well</h1>\n<ol>\n{lines}\n</ol>\n" if rest else ""
    write_whole(path, PAGE.format(summary=summary, figures="\n".join(figures), rest=rest).encode())


def escaped(text) -> str:
    """Text without markup and control characters; half a surrogate pair, which UTF-8 cannot hold, becomes a question
    mark."""
    return html.escape(printable(str(text).encode("utf-8", "replace").decode("utf-8")))


def cut_outs(annotations: CocoBoxes, labels: BoxMasks, boxes: list[int], image_of: list[int]) -> dict[int, str]:
    """For each of the numbered boxes the JPEG of its surroundings, in base64; "" if its image cannot be read."""
    found = dict.fromkeys(boxes, "")
    by_image = {}
    for k in boxes:
        by_image.setdefault(image_of[k], []).append(k)
    for i, of_image in by_image.items():
        try:
            image = read_image(annotations, i)
        except UndecodableImage:
            continue
        for k in of_image:
            buffer = io.BytesIO()
            cut_out(image, annotations.boxes[k], labels.rles[k]).save(buffer, "JPEG", quality=85)
            found[k] = base64.b64encode(buffer.getvalue()).decode("ascii")
    return found


def cut_out(image: Image.Image, box: np.ndarray, rle: dict | None) -> Image.Image:
    """Crop a box (4,) xyxy and a margin of a fifth from an image, resize it to SIDES and draw mask and box over it."""
    x0, y0, x1, y1 = box.tolist()
    margin = max(6, 0.2 * max(x1 - x0, y1 - y0))
    frame = [int(max(0, x0 - margin)), int(max(0, y0 - margin)),
             int(min(image.width, x1 + margin) + 0.999), int(min(image.height, y1 + margin) + 0.999)]
    width, height = frame[2] - frame[0], frame[3] - frame[1]
    scale = min(max(max(width, height), SIDES[0]), SIDES[1]) / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    part = torch.from_numpy(np.array(image.crop(frame).resize(size, Image.BICUBIC))).permute(2, 0, 1)
    if rle is not None:
        mask = Image.fromarray(coco_mask.decode(rle)[frame[1]:frame[3], frame[0]:frame[2]])
        mask = torch.from_numpy(np.array(mask.resize(size, Image.NEAREST))).bool()
        part = outline_mask(fill_mask(part, mask, (60, 150, 240)), mask, (60, 150, 240), 2)
    corners = (torch.tensor([[x0, y0, x1, y1]]) - torch.tensor(frame[:2]).repeat(2)) * scale
    part = draw_bounding_boxes(part, corners.clamp(min=0), colors=(250, 170, 30), width=1)
    return Image.fromarray(part.permute(1, 2, 0).numpy())
