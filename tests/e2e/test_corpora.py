"""The corpora that are fetched by package name: all of them there, and plain text."""

from __future__ import annotations

import pytest

from compress.calibration.text.sources import read_documents

pytestmark = pytest.mark.e2e


def test_wikipedia():
    first, rest = read_documents("wikipedia"), read_documents("wikipedia:heldout")
    assert (len(first.entries), len(rest.entries)) == (60, 36)
    assert first.entries[0].startswith("Anarchism\n\n")
    together = "\n".join((*first.entries, *rest.entries))
    assert 2_000_000 < len(together) < 3_500_000
    for markup in ("[[", "<ref", "'''", "File:", "|thumb"):
        assert markup not in together


def test_brown():
    first, rest = read_documents("brown"), read_documents("brown:heldout")
    assert (len(first.entries), len(rest.entries)) == (400, 100)
    assert first.entries[0].startswith(
        "The Fulton County Grand Jury said Friday an investigation of Atlanta's"
    )
    assert not set(first.hashes) & set(rest.hashes)
    for tag in ("/nn", "/at ", "``", " ,"):
        assert sum(tag in document for document in first.entries) <= 2
