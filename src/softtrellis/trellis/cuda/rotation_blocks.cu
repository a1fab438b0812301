// Sums of a product's shares, out of the basis of Sylvester's transform of blocks of 128 channels.
//
// A warp takes a block, a lane four neighbours of it: two of the seven bits by which channels are
// paired are in a lane's registers, five are exchanged among lanes. Nothing waits for other warps.

#include "jobs.cuh"

constexpr int LANES = 32, QUAD = 4, BLOCK = LANES * QUAD, WARPS = 4;

__device__ __forceinline__ float4 transformed(float4 v) {
    const float a = v.x + v.y, b = v.x - v.y, c = v.z + v.w, d = v.z - v.w;
    v = make_float4(a + c, b + d, a - c, b - d);
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        const float sign = threadIdx.x & step ? -1.f : 1.f;
        v.x = sign * v.x + __shfl_xor_sync(0xffffffffu, v.x, step);
        v.y = sign * v.y + __shfl_xor_sync(0xffffffffu, v.y, step);
        v.z = sign * v.z + __shfl_xor_sync(0xffffffffu, v.z, step);
        v.w = sign * v.w + __shfl_xor_sync(0xffffffffu, v.w, step);
    }
    return v;
}

__device__ __forceinline__ void unrotate(const Parameters &p) {
    const int index = (blockIdx.x - p.first_block) * WARPS + threadIdx.x / LANES;
    const int row = index / p.a, channel = index % p.a * BLOCK + threadIdx.x % LANES * QUAD;
    const bool inside = row < p.batch && channel < p.features;
    if (inside) {
        fetch_to_l2(p.signs + channel / 8);
        if (p.scales) fetch_to_l2(p.scales + 2 * channel);
        if (p.bias) fetch_to_l2(p.bias + size_of(p.bias_type) * channel);
    }
    wait_for_the_kernel_before();
    let_the_next_kernel_begin();
    if (row >= p.batch) return;

    constexpr int SHARES = 4;
    const long long share = (long long)p.batch * p.width;
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    uint4 ones = make_uint4(0x3c003c00u, 0x3c003c00u, 0, 0), bias = {};
    u32 signs = 0;
    float norm = 0.f, scale = 0.f;
    for (int s = 0; s < p.splits; s += SHARES) {
        uint4 x[SHARES] = {};
#pragma unroll
        for (int i = 0; i < SHARES; ++i)
            if (s + i < p.splits)
                x[i] = read_words4(
                    p.source + 4 * ((s + i) * share + (long long)row * p.width + channel));
        if (s == 0) {  // on their way too
            scale = read(p.scale, 0, FLOAT), norm = read((const char *)(p.norms + row), 0, FLOAT);
            if (inside) {
                signs = read_byte(p.signs + channel / 8) << (channel & QUAD);
                if (p.scales) ones = read_bits4(p.scales, channel, HALF);
                if (p.bias) bias = read_bits4(p.bias, channel, p.bias_type);
            }
        }
#pragma unroll
        for (int i = 0; i < SHARES; ++i) {
            const float4 y = numbers(x[i], FLOAT);
            v.x += y.x, v.y += y.y, v.z += y.z, v.w += y.w;
        }
    }
    v = transformed(v);
    if (!inside) return;
    const float factor = p.factor * scale * norm;
    const float4 of = numbers(ones, HALF), more = numbers(bias, p.bias_type);
    const auto turned = [&](float x, int bit) { return signs << bit & 0x80 ? -x : x; };
    const float4 y = make_float4(
        v.x * factor * turned(of.x, 0) + more.x, v.y * factor * turned(of.y, 1) + more.y,
        v.z * factor * turned(of.z, 2) + more.z, v.w * factor * turned(of.w, 3) + more.w);
    const long long at = (long long)row * p.features + channel;
    if (p.type == FLOAT) *(float4 *)(p.target + 4 * at) = y;
    else if (p.type == HALF)
        *(uint2 *)(p.target + 2 * at) = make_uint2(to_half(y.x) | (u32)to_half(y.y) << 16,
                                                   to_half(y.z) | (u32)to_half(y.w) << 16);
    else *(uint2 *)(p.target + 2 * at) = make_uint2(to_bfloats(y.x, y.y), to_bfloats(y.z, y.w));
}

extern "C" __global__ void __launch_bounds__(128) unrotate_blocks(Jobs jobs) {
    unrotate(jobs.mine());
}
