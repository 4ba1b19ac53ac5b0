#include "kernels.h"
#if defined(__AVX512VNNI__) || (defined(_MSC_VER) && defined(__AVX512F__)) || defined(XL_EMULATED)
#include "simd_avx512.h"
#include "template.h"

namespace xl {
const Kernels *avx512vnni_kernels() {
    static const Kernels kernels = table<Avx512Vnni>("avx512vnni");
    return &kernels;
}
}  // namespace xl
#else
const xl::Kernels *xl::avx512vnni_kernels() { return nullptr; }
#endif
