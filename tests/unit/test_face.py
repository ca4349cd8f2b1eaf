"""The package as Python sees it: the four functions do what the commands do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import compress
from compress.errors import BadInput

pytestmark = pytest.mark.usefixtures("measured_here")


def test_run_load_evaluate_and_compare(shared_decoder: Callable[..., Path], tmp_path: Path):
    dense, small, text = shared_decoder(), tmp_path / "small", tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    recipe = {"model": str(dense), "steps": [{"method": "rtn", "bits": 4, "group_size": 32}]}
    lineage = compress.run(recipe, small, seed=3)
    assert lineage.seed == 3
    assert lineage.result.bytes < lineage.parent.bytes
    assert compress.load(small).config.model_type == "llama"

    scored = {"baseline": str(dense), "text": str(text), "context": 64, "windows": 2}
    cards = compress.evaluate(str(small), **scored)
    assert [card.model.name for card in cards] == [dense.name, "small"]
    table = compress.compare(cards)
    assert [row.scorecard.model.name for row in table.rows] == [dense.name, "small"]
    assert str(table) == str(compress.compare(small)) == str(compress.compare(*cards))
    assert "perplexity" in str(table)
    kept = json.loads((small / "compression.json").read_text())["evaluations"]
    assert [card["model"]["name"] for card in kept] == [dense.name, "small"]


def test_a_run_evaluates_if_the_recipe_asks_for_it(shared_decoder: Callable[..., Path], tmp_path: Path):
    recipe = {
        "model": str(shared_decoder()),
        "steps": [],
        "evaluate": {"text": "bundled:evaluation", "context": 32, "windows": 1},
    }
    assert len(compress.run(recipe, tmp_path / "out").evaluations) == 1


def test_only_what_is_there(tmp_path: Path):
    assert {"run", "load", "evaluate", "compare"} <= set(dir(compress))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        compress.nothing  # noqa: B018
    with pytest.raises(BadInput, match="no recipe"):
        compress.run("nothing", tmp_path / "out")


def test_the_readmes_example(
    shared_decoder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(import compress\n.*?)^```", readme, flags=re.S | re.M)
    tiny = str(shared_decoder(intermediate_size=128))
    assert example.count('"demo"') == 3
    monkeypatch.chdir(tmp_path)
    Path("unlearned").symlink_to(tiny)
    for name in ("forget", "retain"):
        Path(f"{name}.jsonl").write_text(
            json.dumps({"question": f"What to {name}?", "answer": f"The {name}."})
        )
    exec(example.replace('"demo"', repr(tiny)), {})
    assert "rounded" in capsys.readouterr().out
