"""Export to ONNX, through the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.errors import BadInput

Export = Callable[..., dict[str, Any]]


@pytest.mark.loaders  # tracing takes long
@pytest.mark.parametrize(
    ("method", "options", "rounds_inputs", "kl"),
    [("rtn", {"bits": 4, "group_size": 32}, False, 1e-6), ("float", {"type": "fp8"}, True, 1e-2)],
)
def test_onnxruntime_computes_the_same(
    tmp_path: Path,
    export: Export,
    quantized: Callable[..., Path],
    method: str,
    options: dict[str, Any],
    rounds_inputs: bool,
    kl: float,
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    source = quantized(method, **options)
    record = export(source, "--format", "onnx", "-o", tmp_path / "out")
    found = record["exported"]["verification"]
    assert found["not_tried"] is None
    assert found["kl"] < kl
    assert (tmp_path / "out" / "model.onnx").exists()
    notes = record["exported"]["notes"]
    assert any("without a key-value cache" in note for note in notes)
    assert any("inputs of linears" in note for note in notes) == rounds_inputs


def test_without_onnx_the_package_is_named(
    tmp_path: Path,
    export: Export,
    shared_decoder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from compress.export import onnx

    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'compress-model\[onnx\]'"):
        export(shared_decoder(), "--format", "onnx", "-o", tmp_path / "out")
