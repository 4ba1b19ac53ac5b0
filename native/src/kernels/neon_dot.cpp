#include "kernels.h"
const xl::Kernels *xl::neon_dot_kernels() { return nullptr; }
