#include "simd_scalar.h"
#include "template.h"

namespace xl {
const Kernels *scalar_kernels() {
    static const Kernels kernels = table<Scalar>("scalar");
    return &kernels;
}
}  // namespace xl
