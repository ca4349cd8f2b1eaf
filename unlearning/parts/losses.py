"""The losses of unlearning, as pure functions of logits, hidden states and labels.

All of them take labels int64 [B, S] that are `IGNORED` where nothing is scored (prompts and padding). Token t
is predicted at position t − 1, so the T scored tokens of a batch are predicted at the positions where
`predicts_scored` is True.

Every function gives one float32 value for each sequence, [B], which depends on that sequence alone. The loss
of a batch is their mean, so neither padding nor the other sequences of a batch change what one contributes.
Published trainers divide by the tokens of the whole batch instead.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from compress.calibration.text.records import IGNORED


def predicts_scored(labels: Tensor) -> Tensor:
    """The positions that predict a scored token: bool [B, S − 1]."""
    return labels[:, 1:] != IGNORED


def lengths(labels: Tensor) -> Tensor:
    """The number of scored tokens of each sequence, at least 1: float32 [B]."""
    return predicts_scored(labels).sum(1).clamp(min=1).float()


def scored_rows(values: Tensor, labels: Tensor) -> Tensor:
    """The rows of ``values`` [B, S, C] that predict a scored token: float32 [T, C], sequence after sequence.

    Only these rows become float32, because logits of whole batches would take gigabytes.
    """
    return values[:, :-1][predicts_scored(labels).to(values.device)].float()


def sums(values: Tensor, labels: Tensor) -> Tensor:
    """The sum of ``values`` [T] of the scored tokens over each sequence: [B]."""
    mask = predicts_scored(labels)
    return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(1)


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """N = −Σ_t log p(x_t | x_<t) over the scored tokens, nats: float32 [B]."""
    targets = labels[:, 1:][predicts_scored(labels)]
    return sums(functional.cross_entropy(scored_rows(logits, labels), targets, reduction="none"), labels)


def kl_to_reference(logits: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
    """KL(reference ‖ model), the mean over the scored tokens, nats: float32 [B].

    Args:
        logits: of the model, [B, S, V].
        labels: [B, S].
        reference: logits of the reference model where it predicts the scored tokens, [T, V].
    """
    log_p = scored_rows(logits, labels).log_softmax(-1)
    log_q = reference.float().log_softmax(-1)
    divergence = functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    return sums(divergence, labels) / lengths(labels)


def npo(nll: Tensor, reference: Tensor, beta: float) -> Tensor:
    """−(2/β) log σ(β (N − N_ref)): negative preference optimisation (arXiv:2404.05868).

    Args:
        nll: N of the model, float32 [B].
        reference: N of the model before unlearning, float32 [B].
        beta: inverse temperature; towards 0 it becomes gradient ascent.
    """
    return -2 / beta * functional.logsigmoid(beta * (nll - reference))


def simnpo(nll: Tensor, length: Tensor, beta: float, margin: float) -> Tensor:
    """−(2/β) log σ(β (N / T − δ)): NPO without a reference (arXiv:2410.07163).

    Args:
        nll: N of the model, float32 [B].
        length: scored tokens T of each sequence, [B].
        beta: inverse temperature.
        margin: δ, nats per token; a sequence whose mean loss is above it has little gradient left.
    """
    return -2 / beta * functional.logsigmoid(beta * (nll / length - margin))


def dpo(chosen: Tensor, chosen_reference: Tensor, rejected: Tensor, reference: Tensor, beta: float) -> Tensor:
    """−(2/β) log σ(β (Δ_chosen − Δ_rejected)) with Δ = N_ref − N: direct preference optimisation.

    Args:
        chosen: N of the answers to prefer, float32 [B].
        chosen_reference: the same of the model before unlearning.
        rejected: N of the answers to forget, float32 [B].
        reference: the same of the model before unlearning.
        beta: inverse temperature.
    """
    gained = (chosen_reference - chosen) - (reference - rejected)
    return -2 / beta * functional.logsigmoid(beta * gained)


def undial(logits: Tensor, labels: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Cross-entropy to softmax(z_ref − β · onehot(x_t)), the mean over scored tokens (arXiv:2402.10052).

    Args:
        logits: of the model, [B, S, V].
        labels: [B, S].
        reference: logits z_ref of the model before unlearning where it predicts the scored tokens, [T, V].
        beta: how far the logit of the token to forget is lowered.
    """
    targets = labels[:, 1:][predicts_scored(labels)]
    reference = reference.float()
    lowered = reference.scatter_add(1, targets[:, None], reference.new_full((len(targets), 1), -beta))
    log_p = scored_rows(logits, labels).log_softmax(-1)
    return sums(-(lowered.softmax(-1) * log_p).sum(-1), labels) / lengths(labels)


def squared_distance(hidden: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """‖h_t − target_t‖², the mean over the positions that predict scored tokens: float32 [B].

    Both terms of RMU (arXiv:2403.03218) are of this form.

    Args:
        hidden: hidden states h, [B, S, D].
        labels: [B, S].
        target: [T, D], or [D] for the same everywhere.
    """
    distance = (scored_rows(hidden, labels) - target.float()).square().sum(-1)
    return sums(distance, labels) / lengths(labels)
