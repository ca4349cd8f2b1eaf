from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.pruning.parts.depth import Cut, choose_cuts, plan_without_layers, remove_layers
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft


def cuts(distances: list[float], transforms: int, n: int) -> list[Cut]:
    return choose_cuts(torch.tensor(distances, dtype=torch.float64), transforms, n)


def test_one_cut_has_the_lowest_distance():
    assert cuts([0.3, 0.2, 0.1, 0.4], 1, 3) == [Cut(2, 3)]
    assert list(Cut(2, 3).removed) == [3, 4, 5]


def test_the_first_of_equal_distances_wins():
    assert cuts([0.2, 0.1, 0.1], 1, 2) == [Cut(1, 2)]


def test_cuts_do_not_overlap():
    # The second best, at layer 3, would remove layer 4 again.
    assert cuts([0.5, 0.4, 0.1, 0.2, 0.9, 0.3], 2, 2) == [Cut(2, 2), Cut(5, 2)]


def test_adjacent_cuts_become_one():
    assert cuts([0.9, 0.1, 0.8, 0.2, 0.9, 0.9], 2, 2) == [Cut(1, 4)]
    assert cuts([0.1, 0.9, 0.2, 0.9, 0.3], 3, 2) == [Cut(0, 6)]


def test_a_cut_that_leaves_no_room_for_the_others_is_passed_over():
    # With layers 2 and 3 gone, two more pairs do not fit into 1 and 4 to 6.
    assert cuts([0.5, 0.1, 0.6, 0.7, 0.8], 3, 2) == [Cut(0, 6)]


@given(st.data())
def test_cuts_remove_the_layers_asked_for(data: st.DataObject):
    n = data.draw(st.integers(1, 4))
    transforms = data.draw(st.integers(1, 4))
    layers = data.draw(st.integers(n * transforms + 1, 20))
    values = st.lists(st.floats(0, 1), min_size=layers - n, max_size=layers - n)
    distances = data.draw(values)
    found = cuts(distances, transforms, n)
    removed = [index for cut in found for index in cut.removed]
    assert len(removed) == len(set(removed)) == n * transforms
    assert set(removed) <= set(range(1, layers))
    assert not {cut.layer for cut in found} & set(removed)
    assert found == sorted(found)
    assert all(before.removed[-1] < after.layer for before, after in pairwise(found))
    best = distances.index(min(distances))
    if transforms == 1:
        assert found == [Cut(best, n)]
    if layers >= 2 * n * transforms:  # then any first cut leaves room
        assert set(Cut(best, n).removed) <= set(removed)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    config = transformers.Qwen3Config(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=4,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    return Checkpoint.open(tmp_path / "model")


def test_removed_layers_are_gone_and_the_others_numbered_anew(checkpoint: Checkpoint, tmp_path: Path):
    removed = [1, 2, 10]
    draft = Draft(checkpoint, tmp_path / "draft")
    renamed = remove_layers(draft, removed)
    assert renamed["model.layers.11.mlp.down_proj.weight"] == "model.layers.8.mlp.down_proj.weight"
    assert renamed["model.norm.weight"] == "model.norm.weight"
    assert draft.tensors.keys() == set(renamed.values())
    assert not any(name.startswith("model.layers.10.") for name in renamed)
    for old, new in renamed.items():
        assert torch.equal(draft.read(new), checkpoint.read(old))
    kinds = checkpoint.config["layer_types"]
    assert set(kinds) == {"full_attention", "sliding_attention"}
    assert draft.config["layer_types"] == [kind for i, kind in enumerate(kinds) if i not in removed]
    assert draft.config["max_window_layers"] == 2
    changed = {key for key in draft.config if draft.config[key] != checkpoint.config.get(key)}
    assert changed == {"num_hidden_layers", "layer_types", "max_window_layers"}


def test_the_plan_is_the_draft(checkpoint: Checkpoint, tmp_path: Path):
    draft = Draft(checkpoint, tmp_path / "draft")
    remove_layers(draft, [0, 5])
    planned = plan_without_layers(ModelShape.of(checkpoint), [0, 5])
    assert (planned.config, planned.tensors) == (draft.config, draft.tensors)


def test_quantized_models_are_refused(checkpoint: Checkpoint, tmp_path: Path):
    checkpoint.config["quantization_config"] = {"quant_method": "gptq"}
    with pytest.raises(BadInput, match="quantized already"):
        remove_layers(Draft(checkpoint, tmp_path / "draft"), [1])
    with pytest.raises(BadInput, match="quantized already"):
        plan_without_layers(ModelShape.of(checkpoint), [1])
