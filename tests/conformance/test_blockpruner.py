"""BlockPruner against a plain greedy loop in float64 on transformers models with hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

import compress
from compress import activations
from compress.artefact import Lineage
from compress.calibration.windows import Windows
from compress.checkpoint import Checkpoint, Draft
from compress.errors import BadInput, CompressError
from compress.method import StepReport
from compress.plan import ModelShape
from compress.pruning import block_losses
from compress.pruning.block_losses import Bound, next_token_losses
from compress.pruning.blockpruner import BlockPruner, contenders
from compress.pruning.blocks import Block, block_parameters, layer_parameters
from compress.reload import streamed_logits
from compress.run import Run
from compress.stream import StreamedModel, next_token_loss

VOCAB, HIDDEN, LAYERS = 48, 16, 3
SIZE = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
SIZE |= {"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GQA = {**SIZE, "intermediate_size": 40, "num_key_value_heads": 2}
GEMMA = {**GQA, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 4}
OPT = {**SIZE, "ffn_dim": 40}
CASES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**GQA, tie_word_embeddings=True),
    "gemma2": lambda: hf.Gemma2Config(**GEMMA, final_logit_softcapping=2.0),
    "gpt2": lambda: hf.GPT2Config(**SIZE),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SIZE, intermediate_size=40),
    "opt": lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=HIDDEN),
    "opt, post-norm": lambda: hf.OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=8),
}
BLOCKS = {
    "gpt2": ("transformer.h", "attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
    "opt": ("model.decoder.layers", "self_attn", "fc2"),
    "opt, post-norm": ("model.decoder.layers", "self_attn", "fc2"),
}
every_case = pytest.mark.parametrize("case", CASES)


def save(case: str, folder: Path) -> Path:
    """A random model every block of which matters."""
    model = hf.AutoModelForCausalLM.from_config(CASES[case]())
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.data = 0.2 * noise + (1 if name.endswith("weight") and case != "gemma2" else 0)
        else:
            embeds = any(part in name for part in ("embed_tokens", "embed_in.", "wte", "wpe", "positions"))
            parameter.data = noise / math.sqrt(1 if embeds else parameter.shape["c_" not in name])
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {case: save(case, tmp_path_factory.mktemp("model")) for case in CASES}


LENGTHS = (16, 16, 11, 1, 16, 5, 16, 13)


def windows_of(lengths: Sequence[int] = LENGTHS, width: int = 16, seed: int = 1) -> Windows:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (len(lengths), 16), generator=generator)
    tokens = nn.functional.pad(tokens, (0, width - 16))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Windows(tokens.masked_fill(~mask, 0), mask, source="random")


WINDOWS = windows_of()


@pytest.fixture(autouse=True)
def few_likely_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the bounds differ from the losses on a vocabulary this small."""
    monkeypatch.setattr(block_losses, "LIKELY_TOKENS", 4)


# The restatement.


class Plain:
    """A whole model in float64, and what its loss is without some blocks."""

    def __init__(self, case: str, folder: Path, windows: Windows) -> None:
        self.model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.windows = windows
        layers, *self.names = BLOCKS.get(case, ("model.layers", "self_attn", "mlp"))
        self.layers = self.model.get_submodule(layers)
        self.found: dict[frozenset[Block], float] = {}

    @torch.no_grad()
    def losses(self, removed: Sequence[Block]) -> Tensor:
        """Mean token loss of each window that has one: float64."""

        def nothing(_: Any, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (torch.zeros_like(output[0]), *output[1:])
            return torch.zeros_like(output)

        hooks = [
            self.layers[layer]
            .get_submodule(self.names[("attention", "mlp").index(part)])
            .register_forward_hook(nothing)
            for layer, part in removed
        ]
        losses = []
        for tokens, mask in zip(self.windows.tokens, self.windows.mask, strict=True):
            real = tokens[mask][None]
            if real.shape[1] > 1:
                logits = self.model(real).logits[0, :-1]
                losses.append(nn.functional.cross_entropy(logits, real[0, 1:]))
        for hook in hooks:
            hook.remove()
        return torch.stack(losses)

    def perplexity(self, removed: Sequence[Block]) -> float:
        if (blocks := frozenset(removed)) not in self.found:
            self.found[blocks] = math.exp(float(self.losses(removed).mean()))
        return self.found[blocks]


@pytest.fixture(scope="session")
def plain_of(folders: dict[str, Path]) -> Callable[[str], Plain]:
    """One for all tests with the same windows, as it remembers what it has found."""
    return cache(lambda case: Plain(case, folders[case], WINDOWS))


def greedy(
    plain: Plain,
    rounds: int,
    parts: Sequence[str] = ("attention", "mlp"),
    parameters: dict[Block, int] | None = None,
) -> list[tuple[Block, float]]:
    """The paper's loop: (block, perplexity without it) in the order of removal."""
    blocks = [Block(layer, part) for layer in range(LAYERS) for part in parts]
    removed: list[tuple[Block, float]] = []
    for _ in range(rounds):
        so_far = [block for block, _ in removed]
        now = math.log(plain.perplexity(so_far))
        perplexities = {block: plain.perplexity([*so_far, block]) for block in blocks if block not in so_far}
        ranks = {
            block: (math.log(found) - now) / (parameters[block] if parameters else 1)
            for block, found in perplexities.items()
        }
        # An argmin of which rounding decides would make the test a lottery.
        first, second = sorted(ranks.values())[:2]
        assert second - first > 1e-5 * abs(second)
        best = min(ranks, key=lambda block: ranks[block])
        removed.append((best, perplexities[best]))
    return removed


def parameters_of(folder: Path) -> dict[Block, int]:
    return block_parameters(ModelShape.of(Checkpoint.open(folder)))


# The method under test.


def applied(folder: Path, work: Path, windows: Windows = WINDOWS, **options: Any) -> tuple[StepReport, Run]:
    checkpoint = Checkpoint.open(folder)
    run = Run(Draft(checkpoint, work), windows, 0, work, "cpu", lambda *_: None)
    return BlockPruner().apply(StreamedModel(checkpoint), BlockPruner.Options(**options), run), run


def order(report: StepReport) -> list[tuple[Block, float]]:
    return [
        (Block(removal["layer"], removal["part"]), removal["perplexity"])
        for removal in report.details["removed"]
    ]


def assert_same(found: list[tuple[Block, float]], expected: list[tuple[Block, float]]) -> None:
    assert [block for block, _ in found] == [block for block, _ in expected]
    assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=2e-6)


@pytest.fixture(scope="session")
def three_removed(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[StepReport, Run]]:
    """What the method does when it is asked for nothing but three blocks."""
    return cache(lambda case: applied(folders[case], tmp_path_factory.mktemp("three"), blocks=3))


Removed = Callable[[str], tuple[StepReport, Run]]

# The search.


@every_case
def test_the_removals_are_those_of_the_plain_loop(
    case: str, folders: dict[str, Path], plain_of: Callable[[str], Plain], three_removed: Removed
):
    plain = plain_of(case)
    report, run = three_removed(case)
    assert_same(order(report), greedy(plain, 3))
    assert report.details["removed"][0]["before"] == pytest.approx(plain.perplexity([]), rel=2e-6)
    # What was written has the perplexity that the search found.
    written = next_token_loss(StreamedModel(run.draft), windows_of([16] * 3))
    expected = Plain(case, folders[case], windows_of([16] * 3)).losses([block for block, _ in order(report)])
    assert float(written.mean()) == pytest.approx(float(expected.mean()), rel=1e-5)


@pytest.mark.parametrize(("case", "mode"), [("llama", "attention"), ("gpt_neox", "mlp")])
def test_modes(
    case: str, mode: str, folders: dict[str, Path], plain_of: Callable[[str], Plain], tmp_path: Path
):
    plain = plain_of(case)
    report, _ = applied(folders[case], tmp_path, blocks=2, mode=mode)
    assert_same(order(report), greedy(plain, 2, parts=[mode]))


@pytest.mark.parametrize(("case", "search"), [("llama", "exact"), ("gpt2", "racing")])
def test_cost_in_parameters(
    case: str, search: str, folders: dict[str, Path], plain_of: Callable[[str], Plain], tmp_path: Path
):
    plain = plain_of(case)
    expected = greedy(plain, 3, parameters=parameters_of(folders[case]))
    options = {"cost": "parameters", "search": search, "confidence": 1 - 1e-12}
    report, _ = applied(folders[case], tmp_path / "found", blocks=3, **options)
    assert_same(order(report), expected)


def test_the_costs_choose_differently(folders: dict[str, Path], plain_of: Callable[[str], Plain]):
    """So that the test above is not the one before it."""
    plain = plain_of("llama")
    assert greedy(plain, 3) != greedy(plain, 3, parameters=parameters_of(folders["llama"]))


@pytest.mark.parametrize("case", ["llama", "gemma2", "opt, post-norm"])
def test_memory_batches_and_padding_change_nothing(
    case: str,
    folders: dict[str, Path],
    three_removed: Removed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    before = order(three_removed(case)[0])[:2]
    padded, _ = applied(folders[case], tmp_path / "padded", windows_of(width=21), blocks=2)
    assert_same(order(padded), before)

    monkeypatch.setattr(activations, "MEMORY_LIMIT", 1)  # a window at a time, and its hidden states in files
    monkeypatch.setattr(block_losses, "CHUNK_ELEMENTS", 3 * VOCAB)
    stream, spilled = StreamedModel.stream, []

    def one_by_one(self: StreamedModel, windows: Windows, folder: Path | None = None) -> Any:
        made = stream(self, windows, folder, batch_tokens=1)
        spilled.append(made.hidden.spilled and len(windows) == 1)
        return made

    monkeypatch.setattr(StreamedModel, "stream", one_by_one)
    small, _ = applied(folders[case], tmp_path / "small", blocks=2)
    assert_same(order(small), before)
    assert len(spilled) >= 2 * 7
    assert all(spilled)


def test_few_losses_need_the_whole_vocabulary(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made: list[Any] = []
    init = block_losses.BlockLosses.__init__
    monkeypatch.setattr(
        block_losses.BlockLosses,
        "__init__",
        lambda self, *args, **kwargs: (made.append(self), init(self, *args, **kwargs))[1],
    )
    monkeypatch.setattr(block_losses, "LIKELY_TOKENS", 24)
    applied(folders["llama"], tmp_path, blocks=3)
    assert sum(int(losses.exact.all(1).sum()) for losses in made) <= 5  # of 6 + 5 + 4 blocks
    for losses in made:
        assert losses.exact.any(1).sum() < len(losses.blocks)


# The bound.


class Vocabulary:
    """What `Bound` needs of a head: a projection, and what it is given."""

    def __init__(self, projection: nn.Linear, cap: float | None = None) -> None:
        self.projection, self.cap = projection, cap

    def features(self, hidden: Tensor) -> Tensor:
        return hidden

    def __call__(self, hidden: Tensor) -> Any:
        logits = self.projection(hidden)
        return SimpleNamespace(
            logits=logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
        )


@given(
    tokens=st.integers(2, 40),
    width=st.integers(1, 12),
    likely=st.integers(1, 50),
    bias=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    far=st.sampled_from([0.0, 0.1, 3.0]),
    seed=st.integers(0, 2**20),
)
def test_a_bound_is_below_the_loss_and_near_it_where_the_models_agree(
    tokens: int, width: int, likely: int, bias: bool, scale: float, far: float, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    head = Vocabulary(nn.Linear(width, tokens, bias=bias).requires_grad_(False))
    head.projection.weight.data = scale * torch.randn(tokens, width, generator=generator)
    hidden = torch.randn(7, width, generator=generator)
    targets = torch.randint(0, tokens, (7,), generator=generator)
    branch = hidden + far * torch.randn(3, 7, width, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_losses, "LIKELY_TOKENS", likely)
        bound = Bound(head, hidden, targets)
    found = bound.of(branch)
    losses = [nn.functional.cross_entropy(head.projection(one).double(), targets) for one in branch]
    expected = torch.stack(losses)
    tolerance = 1e-5 * (1 + float(expected.abs().max()))
    assert bound.loss == pytest.approx(
        float(nn.functional.cross_entropy(head.projection(hidden).double(), targets)), abs=tolerance
    )
    assert bool((found <= expected + tolerance).all())
    if far == 0:
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_there_is_no_bound_for_capped_logits():
    projection = nn.Linear(4, 30).requires_grad_(False)
    hidden, targets = torch.randn(9, 4), torch.arange(9)
    assert Bound(Vocabulary(projection), hidden, targets).holds
    assert not Bound(Vocabulary(projection, cap=1.0), hidden, targets).holds


def test_losses_over_a_large_vocabulary_are_right_to_a_millionth():
    logits = 5 * torch.randn(4, 200_000, generator=torch.Generator().manual_seed(0)) + 20
    targets = torch.arange(4)
    exact = nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(next_token_losses(logits, targets), exact, atol=5e-6, rtol=0)


# Targets.


def test_until_a_share_of_the_parameters_is_left(folders: dict[str, Path], tmp_path: Path):
    folder = folders["llama"]
    sizes, total = parameters_of(folder), layer_parameters(ModelShape.of(Checkpoint.open(folder)))
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    assert total == sum(parameter.numel() for parameter in model.model.layers.parameters())
    norms = model.model.layers[0].input_layernorm.weight.numel()
    attention = sum(parameter.numel() for parameter in model.model.layers[0].self_attn.parameters())
    assert sizes[Block(0, "attention")] == attention + norms
    report, run = applied(folder, tmp_path, keep_ratio=0.7)
    kept = [removal["kept"] for removal in report.details["removed"]]
    assert kept[-1] <= 0.7 < kept[-2]
    left = layer_parameters(ModelShape.of(run.draft))
    assert kept[-1] == pytest.approx(left / total)
    whole, _ = applied(folder, tmp_path / "again", blocks=len(kept))
    assert order(whole) == order(report)


@pytest.fixture(scope="session")
def likely(folders: dict[str, Path]) -> Windows:
    """Text that the Llama model itself wrote, so that losing a block costs perplexity."""
    model = hf.AutoModelForCausalLM.from_pretrained(folders["llama"]).eval()
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, VOCAB, (40, 1), generator=generator)
    with torch.no_grad():
        for _ in range(15):
            probabilities = torch.softmax(model(tokens).logits[:, -1], -1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return Windows(tokens, torch.ones_like(tokens, dtype=torch.bool), source="generated")


def test_until_the_perplexity_is_reached(folders: dict[str, Path], likely: Windows, tmp_path: Path):
    folder, plain = folders["llama"], Plain("llama", folders["llama"], likely)
    expected = greedy(plain, 3)
    dense, first, second, third = plain.perplexity([]), *(value for _, value in expected)
    assert dense < first < second < third
    report, _ = applied(folder, tmp_path / "two", likely, max_perplexity=(second + third) / 2)
    assert_same(order(report), expected[:2])
    report, run = applied(folder, tmp_path / "none", likely, max_perplexity=(dense + first) / 2)
    assert report.details["removed"] == []
    assert "removed nothing" in report.summary
    assert run.draft.config == Checkpoint.open(folder).config
    with pytest.raises(BadInput, match="before anything is removed"):
        applied(folder, tmp_path / "refused", likely, max_perplexity=dense * 0.999)


def test_the_last_attention_stays(folders: dict[str, Path], tmp_path: Path):
    report, run = applied(folders["llama"], tmp_path, blocks=2 * LAYERS - 1)
    assert len(order(report)) == 2 * LAYERS - 1
    assert ModelShape.of(run.draft).num_layers == 1
    with pytest.raises(BadInput, match=r"at most 5 blocks .* leaves"):
        plan(folders["llama"], blocks=2 * LAYERS)
    with pytest.raises(BadInput, match="at most 2 attention blocks"):
        plan(folders["llama"], keep_ratio=0.1, mode="attention")
    assert plan(folders["llama"], blocks=LAYERS, mode="mlp").num_layers == LAYERS


# Racing.


def test_racing_with_extreme_confidence_is_exact(
    folders: dict[str, Path], three_removed: Removed, tmp_path: Path
):
    exact, _ = three_removed("llama")
    options = {"search": "racing", "confidence": 1 - 1e-15}
    raced, _ = applied(folders["llama"], tmp_path / "raced", blocks=3, **options)
    assert_same(order(raced), order(exact))


def test_racing_drops_the_hopeless_and_is_deterministic(
    folders: dict[str, Path], likely: Windows, tmp_path: Path
):
    exact, _ = applied(folders["llama"], tmp_path / "exact", likely, blocks=2)
    options = {"blocks": 2, "search": "racing", "confidence": 0.9}
    raced, _ = applied(folders["llama"], tmp_path / "raced", likely, **options)
    again, _ = applied(folders["llama"], tmp_path / "again", likely, **options)
    assert raced == again
    assert_same(order(raced), order(exact))
    assert [removal["evaluated"] for removal in exact.details["removed"]] == [6 * 40, 5 * 40]
    assert [removal["pairs"] for removal in raced.details["removed"]] == [6 * 40, 5 * 40]
    assert sum(removal["evaluated"] for removal in raced.details["removed"]) < 0.8 * 11 * 40


def test_who_is_out_of_the_race(monkeypatch: pytest.MonkeyPatch):
    """Against Student's interval as scipy gives it for the paired differences."""
    from scipy import stats

    generator = torch.Generator().manual_seed(0)
    rises = torch.randn(6, 10, generator=generator, dtype=torch.float64) + torch.arange(6)[:, None] / 3
    seen = torch.tensor([3, 1, 8, 5])
    best = int(rises[:, seen].mean(1).argmin())
    losses = SimpleNamespace(
        best=lambda alive, seen: best, rises=lambda alive, seen: rises[alive][:, seen], loss=rises
    )
    alive = [index for index in range(6) if index != 1 or best == 1]
    for error in (0.4, 0.2, 0.05):
        expected = []
        for index in alive:
            difference = (rises[index] - rises[best])[seen].numpy()
            scale = stats.sem(difference) * math.sqrt(1 - 4 / 10)
            if index == best or stats.t.ppf(error, 3, difference.mean(), scale) <= 0:
                expected.append(index)
        assert contenders(losses, alive, seen, error) == expected
    assert len(contenders(losses, alive, seen, 0.4)) < len(alive)


# Nested results.


def artefact(report: StepReport, folder: Path, options: dict[str, Any]) -> Path:
    """As much of a result's folder as `order_from` reads."""
    folder.mkdir()
    whole = BlockPruner.Options(**options).model_dump(mode="json")
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
    refused("another search", search="racing")
    refused("is no result of BlockPruner", order_from=folders["llama"])


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
    filled = [layer for layer in cache.layers if layer.is_initialized and layer.keys.numel()]
    assert len(filled) == attention
    expected = logits_without(case, folders[case], removed, WINDOWS.tokens[:2])
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-4)
    sizes, dense = parameters_of(folders[case]), hf.AutoModelForCausalLM.from_pretrained(folders[case])
    gone = sum(sizes[block] for block in removed)
    assert model.num_parameters() == dense.num_parameters() - gone
    assert run.draft.nbytes == Checkpoint.open(folders[case]).nbytes - 4 * gone


def written(run: Run, source: Path, folder: Path) -> Any:
    from compress.artefact import write_model

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


# Refused, planned, and the whole way through.


def plan(folder: Path, **options: Any) -> ModelShape:
    return BlockPruner().plan(ModelShape.of(Checkpoint.open(folder)), BlockPruner.Options(**options))


def test_the_plan_takes_the_smallest_blocks(folders: dict[str, Path], tmp_path: Path):
    def planned_and_done(**options: Any) -> tuple[int, int]:
        _, run = applied(folders["llama"], tmp_path / str(options), **options)
        return plan(folders["llama"], **options).parameters, ModelShape.of(run.draft).parameters

    planned, done = planned_and_done(blocks=3)
    assert planned > done
    planned, done = planned_and_done(blocks=2, mode="mlp")
    assert planned == done
    planned, done = planned_and_done(keep_ratio=0.8)
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
        {"blocks": 1, "keep_ratio": 0.5},
        {"blocks": 0},
        {"keep_ratio": 1.0},
        {"max_perplexity": 1.0},
        {"blocks": 1, "mode": "layers"},
        {"blocks": 1, "confidence": 1.0},
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any]):
    with pytest.raises(ValidationError):
        BlockPruner.Options(**options)
