// The kernels of AVX-VNNI on a processor with AVX2.
#define XL_EMULATED 1
#include "../../src/kernels/avxvnni.cpp"
