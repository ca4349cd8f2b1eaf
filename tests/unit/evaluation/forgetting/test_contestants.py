"""What later steps make of the models of an audit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.evaluation.forgetting.contestants import HowToMake


def test_what_later_steps_make_depends_on_the_content_of_files(tmp_path: Path):
    text = tmp_path / "text.txt"

    def identity(source: str, forget: str) -> list[Any]:
        return HowToMake(0, {"source": source}, forget, "cpu", lambda *_: None).identity

    assert identity("bundled", "people:forget") == [0, {"source": "bundled"}, "people:forget"]
    for names in ((str(text), "people:forget"), ("bundled", str(text))):
        text.write_text("one")
        first = identity(*names)
        assert identity(*names) == first
        text.write_text("two")
        assert identity(*names) != first
