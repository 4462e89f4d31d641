"""The review page in a real browser, from masks to decisions and back (predict.py --boxes, then --apply)."""
import json
import os
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from helpers import noise_image, review_data, rewrite
from review_page import BIG, applied, colour, count, current, label, made_up_page, opened, press, save, shown
from tools import review
from tools.review import digest, in_base64

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)> & \"q\" '\x1b[2J\u202e ß"


@pytest.fixture(scope="module")
def evil(labelled, tmp_path_factory) -> Path:
    """As labelled, but with names that would be markup, or would command a terminal."""
    folder = tmp_path_factory.mktemp("evil")
    shutil.copytree(labelled.parent / "set", folder / "set")

    def rename(content):
        for row in content["categories"]:
            row["name"] += EVIL
        content["images"][0]["file_name"] = "<b>#?%20 \"'ü.png"
    os.rename(folder / "set/val2017/0.png", folder / "set/val2017/<b>#?%20 \"'ü.png")
    return label(folder / "masks", rewrite(folder / "set/annotations/instances_val2017.json", rename),
                 folder / "set/val2017")


def test_names_end_no_script(evil):
    """What holds without a browser, too."""
    text, items = (evil / "review.html").read_text(), review_data(evil / "review.html")["items"]
    assert text.count("</script>") == text.count("<script") == 2 and not re.search(r"[^\n -~\u0100-\uffff]", text)
    assert {item["name"].partition("<")[2] for item in items} == {EVIL[1:].replace("\x1b", r"\x1b").replace(
        "\u202e", r"\u202e")}
    assert all((evil / unquote(item["drawing"])).exists() for item in items)


# --------------------------------------------------------------------------------------------- in the browser


def test_from_keys_to_a_new_annotation_file(person, labelled, tmp_path, capsys):
    """Decisions are made without a mouse, survive a reload, are saved and applied; pycocotools reads the result."""
    page = opened(person, labelled / "review.html")
    order = [item["id"] for item in review_data(labelled / "review.html")["items"]]
    assert count(page) == "8 of 8 left: 0 kept, 0 rejected" and current(page) == order[0]
    press(page, "kr")
    assert count(page) == "6 of 8 left: 1 kept, 1 rejected" and current(page) == order[2]
    press(page, "sbbb")        # skip, and back over all that was shown
    assert current(page) == order[0] and page.get_attribute("#keep", "aria-pressed") == "true"
    press(page, "r")           # another mind about the first; what is decided already is not shown again
    assert current(page) == order[2] and count(page) == "6 of 8 left: 0 kept, 2 rejected"
    page.keyboard.press("ArrowRight")
    assert current(page) == order[3]
    press(page, "kkkk")
    page.reload()
    assert count(page) == "2 of 8 left: 4 kept, 2 rejected" and current(page) == order[2]
    content = save(page, tmp_path / "decisions.json")
    assert content["masks_sha256"] == digest(labelled / "masks.json") and content["decisions"] == {
        **dict.fromkeys(order[:2], "reject"), **dict.fromkeys(order[3:7], "keep")}
    assert str(BIG) in order

    before = {row["id"]: row for row in json.loads((labelled / "masks.json").read_text())["annotations"]}
    capsys.readouterr()
    after = applied(tmp_path / "decisions.json", labelled / "masks.json", tmp_path / "deep/final.json")
    assert capsys.readouterr().out == f"{tmp_path / 'deep/final.json'}: 4 masks kept, 2 rejected, 2 not looked at\n"
    rejected = set(map(int, order[:2]))
    for i, row in before.items():
        x, y, w, h = row["bbox"]
        assert after[i] == (row | {"segmentation": [], "area": w * h} if i in rejected else row)
    coco = COCO(tmp_path / "deep/final.json")
    assert {i for i, row in coco.anns.items() if row["segmentation"]} == before.keys() - rejected
    for i in before.keys() - rejected:
        assert coco_mask.area(coco.annToRLE(coco.anns[i])) == coco.anns[i]["area"] > 0


def test_a_held_key_and_one_with_control_decide_nothing_more(person, labelled):
    page = opened(person, labelled / "review.html")
    page.keyboard.down("k")
    page.keyboard.down("k")    # as a keyboard repeats it
    page.keyboard.up("k")
    page.keyboard.press("Control+k")
    assert count(page) == "7 of 8 left: 1 kept, 0 rejected"


def test_mouse(person, labelled, tmp_path):
    page = opened(person, labelled / "review.html")
    order = [item["id"] for item in review_data(labelled / "review.html")["items"]]
    page.click(f"#tiles button[aria-label*='box {order[5]},']")
    assert current(page) == order[5]
    page.click("#reject")
    page.click("#skip")
    page.click("#keep")
    page.click("#undo")
    assert current(page) == order[7] and count(page) == "7 of 8 left: 0 kept, 1 rejected"
    with person.expect_page() as drawing:
        page.click("#about a")
    assert drawing.value.url.startswith((labelled / "pictures").resolve().as_uri())


def test_at_the_end_nothing_is_left(person, labelled):
    page = opened(person, labelled / "review.html")
    press(page, "kkkkkkkk")
    assert count(page) == "0 of 8 left: 8 kept, 0 rejected"
    assert page.inner_text("#news") == "Nothing is left: save the decisions."
    assert page.get_attribute("#progress", "value") == "8"


def test_with_and_without_the_mask(person, labelled):
    page = opened(person, labelled / "review.html")
    with_mask = colour(page)
    press(page, "m")
    without = colour(page)
    assert page.get_attribute("#masks", "aria-pressed") == "false" and np.abs(with_mask - without).max() > 20
    press(page, "s")           # it stays hidden for the next one
    assert page.locator("#stage .mask").is_hidden() and page.locator("#tiles .mask").first.is_hidden()
    press(page, "bm")
    assert np.abs(colour(page) - with_mask).max() < 1


def test_filters(person, labelled):
    page, items = opened(person, labelled / "review.html"), review_data(labelled / "review.html")["items"]
    for name in {item["name"] for item in items}:
        page.select_option("#name", name)
        assert shown(page) == [item["id"] for item in items if item["name"] == name]
    of_class = shown(page)
    assert current(page) in of_class and f"{len(of_class)} pass the filters, {len(of_class)} of them" in count(page)
    page.focus("#current")
    press(page, "r" * len(of_class))
    assert f"; {len(of_class)} pass the filters, 0 of them left" in count(page)
    page.select_option("#name", "")
    page.select_option("#decision", "reject")
    assert sorted(shown(page)) == sorted(of_class)
    page.select_option("#decision", "open")
    assert len(shown(page)) == 8 - len(of_class)
    page.focus("#current")
    first = current(page)
    press(page, "k")
    assert first not in shown(page) and current(page) != first
    press(page, "b")           # back to one that no longer passes
    assert current(page) == first and first in shown(page)
    page.select_option("#decision", "")
    middle = sorted(round(item["score"], 2) for item in items)[4]
    page.fill("#from", str(middle))
    page.keyboard.press("Enter")
    assert shown(page) == [item["id"] for item in items if round(item["score"], 2) >= middle]
    assert page.evaluate("document.activeElement.id") == "current"
    page.fill("#from", "")
    page.fill("#to", str(middle))
    page.keyboard.press("Escape")
    assert shown(page) == [item["id"] for item in items if round(item["score"], 2) <= middle]
    page.fill("#to", "0")
    page.keyboard.press("Enter")
    assert shown(page) == [] and page.inner_text("#about").startswith("No mask passes the filters. The scores here are")
    press(page, "krbsm")       # nothing to do anything with
    page.fill("#to", "")
    page.select_option("#source", "colours")
    assert len(shown(page)) == 8
    page.fill("#from", "1")
    page.select_option("#name", index=1)
    page.click("#all")
    assert len(shown(page)) == 8 and page.input_value("#from") == page.input_value("#name") == ""
    assert page.evaluate("document.activeElement.id") == "current"


def test_scores_are_filtered_as_they_are_shown(person, tmp_path):
    item = {"name": "a", "source": "model", "file": "a.jpg", "drawing": "a.jpg", "photo": "", "mask": "", "given": True}
    items = [item | {"id": str(i), "score": score} for i, score in enumerate((0.924, 0.926, 0.934, 0.936))]
    page = opened(person, made_up_page(tmp_path / "review.html", items))
    for id, number, expected in (("from", "0.93", ["1", "2", "3"]), ("to", "0.93", ["1", "2"]), ("from", "0.95", [])):
        page.fill(f"#{id}", number)
        page.keyboard.press("Enter")
        assert shown(page) == expected
    assert page.inner_text("#about") == "No mask passes the filters. The scores here are 0.92 to 0.94."


def test_undo_takes_back_one_decision_after_the_other(person, labelled):
    page = opened(person, labelled / "review.html")
    items = review_data(labelled / "review.html")["items"]
    assert page.get_attribute("#undo", "aria-disabled") == "true"
    press(page, "ukrs")        # at first there is nothing to undo
    assert current(page) == items[3]["id"]
    press(page, "u")
    assert current(page) == items[1]["id"] and count(page) == "7 of 8 left: 1 kept, 0 rejected"
    assert re.fullmatch(r"Undone: .*, box %s: not decided\." % items[1]["id"], page.inner_text("#news"))
    press(page, "br")          # another mind about the first
    assert current(page) == items[1]["id"] and count(page) == "7 of 8 left: 0 kept, 1 rejected"
    press(page, "u")
    assert current(page) == items[0]["id"] and count(page) == "7 of 8 left: 1 kept, 0 rejected"
    assert page.inner_text("#news").endswith(": \u2713 kept.")
    press(page, "u")
    assert current(page) == items[0]["id"] and count(page) == "8 of 8 left: 0 kept, 0 rejected"
    assert page.get_attribute("#undo", "aria-disabled") == "true"


def test_the_list_follows_when_the_window_becomes_smaller(person, labelled):
    page = opened(person, labelled / "review.html")
    press(page, "sssssss")
    page.set_viewport_size({"width": 820, "height": 600})
    page.wait_for_function("""() => { const one = document.querySelector("#tiles [aria-current=true]");
        if (!one) return false;
        const box = one.getBoundingClientRect(), list = document.getElementById("list").getBoundingClientRect();
        return list.top <= box.top && box.bottom <= list.bottom; }""")


def test_the_command_after_saving_names_the_masks(person, labelled, tmp_path):
    out = label(tmp_path / "my <b>masks", labelled.parent / "set/annotations/instances_val2017.json",
                labelled.parent / "set/val2017")
    page = opened(person, out / "review.html")
    with page.expect_download():
        press(page, "d")
    assert f"python predict.py --apply decisions.json '{out}/masks.json' --out" in page.inner_text("#news")
    assert page.inner_text("#summary").endswith("All are here.")


def test_letters_in_a_filter_choose_there(person, labelled):
    page = opened(person, labelled / "review.html")
    page.focus("#name")
    press(page, "r")
    assert page.input_value("#name") == "red" and count(page).startswith("8 of 8 left")
    assert page.evaluate("document.activeElement.id") == "name"
    page.dispatch_event("#name", "pointerdown")  # who chooses with the mouse goes on with the keys of the masks
    page.select_option("#name", "green")
    press(page, "k")
    assert page.input_value("#name") == "green" and count(page).startswith("7 of 8 left")


def test_filters_that_a_browser_would_restore_are_empty(person, labelled):
    """Or they would show what they no longer do."""
    page = opened(person, labelled / "review.html")
    page.fill("#to", "0")
    page.keyboard.press("Enter")
    assert shown(page) == []
    page.goto("about:blank")
    page.go_back()
    assert page.input_value("#to") == "" and len(shown(page)) == 8


def test_a_page_that_is_gone_back_to_reads_what_others_stored(person, labelled):
    """A browser that kept it as it was tells it so."""
    page = opened(person, labelled / "review.html")
    page.evaluate("localStorage.setItem(KEY + '0', 'reject')")
    page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', {persisted: true}))")
    assert count(page) == "7 of 8 left: 0 kept, 1 rejected"


@pytest.mark.parametrize("number, counts", [(0, "0 of 0 left: 0 kept, 0 rejected"),
                                            (1, "0 of 1 left: 1 kept, 0 rejected")])
def test_no_box_and_one(number, counts, person, labelled, tmp_path):
    shutil.copytree(labelled.parent / "set", tmp_path / "set")
    json_path = rewrite(tmp_path / "set/annotations/instances_val2017.json",
                        lambda content: content.update(annotations=content["annotations"][:number]))
    page = opened(person, label(tmp_path / "masks", json_path, tmp_path / "set/val2017") / "review.html")
    assert page.inner_text("#summary").startswith(["", "1 box, 1 with a mask"][number])
    assert (page.inner_text("#about") == "There are no boxes.") == (number == 0)
    press(page, "rbskm")
    assert count(page) == counts
    assert len(save(page, tmp_path / "decisions.json")["decisions"]) == number
    assert page.inner_text("#news").startswith(["Saved 0 decisions.", "Saved 1 decision."][number])


def test_saved_decisions_are_loaded_elsewhere(person, browser, labelled, tmp_path):
    page = opened(person, labelled / "review.html")
    press(page, "krk")
    content = save(page, tmp_path / "decisions.json")
    (tmp_path / "other.json").write_text(json.dumps(content | {"masks_sha256": "0" * 64}))
    (tmp_path / "none.json").write_text('{"decisions": {"1": "burn"}}')
    (tmp_path / "list.json").write_text(json.dumps(content | {"decisions": ["keep"]}))
    other = browser.new_context()
    page = opened(other, labelled / "review.html")
    for name, message, left in (("none.json", "none.json does not hold decisions", 8),
                                ("list.json", "list.json does not hold decisions", 8),
                                ("other.json", "another masks.json", 8),
                                ("decisions.json", "Loaded 3 decisions: 3 new, 0 changed.", 5),
                                ("decisions.json", "Loaded 3 decisions: 0 new, 1 changed.", 5)):
        if "1 changed" in message:
            press(page, "r")
        with page.expect_file_chooser() as chooser:
            page.click("#load")
        chooser.value.set_files(tmp_path / name)
        page.wait_for_function("text => document.getElementById('news').textContent.includes(text)", arg=message)
        assert count(page).startswith(f"{left} of 8 left")
    other.close()


def test_a_browser_that_stores_nothing_is_named_and_saves(person, labelled, tmp_path):
    person.add_init_script("Storage.prototype.setItem = () => { throw new Error('full'); }")
    page = opened(person, labelled / "review.html")
    press(page, "kr")
    assert "stores nothing" in page.inner_text("#news") and count(page).startswith("6 of 8 left")
    assert len(save(page, tmp_path / "decisions.json")["decisions"]) == 2


def test_what_another_page_has_stored_in_the_meantime_stays(person, labelled, tmp_path):
    """Also where its storage event has not come yet; a page gets none of what is stored in itself."""
    page = opened(person, labelled / "review.html")
    first, *_, last = [item["id"] for item in review_data(labelled / "review.html")["items"]]
    page.evaluate("id => localStorage.setItem(KEY + id, 'reject')", last)
    press(page, "k")
    assert save(page, tmp_path / "decisions.json")["decisions"] == {first: "keep", last: "reject"}


def test_a_decision_reads_nothing_that_is_stored(person, labelled):
    """All files share a browser's memory: after many reviews each key would take long."""
    page = opened(person, labelled / "review.html")
    press(page, "k")
    page.evaluate("""() => { const get = Storage.prototype.getItem; window.reads = 0;
        Storage.prototype.getItem = function(key) { window.reads++; return get.call(this, key); } }""")
    press(page, "rbu")
    assert count(page) == "7 of 8 left: 1 kept, 0 rejected" and page.evaluate("window.reads") == 0


def test_several_pages_are_one_review(person, labelled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(review, "LARGEST", 3 * max(len(item["photo"] + item["mask"]) for item in
                                                   review_data(labelled / "review.html")["items"]))
    out = label(tmp_path / "masks", labelled.parent / "set/annotations/instances_val2017.json",
                labelled.parent / "set/val2017")
    names = sorted(path.name for path in out.glob("review*.html"))
    assert names[:2] == ["review-2.html", "review-3.html"] and names[-1] == "review.html"
    assert f"review.html: the least certain masks first, on {len(names)} pages" in capsys.readouterr().out
    assert sum(len(review_data(out / name)["items"]) for name in names) == 8
    first, second = opened(person, out / "review.html"), opened(person, out / "review-2.html")
    press(first, "k")
    press(second, "r")         # both are open, and neither loses what the other stored
    press(first, "k")
    for page in (first, second):  # other tabs hear of a decision a little later
        page.wait_for_function("document.getElementById('count').textContent.includes('on all pages 5 of 8')")
    assert sorted(save(first, tmp_path / "d.json")["decisions"].values()) == ["keep", "keep", "reject"]
    press(second, "krkrkrkr")
    assert "other pages" in second.inner_text("#news")
    second.click("nav >> text=Page 1")
    assert second.url == first.url and second.inner_text("nav [aria-current=page]") == "Page 1"

    monkeypatch.setattr(review, "LARGEST", 1e9)  # a later review of fewer pages
    label(out, labelled.parent / "set/annotations/instances_val2017.json", labelled.parent / "set/val2017")
    assert [path.name for path in out.glob("review*.html")] == ["review.html"]


def test_what_is_not_in_the_file_cannot_be_decided(person, labelled, tmp_path):
    """Boxes below --min-score, those without a mask, and those of an image that cannot be read."""
    folder = tmp_path / "set"
    shutil.copytree(labelled.parent / "set", folder)
    scores = sorted(item["score"] for item in review_data(labelled / "review.html")["items"])
    (folder / "val2017/0.png").write_bytes((folder / "val2017/0.png").read_bytes()[:80])
    out = label(tmp_path / "masks", folder / "annotations/instances_val2017.json", folder / "val2017", "--min-score",
                scores[-2], "--review-count", 6)
    page, data = opened(person, out / "review.html"), review_data(out / "review.html")
    assert len(data["items"]) == 6 and [item["given"] for item in data["items"]].count(False) >= 5
    page.select_option("#decision", "none")
    page.focus("#current")
    assert "the image cannot be read" in page.inner_text("#stage").lower() and page.locator("#stage img").count() == 0
    before = count(page)
    press(page, "krskr")
    assert count(page) == before and page.get_attribute("#keep", "aria-disabled") == "true"
    assert save(page, tmp_path / "decisions.json")["decisions"] == {}
    page.select_option("#source", "no mask")
    assert len(shown(page)) == 2
    page.focus("summary")
    page.dispatch_event("#list", "scroll")  # as when the Tab key brings it into view: it keeps the focus
    page.keyboard.press("Enter")
    page.wait_for_selector("#others li")
    assert page.locator("#others li").all_inner_texts() == data["others"] != []


def test_names_from_files_are_only_text(person, evil):
    page = opened(person, evil / "review.html")
    assert page.locator("script").count() == 2 and page.locator("b").count() == 1
    name = page.inner_text("#about b")
    assert "</script><script>alert('x')</script>" in name and r"'\x1b[2J\u202e ß" in name
    page.select_option("#name", index=1)
    assert 0 < len(shown(page)) < 8
    page.select_option("#name", "")
    page.click("#tiles button[aria-label*='box 0,']")
    assert "<b>#?%20 \"'ü.png" in page.inner_text("#about")
    with person.expect_page() as drawing:
        page.click("#about a")
    drawing.value.wait_for_load_state()
    assert drawing.value.locator("img").count() == 1  # the browser found the file


def test_nothing_is_loaded_from_elsewhere(browser, labelled):
    page, requests = browser.new_page(), []
    page.on("request", lambda request: requests.append(request.url.split(":")[0]))
    page.goto((labelled / "review.html").resolve().as_uri())
    press(page, "kskm")
    assert requests[0] == "file" and requests.count("file") == 1 and set(requests) <= {"file", "data", "blob"}
    with page.expect_console_message(lambda message: "Content Security Policy" in message.text):
        page.evaluate("new Image().src = 'https://example.org/a.png'")
    page.close()


def test_five_thousand_boxes(person, tmp_path):
    """Pictures are decoded as they are scrolled to, and the last one is reached with the keyboard."""
    photo = in_base64(noise_image(0, 60, 90), "JPEG")
    items = [{"id": str(i), "name": f"class {i % 7}", "source": "model", "score": i / 5000, "file": "a.jpg",
              "drawing": "pictures/a.jpg", "photo": photo, "mask": "", "given": True} for i in range(5000)]
    page = opened(person, made_up_page(tmp_path / "review.html", items))
    page.wait_for_selector("#tiles img")
    assert 0 < page.locator("#tiles img").count() < 100
    assert page.get_attribute("#tiles li", "aria-setsize") == "5000"
    press(page, "kr")
    assert count(page).startswith("4998 of 5000 left")
    press(page, "bbb")         # round the beginning to the last one, which the list scrolls to
    assert current(page) == "4999"
    assert page.locator("#tiles img").count() < 100
    assert page.get_attribute("#tiles [aria-current=true] >> xpath=..", "aria-posinset") == "5000"
    box, around = (page.locator(name).bounding_box() for name in ("#tiles [aria-current=true]", "#list"))
    assert around["y"] <= box["y"] and box["y"] + box["height"] <= around["y"] + around["height"]
    page.locator("#list").hover()
    page.mouse.wheel(0, -10 ** 6)
    page.wait_for_selector("#tiles li[aria-posinset='1'] img")
    assert shown(page)[:2] == ["0", "1"]
    page.select_option("#name", "class 3")
    assert page.get_attribute("#tiles li", "aria-setsize") == "714" and current(page) == "3"


