/* Loads the library that is named, prints the kernels that the processor runs and the bits of a
 * product that the fastest of them computed. For runs under an emulator of older processors. */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "xinslm.h"

enum { ROWS = 17, COLUMNS = 64, TOKENS = 3, BYTES = ROWS * COLUMNS / 32 * 18, Q4_0 = 2 };

int main(int argc, char **argv) {
    void *library = argc == 2 ? dlopen(argv[1], RTLD_NOW) : NULL;
    if (!library) return fprintf(stderr, "%s\n", argc == 2 ? dlerror() : "usage: loads LIBRARY"), 2;
    const char *(*names)(void) = (const char *(*)(void))dlsym(library, "xl_kernels");
    int32_t (*product)(const char *, int32_t, int64_t, int64_t, const uint8_t *, int64_t,
                       const uint16_t *, int64_t, const float *, int64_t, float *);
    *(void **)&product = dlsym(library, "xl_product");
    static uint8_t weights[BYTES];
    static float x[TOKENS * COLUMNS], out[TOKENS * ROWS];
    for (int i = 0; i < BYTES; i++) weights[i] = (uint8_t)(i % 18 == 1 ? 0x20 : 37 * i + 11);
    for (int i = 0; i < TOKENS * COLUMNS; i++) x[i] = (float)(i * 29 % 101 - 50) / 7;
    if (product("", Q4_0, ROWS, COLUMNS, weights, BYTES, NULL, 0, x, TOKENS, out)) return 1;
    puts(names());
    for (int i = 0; i < TOKENS * ROWS; i++) {
        uint32_t bits;
        memcpy(&bits, out + i, sizeof bits);
        printf("%08x\n", bits);
    }
    return 0;
}
