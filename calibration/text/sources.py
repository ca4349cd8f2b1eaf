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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.calibration.text.corpora import CORPORA
from compress.errors import BadInput, CompressError, unknown

Conversation = tuple[dict[str, str], ...]
"""Messages in order, each with ``role`` and ``content``."""

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
        words = (" ".join(_words(entry).split()) for entry in self.entries)
        return tuple(hashlib.sha256(text.encode()).hexdigest() for text in words)

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
    entries = tuple(_hub(source, characters) if source.startswith("hub:") else _file(source))
    if not entries:
        raise BadInput(f"{source} holds no text.")
    return Documents(entries, source)


def _file(source: str) -> Iterator[str | Conversation]:
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


def _txt(path: Path) -> Iterator[str]:
    text = _utf8(path.read_bytes(), str(path)).replace("\r\n", "\n")
    if text.strip():
        yield text


def _jsonl(path: Path) -> Iterator[str | Conversation]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            text = _utf8(line, where)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{where} is not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise BadInput(f"{where} is not a JSON object with 'text' or 'messages'.")
            yield from _entry(row, _field(row, where), where)


def _parquet(path: Path) -> Iterator[str | Conversation]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise CompressError(
            "Reading .parquet needs pyarrow; run `pip install 'compress-model[data]'`."
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            field = _field(file.schema_arrow.names, str(path))
            number = 0
            for batch in file.iter_batches(columns=[field]):
                for row in batch.to_pylist():
                    number += 1
                    yield from _entry(row, field, f"{path}, row {number}")
    except ArrowException as error:
        raise BadInput(f"{path} is not a whole parquet file ({_first_line(error)}).") from error


def _hub(source: str, characters: int | None) -> Iterator[str | Conversation]:
    parts = source.removeprefix("hub:").split(":")
    if len(parts) > 4 or not parts[0]:
        raise BadInput(f"{source} should read hub:DATASET[:CONFIG[:SPLIT[:FIELD]]].")
    name, config, split, field = parts + [""] * (4 - len(parts))
    seen = 0
    for number, row in enumerate(_hub_rows(name, config or None, split or "train"), start=1):
        where = f"{source}, row {number}"
        field = field or _default_field(row, source)
        if field not in row:
            raise BadInput(f"{where} has no field '{field}'; there are: {', '.join(row)}.")
        for entry in _entry(row, field, where):
            yield entry
            seen += len(_words(entry))
        if characters is not None and seen >= characters:
            return


def _default_field(row: Mapping[str, Any], source: str) -> str:
    strings = [column for column, value in row.items() if isinstance(value, str)]
    if len(strings) == 1 and not {"text", "messages"} & set(row):
        return strings[0]
    return _field(row, source)


def _hub_rows(name: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
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


def _field(columns: Iterable[str], where: str) -> str:
    columns = list(columns)
    for field in ("text", "messages"):
        if field in columns:
            return field
    raise BadInput(
        f"{where} has neither 'text' nor 'messages'; there are: {', '.join(columns) or 'no fields'}."
    )


def _entry(row: Mapping[str, Any], field: str, where: str) -> Iterator[str | Conversation]:
    """Yield the document or conversation of one row, unless it is blank."""
    value = row[field]
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, list) and all(map(_is_message, value)):
        if value:
            yield tuple({"role": message["role"], "content": message["content"]} for message in value)
    else:
        raise BadInput(
            f"{where}: '{field}' is neither a text nor a list of messages with 'role' and 'content'."
        )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _words(entry: str | Conversation) -> str:
    return entry if isinstance(entry, str) else "\n".join(message["content"] for message in entry)


def _utf8(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{where} is not UTF-8 text (byte {error.start}); convert it first.") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _or(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}"
