#pragma once
#include "narrow.h"

typedef emulation::Narrow<emulation::HalfFormat> __half;
typedef emulation::Pair<emulation::HalfFormat> __half2;
typedef __half half;
typedef __half2 half2;

EMULATED_NARROW(__half, __half2, __float2half, __half2float, __half22float2, __floats2half2_rn, __float22half2_rn,
                __half2half2, __halves2half2, __low2half, __high2half, __ushort_as_half, __half_as_ushort)
__forceinline__ __half2 __float2half2_rn(float v) { return {__half(v), __half(v)}; }
__forceinline__ __half __int2half_rn(int v) { return __half((float)v); }
__forceinline__ __half __ushort2half_rn(unsigned short v) { return __half((float)v); }
__forceinline__ __half __short2half_rn(short v) { return __half((float)v); }
__forceinline__ __half2 make_half2(__half a, __half b) { return {a, b}; }
