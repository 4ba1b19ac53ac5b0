#include "vocabulary.h"

#include <algorithm>
#include <numeric>
#include <queue>
#include <stdexcept>

namespace xl::bpe {

namespace {

constexpr size_t SHORT_SYMBOLS = 64;

size_t power_of_two(size_t least) {
    size_t size = 16;
    while (size < least) size *= 2;
    return size;
}

void append_utf8(std::string &text, uint32_t code) {  // below U+0800
    if (code < 0x80) {
        text += static_cast<char>(code);
    } else {
        text += static_cast<char>(0xC0 | code >> 6);
        text += static_cast<char>(0x80 | (code & 0x3F));
    }
}

std::string_view spell(const uint8_t *piece, size_t size, std::string &out) {
    out.clear();
    for (size_t i = 0; i < size; ++i) append_utf8(out, alphabet().code[piece[i]]);
    return out;
}

// The bytes that a token spells; false if it has another character.
bool unspell(std::string_view token, std::string &out) {
    out.clear();
    for (size_t i = 0; i < token.size(); ++i) {
        uint32_t code = static_cast<uint8_t>(token[i]);
        if (code >= 0x80) {
            if (code >= 0xE0 || i + 1 == token.size()) return false;
            code = (code & 0x1F) << 6 | (static_cast<uint8_t>(token[++i]) & 0x3F);
        }
        if (code >= 0x144 || alphabet().byte[code] < 0) return false;
        out += static_cast<char>(alphabet().byte[code]);
    }
    return true;
}

// Strict, as Python's: no surrogates, nothing beyond U+10FFFF, the shortest form.
bool is_utf8(std::string_view text) {
    for (size_t at = 0; at < text.size();) {
        const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
        const uint8_t lead = byte(at++);
        if (lead < 0x80) continue;
        const size_t more = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
        if (lead < 0xC2 || lead > 0xF4 || text.size() - at < more) return false;
        const uint8_t least = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        const uint8_t most = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        if (byte(at) < least || byte(at) > most) return false;
        for (size_t i = 1; i < more; ++i)
            if ((byte(at + i) & 0xC0) != 0x80) return false;
        at += more;
    }
    return true;
}

}  // namespace

Alphabet::Alphabet() {
    std::fill(std::begin(byte), std::end(byte), int16_t{-1});
    int others = 0;
    for (int value = 0; value < 256; ++value) {
        const bool printable = (value > 0x20 && value < 0x7F) || (value > 0xA0 && value != 0xAD);
        code[value] = static_cast<uint16_t>(printable ? value : 256 + others++);
        byte[code[value]] = static_cast<int16_t>(value);
    }
    std::iota(std::begin(in_order), std::end(in_order), uint8_t{0});
    std::sort(std::begin(in_order), std::end(in_order),
              [this](uint8_t a, uint8_t b) { return code[a] < code[b]; });
}

const Alphabet &alphabet() {
    static const Alphabet made;
    return made;
}

std::vector<std::string_view> cut_strings(const char *text, size_t bytes, const uint32_t *lengths,
                                          size_t count) {
    std::vector<std::string_view> strings;
    strings.reserve(count);
    size_t at = 0;
    for (size_t i = 0; i < count; ++i) {
        const size_t begin = at;
        for (uint32_t left = lengths[i]; left > 0; --left) {
            if (at >= bytes) throw std::invalid_argument("strings are shorter than their lengths");
            for (++at; at < bytes && (text[at] & 0xC0) == 0x80;) ++at;
        }
        strings.emplace_back(text + begin, at - begin);
    }
    if (at != bytes) throw std::invalid_argument("strings are longer than their lengths");
    return strings;
}

std::vector<std::string_view> cut_gguf_strings(const char *data, size_t bytes, size_t count) {
    std::vector<std::string_view> strings;
    if (count > bytes / 8) throw std::invalid_argument("there are fewer strings than their number");
    strings.reserve(count);
    size_t at = 0;
    for (size_t i = 0; i < count; ++i) {
        if (bytes - at < 8) throw std::invalid_argument("a string is cut off");
        uint64_t length = 0;
        for (size_t b = 0; b < 8; ++b)
            length |= uint64_t{static_cast<uint8_t>(data[at + b])} << 8 * b;
        at += 8;
        if (length > bytes - at) throw std::invalid_argument("a string is cut off");
        strings.emplace_back(data + at, static_cast<size_t>(length));
        if (!is_utf8(strings.back())) throw std::invalid_argument("a string is not UTF-8");
        at += static_cast<size_t>(length);
    }
    if (at != bytes) throw std::invalid_argument("there are more strings than their number");
    return strings;
}

void StringTable::reserve(size_t count) {
    slots_.assign(power_of_two(2 * count), {0, NO_ID});
    mask_ = slots_.size() - 1;
    entries_.reserve(count);
}

bool StringTable::add(std::string_view key, uint32_t value) {
    const uint64_t hash = hash_bytes(reinterpret_cast<const uint8_t *>(key.data()), key.size());
    size_t at = hash >> 20 & mask_;
    for (; slots_[at].entry != NO_ID; at = (at + 1) & mask_)
        if (slots_[at].hash == hash && entries_[slots_[at].entry].first == key) return false;
    slots_[at] = {hash, static_cast<uint32_t>(entries_.size())};
    entries_.emplace_back(key, value);
    return true;
}

uint32_t StringTable::find(std::string_view key) const {
    const uint64_t hash = hash_bytes(reinterpret_cast<const uint8_t *>(key.data()), key.size());
    for (size_t at = hash >> 20 & mask_; slots_[at].entry != NO_ID; at = (at + 1) & mask_)
        if (slots_[at].hash == hash && entries_[slots_[at].entry].first == key)
            return entries_[slots_[at].entry].second;
    return NO_ID;
}

Vocabulary::Vocabulary(std::string tokens, const uint32_t *lengths, const uint32_t *ids,
                       size_t count, std::string merges, const uint32_t *merge_lengths,
                       size_t num_merges, bool ignore_merges)
    : text_(std::move(tokens)), ids_(ids, ids + count), ignore_merges_(ignore_merges) {
    if (count >= NO_ID || num_merges >= NO_ID / 2)
        throw std::invalid_argument("the vocabulary is too large");
    text_.reserve(text_.size() + 64);  // never short, so that the views stay right when it is moved
    tokens_ = cut_strings(text_.data(), text_.size(), lengths, count);
    whole_.reserve(count);
    for (size_t i = 0; i < count; ++i) {
        if (ids[i] == NO_ID) throw std::invalid_argument("an id is too large");
        largest_ = std::max(largest_, ids[i]);
        whole_.add(tokens_[i], ids[i]);
    }
    find_bytes();
    reserve_merges(num_merges);
    const auto parts = cut_strings(merges.data(), merges.size(), merge_lengths, 2 * num_merges);
    for (size_t rank = 0; rank < num_merges; ++rank) {
        const std::string_view left = parts[2 * rank], right = parts[2 * rank + 1];
        const std::string_view both(left.data(), left.size() + right.size());  // they are adjacent
        const uint32_t joined = whole_.find(both);
        const uint32_t first = whole_.find(left), second = whole_.find(right);
        if (first == NO_ID || second == NO_ID || joined == NO_ID)
            throw std::invalid_argument("merge " + std::to_string(rank) +
                                        " has a token that is not in the vocabulary");
        add_merge(first, second, static_cast<uint32_t>(rank), joined);
    }
}

Vocabulary::Vocabulary(const std::vector<std::string_view> &tokens,
                       const std::vector<uint32_t> &ids,
                       const std::vector<std::string_view> &merges, const int32_t *kinds,
                       bool ignore_merges)
    : ids_(ids), ignore_merges_(ignore_merges) {
    constexpr int32_t kNormal = 1;
    size_t bytes = 0;
    for (const uint32_t id : ids) bytes += tokens[id].size();
    text_.reserve(bytes + 64);  // as above
    tokens_.reserve(ids.size());
    whole_.reserve(ids.size());
    for (const uint32_t id : ids) {
        text_ += tokens[id];
        tokens_.emplace_back(text_.data() + text_.size() - tokens[id].size(), tokens[id].size());
        largest_ = std::max(largest_, id);
        if (!whole_.add(tokens_.back(), id)) throw std::invalid_argument("a token is there twice");
    }
    find_bytes();
    reserve_merges(merges.size());
    std::string both;
    uint32_t rank = 0;
    const auto normal = [&](std::string_view token) {
        const uint32_t id = whole_.find(token);
        return id != NO_ID && kinds[id] == kNormal ? id : NO_ID;
    };
    for (const std::string_view merge : merges) {
        const size_t space = merge.find(' ');
        if (space == merge.npos || merge.find(' ', space + 1) != merge.npos)
            throw std::invalid_argument("a merge is not two tokens");
        both.assign(merge.substr(0, space)).append(merge.substr(space + 1));
        const uint32_t first = normal(merge.substr(0, space));
        const uint32_t second = normal(merge.substr(space + 1)), joined = normal(both);
        if (first == NO_ID || second == NO_ID || joined == NO_ID) continue;
        if (!add_merge(first, second, rank++, joined))
            throw std::invalid_argument("a merge is there twice");
    }
}

void Vocabulary::find_bytes() {
    std::string spelled;
    for (int value = 0; value < 256; ++value) {
        const uint8_t byte = static_cast<uint8_t>(value);
        byte_id_[value] = whole_.find(spell(&byte, 1, spelled));
    }
}

void Vocabulary::reserve_merges(size_t count) {
    const size_t size = power_of_two(2 * count + 2);
    pairs_.resize(size);
    mask_ = size - 1;
    for (shift_ = 64; (size_t{1} << (64 - shift_)) < size;) --shift_;
}

bool Vocabulary::add_merge(uint32_t left, uint32_t right, uint32_t rank, uint32_t joined) {
    size_t at = slot_of(left, right);
    while (pairs_[at].rank != NO_ID && (pairs_[at].left != left || pairs_[at].right != right))
        at = (at + 1) & mask_;
    const bool is_new = pairs_[at].rank == NO_ID;
    pairs_[at] = {left, right, rank, joined};  // of two equal merges the last counts
    return is_new;
}

void Vocabulary::encode(const uint8_t *piece, size_t size, std::vector<uint32_t> &out) const {
    if (ignore_merges_) {
        thread_local std::string spelled;
        const uint32_t token = whole_.find(spell(piece, size, spelled));
        if (token != NO_ID) {
            out.push_back(token);
            return;
        }
    }
    if (size <= SHORT_SYMBOLS) {
        uint32_t symbols[SHORT_SYMBOLS];
        size_t count = 0;
        for (size_t i = 0; i < size; ++i)
            if (byte_id_[piece[i]] != NO_ID) symbols[count++] = byte_id_[piece[i]];
        merge_short(symbols, count, out);
        return;
    }
    std::vector<uint32_t> symbols;
    symbols.reserve(size);
    for (size_t i = 0; i < size; ++i)
        if (byte_id_[piece[i]] != NO_ID) symbols.push_back(byte_id_[piece[i]]);
    merge_long(symbols, out);
}

// Scans all pairs after each merge, which is fastest for words.
void Vocabulary::merge_short(uint32_t *symbols, size_t count, std::vector<uint32_t> &out) const {
    uint32_t ranks[SHORT_SYMBOLS], joined[SHORT_SYMBOLS];
    auto look = [&](size_t i) {
        const Found found = find(symbols[i], symbols[i + 1]);
        ranks[i] = found.rank;
        joined[i] = found.joined;
    };
    for (size_t i = 0; i + 1 < count; ++i) look(i);
    while (count > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < count; ++i)
            if (ranks[i] < ranks[best]) best = i;
        if (ranks[best] == NO_ID) break;
        symbols[best] = joined[best];
        const size_t moved = count - best - 2;
        std::memmove(symbols + best + 1, symbols + best + 2, moved * sizeof(uint32_t));
        if (moved > 0) {
            std::memmove(ranks + best, ranks + best + 1, moved * sizeof(uint32_t));
            std::memmove(joined + best, joined + best + 1, moved * sizeof(uint32_t));
        }
        --count;
        if (best > 0) look(best - 1);
        if (best + 1 < count) look(best);
    }
    out.insert(out.end(), symbols, symbols + count);
}

// A heap of (rank, place) over a linked list: n log n, also for 100,000 equal letters.
void Vocabulary::merge_long(std::vector<uint32_t> &symbols, std::vector<uint32_t> &out) const {
    struct Entry {
        uint32_t rank, left, right, joined;
        size_t at;
        bool operator<(const Entry &other) const {
            return rank != other.rank ? rank > other.rank : at > other.at;
        }
    };
    const size_t end = symbols.size();
    std::vector<size_t> next(end), previous(end);
    std::priority_queue<Entry> heap;
    auto push = [&](size_t at, size_t right) {
        const Found found = find(symbols[at], symbols[right]);
        if (found.rank != NO_ID)
            heap.push({found.rank, symbols[at], symbols[right], found.joined, at});
    };
    for (size_t i = 0; i < end; ++i) {
        next[i] = i + 1;
        previous[i] = i - 1;  // of the first: wraps to a place that is not below `end`
        if (i + 1 < end) push(i, i + 1);
    }
    while (!heap.empty()) {
        const Entry best = heap.top();
        heap.pop();
        const size_t at = best.at, right = next[at];
        // later merges can have taken either part
        if (right >= end || symbols[at] != best.left || symbols[right] != best.right) continue;
        symbols[at] = best.joined;
        symbols[right] = NO_ID;
        next[at] = next[right];
        next[right] = end;
        if (next[at] < end) {
            previous[next[at]] = at;
            push(at, next[at]);
        }
        if (previous[at] < end) push(previous[at], at);
    }
    for (const uint32_t symbol : symbols)
        if (symbol != NO_ID) out.push_back(symbol);
}

std::vector<std::string> Vocabulary::bytes_of_tokens(size_t vocab_size) const {
    std::vector<std::string> table(vocab_size);
    std::string spelled;
    for (size_t i = 0; i < tokens_.size(); ++i)
        if (ids_[i] < vocab_size)
            table[ids_[i]] = unspell(tokens_[i], spelled) ? spelled : std::string(tokens_[i]);
    return table;
}

}  // namespace xl::bpe
