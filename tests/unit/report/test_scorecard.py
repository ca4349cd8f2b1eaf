from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.report.scorecard import Figure

finite = st.floats(-1e300, 1e300, allow_subnormal=False)


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Figure(value=12.3412, low=12.2912, high=12.3912), "12.341 ± 0.050"),
        (Figure(value=1.02, low=1.0, high=1.05), "1.020 +0.030/−0.020"),
        (Figure(value=1, low=0.998, high=1, unit="fraction"), "100.00 +0/−0.20"),
        (Figure(value=1, low=1, high=1), "1.000"),
        (Figure(value=0, unit="nats/token"), "0"),
        (Figure(value=269_060_552, unit="bytes"), "269.1"),
        (Figure(value=4_512_345_678, unit="bytes"), "4,512"),
        (Figure(value=134_515_008, unit="parameters"), "134.5"),
        (
            Figure(value=35.24, low=34.9, high=35.61, unit="tokens/s", spread="interquartile range"),
            "35.24 (34.90–35.61)",
        ),
        (Figure(value=0.0123, low=0.0118, high=0.0128, unit="nats/token"), "0.01230 ± 0.00050"),
        (Figure(value=2.4e-7, low=2.3e-7, high=2.5e-7), "(2.40 ± 0.10)e-7"),
        (Figure(value=1.5e43, low=1.0e43, high=2.0e43), "(1.50 ± 0.50)e43"),
        (Figure(value=2.4e-7), "2.400e-7"),
        (Figure(value=5.0, low=5.0 - 1e-13, high=5.0), "5.000"),
        (Figure(value=1234.5, low=1114.5, high=1354.5), "1,234 ± 120"),
        (Figure(value=-3.2, low=-3.5, high=-2.9), "−3.20 ± 0.30"),
    ],
)
def test_a_figure_reads_like_this(figure: Figure, text: str):
    assert figure.text == text


def test_a_figure_in_a_sentence_and_in_csv():
    size = Figure(value=269_060_552.0, unit="bytes")
    assert str(size) == "269.1 MB"
    assert size.cells == ("269060552", "", "")
    assert Figure(value=0.1 + 0.2, low=0, high=1).cells == ("0.30000000000000004", "0", "1")


@given(finite, finite, finite, st.sampled_from(["", "bytes", "fraction"]))
@example(0.0, 0.0, 1.0770506260143335e-305, "bytes")  # below the normal numbers, in megabytes
def test_every_figure_renders_and_survives_json(a: float, b: float, c: float, unit: str):
    low, value, high = sorted([a, b, c])
    figure = Figure(value=value, low=low, high=high, unit=unit)
    assert figure.text
    assert len(figure.text) < 60
    assert Figure.model_validate(json.loads(figure.model_dump_json())) == figure
    assert float(figure.cells[0]) == value


@pytest.mark.parametrize(
    "wrong",
    [
        {"value": float("nan")},
        {"value": 1, "low": 2, "high": 3},
        {"value": 1, "low": 0},
        {"value": 1, "unit": "furlongs"},
        {"value": 1, "colour": "red"},
    ],
)
def test_a_figure_that_makes_no_sense_is_refused(wrong: dict):
    with pytest.raises(ValidationError):
        Figure(**wrong)
