#include "llama-kv-alloc.h"

#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <queue>
#include <stdexcept>

void llama_kv_curves::check(uint32_t n_layers, const char * ratios_name, const char * loss_name) const {
    if (ratios.empty()) {
        throw std::runtime_error(format("%s is empty: it must hold at least one keep ratio", ratios_name));
    }

    for (size_t i = 0; i < ratios.size(); ++i) {
        if (!(ratios[i] > 0.0f && ratios[i] <= 1.0f) || (i > 0 && ratios[i] <= ratios[i - 1])) {
            throw std::runtime_error(format("%s[%zu] is %g: keep ratios must ascend, above 0 and at most 1", ratios_name, i, ratios[i]));
        }
    }

    if (loss.size() != n_layers*ratios.size()) {
        throw std::runtime_error(format("%s has %zu values: %u layers and %zu keep ratios need %zu",
                loss_name, loss.size(), n_layers, ratios.size(), n_layers*ratios.size()));
    }

    for (size_t i = 0; i < loss.size(); ++i) {
        if (!std::isfinite(loss[i]) || loss[i] < 0.0f) {
            throw std::runtime_error(format("%s[%zu] is %g: a loss must be finite and not negative", loss_name, i, loss[i]));
        }

        // but for rounding
        if (i % ratios.size() > 0 && loss[i] > loss[i - 1]*(1.0f + 1e-6f)) {
            throw std::runtime_error(format("%s[%zu] is %g and the one before it %g: a loss must not grow with the keep ratio",
                    loss_name, i, loss[i], loss[i - 1]));
        }

        if (ratios[i % ratios.size()] >= 1.0f && loss[i] != 0.0f) {
            throw std::runtime_error(format("%s[%zu] is %g: the loss at a keep ratio of 1 is 0", loss_name, i, loss[i]));
        }
    }
}

//
// rules
//

const std::vector<llama_kv_alloc_info> & llama_kv_alloc_list() {
    static const std::vector<llama_kv_alloc_info> list = {
        { "uniform",      "all layers the same",                            llama_kv_alloc_init_uniform      },
        { "proportional", "cells by the square root of the sensitivity",    llama_kv_alloc_init_proportional },
        { "optimal",      "cells where they lower the total loss the most", llama_kv_alloc_init_optimal      },
    };

    return list;
}

static const llama_kv_alloc_info & llama_kv_alloc_find(const std::string & rule) {
    std::string names;
    for (const auto & info : llama_kv_alloc_list()) {
        if (rule == info.name) {
            return info;
        }
        names += (names.empty() ? "" : ", ") + std::string(info.name);
    }

    throw std::runtime_error(format("unknown KV allocation rule '%s': use one of %s", rule.c_str(), names.c_str()));
}

void llama_kv_alloc_check_rule(const std::string & rule) {
    llama_kv_alloc_find(rule);
}

const char * llama_kv_alloc_default_rule() {
    return "optimal";
}

//
// steps
//

// the van der Corput sequence: neighbours are far apart, so that steps among equal layers spread over the depth of the model
static uint32_t llama_kv_alloc_scatter(uint32_t i) {
    uint32_t res = 0;
    for (uint32_t bit = 0; bit < 32; ++bit) {
        res |= ((i >> bit) & 1) << (31 - bit);
    }

    return res;
}

struct llama_kv_alloc_step {
    uint32_t il;
    uint32_t n; // cells after the step
    double   gain;

    // the largest gain first, among equals the layer with the fewest cells
    bool operator<(const llama_kv_alloc_step & other) const {
        if (gain != other.gain) {
            return gain < other.gain;
        }
        if (n != other.n) {
            return n > other.n;
        }
        return llama_kv_alloc_scatter(il) > llama_kv_alloc_scatter(other.il);
    }
};

std::vector<uint32_t> llama_kv_alloc(const std::string & rule_name, const llama_kv_alloc_params & params) {
    const uint32_t n_ctx    = params.n_ctx;
    const uint32_t n_layers = params.n_layers;

    const auto & info = llama_kv_alloc_find(rule_name);

    if (n_layers == 0 || n_ctx == 0 || params.n_align == 0) {
        throw std::runtime_error("cannot share out a KV budget over zero layers or zero cells");
    }

    if (!(params.budget > 0.0 && params.budget <= 1.0)) {
        throw std::runtime_error(format("KV budget %g is out of range: it must be above 0 and at most 1", params.budget));
    }

    if (!params.curves.empty()) {
        params.curves.check(n_layers, "keep_ratios", "sensitivity");
    } else if (rule_name != "uniform") {
        throw std::runtime_error(format("KV allocation rule '%s' needs the sensitivity of every layer: calibrate the model or use uniform", rule_name.c_str()));
    }

    if (!params.cell_bytes.empty() && (params.cell_bytes.size() != n_layers || std::count(params.cell_bytes.begin(), params.cell_bytes.end(), 0) > 0)) {
        throw std::runtime_error(format("cell_bytes must hold %u sizes above 0", n_layers));
    }

    const auto bytes = [&](uint32_t il) {
        return params.cell_bytes.empty() ? 1 : params.cell_bytes[il];
    };

    const auto rule = info.init(params);

    const uint32_t n_align = params.n_align;
    const uint32_t n_floor = std::min<uint64_t>(((uint64_t) params.n_floor + n_align - 1)/n_align*n_align, n_ctx);

    std::vector<uint32_t> cells(n_layers, n_floor);

    double total = 0.0;
    double used  = 0.0;

    for (uint32_t il = 0; il < n_layers; ++il) {
        total += (double) bytes(il)*n_ctx;
        used  += (double) bytes(il)*n_floor;
    }

    const double limit = (params.budget + params.eps)*total;

    if (used > limit) {
        throw std::runtime_error(format("layer capacity %u is below the floor %u: raise the budget of %g or the context of %u",
                (uint32_t) (params.budget*n_ctx)/n_align*n_align, n_floor, params.budget, n_ctx));
    }

    std::priority_queue<llama_kv_alloc_step> steps;

    const auto push = [&](uint32_t il) {
        if (cells[il] < n_ctx) {
            const uint32_t n = std::min<uint64_t>((uint64_t) cells[il] + n_align, n_ctx);
            steps.push({ il, n, rule->gain(il, cells[il], n) });
        }
    };

    for (uint32_t il = 0; il < n_layers; ++il) {
        push(il);
    }

    while (!steps.empty()) {
        const auto step = steps.top();
        steps.pop();

        const double cost = (double) bytes(step.il)*(step.n - cells[step.il]);

        // not skipped in favour of one that fits: a larger budget would then take cells away again
        if (used + cost > limit) {
            break;
        }

        used += cost;
        cells[step.il] = step.n;

        push(step.il);
    }

    return cells;
}
