// Viterbi for HYB at L = 16, k = 2, V = 2, with free, pinned and tail-biting ends (hyb.cuh).
//
// There are no backpointers. The least cost of every overlap is kept at every second step, and the
// way back chooses again among the 16 x 16 pairs of states that lead to an overlap, one to a thread,
// with the arithmetic of the sweep, so that it finds exactly the sweep's minimum.
//
// Tail-biting (QTIP, algorithm 4): the tile rolled by half is swept with free ends, and the way back
// goes only to the seam; the tile is then swept with both ends pinned to the overlap found there.

#include "hyb.cuh"

enum Ends { FREE = 0, PINNED = 1, TAIL_BITING = 2 };

struct Arguments {
    const float *w;          // [tiles, N, 2]
    const float2 *codebook;  // [65536]
    const long long *pins;   // [tiles], with PINNED
    int *states;             // [tiles, N]
    float *scratch;          // [groups, (N + 1) / 2, 4096]
    int *next;               // tiles handed out so far
    int *left;               // tiles left to another kernel: none or all
    int ends;
    int tiles;
    int steps;
};

struct alignas(128) Group {
    float message[2][OVERLAPS];  // swizzled by pairs; on the way back, two kept rows
    float cost[32];
    int choice[32];
    int tile;
};

__device__ __forceinline__ int swizzle(int row) { return (row >> 1) & 7; }
__device__ __forceinline__ int place(int u) { return u ^ (swizzle(u >> 4) << 1); }

__device__ __forceinline__ float energy(float c0, float c1, float w0, float w1) {
    const float d0 = c0 - w0, d1 = c1 - w1;
    return fmaf(d1, d1, d0 * d0);
}

template <int GROUP>  // threads that work on a tile: 256 to 1024
struct Worker {
    static constexpr int WARPS = GROUP / 32;
    static constexpr int PARTS = GROUP / 128;  // threads that share the predecessors of a and 255 - a

    const Arguments &arg;
    const float4 *table;
    Group &own;
    float2 *w;    // [N], as the sweep goes
    float *kept;  // every second message
    int group, id, lane, warp, a, part, first;

    __device__ void barrier() const { group_barrier<GROUP>(group); }

    __device__ float energy_of_state(int s, float2 x) const {
        if (s & 0x800) s = ~s & 0xffff;
        const float4 c = table[table_index((s >> 12) & 7, (s >> 4) & 127, (s >> 1) & 7)];
        const float c0 = s & 1 ? c.z : c.x, c1 = s & 1 ? c.w : c.y;
        return energy(c0, s & 0x8000 ? -c1 : c1, x.x, x.y);
    }

    // The least of one number from every thread: its choice, the same in every thread.
    __device__ int least(float cost, int choice) {
        const u32 bits = __float_as_uint(cost);  // costs are not negative
        const u32 best = __reduce_min_sync(0xffffffffu, bits);
        const u32 at = __reduce_min_sync(0xffffffffu, bits == best ? (u32)choice : 0xffffffffu);
        if (lane == 0) own.cost[warp] = __uint_as_float(best), own.choice[warp] = (int)at;
        barrier();
        float found = own.cost[0];
        int where = own.choice[0];
#pragma unroll
        for (int i = 1; i < WARPS; i++)
            if (own.cost[i] < found || (own.cost[i] == found && own.choice[i] < where))
                found = own.cost[i], where = own.choice[i];
        return where;
    }

    __device__ void load_weights(int tile, int roll) {
        const float *from = arg.w + (size_t)tile * arg.steps * 2;
        for (int t = id; t < arg.steps; t += GROUP) {
            const int source = (t + roll) % arg.steps;
            w[t] = make_float2(from[2 * source + first], from[2 * source + 1 - first]);
        }
    }

    // All messages; those of t = from, from + 2, ... into kept. The last one is in message[N % 2].
    __device__ void sweep(int pin, int from) {
        for (int u = id; u < OVERLAPS; u += GROUP)
            own.message[0][place(u)] = pin < 0 || u == pin ? 0.0f : 1e30f;
        barrier();
        const int column = swizzle(a);
        const int at = place(a), at_m = 15 * 256 + place(255 - a);
        for (int t = 0; t < arg.steps; t++) {
            const float *in = own.message[t & 1];
            float2 *out = (float2 *)own.message[1 - (t & 1)];
            if (t >= from && (t - from) % 2 == 0) {
                float4 *row = (float4 *)(kept + (size_t)((t - from) / 2) * OVERLAPS);
#pragma unroll
                for (int i = 0; i < OVERLAPS / 4 / GROUP; i++)
                    row[i * GROUP + id] = ((const float4 *)in)[i * GROUP + id];
            }
            float A[16], M[16];
#pragma unroll
            for (int hi = 0; hi < 16; hi++) A[hi] = in[at + hi * 256], M[hi] = in[at_m - hi * 256];
            const float w0 = w[t].x, w1 = w[t].y;
#pragma unroll 1
            for (int i = 0; i < 8 / PARTS; i++) {
                const int q = part * (8 / PARTS) + i;
                const float4 *codewords = table + table_index(0, a, q);
                float o[2] = {1e30f, 1e30f}, m[2] = {1e30f, 1e30f};
#pragma unroll
                for (int hi = 0; hi < 8; hi++) {
                    const float4 c = codewords[hi * 1024];
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const float plus = energy(j ? c.z : c.x, j ? c.w : c.y, w0, w1);
                        const float minus = energy(j ? c.z : c.x, j ? -c.w : -c.y, w0, w1);
                        o[j] = fminf(o[j], fminf(A[hi] + plus, A[hi + 8] + minus));
                        m[j] = fminf(m[j], fminf(M[hi] + plus, M[hi + 8] + minus));
                    }
                }
                out[8 * a + (q ^ column)] = make_float2(o[0], o[1]);
                out[8 * (255 - a) + (q ^ column)] = make_float2(m[1], m[0]);
            }
            barrier();
        }
    }

    __device__ void fetch(int row) {  // of kept, into message[row % 2]
        const float4 *source = (const float4 *)(kept + (size_t)row * OVERLAPS);
        float4 *to = (float4 *)own.message[row & 1];
#pragma unroll
        for (int i = 0; i < OVERLAPS / 4 / GROUP; i++)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                             address(to + i * GROUP + id)),
                         "l"(source + i * GROUP + id)
                         : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
    }

    // The best path back to step from; returns its overlap there. Writes the states if asked to.
    __device__ int way_back(int pin, int from, int *states) {
        const int N = arg.steps;
        int v = pin;
        if (pin < 0) {
            const float *last = own.message[N & 1];
            float cost = 3e38f;
            int choice = 0;
            for (int u = id; u < OVERLAPS; u += GROUP)
                if (last[place(u)] < cost) cost = last[place(u)], choice = u;
            v = least(cost, choice);
        }
        barrier();
        int row = (N - 1 - from) / 2;
        fetch(row);
        for (; row >= 0; row--) {
            if (row > 0) {
                fetch(row - 1);
                asm volatile("cp.async.wait_group 1;" ::: "memory");
            } else {
                asm volatile("cp.async.wait_group 0;" ::: "memory");
            }
            barrier();
            const float *message = own.message[row & 1];
            const int t = from + 2 * row;
            const bool two = t + 1 < N;
            const int last = two ? id >> 4 : id;  // the top bits of the last state of one or two
            const int s1 = (last & 15) << 12 | v, u1 = s1 >> 4;
            const int s2 = (id & 15) << 12 | u1, u2 = s2 >> 4;
            float cost = 3e38f;
            if (two && id < 256)
                cost = message[place(u2)] + energy_of_state(s2, w[t]) + energy_of_state(s1, w[t + 1]);
            else if (!two && id < 16)
                cost = message[place(u1)] + energy_of_state(s1, w[t]);
            const int choice = least(cost, id);
            const int top = two ? choice >> 4 : choice;
            const int best = top << 12 | v;
            v = best >> 4;
            if (two) {
                const int before = (choice & 15) << 12 | v;
                v = before >> 4;
                if (states && id == 0) states[t] = before, states[t + 1] = best;
            } else if (states && id == 0) {
                states[t] = best;
            }
            barrier();
        }
        return v;
    }

    __device__ void run() {
        const int N = arg.steps;
        while (true) {
            if (id == 0) own.tile = atomicAdd(arg.next, 1);
            barrier();
            const int tile = own.tile;
            if (tile >= arg.tiles) return;
            int pin = -1;
            if (arg.ends == PINNED) pin = (int)arg.pins[tile];
            if (arg.ends == TAIL_BITING) {
                load_weights(tile, N / 2);
                barrier();
                const int seam = N - N / 2;
                sweep(-1, seam);
                pin = way_back(-1, seam, nullptr);
                barrier();
            }
            load_weights(tile, 0);
            barrier();
            sweep(pin, 0);
            way_back(pin, 0, arg.states + (size_t)tile * N);
            barrier();
        }
    }
};

template <int GROUP, int GROUPS>
__device__ __forceinline__ void block(const Arguments &arg) {
    extern __shared__ float4 shared[];
    Group *groups = (Group *)(shared + QUARTER / 2);
    float2 *weights = (float2 *)(groups + GROUPS);
    const Symmetry symmetry = load_table(shared, arg.codebook);
    if (symmetry == NONE) {
        if (blockIdx.x == 0 && threadIdx.x == 0) *arg.left = arg.tiles;
        return;
    }
    __syncthreads();
    const int group = threadIdx.x / GROUP, id = threadIdx.x % GROUP;
    const int lane = id & 31, warp = id >> 5, rows = (arg.steps + 1) / 2;
    float *kept = arg.scratch + (size_t)(blockIdx.x * GROUPS + group) * rows * OVERLAPS;
    Worker<GROUP> worker = {
        arg, shared, groups[group], weights + group * arg.steps, kept, group, id, lane, warp,
        (warp & 3) * 32 + lane, warp >> 2, symmetry == FIRST_FLIPS,
    };
    worker.run();
}

// Two tiles at a time, for many tiles.
extern "C" __global__ void __launch_bounds__(512, 1) viterbi_many(const Arguments arg) {
    block<256, 2>(arg);
}

// One tile at a time, for fewer tiles than multiprocessors.
extern "C" __global__ void __launch_bounds__(1024, 1) viterbi_few(const Arguments arg) {
    block<1024, 1>(arg);
}
