#include "llama-kv-depth-plan.h"

#include "llama-arch.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-alloc.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>
#include <stdexcept>

//
// layers
//

std::vector<int32_t> llama_kv_depth_layers(const llama_model & model) {
    const auto & hparams = model.hparams;

    const auto refuse = [&](const char * why) {
        throw std::runtime_error(format("KV budget is not defined for architecture '%s': %s", model.arch_name().c_str(), why));
    };

    if (llm_arch_is_recurrent(model.arch) || llm_arch_is_hybrid(model.arch)) {
        refuse("it has recurrent state");
    }
    if (llama_model_has_encoder(&model)) {
        refuse("it has an encoder");
    }
    if (hparams.is_mla()) {
        refuse("its keys and values are compressed together (MLA)");
    }
    if (hparams.use_alibi) {
        refuse("ALiBi biases depend on every cached position");
    }
    if (!hparams.causal_attn) {
        refuse("its attention is not causal");
    }
    if (hparams.n_rel_attn_bkts > 0 || hparams.ple_n_heads > 0 || hparams.router_layer >= 0) {
        refuse("it reads the cache outside attention");
    }

    std::vector<int32_t> res;

    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        // a layer without KV heads has no attention at all
        if (hparams.has_kv(il) && !hparams.is_swa(il) && hparams.n_head_kv(il) > 0) {
            res.push_back(il);
        }
    }

    if (res.empty()) {
        refuse("all of its layers have a sliding window, their cache is bounded already");
    }

    return res;
}

//
// sizes
//

void llama_kv_depth_check_type(int type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_IQ4_NL:
            return;
        default:
            throw std::runtime_error(format("type %d is not one for K and V: use f32, f16, bf16, q8_0 or q4_0", type));
    }
}

size_t llama_kv_depth_row_size_k(const llama_model & model, int32_t il, ggml_type type) {
    return ggml_row_size(type, model.hparams.n_embd_k_gqa(il));
}

size_t llama_kv_depth_row_size_v(const llama_model & model, int32_t il, ggml_type type) {
    return ggml_row_size(type, model.hparams.n_embd_v_gqa(il));
}

// as in llama_kv_cache_iswa without swa_full (tests/test-depth-plan.cpp holds them equal)
static uint32_t llama_kv_depth_swa_cells(const llama_model & model, uint32_t n_ctx_seq, uint32_t n_seq, uint32_t n_ubatch) {
    return GGML_PAD(std::min(n_ctx_seq, model.hparams.n_swa*n_seq + n_ubatch), 256);
}

static size_t llama_kv_depth_bytes(
        const llama_model & model,
                 uint32_t   n_cells,
                 uint32_t   n_cells_swa,
                ggml_type   type_k,
                ggml_type   type_v) {
    size_t res = 0;

    for (uint32_t il = 0; il < model.hparams.n_layer(); ++il) {
        if (model.hparams.has_kv(il)) {
            res += (size_t) (model.hparams.is_swa(il) ? n_cells_swa : n_cells)*(
                    llama_kv_depth_row_size_k(model, il, type_k) +
                    llama_kv_depth_row_size_v(model, il, type_v));
        }
    }

    return res;
}

size_t llama_kv_depth_bytes_full(
        const llama_model & model,
                 uint32_t   n_ctx_seq,
                 uint32_t   n_seq_max,
                     bool   unified,
                 uint32_t   n_ubatch,
                ggml_type   type_k,
                ggml_type   type_v) {
    const uint32_t n_stream    = unified ? 1 : n_seq_max;
    const uint32_t n_cells_swa = llama_kv_depth_swa_cells(model, n_ctx_seq, n_seq_max/n_stream, n_ubatch);

    return n_stream*llama_kv_depth_bytes(model, n_ctx_seq, n_cells_swa, type_k, type_v);
}

size_t llama_kv_depth_bytes_swa(
        const llama_model & model,
                 uint32_t   n_ctx_seq,
                 uint32_t   n_seq_max,
                 uint32_t   n_ubatch,
                ggml_type   type_k,
                ggml_type   type_v) {
    return n_seq_max*llama_kv_depth_bytes(model, 0, llama_kv_depth_swa_cells(model, n_ctx_seq, 1, n_ubatch), type_k, type_v);
}

//
// plan
//

// the curves in the order of the layers that grow with the context
static llama_kv_curves llama_kv_depth_curves_select(const llama_kv_depth_params & params, const std::vector<int32_t> & ids) {
    llama_kv_curves res;

    if (params.curves.empty()) {
        return res;
    }

    const size_t n_ratios = params.curves.ratios.size();

    res.ratios = params.curves.ratios;

    for (const int32_t il : ids) {
        const auto it = std::lower_bound(params.curve_layers.begin(), params.curve_layers.end(), il);
        if (it == params.curve_layers.end() || *it != il) {
            throw std::runtime_error(format("key 'depthkv.layer_ids' lacks layer %d, whose KV cells grow with the context: calibrate the model again", il));
        }

        const auto row = params.curves.loss.begin() + (it - params.curve_layers.begin())*n_ratios;
        res.loss.insert(res.loss.end(), row, row + n_ratios);
    }

    if (params.curve_layers.size() != ids.size()) {
        for (const int32_t il : params.curve_layers) {
            if (!std::binary_search(ids.begin(), ids.end(), il)) {
                throw std::runtime_error(format("key 'depthkv.layer_ids' names layer %d, whose KV cells do not grow with the context: calibrate the model again", il));
            }
        }
    }

    return res;
}

// make the context follow the plan
static void llama_kv_depth_plan_apply(const llama_model & model, const llama_kv_depth_plan & plan, llama_cparams & cparams) {
    cparams.n_ubatch   = plan.n_ubatch;
    cparams.kv_unified = false;

    // on the CPU attention is faster without the flash attention kernel, see docs/engine.md
    if (cparams.auto_fa) {
        bool on_cpu  = true;
        bool quant_v = false;
        for (const auto & layer : plan.layers) {
            on_cpu  = on_cpu  && (!cparams.offload_kqv || ggml_backend_dev_type(model.dev_layer(layer.il)) == GGML_BACKEND_DEVICE_TYPE_CPU);
            quant_v = quant_v || ggml_is_quantized(layer.type_v);
        }

        // a quantized V cannot do without it
        if (on_cpu || quant_v) {
            cparams.auto_fa    = false;
            cparams.flash_attn = quant_v;
        }
    }
}

static void llama_kv_depth_check_context(const llama_model & model, const llama_cparams & cparams) {
    if (cparams.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT || cparams.ctx_other) {
        throw std::runtime_error("KV budget is not defined for draft contexts (MTP)");
    }
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        throw std::runtime_error("KV budget is not defined for split mode 'tensor': drop the budget or use --split-mode layer");
    }
    if (cparams.embeddings) {
        throw std::runtime_error("KV budget is not defined for embedding contexts: drop the budget or --embedding");
    }
    if (!cparams.causal_attn) {
        throw std::runtime_error("KV budget is not defined for non-causal attention");
    }
    if (cparams.n_ctx_seq > (uint32_t) llama_kv_depth_pos_max) {
        throw std::runtime_error(format("a context of %u tokens is longer than the %d positions of a KV budget: give a smaller one",
                cparams.n_ctx_seq, llama_kv_depth_pos_max));
    }
}

llama_kv_depth_plan llama_kv_depth_plan_init(
          const llama_model           & model,
                llama_cparams         & cparams,
          const llama_context_params  & cparams_user,
          const llama_kv_depth_params * params_user) {
    llama_kv_depth_plan res;

    res.params = params_user ? *params_user : model.kv_depth;

    const auto & params = res.params;

    params.check();

    if (params.budget.is_full() && !params.has_plan()) {
        return res;
    }
    if (params.budget.kind == llama_kv_budget::AUTO) {
        throw std::runtime_error("KV budget auto is chosen before the weights are loaded: see llama_depthkv_plan()");
    }

    const auto ids = llama_kv_depth_layers(model);

    llama_kv_depth_check_context(model, cparams);

    res.n_ctx_seq = cparams.n_ctx_seq;
    res.type_k    = cparams_user.type_k;
    res.type_v    = cparams_user.type_v;

    llama_kv_depth_check_type(res.type_k);
    llama_kv_depth_check_type(res.type_v);

    const size_t n_layers = ids.size();

    if ((!params.cells .empty() && params.cells .size() != n_layers) ||
        (!params.type_k.empty() && params.type_k.size() != n_layers) ||
        (!params.type_v.empty() && params.type_v.size() != n_layers)) {
        throw std::runtime_error(format("explicit KV plan must have %zu layers", n_layers));
    }

    // a unified cache is shared by all sequences, so each gets its part of the cells and may use every position
    const uint32_t n_seq_max    = cparams.n_seq_max;
    const uint32_t n_cells_full = cparams.kv_unified && n_seq_max > 1 ? cparams.n_ctx_seq/n_seq_max/llama_kv_n_align*llama_kv_n_align : cparams.n_ctx_seq;

    const uint32_t n_ubatch_min = std::min(cparams.n_ubatch, llama_kv_n_ubatch_min);
    const uint32_t n_safe       = params.n_sink + params.n_recent;
    const uint32_t n_floor      = n_safe + n_ubatch_min;

    llama_kv_alloc_params aparams;

    aparams.n_layers = n_layers;
    aparams.n_ctx    = n_cells_full;
    aparams.n_floor  = n_floor;
    aparams.curves   = llama_kv_depth_curves_select(params, ids);

    // fast attention kernels of GPU backends want multiples of 256, but not at the price of a fifth of a small cache. CUDA has
    // no other kernel for wide heads, and for those whose values have another size
    // not decided by the budget: with another granularity a larger one could take cells away
    const bool is_wide = std::any_of(ids.begin(), ids.end(), [&](int32_t il) {
        return model.hparams.n_embd_head_k(il) > 256 || model.hparams.n_embd_head_k(il) != model.hparams.n_embd_head_v(il);
    });
    const bool on_gpu = std::any_of(ids.begin(), ids.end(), [&](int32_t il) {
        return ggml_backend_dev_type(model.dev_layer(il)) != GGML_BACKEND_DEVICE_TYPE_CPU;
    });
    aparams.n_align = on_gpu && cparams.offload_kqv && (aparams.n_ctx >= 8192 || is_wide) ? 256 : llama_kv_n_align;

    // a CPU is as fast with the tokens of one scoring pass as with more, and forgets less (docs/engine.md)
    const uint32_t n_ubatch_best = on_gpu ? cparams.n_ubatch : std::min(cparams.n_ubatch, llama_kv_n_query_span_pp);

    llama_kv_budget_full full = { n_cells_full*n_seq_max, 0, 0 };

    for (const int32_t il : ids) {
        aparams.cell_bytes.push_back(
                llama_kv_depth_row_size_k(model, il, cparams_user.type_k) + llama_kv_depth_row_size_v(model, il, cparams_user.type_v));

        full.bytes += full.n_tokens*aparams.cell_bytes.back();
    }

    // windows hold a ubatch, too
    const auto bytes_swa = [&](uint32_t n_ubatch) {
        return llama_kv_depth_bytes_swa(model, cparams.n_ctx_seq, n_seq_max, n_ubatch, cparams_user.type_k, cparams_user.type_v);
    };

    full.bytes_fixed = bytes_swa(cparams.n_ubatch);

    if (params.budget.kind != llama_kv_budget::NONE) {
        res.fraction = llama_kv_budget_resolve(params.budget, full);
    }
    if (params.budget.kind == llama_kv_budget::BYTES || params.budget.kind == llama_kv_budget::TOKENS) {
        aparams.eps = 1e-12; // limits are exact
    }
    if (res.fraction >= 1.0 && !params.has_plan()) {
        return res;
    }

    if (res.params.rule.empty()) {
        res.params.rule = aparams.curves.empty() ? "uniform" : llama_kv_alloc_default_rule();
    }

    const auto check_floor = [&](uint32_t n_cells) {
        if (n_cells < n_floor) {
            throw std::runtime_error(format("layer capacity %u is below the floor %u (%u sinks + %u recent + %u ubatch): raise --kv-budget or lower --ubatch",
                    n_cells, n_floor, params.n_sink, params.n_recent, n_ubatch_min));
        }
    };

    const auto plan_cells = [&](double fraction, uint32_t n_ubatch_max, uint32_t & n_ubatch) {
        check_floor((uint32_t) ((fraction + aparams.eps)*n_cells_full)/llama_kv_n_align*llama_kv_n_align);

        aparams.budget = fraction;

        auto cells = llama_kv_alloc(res.params.rule, aparams);

        for (size_t i = 0; i < params.cells.size(); ++i) {
            if (params.cells[i] > 0) {
                cells[i] = params.cells[i] >= n_cells_full ? n_cells_full : GGML_PAD(params.cells[i], llama_kv_n_align);
            }
        }

        const uint32_t n_cells_min = *std::min_element(cells.begin(), cells.end());

        check_floor(n_cells_min); // of an explicit plan

        // nothing is ever evicted from a full layer
        n_ubatch = n_cells_min >= cparams.n_ctx_seq ? n_ubatch_max : llama_kv_evict_n_ubatch(n_cells_min, n_safe, std::min(n_ubatch_max, n_ubatch_best));

        return cells;
    };

    auto cells = plan_cells(res.fraction, cparams.n_ubatch, res.n_ubatch);

    // the windows of the ubatch that this comes to may be smaller than was reckoned with. what they leave goes to the cells
    if (params.budget.kind == llama_kv_budget::BYTES && bytes_swa(res.n_ubatch) < full.bytes_fixed) {
        full.bytes_fixed = bytes_swa(res.n_ubatch);

        res.fraction = llama_kv_budget_resolve(params.budget, full);
        cells        = plan_cells(res.fraction, res.n_ubatch, res.n_ubatch);
    }

    // the curves measured with one scorer say little about another
    if (res.params.rule != "uniform" && params.cells.empty() && params.scorer != params.curve_scorer) {
        LLAMA_LOG_WARN("%s: the layers were calibrated with scorer '%s', not '%s': expect less of the allocation\n", __func__,
                params.curve_scorer.c_str(), params.scorer.c_str());
    }

    for (size_t i = 0; i < n_layers; ++i) {
        llama_kv_depth_plan::layer l;
        l.il     = ids[i];
        l.cells  = cells[i];
        l.type_k = params.type_k.empty() || params.type_k[i] == GGML_TYPE_COUNT ? cparams_user.type_k : params.type_k[i];
        l.type_v = params.type_v.empty() || params.type_v[i] == GGML_TYPE_COUNT ? cparams_user.type_v : params.type_v[i];

        llama_kv_depth_check_type(l.type_k);
        llama_kv_depth_check_type(l.type_v);

        res.layers.push_back(l);
    }

    llama_kv_depth_plan_apply(model, res, cparams);

    return res;
}

// tests/test-depth-plan.cpp holds these equal to what a context gets
llama_cparams llama_kv_depth_cparams(const llama_model & model, const llama_context_params & params) {
    llama_cparams res = {};

    res.n_seq_max  = std::max(1u, params.n_seq_max);
    res.kv_unified = params.kv_unified;
    res.n_ctx      = params.n_ctx == 0 ? model.hparams.n_ctx_train : params.n_ctx;

    res.causal_attn = params.attention_type == LLAMA_ATTENTION_TYPE_UNSPECIFIED ?
            model.hparams.causal_attn : params.attention_type == LLAMA_ATTENTION_TYPE_CAUSAL;

    res.n_batch  = res.causal_attn ? std::min(res.n_ctx, params.n_batch) : params.n_batch;
    res.n_ubatch = std::min(res.n_batch, params.n_ubatch == 0 ? params.n_batch : params.n_ubatch);

    res.n_ctx     = GGML_PAD(res.n_ctx, 256);
    res.n_ctx_seq = res.kv_unified ? res.n_ctx : GGML_PAD(res.n_ctx/res.n_seq_max, 256);

    if (!res.kv_unified) {
        res.n_ctx = res.n_ctx_seq*res.n_seq_max;
    }

    res.embeddings  = params.embeddings;
    res.offload_kqv = params.offload_kqv;
    res.ctx_type    = params.ctx_type;
    res.ctx_other   = params.ctx_other;

    res.flash_attn = params.flash_attn_type != LLAMA_FLASH_ATTN_TYPE_DISABLED;
    res.auto_fa    = params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_AUTO;

    return res;
}
