#include "kernels.h"
#if defined(__AVXVNNI__) || (defined(_MSC_VER) && defined(__AVX2__)) || defined(XL_EMULATED)
#define XL_AVXVNNI 1
#include "simd_avx2.h"
#include "template.h"

namespace xl {
const Kernels *avxvnni_kernels() {
    static const Kernels kernels = table<AvxVnni>("avxvnni");
    return &kernels;
}
}  // namespace xl
#else
const xl::Kernels *xl::avxvnni_kernels() { return nullptr; }
#endif
