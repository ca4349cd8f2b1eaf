"""Large pages: the bytes stay as they are, and the system says that they lie in large pages."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from compress.kernels.cpu import pages
from compress.kernels.cpu.pages import PAGE, into_large_pages


def large_bytes(address: int) -> int:
    """Bytes in large pages of the mapping that an address belongs to."""
    for mapping in re.split(r"\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text()):
        start, end = (int(end, 16) for end in mapping.split(" ", 1)[0].split("-"))
        if start <= address < end:
            return int(re.search(r"AnonHugePages:\s*(\d+)", mapping)[1]) << 10
    raise AssertionError("no such mapping")


def test_the_bytes_stay_as_they_are() -> None:
    small, large = torch.arange(1000), torch.arange(1 << 20)
    into_large_pages(None, small, large, torch.empty(0), small[3:7])
    assert torch.equal(small, torch.arange(1000))
    assert torch.equal(large, torch.arange(1 << 20))


@pytest.mark.parametrize("nbytes", [1, PAGE, 3 * PAGE + 1])
def test_every_page_is_asked_for_whatever_becomes_of_the_others(
    nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(pages, "_advise", lambda: lambda *given: asked.append(given) or -1)
    tensor = torch.empty(nbytes, dtype=torch.uint8)
    into_large_pages(tensor)
    first, last = (address // PAGE for address in (tensor.data_ptr(), tensor.data_ptr() + nbytes - 1))
    assert asked == [(number * PAGE, PAGE, 25) for number in range(first, last + 1)]


def test_they_lie_in_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    advise, answers = pages._advise(), []
    if advise is None:
        pytest.skip("This system has no madvise.")
    monkeypatch.setattr(pages, "_advise", lambda: lambda *given: answers.append(advise(*given)))
    # A mapping of its own: numpy advises parts of the heap, and the system counts these apart.
    memory = mmap.mmap(-1, 8 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
    into_large_pages(tensor)
    if answers.count(0) < 7:
        pytest.skip("This system has not enough large pages to give.")
    assert large_bytes(-(-tensor.data_ptr() // PAGE) * PAGE) >= 7 * PAGE


def test_where_the_system_has_none_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_advise", lambda: None)
    into_large_pages(torch.ones(3))
    monkeypatch.setattr(pages, "_advise", lambda: lambda *_: -1)
    into_large_pages(torch.ones(3))


def test_no_memory_of_a_gpu_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(pages, "_advise", lambda: lambda *given: calls.append(given))
    into_large_pages(torch.empty(5, device="meta"))
    assert not calls
