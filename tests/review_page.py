"""A review page in a browser: what its tests do on it and see of it; the fixtures are in conftest.py."""
import io
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

import predict
from tools.review import write_page

BIG = 2 ** 60 + 1  # an id that JavaScript's numbers cannot hold


def label(out: Path, json_path: Path, images: Path, *options) -> Path:
    predict.main(["--boxes", str(json_path), "--images", str(images), "--out", str(out), "--workers", "0",
                  *map(str, options)])
    return out


def applied(decisions: Path, masks: Path, out: Path) -> dict:
    predict.main(["--apply", str(decisions), str(masks), "--out", str(out)])
    return {row["id"]: row for row in json.loads(out.read_text())["annotations"]}


def made_up_page(path: Path, items: list[dict]) -> Path:
    write_page(path, {"masks_sha256": "0" * 64, "masks": "masks.json", "summary": "", "total": len(items),
                      "others": [], "items": items, "page": 0, "pages": [path.name]})
    return path


def opened(person, path: Path):
    page = person.new_page()
    page.goto(path.resolve().as_uri())
    return page


def press(page, keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def count(page) -> str:
    return page.inner_text("#count")


def current(page) -> str:
    """The id of the box that is shown."""
    return re.search(r"box (\d+)", page.inner_text("#about"))[1]


def save(page, path: Path) -> dict:
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "decisions.json"
    download.value.save_as(path)
    return json.loads(path.read_text())


def shown(page) -> list[str]:
    """The ids of the boxes in the list that pass the filters."""
    return [re.search(r"box (\d+)", name)[1] for name in
            page.eval_on_selector_all("#tiles button", "all => all.map(one => one.ariaLabel)")]


def colour(page, selector: str = "#stage") -> np.ndarray:
    """The mean RGB of the middle of what is drawn."""
    image = np.asarray(Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB"), float)
    h, w = image.shape[:2]
    return image[h * 2 // 5:h * 3 // 5, w * 2 // 5:w * 3 // 5].mean((0, 1))
