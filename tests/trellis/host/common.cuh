// cuda/common.cuh for a build on the host: what the BCJR kernels need of CUDA, with a fibre for every
// thread. Fibres change only where they wait for each other, so that a missing barrier shows.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#define __device__
#define __global__
#define __shared__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define asm                // the instructions of messages.cuh
#define volatile(...) abort()  // are not for the host

typedef unsigned int u32;
using std::max;
using std::min;

struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct Index {
    int x;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern Index threadIdx, blockIdx, blockDim, gridDim;
extern float4 shared[];

void wait_for(int barrier, int threads);  // until so many have come
double &told_by(int lane);                // of the same warp

template <class To, class From>
To bits(From x) {
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
inline float __uint_as_float(u32 x) { return bits<float>(x); }
inline u32 __float_as_uint(float x) { return bits<u32>(x); }
inline float __int_as_float(int x) { return bits<float>(x); }
inline int __float_as_int(float x) { return bits<int>(x); }

inline void __syncthreads() { wait_for(0, blockDim.x); }
inline void __syncwarp() { wait_for(64 + threadIdx.x / 32, 32); }

// f of what every lane told.
template <class X, class F>
X exchange(X mine, F f) {
    told_by(threadIdx.x % 32) = mine;
    __syncwarp();
    const X answer = (X)f();
    __syncwarp();
    return answer;
}
template <class X>
X __shfl_sync(u32, X x, int from) {
    return exchange(x, [&] { return told_by(from); });
}
template <class X>
X __shfl_xor_sync(u32, X x, int mask) {
    return exchange(x, [&] { return told_by(threadIdx.x % 32 ^ mask); });
}
template <class X, class F>
X over_warp(X x, F f) {
    return exchange(x, [&] {
        double all = told_by(0);
        for (int i = 1; i < 32; i++) all = f(all, told_by(i));
        return all;
    });
}
inline double larger(double x, double y) { return x > y ? x : y; }
inline double smaller(double x, double y) { return x < y ? x : y; }
inline double sum(double x, double y) { return x + y; }
inline u32 largest_of_warp(float x) { return __float_as_uint(over_warp(x, larger)); }
inline float least_of_warp(float x) { return over_warp(x, smaller); }
inline float sum_of_warp(float x) { return over_warp(x, sum); }

inline int __syncthreads_and(int x) {
    static int all;
    if (threadIdx.x == 0) all = 1;
    __syncthreads();
    if (!x) all = 0;
    __syncthreads();
    const int answer = all;
    __syncthreads();
    return answer;
}

inline int atomicAdd(int *p, int x) {
    *p += x;
    return *p - x;
}
template <class X>
X __ldcg(const X *p) {
    return *p;
}
inline void prefetch(const void *) {}

inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : exp2f(x); }
inline float power_of_two(int exponent) { return ldexpf(1.0f, min(max(exponent, -149), 127)); }
inline u32 address(const void *p) { return (u32)((const char *)p - (const char *)shared); }
template <class X>
X at(u32 from) {
    X x;
    memcpy(&x, (const char *)shared + from, sizeof x);
    return x;
}
inline float2 constant2(u32 from) { return at<float2>(from); }
inline float4 constant4(u32 from) { return at<float4>(from); }
inline float4 message4(u32 from) { return at<float4>(from); }
