// Matrix products of many tokens with AMX, whose registers are tiles of 16 rows of 64 bytes. One
// instruction multiplies 16 tokens with 16 rows of weights, which are packed as it wants them. All
// else is AVX-512, also the scales of the blocks. They take more time than the products, and the two do
// not overlap: the gain over VNNI is 1.6 with 256 tokens, 1.3 to 1.45 with 32, none with 16.
#include "kernels.h"
#if (defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__GNUC__)) || defined(XL_EMULATED)
#include "simd_avx512.h"
#include "template.h"
#if defined(__linux__) && !defined(XL_EMULATED)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace xl {
namespace {

using S = Avx512Vnni;
constexpr int kGroup = 16;           // tokens of a tile
constexpr int kFewest = 2 * kGroup;  // tokens that pay for unpacking the weights
constexpr size_t kPanel = 64;        // blocks whose codes are unpacked at once, 32 KB
constexpr size_t kCodes = 512;       // bytes of a block's unpacked codes: 8 rows of 64
constexpr size_t kAhead = 2;         // blocks between a product and the use of its sums
enum Register { kSums, kTokens, kWeights };

struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, unused[14] = {};
    uint16_t row_bytes[16] = {4 * kTileRows, kBlock, 4 * kTileRows};
    uint8_t rows[16] = {kGroup, kGroup, kBlock / 4};
};

#ifdef XL_EMULATED
inline void shape_tiles(const Shapes &shapes) { emulated::shape_tiles(shapes.row_bytes, shapes.rows); }
inline void release_tiles() { emulated::release_tiles(); }
template <int N>
inline void load_tile(const int8_t *from, size_t stride) { emulated::load_tile(N, from, stride); }
template <int N>
inline void store_tile(int32_t (*to)[kTileRows]) { emulated::store_tile(N, to, 64); }
inline void multiply_tiles() { emulated::multiply_tiles(kSums, kTokens, kWeights); }
inline bool may_use_tiles() { return true; }
#else
// Not the compiler's intrinsics, which do not say that they read memory: stores before them move after.
inline void shape_tiles(const Shapes &shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes)); }

// Empty tiles cost nothing when the system switches threads.
inline void release_tiles() { __asm__ volatile("tilerelease"); }

template <int N>
inline void load_tile(const int8_t *from, size_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                     : : "r"(from), "r"(stride), "i"(N), "m"(*reinterpret_cast<const int8_t(*)[]>(from)));
}

template <int N>
inline void store_tile(int32_t (*to)[kTileRows]) {
    __asm__ volatile("tilestored %%tmm%c3, (%1,%2,1)"
                     : "=m"(*reinterpret_cast<int32_t(*)[]>(to)) : "r"(to), "r"(size_t{64}), "i"(N));
}

// Sums in int32 of products of signed bytes.
inline void multiply_tiles() {
    __asm__ volatile("tilezero %%tmm%c0\n\ttdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0"
                     : : "i"(kSums), "i"(kTokens), "i"(kWeights));
}

// Linux saves the 8 KB of tiles for processes that have asked for it.
inline bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
    return false;
#endif
}
#endif

// Neighbouring blocks of one tile of weights.
struct Panel {
    const int8_t *codes;    // of the first block, a byte each
    size_t stride;          // bytes between the codes of two blocks
    const uint8_t *scales;  // of the first block
    size_t step;            // bytes between the scales of two blocks
    size_t first, blocks;
};

// 4-bit codes of blocks as signed bytes.
template <Format kFormat>
inline void unpack(const uint8_t *w, size_t blocks, int8_t *out) {
    const __m512i offset = _mm512_set1_epi8(kFormat == Format::kQ4 ? 8 : 0);
    for (size_t b = 0; b < blocks; b++, w += kBlockBytes[static_cast<int>(kFormat)], out += kCodes)
        for (int c = 0; c < 4; c++) {
            const S::Bytes pair = S::load_bytes(w + 64 * c);
            _mm512_storeu_si512(out + 64 * c, _mm512_sub_epi8(S::low_halves(pair), offset));
            _mm512_storeu_si512(out + 64 * (c + 4), _mm512_sub_epi8(S::high_halves(pair), offset));
        }
}

// Adds the products of a panel with 16 tokens, from `first` on, to out[16][16].
template <bool kMinima>
inline void panel_group(const Panel &panel, const Inputs &x, int first, float *out) {
    const size_t row = x.columns / kBlock, start = static_cast<size_t>(first) * row + panel.first;
    alignas(64) int32_t products[2 * kAhead][kGroup][kTileRows];
    float along[kMinima ? kGroup : 1][kPanel];  // a token's scale times the sum of its codes, for the minima
    for (int t = 0; kMinima && t < kGroup; t++)
        for (size_t b = 0; b < panel.blocks; b++) {
            const size_t at = start + static_cast<size_t>(t) * row + b;
            along[t][b] = x.scales[at] * (static_cast<float>(x.offsets[at]) * -0.125f);
        }
    const auto begin = [&](size_t b) {
        if (b >= panel.blocks) return;
        load_tile<kTokens>(x.codes + (start + b) * kBlock, x.columns);
        load_tile<kWeights>(panel.codes + b * panel.stride, 64);
        multiply_tiles();
        store_tile<kSums>(products[b % (2 * kAhead)]);
    };
    for (size_t b = 0; b < kAhead; b++) begin(b);
    Rows<float, kGroup> scales(x.scales + start, row);
    const uint8_t *halves = panel.scales;
    S::F sums[kGroup];
#pragma GCC unroll 16
    for (int t = 0; t < kGroup; t++) sums[t] = S::load(out + kTileRows * t);
    for (size_t b = 0; b < panel.blocks; b++, halves += panel.step, scales.advance(1)) {
        begin(b + kAhead);
        const S::F scale = S::load_half(halves);
#pragma GCC unroll 16
        for (int t = 0; t < kGroup; t++) {
            const S::F sum = S::to_float(_mm512_loadu_si512(products[b % (2 * kAhead)][t]));
            sums[t] = S::fma(sum, S::mul(scale, S::set(*scales[t])), sums[t]);
            if (kMinima) sums[t] = S::fma(S::load_half(halves + 32), S::set(along[t][b]), sums[t]);
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < kGroup; t++) S::store(out + kTileRows * t, sums[t]);
}

template <Format kFormat>
void amx_tile(const uint8_t *w, size_t columns, const Inputs &x, int first, int count, float *out) {
    constexpr size_t bytes = kBlockBytes[static_cast<int>(kFormat)];
    constexpr bool kMinima = kFormat == Format::kQ4M, kPacked = kFormat != Format::kQ8;
    const int grouped = count < kFewest ? 0 : count / kGroup * kGroup;
    if (grouped) {
        alignas(64) int8_t codes[kPacked ? kPanel * kCodes : 1];
        std::memset(out, 0, static_cast<size_t>(grouped) * kTileRows * sizeof(float));
        shape_tiles(Shapes());
        for (size_t done = 0; done < columns / kBlock; done += kPanel) {
            const uint8_t *from = w + done * bytes;
            const size_t blocks = lesser<size_t>(kPanel, columns / kBlock - done);
            Panel panel{reinterpret_cast<const int8_t *>(from), bytes, from + (kPacked ? 256 : 512), bytes, done, blocks};
            if constexpr (kPacked) {
                unpack<kFormat>(from, blocks, codes);
                panel.codes = codes, panel.stride = kCodes;
            }
            for (int at = 0; at < grouped; at += kGroup)
                panel_group<kMinima>(panel, x, first + at, out + kTileRows * at);
        }
        release_tiles();
    }
    const auto others = kPacked ? q4_tile<S, kMinima> : q8_tile<S>;
    if (grouped < count) others(w, columns, x, first + grouped, count - grouped, out + kTileRows * grouped);
}

constexpr Kernels amx_table() {
    Kernels all = table<S>("amx");
    all.tile[static_cast<int>(Format::kQ4)] = amx_tile<Format::kQ4>;
    all.tile[static_cast<int>(Format::kQ4M)] = amx_tile<Format::kQ4M>;
    all.tile[static_cast<int>(Format::kQ8)] = amx_tile<Format::kQ8>;
    return all;
}

}  // namespace

// Null where the system keeps no tiles for this process.
const Kernels *amx_kernels() {
    static constexpr Kernels kernels = amx_table();
    static const bool allowed = may_use_tiles();
    return allowed ? &kernels : nullptr;
}

}  // namespace xl
#else
const xl::Kernels *xl::amx_kernels() { return nullptr; }
#endif
