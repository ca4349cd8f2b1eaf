"""A small interpreter of the wrappers in ``kernels/cuda/source/ptx.cuh``: it reads their asm statements.

`read` finds the wrappers, `Machine` carries out their instructions for the 32 lanes of a warp. It follows the
PTX manual (docs.nvidia.com/cuda/parallel-thread-execution), number by number, and knows nothing of the
emulation, so that the two can be held against each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LANES = range(32)
Lane = dict[str, Any]
"""Values of the parameters and variables of a wrapper: numbers, addresses, or lists of numbers."""


@dataclass(frozen=True)
class Operand:
    """An expression of C++ that is bound to a register.

    Attributes:
        constraint: such as ``+f`` or ``r``.
        expression: such as ``d[0]``.
    """

    constraint: str
    expression: str

    @property
    def name(self) -> str:
        """The variable that the expression is about."""
        found = re.fullmatch(r"\(uint32_t\)__cvta_generic_to_shared\((\w+)\)", self.expression)
        return found[1] if found else re.match(r"\w+", self.expression)[0]  # type: ignore[index]

    @property
    def index(self) -> int | None:
        found = re.search(r"\[(\d+)\]$|\.([xyzw])$", self.expression)
        return None if found is None else int(found[1]) if found[1] else "xyzw".index(found[2])

    def get(self, lane: Lane) -> Any:
        value = lane[self.name]
        if choice := re.fullmatch(r"\w+ \? (\d+) : (\d+)", self.expression):
            return int(choice[1] if value else choice[2])
        return value if self.index is None else value[self.index]

    def set(self, lane: Lane, value: Any) -> None:
        if self.index is None:
            lane[self.name] = value
        else:
            lane.setdefault(self.name, [0] * 4)[self.index] = value


@dataclass(frozen=True)
class Wrapper:
    """A function of one instruction.

    Attributes:
        name: of the function.
        parameters: as they are declared, without spaces at the ends.
        text: of the instruction.
        operands: outputs, then inputs.
        clobbers: what else it says it changes.
    """

    name: str
    parameters: str
    text: str
    operands: tuple[Operand, ...]
    clobbers: str


def read(file: Path) -> list[Wrapper]:
    """All wrappers of a header."""
    text = re.sub(r"//.*", "", file.read_text())
    head = r"__device__ __forceinline__ \w+ (\w+)\(((?:[^()]|\(\S*\))*)\) "
    functions = head + r"\{(.*?)\}\s*(?=\n\n|\n\}|\n__|\ntemplate)"
    found = []
    for name, parameters, body in re.findall(functions, text, flags=re.S):
        statements = re.findall(r"\basm(?: volatile)?\((.*?)\);", body, flags=re.S)
        assert len(statements) == 1, f"{name} has {len(statements)} asm statements."
        found.append(wrapper(name, parameters, statements[0]))
    assert len(found) == len(re.findall(r"\basm\b(?=[ (])", re.sub(r"/\*.*?\*/", "", text)))
    return found


def wrapper(name: str, parameters: str, statement: str) -> Wrapper:
    # Colons also occur within the text of the instruction, so that comes first.
    quoted = re.match(r'\s*((?:"[^"]*"\s*)+)(.*)', statement, flags=re.S)
    assert quoted is not None, f"{name} has no instruction."
    text = "".join(re.findall(r'"([^"]*)"', quoted[1]))
    outputs, inputs, clobbers = (*colons(quoted[2])[1:], "", "", "")[:3]
    operands = [Operand(*pair) for part in (outputs, inputs) for pair in bound(part)]
    return Wrapper(name, " ".join(parameters.split()), text.rstrip("; \n"), tuple(operands), clobbers)


def colons(text: str) -> list[str]:
    """The parts between colons that are in no brackets."""
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == ":" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def bound(text: str) -> list[tuple[str, str]]:
    """Constraint and expression of every operand of a list."""
    found, at = [], 0
    while match := re.compile(r'\s*,?\s*"([^"]+)"\s*\(').match(text, at):
        depth, end = 1, match.end()
        while depth:
            depth += (text[end] == "(") - (text[end] == ")")
            end += 1
        found.append((match[1], text[match.end() : end - 1].strip()))
        at = end
    assert not text[at:].strip(), f"'{text}' is no list of operands."
    return found


class Machine:
    """A warp with its memory, addressed by bytes.

    Args:
        memory: global memory, uint8.
        shared: bytes of shared memory.
    """

    def __init__(self, memory: np.ndarray, shared: int) -> None:
        self.memory, self.shared = memory, np.full(shared, 0xFF, dtype=np.uint8)
        self.open: list[list[tuple[int, np.ndarray]]] = [[] for _ in LANES]
        self.groups: list[list[list[tuple[int, np.ndarray]]]] = [[] for _ in LANES]

    def run(self, wrapper: Wrapper, lanes: list[Lane]) -> None:
        """Carry out the instruction of a wrapper for all lanes, whose values it reads and sets.

        Raises:
            NotImplementedError: the instruction is none of those that are known here.
        """
        opcode, _, rest = wrapper.text.partition(" ")
        registers = [
            [wrapper.operands[int(i)] for i in re.findall(r"%(\d+)", part)] for part in arguments(rest)
        ]
        values = arguments(rest)
        for begin, carry_out in INSTRUCTIONS.items():
            if opcode.startswith(begin):
                carry_out(self, opcode, lanes, registers, values)
                return
        raise NotImplementedError(opcode)

    def multiply(self, opcode: str, lanes: list[Lane], registers: list[list[Operand]], _: list[str]) -> None:
        kind = opcode.split(".")[-2]
        assert opcode == f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
        outputs, of_a, of_b, sums = registers
        a, b, c = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32), np.zeros((16, 8), np.float32)
        for number, lane in enumerate(lanes):
            group, thread = number >> 2, number % 4
            for i, value in enumerate(halves([operand.get(lane) for operand in of_a], kind)):
                row = group if i < 2 or 4 <= i < 6 else group + 8
                a[row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)] = value
            for i, value in enumerate(halves([operand.get(lane) for operand in of_b], kind)):
                b[thread * 2 + (i & 1) + (8 if i >= 2 else 0), group] = value
            for i, operand in enumerate(sums):
                c[group if i < 2 else group + 8, thread * 2 + (i & 1)] = operand.get(lane)
        d = a @ b + c
        for number, lane in enumerate(lanes):
            for i, operand in enumerate(outputs):
                operand.set(lane, d[(number >> 2) + (8 if i >= 2 else 0), number % 4 * 2 + (i & 1)])

    def load_matrix(
        self, opcode: str, lanes: list[Lane], registers: list[list[Operand]], _: list[str]
    ) -> None:
        assert opcode == "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
        outputs, (address,) = registers
        rows = [self.shared[at : at + 16].view(np.uint32) for at in (address.get(lane) for lane in lanes)]
        for number, lane in enumerate(lanes):
            for matrix, operand in enumerate(outputs):
                operand.set(lane, int(rows[8 * matrix + number // 4][number % 4]))

    def copy(self, opcode: str, lanes: list[Lane], registers: list[list[Operand]], values: list[str]) -> None:
        assert opcode == "cp.async.cg.shared.global"
        assert values[2] == "16"
        (to,), (source,) = registers[:2]
        assert (to.constraint, source.constraint) == ("r", "l")
        assert "__cvta_generic_to_shared" in to.expression
        for number, lane in enumerate(lanes):
            present = registers[3][0].get(lane) if len(values) == 4 else 16
            data = np.zeros(16, np.uint8)
            data[:present] = self.memory[source.get(lane) : source.get(lane) + present]
            self.open[number].append((to.get(lane), data))

    def commit(self, *_: Any) -> None:
        for number in LANES:
            self.groups[number].append(self.open[number])
            self.open[number] = []

    def wait(self, _: str, lanes: list[Lane], registers: list[list[Operand]], __: list[str]) -> None:
        ((left,),) = registers
        assert left.constraint == "n"
        for number, lane in enumerate(lanes):
            while len(self.groups[number]) > left.get(lane):
                for at, data in self.groups[number].pop(0):
                    self.shared[at : at + 16] = data

    def load(self, opcode: str, lanes: list[Lane], registers: list[list[Operand]], _: list[str]) -> None:
        outputs, (address,) = registers
        width = re.fullmatch(r"ld\.global\.nc\.L1::no_allocate(\.v[24])?\.u32", opcode)
        assert width is not None
        assert len(outputs) == int((width[1] or ".v1")[2:])
        assert address.constraint == "l"
        for lane in lanes:
            words = self.memory[address.get(lane) :][: 4 * len(outputs)].view(np.uint32)
            for operand, word in zip(outputs, words, strict=True):
                operand.set(lane, int(word))

    def look_up(self, opcode: str, lanes: list[Lane], registers: list[list[Operand]], _: list[str]) -> None:
        assert opcode == "lop3.b32"
        (to,), (a,), (b,), (c,), (table,) = registers
        for lane in lanes:
            three = [f"{operand.get(lane):032b}" for operand in (a, b, c)]
            bits = (table.get(lane) >> int("".join(column), 2) & 1 for column in zip(*three, strict=True))
            to.set(lane, int("".join(map(str, bits)), 2))


INSTRUCTIONS: dict[str, Callable[..., None]] = {
    "mma.": Machine.multiply,
    "ldmatrix.": Machine.load_matrix,
    "cp.async.cg": Machine.copy,
    "cp.async.commit_group": Machine.commit,
    "cp.async.wait_group": Machine.wait,
    "ld.global": Machine.load,
    "lop3": Machine.look_up,
}
NEEDS_MEMORY = ("ldmatrix.", "cp.async")
"""Instructions that the compiler must not move loads and stores across."""


def arguments(text: str) -> list[str]:
    """The operands of an instruction; those in braces are one."""
    return [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)]


def halves(words: list[int], kind: str) -> list[float]:
    """The numbers of 16 bits in words, the lower one first."""
    pairs = np.array(words, dtype=np.uint32).view(np.uint16)
    if kind == "f16":
        return list(pairs.view(np.float16).astype(np.float32))
    return list((pairs.astype(np.uint32) << 16).view(np.float32))
