// float16 and bfloat16 numbers as bits, and the tensor cores' product of bfloat16 matrices.

#pragma once

#include "common.cuh"

typedef unsigned short u16;

__device__ __forceinline__ float of_half(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

__device__ __forceinline__ void of_halves(u32 pair, float &low, float &high) {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high)
        : "r"(pair));
}

__device__ __forceinline__ u16 to_half(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float of_bfloat(u16 x) { return __uint_as_float((u32)x << 16); }

// Two numbers as bfloat16, the first in the low bits.
__device__ __forceinline__ u32 to_bfloats(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// d += a b with a of 16x16 and b of 16x8 bfloat16 numbers; see mma.cuh for who holds what.
__device__ __forceinline__ void multiply_add_bfloat(float (&d)[4], const u32 (&a)[4], uint2 b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}
