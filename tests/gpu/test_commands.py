"""Every command that takes --device computes there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from click.testing import CliRunner, Result

import compress
from compress.cli import cli
from compress.errors import BadInput
from compress.storage.lineage import read_lineage

from .common import assert_same_model

CALIBRATION = ["--nsamples", "4", "--seqlen", "32"]


@pytest.fixture
def model(shared_decoder: Callable[..., Path]) -> Path:
    return shared_decoder(num_hidden_layers=2, intermediate_size=128)


def command(*words: Any) -> Result:
    """Carry out a command in this process; its errors are raised."""
    return CliRunner().invoke(cli, list(map(str, words)), standalone_mode=False, catch_exceptions=False)


def both(cuda: Any, tmp_path: Path, *words: Any) -> None:
    """Carry out a command that writes a model on the CPU and on the device, and compare the results."""
    command(*words, "-o", tmp_path / "here")
    with cuda():
        command(*words, "-o", tmp_path / "there", "--device", "cuda")
    folders = (tmp_path / "here", tmp_path / "there")
    assert_same_model(*((folder, read_lineage(folder)) for folder in folders))


def test_quantize(model: Path, cuda: Any, tmp_path: Path) -> None:
    both(cuda, tmp_path, "quantize", model, "--method", "rtn", "--bits", "8")


def test_prune(model: Path, cuda: Any, tmp_path: Path) -> None:
    text = model.parent / "text.txt"
    words = ("--method", "wanda-sp", "--ratio", "0.3", "--calibration", text, *CALIBRATION)
    both(cuda, tmp_path, "prune", model, *words)


def test_run_a_recipe_of_two_steps(model: Path, cuda: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    steps = [{"method": "shortgpt", "layers": 1}, {"method": "rtn", "group_size": 32}]
    calibration = {"source": str(model.parent / "text.txt"), "nsamples": 4, "seqlen": 32}
    recipe.write_text(yaml.safe_dump({"model": str(model), "calibration": calibration, "steps": steps}))
    both(cuda, tmp_path, "run", recipe)


def test_mix(model: Path, cuda: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    calibration = {"source": str(model.parent / "text.txt"), "nsamples": 2, "seqlen": 16}
    steps = [{"method": "awq", "group_size": 32}]
    recipe.write_text(yaml.safe_dump({"model": str(model), "calibration": calibration, "steps": steps}))
    chosen = []
    for device in ("cpu", "cuda"):
        words = ("mix", recipe, "--memory", "240KB", "-o", tmp_path / f"{device}.yaml", "--device", device)
        if device == "cpu":
            command(*words)
        else:
            with cuda():
                command(*words)
        chosen.append(yaml.safe_load((tmp_path / f"{device}.yaml").read_text())["steps"])
    assert chosen[0] == chosen[1]


@pytest.mark.usefixtures("measured_here")
@pytest.mark.parametrize("method", ["rtn", "bitstack"])
def test_evaluate_beside_the_dense_model(
    method: str, model: Path, run_on: Any, cuda: Any, tmp_path: Path
) -> None:
    options = {"blocks": 2, "rank": 4, "order_windows": 2} if method == "bitstack" else {}
    quantized, _ = run_on("cpu", model, method, **options)
    text, found = model.parent / "other.txt", {}
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 20)
    words = ("evaluate", quantized, "--baseline", model, "--text", text, "--windows", "3", "--context", "48")

    def evaluate(device: str) -> None:
        command(*words, "--device", device, "--json", tmp_path / "card.json")
        found[device] = json.loads((tmp_path / "card.json").read_text())[1]

    evaluate("cpu")
    with cuda():
        evaluate("cuda")
    here, there = (found[device]["fidelity"] for device in ("cpu", "cuda"))
    for name in ("perplexity", "kl_mean", "kl_p99", "rms_delta_p"):
        assert there[name]["value"] == pytest.approx(here[name]["value"], rel=1e-2), name
    measured = found["cuda"]["cost"]["measured"]
    assert measured["peak_device_bytes"] > 0
    assert found["cpu"]["cost"]["measured"]["peak_device_bytes"] is None


@pytest.mark.usefixtures("measured_here")
def test_evaluate_an_encoder_on_examples(
    tiny_encoder: Callable[..., Path], cuda: Any, tmp_path: Path
) -> None:
    model = tiny_encoder("BertForSequenceClassification")
    file = tmp_path / "task.jsonl"
    lines = [("the cat sat on the mat.", "LABEL_0"), ("who ran?", "LABEL_1"), ("a red tree.", "LABEL_0")]
    file.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in lines))
    with cuda():
        result = command("evaluate", model, "--task-file", file, "--device", "cuda", "--json")
    assert json.loads(result.stdout)[0]["task"]


@pytest.mark.parametrize("method", ["rtn", "flap", "bitstack", "nested", "llm-qat", "apiq", "float"])
def test_a_loaded_model_generates(method: str, model: Path, run_on: Any, cuda: Any) -> None:
    options: dict[str, dict[str, Any]] = {
        "bitstack": {"blocks": 2, "rank": 4, "order_windows": 2},
        "nested": {"bits": 3, "order_windows": 2, "embedding_bits": 8},
        "llm-qat": {"steps": 0},
        "apiq": {"rank": 2, "steps": 1},
        "float": {"type": "nvfp4"},
        "flap": {"ratio": 0.3},
        "rtn": {"embedding_bits": 8, "symmetric": False},
    }
    folder, _ = run_on("cpu", model, method, **options[method])
    prompt = hf.AutoTokenizer.from_pretrained(folder)("It was the", return_tensors="pt").input_ids
    wanted = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    here = compress.load(folder).generate(prompt, **wanted)
    with cuda(), torch.no_grad():
        there = compress.load(folder, device="cuda").generate(prompt.to("cuda"), **wanted)
        first, expected = there.logits[0].cpu(), here.logits[0]
        assert there.sequences.shape == here.sequences.shape
    torch.testing.assert_close(first, expected, rtol=1e-2, atol=1e-2 * float(expected.std()))


def test_a_model_in_blocks_is_resized_where_it_is(model: Path, run_on: Any, cuda: Any) -> None:
    folder, _ = run_on("cpu", model, "nested", bits=4, order_windows=2)
    tokens = torch.arange(1, 9)[None]
    expected = compress.load(folder)(tokens).logits
    with cuda():
        loaded = compress.load(folder, device="cuda")
        whole = loaded.resize(None)
        assert loaded.resize(whole - 1) < whole
        assert loaded.resize(None) == whole
        found = loaded(tokens.to("cuda")).logits.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_text_of_the_models_own(model: Path, run_on: Any, cuda: Any) -> None:
    """Sequences have random numbers of their own, drawn on the CPU."""
    calibration = {"source": "generate", "nsamples": 2, "seqlen": 12}
    here = run_on("cpu", model, "shortgpt", layers=1, calibration=calibration)[1]
    with cuda(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESS_MODEL_CACHE", str(model.parent / "another cache"))
        there = run_on("cuda", model, "shortgpt", layers=1, calibration=calibration)[1]
    assert there.calibration["sha256"] == here.calibration["sha256"]


def test_doctor_lists_the_device(cuda: Any) -> None:
    with cuda():
        result = command("doctor", "--json")
    assert "cuda:0" in json.loads(result.stdout)["devices"]


@pytest.mark.parametrize("device", ["cuda:7", "cpuu"])
def test_a_device_that_does_not_exist(device: str, model: Path, cuda: Any, tmp_path: Path) -> None:
    words = ("quantize", model, "--method", "rtn", "-o", tmp_path / "out", "--device", device)
    with cuda(), pytest.raises(BadInput, match=f"^The device '{device}' cannot be used here .*doctor.*\\.$"):
        command(*words)
    assert not (tmp_path / "out").exists()
