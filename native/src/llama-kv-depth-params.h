#pragma once

#include "llama.h"
#include "llama-kv-alloc.h"

#include <cstdint>
#include <string>
#include <vector>

struct llama_cparams;
struct llama_model;
struct llama_model_loader;

// the last position: computed with in 32 bits, far beyond any context
static constexpr llama_pos llama_kv_depth_pos_max = 1 << 24;

// what is asked for: from the keys of the model, overridden by the caller (native/include/llama-depthkv.h)
struct llama_kv_depth_params {
    // fraction of the full cache, 0: no budget
    float budget = 0.0f;

    std::string scorer = "attention";

    // allocation rule, empty: the default one if there are curves, else uniform
    std::string rule;

    // tokens never evicted at the front and at the end
    uint32_t n_sink   = 4;
    uint32_t n_recent = 32;

    // explicit plan, by KV layer, empty: none
    std::vector<uint32_t>  cells;
    std::vector<ggml_type> type_k;
    std::vector<ggml_type> type_v;

    // what calibration measured, for the layers in curve_layers, by index in the model
    llama_kv_curves      curves;
    std::vector<int32_t> curve_layers;
    std::string          curve_scorer;

    // the stock cache serves a full budget
    bool enabled() const {
        return (budget > 0.0f && budget < 1.0f) || !cells.empty() || !type_k.empty() || !type_v.empty();
    }

    // the keys `depthkv.*`, file and key-value overrides; throws one line that names the key
    void load(llama_model_loader & ml);

    // throws one line that names the value
    void check() const;
};

// what the cache will be: decided before anything is allocated
struct llama_kv_depth_plan {
    struct layer {
        int32_t   il;
        uint32_t  cells;   // of one sequence
        ggml_type type_k;
        ggml_type type_v;
    };

    llama_kv_depth_params params;

    std::vector<layer> layers;

    uint32_t n_ctx_seq = 0; // positions of one sequence
    uint32_t n_ubatch  = 0;

    // types of the full cache that the budget is a fraction of
    ggml_type type_k = GGML_TYPE_F16;
    ggml_type type_v = GGML_TYPE_F16;
};

// see llama_depthkv_last_error()
void llama_depthkv_set_error(const char * what);

// the layers whose cells grow with the context, by index in the model
// throws one line that names the architecture if per-layer eviction is not defined for the model
std::vector<int32_t> llama_kv_depth_layers(const llama_model & model);

// the layer whose cache layer il reads, il itself unless the model shares caches between layers
int32_t llama_kv_depth_layer_reuse(const llama_model & model, int32_t il);

// throws one line if there is no plan for these parameters
llama_kv_depth_plan llama_kv_depth_plan_init(
          const llama_model           & model,
          const llama_cparams         & cparams,
          const llama_context_params  & cparams_user,
          const llama_kv_depth_params & params);

// make the context follow the plan: ubatch size, one stream per sequence, the fastest attention path
void llama_kv_depth_plan_apply(
        const llama_model         & model,
        const llama_kv_depth_plan & plan,
              llama_cparams       & cparams);

// llama_init_from_model() with an explicit plan, nullptr: the keys of the model
llama_context * llama_init_from_model_depth(
                      llama_model * model,
             llama_context_params   params,
      const llama_kv_depth_params * depth);

// bytes of one K or V row
size_t llama_kv_depth_row_size_k(const llama_model & model, int32_t il, ggml_type type);
size_t llama_kv_depth_row_size_v(const llama_model & model, int32_t il, ggml_type type);

// cells of an SWA layer of one sequence, as in llama_kv_cache_iswa without swa_full
uint32_t llama_kv_depth_swa_cells(const llama_model & model, uint32_t n_ctx_seq, uint32_t n_ubatch);

// throws one line if a type cannot hold K or V
void llama_kv_depth_check_type(int type);

// bytes of the cache that stock llama.cpp would allocate
size_t llama_kv_depth_bytes_full(
        const llama_model & model,
                 uint32_t   n_ctx_seq,
                 uint32_t   n_seq_max,
                 uint32_t   n_ubatch,
                ggml_type   type_k,
                ggml_type   type_v);
