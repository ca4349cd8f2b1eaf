#pragma once
#include "narrow.h"

typedef emulation::Narrow<emulation::BfloatFormat> __nv_bfloat16;
typedef emulation::Pair<emulation::BfloatFormat> __nv_bfloat162;

EMULATED_NARROW(__nv_bfloat16, __nv_bfloat162, __float2bfloat16, __bfloat162float, __bfloat1622float2,
                __floats2bfloat162_rn, __float22bfloat162_rn, __bfloat162bfloat162, __halves2bfloat162, __low2bfloat16,
                __high2bfloat16, __ushort_as_bfloat16, __bfloat16_as_ushort)
__forceinline__ __nv_bfloat162 __float2bfloat162_rn(float v) { return {__nv_bfloat16(v), __nv_bfloat16(v)}; }
__forceinline__ __nv_bfloat16 __int2bfloat16_rn(int v) { return __nv_bfloat16((float)v); }
__forceinline__ __nv_bfloat162 make_bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
