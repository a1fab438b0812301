// BCJR at L = 16, k = 2, V = 1 for any code: forward, and with TANGENT its exact backward pass.
//
// Messages are linear and certified as in messages.cuh. Two steps are taken at once (scalar.cuh):
// alpha of the odd steps is computed again on the way back, so that half of the messages are kept.

#include "messages.cuh"
#include "scalar.cuh"

constexpr int GROUP = 512;  // threads, one tile
constexpr int WARPS = GROUP / 32;
constexpr float LN2 = 0.6931471805599453f;

struct Arguments {
    const float *w;                   // [tiles, N]
    const unsigned short *halves;     // [65536], the codebook over its factor in float16
    const float *factor;              // the factor; 0 if there is none
    const float *bounds;              // [2], the codebook's least and its greatest value
    const float *scales;              // [tiles], sqrt(log2(e) / T)
    const long long *pins;            // [tiles] or null
    float *values;                    // [tiles, N]; with TANGENT the centre, anything near
    float *log_z;                     // [tiles]; the forward pass writes it
    const float *grad_values;         // [tiles, N]; from here on only with TANGENT
    const float *grad_log_z;          // [tiles], with which the centre is the average; or null
    float *grad_w;                    // [tiles, N]
    float *scratch;                   // [blocks, N / 2 * 16384 (or twice that) + N * 64]
    int *next;                        // tiles handed out so far
    int *failed;                      // [tiles], those that failed the certificate
    int *failures;                    // how many
    int tiles;
    int steps;  // even
};

// One step of a tile. A weight outside the codebook's range is cut to p at its edge; with o for what
// is cut off, (c - w)^2 = (c - p)^2 - 2 o (c - p) + o^2, whose last term is left to log Z. All are
// scaled by sqrt(log2(e) / T).
struct alignas(16) Step {
    float w;       // p
    float far;     // 2 o
    float shift;   // the integer that is added to every log2 phi
    float g;       // upstream gradient over the scale
    float centre;  // g (centre - p)
    float alpha_max, beta_max;
    int alpha_exponent;  // alpha in scratch is alpha times two to this; of even steps
    int scaled;          // in the sums of this step it is that times two to this; of even steps
    int pad[3];
};

template <bool TANGENT>
struct Shared {
    Message<TANGENT> message[OVERLAPS];  // see Places
    u32 largest[2][WARPS], largest_middle[2][WARPS];  // of odd and even pairs of steps
    float2 sums[WARPS];
    double outside;  // the sum of the squares o^2
    float log2_z;    // without them
    int tile, bad;
    u32 gain;
    float mean;  // with TANGENT, of the sum of g (c - centre) along a path
};

// Where the 16 messages of one thread lie. A thread reads the messages of 16 overlaps and writes those
// of 16 others over them, so that one barrier serves a pair of steps: the message of overlap u lies
// at slot(rotated(u, r)), where r grows by 4 in the sweep of alpha and falls by 4 in that of beta.
template <int SIZE>
struct Places {
    u32 first, high[4], low[4];  // bytes

    // Spreads the overlaps of neighbouring threads over the banks, for every even rotation.
    __device__ static u32 slot(u32 q) {
        if (SIZE == 8) return q ^ ((q >> 4 ^ q >> 8) & 15) ^ (q >> 12) * 5;
        return q ^ (q >> 5 & 31) ^ q >> 10 ^ q >> 10 << 1;
    }
    __device__ static u32 rotated(u32 u, int r) { return (u >> r | u << (14 - r)) & (OVERLAPS - 1); }

    // Those of u | i << shift, i = 0 .. 15.
    __device__ __forceinline__ Places(u32 u, int shift, int r) {
        first = slot(rotated(u, r)) * SIZE;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            low[i] = slot(rotated(i << shift, r)) * SIZE;
            high[i] = slot(rotated(i << (shift + 2), r)) * SIZE;
        }
    }
    __device__ __forceinline__ u32 at(int i) const { return first ^ high[i >> 2] ^ low[i & 3]; }
};

// phi and the scaled distances of four states that follow one another.
template <bool FAR>
__device__ __forceinline__ void weigh(const float *c, float scale, const Step &x, float *d,
                                      float *phi) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        d[i] = fmaf(c[i], scale, -x.w);
        phi[i] = exp2_fast(fmaf(-d[i], FAR ? d[i] - x.far : d[i], x.shift));
    }
}

template <bool TANGENT>
struct Worker {
    static constexpr int SIZE = sizeof(Message<TANGENT>);
    static constexpr int SHARED_STATES = TANGENT ? STATES / 8 * 5 : STATES;
    // phi of the first step is 2^HEADROOM at most, that of the second 2^SECOND; between the two
    // 2^MIDDLE is taken out of the messages.
    static constexpr int HEADROOM = TANGENT ? 53 : 58;
    static constexpr int MIDDLE = 45, SECOND = 48;
    static constexpr int TARGET = 2 * HEADROOM - 84;  // log2 of the sum of alpha phi beta

    const Arguments &arg;
    const unsigned short *halves;  // in shared memory
    const float factor;
    Shared<TANGENT> &own;
    Step *steps;
    Message<TANGENT> *alphas;  // [N / 2, 16384] as they lie in shared memory
    float4 *partials;          // [N, WARPS]
    int id, lane, warp;

    __device__ void barrier() const { __syncthreads(); }

    __device__ Message<TANGENT> &message(u32 at) const {
        return *(Message<TANGENT> *)((char *)own.message + at);
    }

    __device__ static u32 most_of(const u32 *all) {
        u32 most = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++) most = max(most, all[i]);
        return most;
    }

    // The exponent of the power of two that brings the messages to 2^HEADROOM or a little more.
    __device__ int normaliser(int parity, u32 &most) const {
        most = most_of(own.largest[parity]);
        return HEADROOM + 127 - (int)(most >> 23);
    }

    __device__ void start_messages(int pin) {
        const float start = power_of_two(HEADROOM);
        for (int u = id; u < OVERLAPS; u += GROUP) {
            Message<TANGENT> m = {};
            m.v = pin < 0 || u == pin ? start : 0.0f;
            message(Places<SIZE>::slot(u) * SIZE) = m;
        }
        if (id < WARPS) own.largest[0][id] = __float_as_uint(start);
    }

    __device__ float cut(float w) const { return fminf(fmaxf(w, arg.bounds[0]), arg.bounds[1]); }

    // The tile's steps into shared memory; returns the power of two that the gradient is scaled by.
    __device__ float prepare(int tile, float scale) {
        const int N = arg.steps;
        const float *w = arg.w + (size_t)tile * N;
        for (int t = id; t < N; t += GROUP) {
            const float p = cut(w[t]), o = (w[t] - p) * scale;
            steps[t].w = p * scale, steps[t].far = 2.0f * o;
            steps[t].shift = t % 2 ? SECOND : HEADROOM;
            if (o != 0.0f) atomicAdd(&own.outside, (double)o * (double)o);
            if (TANGENT)
                atomicMax(&own.gain, __float_as_uint(fabsf(arg.grad_values[(size_t)tile * N + t])));
        }
        barrier();
        u32 exponent = own.gain >> 23;
        if (exponent < 2 || exponent > 252) exponent = 127;
        const float gain = __uint_as_float((254 - exponent) << 23);
        if (TANGENT) {
            for (int t = id; t < N; t += GROUP) {
                const size_t at = (size_t)tile * N + t;
                const float g = arg.grad_values[at] * gain;
                steps[t].g = g / scale;
                steps[t].centre = g * (arg.values[at] - cut(w[t]));
            }
        }
        return gain;
    }

    // Two steps of alpha: from overlaps (h1, h0, a), which go to keep, to overlaps (a, c, e).
    template <bool FAR>
    __device__ __forceinline__ void alpha_block(int a, const Places<SIZE> &places, float by,
                                                Message<TANGENT> *keep, float scale, const Step &x,
                                                const Step &y, float &top, float &top_middle) {
        const Codewords<SHARED_STATES> codewords(halves, arg.halves, a);
        Message<TANGENT> out[16] = {};
#pragma unroll
        for (int h0 = 0; h0 < 4; h0++) {
            Message<TANGENT> middle[4] = {};
#pragma unroll
            for (int h1 = 0; h1 < 4; h1++) {
                const Message<TANGENT> m = times(message(places.at(h1 * 4 + h0)), by);
                keep[(h1 * 4 + h0) * BLOCKS + a] = m;
                float c[4], d[4], phi[4];
                codewords.of_first(h1 * 4 + h0, c);
                weigh<FAR>(c, scale, x, d, phi);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    middle[i].v = fmaf(phi[i], m.v, middle[i].v);
                    if constexpr (TANGENT) {
                        const float gamma = fmaf(d[i], x.g, -x.centre);
                        middle[i].t = fmaf(phi[i], fmaf(gamma, m.v, m.t), middle[i].t);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                middle[i] = times(middle[i], power_of_two(-MIDDLE));
                top_middle = fmaxf(top_middle, middle[i].v);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float c[8];
                codewords.of_second(h0, half, c);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const Message<TANGENT> m = middle[half * 2 + j];
                    float d[4], phi[4];
                    weigh<FAR>(c + 4 * j, scale, y, d, phi);
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        Message<TANGENT> &o = out[half * 8 + j * 4 + e];
                        o.v = fmaf(phi[e], m.v, o.v);
                        if constexpr (TANGENT) {
                            const float gamma = fmaf(d[e], y.g, -y.centre);
                            o.t = fmaf(phi[e], fmaf(gamma, m.v, m.t), o.t);
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 16; i++) {
            top = fmaxf(top, out[i].v);
            message(places.at(i)) = out[i];
        }
    }

    // alpha of the even steps into scratch; log2 of Z without the squares, and the mean.
    __device__ void alpha_sweep(float scale, int pin) {
        const int N = arg.steps;
        int exponent = HEADROOM, r = 0;
        u32 most;
        for (int t = 0; t < N; t += 2) {
            const int parity = t / 2 & 1, by = normaliser(parity, most);
            const float scale_by = power_of_two(by);
            const Step x = steps[t], y = steps[t + 1];
            exponent += by;
            if (id == 0) {
                steps[t].alpha_max = __uint_as_float(most) * scale_by;
                steps[t].alpha_exponent = exponent;
            }
            exponent += (int)x.shift + (int)y.shift - MIDDLE;
            float top = 0.0f, top_middle = 0.0f;
            const bool far = x.far != 0.0f || y.far != 0.0f;
            Message<TANGENT> *keep = alphas + (size_t)(t / 2) * OVERLAPS;
#pragma unroll 1
            for (int a = id; a < BLOCKS; a += GROUP) {
                const Places<SIZE> places(a, 10, r);
                if (far)
                    alpha_block<true>(a, places, scale_by, keep, scale, x, y, top, top_middle);
                else
                    alpha_block<false>(a, places, scale_by, keep, scale, x, y, top, top_middle);
            }
            r = r < 10 ? r + 4 : r - 10;
            const u32 found = largest_of_warp(top), found_middle = largest_of_warp(top_middle);
            if (lane == 0) {
                own.largest[parity ^ 1][warp] = found;
                own.largest_middle[parity][warp] = found_middle;
            }
            barrier();
            if (id == 0)
                steps[t + 1].alpha_max = __uint_as_float(most_of(own.largest_middle[parity]));
        }
        const int by = normaliser(N / 2 & 1, most);
        float2 sums = {};
        for (u32 u = id; u < OVERLAPS; u += GROUP) {
            const u32 at = Places<SIZE>::slot(Places<SIZE>::rotated(u, r)) * SIZE;
            if (pin < 0 || u == pin) add_to(sums, times(message(at), power_of_two(by)));
        }
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

    struct Sums {  // of one step, over the states that a thread has
        float v = 0, z = 0, drift = 0;
    };

    // What a state with the message m on its far side adds to the message on its near side, to the
    // sum of phi d m and to its derivative.
    __device__ __forceinline__ static void gather(float d, float phi, float gamma,
                                                  const Message<TANGENT> &m, Message<TANGENT> &sum,
                                                  float &value, float &slope) {
        const float weighted = phi * d;
        sum.v = fmaf(phi, m.v, sum.v);
        value = fmaf(weighted, m.v, value);
        if constexpr (TANGENT) {
            const float inner = fmaf(gamma, m.v, m.t);
            sum.t = fmaf(phi, inner, sum.t);
            slope = fmaf(weighted, inner, slope);
        }
    }

    __device__ __forceinline__ static void add(const Message<TANGENT> &alpha,
                                               const Message<TANGENT> &beta, float value,
                                               float slope, Sums &sums) {
        sums.z = fmaf(alpha.v, beta.v, sums.z);
        if constexpr (TANGENT) {
            sums.v = fmaf(alpha.t, value, fmaf(alpha.v, slope, sums.v));
            sums.drift = fmaf(alpha.t, beta.v, fmaf(alpha.v, beta.t, sums.drift));
        } else {
            sums.v = fmaf(alpha.v, value, sums.v);
        }
    }

    // alpha at (h1 = 0 .. 3, h0, a).
    __device__ __forceinline__ static void fetch(const Message<TANGENT> *kept, int h0,
                                                 Message<TANGENT> *to) {
#pragma unroll
        for (int h1 = 0; h1 < 4; h1++) to[h1] = kept[(h1 * 4 + h0) * BLOCKS];
    }

    // Two steps of beta, from overlaps (a, c, e) to overlaps (h1, h0, a), and their sums.
    template <bool FAR>
    __device__ __forceinline__ void beta_block(int a, const Places<SIZE> &places, float by,
                                               const Message<TANGENT> *kept, float scale, float pre,
                                               float mean, const Step &x, const Step &y, Sums *sums,
                                               float &top, float &top_middle) {
        const Codewords<SHARED_STATES> codewords(halves, arg.halves, a);
        Message<TANGENT> B[16], next[4];
        fetch(kept + a, 0, next);
#pragma unroll
        for (int i = 0; i < 16; i++) B[i] = times(message(places.at(i)), by);
#pragma unroll
        for (int h0 = 0; h0 < 4; h0++) {
            Message<TANGENT> A[4], out[4] = {};
            float first[4][4], value[4] = {}, slope[4] = {};
#pragma unroll
            for (int h1 = 0; h1 < 4; h1++) {
                A[h1] = centred(next[h1], pre, mean);
                codewords.of_first(h1 * 4 + h0, first[h1]);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float second[8];
                codewords.of_second(h0, half, second);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const int i = half * 2 + j;
                    const float c[4] = {first[0][i], first[1][i], first[2][i], first[3][i]};
                    float d[4], phi[4], f[4], p[4];
                    weigh<FAR>(c, scale, x, d, phi);
                    weigh<FAR>(second + 4 * j, scale, y, f, p);
                    Message<TANGENT> middle = {}, back = {};
                    float gamma[4], value_y = 0.0f, slope_y = 0.0f;
#pragma unroll
                    for (int h1 = 0; h1 < 4; h1++) {
                        middle.v = fmaf(phi[h1], A[h1].v, middle.v);
                        if constexpr (TANGENT) {
                            gamma[h1] = fmaf(d[h1], x.g, -x.centre);
                            middle.t = fmaf(phi[h1], fmaf(gamma[h1], A[h1].v, A[h1].t), middle.t);
                        }
                    }
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        gather(f[e], p[e], TANGENT ? fmaf(f[e], y.g, -y.centre) : 0.0f,
                               B[i * 4 + e], back, value_y, slope_y);
                    add(times(middle, power_of_two(-MIDDLE)), back, value_y, slope_y, sums[1]);
                    back = times(back, power_of_two(-MIDDLE));
                    top_middle = fmaxf(top_middle, back.v);
#pragma unroll
                    for (int h1 = 0; h1 < 4; h1++)
                        gather(d[h1], phi[h1], TANGENT ? gamma[h1] : 0.0f, back, out[h1],
                               value[h1], slope[h1]);
                }
            }
            if (h0 < 3) fetch(kept + a, h0 + 1, next);
#pragma unroll
            for (int h1 = 0; h1 < 4; h1++) {
                add(A[h1], out[h1], value[h1], slope[h1], sums[0]);
                top = fmaxf(top, out[h1].v);
                message(places.at(h1 * 4 + h0)) = out[h1];
            }
        }
    }

    // Sums of every step into partials, from alpha in scratch.
    __device__ void beta_sweep(float scale) {
        int exponent = HEADROOM, r = 0, parity = 0;
        for (int t = arg.steps - 2; t >= 0; t -= 2, parity ^= 1) {
            const Message<TANGENT> *kept = alphas + (size_t)(t / 2) * OVERLAPS;
            if (t > 0) {
                const char *row = (const char *)(kept - OVERLAPS);
                for (int i = id; i < sizeof(own.message) / 128; i += GROUP)
                    prefetch_l2(row + i * 128);
            }
            u32 most;
            const int by = normaliser(parity, most);
            const float scale_by = power_of_two(by);
            const Step x = steps[t], y = steps[t + 1];
            exponent += by;
            const int shifts = (int)x.shift + (int)y.shift - MIDDLE;
            const float level = own.log2_z + (float)(x.alpha_exponent + shifts + exponent);
            const int scaled = max(TARGET - (int)level, -149);
            if (id == 0) {
                steps[t + 1].beta_max = __uint_as_float(most) * scale_by;
                steps[t].scaled = scaled;
            }
            exponent += shifts;
            float top = 0.0f, top_middle = 0.0f;
            Sums sums[2];
            const bool far = x.far != 0.0f || y.far != 0.0f;
            const float pre = power_of_two(scaled), mean = own.mean;
#pragma unroll 1
            for (int a = id; a < BLOCKS; a += GROUP) {
                const Places<SIZE> places(a << 4, 0, r);
                if (far)
                    beta_block<true>(a, places, scale_by, kept, scale, pre, mean, x, y, sums, top,
                                     top_middle);
                else
                    beta_block<false>(a, places, scale_by, kept, scale, pre, mean, x, y, sums, top,
                                      top_middle);
            }
            r = r >= 4 ? r - 4 : r + 10;
            const u32 found = largest_of_warp(top), found_middle = largest_of_warp(top_middle);
            if (lane == 0) {
                own.largest[parity ^ 1][warp] = found;
                own.largest_middle[parity][warp] = found_middle;
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float v = sum_of_warp(sums[i].v), z = sum_of_warp(sums[i].z);
                const float drift = TANGENT ? sum_of_warp(sums[i].drift) : 0.0f;
                if (lane == 0)
                    partials[(t + i) * WARPS + warp] = make_float4(v, z, drift, 0.0f);
            }
            barrier();
            if (id == 0) steps[t].beta_max = __uint_as_float(most_of(own.largest_middle[parity]));
        }
        barrier();
    }

    // Sums of every step into values or their gradient, and the certificate.
    __device__ void finish(int tile, float scale, float gain) {
        for (int t = id; t < arg.steps; t += GROUP) {
            float v = 0, z = 0, drift = 0;
#pragma unroll
            for (int i = 0; i < WARPS; i++) {
                const float4 p = partials[t * WARPS + i];
                v += p.x, z += p.y, drift += p.z;
            }
            const Step &x = steps[t];
            const int scaled = steps[t & ~1].scaled, phi_max = t % 2 ? SECOND : HEADROOM;
            if (!certified(z, x.alpha_max, x.beta_max, phi_max, scaled)) own.bad = 1;
            const size_t at = (size_t)tile * arg.steps + t;
            const float w = arg.w[at], p = cut(w);
            v /= z * scale;
            if (TANGENT) {
                const float s = arg.values[at], twice = 2.0f * LN2 * scale * scale;
                const float gz = arg.grad_log_z ? arg.grad_log_z[tile] : 0.0f;
                arg.grad_w[at] = twice * ((v - (s - p) * (drift / z)) / gain + (s - w) * gz);
            } else {
                arg.values[at] = p + v;
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
            alpha_sweep(scale * factor, pin);
            start_messages(pin);
            barrier();
            beta_sweep(scale * factor);
            finish(tile, scale, gain);
            barrier();
            if (id == 0 && own.bad) arg.failed[atomicAdd(arg.failures, 1)] = tile;
        }
    }
};

template <bool TANGENT>
__device__ __forceinline__ void block(const Arguments &arg) {
    extern __shared__ float4 shared[];
    Shared<TANGENT> &own = *(Shared<TANGENT> *)shared;
    Step *steps = (Step *)((char *)shared + (sizeof(own) + 15) / 16 * 16);
    unsigned short *halves = (unsigned short *)(steps + arg.steps);
    const size_t kept = (size_t)arg.steps / 2 * OVERLAPS * sizeof(Message<TANGENT>) / 4;
    float *scratch = arg.scratch + blockIdx.x * (kept + (size_t)arg.steps * WARPS * 4);
    const int id = threadIdx.x, lane = id & 31, warp = id >> 5;
    const float factor = *arg.factor;
    if (factor == 0.0f) {
        if (blockIdx.x == 0 && id == 0) *arg.failures = arg.tiles;
        return;
    }
    load_halves(halves, arg.halves, Worker<TANGENT>::SHARED_STATES);
    Worker<TANGENT> worker = {
        arg, halves, factor, own, steps, (Message<TANGENT> *)scratch, (float4 *)(scratch + kept),
        id,  lane,   warp,
    };
    worker.run();
}

extern "C" __global__ void __launch_bounds__(GROUP, 1) forward(const Arguments arg) {
    block<false>(arg);
}

extern "C" __global__ void __launch_bounds__(GROUP, 1) backward(const Arguments arg) {
    block<true>(arg);
}
