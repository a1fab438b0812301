// The tensor cores' product of 16x16 by 16x8 float16 matrices.

#pragma once

#include "common.cuh"

// d += a b. Lane l holds, with g = l / 4 and q = l % 4: a[0], a[2] of row g and a[1], a[3] of row
// g + 8, columns 2q, 2q + 1 (a[0], a[1]) and 8 + 2q, 9 + 2q; b0 and b1 those rows of column g;
// d[0], d[1] of row g and d[2], d[3] of row g + 8, columns 2q and 2q + 1.
__device__ __forceinline__ void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// x y + z of two float16 each, rounded once.
__device__ __forceinline__ u32 half2_fma(u32 x, u32 y, u32 z) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(y), "r"(z));
    return r;
}
