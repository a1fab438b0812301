// BCJR for HYB at L = 12, k = 2, V = 2: forward, and with TANGENT its exact backward pass. Messages
// are linear and certified (messages.cuh).
//
// A state is three symbols of 4 bits, s = (x, y, z); a step takes the overlap (x, y) to (y, z). HYB
// has 1024 codewords, entry n of a table that bits 6 to 15 of h(s) = s^2 + s choose:
//     n(x, y, z) = n(0, y, z) + 4 x (2 (16 y + z) + 1)  mod 1024,
// so that its three low bits are those of n(0, y, z), the third changed by x. A step computes 1024
// exponentials into shared memory and gathers 4096 of them.
//
// A team, which is a warp, takes TILES = 4 tiles at a time. A gather reads the entries of the four tiles
// at once, 16 bytes, so that its address is computed once for four, and eight lanes in a row never
// conflict: their n differ in the three low bits.
//   * alpha: a lane has one y and 8 of the 16 z (ORDER), and runs through x.
//   * beta: a lane has one y and the x = j + 2 k, and runs through z; y + 4 i has other bits 6, 7 of h.
//
// What one step of one tile costs a multiprocessor in cycles, both sweeps, by counting:
//                                                              forward   backward
//     shared memory at 128 bytes a cycle, gathers are 256        448        576
//     issued instructions (SASS for sm_90) at 4 a cycle          386        704
//     exponentials at 16 a cycle                                 128        128
// Alpha of all steps goes through global memory: 4 or 8 KiB a step. A direct exponential for every
// state would be 512.

#include "messages.cuh"
#include "short.cuh"

constexpr float LN2 = 0.6931471805599453f;

struct Arguments {
    const float2 *w;            // [tiles, N]
    const float2 *codebook;     // [4096]
    const int *rows;            // [512], a state for every row of HYB's table
    const float *scales;        // [tiles], sqrt(log2(e) / T)
    const long long *pins;      // [tiles] or null
    float2 *values;             // [tiles, N]; with TANGENT the centre, anything near the average
    float *log_z;               // [tiles]; the forward pass writes it
    const float2 *grad_values;  // [tiles, N]; from here on only with TANGENT
    const float *grad_log_z;    // [tiles], with which the centre is the average; or null
    float *grad_w;              // [tiles, N, 2]
    float4 *scratch;            // [blocks, 256], then [teams, N, 256 or 512 + 2]
    int *next;                  // quads of tiles handed out so far
    int *failed;                // [tiles], those that failed the certificate
    int *failures;              // how many
    int tiles;
    int steps;
};

// One step of four tiles. A weight outside the codebook's range is cut to p at its edge; with o for
// what is cut off, (c - w)^2 = (c - p)^2 - 2 o (c - p) + o^2, whose last term is left to log Z. These
// are scaled by sqrt(log2(e) / T), but not the upstream gradient and g . centre.
struct Step {
    float p0[TILES], p1[TILES], far0[TILES], far1[TILES];  // far is 2 o
    float g0[TILES], g1[TILES], centre[TILES];
    bool far;
};

// HYB's table for this block, the component that flips second and not negative.
__device__ __forceinline__ float2 *rows_of(const Arguments &arg) {
    return (float2 *)(arg.scratch + (size_t)blockIdx.x * (ROWS / 2));
}

// What a team keeps in shared memory besides its table and messages.
struct alignas(16) Exchange {
    float scale[TILES], gain[TILES], log2_z[TILES];
    float mean[TILES];  // with TANGENT, of the sum of g . (c - centre) along a path
    float greatest[TILES];  // of the messages
    int exponent[TILES];    // they are times two to this
    float least, most, second;  // bounds of the first component, and of the second without its sign
    int quad;
};

template <bool TANGENT>
struct Worker {
    static constexpr int OWN = 8;  // a lane's z, or x, with one y
    static constexpr int HEADROOM = TANGENT ? 53 : 58;
    static constexpr int TARGET = 2 * HEADROOM - 84;  // log2 of the sum of alpha phi beta
    static constexpr int FIELDS = TANGENT ? 2 : 1;
    static constexpr int ROW = OVERLAPS * FIELDS + 2;  // alpha, its maxima and exponents

    const Arguments &arg;
    float4 *table;       // [1024]
    float4 *messages;    // [256], then with TANGENT their derivatives
    u32 codewords;
    Exchange &told;
    float4 *scratch;
    int lane, first;
    int quad;

    __device__ float2 ordered(float2 x) const { return first ? make_float2(x.y, x.x) : x; }
    __device__ int tile(int m) const { return min(quad * TILES + m, arg.tiles - 1); }
    __device__ size_t index(int m, int t) const { return (size_t)tile(m) * arg.steps + t; }
    __device__ float cut0(float w) const { return fminf(fmaxf(w, told.least), told.most); }
    __device__ float cut1(float w) const { return fminf(fmaxf(w, -told.second), told.second); }

    __device__ void start_messages() {
        const float start = power_of_two(HEADROOM);
        for (int u = lane; u < OVERLAPS; u += 32) {
            float x[TILES];
#pragma unroll
            for (int m = 0; m < TILES; m++)
                x[m] = !arg.pins || (int)arg.pins[tile(m)] == u ? start : 0.0f;
            const u32 at = place(u >> 4, u & 15) / 16;
            messages[at] = four(x);
            if (TANGENT) messages[at + OVERLAPS] = make_float4(0, 0, 0, 0);
        }
        if (lane < TILES) told.exponent[lane] = HEADROOM, told.greatest[lane] = start;
    }

    // Step t; `ahead` are the steps from it to one that is needed soon.
    __device__ __forceinline__ Step read(int t, int ahead) const {
        Step x;
        x.far = false;
        const float(&scale)[TILES] = told.scale, (&gain)[TILES] = told.gain;
        if (lane < TILES && t + ahead >= 0 && t + ahead < arg.steps) {
            prefetch(arg.w + index(lane, t + ahead));
            if (TANGENT) prefetch(arg.grad_values + index(lane, t + ahead));
            if (TANGENT) prefetch(arg.values + index(lane, t + ahead));
        }
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            const float2 w = ordered(arg.w[index(m, t)]);
            const float p0 = cut0(w.x), p1 = cut1(w.y);
            x.p0[m] = p0 * scale[m], x.p1[m] = p1 * scale[m];
            x.far0[m] = 2.0f * (w.x - p0) * scale[m], x.far1[m] = 2.0f * (w.y - p1) * scale[m];
            x.far |= x.far0[m] != 0.0f || x.far1[m] != 0.0f;
            if (TANGENT) {
                const float2 g = ordered(arg.grad_values[index(m, t)]);
                const float2 s = ordered(arg.values[index(m, t)]);
                x.g0[m] = g.x * gain[m], x.g1[m] = g.y * gain[m];
                x.centre[m] = x.g0[m] * s.x + x.g1[m] * s.y;
            }
        }
        return x;
    }

    // Of a message b with its derivative d: after a step with the codeword c the derivative is
    // d + b g . (c - centre), of which this leaves d + c0 b0 + c1 b1.
    __device__ __forceinline__ void spread(const Step &step, const float (&b)[TILES], float (&d)[TILES],
                                           float (&b0)[TILES], float (&b1)[TILES]) const {
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            d[m] = fmaf(-step.centre[m], b[m], d[m]);
            b0[m] = step.g0[m] * b[m], b1[m] = step.g1[m] * b[m];
        }
    }

    // phi of all codewords into the table.
    template <bool FAR>
    __device__ __forceinline__ void weigh(const Step &x) {
        const float2 *rows = rows_of(arg);
        float scale[TILES];
#pragma unroll
        for (int m = 0; m < TILES; m++) scale[m] = told.scale[m];
#pragma unroll(4)
        for (int row = lane; row < ROWS; row += 32) {
            const float2 c = rows[row];
            float plus[TILES], minus[TILES];
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                const float d0 = fmaf(c.x, scale[m], -x.p0[m]);
                const float dp = fmaf(c.y, scale[m], -x.p1[m]), dm = fmaf(-c.y, scale[m], -x.p1[m]);
                const float e = fmaf(-d0, FAR ? d0 - x.far0[m] : d0, (float)HEADROOM);
                plus[m] = exp2_fast(fmaf(-dp, FAR ? dp - x.far1[m] : dp, e));
                minus[m] = exp2_fast(fmaf(-dm, FAR ? dm - x.far1[m] : dm, e));
            }
            table[row] = four(plus);
            table[row + ROWS] = four(minus);
        }
    }

    __device__ __forceinline__ void fill(const Step &x) {
        if (x.far) weigh<true>(x);
        else weigh<false>(x);
        __syncwarp();
    }

    // Scales messages by the power of two that brings their greatest to 2^HEADROOM or a little more.
    __device__ __forceinline__ void normalise(float (&v)[OWN][TILES], float (&d)[OWN][TILES]) {
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            float most = v[0][m];
#pragma unroll
            for (int k = 1; k < OWN; k++) most = fmaxf(most, v[k][m]);
            const u32 largest = largest_of_warp(most);
            const int by = HEADROOM + 127 - (int)(largest >> 23);
            const float factor = power_of_two(by);
            if (lane == 0) {
                told.greatest[m] = __uint_as_float(largest) * factor;
                told.exponent[m] += HEADROOM + by;
            }
#pragma unroll
            for (int k = 0; k < OWN; k++) {
                v[k][m] *= factor;
                if (TANGENT) d[k][m] *= factor;
            }
        }
    }

    // In the sums of a step alpha is times two to this, besides its own exponent.
    __device__ __forceinline__ int scaled(int m, int alpha_exponent) const {
        const int all = alpha_exponent + HEADROOM + told.exponent[m];
        return max(TARGET - (int)(told.log2_z[m] + (float)all), -149);
    }

    // alpha_0 to alpha_{N-1} into scratch; log2 of Z without the squares o^2, and the mean.
    __device__ void alpha_sweep() {
        const int j = lane >> 3 & 1, half = lane >> 4, y = (lane & 7) << 1 | ((lane & 1) ^ half);
        const u32 order = ORDER[lane];
        const u32 base = address(table), from = address(messages);
        const u32 mine = codewords + codeword_at(y, 0, 0);
        for (int t = 0; t < arg.steps; t++) {
            float4 *store = scratch + (size_t)t * ROW;
            const Step step = read(t, 4);
            fill(step);
            if (lane == 0) {
                store[ROW - 2] = *(const float4 *)told.greatest;
                store[ROW - 1] = *(const float4 *)told.exponent;
            }
            u32 entry[OWN], stride[OWN], codeword[OWN];
            float v[OWN][TILES] = {}, d[OWN][TILES] = {};
#pragma unroll
            for (int k = 0; k < OWN; k++) {
                const u32 z = order >> 4 * k & 15;
                entry[k] = entry_of(16 * y + z), stride[k] = stride_of(16 * y + z);
                codeword[k] = mine + z * 1024;
            }
#pragma unroll 1
            for (int pair = 0; pair < 8; pair++) {
                float a[2][TILES], at[2][TILES], a0[2][TILES], a1[2][TILES];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int x = 2 * pair + i;
                    const u32 here = from + place(x, y);
                    read4(a[i], here);
                    if (TANGENT) read4(at[i], here + OVERLAPS * 16);
                    if (i == j) {
                        store[x * 16 + column(y)] = four(a[i]);
                        if (TANGENT) store[OVERLAPS + x * 16 + column(y)] = four(at[i]);
                    }
                    if (TANGENT) spread(step, a[i], at[i], a0[i], a1[i]);
                }
#pragma unroll
                for (int k = 0; k < OWN; k++) {
                    float4 c;
                    if (TANGENT) c = constant4(codeword[k] + pair * 128);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float phi[TILES];
                        read4(phi, base + bytes(entry[k]));
                        entry[k] += stride[k];
#pragma unroll
                        for (int m = 0; m < TILES; m++) {
                            v[k][m] = fmaf(phi[m], a[i][m], v[k][m]);
                            if constexpr (TANGENT) {
                                const float h = fmaf(i ? c.z : c.x, a0[i][m],
                                                     fmaf(i ? c.w : c.y, a1[i][m], at[i][m]));
                                d[k][m] = fmaf(phi[m], h, d[k][m]);
                            }
                        }
                    }
                }
            }
            __syncwarp();
            normalise(v, d);
#pragma unroll
            for (int k = 0; k < OWN; k++) {
                const u32 to = place(y, order >> 4 * k & 15) / 16;
                messages[to] = four(v[k]);
                if (TANGENT) messages[to + OVERLAPS] = four(d[k]);
            }
        }
        __syncwarp();
        float sum[TILES] = {}, drift[TILES] = {};
        for (int u = lane; u < OVERLAPS; u += 32) {
            float x[TILES], d[TILES] = {};
            const u32 here = from + place(u >> 4, u & 15);
            read4(x, here);
            if (TANGENT) read4(d, here + OVERLAPS * 16);
#pragma unroll
            for (int m = 0; m < TILES; m++)
                if (!arg.pins || (int)arg.pins[tile(m)] == u) sum[m] += x[m], drift[m] += d[m];
        }
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            const float all = sum_of_warp(sum[m]);
            told.log2_z[m] = log2f(all) - (float)told.exponent[m];
            if (TANGENT) told.mean[m] = sum_of_warp(drift[m]) / all;
        }
        __syncwarp();
    }

    // The result of one step from the lanes' sums; false if the certificate fails.
    __device__ __forceinline__ bool finish(int t, const float4 *stored, float sum) {
        const int m = lane >> 3, which = lane >> 1 & 3;  // two components, z and drift
        const float alpha_max = __ldcg((const float *)(stored + ROW - 2) + m);
        const int by = scaled(m, __ldcg((const int *)(stored + ROW - 1) + m));
        const float beta_max = told.greatest[m];
        const float z = __shfl_sync(0xffffffffu, sum, (lane & 24) + 4);
        const float drift = __shfl_sync(0xffffffffu, sum, (lane & 24) + 6);
        if (which < 2 && (lane & 1) == 0) {
            const size_t at = index(m, t) * 2 + (which ^ first);
            if (TANGENT) {
                const float s = ((const float *)arg.values)[at], w = ((const float *)arg.w)[at];
                const float gz = arg.grad_log_z ? arg.grad_log_z[tile(m)] : 0.0f;
                const float scale = told.scale[m];
                arg.grad_w[at] = 2.0f * LN2 * scale * scale *
                                 ((sum - s * drift) / z / told.gain[m] + (s - w) * gz);
            } else {
                ((float *)arg.values)[at] = sum / z;
            }
        }
        __syncwarp();
        return certified(z, alpha_max, beta_max, HEADROOM, by);
    }

    // The results of all steps, from alpha in scratch; whether the certificate failed for tile
    // lane >> 3.
    __device__ bool beta_sweep() {
        const int quarter = lane >> 3, j = lane & 1;
        const int y = (quarter < 2 ? 3 * quarter : quarter - 1) + 4 * (lane >> 1 & 3);
        const u32 base = address(table), from = address(messages);
        const u32 mine = codewords + codeword_at(y, 0, j);
        bool bad = false;
#pragma unroll 1
        for (int t = arg.steps - 1; t >= 0; t--) {
            const float4 *stored = scratch + (size_t)t * ROW;
            float alpha[OWN][TILES], tangent[OWN][TILES];
#pragma unroll
            for (int k = 0; k < OWN; k++) {
                const float4 *at = stored + (j + 2 * k) * 16 + column(y);
                fetch4(alpha[k], at);
                if (TANGENT) fetch4(tangent[k], at + OVERLAPS);
            }
            float exponents[TILES];
            fetch4(exponents, stored + ROW - 1);
            const Step step = read(t, -4);
            fill(step);
            float v[OWN][TILES] = {}, d[OWN][TILES] = {};
            float s0[OWN][TILES] = {}, s1[OWN][TILES] = {};  // only without TANGENT
            float sums[16] = {};
            if (TANGENT) scale_alpha(alpha, tangent, exponents);
#pragma unroll 1
            for (int z = 0; z < 16; z++) {
                float b[TILES], bt[TILES], b0[TILES], b1[TILES];
                const u32 here = from + place(y, z), over = 16 * y + z;
                read4(b, here);
                if (TANGENT) {
                    read4(bt, here + OVERLAPS * 16);
                    spread(step, b, bt, b0, b1);
                }
                const u32 stride = stride_of(over), entry = entry_of(over) + j * stride;
#pragma unroll
                for (int k = 0; k < OWN; k++) {
                    float phi[TILES];
                    read4(phi, base + bytes(entry + 2 * k * stride));
                    const float2 c = constant2(mine + z * 1024 + k * 128);
#pragma unroll
                    for (int m = 0; m < TILES; m++) {
                        if constexpr (TANGENT) {
                            const float h = fmaf(c.x, b0[m], fmaf(c.y, b1[m], bt[m]));
                            v[k][m] = fmaf(phi[m], b[m], v[k][m]);
                            d[k][m] = fmaf(phi[m], h, d[k][m]);
                            const float p = phi[m] * fmaf(tangent[k][m], b[m], alpha[k][m] * h);
                            sums[4 * m] = fmaf(p, c.x, sums[4 * m]);
                            sums[4 * m + 1] = fmaf(p, c.y, sums[4 * m + 1]);
                        } else {
                            const float q = phi[m] * b[m];
                            v[k][m] += q;
                            s0[k][m] = fmaf(q, c.x, s0[k][m]);
                            s1[k][m] = fmaf(q, c.y, s1[k][m]);
                        }
                    }
                }
            }
            if (!TANGENT) scale_alpha(alpha, tangent, exponents);
#pragma unroll
            for (int k = 0; k < OWN; k++) {
#pragma unroll
                for (int m = 0; m < TILES; m++) {
                    const float a = alpha[k][m];
                    sums[4 * m + 2] = fmaf(a, v[k][m], sums[4 * m + 2]);
                    if constexpr (TANGENT) {
                        const float drift = fmaf(a, d[k][m], sums[4 * m + 3]);
                        sums[4 * m + 3] = fmaf(tangent[k][m], v[k][m], drift);
                    } else {
                        sums[4 * m] = fmaf(a, s0[k][m], sums[4 * m]);
                        sums[4 * m + 1] = fmaf(a, s1[k][m], sums[4 * m + 1]);
                    }
                }
            }
            __syncwarp();
            bad |= !finish(t, stored, sums_of_warp(sums, lane));
            normalise(v, d);
#pragma unroll
            for (int k = 0; k < OWN; k++) {
                const u32 to = place(j + 2 * k, y) / 16;
                messages[to] = four(v[k]);
                if (TANGENT) messages[to + OVERLAPS] = four(d[k]);
            }
        }
        return __shfl_sync(0xffffffffu, bad, lane & 24);
    }

    __device__ __forceinline__ void scale_alpha(float (&alpha)[OWN][TILES],
                                                float (&tangent)[OWN][TILES],
                                                const float (&exponents)[TILES]) {
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            const float by = power_of_two(scaled(m, __float_as_int(exponents[m])));
#pragma unroll
            for (int k = 0; k < OWN; k++) {
                alpha[k][m] *= by;
                if (TANGENT) tangent[k][m] = fmaf(tangent[k][m], by, -told.mean[m] * alpha[k][m]);
            }
        }
    }

    // The power of two that brings a tile's greatest upstream gradient to 1 or a little more.
    __device__ float gain_of(int m) const {
        float most = 0.0f;
        for (int t = lane; t < arg.steps; t += 32) {
            const float2 g = arg.grad_values[index(m, t)];
            most = fmaxf(most, fmaxf(fabsf(g.x), fabsf(g.y)));
        }
        u32 exponent = largest_of_warp(most) >> 23;
        if (exponent < 2 || exponent > 252) exponent = 127;
        return __uint_as_float((254 - exponent) << 23);
    }

    // The sum of the squares o^2 over a tile.
    __device__ double outside(int m) const {
        double sum = 0.0;
        for (int t = lane; t < arg.steps; t += 32) {
            const float2 w = ordered(arg.w[index(m, t)]);
            const double o0 = (w.x - cut0(w.x)) * told.scale[m];
            const double o1 = (w.y - cut1(w.y)) * told.scale[m];
            sum += o0 * o0 + o1 * o1;
        }
#pragma unroll
        for (int i = 16; i; i >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, i);
        return sum;
    }

    __device__ void run() {
        const int quads = (arg.tiles + TILES - 1) / TILES;
        while (true) {
            if (lane == 0) told.quad = atomicAdd(arg.next, 1);
            __syncwarp();
            quad = told.quad;
            if (quad >= quads) return;
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                told.scale[m] = arg.scales[tile(m)];
                if (TANGENT) told.gain[m] = gain_of(m);
            }
            start_messages();
            __syncwarp();
            alpha_sweep();
            start_messages();
            const bool bad = beta_sweep();
            const int mine = quad * TILES + (lane >> 3);
            if (!TANGENT) {
#pragma unroll 1
                for (int m = 0; m < TILES; m++) {
                    const double all = (double)told.log2_z[m] - outside(m);
                    if (lane == 0)
                        arg.log_z[tile(m)] = (float)(all * 0.6931471805599453);
                }
            }
            if (bad && (lane & 7) == 0 && mine < arg.tiles)
                arg.failed[atomicAdd(arg.failures, 1)] = mine;
            __syncwarp();
        }
    }
};

template <bool TANGENT>
__device__ __forceinline__ void block(const Arguments &arg) {
    extern __shared__ float4 shared[];
    constexpr int EACH = 2 * ROWS + OVERLAPS * (TANGENT ? 2 : 1);
    const Symmetry symmetry = symmetry_of(arg.codebook, arg.rows);
    if (symmetry == NONE) {
        if (blockIdx.x == 0 && threadIdx.x == 0) *arg.failures = arg.tiles;
        return;
    }
    const int first = symmetry == FIRST_FLIPS;
    const int lane = threadIdx.x & 31, team = threadIdx.x >> 5;
    float2 *rows = rows_of(arg);
    for (int i = threadIdx.x; i < ROWS; i += blockDim.x) {
        const float2 x = arg.codebook[arg.rows[i]];
        const float flip = hash(arg.rows[i]) >> 15 & 1 ? -1.0f : 1.0f;
        rows[i] = first ? make_float2(x.y, flip * x.x) : make_float2(x.x, flip * x.y);
    }
    char *codewords = (char *)(shared + TEAMS * EACH);
    for (int s = threadIdx.x; s < STATES; s += blockDim.x) {
        const int x = s >> 8, y = s >> 4 & 15, z = s & 15;
        const float2 c = arg.codebook[s];
        *(float2 *)(codewords + codeword_at(y, z, x)) = first ? make_float2(c.y, c.x) : c;
    }
    Exchange *told = (Exchange *)(codewords + STATES * sizeof(float2));
    __syncthreads();
    float least = 3e38f, most = -3e38f, second = 0.0f;
    for (int i = lane; i < ROWS; i += 32) {
        const float2 c = rows[i];
        least = fminf(least, c.x), most = fmaxf(most, c.x), second = fmaxf(second, fabsf(c.y));
    }
    told[team].least = least_of_warp(least), told[team].most = -least_of_warp(-most);
    told[team].second = -least_of_warp(-second);

    typedef Worker<TANGENT> Team;
    float4 *own = shared + team * EACH;
    float4 *scratch = arg.scratch + (size_t)gridDim.x * (ROWS / 2) +
                      (size_t)(blockIdx.x * TEAMS + team) * arg.steps * Team::ROW;
    Team worker = {arg,        own,     own + 2 * ROWS, address(codewords),
                   told[team], scratch, lane,           first, 0};
    worker.run();
}

extern "C" __global__ void __launch_bounds__(32 * TEAMS, 1) forward(const Arguments arg) {
    block<false>(arg);
}

extern "C" __global__ void __launch_bounds__(32 * TEAMS, 1) backward(const Arguments arg) {
    block<true>(arg);
}
