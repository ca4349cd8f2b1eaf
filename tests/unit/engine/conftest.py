"""Artefacts of every storage format, for the tests of loaded models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

INT4: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 32, "format": "compressed-tensors"}
ARTEFACTS: dict[str, list[dict[str, Any]]] = {
    "int4": [INT4],
    "int4-asymmetric": [INT4 | {"symmetric": False}],
    "int8": [INT4 | {"bits": 8}],
    "packed-embedding": [INT4 | {"embedding_bits": 8}],
    "gptq": [INT4 | {"format": "gptq"}],
    "fp8": [{"method": "float", "type": "fp8"}],
    "mxfp4": [{"method": "float", "type": "mxfp4"}],
    "nvfp4": [{"method": "float", "type": "nvfp4"}],
    "nf4": [{"method": "nf4", "double_quant": False}],
    "nf4-double": [{"method": "nf4", "double_quant": True}],
    "llm-int8": [{"method": "llm-int8"}],
    "apiq": [{"method": "apiq", "bits": 4, "group_size": 32, "rank": 2, "epochs": 1}],
    "bitstack": [{"method": "bitstack", "blocks": 3}],
    "nested": [{"method": "nested", "bits": 4, "group_size": 32}],
    "llm-qat": [{"method": "llm-qat", "steps": 0}],
    "flap": [{"method": "flap", "ratio": 0.3}],
    "blockpruner": [{"method": "blockpruner", "blocks": 2}],
    "replaceme": [{"method": "replaceme", "layers": 1}],
    "blockpruner-int4": [{"method": "blockpruner", "blocks": 2}, INT4],
}
PACKED = [name for name in ARTEFACTS if name not in ("flap", "blockpruner", "replaceme")]


@pytest.fixture(scope="session")
def artefact(
    shared_decoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The folder of one of the `ARTEFACTS`, made once, which no test may change."""
    made: dict[str, Path] = {}

    def get(name: str, architecture: str = "LlamaForCausalLM", **settings: Any) -> Path:
        from compress.pipeline.recipe import parse_recipe
        from compress.pipeline.run import execute

        if architecture == "LlamaForCausalLM":
            settings = {"num_hidden_layers": 3, "tie_word_embeddings": True} | settings
        key = repr((name, architecture, sorted(settings.items())))
        if key not in made:
            dense = shared_decoder(architecture, **settings)
            calibration = {"source": str(dense.parent / "text.txt"), "nsamples": 4, "seqlen": 32}
            recipe = {"model": str(dense), "calibration": calibration, "steps": ARTEFACTS[name]}
            folder = tmp_path_factory.mktemp("artefact") / name
            execute(parse_recipe(recipe), folder)
            made[key] = folder
        return made[key]

    return get
