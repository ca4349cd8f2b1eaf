"""A house to run recipes in, and what it must look like afterwards."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers as hf
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from compress.storage.lineage import Lineage, read_lineage
from compress.system.files import file_sha256

WORDS = 200
STEPS = [
    {"method": "replaceme", "layers": 3, "transform": "cosine", "epochs": 2, "held_out": 0.0},
    {"method": "rtn", "bits": 4, "group_size": 32},
]


class House:
    """A folder with a tiny model, a text and a recipe."""

    def __init__(self, folder: Path, layers: int) -> None:
        self.model, self.text, self.recipe = folder / "model", folder / "text.txt", folder / "recipe.yaml"
        torch.manual_seed(0)
        config = hf.LlamaConfig(
            vocab_size=WORDS + 2,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
        hf.LlamaForCausalLM(config).save_pretrained(self.model)
        words = {"<pad>": 0, "<eos>": 1} | {f"w{number}": number + 2 for number in range(WORDS)}
        core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        hf.PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", eos_token="<eos>"
        ).save_pretrained(self.model)
        choose = random.Random(0)
        documents = (" ".join(f"w{choose.randrange(WORDS)}" for _ in range(130)) for _ in range(30))
        self.text.write_text("\n\n".join(documents))
        self.recipe.write_text(yaml.safe_dump(self.data()))

    def data(self, steps: list[dict[str, Any]] = STEPS, **more: Any) -> dict[str, Any]:
        calibration = {"source": str(self.text), "nsamples": 16, "seqlen": 64}
        return {"model": str(self.model), "calibration": calibration, "steps": steps, **more}


def left_behind(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir() if path != output)


def check_whole(output: Path, wanted: Lineage) -> None:
    lineage = read_lineage(output)
    assert lineage.result.files == wanted.result.files
    for name, sha256 in wanted.result.files.items():
        assert file_sha256(output / name) == sha256
    assert {"README.md", "recipe.yaml", "compression.json"} < {file.name for file in output.iterdir()}
