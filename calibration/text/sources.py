"""Read the documents of a source, which the user names by one string.

A source is one of

- a named text of the module ``corpora`` (``bundled``, ``bundled:evaluation``, ``wikipedia``, ...);
- a ``.txt`` file, which is one document (blank lines do not split it);
- a ``.jsonl`` file, where each line is an object with ``text`` (a document) or ``messages`` (a conversation:
  a list of ``{"role": ..., "content": ...}``);
- a ``.parquet`` file with a column ``text`` or ``messages`` of the same kind;
- ``hub:DATASET[:CONFIG[:SPLIT[:FIELD]]]``, a data set of the Hugging Face hub, which is streamed. A part that
  is empty or missing takes its default: the data set's own config, the split ``train``, and the field
  ``text``, else ``messages``, else the only column of strings.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from compress.calibration.text.corpora import CORPORA
from compress.errors import BadInput, CompressError, unknown

log = logging.getLogger(__name__)

HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""Half of a pair of surrogates, which JSON can spell but no text in UTF-8 can hold."""

Conversation = tuple[dict[str, str], ...]
"""Messages in order, each with ``role`` and ``content``."""

LARGEST_ODD_SHARE = 0.5
"""Share of odd rows above which a source is refused."""

ROWS_OF_A_JUDGEMENT = 1000
"""Rows after which the share of odd ones is judged while reading: a stream of the hub may be endless."""

SUFFIXES = (".txt", ".jsonl", ".parquet")
UNSAFE_SUFFIXES = (".pickle", ".pkl", ".pt", ".pth", ".bin", ".npy", ".npz")


@dataclass(frozen=True)
class Documents:
    """Documents in the order of their source.

    Attributes:
        entries: texts and conversations; no text is blank, and no conversation is empty.
        source: the string that names the source.
        licence: of a named text; None for the user's own files and the hub.
    """

    entries: tuple[str | Conversation, ...]
    source: str
    licence: str | None = None

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """sha256 of the words of each entry, with any white space as one space; overlap is found by these."""
        texts = (" ".join(words(entry).split()) for entry in self.entries)
        return tuple(hashlib.sha256(text.encode()).hexdigest() for text in texts)

    @property
    def distinct(self) -> list[int]:
        """The indices of the entries, without those whose words another one has said before."""
        first = {digest: index for index, digest in reversed(list(enumerate(self.hashes)))}
        return sorted(first.values())

    @property
    def sha256(self) -> str:
        """sha256 over the hashes of the entries, in order."""
        return hashlib.sha256("".join(self.hashes).encode()).hexdigest()


def read_documents(source: str, characters: int | None = None) -> Documents:
    """The documents of a source.

    Args:
        source: one of those above.
        characters: about how many are read of a hub data set, which may be endless; None reads all of it.
            Other sources are always read whole.

    Raises:
        BadInput: there is no such source, or its content is not what it should be.
        CompressError: the source cannot be fetched (offline), or a package to read it is missing.
    """
    if source in CORPORA:
        corpus = CORPORA[source]
        return Documents(tuple(corpus.read()), source, corpus.licence)
    if source.startswith("hub:"):
        entries = tuple(_without_odd_rows(_hub(source), source, characters))
    else:
        entries = tuple(_without_odd_rows(_file(source), source))
    if not entries:
        raise BadInput(f"{source} holds no text.")
    return Documents(entries, source)


class _OddRow(Exception):
    """What is wrong with one row, and where it is."""


Row = Callable[[], str | Conversation | None]
"""Reads one row of a source: gives None if it has no text, and raises _OddRow if it holds something else."""


def _without_odd_rows(
    rows: Iterable[Row], source: str, characters: int | None = None
) -> Iterator[str | Conversation]:
    """The texts and conversations of ``rows``, about ``characters`` of them; a warning counts odd rows."""
    odd: list[_OddRow] = []
    number = seen = 0
    for number, row in enumerate(rows, start=1):
        entry = None
        try:
            entry = row()
        except _OddRow as error:
            odd.append(error)
        if entry is not None:
            yield entry
            seen += len(words(entry))
        if number % ROWS_OF_A_JUDGEMENT == 0:
            _refuse_if_mostly_odd(odd, number, source)
        if characters is not None and seen >= characters:
            break
    _refuse_if_mostly_odd(odd, number, source)
    if odd:
        log.warning("%d of the %d rows of %s were skipped; the first: %s.", len(odd), number, source, odd[0])


def _refuse_if_mostly_odd(odd: list[_OddRow], rows: int, source: str) -> None:
    if len(odd) > LARGEST_ODD_SHARE * rows:
        raise BadInput(
            f"Of the {rows} rows of {source} {len(odd)} cannot be used, which is more than half; the first: "
            f"{odd[0]}."
        )


def _file(source: str) -> Iterator[Row]:
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if suffix in UNSAFE_SUFFIXES:
        raise BadInput(
            f"{source} may be a pickle, which can run code when it is read; give a {_or(SUFFIXES)} file."
        )
    if not path.exists():
        if suffix in SUFFIXES or len(path.parts) > 1:
            raise BadInput(f"There is no file {source}.")
        raise unknown("text", source, CORPORA)
    if not path.is_file() or suffix not in SUFFIXES:
        what = "is not a file" if not path.is_file() else "is not a text file of a known type"
        raise BadInput(f"{source} {what}; give {_or(SUFFIXES)}, or one of {', '.join(CORPORA)}.")
    try:
        yield from {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}[suffix](path)
    except OSError as error:
        raise BadInput(f"{source} cannot be read ({error.strerror or error}).") from error


def _txt(path: Path) -> Iterator[Row]:
    try:
        text = _utf8(path.read_bytes(), str(path)).replace("\r\n", "\n")
    except _OddRow as odd:
        raise BadInput(f"{odd}; convert it first.") from None
    yield lambda: text if text.strip() else None


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield partial(_json_row, line, f"{path}, line {number}")


def _json_row(line: bytes, where: str) -> str | Conversation | None:
    try:
        row = json.loads(_utf8(line, where))
    except (ValueError, RecursionError) as error:
        raise _OddRow(f"{where} is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise _OddRow(f"{where} is not a JSON object with 'text' or 'messages'")
    field = _field(row)
    if field is None:
        raise _OddRow(f"{where} {_no_field(row)}")
    return _entry(row[field], field, where)


def json_objects(content: bytes, path: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a .jsonl file, with the place of each for messages; blank lines are left out.

    Raises:
        BadInput: a line is not JSON, or not an object.
    """
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where} is not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise BadInput(f"{where} is not a JSON object.")
        yield row, where


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise CompressError(
            "Reading .parquet needs pyarrow; run `pip install 'compress-model[data]'`."
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            field = _field(file.schema_arrow.names)
            if field is None:
                raise BadInput(f"{path} {_no_field(file.schema_arrow.names)}.")
            number = 0
            for batch in file.iter_batches(columns=[field]):
                for value in batch.column(0):
                    number += 1
                    yield partial(_parquet_row, value, field, f"{path}, row {number}")
    except ArrowException as error:
        raise BadInput(f"{path} is not a whole parquet file ({_first_line(error)}).") from error


def _parquet_row(value: Any, field: str, where: str) -> str | Conversation | None:
    try:
        return _entry(value.as_py(), field, where)
    except UnicodeDecodeError as error:
        raise _OddRow(f"{where} is not UTF-8 text (byte {error.start})") from error


def _hub(source: str) -> Iterator[Row]:
    parts = source.removeprefix("hub:").split(":")
    if len(parts) > 4 or not parts[0]:
        raise BadInput(f"{source} should read hub:DATASET[:CONFIG[:SPLIT[:FIELD]]].")
    name, config, split, field = parts + [""] * (4 - len(parts))
    for number, row in enumerate(hub_rows(name, config or None, split or "train"), start=1):
        where = f"{source}, row {number}"
        field = field or _default_field(row, source)
        if field not in row:
            raise BadInput(f"{where} has no field '{field}'; there are: {', '.join(row)}.")
        yield partial(_entry, row[field], field, where)


def _default_field(row: Mapping[str, Any], source: str) -> str:
    strings = [column for column, value in row.items() if isinstance(value, str)]
    if len(strings) == 1 and not {"text", "messages"} & set(row):
        return strings[0]
    field = _field(row)
    if field is None:
        raise BadInput(f"{source} {_no_field(row)}.")
    return field


def hub_rows(name: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a data set of the hub, which are streamed.

    Raises:
        CompressError: the package datasets is missing, or the data set cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise CompressError(
            "Reading from the hub needs datasets; run `pip install 'compress-model[data]'`."
        ) from error
    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # datasets, huggingface_hub, fsspec and httpx raise types of their own
        raise CompressError(
            f"The data set {name} cannot be read from the hub; check its name, config and split, and whether "
            f"this machine reaches the hub ({_first_line(error)})."
        ) from error


def _field(columns: Iterable[str]) -> str | None:
    return next((field for field in ("text", "messages") if field in set(columns)), None)


def _no_field(columns: Iterable[str]) -> str:
    return f"has neither 'text' nor 'messages'; there are: {', '.join(columns) or 'no fields'}"


def _entry(value: Any, field: str, where: str) -> str | Conversation | None:
    """The document or conversation that a field of one row holds.

    Raises:
        _OddRow: it holds something else, or a character that cannot be written as UTF-8.
    """
    entry: str | Conversation
    if isinstance(value, str):
        entry = value
    elif isinstance(value, list) and all(map(_is_message, value)):
        entry = tuple({"role": message["role"], "content": message["content"]} for message in value)
    else:
        found = "null" if value is None else "neither a text nor a list of messages with 'role' and 'content'"
        raise _OddRow(f"{where}: '{field}' is {found}")
    if HALF_CHARACTER.search(words(entry)):
        raise _OddRow(f"{where}: '{field}' holds half a character (a lone surrogate)")
    return entry if words(entry).strip() else None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def words(entry: str | Conversation) -> str:
    """All that is said in a text or a conversation."""
    return entry if isinstance(entry, str) else "\n".join(message["content"] for message in entry)


def _utf8(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _OddRow(f"{where} is not UTF-8 text (byte {error.start})") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _or(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}"
