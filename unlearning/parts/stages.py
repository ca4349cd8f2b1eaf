"""One stage of S3T: train the LoRA of one group of layers, so that repeating it gives the same bits."""

from __future__ import annotations

import gc
import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.anatomy import anatomy_of
from compress.calibration.text.records import IGNORED, TokenSequence
from compress.errors import CompressError
from compress.kernels.layers.adapted import A, B
from compress.unlearning.parts.orders import even_parts
from compress.unlearning.parts.training import Batch, scored_logits, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.method import StepContext

ROLE = "learn"
"""The one role of the sequences in a batch."""


@dataclass(frozen=True)
class HowToTrainAStage:
    """How a stage is trained, as `compress.unlearning.parts.training.train` reads it."""

    rank: int
    learning_rate: float
    epochs: int
    batch_size: int
    max_gradient_norm: float
    gradient_checkpointing: bool
    train: str = "lora"


def layer_groups(layers: int, groups: int) -> list[list[int]]:
    """The layers in so many runs of about the same length, the top ones first; stage i trains the i-th."""
    return [list(part) for part in reversed(even_parts(layers, groups))]


def stage_seed(seed: int, shard: int, generation: int, name: str) -> int:
    """The seed of a stage, from 0 to 2^31 - 1.

    It depends on the shard and on the slices that the stage sees, in their order, and on no other slice.
    """
    digest = hashlib.sha256(f"{seed}:{shard}:{generation}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def machine(device: str) -> dict[str, Any]:
    """What the last bits of a training depend on besides its seed: software, processor and threads."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def kind_of(machine: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for another machine to give the same bits; the number of threads can be set."""
    return {key: value for key, value in machine.items() if key != "threads"}


@contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Compute with kernels that give the same bits again, on a fixed number of threads.

    The Trainer looks for garbage after every training. Of many short ones that would be most of the time, so
    what is in memory already is kept out of it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU is used first
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.use_deterministic_algorithms(before[0])
        torch.set_num_threads(before[1])


class Trainee:
    """A base model with a LoRA beside every linear inside its layers, of which one group is trained at once.

    The LoRA is rank-stabilised: a linear computes W x + (2 r / √r) · B A x.

    Args:
        whole: the base model in float32, without dropout; it is changed in place.
        groups: the layers of each stage.
        rank: r.
        checkpointing: compute each layer again in the backward pass.
    """

    def __init__(
        self, whole: PreTrainedModel, groups: Sequence[Sequence[int]], rank: int, checkpointing: bool
    ) -> None:
        from peft import LoraConfig, get_peft_model

        anatomy = anatomy_of(whole.config)
        layers = whole.base_model.get_submodule(anatomy.layers)
        assert isinstance(layers, nn.ModuleList)
        self.groups = [
            [f"{anatomy.layer_name(i)}.{path}" for i in group for path in anatomy.linears(layers[i])]
            for group in groups
        ]
        whole.config.use_cache = False
        if checkpointing:
            whole.gradient_checkpointing_enable({"use_reentrant": False})
        settings = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            use_rslora=True,
            target_modules=[name for group in self.groups for name in group],
            fan_in_fan_out=anatomy.conv1d,
        )
        self.model = get_peft_model(whole, settings)
        inner = self.model.get_base_model()
        names = (name for group in self.groups for name in group)
        self._linears: dict[str, Any] = {name: inner.get_submodule(name) for name in names}
        self._factors: dict[str, Tensor] = {}
        for name, linear in self._linears.items():
            self._factors[f"{name}{A}"] = linear.lora_A["default"].weight
            self._factors[f"{name}{B}"] = linear.lora_B["default"].weight

    @staticmethod
    def scaling(rank: int) -> float:
        """The factor of B A."""
        return 2 * rank / math.sqrt(rank)

    @torch.no_grad()
    def show(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a LoRA; linears that it does not name compute what the base does."""
        for key, factor in self._factors.items():
            if key in tensors:
                factor.copy_(tensors[key])
            else:
                factor.zero_()

    @torch.no_grad()
    def begin(self, stage: int, seed: int) -> None:
        """Let the LoRA of stage ``stage`` (from 0) be trained from a random A and B = 0, and no other."""
        generator = torch.Generator().manual_seed(seed)
        for number, group in enumerate(self.groups):
            for name in group:  # what later stages will train is 0 so far, and need not be computed
                self._linears[name].enable_adapters(number <= stage)
        names = set(self.groups[stage])
        for key, factor in self._factors.items():
            trained = key.removesuffix(A).removesuffix(B) in names
            factor.requires_grad_(trained)
            if trained and key.endswith(A):
                bound = 1 / math.sqrt(factor.shape[1])  # as peft does
                factor.copy_(torch.empty(factor.shape).uniform_(-bound, bound, generator=generator))
            elif trained:
                factor.zero_()

    def found(self, stage: int) -> dict[str, Tensor]:
        """The LoRA of a stage: name -> float32 tensor on the CPU."""
        keys = (f"{name}{factor}" for name in self.groups[stage] for factor in (A, B))
        return {key: self._factors[key].detach().float().cpu().clone() for key in keys}

    def learn(
        self,
        stage: int,
        earlier: Mapping[str, Tensor],
        sequences: Sequence[TokenSequence],
        pad: int,
        how: HowToTrainAStage,
        context: StepContext,
        label: str,
    ) -> dict[str, Tensor]:
        """Train stage ``stage`` (from 0) on top of the earlier ones, which stay as they are.

        Args:
            stage: its group of layers is trained.
            earlier: the LoRA of the stages before.
            sequences: what is learned. Their order counts.
            pad: the token that fills up batches.
            how: rank, learning rate and the like.
            context: its ``seed`` decides the start and the order of the sequences.
            label: of the work in messages, and of the folder for saved states.

        Returns:
            The LoRA of the stage.

        Raises:
            CompressError: the training diverged.
        """
        self.show(earlier)
        self.begin(stage, context.seed)
        examples = [{ROLE: sequence} for sequence in sequences]
        train(self.model, examples, pad, next_token_loss, how, context, label)
        found = self.found(stage)
        if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
            raise CompressError("The training diverged; lower the learning_rate.")
        return found


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean negative log-likelihood of the learned tokens of a batch, in nats, float32."""
    logits, labels = scored_logits(model, batch[ROLE])
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )
