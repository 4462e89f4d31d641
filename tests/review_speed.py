"""How long review pages take in a browser without a window: python tests/review_speed.py PAGE ... (needs playwright)

Opened: from the call until the second frame. Key: from a decision to the frame after it. Frame: of a scroll through the
list, 300 pixels each. Filter: from a choice to the frame after it. All with the time that the script takes to ask."""
import statistics
import sys
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers import CHROMIUM  # noqa: E402

FRAME = "new Promise(done => requestAnimationFrame(() => setTimeout(done)))"
SCROLL = f"document.getElementById('list').scrollTop += 300; {FRAME}"


def seconds(page: Page, act=lambda: None, then: str = FRAME) -> float:
    start = time.perf_counter()
    act()
    page.evaluate(then)
    return time.perf_counter() - start


def measure(page: Page, path: Path) -> None:
    opened = seconds(page, lambda: page.goto(path.resolve().as_uri()))
    keys = [seconds(page, lambda: page.keyboard.press("kr"[i % 2])) for i in range(40)]
    frames = [seconds(page, then=SCROLL) for _ in range(100)]
    chosen = seconds(page, lambda: page.select_option("#decision", "open"))
    print(f"{path}, {path.stat().st_size / 1e6:.1f} MB, {page.evaluate('items.length')} boxes: opened {opened:.2f} s, "
          + ", ".join(f"{name} {1e3 * statistics.median(times):.0f} ms (longest {1e3 * max(times):.0f})"
                      for name, times in (("key", keys), ("frame", frames), ("filter", [chosen]))))


if __name__ == "__main__":
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name in sys.argv[1:]:
            measure(browser.new_page(viewport={"width": 1280, "height": 800}), Path(name))
