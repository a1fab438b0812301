// The loads of cuda/cluster.cuh for a build on the host.

#pragma once

#include "common.cuh"

inline void fetch_to_l2(const void *p) { in_global_memory(p, 1); }
inline u32 read_byte(const void *p) { return loaded<unsigned char>(p); }
inline unsigned short read_half(const void *p) { return loaded<unsigned short>(p); }
inline u32 read_word(const void *p) { return loaded<u32>(p); }
inline uint2 read_words2(const void *p) { return loaded<uint2>(p); }
inline uint4 read_words4(const void *p) { return loaded<uint4>(p); }
