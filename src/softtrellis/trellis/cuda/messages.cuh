// Messages of BCJR, with their derivatives in the backward pass.
//
// Messages are linear and scaled by a power of two at every step. What underflows is bounded by a
// certificate; a tile that fails it is left to the log-domain kernel. What is lost at one step is
// below 2^-126 in a message or in phi, so that its share of the posterior is below
//     2^-126 max(alpha) max(phi) max(beta) / (min(max(alpha), max(phi), max(beta)) Z)
// for each of at most 2^16 states, with all four as they are scaled at that step. A tile passes if
// the sum of these over the states and 2^8 steps is below 2^-18 by this bound.

#pragma once

#include "common.cuh"

// A message: the value, and with TANGENT its derivative; Two is that of neighbours c, c + 1.
template <bool TANGENT>
struct Message {
    float v;
};
template <>
struct alignas(8) Message<true> {
    float v, t;
};
template <bool TANGENT>
struct alignas(TANGENT ? 16 : 8) Two {
    Message<TANGENT> at[2];
};

__device__ __forceinline__ Message<false> times(Message<false> m, float x) { return {m.v * x}; }
__device__ __forceinline__ Message<true> times(Message<true> m, float x) {
    return {m.v * x, m.t * x};
}

// alpha scaled, its derivative without the mean of G (bcjr_torch.soft_backward).
__device__ __forceinline__ Message<false> centred(Message<false> m, float x, float) {
    return times(m, x);
}
__device__ __forceinline__ Message<true> centred(Message<true> m, float x, float mean) {
    return {m.v * x, fmaf(-mean, m.v, m.t) * x};
}

// Of the last alpha: its sum, and with TANGENT that of the derivatives.
__device__ __forceinline__ void add_to(float2 &sums, Message<false> m) { sums.x += m.v; }
__device__ __forceinline__ void add_to(float2 &sums, Message<true> m) {
    sums.x += m.v, sums.y += m.t;
}

__device__ __forceinline__ void load_two(Two<false> &two, u32 from) {
    const float2 x = message2(from);
    two.at[0].v = x.x, two.at[1].v = x.y;
}

__device__ __forceinline__ void load_two(Two<true> &two, u32 from) {
    const float4 x = message4(from);
    two.at[0] = {x.x, x.y}, two.at[1] = {x.z, x.w};
}

// Whether the sum z of alpha phi beta, with alpha times two to scaled, is safe from what was lost.
__device__ __forceinline__ bool certified(float z, float alpha_max, float beta_max, float log2_phi_max,
                                          int scaled) {
    const float alpha = log2f(alpha_max), beta = log2f(beta_max);
    const float lost = alpha + beta + log2_phi_max - fminf(fminf(alpha, beta), log2_phi_max) - 126.0f;
    return log2f(z) - (float)scaled >= lost + 16.0f + 8.0f + 18.0f && z < 3e38f;
}
