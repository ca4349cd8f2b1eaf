"""ShortGPT against a float64 restatement on plain transformers models with hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from pydantic import ValidationError

from compress.engine.logits import streamed_logits
from compress.engine.shape import ModelShape
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.method import StepContext
from compress.pruning.shortgpt import ShortGPT
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft

LAYERS = 5
SIZE = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
SIZE |= {"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MLP = {"intermediate_size": 40}
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("model.layers", lambda: hf.LlamaConfig(**SIZE, **MLP, num_key_value_heads=2)),
    "gpt2": ("transformer.h", lambda: hf.GPT2Config(**SIZE)),
    "gpt_neox": ("gpt_neox.layers", lambda: hf.GPTNeoXConfig(**SIZE, **MLP)),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    layers, build = CASES[request.param]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(build())
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return layers, folder


def windows_of(width: int = 12) -> Windows:
    tokens = torch.randint(3, 48, (5, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(width) < torch.tensor([12, 7, 12, 1, 10])[:, None]
    tokens = torch.nn.functional.pad(tokens, (0, width - 12))
    return Windows(tokens.masked_fill(~mask, 0), mask, source="random")


def run_on(folder: Path, work: Path, windows: Windows) -> tuple[StreamedModel, StepContext]:
    checkpoint = Checkpoint.open(folder)
    return StreamedModel(checkpoint), StepContext(
        Draft(checkpoint, work), windows, 0, work, "cpu", lambda *_: None
    )


@torch.no_grad()
def restated(layers: str, folder: Path, windows: Windows) -> list[float]:
    """BI of every layer, one window without its padding at a time."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    cosines: list[list[torch.Tensor]] = []
    for layer in model.get_submodule(layers):
        cosines.append([])

        def look(_: Any, inputs: Any, output: Any, found: list[torch.Tensor] = cosines[-1]) -> None:
            a, b = inputs[0][0], (output[0] if isinstance(output, tuple) else output)[0]
            found.append((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)))

        layer.register_forward_hook(look)
    for tokens, mask in zip(windows.tokens, windows.mask, strict=True):
        model(tokens[mask][None])
    return [1 - float(torch.cat(found).mean()) for found in cosines]


def test_the_layers_of_least_influence_go(case: tuple[str, Path], tmp_path: Path):
    layers, folder = case
    expected = restated(layers, folder, windows_of())
    for width in (12, 15):
        model, run = run_on(folder, tmp_path / str(width), windows_of(width))
        report = ShortGPT().apply(model, ShortGPT.Options(layers=2), run)
        assert report.details["block_influence"] == pytest.approx(expected, abs=2e-6)
        removed = sorted(range(LAYERS), key=lambda index: expected[index])[:2]
        assert report.details["removed"] == sorted(removed)
        assert report.details["tokens"] == 42
        assert ModelShape.of(run.draft).num_layers == LAYERS - 2
        shape = ModelShape.of(Checkpoint.open(folder))
        planned = ShortGPT().plan(shape, ShortGPT.Options(layers=2))
        assert planned.tensors == run.draft.tensors


def test_batches_change_nothing(case: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, run = run_on(case[1], tmp_path / "1", windows_of())
    before = ShortGPT().block_influence(model, run)
    stream = StreamedModel.stream
    monkeypatch.setattr(StreamedModel, "stream", lambda *args: stream(*args, batch_tokens=1))
    after = ShortGPT().block_influence(*run_on(case[1], tmp_path / "2", windows_of()))
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


def test_layers_that_do_nothing_go_without_loss(tmp_path: Path):
    model = hf.AutoModelForCausalLM.from_config(CASES["llama"][1]())
    for index in (1, 3):
        model.model.layers[index].self_attn.o_proj.weight.data.zero_()
        model.model.layers[index].mlp.down_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "model")
    streamed, run = run_on(tmp_path / "model", tmp_path / "step", windows_of())
    report = ShortGPT().apply(streamed, ShortGPT.Options(layers=2), run)
    assert report.details["removed"] == [1, 3]
    assert "pruned" not in run.draft.config
    before = streamed_logits(streamed.checkpoint, windows_of())
    assert torch.equal(streamed_logits(run.draft, windows_of()), before)


def test_one_layer_must_be_left(case: tuple[str, Path]):
    shape = ModelShape.of(Checkpoint.open(case[1]))
    assert ShortGPT().plan(shape, ShortGPT.Options(layers=LAYERS - 1)).num_layers == 1
    with pytest.raises(BadInput, match="at most 4 of the model's 5 layers, not 5"):
        ShortGPT().plan(shape, ShortGPT.Options(layers=LAYERS))
    with pytest.raises(ValidationError):
        ShortGPT.Options(layers=0)
