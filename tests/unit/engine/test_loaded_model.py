"""What programs do with a transformers model, done with one that `compress.load` returns."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import compress
from compress.errors import CompressError
from compress.storage.checkpoint import Checkpoint
from tests.unit.engine.conftest import ARTEFACTS, PACKED

TOKENS = torch.randint(1, 257, (2, 14), generator=torch.Generator().manual_seed(1))
ROUND_INPUTS = ("fp8", "llm-int8", "llm-qat")
"""Linears that round their inputs: a small change of these may change the outputs by more."""


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS)[0].float()


@pytest.fixture
def load(artefact: Callable[..., Path]) -> Callable[..., Any]:
    return lambda name, *args, **settings: compress.load(artefact(name, *args, **settings), dtype="float32")


def through_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize(
    "name", ["int4", "packed-embedding", "nf4-double", "apiq", "llm-qat", "blockpruner-int4"]
)
def test_copies_in_memory(
    name: str, copied: Callable[[Any], Any], load: Callable[..., Any], tmp_path: Path
) -> None:
    model = load(name)
    other = copied(model)
    expected = logits(model)
    assert torch.equal(logits(other), expected)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    assert torch.equal(logits(model), expected)
    other.save_pretrained(tmp_path)  # its own values, not those of the model it was copied from
    assert torch.equal(logits(compress.load(tmp_path)), logits(other))
    assert not torch.equal(logits(other), expected)


@pytest.mark.parametrize("name", ["bitstack", "nested"])
def test_a_copy_of_a_stack_has_a_size_of_its_own(name: str, load: Callable[..., Any]) -> None:
    model = load(name)
    whole, expected = model.resize(None), logits(model)
    other = copy.deepcopy(model)
    assert other.resize(whole * 9 // 10) < whole
    assert not torch.equal(logits(other), expected)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ARTEFACTS)
def test_a_state_dict_holds_the_tensors_of_the_checkpoint_and_can_be_loaded(
    name: str, load: Callable[..., Any], artefact: Callable[..., Path]
) -> None:
    model, stored = load(name), Checkpoint.open(artefact(name))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert all(torch.equal(state[key], stored.read(key)) for key in stored.tensors)
    expected = logits(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.numel() > 64:
                tensor.zero_()
    assert not torch.equal(logits(model), expected)
    model.load_state_dict(state)
    assert torch.equal(logits(model), expected)
    missing = min(state.keys() - {"lm_head.weight"})
    del state[missing]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


@pytest.mark.parametrize("name", ARTEFACTS)
@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_a_cast_leaves_codes_and_scales(cast: str, name: str, load: Callable[..., Any]) -> None:
    model = load(name)
    expected = logits(model)
    packed = {
        key: tensor.clone()
        for key, tensor in model.state_dict().items()
        if "lora" not in key and "norm" not in key
    }
    model = getattr(model, cast)()
    assert model.dtype == (torch.float16 if cast == "half" else torch.bfloat16)
    error = (logits(model) - expected).norm() / expected.norm()
    assert error < (0.3 if name in ROUND_INPUTS else 0.03)
    if name in PACKED:
        for key, tensor in model.state_dict().items():
            if ".layers." in key and key in packed:
                assert tensor.dtype == packed[key].dtype
                assert torch.equal(tensor, packed[key])
    assert next(iter(model.float().parameters())).dtype == torch.float32
    assert (logits(model) - expected).norm() / expected.norm() < (0.3 if name in ROUND_INPUTS else 0.03)


@pytest.mark.filterwarnings("error:.*autograd kernel")
@pytest.mark.parametrize("name", PACKED)
def test_gradients_reach_the_inputs(name: str, load: Callable[..., Any]) -> None:
    linear = load(name).model.layers[0].mlp.down_proj
    inputs = torch.randn(2, 3, 96, requires_grad=True)
    linear(inputs).square().sum().backward()
    weight = torch.cat([linear.dequantize_rows(rows) for rows in linear.row_slices(inputs.device)])
    if name == "apiq":
        weight += linear.scaling * linear.lora_B @ linear.lora_A
    dense = inputs.detach().clone().requires_grad_()
    torch.nn.functional.linear(dense, weight).square().sum().backward()
    assert (inputs.grad - dense.grad).norm() < (0.05 if name in ROUND_INPUTS else 1e-5) * dense.grad.norm()


@pytest.mark.parametrize("name", ["int4", "packed-embedding", "nf4", "mxfp4", "apiq", "nested"])
def test_a_compiled_model_is_one_graph(name: str, load: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    model = load(name, num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(logits(compiled), logits(model), atol=1e-5)


def test_where_shapes_depend_on_values_a_compiled_model_has_several_graphs(load: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    model = load("llm-int8", num_hidden_layers=1)
    assert torch.allclose(logits(torch.compile(model, backend="eager")), logits(model), atol=1e-5)


def trained(model: Any, **settings: Any) -> tuple[Any, list[float]]:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(wanted, lr=1e-2), []
    for _ in range(4):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


@pytest.mark.parametrize("name", PACKED)
def test_peft_trains_an_adapter_on_packed_linears(
    name: str, load: Callable[..., Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model, losses = trained(load(name), target_modules=["q_proj", "down_proj"])
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(name), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert not list(tmp_path.glob("model*"))


def test_peft_knows_conv1d_and_embeddings_that_are_packed(load: Callable[..., Any]) -> None:
    _, losses = trained(load("int4", "GPT2LMHeadModel"), target_modules=["c_attn"])
    assert losses[-1] < losses[0]
    _, losses = trained(load("packed-embedding"), target_modules=["embed_tokens"])
    assert losses[-1] < losses[0]


def test_an_adapter_is_not_merged_into_packed_weights(load: Callable[..., Any], tmp_path: Path) -> None:
    packed = load("int4")
    expected = logits(packed)
    model, _ = trained(packed, target_modules=["q_proj"])
    with pytest.raises(CompressError, match="packed"):
        model.merge_and_unload()
    with pytest.raises(CompressError, match="packed"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(CompressError, match="adapter"):
        packed.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(model.unload()), expected)
    packed.save_pretrained(tmp_path / "copy")


def test_keys_that_are_quantized_take_no_adapter(
    shared_decoder: Callable[..., Path], carry_out: Callable[..., Any]
) -> None:
    folder, _ = carry_out("llm-qat", shared_decoder(), steps=0, kv_bits=8)
    _, losses = trained(compress.load(folder), target_modules=["q_proj"])
    assert losses[-1] < losses[0]
    with pytest.raises(CompressError, match="leave it out of target_modules"):
        trained(compress.load(folder), target_modules=["v_proj"])


def test_what_a_model_says_of_itself(load: Callable[..., Any]) -> None:
    model = load("packed-embedding")
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.config.quantization_config["quant_method"] == "compressed-tensors"
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert model.get_memory_footprint() == held
    weight = model.get_input_embeddings().weight
    assert (tuple(weight.shape), weight.dtype, str(weight.device)) == ((257, 64), torch.float32, "cpu")
    assert model.half().get_output_embeddings().weight.dtype == torch.float16
    assert model.to("meta").lm_head.weight.device.type == "meta"


def test_a_packed_embedding_is_tied_and_cannot_get_more_tokens(load: Callable[..., Any]) -> None:
    model = load("packed-embedding")
    expected = logits(model)
    model.tie_weights()
    model.resize_token_embeddings(257)  # what it has
    with pytest.raises(CompressError, match="packed"):
        model.resize_token_embeddings(300)
    assert model.config.vocab_size == 257
    assert torch.equal(logits(model), expected)


def test_a_pipeline(load: Callable[..., Any], artefact: Callable[..., Path]) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(artefact("int4"))
    generate = hf.pipeline("text-generation", model=load("int4"), tokenizer=tokenizer)
    (said,) = generate("It was the best", max_new_tokens=4, do_sample=False)
    assert said["generated_text"].startswith("It was the best")
