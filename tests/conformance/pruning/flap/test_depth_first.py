"""FLAP's uniform shapes (depth-first) against a slow float64 restatement, and what holds for any result."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from compress.engine.logits import streamed_logits
from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.pipeline.artefact import write_model
from compress.pruning.flap import Flap, removed_layers, structure_widths
from compress.pruning.parts.allocation import Units
from compress.storage.checkpoint import Checkpoint

from ...common import Killed, Moments, assert_same_draft
from .common import FAMILIES, GQA, LENGTHS, PUBLISHED, WINDOWS, Family, applied, random_model

LAYERS = 10
# With biases and without, grouped heads, attention and MLP in parallel, and weights [in, out].
DEEP = ("llama", "qwen2", "neox", "gpt2")
UNIFORM: dict[str, Any] = {"ratio": 0.3, "shape": "uniform"}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in DEEP:
        found[name] = tmp_path_factory.mktemp(name)
        random_model(deepened(FAMILIES[name])).save_pretrained(found[name])
    return found


def deepened(family: Family) -> Family:
    values = family.config.to_dict() | {"num_hidden_layers": LAYERS, "layer_types": None}
    values.pop("n_layer", None)
    return family._replace(config=type(family.config)(**values))


# The restatement. Pruned columns are set to zero, and removed layers are taken out of the list.


class Text:
    """A float64 model with the calibration text; what goes in and out of its modules, real tokens only."""

    def __init__(self, family: Family, model: Any) -> None:
        self.family, self.model = family, model

    @property
    def layers(self) -> Any:
        return self.model.get_submodule(self.family.layers)

    def logits(self) -> Tensor:
        with torch.no_grad():
            given = {"attention_mask": WINDOWS.mask.long(), "use_cache": False}
            return self.model(WINDOWS.tokens, **given).logits

    def seen(self, module: Any) -> tuple[Tensor, Tensor]:
        """Input and output of a module: [tokens, channels] each."""
        found: list[Tensor] = []

        def hook(_: Any, given: Any, output: Any) -> None:
            found.extend((given[0], output[0] if isinstance(output, tuple) else output))

        handle = module.register_forward_hook(hook)
        self.logits()
        handle.remove()
        x, y = (each.view(*WINDOWS.mask.shape, -1)[WINDOWS.mask] for each in found)
        return x, y


def matrix_of(linear: Any) -> Tensor:
    return linear.weight.data.T if type(linear).__name__ == "Conv1D" else linear.weight.data


def z(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std()


def best_units(family: Family, dense: Text, index: int, heads: int, neurons: int) -> dict[str, list[int]]:
    """Path of each output projection -> the channels that stay in layer ``index``."""
    metrics = {}
    for path in (family.output, family.down):
        linear = dense.layers[index].get_submodule(path)
        x, _ = dense.seen(linear)
        metrics[path] = x.var(0, unbiased=False) * matrix_of(linear).square().sum(0)
    channels = torch.arange(len(metrics[family.output])).view(family.groups, -1)
    groups = z(metrics[family.output].square())[channels].mean(1)
    kept = sorted(groups.argsort(descending=True)[:heads].tolist())
    return {
        family.output: channels[kept].flatten().tolist(),
        family.down: sorted(z(metrics[family.down]).argsort(descending=True)[:neurons].tolist()),
    }


def restated(folder: Path, family: Family, count: int, heads: int, neurons: int) -> tuple[Text, list[int]]:
    dense = Text(family, family.cls.from_pretrained(folder, dtype=torch.float64).eval())
    hidden = [dense.seen(layer)[1] for layer in dense.layers]
    turned = [
        torch.arccos(torch.cosine_similarity(hidden[i], hidden[i + count], dim=1)).mean() if count else 0
        for i in range(LAYERS - count)
    ]
    before = int(torch.tensor(turned).argmin())
    removed = list(range(before + 1, before + 1 + count))
    student = Text(family, copy.deepcopy(dense.model))
    stay = [index for index in range(LAYERS) if index not in removed]
    layers = student.layers
    student.model.get_submodule(family.layers.rpartition(".")[0]).__setattr__(
        family.layers.rpartition(".")[2], torch.nn.ModuleList(layers[index] for index in stay)
    )
    narrowed = heads < family.groups or neurons < matrix_of(layers[0].get_submodule(family.down)).shape[1]
    for number, index in enumerate(stay):
        units = best_units(family, dense, index, heads, neurons)
        last = (stay[number + 1] if number + 1 < len(stay) else LAYERS) - 1
        for path, left in units.items():
            linear = student.layers[number].get_submodule(path)
            matrix = matrix_of(linear)
            gone = [j for j in range(matrix.shape[1]) if j not in left]
            matrix[:, gone] = 0
            if index < before and not narrowed:
                continue
            x, out = student.seen(linear)
            residual, result = student.seen(student.layers[number])
            if path == family.output:
                dense_residual, _ = dense.seen(dense.layers[index])
                behind = dense_residual + dense.seen(dense.layers[index].get_submodule(path))[1]
                wanted = behind - residual
            else:
                wanted = hidden[last] - (result - out)
            if linear.bias is not None:
                wanted = wanted - linear.bias.data
            strength = math.sqrt(float(x[:, left].square().sum(0).mean()))  # damping 1
            rows = torch.cat((x[:, left], strength * torch.eye(len(left), dtype=torch.float64)))
            target = torch.cat((wanted, strength * matrix[:, left].T))
            matrix[:, left] = torch.linalg.lstsq(rows, target, driver="gelsd").solution.T
    return student, removed


@pytest.mark.parametrize(
    ("family", "options", "count", "heads", "neurons"),
    [
        # Two of ten layers, and an eighth of the rest: 216 of 1,728 parameters, in neurons of 48 each.
        ("llama", {"ratio": 0.3}, 2, 2, 15),
        ("qwen2", {"ratio": 0.3}, 2, 2, 15),
        ("llama", {"ratio": 0.1}, 1, 2, 20),
        ("llama", {"ratio": 0.5}, 2, 1, 14),
        ("neox", {"ratio": 0.2, "remove_heads": 0}, 2, 4, 20),
        ("gpt2", {"ratio": 0.25, "remove_heads": 0}, 2, 4, 58),
    ],
)
def test_the_result_is_that_of_the_equations(
    family: str,
    options: dict[str, Any],
    count: int,
    heads: int,
    neurons: int,
    deep: dict[str, Path],
    tmp_path: Path,
):
    student, removed = restated(deep[family], FAMILIES[family], count, heads, neurons)
    done = applied(deep[family], tmp_path, **UNIFORM | options)
    assert done.report.details["removed_layers"] == removed
    assert done.kept == [(0, 0) if i in removed else (heads, neurons) for i in range(LAYERS)]
    expected, found = student.logits(), streamed_logits(done.run.draft, WINDOWS)
    torch.testing.assert_close(found[WINDOWS.mask].double(), expected[WINDOWS.mask], atol=3e-4, rtol=3e-4)


# What holds for any result.


@given(
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(8, 30),
    st.floats(0, 0.5),
    st.sampled_from([1, 4, 64]),
)
def test_the_budget_is_met(layers: int, groups: int, bundles: int, ratio: float, multiple: int):
    """A quarter of the parameters is in the attention."""
    one = Units(groups, multiple * bundles, multiple * bundles * 16 / groups, 48.0, 64)
    units = [one] * layers
    options = Flap.Options(ratio=ratio, shape="uniform", width_multiple=multiple)
    options = options.model_copy(update={"structure": "depth-first"})
    count = removed_layers(units, options)
    assert count <= layers / 5
    assert count <= ratio * layers + 1e-6

    widths = structure_widths(units[count:], options, count)
    assert len(widths) == layers - count
    assert len(set(widths)) == 1
    left = len(widths) * (widths[0].groups * one.group_cost + widths[0].neurons * one.neuron_cost)
    wanted = (1 - ratio) * layers * one.cost
    assert abs(left - wanted) <= len(widths) * multiple * one.neuron_cost / 2 + 1e-6 * layers * one.cost
    assert widths[0].neurons % multiple == 0
    assert widths[0].groups % one.group_step(multiple) == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "neox"])
def test_the_result_is_a_plain_model(family: str, deep: dict[str, Path], tmp_path: Path):
    heads = {"remove_heads": 0} if family == "neox" else {}
    done = applied(deep[family], tmp_path / "work", **UNIFORM | heads)
    write_model(done.run.draft, deep[family], tmp_path / "out", {})
    config = hf.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.model_type == hf.AutoConfig.from_pretrained(deep[family]).model_type
    assert config.num_hidden_layers == LAYERS - 2
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    given = {"attention_mask": WINDOWS.mask.long(), "use_cache": False}
    with torch.no_grad():
        found = model(WINDOWS.tokens, **given).logits
    expected = streamed_logits(done.run.draft, WINDOWS)
    torch.testing.assert_close(found[WINDOWS.mask], expected[WINDOWS.mask], atol=1e-4, rtol=1e-4)


def test_grouped_heads_stay_whole_and_widths_are_multiples(deep: dict[str, Path], tmp_path: Path):
    done = applied(deep["llama"], tmp_path, **UNIFORM | {"ratio": 0.5, "width_multiple": 4})
    config = done.run.draft.config
    assert config["num_attention_heads"] == 2 * config["num_key_value_heads"]
    assert config["head_dim"] == 4
    assert config["intermediate_size"] in (4, 8, 12, 16)


@pytest.mark.parametrize(("family", "ratio"), [("llama", 0.3), ("qwen2", 0.45), ("gpt2", 0.25)])
def test_the_plan_is_what_comes_out(family: str, ratio: float, deep: dict[str, Path], tmp_path: Path):
    options = UNIFORM | PUBLISHED | {"ratio": ratio}
    if family == "gpt2":  # a plain one has heads as wide as hidden_size / heads
        options |= {"remove_heads": 0}
    planned = Flap().plan(ModelShape.of(Checkpoint.open(deep[family])), Flap.Options(**options))
    draft = applied(deep[family], tmp_path, **options).run.draft
    assert planned.config == draft.config
    assert planned.tensors == draft.tensors
    assert str(planned.loads_with) == "transformers"


def test_at_ratio_0_nothing_changes(deep: dict[str, Path], tmp_path: Path):
    draft = applied(deep["llama"], tmp_path, ratio=0.0, shape="uniform").run.draft
    dense = Checkpoint.open(deep["llama"])
    assert draft.config == dense.config
    assert all(torch.equal(draft.read(name), dense.read(name)) for name in dense.tensors)


def test_layers_in_front_of_the_cut_are_not_touched(deep: dict[str, Path], tmp_path: Path):
    done = applied(deep["llama"], tmp_path, ratio=0.2, shape="uniform")
    first, dense = done.report.details["removed_layers"][0], Checkpoint.open(deep["llama"])
    changed = {
        name.split(".")[2]
        for name in done.run.draft.tensors
        if name.startswith("model.layers.")
        and int(name.split(".")[2]) < first
        and not torch.equal(done.run.draft.read(name), dense.read(name))
    }
    assert changed == {str(first - 1)}


def test_following_comes_nearer_than_widths_only(deep: dict[str, Path], tmp_path: Path):
    dense = streamed_logits(Checkpoint.open(deep["llama"]), WINDOWS)[WINDOWS.mask]

    def distance(structure: str) -> float:
        draft = applied(deep["llama"], tmp_path / structure, **UNIFORM, structure=structure).run.draft
        return float((streamed_logits(draft, WINDOWS)[WINDOWS.mask] - dense).square().mean())

    assert distance("depth-first") < 0.9 * distance("UL-MM")


def test_a_killed_run_goes_on_to_the_same_result(
    deep: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    moments = Moments(monkeypatch)

    def run(name: str, deadly: int = 0) -> Any:
        moments.begin(deadly)
        return applied(deep["llama"], tmp_path / name, progress=moments.happens, **UNIFORM)

    whole = run("whole")
    assert moments.passed > 4 * LAYERS
    for deadly in range(3, moments.passed + 1, 11):
        with pytest.raises(Killed):
            run(str(deadly), deadly)
        resumed = run(str(deadly))
        assert resumed.report == whole.report
        assert_same_draft(resumed.run, whole.run)


# What an architecture does not allow.


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    config = hf.Gemma2Config(**GQA | {"num_hidden_layers": 5, "head_dim": 4, "query_pre_attn_scalar": 4})
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_with_norms_behind_the_blocks_no_layer_goes(gemma: Path, tmp_path: Path):
    done = applied(gemma, tmp_path, **UNIFORM)
    assert done.report.details["structure"] == "UL-MM"
    assert done.run.draft.config["num_hidden_layers"] == 5
    with pytest.raises(BadInput, match=r"normalises the output .* Use structure: UL-MM"):
        applied(gemma, tmp_path / "asked", **UNIFORM, structure="depth-first")


def test_layers_that_differ_are_refused(deep: dict[str, Path], tmp_path: Path):
    first = applied(deep["llama"], tmp_path / "first", ratio=0.3, compensate="none").run.draft
    with pytest.raises(BadInput, match="different shapes already"):
        Flap().plan(ModelShape.of(first), Flap.Options(ratio=0.2, structure="depth-first", width_multiple=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"structure": "depth-first", "compensate": "bias"}, "least-squares"),
        ({"shape": "uniform", "propagate": "dense"}, "cannot be dense"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=words):
        Flap.Options(ratio=0.2, **options)


def test_heads_that_cannot_be_shared_are_refused(deep: dict[str, Path]):
    options = Flap.Options(**UNIFORM | PUBLISHED | {"remove_heads": 3})
    with pytest.raises(BadInput, match="3 heads cannot be shared equally by 8 layers, but depth-first"):
        Flap().plan(ModelShape.of(Checkpoint.open(deep["llama"])), options)


assert len(LENGTHS) * 16 > 64  # more tokens than any projection has inputs
