"""The models that ReplaceMe writes, with its maps or without, after a kill as well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress.engine import activations
from compress.engine.logits import streamed_logits
from compress.engine.windows import Windows
from compress.pruning.parts.depth import Cut
from compress.storage.checkpoint import Checkpoint

from ...common import Killed, Moments, assert_same_draft
from .common import (
    FAMILIES,
    HIDDEN,
    LAYERS,
    VOCAB,
    Applied,
    applied,
    estimate,
    folder_of,
    hidden,
    random_model,
    windows_of,
    written,
)


@torch.no_grad()
def replaced_by_hooks(
    folder: Path, family: str, windows: Windows, transforms: dict[Cut, torch.Tensor]
) -> torch.Tensor:
    """Logits [N, S, V] of the dense model in which the output of layer i+n is made M_i T + Y_i."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    layers = model.get_submodule(FAMILIES[family].layers)
    for cut, transform in transforms.items():
        seen: dict[str, torch.Tensor] = {}

        def keep(name: str, seen: dict[str, torch.Tensor] = seen) -> Any:
            return lambda _, __, output: seen.__setitem__(name, hidden(output))

        def replace(_: Any, __: Any, output: Any, seen: Any = seen, transform: Any = transform) -> Any:
            m = seen["M"].view(seen["L"].shape)
            new = seen["L"] - m + m @ transform
            return (new, *output[1:]) if isinstance(output, tuple) else new

        layers[cut.layer].get_submodule(FAMILIES[family].down).register_forward_hook(keep("M"))
        layers[cut.layer].register_forward_hook(keep("L"))
        layers[cut.removed[-1]].register_forward_hook(replace)
    return model(windows.tokens, attention_mask=windows.mask.long()).logits


TWO = {"layers": 2, "transforms": 2, "transform": "least-squares", "distance": "all-tokens"}
TWO_APART = {"opt"}
"""Where these two cuts do not touch, so that they are not merged into one."""


# Two maps in every family, and what else a map may come from or stand for in some.
@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, TWO) for family in FAMILIES),
        ("qwen3", {"layers": 2, "transform": "cosine", "learning_rate": 0.01}),
        ("gpt2", {"layers": 2, "transform": "cosine", "learning_rate": 0.01}),
        ("opt", {"layers": 2, "transform": "least-squares"}),
        ("llama", {"layers": 5, "transform": "least-squares"}),
        ("neox", {"layers": 5, "transform": "least-squares"}),
    ],
)
def test_the_written_model_computes_what_the_equations_say(
    family: str, options: dict[str, Any], folders: dict[str, Path], tmp_path: Path
):
    windows = windows_of()
    _, run, report = applied(folders[family], tmp_path / "step", windows, held_out=0.0, **options)
    cuts = [Cut(cut["layer"], len(cut["removed"])) for cut in report.details["cuts"]]
    assert sum(cut.length for cut in cuts) == options["layers"]
    if options is TWO:
        assert (len(cuts) == 2) == (family in TWO_APART)
    # The restatement gives `distances` and `estimate` their own tests; here T is taken as it was estimated.
    rest = {name: value for name, value in options.items() if name != "layers"}
    found = estimate(folders[family], tmp_path / "again", windows, cuts, **rest)
    expected = replaced_by_hooks(folders[family], family, windows, {cut: found[cut.layer] for cut in cuts})
    merged = written(run.draft, tmp_path / "artefact")
    assert merged.config.num_hidden_layers == LAYERS - options["layers"]
    with torch.no_grad():
        logits = merged(windows.tokens, attention_mask=windows.mask.long()).logits
    torch.testing.assert_close(logits[windows.mask].double(), expected[windows.mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(streamed_logits(run.draft, windows)[windows.mask], logits[windows.mask])


def test_the_stored_dtype_is_kept(tmp_path: Path):
    folder = folder_of(random_model(FAMILIES["gpt2"].config).to(torch.bfloat16), tmp_path / "model")
    _, run, _ = applied(folder, tmp_path / "step", layers=2, transform="least-squares", held_out=0.0)
    assert {info.dtype for info in run.draft.tensors.values()} == {"BF16"}


def test_only_the_down_projection_is_written(folders: dict[str, Path], tmp_path: Path):
    model, run, report = applied(folders["gpt2"], tmp_path, layers=2, held_out=0.0, learning_rate=0.01)
    layer = report.details["cuts"][0]["layer"]
    changed = {
        name
        for name in run.draft.tensors
        if name not in run.draft.sources or run.draft.sources[name].file.startswith(str(tmp_path))
    }
    assert changed == {f"transformer.h.{layer}.mlp.c_proj.{leaf}" for leaf in ("weight", "bias")}
    assert model.checkpoint.tensors.keys() > run.draft.tensors.keys()


# Functions that the mathematics preserves.


@pytest.fixture
def idle(tmp_path: Path) -> Path:
    """A Llama model whose layers 2 and 3 do nothing."""
    model = random_model(FAMILIES["llama"].config)
    with torch.no_grad():
        for layer in model.model.layers[2:4]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return folder_of(model, tmp_path / "idle")


@pytest.mark.parametrize("distance", ["last-token", "all-tokens"])
def test_layers_that_do_nothing_are_removed_without_loss(idle: Path, tmp_path: Path, distance: str):
    windows = windows_of()
    _, run, report = applied(idle, tmp_path / "step", layers=2, transform="none", distance=distance)
    assert report.details["cuts"] == [{"layer": 1, "removed": [2, 3]}]
    assert "held_out" not in report.details
    assert torch.equal(streamed_logits(run.draft, windows), streamed_logits(Checkpoint.open(idle), windows))


def test_the_map_for_layers_that_do_nothing_is_the_identity(idle: Path, tmp_path: Path):
    found = estimate(idle, tmp_path / "step", windows_of(), [Cut(1, 2)], transform="least-squares")[1]
    torch.testing.assert_close(found, torch.eye(HIDDEN, dtype=torch.float64), rtol=0, atol=1e-5)


# The held-out decision.


def perplexity(model: transformers.PreTrainedModel, windows: Windows) -> float:
    with torch.no_grad():
        logits = model.double()(windows.tokens, attention_mask=windows.mask.long()).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), windows.tokens[:, 1:].flatten(), reduction="none"
    )
    return math.exp(float(loss[windows.mask[:, 1:].flatten()].mean()))


def held_out_of(windows: Windows, chosen: Sequence[int]) -> tuple[Windows, Windows]:
    aside = torch.zeros(len(windows), dtype=torch.bool)
    aside[list(chosen)] = True
    return windows.select(aside), windows.select(~aside)


@pytest.fixture(scope="module")
def likely(folders: dict[str, Path]) -> Windows:
    """Text that the GPT-2 model itself finds likely, so that perplexity means something."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["gpt2"]).eval()
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, VOCAB, (80, 1), generator=generator)
    with torch.no_grad():
        for _ in range(23):
            probabilities = torch.softmax(model(tokens).logits[:, -1], -1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return Windows(tokens, torch.ones_like(tokens, dtype=torch.bool), source="generated")


def test_a_map_that_hurts_is_not_used(folders: dict[str, Path], likely: Windows, tmp_path: Path):
    _, run, report = applied(folders["gpt2"], tmp_path / "step", likely, layers=1, learning_rate=1.0)
    found = report.details["held_out"]
    assert found["chosen"] == "none"
    assert found["perplexity"]["cosine"] > 10 * found["perplexity"]["none"]
    assert "without a linear map" in report.summary
    aside, rest = held_out_of(likely, range(0, 80, 8))
    assert (found["windows"], report.details["tokens"]) == (10, rest.num_tokens)
    plain = applied(folders["gpt2"], tmp_path / "plain", rest, layers=1, transform="none").run.draft
    assert run.draft.tensors == plain.tensors
    assert torch.equal(streamed_logits(run.draft, aside), streamed_logits(plain, aside))
    removed = written(run.draft, tmp_path / "artefact")
    assert found["perplexity"]["none"] == pytest.approx(perplexity(removed, aside), rel=1e-4)


def test_a_map_that_helps_is_used(folders: dict[str, Path], likely: Windows, tmp_path: Path):
    options = {"layers": 1, "transform": "least-squares", "held_out": 0.3}
    _, run, report = applied(folders["gpt2"], tmp_path / "step", likely, **options)
    found = report.details["held_out"]
    assert found["chosen"] == "least-squares"
    assert found["perplexity"]["least-squares"] < 0.9 * found["perplexity"]["none"]
    assert "by 1 linear map(s)" in report.summary
    aside, rest = held_out_of(likely, [number * 80 // 24 for number in range(24)])
    assert (found["windows"], report.details["tokens"]) == (24, rest.num_tokens)
    merged = written(run.draft, tmp_path / "artefact")
    assert found["perplexity"]["least-squares"] == pytest.approx(perplexity(merged, aside), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"epochs": 1}, "least-squares"),
        ({"learning_rate": 0.01, "l2": 1e6}, "cosine"),  # so much l2 turns least squares into nothing
    ],
)
def test_auto_takes_the_best_of_the_three(
    options: dict[str, Any], chosen: str, folders: dict[str, Path], likely: Windows, tmp_path: Path
):
    auto = {"layers": 1, "transform": "auto", "held_out": 0.3} | options
    _, run, report = applied(folders["gpt2"], tmp_path / "auto", likely, **auto)
    found = report.details["held_out"]
    assert found["chosen"] == chosen == min(found["perplexity"], key=found["perplexity"].get)
    assert set(found["perplexity"]) == {"none", "least-squares", "cosine"}
    _, rest = held_out_of(likely, aside_of(len(likely), auto["held_out"]))
    alone = auto | {"transform": chosen, "held_out": 0.0}
    assert_same_draft(run, applied(folders["gpt2"], tmp_path / "alone", rest, **alone).run)


def aside_of(count: int, share: float) -> list[int]:
    aside = math.ceil(count * share)
    return [number * count // aside for number in range(aside)]


# Going on after a kill.


@pytest.mark.parametrize(
    ("spilled", "options", "killed_at"),
    [
        (False, {"layers": 2, "transforms": 2, "learning_rate": 0.01}, (2, 16, 30)),
        (True, {"layers": 2, "transforms": 2, "learning_rate": 0.01}, (9, 16, 23)),
        (True, {"layers": 2, "transform": "least-squares", "distance": "all-tokens"}, (9, 23)),
    ],
    ids=["in memory", "spilled", "spilled, all tokens"],
)
def test_a_killed_run_goes_on_to_the_same_result(
    spilled: bool,
    options: dict[str, Any],
    killed_at: tuple[int, ...],
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    if spilled:
        monkeypatch.setattr(activations, "MEMORY_LIMIT", 0)
    moments = Moments(monkeypatch)

    def run(name: str, deadly: int = 0) -> Applied:
        moments.begin(deadly)
        return applied(folders["llama"], tmp_path / name, progress=moments.happens, **options)

    whole = run("whole")
    assert moments.passed == 12 + 12 + 8 + 2  # each of the two walks begins with one, too
    for moment in killed_at:
        with pytest.raises(Killed):
            run(str(moment), moment)
        with suppress(Killed):
            run(str(moment), 3)  # and again, soon after it went on
        resumed = run(str(moment))
        assert resumed.report == whole.report
        assert_same_draft(resumed.run, whole.run)
