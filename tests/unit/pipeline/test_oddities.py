"""Odd model folders through methods of every kind: the result is that of the plain folder, and complete."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import compress
from compress.errors import BadInput
from compress.pipeline import run as module
from compress.pipeline.plan import open_model
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.storage.lineage import read_lineage

from ...oddities import REFUSED, SAME, Oddity, change_json

STEPS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "bits": 8, "group_size": 32, "embedding_bits": 8},
    "gptq": {"method": "gptq", "bits": 4, "group_size": 32},
    "flap": {"method": "flap", "ratio": 0.3},
    "replaceme": {"method": "replaceme", "layers": 1, "transform": "none"},
    "blockpruner": {"method": "blockpruner", "ratio": 0.3},
}
TOKENS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def plain(shared_decoder: Callable[..., Path]) -> Path:
    return shared_decoder(num_hidden_layers=3)


@pytest.fixture
def odd(plain: Path, tmp_path: Path) -> Callable[[Oddity], Path]:
    """A copy of the plain model with an oddity."""

    def make(oddity: Oddity) -> Path:
        folder = Path(shutil.copytree(plain, tmp_path / "odd"))
        oddity(folder)
        return folder

    return make


def carry_out(step: dict[str, Any], model: Path, output: Path) -> Path:
    calibration = {"source": str(output.with_name("text.txt")), "nsamples": 4, "seqlen": 32}
    output.with_name("text.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    execute(parse_recipe({"model": str(model), "calibration": calibration, "steps": [step]}), output)
    return output


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return compress.load(folder)(TOKENS).logits


@pytest.fixture(scope="module")
def wanted(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], torch.Tensor]:
    """What a method makes of the plain model computes."""
    made: dict[str, torch.Tensor] = {}

    def get(method: str) -> torch.Tensor:
        if method not in made:
            made[method] = logits(carry_out(STEPS[method], plain, tmp_path_factory.mktemp("plain") / "out"))
        return made[method]

    return get


# Companions are the same to every method; weights are not.
OF_WEIGHTS = ("names_without_prefix", "called_tied", "more_layers_than_said", "stale_shard")
PAIRS = [(name, method) for name in SAME for method in STEPS if method == "rtn" or name in OF_WEIGHTS]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_what_is_made_of_an_odd_folder_is_what_is_made_of_the_plain_one(
    name: str,
    method: str,
    odd: Callable[[Oddity], Path],
    wanted: Callable[[str], torch.Tensor],
    tmp_path: Path,
):
    result = carry_out(STEPS[method], odd(SAME[name]), tmp_path / "out")
    assert torch.equal(logits(result), wanted(method))
    in_transformers = transformers.AutoModelForCausalLM.from_pretrained(result, trust_remote_code=True)
    assert torch.allclose(in_transformers(TOKENS).logits, wanted(method), atol=1e-4)


@pytest.mark.parametrize("oddity", REFUSED, ids=lambda oddity: oddity.__name__)
def test_what_is_no_whole_model_is_refused_in_the_plan(oddity: Oddity, odd: Callable[[Oddity], Path]):
    folder = odd(oddity)
    with pytest.raises(BadInput, match=REFUSED[oddity]) as caught:
        open_model(parse_recipe({"model": str(folder), "steps": [STEPS["rtn"]]}))
    assert "\n" not in str(caught.value)


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


OWN = {"config.json", "model.safetensors", "README.md", "recipe.yaml", "compression.json"}
CARRIED = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def test_a_full_folder_is_carried_over_but_for_what_belongs_to_the_model_as_it_was(
    odd: Callable[[Oddity], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING, "compress"):
        result = carry_out(STEPS["rtn"], odd(SAME["a_full_folder"]), tmp_path / "out")
    settings = {"chat_template.jinja", "additional_chat_templates/tools.jinja", "tekken.json"}
    settings |= {"tokenizer.model.v3", "preprocessor_config.json", "LICENSE", "NOTICE.txt", "USE_POLICY.md"}
    assert files(result) == OWN | CARRIED | settings
    assert '"max_new_tokens": 7' in (result / "generation_config.json").read_text()

    lineage = read_lineage(result)
    assert caplog.messages == [f"In the result, {sentence}" for sentence in lineage.left_out]
    assert sorted(lineage.left_out) == [
        "'checkpoint-10', 'imatrix.dat', 'optimizer.pt' and 2 others are left out: leftovers of training.",
        "'model.Q4_K_M.gguf', 'onnx', 'original' and 2 others are left out: a form or a part of the model as "
        "it was.",
        "'whatever.xyz' is left out: not known to this program.",
    ]

    card = (result / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "license": "mit",
        "language": ["en"],
        "library_name": "transformers",
        "tags": ["fun", "compress-model", "quantization"],
    }
    assert all(f"- {sentence}" in card for sentence in lineage.left_out)


def test_nothing_in_the_result_names_code_that_is_not_there(odd: Callable[[Oddity], Path], tmp_path: Path):
    folder = odd(SAME["code_of_its_own"])
    change_json(folder / "preprocessor_config.json", auto_map={"AutoProcessor": "someone/repo--x.P"})
    result = carry_out(STEPS["rtn"], folder, tmp_path / "out")
    assert files(result) == OWN | CARRIED | {"preprocessor_config.json"}
    assert "auto_map" not in (result / "config.json").read_text()
    assert "auto_map" not in (result / "tokenizer_config.json").read_text()
    assert "someone/repo--x.P" in (result / "preprocessor_config.json").read_text()
    code, entries = read_lineage(result).left_out
    assert code.startswith("'custom_generate', 'modeling_x.py' and 'tokenization_x.py' are left out")
    assert entries.startswith("auto_map in 'tokenizer_config.json' is left out")
    assert transformers.AutoTokenizer.from_pretrained(result)("a").input_ids


def test_links_are_followed_to_files_only(odd: Callable[[Oddity], Path], tmp_path: Path):
    result = carry_out(STEPS["rtn"], odd(SAME["links"]), tmp_path / "out")
    assert files(result) == OWN | CARRIED
    assert not any(path.is_symlink() for path in result.rglob("*"))
    strange, unknown = sorted(read_lineage(result).left_out)
    assert strange.startswith("'additional_chat_templates' and 'vocab.json' are left out: links to folders")
    assert unknown.startswith("'loop' is left out")


def test_the_card_and_what_was_left_out_survive_the_next_step(odd: Callable[[Oddity], Path], tmp_path: Path):
    first = carry_out(STEPS["replaceme"], odd(SAME["a_full_folder"]), tmp_path / "first")
    second = carry_out(STEPS["rtn"], first, tmp_path / "second")
    front = yaml.safe_load((second / "README.md").read_text().split("---\n")[1])
    assert (front["license"], front["tags"]) == ("mit", ["fun", "compress-model", "pruning", "quantization"])
    assert read_lineage(second).left_out == []
    assert files(second) == files(first)


def test_a_card_that_cannot_be_read_is_left_out_with_a_warning(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = Path(shutil.copytree(plain, tmp_path / "odd"))
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")
    with caplog.at_level(logging.WARNING, "compress"):
        result = carry_out(STEPS["rtn"], folder, tmp_path / "out")
    assert "such as the licence, cannot be read" in caplog.text
    assert "license" not in (result / "README.md").read_text().split("---\n")[1]


def test_a_damaged_lineage_is_found_before_the_work(
    odd: Callable[[Oddity], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "make_plan", lambda *_: pytest.fail("the work has begun"))
    oddity = next(oddity for oddity in REFUSED if oddity.__name__ == "lineage_in_utf16")
    with pytest.raises(BadInput, match="cannot be read"):
        carry_out(STEPS["rtn"], odd(oddity), tmp_path / "out")
