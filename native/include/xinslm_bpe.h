/* BPE in the native library: encoding, decoding, learning merges. See xinslm.h for errors.
 *
 * Text is UTF-8; bytes that are not valid are encoded as they are, each as a character that is no
 * letter, number or white space. Objects can be used by several threads at once, except a learner.
 */
#ifndef XINSLM_BPE_H
#define XINSLM_BPE_H

#include "xinslm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Split rules: 0 LLaMA-3, 1 GPT-2, 2 Qwen2, 3 SmolLM. */

typedef struct xl_bpe xl_bpe;

/* An encoder, or NULL. `tokens`: the vocabulary's tokens, spelled in the byte alphabet, end to end
 * in `tokens_bytes` bytes of UTF-8; `lengths` in characters and `ids` have `num_tokens` entries.
 * `merges`: left and right tokens in turn, in the same form with 2 * `num_merges` lengths. With
 * `ignore_merges` a piece that is in the vocabulary is one token. */
XL_API xl_bpe *xl_bpe_new(const char *tokens, int64_t tokens_bytes, const uint32_t *lengths,
                          const uint32_t *ids, int64_t num_tokens, const char *merges,
                          int64_t merges_bytes, const uint32_t *merge_lengths, int64_t num_merges,
                          int32_t ignore_merges, int32_t rule, int64_t vocab_size);
/* An encoder that is ready, from the arrays of a GGUF file: `tokens` and `merges` as they are in the
 * file (each string after the 8 bytes of its length), `kinds` llama.cpp's kind of each token. NULL
 * also for what is allowed but rare: a token or a merge that is there twice, or is not UTF-8. */
XL_API xl_bpe *xl_bpe_of_gguf(const char *tokens, int64_t tokens_bytes, const int32_t *kinds,
                              int64_t num_tokens, const char *merges, int64_t merges_bytes,
                              int64_t num_merges, int32_t ignore_merges, int32_t rule);
/* A token that texts are searched for before they are split; control tokens are `special`. Only
 * before xl_bpe_ready. */
XL_API int32_t xl_bpe_add_token(xl_bpe *bpe, const char *content, int64_t size, uint32_t id,
                                int32_t special);
XL_API int32_t xl_bpe_ready(xl_bpe *bpe);
XL_API void xl_bpe_free(xl_bpe *bpe);

/* How many ids `out` must have room for. */
XL_API int64_t xl_bpe_capacity(int64_t bytes);
/* Encode texts; returns the number of ids in `out`, of type uint16 or uint32 (`id_bytes` 2 or 4).
 * Text i has ids offsets[i] to offsets[i + 1]. `search`: 0 no added tokens, 1 those that are not
 * special, 2 all. */
XL_API int64_t xl_bpe_encode(xl_bpe *bpe, const char *const *texts, const int64_t *sizes,
                             int64_t num_texts, int32_t threads, int32_t search, int32_t id_bytes,
                             void *out, int64_t capacity, int64_t *offsets);
/* Merges only, no split: the ids of one piece; returns how many, of which `capacity` are written.
 */
XL_API int64_t xl_bpe_encode_piece(xl_bpe *bpe, const char *piece, int64_t size, uint32_t *out,
                                   int64_t capacity);
/* The bytes of tokens; returns how many. The content of `out` is right if `capacity` was enough. */
XL_API int64_t xl_bpe_decode(xl_bpe *bpe, const int64_t *ids, int64_t num_ids, int32_t skip_special,
                             char *out, int64_t capacity);
/* Where the bytes of all tokens lie: token i in (*bytes)[(*offsets)[i]] to (*offsets)[i + 1]. They
 * belong to the encoder. Returns the number of tokens. */
XL_API int64_t xl_bpe_tokens(xl_bpe *bpe, const char **bytes, const uint32_t **offsets);

typedef struct xl_bpe_learner xl_bpe_learner;

XL_API xl_bpe_learner *xl_bpe_learner_new(int32_t rule);
XL_API void xl_bpe_learner_free(xl_bpe_learner *learner);
/* Count the pieces of texts, or one piece `count` times. */
XL_API int32_t xl_bpe_learner_texts(xl_bpe_learner *learner, const char *const *texts,
                                    const int64_t *sizes, int64_t num_texts, int32_t threads);
XL_API int32_t xl_bpe_learner_piece(xl_bpe_learner *learner, const char *piece, int64_t size,
                                    int64_t count);
/* End counting; returns the number of distinct pieces. `longest` token in bytes, 0: no limit. */
XL_API int64_t xl_bpe_learner_start(xl_bpe_learner *learner, int64_t min_frequency,
                                    int64_t longest);
/* Merge until there are `num_tokens` tokens, the 256 bytes included, or no pair is left; returns
 * the number of tokens. */
XL_API int64_t xl_bpe_learner_run(xl_bpe_learner *learner, int64_t num_tokens);
/* Copy the merges, left and right id in turn; returns how many merges there are. */
XL_API int64_t xl_bpe_learner_merges(xl_bpe_learner *learner, uint32_t *out, int64_t capacity);

#ifdef __cplusplus
}
#endif
#endif
