"""Where transformers keeps the code that comes in a model folder."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import dynamic_module_utils


@contextmanager
def code_copied_into(folder: Path) -> Iterator[None]:
    """Let transformers copy a model's code into a folder in ``folder`` that lasts as long as this block.

    By default it copies the code into the home of the user before it imports it, which fails where there is
    no home that can be written.
    """
    usual, path = dynamic_module_utils.HF_MODULES_CACHE, sys.path[:]
    with tempfile.TemporaryDirectory(prefix=".modules-", dir=folder) as cache:
        dynamic_module_utils.HF_MODULES_CACHE = cache
        try:
            yield
        finally:
            dynamic_module_utils.HF_MODULES_CACHE, sys.path[:] = usual, path
