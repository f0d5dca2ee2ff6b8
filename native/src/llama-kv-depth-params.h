#pragma once

#include "llama.h"
#include "llama-kv-alloc.h"
#include "llama-kv-budget.h"
#include "llama-kv-evict.h"

#include <cstdint>
#include <string>
#include <vector>

struct llama_model_loader;

// the last position: computed with in 32 bits, far beyond any context
static constexpr llama_pos llama_kv_depth_pos_max = 1 << 24;

// what is asked for: from the keys of the model, overridden by the caller (native/include/llama-depthkv.h)
struct llama_kv_depth_params {
    llama_kv_budget budget;

    std::string scorer = llama_kv_score_list()[0].name;

    // allocation rule, empty: the default one if there are curves, else uniform
    std::string rule;

    // tokens never evicted at the front and at the end
    uint32_t n_sink   = llama_kv_n_sink;
    uint32_t n_recent = llama_kv_n_recent;

    // explicit plan, by KV layer, empty: none
    std::vector<uint32_t>  cells;
    std::vector<ggml_type> type_k;
    std::vector<ggml_type> type_v;

    // what calibration measured, for the layers in curve_layers, by index in the model
    llama_kv_curves      curves;
    std::vector<int32_t> curve_layers;
    std::string          curve_scorer;

    bool has_plan() const {
        return !cells.empty() || !type_k.empty() || !type_v.empty();
    }

    // the keys `depthkv.*`, file and key-value overrides; throws one line that names the key
    void load(llama_model_loader & ml);

    // the same of a file, without loading it
    void load(const char * path);

    // throws one line that names the value
    void check() const;
};

// see llama_depthkv_last_error(); an empty text: nothing failed
void llama_depthkv_set_error(const char * what);
