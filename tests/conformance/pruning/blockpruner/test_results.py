"""BlockPruner's results: nested, after a kill, what is written, planned and refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from pydantic import ValidationError
from torch import Tensor

import compress
from compress.engine.logits import streamed_logits
from compress.engine.shape import ModelShape
from compress.engine.windows import Windows
from compress.errors import BadInput, CompressError
from compress.method import StepContext, StepReport
from compress.pruning.blockpruner import BlockPruner
from compress.pruning.parts.blocks import Block
from compress.storage.checkpoint import Checkpoint
from compress.storage.lineage import Lineage

from .common import (
    LAYERS,
    SIZE,
    WINDOWS,
    Plain,
    Removed,
    applied,
    assert_same,
    order,
    parameters_of,
    plan,
    windows_of,
)

# Nested results.


def artefact(report: StepReport, folder: Path, options: dict[str, Any]) -> Path:
    """As much of a result's folder as `order_from` reads."""
    folder.mkdir()
    whole = BlockPruner.Options(**{"cost": "blocks"} | options).model_dump(mode="json")
    step = {"method": "blockpruner", "family": "pruning", "paper": "", "options": whole, "seconds": 1}
    step |= {"summary": "", "details": report.details, "peak_memory_bytes": 1, "resumed": False}
    parent = {"id": "", "revision": None, "sha256": "", "bytes": 1, "parameters": 1}
    result = {"bytes": 1, "predicted_bytes": 1, "parameters": 1, "bits_per_parameter": 1, "layers": 1}
    result |= {"loads_with": "", "files": {}}
    reload = {"loaded_by": "transformers", "max_difference": 0, "tokens": 1}
    lineage = Lineage(
        **{"name": "", "created": "2026-01-01T00:00:00Z", "parent": parent, "dtype": None, "seed": 0},
        **{"calibration": None, "steps": [step], "result": result, "reload": reload},
        **{"device": "cpu", "versions": {}},
    )
    (folder / "compression.json").write_text(lineage.model_dump_json())
    return folder


def test_a_smaller_target_needs_no_search(
    folders: dict[str, Path], three_removed: Removed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = folders["llama"]
    whole, _ = applied(folder, tmp_path / "whole", blocks=4)
    three, fresh = three_removed("llama")
    assert order(three) == order(whole)[:3]
    earlier = artefact(whole, tmp_path / "earlier", {"blocks": 4})
    search = BlockPruner.search
    rounds: list[int] = []
    monkeypatch.setattr(BlockPruner, "search", lambda self, *args: (rounds.append(1), search(self, *args))[1])
    for path in (earlier, earlier / "compression.json"):
        found, run = applied(folder, tmp_path / path.name, blocks=3, order_from=path)
        assert found.details == three.details
        assert run.draft.config == fresh.draft.config
        assert run.draft.tensors == fresh.draft.tensors
    assert rounds == []
    five, _ = applied(folder, tmp_path / "five", blocks=5, order_from=earlier)
    assert rounds == [1]
    assert_same(order(five), order(applied(folder, tmp_path / "fresh five", blocks=5)[0]))


def test_an_order_for_something_else_is_refused(folders: dict[str, Path], tmp_path: Path):
    report, _ = applied(folders["llama"], tmp_path / "whole", blocks=2)
    earlier = artefact(report, tmp_path / "earlier", {"blocks": 2})

    def refused(words: str, folder: str = "llama", windows: Windows = WINDOWS, **options: Any) -> None:
        with pytest.raises(BadInput, match=words):
            applied(
                folders[folder], tmp_path / "x", windows, **{"blocks": 1, "order_from": earlier} | options
            )

    refused("another model and calibration", "gpt2", windows_of(seed=2))
    refused("another calibration; search again", windows=windows_of(seed=2))
    refused("another mode and cost", mode="mlp", cost="parameters")
    refused("is not a result of BlockPruner", order_from=folders["llama"])


# Going on after a kill.


class Killed(Exception):
    pass


def test_a_killed_search_goes_on_at_its_round(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, whole_run = applied(folders["llama"], tmp_path / "whole", blocks=4)
    search, rounds = BlockPruner.search, []

    def search_and_die(self: BlockPruner, losses: Any, *args: Any) -> Any:
        rounds.append(len(losses.removed))
        found = search(self, losses, *args)
        if len(rounds) in (3, 4):
            raise Killed
        return found

    monkeypatch.setattr(BlockPruner, "search", search_and_die)
    for _ in range(2):
        with pytest.raises(Killed):
            applied(folders["llama"], tmp_path / "killed", blocks=4)
    resumed, run = applied(folders["llama"], tmp_path / "killed", blocks=4)
    assert rounds == [0, 1, 2, 2, 2, 3]
    assert resumed == whole
    assert run.draft.tensors == whole_run.draft.tensors
    finished, _ = applied(folders["llama"], tmp_path / "killed", blocks=4)
    assert finished == whole
    assert len(rounds) == 6


# What is written.


@torch.no_grad()
def logits_without(case: str, folder: Path, removed: Sequence[Block], tokens: Tensor) -> Tensor:
    plain = Plain(case, folder, WINDOWS)
    found: list[Tensor] = []
    plain.model.register_forward_hook(lambda _, __, output: found.append(output.logits))
    plain.windows = Windows(tokens, torch.ones_like(tokens, dtype=torch.bool), source="")
    plain.losses(removed)
    return torch.cat(found)


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt2", "gpt_neox", "opt, post-norm"])
def test_removed_blocks_cost_nothing_when_the_result_generates(
    case: str, folders: dict[str, Path], three_removed: Removed, tmp_path: Path
):
    report, run = three_removed(case)
    removed = [block for block, _ in order(report)]
    model = written(run, folders[case], tmp_path / "artefact")
    attention = LAYERS - sum(block.part == "attention" for block in removed)
    assert 0 < attention < LAYERS, "the case must lose an attention block"
    prompt = WINDOWS.tokens[:1, :7]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.inference_mode():
        output = model.generate(prompt, use_cache=True, return_dict_in_generate=True, **settings)
        again = model.generate(prompt, use_cache=False, **settings)
        logits = model(WINDOWS.tokens[:2]).logits
    assert torch.equal(output.sequences, again)
    cache = getattr(output, "cache", None) or output.past_key_values  # 5.24 of transformers renamed it
    # A removed block keeps a place in the cache, with one number for each token.
    filled = [layer for layer in cache.layers if layer.is_initialized and layer.keys.shape[-1] > 1]
    assert len(filled) == attention
    expected = logits_without(case, folders[case], removed, WINDOWS.tokens[:2])
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-4)
    sizes, dense = parameters_of(folders[case]), hf.AutoModelForCausalLM.from_pretrained(folders[case])
    gone = sum(sizes[block] for block in removed)
    assert model.num_parameters() == dense.num_parameters() - gone
    assert run.draft.nbytes == Checkpoint.open(folders[case]).nbytes - 4 * gone


def written(run: StepContext, source: Path, folder: Path) -> Any:
    from compress.pipeline.artefact import write_model

    run.draft.flush("step")
    write_model(run.draft, source, folder, {})
    return compress.load(folder)


def test_whole_layers_leave_the_plain_architecture(folders: dict[str, Path], likely: Windows, tmp_path: Path):
    folder = tmp_path / "idle"
    model = hf.AutoModelForCausalLM.from_pretrained(folders["llama"])
    model.config.num_hidden_layers = LAYERS + 2
    longer = hf.AutoModelForCausalLM.from_config(model.config)
    longer.load_state_dict(model.state_dict(), strict=False)
    for layer in longer.model.layers[LAYERS:]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    longer.save_pretrained(folder)
    report, run = applied(folder, tmp_path / "step", likely, blocks=4)
    assert {block for block, _ in order(report)} == {
        Block(layer, part) for layer in (LAYERS, LAYERS + 1) for part in ("attention", "mlp")
    }
    short = Checkpoint.open(folders["llama"])
    assert "pruned" not in run.draft.config
    assert run.draft.tensors == short.tensors
    assert torch.equal(streamed_logits(run.draft, likely), streamed_logits(short, likely))


def test_layers_keep_their_numbers_where_attention_is_scaled_by_them(
    folders: dict[str, Path], tmp_path: Path
):
    folder = tmp_path / "scaled"
    model = hf.AutoModelForCausalLM.from_pretrained(folders["gpt2"], scale_attn_by_inverse_layer_idx=True)
    model.save_pretrained(folder)
    assert plan(folder, blocks=4).num_layers == LAYERS
    report, run = applied(folder, tmp_path / "step", blocks=4)  # at least one layer loses both
    removed = [block for block, _ in order(report)]
    with torch.inference_mode():
        logits = written(run, folder, tmp_path / "artefact")(WINDOWS.tokens[:2]).logits
    expected = logits_without("gpt2", folder, removed, WINDOWS.tokens[:2])
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-4)


# Refused, planned, and the whole way through.


def test_the_plan_takes_the_smallest_blocks(folders: dict[str, Path], tmp_path: Path):
    def planned_and_done(**options: Any) -> tuple[int, int]:
        _, run = applied(folders["llama"], tmp_path / str(options), **options)
        return plan(folders["llama"], **options).parameters, ModelShape.of(run.draft).parameters

    planned, done = planned_and_done(blocks=3)
    assert planned > done
    planned, done = planned_and_done(blocks=2, mode="mlp")
    assert planned == done
    planned, done = planned_and_done(ratio=0.2)
    assert abs(planned - done) <= max(parameters_of(folders["llama"]).values())
    shape = ModelShape.of(Checkpoint.open(folders["llama"]))
    assert plan(folders["llama"], max_perplexity=99).tensors == shape.tensors


def test_encoders_are_refused(tmp_path: Path):
    config = hf.BertConfig(**SIZE, intermediate_size=40, architectures=["BertForMaskedLM"])
    hf.BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"bert model does not predict; use a causal language model"):
        plan(tmp_path, blocks=1)


def test_a_quantized_model_is_refused(folders: dict[str, Path]):
    shape = ModelShape.of(Checkpoint.open(folders["llama"]))
    shape.config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(BadInput, match="quantized already"):
        BlockPruner().plan(shape, BlockPruner.Options(max_perplexity=50))


def test_text_without_a_prediction_is_refused(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(BadInput, match="no token to predict"):
        applied(folders["llama"], tmp_path, windows_of([1, 1]), blocks=1)


def test_a_model_that_overflows_is_an_error(folders: dict[str, Path], tmp_path: Path):
    model = hf.AutoModelForCausalLM.from_pretrained(folders["gpt_neox"])
    model.lm_head.weight.data *= 1e30
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(CompressError, match="nats per token"):
        applied(tmp_path / "broken", tmp_path / "step", blocks=1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blocks": 1, "ratio": 0.5},
        {"blocks": 0},
        {"ratio": 1.0},
        {"max_perplexity": 1.0},
        {"blocks": 1, "mode": "layers"},
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any]):
    with pytest.raises(ValidationError):
        BlockPruner.Options(**options)
