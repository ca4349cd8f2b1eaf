"""The energy that processors and memory take, where the machine tells it.

Linux shows the counters of Intel's RAPL, which AMD has, too, in /sys/class/powercap. Most systems let only
root read them, and virtual machines rarely have any; then there is no energy to tell.
"""

from __future__ import annotations

import re
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """The counters of this machine: of its processor packages, and of its memory where that has one.

    They count everything that runs on the machine. Each starts again at 0 after some minutes to hours under
    load, which is noticed once between two readings.

    Args:
        folder: where Linux shows them.
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        zones = sorted(folder.glob("intel-rapl:*")) if folder.is_dir() else []
        self._zones = [zone for zone in zones if _counts(zone)]

    def read(self) -> list[int]:
        """Microjoules of every counter; empty if there is none, or one cannot be read."""
        try:
            return [_number(zone / "energy_uj") for zone in self._zones]
        except (OSError, ValueError):
            return []

    def since(self, before: list[int]) -> float | None:
        """Joules since a reading, or None if there is nothing to read."""
        now = self.read()
        if not now or not before:
            return None
        try:
            return (
                sum(
                    after - start if after >= start else after - start + _number(zone / "max_energy_range_uj")
                    for zone, start, after in zip(self._zones, before, now, strict=True)
                )
                / 1e6
            )
        except (OSError, ValueError):
            return None


def _counts(zone: Path) -> bool:
    """Whether a zone is a package or a memory: others, such as cores, are parts of these."""
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        return False
    return re.fullmatch(r"package-\d+(-die-\d+)?|dram", name) is not None


def _number(file: Path) -> int:
    return int(file.read_text())
