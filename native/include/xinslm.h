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
#define XL_ABI 5
XL_API int32_t xl_abi(void);

/* What went wrong in the last call of this thread that failed. */
XL_API const char *xl_last_error(void);

/* Names of the kernels that this processor runs, separated by spaces, fastest first. */
XL_API const char *xl_kernels(void);

/* A model ------------------------------------------------------------------------------------- */

typedef struct xl_shape {
    int32_t layers, hidden_size, ffn_size, heads, key_heads, head_size, vocabulary;
    int32_t positions;   /* longest context */
    int32_t window;      /* tokens that a token sees, itself included; 0: all */
    int32_t interleaved; /* rotary pairs are (2i, 2i + 1), as in LLaMA's GGUF; else (i, i + half) */
    float eps;           /* of RMSNorm */
} xl_shape;

enum {
    XL_EMBEDDING, XL_HEAD, XL_FINAL_NORM,
    XL_ATTENTION_NORM, XL_Q, XL_K, XL_V, XL_O, XL_FFN_NORM, XL_GATE, XL_UP, XL_DOWN,
    XL_Q_BIAS, XL_K_BIAS, XL_V_BIAS, XL_O_BIAS, XL_Q_NORM, XL_K_NORM, XL_ROLES
};

typedef struct xl_model xl_model;

/* `frequencies`: radians per position, head_size / 2 numbers. NULL for a shape out of range. */
XL_API xl_model *xl_model_new(const xl_shape *shape, const float *frequencies);
XL_API void xl_model_free(xl_model *model);

/* Copies one weight (rows, columns) into the layout of the kernels; a vector has one row. `type` is
 * llama.cpp's number of F32, F16, BF16, Q4_0, Q4_1 or Q8_0; or 100 and 101 for the codes of Q4_0 and
 * Q8_0 with `scales` (float16, `scale_count`) apart. 0, or -1. */
XL_API int32_t xl_model_set(xl_model *model, int32_t layer, int32_t role, int32_t type, int64_t rows,
                            int64_t columns, const uint8_t *data, int64_t bytes,
                            const uint16_t *scales, int64_t scale_count);

/* Uses a matrix that is packed already, in memory that must outlive the model (a map of a file) and
 * begins at a multiple of 64 bytes. */
XL_API int32_t xl_model_use(xl_model *model, int32_t layer, int32_t role, int64_t rows, int64_t columns,
                            const uint8_t *data, int64_t bytes);
/* Where the packed bytes of a matrix are; returns their number, or -1. */
XL_API int64_t xl_model_packed(const xl_model *model, int32_t layer, int32_t role, const uint8_t **data);

/* Bytes of the packed matrices; -1 with the name of a weight that is missing. */
XL_API int64_t xl_model_bytes(const xl_model *model);

/* Sequences on a model --------------------------------------------------------------------------- */

typedef struct xl_context xl_context;

/* `kernels`: a name of xl_kernels(), or "" for the fastest. `int8_cache`: keys and values as int8
 * instead of float16. `max_tokens`: most positions of all sequences together; memory is taken as they
 * grow. The model must outlive the context. */
XL_API xl_context *xl_context_new(const xl_model *model, int32_t threads, const char *kernels,
                                  int32_t int8_cache, int64_t max_tokens);
XL_API void xl_context_free(xl_context *context);
XL_API const char *xl_context_kernels(const xl_context *context);

/* A new sequence's number: empty, or with the first `length` tokens of `parent` (-1: none). */
XL_API int32_t xl_sequence_new(xl_context *context, int32_t parent, int64_t length);
XL_API int32_t xl_sequence_free(xl_context *context, int32_t sequence);
XL_API int64_t xl_sequence_length(const xl_context *context, int32_t sequence);

/* Shortens a sequence to `length` tokens. If the sliding window has dropped positions that the next
 * token would see, the sequence becomes empty. Returns the new length. */
XL_API int64_t xl_sequence_rewind(xl_context *context, int32_t sequence, int64_t length);

/* Appends tokens[i] to sequences[i], in order, and writes the logits after each token with wanted[i]
 * to `logits` (number of wanted tokens, vocabulary). All or nothing: after an error the sequences are
 * rewound to what they were, as by xl_sequence_rewind. One call at a time: a second one fails as
 * busy, also of the functions below and above that take a context. */
XL_API int32_t xl_extend(xl_context *context, int32_t count, const int32_t *tokens,
                         const int32_t *sequences, const uint8_t *wanted, float *logits);

/* As xl_extend, but writes the wanted tokens' states (number of wanted tokens, hidden_size): the
 * output of the last layer, before the final norm. */
XL_API int32_t xl_extend_states(xl_context *context, int32_t count, const int32_t *tokens,
                                const int32_t *sequences, const uint8_t *wanted, float *states);

/* The final norm and the head: states (count, hidden_size) to logits (count, vocabulary). */
XL_API int32_t xl_logits(xl_context *context, int64_t count, const float *states, float *logits);

/* Bytes of keys and values in use, and allocated. */
XL_API int64_t xl_cache_bytes(const xl_context *context, int32_t allocated);

/* Sampling ------------------------------------------------------------------------------------- */

typedef struct xl_sampling {
    float temperature, top_p, min_p, repetition_penalty;
    int32_t top_k;
} xl_sampling;

/* Draws a token from `logits` (vocabulary,) with a uniform number in [0, 1), after the tokens of
 * `seen`; its log-probability under the unfiltered distribution goes to *log_probability. -1 if a
 * logit is NaN or above all numbers. */
XL_API int32_t xl_sample(const float *logits, int32_t vocabulary, const xl_sampling *sampling,
                         const int32_t *seen, int64_t seen_count, double uniform,
                         double *log_probability);

/* Single functions, for tests ------------------------------------------------------------------- */

/* out (tokens, rows) = x (tokens, columns) times a matrix, as the kernels named compute it. */
XL_API int32_t xl_product(const char *kernels, int32_t type, int64_t rows, int64_t columns,
                          const uint8_t *data, int64_t bytes, const uint16_t *scales,
                          int64_t scale_count, const float *x, int64_t tokens, float *out);
/* Row `row` of a matrix that was packed, in float32. */
XL_API int32_t xl_decode_row(int32_t type, int64_t rows, int64_t columns, const uint8_t *data,
                             int64_t bytes, const uint16_t *scales, int64_t scale_count,
                             int64_t row, float *out);

#ifdef __cplusplus
}
#endif
#endif
