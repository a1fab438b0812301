// Numbers in global memory whose type is known at run time.

#pragma once

#include "cluster.cuh"
#include "halves.cuh"

enum Type { HALF, BFLOAT, FLOAT };

__device__ __forceinline__ int size_of(int type) { return type == FLOAT ? 4 : 2; }

__device__ __forceinline__ float number(u32 bits, int type) {
    if (type == FLOAT) return __uint_as_float(bits);
    return type == HALF ? of_half((u16)bits) : of_bfloat((u16)bits);
}

__device__ __forceinline__ u32 read_bits(const char *p, long long at, int type) {
    return type == FLOAT ? read_word(p + 4 * at) : read_half(p + 2 * at);
}

__device__ __forceinline__ float read(const char *p, long long at, int type) {
    return number(read_bits(p, at, type), type);
}

__device__ __forceinline__ float4 numbers(uint4 bits, int type) {
    if (type == FLOAT)
        return make_float4(__uint_as_float(bits.x), __uint_as_float(bits.y),
                           __uint_as_float(bits.z), __uint_as_float(bits.w));
    return make_float4(number(bits.x & 0xffff, type), number(bits.x >> 16, type),
                       number(bits.y & 0xffff, type), number(bits.y >> 16, type));
}

__device__ __forceinline__ uint4 read_bits4(const char *p, long long at, int type) {
    if (type == FLOAT) return read_words4(p + 4 * at);
    const uint2 x = read_words2(p + 2 * at);
    return make_uint4(x.x, x.y, 0, 0);
}

__device__ __forceinline__ void write(char *p, long long at, int type, float x) {
    if (type == FLOAT) ((float *)p)[at] = x;
    else ((u16 *)p)[at] = type == HALF ? to_half(x) : (u16)to_bfloats(x, 0.f);
}
