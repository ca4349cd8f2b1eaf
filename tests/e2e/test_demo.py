"""The demo model itself: same function as the published weights, but off their 4-bit grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from compress.engine.shape import ModelShape
from compress.pipeline.plan import make_plan, open_model
from compress.pipeline.recipe import bundled_recipes, load_recipe
from compress.pipeline.registry import METHODS, find_method
from compress.sources.demo import demo_folder, dequantised, download_gguf
from compress.storage.checkpoint import Checkpoint

pytestmark = pytest.mark.e2e

TEXT = (
    "Switzerland is a landlocked country in the heart of Europe. Its federal city is Bern, and its largest "
    "city is Zurich. Four languages are spoken: German, French, Italian and Romansh. 1 + 1 = 2, of course."
)


@pytest.fixture(scope="module")
def demo() -> tuple[PreTrainedModel, object]:
    folder = demo_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[PreTrainedModel, object]:
    return dequantised(download_gguf(Path(tmp_path_factory.mktemp("gguf"))))


def relative_error(model: PreTrainedModel) -> float:
    """Frobenius error of rounding every decoder matrix to 4 bits, asymmetric, in groups of 32 inputs."""
    error = norm = 0.0
    for name, weight in model.named_parameters():
        if "layers" in name and weight.ndim == 2:
            groups = weight.detach().double().unflatten(1, (-1, 32))
            low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
            step = (high - low) / 15
            rounded = ((groups - low) / step).round() * step + low
            error += (rounded - groups).square().sum().item()
            norm += groups.square().sum().item()
    return (error / norm) ** 0.5


@torch.no_grad()
def test_same_function_off_the_grid(demo, published):
    (model, tokenizer), (original, original_tokenizer) = demo, published
    tokens = tokenizer(TEXT, return_tensors="pt").input_ids
    assert torch.equal(tokens, original_tokenizer(TEXT, return_tensors="pt").input_ids)
    assert model.dtype == torch.float32

    difference = (model(tokens).logits - original(tokens).logits).abs().max().item()
    before, after = relative_error(original), relative_error(model)
    print(f"max |logit difference| {difference:.2e}; int4 g32 weight error {before:.2e} -> {after:.4f}")
    assert difference < 1e-3
    assert before < 1e-3
    assert after > 0.05


@torch.no_grad()
def test_greedy_text_and_chat_template(demo):
    model, tokenizer = demo
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**prompt, do_sample=False, max_new_tokens=1)
    assert tokenizer.decode(written[0, prompt.input_ids.shape[1] :]) == " Paris"

    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert "<|im_start|>user\nHello<|im_end|>" in chat


@pytest.mark.parametrize("name", METHODS["quantization"])
def test_quantization_takes_it_with_the_default_options(name):
    shape = ModelShape.of(Checkpoint.open(demo_folder()))
    method = find_method(name)
    assert method.plan(shape, method.Options()).nbytes < shape.nbytes


@pytest.mark.parametrize("name", bundled_recipes())
def test_every_bundled_recipe_fits_the_demo_model(name: str):
    recipe = load_recipe(name)
    plan = make_plan(open_model(recipe)[1], recipe.steps)
    acts = any(method.at_inference for method, _ in recipe.steps)  # and takes its statistics along
    assert plan.after.nbytes <= plan.before.nbytes * (1.01 if acts else 1)
