// scoring rules and the choice of what to evict

#include "llama-kv-score.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, #x); exit(1); } } while (0)

static llama_kv_depth_cells make_cells(uint32_t n) {
    llama_kv_depth_cells cells;
    cells.resize(n);
    for (uint32_t i = 0; i < n; ++i) {
        cells.add(i);
    }
    return cells;
}

// the first reason that holds
static void test_kind() {
    llama_kv_depth_spans pins;

    CHECK(llama_kv_score_kind(0, pins, 4, 100) == LLAMA_KV_KIND_SINK);
    CHECK(llama_kv_score_kind(4, pins, 4, 100) == LLAMA_KV_KIND_CHOSEN);

    pins.add(2, 8);
    pins.add(98, 102);

    CHECK(llama_kv_score_kind(  3, pins, 4, 100) == LLAMA_KV_KIND_SINK);
    CHECK(llama_kv_score_kind(  4, pins, 4, 100) == LLAMA_KV_KIND_PINNED);
    CHECK(llama_kv_score_kind(  8, pins, 4, 100) == LLAMA_KV_KIND_CHOSEN);
    CHECK(llama_kv_score_kind( 99, pins, 4, 100) == LLAMA_KV_KIND_PINNED);
    CHECK(llama_kv_score_kind(101, pins, 4, 100) == LLAMA_KV_KIND_PINNED);
    CHECK(llama_kv_score_kind(102, pins, 4, 100) == LLAMA_KV_KIND_RECENT);

    // all of a short text is recent
    CHECK(llama_kv_score_kind(10, pins, 4, -20) == LLAMA_KV_KIND_RECENT);
}

// sinks, the recent window and pinned tokens are safe, the lowest scores go, the older one first among equals
static void test_select() {
    std::mt19937 rng(42);

    for (int iter = 0; iter < 200; ++iter) {
        const uint32_t n        = 40 + rng()%100;
        const uint32_t n_sink   = rng()%6;
        const uint32_t n_recent = 1 + rng()%16;
        const uint32_t n_evict  = 1 + rng()%n;

        auto cells = make_cells(n);
        for (uint32_t i = 0; i < n; i += 7) {
            cells.rm(i); // holes
        }

        llama_kv_depth_spans pins;
        pins.add(10, 13);

        std::vector<float> scores(n);
        for (auto & s : scores) {
            s = rng()%8; // many ties
        }

        const auto rows = llama_kv_score_select(cells, pins, scores, n_sink, n_recent, n_evict);

        const llama_pos pos_safe = cells.pos_max() + 1 - (llama_pos) n_recent;

        const std::set<uint32_t> chosen(rows.begin(), rows.end());
        CHECK(chosen.size() == rows.size());

        uint32_t n_candidates = 0;

        for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
            if (cells.is_empty(i)) {
                CHECK(!chosen.count(i));
                continue;
            }

            const llama_pos p = cells.pos_get(i);
            const bool safe = p < (llama_pos) n_sink || p >= pos_safe || pins.has(p);

            CHECK(!(safe && chosen.count(i)));
            n_candidates += !safe;

            if (safe || chosen.count(i)) {
                continue;
            }

            // kept although it was a candidate: nothing better was evicted
            for (const uint32_t j : rows) {
                CHECK(scores[j] < scores[i] || (scores[j] == scores[i] && cells.pos_get(j) < p));
            }
        }

        CHECK(rows.size() == std::min(n_evict, n_candidates));
    }
}

static void test_attention() {
    auto cells = make_cells(4);
    auto score = llama_kv_score_init("attention");

    CHECK(score->needs_attn() && !score->samples_last());

    std::vector<float> s;

    // not seen by any query: must not go before it has been judged
    score->score(cells, 0, s);
    CHECK(std::isinf(s[0]) && std::isinf(s[3]));

    // two queries at positions 1 and 3: cells 0 and 1 could be seen by both, 2 and 3 by one
    llama_kv_attn attn { { 2.0f, 1.0f, 1.0f, 4.0f }, { 1, 3 } };
    score->accumulate(cells, attn, 4);
    score->score(cells, 0, s);
    CHECK(s[0] == 1.0f && s[1] == 0.5f && s[2] == 1.0f && s[3] == 4.0f);

    // 256 tokens later the old observation counts half
    llama_kv_attn later { { 0.0f, 0.0f, 0.0f, 0.0f }, { 256 } };
    score->accumulate(cells, later, 256);
    score->score(cells, 0, s);
    CHECK(fabsf(s[0] - 1.0f/(1.0f + 1.0f)) < 1e-6f);
    CHECK(fabsf(s[3] - 2.0f/(0.5f + 1.0f)) < 1e-6f);
}

static void test_window() {
    auto cells = make_cells(12);
    auto score = llama_kv_score_init("window");

    CHECK(score->needs_attn() && score->samples_last());

    llama_kv_attn attn;
    attn.mass.assign(12, 0.0f);
    attn.mass[5] = 1.0f;
    attn.pos = { 11 };

    std::vector<float> s;
    score->accumulate(cells, attn, 12);
    score->score(cells, 0, s);

    for (int i = 0; i < 12; ++i) {
        CHECK(s[i] == (abs(i - 5) <= 3 ? 1.0f : 0.0f));
    }
}

static void test_controls() {
    auto cells = make_cells(1000);

    std::vector<float> s;
    llama_kv_score_init("streaming")->score(cells, 0, s);

    const auto rows = llama_kv_score_select(cells, {}, s, 4, 32, 10);
    const std::set<uint32_t> chosen(rows.begin(), rows.end());
    for (uint32_t i = 4; i < 14; ++i) {
        CHECK(chosen.count(i)); // the oldest after the sinks
    }

    std::vector<float> a;
    std::vector<float> b;
    std::vector<float> c;

    auto random = llama_kv_score_init("random");
    random->score(cells, 3, a);
    random->score(cells, 3, b);
    random->score(cells, 4, c);
    CHECK(a == b);
    CHECK(a != c);

    double mean = 0.0;
    for (const float x : a) {
        CHECK(x >= 0.0f && x < 1.0f);
        mean += x/a.size();
    }
    CHECK(mean > 0.45 && mean < 0.55);

    CHECK(!llama_kv_score_init("nonsense"));

    CHECK(llama_kv_score_names() == "attention, window, streaming, random");
}

int main() {
    test_kind();
    test_select();
    test_attention();
    test_window();
    test_controls();

    printf("OK\n");

    return 0;
}
