// sequence operations and state of the depth cache, on one of the tiny models that `test-llama-archs -o DIR` writes
//
// usage: test-depth-seq DIR

#include "llama-depthkv.h"
#include "llama-kv-cache-depth.h"
#include "llama.h"
#include "test-device.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: check failed: %s (%s)\n", __FILE__, __LINE__, #x, llama_depthkv_last_error()); exit(1); } } while (0)

using context_ptr = std::unique_ptr<llama_context, decltype(&llama_free)>;
using logits_t    = std::vector<float>;

static std::string path_model;

static llama_model * model;

static context_ptr make_context(uint32_t n_seq_max, float budget, uint32_t n_cells = 0, ggml_type type_k = GGML_TYPE_F16, bool fa = false, uint32_t n_ctx_seq = 256, uint32_t n_ubatch = 32) {
    auto cparams = llama_context_default_params();

    cparams.n_ctx           = n_ctx_seq*n_seq_max;
    cparams.n_batch         = 128;
    cparams.n_ubatch        = n_ubatch;
    cparams.n_seq_max       = n_seq_max;
    cparams.n_threads       = 2;
    cparams.n_threads_batch = 2;
    cparams.type_k          = type_k;
    cparams.flash_attn_type = fa ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;

    auto depth = llama_depthkv_default_params();

    const std::vector<uint32_t> cells(llama_depthkv_layer_count(model), n_cells);
    if (n_cells > 0) {
        depth.n_layers = cells.size();
        depth.cells    = cells.data();
    }
    const std::string text = std::to_string(budget);
    depth.budget = budget == 0.0f ? nullptr : text.c_str();

    llama_context * ctx = budget == 0.0f && n_cells == 0 ? llama_init_from_model(model, cparams) : llama_depthkv_init_from_model(model, cparams, depth);
    CHECK(ctx);

    return { ctx, llama_free };
}

static std::vector<llama_token> make_tokens(int n, uint32_t seed) {
    std::mt19937 rng(seed);
    std::vector<llama_token> res(n);
    for (auto & t : res) {
        t = rng()%llama_vocab_n_tokens(llama_model_get_vocab(model));
    }
    return res;
}

// logits of the last token of each sequence, the sequences share one batch
static std::vector<logits_t> decode(llama_context * ctx, const std::vector<std::pair<llama_seq_id, std::vector<llama_token>>> & parts, llama_pos p0) {
    llama_batch batch = llama_batch_init(128, 0, 1);

    std::vector<int> last;
    for (const auto & [seq, tokens] : parts) {
        for (size_t i = 0; i < tokens.size(); ++i) {
            const int j = batch.n_tokens++;

            batch.token   [j]    = tokens[i];
            batch.pos     [j]    = p0 + i;
            batch.n_seq_id[j]    = 1;
            batch.seq_id  [j][0] = seq;
            batch.logits  [j]    = i + 1 == tokens.size();
        }
        last.push_back(batch.n_tokens - 1);
    }

    CHECK(llama_decode(ctx, batch) == 0);
    llama_batch_free(batch);

    std::vector<logits_t> res;
    for (const int i : last) {
        const float * logits = llama_get_logits_ith(ctx, i);
        res.emplace_back(logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(model)));
    }
    return res;
}

// prefill in parts of 32 tokens, one at a time after 160
static logits_t feed(llama_context * ctx, llama_seq_id seq, const std::vector<llama_token> & tokens, int from, int to) {
    logits_t res;
    for (int i = from; i < to; ) {
        const int n = i < 160 ? std::min(32, to - i) : 1;
        res = decode(ctx, {{ seq, { tokens.begin() + i, tokens.begin() + i + n } }}, i)[0];
        i += n;
    }
    return res;
}

static double nmse(const logits_t & a, const logits_t & b) {
    double err = 0.0;
    double ref = 0.0;
    for (size_t i = 0; i < a.size(); ++i) {
        err += (double) (a[i] - b[i])*(a[i] - b[i]);
        ref += (double) a[i]*a[i];
    }
    return err/ref;
}

static std::vector<llama_pos> positions(llama_context * ctx, int i, llama_seq_id seq) {
    std::vector<llama_pos> res(256);
    res.resize(llama_depthkv_get_positions(ctx, i, seq, res.data(), res.size()));
    return res;
}

// a sequence that shares a batch with others is computed as if it were alone, eviction included
static void test_isolation() {
    auto alone  = make_context(1, 0.5f);
    auto shared = make_context(3, 0.5f);

    const auto a = make_tokens(224, 1);
    const auto b = make_tokens(224, 2);

    for (int i = 0; i < 224; ) {
        const int n = i < 160 ? 8 : 1; // all three in one ubatch, so that they evict at the same time

        const auto part = [&](const std::vector<llama_token> & t) {
            return std::vector<llama_token>(t.begin() + i, t.begin() + i + n);
        };

        const auto x = decode(alone .get(), {{ 0, part(a) }}, i);
        const auto y = decode(shared.get(), {{ 0, part(a) }, { 1, part(b) }, { 2, part(a) }}, i);

        CHECK(nmse(x[0], y[0]) < 1e-6);
        CHECK(nmse(x[0], y[2]) < 1e-6);
        CHECK(nmse(x[0], y[1]) > 1e-3);

        i += n;
    }

    for (int i = 0; i < llama_depthkv_layer_count(model); ++i) {
        CHECK(positions(shared.get(), i, 0) == positions(shared.get(), i, 2));
        CHECK(positions(shared.get(), i, 0) == positions(alone .get(), i, 0));

        llama_depthkv_layer l;
        CHECK(llama_depthkv_get_layer(shared.get(), i, 1, &l));
        CHECK(l.evicted > 0 && l.used <= l.cells && l.used + l.evicted == 224);
    }
}

static void test_copy_keep_remove() {
    auto ctx = make_context(3, 0.5f);

    auto * mem = llama_get_memory(ctx.get());

    const auto t = make_tokens(224, 3);

    feed(ctx.get(), 0, t, 0, 200);

    llama_memory_seq_cp(mem, 0, 2, -1, -1);
    CHECK(positions(ctx.get(), 0, 0) == positions(ctx.get(), 0, 2));

    const auto x = feed(ctx.get(), 0, t, 200, 224);
    const auto y = feed(ctx.get(), 2, t, 200, 224);
    CHECK(x == y);

    // a part of a sequence
    llama_memory_seq_cp(mem, 0, 1, 10, 100);
    for (const llama_pos p : positions(ctx.get(), 0, 1)) {
        CHECK(p >= 10 && p < 100);
    }

    llama_memory_seq_keep(mem, 2);
    CHECK(llama_memory_seq_pos_max(mem, 0) == -1 && llama_memory_seq_pos_max(mem, 1) == -1);
    CHECK(llama_memory_seq_pos_min(mem, 2) ==  0 && llama_memory_seq_pos_max(mem, 2) == 223);

    // the last token goes, as does all of them
    CHECK(llama_memory_seq_rm(mem, 2, 223, -1));
    CHECK(llama_memory_seq_pos_max(mem, 2) == 222);

    CHECK(llama_memory_seq_rm(mem, 2, -1, -1));
    CHECK(llama_memory_seq_pos_max(mem, 2) == -1);

    // sequences that do not exist
    CHECK(llama_memory_seq_rm(mem, 3, -1, -1));
    CHECK(llama_memory_seq_pos_max(mem, 100) == -1);
    llama_memory_seq_cp (mem, 0, 7, -1, -1);
    llama_memory_seq_add(mem, 9, 0, -1, 1);

    llama_depthkv_layer l;
    CHECK(llama_depthkv_get_layer(ctx.get(), 0, 2, &l));
    CHECK(l.used == 0 && l.evicted == 0);
}

static std::vector<std::vector<llama_pos>> positions_all(llama_context * ctx, llama_seq_id seq) {
    std::vector<std::vector<llama_pos>> res;
    for (int i = 0; i < llama_depthkv_layer_count(model); ++i) {
        res.push_back(positions(ctx, i, seq));
    }
    return res;
}

// going back never leaves less than a fresh evaluation would
static void test_rollback() {
    const auto t = make_tokens(256, 11);

    // while nothing has been evicted, any end can be taken back
    {
        auto ctx   = make_context(1, 0.5f);
        auto stock = make_context(1, 0.0f);

        for (auto * c : { ctx.get(), stock.get() }) {
            feed(c, 0, t, 0, 120);
            CHECK(llama_depthkv_seq_pos_rollback(c, 0, 50) == 50);
            CHECK(llama_depthkv_seq_rollback(c, 0, 50) == 50);
        }
        CHECK(feed(ctx.get(), 0, t, 50, 60) == feed(stock.get(), 0, t, 50, 60));
    }

    for (const int n : { 140, 200 }) {
        auto ctx = make_context(1, 0.5f);
        auto * mem = llama_get_memory(ctx.get());

        feed(ctx.get(), 0, t, 0, n);

        const auto n_reeval = [&]() {
            llama_depthkv_stats stats;
            CHECK(llama_depthkv_get_stats(ctx.get(), &stats));
            return stats.n_reeval;
        };

        for (const int cut : { n - 1, n - 5, n - 40, 100, 1 }) {
            const auto held = positions_all(ctx.get(), 0);

            // a removal that is refused changes nothing
            const llama_pos p = llama_depthkv_seq_pos_rollback(ctx.get(), 0, cut);
            CHECK(p >= 0 && p <= cut);
            if (p < cut) {
                CHECK(!llama_memory_seq_rm(mem, 0, cut, -1));
                CHECK(positions_all(ctx.get(), 0) == held);
                CHECK(llama_memory_seq_pos_max(mem, 0) == n - 1);
                CHECK(llama_depthkv_seq_pos_rollback(ctx.get(), 0, p) == p);
            }

            const uint64_t n_before = n_reeval();

            const llama_pos q = llama_depthkv_seq_rollback(ctx.get(), 0, cut);
            CHECK(q <= p && (q == cut || q % 128 == 0));
            CHECK(llama_memory_seq_pos_max(mem, 0) == q - 1);

            CHECK(n_reeval() == n_before + (cut - q));

            // what a fresh evaluation leaves before the next ubatch: room for that, and the recent window whole
            for (const auto & held : positions_all(ctx.get(), 0)) {
                CHECK((int) held.size() >= std::min(q, 128 - 32 - 4));
                for (int i = 1; i <= std::min(q, 32); ++i) {
                    CHECK(held[held.size() - i] == q - i);
                }
            }

            feed(ctx.get(), 0, t, q, n);

            // from there on it is as if it had never been elsewhere
            if (q < cut) {
                auto fresh = make_context(1, 0.5f);
                CHECK(feed(fresh.get(), 0, t, 0, n) == feed(ctx.get(), 0, t, llama_depthkv_seq_rollback(ctx.get(), 0, cut), n));
                CHECK(positions_all(ctx.get(), 0) == positions_all(fresh.get(), 0));
            }
        }
        CHECK(n == 140 || n_reeval() > 0);
    }

    // what a removal in two steps leaves is no more than what one leaves
    {
        auto ctx   = make_context(1, 0.5f);
        auto stock = make_context(1, 0.0f);

        feed(ctx  .get(), 0, t, 0, 240);
        feed(stock.get(), 0, t, 0, 240);

        for (auto * c : { ctx.get(), stock.get() }) {
            CHECK(llama_memory_seq_rm(llama_get_memory(c), 0, 150, 239));
        }
        CHECK(!llama_memory_seq_rm(llama_get_memory(ctx  .get()), 0, 239, -1));
        CHECK( llama_memory_seq_rm(llama_get_memory(stock.get()), 0, 239, -1));
        CHECK(llama_memory_seq_pos_max(llama_get_memory(stock.get()), 0) == 149);
        CHECK(llama_depthkv_seq_rollback(ctx.get(), 0, 239) == 0);
    }
    {
        auto ctx = make_context(1, 0.5f);
        auto * mem = llama_get_memory(ctx.get());

        feed(ctx.get(), 0, t, 0, 100);
        CHECK(llama_memory_seq_rm(mem, 0, 60, 90));
        CHECK(llama_memory_seq_rm(mem, 0, 90, -1));
        CHECK(llama_memory_seq_pos_max(mem, 0) == 59);
    }

    // what was pinned is pinned when it comes back
    {
        auto ctx = make_context(1, 0.5f);

        CHECK(llama_depthkv_pin(ctx.get(), 0, 0, 40));
        feed(ctx.get(), 0, t, 0, 240);
        CHECK(llama_depthkv_seq_pos_rollback(ctx.get(), 0, 200) >= 40);
        CHECK(llama_depthkv_seq_rollback(ctx.get(), 0, 200) == 0);
        feed(ctx.get(), 0, t, 0, 240);
        for (const auto & held : positions_all(ctx.get(), 0)) {
            CHECK(held.size() > 40 && held[39] == 39);
        }
        // but not what is taken back
        CHECK(llama_depthkv_seq_rollback(ctx.get(), 0, 20) == 20);
        feed(ctx.get(), 0, t, 20, 240);
        CHECK(positions(ctx.get(), 0, 0)[39] != 39);
    }

    // a copy of the front ends where the original could go back to
    {
        auto ctx = make_context(2, 0.5f);
        auto * mem = llama_get_memory(ctx.get());

        feed(ctx.get(), 0, t, 0, 240);
        const llama_pos p = llama_depthkv_seq_pos_rollback(ctx.get(), 0, 150);
        CHECK(p < 150);
        llama_memory_seq_cp(mem, 0, 1, 0, 150);
        CHECK(llama_memory_seq_pos_max(mem, 1) == p - 1);
        CHECK(llama_memory_seq_pos_max(mem, 0) == 239);
    }

    // a restored state knows what it lacks
    {
        auto ctx = make_context(1, 0.5f);
        feed(ctx.get(), 0, t, 0, 240);

        std::vector<uint8_t> state(llama_state_seq_get_size(ctx.get(), 0));
        CHECK(llama_state_seq_get_data(ctx.get(), state.data(), state.size(), 0) == state.size());

        auto other = make_context(1, 0.5f);
        CHECK(llama_state_seq_set_data(other.get(), state.data(), state.size(), 0) == state.size());
        for (llama_pos p = 0; p <= 240; ++p) {
            CHECK(llama_depthkv_seq_pos_rollback(other.get(), 0, p) == llama_depthkv_seq_pos_rollback(ctx.get(), 0, p));
        }
    }
}

// drafts that are rejected: what one batch has brought can be taken back, whatever the cells hold
static void test_drafts() {
    for (const uint32_t n_seq : { 1u, 3u }) {
        auto ctx = make_context(n_seq, 0.5f);
        auto * mem = llama_get_memory(ctx.get());

        llama_depthkv_stats stats;
        CHECK(llama_depthkv_get_stats(ctx.get(), &stats));

        const int n_draft = stats.n_ubatch;

        const auto t = make_tokens(256, 12);

        std::mt19937 rng(13);
        std::vector<llama_pos> end(n_seq, 0);

        while (end[0] < 256 - n_draft) {
            std::vector<std::pair<llama_seq_id, std::vector<llama_token>>> parts;
            for (uint32_t s = 0; s < n_seq; ++s) {
                parts.push_back({ (llama_seq_id) s, { t.begin() + end[s], t.begin() + end[s] + n_draft } });
            }
            decode(ctx.get(), parts, end[0]);

            // some of the draft, or nothing
            const int n_accepted = rng()%4 == 0 ? 0 : 1 + rng()%n_draft;
            for (uint32_t s = 0; s < n_seq; ++s) {
                end[s] += n_accepted;
                CHECK(llama_memory_seq_rm(mem, s, end[s], -1));
                CHECK(llama_memory_seq_pos_max(mem, s) == end[s] - 1);
            }
        }
        CHECK(llama_depthkv_get_stats(ctx.get(), &stats));
        CHECK(stats.n_evict > 0 && stats.n_reeval == 0);
    }
}

// context shift: the keys are rotated as in the stock cache, more of them than one graph takes, and those of each sequence
static void test_shift(ggml_type type_k, bool fa, double tolerance) {
    const uint32_t n_ctx_seq = 1280;

    auto stock = make_context(2, 0.0f, 0,         type_k, fa, n_ctx_seq);
    auto depth = make_context(2, 0.0f, n_ctx_seq, type_k, fa, n_ctx_seq);

    const auto t = make_tokens(1200, 4);

    for (const llama_seq_id seq : { 1, 0 }) {
        for (auto * ctx : { stock.get(), depth.get() }) {
            auto * mem = llama_get_memory(ctx);

            for (int i = 0; i < 1200; i += 100) {
                decode(ctx, {{ seq, { t.begin() + i, t.begin() + i + 100 } }}, i);
            }
            CHECK(llama_memory_can_shift(mem));
            CHECK(llama_memory_seq_rm(mem, seq, 4, 68));
            llama_memory_seq_add(mem, seq, 68, -1, -64);
            CHECK(llama_memory_seq_pos_max(mem, seq) == 1135);
        }

        const auto x = decode(stock.get(), {{ seq, { t[200] } }}, 1136)[0];
        const auto y = decode(depth.get(), {{ seq, { t[200] } }}, 1136)[0];

        CHECK(nmse(x, y) < tolerance);
    }
}

static void test_state() {
    const auto t = make_tokens(240, 5);

    auto ctx = make_context(2, 0.5f);

    llama_depthkv_pin(ctx.get(), 0, 20, 30);
    feed(ctx.get(), 0, t, 0, 200);

    // whole, into a new context
    std::vector<uint8_t> whole(llama_state_get_size(ctx.get()));
    CHECK(llama_state_get_data(ctx.get(), whole.data(), whole.size()) == whole.size());

    // one sequence, into another one
    std::vector<uint8_t> one(llama_state_seq_get_size(ctx.get(), 0));
    CHECK(llama_state_seq_get_data(ctx.get(), one.data(), one.size(), 0) == one.size());

    auto other = make_context(2, 0.5f);
    CHECK(llama_state_set_data(other.get(), whole.data(), whole.size()) == whole.size());
    CHECK(llama_state_seq_set_data(other.get(), one.data(), one.size(), 1) == one.size());

    for (int i = 0; i < llama_depthkv_layer_count(model); ++i) {
        CHECK(positions(ctx.get(), i, 0) == positions(other.get(), i, 0));
        CHECK(positions(ctx.get(), i, 0) == positions(other.get(), i, 1));
    }

    // to the last bit, evictions to come included
    const auto x = feed(ctx  .get(), 0, t, 200, 240);
    const auto y = feed(other.get(), 0, t, 200, 240);
    const auto z = feed(other.get(), 1, t, 200, 240);
    CHECK(x == y);
    CHECK(x == z);

    for (int i = 0; i < llama_depthkv_layer_count(model); ++i) {
        CHECK(positions(ctx.get(), i, 0) == positions(other.get(), i, 0));

        // the pinned span came along
        int n_pinned = 0;
        for (const llama_pos p : positions(other.get(), i, 1)) {
            n_pinned += p >= 20 && p < 30;
        }
        CHECK(n_pinned == 10);
    }

    // what does not fit is refused and leaves an empty, usable sequence
    auto small = make_context(2, 0.4f);
    CHECK(llama_state_seq_set_data(small.get(), one.data(), one.size(), 0) == 0);
    CHECK(llama_memory_seq_pos_max(llama_get_memory(small.get()), 0) == -1);
    feed(small.get(), 0, t, 0, 200);

    // cut short: no sequence is left with tokens that were not restored
    CHECK(llama_state_set_data(other.get(), whole.data(), whole.size() - 64) == 0);
    for (llama_seq_id seq : { 0, 1 }) {
        CHECK(llama_memory_seq_pos_max(llama_get_memory(other.get()), seq) == -1);
    }
    CHECK(llama_state_seq_set_data(other.get(), one.data(), 4, 0) == 0);
    for (const size_t n : { size_t(100), one.size()/3, one.size() - 8 }) {
        CHECK(llama_state_seq_set_data(other.get(), one.data(), n, 0) == 0);
        CHECK(llama_memory_seq_pos_max(llama_get_memory(other.get()), 0) == -1);
    }
}

static void test_pins() {
    auto ctx = make_context(1, 0.5f);

    auto * mem = llama_get_memory(ctx.get());

    const auto t = make_tokens(240, 6);

    CHECK(llama_depthkv_pin(ctx.get(), 0, 8, 40));
    CHECK(!llama_depthkv_pin(ctx.get(), 0, 40, 200)); // no room left
    CHECK(std::string(llama_depthkv_last_error()).find("pinned") != std::string::npos);

    feed(ctx.get(), 0, t, 0, 240);

    const auto n_held = [&](llama_pos p0, llama_pos p1) {
        int res = 0;
        for (const llama_pos p : positions(ctx.get(), 0, 0)) {
            res += p >= p0 && p < p1;
        }
        return res;
    };

    CHECK(n_held(8, 40) == 32);
    CHECK(n_held(0, 4)  ==  4);        // sinks
    CHECK(n_held(208, 240) == 32);     // recent window

    CHECK(!llama_depthkv_pin(ctx.get(), 0, 50, 50));

    // removing the tokens removes the pin
    CHECK(llama_memory_seq_rm(mem, 0, -1, -1));
    CHECK(llama_depthkv_pin(ctx.get(), 0, 40, 70));

    // the end of a span moves as far as positions go
    llama_kv_depth_spans pins;
    pins.add(10, INT32_MAX);
    pins.shift(0, INT32_MAX, 100);
    CHECK(pins.spans == (std::vector<std::pair<llama_pos, llama_pos>> {{ 110, INT32_MAX }}));
    pins.shift(0, INT32_MAX, -INT32_MAX);
    CHECK(pins.empty());
}

// after a division positions share cells. the safe ones still leave room for the tokens to come
// pinned tokens take room from the ubatch before they are refused, and what comes back from one batch follows it
static void test_pins_ubatch() {
    auto ctx   = make_context(1, 0.5f, 0, GGML_TYPE_F16, false, 256, 128);
    auto small = make_context(1, 0.5f);

    llama_depthkv_stats stats;
    CHECK(llama_depthkv_get_stats(ctx.get(), &stats));
    CHECK(stats.n_ubatch == 64); // half of 128 cells

    const auto t = make_tokens(256, 31);

    for (auto * c : { ctx.get(), small.get() }) {
        CHECK(llama_depthkv_pin(c, 0, 4, 36));
        CHECK(llama_depthkv_get_stats(c, &stats));
        CHECK(stats.n_ubatch == 32); // 60 cells are left
    }

    for (int i = 0; i < 192; i += 64) {
        const std::vector<llama_token> part(t.begin() + i, t.begin() + i + 64);
        CHECK(decode(ctx.get(), {{ 0, part }}, i) == decode(small.get(), {{ 0, part }}, i));
    }
    CHECK(positions(ctx.get(), 0, 0) == positions(small.get(), 0, 0));

    decode(ctx.get(), {{ 0, { t.begin() + 192, t.begin() + 192 + stats.n_ubatch } }}, 192);
    CHECK(llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, 193, -1));

    // as many as ever leave room for a ubatch
    CHECK( llama_depthkv_pin(ctx.get(), 0, 36, 64));
    CHECK(!llama_depthkv_pin(ctx.get(), 0, 64, 65));

    llama_depthkv_unpin(ctx.get(), 0);
    CHECK(llama_depthkv_get_stats(ctx.get(), &stats) && stats.n_ubatch == 64);
}

static void test_seq_keep() {
    const auto tokens = make_tokens(160, 11);

    auto ctx = make_context(2, 0.0f, 256);

    feed(ctx.get(), 0, tokens, 0, 128);
    feed(ctx.get(), 1, tokens, 0, 128);
    CHECK(llama_depthkv_pin(ctx.get(), 0, 60, 62));

    // all that it holds: nothing happens
    auto all = positions(ctx.get(), 1, 0);
    CHECK(all.size() == 128);
    CHECK(llama_depthkv_seq_keep(ctx.get(), 1, 0, all.data(), all.size()));
    CHECK(positions(ctx.get(), 1, 0) == all);
    CHECK(llama_depthkv_seq_pos_rollback(ctx.get(), 0, 100) == 100);

    // in any order, one that is not there among them
    const std::vector<llama_pos> keep = { 3, 1000, 0, 90 };
    CHECK(llama_depthkv_seq_keep(ctx.get(), 1, 0, keep.data(), keep.size()));
    CHECK(positions(ctx.get(), 1, 0) == (std::vector<llama_pos> { 0, 3, 60, 61, 90, 127 }));

    llama_depthkv_layer layer;
    CHECK(llama_depthkv_get_layer(ctx.get(), 1, 0, &layer));
    CHECK(layer.used == 6 && layer.evicted == 122);

    // that layer of that sequence alone
    CHECK(positions(ctx.get(), 0, 0) == all);
    CHECK(positions(ctx.get(), 1, 1) == all);

    // what is gone is gone
    CHECK(llama_depthkv_seq_pos_rollback(ctx.get(), 0, 100) == 1);
    CHECK(!llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, 100, -1));

    // it goes on with what is left, as one that is restored does
    auto copy = make_context(2, 0.0f, 256);
    std::vector<uint8_t> state(llama_state_seq_get_size(ctx.get(), 0));
    CHECK(llama_state_seq_get_data(ctx.get(), state.data(), state.size(), 0) == state.size());
    CHECK(llama_state_seq_set_data(copy.get(), state.data(), state.size(), 0) == state.size());

    const auto kept  = feed(ctx.get(),  0, tokens, 128, 160);
    const auto other = feed(ctx.get(),  1, tokens, 128, 160);
    CHECK(feed(copy.get(), 0, tokens, 128, 160) == kept);
    CHECK(kept != other);
    CHECK(positions(ctx.get(), 1, 0).size() == 6 + 32);

    // nothing but the last one and the pinned
    CHECK(llama_depthkv_seq_keep(ctx.get(), 0, 0, nullptr, 0));
    CHECK(positions(ctx.get(), 0, 0) == (std::vector<llama_pos> { 60, 61, 159 }));

    llama_memory_clear(llama_get_memory(ctx.get()), true);
    CHECK(llama_depthkv_seq_keep(ctx.get(), 0, 0, nullptr, 0));
    feed(ctx.get(), 0, tokens, 0, 128);
    CHECK(feed(ctx.get(), 0, tokens, 128, 160) == other);
}

static void test_div() {
    auto ctx = make_context(1, 0.5f);

    auto * mem = llama_get_memory(ctx.get());

    const auto t = make_tokens(240, 9);

    feed(ctx.get(), 0, t, 0, 120);
    llama_memory_seq_div(mem, 0, 0, -1, 16);
    CHECK(llama_memory_seq_pos_max(mem, 0) == 7);
    llama_memory_seq_div(mem, 0, 0, -1, 0);
    llama_memory_seq_div(mem, 0, 0, -1, -1);
    CHECK(llama_memory_seq_pos_max(mem, 0) == 7);

    for (int i = 0; i < 120; ++i) {
        decode(ctx.get(), {{ 0, { t[120 + i] } }}, 8 + i);
    }

    // pinned positions that share cells do not take more of them than were counted
    CHECK(llama_memory_seq_rm(mem, 0, -1, -1));
    feed(ctx.get(), 0, t, 0, 120);
    llama_memory_seq_div(mem, 0, 0, -1, 16);
    CHECK(llama_depthkv_pin(ctx.get(), 0, 0, 8));

    // and are saved like others
    std::vector<uint8_t> state(llama_state_seq_get_size(ctx.get(), 0));
    CHECK(llama_state_seq_get_data(ctx.get(), state.data(), state.size(), 0) == state.size());

    auto other = make_context(1, 0.5f);
    CHECK(llama_state_seq_set_data(other.get(), state.data(), state.size(), 0) == state.size());

    for (int i = 0; i < 120; i += 30) {
        const std::vector<llama_token> part(t.begin() + 120 + i, t.begin() + 150 + i);
        CHECK(decode(ctx.get(), {{ 0, part }}, 8 + i) == decode(other.get(), {{ 0, part }}, 8 + i));
    }

    // positions end somewhere
    llama_memory_seq_add(mem, 0, 0, -1, INT32_MAX);
    CHECK(llama_memory_seq_pos_max(mem, 0) == 127);
}

struct abort_state {
    int n_calls    = 0;
    int n_calls_ok = -1; // negative: never abort
};

static bool abort_once(void * data) {
    auto * state = (abort_state *) data;

    return state->n_calls++ == state->n_calls_ok;
}

// a shift that is aborted, wherever, runs again from where it was
static void test_shift_abort() {
    const auto t = make_tokens(224, 10);

    logits_t expected;

    for (int n = -1; n < 200; ++n) {
        auto ctx = make_context(1, 0.5f);

        feed(ctx.get(), 0, t, 0, 200);
        CHECK(llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, 4, 68));
        llama_memory_seq_add(llama_get_memory(ctx.get()), 0, 68, -1, -64);

        abort_state state;
        state.n_calls_ok = n;

        llama_set_abort_callback(ctx.get(), abort_once, &state);

        llama_token token = t[200];

        const int ret = llama_decode(ctx.get(), llama_batch_get_one(&token, 1));
        if (n < 0) {
            CHECK(ret == 0);
        } else if (ret == 0) {
            CHECK(n > 20); // all calls came before
            break;
        } else {
            CHECK(ret == 2);
            CHECK(llama_memory_seq_pos_max(llama_get_memory(ctx.get()), 0) == 135);
            CHECK(llama_decode(ctx.get(), llama_batch_get_one(&token, 1)) == 0);
        }

        const float * logits = llama_get_logits_ith(ctx.get(), -1);
        const logits_t seen(logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(model)));

        if (n < 0) {
            expected = seen;
        }
        CHECK(nmse(expected, seen) < 1e-10);
    }
}

// eviction that is aborted evicts nothing unseen, and goes on where it was
static void test_evict_abort() {
    const auto t = make_tokens(224, 14);

    logits_t expected;
    std::vector<std::vector<llama_pos>> held;

    int n_aborted = 0;

    for (int n = -1; n < 400; n += 7) {
        auto ctx = make_context(1, 0.5f);

        feed(ctx.get(), 0, t, 0, 128);

        llama_depthkv_stats stats;
        CHECK(llama_depthkv_get_stats(ctx.get(), &stats));
        CHECK(stats.n_evict == 0);

        CHECK(llama_depthkv_pin(ctx.get(), 0, 128, 140));

        abort_state state;
        state.n_calls_ok = n;

        llama_set_abort_callback(ctx.get(), abort_once, &state);

        llama_batch batch = llama_batch_get_one(const_cast<llama_token *>(t.data() + 128), 32);

        const int ret = llama_decode(ctx.get(), batch);
        if (n < 0) {
            CHECK(ret == 0);
        } else if (ret == 0) {
            break; // all calls came before
        } else {
            CHECK(ret == 2);
            CHECK(llama_memory_seq_pos_max(llama_get_memory(ctx.get()), 0) == 127);
            CHECK(llama_decode(ctx.get(), batch) == 0);
            n_aborted++;
        }

        const float * logits = llama_get_logits_ith(ctx.get(), -1);
        const logits_t seen(logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(model)));

        if (n < 0) {
            expected = seen;
            held     = positions_all(ctx.get(), 0);
        }
        CHECK(nmse(expected, seen) < 1e-10);
        CHECK(positions_all(ctx.get(), 0) == held);

        // what was pinned ahead of a decode that was aborted is still pinned
        feed(ctx.get(), 0, t, 160, 224);
        for (const auto & layer : positions_all(ctx.get(), 0)) {
            CHECK(std::count_if(layer.begin(), layer.end(), [](llama_pos p) { return p >= 128 && p < 140; }) == 12);
        }
    }
    CHECK(n_aborted > 5);
}

// a key that is not a number makes all logits so, until it is evicted. what the layer has learned of the other cells stays
static void test_broken_key() {
    auto ctx = make_context(1, 0.5f);

    auto * kv = dynamic_cast<llama_kv_cache_depth *>(llama_get_memory(ctx.get()));
    CHECK(kv);

    const auto t = make_tokens(240, 11);

    feed(ctx.get(), 0, t, 0, 160);

    const auto & layer = kv->get_layers()[0];

    // neither sink nor recent
    const llama_pos p = positions(ctx.get(), 0, 0)[20];
    for (uint32_t i = 0; i < layer.n_cells; ++i) {
        if (layer.cells[0].pos_get(i) == p) {
            const std::vector<ggml_fp16_t> key(layer.k->ne[0], 0x7e00); // NaN
            ggml_backend_tensor_set(layer.k, key.data(), i*layer.k->nb[1], layer.k->nb[1]);
        }
    }

    feed(ctx.get(), 0, t, 160, 240);

    for (const llama_pos q : positions(ctx.get(), 0, 0)) {
        CHECK(q != p);
    }
    for (uint32_t i = 0; i < layer.n_cells; ++i) {
        CHECK(std::isfinite(layer.cells[0].acc[i]));
    }
}

// what eviction computes with is there, and counted, before the first one
static void test_reserved() {
    auto ctx = make_context(1, 0.5f);

    const auto bytes = [&]() {
        llama_depthkv_stats stats;
        CHECK(llama_depthkv_get_stats(ctx.get(), &stats));
        return stats.bytes_scorer;
    };
    const auto breakdown = [&]() {
        size_t res = 0;
        for (const auto & [_, size] : llama_get_memory(ctx.get())->memory_breakdown()) {
            res += size;
        }
        return res;
    };

    const size_t n_scorer = bytes();
    const size_t n_memory = breakdown();

    llama_depthkv_stats stats;
    CHECK(llama_depthkv_get_stats(ctx.get(), &stats));
    CHECK(n_scorer > 0 && n_memory >= stats.bytes + n_scorer);

    const auto t = make_tokens(240, 12);

    feed(ctx.get(), 0, t, 0, 200);
    llama_memory_seq_rm (llama_get_memory(ctx.get()), 0, 4, 68);
    llama_memory_seq_add(llama_get_memory(ctx.get()), 0, 68, -1, -64);
    decode(ctx.get(), {{ 0, { t[200] } }}, 136);

    CHECK(llama_depthkv_get_stats(ctx.get(), &stats));
    CHECK(stats.n_score > 0);
    CHECK(bytes() == n_scorer && breakdown() == n_memory);
}

// objects and numbers that cannot be are one line, not a crash
static void test_bad_calls() {
    auto ctx   = make_context(2, 0.5f);
    auto stock = make_context(1, 0.0f);

    const int n_layers = llama_depthkv_layer_count(model);

    const auto expect = [](bool ok, const char * text) {
        CHECK(!ok);
        CHECK(std::string(llama_depthkv_last_error()).find(text) != std::string::npos);
    };

    llama_depthkv_layer l;
    llama_depthkv_stats s;
    llama_pos p[4];

    for (auto * c : { ctx.get(), stock.get() }) {
        for (const int i : { -1, n_layers, INT32_MAX, INT32_MIN }) {
            expect(llama_depthkv_get_layer(c, i, 0, &l), "layer index");
            expect(llama_depthkv_get_positions(c, i, 0, p, 4) >= 0, "layer index");
            expect(llama_depthkv_seq_keep(c, i, 0, p, 0), c == ctx.get() ? "layer index" : "no depth KV cache");
        }
        for (const int seq : { -1, 2, INT32_MAX, INT32_MIN }) {
            expect(llama_depthkv_get_layer(c, 0, seq, &l), "sequence");
            expect(llama_depthkv_get_positions(c, 0, seq, p, 4) >= 0, "sequence");
            expect(llama_depthkv_pin(c, seq, 0, 4), "sequence");
            expect(llama_depthkv_seq_keep(c, 0, seq, p, 0), "sequence");
            expect(llama_depthkv_seq_pos_rollback(c, seq, 0) >= 0, "sequence");
            expect(llama_depthkv_seq_rollback(c, seq, 0) >= 0, "sequence");
            llama_depthkv_unpin(c, seq);
        }
        expect(llama_depthkv_seq_pos_rollback(c, 0, -1) >= 0, "negative");
        expect(llama_depthkv_seq_rollback(c, 0, -1) >= 0, "negative");
        CHECK(llama_depthkv_seq_pos_rollback(c, 0, 0) == 0 && llama_depthkv_seq_rollback(c, 0, INT32_MAX) == INT32_MAX);
        expect(llama_depthkv_get_layer(c, 0, 0, nullptr), "layer is NULL");
        expect(llama_depthkv_get_stats(c, nullptr), "stats is NULL");
        expect(llama_depthkv_get_positions(c, 0, 0, nullptr, 4) >= 0, "pos is NULL");
        CHECK(llama_depthkv_get_positions(c, 0, 0, nullptr, 0) == 0);
        expect(llama_depthkv_seq_keep(c, 0, 0, nullptr, 4), "pos is NULL");
    }

    expect(llama_depthkv_layer_id(model, n_layers) >= 0, "layer index");
    expect(llama_depthkv_layer_id(nullptr, 0) >= 0, "NULL");
    expect(llama_depthkv_get_layer(nullptr, 0, 0, &l), "NULL");
    expect(llama_depthkv_get_stats(nullptr, &s), "NULL");
    expect(llama_depthkv_get_positions(nullptr, 0, 0, p, 4) >= 0, "NULL");
    expect(llama_depthkv_pin(nullptr, 0, 0, 4), "NULL");
    expect(llama_depthkv_seq_keep(nullptr, 0, 0, p, 0), "NULL");
    expect(llama_depthkv_seq_pos_rollback(nullptr, 0, 0) >= 0, "NULL");
    expect(llama_depthkv_seq_rollback(nullptr, 0, 0) >= 0, "NULL");
    llama_depthkv_unpin(nullptr, 0);

    auto params = llama_depthkv_alloc_params();
    expect(llama_depthkv_alloc(params, nullptr), "cells is NULL");

    // training wants the stock cache
    llama_opt_init(ctx.get(), model, llama_opt_params());
    llama_opt_epoch(ctx.get(), nullptr, nullptr, nullptr, 0, nullptr, nullptr);
}

// activations that are split over devices do not meet a cache that is not
static void test_split_mode() {
    auto mparams = llama_model_default_params();
    mparams.n_gpu_layers = 0;
    mparams.split_mode   = LLAMA_SPLIT_MODE_TENSOR;

    ggml_backend_dev_t devs[] = { ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), nullptr };
    mparams.devices = devs;

    llama_model * split = llama_model_load_from_file(path_model.c_str(), mparams);
    CHECK(split);

    auto depth = llama_depthkv_default_params();
    depth.budget = "0.5";

    CHECK(!llama_depthkv_init_from_model(split, llama_context_default_params(), depth));
    CHECK(std::string(llama_depthkv_last_error()).find("split mode 'tensor'") != std::string::npos);

    llama_model_free(split);
}

// one ubatch of a prompt that is longer than the cells at a time, the cells never overflow
static void test_bounded() {
    auto ctx = make_context(1, 0.4f);

    const auto t = make_tokens(240, 7);

    for (int i = 0; i < 240; i += 120) {
        CHECK(llama_decode(ctx.get(), llama_batch_get_one(const_cast<llama_token *>(t.data() + i), 120)) == 0);

        for (int l = 0; l < llama_depthkv_layer_count(model); ++l) {
            llama_depthkv_layer info;
            CHECK(llama_depthkv_get_layer(ctx.get(), l, 0, &info));
            CHECK(info.used <= info.cells && info.used + info.evicted == (uint32_t) i + 120);
        }
    }

    // the context does run out
    const auto more = make_tokens(32, 8);
    CHECK(llama_decode(ctx.get(), llama_batch_get_one(const_cast<llama_token *>(more.data()), 32)) == 1);
}

// the graph of one token is hardly larger than that of stock, and lets a backend store K together with its rotation
static void test_graph() {
    for (const bool fa : { false, true }) {
        std::vector<ggml_op> ops[2];

        for (const bool is_depth : { false, true }) {
            auto cparams = llama_context_default_params();

            cparams.n_ctx             = 256;
            cparams.n_batch           = 128;
            cparams.n_threads         = 2;
            cparams.n_threads_batch   = 2;
            cparams.flash_attn_type   = fa ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
            cparams.cb_eval_user_data = &ops[is_depth];
            cparams.cb_eval           = [](ggml_tensor * t, bool ask, void * data) {
                if (ask) {
                    ((std::vector<ggml_op> *) data)->push_back(t->op);
                }
                return false;
            };

            auto depth = llama_depthkv_default_params();
            depth.budget = "0.5";

            context_ptr ctx(is_depth ? llama_depthkv_init_from_model(model, cparams, depth) : llama_init_from_model(model, cparams), llama_free);
            CHECK(ctx);

            const auto t = make_tokens(200, 5);
            for (const int i : { 0, 100 }) {
                decode(ctx.get(), {{ 0, { t.begin() + i, t.begin() + i + 100 } }}, i);
            }

            ops[is_depth].clear();
            decode(ctx.get(), {{ 0, { t[0] } }}, 200);
        }

        const auto count_fused = [](const std::vector<ggml_op> & nodes) {
            int res = 0;
            for (size_t i = 2; i < nodes.size(); ++i) {
                res += nodes[i - 2] == GGML_OP_ROPE && nodes[i - 1] == GGML_OP_VIEW && nodes[i] == GGML_OP_SET_ROWS;
            }
            return res;
        };

        CHECK(count_fused(ops[0]) == llama_depthkv_layer_count(model));
        CHECK(count_fused(ops[1]) == llama_depthkv_layer_count(model));
        CHECK(ops[1].size() <= 1.15*ops[0].size());
    }
}

// a plan that cannot be is one line, not a crash
static void test_bad_plans() {
    auto cparams = llama_context_default_params();
    cparams.n_ctx = 256;

    const int n_layers = llama_depthkv_layer_count(model);

    const auto expect = [&](llama_depthkv_params depth, const char * text) {
        CHECK(!llama_depthkv_init_from_model(model, cparams, depth));
        CHECK(std::string(llama_depthkv_last_error()).find(text) != std::string::npos);
    };

    for (const char * budget : { "-1", "1.5", "nan", "", "0", "96 MB each", "auto" }) {
        auto depth = llama_depthkv_default_params();
        depth.budget = budget;
        expect(depth, "KV budget");
    }

    auto depth = llama_depthkv_default_params();
    depth.budget = "0.5";
    depth.scorer = "nonsense";
    expect(depth, "unknown scorer");

    depth = llama_depthkv_default_params();
    depth.budget   = "0.5";
    depth.n_sink   = INT32_MAX;
    depth.n_recent = INT32_MAX;
    expect(depth, "sink tokens");

    const std::vector<uint32_t> few  (n_layers, 10);
    const std::vector<int32_t>  wrong(n_layers, 999);

    depth = llama_depthkv_default_params();
    depth.cells = few.data();
    expect(depth, "n_layers");
    depth.n_layers = n_layers + 1;
    expect(depth, "layers");
    depth.n_layers = n_layers;
    expect(depth, "below the floor");

    depth = llama_depthkv_default_params();
    depth.budget   = "0.5";
    depth.n_layers = n_layers;
    depth.type_k   = (const ggml_type *) wrong.data();
    expect(depth, "type 999");

    CHECK(llama_depthkv_layer_id(model, n_layers) == -1);
    CHECK(llama_depthkv_layer_count(nullptr) == -1);
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: %s DIR\n", argv[0]);
        return 1;
    }

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();

    auto mparams = test_model_params();

    path_model = std::string(argv[1]) + "/llama-dense.gguf";

    model = llama_model_load_from_file(path_model.c_str(), mparams);
    CHECK(model);

    test_isolation();
    test_copy_keep_remove();
    test_rollback();
    test_drafts();
    test_shift(GGML_TYPE_F16,  false, 1e-5);
    test_shift(GGML_TYPE_F32,  false, 1e-9);
    test_shift(GGML_TYPE_Q8_0, true,  1e-3);
    test_state();
    test_pins();
    test_pins_ubatch();
    test_seq_keep();
    test_bounded();
    test_graph();
    test_bad_plans();
    test_div();
    if (test_on_cpu()) { // the other backends do not ask whether to go on
        test_shift_abort();
        test_evict_abort();
    }
    test_broken_key();
    test_reserved();
    test_bad_calls();
    test_split_mode();

    llama_model_free(model);

    printf("OK\n");

    return 0;
}
