"""Models that answered tasks of lm-eval, side by side."""

from __future__ import annotations

import csv
import io
import json
import re
from datetime import timedelta
from pathlib import Path

import pytest

from compress.errors import BadInput
from compress.report.compare import newest_side_by_side, side_by_side
from compress.report.render import render
from compress.report.scorecard import Figure
from compress.report.table import compare
from tests.unit.report.common import HOSTILE, KICK, WHEN, answered, card, lineage, made

LOW = dict.fromkeys(KICK, 0.5)


def shown(comparison, row: int) -> dict[str, str]:
    return {column.key: comparison.rows[row].text(column) for column in comparison.columns}


def test_every_task_has_its_columns_and_the_verdict_stands_before_them():
    comparison = side_by_side([answered("small", LOW, holm_p=0.01, kind="worse"), answered()])
    small = shown(comparison, 1)
    assert small["kick_choice.score"] == "50.0 ± 4.0*"
    assert small["kick_choice.change"] == "−10.0 ± 2.0"
    assert (small["kick_choice.lost"], small["kick_choice.gained"]) == ("30", "10")
    assert small["kick_choice.matching"] == "no"
    assert (small["tasks_lost"], small["tasks_gained"], small["verdict"]) == ("90", "30", "worse")
    assert (small["tasks_matching"], small["tasks_questions"]) == ("0 of 3", "1,500")
    keys = list(small)
    assert keys.index("verdict") < keys.index("kick_factoid.score") < keys.index("kick_open.score")
    dense = shown(comparison, 0)
    assert dense["kick_choice.score"] == "60.0 ± 4.0"
    assert (dense["kick_choice.change"], dense["verdict"], dense["tasks_lost"]) == ("–", "–", "–")
    assert dense["tasks_change"] == "0"  # known without asking


def test_tables_for_people_show_one_score_for_each_task():
    comparison = side_by_side([answered(), answered("small", LOW)])
    columns = [column for column in comparison.brief if column.group == "score"]
    assert [column.title for column in columns] == list(KICK)
    assert {column.key for column in comparison.brief} >= {"tasks_change", "tasks_lost", "verdict"}
    assert not {"kick_choice.lost", "tasks_needed"} & {column.key for column in comparison.brief}
    assert not {"kick_choice.contains", "worse_p"} & {column.key for column in comparison.full}


@pytest.mark.parametrize(("p", "star"), [(0.0499, "*"), (0.05, "")])
def test_the_star_is_for_a_corrected_p_below_the_level(p: float, star: str):
    comparison = side_by_side([answered(), answered("small", LOW, holm_p=p)])
    assert shown(comparison, 1)["kick_open.score"] == f"50.0 ± 4.0{star}"


def best_of(comparison, key: str) -> list[str]:
    return [row.name for row in comparison.rows if row.marks.get(key) and row.marks[key].best]


def test_the_best_value_is_marked_among_compressed_models():
    worse = answered("worse", {"kick_factoid": 0.3, "kick_open": 0.5}, size=10**8)
    better = answered("better", {"kick_factoid": 0.4, "kick_open": 0.5}, size=2 * 10**8)
    comparison = side_by_side([answered(), worse, better])
    assert best_of(comparison, "kick_factoid.score") == ["better"]
    assert best_of(comparison, "size") == best_of(comparison, "size_ratio") == ["worse"]
    assert best_of(comparison, "kick_open.score") == []  # all are alike
    assert best_of(comparison, "parameters") == []  # neither more nor less is better
    assert best_of(side_by_side([answered(), worse]), "size") == []  # nobody to compete with
    assert "**40.0 ± 4.0**" in render(comparison, "markdown")
    assert "• 40.0 ± 4.0" in render(comparison, "table")
    assert "best value" in " ".join(comparison.caption)


def test_speeds_of_two_machines_have_no_best():
    slow = answered("slow")
    measured = slow.cost.measured

    def timed(**changes):
        cost = slow.cost.model_copy(update={"measured": measured.model_copy(update=changes)})
        return answered("quick").model_copy(update={"cost": cost})

    less = {"peak_resident_bytes": 9, "prefill": Figure(value=10**4, low=1, high=10**5, unit="tokens/s")}
    assert best_of(side_by_side([slow, timed(**less)]), "prefill") == ["quick"]
    assert best_of(side_by_side([slow, timed(**less)]), "peak_memory") == ["quick"]
    elsewhere = side_by_side([slow, timed(**less, threads=9)])
    assert best_of(elsewhere, "prefill") == best_of(elsewhere, "peak_memory") == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"fewshot": 5}, "number of examples in front 5 instead of 0"),
        ({"questions": 20}, "number of questions 20 instead of 500"),
        ({"metric": "f1"}, "deciding metric f1 instead of exact_match"),
        ({"sha256": "f" * 64}, "hash of prompts and answers ffffffffffff… instead of"),
    ],
)
def test_a_task_that_was_asked_differently_is_marked_and_says_why(changes: dict, why: str):
    other = answered("other", dict.fromkeys(KICK, 0.59), holm_p=0.01, changes={"kick_choice": changes})
    comparison = side_by_side([answered(), answered("a", LOW), answered("b", LOW), other])
    cells = shown(comparison, 3)
    assert cells["kick_choice.score"] == "59.0 ± 4.0*†"
    assert cells["kick_choice.lost"] == "30†"
    assert cells["kick_open.score"] == "59.0 ± 4.0*"
    assert cells["verdict"] == "undecided†"
    assert not any("†" in text for row in range(3) for text in shown(comparison, row).values())
    assert [note for note in comparison.notes if note.startswith(f"† other, kick_choice: {why}")]
    assert "† other, the verdict: it is over other questions." in comparison.notes
    assert best_of(comparison, "kick_choice.score") == []  # it does not compete
    assert best_of(comparison, "kick_open.score") == ["other"]


@pytest.mark.parametrize(
    ("protocol", "why"),
    [
        ({"chat_template": True}, "chat template on instead of off"),
        ({"lm_eval": "0.5.0"}, "version of lm-eval 0.5.0 instead of 0.4.13"),
        ({"seed": 7}, "seed 7 instead of 0"),
    ],
)
def test_how_all_tasks_were_asked_marks_all_of_them(protocol: dict, why: str):
    comparison = side_by_side([answered(), answered("other", LOW, protocol=protocol)])
    assert f"† other, {', '.join(KICK)}: {why}." in comparison.notes
    assert all(shown(comparison, 1)[f"{task}.score"].endswith("†") for task in KICK)


def test_the_dense_model_decides_what_is_usual():
    others = [answered(name, changes={"kick_open": {"fewshot": 5}}) for name in "abc"]
    comparison = side_by_side([answered(), *others])
    assert [shown(comparison, row)["kick_open.score"] for row in range(4)] == [
        "60.0 ± 4.0",
        *["60.0 ± 4.0†"] * 3,
    ]


def test_another_kernel_or_suite_marks_nothing():
    other = answered("other", LOW, protocol={"kernel": "cpu", "suite": None})
    assert not any("†" in note for note in side_by_side([answered(), other]).notes)


def test_without_the_dense_model_most_models_decide_what_is_usual():
    odd = answered("odd", changes={"kick_open": {"fewshot": 1}})
    comparison = side_by_side([odd, answered("a"), answered("b")])
    assert "† odd, kick_open: number of examples in front 1 instead of 0." in comparison.notes
    assert len([note for note in comparison.notes if note.startswith("† odd")]) == 2
    assert not any(note.startswith(("† a", "† b")) for note in comparison.notes)


def test_verdicts_over_other_tasks_or_margins_are_marked():
    fewer = answered("fewer", {"kick_open": 0.5})
    wider = answered("wider", margin=0.02)
    comparison = side_by_side([answered(), answered("a"), answered("b"), fewer, wider])
    texts = [shown(comparison, row)["verdict"] for row in range(5)]
    assert texts == ["–", "undecided", "undecided", "undecided†", "undecided†"]
    assert "† fewer, the verdict: it is over other questions." in comparison.notes
    assert (
        "† wider, the verdict: its margin is 2.000 % of the questions instead of 1.000 %." in comparison.notes
    )
    assert shown(comparison, 3)["kick_choice.score"] == "–"


def test_notes_hold_every_verdict_and_warning():
    small = answered("small", kind="worse", warnings=("It gained 9 points, which is implausible.",))
    notes = side_by_side([answered(warnings=("It is no better than chance.",)), small]).notes
    assert notes == [
        "small: The sentence that says worse.",
        "dense, warning: It is no better than chance.",
        "small, warning: It gained 9 points, which is implausible.",
    ]


@pytest.mark.parametrize("format", ["table", "markdown", "latex", "html", "json"])
def test_every_format_says_the_verdict_and_the_mark(format: str):
    other = answered("other", kind="worse", changes={"kick_choice": {"fewshot": 5}})
    text = re.sub(r"\s+", " ", render(side_by_side([answered(), other]), format))
    assert "The sentence that says worse." in text
    assert "number of examples in front 5 instead of 0" in text


def test_another_dense_model_is_refused_for_tasks_too():
    with pytest.raises(BadInput, match=r"baseline\.sha256"):
        compare(answered("a", text=False), answered("b", text=False, baseline="other"))


def test_text_and_tasks_of_two_evaluations_make_one_row(tmp_path: Path):
    history = [card(), card("small"), answered(text=False, day=1), answered("small", LOW, text=False, day=1)]
    folder = made(tmp_path / "small", lineage("small", "gptq"), *history)
    comparison = compare(folder)
    assert [row.name for row in comparison.rows] == ["dense", "small"]
    cells = shown(comparison, 1)
    assert cells["perplexity"] == "13.66 ± 0.61"
    assert cells["kick_open.score"] == "50.0 ± 4.0"
    assert cells["made_by"] == "gptq"
    assert comparison.rows[0].lineage is None
    assert shown(newest_side_by_side(history), 1)["perplexity"] == cells["perplexity"]
    assert shown(newest_side_by_side(history), 1)["kick_open.score"] == cells["kick_open.score"]


def test_of_several_evaluations_the_newest_that_all_were_asked_is_taken():
    short = {"changes": {task: {"questions": 20} for task in KICK}}
    a = [answered("a", LOW, day=1), answered("a", LOW, day=5, **short)]
    b = [answered("b", LOW, day=2)]
    comparison = compare(a, b)
    assert comparison.rows[0].scorecard.harness_protocol.tasks[0].questions == 500
    assert not any("†" in note for note in comparison.notes)
    alone = compare(a, answered("b", {"arc": 0.5}, day=2))  # nothing in common: the newest of each
    assert alone.rows[0].scorecard.when == WHEN + timedelta(days=5)


def test_an_evaluation_against_itself_does_not_hide_those_against_the_dense_model():
    alone = card("small", baseline="small", day=9)
    comparison = compare([card(), card("small"), alone], card())
    assert [row.name for row in comparison.rows] == ["dense", "small"]
    assert comparison.rows[1].scorecard.when == WHEN
    mine = answered("small", LOW, baseline="small", day=9, text=False)
    comparison = compare([card(), card("small"), answered(), answered("small", text=False), mine])
    assert shown(comparison, 1)["kick_open.score"] == "60.0 ± 4.0"


def test_a_folder_that_does_not_tell_how_it_was_made_is_compared_all_the_same(tmp_path: Path):
    folder = tmp_path / "old"
    folder.mkdir()
    cards = [answered("old").model_dump(mode="json")]
    (folder / "compression.json").write_text(json.dumps({"evaluations": cards}))
    comparison = compare(folder)
    assert comparison.rows[0].lineage is None
    assert "made_by" not in {column.key for column in comparison.columns}


def test_a_chain_of_runs_is_named_in_order(tmp_path: Path):
    pruned = lineage("pruned", "shortgpt", "wanda")
    folder = made(tmp_path / "both", lineage("both", "gptq", parent=pruned), answered("both"))
    stored = made(tmp_path / "again", lineage("again"), answered("again"))
    comparison = compare(folder, stored)
    assert [row.cells["made_by"] for row in comparison.rows] == ["shortgpt → wanda → gptq", "stored again"]
    document = json.loads(render(comparison, "json"))
    assert document["rows"][0]["lineage"]["parent"]["lineage"]["steps"][1]["method"] == "wanda"
    assert "evaluations" not in document["rows"][0]["lineage"]


def test_csv_has_all_digits_of_all_tasks_and_how_they_were_asked():
    odd = answered("odd", {"kick_open": 0.5}, changes={"kick_open": {"fewshot": 2}})
    rows = list(csv.DictReader(io.StringIO(render(side_by_side([answered(), odd]), "csv"))))
    assert (rows[1]["kick_open.score"], rows[1]["kick_open.score_low"]) == ("0.5", "0.46")
    assert (rows[1]["kick_open.lost"], rows[1]["kick_open.contains"]) == ("30", "0.5")
    assert (rows[1]["kick_open.fewshot"], rows[0]["kick_open.fewshot"]) == ("2", "0")
    assert rows[1]["kick_choice.score"] == rows[1]["kick_choice.questions"] == ""
    assert (rows[0]["asked_differently"], rows[1]["asked_differently"]) == ("", "kick_open")
    assert (rows[1]["verdict"], rows[1]["margin"], rows[1]["lm_eval"]) == ("undecided", "0.01", "0.4.13")


def test_json_says_what_is_marked():
    document = json.loads(render(side_by_side([answered(), answered("small", LOW, holm_p=0.01)]), "json"))
    marks = document["rows"][1]["marks"]
    assert marks["kick_open.score"] == {"star": True, "other": False, "best": False}
    assert document["notes"] == ["small: The sentence that says undecided."]


def test_six_scores_fit_100_columns_and_the_verdict_stands_beside_its_change():
    from rich.console import Console

    from compress.report.render import print_table

    names = ("factoid", "choice", "closed", "open", "summary", "instruct")
    scores = {f"kick_{name}": 0.5 for name in names}
    dense = answered("dense", dict.fromkeys(scores, 0.6), text=False, measured=False)
    small = answered("small", scores, text=False, measured=False, holm_p=0.01)
    for width in (60, 80, 100, 140):
        file = io.StringIO()
        print_table(side_by_side([dense, small]), Console(file=file, width=width))
        lines = file.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        assert "undecided" in next(line for line in lines if "−4.0 ± 1.0" in line)  # groups stay whole
        if width == 100:
            assert next(line for line in lines if "50.0 ± 4.0*" in line).count("50.0 ± 4.0*") == 6


def test_names_command_no_terminal_and_keep_to_their_line():
    evil = "a\x1b[31mb\nc\u202ed"
    comparison = side_by_side([answered(), answered(evil, {"kick_open": 0.5, f"t{HOSTILE}\x07": 0.5})])
    for format in ("table", "markdown", "latex", "html"):
        text = render(comparison, format)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
        assert "a�" in text
    assert next(csv.DictReader(io.StringIO(render(comparison, "csv"))))["model"] == "dense"
    assert json.loads(render(comparison, "json"))["rows"][1]["cells"]["model"] == evil
