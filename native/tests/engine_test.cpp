// The engine through its C interface alone, for the sanitizers: `make native-sanitize`.
//
// A tiny random model runs random operations on several sequences. Each sequence's tokens are known, so
// what an operation returns must have the bits of a run of those tokens one at a time, in a context
// of one thread. By hand: engine_test [ROUNDS]
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "xinslm.h"

namespace {

constexpr int kHidden = 64, kFfn = 96, kLayers = 2, kHeads = 4, kKeyHeads = 2, kHeadSize = 24, kVocabulary = 70;
constexpr int kPositions = 700;

using Tokens = std::vector<int32_t>;
using Random = std::mt19937;

void require(bool holds, const std::string &what) {
    if (holds) return;
    std::fprintf(stderr, "%s (last error: %s)\n", what.c_str(), xl_last_error());
    std::exit(1);
}

int below(Random &random, int count) { return static_cast<int>(random() % static_cast<unsigned>(count)); }

// Model -------------------------------------------------------------------------------------------

// A random weight of llama.cpp's type 0, 2 or 8.
std::vector<uint8_t> weight(Random &random, int type, int rows, int columns) {
    std::vector<uint8_t> out;
    if (type == 0) {
        for (int i = 0; i < rows * columns; i++) {
            const float value = (rows == 1 ? 1.0f : 0.0f) + 0.1f * (static_cast<float>(below(random, 2001)) / 1000 - 1);
            const auto *bytes = reinterpret_cast<const uint8_t *>(&value);
            out.insert(out.end(), bytes, bytes + 4);
        }
        return out;
    }
    const int codes = type == 2 ? 16 : 32;
    for (int i = 0; i < rows * columns / 32; i++) {
        const int scale = (type == 2 ? 0x2800 : 0x1800) + below(random, 1024);  // float16, about 0.04 or 0.003
        out.push_back(static_cast<uint8_t>(scale)), out.push_back(static_cast<uint8_t>(scale >> 8));
        for (int c = 0; c < codes; c++) out.push_back(static_cast<uint8_t>(below(random, 256)));
    }
    return out;
}

struct Place {
    int role, type, rows, columns;
};

const Place kPlaces[] = {
    {XL_ATTENTION_NORM, 0, 1, kHidden},
    {XL_Q, 2, kHeads *kHeadSize, kHidden},
    {XL_K, 8, kKeyHeads *kHeadSize, kHidden},
    {XL_V, 0, kKeyHeads *kHeadSize, kHidden},
    {XL_O, 2, kHidden, kHeads *kHeadSize},
    {XL_Q_BIAS, 0, 1, kHeads *kHeadSize},
    {XL_O_BIAS, 0, 1, kHidden},
    {XL_K_NORM, 0, 1, kHeadSize},
    {XL_FFN_NORM, 0, 1, kHidden},
    {XL_GATE, 2, kFfn, kHidden},
    {XL_UP, 8, kFfn, kHidden},
    {XL_DOWN, 2, kHidden, kFfn},
};

class Model {
  public:
    explicit Model(int window) {
        const xl_shape shape = {kLayers,     kHidden,    kFfn,   kHeads, kKeyHeads, kHeadSize,
                                kVocabulary, kPositions, window, 0,      1e-5f};
        std::vector<float> frequencies;
        for (int i = 0; i < kHeadSize / 2; i++) frequencies.push_back(1.0f / static_cast<float>(1 + 2 * i));
        handle = xl_model_new(&shape, frequencies.data());
        require(handle, "the model was refused");
        Random random(17);
        set(random, 0, {XL_EMBEDDING, 8, kVocabulary, kHidden});
        set(random, 0, {XL_HEAD, 2, kVocabulary, kHidden});
        set(random, 0, {XL_FINAL_NORM, 0, 1, kHidden});
        require(xl_model_bytes(handle) == -1, "a model without layers is complete");
        for (int layer = 0; layer < kLayers; layer++)
            for (const Place &place : kPlaces) set(random, layer, place);
        require(xl_model_bytes(handle) > 0, "the model is not complete");
    }
    ~Model() { xl_model_free(handle); }
    Model(const Model &) = delete;
    Model &operator=(const Model &) = delete;

    // Points the matrices of layers to the packed bytes of another model.
    void use(const Model &other) {
        for (int layer = 0; layer < kLayers; layer++)
            for (const Place &place : kPlaces) {
                if (place.rows == 1) continue;
                const uint8_t *data = nullptr;
                const int64_t bytes = xl_model_packed(other.handle, layer, place.role, &data);
                require(bytes > 0 && data, "a matrix has no packed bytes");
                require(!xl_model_use(handle, layer, place.role, place.rows, place.columns, data, bytes),
                        "packed bytes were refused");
                require(xl_model_use(handle, layer, place.role, place.rows, place.columns, data + 32, bytes) == -1,
                        "packed bytes off a cache line were taken");
                require(xl_model_use(handle, layer, place.role, place.rows, place.columns, data, bytes - 1) == -1,
                        "packed bytes of another size were taken");
            }
    }

    xl_model *handle;

  private:
    void set(Random &random, int layer, const Place &p) {
        const auto data = weight(random, p.type, p.rows, p.columns);
        require(!xl_model_set(handle, layer, p.role, p.type, p.rows, p.columns, data.data(),
                              static_cast<int64_t>(data.size()), nullptr, 0),
                "a weight was refused");
    }
};

// Contexts ----------------------------------------------------------------------------------------

using Row = std::vector<float>;

class Context {
  public:
    Context(const Model &model, int threads, int int8_cache, int64_t max_tokens = 1 << 20)
        : handle(xl_context_new(model.handle, threads, "", int8_cache, max_tokens)) {
        require(handle, "the context was refused");
    }
    ~Context() { xl_context_free(handle); }
    Context(const Context &) = delete;
    Context &operator=(const Context &) = delete;

    int add(int parent = -1, int64_t length = 0) {
        const int made = xl_sequence_new(handle, parent, length);
        require(made >= 0, "a sequence was refused");
        return made;
    }

    // The logits at the wanted tokens; `by_states` takes the way over the last layer's outputs.
    std::vector<Row> extend(const Tokens &tokens, const Tokens &owners, const std::vector<uint8_t> &wanted,
                            bool by_states = false) {
        size_t count = 0;
        for (uint8_t mark : wanted) count += mark != 0;
        std::vector<float> states(count * kHidden + 1), logits(count * kVocabulary + 1);
        const auto size = static_cast<int32_t>(tokens.size());
        if (by_states) {
            require(!xl_extend_states(handle, size, tokens.data(), owners.data(), wanted.data(), states.data()),
                    "extend_states failed");
            require(!xl_logits(handle, static_cast<int64_t>(count), states.data(), logits.data()), "logits failed");
        } else {
            require(!xl_extend(handle, size, tokens.data(), owners.data(), wanted.data(), logits.data()),
                    "extend failed");
        }
        std::vector<Row> rows;
        for (size_t i = 0; i < count; i++)
            rows.emplace_back(logits.begin() + static_cast<long>(i * kVocabulary),
                              logits.begin() + static_cast<long>((i + 1) * kVocabulary));
        return rows;
    }

    // The logits after each token of a text, which goes in one token at a time.
    std::vector<Row> slowly(const Tokens &text) {
        const int sequence = add();
        std::vector<Row> rows;
        for (int32_t token : text) rows.push_back(extend({token}, {sequence}, {1})[0]);
        require(!xl_sequence_free(handle, sequence), "a sequence could not be freed");
        return rows;
    }

    xl_context *handle;
};

bool equal(const Row &a, const Row &b) { return !std::memcmp(a.data(), b.data(), a.size() * sizeof(float)); }

// Random operations -------------------------------------------------------------------------------

struct Sequence {
    int number;
    Tokens text;
    std::vector<Row> wanted;  // logits after each token
};

class Simulation {
  public:
    Simulation(const Model &model, int threads, int int8_cache, unsigned seed)
        : random_(seed), context_(model, threads, int8_cache), reference_(model, 1, int8_cache) {}

    void run(int rounds) {
        for (int i = 0; i < rounds; i++) {
            const int choice = below(random_, 10);
            if (live_.empty() || (choice == 0 && live_.size() < 6))
                live_.push_back({context_.add(), {}, {}});
            else if (choice <= 4)
                grow();
            else if (choice <= 6)
                branch();
            else if (choice == 7)
                rewind();
            else if (choice == 8)
                fail();
            else if (live_.size() > 2)
                remove();
            for (const Sequence &s : live_)
                require(xl_sequence_length(context_.handle, s.number) == static_cast<int64_t>(s.text.size()),
                        "a sequence has another length");
        }
        while (!live_.empty()) remove();
        require(!xl_cache_bytes(context_.handle, 0), "pages are in use after the last sequence");
    }

  private:
    size_t any() { return random_() % live_.size(); }

    void grow() {
        Tokens tokens, owners;
        std::vector<uint8_t> marks;
        std::vector<std::pair<size_t, size_t>> places;  // sequence and position of a wanted token
        const int pieces = 1 + below(random_, 4), most = below(random_, 8) ? 12 : 150;
        for (int p = 0; p < pieces; p++) {
            const size_t at = any();
            Sequence &s = live_[at];
            const int count = 1 + below(random_, most);
            for (int i = 0; i < count && s.text.size() < 300; i++) {
                tokens.push_back(below(random_, kVocabulary)), owners.push_back(s.number);
                marks.push_back(below(random_, 3) == 0);
                if (marks.back()) places.emplace_back(at, s.text.size());
                s.text.push_back(tokens.back());
            }
        }
        if (tokens.empty()) return;
        const auto rows = context_.extend(tokens, owners, marks, below(random_, 3) == 0);
        for (Sequence &s : live_) compute(s);
        for (size_t i = 0; i < rows.size(); i++)
            require(equal(rows[i], live_[places[i].first].wanted[places[i].second]), "logits have other bits");
    }

    void branch() {
        if (live_.size() >= 6) return;
        const Sequence &from = live_[any()];
        const auto length = random_() % (from.text.size() + 1);
        const int number = context_.add(from.number, static_cast<int64_t>(length));
        adopt(from, number, length);
    }

    void rewind() {
        Sequence &s = live_[any()];
        const auto length = random_() % (s.text.size() + 1);
        const int64_t kept = xl_sequence_rewind(context_.handle, s.number, static_cast<int64_t>(length));
        require(kept == static_cast<int64_t>(length) || kept == 0, "a sequence was rewound to another length");
        s.text.resize(static_cast<size_t>(kept)), s.wanted.resize(static_cast<size_t>(kept));
    }

    void fail() {
        const Sequence &s = live_[any()];
        const uint8_t marks[] = {1, 1};
        const int32_t outside[] = {3, kVocabulary}, good[] = {3, 4}, own[] = {s.number, s.number};
        const int32_t unknown[] = {s.number, 1000};
        float logits[2 * kVocabulary];
        require(xl_extend(context_.handle, 2, outside, own, marks, logits) == -1, "a token outside was taken");
        require(xl_extend(context_.handle, 2, good, unknown, marks, logits) == -1, "an unknown sequence was taken");
        require(xl_extend(context_.handle, 2, good, own, marks, nullptr) == -1, "logits went nowhere");
        require(xl_extend(context_.handle, INT32_MAX, good, own, marks, logits) == -1, "a huge count was taken");
        const auto length = static_cast<int64_t>(s.text.size());
        require(xl_sequence_rewind(context_.handle, s.number, length + 1) == -1, "a sequence was rewound forward");
        require(xl_sequence_new(context_.handle, s.number, length + 1) == -1, "a branch is longer than its parent");
    }

    void remove() {
        const size_t at = any();
        require(!xl_sequence_free(context_.handle, live_[at].number), "a sequence could not be freed");
        require(xl_sequence_length(context_.handle, live_[at].number) == -1, "a freed sequence is there");
        live_.erase(live_.begin() + static_cast<long>(at));
    }

    // A branch whose beginning the window has dropped is empty.
    void adopt(const Sequence &from, int number, size_t length) {
        const auto kept = static_cast<size_t>(xl_sequence_length(context_.handle, number));
        require(kept == length || kept == 0, "a branch has another length");
        Sequence made{number, from.text, from.wanted};
        made.text.resize(kept), made.wanted.resize(std::min(made.wanted.size(), kept));
        live_.push_back(made);
    }

    void compute(Sequence &s) {
        if (s.wanted.size() < s.text.size()) s.wanted = reference_.slowly(s.text);
    }

    Random random_;
    Context context_, reference_;
    std::vector<Sequence> live_;
};

// Single cases ------------------------------------------------------------------------------------

Tokens text_of(int length, unsigned seed) {
    Random random(seed);
    Tokens text;
    for (int i = 0; i < length; i++) text.push_back(below(random, kVocabulary));
    return text;
}

void full_cache(const Model &model) {
    Context context(model, 2, 0, 128), reference(model, 1, 0);
    const Tokens text = text_of(140, 1);
    const auto wanted = reference.slowly(text);
    const int first = context.add();
    context.extend(Tokens(text.begin(), text.begin() + 60), Tokens(60, first), std::vector<uint8_t>(60));
    const int second = context.add(first, 60);
    const Tokens both(80, second);
    const std::vector<uint8_t> marks(80);
    require(xl_extend(context.handle, 80, text.data() + 60, both.data(), marks.data(), nullptr) == -1,
            "more tokens were taken than the cache holds");
    require(xl_sequence_length(context.handle, second) == 60, "a failed call changed a sequence");
    for (int i = 60; i < 64; i++)
        require(equal(context.extend({text[static_cast<size_t>(i)]}, {second}, {1})[0], wanted[static_cast<size_t>(i)]),
                "logits after a failed call have other bits");
}

void packed_in_place(const Model &model) {
    Model other(0);
    other.use(model);
    Context a(model, 1, 0), b(other, 2, 0);
    const Tokens text = text_of(30, 2);
    const auto x = a.slowly(text), y = b.slowly(text);
    for (size_t i = 0; i < x.size(); i++) require(equal(x[i], y[i]), "a model used in place has other bits");
}

// Two threads on one context: each tries again while it is busy, and both get what they would alone.
void two_threads(const Model &model) {
    Context context(model, 2, 0), reference(model, 1, 0);
    const Tokens texts[] = {text_of(90, 3), text_of(90, 4)};
    const std::vector<Row> wanted[] = {reference.slowly(texts[0]), reference.slowly(texts[1])};
    const int numbers[] = {context.add(), context.add()};
    std::atomic<int> busy{0}, wrong{0};
    const auto started = std::chrono::steady_clock::now();
    const auto work = [&](int which) {
        std::vector<float> logits(90 * kVocabulary);
        const Tokens owners(90, numbers[which]);
        const std::vector<uint8_t> marks(90, 1);
        const auto again = [&](auto call) {
            while (call() < 0) {
                if (std::strncmp(xl_last_error(), "busy", 4)) wrong++;
                busy++;
                std::this_thread::yield();
            }
        };
        for (int round = 0; round < 5 || (!busy && round < 100000); round++) {
            if (std::chrono::steady_clock::now() - started > std::chrono::seconds(60)) return;
            again([&] { return xl_extend(context.handle, 90, texts[which].data(), owners.data(), marks.data(),
                                         logits.data()); });
            for (size_t i = 0; i < 90; i++)
                if (std::memcmp(&logits[i * kVocabulary], wanted[which][i].data(), kVocabulary * sizeof(float))) wrong++;
            again([&] { return xl_sequence_rewind(context.handle, numbers[which], 0); });
        }
    };
    std::thread other(work, 1);
    work(0);
    other.join();
    require(!wrong, "two threads on one context disturb each other");
    require(busy, "no call of two threads was refused as busy");
}

// Two contexts on one model, which nobody changes.
void two_contexts(const Model &model) {
    const Tokens text = text_of(80, 5);
    std::vector<Row> rows[2];
    const auto work = [&](int which) {
        Context context(model, 2, 1);
        rows[which] = context.slowly(text);
    };
    std::thread other(work, 1);
    work(0);
    other.join();
    for (size_t i = 0; i < text.size(); i++) require(equal(rows[0][i], rows[1][i]), "two contexts give other bits");
}

void sampling(const Model &model) {
    Context context(model, 1, 0);
    const Tokens text = text_of(20, 6);
    const Row logits = context.slowly(text).back();
    Random random(7);
    int32_t best = 0;
    for (int32_t i = 1; i < kVocabulary; i++)
        if (logits[static_cast<size_t>(i)] > logits[static_cast<size_t>(best)]) best = i;
    for (int i = 0; i < 300; i++) {
        const xl_sampling settings = {0.1f * static_cast<float>(below(random, 15)),
                                      0.05f * static_cast<float>(1 + below(random, 20)),
                                      0.1f * static_cast<float>(below(random, 5)), 1.0f, below(random, 80)};
        double log_probability = 1;
        const int32_t token = xl_sample(logits.data(), kVocabulary, &settings, text.data(),
                                        static_cast<int64_t>(text.size()), below(random, 1000) / 1000.0,
                                        &log_probability);
        require(token >= 0 && token < kVocabulary && log_probability <= 0, "a draw is out of range");
        require(settings.temperature > 0 || token == best, "the likeliest token was not taken");
    }
}

}  // namespace

int main(int argc, char **argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 60;
    std::printf("kernels: %s\n", xl_kernels());
    for (int window : {0, 9, 70}) {
        const Model model(window);
        unsigned seed = 1;
        for (int int8_cache : {0, 1})
            for (int threads : {1, 3}) Simulation(model, threads, int8_cache, seed++).run(rounds);
        std::printf("window %d: same bits\n", window);
    }
    const Model model(0);
    full_cache(model), packed_in_place(model), two_threads(model), two_contexts(model), sampling(model);
    std::printf("full cache, packed in place, two threads, two contexts, draws: as they must be\n");
    return 0;
}
