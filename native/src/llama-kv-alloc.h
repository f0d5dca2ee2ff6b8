#pragma once

#include <cstdint>
#include <string>
#include <vector>

// how a budget of KV cells is shared out over the layers: pure arithmetic, no model
struct llama_kv_alloc_params {
    uint32_t n_layers = 0;
    uint32_t n_ctx    = 0;   // cells of a layer in the full cache
    double   budget   = 0.0; // fraction of n_layers*n_ctx, in (0, 1]

    uint32_t n_floor = 1;    // least cells of a layer
    uint32_t n_align = 32;   // granularity of a layer
};

// [n_layers] cells of each layer, multiples of n_align (or n_ctx), sum <= budget*n_layers*n_ctx
// rule: "uniform"
// throws std::runtime_error with one line if the rule is unknown, the budget out of range or below the floor
std::vector<uint32_t> llama_kv_alloc(const std::string & rule, const llama_kv_alloc_params & params);

// one rule each: desired cells of each layer as real numbers in [n_floor, n_ctx], sum <= budget*n_layers*n_ctx
std::vector<double> llama_kv_alloc_uniform(const llama_kv_alloc_params & params);
