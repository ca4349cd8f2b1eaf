"""Transformers models whose layers differ: pruned heads and neurons, or no attention or MLP at all.

`reshape` gives the layers of a stock model the shapes that the section ``pruned`` of its config.json lists.

This file is self-contained: it imports only torch and transformers. compress-model uses it itself, and also
copies it into the folder of every such model, with two classes of the model's architecture at its end. There
transformers finds it by ``auto_map`` in config.json and can load, run and save the model on a machine that
does not have compress-model.
"""

import copy

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D


class NoAttention(nn.Module):
    """Takes the place of an attention block and adds nothing to the residual stream.

    A cache counts its tokens in each of its places. So this block keeps the place of the one that was there,
    and fills it with one number per token.
    """

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states, *args, **kwargs):
        for cache in [given for given in (*args, *kwargs.values()) if isinstance(given, Cache)]:
            nothing = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(nothing, nothing, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class Nothing(nn.Module):
    """Takes the place of an MLP, or of a block's last projection, and adds nothing to the residual stream."""

    def forward(self, hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states)


class HeadsOfPositionBias:
    """Cuts the position bias [B, heads, S, S], which all layers share, down to the heads that an attention
    block has left. The bias is the third argument of the block."""

    def __init__(self, heads):
        self.heads = heads

    def attach(self, attention):
        """Attach this to a block, in place of one that is attached already."""
        hooks = attention._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, HeadsOfPositionBias)]:
            del hooks[key]
        attention.register_forward_pre_hook(self)

    def __call__(self, module, args):
        hidden_states, attention_mask, position_bias, *others = args
        return (hidden_states, attention_mask, position_bias[:, self.heads], *others)


def reshape(model, pruned):
    """Give every layer of a stock ``model`` its shape, in place. Linears that are resized get new weights.

    Args:
        model: a transformers model as its class builds it.
        pruned: ``parts`` says where the parts of a layer are, and ``layers`` has the shape of each layer:
            ``num_attention_heads``, ``num_key_value_heads``, ``intermediate_size`` (0: the block is gone),
            ``biases`` (linears that have a bias although those of the stock layer have none) and, where the
            layers share a position bias, ``heads`` (indices of the query heads that are left).
    """
    parts = pruned["parts"]
    layers = model.base_model.get_submodule(parts["layers"])
    for layer, shape in zip(layers, pruned["layers"], strict=True):
        reshape_layer(layer, parts, shape)


def reshape_layer(layer, parts, shape):
    """Give one layer its shape, in place (see `reshape`)."""
    heads, groups = shape["num_attention_heads"], shape["num_key_value_heads"]
    if heads:
        resize_attention(layer, parts, heads, groups, shape["biases"])
        if "heads" in shape:
            HeadsOfPositionBias(shape["heads"]).attach(layer.get_submodule(parts["attention"]))
    else:
        put(layer, without(layer, parts, "attention"))
    if shape["intermediate_size"]:
        resize_mlp(layer, parts, shape["intermediate_size"], shape["biases"])
    else:
        put(layer, without(layer, parts, "mlp"))


def resize_attention(layer, parts, heads, groups, biases):
    query, key, value = heads * parts["head_dim"], groups * parts["head_dim"], groups * parts["head_dim"]
    outputs = {}
    for role, rows in (("query", query), ("key", key), ("value", value)):
        outputs[parts[role]] = outputs.get(parts[role], 0) + rows  # fused projections have one path
    for path, rows in outputs.items():
        resize(layer, path, rows, None, biases)
    resize(layer, parts["attention_output"], None, query, biases)

    attention = layer.get_submodule(parts["attention"])
    sizes = dict.fromkeys(("num_heads", "num_attention_heads", "n_heads"), heads)
    sizes |= {"num_key_value_heads": groups, "num_key_value_groups": heads // groups}
    sizes |= dict.fromkeys(("all_head_size", "split_size"), query)
    for name, size in sizes.items():
        if hasattr(attention, name):
            setattr(attention, name, size)
    if parts["attention_reads_config"]:
        attention.config = copy.copy(attention.config)
        attention.config.num_attention_heads = heads


def resize_mlp(layer, parts, width, biases):
    fused = parts["gate"] == parts["up"]
    if parts["gate"] is not None and not fused:
        resize(layer, parts["gate"], width, None, biases)
    resize(layer, parts["up"], 2 * width if fused else width, None, biases)
    resize(layer, parts["down"], None, width, biases)


def resize(layer, path, rows, columns, biases):
    """Replace a linear by one with other ``rows`` (outputs) or ``columns`` (inputs), or with a new bias."""
    old = layer.get_submodule(path)
    is_conv1d = isinstance(old, Conv1D)
    old_columns, old_rows = old.weight.shape if is_conv1d else old.weight.shape[::-1]
    rows, columns = rows or old_rows, columns or old_columns
    biased = old.bias is not None or path in biases
    if (rows, columns, biased) == (old_rows, old_columns, old.bias is not None):
        return
    with torch.device(old.weight.device):
        new = Conv1D(rows, columns) if is_conv1d else nn.Linear(columns, rows, bias=biased)
    new = new.to(old.weight.dtype).requires_grad_(old.weight.requires_grad).train(old.training)
    put(layer, {path: new})


def without(layer, parts, block):
    """The modules that switch the "attention" or the "mlp" of a layer off: path -> module to put there."""
    if block == "attention":
        attention = layer.get_submodule(parts["attention"])
        places = {parts["attention"]: NoAttention(getattr(attention, "layer_idx", None))}
        if not parts["attention_output"].startswith(f"{parts['attention']}."):
            places[parts["attention_output"]] = Nothing()
    elif parts["mlp"] is not None:
        places = {parts["mlp"]: Nothing()}
    else:
        places = {parts["up"]: nn.Identity(), parts["down"]: Nothing()}
    return places | {norm: nn.Identity() for norm in parts[f"{block}_norms"]}


def put(layer, places):
    """Put modules into a layer (path -> module), and return those that were there before."""
    before = {path: layer.get_submodule(path) for path in places}
    for path, module in places.items():
        parent, _, name = path.rpartition(".")
        setattr(layer.get_submodule(parent), name, module)
    return before
