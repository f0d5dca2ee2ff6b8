#include "llama-kv-alloc.h"

// the same number of cells for every layer
std::vector<double> llama_kv_alloc_uniform(const llama_kv_alloc_params & params) {
    return std::vector<double>(params.n_layers, params.budget*params.n_ctx);
}
