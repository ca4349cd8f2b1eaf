"""What the anatomy makes of configs: shorter ones, the class of the model, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from compress.anatomy import ROWS, anatomy_of, model_class, sizes_of, without_layers
from compress.errors import BadInput

from .test_anatomy import CASES, GQA, SIZE, WIDE, build, config_of, hooks, same


@pytest.mark.parametrize("removed", [[], [0], [1, 1], (0, 2), {1, 2}])
@pytest.mark.parametrize("case", CASES)
def test_without_layers_is_the_config_of_the_shorter_model(case: str, removed: Any) -> None:
    config = config_of(case)
    kept = [index for index in range(3) if index not in removed]
    shorter = without_layers(config, removed)
    again = type(config).from_dict(shorter.to_dict())
    assert again.to_dict() == shorter.to_dict()
    assert config.to_dict() == config_of(case).to_dict()
    assert (removed != []) or shorter.to_dict() == config.to_dict()
    assert sizes_of(again).num_hidden_layers == len(kept)

    # The shorter model does what the whole one does when the removed layers are skipped.
    model, small = build(config), build(again)
    found = anatomy_of(again)
    state = {}
    for name, tensor in model.state_dict().items():
        for index in range(3):
            if name.startswith(f"{found.layer_name(index)}."):
                tail = name.removeprefix(found.layer_name(index))
                name = f"{found.layer_name(kept.index(index))}{tail}" if index in kept else ""
                break
        state[name] = tensor
    state.pop("", None)
    small.load_state_dict(state)

    def skip(_: nn.Module, inputs: tuple[Tensor, ...], kwargs: dict, output: Any) -> Any:
        hidden = inputs[0] if inputs else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    layers = model.base_model.get_submodule(found.layers)
    tokens = torch.arange(3, 13)[None]
    with torch.no_grad(), hooks(*((layers[index], skip) for index in set(removed))):
        whole = model(tokens, use_cache=False) if found.kind == "decoder" else model(tokens)
    with torch.no_grad():
        assert same(small(tokens).logits, whole.logits)


def test_without_layers_keeps_the_kinds_of_the_layers() -> None:
    types = without_layers(config_of("gemma3_text"), [2]).layer_types
    assert types == ["sliding_attention", "sliding_attention"]
    qwen = without_layers(config_of("qwen2"), [0])
    assert (qwen.layer_types, qwen.max_window_layers) == (["full_attention", "sliding_attention"], 1)


@pytest.mark.parametrize(
    ("removed", "sentence"), [([3], "no layer 3"), ([-1], "no layer -1"), ([0, 1, 2], "keep at least one")]
)
def test_without_layers_refuses(removed: list[int], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        without_layers(config_of("llama"), removed)


def test_layers_that_depend_on_their_index_are_only_removed_from_the_end() -> None:
    config = hf.GPT2Config(**SIZE, scale_attn_by_inverse_layer_idx=True)
    assert without_layers(config, [2]).num_hidden_layers == 2
    with pytest.raises(BadInput, match="scale_attn_by_inverse_layer_idx"):
        without_layers(config, [0])


@pytest.mark.parametrize("config", [hf.MambaConfig(), hf.T5Config(), hf.Gemma3Config()])
def test_unknown_types_are_refused_with_a_sentence(config: Any) -> None:
    for ask in (anatomy_of, sizes_of, lambda config: without_layers(config, [0])):
        with pytest.raises(BadInput) as error:
            ask(config)
        for word in (f"'{config.model_type}'", "llama", "gemma3_text", "mpnet", "compress/anatomy/rows.py"):
            assert word in str(error.value)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (lambda: hf.GPT2Config(**SIZE, add_cross_attention=True), "cross-attention"),
        (lambda: hf.BertConfig(**SIZE, is_decoder=True), "is a decoder"),
        (lambda: hf.LlamaConfig(**GQA, per_layer_config={1: {"intermediate_size": 8}}), "different shapes"),
        (
            lambda: hf.Qwen3Config(**WIDE, per_layer_config={1: {"num_attention_heads": 2}}),
            "different shapes",
        ),
    ],
)
def test_parts_that_no_row_describes_are_refused(config: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        anatomy_of(config())
    with pytest.raises(BadInput, match=sentence):
        sizes_of(config())


@pytest.mark.parametrize("case", CASES)
def test_model_class(case: str) -> None:
    config = config_of(case)
    assert model_class(config) is getattr(hf, CASES[case][0])
    # Names that are not models of this type: another type's, no model at all, remote code, none.
    for name in ("T5ForConditionalGeneration", "PreTrainedModel", "AutoModel", "MyOwnModel", None):
        config.architectures = name and [name]
        if ROWS[config.model_type].kind == "decoder":
            assert model_class(config) is getattr(hf, CASES[case][0])
        else:
            with pytest.raises(BadInput, match=r"set \"architectures\" to the class"):
                model_class(config)
