// Prints what one set of kernels computes for fixed pseudo-random inputs, as hashes of the bits:
//
//     kernels_test avx2 > a; kernels_test scalar > b; cmp a b
//
// The sets must print the same text on every processor. Without an argument it prints the names of
// the sets that this program holds; whether the processor runs them is the caller's business.
// NaN has many bit patterns and processors choose differently, so all count as one.
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "guarded.h"
#include "half.h"
#include "kernels/kernels.h"

namespace {

using namespace xl;

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next() {  // splitmix64
        uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    int below(int count) { return static_cast<int>(next() % static_cast<uint64_t>(count)); }
    float uniform() { return static_cast<float>(next() >> 40) * 0x1p-23f - 1.0f; }

  private:
    uint64_t state_;
};

class Hash {
  public:
    void add(const float *values, size_t count) {
        for (size_t i = 0; i < count; i++) word(values[i] == values[i] ? bits_of(values[i]) : 0x7fc00000);
    }
    void add(const int32_t *values, size_t count) {
        for (size_t i = 0; i < count; i++) word(static_cast<uint32_t>(values[i]));
    }
    void add(const int8_t *values, size_t count) {
        for (size_t i = 0; i < count; i++) word(static_cast<uint8_t>(values[i]));
    }
    void add(const uint16_t *values, size_t count) {
        for (size_t i = 0; i < count; i++) word((values[i] & 0x7fff) > 0x7c00 ? 0x7e00u : values[i]);
    }
    bool operator==(const Hash &other) const { return state_ == other.state_; }
    void print(const std::string &name) const {
        std::printf("%-44s %016llx\n", name.c_str(), static_cast<unsigned long long>(state_));
    }

  private:
    void word(uint32_t value) {
        for (int i = 0; i < 4; i++, value >>= 8) state_ = (state_ ^ (value & 255)) * 0x100000001b3u;
    }
    uint64_t state_ = 0xcbf29ce484222325u;  // FNV-1a
};

const char *const kKinds[] = {"normal", "zeros", "tiny", "small", "huge", "infinite", "nan", "ties", "full"};

// Values of one kind; `full` and `ties` fill the range of the codes.
void fill(Random &random, const std::string &kind, float *out, size_t count) {
    for (size_t i = 0; i < count; i++) {
        const float u = random.uniform();
        out[i] = u * 3.0f;
        if (kind == "zeros") out[i] = i % 2 ? 0.0f : -0.0f;
        if (kind == "tiny") out[i] = u * 1e-40f;
        if (kind == "small") out[i] = u * 2e-5f;
        if (kind == "huge") out[i] = u * 1e30f;
        if (kind == "ties") out[i] = i % 32 ? static_cast<float>(random.below(255) - 127) / 2 : 127.0f;
        if (kind == "full") out[i] = u < 0 ? -127.0f : 127.0f;
    }
    if (kind == "infinite") out[count / 2] = std::numeric_limits<float>::infinity();
    if (kind == "nan") out[count - 1] = std::numeric_limits<float>::quiet_NaN();
}

uint16_t random_half(Random &random, bool odd) {
    if (odd) {
        const uint16_t special[] = {0, 0x8000, 1, 0x83ff, 0x7bff, 0x7c00, 0xfc00, 0x7e00};
        return special[random.below(8)];
    }
    return float_to_half(random.uniform() * 0.01f);
}

// Bytes of a tile. `full`: all codes are 15, or -128.
void fill_tile(Random &random, Format format, size_t columns, const std::string &kind, uint8_t *out) {
    const bool odd = kind == "odd";
    if (format == Format::kF32 || format == Format::kF16) {
        for (size_t i = 0; i < kTileRows * columns; i++) {
            const uint16_t half = random_half(random, odd);
            const float value = half_to_float(half);
            if (format == Format::kF16)
                std::memcpy(out + 2 * i, &half, 2);
            else
                std::memcpy(out + 4 * i, &value, 4);
        }
        return;
    }
    const size_t bytes = kBlockBytes[static_cast<int>(format)], codes = format == Format::kQ8 ? 512 : 256;
    for (size_t b = 0; b < columns / kBlock; b++, out += bytes) {
        for (size_t i = 0; i < codes; i++)
            out[i] = kind != "full" ? static_cast<uint8_t>(random.next()) : format == Format::kQ8 ? 0x80 : 0xff;
        for (size_t i = codes; i < bytes; i += 2) {
            const uint16_t half = random_half(random, odd);
            std::memcpy(out + i, &half, 2);
        }
    }
}

size_t tile_bytes(Format format, size_t columns) {
    if (format == Format::kF32) return 4 * kTileRows * columns;
    if (format == Format::kF16) return 2 * kTileRows * columns;
    return columns / kBlock * kBlockBytes[static_cast<int>(format)];
}

struct Tokens {
    Tokens(const Kernels &kernels, size_t count, size_t columns, const std::string &kind, Random &random)
        : width((columns + kBlock - 1) / kBlock * kBlock), codes(count * width), scales(count * width / kBlock),
          values(count * width), offsets(count * width / kBlock) {
        for (size_t t = 0; t < count; t++) {
            fill(random, kind, values.get() + t * width, columns);
            const size_t at = t * (width / kBlock);
            kernels.quantize(values.get() + t * width, width, codes.get() + t * width, scales.get() + at,
                             offsets.get() + at);
        }
    }
    Inputs view() const { return {codes.get(), scales.get(), offsets.get(), values.get(), width}; }

    size_t width;
    Guarded<int8_t> codes;
    Guarded<float> scales, values;
    Guarded<int32_t> offsets;
};

void quantize(const Kernels &kernels) {
    for (const char *kind : kKinds) {
        Hash hash;
        for (size_t columns : {32, 96, 576}) {
            Random random(columns);
            const Tokens tokens(kernels, 3, columns, kind, random);
            hash.add(tokens.codes.get(), tokens.codes.size());
            hash.add(tokens.scales.get(), tokens.scales.size());
            hash.add(tokens.offsets.get(), tokens.offsets.size());
        }
        hash.print(std::string("quantize ") + kind);
    }
}

// Fails if a token's result depends on how many tokens go through the kernel.
bool tiles(const Kernels &kernels) {
    const char *const formats[] = {"q4_0", "q4_1", "q8_0", "f16", "f32"};
    constexpr int kMost = 53;
    bool same = true;
    for (int f = 0; f < static_cast<int>(Format::kCount); f++) {
        const auto format = static_cast<Format>(f);
        const bool is_float = format == Format::kF16 || format == Format::kF32;
        for (const char *weights : {"random", "full", "odd"}) {
            for (const char *kind : kKinds) {
                Hash hash;
                for (size_t columns : {size_t{32}, size_t{96}, size_t{576}, size_t{33}}) {
                    if (!is_float && columns % kBlock) continue;
                    Random random(static_cast<uint64_t>(f) * 1000 + columns);
                    Guarded<uint8_t> tile(tile_bytes(format, columns));
                    fill_tile(random, format, columns, weights, tile.get());
                    const Tokens tokens(kernels, kMost, columns, kind, random);
                    Guarded<float> all(kMost * kTileRows);
                    kernels.tile[f](tile.get(), columns, tokens.view(), 0, kMost, all.get());
                    hash.add(all.get(), all.size());
                    const bool usual = !std::strcmp(kind, "normal") || !std::strcmp(kind, "full");
                    for (int count = 1; usual && count < kMost; count++) {
                        const int first = kMost - count;
                        Guarded<float> out(static_cast<size_t>(count) * kTileRows);
                        kernels.tile[f](tile.get(), columns, tokens.view(), first, count, out.get());
                        Hash a, b;
                        a.add(out.get(), out.size());
                        b.add(all.get() + first * kTileRows, out.size());
                        same = same && a == b;
                    }
                }
                hash.print(std::string("tile ") + formats[f] + " " + weights + " " + kind);
            }
        }
    }
    return same;
}

void norms(const Kernels &kernels) {
    for (const char *kind : kKinds) {
        Hash hash;
        for (size_t size : {16, 64, 576}) {
            Random random(size);
            Guarded<float> x(size), weight(size), out(size);
            fill(random, kind, x.get(), size);
            fill(random, "normal", weight.get(), size);
            kernels.rms_norm(x.get(), weight.get(), size, 1e-5f, out.get());
            hash.add(out.get(), size);
        }
        hash.print(std::string("rms_norm ") + kind);
    }
}

void gates(const Kernels &kernels) {
    Hash hash;
    Guarded<float> gate(16), up(16);
    Random random(7);
    for (int i = -12000; i < 12000; i += 16) {
        for (int j = 0; j < 16; j++) {
            gate[static_cast<size_t>(j)] = static_cast<float>(i + j) * 0.0101f;
            up[static_cast<size_t>(j)] = random.uniform();
        }
        kernels.silu_product(gate.get(), up.get());
        hash.add(gate.get(), 16);
    }
    for (const char *kind : kKinds) {
        fill(random, kind, gate.get(), 16);
        kernels.silu_product(gate.get(), up.get());
        hash.add(gate.get(), 16);
    }
    hash.print("silu_product");
}

template <class T>
void fill_cache(Random &random, bool odd, T *out, size_t count) {
    for (size_t i = 0; i < count; i++)
        out[i] = sizeof(T) == 1 ? static_cast<T>(random.below(255) - 127)
                                : static_cast<T>(float_to_half(random.uniform() * 2.0f));
    for (size_t i = 0; odd && i < 3; i++)
        out[static_cast<size_t>(random.below(static_cast<int>(count)))] = static_cast<T>(random_half(random, true));
}

// `kind` of the queries; but for the normal ones, a few keys and values are odd, too.
template <class T>
void attention(const Kernels &kernels, const char *name, const std::string &kind) {
    const bool odd = kind != "normal";
    for (int size : {16, 48, 64, 80, 128}) {
        Hash hash;
        const auto width = static_cast<size_t>(size), numbers = kPageTokens * width;
        for (int rows : {1, 2, 3, 4, 5, 9, 13, 24}) {
            Random random(static_cast<uint64_t>(size * 10 + rows));
            constexpr int kPages = kSpanTokens / kPageTokens;
            Guarded<T> keys(kPages * numbers), values(kPages * numbers);
            Guarded<float> key_scales(kSpanTokens), value_scales(kSpanTokens);
            const auto count = static_cast<size_t>(rows);
            Guarded<float> queries(count * width), outputs(count * width);
            std::vector<SoftmaxState> states(count);
            fill(random, kind, queries.get(), queries.size());
            fill_cache(random, odd, keys.get(), keys.size());
            fill_cache(random, odd, values.get(), values.size());
            for (size_t i = 0; i < kSpanTokens; i++) {
                key_scales[i] = 0.01f + 0.005f * random.uniform();
                value_scales[i] = 0.02f * random.uniform();
            }
            if (odd) key_scales[static_cast<size_t>(random.below(kSpanTokens))] = NAN;
            const bool int8 = sizeof(T) == 1;
            PageView pages[kPages];
            for (size_t i = 0; i < kPages; i++)
                pages[i] = {keys.get() + i * numbers, values.get() + i * numbers,
                            int8 ? key_scales.get() + i * kPageTokens : nullptr,
                            int8 ? value_scales.get() + i * kPageTokens : nullptr};
            // all rows alike, a step apart as in a prompt, or anything
            for (int way = 0; way < 3; way++) {
                std::vector<Range> seen;
                for (int r = 0; r < rows; r++) {
                    const int begin = random.below(kSpanTokens), end = random.below(kSpanTokens + 1);
                    seen.push_back(way == 0 ? Range{0, kSpanTokens} : way == 1 ? Range{r, 200 + r} : Range{begin, end});
                }
                kernels.attend[int8](pages, size, rows, queries.get(), seen.data(), states.data(), outputs.get());
                for (const SoftmaxState &state : states) hash.add(&state.largest, 1), hash.add(&state.total, 1);
                hash.add(outputs.get(), outputs.size());
            }
            for (size_t r = 0; r + 1 < count; r++)
                kernels.join(states[r], outputs.get() + r * width, states[r + 1], outputs.get() + (r + 1) * width,
                             size);
            for (const SoftmaxState &state : states) hash.add(&state.largest, 1), hash.add(&state.total, 1);
            hash.add(outputs.get(), outputs.size());
        }
        hash.print(std::string("attend ") + name + " head " + std::to_string(size) + " " + kind);
    }
}

void halves(const Kernels &kernels) {
    for (const char *kind : kKinds) {
        Random random(3);
        Guarded<float> x(256);
        Guarded<uint16_t> out(256);
        fill(random, kind, x.get(), 256);
        kernels.to_half(x.get(), 256, out.get());
        Hash hash;
        hash.add(out.get(), 256);
        hash.print(std::string("to_half ") + kind);
    }
}

}  // namespace

int main(int argc, char **argv) {
    const Kernels *sets[] = {scalar_kernels(),     avx2_kernels(), avxvnni_kernels(),
                             avx512vnni_kernels(), amx_kernels(),  neon_kernels(), neon_dot_kernels()};
    const Kernels *chosen = nullptr;
    for (const Kernels *set : sets) {
        if (!set) continue;
        if (argc < 2) std::printf("%s\n", set->name);
        if (argc == 2 && std::string(set->name) == argv[1]) chosen = set;
    }
    if (argc < 2) return 0;
    if (!chosen) return std::fprintf(stderr, "there are no kernels '%s' here\n", argv[1]), 2;
    quantize(*chosen);
    const bool same = tiles(*chosen);
    norms(*chosen);
    gates(*chosen);
    for (const char *kind : {"normal", "zeros", "huge", "infinite", "nan"}) {
        attention<uint16_t>(*chosen, "half", kind);
        attention<int8_t>(*chosen, "int8", kind);
    }
    halves(*chosen);
    if (!same) std::fprintf(stderr, "a token's result depends on the number of tokens\n");
    return same ? 0 : 1;
}
