"""How much loss each tensor of a model causes in each of the types that it could have."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from compress.anatomy import weight
from compress.calibration.statistics.fisher import Fisher, expected_loss, sampled_loss
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.quantization.parts.ladder import Ladder, channel_importance
from compress.quantization.parts.layout import stored_linears
from compress.storage.writer import write_tensors
from compress.system.files import write_atomically

LOSSES = "losses.json"
"""The file that losses are kept in; it is written last."""


@dataclass
class Sensitivities:
    """What was measured of a model and a ladder.

    Attributes:
        losses: full name of a tensor -> type -> the loss that it causes alone, nats per token.
        powers: full name and type -> the power of importance with which the loss is least.
        importance: full name -> importance of the input channels, float32 [in]; of a head, what it reads (see
            `compress.quantization.parts.head`): float64 [in, in].
    """

    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    powers: dict[tuple[str, str], float] = field(default_factory=dict)
    importance: dict[str, torch.Tensor] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Keep everything in two files of a folder, from which `read` takes it."""
        weights = {name: values.contiguous() for name, values in self.importance.items()}
        write_tensors(weights, folder / "importance.safetensors")
        powers = [[*key, power] for key, power in self.powers.items()]
        write_atomically(folder / LOSSES, json.dumps({"losses": self.losses, "powers": powers}))

    @classmethod
    def read(cls, folder: Path) -> Sensitivities | None:
        """What `write` kept in a folder, or None."""
        if not (file := folder / LOSSES).exists():
            return None
        kept = json.loads(file.read_text(encoding="utf-8"))
        powers = {(name, kind): power for name, kind, power in kept["powers"]}
        return cls(kept["losses"], powers, load_file(folder / "importance.safetensors"))

    def rounded(self, ladder: Ladder, name: str, dense: torch.Tensor, kind: str) -> torch.Tensor:
        """What a weight becomes in a type, rounded as it was found to be best: float32 [out, in]."""
        power = self.powers.get((name, kind), ladder.powers(name)[0])
        importance = self.importance.get(name)
        if importance is not None:
            importance = importance.to(dense.device)
        return ladder.rounded(name, dense, kind, importance, power)


def linear_sensitivities(
    model: StreamedModel, ladder: Ladder, windows: Windows, seed: int, folder: Path
) -> Sensitivities:
    """Estimate the losses of the linears inside the layers, to second order (see `expected_loss`).

    Args:
        model: the dense model.
        ladder: of the types.
        windows: of text.
        seed: for drawing labels from the model.
        folder: an empty folder with room for the Fisher information: 4 bytes per weight.

    Raises:
        BadInput: a weight holds NaN or infinity.
    """
    found = Sensitivities()
    fisher = Fisher(model, windows, sampled_loss(model, windows, seed), folder)
    for layer in model.walk(None, label="measuring sensitivities"):
        information = fisher.read(layer)
        for path, stored in stored_linears(layer, ladder.sizes).items():
            name, dense = stored.removesuffix(".weight"), weight(layer.linears[path])
            of_weights = information[path]
            found.importance[name] = channel_importance(of_weights)
            measure = partial(_loss, ladder, name, dense, of_weights, windows)
            # What is best for a type in the middle is near the best for all of them.
            kinds = list(ladder.sizes[name])
            middle = kinds[len(kinds) // 2]
            tried = {power: measure(middle, power) for power in ladder.powers(name)}
            best = min(tried, key=tried.__getitem__)
            found.powers |= {(name, kind): best for kind in kinds}
            found.losses[name] = {
                kind: tried[best] if kind == middle else measure(kind, best) for kind in kinds
            }
    return found


def _loss(
    ladder: Ladder,
    name: str,
    dense: torch.Tensor,
    information: torch.Tensor,
    windows: Windows,
    kind: str,
    power: float,
) -> float:
    """The expected loss of one weight in one type, rounded by a power of importance."""
    rounded = ladder.rounded(name, dense, kind, channel_importance(information), power)
    return expected_loss(information, dense - rounded, windows)
