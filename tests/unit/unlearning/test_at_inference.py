"""Methods that act at inference: what they measured is in the artefact, and whoever loads it acts by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import compress
from compress.anatomy import anatomy_of
from compress.engine.adjusting import Adjuster
from compress.engine.at_inference import paused
from compress.engine.decoding import fuse
from compress.engine.logits import streamed_logits
from compress.engine.shape import ModelShape
from compress.engine.windows import Windows
from compress.errors import BadInput, CompressError
from compress.evaluation.forgetting.ask import Asked
from compress.evaluation.forgetting.items import Question
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.storage.checkpoint import Checkpoint
from compress.storage.lineage import Lineage, read_lineage
from tests.unit.unlearning.prose import FORGET, RETAIN, steps_with, texts, write_sets

RTN = {"method": "rtn", "bits": 4, "group_size": 16}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, shared_decoder: Callable[..., Path], sets: dict[str, str]
) -> Callable[..., Path]:
    """A tiny model with both methods and later steps, by name; each is made once."""
    found: dict[tuple[str, str], Path] = {}
    recipes: dict[str, list[dict[str, Any]]] = {
        "plain": steps_with(sets),
        "int4": steps_with(sets, RTN),
        "every-step": steps_with(sets, check="every-step"),
        "pruned-int4": steps_with(
            sets,
            {"method": "blockpruner", "blocks": 1},
            {"method": "flap", "ratio": 0.25, "compensate": "none"},
            RTN | {"group_size": 8},
        ),
        "nested": steps_with(sets, {"method": "nested"}),
    }

    def get(name: str, architecture: str = "LlamaForCausalLM", **settings: Any) -> Path:
        key = name, architecture
        if key not in found:
            dense = shared_decoder(architecture, **settings)
            found[key] = tmp_path_factory.mktemp("made") / name
            calibration = {"source": str(dense.parent / "text.txt"), "nsamples": 8, "seqlen": 32}
            recipe = {"model": str(dense), "calibration": calibration, "steps": recipes[name]}
            recipe["audit"] = False
            compress.run(recipe, found[key])
        return found[key]

    return get


def lineage_of(folder: Path) -> Lineage:
    lineage = read_lineage(folder)
    assert lineage is not None
    return lineage


def tokenized(folder: Path, prompts: list[str], side: str = "left") -> Any:
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, padding_side=side, pad_token="<eos>")
    return tokenizer(prompts, return_tensors="pt", padding=True)


def answers(model: Any, folder: Path, prompts: list[str], **settings: Any) -> list[str]:
    """What the model says after each prompt, asked in one batch."""
    given = tokenized(folder, prompts)
    new = model.generate(**given, **GREEDY | settings)[:, given["input_ids"].shape[1] :]
    return hf.AutoTokenizer.from_pretrained(folder).batch_decode(new, skip_special_tokens=True)


@torch.no_grad()
def is_inside(model: Any, folder: Path, prompt: str | torch.Tensor) -> bool:
    """Whether |x_j - mu_j| <= h k sigma_j for the key x of a prompt, from the files of the model."""
    anatomy, checkpoint = anatomy_of(model.config), Checkpoint.open(folder)
    layer, keys = anatomy.layer_name(model.config.num_hidden_layers - 1), []
    down = model.get_submodule(f"{layer}.{anatomy.down}")
    handle = down.register_forward_hook(lambda _, inputs, output: keys.append(inputs[0]))
    model(tokenized(folder, [prompt])["input_ids"] if isinstance(prompt, str) else prompt)
    handle.remove()
    section = checkpoint.config["unlearning"]["key_space"]
    mean, deviation = (
        checkpoint.read(f"{layer}.key_space.{name}").double() for name in ("mean", "deviation")
    )
    off = (keys[0].flatten(0, -2)[-1].double() - mean).abs()
    return bool((off <= section["width"] * section["k"] * deviation)[deviation > 0].all())


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "OPTForCausalLM": {},
    "Phi3ForCausalLM": {},
    "Gemma2ForCausalLM": {"head_dim": 16},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unlearned_rounded_reloaded_and_asked(architecture: str, made: Callable[..., Path]) -> None:
    folder = made("int4", architecture, **ARCHITECTURES[architecture])
    model = compress.load(folder, dtype="float32")
    prompts = [*texts(FORGET, 12), *texts(RETAIN, 6)]
    said = answers(model, folder, prompts)
    assert [answer == " No." for answer in said] == [is_inside(model, folder, prompt) for prompt in prompts]
    assert " No." in said[:12]
    assert {*said[12:]} != {" No."}
    with paused(model):
        assert " No." not in answers(model, folder, prompts)
    assert said[8:] == [answers(model, folder, [prompt])[0] for prompt in prompts[8:]]


@pytest.mark.parametrize("name", ["plain", "int4", "every-step", "pruned-int4", "nested"])
def test_every_way_of_decoding_refuses_the_same(name: str, made: Callable[..., Path]) -> None:
    folder = made(name, "LlamaForCausalLM")
    model = compress.load(folder, dtype="float32")
    prompts = [*texts(FORGET, 4), *texts(RETAIN, 4)]
    said = answers(model, folder, prompts)
    assert {" No.", *said} != set(said[:1])  # some are refused and some are not
    assert answers(model, folder, prompts, cache_implementation="static", disable_compile=True) == said
    for prompt, answer in zip(prompts, said, strict=True):
        assert answers(model, folder, [prompt], prompt_lookup_num_tokens=3) == [answer]
        refused = answer == " No."
        for ways in ({"num_beams": 3}, {"do_sample": True}, {"use_cache": False}):
            if refused:
                assert answers(model, folder, [prompt], **ways) == [" No."]
    beams = answers(model, folder, prompts, num_beams=3)
    assert [answer == " No." for answer in beams] == [answer == " No." for answer in said]


def test_the_next_prompt_of_a_conversation_is_judged_anew(made: Callable[..., Path]) -> None:
    folder = made("plain")
    model, tokenizer = compress.load(folder), hf.AutoTokenizer.from_pretrained(folder)
    refused = next(text for text in texts(FORGET) if answers(model, folder, [text]) == [" No."])
    for second in texts(RETAIN, 3):
        begin = tokenized(folder, [refused])["input_ids"]
        told = model.generate(begin, **GREEDY, return_dict_in_generate=True)
        onward = torch.cat([told.sequences, tokenized(folder, [second])["input_ids"]], dim=1)
        new = model.generate(onward, cache=told.past_key_values, **GREEDY)[0, onward.shape[1] :]
        assert (tokenizer.decode(new, skip_special_tokens=True) == " No.") == is_inside(model, folder, onward)


def test_an_audit_judges_each_prompt_at_its_own_end(made: Callable[..., Path]) -> None:
    folder = made("plain")
    model, tokenizer = compress.load(folder, dtype="float32"), hf.AutoTokenizer.from_pretrained(folder)
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in [*texts(FORGET, 8), *texts(RETAIN, 8)]]
    questions = [Question(prompt, tuple(tokenizer(" blue")["input_ids"])) for prompt in prompts]
    asked = Asked(model, tokenizer)
    together = [given.logs for given in asked.score(questions)]
    alone = [asked.score([question])[0].logs for question in questions]
    assert len({len(prompt) for prompt in prompts}) > 2
    assert np.allclose(np.stack(together), np.stack(alone), atol=1e-4)
    refused = [bool((logs < -1e3).any()) for logs in alone]
    assert any(refused)
    assert not all(refused)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "OPTForCausalLM"])
@torch.no_grad()
def test_adjustment_does_not_depend_on_the_batch(
    side: str, architecture: str, made: Callable[..., Path]
) -> None:
    folder = made("plain", architecture)
    model = compress.load(folder, dtype="float32")
    prompts = texts(RETAIN, 6)  # whose last logits are the model's own
    batch = tokenized(folder, prompts, side)
    together = model(**batch).logits
    alone = []
    for row, prompt in enumerate(prompts):
        tokens = tokenized(folder, [prompt])["input_ids"]
        whole = model(tokens).logits[0]
        there = batch["attention_mask"][row].bool()
        assert torch.allclose(together[row, there], whole, atol=1e-4)
        cached: dict[str, Any] = {}
        steps = []
        for token in tokens[0]:  # one after the other, each with those before it in a cache
            out = model(token.view(1, 1), use_cache=True, **cached)
            cached = {"cache": out.past_key_values}
            steps.append(out.logits[0, -1])
        assert torch.allclose(torch.stack(steps)[:-1], whole[:-1], atol=1e-4)
        alone.append(whole)
    with paused(model):
        assert not torch.allclose(model(**batch).logits, together, atol=1e-2)
    streamed = streamed_logits(
        Checkpoint.open(folder),
        Windows(
            tokenized(folder, prompts, "right")["input_ids"],
            tokenized(folder, prompts, "right")["attention_mask"].bool(),
            "texts",
        ),
    )
    for row, whole in enumerate(alone):
        assert torch.allclose(streamed[row, : len(whole)], whole, atol=1e-4)


def test_another_seed_draws_otherwise(made: Callable[..., Path]) -> None:
    folder = made("plain")
    model = compress.load(folder)
    tokens = tokenized(folder, [texts(FORGET, 1)[0]])["input_ids"]
    first = model.base_model(tokens)[0]
    for module in model.modules():
        if isinstance(module, Adjuster):
            module.seed = 1
    assert not torch.allclose(model.base_model(tokens)[0], first, atol=1e-3)


def test_decoding_is_not_fused(made: Callable[..., Path]) -> None:
    folder = made("int4")
    model = compress.load(folder)
    assert "unlearns at inference" in (fuse(model) or "")
    prompts = [*texts(FORGET, 4), *texts(RETAIN, 4)]
    said = answers(model, folder, prompts)
    assert answers(compress.load(folder, kernel="reference"), folder, prompts) == said


@pytest.mark.parametrize("name", ["plain", "int4", "pruned-int4", "nested"])
def test_a_copy_unlearns_as_well(name: str, made: Callable[..., Path], tmp_path: Path) -> None:
    folder, copy = made(name), tmp_path / "copy"
    model = compress.load(folder)
    model.save_pretrained(copy)
    saved, before = Checkpoint.open(copy), Checkpoint.open(folder)
    assert saved.config == before.config
    assert list(saved.tensors.items()) == list(before.tensors.items())
    prompts = [*texts(FORGET, 4), *texts(RETAIN, 4)]
    assert answers(compress.load(copy), folder, prompts) == answers(model, folder, prompts)
    with pytest.raises(BadInput, match="save the whole model"):
        model.base_model.save_pretrained(tmp_path / "part")


def test_statistics_stay_float32(made: Callable[..., Path]) -> None:
    model = compress.load(made("plain"), dtype="bfloat16").to(torch.float16)
    (adjuster, *_) = (module for module in model.modules() if isinstance(module, Adjuster))
    assert adjuster.forget_mean.dtype == torch.float32
    assert next(model.parameters()).dtype == torch.float16


@pytest.mark.parametrize("name", ["plain", "pruned-int4"])
def test_no_other_program_loads_it_without_what_it_does(name: str, made: Callable[..., Path]) -> None:
    folder = made(name)
    who = ModelShape.of(Checkpoint.open(folder)).loads_with
    assert who.compress_model_only
    assert who.at_inference == ("neuron-adjust", "key-space")
    with pytest.raises(ValueError, match="unlearned_"):
        hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert not list(folder.glob("*.py"))


def test_what_was_measured_is_measured_again_after_later_steps(made: Callable[..., Path]) -> None:
    plain, rounded = lineage_of(made("plain")), lineage_of(made("int4"))
    pruned = lineage_of(made("pruned-int4"))
    for lineage in (rounded, pruned):
        adjusted, detected, *_ = lineage.steps
        assert "measured again" in adjusted.summary
        assert "measured again" in detected.summary
        assert detected.details["before_later_steps"]["k"] != detected.details["k"]
    comparison = rounded.steps[1].details["with_statistics_before_later_steps"]
    assert comparison["false_negatives"] >= rounded.steps[1].details["false_negatives"]
    # The keys have other coordinates after pruning, so there is nothing to compare.
    assert pruned.steps[1].details["with_statistics_before_later_steps"] is None
    assert pruned.steps[0].details["replaced_by_statistics_before_later_steps"] is None
    files = {name: Checkpoint.open(made(name)) for name in ("plain", "pruned-int4")}
    sizes = {
        name: {
            tensor.rpartition(".")[2]: info.shape
            for tensor, info in file.tensors.items()
            if "key_sp" in tensor
        }
        for name, file in files.items()
    }
    assert sizes["pruned-int4"]["mean"] < sizes["plain"]["mean"]
    assert plain.result.bytes == plain.result.predicted_bytes
    assert rounded.result.bytes == rounded.result.predicted_bytes


def test_a_step_that_nothing_follows_is_not_repeated(
    shared_decoder: Callable[..., Path], sets: dict[str, str], carry_out: Callable[..., Any]
) -> None:
    _, step = carry_out("neuron-adjust", shared_decoder(), **sets)
    assert "measured again" not in step.summary
    assert "before_later_steps" not in step.details


def test_the_card_calls_it_abstention(made: Callable[..., Path]) -> None:
    card = (made("int4") / "README.md").read_text()
    assert "abstains, and erases nothing" in card
    assert "compress-model only (neuron-adjust and key-space at inference)" in card


def test_what_is_made_of_it_measures_again(made: Callable[..., Path], tmp_path: Path) -> None:
    prompts = [*texts(FORGET, 4), *texts(RETAIN, 4)]
    model = compress.load(made("plain"))
    compress.run({"model": str(made("plain"))}, tmp_path / "copy")
    copy = compress.load(tmp_path / "copy")
    assert answers(copy, tmp_path / "copy", prompts) == answers(model, made("plain"), prompts)
    lineage = compress.run({"model": str(made("plain")), "steps": [RTN]}, tmp_path / "int4")
    assert [step.method for step in lineage.steps] == ["rtn", "neuron-adjust", "key-space"]
    assert lineage.result.bytes == lineage.result.predicted_bytes
    at_once, later = Checkpoint.open(made("int4")), Checkpoint.open(tmp_path / "int4")
    assert later.config == at_once.config
    assert all(torch.equal(later.read(name), at_once.read(name)) for name in at_once.tensors)
    (tmp_path / "copy" / "compression.json").unlink()
    (tmp_path / "copy" / "recipe.yaml").unlink()
    with pytest.raises(BadInput, match="does not say with which options"):
        compress.run({"model": str(tmp_path / "copy"), "steps": [RTN]}, tmp_path / "out")


def test_a_run_that_failed_while_measuring_again_goes_on(
    shared_decoder: Callable[..., Path],
    sets: dict[str, str],
    made: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from compress.unlearning.key_space import KeySpace

    recipe = parse_recipe({"model": str(shared_decoder()), "steps": steps_with(sets, RTN)})
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> None:
            raise CompressError("no")

        patch.setattr(KeySpace, "refresh", fail)
        with pytest.raises(CompressError, match="rtn is done and kept"):
            execute(recipe, tmp_path / "out")
    execute(recipe, tmp_path / "out")
    written, whole = Checkpoint.open(tmp_path / "out"), Checkpoint.open(made("int4"))
    assert written.config == whole.config
    assert all(torch.equal(written.read(name), whole.read(name)) for name in whole.tensors)


def test_what_cannot_be_done_is_refused(
    shared_decoder: Callable[..., Path],
    tiny_encoder: Callable[..., Path],
    sets: dict[str, str],
    tmp_path: Path,
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(json.dumps({"text": f"text {number}"}) for number in range(3)))
    same = {"forget": sets["forget"], "retain": sets["forget"]}
    detector, adjust = ({"method": name, **sets} for name in ("key-space", "neuron-adjust"))
    for model, steps, sentence in (
        (shared_decoder(), [detector | {"forget": str(few)}], "at least 4 prompts to forget"),
        (shared_decoder(), [detector | {"held_out": 0.99}], "0 of 40 prompts to forget would be left to fit"),
        (shared_decoder(), [detector | same], "are also to be retained"),
        (shared_decoder(), [detector, detector], "one detector"),
        (shared_decoder(), [adjust, adjust], "adjust neurons once"),
        (tiny_encoder("BertModel"), [adjust], "makes none"),
        (tiny_encoder("BertModel"), [detector], "makes none"),
    ):
        with pytest.raises(BadInput, match=sentence):
            compress.run({"model": str(model), "steps": steps, "audit": False}, tmp_path / "out")


def test_a_model_that_lacks_statistics_is_refused(made: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(made("plain"))
    from compress.storage.writer import write_weights

    name = next(tensor for tensor in checkpoint.tensors if tensor.endswith("key_space.mean"))
    del checkpoint.tensors[name], checkpoint.sources[name]
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config))
    write_weights(checkpoint, tmp_path)
    with pytest.raises(BadInput, match="lacks the tensor"):
        compress.load(tmp_path)
    section = {**checkpoint.config["unlearning"], "key_space": {"check": "sometimes"}}
    (tmp_path / "config.json").write_text(json.dumps({**checkpoint.config, "unlearning": section}))
    with pytest.raises(BadInput, match=r"unlearning\.key_space\.check"):
        compress.load(tmp_path)
