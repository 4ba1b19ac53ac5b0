// The choice of kernels, once per process.
#pragma once

#include "kernels/kernels.h"

namespace xl {

// The fastest kernels that this processor runs, or those that `name` names. Throws if the processor
// or this build lacks them. An empty name chooses.
const Kernels &kernels_named(const char *name);

// Names of the kernels that this processor runs, separated by spaces, fastest first.
const char *kernels_available();

}  // namespace xl
