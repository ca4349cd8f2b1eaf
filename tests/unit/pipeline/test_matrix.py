"""A part of scripts/benchmarks/matrix.py: whatever is asked for is done, or refused in the plan."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from compress.errors import BadInput
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.registry import find_method, methods_of
from compress.quantization.round_to_nearest import RoundToNearest
from compress.storage.checkpoint import Checkpoint

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts" / "benchmarks"
SLOW = ("apiq", "llm-qat", "bitstack")  # on the diagonals once only


@pytest.fixture(scope="module")
def matrix() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield import_module("matrix")


@pytest.fixture(scope="module")
def room(matrix: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the text, and a folder for each architecture."""
    room = tmp_path_factory.mktemp("matrix")
    matrix.write_text(room / "text.jsonl")
    for name in matrix.ARCHITECTURES:
        matrix.write_model(room / name, name)
    return room


def pairs(matrix: ModuleType) -> list[tuple[str, str]]:
    return [(pruner, quantizer) for pruner in matrix.PRUNERS for quantizer in matrix.QUANTIZERS]


def test_the_matrix_has_every_method(matrix: ModuleType) -> None:
    assert set(matrix.PRUNERS) == {"none", *methods_of("pruning")}
    assert set(matrix.QUANTIZERS) == {"none", *methods_of("quantization")}
    for name, step in matrix.STEPS.items():
        if name != "none":
            fields = find_method(name).Options.model_fields
            more = {"blockpruner": "ratio", "apiq": "steps"}.get(name)  # one of three targets; less training
            assert set(step) - {"method", more} == {k for k, v in fields.items() if v.is_required()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_every_pruner_goes_into_every_quantizer(matrix: ModuleType, room: Path, architecture: str) -> None:
    """All plans; a quantizer that takes the dense model takes every pruned one."""
    checkpoint = Checkpoint.open(room / architecture)
    refused, sentences = set(), []
    for pruner, quantizer in pairs(matrix):
        steps = parse_recipe({"model": "model", "steps": matrix.steps_of(pruner, quantizer)}).steps
        try:
            make_plan(checkpoint, steps)
        except BadInput as error:
            refused.add((pruner, quantizer))
            sentences.append(str(error))
    assert all(sentence.endswith(".") for sentence in sentences)
    alone = {pair for pair in refused if "none" in pair}
    assert {(pruner, quantizer) for pruner, quantizer in refused} == {
        pair for pair in pairs(matrix) if (pair[0], "none") in alone or ("none", pair[1]) in alone
    }
    assert len(alone) == {"llama": 0, "gpt2": 0, "bert": 3}[architecture]


def test_a_diagonal_through_pruners_quantizers_and_architectures(matrix: ModuleType, room: Path) -> None:
    pruners, quantizers = list(matrix.PRUNERS), list(matrix.QUANTIZERS)
    quick = [name for name in quantizers if name not in SLOW]
    cells = {("llama", pruners[n % 7 + 1], name) for n, name in enumerate(quantizers)}
    cells |= {("bert", pruners[n % 5], name) for n, name in enumerate(quick)}
    cells |= {(name, pruners[n % 8], quick[n % 9]) for n, name in enumerate(matrix.ARCHITECTURES)}
    faults = {}
    for architecture, pruner, quantizer in sorted(cells):
        steps = matrix.steps_of(pruner, quantizer)
        found = matrix.outcome(room / architecture, steps, room / "text.jsonl", room / "result")
        if found != "done" and not found.startswith("refused: "):
            faults[architecture, pruner, quantizer] = found
    assert faults == {}


def test_what_is_wrong_is_called_so(matrix: ModuleType, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome_of(*methods: str) -> str:
        steps = matrix.steps_of(*methods)
        return matrix.outcome(room / "llama", steps, room / "text.jsonl", room / "result")

    def fail(error: Exception) -> object:
        def apply(*_: object) -> None:
            raise error

        return apply

    assert outcome_of("none", "rtn") == "done"
    for error, found in (
        (BadInput("No."), "refused after the plan: No."),
        (KeyError("x"), "internal error: KeyError: 'x'"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(RoundToNearest, "apply", fail(error))
            assert outcome_of("none", "rtn") == found
    with monkeypatch.context() as patch:
        patch.setattr(RoundToNearest, "plan", fail(ZeroDivisionError()))
        assert outcome_of("none", "rtn").startswith("internal error in the plan")
    with monkeypatch.context() as patch:
        computed = iter((torch.ones(2), torch.zeros(2)))
        patch.setattr(matrix, "_first", lambda _: next(computed))
        assert outcome_of("none", "rtn") == "wrong: transformers computes something else"
    assert outcome_of("shortgpt", "rtn") == "done"
