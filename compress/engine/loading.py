"""``compress.load``: any model folder as an ordinary transformers model."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from compress.anatomy import anatomy_of
from compress.anatomy import weight as weight_of
from compress.engine.config import UNLEARNING, config_of
from compress.engine.decoding import Fusion, fuse, fusion_of
from compress.engine.ensemble import join
from compress.engine.opening import open_checkpoint
from compress.engine.saving import QUANTIZATION, Save
from compress.engine.skeleton import skeleton
from compress.engine.weights import Weights
from compress.errors import BadInput
from compress.kernels.codes.integer import CHANNEL, quantize_weight
from compress.kernels.codes.packing import BITS
from compress.kernels.cpu.library import AUTO, REFERENCE, use
from compress.kernels.layers.base import LowBitLinear
from compress.kernels.layers.embedding import PackedEmbedding
from compress.kernels.layers.linear import PackedLinear, TokenQuantizedLinear
from compress.kernels.layers.stacked import StackedLinear
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.stacks import counts_after, prefix, sizes, stack_of, steps_within
from compress.storage.sharded import is_sharded, read_served, read_sharded
from compress.storage.tensors import DTYPE_NAMES
from compress.system.device import check_device
from compress.system.memory import parse_memory

HEAD_GROUP, SMALLEST_GROUP = 64, 16
"""Inputs that share a scale in a head that is rounded at loading; below the latter a whole row shares one."""


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    memory: str | int | None = None,
    *,
    kernel: str = AUTO,
    activation_bits: int = 16,
    head_bits: int | None = None,
) -> PreTrainedModel:
    """Load a model folder, quantized or not, ready for ``generate``.

    Packed linears stay packed and run through the kernels of this package, without a dequantized copy.

    Args:
        path: a folder written by compress-model, or any Hugging Face folder of a supported architecture.
        device: such as "cpu" or "cuda:0".
        dtype: of activations and of the weights that are not packed; None takes the one in config.json.
        memory: the largest size of the whole model, such as "90MB" or a number of bytes, for a model that is
            stored in blocks (bitstack, nested): as many blocks are read as fit. None reads all blocks.
        kernel: what multiplies with packed weights on a CPU, in this process from now on: ``auto`` (the
            fastest that works), ``reference`` (plain torch), ``cpu``, or ``cpu:`` and a path, such as
            ``cpu:avx2``; ``compress-model doctor`` lists those of a machine.
        activation_bits: 8 lets the native kernels round inputs of packed linears to 8 bits, with one scale
            for each group of the weight; 16 keeps them as they are.
        head_bits: round the head, if it is stored dense, to so many bits; and with it the token embedding,
            if they are one table. The head is half the work of a small model at every new token. Such a
            model cannot be saved.

    Returns:
        The transformers model in evaluation mode. Its ``config`` has the quantization section of config.json.
        Its ``save_pretrained`` and ``push_to_hub`` write it as it is stored (see `Save`). What S3T trained is
        an ensemble, whose logits are the mean over the shards (see `join`). A model stored in
        blocks has a function ``resize`` (see `Resize`).

    Raises:
        BadInput: the folder is not a model, its files are damaged, the anatomy table does not know its
            architecture, no size of the model fits into ``memory``, or there is no such kernel or device
            here.
        CompressError: a kernel that was asked for by name cannot be compiled.
    """
    use(kernel)
    check_device(device)
    whole = checkpoint = open_checkpoint(path)
    dtype = _dtype(dtype or config_of(whole).dtype or torch.float32)
    if memory is not None:
        checkpoint = prefix(whole, steps_within(whole, parse_memory(memory), dtype))
    model = assemble(checkpoint, device, dtype)
    if head_bits is not None:
        pack_head(model, head_bits)
    round_activations(model, activation_bits)
    model.config._name_or_path = model.name_or_path = str(path)
    if (Path(path) / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(path)
    if (quantization := checkpoint.config.get(QUANTIZATION)) is not None:
        setattr(model.config, QUANTIZATION, quantization)
    if is_sharded(whole.config):
        state = read_sharded(Path(path))
        join(model, read_served(Path(path), state), state.scaling)
    elif kernel != REFERENCE:
        fuse(model)
    linears = [module for module in model.modules() if isinstance(module, StackedLinear)]
    if linears:
        object.__setattr__(model, "resize", Resize(whole, linears, dtype, model.config, fusion_of(model)))
    changed = {"pruned", UNLEARNING} & checkpoint.config.keys()
    if quantization is not None or head_bits is not None or changed:
        weights = Weights(whole, model, device, dtype)
        for part in {model, model.base_model}:  # one of them in a model without a head
            assert isinstance(part, PreTrainedModel)
            object.__setattr__(part, "save_pretrained", Save(part, weights, whole=part is model))
    return model


def assemble(
    checkpoint: Checkpoint, device: str = "cpu", dtype: str | torch.dtype | None = None
) -> PreTrainedModel:
    """The whole model of an open checkpoint in memory. Arguments, result and errors are those of `load`."""
    config = config_of(checkpoint)
    dtype = _dtype(dtype or config.dtype or torch.float32)  # before the skeleton, which sets its own
    model = skeleton(config, device)
    weights = Weights(checkpoint, model, device, dtype)
    weights.fill(model, "")
    model.config.dtype = weights.dtype
    _forget_packed_ties(model)
    return model


def pack_head(model: PreTrainedModel, bits: int) -> None:
    """Round the head of a loaded model to the nearest of 2^bits levels in groups of at most 64 inputs.

    Nothing happens if it is packed already. If the token embedding is the same table, it is packed with it.

    Raises:
        BadInput: the model has no head, or the head cannot have so many bits.
    """
    path = anatomy_of(model.config).head
    if path is None or bits not in BITS:
        raise BadInput(
            "This model has no head to round." if path is None else f"A head has 2 to 8 bits, not {bits}."
        )
    head = model.get_submodule(path)
    if isinstance(head, LowBitLinear):
        return
    weight = weight_of(head)
    group = math.gcd(weight.shape[1], HEAD_GROUP)
    group = group if group >= SMALLEST_GROUP else CHANNEL
    bias = head.bias if isinstance(head.bias, torch.Tensor) else None
    packed = PackedLinear.from_quantized(
        quantize_weight(weight, bits, group, False, torch.float16, path), bias
    ).to(dtype=weight.dtype)
    packed.arrange()
    embedding = model.get_input_embeddings()
    if embedding.weight is head.weight:
        scale = getattr(embedding, "embed_scale", None)
        model.set_input_embeddings(PackedEmbedding(packed, weight.dtype, scale))
    model.set_submodule(path, packed)
    _forget_packed_ties(model)


def round_activations(model: nn.Module, bits: int) -> None:
    """Let the native kernels of integer weights round inputs to ``bits`` bits: 8, or 16 for not at all.

    Linears that round their inputs anyway, as they were trained, stay as they are.

    Raises:
        BadInput: another number.
    """
    if bits not in (8, 16):
        raise BadInput(f"Inputs can have 8 or 16 bits, not {bits}.")
    for module in model.modules():
        if isinstance(module, PackedLinear) and not isinstance(module, TokenQuantizedLinear):
            module.activations = "int8-block" if bits == 8 else "floating"


def _forget_packed_ties(model: PreTrainedModel) -> None:
    """Take packed heads out of the list of tied parameters: each is one module with its embedding, and has no
    parameter that ``tie_weights`` could tie."""
    modules = model.named_modules(remove_duplicate=False)
    packed = {f"{name}.weight" for name, module in modules if isinstance(module, LowBitLinear)}
    for kind in ("_tied_weights_keys", "all_tied_weights_keys"):
        tied = getattr(model, kind) or {}
        setattr(model, kind, {name: source for name, source in tied.items() if name not in packed})


class Resize:
    """``model.resize("120MB")``: give a running model more of its blocks, or take some away.

    Blocks that are dropped leave memory at once. Blocks that are added are read from the files the model was
    loaded from. All others stay as they are.

    Args:
        checkpoint: with all blocks.
        linears: the linears of the model that have blocks.
        dtype: of the weights that are not packed, which count too.
        config: of the model. Its quantization section says which blocks there are.
        fusion: of the model, if it decodes natively.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        linears: list[StackedLinear],
        dtype: torch.dtype,
        config: PretrainedConfig,
        fusion: Fusion | None = None,
    ) -> None:
        self._fusion = fusion
        self._checkpoint, self._linears, self._dtype, self._config = checkpoint, linears, dtype, config

    def __call__(self, memory: str | int | None) -> int:
        """Give the model as many blocks as fit.

        Args:
            memory: the largest size of the whole model, as in `load`; None gives it all blocks.

        Returns:
            The bytes that the model takes now.

        Raises:
            BadInput: not even its smallest size fits; the model stays as it was.
        """
        wanted = None if memory is None else parse_memory(memory)
        steps = steps_within(self._checkpoint, wanted, self._dtype)
        counts = counts_after(self._checkpoint, steps)
        form = stack_of(self._checkpoint)
        if self._fusion is not None:
            self._fusion.forget()
        # Blocks are dropped first, so that the model never takes more than the larger of both sizes.
        for linear in self._linears:
            del linear.blocks[counts[linear.stored] :]
        for linear in self._linears:
            there, count = len(linear.blocks), counts[linear.stored]
            if there < count:
                linear.add(form.read(linear.stored, self._checkpoint, there, count))
        setattr(self._config, QUANTIZATION, prefix(self._checkpoint, steps).config[QUANTIZATION])
        return sizes(self._checkpoint, self._dtype)[steps]


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in DTYPE_NAMES or not found.is_floating_point or found.itemsize < 2:
        raise BadInput(f"'{dtype}' is not a floating-point dtype; use float32, bfloat16 or float16.")
    return found
