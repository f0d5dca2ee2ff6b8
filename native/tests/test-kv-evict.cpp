// when a layer evicts and which queries judge it, through the simulation of a layer; and the keys of a file

#include "llama-depthkv.h"
#include "llama-kv-evict.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: check failed: %s (%s)\n", __FILE__, __LINE__, #x, llama_depthkv_last_error()); exit(1); } } while (0)

static std::vector<llama_pos> positions(const llama_depthkv_sim * sim) {
    std::vector<llama_pos> res(llama_depthkv_sim_positions(sim, nullptr, 0));
    CHECK(llama_depthkv_sim_positions(sim, res.data(), res.size()) == (int32_t) res.size());

    return res;
}

static void test_n_ubatch() {
    const uint32_t cells   [] = { 68, 307, 768, 1229, 2150, 3071, 6144, 100000 };
    const uint32_t expected[] = { 32, 128, 256,  512,  512,  512,  512,    512 };

    for (size_t i = 0; i < sizeof(cells)/sizeof(cells[0]); ++i) {
        CHECK(llama_depthkv_n_ubatch(cells[i], 512) == expected[i]);
    }

    CHECK(llama_depthkv_n_ubatch(6144, 128) == 128);
    CHECK(llama_depthkv_n_ubatch(60, 512) == 60 - llama_kv_n_sink - llama_kv_n_recent);
}

// the last token is one of the samples, whatever the rule
static void test_sample() {
    for (const auto & info : llama_kv_score_list()) {
        const auto score = info.init();

        for (uint32_t n = 1; n < 300; ++n) {
            const auto idxs = llama_kv_evict_sample(*score, n);

            CHECK(!idxs.empty() && idxs.size() <= llama_kv_n_query && idxs.back() == n - 1);
            CHECK(std::adjacent_find(idxs.begin(), idxs.end(), std::greater_equal<uint32_t>()) == idxs.end());

            uint32_t few[2];
            CHECK(llama_depthkv_sim_sample(info.name, n, few, 2) == (int32_t) idxs.size());
            CHECK(few[0] == idxs[0]);
        }
    }
}

// of a prompt every sample is kept, of a text that arrives a token at a time one of sixteen
static void test_queries() {
    const auto score = llama_kv_score_init("attention");

    llama_kv_queries queries;
    CHECK(queries.after(-1).empty());

    for (llama_pos p = 0; p < 10; ++p) {
        CHECK(queries.add(*score, p, 128) == (uint32_t) p);
    }
    CHECK(queries.after(4) == std::vector<llama_pos>({ 5, 6, 7, 8, 9 }));

    for (llama_pos p = 10; p < 10 + 32; ++p) {
        queries.add(*score, p, 1);
    }
    CHECK(queries.after(9) == std::vector<llama_pos>({ 25, 41 }));
}

// a layer never holds more than its cells, always sinks and recent tokens, and evicts only when it must
static void test_bounded(const char * scorer) {
    std::mt19937 rng(42);

    for (int iter = 0; iter < 40; ++iter) {
        const uint32_t n_cells  = 68 + rng()%600;
        const uint32_t n_ubatch = 1 + rng()%std::min(n_cells - llama_kv_n_sink - llama_kv_n_recent, 160u);

        auto * sim = llama_depthkv_sim_init(scorer, 3, n_cells, llama_kv_n_sink, llama_kv_n_recent);
        CHECK(sim);

        llama_pos p = 0;
        for (int i = 0; i < 40; ++i, p += n_ubatch) {
            const auto before = positions(sim);

            llama_pos queries[llama_kv_n_query];
            if (llama_depthkv_sim_queries(sim, n_ubatch, queries, llama_kv_n_query) > 0) {
                std::vector<float> mass(before.size());
                for (auto & x : mass) {
                    x = rng()%8 == 0 ? NAN : rng()%100;
                }
                llama_depthkv_sim_count(sim, mass.data());
                CHECK(llama_depthkv_sim_pending(sim, queries, llama_kv_n_query) == 0);
            }

            llama_depthkv_sim_evict(sim, n_ubatch);

            const auto held = positions(sim);
            CHECK(held.size() + n_ubatch <= n_cells);
            CHECK(before.size() + n_ubatch > n_cells || held.size() == before.size());

            for (llama_pos q = 0; q < p; ++q) {
                if (q < (llama_pos) llama_kv_n_sink || q >= p - (llama_pos) llama_kv_n_recent) {
                    CHECK(std::binary_search(held.begin(), held.end(), q));
                }
            }

            llama_depthkv_sim_add(sim, n_ubatch);
        }

        llama_depthkv_sim_free(sim);
    }
}

// while decoding no token waits for many layers, whether a prompt has filled them or they fill up together, one token at a time
static void test_turns(uint32_t n_cells, uint32_t n_layers, uint32_t n_prompt) {
    std::vector<llama_depthkv_sim *> sims;
    for (uint32_t il = 0; il < n_layers; ++il) {
        sims.push_back(llama_depthkv_sim_init("attention", il, n_cells, llama_kv_n_sink, llama_kv_n_recent));
    }

    const uint32_t n_batch = std::min(64u, n_cells/32);
    const uint32_t n_most  = 2*((n_layers + n_batch - 1)/n_batch);

    const auto step = [&](uint32_t n_tokens, size_t & n_score, size_t & n_evict) {
        n_score = n_evict = 0;
        for (auto * sim : sims) {
            const uint32_t before = llama_depthkv_sim_positions(sim, nullptr, 0);

            if (llama_depthkv_sim_queries(sim, n_tokens, nullptr, 0) > 0) {
                llama_depthkv_sim_count(sim, std::vector<float>(before, 1.0f).data());
                n_score++;
            }
            llama_depthkv_sim_evict(sim, n_tokens);

            const uint32_t held = llama_depthkv_sim_positions(sim, nullptr, 0);
            CHECK(held + n_tokens <= n_cells);
            CHECK(before - held <= (n_tokens > 1 ? n_cells : n_batch));
            n_evict += held < before;

            llama_depthkv_sim_add(sim, n_tokens);
        }
    };

    size_t n_score;
    size_t n_evict;

    uint32_t n_past = 0;
    for (; n_past + 32 <= n_prompt; n_past += 32) {
        step(32, n_score, n_evict);
    }

    uint32_t n_first = 0;

    for (; n_past < n_prompt + n_cells + 600; ++n_past) {
        step(1, n_score, n_evict);

        CHECK(n_score <= n_most);
        CHECK(n_evict == 0 || n_past >= n_cells);

        // to choose what goes is cheap. at first a layer that is full before its turn does not wait for it
        n_first = n_first == 0 && n_evict > 0 ? n_past : n_first;
        CHECK(n_evict <= n_most || n_past < n_first + n_batch);
    }

    for (auto * sim : sims) {
        CHECK(positions(sim).size() + n_batch >= n_cells);
        llama_depthkv_sim_free(sim);
    }
}

static void test_rules() {
    llama_depthkv_rule rule;

    int32_t n = 0;
    while (llama_depthkv_get_scorer(n, &rule)) {
        CHECK(strlen(rule.desc) > 0 && rule.needs_attn == llama_kv_score_init(rule.name)->needs_attn());
        n++;
    }
    CHECK(n == (int32_t) llama_kv_score_list().size());

    CHECK(llama_depthkv_get_alloc(0, &rule) && std::string(rule.name) == "uniform");
    CHECK(!llama_depthkv_get_alloc(-1, &rule) && !llama_depthkv_get_alloc(99, &rule));
}

static void test_errors() {
    CHECK(!llama_depthkv_sim_init("magic", 0, 100, 4, 32));
    CHECK(std::string(llama_depthkv_last_error()) == "unknown scorer 'magic': use one of attention, window, streaming, random");
    CHECK(!llama_depthkv_sim_init(nullptr, 0, 100, 4, 32));
    CHECK(!llama_depthkv_sim_init("attention", 0, 36, 4, 32));
    CHECK(std::string(llama_depthkv_last_error()).find("layer capacity 36 has no room") == 0);

    llama_depthkv_clear_error();
    CHECK(llama_depthkv_last_error()[0] == 0);

    CHECK(llama_depthkv_sim_sample("magic", 10, nullptr, 0) == -1);

    CHECK(!llama_depthkv_check_file(nullptr) && !llama_depthkv_check_file("no-such-file.gguf"));
    CHECK(std::string(llama_depthkv_last_error()).find("damaged or incomplete") == 0);
}

int main() {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    test_n_ubatch();
    test_sample();
    test_queries();
    for (const auto & info : llama_kv_score_list()) {
        test_bounded(info.name);
    }
    test_turns( 200, 30, 640);
    test_turns(1100, 12, 640);
    test_turns( 300, 28,   0);
    test_turns( 450, 40, 512);
    test_rules();
    test_errors();

    printf("OK\n");

    return 0;
}
