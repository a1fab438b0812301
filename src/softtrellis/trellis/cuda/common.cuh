// What all kernels share.

#pragma once

typedef unsigned int u32;

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float power_of_two(int exponent) {  // of -149 to 127
    return exponent < -126 ? __uint_as_float(1u << max(exponent + 149, 0))
                           : __uint_as_float((u32)(min(exponent, 127) + 127) << 23);
}

// Asks for a line of global memory to come near.
__device__ __forceinline__ void prefetch(const void *p) {
    asm volatile("prefetch.global.L1 [%0];" ::"l"(p));
}

__device__ __forceinline__ void prefetch_l2(const void *p) {  // only as near as the second cache
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

__device__ __forceinline__ u32 largest_of_warp(float x) {  // x >= 0
    return __reduce_max_sync(0xffffffffu, __float_as_uint(x));
}

__device__ __forceinline__ float least_of_warp(float x) {
#pragma unroll
    for (int i = 16; i; i >>= 1) x = fminf(x, __shfl_xor_sync(0xffffffffu, x, i));
    return x;
}

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

// One instruction, where the compiler makes two as soon as it knows that the bits are apart.
__device__ __forceinline__ u32 and_or(u32 x, u32 mask, u32 bits) {
    u32 y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
    return y;
}

// Shared memory by its 32-bit address, which lets a swizzle be one exclusive or.
__device__ __forceinline__ u32 address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ float4 constant4(u32 from) {  // of what is not written any more
    float4 x;
    asm("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
        : "r"(from));
    return x;
}

__device__ __forceinline__ float2 constant2(u32 from) {  // likewise
    float2 x;
    asm("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from));
    return x;
}

__device__ __forceinline__ float4 message4(u32 from) {  // of what barriers guard
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(from));
    return x;
}

__device__ __forceinline__ float2 message2(u32 from) {  // likewise
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from));
    return x;
}

// A barrier among the threads of one group.
template <int THREADS>
__device__ __forceinline__ void group_barrier(int group) {
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(THREADS) : "memory");
}

// With an overlapping launch: until this returns, kernels before this one may still write memory.
__device__ __forceinline__ void wait_for_the_kernel_before() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Lets an overlapping launch of the next kernel begin.
__device__ __forceinline__ void let_the_next_kernel_begin() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Until this thread's copies are there.
__device__ __forceinline__ void wait_for_own_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// 16 bytes on their way from global to shared memory, or zeros; a thread waits for its own.
__device__ __forceinline__ void copy_16_bytes_or_0(u32 to, const void *from, bool copy) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(copy ? 16 : 0)
                 : "memory");
}

// 16 bytes of shared memory, or what `to` was.
__device__ __forceinline__ void read_if(bool condition, uint4 &to, u32 from) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; @p ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];}"
                 : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
                 : "r"(from), "r"((int)condition));
}

// 16 bytes of global memory, or what `to` was.
__device__ __forceinline__ void load_if(bool condition, uint4 &to, const uint4 *from) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; @p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];}"
                 : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
                 : "l"(from), "r"((int)condition));
}
