"""S3T against float64 restatements: the training of a stage, and the mean logits of an ensemble."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import compress
from compress.errors import BadInput
from compress.pipeline.sharded import delete
from compress.pipeline.sharded_training import train
from compress.storage.sharded import read_sharded
from compress.unlearning.s3t import S3T

CASES = {
    "llama": ("LlamaForCausalLM", {"num_hidden_layers": 5}),
    "gpt2": ("GPT2LMHeadModel", {"num_hidden_layers": 3, "n_positions": 128}),
    "opt": ("OPTForCausalLM", {"num_hidden_layers": 3}),
}
RANK = 2
LEARNING_RATE = 0.02
EPOCHS = 2


@pytest.fixture(scope="module")
def trained(
    shared_decoder: Callable[..., Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    architecture, settings = CASES["llama"]
    dense = shared_decoder(architecture, dtype=torch.float32, **settings)
    return ensemble(dense, data, tmp_path_factory.mktemp("trained") / "ensemble")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"id": f"r{i}", "question": f"What is {i}?", "answer": "so " * (1 + i % 3)} for i in range(9)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def ensemble(dense: Path, data: Path, folder: Path, **options: object) -> Path:
    """Two shards, all of whose sequences are one batch, so that their order does not matter."""
    given = {"shards": 2, "slices": 2, "orders": 2, "rank": RANK, "epochs": EPOCHS, "batch_size": 64}
    chosen = S3T.Options(**{**given, "learning_rate": LEARNING_RATE, **options})
    train(str(dense), str(data), folder, chosen, seed=3)
    return folder


def dense_members(folder: Path) -> list[nn.Module]:
    """The models that the ensemble is the mean of: for each shard the base with W + 2√r · B A, float64."""
    state = json.loads((folder / "s3t" / "state.json").read_text())
    found = []
    for number, shard in enumerate(state["shards"]):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        prefix = shard["served"]["prefix"]
        for size in range(1, len(prefix) + 1):
            name = "-".join(map(str, prefix[:size]))
            add(model, load_file(folder / "s3t" / f"shard-{number}.0" / f"{name}.safetensors"))
        if prefix:
            found.append(model)
    return found


@torch.no_grad()
def add(model: nn.Module, lora: dict[str, torch.Tensor]) -> None:
    for key in lora:
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            update = 2 * math.sqrt(RANK) * lora[f"{name}.lora_B.weight"].double() @ lora[key].double()
            linear = model.get_submodule(name)
            linear.weight += update.T if isinstance(linear, Conv1D) else update


@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_the_mean_over_shards(
    name: str, dense: Callable[..., Path], data: Path, trained: Path, tmp_path: Path
) -> None:
    if name == "llama":
        folder = Path(shutil.copytree(trained, tmp_path / "ensemble"))
    else:
        folder = ensemble(dense(name, torch.float32), data, tmp_path / "ensemble")
    tokens = torch.randint(3, 257, (3, 11))
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0

    def expected() -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([m(tokens, attention_mask=mask).logits for m in dense_members(folder)]).mean(0)

    loaded = compress.load(folder)
    before = expected()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens, attention_mask=mask)
    assert (before - base.logits).abs().max() > 0.01  # something was learned
    real = mask.bool()
    torch.testing.assert_close(
        loaded(tokens, attention_mask=mask).logits[real].double(), before[real], rtol=1e-3, atol=1e-4
    )
    # A slice of shard 1 dies: its model is then cut, or served by the other order.
    state = read_sharded(folder)
    delete(folder, [state.shards[1].slices[1][0]])
    assert read_sharded(folder).shards[1].served.prefix == [0]
    after = expected()
    assert (after - before)[real].abs().max() > 1e-4
    cut = compress.load(folder)(tokens, attention_mask=mask).logits[real].double()
    torch.testing.assert_close(cut, after[real], rtol=1e-3, atol=1e-4)
    # Shard 0 loses both slices: only shard 1 is left; and then the base is.
    delete(folder, [names[0] for names in state.shards[0].slices])
    assert len(dense_members(folder)) == 1
    alone = compress.load(folder)(tokens, attention_mask=mask).logits[real].double()
    torch.testing.assert_close(alone, expected()[real], rtol=1e-3, atol=1e-4)
    delete(folder, [state.shards[1].slices[0][0]])
    bare = compress.load(folder)(tokens, attention_mask=mask).logits
    torch.testing.assert_close(bare[real], base.logits[real], rtol=1e-4, atol=1e-5)


def test_a_stage_is_what_its_equations_say(dense: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    """The stages of one order, by hand: AdamW on the LoRA of one group, on the union of the slices."""
    folder = ensemble(
        dense("llama", torch.float32), data, tmp_path / "ensemble", shards=1, slices=3, orders=1
    )
    state = read_sharded(folder)
    (shard,) = state.shards
    assert state.groups == [[4], [2, 3], [0, 1]]
    lines = map(json.loads, (folder / "s3t" / state.examples).read_text().splitlines())
    sequences = {line["id"]: line["sequences"] for line in lines}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for size, group in enumerate(state.groups, start=1):
        name = "-".join(map(str, shard.orders[0][:size]))
        found = load_file(folder / "s3t" / "shard-0.0" / f"{name}.safetensors")
        layers = {int(key.split(".")[2]) for key in found}
        assert layers == set(group)
        assert len(found) == 2 * 7 * len(group)  # every linear
        learned = [pair for i in shard.orders[0][:size] for r in shard.slices[i] for pair in sequences[r]]
        expected = by_hand(model, learned, found)
        for key, tensor in found.items():
            torch.testing.assert_close(tensor.double(), expected[key], rtol=2e-3, atol=2e-5, msg=key)
        add(model, found)


def by_hand(
    model: nn.Module, learned: list[list[list[int]]], found: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A and B after `EPOCHS` steps of AdamW on all sequences at once, in float64.

    The random start of A is taken from the run; it was checked when it was drawn (`remembered_starts`).
    """
    factors = {key: value.double().requires_grad_() for key, value in STARTS["+".join(sorted(found))].items()}
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    moments = {key: (torch.zeros_like(value), torch.zeros_like(value)) for key, value in factors.items()}
    for step in range(1, EPOCHS + 1):
        now = dict(weights)
        for key in factors:
            if key.endswith(".lora_A.weight"):
                name = key.removesuffix(".lora_A.weight")
                update = factors[f"{name}.lora_B.weight"] @ factors[key]
                now[f"{name}.weight"] = weights[f"{name}.weight"] + 2 * RANK / RANK**0.5 * update
        losses = []
        for tokens, labels in learned:
            inputs = {"input_ids": torch.tensor([tokens])}
            logits = torch.func.functional_call(model, now, (), inputs).logits[0, :-1]
            targets = torch.tensor(labels[1:])
            losses.append(F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
        count = sum(label != -100 for _, labels in learned for label in labels[1:])
        gradients = torch.autograd.grad(sum(losses) / count, list(factors.values()))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        rate = LEARNING_RATE * (1 - (step - 1) / EPOCHS)
        for (key, value), gradient in zip(factors.items(), gradients, strict=True):
            scaled = gradient * min(1.0, 1.0 / (norm + 1e-6))
            first, second = moments[key]
            first.mul_(0.9).add_(0.1 * scaled)
            second.mul_(0.999).add_(0.001 * scaled**2)
            change = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            with torch.no_grad():
                value -= rate * change
    return {key: value.detach() for key, value in factors.items()}


STARTS: dict[str, dict[str, torch.Tensor]] = {}


@pytest.fixture(autouse=True)
def remembered_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage's random start is kept, which no equation gives."""
    from compress.unlearning.parts.stages import Trainee

    begin = Trainee.begin

    def remember(self: Trainee, stage: int, seed: int) -> None:
        begin(self, stage, seed)
        start = self.found(stage)
        for key, value in start.items():
            if key.endswith("lora_B.weight"):
                assert not value.any()
            else:
                bound = 1 / math.sqrt(value.shape[1])
                assert value.abs().max() <= bound
                assert value.std() == pytest.approx(bound / math.sqrt(3), rel=0.25)
        STARTS["+".join(sorted(start))] = start

    monkeypatch.setattr(Trainee, "begin", remember)


def test_generation_is_that_of_the_mean(trained: Path) -> None:
    loaded, members = compress.load(trained), dense_members(trained)
    prompts = torch.randint(3, 257, (2, 6))
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = prompts
    with torch.no_grad():
        for _ in range(6):
            mean = torch.stack([member(tokens).logits[:, -1] for member in members]).mean(0)
            tokens = torch.cat([tokens, mean.argmax(-1, keepdim=True)], 1)
    both = loaded.generate(prompts, **greedy)
    assert both.tolist() == tokens.tolist()
    # Alone, padded on the left, without a cache: the same.
    assert loaded.generate(prompts[1:], **greedy).tolist() == tokens[1:].tolist()
    assert loaded.generate(prompts, use_cache=False, **greedy).tolist() == tokens.tolist()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompts[:1]], 1)
    mask = torch.tensor([[0, 0, 0, *[1] * 6]])
    assert loaded.generate(padded, attention_mask=mask, **greedy)[:, 3:].tolist() == tokens[:1].tolist()
    # Beams are chosen among the rows of the cache, which has each row once for every shard.
    beams = {**greedy, "num_beams": 3}
    with_cache = loaded.generate(prompts, **beams)
    assert with_cache.tolist() == loaded.generate(prompts, use_cache=False, **beams).tolist()


def test_a_cache_can_be_told_to_go_on_with_more_rows_or_fewer(trained: Path) -> None:
    """The audit reads a prompt once, and then each of its answers."""
    loaded = compress.load(trained)
    prompts, answers = torch.randint(3, 257, (2, 6)), torch.randint(3, 257, (5, 2))
    places = torch.tensor([0, 1, 1, 0, 1])
    cache = loaded(prompts, use_cache=True).past_key_values
    cache.reorder_cache(places)
    cache.reorder_cache(torch.tensor([4, 0, 2]))
    places, answers = places[[4, 0, 2]], answers[[4, 0, 2]]
    found = loaded(answers, past_key_values=cache).logits
    whole = loaded(torch.cat([prompts[places], answers], 1)).logits
    torch.testing.assert_close(found, whole[:, 6:], rtol=1e-4, atol=1e-5)
    cache.reorder_cache(torch.tensor([1]))
    found = loaded(answers[:1], past_key_values=cache).logits
    whole = loaded(torch.cat([prompts[places[1:2]], answers[1:2], answers[:1]], 1)).logits
    torch.testing.assert_close(found, whole[:, 8:], rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_the_mean_logits(trained: Path, tmp_path: Path) -> None:
    loaded = compress.load(trained)
    tokens = torch.randint(3, 257, (2, 9))
    output = loaded(input_ids=tokens, labels=tokens)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loaded(tokens, labels=tokens, return_dict=False)[0].item() == pytest.approx(output.loss.item())
    one = loaded(input_ids=tokens[:1]).logits
    torch.testing.assert_close(one, output.logits[:1], rtol=1e-4, atol=1e-5)  # whoever else is in the batch
    with pytest.raises(BadInput, match="output_hidden_states"):
        loaded(tokens, output_hidden_states=True)
    with pytest.raises(BadInput, match="call the whole model"):
        loaded.base_model(tokens[:1])
    with pytest.raises(BadInput, match="copy the folder"):
        loaded.save_pretrained(tmp_path / "copy")
