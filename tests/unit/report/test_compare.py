from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from compress.commands.compare import compare as command
from compress.errors import BadInput
from compress.report.compare import newest_side_by_side, read_scorecards, side_by_side
from compress.report.render import FORMATS, render
from compress.report.scorecard import Scorecard
from compress.report.table import compare
from tests.unit.report.common import HOSTILE, WHEN, card, dumped, write


def test_rows_have_dense_first_and_figures_as_stored():
    comparison = side_by_side(
        [card("small", size=100_000_000), card("dense"), card("smaller", size=50_000_000)]
    )
    assert [row.cells["model"] for row in comparison.rows] == ["dense", "small", "smaller"]
    small = comparison.rows[1]
    shown = {column.key: small.text(column) for column in comparison.columns}
    assert shown == {
        "model": "small",
        "size": "100.0",
        "size_ratio": "0.2500",
        "bits_per_parameter": "4.000",
        "parameters": "200.0",
        "perplexity": "13.66 ± 0.61",
        "perplexity_ratio": "1.090 ± 0.011",
        "kl_mean": "0.1210 ± 0.0060",
        "top1_agreement": "86.20 ± 0.40",
        "peak_memory": "940.0",
        "added_memory": "639.0",
        "prefill": "812 (796–820)",
        "decode": "–",
        "kernel": "reference (scored: torch)",
        "loads_with": "transformers",
    }


def test_what_was_not_measured_is_a_dash_and_never_zero():
    bare = card("bare", measured=False).model_copy(update={"protocol": None, "fidelity": None})
    comparison = side_by_side([bare])
    dashes = {column.key for column in comparison.columns if comparison.rows[0].text(column) == "–"}
    assert dashes == {
        "size_ratio",
        "perplexity",
        "perplexity_ratio",
        "kl_mean",
        "top1_agreement",
        "peak_memory",
        "added_memory",
        "prefill",
        "decode",
        "kernel",
    }
    row = next(csv.DictReader(io.StringIO(render(comparison, "csv"))))
    assert row["perplexity"] == row["size_ratio"] == row["prefill"] == ""
    assert json.loads(render(comparison, "json"))["rows"][0]["cells"]["perplexity"] is None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"text_sha256": "1" * 64}, "text_sha256"),
        ({"context_tokens": 1024}, "context_tokens"),
        ({"stride_tokens": 512}, "stride_tokens"),
        ({"windows": 10}, "windows"),
        ({"tokens_scored": 4600}, "tokens_scored"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype"),
        ({"seed": 8}, "seed"),
        ({"baseline": "other"}, "baseline.sha256"),
    ],
)
def test_rows_made_in_different_ways_are_refused(change: dict, field: str, tmp_path: Path):
    first = write(tmp_path / "first.json", dumped(card("dense")))
    second = write(tmp_path / "second.json", dumped(card("small", **change)))
    with pytest.raises(BadInput) as caught:
        compare(first, second)
    message = str(caught.value)
    assert field in message
    assert str(first) in message
    assert str(second) in message


def test_another_kernel_or_machine_is_stated_but_not_refused():
    timed = card("small", kernel="cpu")
    measured = timed.cost.measured.model_copy(update={"threads": 8})
    other = timed.model_copy(update={"cost": timed.cost.model_copy(update={"measured": measured})})
    caption = " ".join(side_by_side([card("dense"), other]).caption)
    assert "a processor, 2 threads; a processor, 8 threads" in caption
    assert "speeds do not compare" in caption


def test_the_newest_evaluation_that_fits_is_taken(tmp_path: Path):
    folder = tmp_path / "small"
    folder.mkdir()
    history = dumped(
        card("small", size=1, day=1),
        card("small", size=2, day=2),
        card("small", size=3, day=3, context_tokens=99),
    )
    write(folder / "compression.json", {"schema_version": 1, "evaluations": history})
    dense = write(tmp_path / "dense.json", dumped(card("dense"))[0])
    assert [row.cells["size"].value for row in compare(folder, dense).rows] == [400_000_000, 2]
    assert [row.cells["size"].value for row in compare(folder).rows] == [3]
    assert len(compare(folder, folder, dense).rows) == 2  # a model given twice is one row


def test_models_with_the_same_weights_share_a_row_and_a_note_says_so(tmp_path: Path):
    one, twin = card("small", day=1), card("small")
    twin = twin.model_copy(update={"model": twin.model.model_copy(update={"name": "copy"})})
    names = {"one": one, "two": twin, "again": one}
    files = {name: write(tmp_path / f"{name}.json", dumped(card("dense"), of)) for name, of in names.items()}
    table = compare(files["one"], files["two"])
    assert [row.name for row in table.rows] == ["dense", "small"]
    assert table.notes == ["copy has the same weights as small, so they share a row."]
    assert "share a row" in table.render("table")
    assert compare(files["one"], files["again"]).notes == []
    renamed = write(tmp_path / "renamed.json", dumped(twin, one))  # one folder that was moved
    assert compare(files["one"], renamed).notes == []


def test_a_model_that_was_compared_with_two_dense_models_is_shown_beside_the_newest(tmp_path: Path):
    folder = tmp_path / "small"
    folder.mkdir()
    first = [card("dense", day=2), card("small", day=2)]
    second = [card("other", baseline="other", day=1), card("small", baseline="other", day=1)]
    write(folder / "compression.json", {"schema_version": 1, "evaluations": dumped(*first, *second)})
    assert [row.cells["model"] for row in compare(folder).rows] == ["dense", "small"]
    own = write(tmp_path / "other.json", dumped(second[0]))
    assert [row.cells["model"] for row in compare(folder, own).rows] == ["other", "small"]
    alone = write(tmp_path / "third.json", dumped(card("third", baseline="third")))
    with pytest.raises(BadInput, match=r"third\.json"):
        compare(folder, alone)


def test_of_one_models_history_the_newest_comparison_with_another_counts():
    beside_dense = [card(day=1), card("small", day=1), card(day=2), card("small", day=2)]
    longer = [card(day=3, context_tokens=1024), card("small", day=3, context_tokens=1024)]
    alone = card("small", baseline="small", day=4)

    def chosen(history: list[Scorecard]) -> list[tuple[str, datetime]]:
        rows = newest_side_by_side(history).rows
        return [(row.scorecard.model.name, row.scorecard.when) for row in rows]

    assert chosen([*beside_dense, alone]) == [
        ("dense", WHEN + timedelta(days=2)),
        ("small", WHEN + timedelta(days=2)),
    ]
    assert {when for _, when in chosen([*longer, *beside_dense])} == {WHEN + timedelta(days=3)}
    assert chosen([alone]) == [("small", WHEN + timedelta(days=4))]


def test_files_that_hold_no_scorecard(tmp_path: Path):
    empty = tmp_path / "empty"
    empty.mkdir()
    plain = tmp_path / "plain"
    plain.mkdir()
    write(plain / "compression.json", {"schema_version": 1})
    broken = tmp_path / "broken.json"
    broken.write_text('{"model": ')
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    newer = write(tmp_path / "newer.json", dumped(card())[0] | {"schema_version": 2})
    unknown = write(tmp_path / "unknown.json", dumped(card())[0] | {"colour": "red"})
    cases = {
        tmp_path / "nowhere": "There is no",
        empty: "has no compression.json",
        plain: "holds no evaluation yet",
        broken: "is not JSON",
        binary: "is not JSON",
        deep: "is not JSON",
        newer: "newer compress-model",
        unknown: "colour",
        write(tmp_path / "number.json", 7): "not a scorecard",
        write(tmp_path / "list.json", []): "holds no evaluation yet",
    }
    for path, reason in cases.items():
        with pytest.raises(BadInput, match=reason) as caught:
            read_scorecards(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(BadInput, match="nothing to compare"):
        side_by_side([])


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_states_text_context_stride_and_denominator(format: str):
    text = render(side_by_side([card("dense"), card("small")]), format)
    text = re.sub(r"\s+", " ", text.replace("\\_", "_"))
    for fact in ("factbook", "512", "256", "float32", "a processor", "dense"):
        assert fact in text
    assert "4,599" in text or "4599" in text


def test_markdown_is_a_table_whatever_the_name():
    lines = render(side_by_side([card("dense"), card(HOSTILE)]), "markdown").splitlines()
    bars = [len(re.findall(r"(?<!\\)\|", line)) for line in lines[:4]]
    assert bars == [16] * 4
    assert "\\<script>" in lines[3]
    assert lines[4] == ""
    assert lines[5].startswith("- Text: factbook")


def test_csv_has_every_digit_and_reads_back():
    rows = list(csv.DictReader(io.StringIO(render(side_by_side([card("dense"), card(HOSTILE)]), "csv"))))
    assert [row["model"] for row in rows] == ["dense", HOSTILE]
    assert float(rows[1]["perplexity_ratio"]) == 1.0904
    assert (rows[1]["perplexity_low"], rows[1]["perplexity_high"]) == ("13.06", "14.27")
    assert rows[1]["size"] == "400000000"
    assert rows[1]["decode"] == ""


def test_json_holds_the_scorecards():
    cards = [card("dense"), card("small")]
    document = json.loads(render(side_by_side(cards), "json"))
    assert [Scorecard.model_validate(row["scorecard"]) for row in document["rows"]] == cards
    assert document["rows"][1]["cells"]["perplexity"]["high"] == 14.27
    assert [row["dense"] for row in document["rows"]] == [True, False]


@pytest.mark.parametrize("width", [60, 80, 120, 300])
def test_the_terminal_table_fits_its_terminal(width: int):
    from rich.console import Console

    from compress.report.render import print_table

    file = io.StringIO()
    print_table(side_by_side([card("dense"), card(HOSTILE)]), Console(file=file, width=width))
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "[bold]" in re.sub(r"\s", "", text)  # a name is not markup
    for figure in ("13.66 ± 0.61", "0.1210 ± 0.0060", "812 (796–820)", "1.090 ± 0.011"):
        assert figure in text  # no figure is folded or cut


def test_the_command(tmp_path: Path):
    file = write(tmp_path / "cards.json", dumped(card("dense"), card("small", size=10**8)))
    run = CliRunner().invoke
    assert "13.66 ± 0.61" in run(command, [str(file)]).output
    assert json.loads(run(command, [str(file), "--json"]).output)["schema_version"] == 1
    assert run(command, [str(file), "--json"]).output == run(command, [str(file), "--format", "json"]).output
    assert run(command, [str(file), "--json", "--format", "csv"]).exit_code == 2
    assert run(command, []).exit_code == 2
    for format in FORMATS:
        output = tmp_path / f"out.{format}"
        result = run(command, [str(file), "--format", format, "-o", str(output)])
        assert (result.exit_code, result.output) == (0, "")
        assert output.read_text() == render(compare(file), format)
    assert len(list(tmp_path.iterdir())) == 1 + len(FORMATS)  # no temporary file is left


def test_comparing_imports_no_torch(tmp_path: Path):
    file = write(tmp_path / "cards.json", dumped(card("dense")))
    code = (
        "import sys; from compress.report.table import compare\n"
        "from compress.report.render import render\n"
        f"render(compare({str(file)!r}), 'table')\n"
        "assert not {'torch', 'transformers', 'scipy', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
