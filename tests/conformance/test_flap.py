"""FLAP against a slow float64 restatement on plain transformers models with hooks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from pydantic import ValidationError

from compress.calibration.windows import Windows
from compress.checkpoint import Checkpoint, Draft
from compress.errors import BadInput
from compress.method import StepReport
from compress.plan import ModelShape
from compress.pruning.flap import Flap
from compress.reload import streamed_logits
from compress.run import Run
from compress.stream import Activations, Stream, StreamedModel

VOCAB, HIDDEN, LAYERS = 48, 16, 3
LENGTHS = (16, 16, 11, 7, 16, 5, 16, 13, 9, 16, 2, 16)
SIZE = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GQA = {**SIZE, **SPECIAL, "intermediate_size": 20, "num_key_value_heads": 2}


class Family(NamedTuple):
    config: hf.PretrainedConfig
    cls: Any
    layers: str
    output: str
    down: str
    groups: int
    group_cost: int
    neuron_cost: int


CAUSAL = hf.AutoModelForCausalLM
FAMILIES = {
    # 4 query heads of 4 channels on 2 key-value heads: 8 rows of q, 4 of k, 4 of v, 8 columns of o.
    "llama": Family(
        hf.LlamaConfig(**GQA), CAUSAL, "model.layers", "self_attn.o_proj", "mlp.down_proj", 2, 24 * 16, 3 * 16
    ),
    # The same with biases for 16 rows.
    "qwen2": Family(
        hf.Qwen2Config(**GQA, tie_word_embeddings=True),
        *(CAUSAL, "model.layers", "self_attn.o_proj", "mlp.down_proj", 2, 24 * 16 + 16, 3 * 16),
    ),
    "phi3": Family(
        hf.Phi3Config(**GQA), CAUSAL, "model.layers", "self_attn.o_proj", "mlp.down_proj", 2, 24 * 16, 3 * 16
    ),
    "gpt2": Family(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=32, **SPECIAL),
        *(CAUSAL, "transformer.h", "attn.c_proj", "mlp.c_proj", 4, 16 * 16 + 12, 2 * 16 + 1),
    ),
    "neox": Family(
        hf.GPTNeoXConfig(**SIZE, **SPECIAL, intermediate_size=20, use_parallel_residual=True),
        *(CAUSAL, "gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h", 4, 16 * 16 + 12, 2 * 16 + 1),
    ),
    "bert": Family(
        hf.BertConfig(**SIZE, intermediate_size=20, max_position_embeddings=32, pad_token_id=0),
        *(hf.AutoModelForSequenceClassification, "bert.encoder.layer"),
        *("attention.output.dense", "output.dense", 4, 16 * 16 + 12, 2 * 16 + 1),
    ),
}


def random_model(family: Family, seed: int = 0) -> hf.PreTrainedModel:
    """A model every layer of which matters, in which channels have means and very different variances."""
    model = family.cls.from_config(family.config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                inputs = 1 if "embed" in name else parameter.shape["c_" not in name]  # Conv1D is [in, out]
                scale = torch.rand(parameter.shape[1], generator=generator) + 0.3
                parameter.copy_(noise * scale / math.sqrt(inputs))
            else:
                parameter.copy_(0.3 * noise + (1 if name.endswith("weight") else 0))
    return model.eval()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, family in FAMILIES.items():
        found[name] = tmp_path_factory.mktemp(name)
        random_model(family).save_pretrained(found[name])
    return found


def windows_of(lengths: tuple[int, ...] = LENGTHS, width: int = 16, seed: int = 1) -> Windows:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCAB, (len(lengths), max(lengths)), generator=generator)
    tokens = torch.nn.functional.pad(tokens, (0, width - max(lengths)))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Windows(tokens.masked_fill(~mask, 0), mask, source="random")


WINDOWS = windows_of()


class Applied(NamedTuple):
    run: Run
    report: StepReport

    @property
    def kept(self) -> list[tuple[int, int]]:
        details = self.report.details
        return list(zip(details["key_value_heads"], details["neurons"], strict=True))


def applied(
    folder: Path, work: Path, windows: Windows = WINDOWS, progress: Any = lambda *_: None, **options: Any
) -> Applied:
    checkpoint = Checkpoint.open(folder)
    run = Run(Draft(checkpoint, work), windows, 0, work, "cpu", progress)
    model = StreamedModel(checkpoint, progress=progress)
    return Applied(run, Flap().apply(model, Flap.Options(**options), run))


# The restatement.


class Restated:
    """The dense model in float64; pruning sets columns of its output projections to zero."""

    def __init__(self, folder: Path, family: str) -> None:
        self.family = FAMILIES[family]
        self.model = self.family.cls.from_pretrained(folder, dtype=torch.float64).eval()
        self.dense = [{path: self.inputs(index, path) for path in self.paths} for index in range(LAYERS)]
        self.weights = [
            {path: self.matrix(index, path).clone() for path in self.paths} for index in range(LAYERS)
        ]

    @property
    def paths(self) -> tuple[str, str]:
        return self.family.output, self.family.down

    def linear(self, index: int, path: str) -> torch.nn.Module:
        return self.model.get_submodule(f"{self.family.layers}.{index}.{path}")

    def matrix(self, index: int, path: str) -> torch.Tensor:
        linear = self.linear(index, path)
        return linear.weight.data.T if type(linear).__name__ == "Conv1D" else linear.weight.data

    @torch.no_grad()
    def logits(self, windows: Windows = WINDOWS) -> torch.Tensor:
        return self.model(windows.tokens, attention_mask=windows.mask.long()).logits

    def inputs(self, index: int, path: str) -> torch.Tensor:
        """What the projection is given for every real token: [tokens, channels]."""
        seen = []
        handle = self.linear(index, path).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        self.logits()
        handle.remove()
        return seen[0].view(*WINDOWS.mask.shape, -1)[WINDOWS.mask]

    def metric(self, index: int, path: str, metric: str) -> torch.Tensor:
        x, w = self.dense[index][path], self.weights[index][path]
        values = []
        for j in range(x.shape[1]):
            variance = ((x[:, j] - x[:, j].mean()) ** 2).mean()
            values.append(
                {
                    "IFV": variance,
                    "WIFV": variance * sum(v**2 for v in w[:, j]),
                    "WIFN": w[:, j].abs().mean() * x[:, j].norm(),
                }[metric]
            )
        values = torch.stack(values)
        return values**2 if path == self.family.output else values

    def unit_scores(self, index: int, metric: str) -> list[tuple[float, str, int]]:
        """(standardised score, kind, number) of every unit of a layer."""
        found = []
        for kind, path in zip(("group", "neuron"), self.paths, strict=True):
            values = self.metric(index, path, metric)
            z = (values - values.mean()) / torch.std(values, unbiased=True)
            per_unit = len(z) // self.family.groups if kind == "group" else 1
            for unit in range(len(z) // per_unit):
                found.append((float(z[unit * per_unit : (unit + 1) * per_unit].mean()), kind, unit))
        return found

    def prune(self, index: int, path: str, gone: list[int], compensate: str, x: torch.Tensor, ridge: float):
        """Set the pruned columns to zero and make up for them by what the projection is given, x."""
        if not gone:
            return
        old, matrix, linear = self.weights[index][path], self.matrix(index, path), self.linear(index, path)
        left = [j for j in range(old.shape[1]) if j not in gone]
        matrix[:, gone] = 0
        if compensate == "bias":
            extra = sum(x[:, j].mean() * old[:, j] for j in gone)
            had = linear.bias.data if linear.bias is not None else 0
            linear.bias = torch.nn.Parameter(had + extra)
        elif compensate == "least-squares":
            # Stacked rows: the projection's own output, and the old weights as often as the ridge says.
            biased = linear.bias is not None
            centred = x - x.mean(0) if biased else x
            strength = math.sqrt(ridge * float(centred[:, left].square().sum(0).mean()))
            rows = torch.cat((centred[:, left], strength * torch.eye(len(left), dtype=torch.float64)))
            wanted = torch.cat((centred @ old.T, strength * old[:, left].T))
            matrix[:, left] = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T
            if biased:
                linear.bias.data += x.mean(0) @ (old - matrix).T


def chosen(model: Restated, structure: str, metric: str, ratio: float) -> list[set[tuple[str, int]]]:
    """The units of every layer that stay."""
    family = model.family
    cost = {"group": family.group_cost, "neuron": family.neuron_cost}
    scores = [model.unit_scores(index, metric) for index in range(LAYERS)]
    counts = {kind: sum(unit[1] == kind for unit in scores[0]) for kind in cost}
    layer_cost = sum(counts[kind] * cost[kind] for kind in cost)

    def by_layer(units: list[tuple[float, str, int, int]]) -> list[set[tuple[str, int]]]:
        return [{unit[1:3] for unit in units if unit[3] == index} for index in range(LAYERS)]

    def cut(kinds: set[str], budget: float, price: dict[str, int]) -> list[tuple[float, str, int, int]]:
        units = [(*unit, index) for index, layer in enumerate(scores) for unit in layer if unit[1] in kinds]
        must = [max(u for u in units if u[1] == kind and u[3] == i) for kind in kinds for i in range(LAYERS)]
        units = must + sorted((u for u in units if u not in must), reverse=True)
        spent = [sum(price[u[1]] for u in units[: n + 1]) for n in range(len(units))]
        return units[: 1 + min(range(len(units)), key=lambda n: abs(spent[n] - budget))]

    def top(layer: list, kind: str, count: int) -> list:
        return sorted((unit for unit in layer if unit[1] == kind), reverse=True)[:count]

    if structure == "AL-AM":
        return by_layer(cut(set(cost), (1 - ratio) * LAYERS * layer_cost, cost))
    if structure == "AL-MM":
        left = LAYERS * counts["group"] - round(ratio * LAYERS * counts["group"])
        groups = cut({"group"}, left, {"group": 1})
        budget = (1 - ratio) * LAYERS * layer_cost - left * cost["group"]
        return by_layer(groups + cut({"neuron"}, budget, cost))
    if structure == "UL-UM":
        left = {kind: counts[kind] - int(ratio * counts[kind]) for kind in cost}
    else:
        possible = {}
        for groups in range(1, counts["group"] + 1):
            neurons = round(((1 - ratio) * layer_cost - groups * cost["group"]) / cost["neuron"])
            if 1 <= neurons <= counts["neuron"]:
                possible[groups] = neurons
        groups = min(possible, key=lambda n: (abs(n - (1 - ratio) * counts["group"]), -n))
        left = {"group": groups, "neuron": possible[groups]}
    return [{unit[1:3] for kind in cost for unit in top(layer, kind, left[kind])} for layer in scores]


def restated(
    folder: Path,
    family: str,
    *,
    ratio: float = 0.3,
    structure: str = "AL-AM",
    metric: str = "WIFV",
    compensate: str = "none",
    propagate: str = "dense",
    ridge: float = 1.0,
) -> tuple[Restated, list[set[tuple[str, int]]]]:
    model = Restated(folder, family)
    kept = chosen(model, structure, metric, ratio)
    for index in range(LAYERS):
        for kind, path in zip(("group", "neuron"), model.paths, strict=True):
            channels = model.weights[index][path].shape[1]
            per_unit = channels // model.family.groups if kind == "group" else 1
            gone = [j for j in range(channels) if (kind, j // per_unit) not in kept[index]]
            x = model.dense[index][path] if propagate == "dense" else model.inputs(index, path)
            model.prune(index, path, gone, compensate, x, ridge)
    return model, kept


def check(folder: Path, family: str, work: Path, **options: Any) -> Applied:
    options = {"ratio": 0.3, **options}
    model, kept = restated(folder, family, **options)
    done = applied(folder, work, **options)
    assert done.kept == [
        tuple(sum(unit[0] == kind for unit in layer) for kind in ("group", "neuron")) for layer in kept
    ]
    expected, found = model.logits(), streamed_logits(done.run.draft, WINDOWS)
    real = WINDOWS.mask if expected.shape[:2] == WINDOWS.mask.shape else ...
    torch.testing.assert_close(found[real].double(), expected[real], atol=2e-4, rtol=2e-4)
    return done


STRUCTURES = ("UL-UM", "UL-MM", "AL-MM", "AL-AM")
METRICS = ("IFV", "WIFV", "WIFN")


# Every metric with every structure once, and each family with some of them.
@pytest.mark.parametrize(
    ("family", "structure", "metric"),
    [
        (list(FAMILIES)[(row + column) % len(FAMILIES)], structure, metric)
        for row, structure in enumerate(STRUCTURES)
        for column, metric in enumerate(METRICS)
    ],
)
def test_the_units_that_stay_are_those_of_the_equations(
    family: str, metric: str, structure: str, folders: dict[str, Path], tmp_path: Path
):
    check(folders[family], family, tmp_path, metric=metric, structure=structure, compensate="none")


# Every family with both, and both of them with either stream in families with biases and without.
@pytest.mark.parametrize(
    ("family", "compensate", "propagate"),
    [
        (family, compensate, ("dense", "pruned")[(row + column) % 2])
        for row, family in enumerate(FAMILIES)
        for column, compensate in enumerate(("bias", "least-squares"))
    ],
)
def test_the_compensation_is_that_of_the_equations(
    family: str, compensate: str, propagate: str, folders: dict[str, Path], tmp_path: Path
):
    check(folders[family], family, tmp_path, compensate=compensate, propagate=propagate)


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
            stream.look(layer, {path: lambda _, output, mask, __: outputs.append(output[mask].double())})
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
    run = Run(Draft(first.run.draft, tmp_path / "again"), WINDOWS, 0, tmp_path / "again", "cpu", print)
    model = StreamedModel(first.run.draft)
    report = Flap().apply(model, Flap.Options(ratio=0.2, compensate="least-squares"), run)

    assert report.details["ratio_removed"] == pytest.approx(0.2, abs=0.08)
    assert all(
        after <= before
        for key in ("key_value_heads", "neurons")
        for before, after in zip(first.report.details[key], report.details[key], strict=True)
    )
    assert torch.isfinite(streamed_logits(run.draft, WINDOWS)).all()


# Going on after a kill.


class Killed(Exception):
    pass


@pytest.mark.parametrize("spilled", [False, True])
def test_a_killed_run_goes_on_to_the_same_result(
    spilled: bool, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if spilled:
        monkeypatch.setattr(Activations.__init__, "__defaults__", (0,))
    options = {"ratio": 0.3, "compensate": "least-squares", "propagate": "pruned"}
    happened: list[str] = []
    moment = 0

    def happens(what: str) -> None:
        happened.append(what)
        if len(happened) == moment:
            raise Killed

    advance = Stream.advance

    def advance_and_die(self: Stream, *args: Any, **kwargs: Any) -> None:
        advance(self, *args, **kwargs)
        happens("a layer is through, but not durable")

    monkeypatch.setattr(Stream, "advance", advance_and_die)

    def run(name: str) -> Applied:
        happened.clear()
        return applied(folders["llama"], tmp_path / name, progress=lambda *_: happens("durable"), **options)

    whole = run("whole")
    for killed_at in range(2, len(happened) + 1, 5):
        moment = killed_at
        with pytest.raises(Killed):
            run(str(killed_at))
        moment = 0
        resumed = run(str(killed_at))
        assert resumed.report == whole.report
        assert resumed.run.draft.config == whole.run.draft.config
        assert resumed.run.draft.tensors == whole.run.draft.tensors
        for tensor in whole.run.draft.tensors:
            assert torch.equal(resumed.run.draft.read(tensor), whole.run.draft.read(tensor))


# Plans, and what is refused.


def plan(folder: Path, **options: Any) -> ModelShape:
    return Flap().plan(ModelShape.of(Checkpoint.open(folder)), Flap.Options(**options))


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
    assert planned.loads_with == ModelShape.of(draft).loads_with == "transformers (trust_remote_code=True)"
    assert planned.parameters == pytest.approx(ModelShape.of(draft).parameters, rel=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.5}, "less than 1"),
        ({"ratio": 0.2, "shape": "uniform", "structure": "AL-AM"}, "different widths"),
        ({"ratio": 0.2, "remove_heads": 3}, "belongs to UL-MM and AL-MM"),
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
        ("llama", {"ratio": 0.02, "structure": "UL-MM", "remove_heads": 3}, "when 1 heads go"),
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


def test_a_quantized_model_is_refused(folders: dict[str, Path]):
    shape = ModelShape.of(Checkpoint.open(folders["llama"]))
    shape.config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(BadInput, match="quantized already"):
        Flap().plan(shape, Flap.Options(ratio=0.2))


def test_too_little_text_for_least_squares(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(BadInput, match="at least 20 calibration tokens"):
        applied(folders["llama"], tmp_path, windows_of((16,)), ratio=0.2, compensate="least-squares")
