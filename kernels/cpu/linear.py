"""The native description of a linear layer, and the call that multiplies with it."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_void_p

import torch

MOST_BLOCKS = 32

INTEGER, TABLE, FP8, DENSE, PLANES, FACTORS = range(6)
"""Kinds of weights."""

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

ACTIVATIONS = {"floating": 0, "int8-block": 1, "int8-token": 2}


class Linear(ctypes.Structure):
    """``Linear`` of source/product.h, which says what the fields mean."""

    _fields_ = [
        ("kind", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("bits", c_int32),
        ("group", c_int32),
        ("scale_type", c_int32),
        ("activations", c_int32),
        ("type", c_int32),
        ("blocks", c_int32),
        ("rank", c_int32),
        ("codes", c_void_p * MOST_BLOCKS),
        ("left", c_void_p * MOST_BLOCKS),
        ("right", c_void_p * MOST_BLOCKS),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("table", c_void_p),
        ("bias", c_void_p),
    ]
