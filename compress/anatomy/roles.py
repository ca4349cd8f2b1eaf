"""The anatomy of an architecture: the roles of the modules in a layer and around the layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

PROJECTIONS = ("query", "key", "value", "attention_output", "gate", "up", "down")
NORMS = ("attention_norm", "query_norm", "key_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm")
Task = Literal["sequence classification", "token classification", "question answering"]


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Where the parts of one architecture are, as module paths. Take one from :func:`anatomy_of`."""

    model_type: str
    kind: Literal["decoder", "encoder"]

    # Relative to the base model (``model.base_model``); ``in_model`` makes them relative to the full model.
    layers: str
    embeddings: tuple[str, ...]  # token embedding first, then position and type tables, input projection
    embedding_norm: str | None = None
    final_norm: str | None = None
    final_projection: str | None = None  # from hidden_size to the width of the token embedding (OPT-350m)

    # Relative to the full model: projection to the vocabulary, None where the class has none.
    head: str | None
    head_aliases: tuple[str, ...] = ()  # what checkpoint files, or older classes, may call it instead

    # Relative to one layer. Paths that are equal are one fused linear.
    attention: str
    # The module from hidden states to heads, where ``attention`` also holds the residual sum.
    attention_core: str | None = None
    query: str
    key: str
    value: str
    attention_output: str
    mlp: str | None  # None where the MLP is not one module
    gate: str | None = None  # a fused gate and up is stacked, gate first
    up: str
    down: str
    activation: str  # the module between up (or gate) and down
    # Rows of a fused projection: "stacked" is all of q, then k, then v; "interleaved" is q, k and v of head
    # 0, then of head 1, and so on.
    qkv_layout: Literal["separate", "stacked", "interleaved"] = "separate"
    conv1d: bool = False  # weights are stored [in, out]

    # Relative to one layer. attention_norm and mlp_norm come before their block if norm_first, else after its
    # residual addition; post_attention_norm and post_mlp_norm act on a block's output before it is added.
    attention_norm: str
    mlp_norm: str
    post_attention_norm: str | None = None
    post_mlp_norm: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    norm_first: bool = True
    norm_offset: float = 0.0  # norms multiply by this plus their weight
    parallel_residual: bool = False  # attention and MLP both read the layer's input
    scales_query: bool = False  # attention scales the query itself, and not its products with keys
    softcap: str | None = None  # the attribute of attention that limits the products, if it has one
    flat_mlp: bool = False  # the MLP is given all tokens of a batch as rows, [N·S, D]

    # Names in the config. Without ``head_dim`` in it, a head can only have the width hidden_size / heads. A
    # bias key gives every projection of a block a bias; it is None where the class leaves no choice.
    intermediate_size_key: str = "intermediate_size"
    has_head_dim: bool = False
    attention_bias_key: str | None = None
    mlp_bias_key: str | None = None
    attention_reads_config: bool = False  # reads the number of heads from the config at every call
    shared_position_bias: bool = False  # all layers are given one position bias, with a part for every head
    per_layer_lists: tuple[str, ...] = ("layer_types", "mlp_layer_types")
    layer_thresholds: tuple[str, ...] = ("max_window_layers",)  # layer indices where something changes

    # Filled in by anatomy_of.
    prefix: str = ""  # of the base model inside the full model; empty for a bare base model
    tied: bool = False  # head and token embedding are one tensor

    def in_model(self, path: str) -> str:
        """The path inside the full model of a path inside the base model."""
        return f"{self.prefix}.{path}" if self.prefix else path

    def layer_name(self, index: int) -> str:
        """The name of a layer in the full model's ``state_dict``, e.g. ``model.layers.3``."""
        return self.in_model(f"{self.layers}.{index}")

    def layer_index(self, name: str) -> int:
        """The index of the layer that a parameter of the full model belongs to; −1 if it is outside."""
        before = self.in_model(f"{self.layers}.")
        index = name.removeprefix(before).partition(".")[0] if name.startswith(before) else ""
        return int(index) if index.isdigit() else -1

    @property
    def heads(self) -> tuple[str, ...]:
        """Every name of the head, in files and in classes; none if there is no head."""
        return (self.head, *self.head_aliases) if self.head else ()

    def names_of(self, module: str) -> tuple[str, ...]:
        """Every name, in files and in classes, of a module of the full model; only the head has several."""
        return self.heads if module in self.heads else (module,)

    def located(self, names: Iterable[str]) -> Anatomy:
        """The same anatomy with ``head`` as the tensor ``names`` of a checkpoint have it.

        Files may call the head otherwise than the class does: Pythia's is ``embed_out``.
        """
        modules = {name.rpartition(".")[0] for name in names}  # not only of ``.weight``: it may be packed
        aliases = (alias for alias in self.head_aliases if alias in modules)
        head = self.head and next(aliases, self.head)
        return replace(self, head=head, head_aliases=tuple(name for name in self.heads if name != head))

    @property
    def linear_paths(self) -> tuple[str, ...]:
        """Every linear of a layer once, in data-flow order; a fused one has the place of its first part."""
        return self._paths(PROJECTIONS)

    @property
    def norm_paths(self) -> tuple[str, ...]:
        """Every norm of a layer."""
        return self._paths(NORMS)

    def _paths(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path for role in roles if (path := getattr(self, role)) is not None))

    def linears(self, layer: nn.Module) -> dict[str, nn.Module]:
        """Every linear of a layer (``nn.Linear`` or ``Conv1D``) by its path, in data-flow order."""
        modules = dict(layer.named_modules())
        here = (path for path in self.linear_paths if path in modules)
        return {path: modules[path] for path in here if hasattr(modules[path], "bias")}  # no removed block

    @property
    def merge_obstacle(self) -> str | None:
        """Why a linear map of the MLP's output cannot be folded into ``down``: a sentence; None if it can."""
        if self.post_mlp_norm is not None:
            return (
                f"In {self.model_type} models '{self.post_mlp_norm}' normalises the output of '{self.down}' "
                "before it joins the residual stream, so a linear map cannot be folded into that projection."
            )
        if not self.norm_first:
            return (
                f"This {self.model_type} model is post-norm: '{self.mlp_norm}' normalises the sum after "
                f"'{self.down}' is added, so a linear map cannot be folded into that projection."
            )
        return None

    @property
    def refit_obstacle(self) -> str | None:
        """Why the output projections of the blocks cannot be refitted to the residual stream by linear least
        squares: a sentence; None if they can."""
        for norm, path in (
            (self.post_attention_norm, self.attention_output),
            (self.post_mlp_norm, self.down),
        ):
            if norm is not None:
                return (
                    f"In {self.model_type} models '{norm}' normalises the output of '{path}' before it joins "
                    "the residual stream, so that projection cannot be fitted to the stream by least squares."
                )
        return None


def linears_by_input(anatomy: Anatomy, linears: Collection[str]) -> list[list[str]]:
    """The paths ``linears`` of one layer in data-flow order, grouped by the input that they share."""
    roles = (("query", "key", "value"), ("attention_output",), ("gate", "up"), ("down",))
    groups = (dict.fromkeys(getattr(anatomy, role) for role in same) for same in roles)
    found = [[path for path in paths if path in linears] for paths in groups]
    return [paths for paths in found if paths]
