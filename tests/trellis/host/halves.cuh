// cuda/halves.cuh for a build on the host.

#pragma once

#include "common.cuh"

typedef unsigned short u16;

// A float16's bits are those of a float that is 2^112 times smaller, but for infinities and NaN.
inline float of_half(u16 x) {
    const u32 rest = (x & 0x7fff) << 13;
    const bool finite = (x & 0x7c00) != 0x7c00;
    const float y = finite ? bits<float>(rest) * 0x1p112f : bits<float>(rest | 0x7f800000);
    return x & 0x8000 ? -y : y;
}

inline void of_halves(u32 pair, float &low, float &high) {
    low = of_half(pair & 0xffff), high = of_half(pair >> 16);
}

inline u16 to_half(double x) {
    const u16 sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return 0x7fff;
    if (fabs(x) >= 65520) return sign | 0x7c00;
    const double step = ldexp(1, max(ilogb(x), -14) - 10), y = nearbyint(fabs(x) / step) * step;
    return sign | bits<u32>((float)(y * 0x1p-112)) >> 13;
}

inline float of_bfloat(u16 x) { return bits<float>((u32)x << 16); }
inline u32 to_bfloats(float, float) { abort(); }
