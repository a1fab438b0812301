// Rows of activations times a packed matrix at k = 2, which is decoded in registers only: HYB at
// L = 12 and 16, mul1 at L = 16.
//
//   * A lane decodes a quarter of a tile: 16 bytes, and the 16 bits after them, which another lane
//     holds. Lane 4 g + q takes quarter g % 4 of the tile at output block g / 4 of two and input
//     block q of four, so that a warp reads whole lines of memory. Both the order of a product's
//     inputs and that of its outputs are free: one matrix instruction takes two rows of each
//     quarter, and 4 inputs of each input block; the operands are where they were decoded. A unit
//     of work is twice that, 32 outputs by 128 inputs.
//   * A lane loads its own quarters into registers, a unit ahead, as those after it come to L2. The
//     first are under way before the kernel before this one ends.
//   * HYB: 2 h(s) = 2 s (s + 1) holds the row of a table of 1024 codewords, signs included, in its
//     bits 7 to 16. Every lane has its own copy of the table in its own bank (128 KiB in all), and
//     bits 7 to 16 of 2 h, with the lane in bits 2 to 6, are the address: no reads conflict.
//   * The units, inputs first, are dealt evenly to the blocks of the grid, and those of a block to
//     its warps, none of which gets more than one row of units: so it has sums for at most two
//     strips of 32 outputs. A block adds up its warps, in their order, and writes one share.

#include "mma.cuh"
#include "sylvester.cuh"

constexpr int LANES = 32, SIDE = 16, QUARTET = 4, TILE = 4;  // a tile of 4 times 16 bytes
constexpr int LEAD = 4;  // units that are on their way to L2 before they are loaded
constexpr int UNIT_BLOCKS = 8, STRIP = 2 * SIDE, TABLE_ROWS = 1024;

enum Code { HYB, MUL1 };

// Where a lane's activations come from: memory; the block's copy of all of them; or the one row
// that the block itself rotates.
enum Inputs { GLOBAL, SHARED, ROTATED };

struct Parameters {
    const uint4 *codes;   // [out_blocks, in_blocks, 64 bytes]
    const u32 *table;     // of HYB, two float16 each
    const uint4 (*x)[2];  // float16 [batch, in_blocks, 16]; ROTATED: see Row
    float *partial;       // [shares, batch, 16 out_blocks]
    const char *signs, *scales;  // ROTATED: see Row
    float *norm;                 // ROTATED: what the row was divided by
    int batch, out_blocks, in_blocks, shares;
    int least, more;  // units of a block, of which the first `more` have one more
    int bits, type;   // ROTATED: see Row
    int by_strips;    // whether each strip goes through Sylvester's transform of 32 outputs
};

// The first unit of a part, where each has so many and the first `more` have one more.
__device__ __forceinline__ int first_of(int part, int least, int more) {
    return part * least + min(part, more);
}

extern __shared__ u32 shared[];

// HYB is in order "rows", mul1 in EXL3's. The halves of a quarter hold two rows of 16 inputs each:
// the first bit of the weights at this row and at this and the next input; and the row's output.
template <Code CODE>
__device__ constexpr int bit_of(int row, int input) {
    return CODE == HYB ? 32 * row + 2 * input : 8 * row + 8 * (input % 8) + input / 8 * 4;
}

template <Code CODE>
__device__ constexpr int output_of(int quarter, int half, int row) {
    return CODE == HYB ? 4 * quarter + 2 * half + row : 2 * quarter + half + 8 * row;
}

// A quarter of a tile, of which `weights` are the two from this bit on, as float16.
template <Code CODE, int L>
struct Quarter;

template <int L>
struct Quarter<HYB, L> {
    u32 words[5], swapped[5];  // the stream begins in the high half of what is swapped

    __device__ __forceinline__ Quarter(const uint4 &v, u32 after)
        : words{v.x, v.y, v.z, v.w, after} {
#pragma unroll
        for (int i = 0; i < 5; ++i) swapped[i] = __byte_perm(words[i], 0, 0x1032);
    }
    __device__ __forceinline__ u32 bits_from(int bit) const {  // L of them, below anything
        const int i = bit / 32, offset = bit % 32;
        if (L == 16 && offset == 0) return words[i];
        if (offset <= 32 - L) return swapped[i] >> (32 - L - offset);
        return __funnelshift_r(swapped[i + 1], swapped[i], 64 - L - offset);
    }
    __device__ __forceinline__ u32 weights(int bit, u32 bank) const {
        // h(s) has 16 bits, which no bit of s above them changes.
        const u32 s = L == 16 ? bits_from(bit) : bits_from(bit) & ((1 << L) - 1), twice = 2 * s;
        const u32 at = and_or(twice * s + twice, (TABLE_ROWS - 1) * LANES * 4, bank);
        return *(const u32 *)((const char *)shared + at);
    }
};

template <>
struct Quarter<MUL1, 16> {
    u32 pieces[8];  // [k]: 32 bits from bit 16 k on

    __device__ __forceinline__ Quarter(const uint4 &v, u32 after) {
        const u32 words[5] = {v.x, v.y, v.z, v.w, after};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            pieces[2 * i] = __byte_perm(words[i], 0, 0x1032);
            pieces[2 * i + 1] = __byte_perm(words[i], words[i + 1], 0x3254);
        }
    }
    __device__ __forceinline__ u32 state(int bit) const {
        // Serves two states. Not <<, which becomes a multiplication: those are what it waits for.
        const u32 shifted = __funnelshift_l(0u, pieces[bit / 16], bit % 8);
        return __byte_perm(shifted, 0, bit % 16 < 8 ? 0x4432 : 0x4421);
    }
    __device__ __forceinline__ u32 byte_sum(int bit) const {  // and 1024, as a float16
        return __dp4a(state(bit) * 0x83dcd12du, 0x01010101u, 0x6400u);
    }
    __device__ __forceinline__ u32 weights(int bit, u32) const {
        const u32 sums = __byte_perm(byte_sum(bit), byte_sum(bit + 2), 0x5410);
        return half2_fma(sums, 0x1eee1eeeu, 0xc931c931u);
    }
};

// A copy of the table for each lane: thread t writes rows t, t + THREADS, ..., and
// neighbours begin at different banks.
template <int THREADS>
struct TableFill {
    static constexpr int ROWS = (TABLE_ROWS + THREADS - 1) / THREADS, PARTS = LANES / 4;
    u32 values[ROWS];

    __device__ __forceinline__ void load(const u32 *table) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int row = r * THREADS + threadIdx.x;
            if (row < TABLE_ROWS) values[r] = __ldg(table + row);
        }
    }
    __device__ __forceinline__ void store() {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int row = r * THREADS + threadIdx.x;
            if (row >= TABLE_ROWS) break;
            const u32 v = values[r];
#pragma unroll
            for (int i = 0; i < PARTS; ++i) {
                const int part = (i + threadIdx.x) % PARTS;
                ((uint4 *)shared)[row * PARTS + part] = make_uint4(v, v, v, v);
            }
        }
    }
};

// The block's copy of x, rows of whole units; what is beyond the inputs is 0.
template <int THREADS>
__device__ __forceinline__ void copy_x(const Parameters &p, u32 to, int row_units, int row_bytes) {
    for (int row = 0; row < p.batch; ++row, to += row_bytes)
        for (int i = threadIdx.x; i < row_units * UNIT_BLOCKS * 2; i += THREADS)
            copy_16_bytes_or_0(to + 16 * i, &p.x[row * p.in_blocks][0] + i, i < p.in_blocks * 2);
}

template <Code CODE, int L, int ROWS8, int WARPS, Inputs INPUTS>
__device__ __forceinline__ void multiply(const Parameters &p) {
    const int lane = threadIdx.x % LANES, g = lane / 4, q = lane % 4, warp = threadIdx.x / LANES;
    const int row_units = (p.in_blocks + UNIT_BLOCKS - 1) / UNIT_BLOCKS;
    const int first = first_of(blockIdx.x, p.least, p.more);
    const int count = p.least + (blockIdx.x < p.more);
    const auto first_of_warp = [&](int w) {
        return first + first_of(w, count / WARPS, count % WARPS);
    };
    const u32 bank = 4 * lane;
    constexpr bool SHARED_X = INPUTS != GLOBAL;
    TableFill<WARPS * LANES> fill;
    if (CODE == HYB) fill.load(p.table);

    // Of each warp: the sums of its first strip and of its second one.
    const int x_row_bytes = row_units * UNIT_BLOCKS * SIDE * 2 + 16;  // 16: rows in other banks
    char *const shared_x = (char *)shared + (CODE == HYB ? TABLE_ROWS * LANES * 4 : 0);
    char *const own = shared_x + (SHARED_X ? p.batch * x_row_bytes : 0);
    const int sums_bytes = p.batch * STRIP * 4;
    const int own_bytes = 2 * sums_bytes;

    const int first_strip = first / row_units, unit = first_of_warp(warp);
    int strip = first_strip;
    while (unit >= (strip + 1) * row_units) ++strip;
    const int units = first_of_warp(warp + 1) - unit;
    const int here = min(units, (strip + 1) * row_units - unit), there = units - here;
    const int first_block = (unit - strip * row_units) * UNIT_BLOCKS + q;

    // What is not loaded decodes to numbers that are multiplied by 0, or to outputs that are not
    // there.
    const int out_block = strip * 2 + g / 4;
    const u32 next_part = ((out_block + 2) * p.in_blocks + q) * TILE + g % 4;
    u32 part = (out_block * p.in_blocks + first_block) * TILE + g % 4;
    int ahead = here;  // units to load, and from this lane's input block to the end of the row
    int room = units > 0 && out_block < p.out_blocks ? p.in_blocks - first_block : 0;
    int next_room = there > 0 && out_block + 2 < p.out_blocks ? p.in_blocks - q : 0;
    const auto advance = [&] {
        room -= UNIT_BLOCKS, part += UNIT_BLOCKS * TILE;
        if (--ahead == 0)  // on to the second strip, and after it to nothing
            part = next_part, ahead = there, room = next_room, next_room = 0;
    };
    // The next unit is on its way into registers, those after it to L2.
    uint4 quarters[2] = {};
    const auto load = [&](int half) {
        load_if(room > half * QUARTET, quarters[half], p.codes + part + half * QUARTET * TILE);
    };
    const auto fetch = [&](u32 at) {  // each lane 32 bytes of the unit
        at += g % 2 * QUARTET * TILE;
        if (at < p.out_blocks * p.in_blocks * TILE) fetch_to_l2(p.codes + at);
    };
    load(0), load(1);
#pragma unroll 1
    for (int i = 1; i <= LEAD; ++i) {
        fetch(part + i * UNIT_BLOCKS * TILE);
        if (there > 0) fetch(next_part + (i - 1) * UNIT_BLOCKS * TILE);
    }
    advance();
    const Row row{(const char *)p.x, p.signs, p.scales, p.in_blocks * SIDE, p.bits, p.type};
    if (INPUTS == ROTATED) fetch_constants<WARPS * LANES>(row);
    if (CODE == HYB) fill.store();
    wait_for_the_kernel_before();  // which writes x; codes and table were there
    let_the_next_kernel_begin();

    uint4 x[2][ROWS8][2] = {};
    int x_at = g * p.in_blocks + first_block;
    const int x_end = (g + 1) * p.in_blocks;
    const u32 x_row = address(shared_x) + g * x_row_bytes + q * SIDE * 2;
    u32 x_from = x_row + (first_block - q) * SIDE * 2;
    const auto load_x = [&](int half) {
#pragma unroll
        for (int r = 0; r < ROWS8; ++r) {
            const bool inside = r * 8 + g < p.batch;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (SHARED_X) {
                    read_if(inside, x[half][r][i], x_from + r * 8 * x_row_bytes + 16 * i);
                } else {
                    x[half][r][i] = make_uint4(0, 0, 0, 0);
                    load_if(x_at < x_end && inside, x[half][r][i],
                            p.x[x_at + r * 8 * p.in_blocks] + i);
                }
            }
        }
        x_at += QUARTET, x_from += QUARTET * SIDE * 2;
    };
    if (INPUTS == ROTATED) {
        float *const room = (float *)(own + WARPS * own_bytes);
        u32 *const peaks = (u32 *)(room + row.channels);
        const float peak = rotate_row<WARPS * LANES>(row, room, (u16 *)shared_x, peaks);
        if (blockIdx.x == 0 && threadIdx.x == 0) *p.norm = peak;
        __syncthreads();
        load_x(0);
    } else if (INPUTS == SHARED) {
        copy_x<WARPS * LANES>(p, address(shared_x), row_units, x_row_bytes);
        wait_for_own_copies();
        __syncthreads();
        load_x(0);
    } else {
        load_x(0);
        if (CODE == HYB) __syncthreads();
    }
    const int lane_after = (lane & 19) | ((lane + 4) & 12);

#pragma unroll 1
    for (int side = 0; side < (there > 0 ? 2 : 1); ++side) {
        if (SHARED_X && side) x_from = x_row, load_x(0);
        float total[ROWS8][2][4] = {};
#pragma unroll 1
        for (int left = side ? there : here; left > 0; --left) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const u32 after = __shfl_sync(0xffffffffu, quarters[half].x, lane_after);
                const Quarter<CODE, L> quarter(quarters[half], after);
                load(half);
                if (half == 1) {
                    fetch(part + LEAD * UNIT_BLOCKS * TILE);
                    advance();
                    if (!SHARED_X && left == 1) x_at = x_end - p.in_blocks + q;
                }
                load_x(1 - half);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
#pragma unroll
                    for (int pair = 0; pair < 2; ++pair) {
                        u32 a[4];
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            a[i] = quarter.weights(
                                64 * pair + bit_of<CODE>(i % 2, 4 * j + 2 * (i / 2)), bank);
#pragma unroll
                        for (int r = 0; r < ROWS8; ++r) {
                            const uint4 b = x[half][r][j / 2];
                            multiply_add(total[r][pair], a, j % 2 ? b.z : b.x, j % 2 ? b.w : b.y);
                        }
                    }
                }
            }
        }
        float *sums = (float *)(own + warp * own_bytes) + side * p.batch * STRIP;
#pragma unroll
        for (int r = 0; r < ROWS8; ++r)
#pragma unroll
            for (int pair = 0; pair < 2; ++pair)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const int column = 8 * r + 2 * q + c % 2;
                    const int output = g / 4 * SIDE + output_of<CODE>(g % 4, pair, c / 2);
                    if (column < p.batch) sums[column * STRIP + output] = total[r][pair][c];
                }
    }
    int column = warp;  // of the sums that this warp adds up
    strip = first_strip;
    for (; column >= p.batch; column -= p.batch) ++strip;
    __syncthreads();

    const int width = p.out_blocks * SIDE;
#pragma unroll 1
    for (int begin; (begin = strip * row_units) < first + count;) {
        const int stop = begin + row_units;
        const bool has_part = max(first_of_warp(lane), begin) < min(first_of_warp(lane + 1), stop);
        const u32 parts = __ballot_sync(0xffffffffu, lane < WARPS && has_part);
        const int low = __ffs(parts) - 1, high = LANES - __clz(parts);
        const int side = first_of_warp(low) < begin;
        const char *const at = own + (column * STRIP + lane) * 4;
        float sum = *(const float *)(at + low * own_bytes + side * sums_bytes);
#pragma unroll 4
        for (int w = low + 1; w < high; ++w) sum += *(const float *)(at + w * own_bytes);

        if (p.by_strips) sum = transformed_by_lanes(sum);
        int share = 0;
        while (first_of(blockIdx.x - share, p.least, p.more) > begin) ++share;
        const int shares = stop <= first + count ? p.shares : share + 1;
        const int output = strip * STRIP + lane;
        if (output < width) {
#pragma unroll 1
            for (; share < shares; ++share, sum = 0.f)
                p.partial[((long long)share * p.batch + column) * width + output] = sum;
        }
        for (column += WARPS; column >= p.batch; column -= p.batch) ++strip;
    }
}

#define KERNEL(NAME, CODE, L, ROWS8, WARPS, INPUTS, REGISTERS)             \
    extern "C" __global__ void __maxnreg__(REGISTERS) NAME(Parameters p) { \
        multiply<CODE, L, ROWS8, WARPS, INPUTS>(p);                        \
    }

KERNEL(hyb_rotating, HYB, 16, 1, 12, ROTATED, 104)
KERNEL(hyb_one_row, HYB, 16, 1, 12, SHARED, 104)
KERNEL(hyb_rows_8, HYB, 16, 1, 12, GLOBAL, 128)
KERNEL(hyb_rows_16, HYB, 16, 2, 12, GLOBAL, 168)
KERNEL(hyb12_rotating, HYB, 12, 1, 12, ROTATED, 104)
KERNEL(hyb12_one_row, HYB, 12, 1, 12, SHARED, 104)
KERNEL(hyb12_rows_8, HYB, 12, 1, 12, GLOBAL, 128)
KERNEL(hyb12_rows_16, HYB, 12, 2, 12, GLOBAL, 168)
KERNEL(mul1_rotating, MUL1, 16, 1, 8, ROTATED, 128)
KERNEL(mul1_one_row, MUL1, 16, 1, 8, SHARED, 128)
KERNEL(mul1_rows_8, MUL1, 16, 1, 12, GLOBAL, 128)
KERNEL(mul1_rows_16, MUL1, 16, 2, 12, GLOBAL, 168)
