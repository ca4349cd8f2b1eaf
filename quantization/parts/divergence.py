"""How far a model is from the dense one on some windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from compress.engine.logits import first_output, through_all_layers
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.quantization.parts.head import head_inputs
from compress.storage.checkpoint import Checkpoint


class Divergence:
    """Measures the divergence of models from the dense one: what `expected_loss` estimates.

    For a causal language model that is KL(dense || model) in nats, the mean over all tokens. Other outputs
    are means of Gaussian distributions of variance 1, whose divergence is half the squared distance.

    Args:
        model: the dense model.
        windows: of text.
    """

    def __init__(self, model: StreamedModel, windows: Windows) -> None:
        self.model, self.windows = model, windows
        self._causal = model.anatomy.kind == "decoder" and model.anatomy.head is not None
        self._other: StreamedModel | None = None
        self._dense = through_all_layers(model, windows).hidden

    @torch.no_grad()
    def of(self, checkpoint: Checkpoint) -> float:
        """The divergence of another version of the model, with the same tensors: nats per token."""
        if self._other is None:
            self._other = StreamedModel(checkpoint, self.model.device)
        other = self._other  # a skeleton takes longer to build than the layers of a small model to run
        other.checkpoint = other.weights.checkpoint = checkpoint
        hidden, total = through_all_layers(other, self.windows).hidden, 0.0
        with self.model.head() as dense, other.head() as head:
            for index, mask in enumerate(self.windows.mask):
                expected, given = (
                    first_output(behind(states.read(index, index + 1)))[0].float()
                    for behind, states in ((dense, self._dense), (head, hidden))
                )
                total += self._between(expected, given, mask.to(given.device))
        return total / self.windows.num_tokens

    def head_inputs(self) -> torch.Tensor:
        """H of what the head of the dense model reads on the windows: float64 [E, E]."""
        return head_inputs(self.model, self._dense, self.windows)

    def _between(self, expected: torch.Tensor, given: torch.Tensor, mask: torch.Tensor) -> float:
        """The sum over the real tokens of one window."""
        if self._causal:
            p, q = (each[mask].log_softmax(-1) for each in (expected, given))
            return float(F.kl_div(q, p, reduction="sum", log_target=True).double())
        difference = given - expected
        if difference.shape[:1] == mask.shape:
            difference = difference[mask]
        return float(difference.double().square().sum() / 2)
