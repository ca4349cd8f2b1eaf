"""Checkpoint formats: what is planned is what is written, and what is written reads back."""

from __future__ import annotations

import pytest
import torch

from compress.errors import BadInput
from compress.kernels.codes.integer import quantize_weight
from compress.kernels.codes.packing import BITS
from compress.storage.formats.compressed_tensors import CompressedTensorsFormat
from compress.storage.formats.gptq import GPTQFormat
from compress.storage.formats.loaders import COMPRESS_MODEL_ONLY, LoadsWith, loads_with
from compress.storage.formats.table import format_of
from compress.storage.tensors import DTYPE_NAMES, TensorInfo

NAME = "model.layers.0.mlp.up_proj"
FORMS = [
    form(bits, group_size, symmetric)
    for form in (CompressedTensorsFormat, GPTQFormat)
    for bits in form.widths
    for group_size in (32, -1)
    for symmetric in (True, False)
]


def identity(form) -> str:
    return f"{form.name}-{form.bits}-{form.group_size}-{'symmetric' if form.symmetric else 'asymmetric'}"


def quantized(form, out: int = 64, width: int = 96, dtype: torch.dtype = torch.bfloat16):
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(0))
    weight[3] = weight[3].abs()  # an asymmetric zero point of 0
    return quantize_weight(
        weight, form.bits, form.group_size, form.symmetric, form.scale_dtype(dtype), "up_proj"
    )


@pytest.mark.parametrize("form", FORMS, ids=identity)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_infos_foretell_the_tensors_and_reading_gives_them_back(form, dtype):
    weight = quantized(form, dtype=dtype)
    tensors = form.tensors(NAME, weight)
    written = {name: TensorInfo(DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    assert written == form.tensor_infos(NAME, weight.shape, DTYPE_NAMES[dtype])
    assert f"{NAME}.{form.marker}" in tensors
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert form.read(NAME, tensors.__getitem__).same_as(weight)


@pytest.mark.parametrize("form", FORMS, ids=identity)
def test_config_declares_the_format(form):
    again = format_of(form.quantization_config([NAME], [], ["lm_head"]))
    assert vars(again) == vars(form)
    assert type(again) is type(form)


@pytest.mark.parametrize("out", [1, 5, 33])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_store_any_shape(bits, symmetric, out):
    form = CompressedTensorsFormat(bits, -1, symmetric)
    weight = quantize_weight(torch.randn(out, 37), bits, -1, symmetric, torch.bfloat16)
    tensors = form.tensors(NAME, weight)
    assert form.read(NAME, tensors.__getitem__).same_as(weight)


@pytest.mark.parametrize(
    ("bits", "shape", "message"),
    [
        (3, (64, 48), "multiples of 32, and the input dimension of .* is 48"),
        (4, (60, 64), "multiples of 8, and the output dimension of .* is 60"),
        (2, (64, 24), "multiples of 16, and the input dimension of .* is 24"),
    ],
)
def test_gptq_refuses_shapes_it_cannot_store(bits, shape, message):
    form = GPTQFormat(bits, -1, True)
    with pytest.raises(BadInput, match=message):
        form.tensor_infos(NAME, shape, "BF16")
    with pytest.raises(BadInput, match=message):
        form.tensors(NAME, quantize_weight(torch.randn(shape), bits, -1, True, torch.float16))


def test_gptq_is_version_1_when_symmetric_and_version_2_when_not():
    assert GPTQFormat(4, 32, True).quantization_config([NAME])["checkpoint_format"] == "gptq"
    assert GPTQFormat(4, 32, False).quantization_config([NAME])["checkpoint_format"] == "gptq_v2"


def test_groups_that_are_not_there_are_refused():
    form = GPTQFormat(4, 32, True)
    tensors = form.tensors(NAME, quantized(form))
    tensors[f"{NAME}.g_idx"] = tensors[f"{NAME}.g_idx"] + 1
    with pytest.raises(BadInput, match="names groups that"):
        form.read(NAME, tensors.__getitem__)


@pytest.mark.parametrize(
    "form", [CompressedTensorsFormat(4, 32, False), GPTQFormat(4, 32, False)], ids=identity
)
def test_tensors_that_do_not_fit_together_are_refused(form):
    tensors = form.tensors(NAME, quantized(form))
    leaf = "weight_zero_point" if form.name == "compressed-tensors" else "qzeros"
    tensors[f"{NAME}.{leaf}"] = tensors[f"{NAME}.{leaf}"][:1]
    with pytest.raises(BadInput, match=leaf):
        form.read(NAME, tensors.__getitem__)


def test_a_weight_of_another_kind_is_not_written():
    with pytest.raises(ValueError, match="was given"):
        GPTQFormat(4, 32, True).tensors(NAME, quantized(GPTQFormat(4, 32, False)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "quip"}, "'quip', which cannot be read"),
        ({}, "'None'"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {
                            "num_bits": 4,
                            "group_size": 32,
                            "strategy": "group",
                            "actorder": "group",
                        },
                    }
                },
            },
            "activation order 'group'",
        ),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "gptq", "bits": 5}, "5 bits"),
    ],
)
def test_other_quantizations_are_refused(config, message):
    with pytest.raises(BadInput, match=message):
        format_of(config)


def test_who_can_load_it():
    def said(form, **kwargs) -> str:
        return str(loads_with(form.quantization_config([NAME]), **kwargs))

    assert said(CompressedTensorsFormat(4, 32, True)) == "transformers with compressed-tensors"
    assert said(CompressedTensorsFormat(4, 32, False)) == "transformers with compressed-tensors"
    assert said(GPTQFormat(3, 32, True)) == "transformers with optimum and gptqmodel"
    assert "GPU" in said(GPTQFormat(4, -1, True))
    assert said(GPTQFormat(4, 32, True), conv1d=True) == "gptqmodel"
    assert said(CompressedTensorsFormat(4, 32, True), conv1d=True) == "compress-model only"


@pytest.mark.parametrize(
    ("who", "sentence"),
    [
        (LoadsWith(), "transformers"),
        (COMPRESS_MODEL_ONLY, "compress-model only"),
        (LoadsWith(False, adapter=True, key_value_bits=4), "compress-model only"),
        (LoadsWith(False, ("gptqmodel",), adapter=True), "gptqmodel, and peft for the adapter"),
        (LoadsWith(trust_remote_code=True), "transformers (trust_remote_code=True)"),
        (
            LoadsWith(packages=("compressed-tensors",), trust_remote_code=True, adapter=True),
            "transformers with compressed-tensors (trust_remote_code=True), and peft for the adapter",
        ),
        (
            LoadsWith(packages=("optimum", "gptqmodel"), where="on a GPU", key_value_bits=4),
            "transformers with optimum and gptqmodel on a GPU "
            "(4-bit keys and values with compress-model only)",
        ),
    ],
)
def test_who_can_load_it_in_words(who: LoadsWith, sentence: str) -> None:
    assert str(who) == sentence
    assert who.compress_model_only == (sentence == "compress-model only")
