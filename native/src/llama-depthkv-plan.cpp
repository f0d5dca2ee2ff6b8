#include "llama-depthkv.h"

#include "llama-cpp.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-depthkv-impl.h"
#include "llama-impl.h"
#include "llama-kv-alloc.h"
#include "llama-kv-depth-memory.h"
#include "llama-kv-depth-plan.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

//
// what is asked for
//

bool llama_depthkv_budget_parse(const char * text, llama_depthkv_budget * budget) {
    return llama_depthkv_try(false, [&]() {
        llama_depthkv_check_ptr(text,   "text");
        llama_depthkv_check_ptr(budget, "budget");

        const auto res = llama_kv_budget::parse(text);

        budget->value = res.value;

        switch (res.kind) {
            case llama_kv_budget::FRACTION: budget->type = LLAMA_DEPTHKV_BUDGET_FRACTION; break;
            case llama_kv_budget::BYTES:    budget->type = LLAMA_DEPTHKV_BUDGET_BYTES;    break;
            case llama_kv_budget::TOKENS:   budget->type = LLAMA_DEPTHKV_BUDGET_TOKENS;   break;
            default:                        budget->type = LLAMA_DEPTHKV_BUDGET_AUTO;     break;
        }

        return true;
    });
}

llama_depthkv_params llama_depthkv_default_params(void) {
    llama_depthkv_params res = {
        /*.budget   =*/ nullptr,
        /*.memory   =*/ 0,
        /*.scorer   =*/ nullptr,
        /*.rule     =*/ nullptr,
        /*.n_sink   =*/ -1,
        /*.n_recent =*/ -1,
        /*.n_layers =*/ 0,
        /*.cells    =*/ nullptr,
        /*.type_k   =*/ nullptr,
        /*.type_v   =*/ nullptr,
    };

    return res;
}

// a caller in C can give any number, and to read one that is no ggml_type as such is undefined behaviour
static std::vector<ggml_type> llama_depthkv_read_types(const ggml_type * types, size_t n) {
    std::vector<ggml_type> res(n);

    for (size_t i = 0; i < n; ++i) {
        int32_t type;
        static_assert(sizeof(type) == sizeof(types[i]), "ggml_type is not an int");
        memcpy(&type, types + i, sizeof(type));
        llama_kv_depth_check_type(type);
        res[i] = (ggml_type) type;
    }

    return res;
}

llama_kv_depth_params llama_depthkv_read_params(const llama_model & model, const llama_depthkv_params & depth) {
    if ((depth.cells || depth.type_k || depth.type_v) && depth.n_layers == 0) {
        throw std::runtime_error("an explicit KV plan needs n_layers");
    }
    if (depth.n_layers != 0) {
        // before anything is read: the arrays are as long as the caller says
        const size_t n_layers = llama_kv_depth_layers(model).size();
        if (depth.n_layers != n_layers) {
            throw std::runtime_error(format("explicit KV plan must have %zu layers", n_layers));
        }
    }

    llama_kv_depth_params res = model.kv_depth;

    if (depth.budget) {
        res.budget = llama_kv_budget::parse(depth.budget);
    }
    if (depth.scorer) {
        res.scorer = depth.scorer;
    }
    if (depth.rule) {
        res.rule = depth.rule;
    }
    if (depth.n_sink >= 0) {
        res.n_sink = depth.n_sink;
    }
    if (depth.n_recent >= 0) {
        res.n_recent = depth.n_recent;
    }
    if (depth.cells) {
        res.cells.assign(depth.cells, depth.cells + depth.n_layers);
    }
    if (depth.type_k) {
        res.type_k = llama_depthkv_read_types(depth.type_k, depth.n_layers);
    }
    if (depth.type_v) {
        res.type_v = llama_depthkv_read_types(depth.type_v, depth.n_layers);
    }

    res.check();

    return res;
}

llama_context * llama_depthkv_init_context(llama_model * model, const llama_context_params & params, const llama_kv_depth_params & dparams) {
    llama_depthkv_set_error("");

    auto * res = llama_init_from_model_depth(model, params, &dparams);

    if (!res) {
        const std::string why = llama_depthkv_last_error();
        throw std::runtime_error(why.empty() ? "failed to initialize the context: see the log" : why);
    }

    return res;
}

//
// plan
//

// beside tensors and buffers: the records of the cells (llama-kv-depth-cells.h, or llama_kv_cells with the nodes of its
// sets), logits and the candidates of a sampler, graphs, threads, what the allocator cannot use
static size_t llama_depthkv_bytes_other(const llama_model & model, const llama_cparams & cparams, const llama_kv_depth_plan & plan) {
    size_t n_cells = 0;
    for (const auto & layer : plan.layers) {
        n_cells += (size_t) layer.cells*cparams.n_seq_max;
    }

    return 12*1024*1024 + (size_t) 64*model.vocab.n_tokens() + (plan.enabled() ? 12*n_cells : (size_t) 160*cparams.n_ctx);
}

llama_depthkv_stats llama_depthkv_init_stats(const llama_model & model, const llama_cparams & cparams, const llama_kv_depth_plan & plan) {
    llama_depthkv_stats res = {};

    res.active        = plan.enabled();
    res.n_layers      = plan.layers.size();
    res.n_ctx_seq     = cparams.n_ctx_seq;
    res.n_ubatch      = cparams.n_ubatch;
    res.bytes_weights = model.size();
    res.bytes_other   = llama_depthkv_bytes_other(model, cparams, plan);

    // a float that is read back as a budget must not ask for more
    res.budget = plan.fraction;
    if (res.budget > plan.fraction) {
        res.budget = std::nextafter(res.budget, 0.0f);
    }

    snprintf(res.scorer,     sizeof(res.scorer),     "%s", plan.enabled() ? plan.params.scorer.c_str()       : "none");
    snprintf(res.rule,       sizeof(res.rule),       "%s", plan.enabled() ? plan.params.rule.c_str()         : "full");
    snprintf(res.calibrated, sizeof(res.calibrated), "%s", plan.enabled() ? plan.params.curve_scorer.c_str() : "");

    return res;
}

// the statistics of an empty context
struct llama_depthkv_planned {
    llama_depthkv_stats              stats = {};
    std::vector<llama_depthkv_layer> layers;

    std::string device; // why a device has no room for it

    // of the host
    size_t total() const {
        const size_t res = stats.bytes + stats.bytes_scorer + stats.bytes_compute + stats.bytes_work + stats.bytes_weights + stats.bytes_other;

        return res - std::min(res, stats.bytes_device);
    }
};

// from the parameters alone: without buffers
static llama_depthkv_planned llama_depthkv_plan_cells(const llama_model & model, const llama_context_params & params, const llama_kv_depth_params & dparams) {
    llama_depthkv_planned res;

    auto & stats = res.stats;

    auto cparams = llama_kv_depth_cparams(model, params);

    const bool unified = cparams.kv_unified;

    const auto plan = llama_kv_depth_plan_init(model, cparams, params, &dparams);

    stats = llama_depthkv_init_stats(model, cparams, plan);

    // whatever else the model has in place of a cache
    try {
        llama_kv_depth_layers(model);
    } catch (const std::exception &) {
        return res;
    }

    llama_kv_depth_check_type(params.type_k);
    llama_kv_depth_check_type(params.type_v);

    stats.bytes_full = llama_kv_depth_bytes_full(model, cparams.n_ctx_seq, cparams.n_seq_max, unified, cparams.n_ubatch, params.type_k, params.type_v);

    if (!plan.enabled()) {
        stats.bytes = stats.bytes_full;
        return res;
    }

    stats.bytes = llama_kv_depth_bytes_swa(model, cparams.n_ctx_seq, cparams.n_seq_max, cparams.n_ubatch, params.type_k, params.type_v);

    for (const auto & layer : plan.layers) {
        llama_depthkv_layer l = {};

        l.layer = layer.il;
        l.cells = layer.cells;
        l.bytes = (size_t) layer.cells*cparams.n_seq_max*(
                llama_kv_depth_row_size_k(model, layer.il, layer.type_k) +
                llama_kv_depth_row_size_v(model, layer.il, layer.type_v));

        stats.bytes += l.bytes;

        res.layers.push_back(l);
    }

    return res;
}

// from a context on a model without weights, which allocates nothing
static llama_depthkv_planned llama_depthkv_plan_context(llama_model * model, const llama_context_params & params, const llama_kv_depth_params & dparams) {
    llama_depthkv_planned res;

    llama_context_ptr ctx(llama_depthkv_init_context(model, params, dparams));

    if (!llama_depthkv_get_stats(ctx.get(), &res.stats)) {
        throw std::runtime_error(llama_depthkv_last_error());
    }

    res.device = llama_kv_depth_memory_check(llama_kv_depth_memory_devices(ctx->memory_breakdown()));

    res.layers.resize(res.stats.n_layers);
    for (int32_t i = 0; i < res.stats.n_layers; ++i) {
        llama_depthkv_get_layer(ctx.get(), i, 0, &res.layers[i]);
    }

    return res;
}

//
// memory
//

// the largest budget, and the largest ubatch, that fit
struct llama_depthkv_search {
    llama_model              * model;
    llama_context_params       params;
    llama_kv_depth_params      dparams;
    size_t                     memory;

    std::vector<llama_kv_budget> budgets; // ascending
    std::vector<uint32_t>        ubatches; // descending

    llama_depthkv_planned res;

    // throws where there is no plan
    bool fits(const llama_kv_budget & budget, uint32_t n_ubatch) {
        auto p = params;
        auto d = dparams;

        p.n_ubatch = n_ubatch;
        d.budget   = budget;

        res = llama_depthkv_plan_cells(*model, p, d);

        // not even a context if the records of its cells alone are too much
        if (res.stats.bytes_other <= std::max<size_t>(memory, 1 << 30)) {
            res = llama_depthkv_plan_context(model, p, d);
        }

        return res.total() <= memory && res.device.empty();
    }

    // the least that there is a plan for
    bool least_fits() {
        const uint32_t n_ubatch = ubatches.back();

        size_t low  = 0;
        size_t high = budgets.size() - 1;

        while (low < high) {
            const size_t mid = (low + high)/2;
            try {
                fits(budgets[mid], n_ubatch);
                high = mid;
            } catch (const std::exception &) { // below the floor of a layer
                low = mid + 1;
            }
        }

        return fits(budgets[low], n_ubatch);
    }

    bool find(uint32_t n_ubatch) {
        llama_depthkv_planned best;

        bool found = false;

        for (size_t low = 0, high = budgets.size(); low < high;) {
            const size_t mid = (low + high)/2;

            bool is_above = false;
            bool is_below = false;
            try {
                is_above = !fits(budgets[mid], n_ubatch);
            } catch (const std::exception &) { // below the floor of a layer
                is_below = true;
            }

            if (is_above) {
                high = mid;
                continue;
            }
            if (!is_below) {
                best  = res;
                found = true;
            }
            low = mid + 1;
        }

        if (found) {
            res = best;
        }

        return found;
    }

    // the full cache comes before a large ubatch, which is only faster; a slightly larger budget does not
    bool run() {
        if (!least_fits()) {
            return false;
        }
        if (budgets.size() > 1) {
            for (const uint32_t n_ubatch : ubatches) {
                if (fits(budgets.back(), n_ubatch)) {
                    return true;
                }
            }
        }
        for (const uint32_t n_ubatch : ubatches) {
            if (find(n_ubatch)) {
                return true;
            }
        }

        return least_fits();
    }
};

// budgets to choose from: docs/calibration.md has no measurement below the first
static constexpr int LLAMA_DEPTHKV_AUTO_MIN = 20;

static bool llama_depthkv_plan_fit(
                llama_model            * model,
          const llama_context_params   & params,
          const llama_kv_depth_params  & dparams,
                size_t                   memory,
                llama_depthkv_planned  & planned) {
    llama_depthkv_search search = { model, params, dparams, memory, {}, {}, {} };

    if (dparams.budget.kind == llama_kv_budget::AUTO) {
        llama_kv_depth_layers(*model); // or there is nothing to choose from
        for (int i = LLAMA_DEPTHKV_AUTO_MIN; i <= 100; ++i) {
            search.budgets.push_back({ llama_kv_budget::FRACTION, (float) (i/100.0) });
        }
    } else {
        search.budgets.push_back(dparams.budget);
    }

    search.ubatches.push_back(llama_kv_depth_cparams(*model, params).n_ubatch);
    for (const uint32_t n_ubatch : { 512, 256, 128, 64, 32 }) {
        if (n_ubatch < search.ubatches.front()) {
            search.ubatches.push_back(n_ubatch);
        }
    }

    const bool res = search.run();

    planned = search.res;

    return res;
}

size_t llama_depthkv_memory_free(void) {
    // others want some of it, too
    return llama_kv_depth_memory_free()/10*9;
}

int32_t llama_depthkv_plan(
                llama_model          * model,
                llama_context_params   params,
                llama_depthkv_params   depth,
                llama_depthkv_stats  * stats,
                llama_depthkv_layer  * layers,
                int32_t                n) {
    return llama_depthkv_try(-1, [&]() {
        llama_depthkv_check_ptr(model);
        llama_depthkv_check_ptr(stats, "stats");

        const auto dparams = llama_depthkv_read_params(*model, depth);
        const bool is_auto = dparams.budget.kind == llama_kv_budget::AUTO;

        const size_t memory = depth.memory != 0 || !is_auto ? depth.memory : llama_depthkv_memory_free();

        if (memory == 0 && is_auto) {
            throw std::runtime_error("the free memory of this machine is not known: give a KV budget other than auto");
        }
        if (memory != 0 && !model->hparams.no_alloc) {
            throw std::runtime_error("what fits a memory size is planned on a model without weights (llama_model_params::no_alloc)");
        }

        llama_depthkv_planned planned;

        int32_t res = 0;

        if (memory != 0) {
            res = llama_depthkv_plan_fit(model, params, dparams, memory, planned) ? 0 : 1;
        } else if (model->hparams.no_alloc) {
            planned = llama_depthkv_plan_context(model, params, dparams);
            res     = planned.device.empty() ? 0 : 1;
        } else {
            planned = llama_depthkv_plan_cells(*model, params, dparams);
        }

        const double mib = 1024.0*1024.0;

        if (res == 1 && !planned.device.empty()) {
            llama_depthkv_set_error(format("%s, for a context of %u tokens with a budget of %.3g and a ubatch of %u: offload fewer layers, or give a smaller context or budget",
                    planned.device.c_str(), planned.stats.n_ctx_seq, planned.stats.budget, planned.stats.n_ubatch).c_str());
        } else if (res == 1) {
            llama_depthkv_set_error(format("%.0f MiB is too little memory for a context of %u tokens: the least that would do is %.0f MiB, with a budget of %.3g and a ubatch of %u",
                    memory/mib, planned.stats.n_ctx_seq, std::ceil(planned.total()/mib), planned.stats.budget, planned.stats.n_ubatch).c_str());
        }

        if (n > 0) {
            llama_depthkv_check_ptr(layers, "layers");
        }

        *stats = planned.stats;
        std::copy_n(planned.layers.begin(), std::min<size_t>(planned.layers.size(), std::max(n, 0)), layers);

        return res;
    });
}

//
// allocation
//

bool llama_depthkv_alloc(llama_depthkv_alloc_params params, uint32_t * cells) {
    return llama_depthkv_try(false, [&]() {
        llama_depthkv_check_ptr(cells, "cells");

        llama_kv_alloc_params aparams;

        aparams.n_layers = params.n_layers;
        aparams.n_ctx    = params.n_ctx;
        aparams.budget   = params.budget;
        aparams.n_floor  = params.n_floor;
        aparams.n_align  = params.n_align;

        if (params.n_ratios > 0) {
            if (!params.keep_ratios || !params.sensitivity) {
                throw std::runtime_error("keep_ratios or sensitivity is NULL");
            }
            aparams.curves.ratios.assign(params.keep_ratios, params.keep_ratios + params.n_ratios);
            aparams.curves.loss  .assign(params.sensitivity, params.sensitivity + (size_t) params.n_layers*params.n_ratios);
        }
        if (params.cell_bytes) {
            aparams.cell_bytes.assign(params.cell_bytes, params.cell_bytes + params.n_layers);
        }

        const char * rule = params.rule ? params.rule : params.n_ratios > 0 ? llama_kv_alloc_default_rule() : "uniform";

        const auto res = llama_kv_alloc(rule, aparams);

        std::copy(res.begin(), res.end(), cells);

        return true;
    });
}
