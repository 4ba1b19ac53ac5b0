#include "matrix.h"

#include <stdexcept>
#include <string>

#include "half.h"

namespace xl {
namespace {

constexpr size_t kChunk = 4;  // columns whose codes of one row are neighbours

uint16_t load16(const uint8_t *at) {
    uint16_t value;
    std::memcpy(&value, at, 2);
    return value;
}

// A safetensors file may put its numbers at any byte.
uint16_t split_scale(const uint16_t *scales, size_t index) {
    return load16(reinterpret_cast<const uint8_t *>(scales) + 2 * index);
}

void store16(uint8_t *at, uint16_t value) { std::memcpy(at, &value, 2); }

// One row's block of the file: where its codes, scale and minimum are.
struct Block {
    const uint8_t *codes;
    uint16_t scale, minimum;
};

Block block_of(Source source, const uint8_t *data, const uint16_t *scales, size_t index) {
    switch (source) {
        case Source::kQ4_0: return {data + 18 * index + 2, load16(data + 18 * index), 0};
        case Source::kQ4_1:
            return {data + 20 * index + 4, load16(data + 20 * index), load16(data + 20 * index + 2)};
        case Source::kQ8_0: return {data + 34 * index + 2, load16(data + 34 * index), 0};
        case Source::kQ4Split: return {data + 16 * index, split_scale(scales, index), 0};
        default: return {data + 32 * index, split_scale(scales, index), 0};
    }
}

Format format_of(Source source) {
    switch (source) {
        case Source::kQ4_0:
        case Source::kQ4Split: return Format::kQ4;
        case Source::kQ4_1: return Format::kQ4M;
        case Source::kQ8_0:
        case Source::kQ8Split: return Format::kQ8;
        case Source::kF16: return Format::kF16;
        case Source::kF32:
        case Source::kBF16: return Format::kF32;
    }
    throw std::runtime_error("unknown type of weights, number " + std::to_string(static_cast<int>(source)));
}

size_t source_bytes(Source source, size_t rows, size_t columns) {
    const size_t blocks = rows * (columns / kBlock);
    switch (source) {
        case Source::kQ4_0: return 18 * blocks;
        case Source::kQ4_1: return 20 * blocks;
        case Source::kQ8_0: return 34 * blocks;
        case Source::kQ4Split: return 16 * blocks;
        case Source::kQ8Split: return 32 * blocks;
        case Source::kF32: return 4 * rows * columns;
        default: return 2 * rows * columns;
    }
}

void pack_block(Format format, const Block &from, size_t row, uint8_t *to) {
    const size_t chunks = format == Format::kQ8 ? 8 : 4, scales = 64 * chunks;
    for (size_t c = 0; c < chunks; c++)
        std::memcpy(to + 64 * c + kChunk * row, from.codes + kChunk * c, kChunk);
    store16(to + scales + 2 * row, from.scale);
    if (format == Format::kQ4M) store16(to + scales + 32 + 2 * row, from.minimum);
}

void pack_float_row(Source source, const uint8_t *from, size_t columns, size_t row, uint8_t *to) {
    for (size_t c = 0; c < columns; c++) {
        if (source == Source::kF16) {
            std::memcpy(to + 2 * (kTileRows * c + row), from + 2 * c, 2);
        } else if (source == Source::kF32) {
            std::memcpy(to + 4 * (kTileRows * c + row), from + 4 * c, 4);
        } else {
            const float value = bfloat16_to_float(load16(from + 2 * c));
            std::memcpy(to + 4 * (kTileRows * c + row), &value, 4);
        }
    }
}

}  // namespace

size_t Matrix::tile_bytes() const {
    switch (format) {
        case Format::kF16: return 2 * kTileRows * columns;
        case Format::kF32: return 4 * kTileRows * columns;
        default: return columns / kBlock * kBlockBytes[static_cast<int>(format)];
    }
}

Matrix pack(Source source, size_t rows, size_t columns, const uint8_t *data, size_t bytes,
            const uint16_t *scales, size_t scale_count) {
    Matrix m;
    m.format = format_of(source), m.rows = rows, m.columns = columns;
    constexpr size_t most = size_t{1} << 31;
    if (!rows || !columns || rows >= most || columns >= most)
        throw std::runtime_error("a matrix of " + std::to_string(rows) + " x " + std::to_string(columns));
    if (!m.is_float() && columns % kBlock)
        throw std::runtime_error("rows of " + std::to_string(columns) + " codes are not whole blocks of 32");
    const bool split = source == Source::kQ4Split || source == Source::kQ8Split;
    if (bytes != source_bytes(source, rows, columns) ||
        (split ? !scales || scale_count != rows * (columns / kBlock) : scales || scale_count))
        throw std::runtime_error("the bytes of a matrix do not match its shape");
    m.owned = allocate<uint8_t>(m.bytes());
    m.data = m.owned.get();
    const size_t blocks = columns / kBlock, step = kBlockBytes[static_cast<int>(m.format)];
    for (size_t row = 0; row < rows; row++) {
        uint8_t *tile = m.owned.get() + row / kTileRows * m.tile_bytes();
        const size_t lane = row % kTileRows;
        if (m.is_float()) {
            pack_float_row(source, data + row * (bytes / rows), columns, lane, tile);
        } else {
            for (size_t b = 0; b < blocks; b++)
                pack_block(m.format, block_of(source, data, scales, row * blocks + b), lane, tile + step * b);
        }
    }
    return m;
}

Matrix packed_at(const uint8_t *data, size_t rows, size_t columns, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(data) % kAlignment)
        throw std::runtime_error("a packed matrix does not begin at a multiple of 64 bytes");
    Matrix m;
    m.rows = rows, m.columns = columns, m.data = data;
    for (int i = 0; i < static_cast<int>(Format::kCount); i++) {
        m.format = static_cast<Format>(i);
        if ((m.is_float() || columns % kBlock == 0) && m.bytes() == bytes) return m;
    }
    throw std::runtime_error(std::to_string(bytes) + " bytes are no packed matrix of " + std::to_string(rows) + " x " +
                             std::to_string(columns));
}

void Matrix::decode_row(size_t row, float *out) const {
    const uint8_t *from = tile(row / kTileRows);
    const size_t lane = row % kTileRows;
    if (is_float()) {
        for (size_t c = 0; c < columns; c++) {
            const size_t at = kTileRows * c + lane;
            if (format == Format::kF16)
                out[c] = half_to_float(load16(from + 2 * at));
            else
                std::memcpy(out + c, from + 4 * at, 4);
        }
        return;
    }
    for (size_t b = 0; b < columns / kBlock; b++, out += kBlock) {
        const size_t scales = format == Format::kQ8 ? 512 : 256;
        const float scale = half_to_float(load16(from + scales + 2 * lane));
        const float minimum =
            format == Format::kQ4M ? half_to_float(load16(from + scales + 32 + 2 * lane)) : 0.0f;
        for (size_t c = 0; c < kBlock; c++) {
            if (format == Format::kQ8) {
                const auto code = static_cast<int8_t>(from[64 * (c / 4) + kChunk * lane + c % 4]);
                out[c] = static_cast<float>(code) * scale;
                continue;
            }
            const uint8_t pair = from[64 * (c % 16 / 4) + kChunk * lane + c % 4];
            const int code = c < 16 ? pair & 15 : pair >> 4;
            out[c] = format == Format::kQ4M ? static_cast<float>(code) * scale + minimum
                                            : static_cast<float>(code - 8) * scale;
        }
        from += kBlockBytes[static_cast<int>(format)];
    }
}

}  // namespace xl
