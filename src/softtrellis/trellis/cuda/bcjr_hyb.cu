// BCJR for HYB at L = 16, k = 2, V = 2: forward, and with TANGENT its exact backward pass. Two
// exponentials serve four states (hyb.cuh). Messages are linear and certified (messages.cuh).

#include "hyb.cuh"
#include "messages.cuh"

constexpr int GROUP = 256;
constexpr int GROUPS = 2;
constexpr int WARPS = GROUP / 32;
constexpr int ROWS = 512;
constexpr float LN2 = 0.6931471805599453f;

struct Arguments {
    const float *w;            // [tiles, N, 2]
    const float2 *codebook;    // [65536]
    const int *rows;           // [512], a state of the quarter for every row of HYB's table
    const float *scales;       // [tiles], sqrt(log2(e) / T)
    const long long *pins;     // [tiles] or null
    float *values;             // [tiles, N, 2]; with TANGENT the centre, anything near the average
    float *log_z;              // [tiles]; the forward pass writes it
    const float *grad_values;  // [tiles, N, 2]; from here on only with TANGENT
    const float *grad_log_z;   // [tiles], with which the centre is the average; or null
    float *grad_w;             // [tiles, N, 2]
    float *scratch;            // [groups, N, 32 + 4096 or 8192]
    int *next;                 // tiles handed out so far
    int *failed;               // [tiles], those that failed the certificate
    int *failures;             // how many
    int tiles;
    int steps;
};

// One step of a tile. A weight outside the codebook's range is cut to p at its edge; with o for what
// is cut off, (c - w)^2 = (c - p)^2 - 2 o (c - p) + o^2, whose last term is left to log Z: the
// differences of large squares would round too coarsely. All are scaled by sqrt(log2(e) / T).
struct alignas(16) Step {
    float w0, w1;      // p
    float far0, far1;  // 2 o
    float shift;       // the integer that is added to every log2 phi
    float g0, g1;      // upstream gradient over the scale
    float centre;      // g . (centre - p)
    float alpha_max, beta_max;
    int alpha_exponent;  // alpha in scratch is alpha times two to this
    int scaled;          // in the sums of this step it is that times two to this
};

// Scaled distances from the weight to a codeword and to its mirror image, and phi of both.
struct Pair {
    float d0, plus, minus, phi_plus, phi_minus;
};

template <bool FAR>
__device__ __forceinline__ Pair weigh(float c0, float c1, float scale, const Step &x) {
    Pair p;
    p.d0 = fmaf(c0, scale, -x.w0);
    p.plus = fmaf(c1, scale, -x.w1);
    p.minus = fmaf(-c1, scale, -x.w1);
    const float e = fmaf(-p.d0, FAR ? p.d0 - x.far0 : p.d0, x.shift);
    p.phi_plus = exp2_fast(fmaf(-p.plus, FAR ? p.plus - x.far1 : p.plus, e));
    p.phi_minus = exp2_fast(fmaf(-p.minus, FAR ? p.minus - x.far1 : p.minus, e));
    return p;
}

template <bool TANGENT>
struct alignas(128) Group {
    Message<TANGENT> message[OVERLAPS];  // as the last step left them
    u32 largest[WARPS];
    float2 sums[WARPS];
    double outside;  // the sum of the squares o^2
    float log2_z;    // without them
    int tile, bad;
    u32 gain;
    float mean;  // with TANGENT, of the sum of g . (c - centre) along a path
};

template <bool TANGENT>
struct Worker {
    static constexpr int HEADROOM = TANGENT ? 53 : 58;
    static constexpr int TARGET = 2 * HEADROOM - 84;  // log2 of the sum of alpha phi beta

    const Arguments &arg;
    const float4 *table;  // two neighbouring codewords; [8, 128, 8], the last axis swizzled by a
    const float2 *rows;   // HYB's table, the component that flips second and not negative
    const float *bounds;  // least and greatest first component, greatest second one
    Group<TANGENT> &own;
    Step *steps;
    Message<TANGENT> *alphas;  // [N, 4096] as they lie in shared memory
    float4 *partials;          // [N, WARPS]
    int group, id, lane, warp, a, half, first;

    __device__ void barrier() const { group_barrier<GROUP>(group); }

    // Messages are swizzled by pairs, so that neither sweep's reading conflicts.
    __device__ static int swizzle(int row) { return (TANGENT ? row : row >> 1) & 7; }
    __device__ static int place(int u) { return u ^ (swizzle(u >> 4) << 1); }

    // The exponent of the power of two that brings the messages to 2^HEADROOM or a little more.
    __device__ int normaliser(u32 &most) const {
        most = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++) most = max(most, own.largest[i]);
        return HEADROOM + 127 - (int)(most >> 23);
    }

    __device__ void start_messages(int pin) {
        const float start = power_of_two(HEADROOM);
        for (int u = id; u < OVERLAPS; u += GROUP) {
            Message<TANGENT> m = {};
            m.v = pin < 0 || u == pin ? start : 0.0f;
            own.message[place(u)] = m;
        }
        if (id < WARPS) own.largest[id] = __float_as_uint(start);
    }

    __device__ float cut(float w, int component) const {
        const float least = component ? -bounds[2] : bounds[0], most = bounds[component ? 2 : 1];
        return fminf(fmaxf(w, least), most);
    }

    // The tile's steps into shared memory; returns the power of two that the gradient is scaled by.
    __device__ float prepare(int tile, float scale) {
        const int N = arg.steps;
        for (int t = id; t < N; t += GROUP) {
            const size_t at = ((size_t)tile * N + t) * 2;
            const float w0 = arg.w[at + first], w1 = arg.w[at + 1 - first];
            const float p0 = cut(w0, 0), p1 = cut(w1, 1);
            const float o0 = (w0 - p0) * scale, o1 = (w1 - p1) * scale;
            Step &x = steps[t];
            x.w0 = p0 * scale, x.w1 = p1 * scale, x.far0 = 2.0f * o0, x.far1 = 2.0f * o1;
            if (o0 != 0.0f || o1 != 0.0f)
                atomicAdd(&own.outside, (double)o0 * (double)o0 + (double)o1 * (double)o1);
            if (TANGENT) {
                x.g0 = arg.grad_values[at + first], x.g1 = arg.grad_values[at + 1 - first];
                atomicMax(&own.gain, __float_as_uint(fmaxf(fabsf(x.g0), fabsf(x.g1))));
            }
        }
        barrier();
        u32 exponent = own.gain >> 23;
        if (exponent < 2 || exponent > 252) exponent = 127;
        const float gain = __uint_as_float((254 - exponent) << 23);
        if (TANGENT) {
            for (int t = id; t < N; t += GROUP) {
                const size_t at = ((size_t)tile * N + t) * 2;
                Step &x = steps[t];
                const float g0 = x.g0 * gain, g1 = x.g1 * gain;
                x.g0 = g0 / scale, x.g1 = g1 / scale;
                x.centre = g0 * (arg.values[at + first] - cut(arg.w[at + first], 0)) +
                           g1 * (arg.values[at + 1 - first] - cut(arg.w[at + 1 - first], 1));
            }
        }
        for (int t = warp; t < N; t += WARPS) {
            const Step x = steps[t];
            const float w1 = fabsf(x.w1), far1 = fabsf(x.far1);
            float least = 3e38f;
            for (int i = lane; i < ROWS; i += 32) {
                const float d0 = fmaf(rows[i].x, scale, -x.w0), d1 = fmaf(rows[i].y, scale, -w1);
                least = fminf(least, d0 * (d0 - x.far0) + d1 * (d1 - far1));
            }
            least = least_of_warp(least);
            if (lane == 0) steps[t].shift = floorf(least) + HEADROOM;
        }
        return gain;
    }

    // Overlaps 16 a + c of the next alpha for 8 of the 16 c, and their mirror images; their maximum.
    template <bool FAR>
    __device__ __forceinline__ float alpha_step(const Message<TANGENT> *A, const Message<TANGENT> *M,
                                                float scale, const Step &x) {
        const int column = swizzle(a);
        Two<TANGENT> *out = (Two<TANGENT> *)own.message + 8 * a;
        Two<TANGENT> *out_m = (Two<TANGENT> *)own.message + 8 * (255 - a);
        float top = 0.0f;
#pragma unroll 1
        for (int i = 0; i < 4; i++) {
            const int q = half * 4 + i;
            const float4 *at = table + table_index(0, a, q);
            Two<TANGENT> two = {}, two_m = {};
#pragma unroll
            for (int hi = 0; hi < 8; hi++) {
                const float4 c = at[hi * 1024];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const Pair p = weigh<FAR>(j ? c.z : c.x, j ? c.w : c.y, scale, x);
                    Message<TANGENT> &o = two.at[j], &m = two_m.at[1 - j];
                    if constexpr (TANGENT) {
                        const float g = fmaf(p.d0, x.g0, -x.centre);
                        const float gp = fmaf(p.plus, x.g1, g), gm = fmaf(p.minus, x.g1, g);
                        o.t = fmaf(p.phi_plus, fmaf(gp, A[hi].v, A[hi].t), o.t);
                        m.t = fmaf(p.phi_plus, fmaf(gp, M[hi].v, M[hi].t), m.t);
                        o.t = fmaf(p.phi_minus, fmaf(gm, A[hi + 8].v, A[hi + 8].t), o.t);
                        m.t = fmaf(p.phi_minus, fmaf(gm, M[hi + 8].v, M[hi + 8].t), m.t);
                    }
                    o.v = fmaf(p.phi_plus, A[hi].v, o.v);
                    m.v = fmaf(p.phi_plus, M[hi].v, m.v);
                    o.v = fmaf(p.phi_minus, A[hi + 8].v, o.v);
                    m.v = fmaf(p.phi_minus, M[hi + 8].v, m.v);
                }
            }
#pragma unroll
            for (int j = 0; j < 2; j++) top = fmaxf(top, fmaxf(two.at[j].v, two_m.at[j].v));
            out[q ^ column] = two;
            out_m[q ^ column] = two_m;
        }
        return top;
    }

    // alpha_0 to alpha_{N-1} into scratch; log2 of Z without the squares, and the mean.
    __device__ void alpha_sweep(float scale, int pin) {
        const int N = arg.steps;
        const Message<TANGENT> *in = own.message + place(a);
        const Message<TANGENT> *in_m = own.message + 15 * 256 + place(255 - a);
        int exponent = HEADROOM;
        for (int t = 0; t < N; t++) {
            u32 most;
            const int by = normaliser(most);
            const float scale_by = power_of_two(by);
            const float4 *image = (const float4 *)own.message;
            float4 *store = (float4 *)(alphas + (size_t)t * OVERLAPS);
#pragma unroll
            for (int i = 0; i < sizeof(own.message) / 16 / GROUP; i++) {
                const float4 m = image[i * GROUP + id];
                store[i * GROUP + id] =
                    make_float4(m.x * scale_by, m.y * scale_by, m.z * scale_by, m.w * scale_by);
            }
            Message<TANGENT> A[16], M[16];
#pragma unroll
            for (int hi = 0; hi < 16; hi++) {
                A[hi] = times(in[hi * 256], scale_by);
                M[hi] = times(in_m[-hi * 256], scale_by);
            }
            const Step x = steps[t];
            exponent += by;
            barrier();
            if (id == 0) {
                steps[t].alpha_max = __uint_as_float(most) * scale_by;
                steps[t].alpha_exponent = exponent;
            }
            exponent += (int)x.shift;
            const bool far = x.far0 != 0.0f || x.far1 != 0.0f;
            const float top = far ? alpha_step<true>(A, M, scale, x) : alpha_step<false>(A, M, scale, x);
            const u32 found = largest_of_warp(top);
            if (lane == 0) own.largest[warp] = found;
            barrier();
        }
        u32 most;
        const int by = normaliser(most);
        float2 sums = {};
        for (int u = id; u < OVERLAPS; u += GROUP)
            if (pin < 0 || u == pin) add_to(sums, times(own.message[place(u)], power_of_two(by)));
        sums = make_float2(sum_of_warp(sums.x), sum_of_warp(sums.y));
        if (lane == 0) own.sums[warp] = sums;
        barrier();
        if (id == 0) {
            sums = make_float2(0, 0);
            for (int i = 0; i < WARPS; i++) sums.x += own.sums[i].x, sums.y += own.sums[i].y;
            own.log2_z = log2f(sums.x) - (float)(exponent + by);
            own.mean = sums.y / sums.x;
        }
        barrier();
    }

    // Sums over the states of one step; overlaps hi * 256 + a of the next beta for 4 of the hi, those
    // for 8 + hi, and the mirror images of both; their maximum.
    template <bool FAR>
    __device__ __forceinline__ float beta_step(const Message<TANGENT> *B, const Message<TANGENT> *M,
                                               const Message<TANGENT> *alpha,
                                               Message<TANGENT> *next, float scale, float pre,
                                               float mean, const Step &x, float4 &sums) {
        const int to = half * 1024 + place(a), to_m = (15 - half * 4) * 256 + place(255 - a);
        const u32 codewords = address(table + half * 4096 + a * 8 + (a & 7));
        float top = 0.0f;
#pragma unroll 1
        for (int h = 0; h < 4; h++) {
            const u32 at = codewords + h * 16384;
            const Message<TANGENT> a1 = centred(next[0], pre, mean), a2 = centred(next[1], pre, mean);
            const Message<TANGENT> m1 = centred(next[2], pre, mean), m2 = centred(next[3], pre, mean);
            if (h < 3) fetch(alpha, h + 1, next);
            Message<TANGENT> b1 = {}, b2 = {}, n1 = {}, n2 = {};
#pragma unroll
            for (int q = 0; q < 8; q++) {
                const float4 c4 = constant4(at ^ (q * 16));
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const int c = 2 * q + j;
                    const Pair p = weigh<FAR>(j ? c4.z : c4.x, j ? c4.w : c4.y, scale, x);
                    float sum_p, sum_m;
                    if constexpr (TANGENT) {
                        const float g = fmaf(p.d0, x.g0, -x.centre);
                        const float gp = fmaf(p.plus, x.g1, g), gm = fmaf(p.minus, x.g1, g);
                        const float bp = fmaf(gp, B[c].v, B[c].t), bm = fmaf(gm, B[c].v, B[c].t);
                        const float np = fmaf(gp, M[c].v, M[c].t), nm = fmaf(gm, M[c].v, M[c].t);
                        b1.t = fmaf(p.phi_plus, bp, b1.t), b2.t = fmaf(p.phi_minus, bm, b2.t);
                        n1.t = fmaf(p.phi_plus, np, n1.t), n2.t = fmaf(p.phi_minus, nm, n2.t);
                        sum_p = fmaf(a1.t, B[c].v, fmaf(a1.v, bp, fmaf(m1.t, M[c].v, m1.v * np)));
                        sum_m = fmaf(a2.t, B[c].v, fmaf(a2.v, bm, fmaf(m2.t, M[c].v, m2.v * nm)));
                    } else {
                        sum_p = fmaf(a1.v, B[c].v, m1.v * M[c].v);
                        sum_m = fmaf(a2.v, B[c].v, m2.v * M[c].v);
                    }
                    b1.v = fmaf(p.phi_plus, B[c].v, b1.v), b2.v = fmaf(p.phi_minus, B[c].v, b2.v);
                    n1.v = fmaf(p.phi_plus, M[c].v, n1.v), n2.v = fmaf(p.phi_minus, M[c].v, n2.v);
                    sum_p *= p.phi_plus, sum_m *= p.phi_minus;
                    sums.x = fmaf(p.d0, sum_p + sum_m, sums.x);
                    sums.y = fmaf(p.plus, sum_p, fmaf(p.minus, sum_m, sums.y));
                }
            }
            sums.z += fmaf(a1.v, b1.v, a2.v * b2.v) + fmaf(m1.v, n1.v, m2.v * n2.v);
            if constexpr (TANGENT) {
                sums.w += fmaf(a1.t, b1.v, a1.v * b1.t) + fmaf(a2.t, b2.v, a2.v * b2.t);
                sums.w += fmaf(m1.t, n1.v, m1.v * n1.t) + fmaf(m2.t, n2.v, m2.v * n2.t);
            }
            own.message[to + h * 256] = b1;
            own.message[to + h * 256 + 2048] = b2;
            own.message[to_m - h * 256] = n1;
            own.message[to_m - h * 256 - 2048] = n2;
            top = fmaxf(fmaxf(top, fmaxf(b1.v, b2.v)), fmaxf(n1.v, n2.v));
        }
        return top;
    }

    // alpha at the four overlaps that share the codewords of hi = half * 4 + h.
    __device__ __forceinline__ void fetch(const Message<TANGENT> *alpha, int h,
                                          Message<TANGENT> *to) const {
        const Message<TANGENT> *from = alpha + half * 1024 + place(a) + h * 256;
        const Message<TANGENT> *from_m = alpha + (15 - half * 4) * 256 + place(255 - a) - h * 256;
        to[0] = from[0], to[1] = from[2048], to[2] = from_m[0], to[3] = from_m[-2048];
    }

    // Sums of every step into partials, from alpha in scratch.
    __device__ void beta_sweep(float scale) {
        const int column = swizzle(a);
        const u32 in = address((const Two<TANGENT> *)own.message + 8 * a + column);
        const u32 in_m = address((const Two<TANGENT> *)own.message + 8 * (255 - a) + column);
        int exponent = HEADROOM;
        for (int t = arg.steps - 1; t >= 0; t--) {
            const Message<TANGENT> *alpha = alphas + (size_t)t * OVERLAPS;
            Message<TANGENT> next[4];
            fetch(alpha, 0, next);
            if (t > 0 && id < sizeof(own.message) / 128)
                prefetch_l2((const char *)(alpha - OVERLAPS) + id * 128);
            u32 most;
            const int by = normaliser(most);
            const float scale_by = power_of_two(by);
            Message<TANGENT> B[16], M[16];
#pragma unroll
            for (int q = 0; q < 8; q++) {
                Two<TANGENT> b, m;
                load_two(b, in ^ (u32)(q * sizeof(b)));
                load_two(m, in_m ^ (u32)(q * sizeof(m)));
                B[2 * q] = times(b.at[0], scale_by), B[2 * q + 1] = times(b.at[1], scale_by);
                M[2 * q] = times(m.at[1], scale_by), M[2 * q + 1] = times(m.at[0], scale_by);
            }
            const Step x = steps[t];
            exponent += by;
            const float level = own.log2_z + (float)(x.alpha_exponent + (int)x.shift + exponent);
            const int scaled = max(TARGET - (int)level, -149);
            barrier();
            if (id == 0) {
                steps[t].beta_max = __uint_as_float(most) * scale_by;
                steps[t].scaled = scaled;
            }
            exponent += (int)x.shift;
            float4 sums = make_float4(0, 0, 0, 0);
            const bool far = x.far0 != 0.0f || x.far1 != 0.0f;
            const float pre = power_of_two(scaled);
            const float mean = own.mean;
            const float top = far ? beta_step<true>(B, M, alpha, next, scale, pre, mean, x, sums)
                                  : beta_step<false>(B, M, alpha, next, scale, pre, mean, x, sums);
            const u32 found = largest_of_warp(top);
            sums.x = sum_of_warp(sums.x), sums.y = sum_of_warp(sums.y), sums.z = sum_of_warp(sums.z);
            if (TANGENT) sums.w = sum_of_warp(sums.w);
            if (lane == 0) {
                own.largest[warp] = found;
                partials[t * WARPS + warp] = sums;
            }
            barrier();
        }
    }

    // Sums of every step into values or their gradient, and the certificate.
    __device__ void finish(int tile, float scale, float gain) {
        const int N = arg.steps;
        for (int t = id; t < N; t += GROUP) {
            float v0 = 0, v1 = 0, z = 0, drift = 0;
#pragma unroll
            for (int i = 0; i < WARPS; i++) {
                const float4 p = partials[t * WARPS + i];
                v0 += p.x, v1 += p.y, z += p.z, drift += p.w;
            }
            const Step x = steps[t];
            if (!certified(z, x.alpha_max, x.beta_max, HEADROOM, x.scaled)) own.bad = 1;
            const size_t at = ((size_t)tile * N + t) * 2;
            const float w0 = arg.w[at + first], w1 = arg.w[at + 1 - first];
            const float p0 = cut(w0, 0), p1 = cut(w1, 1);
            v0 /= z * scale, v1 /= z * scale;
            if (TANGENT) {
                const float s0 = arg.values[at + first], s1 = arg.values[at + 1 - first];
                const float twice = 2.0f * LN2 * scale * scale;
                const float gz = arg.grad_log_z ? arg.grad_log_z[tile] : 0.0f;
                drift /= z;
                arg.grad_w[at + first] =
                    twice * ((v0 - (s0 - p0) * drift) / gain + (s0 - w0) * gz);
                arg.grad_w[at + 1 - first] =
                    twice * ((v1 - (s1 - p1) * drift) / gain + (s1 - w1) * gz);
            } else {
                arg.values[at + first] = p0 + v0;
                arg.values[at + 1 - first] = p1 + v1;
            }
        }
        if (!TANGENT && id == 0)
            arg.log_z[tile] = (float)(((double)own.log2_z - own.outside) * 0.6931471805599453);
    }

    __device__ void run() {
        while (true) {
            if (id == 0) {
                own.tile = atomicAdd(arg.next, 1);
                own.bad = 0;
                own.gain = 0;
                own.outside = 0.0;
            }
            barrier();
            const int tile = own.tile;
            if (tile >= arg.tiles) return;
            const float scale = arg.scales[tile];
            const int pin = arg.pins ? (int)arg.pins[tile] : -1;
            const float gain = prepare(tile, scale);
            start_messages(pin);
            barrier();
            alpha_sweep(scale, pin);
            start_messages(pin);
            barrier();
            beta_sweep(scale);
            finish(tile, scale, gain);
            barrier();
            if (id == 0 && own.bad) arg.failed[atomicAdd(arg.failures, 1)] = tile;
        }
    }
};

template <bool TANGENT>
__device__ __forceinline__ void block(const Arguments &arg) {
    extern __shared__ float4 shared[];
    float4 *table = shared;
    float2 *rows = (float2 *)(table + QUARTER / 2);
    float *bounds = (float *)(rows + ROWS);
    Group<TANGENT> *groups = (Group<TANGENT> *)(bounds + 32);
    Step *steps = (Step *)(groups + GROUPS);
    const Symmetry symmetry = load_table(table, arg.codebook);
    if (symmetry == NONE) {
        if (blockIdx.x == 0 && threadIdx.x == 0) *arg.failures = arg.tiles;
        return;
    }
    const int first = symmetry == FIRST_FLIPS;
    for (int i = threadIdx.x; i < ROWS; i += GROUP * GROUPS) {
        const float2 x = arg.codebook[arg.rows[i]];
        rows[i] = first ? make_float2(x.y, fabsf(x.x)) : make_float2(x.x, fabsf(x.y));
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        float least = 3e38f, most = -3e38f, second = 0.0f;
        for (int i = threadIdx.x; i < ROWS; i += 32) {
            least = fminf(least, rows[i].x), most = fmaxf(most, rows[i].x);
            second = fmaxf(second, rows[i].y);
        }
        bounds[0] = least_of_warp(least), bounds[1] = -least_of_warp(-most);
        bounds[2] = -least_of_warp(-second);
    }
    __syncthreads();

    const int group = threadIdx.x / GROUP, id = threadIdx.x % GROUP;
    const int lane = id & 31, warp = id >> 5;
    constexpr int ROW = OVERLAPS * (TANGENT ? 2 : 1) + 32;
    float *own = arg.scratch + (size_t)(blockIdx.x * GROUPS + group) * arg.steps * ROW;
    Worker<TANGENT> worker = {
        arg,   table, rows, bounds, groups[group], steps + group * arg.steps,
        (Message<TANGENT> *)own, (float4 *)(own + (size_t)arg.steps * (ROW - 32)),
        group, id,    lane, warp,          (warp & 3) * 32 + lane,
        warp >> 2, first,
    };
    worker.run();
}

extern "C" __global__ void __launch_bounds__(GROUP *GROUPS, 1) forward(const Arguments arg) {
    block<false>(arg);
}

extern "C" __global__ void __launch_bounds__(GROUP *GROUPS, 1) backward(const Arguments arg) {
    block<true>(arg);
}
