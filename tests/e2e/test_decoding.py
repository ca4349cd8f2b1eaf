"""The demo model decodes the same text natively and in the plain way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.sources.demo import demo_folder

pytestmark = pytest.mark.e2e
PROMPTS = ("The capital of France is", "Once upon a time there was a", "def fibonacci(n):\n")


# In bfloat16 the two best tokens often have the same logit, and sums in another order decide between them.
def test_the_demo_model_says_the_same(tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    import compress
    from compress.engine.decoding import fuse

    folder = tmp_path / "int4"
    step = {"method": "rtn", "bits": 4, "group_size": 64, "format": "compressed-tensors", "embedding_bits": 8}
    compress.run({"model": str(demo_folder()), "steps": [step]}, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, plain = (compress.load(folder, dtype="float32") for _ in range(2))
    assert fuse(model) is None
    for hooks in (plain.model._forward_hooks, plain.model._forward_pre_hooks):
        hooks.clear()
    settings: dict[str, Any] = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")
        assert torch.equal(model.generate(**tokens, **settings), plain.generate(**tokens, **settings))
