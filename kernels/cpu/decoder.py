"""The native description of a decoder, and the call that runs all its layers for one new token in each row.

The structures mirror those of source/decoder.h, which says what their fields mean.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p

from compress.kernels.cpu.linear import Linear

SILU, GELU, GELU_TANH, GELU_NEW, GELU_FAST, GELU_QUICK, RELU = range(7)
"""Activations."""

NO_NORM, RMS, RMS_OFFSET, LAYER_NORM = range(4)
"""Kinds of norms."""

NO_MASK, BOOLEAN, ADDITIVE = range(3)
"""Kinds of masks."""

LinearPointer = POINTER(Linear)


class Norm(Structure):
    """A norm, or none if it is all zeros."""

    _fields_ = (
        ("kind", c_int32),
        ("epsilon", c_float),
        ("offset", c_float),
        ("weight", c_void_p),
        ("bias", c_void_p),
    )


class Place(Structure):
    """Where the vectors of one role are among the outputs of a list of linears."""

    _fields_ = (("linear", c_int32), ("start", c_int32), ("stride", c_int32))


class Layer(Structure):
    """One layer."""

    _fields_ = (
        ("heads", c_int32),
        ("groups", c_int32),
        ("width", c_int32),
        ("neurons", c_int32),
        ("activation", c_int32),
        ("kind", c_int32),
        ("norm_first", c_int32),
        ("parallel", c_int32),
        ("eager", c_int32),
        ("scales_query", c_int32),
        ("scaling", c_float),
        ("softcap", c_float),
        ("projections", c_int32),
        ("inputs", c_int32),
        ("query", Place),
        ("key", Place),
        ("value", Place),
        ("gate", Place),
        ("up", Place),
        ("project", LinearPointer * 3),
        ("input", LinearPointer * 2),
        ("output", LinearPointer),
        ("down", LinearPointer),
        ("project_bias", c_void_p * 3),
        ("input_bias", c_void_p * 2),
        ("output_bias", c_void_p),
        ("down_bias", c_void_p),
        ("attention_norm", Norm),
        ("query_norm", Norm),
        ("key_norm", Norm),
        ("post_attention_norm", Norm),
        ("mlp_norm", Norm),
        ("post_mlp_norm", Norm),
    )


class Plan(Structure):
    """All layers."""

    _fields_ = (("layers", c_int32), ("width", c_int32), ("type", c_int32), ("layer", POINTER(Layer)))


class Given(Structure):
    """Mask and rotation of the layers of one kind."""

    _fields_ = (
        ("mask_kind", c_int32),
        ("rotated", c_int32),
        ("mask_stride", c_int64),
        ("rotation_stride", c_int64),
        ("mask", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
    )


class Step(Structure):
    """Inputs and outputs of one step."""

    _fields_ = (
        ("rows", c_int32),
        ("length", c_int32),
        ("input", c_void_p),
        ("output", c_void_p),
        ("keys", POINTER(c_void_p)),
        ("values", POINTER(c_void_p)),
        ("capacity", POINTER(c_int64)),
        ("given", POINTER(Given)),
    )


def decode(library: ctypes.CDLL, plan: Plan, step: Step) -> None:
    """Run all layers of a plan for one step. The caller has checked every size."""
    library.compress_decode(ctypes.byref(plan), ctypes.byref(step))
