#include "kernels.h"
#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include "simd_neon.h"
#include "template.h"

namespace xl {
const Kernels *neon_dot_kernels() {
    static const Kernels kernels = table<Neon<true>>("neon_dot");
    return &kernels;
}
}  // namespace xl
#else
const xl::Kernels *xl::neon_dot_kernels() { return nullptr; }
#endif
