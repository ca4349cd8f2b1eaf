"""Runs the Triton programs in Triton's interpreter, on the CPU: what the tests ask for, in one process.

    TRITON_INTERPRET=1 python interpreted.py CASES RESULTS

Triton decides when it is imported whether it interprets, so this is a process of its own. CASES is a list of
(name of a function, arguments), and RESULTS that of the tensors they return, both by torch.save.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter

from compress.kernels.triton import linear


def widen_bfloat16() -> None:
    """Have the interpreter multiply numbers of bfloat16, whose bits it takes for integers (Triton 3.9)."""
    multiply, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def widened(tensor: Any) -> Any:
        if tensor.dtype != tl.bfloat16:
            return tensor
        data = convert(tensor.data, tl.bfloat16, tl.float32, None).view("float32")
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


if __name__ == "__main__":
    widen_bfloat16()
    torch.save([getattr(linear, name)(*given) for name, given in torch.load(sys.argv[1])], sys.argv[2])
