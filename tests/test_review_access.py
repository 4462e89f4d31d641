"""The review page for those who do not use a mouse, do not see it, or see it light, dark, wide or narrow."""
import pytest

from helpers import review_data
from review_page import count, made_up_page, opened, press


def test_every_control_has_a_name_and_the_count_is_spoken(person, labelled):
    page = opened(person, labelled / "review.html")
    tree = person.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    nodes = [(node["role"]["value"], node.get("name", {}).get("value", "").strip()) for node in tree
             if not node["ignored"] and "role" in node]
    controls = [(role, name) for role, name in nodes if role in (
        "button", "link", "combobox", "spinbutton", "textbox", "image", "progressbar", "form", "navigation", "region")]
    assert len(controls) > 20 and all(name for role, name in controls if name or role != "image")
    assert {("button", "Keep"), ("button", "Reject"), ("button", "Back"), ("button", "Skip"), ("button", "Mask"),
            ("combobox", "Class"), ("combobox", "Source"), ("spinbutton", "Score from"), ("progressbar", "Decided"),
            ("form", "Filters"), ("region", "Current mask")} <= set(controls)
    item = review_data(labelled / "review.html")["items"][0]
    assert ("image", f"{item['name']}, score {item['score']:.2f}, box {item['id']}") in controls
    assert ("button", f"{item['name']}, score {item['score']:.2f}, box {item['id']}, not decided") in controls
    assert [page.get_attribute(f"#{name}", "role") for name in ("count", "news")] == ["status"] * 2
    assert page.get_attribute("#about", "aria-live") == "polite"


def test_the_tab_key_reaches_everything_and_is_seen(person, labelled):
    page, reached = opened(person, labelled / "review.html"), []
    for _ in range(25):
        page.keyboard.press("Tab")
        name, outline = page.evaluate("""() => { const one = document.activeElement;
            return [one.id || one.ariaLabel || one.localName, getComputedStyle(one).outlineStyle]; }""")
        assert outline != "none" or name == "body", name
        reached.append(name)
    assert {"name", "source", "decision", "from", "to", "keep", "reject", "skip", "back", "undo", "masks", "save",
            "load"} <= set(reached)
    assert len({name for name in reached if "decided" in name}) == 1  # the list is one stop
    page.focus("#reject")
    page.keyboard.press("Enter")
    assert count(page) == "7 of 8 left: 0 kept, 1 rejected"


CONTRAST = """() => {
  const light = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = one => { const colour = getComputedStyle(one).backgroundColor;
    return colour !== "rgba(0, 0, 0, 0)" || !one.parentElement ? colour : behind(one.parentElement); };
  return [...document.querySelectorAll("h1, p, a, label, button, select, input, .state, .name, .score, kbd")]
    .filter(one => one.offsetParent && one.textContent.trim()).map(one => {
      const [a, b] = [light(getComputedStyle(one).color), light(behind(one))].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05); });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_light_and_dark_wide_and_narrow(browser, labelled, scheme, width):
    """Text is read on its background (WCAG 1.4.3), and nothing is wider than the window."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    page = opened(context, labelled / "review.html")
    press(page, "kr")
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 40 and min(contrasts) >= 4.5
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#keep").bounding_box()["y"] < 800 and page.locator("#stage").bounding_box()["height"] > 250
    context.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_long_names_leave_the_buttons_in_view(width, person, tmp_path):
    item = {"id": "1", "name": "\u00c4" * 2000, "source": "model", "score": 0.5, "file": "x" * 255, "drawing": "a.jpg",
            "photo": "", "mask": "", "given": True}
    page = opened(person, made_up_page(tmp_path / "review.html", [item]))
    page.set_viewport_size({"width": width, "height": 800})
    place = page.locator("#keep").bounding_box()
    assert place["y"] + place["height"] <= 800 and page.evaluate("document.documentElement.scrollWidth") <= width
