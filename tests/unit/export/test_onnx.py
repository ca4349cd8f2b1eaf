"""Export to ONNX, through the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.errors import BadInput

Export = Callable[..., dict[str, Any]]


@pytest.mark.loaders  # tracing takes long
def test_onnxruntime_computes_the_same(
    tmp_path: Path, export: Export, quantized: Callable[..., Path]
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    source = quantized("rtn", bits=4, group_size=32)
    record = export(source, "--format", "onnx", "-o", tmp_path / "out")
    found = record["exported"]["verification"]
    assert found["not_tried"] is None
    assert found["kl"] < 1e-6
    assert (tmp_path / "out" / "model.onnx").exists()
    assert any("without a key-value cache" in note for note in record["exported"]["notes"])


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
