// allocation: invariants of every rule over a grid of layers, contexts, budgets and granularities, what each rule is
// for, and the errors

#include "llama-depthkv.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, #x); exit(1); } } while (0)

static const std::vector<float> ratios = { 0.1f, 0.2f, 0.4f, 0.7f };

// losses of layers that differ by orders of magnitude, as those of real models do
static std::vector<float> make_loss(uint32_t n_layers, uint32_t seed) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal(-8.0f, 2.5f);
    std::uniform_real_distribution<float> uniform(0.0f, 1.0f);

    std::vector<float> res;
    for (uint32_t i = 0; i < n_layers; ++i) {
        float loss = expf(normal(rng));
        for (size_t j = 0; j < ratios.size(); ++j) {
            res.push_back(loss);
            loss *= uniform(rng);
        }
    }

    return res;
}

// the params point into loss
static llama_depthkv_alloc_params make_params(const char * rule, const std::vector<float> & loss, uint32_t n_layers, uint32_t n_ctx, double budget, uint32_t n_align) {
    llama_depthkv_alloc_params res = {};

    res.rule        = rule;
    res.n_layers    = n_layers;
    res.n_ctx       = n_ctx;
    res.budget      = budget;
    res.n_align     = n_align;
    res.n_ratios    = loss.empty() ? 0 : ratios.size();
    res.keep_ratios = ratios.data();
    res.sensitivity = loss.data();

    return res;
}

static std::vector<uint32_t> alloc(const llama_depthkv_alloc_params & params) {
    std::vector<uint32_t> res(params.n_layers);
    if (!llama_depthkv_alloc(params, res.data())) {
        fprintf(stderr, "%s\n", llama_depthkv_last_error());
        exit(1);
    }

    return res;
}

static void test_invariants(const char * rule) {
    for (uint32_t n_layers : { 1, 2, 7, 30, 80 }) {
        const auto loss = make_loss(n_layers, n_layers);

        for (uint32_t n_ctx : { 256, 2048, 8192, 65536 }) {
            for (uint32_t n_align : { 32, 256 }) {
                std::vector<uint32_t> prev(n_layers, 0);

                for (float budget : { 0.05f, 0.15f, 0.2f, 0.3f, 0.333f, 0.4f, 0.5f, 0.6f, 0.9f, 0.999f, 1.0f }) {
                    auto params = make_params(rule, loss, n_layers, n_ctx, budget, n_align);

                    // a floor that the budget allows
                    params.n_floor = (uint32_t) (budget*n_ctx)/n_align*n_align/4;

                    const auto cells = alloc(params);

                    const double target = (double) budget*n_ctx*n_layers;

                    double sum = 0;
                    for (uint32_t i = 0; i < n_layers; ++i) {
                        CHECK(cells[i] >= params.n_floor);
                        CHECK(cells[i] <= n_ctx);
                        CHECK(cells[i] % n_align == 0 || cells[i] == n_ctx);
                        CHECK(params.n_floor > 0 || cells[i] >= prev[i]);

                        sum += cells[i];
                    }

                    CHECK(sum <= target + 1e-5*n_ctx*n_layers);
                    CHECK(sum >  target - n_align); // nothing is left over that one more step could use
                }

                // more budget never takes a cell away from a layer
                for (double budget = 0.02; budget <= 1.0; budget += 0.05 - 1e-4) {
                    const auto cells = alloc(make_params(rule, loss, n_layers, n_ctx, budget, n_align));
                    for (uint32_t i = 0; i < n_layers; ++i) {
                        CHECK(cells[i] >= prev[i]);
                    }
                    prev = cells;
                }
            }
        }
    }
}

// which layer is which does not matter
static void test_permutation(const char * rule) {
    const uint32_t n_layers = 30;
    const size_t   n_ratios = ratios.size();

    const auto loss  = make_loss(n_layers, 1);
    const auto cells = alloc(make_params(rule, loss, n_layers, 4096, 0.3, 32));

    std::vector<uint32_t> perm(n_layers);
    std::iota(perm.begin(), perm.end(), 0);
    std::shuffle(perm.begin(), perm.end(), std::mt19937(2));

    std::vector<float> loss_perm(loss.size());
    for (uint32_t i = 0; i < n_layers; ++i) {
        std::copy_n(loss.begin() + perm[i]*n_ratios, n_ratios, loss_perm.begin() + i*n_ratios);
    }

    const auto cells_perm = alloc(make_params(rule, loss_perm, n_layers, 4096, 0.3, 32));
    for (uint32_t i = 0; i < n_layers; ++i) {
        CHECK(cells_perm[i] == cells[perm[i]]);
    }
}

static void test_uniform() {
    for (double budget : { 0.1, 0.25, 0.333, 0.6 }) {
        const auto cells = alloc(make_params("uniform", {}, 30, 4096, budget, 32));
        const auto [n_min, n_max] = std::minmax_element(cells.begin(), cells.end());
        CHECK(*n_max - *n_min <= 32);
    }

    // the odd steps are spread over the depth: half of them in each half
    const auto cells = alloc(make_params("uniform", {}, 32, 1024, 0.5 + 1.0/64, 32));
    CHECK(std::accumulate(cells.begin(), cells.begin() + 16, 0u) == std::accumulate(cells.begin() + 16, cells.end(), 0u));
}

static void test_proportional() {
    // four times the sensitivity, twice the cells
    const std::vector<float> loss = { 0.1f, 0.1f, 0.1f, 0.1f, 0.4f, 0.4f, 0.4f, 0.4f };
    CHECK((alloc(make_params("proportional", loss, 2, 3200, 0.3, 32)) == std::vector<uint32_t> { 640, 1280 }));

    // what does not fit into a full layer goes to the others
    CHECK((alloc(make_params("proportional", loss, 2, 3200, 0.9, 32)) == std::vector<uint32_t> { 2560, 3200 }));

    // the floor counts
    const std::vector<float> one = { 0, 0, 0, 0, 0.4f, 0.4f, 0.4f, 0.4f };
    auto params = make_params("proportional", one, 2, 3200, 0.3, 32);
    params.n_floor = 160;
    CHECK((alloc(params) == std::vector<uint32_t> { 160, 1760 }));
}

// summed loss of convex curves, interpolated as the rule does
static double sum_loss(const std::vector<float> & loss, const std::vector<uint32_t> & cells, uint32_t n_ctx) {
    const size_t n = ratios.size();

    double res = 0.0;
    for (size_t i = 0; i < cells.size(); ++i) {
        const double r = (double) cells[i]/n_ctx;

        const float * l = loss.data() + i*n;

        if (r >= ratios[n - 1]) {
            res += l[n - 1]*(1.0 - r)/(1.0 - ratios[n - 1]);
            continue;
        }

        size_t j = 0;
        while (j + 2 < n && r > ratios[j + 1]) {
            ++j;
        }

        res += exp(log(l[j]) + (r - ratios[j])/(ratios[j + 1] - ratios[j])*(log(l[j + 1]) - log(l[j])));
    }

    return res;
}

static void test_optimal() {
    // no exchange of a step between two layers lowers the summed loss
    const uint32_t n_ctx = 4096;

    std::vector<float> loss;
    std::mt19937 rng(3);
    for (uint32_t i = 0; i < 8; ++i) {
        // convex
        const float scale = expf(std::normal_distribution<float>(-6.0f, 2.0f)(rng));
        for (const float r : ratios) {
            loss.push_back(scale*expf(-4.0f*r));
        }
    }

    for (double budget : { 0.2, 0.4, 0.6, 0.8 }) {
        const auto   cells = alloc(make_params("optimal", loss, 8, n_ctx, budget, 32));
        const double best  = sum_loss(loss, cells, n_ctx);

        for (size_t i = 0; i < cells.size(); ++i) {
            for (size_t j = 0; j < cells.size(); ++j) {
                auto other = cells;
                if (i == j || other[i] < 32 || other[j] + 32 > n_ctx) {
                    continue;
                }
                other[i] -= 32;
                other[j] += 32;
                // the rule knows the curves at 256 points
                CHECK(sum_loss(loss, other, n_ctx) >= best*(1.0 - 1e-4));
            }
        }

        CHECK(best < sum_loss(loss, alloc(make_params("uniform", loss, 8, n_ctx, budget, 32)), n_ctx));
    }

    // a layer whose loss does not vanish keeps everything, one without loss gives
    const std::vector<float> two = { 1e-6f, 0, 0, 0, 2.0f, 1.0f, 0.5f, 0.3f };
    CHECK((alloc(make_params("optimal", two, 2, 3200, 0.55, 32)) == std::vector<uint32_t> { 320, 3200 }));

    // what nobody gains from is shared equally
    CHECK((alloc(make_params("optimal", std::vector<float>(8, 0.0f), 2, 3200, 0.55, 32)) == std::vector<uint32_t> { 1760, 1760 }));
}

// close keep ratios with very different losses: what lies far below them must stay finite, and the layer that loses keeps
static void test_optimal_close_ratios() {
    for (const float r : { 0.2f, 0.5f }) {
        const float close[] = { r, r + 0.001f };
        const std::vector<float> loss = { 2.0f, 1e-6f, 1e-5f, 1e-6f };

        auto params = make_params("optimal", loss, 2, 4096, 0.4, 32);
        params.n_ratios    = 2;
        params.keep_ratios = close;

        const auto cells = alloc(params);
        CHECK(cells[0] >= r*4096);
        CHECK(cells[0] >= cells[1]);
    }
}

// wide cells count for what they take
static void test_cell_bytes() {
    const uint64_t cell_bytes[] = { 512, 1024, 256 };

    for (const char * rule : { "uniform", "proportional", "optimal" }) {
        const auto loss = make_loss(3, 4);

        auto params = make_params(rule, loss, 3, 4096, 0.4, 32);
        params.cell_bytes = cell_bytes;

        const auto cells = alloc(params);

        uint64_t sum = 0;
        for (int i = 0; i < 3; ++i) {
            sum += cells[i]*cell_bytes[i];
        }
        CHECK(sum <= 0.4*4096*1792 + 1);
        CHECK(sum >  0.4*4096*1792 - 32*1024);
    }
}

static void test_full() {
    for (const char * rule : { "uniform", "proportional", "optimal" }) {
        for (const uint32_t n : alloc(make_params(rule, make_loss(3, 5), 3, 1000, 1.0, 32))) {
            CHECK(n == 1000); // not rounded
        }
    }
}

static void test_default() {
    const auto loss = make_loss(4, 6);
    CHECK(alloc(make_params(nullptr, loss, 4, 4096, 0.4, 32)) == alloc(make_params("optimal", loss, 4, 4096, 0.4, 32)));
    CHECK(alloc(make_params(nullptr, {},   4, 4096, 0.4, 32)) == alloc(make_params("uniform", {},   4, 4096, 0.4, 32)));
}

static void expect_error(llama_depthkv_alloc_params params, const char * text) {
    std::vector<uint32_t> cells(params.n_layers + 1);
    CHECK(!llama_depthkv_alloc(params, cells.data()));
    if (!strstr(llama_depthkv_last_error(), text)) {
        fprintf(stderr, "'%s' is not in '%s'\n", text, llama_depthkv_last_error());
        exit(1);
    }
}

static void test_errors() {
    for (double budget : { 0.0, -0.1, 1.5, (double) NAN, (double) INFINITY }) {
        expect_error(make_params("uniform", {}, 4, 1024, budget, 32), "out of range");
    }

    expect_error(make_params("uniform", {}, 0, 1024, 0.5, 32), "zero");
    expect_error(make_params("uniform", {}, 4,    0, 0.5, 32), "zero");

    auto params = make_params("uniform", {}, 4, 1024, 0.1, 32);
    params.n_floor = 164; // 192 in steps of 32
    expect_error(params, "layer capacity 96 is below the floor 192: raise the budget");

    expect_error(make_params("pyramid", {}, 4, 1024, 0.5, 32), "unknown KV allocation rule 'pyramid'");
    expect_error(make_params("optimal", {}, 4, 1024, 0.5, 32), "needs the sensitivity");

    for (const float bad : { -1.0f, (float) NAN, (float) INFINITY }) {
        auto loss = make_loss(4, 7);
        loss[6] = bad;
        expect_error(make_params("optimal", loss, 4, 1024, 0.5, 32), "sensitivity[6]");
    }

    auto loss = make_loss(4, 7);
    loss[5] = 2.0f*loss[4];
    expect_error(make_params("uniform", loss, 4, 1024, 0.5, 32), "sensitivity[5]");

    const uint64_t no_bytes[] = { 1, 1, 0, 1 };
    params = make_params("uniform", {}, 4, 1024, 0.5, 32);
    params.cell_bytes = no_bytes;
    expect_error(params, "cell_bytes");

    const float descending[] = { 0.4f, 0.2f, 0.1f, 0.05f };
    params = make_params("optimal", loss, 4, 1024, 0.5, 32);
    params.keep_ratios = descending;
    expect_error(params, "keep_ratios[1] is 0.2");
}

int main() {
    for (const char * rule : { "uniform", "proportional", "optimal" }) {
        test_invariants(rule);
    }

    test_permutation("proportional");
    test_permutation("optimal");

    test_uniform();
    test_proportional();
    test_optimal();
    test_optimal_close_ratios();
    test_cell_bytes();
    test_full();
    test_default();
    test_errors();

    printf("OK\n");

    return 0;
}
