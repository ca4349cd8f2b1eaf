"""What a walk keeps for the case that it is killed, and what observers are shown."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from compress.engine import activations
from compress.engine.activations import Activations
from compress.engine.journal import Journal
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.storage.checkpoint import Checkpoint


@pytest.mark.parametrize("memory_limit", [0, 1 << 20], ids=["spilled", "in memory"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_new_process_does_not_overwrite_what_is_durable(
    times: int, layers: int, memory_limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It begins with the embeddings, as the first one did, and only then goes back to what was saved.

    Depth-first pruning writes states several times between two saves, once for every layer it removes.
    """
    monkeypatch.setattr(activations, "MEMORY_LIMIT", memory_limit)

    def begun() -> Activations:
        held = Activations((2, 3, 4), tmp_path / "hidden")
        held.write(0, torch.zeros(2, 3, 4))
        held.flip()
        return held

    def pass_by(held: Activations, layer: int) -> None:
        for number in reversed(range(times)):
            held.write(0, torch.full((2, 3, 4), layer + 100.0 * number))
            held.flip()

    first = begun()
    for layer in range(1, layers + 1):
        pass_by(first, layer)
        saved = first.save()
    pass_by(first, 99)  # the next layer, not saved when the process is killed
    for _ in range(3):
        again = begun()
        again.restore(saved)
        assert torch.equal(again.read(0, 2), torch.full((2, 3, 4), float(layers)))
        pass_by(again, layers + 1)
        layers += 1
        saved = again.save()
        pass_by(again, 99)
    assert len(list(tmp_path.iterdir())) <= min(times + 1, 3)


def test_state_of_any_memory_layout_is_kept(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.state["transposed"] = torch.arange(6.0).view(2, 3).T
    journal.commit(1, [])
    again = Journal(tmp_path)
    assert again.restore([]) == 1
    assert torch.equal(again.state["transposed"], journal.state["transposed"])


def test_observers_see_windows_where_a_layer_flattens_them(tmp_path: Path):
    config = transformers.OPTConfig(
        vocab_size=32,
        hidden_size=8,
        ffn_dim=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=8,
    )
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    tokens = torch.arange(12).view(2, 6)
    model = StreamedModel(Checkpoint.open(tmp_path))
    stream = model.stream(Windows(tokens, torch.ones_like(tokens, dtype=torch.bool), source="numbers"))
    shapes = []
    for layer in model.walk(None, stream):
        stream.advance(layer, {"fc2": lambda seen: shapes.append([part.shape for part in seen[:3]])})
    assert shapes == [[(2, 6, 12), (2, 6, 8), (2, 6)]]
