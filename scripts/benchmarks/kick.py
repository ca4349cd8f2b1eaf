#!/usr/bin/env python
"""Ask compressed models LLM-KICK's questions, beside their perplexity and divergence, on the demo model.

Each row is one recipe. Its model is made, asked the questions of the offline suite, and compared with the
dense model question by question. The dense model is asked once, because its answers are kept.

    python scripts/benchmarks/kick.py [--rows "gptq, 4 bits" ...] [--limit 200] [--llama-cpp FOLDER]

llama.cpp's row is its own file, read back into float32 and asked like the others. It needs llama-cpp-python:
here, or in the folder that is given (see decode.py); without it the row is left out.

An interrupted benchmark goes on: what is in --folder already is not done again.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from common import Sheet, command, compressed, dense_model, parser, slug
from llama_files import dequantized, gguf_file

CALIBRATION = {"source": "brown", "nsamples": 8, "seqlen": 512, "seed": 0}
WRITTEN = {
    "source": "generate",
    "nsamples": 240,
    "seqlen": 128,
    "seed": 0,
}  # by the model itself, for LLM-QAT
SHORT = {**CALIBRATION, "nsamples": 4, "seqlen": 128}
"""For BlockPruner, which runs the model on all of it for every block that it may remove."""
TABLE = {"embedding_bits": 8}
SIGNIFICANT = 0.05


class Row(NamedTuple):
    """A compressed model. ``memory`` is the part of a stack that is read, ``gguf`` a type of llama.cpp's."""

    name: str
    steps: list[dict[str, Any]]
    calibration: dict[str, Any] = CALIBRATION
    memory: str | None = None
    gguf: str | None = None


def pruned(name: str, calibration: dict[str, Any] = CALIBRATION, **options: Any) -> Row:
    return Row(name, [options], calibration)


def quantized(method: str, bits: int) -> Row:
    return Row(f"{method}, {bits} bits", [{"method": method, "bits": bits, **TABLE}])


def stack(name: str, step: dict[str, Any], *sizes: str) -> list[Row]:
    return [Row(f"{name}, {size}", [{**step, **TABLE}], CALIBRATION, size) for size in sizes]


FLAP = {"method": "flap", "ratio": 0.2}
ROWS = [
    Row("llm-int8", [{"method": "llm-int8"}]),
    quantized("rtn", 8),
    quantized("rtn", 4),
    quantized("awq", 4),
    quantized("gptq", 4),
    Row("nf4", [{"method": "nf4"}]),
    Row("llama.cpp, Q4_K_M", [], gguf="Q4_K_M"),
    quantized("gptq", 3),
    quantized("gptq", 2),
    quantized("rtn", 2),
    Row("W4A8KV4", [{"method": "llm-qat", "bits": 4, "epochs": 1, **TABLE}], WRITTEN),
    pruned("magnitude, 20 %", method="magnitude", ratio=0.2),
    pruned("wanda-sp, 20 %", method="wanda-sp", ratio=0.2),
    pruned("flap, 20 %", **FLAP),
    pruned("kprune, 20 %", method="kprune", ratio=0.2),
    pruned("shortgpt, 6 layers", method="shortgpt", layers=6),
    pruned("replaceme, 6 layers", method="replaceme", layers=6),
    pruned("blockpruner, 20 %", SHORT, method="blockpruner", ratio=0.2),
    Row("flap, 20 %, then gptq, 4 bits", [FLAP, {"method": "gptq", "bits": 4, **TABLE}]),
    *stack("bitstack", {"method": "bitstack", "blocks": 8}, "60MB", "73.5MB", "86.9MB"),
    *stack("nested", {"method": "nested", "bits": 4}, "60MB", "73.5MB", "86.9MB"),
]


class Bench:
    """Makes and asks one model after the other, with its files in ``folder``."""

    def __init__(self, folder: Path, limit: int, llama_cpp: Path | None) -> None:
        self.folder, self.limit, self.dense = folder, limit, dense_model(folder)
        self.llama_cpp = llama_cpp

    def measured(self, row: Row) -> dict[str, Any]:
        if row.gguf:
            return self.measured_gguf(row, row.gguf)
        output = self.folder / slug(row.name.removesuffix(f", {row.memory}"))
        made = compressed(output, self.dense, row.steps, row.calibration)
        done = made["steps"][-1]
        return {
            "steps": row.steps,
            "calibration": row.calibration,
            "seconds": sum(step["seconds"] for step in made["steps"]) or None,
            "peak_memory_bytes": done["peak_memory_bytes"],
            **shown(self.cards(output, row)[-1]),
        }

    def measured_gguf(self, row: Row, kind: str) -> dict[str, Any]:
        file = gguf_file(self.dense, self.folder, kind, self.llama_cpp)
        output = dequantized(file, self.dense, self.folder / slug(row.name))
        found = shown(self.cards(output, row)[-1])
        found["figures"]["size"]["value"] = file.stat().st_size
        return found

    def dense_row(self) -> dict[str, Any]:
        first = next(self.folder.glob("*.cards.json"), None)
        card = json.loads(first.read_text())[0] if first else self.cards(self.dense, Row("dense", []))[0]
        return shown(card)

    def cards(self, output: Path, row: Row) -> list[dict[str, Any]]:
        """The scorecards of the dense model and of the row's."""
        file = self.folder / f"{slug(row.name)}.cards.json"
        if not file.exists():
            part = () if row.memory is None else ("--memory", row.memory)
            asked = ("--suite", "kick", "--limit", str(self.limit), "--text", "wikipedia", "--windows", "8")
            command("evaluate", output, "--baseline", self.dense, *asked, *part, "--json", file)
        return json.loads(file.read_text())


def shown(card: dict[str, Any]) -> dict[str, Any]:
    """Figures and words of a scorecard; a score that differs from the dense model's has a star."""
    from compress.report.scorecard import Figure

    harness, fidelity = card["harness"], card["fidelity"]
    verdict = harness["verdict"]
    figures = {
        "size": {"value": card["cost"]["weight_bytes"], "unit": "bytes"},
        "perplexity": fidelity["perplexity"],
        "kl": fidelity["kl_mean"],
        **{task["task"]: task["score"] for task in harness["tasks"]},
    }
    facts = {}
    for task in harness["tasks"]:
        differs = task["holm_p"] is not None and task["holm_p"]["value"] < SIGNIFICANT
        facts[f"{task['task']}.shown"] = Figure(**task["score"]).text + ("*" if differs else "")
    if verdict is not None:
        figures |= {name: verdict[name] for name in ("change", "worse_p")}
        for name in ("lost", "gained"):
            figures[name] = {"value": sum(task[name] or 0 for task in harness["tasks"])}
        facts["verdict"] = verdict["kind"]
    return {"figures": figures, "facts": facts}


def main() -> None:
    options = parser(__doc__, "kick")
    options.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], metavar="NAME")
    options.add_argument("--limit", type=int, default=200, help="questions of each task")
    options.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="where pip --target put it")
    arguments = options.parse_args()
    sheet = Sheet(arguments, "kick")
    bench = Bench(sheet.folder, arguments.limit, arguments.llama_cpp)
    wanted = [row for row in ROWS if not arguments.rows or row.name in arguments.rows]
    if not arguments.llama_cpp and not find_spec("llama_cpp"):
        print("llama-cpp-python is not here, so its row is left out (see --help).", file=sys.stderr)
        wanted = [row for row in wanted if not row.gguf]
    sheet.row("dense", bench.dense_row)
    for row in wanted:
        sheet.row(row.name, lambda row=row: bench.measured(row))
    sheet.show()


if __name__ == "__main__":
    main()
