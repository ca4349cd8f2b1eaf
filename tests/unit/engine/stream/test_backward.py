"""The way back through the layers: gradients are those of autograd on the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.anatomy import weight as anatomy_weight
from compress.engine import activations
from compress.engine import stream as module
from compress.engine.backward import Tape
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.storage.checkpoint import Checkpoint

from .common import CASES, LAYERS, Subject, everything, make_windows


def channel_masks(layer: module.Layer, count: int) -> Any:
    """Ones that multiply the inputs of a layer's last linear, one row for each window."""

    @contextmanager
    def put() -> Iterator[dict[str, Tensor]]:
        linear = list(layer.linears.values())[-1]
        mask = torch.ones(count, 1, anatomy_weight(linear).shape[1], requires_grad=True)

        def multiply(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
            (given,) = inputs
            return ((given.view(count, -1, given.shape[-1]) * mask).view(given.shape),)

        handle = linear.register_forward_pre_hook(multiply)
        try:
            yield {"mask": mask}
        finally:
            handle.remove()

    return put()


@contextmanager
def last_weight(layer: module.Layer, count: int) -> Iterator[dict[str, Tensor]]:
    """The weight of a layer's last linear."""
    weight = list(layer.linears.values())[-1].weight.requires_grad_()
    yield {"weight": weight}
    weight.requires_grad_(False)


def loss_of(windows: Windows) -> Callable[[Any, int], Tensor]:
    """Squares of the first output at real tokens with random coefficients that belong to the window."""

    def loss(output: Any, start: int) -> Tensor:
        values = output["logits"] if "logits" in output else output[0]
        total = values.new_zeros(())
        for row, value in enumerate(values):
            generator = torch.Generator().manual_seed(start + row)
            if value.ndim > 1:
                value = value[windows.mask[start + row]]
            total = total + (torch.randn(value.shape, generator=generator) * value.square()).sum()
        return total

    return loss


# Padded in every case, with states in files; without a mask in three, as layers are called like that in
# test_stream.py.
@pytest.mark.parametrize(
    ("case", "padded"),
    [*((case, True) for case in CASES), *((case, False) for case in ("llama", "gpt2", "bert"))],
)
def test_gradients_are_those_of_autograd(
    subject_of: Callable[[str], Subject],
    case: str,
    padded: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """With respect to the embeddings, to masks that each belong to one window, and to shared weights."""
    subject, windows = subject_of(case), make_windows(padded=padded)
    loss = loss_of(windows)

    # The whole model at once.
    masks = [
        channel_masks(module.Layer(i, "", each, subject.anatomy.linears(each)), 5)
        for i, each in enumerate(subject.layers)
    ]
    embedded: list[Tensor] = []

    def keep(_: Any, inputs: tuple[Tensor, ...], kwargs: Any) -> Any:
        embedded.append(inputs[0].detach().requires_grad_())
        return (embedded[0], *inputs[1:]), kwargs

    with ExitStack() as stack:
        stack.callback(subject.layers[0].register_forward_pre_hook(keep, with_kwargs=True).remove)
        leaves = [stack.enter_context(mask)["mask"] for mask in masks]
        weights = [list(subject.anatomy.linears(each).values())[-1].weight for each in subject.layers]
        options = {"use_cache": False} if subject.anatomy.kind == "decoder" else {}
        output = subject.model(windows.tokens, attention_mask=windows.mask if padded else None, **options)
        value = loss(output, 0)
        wanted = torch.autograd.grad(value, [*embedded, *leaves, *weights])
    by_mask, by_weight = wanted[1 : LAYERS + 1], wanted[LAYERS + 1 :]

    monkeypatch.setattr(activations, "MEMORY_LIMIT", 0 if padded else 1 << 30)
    model = StreamedModel(Checkpoint.open(subject.folder))
    stream = model.stream(windows, tmp_path, batch_tokens=18)
    before = everything(stream)
    tape = Tape(model, stream, tmp_path)
    tape.forward()
    found = tape.differentiate(loss)
    assert found == pytest.approx(value.item(), rel=1e-4)
    rows: dict[int, list[Tensor]] = {index: [] for index in range(LAYERS)}
    tape.backward(channel_masks, lambda layer, _, given: rows[layer.index].append(given["mask"]))
    gradient = tape.gradient.read(0, 5)
    assert close(gradient[windows.mask], wanted[0][windows.mask])
    for index, wanted_mask in enumerate(by_mask):
        assert close(torch.cat(rows[index]), wanted_mask), index

    tape.differentiate(loss)
    sums = [torch.zeros_like(weight) for weight in weights]
    tape.backward(last_weight, lambda layer, _, given: sums[layer.index].add_(given["weight"]))
    for index, wanted_weight in enumerate(by_weight):
        assert close(sums[index], wanted_weight), index
    assert torch.equal(everything(stream), before)


def close(found: Tensor, wanted: Tensor) -> bool:
    """Within 1e-4 of the largest value."""
    assert wanted.abs().max() > 0
    return torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_way_back_from_a_changed_layer(llama: Subject, tmp_path: Path):
    """Only what is behind the stream is walked, with the layer that is in memory as it is now."""
    windows = make_windows(padded=True)
    model = StreamedModel(Checkpoint.open(llama.folder))
    found = {}
    for scale in (1.0, 3.0):
        stream = model.stream(windows, batch_tokens=18)
        for layer in model.walk(None, stream, stop=2):
            if layer.index == 1:
                layer.linears["mlp.down_proj"].weight.data *= scale
                tape = Tape(model, stream, tmp_path, held=layer)
                seen: list[int] = []
                tape.forward(observe=lambda each, seen=seen: seen.append(each.index) or {})
                found[scale] = tape.differentiate(loss_of(windows))
                tape.backward(channel_masks, lambda each, start, _, seen=seen: seen.append(each.index))
                assert seen == [1, 2, 2, 2, 2, 1, 1, 1]
                assert layer.linears["mlp.down_proj"].weight.device.type == "cpu"
            stream.advance(layer)
    assert found[1.0] != pytest.approx(found[3.0], rel=1e-3)


def test_a_tape_keeps_to_one_memory_limit(llama: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = StreamedModel(Checkpoint.open(llama.folder))
    stream = model.stream(make_windows(), tmp_path)
    size = 5 * 9 * 32 * 4
    for limit, spilled in ((4 * size, False), (4 * size - 1, True)):
        monkeypatch.setattr(activations, "MEMORY_LIMIT", limit)
        tape = Tape(model, stream, tmp_path)
        held = [*(tape.states[index] for index in range(1, LAYERS + 1)), tape.gradient]
        assert [each.spilled for each in held] == [spilled] * 4
