"""compress-model doctor"""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import rich_click as click

from compress.commands.common import common_options, make_table, print_json, stdout
from compress.errors import CompressError

FAILED = "fails: "


BFLOAT16 = {
    True: "fast: the processor multiplies it",
    False: "slow: this processor has no instructions for it, so dense models are faster with --dtype float32",
    None: "not known",
}


@click.command()
@click.option(
    "--build", is_flag=True, help="Compile the kernels of all paths of this CPU now, and try each of them."
)
@common_options
def doctor(build: bool, as_json: bool) -> None:
    """Show versions, devices, the cache, and what can be loaded and run here."""
    document = examine()
    document["CPU kernels"] = cpu_kernels(build)
    if as_json:
        print_json(document)
    else:
        _print_tables(document)
    failed = [text for text in document["CPU kernels"].values() if text.startswith(FAILED)]
    if failed:
        raise CompressError(failed[0].removeprefix(FAILED))


def _print_tables(document: dict[str, dict[str, Any]]) -> None:
    console = stdout()
    for title, values in document.items():
        table = make_table(title=title)
        table.add_column()
        table.add_column(overflow="fold")
        for key, value in values.items():
            table.add_row(key, str(value))
        console.print(table)


def cpu_kernels(build: bool = False) -> dict[str, str]:
    """What the native kernels need, which paths this processor can run, and which one is in use.

    Args:
        build: compile and try all of the paths; a path that fails has a text that begins with `FAILED`.
    """
    from compress.kernels.cpu.build import compiler_version
    from compress.kernels.cpu.library import kernel_name, paths
    from compress.kernels.cpu.processor import multiplies_bfloat16

    tried = {f"path {path}": _try(path) if build else "can run" for path in paths()}
    return {
        "C++ compiler": compiler_version() or "none found",
        **tried,
        "in use": kernel_name(),
        "bfloat16": BFLOAT16[multiplies_bfloat16()],
    }


def _try(path: str) -> str:
    from compress.kernels.cpu.trial import try_path

    try:
        try_path(path)
    except CompressError as error:
        return f"{FAILED}{error}"
    return "compiled; its results are right"


def examine() -> dict[str, dict[str, Any]]:
    """The state of this machine, as JSON data."""
    import psutil
    import torch
    from packaging.requirements import Requirement

    from compress.kernels.codes.packing import BITS
    from compress.kernels.cuda.build import find_nvcc
    from compress.kernels.ops import backend_of
    from compress.system.cache import cache_folder

    packages = {}
    for line in requires("compress-model") or []:
        requirement = Requirement(line)
        if requirement.name == "compress-model" or requirement.name in packages:
            continue
        try:
            found = version(requirement.name)
            fits = (
                ""
                if requirement.specifier.contains(found, prereleases=True)
                else f" (needs {requirement.specifier})"
            )
            packages[requirement.name] = found + fits
        except PackageNotFoundError:
            extra = str(requirement.marker).partition("==")[2].strip(" \"'") if requirement.marker else ""
            packages[requirement.name] = (
                f"missing (pip install 'compress-model[{extra}]')" if extra else "missing"
            )
    cache = cache_folder()
    devices = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    return {
        "system": {
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "memory available": f"{psutil.virtual_memory().available / 1e9:.1f} GB",
            "cache": f"{cache} ({'there' if cache.exists() else 'not made yet'})",
            "nvcc": find_nvcc() or "none found",
        },
        "packages": packages,
        "devices": devices,
        "low-bit kernels": {
            f"{bits} bits on {device}": backend_of(device) for device in devices for bits in BITS
        },
    }
