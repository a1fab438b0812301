// Runs kernels on the host, one block after the other: g++ -DSOURCE=... -DKERNELS=... run.cpp
// kernels.cpp in a copy of cuda/ with this folder in it.

#include <cstdio>
#include <ucontext.h>
#include <vector>

#include "common.cuh"

Index threadIdx, blockIdx, blockDim, gridDim;
static constexpr int MOST = 1024, STACK = 1 << 17, ROOM = 227 * 1024;
alignas(128) char shared[ROOM];  // has its own type in every kernel

struct Range {  // of global memory; `written` by the kernel before this one
    const char *begin, *end;
    long long written;
};
struct Copy {
    u32 to;
    const void *from;
};
struct Fibre {
    ucontext_t context;
    std::vector<Copy> copies;  // on their way
    const void *told;
    bool done, kernel_before_ended;
    int barrier, turn;
};
static Fibre fibres[MOST];
static ucontext_t scheduler;
static void (*thread)(const void *);
static const void *parameter;
static int came[128], turns[128], shared_bytes;
static std::vector<Range> ranges;
static char fault[128];  // the first

static Fibre &self() { return fibres[threadIdx.x]; }
static bool checked(bool right, const char *otherwise) {
    if (!right && !*fault)
        snprintf(fault, sizeof fault, "%s: block %d, thread %d", otherwise, blockIdx.x,
                 threadIdx.x);
    return right;
}

char *shared_memory() { return shared; }
bool in_shared_memory(u32 from, int bytes) {
    return checked(from + bytes <= shared_bytes && from % bytes == 0,
                   "reads what it may not of shared memory");
}
bool in_global_memory(const void *from, int bytes) {
    bool found = false;
    for (const Range &range : ranges)
        found |= range.begin <= from && (const char *)from + bytes <= range.end &&
                 (!range.written || self().kernel_before_ended);
    return checked(found && (uintptr_t)from % bytes == 0, "reads what it may not of global memory");
}
void wait_for_the_kernel_before() { self().kernel_before_ended = true; }
void copy_later(u32 to, const void *from) {
    if (in_shared_memory(to, 16) && (!from || in_global_memory(from, 16)))
        self().copies.push_back({to, from});
}
void wait_for_own_copies() {
    static const char zeros[16] = {};
    for (const Copy &copy : self().copies)
        memcpy(shared + copy.to, copy.from ? copy.from : zeros, 16);
    self().copies.clear();
}

const void *&told_by(int lane) { return fibres[threadIdx.x / 32 * 32 + lane].told; }

static void leave() { swapcontext(&self().context, &scheduler); }

void wait_for(int barrier, int threads) {
    if (++came[barrier] == threads) {
        came[barrier] = 0;
        turns[barrier]++;
    } else {
        self().barrier = barrier;
        self().turn = turns[barrier];
        leave();
    }
}
static bool waits(const Fibre &fibre) {
    return fibre.barrier >= 0 && turns[fibre.barrier] == fibre.turn;
}

static void body() {
    thread(parameter);
    self().done = true;
    leave();
}

// Lets each thread of a warp run until it waits; whether any did.
static bool go_on(int warp, bool backwards) {
    bool any = false;
    for (int i = 0; i < 32; i++) {
        threadIdx.x = warp * 32 + (backwards ? 31 - i : i);
        if (self().done || waits(self())) continue;
        any = true;
        swapcontext(&scheduler, &self().context);
    }
    return any;
}

static void run_block(bool backwards) {
    static char *stacks = (char *)malloc((size_t)MOST * STACK);
    const int threads = blockDim.x;
    memset(shared, 0xff, sizeof shared);
    memset(came, 0, sizeof came);
    for (int i = 0; i < threads; i++) {
        Fibre &fibre = fibres[i];
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = stacks + (size_t)i * STACK;
        fibre.context.uc_stack.ss_size = STACK;
        makecontext(&fibre.context, body, 0);
        fibre.copies.clear();
        fibre.done = fibre.kernel_before_ended = false;
        fibre.barrier = -1;
    }
    for (bool any = true; any;) {
        any = false;
        for (int i = 0; i < threads / 32; i++) {
            const int warp = backwards ? threads / 32 - 1 - i : i;
            while (go_on(warp, backwards)) any = true;  // as far as it comes without the others
        }
    }
    for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
        checked(self().done, "waits for ever");
    threadIdx.x = -1;  // it could be any
    for (int i = shared_bytes; i < ROOM; i++)
        checked(shared[i] == (char)0xff, "writes beyond its shared memory");
}

// What was wrong, if anything.
extern "C" const char *launch(void (*started)(const void *), const void *structures, int blocks,
                              int threads, int bytes, int backwards, const Range *readable,
                              int count) {
    thread = started, parameter = structures;
    blockDim.x = threads, gridDim.x = blocks, shared_bytes = bytes;
    ranges.assign(readable, readable + count);
    *fault = 0;
    checked(bytes <= ROOM, "has too much shared memory");
    for (blockIdx.x = 0; blockIdx.x < blocks && !*fault; blockIdx.x++) run_block(backwards);
    return fault;
}
