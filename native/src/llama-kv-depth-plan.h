#pragma once

#include "llama-kv-depth-params.h"

#include <cstdint>
#include <vector>

struct llama_cparams;
struct llama_model;

// what the cache will be: decided before anything is allocated
struct llama_kv_depth_plan {
    struct layer {
        int32_t   il;
        uint32_t  cells;   // of one sequence
        ggml_type type_k;
        ggml_type type_v;
    };

    llama_kv_depth_params params;

    std::vector<layer> layers; // empty: the stock cache serves the budget

    double   fraction  = 1.0; // of the full cache, what the budget comes to
    uint32_t n_ctx_seq = 0;   // positions of one sequence
    uint32_t n_ubatch  = 0;

    // types of the full cache that the budget is a fraction of
    ggml_type type_k = GGML_TYPE_F16;
    ggml_type type_v = GGML_TYPE_F16;

    bool enabled() const {
        return !layers.empty();
    }
};

// plan the cache of a context, and make its parameters follow: ubatch size, one stream per sequence, the fastest attention
// params: nullptr for the keys of the model
// throws one line if there is no plan for these parameters
llama_kv_depth_plan llama_kv_depth_plan_init(
          const llama_model           & model,
                llama_cparams         & cparams,
          const llama_context_params  & cparams_user,
          const llama_kv_depth_params * params);

// the parameters of a context that a plan depends on, as the constructor of llama_context sets them before there is a plan
llama_cparams llama_kv_depth_cparams(const llama_model & model, const llama_context_params & params);

// llama_init_from_model() with an explicit plan, nullptr: the keys of the model
llama_context * llama_init_from_model_depth(
                      llama_model * model,
             llama_context_params   params,
      const llama_kv_depth_params * depth);

// the layers whose cells grow with the context, by index in the model
// throws one line that names the architecture if per-layer eviction is not defined for the model
std::vector<int32_t> llama_kv_depth_layers(const llama_model & model);

// bytes of one K or V row
size_t llama_kv_depth_row_size_k(const llama_model & model, int32_t il, ggml_type type);
size_t llama_kv_depth_row_size_v(const llama_model & model, int32_t il, ggml_type type);

// throws one line if a type cannot hold K or V
void llama_kv_depth_check_type(int type);

// bytes of the cache that stock llama.cpp would allocate without swa_full
// unified: all sequences share its cells
size_t llama_kv_depth_bytes_full(
        const llama_model & model,
                 uint32_t   n_ctx_seq,
                 uint32_t   n_seq_max,
                     bool   unified,
                 uint32_t   n_ubatch,
                ggml_type   type_k,
                ggml_type   type_v);

// bytes of the SWA layers in a depth cache, where each sequence has windows of its own
size_t llama_kv_depth_bytes_swa(
        const llama_model & model,
                 uint32_t   n_ctx_seq,
                 uint32_t   n_seq_max,
                 uint32_t   n_ubatch,
                ggml_type   type_k,
                ggml_type   type_v);
