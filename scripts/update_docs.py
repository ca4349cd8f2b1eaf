#!/usr/bin/env python
"""Put real output into README.md, between its markers: of every benchmark whose output is there.

scripts/quickstart
python scripts/bench_pruning.py; python scripts/bench_kprune.py; python scripts/bench_embeddings.py
bench="python scripts/bench_quantization.py --nsamples 8 --protocols"
methods="--methods rtn hqq awq gptq nested bitstack llm-qat"
$bench "Wikipedia, 512" "Brown, 512" $methods > out/bench-quantization.md
$bench "Wikipedia, 2048" --bits 4 $methods > out/bench-2048.md
$bench "Wikipedia, 2048" --no-peers --bits 3 2 $methods apiq > out/bench-2048-narrow.md
$bench "Wikipedia, 512" "Brown, 512" --no-peers --methods gptq apiq > out/bench-apiq.md
python scripts/bench_quantization.py --protocols "Wikipedia, 512" "Brown, 512" --no-peers --methods gptq \\
    --folder out/bench-q32 > out/bench-q32.md
compress-model compare qat0 qat --format markdown -o out/llm-qat.md  # made as the README says
python scripts/bench_streaming.py --recipes replaceme flap gptq bitstack hqq > out/bench_streaming.txt
python scripts/bench_streaming.py --layers 2 --recipes awq nested apiq >> out/bench_streaming.txt
python scripts/update_readme.py
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = {  # marker -> file below out/
    "quickstart": "quickstart/comparison.md",
    "bench_pruning": "bench-pruning/table.md",
    "bench_kprune": "bench-kprune/table.md",
    "bench_quantization": "bench-quantization.md",
    "bench_2048": "bench-2048.md",
    "bench_2048_narrow": "bench-2048-narrow.md",
    "bench_quantization_32": "bench-q32.md",
    "bench_embeddings": "bench-embeddings/table.md",
    "bench_apiq": "bench-apiq.md",
    "llm_qat": "llm-qat.md",
    "bench_streaming": "bench_streaming.txt",
}


def put(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the markers of ``name``."""
    pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)"
    changed, count = re.subn(pattern, lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text, flags=re.S)
    if count != 1:
        raise SystemExit(f"README.md has no pair of markers '{name}'.")
    return changed


def shown(file: Path) -> str:
    """What the README shows of an output: Markdown as it is, plain text as a block of code."""
    text = file.read_text(encoding="utf-8").strip()
    if file.suffix == ".md":
        return text
    lines = [line for line in text.splitlines() if line and not line.startswith(("Error", "$"))]
    return "\n".join(f"    {line}".rstrip() for line in lines)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, output in OUTPUTS.items():
        file = ROOT / "out" / output
        if file.exists():
            text = put(text, name, shown(file))
        else:
            print(f"{name}: left as it is, {file} is not there")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
