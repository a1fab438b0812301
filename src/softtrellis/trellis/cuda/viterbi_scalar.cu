// Viterbi at L = 16, k = 2, V = 1 for any code, with free, pinned and tail-biting ends (scalar.cuh).
//
// There are no backpointers. The least cost of every overlap is kept at every fourth step, and the
// way back chooses again among the 256 paths of four states that lead to an overlap, one to a thread,
// with the arithmetic of the sweep, so that it finds exactly the sweep's minimum.
//
// Tail-biting (QTIP, algorithm 4): the tile rolled by half is swept with free ends, and the way back
// goes only to the seam; the tile is then swept with both ends pinned to the overlap found there.

#include "scalar.cuh"

enum Ends { FREE = 0, PINNED = 1, TAIL_BITING = 2 };

constexpr int GROUP = 512;  // threads, one tile
constexpr int WARPS = GROUP / 32;
constexpr int EACH = BLOCKS / GROUP;
constexpr int WINDOW = 4;

struct Arguments {
    const float *w;                // [tiles, N]
    const unsigned short *halves;  // [65536], the codebook over its factor in float16
    const float *factor;           // the factor; 0 if there is none
    const long long *pins;         // [tiles], with PINNED
    int *states;                   // [tiles, N]
    float *scratch;                // [blocks, N / 4, 16384]
    int *next;                     // tiles handed out so far
    int *left;                     // tiles left to another kernel: none or all
    int ends;
    int tiles;
    int steps;  // a multiple of 4, with TAIL_BITING of 8
};

struct Shared {
    float message[OVERLAPS];  // swizzled by 16 bytes in every 128 x 8
    float cost[WARPS];
    int choice[WARPS];
    int tile;
    int pad[3];
};

__device__ __forceinline__ int place(int u) { return u ^ ((u >> 5 & 7) << 2); }

struct Worker {
    const Arguments &arg;
    const unsigned short *halves;
    const float factor;
    Shared &own;
    float *w;     // [N], as the sweep goes
    float *kept;  // every fourth message
    int id, lane, warp;

    // The least of one number from every thread: its choice, the same in every thread.
    __device__ int least(float cost, int choice) {
        const u32 bits = __float_as_uint(cost);  // costs are not negative
        const u32 best = __reduce_min_sync(0xffffffffu, bits);
        const u32 at = __reduce_min_sync(0xffffffffu, bits == best ? (u32)choice : 0xffffffffu);
        if (lane == 0) own.cost[warp] = __uint_as_float(best), own.choice[warp] = (int)at;
        __syncthreads();
        float found = own.cost[0];
        int where = own.choice[0];
#pragma unroll
        for (int i = 1; i < WARPS; i++)
            if (own.cost[i] < found || (own.cost[i] == found && own.choice[i] < where))
                found = own.cost[i], where = own.choice[i];
        return where;
    }

    __device__ void load_weights(int tile, int roll) {
        for (int t = id; t < arg.steps; t += GROUP)
            w[t] = arg.w[(size_t)tile * arg.steps + (t + roll) % arg.steps];
    }

    __device__ float codeword(int state) const {
        float low, high;
        of_halves(halves[placed(state)], low, high);
        return low;
    }

    // All messages; those of t = from, from + 4, ... into kept.
    __device__ void sweep(int pin, int from) {
        for (int u = id; u < OVERLAPS; u += GROUP)
            own.message[place(u)] = pin < 0 || u == pin ? 0.0f : 1e30f;
        __syncthreads();
        for (int t = 0; t < arg.steps; t += 2) {
            if (t >= from && (t - from) % WINDOW == 0) {
                float4 *row = (float4 *)(kept + (size_t)((t - from) / WINDOW) * OVERLAPS);
#pragma unroll
                for (int i = 0; i < OVERLAPS / 4 / GROUP; i++)
                    row[i * GROUP + id] = ((const float4 *)own.message)[i * GROUP + id];
            }
            float A[EACH][16];
#pragma unroll
            for (int b = 0; b < EACH; b++) {
#pragma unroll
                for (int h = 0; h < 16; h++)
                    A[b][h] = own.message[place(b * GROUP + id) + h * BLOCKS];
            }
            const float x = w[t], y = w[t + 1];
            __syncthreads();
#pragma unroll
            for (int b = 0; b < EACH; b++) {
                const int a = b * GROUP + id;
                const Codewords<STATES> codewords(halves, halves, a);
                float out[16];
#pragma unroll
                for (int i = 0; i < 16; i++) out[i] = 2e30f;
#pragma unroll
                for (int h0 = 0; h0 < 4; h0++) {
                    float middle[4] = {2e30f, 2e30f, 2e30f, 2e30f};
#pragma unroll
                    for (int h1 = 0; h1 < 4; h1++) {
                        float c[4];
                        codewords.of_first(h1 * 4 + h0, c);
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const float d = fmaf(c[i], factor, -x);
                            middle[i] = fminf(middle[i], fmaf(d, d, A[b][h1 * 4 + h0]));
                        }
                    }
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float c[8];
                        codewords.of_second(h0, half, c);
#pragma unroll
                        for (int i = 0; i < 8; i++) {
                            const float d = fmaf(c[i], factor, -y);
                            float &o = out[half * 8 + i];
                            o = fminf(o, fmaf(d, d, middle[half * 2 + i / 4]));
                        }
                    }
                }
                char *to = (char *)own.message;
                const u32 base = (u32)place(a * 16) * 4;
#pragma unroll
                for (int i = 0; i < 4; i++)
                    *(float4 *)(to + (base ^ (i << 4))) =
                        make_float4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
            }
            __syncthreads();
        }
    }

    // The best path back to step from; returns its overlap there. Writes the states if asked to.
    __device__ int way_back(int pin, int from, int *states) {
        const int N = arg.steps;
        int v = pin;
        if (pin < 0) {
            float cost = 3e38f;
            int choice = 0;
            for (int u = id; u < OVERLAPS; u += GROUP)
                if (own.message[place(u)] < cost) cost = own.message[place(u)], choice = u;
            v = least(cost, choice);
        }
        for (int t = N - WINDOW; t >= from; t -= WINDOW) {
            __syncthreads();
            const float *row = kept + (size_t)((t - from) / WINDOW) * OVERLAPS;
            if (t > from)
                for (int i = id; i < OVERLAPS / 32; i += GROUP)
                    prefetch_l2(row - OVERLAPS + i * 32);
            // Two bits of the number of a path stand on top of each of its states, the last first.
            float cost = 3e38f;
            int s[WINDOW];
            auto walk = [&](int path) {
                int u = v;
#pragma unroll
                for (int i = WINDOW - 1; i >= 0; i--) {
                    s[i] = (path >> (2 * i) & 3) << 14 | u;
                    u = s[i] >> 2;
                }
                return u;
            };
            if (id < 256) {
                cost = row[place(walk(id))];
#pragma unroll
                for (int i = 0; i < WINDOW; i++) {
                    const float d = fmaf(codeword(s[i]), factor, -w[t + i]);
                    cost = fmaf(d, d, cost);
                }
            }
            v = walk(least(cost, id));
            if (states && id < WINDOW) {
                int mine = s[0];
#pragma unroll
                for (int i = 1; i < WINDOW; i++) mine = id == i ? s[i] : mine;
                states[t + id] = mine;
            }
        }
        return v;
    }

    __device__ void run() {
        const int N = arg.steps;
        while (true) {
            if (id == 0) own.tile = atomicAdd(arg.next, 1);
            __syncthreads();
            const int tile = own.tile;
            if (tile >= arg.tiles) return;
            int pin = -1;
            if (arg.ends == PINNED) pin = (int)arg.pins[tile];
            if (arg.ends == TAIL_BITING) {
                load_weights(tile, N / 2);
                __syncthreads();
                sweep(-1, N / 2);
                pin = way_back(-1, N / 2, nullptr);
                __syncthreads();
            }
            load_weights(tile, 0);
            __syncthreads();
            sweep(pin, 0);
            way_back(pin, 0, arg.states + (size_t)tile * N);
            __syncthreads();
        }
    }
};

extern "C" __global__ void __launch_bounds__(GROUP, 1) viterbi(const Arguments arg) {
    extern __shared__ float4 shared[];
    Shared &own = *(Shared *)shared;
    float *w = (float *)(&own + 1);
    const int id = threadIdx.x, lane = id & 31, warp = id >> 5;
    float *kept = arg.scratch + (size_t)blockIdx.x * (arg.steps / WINDOW) * OVERLAPS;
    const float factor = *arg.factor;
    if (factor == 0.0f) {
        if (blockIdx.x == 0 && id == 0) *arg.left = arg.tiles;
        return;
    }
    unsigned short *halves = (unsigned short *)(w + arg.steps);
    load_halves(halves, arg.halves, STATES);
    Worker worker = {arg, halves, factor, own, w, kept, id, lane, warp};
    worker.run();
}
