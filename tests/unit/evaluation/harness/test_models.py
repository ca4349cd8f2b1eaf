"""What depends on the model that is asked: its chat template, and NaN."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from compress.errors import BadInput, CompressError
from compress.evaluation.harness.ask import Wanted, ask

from .conftest import LINES, TASKS, subject


def test_a_model_that_puts_out_nan_has_no_answers(model: Path, tasks: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(model, tmp_path / "nan"))
    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], 3e38)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    for task in TASKS:
        with pytest.raises(CompressError, match="puts out NaN"):
            ask(subject(copy), Wanted((task,), (tasks,)))


def test_the_chat_template_is_the_models_own(model: Path, tasks: Path, tmp_path: Path):
    with pytest.raises(BadInput, match="has no chat template"):
        ask(subject(model), Wanted(("say",), (tasks,), chat_template=True))
    copy = Path(shutil.copytree(model, tmp_path / "chatty"))
    template = "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}<assistant>"
    (copy / "chat_template.jinja").write_text(template)
    wanted = Wanted(("say",), (tasks,), chat_template=True)
    ask(subject(copy), wanted, samples=tmp_path / "samples")
    row = json.loads((tmp_path / "samples/chatty/say.jsonl").read_text().splitlines()[0])
    assert row["prompts"] == [f"<user>Question: {LINES[0]['question']}\nAnswer:<assistant>"]
