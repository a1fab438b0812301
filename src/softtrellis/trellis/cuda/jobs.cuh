// Rows of activations to rotate, as rotation.cu describes it.

#pragma once

#include "types.cuh"

struct Parameters {
    const char *source;          // x [batch, features]; or float [splits, batch, width]
    char *target;                // float16 [batch, width]; or [batch, features]
    float *norms;                // [batch], the divisors of the rows
    const char *left, *right;    // packed signs of A (null: none) and B; transposed on the way out
    const char *signs;           // of channels, packed
    const char *scales, *bias;   // float16 [features] and [features], or null
    const char *scale;           // float, on the way out
    int batch, features, width;  // of a row without padding; from a padded row to the next
    int first, a, b;             // the transform takes channels first to first + a b
    int splits, slices, parts;   // shares to add up; blocks of a cluster; clusters of a row
    int part_tiles;              // runs of 16 rows of A that a cluster computes, a warp each
    int group_shift;             // 2^group_shift groups of 4 columns belong to a block
    int type, bias_type;         // of the activations and of the bias
    int by_four;                 // whether four channels can be read at once
    float factor;
    int first_block, unused;     // of the blocks of the grid that do this
};

struct Jobs {  // independent of each other
    Parameters of[4];

    __device__ __forceinline__ const Parameters &mine() const {
        int i = 0;
        while (i < 3 && (int)blockIdx.x >= of[i + 1].first_block) ++i;
        return of[i];
    }
};
