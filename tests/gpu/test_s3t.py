"""An ensemble that records can be deleted from, on a CUDA device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

import compress
from compress.cli import cli

WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "red", "blue")
SMALL = (
    *("--shards", 1, "--slices", 2, "--orders", 1, "--rank", 2, "--epochs", 1, "--learning-rate", 0.01),
    *("--batch-size", 2),
)


def s3t(*words: Any) -> dict[str, Any]:
    """Carry out a command of s3t in this process; its errors are raised."""
    done = CliRunner().invoke(cli, ["s3t", *map(str, words), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_train_delete_retrain_and_verify(
    shared_decoder: Callable[..., Path], cuda: Any, tmp_path: Path
) -> None:
    model = shared_decoder(num_hidden_layers=2, intermediate_size=128)
    records = tmp_path / "records.jsonl"
    lines = [
        {"id": f"r{number}", "question": f"Where is {word}?", "answer": f"On {word}."}
        for number, word in enumerate(WORDS)
    ]
    records.write_text("\n".join(map(json.dumps, lines)))
    tokens = torch.arange(3, 12)[None]
    s3t("train", model, records, "-o", tmp_path / "here", *SMALL)
    expected = compress.load(tmp_path / "here")(tokens).logits.detach()
    with cuda():
        there = tmp_path / "there"
        trained = s3t("train", model, records, "-o", there, *SMALL, "--device", "cuda")
        assert trained["receipt"] is not None
        found = compress.load(there, device="cuda")(tokens.to("cuda")).logits.detach().cpu()
        # Whoever can rebuild every served stage bit for bit has the same seed and kernels.
        assert s3t("verify", there, "--device", "cuda")["holds"]
        deleted = s3t("delete", there, *[f"r{number}" for number in range(len(WORDS) - 2)])
        assert deleted["exhausted"]
        assert s3t("retrain", there, "--device", "cuda")["trained"] == deleted["exhausted"]
        assert s3t("verify", there, "--device", "cuda")["holds"]
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=5e-2 * float(expected.std()))
