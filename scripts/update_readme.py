#!/usr/bin/env python
"""Put real output into README.md, between its markers.

scripts/quickstart && python scripts/bench_streaming.py | tee out/bench_streaming.txt
python scripts/update_readme.py
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def put(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the markers of ``name``."""
    pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)"
    changed, count = re.subn(pattern, lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text, flags=re.S)
    if count != 1:
        raise SystemExit(f"README.md has no pair of markers '{name}'.")
    return changed


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    table = (ROOT / "out" / "quickstart" / "comparison.md").read_text(encoding="utf-8").strip()
    text = put(text, "quickstart", table)
    lines = (ROOT / "out" / "bench_streaming.txt").read_text(encoding="utf-8").splitlines()
    figures = "\n".join(
        f"    {line}".rstrip() for line in lines if line and not line.startswith(("Error", "$"))
    )
    text = put(text, "bench_streaming", figures)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
