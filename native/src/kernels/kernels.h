// What an instruction set provides. A kernel file fills one table; dispatch.cpp chooses.
//
// All tables compute the same bits: integer sums are exact, float sums have one order, and a product
// is fused with a sum exactly where the templates say so. Results do not depend on how many tokens
// go through a kernel at once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xl {

constexpr int kTileRows = 16;   // rows of a weight tile: the lanes of all kernels
constexpr int kBlock = 32;      // neighbouring columns with one scale
constexpr int kPageTokens = 64; // positions in a page of the key-value cache
constexpr int kSpanTokens = 8 * kPageTokens;  // keys of one partial softmax

// Formats of packed weights. A tile is 16 rows; its blocks follow each other.
//   kQ4   block of 288 bytes: 4 x 64 bytes of codes, 16 float16 scales. Byte 4 r + j of chunk c
//         holds the codes of row r: column 4 c + j in the low half, 16 + 4 c + j in the high half,
//         each plus 8.
//   kQ4M  the same with 16 float16 minima after the scales, 320 bytes (Q4_1): code * scale + minimum
//   kQ8   block of 544 bytes: 8 x 64 bytes of int8 codes (byte 4 r + j of chunk c is column 4 c + j
//         of row r), 16 float16 scales
//   kF16, kF32  [column][16 rows]
enum class Format : int { kQ4, kQ4M, kQ8, kF16, kF32, kCount };

constexpr size_t kBlockBytes[] = {288, 320, 544, 32 * kBlock, 64 * kBlock};

// Inputs of a matrix product, token by token. `codes` and `scales` are the inputs rounded to int8 in
// blocks of 32 (model/int8_inputs.py); `values` the unrounded ones, for float weights.
struct Inputs {
    int8_t *codes;
    float *scales;
    int32_t *offsets;  // -8 times the sum of a block's codes: 4-bit weights are stored plus 8
    float *values;
    size_t columns; // stride of codes and values, a multiple of 32; a token has columns / 32 scales
};

// One page of keys and values of one layer and key head. Either half or int8; int8 has scales.
struct PageView {
    const void *keys;         // [4][head size][16 positions]
    const void *values;       // [64 positions][head size]
    const float *key_scales;  // [64], int8 only
    const float *value_scales;
};

// Softmax over the keys so far, of one query.
struct SoftmaxState {
    float largest, total;  // the largest score, and the sum of exp(score - largest)
};

// Part of a span that a query sees: positions [begin, end).
struct Range {
    int begin, end;
};

struct Kernels {
    const char *name;
    // out[count][16] = the tile's rows times inputs [first, first + count)
    void (*tile[static_cast<int>(Format::kCount)])(const uint8_t *tile, size_t columns,
                                                   const Inputs &x, int first, int count, float *out);
    // codes, scales and offsets of `columns` values (a multiple of 32) of one token
    void (*quantize)(const float *values, size_t columns, int8_t *codes, float *scales,
                     int32_t *offsets);
    // RMSNorm of `size` values, which are padded with zeros to a multiple of 16 as is `weight`
    void (*rms_norm)(const float *x, const float *weight, size_t size, float eps, float *out);
    // gate[i] = silu(gate[i]) * up[i], 16 values
    void (*silu_product)(float *gate, const float *up);
    // Softmax states and outputs [rows][head size] of `rows` queries over a span of keys, of which
    // they see `seen[row]`. Page i holds the span's positions from 64 i on; it is read if a row sees
    // some of them. The head size is a multiple of 16. [0]: half, [1]: int8
    void (*attend[2])(const PageView *pages, int head_size, int rows, const float *queries,
                      const Range *seen, SoftmaxState *states, float *outputs);
    // Joins a state and output with those of later keys; all by the same formula.
    void (*join)(SoftmaxState &state, float *output, const SoftmaxState &later,
                 const float *later_output, int head_size);
    void (*to_half)(const float *values, size_t count, uint16_t *out);  // count: multiple of 16
};

const Kernels *scalar_kernels();
const Kernels *avx2_kernels();
const Kernels *avxvnni_kernels();
const Kernels *avx512vnni_kernels();
const Kernels *amx_kernels();
const Kernels *neon_kernels();
const Kernels *neon_dot_kernels();

}  // namespace xl
