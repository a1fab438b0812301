// What lies where in the kernel for HYB at L = 12 (bcjr_short.cu), and sums over its lanes.

#pragma once

#include "common.cuh"

constexpr int TILES = 4;
constexpr int TEAMS = 8;
constexpr int OVERLAPS = 256;
constexpr int STATES = 4096;
constexpr int ROWS = 512;

// The z of a lane in the alpha sweep, 4 bits each: at any of them eight lanes in a row have
// eight different values of bits 6 to 8 of h(16 y + z), and nearly always of the banks they write to.
__constant__ u32 ORDER[32] = {
    0x87be15ca, 0xbdf78035, 0x1a07fcd2, 0x8160b7fc, 0xb912af87, 0x7140f568, 0xcea187bf, 0xa6cd1280,
    0x936f240d, 0x4291ac6e, 0xe98645b3, 0x4a5392ed, 0x5e3406cd, 0xe9d3cba2, 0x9435260d, 0x73e9b45f,
    0xc2a1769b, 0x810db539, 0x7a1268f0, 0x519ecba2, 0xde06cbf4, 0x7061589a, 0x76fe3502, 0xb0a9d68c,
    0xf308d4e5, 0x7e6cfa42, 0x9ecb4d53, 0x0687f3d4, 0x8179a523, 0x2d3ecbf4, 0xdb98ac14, 0x14e752f3};

__device__ __forceinline__ u32 hash(u32 s) { return s * s + s; }
__device__ __forceinline__ int half_of(int y) { return (y ^ y >> 1) & 1; }
__device__ __forceinline__ int column(int y) { return half_of(y) << 3 | y >> 1; }

// Where messages lie, [x, y]: neither reads at one x nor reads at one y of (y, z) conflict.
__device__ __forceinline__ u32 place(int x, int y) {
    return (u32)(x * 16 + (column(y) ^ x >> 1 ^ (x & 1))) * 16;
}

// Entry n of the table is n << 22 here, so that it wraps by itself; 16 bytes an entry.
__device__ __forceinline__ u32 entry_of(u32 v) { return (hash(v) << 16) & 0xffc00000u; }
__device__ __forceinline__ u32 stride_of(u32 v) { return (2 * v + 1) << 24; }
__device__ __forceinline__ u32 bytes(u32 entry) { return entry >> 18; }

// Codewords of all states, 8 bytes each, as the sweeps read them: [half of y, z, x >> 1, y >> 1, x & 1].
__device__ __forceinline__ u32 codeword_at(int y, int z, int x) {
    return (u32)((half_of(y) * 16 + z) * 8 + (x >> 1)) * 128 + (y >> 1) * 16 + (x & 1) * 8;
}

__device__ __forceinline__ void read4(float (&to)[TILES], u32 from) {
    const float4 x = message4(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
__device__ __forceinline__ void fetch4(float (&to)[TILES], const float4 *from) {
    const float4 x = __ldcg(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
__device__ __forceinline__ float4 four(const float (&x)[TILES]) {
    return make_float4(x[0], x[1], x[2], x[3]);
}
template <int HALF>
__device__ __forceinline__ void fold(float (&x)[16], int lane) {
    const bool upper = lane & HALF * 2;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        const float kept = upper ? x[i + HALF] : x[i], sent = upper ? x[i] : x[i + HALF];
        x[i] = kept + __shfl_xor_sync(0xffffffffu, sent, HALF * 2);
    }
}

// Sums over the warp of 16 numbers: lane i has that of x[i >> 1].
__device__ __forceinline__ float sums_of_warp(float (&x)[16], int lane) {
    fold<8>(x, lane), fold<4>(x, lane), fold<2>(x, lane), fold<1>(x, lane);
    return x[0] + __shfl_xor_sync(0xffffffffu, x[0], 1);
}

enum Symmetry { NONE = 0, SECOND_FLIPS = 1, FIRST_FLIPS = 2 };

// Whether the codebook is HYB's: rows of a table, one component negative where bit 15 of h is set.
__device__ __forceinline__ Symmetry symmetry_of(const float2 *codebook, const int *rows) {
    bool second = true, first = true;
    for (int s = threadIdx.x; s < STATES; s += blockDim.x) {
        const u32 n = hash(s) >> 6 & 1023, other = rows[n & 511];
        const float sign = (n >> 9) == (hash(other) >> 15 & 1) ? 1.0f : -1.0f;
        const float2 x = codebook[s], y = codebook[other];
        second &= x.x == y.x && x.y == sign * y.y;
        first &= x.x == sign * y.x && x.y == y.y;
    }
    second = __syncthreads_and(second), first = __syncthreads_and(first);
    return second ? SECOND_FLIPS : first ? FIRST_FLIPS : NONE;
}
