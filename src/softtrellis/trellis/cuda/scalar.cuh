// What the kernels for L = 16, k = 2, V = 1 share: any code with one weight a step.
//
// Two steps are taken at once. The 16 overlaps h * 1024 + a, with the two pairs of bits h = (h1, h0)
// on top, lead through the middle overlaps (h0, a, c) to the 16 overlaps (a, c, e), so that a thread
// needs no other messages. A state of the first step is (h1, h0, a, c), one of the second (h0, a, c, e).
//
// The codebook is a factor times float16 numbers, as those of 1MAD, 3INST, mul1 and mcg are; the
// kernels leave any other to the Triton ones.

#pragma once

#include "halves.cuh"

constexpr int OVERLAPS = 16384;
constexpr int STATES = 65536;
constexpr int BLOCKS = 1024;  // of 16 overlaps

// Where a codeword lies in shared memory: every second 128 bytes have their neighbouring 16 bytes
// exchanged, against bank conflicts. Bits above the seventh may be added afterwards.
__device__ __forceinline__ int placed(int state) { return state ^ (state >> 6 & 1) << 3; }

// The codewords over their factor that one thread reads: those of the lower states from shared memory,
// where load_halves put them, the others from global memory.
template <int SHARED_STATES>
struct Codewords {
    const unsigned short *first, *low, *high;  // of h = 0, c = 0; h0 = c = e = 0; h0 = e = 0, c = 2
    const unsigned short *far_first, *far_low;

    __device__ __forceinline__ Codewords(const unsigned short *shared, const unsigned short *global,
                                         int a)
        : first(shared + placed(a << 2)),
          low(shared + placed(a << 4)),
          high(shared + placed(a << 4 | 8)),
          far_first(global + (a << 2)),
          far_low(global + (a << 4)) {}

    // c = 0 .. 3 of the first step.
    __device__ __forceinline__ void of_first(int h, float *c) const {
        const uint2 x = (h << 12) < SHARED_STATES ? *(const uint2 *)(first + (h << 12))
                                                  : __ldg((const uint2 *)(far_first + (h << 12)));
        of_halves(x.x, c[0], c[1]), of_halves(x.y, c[2], c[3]);
    }
    // (c, e) = (0, 0) .. (1, 3), or (2, 0) .. (3, 3), of the second.
    __device__ __forceinline__ void of_second(int h0, int half, float *c) const {
        const uint4 x = (h0 + 1 << 14) <= SHARED_STATES
                            ? *(const uint4 *)((half ? high : low) + (h0 << 14))
                            : __ldg((const uint4 *)(far_low + (h0 << 14 | half << 3)));
        of_halves(x.x, c[0], c[1]), of_halves(x.y, c[2], c[3]);
        of_halves(x.z, c[4], c[5]), of_halves(x.w, c[6], c[7]);
    }
};

__device__ __forceinline__ void load_halves(unsigned short *to, const unsigned short *halves,
                                            int states) {
    for (int i = threadIdx.x; i < states / 8; i += blockDim.x)
        ((uint4 *)to)[placed(i * 8) / 8] = ((const uint4 *)halves)[i];
}
