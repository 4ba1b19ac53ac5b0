#include "kernels.h"
#if defined(__AVX2__)
#include "simd_avx2.h"
#include "template.h"

namespace xl {
const Kernels *avx2_kernels() {
    static const Kernels kernels = table<Avx2>("avx2");
    return &kernels;
}
}  // namespace xl
#else
const xl::Kernels *xl::avx2_kernels() { return nullptr; }
#endif
