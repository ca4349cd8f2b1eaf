from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from compress.report.compare import side_by_side
from compress.report.latex import SPECIAL, escaped
from compress.report.render import render
from tests.unit.report.common import KICK, answered, card


def table(*cards) -> list[str]:
    return render(side_by_side(cards), "latex").splitlines()


def test_booktabs_rules_the_groups_and_the_rows():
    lines = table(answered(), answered("a_1", dict.fromkeys(KICK, 0.5), holm_p=0.01), answered("b", size=9))
    rows = [line for line in lines if line.endswith(r"\\")]
    header, titles, *models = rows
    columns = len(re.search(r"\\begin\{tabular\}\{([lr]+)\}", "\n".join(lines))[1])
    assert [row.count(" & ") + 1 for row in (titles, *models)] == [columns] * 4
    spans = [int(span) for span in re.findall(r"\\multicolumn\{(\d+)\}", header)]
    assert sum(spans) + header.count(" & ") + 1 - len(spans) == columns
    rules = re.findall(r"\\cmidrule\(lr\)\{(\d+)-(\d+)\}", "\n".join(lines))
    assert [int(last) - int(first) + 1 for first, last in rules] == spans
    assert r"\multicolumn{3}{c}{score}" in header
    assert r"50.0 $\pm$ 4.0\textsuperscript{*}" in models[1]
    assert models[1].startswith(r"a\_1 & ")
    assert r"\textbf{60.0 $\pm$ 4.0}" in models[2]
    assert [line for line in lines if "rule" in line and "cmid" not in line] == [
        r"\toprule",
        r"\midrule",
        r"\midrule",  # below the dense model
        r"\bottomrule",
    ]


def test_notes_stand_below_the_table():
    text = "\n".join(table(answered(), answered("small", kind="worse")))
    below = text[text.index(r"\end{tabular}") :]
    assert "The sentence that says worse." in below
    assert "500 questions, by exact\\_match" in below


def test_what_loads_a_model_is_left_out():
    assert "transformers" not in "\n".join(table(card()))


@given(st.text(st.sampled_from("".join(SPECIAL)) | st.characters()))
@settings(max_examples=200)
def test_no_name_is_a_command(name: str):
    text = escaped(name)
    ours = r"\\text[a-z]+\{(\*|\\dag)?\}|\\ldots\{\}|\$(\\[A-Za-z]+|-)\$|\{[\[\]]\}|\\[{}$&%#_]"
    rest = re.sub(ours, "", text)
    assert not set(rest) & set('\\{}$&%#_^~<>|"[]')
    assert "\n" not in text
