#!/usr/bin/env python
"""Compare every quantization method at 4, 3 and 2 bits with what users would pick instead.

The model is the demo model off its 4-bit grid, in bfloat16. All methods see the same calibration windows
(Brown). All results are scored by the same code on the same windows of two texts: Wikipedia articles, and
documents of Brown that no method was calibrated on. Bytes are those of all tensors, with scales, adapters and
embeddings; files may also hold a tokenizer.

    python scripts/benchmarks/quantization.py [--bits 4 3 2] [--methods rtn gptq] [--results NAME]

Peers run where they are installed; where they are not, their rows are left out and a line says so:

- llama.cpp: ``pip install llama-cpp-python`` in this environment, and ``--llama-cpp FOLDER`` with its
  sources, for their conversion script;
- HQQ: ``pip install --no-deps hqq`` in this environment;
- bitsandbytes: ``pip install 'compress-model[bitsandbytes]'``;
- llm-compressor: ``--llm-compressor PYTHON``, an interpreter that has it (it wants an older transformers).

An interrupted benchmark goes on: what is in --folder already is not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Sheet, command, dense_model, lineage, parser, slug, write_recipe

if TYPE_CHECKING:
    import torch

    from compress.engine.windows import Windows
    from compress.evaluation.fidelity import FidelityAccumulator
    from compress.storage.checkpoint import Checkpoint

GROUP_SIZE = 64
PROTOCOLS = {  # heading -> text, context (tokens), windows
    "Wikipedia, 512": ("wikipedia", 512, 8),
    "Brown, 512": ("brown:heldout", 512, 8),
    "Wikipedia, 2048": ("wikipedia", 2048, 4),
}

# name -> the step at a width. Asymmetric; the table that tokens and head share has 8 bits, in groups.
Step = Callable[[int], dict[str, Any]]
COMMON = {"group_size": GROUP_SIZE, "symmetric": False, "embedding_bits": 8}
METHODS: dict[str, Step] = {
    name: lambda bits, name=name: {"method": name, "bits": bits, **COMMON}
    for name in ("rtn", "hqq", "awq", "gptq")
} | {"apiq": lambda bits: {"method": "apiq", "bits": bits, "rank": APIQ_RANK, **COMMON}}
APIQ_RANK = 16
STACKED: dict[str, dict[str, Any]] = {  # made once; at a width no larger than GPTQ is there
    "nested": {"method": "nested", "bits": 5, "group_size": GROUP_SIZE, "embedding_bits": 8},
    "bitstack": {"method": "bitstack", "blocks": 8, "embedding_bits": 8},
}

# Weights at 4 bits, inputs at 8 and the key-value cache at 4; trained on text that the model writes itself.
LLM_QAT = {"method": "llm-qat", "batch_size": 4, "learning_rate": 3e-4, "embedding_bits": 8}
TRAINED: dict[str, dict[str, Any]] = {
    "W4A8KV4, rounded": {**LLM_QAT, "steps": 0},
    "W4A8KV4, llm-qat": {**LLM_QAT, "epochs": 2},
}
GENERATED = {"source": "generate", "nsamples": 240, "seqlen": 128, "seed": 0}

MIXED = "awq"  # the method whose bits are mixed, to compare with llama.cpp's own mixtures
LLAMA_CPP = {2: ("Q2_K",), 3: ("Q3_K_M",), 4: ("Q4_0", "Q4_K_M")}

LLM_COMPRESSOR = """
import json, resource, sys, time, torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model, windows, bits, group_size, output = sys.argv[1:]
tokens = load_file(windows)["tokens"]
rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
weights = {"num_bits": int(bits), "type": "int", "symmetric": False, "strategy": "group",
           "group_size": int(group_size)}
groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
# In float32, which processors without bfloat16 instructions compute many times faster.
loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(model)
started = time.perf_counter()
recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"])
oneshot(model=loaded, tokenizer=tokenizer, dataset=rows, recipe=recipe,
        max_seq_length=tokens.shape[1], num_calibration_samples=len(tokens))
seconds = time.perf_counter() - started
loaded.to(torch.bfloat16).save_pretrained(output, save_compressed=True)
tokenizer.save_pretrained(output)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak_memory_bytes": peak}))
"""


@dataclass(frozen=True)
class Made:
    """A compressed model: a folder that compress.load reads, or a GGUF file.

    Attributes:
        path: where it is.
        nbytes: size of all tensors, or of those that are read.
        seconds: the time it took to make.
        peak_memory_bytes: the peak while making it, where known.
        memory: how many bytes to read of a model stored in blocks.
        step: the step of its recipe; empty for peers.
        calibration: of that recipe.
    """

    path: str
    nbytes: int
    seconds: float
    peak_memory_bytes: int | None
    memory: int | None = None
    step: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None


class Bench:
    """The dense model, its hidden states on every window, and a folder where everything lies."""

    def __init__(self, folder: Path, calibration: dict[str, Any], protocols: list[str]) -> None:
        from compress.storage.checkpoint import Checkpoint

        self.folder = folder
        self.calibration = calibration
        self.protocols = protocols
        self.dense = Checkpoint.open(dense_model(folder))

    @cached_property
    def references(self) -> dict[str, tuple[Windows, torch.Tensor]]:
        """Windows and the dense model's last hidden states, for every protocol."""
        from compress.calibration.text.windows import evaluation_windows
        from compress.engine.stream import StreamedModel
        from compress.engine.tokenizer import load_tokenizer
        from compress.evaluation.evaluate import last_hidden

        tokenizer, found = load_tokenizer(self.dense.folder), {}
        for heading in self.protocols:
            text, context, count = PROTOCOLS[heading]
            windows = evaluation_windows(tokenizer, text, context, count)
            found[heading] = (windows, last_hidden(StreamedModel(self.dense), windows, "dense"))
        return found

    def row(self, name: str, make: Callable[[Path], Made]) -> dict[str, Any]:
        """One compressed model and its scores, made and scored as far as that has not been done yet."""
        file = self.folder / f"{slug(name)}.json"
        print(f"== {name}", file=sys.stderr, flush=True)
        if file.exists():
            row = json.loads(file.read_text())
        else:
            row = {"made": asdict(make(file.with_suffix(""))), "scores": {}}
        for heading in self.protocols:
            if heading not in row["scores"]:
                row["scores"][heading] = self.score(Made(**row["made"]), heading)
            file.write_text(json.dumps(row))
        return row

    def measured(self, name: str, make: Callable[[Path], Made]) -> dict[str, Any]:
        """The same as a row of the sheet."""
        row = self.row(name, make)
        made = Made(**row["made"])
        figures: dict[str, Any] = {"size": {"value": made.nbytes, "unit": "bytes"}}
        for heading in self.protocols:
            key = heading.lower().replace(", ", "_")
            score = row["scores"][heading]
            figures |= {
                f"{key}.perplexity": score["perplexity"],
                f"{key}.kl": score["kl_mean"],
                f"{key}.agreement": score["top1_agreement"],
            }
        return {
            "steps": [made.step] if made.step else [],
            "calibration": made.calibration,
            "figures": figures,
            "seconds": made.seconds,
            "peak_memory_bytes": made.peak_memory_bytes,
        }

    def score(self, made: Made, heading: str) -> dict[str, Any]:
        from compress.engine.stream import StreamedModel
        from compress.evaluation.fidelity import FidelityAccumulator

        windows, hidden = self.references[heading]
        streamed = StreamedModel(self.dense)
        accumulator = FidelityAccumulator(streamed.config.vocab_size)
        with streamed.head() as head:
            scorer = self._score_gguf if made.path.endswith(".gguf") else self._score_folder
            scorer(made, windows, head, hidden, accumulator)
        return accumulator.fidelity().model_dump(mode="json")

    @staticmethod
    def _score_folder(
        made: Made, windows: Windows, dense: Any, hidden: torch.Tensor, accumulator: FidelityAccumulator
    ) -> None:
        from compress.engine.stream import StreamedModel
        from compress.evaluation.evaluate import last_hidden, logits_of
        from compress.storage.checkpoint import Checkpoint

        model = StreamedModel(opened(Checkpoint.open(made.path), made.memory))
        found = last_hidden(model, windows, "scoring")
        with model.head() as head:
            for index, (tokens, mask) in enumerate(zip(windows.tokens, windows.mask, strict=True)):
                accumulator.add(logits_of(dense, hidden[index]), logits_of(head, found[index]), tokens, mask)

    @staticmethod
    def _score_gguf(
        made: Made, windows: Windows, dense: Any, hidden: torch.Tensor, accumulator: FidelityAccumulator
    ) -> None:
        import torch
        from llama_cpp import Llama

        from compress.evaluation.evaluate import logits_of

        length = windows.tokens.shape[1]
        model = Llama(made.path, n_ctx=length, n_batch=length, logits_all=True, verbose=False)
        for index, (tokens, mask) in enumerate(zip(windows.tokens, windows.mask, strict=True)):
            model.reset()
            model.eval(tokens.tolist())
            accumulator.add(
                logits_of(dense, hidden[index]), torch.from_numpy(model.scores[:length]), tokens, mask
            )
        model.close()

    def ours(self, step: dict[str, Any], calibration: dict[str, Any] | None = None) -> Callable[[Path], Made]:
        """By compress-model, with the step of a recipe."""

        def make(output: Path) -> Made:
            text = calibration or self.calibration
            recipe = write_recipe(output.with_suffix(".yaml"), self.dense.folder, [step], text)
            return replace(self.run(recipe, output), step=step, calibration=text)

        return make

    @staticmethod
    def run(recipe: Path, output: Path) -> Made:
        command("run", recipe, "-o", output, "--overwrite")
        document = lineage(output)
        done = document["steps"][0]
        return Made(str(output), document["result"]["bytes"], done["seconds"], done["peak_memory_bytes"])

    def mixed(self, name: str, other: str, make_other: Callable[[Path], Made]) -> Callable[[Path], Made]:
        """By compress-model, with bits chosen by sensitivity, in no more bytes than ``other`` takes."""

        def make(output: Path) -> Made:
            memory = self.row(other, make_other)["made"]["nbytes"]
            step, recipe = METHODS[name](4), output.with_suffix(".yaml")
            before = output.with_suffix(".before.yaml")
            write_recipe(before, self.dense.folder, [step], self.calibration)
            recipe.unlink(missing_ok=True)
            started = time.perf_counter()
            command("mix", before, "--memory", str(memory), "-o", recipe)
            seconds = time.perf_counter() - started
            made = self.run(recipe, output)
            mixed = {**step, "bits": "mixed"}
            return replace(made, seconds=made.seconds + seconds, step=mixed, calibration=self.calibration)

        return make

    def stacked(self, name: str, bits: int) -> Callable[[Path], Made]:
        """By compress-model, as one file for all sizes, of which no more than GPTQ's bytes are read."""

        def make(_: Path) -> Made:
            from compress.storage.checkpoint import Checkpoint

            output = self.folder / name
            if not (output / "compression.json").exists():
                self.ours(STACKED[name])(output)
            done = lineage(output)["steps"][0]
            memory = self.row(f"gptq, {bits} bits", self.ours(METHODS["gptq"](bits)))["made"]["nbytes"]
            nbytes = opened(Checkpoint.open(output), memory).nbytes
            return Made(
                str(output),
                nbytes,
                done["seconds"],
                done["peak_memory_bytes"],
                memory,
                step=STACKED[name],
                calibration=self.calibration,
            )

        return make

    def llm_compressor(self, python: str, bits: int) -> Callable[[Path], Made]:
        """By llm-compressor's GPTQ, on our calibration windows."""

        def make(output: Path) -> Made:
            from compress.storage.checkpoint import Checkpoint
            from compress.storage.writer import write_tensors

            windows = self.folder / "calibration.safetensors"
            write_tensors({"tokens": self.calibration_tokens}, windows)
            arguments = (self.dense.folder, windows, bits, GROUP_SIZE, output)
            child = subprocess.run(
                [python, "-c", LLM_COMPRESSOR, *map(str, arguments)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            return Made(
                str(output), Checkpoint.open(output).nbytes, **json.loads(child.stdout.splitlines()[-1])
            )

        return make

    @cached_property
    def calibration_tokens(self) -> torch.Tensor:
        from compress.calibration.text.windows import calibration_windows
        from compress.engine.tokenizer import load_tokenizer

        settings = dict(self.calibration)
        return calibration_windows(
            load_tokenizer(self.dense.folder), settings.pop("source"), chat_template=False, **settings
        ).tokens

    def hqq(self, bits: int) -> Callable[[Path], Made]:
        """By the library of HQQ's authors; its codes are written as float32 weights for scoring only."""

        def make(output: Path) -> Made:
            from hqq.core.quantize import Quantizer

            from compress.engine.shape import ModelShape
            from compress.storage.writer import write_tensors

            started = time.perf_counter()
            linears = ModelShape.of(self.dense).linears()
            tensors, nbytes = {}, 0
            for name in self.dense.tensors:
                weight = self.dense.read(name)
                if name.removesuffix(".weight") in linears:
                    settings = {"nbits": bits, "group_size": GROUP_SIZE, "axis": 1, "device": "cpu"}
                    codes, meta = Quantizer.quantize(weight.float(), channel_wise=True, **settings)
                    nbytes += weight.numel() * bits // 8 + 2 * 2 * weight.numel() // GROUP_SIZE
                    weight = Quantizer.dequantize(codes, meta)
                else:
                    nbytes += weight.nbytes
                tensors[name] = weight.float()
            seconds = time.perf_counter() - started
            shutil.copytree(self.dense.folder, output, dirs_exist_ok=True)
            write_tensors(tensors, output / "model.safetensors")
            return Made(str(output), nbytes, seconds, None)

        return make

    def llama_cpp(self, sources: Path, kind: str) -> Callable[[Path], Made]:
        """By llama.cpp's own conversion and quantization (without an importance matrix)."""

        def make(output: Path) -> Made:
            import llama_cpp
            from gguf import GGUFReader

            dense = self.folder / "dense.gguf"
            if not dense.exists():
                script = sources / "convert_hf_to_gguf.py"
                arguments = (self.dense.folder, "--outfile", dense, "--outtype", "bf16")
                subprocess.run([sys.executable, script, *map(str, arguments)], check=True, stdout=sys.stderr)
            file = output.with_name(f"{output.name}.gguf")  # the name has a dot of its own
            parameters = llama_cpp.llama_model_quantize_default_params()
            parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
            started = time.perf_counter()
            if llama_cpp.llama_model_quantize(str(dense).encode(), str(file).encode(), parameters):
                raise RuntimeError(f"llama.cpp cannot make {file}")
            seconds = time.perf_counter() - started
            nbytes = sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)
            return Made(str(file), nbytes, seconds, None)

        return make


def opened(checkpoint: Checkpoint, memory: int | None) -> Checkpoint:
    """The part of a model in blocks that fits into ``memory``; any other model as it is."""
    from compress.storage.formats.stacks import prefix, steps_within

    return checkpoint if memory is None else prefix(checkpoint, steps_within(checkpoint, memory))


def peers(
    bench: Bench, arguments: argparse.Namespace, bits: int
) -> Iterator[tuple[str, int, Callable[[Path], Made]]]:
    """What users would pick instead, and what is compared with it; yields what `contenders` does."""
    if arguments.llm_compressor:
        yield (
            f"llm-compressor GPTQ, {bits} bits",
            bits,
            bench.llm_compressor(arguments.llm_compressor, bits),
        )
    if bits == 4 and find_spec("bitsandbytes"):
        yield "bitsandbytes NF4", bits, bench.ours({"method": "nf4"})
    if find_spec("hqq"):
        yield f"HQQ library, {bits} bits", bits, bench.hqq(bits)
    if arguments.llama_cpp and find_spec("llama_cpp"):
        for kind in LLAMA_CPP.get(bits, ()):
            make = bench.llama_cpp(arguments.llama_cpp, kind)
            yield f"llama.cpp {kind}", bits, make
            mixed = bench.mixed(MIXED, f"llama.cpp {kind}", make)
            yield f"{MIXED}, mixed to fit {kind}", bits, mixed


def contenders(
    bench: Bench, arguments: argparse.Namespace
) -> Iterator[tuple[str, int, Callable[[Path], Made]]]:
    """(name, bits, how to make it) of every row."""
    for bits in arguments.bits:
        for name in arguments.methods:
            if name == LLM_QAT["method"]:
                for row, step in TRAINED.items() if bits == 4 else ():
                    yield row, bits, bench.ours(step, GENERATED)
                continue
            make = bench.stacked(name, bits) if name in STACKED else bench.ours(METHODS[name](bits))
            yield f"{name}, {bits} bits", bits, make
            if name == "apiq":  # whose adapters' bytes GPTQ may spend on wider codes
                mixed = bench.mixed("gptq", f"apiq, {bits} bits", make)
                yield f"gptq, mixed to fit apiq, {bits} bits", bits, mixed
        if arguments.peers:
            yield from peers(bench, arguments, bits)
    for peer, there in (
        ("llm-compressor (--llm-compressor)", arguments.llm_compressor),
        ("bitsandbytes", find_spec("bitsandbytes")),
        ("HQQ", find_spec("hqq")),
        ("llama.cpp (--llama-cpp)", arguments.llama_cpp and find_spec("llama_cpp")),
    ):
        if arguments.peers and not there:
            print(f"{peer} is not here, so its rows are left out.", file=sys.stderr)


def main() -> None:
    options = parser(__doc__, "quantization")
    options.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    options.add_argument("--methods", nargs="*", default=[*METHODS, *STACKED, "llm-qat"])
    options.add_argument("--nsamples", type=int, default=32, help="calibration windows of 512 tokens")
    options.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=list(PROTOCOLS))
    options.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="sources of llama.cpp")
    options.add_argument("--llm-compressor", metavar="PYTHON", help="an interpreter that has it")
    options.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="rows of peers")
    arguments = options.parse_args()
    sheet = Sheet(arguments, "quantization")
    calibration = {"source": "brown", "nsamples": arguments.nsamples, "seqlen": 512, "seed": 0}
    bench = Bench(sheet.folder, calibration, arguments.protocols)
    for name, _, make in contenders(bench, arguments):
        sheet.row(name, lambda n=name, m=make: bench.measured(n, m))
    sheet.show()


if __name__ == "__main__":
    main()
