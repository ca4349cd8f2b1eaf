"""What holds for any result of FLAP, also after a kill; plans, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from pydantic import ValidationError

from compress.engine import activations
from compress.engine.logits import streamed_logits
from compress.engine.shape import ModelShape
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.method import StepContext
from compress.pruning.flap import Flap
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft

from ...common import Killed, Moments, assert_same_draft
from .common import FAMILIES, HIDDEN, LAYERS, LENGTHS, PUBLISHED, SIZE, WINDOWS, Applied, applied, windows_of

# What holds for any result.


@pytest.mark.parametrize("options", [{"compensate": "bias"}, {"compensate": "least-squares"}])
@pytest.mark.parametrize("structure", ["AL-AM", "UL-MM"])
def test_at_ratio_0_nothing_changes(
    structure: str, options: dict[str, Any], folders: dict[str, Path], tmp_path: Path
):
    done = applied(folders["llama"], tmp_path, ratio=0.0, structure=structure, **options, propagate="pruned")
    draft, dense = done.run.draft, Checkpoint.open(folders["llama"])
    assert draft.config == dense.config
    assert draft.tensors == dense.tensors
    assert all(torch.equal(draft.read(name), dense.read(name)) for name in dense.tensors)


def test_groups_stay_whole(folders: dict[str, Path], tmp_path: Path):
    done = applied(folders["llama"], tmp_path, ratio=0.4, structure="UL-MM", compensate="none")
    draft, dense = done.run.draft, Checkpoint.open(folders["llama"])
    for index in range(LAYERS):
        name = f"model.layers.{index}.self_attn."
        keys, queries = draft.read(f"{name}k_proj.weight"), draft.read(f"{name}q_proj.weight")
        assert (len(keys), len(queries)) == (4, 8)
        group = 0 if torch.equal(keys, dense.read(f"{name}k_proj.weight")[:4]) else 1
        assert torch.equal(keys, dense.read(f"{name}k_proj.weight")[4 * group :][:4])
        assert torch.equal(queries, dense.read(f"{name}q_proj.weight")[8 * group :][:8])
        columns = dense.read(f"{name}o_proj.weight")[:, 8 * group :][:, :8]
        assert torch.equal(draft.read(f"{name}o_proj.weight"), columns)


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("structure", ["UL-MM", "AL-MM", "AL-AM"])
@pytest.mark.parametrize("ratio", [0.17, 0.5])
def test_the_budget_is_met(
    ratio: float, structure: str, multiple: int, folders: dict[str, Path], tmp_path: Path
):
    options = {"structure": structure, "width_multiple": multiple, "compensate": "none"}
    done = applied(folders["qwen2"], tmp_path, ratio=ratio, **options)
    family = FAMILIES["qwen2"]
    before = LAYERS * (family.groups * family.group_cost + 20 * family.neuron_cost)
    left = sum(groups * family.group_cost + neurons * family.neuron_cost for groups, neurons in done.kept)
    one = multiple * family.neuron_cost * (LAYERS if structure == "UL-MM" else 1)
    if structure == "AL-AM":
        one = max(one, family.group_cost)

    assert abs(left - (1 - ratio) * before) <= one
    assert all(groups >= 1 and neurons >= multiple for groups, neurons in done.kept)
    assert all(neurons % multiple == 0 for _, neurons in done.kept)
    # What is stored is what was counted.
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    stored = sum(
        info.numel for name, info in done.run.draft.tensors.items() if any(part in name for part in names)
    )
    assert stored == left


@pytest.mark.parametrize("block", ["attention", "mlp"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_bias_keeps_the_mean_of_what_a_block_puts_out(
    family: str, block: str, folders: dict[str, Path], tmp_path: Path
):
    """Of the first block that is pruned: what goes into it is as before."""
    options = {"structure": "UL-MM", "remove_heads": LAYERS if block == "attention" else 0}
    done = applied(folders[family], tmp_path, ratio=0.3, compensate="bias", **options)
    path = FAMILIES[family].output if block == "attention" else FAMILIES[family].down

    def mean(checkpoint: Checkpoint) -> torch.Tensor:
        outputs = []
        model = StreamedModel(checkpoint)
        stream = model.stream(WINDOWS)
        with model.layer(0) as layer:
            stream.look(layer, {path: lambda seen: outputs.append(seen.output[seen.mask].double())})
        return torch.cat(outputs).mean(0)

    dense = Checkpoint.open(folders[family])
    torch.testing.assert_close(mean(done.run.draft), mean(dense), atol=1e-6, rtol=1e-6)
    without = applied(folders[family], tmp_path / "none", ratio=0.3, compensate="none", **options)
    assert (mean(without.run.draft) - mean(dense)).abs().max() > 1e-3


def test_batch_size_order_and_padding_change_nothing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = {"ratio": 0.3, "compensate": "least-squares", "propagate": "pruned"}
    whole = applied(folders["llama"], tmp_path / "whole", **options)
    order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(3))
    padded = Windows(
        torch.nn.functional.pad(WINDOWS.tokens[order], (0, 5), value=7),
        torch.nn.functional.pad(WINDOWS.mask[order], (0, 5)),
        source="random",
    )
    stream = StreamedModel.stream
    monkeypatch.setattr(
        StreamedModel, "stream", lambda self, windows, folder=None: stream(self, windows, folder, 40)
    )
    other = applied(folders["llama"], tmp_path / "other", padded, **options)

    assert other.kept == whole.kept
    for name in whole.run.draft.tensors:
        found, expected = other.run.draft.read(name), whole.run.draft.read(name)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_pruned_model_is_pruned_again(folders: dict[str, Path], tmp_path: Path):
    """Also one whose layers differ, and of which a block is gone."""
    first = applied(folders["llama"], tmp_path / "first", ratio=0.4, compensate="bias")
    run = StepContext(
        Draft(first.run.draft, tmp_path / "again"), WINDOWS, 0, tmp_path / "again", "cpu", print
    )
    model = StreamedModel(first.run.draft)
    report = Flap().apply(model, Flap.Options(ratio=0.2, compensate="least-squares", width_multiple=1), run)

    assert report.details["ratio_removed"] == pytest.approx(0.2, abs=0.08)
    assert all(
        after <= before
        for key in ("key_value_heads", "neurons")
        for before, after in zip(first.report.details[key], report.details[key], strict=True)
    )
    assert torch.isfinite(streamed_logits(run.draft, WINDOWS)).all()


# Going on after a kill.


@pytest.mark.parametrize("spilled", [False, True])
def test_a_killed_run_goes_on_to_the_same_result(
    spilled: bool, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if spilled:
        monkeypatch.setattr(activations, "MEMORY_LIMIT", 0)
    options = {"ratio": 0.3, "compensate": "least-squares", "propagate": "pruned"}
    moments = Moments(monkeypatch)

    def run(name: str, deadly: int = 0) -> Applied:
        moments.begin(deadly)
        return applied(folders["llama"], tmp_path / name, progress=moments.happens, **options)

    whole = run("whole")
    assert moments.passed > 2 * LAYERS
    for deadly in range(2, moments.passed + 1, 5):
        with pytest.raises(Killed):
            run(str(deadly), deadly)
        resumed = run(str(deadly))
        assert resumed.report == whole.report
        assert_same_draft(resumed.run, whole.run)


# Plans, and what is refused.


def plan(folder: Path, **options: Any) -> ModelShape:
    return Flap().plan(ModelShape.of(Checkpoint.open(folder)), Flap.Options(**PUBLISHED | options))


@pytest.mark.parametrize("options", [{"structure": "UL-MM"}, {"shape": "uniform"}, {"structure": "UL-UM"}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_plan_of_uniform_widths_is_what_comes_out(
    family: str, options: dict[str, Any], folders: dict[str, Path], tmp_path: Path
):
    options |= {"ratio": 0.3, "compensate": "bias"}
    if family == "gpt2" and options.get("shape") == "uniform":
        options |= {"remove_heads": 0}  # a plain one has heads as wide as hidden_size / heads
    planned = plan(folders[family], **options)
    draft = applied(folders[family], tmp_path, **options).run.draft
    assert planned.config == draft.config
    assert planned.tensors == draft.tensors


def test_the_plan_of_adaptive_widths_is_near(folders: dict[str, Path], tmp_path: Path):
    planned = plan(folders["llama"], ratio=0.3)
    draft = applied(folders["llama"], tmp_path, ratio=0.3).run.draft
    assert (
        str(planned.loads_with)
        == str(ModelShape.of(draft).loads_with)
        == "transformers (trust_remote_code=True)"
    )
    assert planned.parameters == pytest.approx(ModelShape.of(draft).parameters, rel=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.5}, "less than 1"),
        ({"ratio": 0.2, "shape": "uniform", "structure": "AL-AM"}, "different widths"),
        ({"ratio": 0.2, "remove_heads": 3}, "belongs to UL-MM, AL-MM and depth-first"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=words):
        Flap.Options(**options)


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {"ratio": 0.9}, "at most 0"),
        ("llama", {"ratio": 0.2, "width_multiple": 32}, "fewer than the width_multiple"),
        ("llama", {"ratio": 0.3, "structure": "UL-MM", "remove_heads": 2}, "shared equally by 3 layers"),
        ("llama", {"ratio": 0.02, "structure": "UL-MM", "remove_heads": 3}, "when it loses 1 of its heads"),
        ("llama", {"ratio": 0.3, "structure": "AL-MM", "remove_heads": 4}, "At most 3 of the 6"),
        ("qwen2", {"ratio": 0.4, "shape": "uniform", "compensate": "bias"}, "compensate: least-squares"),
        ("gpt2", {"ratio": 0.4, "shape": "uniform"}, "as wide as hidden_size / heads"),
    ],
)
def test_what_a_model_does_not_allow_is_refused_in_the_plan(
    family: str, options: dict[str, Any], words: str, folders: dict[str, Path]
):
    with pytest.raises(BadInput, match=words):
        plan(folders[family], **options)


@pytest.mark.parametrize(
    "config",
    [
        hf.OPTConfig(**SIZE, ffn_dim=64, word_embed_proj_dim=HIDDEN, max_position_embeddings=32),
        hf.GPTNeoXConfig(**SIZE, intermediate_size=64),
        hf.LlamaConfig(**SIZE, intermediate_size=64),  # three heads would not divide hidden_size
    ],
    ids=lambda config: config.model_type,
)
def test_where_a_plain_model_must_keep_its_heads_the_option_that_does_is_named(
    config: hf.PretrainedConfig, tmp_path: Path
):
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="use remove_heads: 0 in UL-MM or depth-first, or"):
        plan(tmp_path, ratio=0.3, shape="uniform")
    for structure in (None, "UL-MM", "depth-first"):
        planned = plan(tmp_path, ratio=0.3, shape="uniform", structure=structure, remove_heads=0)
        assert not planned.is_pruned


def test_a_quantized_model_is_refused(folders: dict[str, Path]):
    shape = ModelShape.of(Checkpoint.open(folders["llama"]))
    shape.config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(BadInput, match="quantized already"):
        Flap().plan(shape, Flap.Options(ratio=0.2))


def test_too_little_text_for_least_squares(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(BadInput, match="at least 20 calibration tokens"):
        applied(folders["llama"], tmp_path, windows_of((16,)), ratio=0.2, compensate="least-squares")
