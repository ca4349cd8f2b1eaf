"""The page in a headless browser: what its script does, and how it looks."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress.report.compare import Comparison, side_by_side
from compress.report.render import render
from tests.unit.report.browser import NAMES, PROGRAM, Browser
from tests.unit.report.common import KICK, answered, card, lineage
from tests.unit.report.test_page import EVIL

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"no browser is installed ({', '.join(NAMES)})")

SIXTY = tuple(f"a_long_name_of_a_subject_that_is_asked_about_{number}" for number in range(60))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def models(number: int, tasks: tuple[str, ...] = KICK) -> Comparison:
    """The dense model and others, each smaller and mostly worse than the one before; one was not measured,
    and one name is as long as names get."""
    cards = []
    for index in range(number):
        name = ("dense", "small", EVIL, "x" * 300)[index] if index < 4 else f"model-{index}"
        given = {"size": 400_000_000 - 15_000_000 * index, "measured": index != 1}
        scores = dict.fromkeys(tasks, 0.6 - 0.02 * index + 0.05 * (index % 3))
        if tasks:
            cards.append(answered(name, scores, holm_p=0.01, kind="worse", **given))
        else:
            cards.append(card(name, **given))
    made = {one.model.sha256: lineage(one.model.name, "shortgpt") for one in cards[1:]}
    return side_by_side(cards, lineages=made)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    file = tmp_path / "page.html"
    file.write_text(render(models(5), "html"))
    return file


@pytest.mark.parametrize(("number", "tasks"), [(1, ()), (1, KICK), (5, SIXTY), (25, KICK)])
def test_the_page_never_scrolls_sideways(
    browser: Browser, tmp_path: Path, number: int, tasks: tuple[str, ...]
):
    file = tmp_path / "page.html"
    file.write_text(render(models(number, tasks), "html"))
    browser.open(file)
    for width in (1200, 400, 320):
        browser.resize(width, 900)
        for _ in range(2):  # without and with details
            root = "document.documentElement"
            assert browser.run(f"{root}.scrollWidth - {root}.clientWidth") <= 0
            browser.run("document.getElementById('details')?.click()")
    assert not browser.failures


def test_the_table_scrolls_in_its_own_box_and_its_first_column_stays(browser: Browser, page: Path):
    browser.open(page, 320)
    left = "document.querySelector('tbody th').getBoundingClientRect().left"
    before = browser.run(left)
    browser.run("document.querySelector('.scroll').scrollLeft = 150")
    assert browser.run("document.querySelector('.scroll').scrollLeft") == 150
    assert browser.run(left) == before
    widths = "[...document.querySelectorAll('tbody th')].map(header => header.offsetWidth)"
    assert max(browser.run(widths)) < 0.55 * 320  # which leaves room for a figure


def test_names_run_nothing(browser: Browser, page: Path):
    browser.open(page)
    assert browser.run("window.hit ?? 'nothing'") == "nothing"
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.querySelectorAll('tbody th')[2].textContent") == f"3 {EVIL}"
    assert browser.run("document.querySelector('svg').getAttribute('aria-label')").count(EVIL) == 1
    assert not browser.failures


def rows(browser: Browser) -> list[int]:
    """The numbers of the models, from top to bottom."""
    numbers = "[...document.querySelectorAll('tbody th .number')].map(number => Number(number.textContent))"
    return browser.run(numbers)


HEADER = "[...document.querySelectorAll('.sortable th')].find(header => header.textContent.startsWith({}))"


def test_columns_sort_by_keyboard(browser: Browser, page: Path):
    browser.open(page)
    assert rows(browser) == [1, 2, 3, 4, 5]
    for title, up, down in (
        ("size\n", [1, 5, 4, 3, 2], [1, 2, 3, 4, 5]),
        ("peak memory", [1, 3, 4, 5, 2], [1, 3, 4, 5, 2]),  # the second was not measured
        ("model", [1, 3, 5, 2, 4], [1, 4, 2, 5, 3]),
    ):
        header = HEADER.format(json.dumps(title))
        browser.run(f"{header}.querySelector('button').focus()")
        browser.press("Enter", 13)
        assert browser.run(f"{header}.getAttribute('aria-sort')") == "ascending"
        assert rows(browser) == up, title
        assert browser.run("document.getElementById('sorted').textContent").endswith("ascending.")
        browser.press("Enter", 13)
        assert browser.run(f"{header}.getAttribute('aria-sort')") == "descending"
        assert rows(browser) == down, title
    assert browser.run("document.querySelectorAll('[aria-sort]').length") == 1


def test_the_order_of_tabs_reaches_all_that_can_be_used(browser: Browser, page: Path):
    browser.open(page)
    reached = set()
    for _ in range(12):
        browser.press("Tab", 9)
        reached.add(browser.run("document.activeElement.tagName + (document.activeElement.id || '')"))
    assert {"SELECTy0", "SELECTx0", "SELECTy1", "SELECTx1", "INPUTdetails", "DIV", "BUTTON"} <= reached


def points(browser: Browser, plot: int = 0) -> list[list[float]]:
    circles = f"[...document.querySelectorAll('svg')[{plot}].querySelectorAll('circle')]"
    return browser.run(f"{circles}.map(circle => [circle.cx.baseVal.value, circle.cy.baseVal.value])")


def test_plots_place_models_by_the_axes_that_are_chosen(browser: Browser, page: Path):
    browser.open(page)
    (dense, *others) = points(browser)
    assert len(others) == 4
    assert all(x < dense[0] for x, _ in others)  # smaller, so further left
    assert [x for x, _ in others] == sorted((x for x, _ in others), reverse=True)
    assert all(y > dense[1] for _, y in others)  # worse, so further down
    assert len(points(browser, 1)) == 4  # one has no speed, and is named
    assert "Without a figure: small." in browser.run("document.querySelectorAll('figcaption')[1].textContent")
    choose = (
        "(() => { const select = document.getElementById('y0');"
        "select.value = [...select.options].find(option => option.text === 'kick_open: score (%)').value;"
        "select.dispatchEvent(new Event('change')); })()"
    )
    browser.run(choose)
    label = browser.run("document.querySelector('svg').getAttribute('aria-label')")
    assert label.startswith(
        "kick_open: score (%) against size (MB) of 5 models. dense (dense): 60.0 ± 4.0 at 400.0;"
    )
    assert points(browser)[1][1] < points(browser)[0][1]  # the second model is the best in this task
    assert browser.run("document.querySelector('.front').getAttribute('d')").count("L") == 1  # two are on it


def test_labels_cover_neither_each_other_nor_points(browser: Browser, tmp_path: Path):
    file = tmp_path / "page.html"
    file.write_text(render(models(25), "html"))
    browser.open(file, 1200)
    covered = browser.run(
        "(() => { const boxes = [...document.querySelectorAll('svg')[0].querySelectorAll('.label')]"
        ".filter(label => !/^[0-9]+$/.test(label.textContent)).map(label => label.getBBox());"
        "return [boxes.length, boxes.filter((a, i) => boxes.some((b, j) => i < j && a.x < b.x + b.width"
        " && b.x < a.x + a.width && a.y + 2 < b.y + b.height && b.y + 2 < a.y + a.height)).length]; })()"
    )
    assert covered[0] > 1
    assert covered[1] == 0
    named = browser.run("document.querySelectorAll('svg')[0].querySelectorAll('.label').length")
    assert named == 25  # by name or by number


def test_details_of_tasks_come_and_go(browser: Browser, page: Path):
    browser.open(page)
    seen = "[...document.querySelectorAll('.sortable th')].filter(header => header.offsetWidth).length"
    spans = "[...document.querySelectorAll('.group th')].reduce((sum, header) => sum + header.colSpan, 0)"
    brief = browser.run(seen)
    assert browser.run(spans) == brief
    browser.run("document.getElementById('details').click()")
    assert browser.run(seen) == browser.run(spans) > brief


def test_a_link_opens_how_a_model_was_made(browser: Browser, page: Path):
    browser.open(page)
    assert browser.run("document.querySelectorAll('details[open]').length") == 0
    browser.run("document.querySelector('a[href=\"#made-3\"]').click()")
    assert browser.run("document.querySelector('details[open] summary').textContent").startswith("3 ")


def test_without_a_script_all_columns_are_there(browser: Browser, page: Path):
    browser.open(page, script=False)
    hidden = "[...document.querySelectorAll('table th, table td')].filter(cell => !cell.offsetWidth).length"
    assert browser.run(hidden) == 0
    assert browser.run("document.querySelector('noscript').offsetHeight") > 0
    assert browser.run("document.querySelectorAll('button, svg').length") == 0


CONTRAST = """(() => {
  const light = (colour) => {
    const parts = colour.match(/[0-9.]+/g).slice(0, 3).map(Number).map(part => part / 255)
      .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const texts = ["body", ".quiet", ".caption", ".number", "figcaption", "td a"].map((selector) => {
    const ink = light(getComputedStyle(document.querySelector(selector)).color);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  });
  return [paper, Math.min(...texts)];
})()"""
"""Luminance of the page, and the least contrast of its texts (WCAG 2.2, 1.4.3: at least 4.5)."""


@pytest.mark.parametrize("dark", [False, True])
def test_texts_are_readable_by_day_and_night(browser: Browser, page: Path, dark: bool):
    browser.open(page, dark=dark)
    paper, contrast = browser.run(CONTRAST)
    assert (paper < 0.1) == dark
    assert contrast >= 4.5


def pixels(browser: Browser, picture: bytes) -> dict[str, float]:
    """Colour -> its share of a picture; colours are rounded to steps of 32."""
    browser.visit("about:blank")
    address = f"data:image/png;base64,{b64encode(picture).decode()}"
    return browser.run(
        "(async () => { const image = new Image(); image.src = " + json.dumps(address) + ";"
        "await image.decode(); const canvas = document.createElement('canvas');"
        "canvas.width = image.width; canvas.height = image.height;"
        "const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);"
        "const data = context.getImageData(0, 0, image.width, image.height).data, found = {};"
        "for (let i = 0; i < data.length; i += 4) {"
        "  const colour = [data[i] >> 5, data[i + 1] >> 5, data[i + 2] >> 5].join();"
        "  found[colour] = (found[colour] ?? 0) + 4 / data.length; }"
        "return found; })()"
    )


@pytest.mark.parametrize(("dark", "paper", "accent"), [(False, "7,7,7", "0,3,7"), (True, "0,0,0", "3,5,7")])
@pytest.mark.parametrize("width", [360, 1200])
def test_screenshots_show_paper_and_plots(
    browser: Browser, page: Path, width: int, dark: bool, paper: str, accent: str
):
    browser.open(page, width, dark=dark)
    browser.run("document.querySelector('svg').scrollIntoView()")
    found = pixels(browser, browser.screenshot())
    assert max(found, key=found.get) == paper
    assert found[paper] > 0.6
    assert 0.0002 < found.get(accent, 0) < 0.05  # points and intervals
