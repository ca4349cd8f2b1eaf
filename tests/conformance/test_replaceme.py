"""ReplaceMe against a float64 restatement on plain transformers models with hooks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from pydantic import ValidationError

from compress.activations import Activations
from compress.calibration.windows import Windows
from compress.checkpoint import Checkpoint, Draft, write_weights
from compress.errors import BadInput, CompressError
from compress.method import StepReport
from compress.plan import ModelShape
from compress.pruning.depth import Cut
from compress.pruning.replaceme import ReplaceMe, Samples, least_squares, merge
from compress.reload import streamed_logits
from compress.run import Run
from compress.stream import Stream, StreamedModel

VOCAB, HIDDEN, LAYERS = 48, 16, 6
LENGTHS = (16, 16, 11, 7, 16, 5, 16, 13, 9, 16, 2, 16)


class Family(NamedTuple):
    config: transformers.PretrainedConfig
    layers: str
    down: str


SMALL = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FAMILIES = {
    "llama": Family(
        transformers.LlamaConfig(
            **SMALL, intermediate_size=40, num_key_value_heads=2, tie_word_embeddings=True, **TOKENS
        ),
        "model.layers",
        "mlp.down_proj",
    ),
    "qwen3": Family(
        transformers.Qwen3Config(**SMALL, intermediate_size=40, num_key_value_heads=2, head_dim=8, **TOKENS),
        "model.layers",
        "mlp.down_proj",
    ),
    "gpt2": Family(
        transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=32, **TOKENS
        ),
        "transformer.h",
        "mlp.c_proj",
    ),
    "neox": Family(
        transformers.GPTNeoXConfig(**SMALL, intermediate_size=40, use_parallel_residual=True, **TOKENS),
        "gpt_neox.layers",
        "mlp.dense_4h_to_h",
    ),
    "opt": Family(
        transformers.OPTConfig(
            **SMALL, ffn_dim=40, word_embed_proj_dim=HIDDEN, max_position_embeddings=32, **TOKENS
        ),
        "model.decoder.layers",
        "fc2",
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def random_model(config: transformers.PretrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """A model every layer of which matters: each block changes the residual stream about as much as it is."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                embeds = any(part in name for part in ("embed", "wte", "wpe"))
                inputs = 1 if embeds else parameter.shape["c_" not in name]  # Conv1D is [in, out]
                parameter.copy_(noise / math.sqrt(inputs))
            else:
                parameter.copy_(0.2 * noise + (1 if name.endswith("weight") else 0))
    return model.eval()


def folder_of(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: folder_of(random_model(family.config), tmp_path_factory.mktemp(name))
        for name, family in FAMILIES.items()
    }


def windows_of(lengths: tuple[int, ...] = LENGTHS, width: int = 16, seed: int = 1) -> Windows:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCAB, (len(lengths), max(lengths)), generator=generator)
    tokens = torch.nn.functional.pad(tokens, (0, width - max(lengths)))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Windows(tokens.masked_fill(~mask, 0), mask, source="random")


class Applied(NamedTuple):
    model: StreamedModel
    run: Run
    report: StepReport | None = None


def opened(folder: Path, work: Path, windows: Windows, progress: Any = None) -> Applied:
    checkpoint = Checkpoint.open(folder)
    progress = progress or (lambda *_: None)
    run = Run(Draft(checkpoint, work), windows, 0, work, "cpu", progress)
    return Applied(StreamedModel(checkpoint, progress=progress), run)


def applied(
    folder: Path, work: Path, windows: Windows | None = None, progress: Any = None, **options: Any
) -> Applied:
    model, run, _ = opened(folder, work, windows or windows_of(), progress)
    return Applied(model, run, ReplaceMe().apply(model, ReplaceMe.Options(**options), run))


def distances(folder: Path, work: Path, windows: Windows, **options: Any) -> torch.Tensor:
    model, run, _ = opened(folder, work, windows)
    return ReplaceMe().distances(model, windows, ReplaceMe.Options(**options), run)


def estimate(
    folder: Path, work: Path, windows: Windows, cuts: list[Cut], **options: Any
) -> dict[int, torch.Tensor]:
    model, run, _ = opened(folder, work, windows)
    options = ReplaceMe.Options(layers=sum(cut.count for cut in cuts), **options)
    return ReplaceMe().estimate(model, windows, cuts, options, run)


def written(draft: Draft, folder: Path) -> transformers.PreTrainedModel:
    """What plain transformers makes of a draft."""
    folder.mkdir()
    write_weights(draft, folder)
    (folder / "config.json").write_text(json.dumps(draft.config))
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    return model.eval()


# The restatement.


def hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def dense(folder: Path, family: str, windows: Windows) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """L_i and M_i of every layer i: float64 [N, S, D], from a plain forward pass."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    outputs, mlps = [], []
    for layer in model.get_submodule(FAMILIES[family].layers):
        layer.register_forward_hook(lambda _, __, output: outputs.append(hidden(output)))
        down = layer.get_submodule(FAMILIES[family].down)
        down.register_forward_hook(lambda _, __, output: mlps.append(output))
    model(windows.tokens, attention_mask=windows.mask.long())
    return outputs, [mlp.view(*windows.tokens.shape, -1) for mlp in mlps]


def angle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.acos((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))) / math.pi


def rows(folder: Path, family: str, windows: Windows, cut: Cut) -> tuple[torch.Tensor, ...]:
    """M_i, Y_i and L_{i+n} of the real tokens: float64 [tokens, D]."""
    outputs, mlps = dense(folder, family, windows)
    m = mlps[cut.layer]
    return tuple(part[windows.mask] for part in (m, outputs[cut.layer] - m, outputs[cut.layer + cut.count]))


def cosine_loss(
    t: torch.Tensor, m: torch.Tensor, y: torch.Tensor, target: torch.Tensor, exact: bool
) -> torch.Tensor:
    a, b = (m @ t + y, target) if exact else (m @ t, target - y)
    return (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()


def adam(folder: Path, family: str, windows: Windows, cut: Cut, options: dict[str, Any]) -> torch.Tensor:
    """Adam as Kingma and Ba write it, over the windows in the order that the seed gives."""
    all_tokens = rows(folder, family, windows, cut)
    lengths = windows.mask.sum(1).tolist()
    by_window = list(zip(*(part.split(lengths) for part in all_tokens)))
    generator = torch.Generator().manual_seed(0)
    t = torch.eye(HIDDEN, dtype=torch.float64)
    mean, square, steps = torch.zeros_like(t), torch.zeros_like(t), 0
    for _ in range(options["epochs"]):
        order = torch.randperm(len(windows), generator=generator).tolist()
        parts = [torch.cat([by_window[index][k] for index in order]) for k in range(3)]
        for batch in zip(*(part.split(options["batch_tokens"]) for part in parts)):
            t = t.detach().requires_grad_()
            loss = cosine_loss(t, *batch, exact=options.get("exact", False))
            loss = loss + options.get("l1", 0) * t.abs().sum() + options.get("l2", 0) * t.pow(2).sum()
            (gradient,) = torch.autograd.grad(loss, t)
            steps += 1
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            move = (mean / (1 - 0.9**steps)) / ((square / (1 - 0.999**steps)).sqrt() + 1e-8)
            t = t.detach() - options["learning_rate"] * move
    return t


# Selection.


@every_family
def test_distances_are_those_of_the_paper(family: str, folders: dict[str, Path], tmp_path: Path):
    """The last one is taken before the final norm."""
    windows = windows_of()
    outputs, _ = dense(folders[family], family, windows)
    last = torch.arange(len(windows)), windows.mask.sum(1) - 1
    for n, distance in ((1, "all-tokens"), (2, "last-token")):
        rows = windows.mask if distance == "all-tokens" else last
        values = [float(angle(a[rows], b[rows]).mean()) for a, b in zip(outputs, outputs[n:])]
        found = distances(folders[family], tmp_path / distance, windows, layers=n, distance=distance)
        assert found.tolist() == pytest.approx(values, abs=1e-5)
        assert min(values) > 0.02, "layers that hardly matter would make this test blind"
        if n == 1:
            model = transformers.AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float64)
            with torch.no_grad():
                result = model(windows.tokens, attention_mask=windows.mask.long(), output_hidden_states=True)
            normed = float(angle(outputs[-2], result.hidden_states[-1])[windows.mask].mean())
            assert abs(float(found[-1]) - normed) > 1e-3


# Estimation.

CUTS = [Cut(0, 1), Cut(1, 3), Cut(LAYERS - 3, 2)]


@every_family
def test_least_squares_solves_the_stacked_problem(family: str, folders: dict[str, Path], tmp_path: Path):
    windows = windows_of()
    for number, (cut, l2) in enumerate(zip(CUTS, (0.0, 3.0, 0.0), strict=True)):
        m, y, target = rows(folders[family], family, windows, cut)
        ridge = math.sqrt(l2) * torch.eye(HIDDEN, dtype=torch.float64)
        left, right = torch.cat([m, ridge]), torch.cat([target - y, torch.zeros_like(ridge)])
        expected = torch.linalg.lstsq(left, right).solution
        work = tmp_path / str(number)
        found = estimate(folders[family], work, windows, [cut], transform="least-squares", l2=l2)
        torch.testing.assert_close(found[cut.layer], expected, rtol=1e-4, atol=1e-4)


@every_family
def test_cosine_follows_adam(family: str, folders: dict[str, Path], tmp_path: Path):
    windows, cut = windows_of(), CUTS[-1]
    m, y, target = rows(folders[family], family, windows, cut)
    common = {"epochs": 3, "learning_rate": 0.01, "batch_tokens": 50}
    identity = torch.eye(HIDDEN, dtype=torch.float64)
    extras = ({"exact": True}, {"l1": 0.01}, {"l2": 0.01})  # whose terms have nothing of the architecture
    for number, extra in enumerate(({}, extras[list(FAMILIES).index(family) % 3])):
        options = common | extra
        found = estimate(folders[family], tmp_path / str(number), windows, [cut], **options)[cut.layer]
        expected = adam(folders[family], family, windows, cut, options)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        exact = "exact" in extra
        assert cosine_loss(found, m, y, target, exact) < cosine_loss(identity, m, y, target, exact)


def test_regularisation_makes_the_map_smaller(folders: dict[str, Path], tmp_path: Path):
    def size(name: str, **options: Any) -> float:
        common = {"epochs": 20, "learning_rate": 0.01, "batch_tokens": 50}
        found = estimate(folders["llama"], tmp_path / name, windows_of(), [CUTS[1]], **common, **options)
        return float(found[CUTS[1].layer].abs().sum())

    assert size("l1", l1=0.01) < size("none") - 1
    assert size("l2", l2=0.01) < size("none again") - 1


def samples_of(m: torch.Tensor, y: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> Samples:
    def held(values: torch.Tensor) -> Activations:
        activations = Activations(tuple(values.shape), None)
        activations.write(0, values)
        return activations

    windows = Windows(mask.long(), mask, source="made up")
    return Samples(held(m), held(y), SimpleNamespace(hidden=held(target), windows=windows), "cpu")


def test_least_squares_recovers_a_map_that_exists():
    generator = torch.Generator().manual_seed(3)
    m, y = torch.randn(2, 5, 12, HIDDEN, generator=generator)
    wanted = torch.randn(HIDDEN, HIDDEN, generator=generator)
    mask = torch.ones(5, 12, dtype=torch.bool)
    mask[1, 7:] = False
    target = torch.where(mask[..., None], m @ wanted + y, 1e6)  # padding holds rubbish
    options = ReplaceMe.Options(layers=1, transform="least-squares")
    found = least_squares(samples_of(m, y, target, mask), options, torch.Generator())
    torch.testing.assert_close(found, wanted.double(), rtol=0, atol=1e-5)


def test_least_squares_where_the_mlp_writes_into_few_directions():
    generator = torch.Generator().manual_seed(4)
    m, y, target = torch.randn(3, 5, 12, HIDDEN, generator=generator)
    m[..., HIDDEN // 2 :] = 0  # the Gram is singular
    mask = torch.ones(5, 12, dtype=torch.bool)
    options = ReplaceMe.Options(layers=1, transform="least-squares")
    found = least_squares(samples_of(m, y, target, mask), options, torch.Generator())
    left, right = m.flatten(0, 1).double(), (target - y).flatten(0, 1).double()
    torch.testing.assert_close(found, torch.linalg.pinv(left) @ right, rtol=0, atol=1e-6)


# What the estimates must not depend on.


# Positions are relative in one family and learned in the other; what estimates the map sees neither.
@pytest.mark.parametrize(("family", "transform"), [("llama", "cosine"), ("opt", "least-squares")])
def test_padding_and_batch_size_change_nothing(
    family: str,
    transform: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    cuts = [Cut(0, 2), Cut(3, 1)]
    options = {"transform": transform}
    if transform == "cosine":
        options |= {"epochs": 3, "learning_rate": 0.01, "batch_tokens": 50}

    def everything(name: str, windows: Windows) -> list[torch.Tensor]:
        found = [
            distances(folders[family], tmp_path / name / distance, windows, layers=2, distance=distance)
            for distance in ("last-token", "all-tokens")
        ]
        return found + list(
            estimate(folders[family], tmp_path / name / "T", windows, cuts, **options).values()
        )

    before = everything("before", windows_of())
    for one, other in zip(before, everything("padded", windows_of(width=21))):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    stream = StreamedModel.stream
    sizes = []

    def one_by_one(self: StreamedModel, windows: Windows, folder: Path | None = None) -> Stream:
        made = stream(self, windows, folder, batch_tokens=1)
        sizes.append(made.batch_size)
        return made

    monkeypatch.setattr(StreamedModel, "stream", one_by_one)
    for one, other in zip(before, everything("one by one", windows_of())):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert sizes == [1, 1, 1]


# Surgery.


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
    assert sum(cut.count for cut in cuts) == options["layers"]
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
    assert found["perplexity_with_transform"] > 10 * found["perplexity_without"]
    assert "without a linear map" in report.summary
    aside, rest = held_out_of(likely, range(0, 80, 8))
    assert (found["windows"], report.details["tokens"]) == (10, rest.num_tokens)
    plain = applied(folders["gpt2"], tmp_path / "plain", rest, layers=1, transform="none").run.draft
    assert run.draft.tensors == plain.tensors
    assert torch.equal(streamed_logits(run.draft, aside), streamed_logits(plain, aside))
    removed = written(run.draft, tmp_path / "artefact")
    assert found["perplexity_without"] == pytest.approx(perplexity(removed, aside), rel=1e-4)


def test_a_map_that_helps_is_used(folders: dict[str, Path], likely: Windows, tmp_path: Path):
    options = {"layers": 1, "transform": "least-squares", "held_out": 0.3}
    _, run, report = applied(folders["gpt2"], tmp_path / "step", likely, **options)
    found = report.details["held_out"]
    assert found["chosen"] == "transform"
    assert found["perplexity_with_transform"] < 0.9 * found["perplexity_without"]
    assert "by 1 linear map(s)" in report.summary
    aside, rest = held_out_of(likely, [number * 80 // 24 for number in range(24)])
    assert (found["windows"], report.details["tokens"]) == (24, rest.num_tokens)
    merged = written(run.draft, tmp_path / "artefact")
    assert found["perplexity_with_transform"] == pytest.approx(perplexity(merged, aside), rel=1e-4)


# Going on after a kill.


class Killed(Exception):
    pass


# Each layer is first through, then durable: 12 moments of the walk for distances, 12 of the one for the map,
# and 8 of scoring held-out text.
@pytest.mark.parametrize(
    ("spilled", "options", "moments"),
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
    moments: tuple[int, ...],
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    if spilled:
        monkeypatch.setattr(Activations.__init__, "__defaults__", (0,))
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
    assert len(happened) == 12 + 12 + 8
    for killed_at in moments:
        moment = killed_at
        with pytest.raises(Killed):
            run(str(killed_at))
        moment = 3  # and again, soon after it went on
        with suppress(Killed):
            run(str(killed_at))
        moment = 0
        resumed = run(str(killed_at))
        assert resumed.report == whole.report
        assert resumed.run.draft.config == whole.run.draft.config
        assert resumed.run.draft.tensors == whole.run.draft.tensors
        for tensor in whole.run.draft.tensors:
            assert torch.equal(resumed.run.draft.read(tensor), whole.run.draft.read(tensor))


# What is refused, and what is only just allowed.


def plan(folder: Path, **options: Any) -> ModelShape:
    return ReplaceMe().plan(ModelShape.of(Checkpoint.open(folder)), ReplaceMe.Options(**options))


def test_the_plan_is_what_comes_out(folders: dict[str, Path], tmp_path: Path):
    for family in ("llama", "gpt2"):
        planned = plan(folders[family], layers=2)
        draft = applied(folders[family], tmp_path / family, layers=2).run.draft
        assert planned.config == draft.config
        assert planned.tensors == draft.tensors


def test_one_layer_must_be_left(folders: dict[str, Path]):
    assert plan(folders["llama"], layers=LAYERS - 1).num_layers == 1
    with pytest.raises(BadInput, match="at most 5 of the model's 6 layers, not 6"):
        plan(folders["llama"], layers=LAYERS)


@pytest.mark.parametrize(
    "options",
    [
        {"layers": 5, "transforms": 2},
        {"layers": 2, "transform": "least-squares", "exact": True},
        {"layers": 2, "transform": "none", "l1": 0.1},
        {"layers": 0},
        {"layers": 2, "learning_rate": 1e38},
        {"layers": 2, "held_out": 1.0},
        {"layers": 2, "ratio": 0.5},
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any]):
    with pytest.raises(ValidationError):
        ReplaceMe.Options(**options)


def test_too_little_text(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(BadInput, match="at least 16 calibration tokens"):
        applied(folders["llama"], tmp_path / "1", windows_of((5, 6, 3)), layers=2, transform="least-squares")
    ridge = {"layers": 2, "transform": "least-squares", "l2": 1.0}
    applied(folders["llama"], tmp_path / "2", windows_of((5, 6, 3)), **ridge)
    with pytest.raises(BadInput, match="none can be held out"):
        applied(folders["llama"], tmp_path / "3", windows_of((5,)), layers=2)
    applied(folders["llama"], tmp_path / "4", windows_of((5,)), layers=2, held_out=0.0)


@pytest.mark.parametrize("value", [math.nan, 1e300])
def test_a_map_that_does_not_fit_is_an_error(value: float, folders: dict[str, Path], tmp_path: Path):
    model, run, _ = opened(folders["llama"], tmp_path, windows_of())
    with pytest.raises(CompressError, match="too large or not a number"):
        merge(run.draft, model, [2], {1: torch.full((HIDDEN, HIDDEN), value, dtype=torch.float64)})


def test_a_quantized_model_is_refused(folders: dict[str, Path], tmp_path: Path):
    checkpoint = Checkpoint.open(folders["llama"])
    checkpoint.config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(BadInput, match="quantized already"):
        ReplaceMe().plan(ModelShape.of(checkpoint), ReplaceMe.Options(layers=2))


def gemma(folder: Path) -> Path:
    config = transformers.Gemma2Config(
        **SMALL,
        intermediate_size=40,
        num_key_value_heads=2,
        head_dim=4,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "full_attention"] * 2,
        **TOKENS,
    )
    return folder_of(random_model(config), folder)


def test_a_norm_behind_the_mlp_leaves_only_plain_removal(tmp_path: Path):
    folder, windows = gemma(tmp_path / "gemma"), windows_of()
    with pytest.raises(BadInput, match=r"post_feedforward_layernorm.*transform: none"):
        plan(folder, layers=2)
    _, run, report = applied(folder, tmp_path / "step", windows, layers=2, transform="none")
    removed = report.details["cuts"][0]["removed"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    kept = [index for index in range(LAYERS) if index not in removed]
    merged = written(run.draft, tmp_path / "artefact")
    assert merged.config.layer_types == [model.config.layer_types[index] for index in kept]
    with torch.no_grad():
        for index in removed:
            model.model.layers[index].register_forward_hook(
                lambda _, inputs, output: (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]
            )
        inputs = {"input_ids": windows.tokens, "attention_mask": windows.mask.long()}
        expected, logits = model(**inputs).logits, merged(**inputs).logits
    torch.testing.assert_close(logits[windows.mask], expected[windows.mask], rtol=1e-5, atol=1e-5)


def test_a_post_norm_model_is_refused(tmp_path: Path):
    config = transformers.OPTConfig(
        **SMALL, ffn_dim=40, word_embed_proj_dim=HIDDEN, do_layer_norm_before=False, **TOKENS
    )
    folder = folder_of(random_model(config), tmp_path)
    with pytest.raises(BadInput, match=r"post-norm.*transform: none"):
        plan(folder, layers=2)
