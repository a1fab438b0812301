// Blocks of a cluster that send numbers to each other, and loads that keep their place. In a launch
// without clusters sending is an illegal instruction, to the block itself too.

#pragma once

#include "common.cuh"

// Every thread of the cluster arrives, then waits: all blocks run then, their mailboxes set.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A mailbox (8 bytes of shared memory, by its address) counts the bytes that blocks of the cluster,
// this one included, send here. One thread sets it, before cluster_arrive; it serves once.
__device__ __forceinline__ void expect_mail(u32 mailbox, int bytes) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(mailbox) : "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(mailbox), "r"(bytes)
                 : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Returns when all that is expected has come.
__device__ __forceinline__ void wait_for_mail(u32 mailbox) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], 0;\n"
        "@!done bra again;\n}" ::"r"(mailbox)
        : "memory");
}

// The address, in the shared memory of the block of this rank, of what lies here in this block's.
__device__ __forceinline__ u32 address_in_block(u32 here, int rank) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    return there;
}

// Sends what is to lie at ``to`` in the block of this rank, whose mailbox counts it.
__device__ __forceinline__ void send(u32 to, int rank, u32 mailbox, uint4 x) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
        ::"r"(address_in_block(to, rank)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w),
        "r"(address_in_block(mailbox, rank))
        : "memory");
}

__device__ __forceinline__ void send(u32 to, int rank, u32 mailbox, u32 x) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                     address_in_block(to, rank)),
                 "r"(x), "r"(address_in_block(mailbox, rank))
                 : "memory");
}

// 16 bytes from global into shared memory; there after wait_for_copies and a barrier.
__device__ __forceinline__ void copy_async(u32 to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

__device__ __forceinline__ void fetch_to_l2(const void *p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// Loads past the L1 cache that the compiler moves over no barrier or wait.
__device__ __forceinline__ u32 read_byte(const void *p) {
    u32 x;
    asm volatile("ld.global.cg.u8 %0, [%1];" : "=r"(x) : "l"(p));
    return x;
}

__device__ __forceinline__ unsigned short read_half(const void *p) {
    unsigned short x;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(x) : "l"(p));
    return x;
}

__device__ __forceinline__ u32 read_word(const void *p) {
    u32 x;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(x) : "l"(p));
    return x;
}

__device__ __forceinline__ uint2 read_words2(const void *p) {
    uint2 x;
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));
    return x;
}

__device__ __forceinline__ uint4 read_words4(const void *p) {
    uint4 x;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(p));
    return x;
}
