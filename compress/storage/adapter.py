"""A LoRA adapter that belongs to a packed model. It is stored as peft stores it, in a folder of the artefact.

``DIR/adapter`` holds adapter_config.json and adapter_model.safetensors, which peft loads onto the base model
in ``DIR``. The config.json of the base names the folder (``"adapter": "adapter"``), so that a copy without it
is refused. In memory, that entry is the content of adapter_config.json, and the tensors have the names of
their linears: ``{linear}.lora_A.weight`` [r, in] and ``{linear}.lora_B.weight`` [out, r]. The linear computes
W x + scaling · B A x.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from compress.errors import BadInput
from compress.kernels.layers.adapted import A, B
from compress.system.files import write_atomically

KEY = "adapter"
"""The entry in config.json, and the name of the folder."""
SETTINGS_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts in front of the names of the model's modules."""


def adapter_config(
    rank: int, alpha: float, names: Collection[str], others: Collection[str], *, conv1d: bool, causal: bool
) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        rank, alpha: the same for every linear; scaling = alpha / rank.
        names: the linears with an adapter, as the model class names them.
        others: all other linears of the model. Peft must not mistake them for one with an adapter.
        conv1d: whether the linears are ``Conv1D`` modules.
        causal: whether the model is a causal language model with its head.
    """
    endings = sorted({name.rpartition(".")[2] for name in names})
    unique = not any(name.rpartition(".")[2] in endings for name in others)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": None,  # it is the folder around this one, wherever that lies
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": endings if unique else sorted(names),
        "fan_in_fan_out": conv1d,
        "inference_mode": True,
    }


def is_adapter(name: str) -> bool:
    """Whether a tensor belongs to the adapter."""
    return name.endswith((A, B))


def linear_of(key: str) -> str:
    """The full name of the linear that a tensor of the adapter belongs to."""
    return key.removesuffix(A).removesuffix(B)


def scaling(settings: Mapping[str, Any]) -> float:
    """The factor of B A, from the content of adapter_config.json.

    Raises:
        BadInput: it is not a LoRA adapter with one rank and one alpha.
    """
    refused = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication")
    found = [name for name in refused if settings.get(name)]
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none" or found:
        what = found[0] if found else f"{settings.get('peft_type')} with bias={settings.get('bias')}"
        raise BadInput(f"Only plain LoRA adapters can be read; this one uses {what}.")
    rank = settings["r"]
    return settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)


def read_settings(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json of the model in ``folder``, whose config.json says that there is an adapter.

    Raises:
        BadInput: the folder of the adapter is missing or damaged, or it is not a plain LoRA adapter.
    """
    path = folder / KEY / SETTINGS_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        scaling(settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"The model in '{folder}' uses a LoRA adapter, but {path} cannot be read "
            f"({type(error).__name__}); copy the folder '{KEY}' along with the model."
        ) from None
    return settings


def stored_name(key: str) -> str:
    """The name that a tensor of adapter_model.safetensors has in memory.

    Raises:
        BadInput: it does not belong to a plain LoRA adapter.
    """
    if not is_adapter(key):
        raise BadInput(f"The adapter holds the tensor '{key}', which is neither lora_A nor lora_B.")
    return key.removeprefix(PREFIX)


def write_config(config: Mapping[str, Any], folder: Path) -> None:
    """Write config.json, and adapter_config.json if the model has an adapter."""
    values = dict(config)
    if (settings := values.get(KEY)) is not None:
        (folder / KEY).mkdir(exist_ok=True)
        write_atomically(folder / KEY / SETTINGS_FILE, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        values[KEY] = KEY
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
