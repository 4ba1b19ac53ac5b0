// The kernels of AMX on any processor.
#define XL_EMULATED 1
#include "../../src/kernels/amx.cpp"
