// What the kernels for HYB at L = 16, k = 2, V = 2 share.
//
//   * HYB's hash h(s) = s^2 + s is the same for s and for its complement ~s, and flipping bit 15 of
//     s flips bit 15 of h, the sign of one component. The four states {s, ~s, s^8000, ~s^8000} have
//     the codewords (c0, c1), (c0, c1), (c0, -c1), (c0, -c1): one read serves all four, and a quarter
//     of the codebook (128 KiB) stays in shared memory.
//   * The overlaps 16 a + c, c = 0 .. 15, have the same 16 predecessors hi * 256 + a. A thread holds
//     the messages of these in registers, and those of 255 - a too, which meet the complements.
//
// A block has one or two groups of threads; each takes one tile at a time.

#pragma once

#include "common.cuh"

constexpr int OVERLAPS = 4096;
constexpr int QUARTER = 16384;

// The quarter of the codebook with bits 11 and 15 of the state 0: two neighbouring codewords
// [hi = 0 .. 7, a = 0 .. 127, q = 0 .. 7], the last axis swizzled by a. The component whose sign
// flips comes second.
__device__ __forceinline__ int table_index(int hi, int a, int q) {
    return (hi * 128 + a) * 8 + (q ^ (a & 7));
}

enum Symmetry { NONE = 0, SECOND_FLIPS = 1, FIRST_FLIPS = 2 };

// Loads the table; NONE if the codebook has not HYB's symmetries, so that other kernels must do it.
__device__ __forceinline__ Symmetry load_table(float4 *table, const float2 *codebook) {
    bool second = true, first = true;
    for (int i = threadIdx.x; i < QUARTER; i += blockDim.x) {
        const int s = (i & 0x3800) << 1 | (i & 0x7ff);
        const float2 x = codebook[s], y = codebook[s ^ 0xffff];
        const float2 p = codebook[s ^ 0x8000], q = codebook[s ^ 0x7fff];
        const bool same = x.x == y.x && x.y == y.y && p.x == q.x && p.y == q.y;
        second &= same && p.x == x.x && p.y == -x.y;
        first &= same && p.x == -x.x && p.y == x.y;
    }
    second = __syncthreads_and(second), first = __syncthreads_and(first);
    if (!second && !first) return NONE;
    for (int i = threadIdx.x; i < QUARTER / 2; i += blockDim.x) {
        const int hi = i >> 10, a = (i >> 3) & 127, q = i & 7;
        const int state = hi << 12 | a << 4 | q << 1;
        const float2 x = codebook[state], y = codebook[state + 1];
        table[table_index(hi, a, q)] =
            second ? make_float4(x.x, x.y, y.x, y.y) : make_float4(x.y, x.x, y.y, y.x);
    }
    return second ? SECOND_FLIPS : FIRST_FLIPS;
}
