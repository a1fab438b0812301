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
    float *values;                    // [tiles, N]
    float *log_z;                     // [tiles]; the forward pass writes it
    const float *grad_values;         // [tiles, N]; from here on only with TANGENT
    const float *grad_log_z;          // [tiles]
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
    float centre;  // g (soft - p)
    float alpha_max, beta_max;
    int alpha_exponent;  // alpha in scratch is alpha times two to this; of even steps
    int scaled;          // in the sums of this step it is that times two to this; of even steps
    int pad[3];
};

template <bool TANGENT>
struct Shared {
    Message<TANGENT> message[OVERLAPS];  // as the last two steps left them
    u32 largest[WARPS], largest_middle[WARPS];
    float sums[WARPS];
    Message<TANGENT> fetched[4][GROUP];  // alpha on its way
    double outside;                      // the sum of the squares o^2
    float log2_z;                        // without them
    int tile, bad;
    u32 gain;
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
    static constexpr int SHARED_STATES = TANGENT ? STATES / 2 : STATES;
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

    // Messages are swizzled by 16 bytes in every 128 x 8.
    __device__ static u32 swizzled(u32 bytes) { return bytes ^ ((bytes >> 7 & 7) << 4); }
    __device__ static int place(int u) { return (int)swizzled(u * SIZE) / SIZE; }

    __device__ static u32 most_of(const u32 *all) {
        u32 most = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++) most = max(most, all[i]);
        return most;
    }

    // The exponent of the power of two that brings the messages to 2^HEADROOM or a little more.
    __device__ int normaliser(u32 &most) const {
        most = most_of(own.largest);
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

    __device__ void load_row(int a, float by, Message<TANGENT> *row) const {
        const u32 from = swizzled((u32)a * 16 * SIZE) + address(own.message);
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            const float4 x = message4(from ^ (i << 4));
            if constexpr (TANGENT) {
                row[2 * i] = {x.x * by, x.y * by}, row[2 * i + 1] = {x.z * by, x.w * by};
            } else {
                row[4 * i] = {x.x * by}, row[4 * i + 1] = {x.y * by};
                row[4 * i + 2] = {x.z * by}, row[4 * i + 3] = {x.w * by};
            }
        }
    }

    __device__ void store_row(int a, const Message<TANGENT> *row) {
        char *to = (char *)own.message;
        const u32 base = swizzled((u32)a * 16 * SIZE);
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            float4 x;
            if constexpr (TANGENT)
                x = make_float4(row[2 * i].v, row[2 * i].t, row[2 * i + 1].v, row[2 * i + 1].t);
            else
                x = make_float4(row[4 * i].v, row[4 * i + 1].v, row[4 * i + 2].v, row[4 * i + 3].v);
            *(float4 *)(to + (base ^ (i << 4))) = x;
        }
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

    template <bool FAR>
    __device__ __forceinline__ void alpha_block(int a, const Message<TANGENT> *A, float scale,
                                                const Step &x, const Step &y, float &top,
                                                float &top_middle) {
        const Codewords<SHARED_STATES> codewords(halves, arg.halves, a);
        Message<TANGENT> out[16] = {};
#pragma unroll
        for (int h0 = 0; h0 < 4; h0++) {
            Message<TANGENT> middle[4] = {};
#pragma unroll
            for (int h1 = 0; h1 < 4; h1++) {
                const Message<TANGENT> m = A[h1 * 4 + h0];
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
        for (int i = 0; i < 16; i++) top = fmaxf(top, out[i].v);
        store_row(a, out);
    }

    // alpha of the even steps into scratch, and log2 of Z without the squares.
    __device__ void alpha_sweep(float scale, int pin) {
        const int N = arg.steps;
        int exponent = HEADROOM;
        u32 most;
        for (int t = 0; t < N; t += 2) {
            const int by = normaliser(most);
            const float scale_by = power_of_two(by);
            Message<TANGENT> *store = alphas + (size_t)(t / 2) * OVERLAPS;
            Message<TANGENT> A[2][16];
#pragma unroll
            for (int b = 0; b < 2; b++) {
#pragma unroll
                for (int h = 0; h < 16; h++) {
                    const int at = place(b * GROUP + id) + h * BLOCKS;
                    A[b][h] = times(own.message[at], scale_by);
                    store[at] = A[b][h];
                }
            }
            const Step x = steps[t], y = steps[t + 1];
            exponent += by;
            barrier();
            if (id == 0) {
                steps[t].alpha_max = __uint_as_float(most) * scale_by;
                steps[t].alpha_exponent = exponent;
            }
            exponent += (int)x.shift + (int)y.shift - MIDDLE;
            float top = 0.0f, top_middle = 0.0f;
            const bool far = x.far != 0.0f || y.far != 0.0f;
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const int a = b * GROUP + id;
                if (far)
                    alpha_block<true>(a, A[b], scale, x, y, top, top_middle);
                else
                    alpha_block<false>(a, A[b], scale, x, y, top, top_middle);
            }
            const u32 found = largest_of_warp(top), found_middle = largest_of_warp(top_middle);
            if (lane == 0) own.largest[warp] = found, own.largest_middle[warp] = found_middle;
            barrier();
            if (id == 0) steps[t + 1].alpha_max = __uint_as_float(most_of(own.largest_middle));
        }
        const int by = normaliser(most);
        float sum = 0.0f;
        for (int u = id; u < OVERLAPS; u += GROUP)
            if (pin < 0 || u == pin) sum += own.message[place(u)].v * power_of_two(by);
        sum = sum_of_warp(sum);
        if (lane == 0) own.sums[warp] = sum;
        barrier();
        if (id == 0) {
            sum = 0.0f;
            for (int i = 0; i < WARPS; i++) sum += own.sums[i];
            own.log2_z = log2f(sum) - (float)(exponent + by);
        }
        barrier();
    }

    struct Sums {  // of one step, over the states that a thread has
        float v = 0, z = 0, drift = 0;
    };

    // What four states (of c or e) with the messages m on the far side give: their sum, and the sums
    // of phi d m and of its derivative.
    __device__ __forceinline__ static void gather(const float *d, const float *phi, const Step &x,
                                                  const Message<TANGENT> *m, Message<TANGENT> &sum,
                                                  float &value, float &slope) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float weighted = phi[i] * d[i];
            sum.v = fmaf(phi[i], m[i].v, sum.v);
            value = fmaf(weighted, m[i].v, value);
            if constexpr (TANGENT) {
                const float gamma = fmaf(d[i], x.g, -x.centre);
                const float inner = fmaf(gamma, m[i].v, m[i].t);
                sum.t = fmaf(phi[i], inner, sum.t);
                slope = fmaf(weighted, inner, slope);
            }
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

    // Asks for alpha at (h1 = 0 .. 3, h0, a); fetched holds it once the copies have been waited for.
    __device__ __forceinline__ void fetch(const Message<TANGENT> *load, int a, int h0) {
#pragma unroll
        for (int h1 = 0; h1 < 4; h1++)
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(
                             address(&own.fetched[h1][id])),
                         "l"(load + place(a) + (h1 * 4 + h0) * BLOCKS), "n"(SIZE)
                         : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
    }

    template <bool FAR>
    __device__ __forceinline__ void beta_block(int a, const Message<TANGENT> *B,
                                               const Message<TANGENT> *load, float scale, float pre,
                                               const Step &x, const Step &y, Sums *sums, float &top,
                                               float &top_middle) {
        const int column = place(a);
        const Codewords<SHARED_STATES> codewords(halves, arg.halves, a);
#pragma unroll 1
        for (int h0 = 0; h0 < 4; h0++) {
            Message<TANGENT> A[4], middle[4] = {}, back[4] = {};
            float phi[4][4], d[4][4];
            asm volatile("cp.async.wait_group 0;" ::: "memory");
#pragma unroll
            for (int h1 = 0; h1 < 4; h1++) A[h1] = times(own.fetched[h1][id], pre);
            if (h0 < 3 || a < GROUP) fetch(load, h0 < 3 ? a : a + GROUP, (h0 + 1) & 3);
#pragma unroll
            for (int h1 = 0; h1 < 4; h1++) {
                float c[4];
                codewords.of_first(h1 * 4 + h0, c);
                weigh<FAR>(c, scale, x, d[h1], phi[h1]);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    middle[i].v = fmaf(phi[h1][i], A[h1].v, middle[i].v);
                    if constexpr (TANGENT) {
                        const float gamma = fmaf(d[h1][i], x.g, -x.centre);
                        middle[i].t =
                            fmaf(phi[h1][i], fmaf(gamma, A[h1].v, A[h1].t), middle[i].t);
                    }
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float c[8];
                codewords.of_second(h0, half, c);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const int i = half * 2 + j;
                    float f[4], p[4], value = 0.0f, slope = 0.0f;
                    weigh<FAR>(c + 4 * j, scale, y, f, p);
                    gather(f, p, y, B + i * 4, back[i], value, slope);
                    add(times(middle[i], power_of_two(-MIDDLE)), back[i], value, slope, sums[1]);
                    back[i] = times(back[i], power_of_two(-MIDDLE));
                    top_middle = fmaxf(top_middle, back[i].v);
                }
            }
#pragma unroll
            for (int h1 = 0; h1 < 4; h1++) {
                Message<TANGENT> out = {};
                float value = 0.0f, slope = 0.0f;
                gather(d[h1], phi[h1], x, back, out, value, slope);
                add(A[h1], out, value, slope, sums[0]);
                top = fmaxf(top, out.v);
                own.message[column + (h1 * 4 + h0) * BLOCKS] = out;
            }
        }
    }

    // Sums of every step into partials, from alpha in scratch.
    __device__ void beta_sweep(float scale) {
        int exponent = HEADROOM;
        for (int t = arg.steps - 2; t >= 0; t -= 2) {
            const Message<TANGENT> *load = alphas + (size_t)(t / 2) * OVERLAPS;
            if (t > 0) {
                const char *row = (const char *)(load - OVERLAPS);
                for (int i = id; i < sizeof(own.message) / 128; i += GROUP)
                    asm volatile("prefetch.global.L2 [%0];" ::"l"(row + i * 128));
            }
            fetch(load, id, 0);
            u32 most;
            const int by = normaliser(most);
            const float scale_by = power_of_two(by);
            Message<TANGENT> B[2][16];
#pragma unroll
            for (int b = 0; b < 2; b++) load_row(b * GROUP + id, scale_by, B[b]);
            const Step x = steps[t], y = steps[t + 1];
            exponent += by;
            const int shifts = (int)x.shift + (int)y.shift - MIDDLE;
            const float level = own.log2_z + (float)(x.alpha_exponent + shifts + exponent);
            const int scaled = max(TARGET - (int)level, -149);
            barrier();
            if (id == 0) {
                steps[t + 1].beta_max = __uint_as_float(most) * scale_by;
                steps[t].scaled = scaled;
            }
            exponent += shifts;
            float top = 0.0f, top_middle = 0.0f;
            Sums sums[2];
            const bool far = x.far != 0.0f || y.far != 0.0f;
            const float pre = power_of_two(scaled);
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const int a = b * GROUP + id;
                if (far)
                    beta_block<true>(a, B[b], load, scale, pre, x, y, sums, top, top_middle);
                else
                    beta_block<false>(a, B[b], load, scale, pre, x, y, sums, top, top_middle);
            }
            const u32 found = largest_of_warp(top), found_middle = largest_of_warp(top_middle);
            if (lane == 0) own.largest[warp] = found, own.largest_middle[warp] = found_middle;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float v = sum_of_warp(sums[i].v), z = sum_of_warp(sums[i].z);
                const float drift = TANGENT ? sum_of_warp(sums[i].drift) : 0.0f;
                if (lane == 0)
                    partials[(t + i) * WARPS + warp] = make_float4(v, z, drift, 0.0f);
            }
            barrier();
            if (id == 0) steps[t].beta_max = __uint_as_float(most_of(own.largest_middle));
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
                arg.grad_w[at] = twice * ((v - (s - p) * (drift / z)) / gain +
                                          (s - w) * arg.grad_log_z[tile]);
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
