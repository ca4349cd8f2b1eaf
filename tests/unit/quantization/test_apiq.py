"""ApiQ through the command line's way: every architecture, base and adapter, loaded again, resumed, tuned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import compress
from compress.anatomy import set_weight, weight
from compress.commands.inspect import bytes_per_part
from compress.engine.shape import ModelShape
from compress.engine.stream import Stream, StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.kernels.codes.integer import quantize_weight
from compress.kernels.layers.adapted import AdaptedLinear
from compress.method import StepContext
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.quantization.apiq import ApiQ, Learning
from compress.storage.adapter import scaling
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft
from compress.storage.formats.table import Formats
from compress.storage.lineage import read_lineage

LAYERS = 2
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**SMALL, "tie_word_embeddings": True}),
    "phi3": ("Phi3ForCausalLM", SMALL),
    "opt": ("OPTForCausalLM", {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64}),
    "gpt2": ("GPT2LMHeadModel", {"hidden_size": 32}),
    "gpt_neox": ("GPTNeoXForCausalLM", SMALL),
}
FAST = {
    "bits": 2,
    "group_size": 16,
    "rank": 4,
    "steps": 25,
    "epochs": 4,
    "batch_size": 2,
    "learning_rate": 5e-3,
}


Dense = Callable[..., Path]


@pytest.fixture(scope="session")
def dense_of(shared_decoder: Callable[..., Path]) -> Dense:
    def get(name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        return shared_decoder(CASES[name][0], dtype=dtype, **CASES[name][1])

    return get


def apiq(dense: Path, output: Path, first: dict[str, object] | None = None, **options: object) -> Path:
    """Quantize it, after another step if there is one."""
    steps = [*([first] if first else []), {"method": "apiq", **FAST, **options}]
    calibration = {"source": str(dense.parent / "text.txt"), "nsamples": 8, "seqlen": 32}
    recipe = {"model": str(dense), "calibration": calibration, "steps": steps}
    execute(parse_recipe(recipe), output)
    return output


@pytest.fixture(scope="session")
def default(dense_of: Dense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ApiQ makes of the Llama model; not to be changed."""
    return apiq(dense_of(), tmp_path_factory.mktemp("apiq") / "default")


TOKENS = torch.randint(0, 257, (3, 24), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(tokens).logits.float()


def merged(dense: Path, folder: Path) -> torch.nn.Module:
    """The dense model with Ŵ + (alpha / r) B A for its weights, from the files of the artefact."""
    model = hf.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    checkpoint = Checkpoint.open(folder)
    formats = Formats(checkpoint.config["quantization_config"])
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    linears = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in adapter}
    assert linears
    for name in linears:
        A, B = (adapter[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB")
        low_rank = settings["lora_alpha"] / settings["r"] * B @ A
        set_weight(
            model.get_submodule(name), formats.of(name).read(name, checkpoint.read).dequantize() + low_rank
        )
    return model


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("llama", "layer"), ("opt", "layer"), ("gpt2", "layer"), ("gpt_neox", "layer")),
        *(("llama", "block"), ("phi3", "block"), ("gpt2", "block")),
    ],
)
def test_what_is_loaded_computes_what_was_trained(
    name: str, mode: str, dense_of: Dense, tmp_path: Path, monkeypatch
) -> None:
    dense = dense_of(name)
    streams: list[Stream] = []
    wrapped = getattr(Learning, f"{mode}_wise")

    def watched(self: Learning, *arguments: object) -> tuple[float, float]:
        streams.append(self.quantized)
        return wrapped(self, *arguments)

    monkeypatch.setattr(Learning, f"{mode}_wise", watched)
    folder = apiq(dense, tmp_path / "apiq", mode=mode)
    trained, windows = streams[-1].hidden, streams[-1].windows
    model, anatomy = compress.load(folder), ModelShape.of(Checkpoint.open(dense)).anatomy
    adapted = [part for part in model.modules() if isinstance(part, AdaptedLinear)]
    assert len(adapted) == LAYERS * len(anatomy.linear_paths)
    found = logits(model, windows.tokens)
    streamed = StreamedModel(Checkpoint.open(folder))
    with torch.no_grad(), streamed.head() as head:
        expected = head(trained.read(0, len(windows))).logits
    assert float((found - expected).abs().max()) <= 1e-4
    assert float((logits(model) - logits(merged(dense, folder))).abs().max()) <= 1e-4

    lineage = read_lineage(folder)
    losses = lineage.steps[0].details["loss"]
    assert all(
        after < 0.9 * before
        for before, after in zip(losses["plain_rounding"], losses["learned"], strict=True)
    )
    original = logits(compress.load(dense), windows.tokens)
    plain = compress.load(dense)
    for layer in plain.base_model.get_submodule(anatomy.layers):
        for linear in anatomy.linears(layer).values():
            set_weight(linear, quantize_weight(weight(linear), 2, 16, False, torch.float16).dequantize())
    nearest = (logits(plain, windows.tokens) - original).square().mean()
    assert (found - original).square().mean() < 0.9 * nearest


def test_every_size_counts_the_adapter(dense_of: Dense, tmp_path: Path) -> None:
    dense = dense_of(dtype=torch.bfloat16)
    shape = ModelShape.of(Checkpoint.open(dense))
    options = ApiQ.Options(**FAST)
    planned = ApiQ().plan(shape, options)
    folder = apiq(dense, tmp_path / "apiq")
    files = [folder / "model.safetensors", folder / "adapter" / "adapter_model.safetensors"]
    written = ModelShape.of(Checkpoint.open(folder))
    assert planned.tensors == written.tensors
    assert planned.config == written.config
    lineage = read_lineage(folder)
    adapter = bytes_per_part(written)["adapter"]
    assert adapter == 2 * 4 * sum(sum(pair) for pair in shape.linears().values())  # bfloat16, as the weights
    assert adapter == lineage.steps[0].details["adapter_bytes"]
    assert lineage.result.bytes == lineage.result.predicted_bytes == planned.nbytes == written.nbytes
    assert sum(bytes_per_part(written).values()) == written.nbytes
    assert written.nbytes < sum(file.stat().st_size for file in files) < written.nbytes + 20_000  # headers
    weights = sum(out * width for out, width in shape.linears().values())
    details = lineage.steps[0].details
    assert details["bits_per_weight_with_adapter"] == pytest.approx(
        details["bits_per_weight"] + 8 * adapter / weights, abs=1e-3
    )
    assert set(lineage.result.files) >= {
        "model.safetensors",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
    }
    assert str(written.loads_with) == "transformers with compressed-tensors, and peft for the adapter"


def test_kept_linears_have_no_adapter(dense_of: Dense, tmp_path: Path) -> None:
    folder = apiq(dense_of(), tmp_path / "apiq", ignore=["*.0.mlp.down_proj", "*.v_proj"])
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    names = {
        key.removeprefix("base_model.model.").rpartition(".lora_")[0]
        for key in load_file(folder / "adapter" / "adapter_model.safetensors")
    }
    assert set(settings["target_modules"]) == names  # in full, since down_proj alone would match too much
    assert len(names) == LAYERS * 7 - 3
    compress.load(folder)


@pytest.mark.parametrize("mode", ["layer", "block"])
def test_a_pruned_model(mode: str, dense_of: Dense, tmp_path: Path) -> None:
    flap = {"method": "flap", "ratio": 0.4, "width_multiple": 1}
    options = {"mode": mode, "group_size": "channel", "format": "compressed-tensors"}
    folder = apiq(dense_of(), tmp_path / "apiq", first=flap, **options)
    checkpoint = Checkpoint.open(folder)
    layers = checkpoint.config["pruned"]["layers"]
    assert len({json.dumps(layer) for layer in layers}) > 1
    assert logits(compress.load(folder)).isfinite().all()
    assert read_lineage(folder).reload.max_difference <= 1e-4


@pytest.mark.parametrize("options", [{}, {"mode": "block"}, {"saliency": "before_lora"}])
def test_a_resumed_run_writes_the_same(options: dict[str, object], dense_of: Dense, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(dense_of())
    tokens = torch.randint(0, 257, (6, 16), generator=torch.Generator().manual_seed(3))
    windows = Windows(tokens, torch.ones_like(tokens, dtype=torch.bool), source="random")
    options = ApiQ.Options(**{**FAST, "epochs": 2, **options})

    def run(work: Path) -> StepContext:
        return StepContext(Draft(checkpoint, work), windows, 0, work, "cpu", lambda text, share: None)

    class Killed(Exception):
        pass

    def kill(text: str, share: float) -> None:
        if "ApiQ" in text:
            raise Killed

    unbroken, resumed = run(tmp_path / "a"), run(tmp_path / "b")
    expected = ApiQ().apply(StreamedModel(checkpoint), options, unbroken)
    with pytest.raises(Killed):  # after the first layer
        ApiQ().apply(StreamedModel(checkpoint, progress=kill), options, run(tmp_path / "b"))
    assert ApiQ().apply(StreamedModel(checkpoint), options, resumed) == expected
    assert resumed.draft.tensors == unbroken.draft.tensors
    for name in unbroken.draft.tensors:
        assert torch.equal(unbroken.draft.read(name), resumed.draft.read(name)), name


def test_an_encoder(tiny_encoder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_encoder("BertForSequenceClassification")
    checkpoint = Checkpoint.open(folder)
    tokens = torch.randint(5, 25, (6, 16), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(16) < torch.tensor([16, 9, 16, 12, 5, 16])[:, None]
    work = tmp_path / "work"
    run = StepContext(
        Draft(checkpoint, work), Windows(tokens, mask, source="random"), 0, work, "cpu", lambda *_: None
    )
    for mode in ("layer", "block"):
        options = ApiQ.Options(**{**FAST, "mode": mode})
        report = ApiQ().apply(StreamedModel(checkpoint), options, run)
        planned = ApiQ().plan(ModelShape.of(checkpoint), options)
        assert run.draft.tensors == planned.tensors
        assert planned.config["adapter"]["task_type"] is None
        losses = report.details["loss"]
        assert sum(losses["learned"]) < 0.9 * sum(losses["plain_rounding"])
        shutil.rmtree(work)
        run.draft.reset()
    with pytest.raises(BadInput, match="language model"):
        ApiQ().plan(ModelShape.of(checkpoint), ApiQ.Options(group_size=16, saliency="after_lora"))


def test_weights_that_the_grid_holds_stay(write_decoder: Callable[..., Path], tmp_path: Path) -> None:
    dense = write_decoder(tmp_path / "dense", dtype=torch.float16, **CASES["llama"][1])
    weights, generator = load_file(dense / "model.safetensors"), torch.Generator().manual_seed(4)
    letters = torch.randint(97, 123, (600,), generator=generator).tolist()
    (tmp_path / "text.txt").write_text(bytes(letters).decode())  # repeats nothing, which would cost precision
    for name, value in weights.items():
        if name.endswith("proj.weight"):
            levels = torch.randint(-2, 2, (value.numel() // 16, 16), generator=generator).half()
            levels[:, 0], levels[:, 1] = -2, 1  # both ends of the grid
            weights[name] = levels.mul(0.125).view_as(value)
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    for mode in ("layer", "block"):
        folder = apiq(dense, tmp_path / mode, mode=mode)
        first, second = (logits(compress.load(path, dtype="float32")) for path in (folder, dense))
        assert float((first - second).abs().max()) <= 1e-3
        assert 0 <= max(read_lineage(folder).steps[0].details["loss"]["learned"]) < 1e-4


def test_an_adapter_that_does_not_fit_is_refused(default: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(default, tmp_path / "apiq"))
    settings, weights = (
        folder / "adapter" / "adapter_config.json",
        folder / "adapter" / "adapter_model.safetensors",
    )
    kept, tensors = settings.read_text(), load_file(weights)

    def changed(**values: object) -> None:
        settings.write_text(json.dumps(json.loads(kept) | values))

    for values in (
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"peft_type": "IA3"},
        {"bias": "all"},
    ):
        changed(**values)
        with pytest.raises(BadInput, match="Only plain LoRA"):
            compress.load(folder)
    changed(r=3)
    with pytest.raises(BadInput, match="shape"):
        compress.load(folder)
    changed()
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, weights)
    with pytest.raises(BadInput, match="neither lora_A nor lora_B"):
        compress.load(folder)
    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)}, weights)
    with pytest.raises(BadInput, match="is not a packed linear"):
        compress.load(folder)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, weights)
    with pytest.raises(BadInput, match="lacks the tensor"):
        compress.load(folder)
    shutil.rmtree(folder / "adapter")
    with pytest.raises(BadInput, match="copy the folder 'adapter' along"):
        compress.load(folder)


def test_scalings() -> None:
    plain = {"peft_type": "LORA", "r": 16, "lora_alpha": 8}
    assert scaling(plain) == 0.5
    assert scaling(plain | {"use_rslora": True}) == 2


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_peft_goes_on_from_there(name: str, dense_of: Dense, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    folder = apiq(dense_of(name), tmp_path / "apiq", bits=4, format="compressed-tensors")
    base = hf.AutoModelForCausalLM.from_pretrained(folder)
    model = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).eval()
    assert float((logits(model) - logits(compress.load(folder))).abs().max()) <= 1e-4

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * LAYERS * len(ModelShape.of(Checkpoint.open(folder)).anatomy.linear_paths)
    optimizer, losses = torch.optim.AdamW(trained, 5e-3), []
    for _ in range(5):
        losses.append(model(TOKENS, labels=TOKENS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.save_pretrained(folder / "adapter")
    assert float((logits(model) - logits(compress.load(folder))).abs().max()) <= 1e-4
