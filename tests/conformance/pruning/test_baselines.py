"""Magnitude and Wanda-sp against restatements that go through the weights one unit at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from torch import Tensor

from compress.engine.shape import ModelShape
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.method import StepContext
from compress.pruning.magnitude import Magnitude
from compress.pruning.wanda_sp import WandaSp
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft

LAYERS, HEADS, WIDTH = 3, 4, 4  # heads of 4 channels
SIZE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
MLP = {"intermediate_size": 18, "max_position_embeddings": 32, "pad_token_id": 0}


class Family(NamedTuple):
    config: hf.PretrainedConfig
    cls: Any
    layers: str
    groups: int
    # Paths of q, k and v (or of the fused one), of their output, of gate and up, and of down.
    attention: tuple[str, ...]
    output: str
    mlp: tuple[str, ...]
    down: str


CAUSAL, LLAMA = hf.AutoModelForCausalLM, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FAMILIES = {
    "llama": Family(
        hf.LlamaConfig(**SIZE, **MLP, num_key_value_heads=2),
        *(CAUSAL, "model.layers", 2, LLAMA, "self_attn.o_proj"),
        *(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    ),
    "phi3": Family(
        hf.Phi3Config(**SIZE, **MLP, num_key_value_heads=2, bos_token_id=0, eos_token_id=0),
        *(CAUSAL, "model.layers", 2, ("self_attn.qkv_proj",), "self_attn.o_proj"),
        *(("mlp.gate_up_proj",), "mlp.down_proj"),
    ),
    "gpt2": Family(
        hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=LAYERS, n_head=HEADS, n_inner=18, n_positions=32),
        *(CAUSAL, "transformer.h", 4, ("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj"),
    ),
    "neox": Family(
        hf.GPTNeoXConfig(**SIZE, **MLP),
        *(CAUSAL, "gpt_neox.layers", 4, ("attention.query_key_value",), "attention.dense"),
        *(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    ),
    "bert": Family(
        hf.BertConfig(**SIZE, **MLP),
        *(hf.AutoModelForSequenceClassification, "bert.encoder.layer", 4),
        tuple(f"attention.self.{role}" for role in ("query", "key", "value")),
        *("attention.output.dense", ("intermediate.dense",), "output.dense"),
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)

TOKENS = torch.randint(1, 40, (5, 14), generator=torch.Generator().manual_seed(2))
MASK = torch.arange(14) < torch.tensor([14, 9, 14, 3, 12])[:, None]
WINDOWS = Windows(TOKENS.masked_fill(~MASK, 0), MASK, source="random")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, family in FAMILIES.items():
        torch.manual_seed(1)
        model = family.cls.from_config(family.config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


class Restated:
    def __init__(self, folder: Path, family: str) -> None:
        self.family = FAMILIES[family]
        self.model = self.family.cls.from_pretrained(folder, dtype=torch.float64).eval()
        self.fused = family in ("phi3", "gpt2")

    def matrix(self, index: int, path: str) -> Tensor:
        linear = self.model.get_submodule(f"{self.family.layers}.{index}.{path}")
        return linear.weight.data.T if type(linear).__name__ == "Conv1D" else linear.weight.data

    def unit(self, index: int, kind: str, number: int) -> list[Tensor]:
        """Every piece of weight of a unit."""
        family = self.family
        if kind == "neuron":
            parts = [self.matrix(index, path) for path in family.mlp]
            if len(parts[0]) == 2 * 18:
                parts = list(parts[0].split(18))
            return [*(part[number] for part in parts), self.matrix(index, family.down)[:, number]]
        queries = HEADS // family.groups
        matrices = [self.matrix(index, path) for path in family.attention]
        if len(matrices) == 1 and not self.fused:  # q, k and v of one head after the other
            q, k, v = (matrices[0].view(HEADS, 3, WIDTH, -1)[:, role].flatten(0, 1) for role in range(3))
        elif len(matrices) == 1:
            kv = family.groups * WIDTH
            q, k, v = matrices[0].split((HEADS * WIDTH, kv, kv))
        else:
            q, k, v = matrices
        mine = slice(number * queries * WIDTH, (number + 1) * queries * WIDTH)
        kv = slice(number * WIDTH, (number + 1) * WIDTH)
        return [q[mine], k[kv], v[kv], self.matrix(index, family.output)[:, mine]]

    def magnitude(self, index: int, kind: str, count: int) -> list[float]:
        scores = []
        for number in range(count):
            weights = torch.cat([part.flatten() for part in self.unit(index, kind, number)])
            scores.append(float((weights**2).sum() / len(weights)))
        return scores

    @torch.no_grad()
    def wanda(self, index: int, kind: str, count: int) -> list[float]:
        path = self.family.output if kind == "group" else self.family.down
        seen: list[Tensor] = []
        module = self.model.get_submodule(f"{self.family.layers}.{index}.{path}")
        handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        self.model(WINDOWS.tokens, attention_mask=MASK.long())
        handle.remove()
        scores = self.matrix(index, path).abs() * seen[0][MASK].norm(dim=0)
        return scores.sum(0).view(count, -1).sum(1).tolist()

    def kept(
        self, index: int, kind: str, draft: Checkpoint, scores: list[float]
    ) -> tuple[set[int], set[int]]:
        """The units that are in the draft, and as many of those with the best scores."""
        path = self.family.output if kind == "group" else self.family.down
        name = StreamedModel(draft).weights.find(f"{self.family.layers}.{index}.{path}.weight")
        written = draft.read(name).double()
        written = written.T if self.model.config.model_type == "gpt2" else written
        dense = self.matrix(index, path)
        size = dense.shape[1] // len(scores)
        found = {
            number
            for number in range(len(scores))
            for at in range(0, written.shape[1], size)
            if torch.equal(written[:, at : at + size], dense[:, number * size : (number + 1) * size])
        }
        assert len(found) * size == written.shape[1]
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        return found, set(order[: len(found)])


def applied(method: Any, folder: Path, work: Path, **options: Any) -> tuple[Draft, dict[str, Any]]:
    checkpoint = Checkpoint.open(folder)
    run = StepContext(Draft(checkpoint, work), WINDOWS, 0, work, "cpu", lambda *_: None)
    report = method.apply(StreamedModel(checkpoint), method.Options(width_multiple=1, **options), run)
    return run.draft, report.details


@pytest.mark.parametrize("method", [Magnitude(), WandaSp()], ids=lambda method: method.name)
@every_family
def test_every_layer_keeps_the_best_and_loses_the_same_share(
    family: str, method: Any, folders: dict[str, Path], tmp_path: Path
):
    draft, details = applied(method, folders[family], tmp_path, ratio=0.4)
    restated = Restated(folders[family], family)
    for index in range(LAYERS):
        for kind, count in (("group", FAMILIES[family].groups), ("neuron", 18)):
            scores = (restated.magnitude if method.name == "magnitude" else restated.wanda)(
                index, kind, count
            )
            found, best = restated.kept(index, kind, draft, scores)
            assert found == best
            assert 0 < len(found) < count
    assert details["ratio_removed"] == pytest.approx(0.4, abs=0.02)

    shape = ModelShape.of(Checkpoint.open(folders[family]))
    planned = method.plan(shape, method.Options(ratio=0.4, width_multiple=1))
    assert planned.tensors == draft.tensors
    assert planned.config == draft.config


@pytest.mark.parametrize("allocation", ["global", "standardised"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_ranking_of_all_units(allocation: str, family: str, folders: dict[str, Path], tmp_path: Path):
    draft, details = applied(Magnitude(), folders[family], tmp_path, ratio=0.4, allocation=allocation)
    restated, kept, gone = Restated(folders[family], family), [], []
    for index in range(LAYERS):
        for kind, count in (("group", FAMILIES[family].groups), ("neuron", 18)):
            scores = restated.magnitude(index, kind, count)
            if allocation == "standardised":
                values = torch.tensor(scores, dtype=torch.float64)
                scores = ((values - values.mean()) / values.std()).tolist()
            found, best = restated.kept(index, kind, draft, scores)
            assert found == best
            protected = max(range(count), key=scores.__getitem__)
            kept += [scores[number] for number in found if number != protected]
            gone += [scores[number] for number in range(count) if number not in found]
    assert min(kept) >= max(gone)
    assert details["ratio_removed"] == pytest.approx(0.4, abs=0.07)


@pytest.mark.parametrize("method", [Magnitude(), WandaSp()], ids=lambda method: method.name)
def test_ratios_that_leave_nothing_and_packed_models_are_refused(method: Any, folders: dict[str, Path]):
    shape = ModelShape.of(Checkpoint.open(folders["llama"]))
    with pytest.raises(BadInput, match="at most 0"):
        method.plan(shape, method.Options(ratio=0.9))
    shape.config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(BadInput, match="quantized already"):
        method.plan(shape, method.Options(ratio=0.2))


def test_magnitude_reads_no_text(folders: dict[str, Path], tmp_path: Path):
    assert not Magnitude().needs_calibration
    checkpoint = Checkpoint.open(folders["llama"])
    run = StepContext(Draft(checkpoint, tmp_path), None, 0, tmp_path, "cpu", lambda *_: None)
    Magnitude().apply(StreamedModel(checkpoint), Magnitude.Options(ratio=0.3), run)
