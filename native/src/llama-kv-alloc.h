#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

// what pruning costs: mean KL divergence in nats per token when a single layer keeps a fraction of its cells
struct llama_kv_curves {
    std::vector<float> ratios; // [R] keep ratios, ascending, in (0, 1]
    std::vector<float> loss;   // [L*R] row-major by layer, not increasing with the ratio; 0 at a ratio of 1 by definition

    bool empty() const {
        return loss.empty();
    }

    // throws std::runtime_error with one line that names the offending array: ratios_name or loss_name
    void check(uint32_t n_layers, const char * ratios_name, const char * loss_name) const;
};

// how a budget of KV cells is shared out over the layers: pure arithmetic, no model
struct llama_kv_alloc_params {
    uint32_t n_layers = 0;
    uint32_t n_ctx    = 0;   // cells of a layer in the full cache
    double   budget   = 0.0; // fraction of the bytes of the full cache, in (0, 1]
    double   eps      = 1e-7; // by which it may be exceeded: one that is a float, such as 0.7f, must not lose cells to rounding

    uint32_t n_floor = 1;    // least cells of a layer
    uint32_t n_align = 32;   // granularity of a layer

    llama_kv_curves curves;           // empty: none
    std::vector<uint64_t> cell_bytes; // [n_layers] bytes of a cell, empty: all the same
};

// an allocation rule: which layer gets the next few cells
//
// every layer starts at the floor. cells are handed out a step at a time to the layer that gains the most from them,
// until the next step no longer fits. the order of the steps does not depend on the budget, so more budget never takes
// a cell away from a layer
class llama_kv_alloc_i {
public:
    virtual ~llama_kv_alloc_i() = default;

    // how much layer il gains when it grows from n0 to n1 cells, must not increase with n0
    virtual double gain(uint32_t il, uint32_t n0, uint32_t n1) const = 0;
};

using llama_kv_alloc_ptr = std::unique_ptr<llama_kv_alloc_i>;

// the params outlive the rule
llama_kv_alloc_ptr llama_kv_alloc_init_uniform     (const llama_kv_alloc_params & params);
llama_kv_alloc_ptr llama_kv_alloc_init_proportional(const llama_kv_alloc_params & params);
llama_kv_alloc_ptr llama_kv_alloc_init_optimal     (const llama_kv_alloc_params & params);

struct llama_kv_alloc_info {
    const char * name;
    const char * desc;

    llama_kv_alloc_ptr (*init)(const llama_kv_alloc_params & params);
};

// every rule
const std::vector<llama_kv_alloc_info> & llama_kv_alloc_list();

// throws std::runtime_error with one line if the rule is unknown
void llama_kv_alloc_check_rule(const std::string & rule);

// the rule when there are curves and none is asked for, see docs/calibration.md
const char * llama_kv_alloc_default_rule();

// [n_layers] cells of each layer, multiples of n_align (or n_ctx), whose bytes do not exceed the budget
// throws std::runtime_error with one line if the rule is unknown or needs curves that are not there, the curves are
// nonsense, or the budget is out of range or below the floor
std::vector<uint32_t> llama_kv_alloc(const std::string & rule, const llama_kv_alloc_params & params);
