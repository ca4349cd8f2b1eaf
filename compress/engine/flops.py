"""Count the floating-point operations of a model for one sequence, from its config and anatomy alone.

A multiplication with its addition counts as two, as in ``torch.utils.flop_counter``, which the tests compare
with. Only matrix products are counted: norms, activations, softmax and look-ups are not. For a sequence of s
tokens, with d the hidden size, d_h the width of a head, and H query heads, G key-value heads and I neurons in
a layer:

    projections    2 s d d_h (2 H + 2 G)    query and output, key and value
    attention      4 s^2 d_h H              query times key, weights times value; the masked half of a causal
                                            square is counted too, as most kernels compute it
    MLP            4 s d I                  or 6 s d I with a gate
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.anatomy import anatomy_of, layer_shapes, sizes_of, task_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one sequence, by the part of the model that needs them."""

    projections: int  # of the attention blocks: query, key, value and output
    attention: int  # products of queries with keys, and of attention weights with values
    mlp: int
    head: int  # everything outside the layers

    @property
    def layers(self) -> int:
        """All but the head: the operations that pruning of layers, heads or neurons can save."""
        return self.projections + self.attention + self.mlp

    @property
    def total(self) -> int:
        return self.layers + self.head


def flops(config: PretrainedConfig, tokens: int) -> Flops:
    """The operations of one sequence of ``tokens`` in the model that ``config`` describes, pruned or not.

    A bare base model has no head; the pooler that some of them have is not counted.

    Raises:
        BadInput: as :func:`anatomy_of`.
    """
    anatomy, sizes, layers = anatomy_of(config), sizes_of(config), layer_shapes(config)
    width, matrices = sizes.hidden_size, 2 if anatomy.gate is None else 3
    heads = sum(layer.num_attention_heads for layer in layers)
    groups = sum(layer.num_key_value_heads for layer in layers)
    neurons = sum(layer.intermediate_size for layer in layers)
    return Flops(
        projections=2 * tokens * width * sizes.head_dim * (2 * heads + 2 * groups),
        attention=4 * tokens**2 * sizes.head_dim * heads,
        mlp=2 * tokens * width * neurons * matrices,
        head=2 * _head(config, tokens),
    )


def unit_flops(config: PretrainedConfig, index: int, tokens: int) -> tuple[int, int]:
    """The operations of the smallest units of a layer that can be pruned.

    Args:
        config: of the model.
        index: of the layer.
        tokens: length of the sequence.

    Returns:
        Two numbers: for one key-value head with its query heads, and for one neuron. A number is 0 if the
        layer has no such block.

    Raises:
        BadInput: as :func:`anatomy_of`.
    """
    anatomy, sizes, layer = anatomy_of(config), sizes_of(config), layer_shapes(config)[index]
    matrices = 2 if anatomy.gate is None else 3
    query_heads = layer.num_attention_heads // max(layer.num_key_value_heads, 1)
    projections = 2 * tokens * sizes.hidden_size * sizes.head_dim * (2 * query_heads + 2)
    group = projections + 4 * tokens**2 * sizes.head_dim * query_heads
    neuron = 2 * tokens * sizes.hidden_size * matrices
    return (group if layer.num_key_value_heads else 0, neuron if layer.intermediate_size else 0)


def _head(config: PretrainedConfig, tokens: int) -> int:
    """Multiplications outside the layers.

    In an encoder, the vocabulary head and the sequence classifier have a square linear before the projection;
    the classifier reads the first token only. A decoder's classifier is applied to every token.
    """
    anatomy, sizes, task = anatomy_of(config), sizes_of(config), task_of(config)
    width = embedding = sizes.hidden_size
    labels = config.num_labels or 0
    outside = 0
    if anatomy.final_projection is not None:
        embedding = config.word_embed_proj_dim
        outside = 2 * tokens * width * embedding  # into the layers, and out of them
    transform = width * width if anatomy.kind == "encoder" else 0
    if anatomy.head is not None:
        return outside + tokens * (transform + embedding * sizes.vocab_size)
    if task == "sequence classification":
        positions = 1 if anatomy.kind == "encoder" else tokens
        return outside + positions * (transform + embedding * labels)
    if task == "token classification":
        return outside + tokens * width * labels
    if task == "question answering":
        return outside + tokens * embedding * 2  # begin and end of the answer
    return outside
