// The C interface of BPE: checks arguments, turns exceptions into results.
#include "xinslm_bpe.h"

#include <algorithm>
#include <memory>

#include "encoder.h"
#include "error.h"
#include "learn.h"

using namespace xl;
using namespace xl::bpe;

struct xl_bpe {
    Encoder encoder;
    bool ready;
};

struct xl_bpe_learner {
    Learner learner;
};

namespace {

size_t checked(int64_t number, const void *data, const char *what) {
    if (number < 0 || (number > 0 && data == nullptr))
        throw std::invalid_argument(std::string(what) + ": a negative number or no data");
    return static_cast<size_t>(number);
}

template <class Object>
Object &given(Object *object) {
    if (object == nullptr) throw std::invalid_argument("there is no object");
    return *object;
}

Encoder &encoder_of(xl_bpe *bpe) {
    if (!given(bpe).ready) throw std::logic_error("xl_bpe_ready was not called");
    return bpe->encoder;
}

const uint8_t *bytes(const char *text) { return reinterpret_cast<const uint8_t *>(text); }

const uint8_t *const *bytes(const char *const *texts) {
    return reinterpret_cast<const uint8_t *const *>(texts);
}

}  // namespace

xl_bpe *xl_bpe_new(const char *tokens, int64_t tokens_bytes, const uint32_t *lengths,
                   const uint32_t *ids, int64_t num_tokens, const char *merges,
                   int64_t merges_bytes, const uint32_t *merge_lengths, int64_t num_merges,
                   int32_t ignore_merges, int32_t rule, int64_t vocab_size) {
    return guarded(static_cast<xl_bpe *>(nullptr), [&] {
        const size_t count = checked(num_tokens, lengths, "tokens");
        checked(num_tokens, ids, "ids");
        const size_t pairs = checked(num_merges, merge_lengths, "merges");
        std::string text, parts;
        if (const size_t size = checked(tokens_bytes, tokens, "tokens")) text.assign(tokens, size);
        if (const size_t size = checked(merges_bytes, merges, "merges")) parts.assign(merges, size);
        if (vocab_size < 0) throw std::invalid_argument("vocab_size is negative");
        Vocabulary vocabulary(std::move(text), lengths, ids, count, std::move(parts), merge_lengths,
                              pairs, ignore_merges != 0);
        return new xl_bpe{Encoder(std::move(vocabulary), static_cast<Rule>(rule),
                                  static_cast<size_t>(vocab_size)),
                          false};
    });
}

xl_bpe *xl_bpe_of_gguf(const char *tokens, int64_t tokens_bytes, const int32_t *kinds,
                       int64_t num_tokens, const char *merges, int64_t merges_bytes,
                       int64_t num_merges, int32_t ignore_merges, int32_t rule) {
    return guarded(static_cast<xl_bpe *>(nullptr), [&] {
        constexpr int32_t kNormal = 1, kControl = 3, kUserDefined = 4;
        const size_t count = checked(num_tokens, kinds, "kinds");
        if (count >= NO_ID) throw std::invalid_argument("the vocabulary is too large");
        const auto contents = cut_gguf_strings(tokens, checked(tokens_bytes, tokens, "tokens"), count);
        const auto pairs = cut_gguf_strings(merges, checked(merges_bytes, merges, "merges"),
                                            checked(num_merges, merges, "merges"));
        size_t last = 0, size = 0;
        for (size_t id = 0; id < count; ++id) {
            if (kinds[id] < 1 || kinds[id] > 6) throw std::invalid_argument("an unknown kind of token");
            if (kinds[id] == kNormal) last = id;
            if (kinds[id] == kNormal || kinds[id] == kControl || kinds[id] == kUserDefined)
                size = id + 1;
        }
        std::vector<uint32_t> ids;  // of the vocabulary; what follows it is found in texts only
        const auto is_added = [&](size_t id) { return kinds[id] == kControl || kinds[id] == kUserDefined; };
        for (size_t id = 0; id < size; ++id)
            if (kinds[id] == kNormal || (is_added(id) && id < last))
                ids.push_back(static_cast<uint32_t>(id));
        Vocabulary vocabulary(contents, ids, pairs, kinds, ignore_merges != 0);
        for (size_t id = last; id < size; ++id)
            if (is_added(id) && vocabulary.has(contents[id]))
                throw std::invalid_argument("a token is there twice");
        std::unique_ptr<xl_bpe> bpe(
            new xl_bpe{Encoder(std::move(vocabulary), static_cast<Rule>(rule), size), false});
        for (const int32_t kind : {kControl, kUserDefined})
            for (size_t id = 0; id < size; ++id)
                if (kinds[id] == kind)
                    bpe->encoder.add_token(contents[id], static_cast<uint32_t>(id), kind == kControl);
        bpe->encoder.finish();
        bpe->ready = true;
        return bpe.release();
    });
}

int32_t xl_bpe_add_token(xl_bpe *bpe, const char *content, int64_t size, uint32_t id,
                         int32_t special) {
    return guarded(-1, [&] {
        const size_t length = checked(size, content, "content");
        if (given(bpe).ready) throw std::logic_error("the encoder is ready already");
        bpe->encoder.add_token({content, length}, id, special != 0);
        return 0;
    });
}

int32_t xl_bpe_ready(xl_bpe *bpe) {
    return guarded(-1, [&] {
        if (!given(bpe).ready) bpe->encoder.finish();
        bpe->ready = true;
        return 0;
    });
}

void xl_bpe_free(xl_bpe *bpe) { delete bpe; }

int64_t xl_bpe_capacity(int64_t bytes) {
    // jobs have at least 256 KiB each, the last can have less
    return bytes < 0 ? -1 : bytes + 8 * (bytes / (1 << 18) + 2);
}

int64_t xl_bpe_encode(xl_bpe *bpe, const char *const *texts, const int64_t *sizes,
                      int64_t num_texts, int32_t threads, int32_t search, int32_t id_bytes,
                      void *out, int64_t capacity, int64_t *offsets) {
    return guarded(int64_t{-1}, [&] {
        Encoder &encoder = encoder_of(bpe);
        const size_t count = checked(num_texts, texts, "texts");
        checked(num_texts, sizes, "sizes");
        const size_t room = checked(capacity, out, "out");
        if (offsets == nullptr) throw std::invalid_argument("there are no offsets");
        if (search < 0 || search > 2) throw std::invalid_argument("search must be 0, 1 or 2");
        const Search which = static_cast<Search>(search);
        const Batch batch =
            make_batch(bytes(texts), sizes, count, threads, encoder.can_cut(which));
        if (id_bytes == 2) {
            if (encoder.vocab_size() > 65536) throw std::invalid_argument("ids need 4 bytes");
            return static_cast<int64_t>(encoder.encode(
                batch, count, threads, which, static_cast<uint16_t *>(out), room, offsets));
        }
        if (id_bytes != 4) throw std::invalid_argument("id_bytes must be 2 or 4");
        return static_cast<int64_t>(encoder.encode(batch, count, threads, which,
                                                   static_cast<uint32_t *>(out), room, offsets));
    });
}

int64_t xl_bpe_encode_piece(xl_bpe *bpe, const char *piece, int64_t size, uint32_t *out,
                            int64_t capacity) {
    return guarded(int64_t{-1}, [&] {
        const size_t length = checked(size, piece, "piece");
        const auto ids = encoder_of(bpe).encode_piece(bytes(piece), length);
        const size_t room = checked(capacity, out, "out");
        std::copy_n(ids.begin(), std::min(room, ids.size()), out);
        return static_cast<int64_t>(ids.size());
    });
}

int64_t xl_bpe_decode(xl_bpe *bpe, const int64_t *ids, int64_t num_ids, int32_t skip_special,
                      char *out, int64_t capacity) {
    return guarded(int64_t{-1}, [&] {
        const size_t count = checked(num_ids, ids, "ids");
        const size_t room = checked(capacity, out, "out");
        return static_cast<int64_t>(encoder_of(bpe).decode(
            ids, count, skip_special != 0, reinterpret_cast<uint8_t *>(out), room));
    });
}

int64_t xl_bpe_tokens(xl_bpe *bpe, const char **content, const uint32_t **offsets) {
    return guarded(int64_t{-1}, [&] {
        const Encoder &encoder = encoder_of(bpe);
        given(content) = reinterpret_cast<const char *>(encoder.token_bytes().data());
        given(offsets) = encoder.token_at().data();
        return static_cast<int64_t>(encoder.vocab_size());
    });
}

xl_bpe_learner *xl_bpe_learner_new(int32_t rule) {
    return guarded(static_cast<xl_bpe_learner *>(nullptr),
                   [&] { return new xl_bpe_learner{Learner(static_cast<Rule>(rule))}; });
}

void xl_bpe_learner_free(xl_bpe_learner *learner) { delete learner; }

int32_t xl_bpe_learner_texts(xl_bpe_learner *learner, const char *const *texts,
                             const int64_t *sizes, int64_t num_texts, int32_t threads) {
    return guarded(-1, [&] {
        const size_t count = checked(num_texts, texts, "texts");
        checked(num_texts, sizes, "sizes");
        given(learner).learner.add_texts(bytes(texts), sizes, count, threads);
        return 0;
    });
}

int32_t xl_bpe_learner_piece(xl_bpe_learner *learner, const char *piece, int64_t size,
                             int64_t count) {
    return guarded(-1, [&] {
        given(learner).learner.add_piece(bytes(piece), checked(size, piece, "piece"), count);
        return 0;
    });
}

int64_t xl_bpe_learner_start(xl_bpe_learner *learner, int64_t min_frequency, int64_t longest) {
    return guarded(int64_t{-1}, [&] {
        if (longest < 0) throw std::invalid_argument("the longest token is negative");
        const auto limit = static_cast<uint32_t>(std::min<int64_t>(longest, UINT32_MAX));
        return static_cast<int64_t>(given(learner).learner.start(min_frequency, limit));
    });
}

int64_t xl_bpe_learner_run(xl_bpe_learner *learner, int64_t num_tokens) {
    return guarded(int64_t{-1}, [&] {
        if (num_tokens < 0) throw std::invalid_argument("the number of tokens is negative");
        return static_cast<int64_t>(given(learner).learner.run(static_cast<size_t>(num_tokens)));
    });
}

int64_t xl_bpe_learner_merges(xl_bpe_learner *learner, uint32_t *out, int64_t capacity) {
    return guarded(int64_t{-1}, [&] {
        const auto &merges = given(learner).learner.merges();
        const size_t room = checked(capacity, out, "out");
        std::copy_n(merges.begin(), std::min(room, merges.size()), out);
        return static_cast<int64_t>(merges.size() / 2);
    });
}
