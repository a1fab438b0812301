// What kernels need of CUDA's language in a build on the host, with a fibre for every thread.
// Fibres change only where they wait for each other, and a warp runs as far as it comes without the
// others, so that a missing barrier shows.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __device__
#define __global__
#define __shared__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(...)

typedef unsigned int u32;
using std::max;
using std::min;

struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
struct Index {
    int x;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

extern Index threadIdx, blockIdx, blockDim, gridDim;

// What run.cpp does for a thread. Memory that a kernel may not read is a fault, which the launch
// returns; what was read is then 0.
void wait_for(int barrier, int threads);  // until so many have come
const void *&told_by(int lane);           // of the same warp
char *shared_memory();
bool in_shared_memory(u32 from, int bytes);
bool in_global_memory(const void *from, int bytes);
void copy_later(u32 to, const void *from);  // 16 bytes, or zeros from null

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

inline int __ffs(u32 x) { return __builtin_ffs(x); }
inline int __clz(u32 x) { return x ? __builtin_clz(x) : 32; }
inline uint64_t joined(u32 low, u32 high) { return (uint64_t)high << 32 | low; }
inline u32 __funnelshift_l(u32 low, u32 high, u32 n) { return joined(low, high) << n % 32 >> 32; }
inline u32 __funnelshift_r(u32 low, u32 high, u32 n) { return joined(low, high) >> n % 32; }
inline u32 byte_of(uint64_t x, int i) { return x >> 8 * i & 255; }
inline u32 __byte_perm(u32 x, u32 y, u32 selector) {
    u32 z = 0;
    for (int i = 0; i < 4; i++) z |= byte_of(joined(x, y), selector >> 4 * i & 7) << 8 * i;
    return z;
}
inline u32 __dp4a(u32 x, u32 y, u32 z) {
    for (int i = 0; i < 4; i++) z += byte_of(x, i) * byte_of(y, i);
    return z;
}

inline void __syncthreads() { wait_for(0, blockDim.x); }
inline void __syncwarp() { wait_for(64 + threadIdx.x / 32, 32); }

// f of a function that says what a lane told.
template <class X, class F>
auto exchange(const X &mine, F f) {
    told_by(threadIdx.x % 32) = &mine;
    __syncwarp();
    const auto answer = f([](int lane) { return *(const X *)told_by(lane); });
    __syncwarp();
    return answer;
}
template <class X>
X __shfl_sync(u32, X x, int from) {
    return exchange(x, [&](auto told) { return told(from); });
}
template <class X>
X __shfl_xor_sync(u32, X x, int mask) {
    return exchange(x, [&](auto told) { return told(threadIdx.x % 32 ^ mask); });
}
inline u32 __ballot_sync(u32, bool x) {
    return exchange(x, [&](auto told) {
        u32 all = 0;
        for (int i = 0; i < 32; i++) all |= (u32)told(i) << i;
        return all;
    });
}

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
inline double atomicAdd(double *p, double x) {
    *p += x;
    return *p - x;
}
inline u32 atomicMax(u32 *p, u32 x) {
    const u32 before = *p;
    *p = max(before, x);
    return before;
}
template <class X>
X __ldcg(const X *p) {
    return *p;
}

template <class X>
X loaded(const void *from) {
    X x = {};
    if (in_global_memory(from, sizeof x)) memcpy(&x, from, sizeof x);
    return x;
}
template <class X>
X __ldg(const X *from) {
    return loaded<X>(from);
}
