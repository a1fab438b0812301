// Runs a kernel on the host, one block after the other: g++ -DSOURCE=... of a copy of cuda/ with this
// common.cuh in it.

#include <cstdlib>
#include <ucontext.h>

#include "common.cuh"
#include SOURCE

Index threadIdx, blockIdx, blockDim, gridDim;
float4 shared[227 * 64];

static constexpr int MOST = 1024, STACK = 1 << 17;
static ucontext_t scheduler, fibres[MOST];
static bool done[MOST];
static int came[128], turns[128];
static double told[MOST / 32][32];
static Arguments arguments;
static void (*kernel)(Arguments);

double &told_by(int lane) { return told[threadIdx.x / 32][lane]; }

static void leave() { swapcontext(&fibres[threadIdx.x], &scheduler); }

void wait_for(int barrier, int threads) {
    const int turn = turns[barrier];
    if (++came[barrier] == threads) {
        came[barrier] = 0;
        turns[barrier]++;
    }
    while (turns[barrier] == turn) leave();
}

static void body() {
    kernel(arguments);
    done[threadIdx.x] = true;
    while (true) leave();
}

static void run(void (*started)(Arguments), const void *parameter, int blocks, int threads,
                bool backwards) {
    static char *stacks = (char *)malloc((size_t)MOST * STACK);
    memcpy(&arguments, parameter, sizeof arguments);
    kernel = started, blockDim.x = threads, gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        memset(shared, 0xff, sizeof shared);
        memset(came, 0, sizeof came);
        for (int i = 0; i < threads; i++) {
            getcontext(&fibres[i]);
            fibres[i].uc_stack.ss_sp = stacks + (size_t)i * STACK;
            fibres[i].uc_stack.ss_size = STACK;
            makecontext(&fibres[i], body, 0);
            done[i] = false;
        }
        for (bool any = true; any;) {
            any = false;
            for (int i = 0; i < threads; i++) {
                threadIdx.x = backwards ? threads - 1 - i : i;
                if (done[threadIdx.x]) continue;
                any = true;
                swapcontext(&scheduler, &fibres[threadIdx.x]);
            }
        }
    }
}

#define KERNEL(name)                                                                         \
    extern "C" void run_##name(const void *parameter, int blocks, int threads, int backwards) { \
        run(name, parameter, blocks, threads, backwards);                                    \
    }
KERNELS
