"""A random Llama that decodes on a GPU, with and without a CUDA graph: the decodes of `gpu.py`."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from compress.kernels.codes.integer import quantize_weight
from compress.kernels.layers.linear import PackedLinear

GROUP = 128
HEAD_BITS = 8
PROMPT = 32
TOKENS = 64


def random_llama(sizes: dict[str, int], layers: int, device: str) -> LlamaForCausalLM:
    """A model with random weights in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=False, dtype="bfloat16", **sizes)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def pack_linears(model: LlamaForCausalLM, bits: int) -> None:
    """Put packed linears in the place of all dense ones: ``bits`` in groups, and the head at 8 bits."""
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear:
            continue
        own = HEAD_BITS if name == "lm_head" else bits
        weight = quantize_weight(module.weight.detach(), own, GROUP, True, torch.float16, name)
        model.set_submodule(name, PackedLinear.from_quantized(weight))


def token_bytes(model: LlamaForCausalLM) -> int:
    """The bytes of weights that a token reads: all but the table of the tokens, of which it reads a row."""
    table = model.get_input_embeddings().weight.nbytes
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values()) - table


class Decoder:
    """Greedy decoding in fixed memory, so that one step can be a CUDA graph.

    Args:
        model: that decodes.
        longest: tokens that the cache holds.
        device: of the model.
    """

    def __init__(self, model: LlamaForCausalLM, longest: int, device: str) -> None:
        self.model: Any = model
        self.cache = StaticCache(config=model.config, max_cache_len=longest)
        self.places = torch.arange(longest, device=device)
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, 1, dtype=torch.int64, device=device)
        # transformers 5.24 renamed it and warns about the old name, which 5.40 removes.
        self.name = (
            "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
        )

    def run(self, tokens: torch.Tensor, positions: torch.Tensor) -> None:
        """Add tokens [1, n] at positions [1, n] to the cache, and keep the likeliest next one."""
        mask = self.places <= positions[0, :, None]
        output = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask[None, None],
            use_cache=True,
            logits_to_keep=1,
            **{self.name: self.cache},
        )
        self.token.copy_(output.logits[:, -1:].argmax(-1))
        self.position.copy_(positions[:, -1:] + 1)

    def step(self) -> None:
        """Add the token that was chosen last."""
        self.run(self.token, self.position)

    def start(self, prompt: torch.Tensor) -> None:
        """Forget everything, and read a prompt [1, n]."""
        self.cache.reset()
        self.run(prompt, torch.arange(prompt.shape[1], device=prompt.device)[None])


def as_graph(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph; it is done a few times first, outside of the graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def decoded(
    model: LlamaForCausalLM,
    device: str,
    graph: bool,
    tokens: int = TOKENS,
    captured: Callable[[Callable[[], None]], Callable[[], None]] = as_graph,
) -> tuple[float, list[int]]:
    """Seconds per token after a prompt, the best of three, and the tokens.

    Args:
        model: that decodes.
        device: where it is.
        graph: whether a step is a CUDA graph.
        tokens: that are decoded.
        captured: makes a graph of a step.
    """
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT), generator=generator).to(device)
    times, found = [], []
    with torch.inference_mode():
        decoder = Decoder(model, PROMPT + tokens + 8, device)
        decoder.start(prompt)
        step = captured(decoder.step) if graph else decoder.step
        for _ in range(3):
            decoder.start(prompt)
            chosen = []
            wait()
            begin = time.perf_counter()
            for _ in range(tokens):
                chosen.append(decoder.token.clone())
                step()
            wait()
            times.append((time.perf_counter() - begin) / tokens)
            found = torch.cat(chosen).flatten().tolist()
    return min(times), found
