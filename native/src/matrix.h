// Weight matrices in the kernels' format, made from the rows of files.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "memory.h"

namespace xl {

// How a file stores rows. The first are llama.cpp's types and numbers; the last two have all codes
// of a matrix first and its float16 scales elsewhere, as the quantized folder has.
enum class Source : int {
    kF32 = 0,
    kF16 = 1,
    kQ4_0 = 2,
    kQ4_1 = 3,
    kQ8_0 = 8,
    kBF16 = 30,
    kQ4Split = 100,
    kQ8Split = 101,
};

struct Matrix {
    Format format = Format::kF32;
    size_t rows = 0, columns = 0;
    const uint8_t *data = nullptr;
    Memory<uint8_t> owned;

    size_t tiles() const { return (rows + kTileRows - 1) / kTileRows; }
    size_t tile_bytes() const;
    size_t bytes() const { return tiles() * tile_bytes(); }
    bool is_float() const { return format == Format::kF16 || format == Format::kF32; }
    const uint8_t *tile(size_t index) const { return data + index * tile_bytes(); }

    // Row `row` as float32 (columns,).
    void decode_row(size_t row, float *out) const;
};

// Packs `rows` x `columns` weights at `data` (`bytes` long; `scales` for the split sources). Rows are
// padded to whole tiles with zeros. Throws if the sizes do not agree.
Matrix pack(Source source, size_t rows, size_t columns, const uint8_t *data, size_t bytes,
            const uint16_t *scales, size_t scale_count);

// A matrix that is packed already, at `data`, a multiple of 64. Its format follows from its size;
// throws if none does.
Matrix packed_at(const uint8_t *data, size_t rows, size_t columns, size_t bytes);

}  // namespace xl
