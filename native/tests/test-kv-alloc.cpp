// allocation: invariants over a grid of layers, contexts, budgets and granularities, and the errors

#include "llama-depthkv.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, #x); exit(1); } } while (0)

static llama_depthkv_alloc_params make_params(uint32_t n_layers, uint32_t n_ctx, double budget, uint32_t n_align) {
    return { "uniform", n_layers, n_ctx, budget, 0, n_align };
}

static void test_invariants() {
    for (uint32_t n_layers : { 1, 2, 7, 30, 80 }) {
        for (uint32_t n_ctx : { 256, 2048, 8192, 131072 }) {
            for (uint32_t n_align : { 1, 32, 256 }) {
                std::vector<uint32_t> prev(n_layers, 0);

                for (float budget : { 0.05f, 0.15f, 0.2f, 0.3f, 0.333f, 0.4f, 0.5f, 0.6f, 0.9f, 0.999f, 1.0f }) {
                    std::vector<uint32_t> cells(n_layers);
                    CHECK(llama_depthkv_alloc(make_params(n_layers, n_ctx, budget, n_align), cells.data()));

                    const double target = (double) budget*n_ctx*n_layers;

                    double   sum   = 0;
                    uint32_t n_min = n_ctx;
                    uint32_t n_max = 0;

                    for (uint32_t i = 0; i < n_layers; ++i) {
                        CHECK(cells[i] <= n_ctx);
                        CHECK(cells[i] % n_align == 0 || cells[i] == n_ctx);
                        CHECK(cells[i] + n_align >= prev[i]); // monotone in the budget, but for the spread of the rest

                        sum  += cells[i];
                        n_min = std::min(n_min, cells[i]);
                        n_max = std::max(n_max, cells[i]);
                    }

                    CHECK(sum <= target + 1e-5*n_ctx*n_layers);
                    CHECK(sum >  target - n_align);   // nothing is left over that one more step could use
                    CHECK(n_max - n_min <= n_align);  // uniform

                    prev = cells;
                }
            }
        }
    }
}

static void test_full() {
    std::vector<uint32_t> cells(3);
    CHECK(llama_depthkv_alloc(make_params(3, 1000, 1.0, 32), cells.data()));
    for (const uint32_t n : cells) {
        CHECK(n == 1000); // not rounded
    }
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
        expect_error(make_params(4, 1024, budget, 32), "out of range");
    }

    expect_error(make_params(0, 1024, 0.5, 32), "zero");
    expect_error(make_params(4,    0, 0.5, 32), "zero");

    auto params = make_params(4, 1024, 0.1, 32);

    params.n_floor = 164;
    expect_error(params, "layer capacity 96 is below the floor 164");

    params.rule = "pyramid";
    expect_error(params, "unknown KV allocation rule 'pyramid'");
}

int main() {
    test_invariants();
    test_full();
    test_errors();

    printf("OK\n");

    return 0;
}
