// Compares the pieces that `piece_starts` finds in 64 bytes with those of `next_piece`, one by one,
// for random strings of characters that the split rules tell apart. Prints a hash for each rule,
// the same on all processors, and how many pieces came from windows; exits with 1 at a difference.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "bpe/piece.h"

using namespace xl::bpe;

static const char *const PARTS[] = {
    " ",    " ",   " ",   "  ",  "\n",  "\r",     "\t", "\v",   "\f",       "\x1c",  "'",
    "'s",   "'T",  "'re", "'LL", "'vE", "'d",     "''", "a",    "b",        "Word",  "z{",
    "`@[A", "1",   "23",  "4567", ".",  "!?",     "/:", "-",    "\xc2\xa0", "\xc3\xa9",
    "\xe4\xb8\x96", "\xc5\xbf", "'\xc5\xbf", "\xff", "\x7f", "\n\n", " \n ", "(b"};

template <Rule RULE>
static bool check(const char *name, const std::vector<std::string> &texts) {
    uint64_t hash = 1469598103934665603ull;
    size_t count = 0, by_window = 0;
    for (const std::string &text : texts) {
        const uint8_t *begin = reinterpret_cast<const uint8_t *>(text.data());
        const uint8_t *end = begin + text.size(), *at = begin;
        size_t found = 0;
        bool equal = true;
        for_each_piece<RULE>(
            begin, end, [](uint64_t) {},
            [&](const uint8_t *piece, size_t size, const Key &, uint64_t) {
                const uint8_t *next = at < end ? next_piece<RULE>(at, end) : end;
                equal = equal && piece == at && piece + size == next;
                at = next;
                hash = (hash ^ size) * 1099511628211ull;
                ++found;
            });
        if (!equal || at != end) {
            std::printf("%s: other pieces in a text of %zu bytes\n", name, text.size());
            return false;
        }
        count += found;
#if XL_BPE_WINDOWS
        if (text.size() >= 64) by_window += piece_starts<RULE>(begin, end) != 1;
#endif
    }
    std::printf("%s %zu pieces %016llx\n", name, count, static_cast<unsigned long long>(hash));
    std::fprintf(stderr, "%s: %zu of %zu texts begin with a window\n", name, by_window,
                 texts.size());
    return true;
}

int main() {
    std::mt19937 draw(5);
    std::vector<std::string> texts;
    constexpr unsigned KINDS = sizeof PARTS / sizeof *PARTS;
    for (int number = 0; number < 60000; ++number) {
        // few kinds in a text, so that long runs and rare neighbours both come up
        unsigned chosen[6];
        for (unsigned &kind : chosen) kind = draw() % KINDS;
        std::string text;
        const size_t wanted = 40 + draw() % 120;
        while (text.size() < wanted) text += PARTS[chosen[draw() % (1 + number % 6)]];
        texts.push_back(text);
    }
    const bool equal = check<Rule::LLAMA3>("llama3", texts) & check<Rule::GPT2>("gpt2", texts) &
                       check<Rule::QWEN2>("qwen2", texts) & check<Rule::SMOLLM>("smollm", texts);
    return equal ? EXIT_SUCCESS : EXIT_FAILURE;
}
