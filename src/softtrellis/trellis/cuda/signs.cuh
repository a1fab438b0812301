// Matrices of +-1, one bit an entry, times vectors of numbers that are two bfloat16 numbers each.

#pragma once

#include "jobs.cuh"

constexpr int SIDE = 16, QUAD = 4, LANES = 32;

// Quads of one vector of `steps` k-steps; the odd multiple of 64 bytes keeps reads off each other.
__device__ __forceinline__ int stride_of(int steps) { return 4 * (steps | 1); }

// Words of packed signs of 16 rows.
__device__ __forceinline__ int words_of(int steps) { return (steps + 3) / 4 * LANES; }

__device__ __forceinline__ float sign_of(u32 byte, int channel) {
    return (byte >> (7 - channel % 8)) & 1 ? -1.f : 1.f;
}

// 16 rows of a sign matrix times 4 N vectors of `steps` k-steps of 16 numbers. A lane, with g =
// lane / 4 and q = lane % 4, receives rows g and g + 8 of the products with the vectors 4 n + q.
template <int N>
__device__ __forceinline__ void multiply(float (&result)[N][2], const u32 *signs,
                                         const uint4 *vectors, int steps) {
    constexpr int SETS = 4 / N;  // of accumulators: a matrix instruction takes 33 cycles
    const int lane = threadIdx.x % LANES, g = lane / 4, q = lane % 4, stride = stride_of(steps);
    const uint2 *from = (const uint2 *)(vectors + g / 2 * stride + q) + g % 2;
    const u32 ones = 0x3f803f80u + (steps < 0);  // in a register: an instruction has one immediate
    float sums[SETS][N][4] = {};
    auto step = [&](u32 word, int begin, int s) {
        u32 a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = (word << (4 * s + i) & 0x80008000u) | ones;
#pragma unroll
        for (int n = 0; n < N; ++n)
            multiply_add_bfloat(sums[s % SETS][n], a, from[2 * (4 * n * stride + 4 * (begin + s))]);
    };
    int begin = 0;
    for (; begin + 4 <= steps; begin += 4) {
        const u32 word = signs[begin / 4 * LANES + lane];
#pragma unroll
        for (int s = 0; s < 4; ++s) step(word, begin, s);
    }
    if (begin < steps) {
        const u32 word = signs[begin / 4 * LANES + lane];
#pragma unroll
        for (int s = 0; s < 3; ++s)
            if (begin + s < steps) step(word, begin, s);
    }
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            result[n][h] = 0.f;
#pragma unroll
            for (int s = 0; s < SETS; ++s)
                result[n][h] += sums[s][n][2 * h] + sums[s][n][2 * h + 1];
        }
}

// What one number of the result is multiplied by and added to: row i of A and column j of X.
template <bool INPUT>
struct Output {
    u32 byte, scale, bias;  // as they are read

    static __device__ __forceinline__ int channel_of(const Parameters &p, int i, int j) {
        const int channel = p.first + i * p.b + j;
        return i < p.a && j < p.b && (INPUT || channel < p.features) ? channel : -1;
    }

    __device__ __forceinline__ void load(const Parameters &p, int i, int j) {
        const int channel = channel_of(p, i, j);
        byte = 0, scale = 0x3c00, bias = 0;
        if (INPUT || channel < 0) return;
        byte = read_byte(p.signs + channel / 8);
        if (p.scales) scale = read_half(p.scales + 2 * channel);
        if (p.bias) bias = read_bits(p.bias, channel, p.bias_type);
    }

    __device__ __forceinline__ void store(const Parameters &p, int row, int i, int j, float x,
                                          float factor) {
        const int channel = channel_of(p, i, j);
        if (channel < 0) return;
        if (INPUT) write(p.target, (long long)row * p.width + channel, HALF, x * factor);
        else
            write(p.target, (long long)row * p.features + channel, p.type,
                  x * factor * (of_half((u16)scale) * sign_of(byte, channel)) +
                      number(bias, p.bias_type));
    }
};
