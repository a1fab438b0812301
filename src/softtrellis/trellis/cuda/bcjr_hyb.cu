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
    float *values;             // [tiles, N, 2]
    float *log_z;              // [tiles]; the forward pass writes it
    const float *grad_values;  // [tiles, N, 2]; from here on only with TANGENT
    const float *grad_log_z;   // [tiles]
    float *grad_w;             // [tiles, N, 2]
    float *scratch;            // [groups, N, 32 + 4096 or 8192]
    int *next;                 // tiles handed out so far
    int *failed;               // [tiles], those that failed the certificate
    int *failures;             // how many
    int tiles;
    int steps;
};

// Scaled distances from the weight to a codeword and to its mirror image, and phi of both.
struct Pair {
    float d0, plus, minus, phi_plus, phi_minus;
};

__device__ __forceinline__ Pair weigh(float c0, float c1, float scale, float w0, float w1,
                                      float shift) {
    Pair p;
    p.d0 = fmaf(c0, scale, -w0);
    p.plus = fmaf(c1, scale, -w1);
    p.minus = fmaf(-c1, scale, -w1);
    const float e = fmaf(-p.d0, p.d0, shift);
    p.phi_plus = exp2_fast(fmaf(-p.plus, p.plus, e));
    p.phi_minus = exp2_fast(fmaf(-p.minus, p.minus, e));
    return p;
}

struct alignas(16) Step {  // of a tile; distances are scaled by sqrt(log2(e) / T)
    float w0, w1;          // the weight
    float shift;           // the exponent that is added to every log2 phi
    int alpha_exponent;    // alpha in scratch is alpha times two to this
    float alpha_max, beta_max;
    float z_exponent;  // sums of this step are sums times two to this
    float g0, g1;      // upstream gradient over the scale
    float centre;      // g . (soft - w)
    float pad[2];
};

template <bool TANGENT>
struct alignas(128) Group {
    Message<TANGENT> message[OVERLAPS];
    u32 largest[WARPS];
    float sums[WARPS];
    float log2_z;
    int tile, bad;
    u32 gain;
};

template <bool TANGENT>
struct Worker {
    static constexpr int HEADROOM = TANGENT ? 54 : 58;
    static constexpr int TARGET = 2 * HEADROOM - 84;  // log2 of the sum of alpha phi beta

    const Arguments &arg;
    const float4 *table;  // two neighbouring codewords; [8, 128, 8], the last axis swizzled by a
    const float2 *rows;
    Group<TANGENT> &own;
    Step *steps;
    Message<TANGENT> *alphas;  // [N, 4096] as they lie in shared memory
    float4 *partials;          // [N, WARPS]
    int group, id, lane, warp, a, half, first;

    __device__ void barrier() const { group_barrier<GROUP>(group); }

    // Messages are swizzled by pairs, so that neither sweep's reading conflicts.
    __device__ static int swizzle(int row) { return (TANGENT ? row : row >> 1) & 7; }
    __device__ static int place(int u) { return u ^ (swizzle(u >> 4) << 1); }

    __device__ u32 largest() const {
        u32 most = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++) most = max(most, own.largest[i]);
        return most;
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

    // The tile's steps into shared memory; returns the power of two that the gradient is scaled by.
    __device__ float prepare(int tile, float scale) {
        const int N = arg.steps;
        for (int t = id; t < N; t += GROUP) {
            const size_t at = ((size_t)tile * N + t) * 2;
            const float w0 = arg.w[at + first], w1 = arg.w[at + 1 - first];
            steps[t].w0 = w0 * scale, steps[t].w1 = w1 * scale;
            if (TANGENT) {
                const float g0 = arg.grad_values[at + first], g1 = arg.grad_values[at + 1 - first];
                steps[t].g0 = g0, steps[t].g1 = g1;
                atomicMax(&own.gain, __float_as_uint(fmaxf(fabsf(g0), fabsf(g1))));
            }
        }
        barrier();
        u32 exponent = own.gain >> 23;
        if (exponent < 2 || exponent > 252) exponent = 127;
        const float gain = __uint_as_float((254 - exponent) << 23);
        if (TANGENT) {
            for (int t = id; t < N; t += GROUP) {
                const size_t at = ((size_t)tile * N + t) * 2;
                const float g0 = steps[t].g0 * gain, g1 = steps[t].g1 * gain;
                const float s0 = arg.values[at + first] - arg.w[at + first];
                const float s1 = arg.values[at + 1 - first] - arg.w[at + 1 - first];
                steps[t].g0 = g0 / scale, steps[t].g1 = g1 / scale;
                steps[t].centre = g0 * s0 + g1 * s1;
            }
        }
        for (int t = warp; t < N; t += WARPS) {
            const float w0 = steps[t].w0, w1 = fabsf(steps[t].w1);
            float least = 3e38f;
            for (int i = lane; i < ROWS; i += 32) {
                const float d0 = fmaf(rows[i].x, scale, -w0), d1 = fmaf(rows[i].y, scale, -w1);
                least = fminf(least, d0 * d0 + d1 * d1);
            }
            least = __uint_as_float(__reduce_min_sync(0xffffffffu, __float_as_uint(least)));
            if (lane == 0) steps[t].shift = floorf(least) + HEADROOM;
        }
        return gain;
    }

    // alpha_0 to alpha_{N-1} into scratch; leaves log2 of the scaled sum and its exponent.
    __device__ void alpha_sweep(float scale, int pin) {
        const int N = arg.steps;
        const int column = swizzle(a);
        const Message<TANGENT> *in = own.message + place(a);
        const Message<TANGENT> *in_m = own.message + 15 * 256 + place(255 - a);
        Two<TANGENT> *out = (Two<TANGENT> *)own.message + 8 * a;
        Two<TANGENT> *out_m = (Two<TANGENT> *)own.message + 8 * (255 - a);
        int exponent = HEADROOM;
        for (int t = 0; t < N; t++) {
            const float4 *image = (const float4 *)own.message;
            float4 *store = (float4 *)(alphas + (size_t)t * OVERLAPS);
#pragma unroll
            for (int i = 0; i < sizeof(own.message) / 16 / GROUP; i++)
                store[i * GROUP + id] = image[i * GROUP + id];
            Message<TANGENT> A[16], M[16];
#pragma unroll
            for (int hi = 0; hi < 16; hi++) A[hi] = in[hi * 256], M[hi] = in_m[-hi * 256];
            const u32 most = largest();
            const Step x = steps[t];
            const float post = __uint_as_float((254 - (most >> 23)) << 23);
            barrier();
            if (id == 0) {
                steps[t].alpha_max = __uint_as_float(most);
                steps[t].alpha_exponent = exponent;
            }
            exponent += (int)x.shift + 127 - (int)(most >> 23);
            float top = 0.0f;
#pragma unroll 1
            for (int i = 0; i < 4; i++) {
                const int q = half * 4 + i;
                const float4 *at = table + table_index(0, a, q);
                float o[2] = {0, 0}, m[2] = {0, 0}, ot[2] = {0, 0}, mt[2] = {0, 0};
#pragma unroll
                for (int hi = 0; hi < 8; hi++) {
                    const float4 c = at[hi * 1024];
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const Pair p =
                            weigh(j ? c.z : c.x, j ? c.w : c.y, scale, x.w0, x.w1, x.shift);
                        if constexpr (TANGENT) {
                            const float g = fmaf(p.d0, x.g0, -x.centre);
                            const float gp = fmaf(p.plus, x.g1, g), gm = fmaf(p.minus, x.g1, g);
                            ot[j] = fmaf(p.phi_plus, fmaf(gp, A[hi].v, A[hi].t), ot[j]);
                            mt[j] = fmaf(p.phi_plus, fmaf(gp, M[hi].v, M[hi].t), mt[j]);
                            ot[j] = fmaf(p.phi_minus, fmaf(gm, A[hi + 8].v, A[hi + 8].t), ot[j]);
                            mt[j] = fmaf(p.phi_minus, fmaf(gm, M[hi + 8].v, M[hi + 8].t), mt[j]);
                        }
                        o[j] = fmaf(p.phi_plus, A[hi].v, o[j]);
                        m[j] = fmaf(p.phi_plus, M[hi].v, m[j]);
                        o[j] = fmaf(p.phi_minus, A[hi + 8].v, o[j]);
                        m[j] = fmaf(p.phi_minus, M[hi + 8].v, m[j]);
                    }
                }
                Two<TANGENT> two, two_m;
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    two.at[j].v = o[j] * post, two_m.at[1 - j].v = m[j] * post;
                    if constexpr (TANGENT)
                        two.at[j].t = ot[j] * post, two_m.at[1 - j].t = mt[j] * post;
                    top = fmaxf(top, fmaxf(two.at[j].v, two_m.at[1 - j].v));
                }
                out[q ^ column] = two;
                out_m[q ^ column] = two_m;
            }
            const u32 found = largest_of_warp(top);
            if (lane == 0) own.largest[warp] = found;
            barrier();
        }
        float sum = 0.0f;
        if (pin >= 0) {
            sum = id == 0 ? own.message[place(pin)].v : 0.0f;
        } else {
            for (int u = id; u < OVERLAPS; u += GROUP) sum += own.message[u].v;
        }
        sum = sum_of_warp(sum);
        if (lane == 0) own.sums[warp] = sum;
        barrier();
        if (id == 0) {
            sum = 0.0f;
            for (int i = 0; i < WARPS; i++) sum += own.sums[i];
            own.log2_z = log2f(sum);
        }
    }

    // Values and sums of every step into partials, from alpha in scratch.
    __device__ void beta_sweep(float scale) {
        const int N = arg.steps;
        const int column = swizzle(a);
        const u32 in = address((const Two<TANGENT> *)own.message + 8 * a + column);
        const u32 in_m = address((const Two<TANGENT> *)own.message + 8 * (255 - a) + column);
        const u32 codewords = address(table + half * 4096 + a * 8 + (a & 7));
        const int to = half * 1024 + place(a), to_m = (15 - half * 4) * 256 + place(255 - a);
        for (int t = N - 1; t >= 0; t--) {
            const Message<TANGENT> *load = alphas + (size_t)t * OVERLAPS + to;
            const Message<TANGENT> *load_m = alphas + (size_t)t * OVERLAPS + to_m;
            Message<TANGENT> next[4];
            auto fetch = [&](int h) {
                next[0] = load[h * 256], next[1] = load[h * 256 + 2048];
                next[2] = load_m[-h * 256], next[3] = load_m[-h * 256 - 2048];
            };
            fetch(0);
            if (t > 0 && id < sizeof(own.message) / 128)
                asm volatile("prefetch.global.L2 [%0];" ::"l"(
                    (const char *)(alphas + (size_t)(t - 1) * OVERLAPS) + id * 128));
            Message<TANGENT> B[16], M[16];
#pragma unroll
            for (int q = 0; q < 8; q++) {
                Two<TANGENT> b, m;
                load_two(b, in ^ (u32)(q * sizeof(b)));
                load_two(m, in_m ^ (u32)(q * sizeof(m)));
                B[2 * q] = b.at[0], B[2 * q + 1] = b.at[1];
                M[2 * q] = m.at[1], M[2 * q + 1] = m.at[0];
            }
            const u32 most = largest();
            const Step x = steps[t];
            const float post = __uint_as_float((254 - (most >> 23)) << 23);
            // alpha is scaled so that the sum of alpha phi beta is about 2^TARGET.
            const float level = x.z_exponent;
            const float pre = power_of_two(TARGET - (int)level);
            barrier();
            if (id == 0) {
                steps[t].beta_max = __uint_as_float(most);
                if (t > 0) {
                    // beta's exponent falls by what is taken out, alpha's and phi's are those of t - 1
                    const float beta_step = x.shift + 127.0f - (float)(int)(most >> 23);
                    steps[t - 1].z_exponent = level - (float)x.alpha_exponent - x.shift + beta_step +
                                              (float)steps[t - 1].alpha_exponent +
                                              steps[t - 1].shift;
                }
            }
            float top = 0.0f, v0 = 0.0f, v1 = 0.0f, z = 0.0f, drift = 0.0f;
#pragma unroll 1
            for (int h = 0; h < 4; h++) {
                const u32 at = codewords + h * 16384;
                Message<TANGENT> a1 = next[0], a2 = next[1], m1 = next[2], m2 = next[3];
                if (h < 3) fetch(h + 1);
                a1.v *= pre, a2.v *= pre, m1.v *= pre, m2.v *= pre;
                if constexpr (TANGENT) a1.t *= pre, a2.t *= pre, m1.t *= pre, m2.t *= pre;
                Message<TANGENT> b1 = {}, b2 = {}, n1 = {}, n2 = {};
#pragma unroll
                for (int q = 0; q < 8; q++) {
                    const float4 c4 = constant4(at ^ (q * 16));
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const int c = 2 * q + j;
                        const Pair p =
                            weigh(j ? c4.z : c4.x, j ? c4.w : c4.y, scale, x.w0, x.w1, x.shift);
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
                        v0 = fmaf(p.d0, sum_p + sum_m, v0);
                        v1 = fmaf(p.plus, sum_p, fmaf(p.minus, sum_m, v1));
                    }
                }
                z += fmaf(a1.v, b1.v, a2.v * b2.v) + fmaf(m1.v, n1.v, m2.v * n2.v);
                if constexpr (TANGENT) {
                    drift += fmaf(a1.t, b1.v, a1.v * b1.t) + fmaf(a2.t, b2.v, a2.v * b2.t);
                    drift += fmaf(m1.t, n1.v, m1.v * n1.t) + fmaf(m2.t, n2.v, m2.v * n2.t);
                    b1.t *= post, b2.t *= post, n1.t *= post, n2.t *= post;
                }
                b1.v *= post, b2.v *= post, n1.v *= post, n2.v *= post;
                own.message[to + h * 256] = b1;
                own.message[to + h * 256 + 2048] = b2;
                own.message[to_m - h * 256] = n1;
                own.message[to_m - h * 256 - 2048] = n2;
                top = fmaxf(fmaxf(top, fmaxf(b1.v, b2.v)), fmaxf(n1.v, n2.v));
            }
            const u32 found = largest_of_warp(top);
            v0 = sum_of_warp(v0), v1 = sum_of_warp(v1), z = sum_of_warp(z);
            if (TANGENT) drift = sum_of_warp(drift);
            if (lane == 0) {
                own.largest[warp] = found;
                partials[t * WARPS + warp] = make_float4(v0, v1, z, drift);
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
            const float scaled = fmaxf(TARGET - truncf(x.z_exponent), -149.0f);
            if (!certified(z, x.alpha_max, x.beta_max, HEADROOM, scaled)) own.bad = 1;
            const size_t at = ((size_t)tile * N + t) * 2;
            const float w0 = arg.w[at + first], w1 = arg.w[at + 1 - first];
            v0 /= z * scale, v1 /= z * scale;
            if (TANGENT) {
                const float s0 = arg.values[at + first] - w0, s1 = arg.values[at + 1 - first] - w1;
                const float twice = 2.0f * LN2 * scale * scale, gz = arg.grad_log_z[tile];
                drift /= z;
                arg.grad_w[at + first] = twice * ((v0 - s0 * drift) / gain + s0 * gz);
                arg.grad_w[at + 1 - first] = twice * ((v1 - s1 * drift) / gain + s1 * gz);
            } else {
                arg.values[at + first] = w0 + v0;
                arg.values[at + 1 - first] = w1 + v1;
            }
        }
    }

    __device__ void run() {
        while (true) {
            if (id == 0) {
                own.tile = atomicAdd(arg.next, 1);
                own.bad = 0;
                own.gain = 0;
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
            if (id == 0) {
                // own.log2_z is that of the sum of alpha_N with the last step's exponent.
                const Step &last = steps[arg.steps - 1];
                const int exponent = last.alpha_exponent + (int)last.shift + 127 -
                                     (int)(__float_as_uint(last.alpha_max) >> 23);
                const double log2_z = (double)own.log2_z - (double)exponent;
                steps[arg.steps - 1].z_exponent =
                    (float)(log2_z + (double)last.alpha_exponent + (double)last.shift + HEADROOM);
                if (!TANGENT) arg.log_z[tile] = (float)(log2_z * 0.6931471805599453);
            }
            barrier();
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
    Group<TANGENT> *groups = (Group<TANGENT> *)(rows + ROWS);
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

    const int group = threadIdx.x / GROUP, id = threadIdx.x % GROUP;
    const int lane = id & 31, warp = id >> 5;
    constexpr int ROW = OVERLAPS * (TANGENT ? 2 : 1) + 32;
    float *own = arg.scratch + (size_t)(blockIdx.x * GROUPS + group) * arg.steps * ROW;
    Worker<TANGENT> worker = {
        arg,   table, rows, groups[group], steps + group * arg.steps,
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
