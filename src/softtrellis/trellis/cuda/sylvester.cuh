// A row of activations through Sylvester's Hadamard transform, by all threads of one block.
//
// The transform is one of sums and differences of pairs of channels whose numbers differ in one
// bit. A thread takes 16 channels, which are all values of four bits, through those four; the next
// four bits follow after a barrier, from shared memory.

#pragma once

#include "types.cuh"

struct Row {
    const char *source;          // x [channels]
    const char *signs, *scales;  // of channels: packed; float16, or null
    int channels, bits, type;    // each 2^bits channels are transformed, 5 to 16 bits; x's type
};

constexpr int RUN_BITS = 4, RUN = 1 << RUN_BITS, MOST_BITS = 16, FETCHED = 128;

// Signs and scales on their way into the L2 cache, a part of them by each block.
template <int THREADS>
__device__ __forceinline__ void fetch_constants(const Row &row) {
    const int at = (blockIdx.x * THREADS + threadIdx.x) * FETCHED;
    if (at < row.channels / 8) fetch_to_l2(row.signs + at);
    if (row.scales && at < row.channels * 2) fetch_to_l2(row.scales + at);
}

// Where a channel's number lies, so that neither 32 runs of 16 channels nor channels 16 apart, nor
// neighbours, share a bank. Of a sum without carries it is the exclusive or.
__device__ __forceinline__ int place(int i) { return i ^ (i >> 5 & 7) ^ (i & 256 ? 24 : 0); }

template <int BITS>
__device__ __forceinline__ void transform(float (&v)[1 << BITS]) {
#pragma unroll
    for (int step = 1; step < 1 << BITS; step *= 2)
#pragma unroll
        for (int i = 0; i < 1 << BITS; ++i)
            if (!(i & step)) {
                const float sum = v[i] + v[i + step];
                v[i + step] = v[i] - v[i + step], v[i] = sum;
            }
}

// One number of each of 32 lanes.
__device__ __forceinline__ float transformed_by_lanes(float x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2)
        x = (threadIdx.x & step ? -x : x) + __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// Runs of 16 channels, scaled, with their signs, through the first four bits; the largest of them.
template <int THREADS>
__device__ __forceinline__ float load_runs(const Row &row, float *to) {
    float peak = 0.f;
    for (int run = threadIdx.x; run < row.channels / RUN; run += THREADS) {
        const int first = run * RUN;
        uint4 x[RUN / 4], scales[RUN / 4];
#pragma unroll
        for (int k = 0; k < RUN / 4; ++k) {
            x[k] = read_bits4(row.source, first + 4 * k, row.type);
            if (row.scales) scales[k] = read_bits4(row.scales, first + 4 * k, HALF);
        }
        const char *from = row.signs + first / 8;
        const u32 signs = read_byte(from) << 24 | read_byte(from + 1) << 16;  // the first highest
        float v[RUN];
#pragma unroll
        for (int k = 0; k < RUN / 4; ++k) {
            const float4 y = numbers(x[k], row.type);
            v[4 * k] = y.x, v[4 * k + 1] = y.y, v[4 * k + 2] = y.z, v[4 * k + 3] = y.w;
            if (!row.scales) continue;
            const float4 scale = numbers(scales[k], HALF);
            v[4 * k] *= scale.x, v[4 * k + 1] *= scale.y;
            v[4 * k + 2] *= scale.z, v[4 * k + 3] *= scale.w;
        }
#pragma unroll
        for (int i = 0; i < RUN; ++i) {
            peak = fmaxf(peak, fabsf(v[i]));
            v[i] = __uint_as_float(__float_as_uint(v[i]) ^ (signs << i & 0x80000000u));
        }
        transform<RUN_BITS>(v);
        const int at = place(first);
#pragma unroll
        for (int i = 0; i < RUN; ++i) to[at ^ place(i)] = v[i];
    }
    return peak;
}

// BITS bits from bit SHIFT on; after the last of them the numbers are done.
template <int THREADS, int BITS, int SHIFT, bool LAST>
__device__ __forceinline__ void next_bits(const Row &row, float *at, u16 *done, float factor) {
    for (int u = threadIdx.x; u < row.channels >> BITS; u += THREADS) {
        const int low = u & ((1 << SHIFT) - 1), first = ((u - low) << BITS) + low;
        float v[1 << BITS];
#pragma unroll
        for (int i = 0; i < 1 << BITS; ++i) v[i] = at[place(first) ^ place(i << SHIFT)];
        transform<BITS>(v);
#pragma unroll
        for (int i = 0; i < 1 << BITS; ++i) {
            if (LAST) done[first + (i << SHIFT)] = to_half(v[i] * factor);
            else at[place(first) ^ place(i << SHIFT)] = v[i];
        }
    }
}

// All bits from bit SHIFT on, which the compiler knows: so it knows the places, too.
template <int THREADS, int SHIFT>
__device__ __forceinline__ void bits_from(const Row &row, float *at, u16 *done, float factor) {
    switch (row.bits - SHIFT) {
    case 1: next_bits<THREADS, 1, SHIFT, true>(row, at, done, factor); break;
    case 2: next_bits<THREADS, 2, SHIFT, true>(row, at, done, factor); break;
    case 3: next_bits<THREADS, 3, SHIFT, true>(row, at, done, factor); break;
    case 4: next_bits<THREADS, 4, SHIFT, true>(row, at, done, factor); break;
    default:
        if constexpr (SHIFT + RUN_BITS < MOST_BITS) {
            next_bits<THREADS, RUN_BITS, SHIFT, false>(row, at, done, factor);
            __syncthreads();
            bits_from<THREADS, SHIFT + RUN_BITS>(row, at, done, factor);
        }
    }
}

// Writes the rotated row, divided by its largest number, as float16 to `done`, with `room` for as
// many floats. There after the next barrier.
template <int THREADS>
__device__ __forceinline__ float rotate_row(const Row &row, float *room, u16 *done, u32 *peaks) {
    constexpr int WARPS = THREADS / 32;
    const u32 mine = largest_of_warp(load_runs<THREADS>(row, room));
    if (threadIdx.x % 32 == 0) peaks[threadIdx.x / 32] = mine;
    __syncthreads();
    float peak = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) peak = fmaxf(peak, __uint_as_float(peaks[w]));
    if (peak == 0.f) peak = 1.f;
    const float factor = (row.bits & 1 ? 0.70710678f : 1.f) / (float)(1 << row.bits / 2) / peak;
    bits_from<THREADS, RUN_BITS>(row, room, done, factor);
    return peak;
}
