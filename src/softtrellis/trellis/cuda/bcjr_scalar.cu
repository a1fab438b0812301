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

struct alignas(16) Step {  // of a tile; distances are scaled by sqrt(log2(e) / T)
    float w;               // the weight
    float shift;           // the exponent that is added to every log2 phi
    float g;               // upstream gradient over the scale
    float centre;          // g (soft - w)
    float alpha_max, beta_max;
    int alpha_exponent;  // alpha is alpha times two to this; of even steps
    float z_exponent;    // the sum of alpha phi beta is the true one times two to this; of even steps
};

template <bool TANGENT>
struct Shared {
    Message<TANGENT> message[OVERLAPS];
    u32 largest[WARPS], largest_middle[WARPS];
    float sums[WARPS];
    float log2_z;
    int tile, bad;
    u32 gain;
};

template <bool TANGENT>
struct Worker {
    static constexpr int HEADROOM = TANGENT ? 53 : 58;
    static constexpr int TARGET = 2 * HEADROOM - 84;  // log2 of the sum of alpha phi beta
    static constexpr int SIZE = sizeof(Message<TANGENT>);

    const Arguments &arg;
    const unsigned short *halves;
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

    __device__ void start_messages(int pin) {
        const float start = power_of_two(HEADROOM);
        for (int u = id; u < OVERLAPS; u += GROUP) {
            Message<TANGENT> m = {};
            m.v = pin < 0 || u == pin ? start : 0.0f;
            own.message[place(u)] = m;
        }
        if (id < WARPS) own.largest[id] = __float_as_uint(start);
    }

    // Two to this is taken out of the messages in two steps, two to HEADROOM of it after the first.
    __device__ static int taken_out(u32 most) { return (int)(most >> 23) - 127 + HEADROOM; }

    __device__ void load_row(int a, Message<TANGENT> *row) const {
        const u32 from = swizzled((u32)a * 16 * SIZE) + address(own.message);
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            const float4 x = message4(from ^ (i << 4));
            if constexpr (TANGENT) {
                row[2 * i].v = x.x, row[2 * i].t = x.y, row[2 * i + 1].v = x.z, row[2 * i + 1].t = x.w;
            } else {
                row[4 * i].v = x.x, row[4 * i + 1].v = x.y, row[4 * i + 2].v = x.z,
                row[4 * i + 3].v = x.w;
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

    __device__ float prepare(int tile, float scale) {
        const int N = arg.steps;
        const float *w = arg.w + (size_t)tile * N;
        for (int t = id; t < N; t += GROUP) {
            const float out = fmaxf(fmaxf(w[t] - arg.bounds[1], arg.bounds[0] - w[t]), 0.0f) * scale;
            steps[t].w = w[t] * scale;
            steps[t].shift = floorf(out * out) + HEADROOM;
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
                steps[t].centre = g * (arg.values[at] - arg.w[at]);
            }
        }
        return gain;
    }

    // phi of four states of the first step with the same (h1, h0, a), and gamma of them.
    __device__ __forceinline__ static void weigh(const float *c, float scale, const Step &x, float *d,
                                                 float *phi) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            d[i] = fmaf(c[i], scale, -x.w);
            phi[i] = exp2_fast(fmaf(-d[i], d[i], x.shift));
        }
    }

    __device__ void alpha_sweep(float scale) {
        const int N = arg.steps;
        int exponent = HEADROOM;
        for (int t = 0; t < N; t += 2) {
            const float4 *image = (const float4 *)own.message;
            float4 *store = (float4 *)(alphas + (size_t)(t / 2) * OVERLAPS);
#pragma unroll
            for (int i = 0; i < sizeof(own.message) / 16 / GROUP; i++)
                store[i * GROUP + id] = image[i * GROUP + id];
            Message<TANGENT> A[2][16];
#pragma unroll
            for (int b = 0; b < 2; b++) {
#pragma unroll
                for (int h = 0; h < 16; h++)
                    A[b][h] = own.message[place(b * GROUP + id) + h * BLOCKS];
            }
            const u32 most = most_of(own.largest);
            const Step x = steps[t], y = steps[t + 1];
            const float post = power_of_two(HEADROOM - taken_out(most));
            barrier();
            if (id == 0) {
                steps[t].alpha_max = __uint_as_float(most);
                steps[t].alpha_exponent = exponent;
            }
            exponent += (int)x.shift + (int)y.shift - taken_out(most);
            float top = 0.0f, top_middle = 0.0f;
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const int a = b * GROUP + id;
                const Codewords<!TANGENT> codewords(halves, a);
                Message<TANGENT> out[16] = {};
#pragma unroll
                for (int h0 = 0; h0 < 4; h0++) {
                    Message<TANGENT> middle[4] = {};
#pragma unroll
                    for (int h1 = 0; h1 < 4; h1++) {
                        const int h = h1 * 4 + h0;
                        float c[4], d[4], phi[4];
                        codewords.of_first(h, c);
                        weigh(c, scale, x, d, phi);
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            middle[i].v = fmaf(phi[i], A[b][h].v, middle[i].v);
                            if constexpr (TANGENT) {
                                const float gamma = fmaf(d[i], x.g, -x.centre);
                                middle[i].t =
                                    fmaf(phi[i], fmaf(gamma, A[b][h].v, A[b][h].t), middle[i].t);
                            }
                        }
                    }
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        middle[i].v *= power_of_two(-HEADROOM);
                        if constexpr (TANGENT) middle[i].t *= power_of_two(-HEADROOM);
                        top_middle = fmaxf(top_middle, middle[i].v);
                    }
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float c[8];
                        codewords.of_second(h0, half, c);
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            const int i = half * 2 + j;
                            float d[4], phi[4];
                            weigh(c + 4 * j, scale, y, d, phi);
#pragma unroll
                            for (int e = 0; e < 4; e++) {
                                out[i * 4 + e].v = fmaf(phi[e], middle[i].v, out[i * 4 + e].v);
                                if constexpr (TANGENT) {
                                    const float gamma = fmaf(d[e], y.g, -y.centre);
                                    out[i * 4 + e].t =
                                        fmaf(phi[e], fmaf(gamma, middle[i].v, middle[i].t),
                                             out[i * 4 + e].t);
                                }
                            }
                        }
                    }
                }
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    out[i].v *= post;
                    if constexpr (TANGENT) out[i].t *= post;
                    top = fmaxf(top, out[i].v);
                }
                store_row(a, out);
            }
            const u32 found = largest_of_warp(top), found_middle = largest_of_warp(top_middle);
            if (lane == 0) own.largest[warp] = found, own.largest_middle[warp] = found_middle;
            barrier();
            if (id == 0) steps[t + 1].alpha_max = __uint_as_float(most_of(own.largest_middle));
        }
    }

    // log2 of Z, and from it the exponent of the last pair of steps; all messages are alpha_N.
    __device__ void close(int tile, int pin) {
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
            Step &x = steps[arg.steps - 2];
            const Step &y = steps[arg.steps - 1];
            const int exponent = x.alpha_exponent + (int)x.shift + (int)y.shift -
                                 taken_out(__float_as_uint(x.alpha_max));
            const double log2_z = (double)log2f(sum) - (double)exponent;
            x.z_exponent = (float)(log2_z + (double)x.alpha_exponent + (double)x.shift +
                                   (double)y.shift);
            if (!TANGENT) arg.log_z[tile] = (float)(log2_z * 0.6931471805599453);
        }
        barrier();
    }

    __device__ void beta_sweep(float scale) {
        const int N = arg.steps;
        for (int t = N - 2; t >= 0; t -= 2) {
            const Message<TANGENT> *load = alphas + (size_t)(t / 2) * OVERLAPS;
            if (t > 0) {
                const char *row = (const char *)(load - OVERLAPS);
                for (int i = id; i < sizeof(own.message) / 128; i += GROUP)
                    asm volatile("prefetch.global.L2 [%0];" ::"l"(row + i * 128));
            }
            Message<TANGENT> B[2][16];
#pragma unroll
            for (int b = 0; b < 2; b++) load_row(b * GROUP + id, B[b]);
            const u32 most = most_of(own.largest);
            const Step x = steps[t], y = steps[t + 1];
            const float post = power_of_two(HEADROOM - taken_out(most));
            const float pre = power_of_two(TARGET - (int)x.z_exponent);
            barrier();
            if (id == 0) {
                steps[t + 1].beta_max = __uint_as_float(most);
                if (t > 0) {
                    const float beta = x.shift + y.shift - (float)taken_out(most);
                    const Step &u = steps[t - 2], &v = steps[t - 1];
                    steps[t - 2].z_exponent = x.z_exponent - (float)x.alpha_exponent - x.shift -
                                              y.shift + beta + (float)u.alpha_exponent + u.shift +
                                              v.shift;
                }
            }
            float top = 0.0f, top_middle = 0.0f;
            float v[2] = {0, 0}, z[2] = {0, 0}, drift[2] = {0, 0};
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const int a = b * GROUP + id, column = place(a);
                const Codewords<!TANGENT> codewords(halves, a);
#pragma unroll 1
                for (int h0 = 0; h0 < 4; h0++) {
                    Message<TANGENT> A[4], middle[4] = {}, back[4] = {};
                    float phi[4][4], d[4][4];
#pragma unroll
                    for (int h1 = 0; h1 < 4; h1++) {
                        A[h1] = once(load + column + (h1 * 4 + h0) * BLOCKS);
                        A[h1].v *= pre;
                        if constexpr (TANGENT) A[h1].t *= pre;
                        float c[4];
                        codewords.of_first(h1 * 4 + h0, c);
                        weigh(c, scale, x, d[h1], phi[h1]);
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            middle[i].v = fmaf(phi[h1][i], A[h1].v, middle[i].v);
                            if constexpr (TANGENT) {
                                const float gamma = fmaf(d[h1][i], x.g, -x.centre);
                                middle[i].t = fmaf(phi[h1][i], fmaf(gamma, A[h1].v, A[h1].t),
                                                   middle[i].t);
                            }
                        }
                    }
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        middle[i].v *= power_of_two(-HEADROOM);
                        if constexpr (TANGENT) middle[i].t *= power_of_two(-HEADROOM);
                    }
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float c[8];
                        codewords.of_second(h0, half, c);
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            const int i = half * 2 + j;
                            float f[4], p[4], value = 0.0f, slope = 0.0f;
                            weigh(c + 4 * j, scale, y, f, p);
#pragma unroll
                            for (int e = 0; e < 4; e++) {
                                const Message<TANGENT> m = B[b][i * 4 + e];
                                const float q = p[e] * m.v;
                                back[i].v += q;
                                value = fmaf(q, f[e], value);
                                if constexpr (TANGENT) {
                                    const float gamma = fmaf(f[e], y.g, -y.centre);
                                    const float r = p[e] * fmaf(gamma, m.v, m.t);
                                    back[i].t += r;
                                    slope = fmaf(r, f[e], slope);
                                }
                            }
                            z[1] = fmaf(middle[i].v, back[i].v, z[1]);
                            if constexpr (TANGENT) {
                                v[1] = fmaf(middle[i].t, value, fmaf(middle[i].v, slope, v[1]));
                                drift[1] = fmaf(middle[i].t, back[i].v,
                                                fmaf(middle[i].v, back[i].t, drift[1]));
                            } else {
                                v[1] = fmaf(middle[i].v, value, v[1]);
                            }
                            back[i].v *= power_of_two(-HEADROOM);
                            if constexpr (TANGENT) back[i].t *= power_of_two(-HEADROOM);
                            top_middle = fmaxf(top_middle, back[i].v);
                        }
                    }
#pragma unroll
                    for (int h1 = 0; h1 < 4; h1++) {
                        Message<TANGENT> out = {};
                        float value = 0.0f, slope = 0.0f;
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const float q = phi[h1][i] * back[i].v;
                            out.v += q;
                            value = fmaf(q, d[h1][i], value);
                            if constexpr (TANGENT) {
                                const float gamma = fmaf(d[h1][i], x.g, -x.centre);
                                const float r = phi[h1][i] * fmaf(gamma, back[i].v, back[i].t);
                                out.t += r;
                                slope = fmaf(r, d[h1][i], slope);
                            }
                        }
                        z[0] = fmaf(A[h1].v, out.v, z[0]);
                        if constexpr (TANGENT) {
                            v[0] = fmaf(A[h1].t, value, fmaf(A[h1].v, slope, v[0]));
                            drift[0] = fmaf(A[h1].t, out.v, fmaf(A[h1].v, out.t, drift[0]));
                            out.t *= post;
                        } else {
                            v[0] = fmaf(A[h1].v, value, v[0]);
                        }
                        out.v *= post;
                        top = fmaxf(top, out.v);
                        own.message[column + (h1 * 4 + h0) * BLOCKS] = out;
                    }
                }
            }
            const u32 found = largest_of_warp(top), found_middle = largest_of_warp(top_middle);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                v[i] = sum_of_warp(v[i]), z[i] = sum_of_warp(z[i]);
                if (TANGENT) drift[i] = sum_of_warp(drift[i]);
            }
            if (lane == 0) {
                own.largest[warp] = found, own.largest_middle[warp] = found_middle;
                partials[t * WARPS + warp] = make_float4(v[0], z[0], drift[0], 0.0f);
                partials[(t + 1) * WARPS + warp] = make_float4(v[1], z[1], drift[1], 0.0f);
            }
            barrier();
            if (id == 0) steps[t].beta_max = __uint_as_float(most_of(own.largest_middle));
        }
    }

    __device__ void finish(int tile, float scale, float gain) {
        for (int t = id; t < arg.steps; t += GROUP) {
            float v = 0, z = 0, drift = 0;
#pragma unroll
            for (int i = 0; i < WARPS; i++) {
                const float4 p = partials[t * WARPS + i];
                v += p.x, z += p.y, drift += p.z;
            }
            const Step &x = steps[t];
            const float scaled = fmaxf(TARGET - truncf(steps[t & ~1].z_exponent), -149.0f);
            if (!certified(z, x.alpha_max, x.beta_max, HEADROOM, scaled)) own.bad = 1;
            const size_t at = (size_t)tile * arg.steps + t;
            v /= z * scale;
            if (TANGENT) {
                const float s = arg.values[at] - arg.w[at], twice = 2.0f * LN2 * scale * scale;
                arg.grad_w[at] = twice * ((v - s * (drift / z)) / gain + s * arg.grad_log_z[tile]);
            } else {
                arg.values[at] = arg.w[at] + v;
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
            alpha_sweep(scale * factor);
            close(tile, pin);
            start_messages(pin);
            barrier();
            beta_sweep(scale * factor);
            barrier();
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
    const size_t kept = (size_t)arg.steps / 2 * OVERLAPS * sizeof(Message<TANGENT>) / 4;
    float *scratch = arg.scratch + blockIdx.x * (kept + (size_t)arg.steps * WARPS * 4);
    const int id = threadIdx.x, lane = id & 31, warp = id >> 5;
    Message<TANGENT> *alphas = (Message<TANGENT> *)scratch;
    float4 *partials = (float4 *)(scratch + kept);
    const float factor = *arg.factor;
    if (factor == 0.0f) {
        if (blockIdx.x == 0 && id == 0) *arg.failures = arg.tiles;
        return;
    }
    const unsigned short *halves = arg.halves;
    if (!TANGENT) {
        load_halves((unsigned short *)(steps + arg.steps), halves);
        halves = (const unsigned short *)(steps + arg.steps);
    }
    Worker<TANGENT> worker = {arg,    halves, factor, own,  steps,
                              alphas, partials, id,     lane, warp};
    worker.run();
}

extern "C" __global__ void __launch_bounds__(GROUP, 1) forward(const Arguments arg) {
    block<false>(arg);
}

extern "C" __global__ void __launch_bounds__(GROUP, 1) backward(const Arguments arg) {
    block<true>(arg);
}
