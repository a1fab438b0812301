// Rows of activations times a packed matrix at L = 16, k = 2, which is decoded in registers only.
//
//   * A lane decodes a whole tile: 16 words of 32 bits, so that every state is a shift of words that
//     it holds, and the loads are 16 bytes wide. Lane 4 g + q takes the tile at output block g of 8
//     and input block q of 4. Both the order of a product's inputs and that of its outputs are free,
//     so one matrix instruction takes two rows of each of the 8 output blocks, and 4 inputs of each
//     of the 4 input blocks: the operands are where they were decoded.
//   * HYB: 2 h(s) = 2 s (s + 1) holds the row of a table of 1024 codewords, signs included, in its
//     bits 7 to 16. Every lane has its own copy of the table in its own bank (128 KiB in all): bits 7
//     to 16 of 2 h, with the lane in bits 2 to 6, are the address. No reads conflict.
//   * A unit of work is 8 output blocks by 4 input blocks. The units, inputs first, are dealt evenly
//     to the blocks of the grid; a block adds up its warps, in their order, and writes one share.

#include "mma.cuh"

constexpr int OCTET = 8, QUARTET = 4, SIDE = 16, WORDS = 16;
constexpr int TABLE_ROWS = 1024, LANES = 32;

enum Code { HYB, MUL1 };
enum Order { ROWS, EXL3 };

struct Parameters {
    const uint4 *x;       // float16 [batch, 16 in_blocks]
    const uint4 *codes;   // [out_blocks, in_blocks, 64 bytes]
    const u32 *table;     // of HYB, two float16 each
    float *partial;       // [shares, batch, 16 out_blocks]
    int batch, out_blocks, in_blocks, shares;
};

// The block of the grid that has a unit of work: block c has those from c T / G to (c + 1) T / G.
__device__ __forceinline__ int block_of(long long unit, long long units) {
    return (int)(((unit + 1) * gridDim.x - 1) / units);
}

__device__ __forceinline__ void load_tile(u32 (&words)[WORDS], const uint4 *tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint4 v = __ldg(tile + i);
        words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
}

// 16 bits (and others above them) of the tile's cyclic stream, from this bit on.
__device__ __forceinline__ u32 window(const u32 (&words)[WORDS], int bit) {
    const int word = bit / 32, offset = bit % 32;
    if (offset <= 16) return words[word] >> (16 - offset);
    return __funnelshift_r(words[(word + 1) % WORDS], words[word], 48 - offset);
}

extern __shared__ u32 shared[];

// The two weights at an even position of the tile, as float16.
template <Code CODE>
__device__ __forceinline__ u32 decode(const u32 (&words)[WORDS], int position, u32 bank) {
    if (CODE == HYB) {
        const u32 s = window(words, 2 * position), twice = s + s;
        return *(const u32 *)((const char *)shared + (((twice * s + twice) & 0x1ff80u) | bank));
    }
    const u32 s = window(words, 2 * position) & 0xffff, t = window(words, 2 * position + 2) & 0xffff;
    const u32 low = __dp4a(s * 0x83dcd12du, 0x01010101u, 0x64006400u);
    const u32 high = __dp4a(t * 0x83dcd12du, 0x01010101u, 0u);
    return half2_fma(high * 65536u + low, 0x1eee1eeeu, 0xc931c931u);
}

template <Code CODE, Order ORDER, int ROWS8>
__device__ __forceinline__ void multiply(const Parameters &p) {
    const int lane = threadIdx.x % LANES, g = lane / 4, q = lane % 4;
    const int warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
    const int groups = (p.in_blocks + QUARTET - 1) / QUARTET;
    const int octets = (p.out_blocks + OCTET - 1) / OCTET;
    const long long units = (long long)octets * groups;
    const int end = (int)((blockIdx.x + 1) * units / gridDim.x);
    int first = (int)(blockIdx.x * units / gridDim.x);
    int last = min(end, (first / groups + 1) * groups), unit = first + warp;
    float *sums = (float *)(shared + (CODE == HYB ? TABLE_ROWS * LANES : 0));
    const u32 bank = 4 * lane;

    auto tile_of = [&](int unit) {
        const int out_block = min(unit / groups * OCTET + g, p.out_blocks - 1);
        const int in_block = min(unit % groups * QUARTET + q, p.in_blocks - 1);
        return p.codes + ((long long)out_block * p.in_blocks + in_block) * (WORDS / 4);
    };
    u32 next[WORDS];
    if (unit < last) load_tile(next, tile_of(unit));
    if (CODE == HYB) {
        for (int i = threadIdx.x; i < TABLE_ROWS * LANES / 4; i += blockDim.x) {
            const u32 v = __ldg(p.table + i / (LANES / 4));
            ((uint4 *)shared)[i] = make_uint4(v, v, v, v);
        }
        __syncthreads();
    }
    wait_for_the_kernel_before();  // which writes x; codes and table were there
    let_the_next_kernel_begin();
    while (first < end) {
        const int octet = first / groups;
        float total[ROWS8][8][4] = {};
        for (; unit < last; unit += warps) {
            const int in_block = unit % groups * QUARTET + q;
            uint4 x[ROWS8][2];
#pragma unroll
            for (int r = 0; r < ROWS8; ++r) {
                const bool valid = in_block < p.in_blocks && r * 8 + g < p.batch;
                const uint4 *from = p.x + ((long long)(r * 8 + g) * p.in_blocks + in_block) * 2;
                x[r][0] = valid ? from[0] : make_uint4(0, 0, 0, 0);
                x[r][1] = valid ? from[1] : make_uint4(0, 0, 0, 0);
            }
            u32 words[WORDS];
#pragma unroll
            for (int i = 0; i < WORDS; ++i) words[i] = __funnelshift_l(next[i], next[i], 16);
            if (unit + warps < last) load_tile(next, tile_of(unit + warps));
#pragma unroll
            for (int pair = 0; pair < 8; ++pair) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    u32 a[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int row = i % 2, half = i / 2;
                        a[i] = decode<CODE>(
                            words,
                            ORDER == ROWS ? 16 * (2 * pair + row) + 4 * j + 2 * half
                                          : 8 * (4 * pair + j) + 4 * row + 2 * half,
                            bank);
                    }
#pragma unroll
                    for (int r = 0; r < ROWS8; ++r) {
                        const u32 b[8] = {x[r][0].x, x[r][0].y, x[r][0].z, x[r][0].w,
                                          x[r][1].x, x[r][1].y, x[r][1].z, x[r][1].w};
                        const bool rows = ORDER == ROWS;
                        multiply_add(total[r][pair], a, b[rows ? 2 * j : j],
                                     b[rows ? 2 * j + 1 : 4 + j]);
                    }
                }
            }
        }
        const int begin = last, share = blockIdx.x - block_of((long long)octet * groups, units);
        const bool complete = begin == (octet + 1) * groups;
        last = min(end, begin + groups), unit = begin + warp;
        if (unit < last) load_tile(next, tile_of(unit));
#pragma unroll
        for (int r = 0; r < ROWS8; ++r) {
            const int columns = min(8, p.batch - 8 * r);
#pragma unroll
            for (int pair = 0; pair < 8; ++pair)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const int row = ORDER == ROWS ? 2 * pair + c / 2 : pair + 8 * (c / 2);
                    const int column = 2 * q + c % 2;
                    if (column < columns)
                        sums[(warp * columns + column) * 128 + g * SIDE + row] = total[r][pair][c];
                }
            __syncthreads();
            for (int i = threadIdx.x; i < columns * 128; i += blockDim.x) {
                float sum = 0.f;
                for (int w = 0; w < warps; ++w) sum += sums[w * columns * 128 + i];
                const int output = octet * 128 + i % 128, width = p.out_blocks * SIDE;
                if (output < width) {
                    for (int s = share; s < (complete ? p.shares : share + 1); ++s) {
                        const long long at = (long long)s * p.batch + 8 * r + i / 128;
                        p.partial[at * width + output] = s == share ? sum : 0.f;
                    }
                }
            }
            __syncthreads();
        }
        first = begin;
    }
}

#define KERNEL(NAME, CODE, ORDER, ROWS8, THREADS)                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(Parameters p) {    \
        multiply<CODE, ORDER, ROWS8>(p);                                             \
    }

KERNEL(hyb_rows_8, HYB, ROWS, 1, 512)
KERNEL(hyb_rows_16, HYB, ROWS, 2, 256)
KERNEL(mul1_exl3_8, MUL1, EXL3, 1, 512)
KERNEL(mul1_exl3_16, MUL1, EXL3, 2, 256)
