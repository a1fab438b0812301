// cuda/common.cuh for a build on the host.

#pragma once

#include "cuda.cuh"

template <class F>
float over_warp(float x, F f) {
    return exchange(x, [&](auto told) {
        double all = told(0);
        for (int i = 1; i < 32; i++) all = f(all, told(i));
        return (float)all;
    });
}
inline double larger(double x, double y) { return x > y ? x : y; }
inline double smaller(double x, double y) { return x < y ? x : y; }
inline double sum(double x, double y) { return x + y; }
inline u32 largest_of_warp(float x) { return __float_as_uint(over_warp(x, larger)); }
inline float least_of_warp(float x) { return over_warp(x, smaller); }
inline float sum_of_warp(float x) { return over_warp(x, sum); }

inline void prefetch(const void *) {}
inline void prefetch_l2(const void *) {}
inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : exp2f(x); }
inline float power_of_two(int exponent) { return ldexpf(1.0f, min(max(exponent, -149), 127)); }
inline u32 and_or(u32 x, u32 mask, u32 bits) { return x & mask | bits; }

inline u32 address(const void *p) { return (u32)((const char *)p - shared_memory()); }
template <class X>
X at(u32 from) {
    X x = {};
    if (in_shared_memory(from, sizeof x)) memcpy(&x, shared_memory() + from, sizeof x);
    return x;
}
inline float2 constant2(u32 from) { return at<float2>(from); }
inline float4 constant4(u32 from) { return at<float4>(from); }
inline float2 message2(u32 from) { return at<float2>(from); }
inline float4 message4(u32 from) { return at<float4>(from); }

template <int THREADS>
void group_barrier(int group) {
    wait_for(group + 1, THREADS);
}

inline void read_if(bool condition, uint4 &to, u32 from) {
    if (condition) to = at<uint4>(from);
}
inline void load_if(bool condition, uint4 &to, const uint4 *from) {
    if (condition) to = loaded<uint4>(from);
}
inline void copy_16_bytes_or_0(u32 to, const void *from, bool copy) {
    copy_later(to, copy ? from : nullptr);
}

void wait_for_own_copies();
void wait_for_the_kernel_before();
inline void let_the_next_kernel_begin() {}
