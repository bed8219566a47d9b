"""The report in a real browser: a click through its prompts, on a desk and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from calibrations import ORIGIN, of_pairs, of_scores
from playwright.sync_api import Browser, Locator, Page, expect
from report_runs import Runs, make_config

from rlhf.files import write_parquet
from rlhf.report import write_report
from rlhf.report.calibration import write_calibration

EVIL = "<script>alert(1)</script></script><img src=x onerror=alert(2)>\u202e]]>"
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds, with one answer that tries to become code."""
    config = make_config(tmp_path_factory.mktemp("run"))
    folder = Runs(config, [0.4, 0.6, 0.7], prompts=40).finish()
    path = folder / "rounds/0001/completions/part-00000.parquet"
    table = pl.read_parquet(path, hive_partitioning=False)
    first = (pl.col("prompt_id") == "train-7") & (pl.col("sample") == 2)
    write_parquet(
        table.with_columns(text=pl.when(first).then(pl.lit(EVIL)).otherwise("text")), path
    )
    return write_report(folder)


@pytest.fixture(params=WIDTHS)
def page(request: pytest.FixtureRequest, chromium: Browser, report: Path) -> Iterator[Page]:
    """The page, which must say nothing on the console and ask for nothing but itself."""
    said: list[str] = []
    asked: list[str] = []
    page = chromium.new_page(viewport={"width": request.param, "height": 900})
    page.set_default_timeout(60_000)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda asks: asked.append(asks.url))
    page.goto(report.as_uri())
    yield page
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]


def filters(page: Page) -> Locator:
    return page.locator("#filters")


def no_sideways_scroll(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


def test_a_click_through_the_prompts(page: Page) -> None:
    cards = page.locator("details.prompt")
    expect(page.locator("#count")).to_contain_text("of 120 prompts match")
    expect(cards).to_have_count(25)
    page.get_by_role("button", name="Show more").click()
    expect(cards).to_have_count(50)

    filters(page).get_by_label("Split").select_option("gate")
    expect(page.locator("#count")).to_contain_text("40 of 120")
    filters(page).get_by_label("Category").select_option("kind 1")
    expect(page.locator("#count")).to_contain_text("13 of 120")
    filters(page).get_by_label("Category").select_option("")
    filters(page).get_by_label("Show").select_option("worse")
    worse = cards.count()
    assert 0 < worse < 40
    assert all(
        value.startswith("▼ -") for value in page.locator(".prompt .value").all_inner_texts()
    )

    card = cards.first
    card.locator("summary").click()
    expect(card).to_contain_text("Likeliest answer, before and after")
    greedy = card.locator(".columns").first
    expect(greedy).to_contain_text("Start")
    expect(greedy).to_contain_text("Answer 0 of version 0.")
    expect(greedy).to_contain_text("Answer 0 of version 2.")
    expect(card).to_contain_text("correctness")
    expect(card).to_contain_text("(audit)")
    expect(card).to_contain_text("On Monday, parcel")
    assert no_sideways_scroll(page)


def test_a_pair_shows_what_was_chosen_and_why_others_were_not(page: Page) -> None:
    filters(page).get_by_label("Split").select_option("1")
    filters(page).get_by_label("Show").select_option("inverted")
    card = page.locator("details.prompt").first
    expect(card).to_contain_text("inverted: style")
    card.locator("summary").click()
    expect(card.locator(".answer")).to_have_count(4)
    expect(card.locator(".answer.chosen .tag")).to_have_text("▲ chosen")
    expect(card.locator(".answer.rejected .tag")).to_have_text("▼ rejected")
    filters(page).get_by_label("Search").fill("train-7 alert")
    filters(page).get_by_label("Show").select_option("")
    card = page.locator("details.prompt").first
    expect(page.locator("details.prompt")).to_have_count(1)
    card.locator("summary").click()
    expect(card).to_contain_text(
        "<script>alert(1)</script></script><img src=x onerror=alert(2)>⟨U+202E⟩]]>"
    )
    assert card.locator("img, script").count() == 0
    filters(page).get_by_label("Search").fill("no such words")
    expect(page.locator("#count")).to_have_text("None of 120 prompts matches")


def test_the_page_fits_its_window_with_everything_open(page: Page) -> None:
    assert no_sideways_scroll(page)
    page.evaluate("document.querySelectorAll('details').forEach(box => { box.open = true; })")
    page.wait_for_function("document.querySelectorAll('.prompt .inside').length === 25")
    assert no_sideways_scroll(page)
    # A plot is never wider than the window, nor its text too small to read.
    sizes = page.evaluate(
        "[...document.querySelectorAll('svg')].map(s => {"
        " const box = s.getBoundingClientRect();"
        " return [box.right, box.width / s.viewBox.baseVal.width]; })"
    )
    assert all(right <= page.viewport_size["width"] for right, _ in sizes)  # type: ignore[index]
    assert all(scale > 0.8 for _, scale in sizes)


def test_the_theme_follows_the_system_until_it_is_chosen(page: Page) -> None:
    def paper() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    page.emulate_media(color_scheme="light")
    assert paper() == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    dark = paper()
    assert dark != "rgb(255, 255, 255)"
    line = page.locator("#scores svg text").first
    assert line.evaluate("e => getComputedStyle(e).fill") != "rgb(26, 28, 30)"
    page.get_by_role("button", name="Light").click()
    assert paper() == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark", media="print")
    assert paper() == "rgb(255, 255, 255)"


def test_numbers_are_unfolded_for_print(page: Page) -> None:
    folded = page.locator("details.numbers:not([open])")
    before = folded.count()
    assert before > 3
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    expect(folded).to_have_count(0)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    expect(folded).to_have_count(before)


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_a_calibration_fits_its_window_and_a_link_opens_its_judge(
    width: int, chromium: Browser, tmp_path: Path
) -> None:
    found = of_scores() + 3 * of_pairs() + 3 * of_scores(offset=0.2)
    path = write_calibration(tmp_path / "page.html", found, ORIGIN, "--report")
    said: list[str] = []
    page = chromium.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(60_000)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri())
    assert no_sideways_scroll(page)
    judges = page.locator("details.judge")
    expect(judges).to_have_count(7)
    expect(judges.nth(4)).not_to_have_attribute("open", "")
    page.locator("a[href='#judge-4']").click()
    expect(judges.nth(4)).to_have_attribute("open", "")
    expect(judges.nth(4).locator(".reasons")).to_be_in_viewport()
    assert no_sideways_scroll(page)
    page.close()
    assert said == []
