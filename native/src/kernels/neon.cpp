#include "kernels.h"
#if defined(__aarch64__)
#include "simd_neon.h"
#include "template.h"

namespace xl {
const Kernels *neon_kernels() {
    static const Kernels kernels = table<Neon<false>>("neon");
    return &kernels;
}
}  // namespace xl
#else
const xl::Kernels *xl::neon_kernels() { return nullptr; }
#endif
