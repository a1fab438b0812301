// BCJR for HYB at L = 12, k = 2, V = 2: forward, and with TANGENT its exact backward pass. Messages
// are linear and certified (messages.cuh).
//
// A state is three symbols of 4 bits, s = (x, y, z); a step takes the overlap (x, y) to (y, z). HYB
// has 1024 codewords, entry n of a table that bits 6 to 15 of h(s) = s^2 + s choose:
//     n(x, y, z) = n(0, y, z) + 4 x (2 (16 y + z) + 1)  mod 1024,
// so that its three low bits are those of n(0, y, z), the third changed by x. A step computes 1024
// exponentials into shared memory and gathers 4096 of them.
//
// A team of SPLIT warps takes TILES = 4 tiles at a time. A gather reads the entries of the
// four tiles at once, 16 bytes, so that its address is computed once for four, and eight lanes in a
// row never conflict: their n differ in the three low bits.
//   * alpha: a lane has one y and 8 of the 16 z (ORDER), and runs through x.
//   * beta: a lane has one y and the x = j + 2 k, and runs through z; y + 4 i has other bits 6, 7 of h.
//
// What one step of one tile costs a multiprocessor in cycles, by counting: shared memory (128 bytes a
// cycle) 448 forward and 576 backward, most of it the gathers, 128 a sweep; issued instructions 305
// and 680; exponentials 128. Alpha of all steps goes through global memory: 4 or 8 KiB a step.

#include "messages.cuh"

constexpr int TILES = 4;
constexpr int TEAMS = 8;
constexpr int OVERLAPS = 256;
constexpr int STATES = 4096;
constexpr int ROWS = 512;
constexpr float LN2 = 0.6931471805599453f;

// The z of a lane in the alpha sweep, 4 bits each: at any of them eight lanes in a row have
// eight different values of bits 6 to 8 of h(16 y + z), and nearly always of the banks they write to.
__constant__ u32 ORDER[32] = {
    0x87be15ca, 0xbdf78035, 0x1a07fcd2, 0x8160b7fc, 0xb912af87, 0x7140f568, 0xcea187bf, 0xa6cd1280,
    0x936f240d, 0x4291ac6e, 0xe98645b3, 0x4a5392ed, 0x5e3406cd, 0xe9d3cba2, 0x9435260d, 0x73e9b45f,
    0xc2a1769b, 0x810db539, 0x7a1268f0, 0x519ecba2, 0xde06cbf4, 0x7061589a, 0x76fe3502, 0xb0a9d68c,
    0xf308d4e5, 0x7e6cfa42, 0x9ecb4d53, 0x0687f3d4, 0x8179a523, 0x2d3ecbf4, 0xdb98ac14, 0x14e752f3};

struct Arguments {
    const float2 *w;            // [tiles, N]
    const float2 *codebook;     // [4096]
    const int *rows;            // [512], a state for every row of HYB's table
    const float *scales;        // [tiles], sqrt(log2(e) / T)
    const long long *pins;      // [tiles] or null
    float2 *values;             // [tiles, N]
    float *log_z;               // [tiles]; the forward pass writes it
    const float2 *grad_values;  // [tiles, N]; from here on only with TANGENT
    const float *grad_log_z;    // [tiles]
    float *grad_w;              // [tiles, N, 2]
    float4 *scratch;            // [blocks, 256], then [teams, N, 256 or 512 + 2]
    int *next;                  // quads of tiles handed out so far
    int *failed;                // [tiles], those that failed the certificate
    int *failures;              // how many
    int tiles;
    int steps;
};

__device__ __forceinline__ u32 hash(u32 s) { return s * s + s; }
__device__ __forceinline__ int half_of(int y) { return (y ^ y >> 1) & 1; }
__device__ __forceinline__ int column(int y) { return half_of(y) << 3 | y >> 1; }

// Where messages lie, [x, y]: neither reads at one x nor reads at one y of (y, z) conflict.
__device__ __forceinline__ u32 place(int x, int y) {
    return (u32)(x * 16 + (column(y) ^ x >> 1 ^ (x & 1))) * 16;
}

// Entry n of the table is n << 22 here, so that it wraps by itself; 16 bytes an entry.
__device__ __forceinline__ u32 entry_of(u32 v) { return (hash(v) << 16) & 0xffc00000u; }
__device__ __forceinline__ u32 stride_of(u32 v) { return (2 * v + 1) << 24; }
__device__ __forceinline__ u32 bytes(u32 entry) { return entry >> 18; }

// Codewords of all states, 8 bytes each, as the sweeps read them: [half of y, z, x >> 1, y >> 1, x & 1].
__device__ __forceinline__ u32 codeword_at(int y, int z, int x) {
    return (u32)((half_of(y) * 16 + z) * 8 + (x >> 1)) * 128 + (y >> 1) * 16 + (x & 1) * 8;
}

__device__ __forceinline__ void read4(float (&to)[TILES], u32 from) {
    const float4 x = message4(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
__device__ __forceinline__ void fetch4(float (&to)[TILES], const float4 *from) {
    const float4 x = __ldcg(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
__device__ __forceinline__ float4 four(const float (&x)[TILES]) {
    return make_float4(x[0], x[1], x[2], x[3]);
}
template <class X>
__device__ __forceinline__ X pick(const X (&x)[TILES], int m) {
    return m & 2 ? (m & 1 ? x[3] : x[2]) : (m & 1 ? x[1] : x[0]);
}

template <int HALF>
__device__ __forceinline__ void fold(float (&x)[16], int lane) {
    const bool upper = lane & HALF * 2;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        const float kept = upper ? x[i + HALF] : x[i], sent = upper ? x[i] : x[i + HALF];
        x[i] = kept + __shfl_xor_sync(0xffffffffu, sent, HALF * 2);
    }
}

// Sums over the warp of 16 numbers: lane i has that of x[i >> 1].
__device__ __forceinline__ float sums_of_warp(float (&x)[16], int lane) {
    fold<8>(x, lane), fold<4>(x, lane), fold<2>(x, lane), fold<1>(x, lane);
    return x[0] + __shfl_xor_sync(0xffffffffu, x[0], 1);
}

// One step of four tiles. A weight outside the codebook's range is cut to p at its edge; with o for
// what is cut off, (c - w)^2 = (c - p)^2 - 2 o (c - p) + o^2, whose last term is left to log Z. These
// are scaled by sqrt(log2(e) / T), but not the upstream gradient and g . soft.
struct Step {
    float p0[TILES], p1[TILES], far0[TILES], far1[TILES];  // far is 2 o
    float g0[TILES], g1[TILES], centre[TILES];
    bool far;
};

// What the warps of a team tell each other.
template <int SPLIT>
struct alignas(16) Exchange {
    float largest[SPLIT][TILES];
    float sums[SPLIT][32];
    int quad, unused[3];
};

struct Bounds {
    float least, most, second;  // of the first component, and of the second one without its sign
};

// SPLIT warps share a team's table and messages.
template <bool TANGENT, int SPLIT>
struct Worker {
    static constexpr int OWN = 8 / SPLIT;  // a lane's z, or x, with one y
    static constexpr int THREADS = 32 * SPLIT;
    static constexpr int HEADROOM = TANGENT ? 53 : 58;
    static constexpr int TARGET = 2 * HEADROOM - 84;  // log2 of the sum of alpha phi beta
    static constexpr int FIELDS = TANGENT ? 2 : 1;
    static constexpr int ROW = OVERLAPS * FIELDS + 2;  // alpha, its maxima and exponents

    const Arguments &arg;
    const float2 *rows;  // HYB's table, the component that flips second and not negative
    float4 *table;       // [1024]
    float4 *messages;    // [256], then with TANGENT their derivatives
    u32 codewords;
    Exchange<SPLIT> &told;
    float4 *scratch;
    int team, part, lane, first;
    Bounds bounds;
    int tile[TILES];
    float scale[TILES], gain[TILES];

    __device__ void barrier() const {
        if constexpr (SPLIT == 1) __syncwarp();
        else group_barrier<THREADS>(team);
    }

    __device__ float2 ordered(float2 x) const { return first ? make_float2(x.y, x.x) : x; }
    __device__ size_t index(int m, int t) const { return (size_t)tile[m] * arg.steps + t; }
    __device__ float cut0(float w) const { return fminf(fmaxf(w, bounds.least), bounds.most); }
    __device__ float cut1(float w) const { return fminf(fmaxf(w, -bounds.second), bounds.second); }

    __device__ void start_messages() {
        const float start = power_of_two(HEADROOM);
        for (int u = lane; u < OVERLAPS; u += 32) {
            float x[TILES];
#pragma unroll
            for (int m = 0; m < TILES; m++)
                x[m] = !arg.pins || (int)arg.pins[tile[m]] == u ? start : 0.0f;
            const u32 at = place(u >> 4, u & 15) / 16;
            messages[at] = four(x);
            if (TANGENT) messages[at + OVERLAPS] = make_float4(0, 0, 0, 0);
        }
    }

    __device__ __forceinline__ Step read(int t) const {
        Step x;
        x.far = false;
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
    // d + b (g . c - g . soft), of which this leaves d + c0 b0 + c1 b1.
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
#pragma unroll 2
        for (int row = part * 32 + lane; row < ROWS; row += THREADS) {
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
        barrier();
    }

    // The greatest message of every tile in the lane's own, for normalise after a barrier.
    __device__ __forceinline__ void tell_largest(const float (&v)[OWN][TILES]) {
        float top[TILES];
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            top[m] = v[0][m];
#pragma unroll
            for (int k = 1; k < OWN; k++) top[m] = fmaxf(top[m], v[k][m]);
            top[m] = __uint_as_float(largest_of_warp(top[m]));
        }
        if (lane == 0) *(float4 *)told.largest[part] = four(top);
    }

    // Scales messages by the power of two that brings their greatest to 2^HEADROOM or a little more;
    // adds it to the exponents and returns the greatest.
    __device__ __forceinline__ void normalise(float (&v)[OWN][TILES], float (&d)[OWN][TILES],
                                              int (&exponent)[TILES], float (&greatest)[TILES]) {
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            float most = told.largest[0][m];
#pragma unroll
            for (int i = 1; i < SPLIT; i++) most = fmaxf(most, told.largest[i][m]);
            const int by = HEADROOM + 127 - (int)(__float_as_uint(most) >> 23);
            const float factor = power_of_two(by);
            greatest[m] = most * factor;
            exponent[m] += HEADROOM + by;
#pragma unroll
            for (int k = 0; k < OWN; k++) {
                v[k][m] *= factor;
                if (TANGENT) d[k][m] *= factor;
            }
        }
    }

    // alpha_0 to alpha_{N-1} into scratch; log2 of Z without the squares o^2.
    __device__ void alpha_sweep(float (&log2_z)[TILES]) {
        const int j = lane >> 3 & 1, half = lane >> 4, y = (lane & 7) << 1 | ((lane & 1) ^ half);
        const u32 order = ORDER[lane] >> 4 * OWN * part, base = address(table), from = address(messages);
        const u32 mine = codewords + codeword_at(y, 0, 0);
        int exponent[TILES];
        float greatest[TILES];
#pragma unroll
        for (int m = 0; m < TILES; m++) exponent[m] = HEADROOM, greatest[m] = power_of_two(HEADROOM);
        for (int t = 0; t < arg.steps; t++) {
            float4 *store = scratch + (size_t)t * ROW;
            const Step step = read(t);
            fill(step);
            if (part == 0 && lane == 0) {
                store[ROW - 2] = four(greatest);
                store[ROW - 1] = make_float4(__int_as_float(exponent[0]), __int_as_float(exponent[1]),
                                             __int_as_float(exponent[2]), __int_as_float(exponent[3]));
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
                    if (i == j && (SPLIT == 1 || pair % SPLIT == part)) {
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
            tell_largest(v);
            barrier();
            normalise(v, d, exponent, greatest);
#pragma unroll
            for (int k = 0; k < OWN; k++) {
                const u32 to = place(y, order >> 4 * k & 15) / 16;
                messages[to] = four(v[k]);
                if (TANGENT) messages[to + OVERLAPS] = four(d[k]);
            }
        }
        barrier();
        float sum[TILES] = {};
        for (int u = lane; u < OVERLAPS; u += 32) {
            float x[TILES];
            read4(x, from + place(u >> 4, u & 15));
#pragma unroll
            for (int m = 0; m < TILES; m++)
                if (!arg.pins || (int)arg.pins[tile[m]] == u) sum[m] += x[m];
        }
#pragma unroll
        for (int m = 0; m < TILES; m++)
            log2_z[m] = log2f(sum_of_warp(sum[m])) - (float)exponent[m];
        barrier();
    }

    // The result of one step from its sums; false if the certificate fails.
    __device__ __forceinline__ bool finish(int t, const float (&alpha_max)[TILES],
                                           const float (&beta_max)[TILES],
                                           const int (&scaled)[TILES]) {
        float sum = told.sums[0][lane];
#pragma unroll
        for (int i = 1; i < SPLIT; i++) sum += told.sums[i][lane];
        const int m = lane >> 3, which = lane >> 1 & 3;  // two components, z and drift
        const float z = __shfl_sync(0xffffffffu, sum, (lane & 24) + 4);
        const float drift = __shfl_sync(0xffffffffu, sum, (lane & 24) + 6);
        if (which < 2 && (lane & 1) == 0) {
            const size_t at = ((size_t)pick(tile, m) * arg.steps + t) * 2 + (which ^ first);
            if (TANGENT) {
                const float s = ((const float *)arg.values)[at], w = ((const float *)arg.w)[at];
                const float gz = arg.grad_log_z[pick(tile, m)], by = pick(scale, m);
                arg.grad_w[at] = 2.0f * LN2 * by * by *
                                 ((sum - s * drift) / z / pick(gain, m) + (s - w) * gz);
            } else {
                ((float *)arg.values)[at] = sum / z;
            }
        }
        return certified(z, pick(alpha_max, m), pick(beta_max, m), HEADROOM, pick(scaled, m));
    }

    // The results of all steps, from alpha in scratch; whether the certificate failed for tile
    // lane >> 3.
    __device__ bool beta_sweep(const float (&log2_z)[TILES]) {
        const int quarter = lane >> 3, j = lane & 1;
        const int y = (quarter < 2 ? 3 * quarter : quarter - 1) + 4 * (lane >> 1 & 3);
        const u32 base = address(table), from = address(messages);
        const u32 mine = codewords + codeword_at(y, 0, j + 2 * OWN * part);
        const int own = j + 2 * OWN * part;  // the first x
        int exponent[TILES];
        float beta_max[TILES];
        bool bad = false;
#pragma unroll
        for (int m = 0; m < TILES; m++) exponent[m] = HEADROOM, beta_max[m] = power_of_two(HEADROOM);
#pragma unroll 1
        for (int t = arg.steps - 1; t >= 0; t--) {
            const float4 *stored = scratch + (size_t)t * ROW;
            float alpha[OWN][TILES], tangent[OWN][TILES];
#pragma unroll
            for (int k = 0; k < OWN; k++) {
                const float4 *at = stored + (own + 2 * k) * 16 + column(y);
                fetch4(alpha[k], at);
                if (TANGENT) fetch4(tangent[k], at + OVERLAPS);
            }
            float alpha_max[TILES], exponents[TILES];
            fetch4(alpha_max, stored + ROW - 2);
            fetch4(exponents, stored + ROW - 1);
            const Step step = read(t);
            fill(step);
            int scaled[TILES];
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                const int all = __float_as_int(exponents[m]) + HEADROOM + exponent[m];
                scaled[m] = max(TARGET - (int)(log2_z[m] + (float)all), -149);
            }
            float v[OWN][TILES] = {}, d[OWN][TILES] = {};
            float s0[OWN][TILES] = {}, s1[OWN][TILES] = {};  // only without TANGENT
            float sums[16] = {};
            if (TANGENT) scale_alpha(alpha, tangent, scaled);
#pragma unroll 1
            for (int z = 0; z < 16; z++) {
                float b[TILES], bt[TILES], b0[TILES], b1[TILES];
                const u32 here = from + place(y, z), over = 16 * y + z;
                read4(b, here);
                if (TANGENT) {
                    read4(bt, here + OVERLAPS * 16);
                    spread(step, b, bt, b0, b1);
                }
                const u32 stride = stride_of(over), entry = entry_of(over) + own * stride;
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
            if (!TANGENT) scale_alpha(alpha, tangent, scaled);
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
            told.sums[part][lane] = sums_of_warp(sums, lane);
            tell_largest(v);
            barrier();
            if (part == 0) bad |= !finish(t, alpha_max, beta_max, scaled);
            normalise(v, d, exponent, beta_max);
#pragma unroll
            for (int k = 0; k < OWN; k++) {
                const u32 to = place(own + 2 * k, y) / 16;
                messages[to] = four(v[k]);
                if (TANGENT) messages[to + OVERLAPS] = four(d[k]);
            }
        }
        return __shfl_sync(0xffffffffu, bad, lane & 24);
    }

    __device__ __forceinline__ void scale_alpha(float (&alpha)[OWN][TILES],
                                                float (&tangent)[OWN][TILES],
                                                const int (&scaled)[TILES]) {
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            const float by = power_of_two(scaled[m]);
#pragma unroll
            for (int k = 0; k < OWN; k++) {
                alpha[k][m] *= by;
                if (TANGENT) tangent[k][m] *= by;
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
            const double o0 = (w.x - cut0(w.x)) * scale[m], o1 = (w.y - cut1(w.y)) * scale[m];
            sum += o0 * o0 + o1 * o1;
        }
#pragma unroll
        for (int i = 16; i; i >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, i);
        return sum;
    }

    __device__ void run() {
        const int quads = (arg.tiles + TILES - 1) / TILES;
        while (true) {
            if (part == 0 && lane == 0) told.quad = atomicAdd(arg.next, 1);
            barrier();
            const int quad = told.quad;
            if (quad >= quads) return;
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                tile[m] = min(quad * TILES + m, arg.tiles - 1);
                scale[m] = arg.scales[tile[m]];
                gain[m] = TANGENT ? gain_of(m) : 1.0f;
            }
            float log2_z[TILES];
            start_messages();
            alpha_sweep(log2_z);
            start_messages();
            const bool bad = beta_sweep(log2_z);
            const int m = lane >> 3, mine = quad * TILES + m;
            if (!TANGENT) {
#pragma unroll
                for (int i = 0; i < TILES; i++) {
                    const double all = (double)log2_z[i] - outside(i);
                    if (part == 0 && lane == 0) arg.log_z[tile[i]] = (float)(all * 0.6931471805599453);
                }
            }
            if (part == 0 && bad && (lane & 7) == 0 && mine < arg.tiles)
                arg.failed[atomicAdd(arg.failures, 1)] = mine;
            barrier();
        }
    }
};

enum Symmetry { NONE = 0, SECOND_FLIPS = 1, FIRST_FLIPS = 2 };

// Whether the codebook is HYB's: rows of a table, one component negative where bit 15 of h is set.
__device__ __forceinline__ Symmetry symmetry_of(const float2 *codebook, const int *rows) {
    bool second = true, first = true;
    for (int s = threadIdx.x; s < STATES; s += blockDim.x) {
        const u32 n = hash(s) >> 6 & 1023, other = rows[n & 511];
        const float sign = (n >> 9) == (hash(other) >> 15 & 1) ? 1.0f : -1.0f;
        const float2 x = codebook[s], y = codebook[other];
        second &= x.x == y.x && x.y == sign * y.y;
        first &= x.x == sign * y.x && x.y == y.y;
    }
    second = __syncthreads_and(second), first = __syncthreads_and(first);
    return second ? SECOND_FLIPS : first ? FIRST_FLIPS : NONE;
}

template <bool TANGENT, int SPLIT>
__device__ __forceinline__ void block(const Arguments &arg) {
    extern __shared__ float4 shared[];
    constexpr int EACH = 2 * ROWS + OVERLAPS * (TANGENT ? 2 : 1);
    const Symmetry symmetry = symmetry_of(arg.codebook, arg.rows);
    if (symmetry == NONE) {
        if (blockIdx.x == 0 && threadIdx.x == 0) *arg.failures = arg.tiles;
        return;
    }
    const int first = symmetry == FIRST_FLIPS;
    const int lane = threadIdx.x & 31, team = threadIdx.x / (32 * SPLIT);
    const int part = (threadIdx.x >> 5) % SPLIT;
    float2 *rows = (float2 *)(arg.scratch + (size_t)blockIdx.x * (ROWS / 2));
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
    Exchange<SPLIT> *told = (Exchange<SPLIT> *)(codewords + STATES * sizeof(float2));
    __syncthreads();
    Bounds bounds = {3e38f, -3e38f, 0.0f};
    for (int i = lane; i < ROWS; i += 32) {
        const float2 c = rows[i];
        bounds.least = fminf(bounds.least, c.x), bounds.most = fmaxf(bounds.most, c.x);
        bounds.second = fmaxf(bounds.second, fabsf(c.y));
    }
    bounds.least = least_of_warp(bounds.least);
    bounds.most = -least_of_warp(-bounds.most);
    bounds.second = -least_of_warp(-bounds.second);

    typedef Worker<TANGENT, SPLIT> Team;
    float4 *own = shared + team * EACH;
    float4 *scratch = arg.scratch + (size_t)gridDim.x * (ROWS / 2) +
                      (size_t)(blockIdx.x * TEAMS + team) * arg.steps * Team::ROW;
    Team worker = {arg,        rows,    own,  own + 2 * ROWS, address(codewords),
                   told[team], scratch, team, part,           lane,
                   first,      bounds};
    worker.run();
}

extern "C" __global__ void __launch_bounds__(32 * TEAMS, 1) forward(const Arguments arg) {
    block<false, 1>(arg);
}

extern "C" __global__ void __launch_bounds__(32 * TEAMS, 1) backward(const Arguments arg) {
    block<true, 1>(arg);
}

extern "C" __global__ void __launch_bounds__(64 * TEAMS, 1) forward_by_two(const Arguments arg) {
    block<false, 2>(arg);
}

extern "C" __global__ void __launch_bounds__(64 * TEAMS, 1) backward_by_two(const Arguments arg) {
    block<true, 2>(arg);
}
