/* The C interface of the native library. Everything else in it is hidden.
 *
 * Functions that can fail return a negative number or NULL; xl_last_error() then has the reason, for
 * the calling thread. Text is UTF-8. Nothing here throws, exits or prints.
 */
#ifndef XINSLM_H
#define XINSLM_H

#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define XL_API __declspec(dllexport)
#else
#define XL_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Number of this interface; the Python side refuses another one. */
#define XL_ABI 1
XL_API int32_t xl_abi(void);

/* What went wrong in the last call of this thread that failed. */
XL_API const char *xl_last_error(void);

#ifdef __cplusplus
}
#endif
#endif
