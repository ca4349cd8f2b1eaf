"""The page as a file: what is in it before any script runs."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from compress.report.compare import Comparison, side_by_side
from compress.report.page import embedded, plotted
from compress.report.render import render
from tests.unit.report.common import HOSTILE, KICK, answered, card, lineage

EVIL = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def comparison(name: str = EVIL) -> Comparison:
    made = lineage(name, "shortgpt", name)
    cards = [answered(), answered(name, {**dict.fromkeys(KICK, 0.5), name: 0.5}, size=10**8)]
    return side_by_side(cards, lineages={cards[1].model.sha256: made})


def test_the_page_fetches_nothing_and_names_are_only_text():
    text = render(comparison(), "html")
    page = Page(text)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("script") == 2
    assert not re.search(r"https?:(?!//www.w3.org/2000/svg)|@import|url\(", text)
    loading = {"src", "srcset", "action", "formaction", "poster", "data"}
    assert not [name for name, _ in page.attributes if name in loading or name.startswith("on")]
    references = [value for name, value in page.attributes if name == "href"]
    assert references == ["#made-2"]
    assert EVIL in page.text
    assert "prefers-color-scheme: dark" in text


def test_only_the_script_of_the_page_may_run():
    import base64
    from hashlib import sha256

    text = render(comparison(), "html")
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_without_a_script_the_table_is_complete():
    shown = comparison("small")
    text = Page(render(shown, "html")).text
    for row in shown.rows:
        for column in shown.full:
            assert row.text(column) in text
    for line in (*shown.notes, *shown.caption):
        assert line in text
    assert "shortgpt → small" in text
    assert any(f"ratio = 0.25, note = {json.dumps(HOSTILE)}. Paper" in part for part in text)
    assert any("source = factbook, nsamples = 16" in part for part in text)
    assert any("compress-model 9.8.7" in part for part in text)


@given(
    st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
)
@settings(max_examples=50)
def test_embedded_json_reads_back_and_ends_no_element(document: object):
    text = embedded(document)
    assert json.loads(text) == document
    assert not set(text) & set("<>&\u2028\u2029")


def test_a_page_of_nothing_scored_says_so():
    bare = card("bare", measured=False).model_copy(update={"protocol": None, "fidelity": None})
    assert "no quality to plot" in render(side_by_side([bare]), "html")
    assert "no quality to plot" not in render(side_by_side([card()]), "html")


def test_plots_get_what_can_be_plotted():
    document = plotted(comparison(HOSTILE))
    axes = {axis["key"]: axis for axis in document["axes"]}
    assert [plot["y"] for plot in document["plots"]] == ["tasks_change", "tasks_change"]
    assert [plot["x"] for plot in document["plots"]] == ["size", "prefill"]
    assert axes["size"]["figures"][1] == {"value": 100.0, "low": None, "high": None, "text": "100.0"}
    assert axes["kick_open.score"]["figures"][1]["low"] == 46
    assert axes["kick_open.score"]["label"] == "kick_open: score (%)"
    assert not {"model", "verdict", "kick_open.holm_p", "kick_open.matching"} & set(axes)
    assert document["models"][1]["name"] == HOSTILE
