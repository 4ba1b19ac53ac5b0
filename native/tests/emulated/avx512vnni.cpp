// The kernels of AVX-512 VNNI on any processor.
#define XL_EMULATED 1
#include "../../src/kernels/avx512vnni.cpp"
