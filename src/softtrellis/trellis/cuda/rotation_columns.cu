// The last step out of the basis of a packed product: y = A^T X, column by column.
//
// Where B is Sylvester's transform of 32, 64 or 128 channels, the product has summed each of its
// strips of 32 outputs through 32 of them. What is left of B are sums and differences of a row's
// 1, 2 or 4 strips, which a thread does as it reads; and A, for which columns of X [a, b] have
// nothing to do with each other: a block takes 4 of every strip, and no block waits for another.

#include "signs.cuh"

constexpr int STRIP = 32, COLUMN_BLOCKS = STRIP / QUAD;

extern __shared__ uint4 shared[];

// Rows of X in four columns of each strip, as the matrix instructions take them.
template <int STRIPS>
__device__ __forceinline__ void load_columns(const Parameters &p, int row, int first, int tiles,
                                             uint4 *columns) {
    constexpr int SHARES = 4 / STRIPS;  // on their way at once
    const int stride = stride_of(tiles);
    const long long share = (long long)p.batch * p.width;
    for (int i = threadIdx.x; i < tiles * SIDE; i += blockDim.x) {
        float v[STRIPS][QUAD] = {};
        const char *const from =
            p.source + 4 * ((long long)row * p.width + p.first + i * p.b + first);
        for (int s = 0; s < p.splits && i < p.a; s += SHARES) {
            uint4 x[SHARES][STRIPS] = {};
#pragma unroll
            for (int k = 0; k < SHARES * STRIPS; ++k)
                if (s + k / STRIPS < p.splits)
                    x[k / STRIPS][k % STRIPS] = read_words4(
                        from + 4 * ((s + k / STRIPS) * share + k % STRIPS * STRIP));
#pragma unroll
            for (int k = 0; k < SHARES * STRIPS; ++k) {
                const float4 y = numbers(x[k / STRIPS][k % STRIPS], FLOAT);
                float(&sum)[QUAD] = v[k % STRIPS];
                sum[0] += y.x, sum[1] += y.y, sum[2] += y.z, sum[3] += y.w;
            }
        }
#pragma unroll
        for (int step = 1; step < STRIPS; step *= 2)
#pragma unroll
            for (int k = 0; k < STRIPS; ++k)
                if (!(k & step))
#pragma unroll
                    for (int c = 0; c < QUAD; ++c) {
                        const float sum = v[k][c] + v[k + step][c];
                        v[k + step][c] = v[k][c] - v[k + step][c], v[k][c] = sum;
                    }
#pragma unroll
        for (int k = 0; k < STRIPS; ++k)
#pragma unroll
            for (int c = 0; c < QUAD; ++c) {
                const u32 high = to_bfloats(v[k][c], 0.f) & 0xffff;
                u16 *const to =
                    (u16 *)&columns[(k * QUAD + c) * stride + i / SIDE * QUAD + i % QUAD];
                to[i % SIDE / QUAD] = (u16)high;
                to[QUAD + i % SIDE / QUAD] =
                    (u16)to_bfloats(v[k][c] - __uint_as_float(high << 16), 0.f);
            }
    }
}

// Of a row of B's strips, all at once.
template <int STRIPS>
__device__ __forceinline__ void unrotate_strips(const Parameters &p, int row, int first, int tile,
                                                bool works, const u32 *left, uint4 *columns) {
    const int lane = threadIdx.x % LANES, tiles = (p.a + SIDE - 1) / SIDE;
    const int i = tile * SIDE + lane / 4, j = first + lane % 4;
    const float scale = read(p.scale, 0, FLOAT);
    const float norm = read((const char *)(p.norms + row), 0, FLOAT);
    Output<false> outputs[STRIPS][2];
    const auto load_outputs = [&] {
#pragma unroll
        for (int k = 0; k < STRIPS; ++k)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                outputs[k][h].load(p, works ? i + 8 * h : p.a, j + k * STRIP);
    };
    if (STRIPS < 4) load_outputs();
    load_columns<STRIPS>(p, row, first, tiles, columns);
    if (STRIPS == 4) load_outputs();  // not before: registers
    wait_for_copies();
    __syncthreads();
    if (!works) return;
    float result[STRIPS][2];
    multiply<STRIPS>(result, left, columns, tiles);
#pragma unroll
    for (int k = 0; k < STRIPS; ++k)
#pragma unroll
        for (int h = 0; h < 2; ++h)
            outputs[k][h].store(p, row, i + 8 * h, j + k * STRIP, result[k][h],
                                p.factor * scale * norm);
}

__device__ __forceinline__ void unrotate(const Parameters &p) {
    const int warp = threadIdx.x / LANES;
    const int index = blockIdx.x - p.first_block, first = index % COLUMN_BLOCKS * QUAD;
    const int part = index / COLUMN_BLOCKS % p.parts, row = index / COLUMN_BLOCKS / p.parts;
    const int tiles = (p.a + SIDE - 1) / SIDE, words = words_of(tiles);
    const int first_tile = part * p.part_tiles, tile = first_tile + warp;
    u32 *const left = (u32 *)shared;
    uint4 *const columns = (uint4 *)(left + p.part_tiles * words);

    const int quads = min(p.part_tiles, tiles - first_tile) * words / 4;
    for (int i = threadIdx.x; i < quads; i += blockDim.x)
        copy_async(address(left + 4 * i), p.left + 16 * (first_tile * words / 4 + i));
    const auto fetch = [&](const char *from, int bytes) {
        const int blocks = COLUMN_BLOCKS * p.parts;
        const int thread = index % blocks * blockDim.x + threadIdx.x;
        for (int at = thread * 128; from && at < bytes; at += blocks * blockDim.x * 128)
            fetch_to_l2(from + at);
    };
    fetch(p.signs, (p.features + 7) / 8);
    fetch(p.scales, 2 * p.features);
    fetch(p.bias, size_of(p.bias_type) * p.features);
    wait_for_the_kernel_before();
    let_the_next_kernel_begin();

    const bool works = warp < p.part_tiles && tile < tiles;
    const u32 *const own = left + warp * words;
    const int strips = p.b / STRIP;
    if (strips == 1) unrotate_strips<1>(p, row, first, tile, works, own, columns);
    else if (strips == 2) unrotate_strips<2>(p, row, first, tile, works, own, columns);
    else unrotate_strips<4>(p, row, first, tile, works, own, columns);
}

extern "C" __global__ void __launch_bounds__(512, 2) unrotate_columns(Jobs jobs) {
    unrotate(jobs.mine());
}
