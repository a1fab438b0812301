// cuda/mma.cuh for a build on the host.

#pragma once

#include "halves.cuh"

struct Operands {  // of a lane: two numbers in each word
    float a[8], b[4];
};

inline void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u32 b[2] = {b0, b1};
    Operands mine;
    for (int i = 0; i < 8; i++) mine.a[i] = of_half(a[i / 2] >> 16 * (i % 2));
    for (int i = 0; i < 4; i++) mine.b[i] = of_half(b[i / 2] >> 16 * (i % 2));
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    const float4 products = exchange(mine, [&](auto) {
        float sums[4] = {};
        for (int from = 0; from < 4; from++) {  // columns 2 from and 8 + 2 from of a
            const auto &rows = *(const Operands *)told_by(4 * g + from);
            for (int i = 0; i < 4; i++) {
                const auto &column = *(const Operands *)told_by(8 * q + 4 * (i % 2) + from);
                for (int k = 0; k < 4; k++)
                    sums[i] += rows.a[k / 2 * 4 + i / 2 * 2 + k % 2] * column.b[k];
            }
        }
        return make_float4(sums[0], sums[1], sums[2], sums[3]);
    });
    d[0] += products.x, d[1] += products.y, d[2] += products.z, d[3] += products.w;
}

inline u32 half2_fma(u32 x, u32 y, u32 z) {
    u32 r = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const double product = (double)of_half(x >> shift) * of_half(y >> shift);
        r |= (u32)to_half(product + of_half(z >> shift)) << shift;
    }
    return r;
}
