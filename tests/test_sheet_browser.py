"""The blind sheet in a real browser: labelled with mouse and keys, saved, loaded, read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from rlhf.blind_sheet import Question, Sheet, read_key, write_sheet
from rlhf.blind_sheet.labels import read_labels

EVIL = "<script>alert(1)</script></script><img src=x onerror=alert(2)>\u202e]]>"
WIDTHS = (1280, 390)
PAIRS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pairs; every answer of `x` tries to become code."""
    number = pl.int_range(PAIRS)
    pairs = pl.select(
        prompt_id=pl.format("q{}", number),
        prompt=pl.format("user: question {}", number),
        context=pl.when(number > 0).then(pl.lit("A passage. " * 60)),
        reference=pl.lit("On Monday.", pl.String),
        answer_x=pl.lit(EVIL),
        answer_y=pl.format("An honest answer, number {}. ", number) + "words " * 90,
    )
    questions = [Question("truth", "Is what it states true?", bar=True), Question("tone")]
    target = tmp_path_factory.mktemp("sheet")
    write_sheet(target, Sheet.of(pairs, questions, 0), "trial")
    return target


@pytest.fixture
def context(request: pytest.FixtureRequest, chromium: Browser) -> Iterator[BrowserContext]:
    """A browser that has not seen the sheet yet."""
    width = getattr(request, "param", WIDTHS[0])
    context = chromium.new_context(viewport={"width": width, "height": 900})
    context.set_default_timeout(60_000)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, folder: Path) -> Iterator[Page]:
    """The page, which must say nothing on the console and ask for nothing but itself."""
    said: list[str] = []
    asked: list[str] = []
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda asks: asked.append(asks.url))
    page.goto((folder / "sheet.html").as_uri())
    yield page
    assert said == []
    here = (folder / "sheet.html").as_uri()
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} == {here}


at_both_widths = pytest.mark.parametrize("context", WIDTHS, indirect=True)


def save(page: Page, target: Path) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    download.value.save_as(target)
    return target


def items(folder: Path) -> list[str]:
    return [item["item_id"] for item in json.loads((folder / "key.json").read_text())["items"]]


def no_sideways_scroll(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


@at_both_widths
def test_labels_by_mouse_and_by_key_are_saved_and_taken_up_again(
    page: Page, folder: Path, tmp_path: Path
) -> None:
    first, second, third = items(folder)
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#told")).to_contain_text("Give your name first")
    page.get_by_label("Your name").fill("Kim B")

    # By mouse.
    groups = page.locator("fieldset")
    expect(groups).to_have_count(4)
    groups.nth(0).get_by_label("A", exact=True).check()
    groups.nth(1).get_by_label("Yes").check()
    groups.nth(2).get_by_label("No").check()
    expect(page.locator("#done")).to_have_text(f"0 of {PAIRS} done")
    groups.nth(3).get_by_label("Can't tell").check()
    expect(page.locator("#done")).to_have_text(f"1 of {PAIRS} done")

    # By key: the first open question takes it, and the next one follows.
    page.get_by_role("button", name="Next pair").click()
    expect(page.locator("#pair h2")).to_have_text(f"Pair 2 of {PAIRS}")
    for key in "tnxb":
        page.keyboard.press(key)
    expect(page.locator("#done")).to_have_text(f"2 of {PAIRS} done")
    expect(page.get_by_role("button", name="Next pair")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("b")
    page.keyboard.press("y")
    # Back to the question before, whose answer is taken back.
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Delete")
    page.keyboard.press("k")
    expect(page.locator("#pair h2")).to_have_text(f"Pair 2 of {PAIRS}")

    saved = save(page, tmp_path / "gold.jsonl")
    labels = read_labels([saved], read_key(folder))
    assert {(g.item_id, g.dimension): (g.value, g.annotator) for g in labels.gold} == {
        (first, "truth"): (1.0, "Kim B"),
        (f"{first}-a", "truth"): (1.0, "Kim B"),
        (f"{first}-b", "truth"): (0.0, "Kim B"),
        (second, "truth"): (0.0, "Kim B"),
        (f"{second}-a", "truth"): (0.0, "Kim B"),
        (second, "tone"): (-1.0, "Kim B"),
        (third, "truth"): (-1.0, "Kim B"),
    }
    assert labels.cant_tell == 2

    # The same browser goes on where it was.
    page.reload()
    expect(page.locator("#told")).to_contain_text("9 labels were kept in this browser")
    expect(page.get_by_label("Your name")).to_have_value("Kim B")
    expect(page.locator("#pair h2")).to_have_text(f"Pair 2 of {PAIRS}")
    assert groups.nth(0).get_by_label("Tie").is_checked()

    # Another one takes up the file.
    page.evaluate("localStorage.clear()")
    page.reload()
    expect(page.locator("#done")).to_have_text(f"0 of {PAIRS} done")
    page.locator("#file").set_input_files(saved)
    expect(page.locator("#told")).to_contain_text("Loaded 9 labels")
    expect(page.locator("#done")).to_have_text(f"2 of {PAIRS} done")
    assert save(page, tmp_path / "again.jsonl").read_bytes() == saved.read_bytes()


def test_what_a_model_wrote_is_text_and_nothing_tells_the_sides_apart(
    page: Page, folder: Path
) -> None:
    key = {item["item_id"]: item for item in json.loads((folder / "key.json").read_text())["items"]}
    for place, item in enumerate(items(folder)):
        page.get_by_label("Number of the pair").fill(str(place + 1))
        page.keyboard.press("Enter")
        expect(page.locator("#pair h2")).to_have_text(f"Pair {place + 1} of {PAIRS}")
        evil = page.get_by_role("article", name=f"Answer {key[item]['side_x'].upper()}")
        expect(evil).to_contain_text(EVIL.replace("\u202e", "⟨U+202E⟩"))
        # Both answers have the same elements around them, less the characters spelt out.
        shapes = page.locator(".answers article").evaluate_all(
            "boxes => boxes.map(box => [...box.querySelectorAll('*:not(.odd)')]"
            ".map(e => e.tagName + '.' + e.className).join())"
        )
        assert shapes[0] == shapes[1]
    assert page.locator("#pair img, #pair script").count() == 0
    assert "q0" not in page.content(), "prompt ids stay in the key"


def test_a_file_of_another_sheet_changes_nothing(page: Page, folder: Path, tmp_path: Path) -> None:
    page.keyboard.press("a")
    item = items(folder)[0]
    for record, message in (
        ({"item_id": "p0", "dimension": "truth", "winner": "a"}, "is not asked on this sheet"),
        ({"item_id": item, "dimension": "truth", "winner": "c"}, "no label that can be chosen"),
        ({"item_id": f"{item}-a", "dimension": "truth", "score": 0.5}, "no label that can be"),
    ):
        path = tmp_path / "other.jsonl"
        good = {"item_id": item, "dimension": "tone", "winner": "b", "annotator": "lee"}
        path.write_text(f"{json.dumps(good)}\n{json.dumps({**record, 'annotator': 'lee'})}\n")
        page.locator("#file").set_input_files(path)
        expect(page.locator("#told")).to_contain_text("Nothing was loaded from other.jsonl: line 2")
        expect(page.locator("#told")).to_contain_text(message)
        expect(page.locator("input:checked")).to_have_count(1)
    path.write_text(json.dumps({**good, "annotator": "kim"}) + "\n" + json.dumps(good) + "\n")
    page.locator("#file").set_input_files(path)
    expect(page.locator("#told")).to_contain_text("labels of kim, lee; one person's at a time")
    assert page.locator("input:checked").count() == 1


@at_both_widths
def test_the_page_fits_and_follows_the_theme(page: Page) -> None:
    page.get_by_role("button", name="Next pair").click()
    for box in page.locator("details").all():
        box.evaluate("box => { box.open = true; }")
    assert no_sideways_scroll(page)
    width = page.evaluate("window.innerWidth")
    a, b = (box.bounding_box() for box in page.locator(".answers article").all())
    assert a is not None and b is not None
    assert (a["y"] == b["y"]) == (width > 760), "side by side where there is room"

    def paper() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    page.emulate_media(color_scheme="light")
    assert paper() == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    assert paper() != "rgb(255, 255, 255)"
    page.get_by_role("button", name="Light").click()
    assert paper() == "rgb(255, 255, 255)"


@at_both_widths
def test_every_control_has_a_name_and_no_focus_hides_behind_the_bar(page: Page) -> None:
    page.get_by_role("button", name="Next pair").click()
    page.get_by_label("Your name").focus()
    hidden = (
        "() => { const one = document.activeElement.getBoundingClientRect();"
        " const bar = document.querySelector('.foot').getBoundingClientRect();"
        " const inside = document.activeElement.closest('.foot');"
        " return !inside && one.bottom > bar.top + 1 && one.top < bar.bottom; }"
    )
    names = []
    for _ in range(14):
        page.keyboard.press("Tab")
        assert not page.evaluate(hidden)
        names.append(page.evaluate("document.activeElement.type ?? document.activeElement.tagName"))
    assert names.count("radio") == 4, "a stop for each group of choices"
    unnamed = page.locator("input:not([hidden])").evaluate_all(
        "inputs => inputs.filter(input => !input.labels.length).length"
    )
    assert unnamed == 0
