"""Remove attention heads and MLP neurons, which makes layers narrower.

The unit of attention is a key-value head with all query heads of its group, so grouped-query attention keeps
its structure. Layers may end up with different widths, and a block that loses all its units is gone. If all
layers have the same widths and the config.json of the architecture can express them, the result is the plain
architecture; otherwise it carries its own modelling code (compress/engine/pruned.py).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from compress.anatomy import (
    Anatomy,
    LayerShape,
    anatomy_of,
    layer_shapes,
    projection_rows,
    set_weight,
    sizes_of,
    weight,
)
from compress.engine.checks import all_finite
from compress.engine.config import config_of
from compress.engine.pruned import put, reshape_layer, without
from compress.engine.pruned_config import mark_pruned
from compress.engine.shape import ModelShape
from compress.engine.stream import Layer, StreamedModel
from compress.errors import BadInput, CompressError
from compress.pruning.parts.depth import plan_without_layers, remove_layers
from compress.storage.draft import Draft
from compress.storage.tensors import DTYPES, TensorInfo

if TYPE_CHECKING:
    from compress.method import StepContext

KEEP_HEADS = "use remove_heads: 0 in UL-MM or depth-first, or shape: heterogeneous."


@dataclass(frozen=True)
class Kept:
    """The units of one layer that stay: sorted int64 indices. Without any unit the block is removed."""

    groups: torch.Tensor  # key-value heads, each with its query heads
    neurons: torch.Tensor

    def shape(self, before: LayerShape) -> LayerShape:
        """The widths of the pruned layer, which had the shape ``before``."""
        per_group = before.num_attention_heads // max(before.num_key_value_heads, 1)
        groups = len(self.groups)
        return LayerShape(groups * per_group, groups, len(self.neurons))

    def heads(self, before: LayerShape) -> torch.Tensor:
        """The query heads that stay: int64 indices in a layer that had the shape ``before``."""
        per_group = before.num_attention_heads // max(before.num_key_value_heads, 1)
        return (self.groups[:, None] * per_group + torch.arange(per_group)).flatten()


def channels_of_groups(config: Any, index: int) -> torch.Tensor:
    """The input channels of the attention's output projection by key-value head, in layer ``index``.

    Returns:
        int64 [num_key_value_heads, heads in a group * head_dim].
    """
    shape, head_dim = layer_shapes(config)[index], sizes_of(config).head_dim
    groups = shape.num_key_value_heads
    return torch.arange(shape.num_attention_heads * head_dim).view(groups, -1 if groups else 0)


def narrow(model: StreamedModel, layer: Layer, kept: Kept) -> None:
    """Replace ``layer.module`` by a copy that has only the units in ``kept``.

    Removed are rows of the query, key, value, gate and up projections, and columns of the two output
    projections. What is left keeps its order and its values.
    """
    anatomy, config = model.anatomy, model.config
    before = layer_shapes(config)[layer.index]
    rows = projection_rows(config, layer.index)
    columns = {
        anatomy.attention_output: channels_of_groups(config, layer.index)[kept.groups].flatten(),
        anatomy.down: kept.neurons,
    }
    picked = {"query": kept.heads(before), "key": kept.groups, "value": kept.groups}
    picked |= {"gate": kept.neurons, "up": kept.neurons}
    kept_rows: dict[str, list[torch.Tensor]] = {}
    for role in ("query", "key", "value", "gate", "up"):
        if role in rows:
            kept_rows.setdefault(getattr(anatomy, role), []).append(rows[role][picked[role]].flatten())
    narrowed: dict[str, tuple[Tensor, Tensor | None]] = {}
    for path, linear in layer.linears.items():
        matrix, bias = weight(linear), bias_of(linear)
        if path in columns:
            narrowed[path] = (matrix[:, columns[path]], bias)
        else:
            chosen = torch.cat(kept_rows[path])
            if anatomy.qkv_layout == "interleaved" and path == anatomy.query:
                chosen = chosen.sort().values  # the fused projection stores one head after the other
            narrowed[path] = (matrix[chosen], None if bias is None else bias[chosen])

    module = shallow_copy(layer.module)
    # The module already has the biases that an earlier pruning step added.
    after = _shape_entry(anatomy, config, layer.index, kept, biases=[])
    reshape_layer(module, pruned_parts(anatomy, config), after)
    layer.module, layer.linears = module, anatomy.linears(module)
    for path, linear in layer.linears.items():
        set_weight(linear, *narrowed[path])


def bias_of(linear: nn.Module) -> Tensor | None:
    """The bias [out] of a linear, without gradient; None if it has none."""
    bias = linear.bias
    return bias.detach() if isinstance(bias, Tensor) else None


def shallow_copy(module: nn.Module) -> nn.Module:
    """A copy with submodules of its own, which shares the parameters until they are replaced."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


@contextmanager
def skipped(layer: Layer, anatomy: Anatomy, block: Literal["attention", "mlp"]) -> Iterator[None]:
    """Switch off a block of a layer inside the ``with``: it adds nothing and takes no time."""
    before = put(layer.module, without(layer.module, pruned_parts(anatomy), block))
    try:
        yield
    finally:
        put(layer.module, before)


def write_layer(draft: Draft, model: StreamedModel, layer: Layer) -> None:
    """Write the changed parameters of a narrowed layer into the draft, in the dtypes they were stored in.

    Raises:
        CompressError: a value is not finite in the dtype it is stored in.
    """
    parameters = dict(layer.module.named_parameters())
    for name in _owned(model.anatomy):
        for leaf in ("weight", "bias"):
            stored = layer.stored(name, leaf)
            parameter = parameters.get(f"{name}.{leaf}")
            if parameter is None:
                if stored is not None:
                    draft.drop(stored)
                continue
            like = stored or layer.stored(name)  # a bias that the layer did not have is like the weight
            assert like is not None
            stored = stored or f"{like.removesuffix('weight')}{leaf}"
            new = parameter.detach().to("cpu", DTYPES[model.checkpoint.tensors[like].dtype])
            if not all_finite(new):
                raise CompressError(
                    f"'{stored}' is too large or not a number after pruning; use more calibration windows, "
                    "or no compensation."
                )
            if stored not in model.checkpoint or not _equal(model.checkpoint.read(stored), new):
                draft.write({stored: new})


def prune(model: StreamedModel, kept: Sequence[Kept], context: StepContext) -> None:
    """Narrow every layer and write the model, for methods that do not change the kept weights."""
    for layer in model.walk(context.journal("pruning"), label="pruning"):
        narrow(model, layer, kept[layer.index])
        write_layer(context.draft, model, layer)
    finish(context.draft, model, kept)


def finish(draft: Draft, model: StreamedModel, kept: Sequence[Kept], removed: Collection[int] = ()) -> None:
    """Give a draft whose layers are all written the config.json of its new shape.

    If the plain architecture demands biases for projections that got none, they get zeros.

    Args:
        draft: the pruned model, with the names of its parent.
        model: the model before pruning.
        kept: the units of every layer that is not ``removed``.
        removed: layers that go as a whole; the others are renumbered.
    """
    before = ModelShape.of(draft.parent)
    if removed:
        before = plan_without_layers(before, removed)
        remove_layers(draft, removed)
    biases = []
    for index in range(len(kept)):
        prefix = f"{before.anatomy.layer_name(index)}."
        names = (f"{prefix}{path}.bias" for path in before.anatomy.linear_paths)
        biases.append(
            {
                name.removeprefix(prefix).removesuffix(".bias")
                for name in names
                if name in draft and name not in before.tensors
            }
        )
    draft.config = _config(before, kept, biases)
    after = ModelShape(draft.config, draft.tensors, draft.folder)
    for name, old in head_of_its_class(before, after).items():
        draft.alias(name, old)
        draft.drop(old)
    for name, info in _tensors(before, after).items():
        if name not in draft:
            draft.write({name: torch.zeros(info.shape, dtype=DTYPES[info.dtype])})


def plan_widths(
    shape: ModelShape, kept: Sequence[Kept], biased: Sequence[str] = (), uniform: bool = False
) -> ModelShape:
    """The shape of the model when each layer has only the units in ``kept``.

    Args:
        shape: the model before pruning.
        kept: the units of every layer that stay; only their numbers matter.
        biased: output projections (paths inside a layer) that get a bias if they have none.
        uniform: whether the result must have the plain architecture.

    Raises:
        BadInput: the model is quantized, or its plain architecture cannot have this shape.
    """
    if "quantization_config" in shape.config:
        raise BadInput("The model is quantized already, and packed layers cannot be pruned; prune first.")
    biases = []
    for layer, units in zip(_layers(shape), kept, strict=True):
        left = {shape.anatomy.attention_output: len(units.groups), shape.anatomy.down: len(units.neurons)}
        linears = shape.anatomy.linears(layer)
        biases.append({path for path in biased if left[path] and linears[path].bias is None})
    config = _config(shape, kept, biases)
    if uniform and "pruned" in config and (why := obstacle(shape, kept, biases)):
        raise BadInput(why)
    after = ModelShape(config, shape.tensors, shape.folder)
    return ModelShape(config, _tensors(shape, after), shape.folder)


def obstacle(shape: ModelShape, kept: Sequence[Kept], biases: Sequence[set[str]]) -> str | None:
    """Why the plain architecture cannot have this shape, as a sentence; None if it can."""
    anatomy, kind = shape.anatomy, shape.anatomy.model_type
    before = layer_shapes(shape.pretrained_config)
    after = [units.shape(old) for units, old in zip(kept, before, strict=True)]
    if "pruned" in shape.config:
        return "The model has layers of different shapes already; use shape: heterogeneous."
    if len(set(after)) > 1:
        return "Its layers would have different widths; use shape: heterogeneous, or a uniform structure."
    if 0 in astuple(after[0]):
        return "Its layers would have no attention or no MLP, which the plain architecture must have."
    if after[0].num_attention_heads != before[0].num_attention_heads and not anatomy.has_head_dim:
        return (
            f"In a plain {kind} model heads are as wide as hidden_size / heads, so none can be taken out; "
            f"{KEEP_HEADS}"
        )
    added = set[str]().union(*biases)
    missing = [path for path in sorted(added) if _bias_key(anatomy, path) is None]
    if missing:
        return (
            f"A plain {kind} model has no bias in '{missing[0]}' to compensate with; use compensate: "
            "least-squares, which needs none, or shape: heterogeneous."
        )
    try:
        config_of(ModelShape(_plain(shape, after[0], added), shape.tensors, shape.folder))
    except BadInput:  # the class of its config refuses it
        return (
            f"A plain {kind} model with a hidden_size of {shape.sizes.hidden_size} cannot have "
            f"{after[0].num_attention_heads} heads; {KEEP_HEADS}"
        )
    return None


def _plain(shape: ModelShape, widths: LayerShape, biased: Collection[str]) -> dict[str, Any]:
    """The config.json of a plain model whose layers have these widths, and biases in the paths ``biased``."""
    anatomy = shape.anatomy
    sizes = {anatomy.intermediate_size_key: widths.intermediate_size}
    if anatomy.has_head_dim:
        sizes["num_attention_heads"] = widths.num_attention_heads
        sizes["num_key_value_heads"] = widths.num_key_value_heads
        sizes["head_dim"] = shape.sizes.head_dim
    keys = (_bias_key(anatomy, path) for path in sorted(biased))
    return shape.config | sizes | {key: True for key in keys if key is not None}


def pruned_parts(anatomy: Anatomy, config: Any = None) -> dict[str, Any]:
    """``parts`` of the section ``pruned`` of a config.json, for `compress.engine.pruned.reshape`."""
    core = anatomy.attention_core or anatomy.attention
    norms: dict[str, list[str]] = {"attention_norms": [], "mlp_norms": []}
    if anatomy.norm_first:
        norms["attention_norms"] = [
            path for path in (anatomy.attention_norm, anatomy.post_attention_norm) if path is not None
        ]
        norms["mlp_norms"] = [path for path in (anatomy.mlp_norm, anatomy.post_mlp_norm) if path is not None]
    roles = ("layers", "query", "key", "value", "attention_output", "mlp", "gate", "up", "down")
    return {
        **{role: getattr(anatomy, role) for role in roles},
        "attention": core,
        "attention_reads_config": anatomy.attention_reads_config,
        "head_dim": sizes_of(config).head_dim if config is not None else None,
        **norms,
    }


def _config(shape: ModelShape, kept: Sequence[Kept], biases: Sequence[set[str]]) -> dict[str, Any]:
    """The config.json of the pruned model, with a section ``pruned`` unless the architecture is plain."""
    anatomy, config = shape.anatomy, shape.pretrained_config
    if obstacle(shape, kept, biases) is None:
        return _plain(shape, kept[0].shape(layer_shapes(config)[0]), set[str]().union(*biases))
    section = {
        "parts": pruned_parts(anatomy, config),
        "layers": [
            _shape_entry(anatomy, config, index, units, sorted(biases[index]))
            for index, units in enumerate(kept)
        ],
    }
    return mark_pruned(shape.config, config, section)


def _bias_key(anatomy: Anatomy, path: str) -> str | None:
    return anatomy.attention_bias_key if path == anatomy.attention_output else anatomy.mlp_bias_key


def _shape_entry(anatomy: Anatomy, config: Any, index: int, kept: Kept, biases: list[str]) -> dict[str, Any]:
    """The shape of one layer for `compress.engine.pruned.reshape`."""
    before = layer_shapes(config)[index]
    old = config.pruned["layers"][index] if getattr(config, "pruned", None) else {}
    entry: dict[str, Any] = dict(vars(kept.shape(before)))
    entry["biases"] = sorted({*old.get("biases", []), *biases})
    if anatomy.shared_position_bias:
        heads = torch.tensor(old.get("heads", range(before.num_attention_heads)), dtype=torch.int64)
        entry["heads"] = heads[kept.heads(before)].tolist()
    return entry


def _layers(shape: ModelShape) -> Any:
    return shape.skeleton.base_model.get_submodule(shape.anatomy.layers)


def _owned(anatomy: Anatomy) -> tuple[str, ...]:
    """Paths of the modules of a layer that pruning may change or remove."""
    return (*anatomy.linear_paths, *anatomy.norm_paths)


def _tensors(before: ModelShape, after: ModelShape) -> dict[str, TensorInfo]:
    """The tensors of the pruned model: its layers are resized, everything else is as in ``before``."""
    tensors = dict(before.tensors)
    for index, layer in enumerate(_layers(after)):
        parameters = dict(layer.named_parameters())
        prefix = before.anatomy.layer_name(index)
        for path in _owned(before.anatomy):
            for leaf in ("weight", "bias"):
                name, new = f"{prefix}.{path}.{leaf}", parameters.get(f"{path}.{leaf}")
                if new is None:
                    tensors.pop(name, None)
                elif path in before.anatomy.linear_paths:
                    old = tensors.get(name) or tensors[f"{prefix}.{path}.weight"]
                    tensors[name] = TensorInfo(old.dtype, tuple(new.shape))
    for name, old_name in head_of_its_class(before, after).items():
        tensors[name] = tensors.pop(old_name)
    return tensors


def head_of_its_class(before: ModelShape, after: ModelShape) -> dict[str, str]:
    """New name -> old name of the head's weight, if a model with its own modelling code renames it."""
    old, new = before.anatomy.head, anatomy_of(before.pretrained_config).head
    named = "pruned" in after.config and old is not None and f"{old}.weight" in before.tensors
    return {f"{new}.weight": f"{old}.weight"} if named and old != new else {}


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
