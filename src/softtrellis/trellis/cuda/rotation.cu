// Randomised Hadamard transforms of a few rows of activations, before and after a packed product.
//
//   * H = A (x) B: a row of a b channels, seen as a matrix X [a, b], becomes A X B^T. For blocks of
//     channels, I (x) B, there is no A. A and B are +-1: one bit an entry, which becomes a bfloat16
//     number in two instructions. A number of X is two bfloat16 numbers, its rounded value and what
//     that leaves (2^-18 of it is lost); they are neighbouring columns of one matrix instruction,
//     so their two results meet in one lane.
//   * The blocks of a cluster share a row: each reads 16 or more rows of X, multiplies them by B^T
//     and hands every block its columns; each then multiplies its columns by A. Where A is large,
//     several clusters do all but that product, of which each computes its rows of A.
//   * Nothing that a kernel may have written is read before the kernel before this one has ended.
//     Only then may the next one begin: products that begin with this kernel were slower.

#include "signs.cuh"

constexpr int LINE = 128;
constexpr int MAX_PEAKS = 8 * 16;  // of 8 blocks of 16 warps
constexpr int AT_ONCE = 1;         // times four channels that a thread loads before it uses one

extern __shared__ uint4 shared[];

// Four numbers as bfloat16, then what that leaves of them.
__device__ __forceinline__ uint4 split(float4 v) {
    const u32 xy = to_bfloats(v.x, v.y), zw = to_bfloats(v.z, v.w);
    return make_uint4(xy, zw,
                      to_bfloats(v.x - __uint_as_float(xy << 16),
                                 v.y - __uint_as_float(xy & 0xffff0000u)),
                      to_bfloats(v.z - __uint_as_float(zw << 16),
                                 v.w - __uint_as_float(zw & 0xffff0000u)));
}

__device__ __forceinline__ float scaled_input(const Parameters &p, int row, int channel) {
    const float x = read(p.source, (long long)row * p.features + channel, p.type);
    return p.scales ? x * read(p.scales, channel, HALF) : x;
}

// One channel: of the activations, scaled and with its sign, or the sum of the product's shares.
template <bool INPUT>
__device__ __forceinline__ float load(const Parameters &p, int row, int channel) {
    if (INPUT) {
        if (channel >= p.features) return 0.f;
        return scaled_input(p, row, channel) * sign_of(read_byte(p.signs + channel / 8), channel);
    }
    float sum = 0.f;
    for (int s = 0; s < p.splits; ++s)
        sum += read(p.source, ((long long)s * p.batch + row) * p.width + channel, FLOAT);
    return sum;
}

// N times four channels, of each of which `count` belong to a row of X; all loads are under way
// before the first number is used.
template <bool INPUT, int N>
__device__ __forceinline__ void load_quads(const Parameters &p, int row, const int (&channel)[N],
                                           const int (&count)[N], float4 (&v)[N]) {
    for (int k = 0; k < N; ++k) v[k] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (!p.by_four) {
        for (int k = 0; k < N; ++k) {
            if (count[k] > 0) v[k].x = load<INPUT>(p, row, channel[k]);
            if (count[k] > 1) v[k].y = load<INPUT>(p, row, channel[k] + 1);
            if (count[k] > 2) v[k].z = load<INPUT>(p, row, channel[k] + 2);
            if (count[k] > 3) v[k].w = load<INPUT>(p, row, channel[k] + 3);
        }
    } else if (INPUT) {
        uint4 x[N], ones[N];
        u32 byte[N];
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const bool inside = count[k] > 0 && channel[k] < p.features;
            const long long at = (long long)row * p.features + channel[k];
            x[k] = inside ? read_bits4(p.source, at, p.type) : uint4{};
            ones[k] = inside && p.scales ? read_bits4(p.scales, channel[k], HALF)
                                         : make_uint4(0x3c003c00u, 0x3c003c00u, 0, 0);
            byte[k] = inside ? read_byte(p.signs + channel[k] / 8) : 0;
        }
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const float4 y = numbers(x[k], p.type), scale = numbers(ones[k], HALF);
            const int c = channel[k];
            v[k].x = y.x * (scale.x * sign_of(byte[k], c));
            v[k].y = y.y * (scale.y * sign_of(byte[k], c + 1));
            v[k].z = y.z * (scale.z * sign_of(byte[k], c + 2));
            v[k].w = y.w * (scale.w * sign_of(byte[k], c + 3));
        }
    } else {
        constexpr int SHARES = 4;
        const long long share = (long long)p.batch * p.width;
        for (int s = 0; s < p.splits; s += SHARES) {
            uint4 x[N][SHARES];
#pragma unroll
            for (int i = 0; i < N * SHARES; ++i) {
                const int k = i / SHARES, of = s + i % SHARES;
                const long long at = of * share + (long long)row * p.width + channel[k];
                const bool inside = count[k] > 0 && of < p.splits;
                x[k][i % SHARES] = inside ? read_words4(p.source + 4 * at) : uint4{};
            }
#pragma unroll
            for (int i = 0; i < N * SHARES; ++i) {
                const float4 y = numbers(x[i / SHARES][i % SHARES], FLOAT);
                float4 &sum = v[i / SHARES];
                sum.x += y.x, sum.y += y.y, sum.z += y.z, sum.w += y.w;
            }
        }
    }
}

// The block's columns times the warp's 16 rows of A.
template <bool INPUT, int N, typename Factor>
__device__ __forceinline__ void multiply_columns(const Parameters &p, int row, int tile, int rank,
                                                 const u32 *signs, const uint4 *columns,
                                                 u32 mailbox, Factor factor_of) {
    const int lane = threadIdx.x % LANES, steps = (p.a + SIDE - 1) / SIDE;
    const int groups = 1 << p.group_shift, i = tile * SIDE + lane / 4;
    int j = rank * groups * QUAD + lane % 4;
    Output<INPUT> outputs[N][2];
    const auto load_outputs = [&] {
#pragma unroll
        for (int m = 0; m < N; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) outputs[m][h].load(p, i + 8 * h, j + QUAD * m);
    };
    load_outputs();
    wait_for_mail(mailbox);
    const float factor = factor_of();
    for (int n = 0; n < groups; n += N) {
        float result[N][2];
        multiply<N>(result, signs, columns + n * QUAD * stride_of(steps), steps);
#pragma unroll
        for (int m = 0; m < N; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                outputs[m][h].store(p, row, i + 8 * h, j + QUAD * m, result[m][h], factor);
        j += QUAD * N;
        if (n + N < groups) load_outputs();
    }
}

template <bool INPUT>
__device__ __forceinline__ void rotate(const Parameters &p) {
    const int lane = threadIdx.x % LANES, g = lane / 4, q = lane % 4;
    const int warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
    const int index = blockIdx.x - p.first_block;
    const int rank = index % p.slices, cluster = index / p.slices;
    const int part = cluster % p.parts, row = cluster / p.parts;
    const int tiles = (p.a + SIDE - 1) / SIDE, own = (tiles + p.slices - 1) / p.slices;
    const int steps = (p.b + SIDE - 1) / SIDE;  // of a row of X; 16 columns each, as in B's rows
    const int stride = stride_of(steps), row_words = words_of(steps), left_words = words_of(tiles);

    u32 *right = (u32 *)shared, *left = right + steps * row_words;
    uint4 *rows = (uint4 *)(left + (p.left ? p.part_tiles * left_words : 0));
    uint4 *columns = rows + own * SIDE * stride;
    const int my_columns = p.left ? QUAD << p.group_shift : 0;
    uint4 *end = columns + my_columns * stride_of(tiles);
    const u32 mailbox = address(end);
    u32 *peaks = (u32 *)(end + 1);

    const bool exchange = INPUT || p.left;  // else the blocks have nothing to say to each other
    if (exchange) {
        if (threadIdx.x == 0) {
            const int some = max(0, min(my_columns, p.b - rank * my_columns));
            expect_mail(mailbox, some * tiles * 64 + (INPUT ? p.slices * warps * 4 : 0));
        }
        __syncwarp();
        cluster_arrive();
    }
    for (int i = threadIdx.x; i < steps * row_words / 4; i += blockDim.x)
        copy_async(address(right + 4 * i), p.right + 16 * i);
    if (p.left) {
        const int begin = part * p.part_tiles;
        const int count = min(p.part_tiles, tiles - begin) * left_words / 4;
        for (int i = threadIdx.x; i < count; i += blockDim.x)
            copy_async(address(left + 4 * i), p.left + 16 * (begin * left_words / 4 + i));
    }
    const int thread = rank * blockDim.x + threadIdx.x;
    auto fetch = [&](const char *from, int bytes) {
        for (int at = thread * LINE; from && at < bytes; at += p.slices * blockDim.x * LINE)
            fetch_to_l2(from + at);
    };
    fetch(p.signs, (p.features + 7) / 8);
    fetch(p.scales, 2 * p.features);
    fetch(p.bias, size_of(p.bias_type) * p.features);
    __syncwarp();
    if (exchange) cluster_wait();
    wait_for_the_kernel_before();
    let_the_next_kernel_begin();

    float peak = 0.f, scale = 1.f, norm = 1.f;
    if (!INPUT) {
        scale = read(p.scale, 0, FLOAT);
        norm = read((const char *)(p.norms + row), 0, FLOAT);
    }
    Output<INPUT> outputs[2][4];  // of a unit, where there is no A
    const auto load_outputs = [&](int unit) {
        const int i = (rank * own + unit / steps) * SIDE + q, j = unit % steps * SIDE + g;
#pragma unroll
        for (int k = 0; k < 8; ++k) outputs[k / 4][k % 4].load(p, i + k % 4 * 4, j + k / 4 * 8);
    };
    if (!INPUT && !p.left) load_outputs(warp);  // on their way while the rows are
    const int quads = 4 * steps;
    for (int u = threadIdx.x; u < own * SIDE * quads; u += AT_ONCE * blockDim.x) {
        int channel[AT_ONCE], count[AT_ONCE], at[AT_ONCE];
        float4 v[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            const int quad = u + k * blockDim.x, i = quad / quads, j = quad % quads;
            const int row_of_x = rank * own * SIDE + i;
            channel[k] = p.first + row_of_x * p.b + QUAD * j;
            at[k] = i < own * SIDE ? i * stride + j : -1;
            count[k] = at[k] >= 0 && row_of_x < p.a ? p.b - QUAD * j : 0;
        }
        load_quads<INPUT>(p, row, channel, count, v);
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            peak = fmaxf(peak, fmaxf(fmaxf(fabsf(v[k].x), fabsf(v[k].y)),
                                     fmaxf(fabsf(v[k].z), fabsf(v[k].w))));
            if (at[k] >= 0) rows[at[k]] = split(v[k]);
        }
    }
    if (INPUT && p.a * p.b < p.width)  // other channels' transforms are other launches
        for (int channel = thread; channel < p.features; channel += p.slices * blockDim.x)
            peak = fmaxf(peak, fabsf(scaled_input(p, row, channel)));
    wait_for_copies();
    if (INPUT) {
        const u32 largest = largest_of_warp(peak);
        if (lane < p.slices) send(address(peaks + rank * warps + warp), lane, mailbox, largest);
    }
    __syncthreads();
    auto factor_of = [&] {  // of the row; on the way in, after the exchange of the peaks
        if (!INPUT) return p.factor * scale * norm;
        float largest = 0.f;
#pragma unroll
        for (int i = 0; i < MAX_PEAKS; i += LANES)
            if (i + lane < p.slices * warps)
                largest = fmaxf(largest, __uint_as_float(peaks[i + lane]));
        largest = __uint_as_float(largest_of_warp(largest));
        if (largest == 0.f) largest = 1.f;
        if (index % (p.slices * p.parts) == 0 && threadIdx.x == 0) p.norms[row] = largest;
        return p.factor / largest;
    };
    float factor = 1.f;
    for (int unit = warp; unit < own * steps; unit += warps) {
        const int tile = rank * own + unit / steps, block = unit % steps;
        if (tile >= tiles) break;
        float result[4][2];
        multiply<4>(result, right + block * row_words, rows + unit / steps * SIDE * stride, steps);
        if (!p.left) {
            if (INPUT || unit != warp) load_outputs(unit);
            if (unit == warp) {
                if (INPUT) wait_for_mail(mailbox);
                factor = factor_of();
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int j = block * SIDE + 8 * h + g;
            if (p.left) {
                if (j >= p.b) continue;
                const int owner = j / QUAD >> p.group_shift, column = j - owner * my_columns;
                const float4 v =
                    make_float4(result[0][h], result[1][h], result[2][h], result[3][h]);
                send(address(columns + column * stride_of(tiles) + 4 * tile + q), owner, mailbox,
                     split(v));
            } else {
#pragma unroll
                for (int n = 0; n < 4; ++n)
                    outputs[h][n].store(p, row, tile * SIDE + 4 * n + q, j, result[n][h], factor);
            }
        }
    }
    if (!p.left) {
        if (INPUT) wait_for_mail(mailbox);  // to stay while others send
        return;
    }
    left += warp * left_words;
    const int tile = part * p.part_tiles + warp;
    if (warp >= p.part_tiles || tile >= tiles) wait_for_mail(mailbox);  // to stay while others send
    else if (p.group_shift == 0)
        multiply_columns<INPUT, 1>(p, row, tile, rank, left, columns, mailbox, factor_of);
    else multiply_columns<INPUT, 2>(p, row, tile, rank, left, columns, mailbox, factor_of);
}

// 512 threads of either fit beside a block of the product of 256, 384 beside one of 384.
extern "C" __global__ void __launch_bounds__(512, 2) rotate_input(Jobs jobs) {
    rotate<true>(jobs.mine());
}

extern "C" __global__ void __launch_bounds__(512, 2) unrotate_output(Jobs jobs) {
    rotate<false>(jobs.mine());
}
