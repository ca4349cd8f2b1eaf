"""Decoding in one native call for all layers gives what the layers themselves give, or leaves it to them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import compress
from compress.anatomy import ROWS, anatomy_of
from compress.engine import decoder_state
from compress.engine.decoding import MOST_ROWS, Fusion, fuse
from compress.kernels.cpu.library import library, use

WINDOW = {"sliding_window": 8}
GEMMA = {**WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16}
HALF_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralForCausalLM", {**WINDOW, "head_dim": 24}),
    "qwen2": ("Qwen2ForCausalLM", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", GEMMA),
    "gemma3_text": ("Gemma3ForCausalLM", GEMMA | HALF_SLIDING),
    "phi3": ("Phi3ForCausalLM", {}),
    "opt": ("OPTForCausalLM", {}),
    "opt, post-norm": ("OPTForCausalLM", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "llama, wide": ("LlamaForCausalLM", {"intermediate_size": 128}),
    "gpt_neox": ("GPTNeoXForCausalLM", {"hidden_act": "gelu_fast"}),
    "gpt_neox, sequential": ("GPTNeoXForCausalLM", {"use_parallel_residual": False}),
}
PROMPT = torch.arange(13)[None] % 5 + 40
PADDED = torch.stack([torch.arange(13) % 7 + 50, torch.tensor([0] * 4 + list(range(60, 69)))])
GREEDY: dict[str, Any] = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def native_kernels() -> Iterator[None]:
    use("auto")
    if library() is None:
        pytest.skip("no compiler")
    yield
    use("auto")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every native step."""
    seen: list[int] = []
    decode = decoder_state.native.decode

    def counted(library: Any, plan: Any, step: Any) -> None:
        seen.append(step.rows)
        decode(library, plan, step)

    monkeypatch.setattr(decoder_state.native, "decode", counted)
    return seen


@pytest.fixture
def packed(artefact: Callable[..., Path]) -> Callable[..., Any]:
    """A tiny model of one of the `DECODERS`, packed at 4 bits; ``plain`` does not let it decode natively."""

    def load(case: str = "llama", dtype: str = "float32", plain: bool = False, name: str = "int4") -> Any:
        architecture, settings = DECODERS[case]
        model = compress.load(
            artefact(name, architecture, **{"num_hidden_layers": 2, **settings}), dtype=dtype
        )
        return unfused(model) if plain else model

    return load


def runner_of(model: Any) -> Any:
    return model.base_model.get_submodule(anatomy_of(model.config).layers.rpartition(".")[0])


def unfused(model: Any) -> Any:
    runner = runner_of(model)
    for hooks in (runner._forward_hooks, runner._forward_pre_hooks):
        for key in [
            key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Fusion)
        ]:
            del hooks[key]
    return model


def mask_of(tokens: Tensor) -> Tensor:
    return (tokens != 0).long()


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor, count: int = 6) -> Tensor:
    """The logits of ``count`` given tokens behind a prompt, one step each: [count, B, V]."""
    mask, found = mask_of(tokens), []
    output = model(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0), use_cache=True)
    for number in range(count):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        output = model(
            torch.full((len(mask), 1), 70 + number),
            attention_mask=mask,
            position_ids=mask.cumsum(1)[:, -1:] - 1,
            use_cache=True,
            **cache_in(output),
        )
        found.append(output.logits[:, -1].float())
    return torch.stack(found)


def cache_in(output: Any) -> dict[str, Any]:
    name = "cache" if "cache" in output.keys() else "past_key_values"  # noqa: SIM118  (it is no dict)
    return {name: output[name]}


def generate(model: Any, tokens: Tensor = PROMPT, **settings: Any) -> Tensor:
    return model.generate(tokens, attention_mask=mask_of(tokens), **GREEDY | settings)


def test_every_decoder_of_the_table_is_tried() -> None:
    decoders = {name for name, row in ROWS.items() if row.kind == "decoder"}
    assert {case.partition(",")[0] for case in DECODERS} == decoders


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", DECODERS)
def test_logits_and_text_are_those_of_the_layers(
    case: str, dtype: str, packed: Callable[..., Any], steps: list[int]
) -> None:
    model, plain = packed(case, dtype), packed(case, dtype, plain=True)
    for tokens in (PROMPT, PADDED):
        found, wanted = logits_of(model, tokens), logits_of(plain, tokens)
        error = 1e-4 if dtype == "float32" else 0.05  # of their spread
        torch.testing.assert_close(found, wanted, rtol=0, atol=error * float(wanted.std()))
        assert steps == [len(tokens)] * 6
        steps.clear()
        if dtype == "float32":  # else random logits that are all but equal change places
            assert torch.equal(generate(model, tokens), generate(plain, tokens))
            assert len(steps) == GREEDY["max_new_tokens"] - 1
            steps.clear()


@pytest.mark.parametrize("case", ["llama", "gemma2", "gemma3_text", "opt"])
def test_every_way_to_generate(case: str, packed: Callable[..., Any], steps: list[int]) -> None:
    model, plain = packed(case), packed(case, plain=True)
    ways: dict[str, Any] = {
        "beams": {"num_beams": 3},
        "look-up": {"prompt_lookup_num_tokens": 3},
        "several": {"num_beams": 4, "num_return_sequences": 2},
    }
    for way, settings in ways.items():
        assert torch.equal(generate(model, **settings), generate(plain, **settings)), way
        assert steps or way == "look-up"
        steps.clear()
    assert torch.equal(generate(model, assistant_model=plain), generate(plain))
    assert torch.equal(generate(plain, assistant_model=model), generate(plain))
    steps.clear()
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(generate(model, **static), generate(plain, **static))
    assert not steps


@pytest.mark.parametrize("name", ["flap", "blockpruner", "blockpruner-int4", "replaceme"])
def test_pruned_layers(name: str, artefact: Callable[..., Path], steps: list[int]) -> None:
    for case in ("llama", "opt", "opt, post-norm", "gpt_neox", "gemma2"):
        if name == "replaceme" and case in ("opt, post-norm", "gemma2"):
            continue  # it folds a map into the last projection, which a norm follows here
        architecture, settings = DECODERS[case]
        folder = artefact(name, architecture, **{**settings, "num_hidden_layers": 3})
        model, plain = compress.load(folder), unfused(compress.load(folder))
        for tokens in (PROMPT, PADDED):
            torch.testing.assert_close(logits_of(model, tokens), logits_of(plain, tokens), rtol=0, atol=1e-3)
            assert steps == [len(tokens)] * 6
            steps.clear()


@pytest.mark.parametrize(
    "name", ["int4-asymmetric", "int8", "packed-embedding", "gptq", "mxfp4", "nvfp4", "nf4"]
)
def test_every_packed_linear(name: str, packed: Callable[..., Any], steps: list[int]) -> None:
    model, plain = (packed("llama, wide", name=name, plain=plain) for plain in (False, True))
    torch.testing.assert_close(logits_of(model, PADDED), logits_of(plain, PADDED), rtol=0, atol=1e-3)
    assert steps


def test_dense_models(shared_decoder: Callable[..., Path], steps: list[int]) -> None:
    for case in ("llama", "gpt2"):
        architecture, settings = DECODERS[case]
        model = compress.load(shared_decoder(architecture, **settings))
        plain = hf.AutoModelForCausalLM.from_pretrained(shared_decoder(architecture, **settings)).eval()
        torch.testing.assert_close(logits_of(model, PADDED), logits_of(plain, PADDED), rtol=0, atol=1e-3)
        assert steps
        assert model(PROMPT[:, :1], use_cache=True).logits.grad_fn is None
        steps.clear()


def test_copies_decode_with_their_own_weights(packed: Callable[..., Any], steps: list[int]) -> None:
    model = packed()
    wanted = logits_of(model, PROMPT)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        steps.clear()
        assert torch.equal(logits_of(other, PROMPT), wanted)
        assert steps
        other.model.layers[1].input_layernorm.weight.data *= 2
        assert not torch.equal(logits_of(other, PROMPT), wanted)
    assert torch.equal(logits_of(model, PROMPT), wanted)


def change_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm.weight.data = 2 * model.model.layers[0].input_layernorm.weight.data


def change_parameter(model: Any) -> None:
    norm = model.model.layers[0].input_layernorm
    norm.weight = nn.Parameter(2 * norm.weight.detach())


def change_packed(model: Any) -> None:
    linear = model.model.layers[0].mlp.up_proj
    linear.scales = 2 * linear.scales


def change_linear(model: Any) -> None:
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 96)


def change_dtype(model: Any) -> None:
    model.bfloat16().float()


def drop_layer(model: Any) -> None:
    del model.model.layers[1]
    model.config.num_hidden_layers = 1


CHANGES = [change_norm, change_parameter, change_packed, change_linear, change_dtype, drop_layer]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_two_steps_count(
    change: Callable[[Any], None], packed: Callable[..., Any], steps: list[int]
) -> None:
    model = packed()
    before = logits_of(model, PROMPT)
    torch.manual_seed(1)
    change(model)
    steps.clear()
    found = logits_of(model, PROMPT)
    assert steps
    torch.testing.assert_close(found, logits_of(unfused(model), PROMPT), rtol=0, atol=1e-4)
    assert not torch.equal(found, before)


def test_hooks_on_layers_run(packed: Callable[..., Any], steps: list[int]) -> None:
    model = packed()
    before = logits_of(model, PROMPT)
    for path in ("model.layers.1", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.act_fn"):
        steps.clear()
        hook = model.get_submodule(path).register_forward_hook(lambda *parts: 2 * parts[-1])
        assert not torch.allclose(logits_of(model, PROMPT), before)
        hook.remove()
        assert not steps
        assert torch.equal(logits_of(model, PROMPT), before)
        assert steps


def test_states_between_layers_can_be_asked_for(packed: Callable[..., Any], steps: list[int]) -> None:
    model = packed()
    with torch.no_grad():
        cached = cache_in(model(PROMPT, use_cache=True))
        states = model(PROMPT[:, :1], **cached, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert not torch.equal(states[0], states[1])
    assert not steps
    assert torch.equal(
        generate(model), generate(packed(plain=True))
    )  # with the hooks that this has left behind
    assert steps


def test_gradients_flow(packed: Callable[..., Any], steps: list[int]) -> None:
    model = packed()
    cached = cache_in(model(PROMPT, use_cache=True))
    inputs = torch.randn(1, 1, 64, requires_grad=True)
    model(inputs_embeds=inputs, use_cache=True, **cached).logits.sum().backward()
    assert inputs.grad is not None
    assert not steps


def test_an_adapter_on_top(packed: Callable[..., Any], steps: list[int]) -> None:
    peft = pytest.importorskip("peft")
    model = packed()
    before = logits_of(model, PROMPT)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    steps.clear()
    assert not torch.allclose(logits_of(adapted.eval(), PROMPT), before)
    assert not steps


def test_threads_that_share_a_model(packed: Callable[..., Any]) -> None:
    model = packed()
    wanted = [generate(model, prompt) for prompt in (PROMPT, PADDED[:1], PROMPT + 3)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            found = pool.map(lambda prompt: generate(model, prompt), (PROMPT, PADDED[:1], PROMPT + 3))
            assert all(map(torch.equal, found, wanted))


def test_an_error_in_a_step_leaves_the_layers(
    packed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed()
    wanted = generate(model)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(decoder_state.native, "decode", fail)
        with pytest.raises(KeyboardInterrupt):
            generate(model)
    assert list(runner_of(model).layers) == list(model.model._modules["layers"])
    assert torch.equal(generate(model), wanted)


def test_large_batches_and_training_are_left_to_the_layers(
    packed: Callable[..., Any], steps: list[int]
) -> None:
    model = packed()
    rows = PROMPT.expand(MOST_ROWS + 1, -1)
    assert torch.equal(generate(model, rows), generate(packed(plain=True), rows))
    generate(model.train())
    assert not steps


def test_compiled_models(packed: Callable[..., Any]) -> None:
    model = packed()
    wanted = logits_of(model, PROMPT, 2)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits_of(compiled, PROMPT, 2), wanted, rtol=0, atol=1e-3)


def test_why_models_are_not_fused(
    packed: Callable[..., Any],
    shared_decoder: Callable[..., Path],
    tiny_encoder: Callable[..., Path],
    artefact: Callable[..., Path],
) -> None:
    model = packed()
    assert fuse(model) is None
    assert "BertForMaskedLM" in str(type(encoder := compress.load(tiny_encoder("BertForMaskedLM"))))
    assert fuse(encoder) == "Models of type bert do not decode."
    assert "(AdaptedLinear)" in str(fuse(packed(name="apiq")))
    assert fuse(packed(name="llm-qat")) == "The model quantizes its keys and values."
    silly = compress.load(shared_decoder(hidden_act="mish"))
    assert fuse(silly) == "There is no native activation 'MishActivation'."
    use("reference")
    assert fuse(packed()) is None  # load chooses the kernel again
    use("reference")
    assert fuse(silly) == "There are no native kernels."


def test_models_are_fused_once(packed: Callable[..., Any]) -> None:
    model = packed()
    fuse(model)
    assert len(runner_of(model)._forward_hooks) == 1


def test_saved_models_do_not_know_of_it(
    packed: Callable[..., Any], tmp_path: Path, artefact: Callable[..., Path]
) -> None:
    model = packed()
    wanted = generate(model)
    model.save_pretrained(tmp_path / "copy")
    assert torch.equal(generate(compress.load(tmp_path / "copy", dtype="float32")), wanted)


def test_resized_models(artefact: Callable[..., Path], steps: list[int]) -> None:
    model = compress.load(artefact("nested"), dtype="float32")
    plain = unfused(compress.load(artefact("nested"), dtype="float32"))
    for memory in (None, int(0.95 * model.resize(None))):
        assert model.resize(memory) == plain.resize(memory)
        torch.testing.assert_close(logits_of(model, PROMPT), logits_of(plain, PROMPT), rtol=0, atol=1e-3)


@torch.no_grad()
def test_a_cache_goes_on_in_another_dtype(shared_decoder: Callable[..., Path], steps: list[int]) -> None:
    found = []
    for prepare in (unfused, lambda model: model):
        model = prepare(compress.load(shared_decoder(), dtype="bfloat16"))
        output = model(PROMPT, use_cache=True)
        output = model(PROMPT[:, :1], use_cache=True, **cache_in(output))
        model.float()
        for _ in range(3):
            output = model(PROMPT[:, :1], use_cache=True, **cache_in(output))
        found.append(output.logits)
    assert steps == [1, 1, 1]  # not the one that moves the cache
    assert (found[1] - found[0]).abs().max() < 0.02 * found[0].abs().max()
