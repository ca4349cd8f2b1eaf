"""Rows of a source that hold no usable text: skipped and counted, or a reason to refuse the source."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from compress.calibration.text import sources
from compress.calibration.text.sources import read_documents
from compress.errors import BadInput

GOOD = '{"text": "good"}'
TALK = {"role": "user", "content": "Hello"}
ODD = {
    '{"text": null}': "'text' is null",
    '{"text": 7}': "'text' is neither a text nor a list of messages",
    '{"text": ["good"]}': "'text' is neither a text nor a list of messages",
    '{"text": "\\ud800 half"}': "'text' holds half a character",
    json.dumps(
        {"messages": [TALK, {"role": "user", "content": "\udfff"}]}
    ): "'messages' holds half a character",
    json.dumps({"messages": [{"role": "user"}]}): "'messages' is neither",
    '{"content": "good"}': "has neither 'text' nor 'messages'; there are: content",
    '["good"]': "is not a JSON object",
    '{"text": "go': "is not JSON",
    "caf\udce9": r"is not UTF-8 text \(byte 3\)",
}


def jsonl(folder: Path, *lines: str) -> str:
    path = folder / "rows.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    return str(path)


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_row_is_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture, odd: str):
    source = jsonl(tmp_path, GOOD, odd, GOOD, odd)
    assert read_documents(source).entries == ("good", "good")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"2 of the 4 rows of {source} were skipped; the first: {source}, line 2")


@pytest.mark.parametrize("odd", ODD)
def test_a_source_of_which_more_than_half_is_odd_is_refused(tmp_path: Path, odd: str):
    source = jsonl(tmp_path, GOOD, odd, odd)
    with pytest.raises(
        BadInput, match=f"Of the 3 rows of .* 2 cannot be used.*line 2:? {ODD[odd]}"
    ) as caught:
        read_documents(source)
    assert "\n" not in str(caught.value)


def test_rows_without_text_are_not_odd(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    blank = '{"text": " "}', '{"text": ""}', '{"messages": []}', ""
    assert read_documents(jsonl(tmp_path, GOOD, *blank)).entries == ("good",)
    assert not caplog.records


def column(values: list[Any]) -> Any:
    """A column of strings, of which some may be bytes that are not UTF-8."""
    import pyarrow

    raw = [value.encode() if isinstance(value, str) else value for value in values]
    binary = pyarrow.array(raw, pyarrow.binary())
    return pyarrow.StringArray.from_buffers(len(raw), *binary.buffers()[1:], binary.buffers()[0])


def test_odd_rows_of_parquet(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": column(["good", None, "", b"caf\xe9", "fine"])}), path)
    assert read_documents(str(path)).entries == ("good", "fine")
    assert f"2 of the 5 rows of {path} were skipped; the first: {path}, row 2: 'text' is null" in caplog.text
    parquet.write_table(pyarrow.table({"text": column([b"caf\xe9"])}), path)
    with pytest.raises(BadInput, match=r"row 1 is not UTF-8 text \(byte 3\)"):
        read_documents(str(path))


def test_an_endless_stream_of_odd_rows_ends(monkeypatch: pytest.MonkeyPatch):
    def endless(*_: Any) -> Any:
        yield {"text": "good"}
        while True:
            yield {"text": None}

    monkeypatch.setattr(sources, "hub_rows", endless)
    with pytest.raises(BadInput, match=r"Of the 1000 rows of hub:some/data 999 cannot be used"):
        read_documents("hub:some/data", characters=1000)
