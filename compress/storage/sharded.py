"""The folder ``s3t/`` of a model that was trained in shards, so that records can be deleted from it exactly.

The model folder holds the base model, and its config.json names the folder (``"s3t": "s3t"``). In it lie

- ``state.json``: a `Sharded`, which is replaced in one move whenever records are deleted;
- a file of `Example` lines, the training data that is left, which ``state.json`` names;
- ``shard-S.G/P.safetensors``: the LoRA of one stage for shard S in its G-th training, where P names the
  slices that this stage was trained on, in their order, such as ``3-4-5``. Tensors are called
  ``{linear}.lora_A.weight`` [r, in] and ``{linear}.lora_B.weight`` [out, r], float32; the linear computes
  W x + scaling · B A x.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file

from compress.errors import BadInput
from compress.system.files import write_atomically

KEY = "s3t"
"""The entry in config.json, and the name of the folder."""
STATE = "state.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Served(_Record):
    """What a shard contributes to the model now."""

    prefix: list[int] = Field(description="the slices that its stages were trained on; empty: it is left out")
    sha256: str = Field(description="the hash of the LoRA of these stages (see `prefix_sha256`)")


class Shard(_Record):
    """One shard of the training data, and the stages that were trained on it."""

    generation: int = Field(description="how often the shard was trained again from its remaining records")
    slices: list[list[str]] = Field(description="the ids of the remaining records in each slice")
    orders: list[list[int]] = Field(description="permutations of the slices")
    dead: list[int] = Field(description="the slices that lost a record")
    stages: dict[str, str] = Field(description="name of a live stage -> sha256 of its file")
    served: Served
    machine: dict[str, Any] = Field(description="what the last bits of its training depend on")

    @property
    def remaining(self) -> int:
        """The number of records that are not deleted."""
        return sum(map(len, self.slices))


class Sharded(_Record):
    """The content of ``state.json``."""

    schema_version: Literal[1] = 1
    base: str = Field(description="sha256 of the base model in this folder")
    options: dict[str, Any] = Field(description="of the training")
    seed: int
    groups: list[list[int]] = Field(description="the layers whose LoRA each stage trains; top layers first")
    scaling: float = Field(description="the factor of B A")
    pad: int = Field(description="the token that fills up batches")
    priors: dict[str, float] | None = Field(description="the chance of each remaining record to be deleted")
    examples: str = Field(description="the name of the file with the training data that is left")
    deleted: list[str] = Field(description="the ids of the deleted records, in the order of their deletion")
    shards: list[Shard]

    @model_validator(mode="before")
    @classmethod
    def _one_machine(cls, data: Any) -> Any:
        """Read a state from before shards had machines of their own: it names that of the first training."""
        if not isinstance(data, dict) or "machine" not in data or not isinstance(data.get("shards"), list):
            return data
        shards = [{"machine": data["machine"], **s} if isinstance(s, dict) else s for s in data["shards"]]
        return {**{key: value for key, value in data.items() if key != "machine"}, "shards": shards}


@dataclass(frozen=True)
class Example:
    """A record as it is learned.

    Attributes:
        id: of the record.
        hash: sha256 of its words.
        sequences: pairs of token ids and labels (-100 where nothing is learned), of the same length.
    """

    id: str
    hash: str
    sequences: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def is_sharded(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model trained in shards."""
    return KEY in config


def refuse_sharded(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse (BadInput) a model trained in shards, of which most of this program would see the base only."""
    if is_sharded(config):
        raise BadInput(
            f"'{folder}' is an ensemble that S3T trained, which compress.load, evaluate and s3t take; it "
            "cannot be compressed or unlearned in another way."
        )


def read_sharded(folder: Path) -> Sharded:
    """The state of a model folder.

    Raises:
        BadInput: the folder was not written by S3T, or its state is damaged.
    """
    path = folder / KEY / STATE
    if not path.is_file():
        raise BadInput(
            f"'{folder}' is not a folder that S3T trained: it has no {KEY}/{STATE}; "
            "'compress-model s3t train' makes one."
        )
    try:
        return Sharded.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        raise BadInput(f"{path} cannot be read: {where}{first['msg']}.") from None


def write_sharded(folder: Path, state: Sharded) -> None:
    """Replace the state of a model folder in one move."""
    write_atomically(folder / KEY / STATE, state.model_dump_json(indent=1))


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write training data, one JSON object a line."""
    lines = (json.dumps({"id": e.id, "hash": e.hash, "sequences": e.sequences}) for e in examples)
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def read_examples(folder: Path, state: Sharded) -> dict[str, Example]:
    """The training data that is left in a model folder, by id, in the order of the file.

    Raises:
        BadInput: the file is missing or damaged.
    """
    path = folder / KEY / state.examples
    try:
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        found = [
            Example(
                line["id"], line["hash"], tuple((tuple(t), tuple(labels)) for t, labels in line["sequences"])
            )
            for line in lines
        ]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"The training data {path} is missing or damaged.") from None
    return {example.id: example for example in found}


def stage_name(prefix: Sequence[int]) -> str:
    """The name of the stage that was trained on these slices, in this order."""
    return "-".join(map(str, prefix))


def stage_file(folder: Path, prefix: Sequence[int]) -> Path:
    """The file of a stage in the folder of its shard."""
    return folder / f"{stage_name(prefix)}.safetensors"


def stage_folder(shard: int, generation: int) -> str:
    """The name of the folder of a shard's stages."""
    return f"shard-{shard}.{generation}"


def read_stage(path: Path) -> dict[str, torch.Tensor]:
    """The LoRA of one stage: name -> tensor.

    Raises:
        BadInput: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"The stage {path} cannot be read ({' '.join(str(error).split())}).") from None


def served_files(folder: Path, number: int, shard: Shard) -> list[Path]:
    """The files of the stages that shard ``number`` of a model folder serves, in their order."""
    where, prefix = folder / KEY / stage_folder(number, shard.generation), shard.served.prefix
    return [stage_file(where, prefix[:size]) for size in range(1, len(prefix) + 1)]


def read_served(folder: Path, state: Sharded) -> list[dict[str, torch.Tensor]]:
    """The LoRA of every shard that contributes: name -> tensor, of all its served stages together.

    Raises:
        BadInput: a file is missing or damaged.
    """
    found = []
    for number, shard in enumerate(state.shards):
        tensors: dict[str, torch.Tensor] = {}
        for file in served_files(folder, number, shard):
            tensors |= read_stage(file)
        if tensors:
            found.append(tensors)
    return found


def prefix_sha256(stages: Sequence[str]) -> str:
    """The hash of a prefix: sha256 of the sha256 of its stages' files, as lines of hexadecimal digits."""
    return hashlib.sha256("".join(f"{stage}\n" for stage in stages).encode()).hexdigest()
