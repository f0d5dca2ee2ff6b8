#include "llama-kv-alloc.h"

#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

// the largest multiple of the granularity that does not exceed n, the full layer is always allowed
static uint32_t llama_kv_alloc_align(double n, const llama_kv_alloc_params & params) {
    // the budget arrives as a float: 0.6f*8192 must not lose a whole step to rounding
    const double eps = 1e-7*params.n_ctx;

    if (n + eps >= params.n_ctx) {
        return params.n_ctx;
    }

    return (uint32_t) std::floor((n + eps)/params.n_align)*params.n_align;
}

std::vector<uint32_t> llama_kv_alloc(const std::string & rule, const llama_kv_alloc_params & params) {
    if (params.n_layers == 0 || params.n_ctx == 0 || params.n_align == 0) {
        throw std::runtime_error("cannot share out a KV budget over zero layers or zero cells");
    }

    if (!(params.budget > 0.0 && params.budget <= 1.0)) {
        throw std::runtime_error(format("KV budget %g is out of range: it must be above 0 and at most 1", params.budget));
    }

    std::vector<double> want;

    if (rule == "uniform") {
        want = llama_kv_alloc_uniform(params);
    } else {
        throw std::runtime_error(format("unknown KV allocation rule '%s': use uniform", rule.c_str()));
    }

    std::vector<uint32_t> cells(params.n_layers);

    double total = 0.0;
    double used  = 0.0;

    for (uint32_t i = 0; i < params.n_layers; ++i) {
        cells[i] = llama_kv_alloc_align(want[i], params);

        total += want[i];
        used  += cells[i];
    }

    // hand out what rounding down left over, a step at a time, to the layers that lost the most
    // the running remainder spreads the steps of equal layers evenly over the depth of the model
    std::vector<uint32_t> order(params.n_layers);
    {
        double rem = 0.0;

        std::vector<double> key(params.n_layers);
        for (uint32_t i = 0; i < params.n_layers; ++i) {
            const double lost = want[i] - cells[i];

            rem += lost;
            key[i] = lost;
            if (rem >= params.n_align) {
                rem -= params.n_align;
                key[i] += params.n_align;
            }

            order[i] = i;
        }

        std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
            return key[a] > key[b];
        });
    }

    for (const uint32_t i : order) {
        const uint32_t next = std::min(cells[i] + params.n_align, params.n_ctx);

        if (used + (next - cells[i]) <= total + 1e-7*params.n_ctx*params.n_layers) {
            used += next - cells[i];
            cells[i] = next;
        }
    }

    const uint32_t n_min = *std::min_element(cells.begin(), cells.end());
    if (n_min < params.n_floor) {
        throw std::runtime_error(format("layer capacity %u is below the floor %u", n_min, params.n_floor));
    }

    return cells;
}
