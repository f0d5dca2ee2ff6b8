#include "llama-kv-depth-params.h"

#include "llama-arch.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-alloc.h"
#include "llama-kv-score.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

//
// keys
//

// the keys are few and private to this file, so they are read with gguf.h: a wrong type must be an error that names the
// key, also when it comes from the command line
static const llama_model_kv_override * llama_kv_depth_find_override(const llama_model_loader & ml, const char * key) {
    const auto it = ml.kv_overrides.find(key);

    return it == ml.kv_overrides.end() ? nullptr : &it->second;
}

static bool llama_kv_depth_get_f32(const llama_model_loader & ml, const char * key, float & res) {
    if (const auto * ovrd = llama_kv_depth_find_override(ml, key)) {
        switch (ovrd->tag) {
            case LLAMA_KV_OVERRIDE_TYPE_FLOAT: res = ovrd->val_f64; return true;
            case LLAMA_KV_OVERRIDE_TYPE_INT:   res = ovrd->val_i64; return true;
            default: throw std::runtime_error(format("key '%s' must be overridden with a float", key));
        }
    }

    const int64_t id = gguf_find_key(ml.metadata, key);
    if (id < 0) {
        return false;
    }

    if (gguf_get_kv_type(ml.metadata, id) != GGUF_TYPE_FLOAT32) {
        throw std::runtime_error(format("key '%s' must be of type f32, not %s", key, gguf_type_name(gguf_get_kv_type(ml.metadata, id))));
    }

    res = gguf_get_val_f32(ml.metadata, id);

    return true;
}

static bool llama_kv_depth_get_u32(const llama_model_loader & ml, const char * key, uint32_t & res) {
    if (const auto * ovrd = llama_kv_depth_find_override(ml, key)) {
        if (ovrd->tag != LLAMA_KV_OVERRIDE_TYPE_INT || ovrd->val_i64 < 0 || ovrd->val_i64 > INT32_MAX) {
            throw std::runtime_error(format("key '%s' must be overridden with a non-negative integer", key));
        }
        res = ovrd->val_i64;
        return true;
    }

    const int64_t id = gguf_find_key(ml.metadata, key);
    if (id < 0) {
        return false;
    }

    if (gguf_get_kv_type(ml.metadata, id) != GGUF_TYPE_UINT32) {
        throw std::runtime_error(format("key '%s' must be of type u32, not %s", key, gguf_type_name(gguf_get_kv_type(ml.metadata, id))));
    }

    res = gguf_get_val_u32(ml.metadata, id);

    return true;
}

static bool llama_kv_depth_get_str(const llama_model_loader & ml, const char * key, std::string & res) {
    if (const auto * ovrd = llama_kv_depth_find_override(ml, key)) {
        if (ovrd->tag != LLAMA_KV_OVERRIDE_TYPE_STR) {
            throw std::runtime_error(format("key '%s' must be overridden with a string", key));
        }
        res = ovrd->val_str;
        return true;
    }

    const int64_t id = gguf_find_key(ml.metadata, key);
    if (id < 0) {
        return false;
    }

    if (gguf_get_kv_type(ml.metadata, id) != GGUF_TYPE_STRING) {
        throw std::runtime_error(format("key '%s' must be of type string, not %s", key, gguf_type_name(gguf_get_kv_type(ml.metadata, id))));
    }

    res = gguf_get_val_str(ml.metadata, id);

    return true;
}

// arrays cannot be overridden
static const void * llama_kv_depth_get_arr(const llama_model_loader & ml, const char * key, gguf_type type, size_t & n) {
    const int64_t id = gguf_find_key(ml.metadata, key);
    if (id < 0) {
        throw std::runtime_error(format("key '%s' is missing: the other keys of a calibration are there", key));
    }

    if (gguf_get_kv_type(ml.metadata, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(ml.metadata, id) != type) {
        throw std::runtime_error(format("key '%s' must be an array of type %s", key, gguf_type_name(type)));
    }

    n = gguf_get_arr_n(ml.metadata, id);

    // gguf keeps nothing for an empty array
    return n == 0 ? nullptr : gguf_get_arr_data(ml.metadata, id);
}

static std::vector<float> llama_kv_depth_get_arr_f32(const llama_model_loader & ml, const char * key) {
    size_t n = 0;
    const auto * data = (const float *) llama_kv_depth_get_arr(ml, key, GGUF_TYPE_FLOAT32, n);

    return std::vector<float>(data, data + n);
}

static std::vector<int32_t> llama_kv_depth_get_arr_i32(const llama_model_loader & ml, const char * key) {
    size_t n = 0;
    const auto * data = (const int32_t *) llama_kv_depth_get_arr(ml, key, GGUF_TYPE_INT32, n);

    return std::vector<int32_t>(data, data + n);
}

// all of the keys or none: a file with half a calibration is broken, not uniform
static void llama_kv_depth_curves_load(llama_model_loader & ml, llama_kv_depth_params & params) {
    const char * key_layers = "depthkv.layer_ids";
    const char * key_ratios = "depthkv.keep_ratios";
    const char * key_loss   = "depthkv.sensitivity";
    const char * key_se     = "depthkv.sensitivity_se";
    const char * key_scorer = "depthkv.scorer";

    bool found = false;
    for (const char * key : { key_layers, key_ratios, key_loss, key_se }) {
        found = found || gguf_find_key(ml.metadata, key) >= 0;
    }
    if (!found) {
        return;
    }

    for (const char * key : { key_scorer, "depthkv.sink_tokens", "depthkv.recent_tokens" }) {
        if (gguf_find_key(ml.metadata, key) < 0) {
            throw std::runtime_error(format("key '%s' is missing: the other keys of a calibration are there", key));
        }
    }

    // the curves were measured with the scorer of the file, an override does not change that
    {
        const int64_t id = gguf_find_key(ml.metadata, key_scorer);

        if (gguf_get_kv_type(ml.metadata, id) != GGUF_TYPE_STRING || !llama_kv_score_init(gguf_get_val_str(ml.metadata, id))) {
            throw std::runtime_error(format("key '%s' must be one of %s", key_scorer, llama_kv_score_names()));
        }

        params.curve_scorer = gguf_get_val_str(ml.metadata, id);
    }

    const auto layers = llama_kv_depth_get_arr_i32(ml, key_layers);
    const auto ratios = llama_kv_depth_get_arr_f32(ml, key_ratios);
    const auto loss   = llama_kv_depth_get_arr_f32(ml, key_loss);

    if (layers.empty()) {
        throw std::runtime_error(format("key '%s' is empty: it must name at least one layer", key_layers));
    }

    uint32_t n_layer = 0;
    ml.get_key(LLM_KV_BLOCK_COUNT, n_layer);

    for (size_t i = 0; i < layers.size(); ++i) {
        if (layers[i] < 0 || layers[i] >= (int32_t) n_layer) {
            throw std::runtime_error(format("key '%s' names layer %d: the model has %u", key_layers, layers[i], n_layer));
        }
        if (i > 0 && layers[i] <= layers[i - 1]) {
            throw std::runtime_error(format("key '%s' names layer %d after layer %d: layers must ascend", key_layers, layers[i], layers[i - 1]));
        }
    }

    params.curves.ratios = ratios;
    params.curves.loss   = loss;
    params.curves.check(layers.size(), "key 'depthkv.keep_ratios'", "key 'depthkv.sensitivity'");

    const auto se = llama_kv_depth_get_arr_f32(ml, key_se);

    if (se.size() != loss.size()) {
        throw std::runtime_error(format("key '%s' has %zu values, '%s' has %zu", key_se, se.size(), key_loss, loss.size()));
    }
    for (size_t i = 0; i < se.size(); ++i) {
        if (!std::isfinite(se[i]) || se[i] < 0.0f) {
            throw std::runtime_error(format("key '%s'[%zu] is %g: a standard error must be finite and not negative", key_se, i, se[i]));
        }
    }

    params.curve_layers = layers;
}

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

static void llama_kv_depth_params_load(llama_model_loader & ml, llama_kv_depth_params & params) {
    uint32_t version = 1;
    llama_kv_depth_get_u32(ml, "depthkv.version", version);
    if (version != 1) {
        throw std::runtime_error(format("key 'depthkv.version' is %u, this build reads version 1: update it", version));
    }

    if (llama_kv_depth_get_f32(ml, "depthkv.budget", params.budget) && !(params.budget > 0.0f && params.budget <= 1.0f)) {
        throw std::runtime_error(format("key 'depthkv.budget' is %g: it must be above 0 and at most 1", params.budget));
    }

    llama_kv_depth_curves_load(ml, params);

    llama_kv_depth_get_str(ml, "depthkv.scorer",        params.scorer);
    llama_kv_depth_get_str(ml, "depthkv.rule",          params.rule);
    llama_kv_depth_get_u32(ml, "depthkv.sink_tokens",   params.n_sink);
    llama_kv_depth_get_u32(ml, "depthkv.recent_tokens", params.n_recent);

    params.check();
}

void llama_kv_depth_params::load(llama_model_loader & ml) {
    try {
        llama_kv_depth_params_load(ml, *this);
    } catch (const std::exception & err) {
        llama_depthkv_set_error(err.what());
        throw;
    }
}

void llama_kv_depth_params::check() const {
    if (!(budget >= 0.0f && budget <= 1.0f)) {
        throw std::runtime_error(format("KV budget %g is out of range: it must be above 0 and at most 1", budget));
    }

    if (!rule.empty()) {
        llama_kv_alloc_check_rule(rule);
    }

    if (!llama_kv_score_init(scorer)) {
        throw std::runtime_error(format("unknown scorer '%s': use one of %s", scorer.c_str(), llama_kv_score_names()));
    }

    // the first token must stay to know where a sequence begins, the last one to know where it ends
    for (const uint32_t n : { n_sink, n_recent }) {
        if (n == 0 || n > 1u << 20) {
            throw std::runtime_error(format("%u sink tokens (depthkv.sink_tokens) and %u recent tokens (depthkv.recent_tokens): use 1 to %u of each", n_sink, n_recent, 1u << 20));
        }
    }
}

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

//
// layers
//

std::vector<int32_t> llama_kv_depth_layers(const llama_model & model) {
    const auto & hparams = model.hparams;

    const auto refuse = [&](const char * why) {
        throw std::runtime_error(format("KV budget is not defined for architecture '%s': %s", model.arch_name().c_str(), why));
    };

    switch (model.arch) {
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_GLM5_NEXT:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_DOTS3NOTE:
        case LLM_ARCH_DEEPSEEK4:
            refuse("it has a sparse-attention index cache");
            break;
        case LLM_ARCH_GEMMA4_ASSISTANT:
        case LLM_ARCH_EAGLE3:
        case LLM_ARCH_DFLASH:
            refuse("it is a draft model that reads the cache of another model");
            break;
        case LLM_ARCH_BERT:
        case LLM_ARCH_JINA_BERT_V2:
        case LLM_ARCH_JINA_BERT_V3:
        case LLM_ARCH_NOMIC_BERT:
        case LLM_ARCH_NOMIC_BERT_MOE:
        case LLM_ARCH_NEO_BERT:
        case LLM_ARCH_EUROBERT:
        case LLM_ARCH_WAVTOKENIZER_DEC:
        case LLM_ARCH_MODERN_BERT:
        case LLM_ARCH_GEMMA_EMBEDDING:
        case LLM_ARCH_DREAM:
        case LLM_ARCH_LLADA:
        case LLM_ARCH_LLADA_MOE:
        case LLM_ARCH_RND1:
            refuse("it has no KV cache");
            break;
        default:
            break;
    }

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

int32_t llama_kv_depth_layer_reuse(const llama_model & model, int32_t il) {
    const auto & hparams = model.hparams;

    // same rule as in llama_model::create_memory()
    if ((model.arch == LLM_ARCH_GEMMA3N || model.arch == LLM_ARCH_GEMMA4) && il >= hparams.n_layer_kv_from_start) {
        return hparams.n_layer_kv_from_start - (hparams.is_swa(il) ? 2 : 1);
    }

    return il;
}

//
// sizes
//

size_t llama_kv_depth_row_size_k(const llama_model & model, int32_t il, ggml_type type) {
    return ggml_row_size(type, model.hparams.n_embd_k_gqa(il));
}

size_t llama_kv_depth_row_size_v(const llama_model & model, int32_t il, ggml_type type) {
    return ggml_row_size(type, model.hparams.n_embd_v_gqa(il));
}

uint32_t llama_kv_depth_swa_cells(const llama_model & model, uint32_t n_ctx_seq, uint32_t n_ubatch) {
    return GGML_PAD(std::min(n_ctx_seq, model.hparams.n_swa + n_ubatch), 256);
}

size_t llama_kv_depth_bytes_full(
        const llama_model & model,
                 uint32_t   n_ctx_seq,
                 uint32_t   n_seq_max,
                 uint32_t   n_ubatch,
                ggml_type   type_k,
                ggml_type   type_v) {
    const auto & hparams = model.hparams;

    llama_kv_depth_check_type(type_k);
    llama_kv_depth_check_type(type_v);

    size_t res = 0;

    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!hparams.has_kv(il)) {
            continue;
        }

        const size_t n_cells = hparams.is_swa(il) ? llama_kv_depth_swa_cells(model, n_ctx_seq, n_ubatch) : n_ctx_seq;

        res += n_cells*n_seq_max*(llama_kv_depth_row_size_k(model, il, type_k) + llama_kv_depth_row_size_v(model, il, type_v));
    }

    return res;
}

//
// plan
//

// a ubatch costs capacity: that many cells of every layer are free before it runs. small ones keep more of the past,
// large ones run faster. a twelfth of the smallest layer costs little of either (docs/engine.md)
static uint32_t llama_kv_depth_n_ubatch(uint32_t n_cells_min, uint32_t n_safe, uint32_t n_ubatch_user) {
    uint32_t res = std::max(32u, n_cells_min/12/32*32);

    res = std::min(res, n_ubatch_user);
    res = std::min(res, n_cells_min - n_safe);

    return res;
}

llama_kv_depth_plan llama_kv_depth_plan_init(
          const llama_model           & model,
          const llama_cparams         & cparams,
          const llama_context_params  & cparams_user,
          const llama_kv_depth_params & params) {
    params.check();

    const auto ids = llama_kv_depth_layers(model);

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

    llama_kv_depth_plan res;

    res.params    = params;
    res.n_ctx_seq = cparams.n_ctx_seq;
    res.type_k    = cparams_user.type_k;
    res.type_v    = cparams_user.type_v;

    const size_t n_layers = ids.size();

    if ((!params.cells .empty() && params.cells .size() != n_layers) ||
        (!params.type_k.empty() && params.type_k.size() != n_layers) ||
        (!params.type_v.empty() && params.type_v.size() != n_layers)) {
        throw std::runtime_error(format("explicit KV plan must have %zu layers", n_layers));
    }

    // a unified cache is shared by all sequences, so each gets its part of the cells and may use every position
    const uint32_t n_cells_full = cparams.kv_unified && cparams.n_seq_max > 1 ? cparams.n_ctx_seq/cparams.n_seq_max/32*32 : cparams.n_ctx_seq;

    const uint32_t n_ubatch_min = std::min(cparams.n_ubatch, 32u);
    const uint32_t n_safe       = params.n_sink + params.n_recent;
    const uint32_t n_floor      = n_safe + n_ubatch_min;

    llama_kv_alloc_params aparams;

    aparams.n_layers = n_layers;
    aparams.n_ctx    = n_cells_full;
    aparams.budget   = params.budget > 0.0f ? params.budget : 1.0f;
    aparams.n_floor  = n_floor;
    aparams.curves   = llama_kv_depth_curves_select(params, ids);

    // fast attention kernels of GPU backends want multiples of 256, but not at the price of a fifth of a small cache
    // decided by the context alone: with another granularity a larger budget could take cells away
    const bool on_gpu = cparams.offload_kqv && ggml_backend_dev_type(model.dev_layer(ids[0])) != GGML_BACKEND_DEVICE_TYPE_CPU;
    aparams.n_align = on_gpu && aparams.n_ctx >= 8192 ? 256 : 32;

    for (const int32_t il : ids) {
        aparams.cell_bytes.push_back(
                llama_kv_depth_row_size_k(model, il, cparams_user.type_k) + llama_kv_depth_row_size_v(model, il, cparams_user.type_v));
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

    check_floor((uint32_t) ((aparams.budget + 1e-7)*n_cells_full)/32*32);

    auto cells = llama_kv_alloc(res.params.rule, aparams);

    // the curves measured with one scorer say little about another
    if (res.params.rule != "uniform" && params.cells.empty() && params.scorer != params.curve_scorer) {
        LLAMA_LOG_WARN("%s: the layers were calibrated with scorer '%s', not '%s': expect less of the allocation\n", __func__,
                params.curve_scorer.c_str(), params.scorer.c_str());
    }

    for (size_t i = 0; i < n_layers; ++i) {
        if (!params.cells.empty() && params.cells[i] > 0) {
            cells[i] = params.cells[i] >= n_cells_full ? n_cells_full : GGML_PAD(params.cells[i], 32);
        }

        llama_kv_depth_plan::layer l;
        l.il     = ids[i];
        l.cells  = cells[i];
        l.type_k = params.type_k.empty() || params.type_k[i] == GGML_TYPE_COUNT ? cparams_user.type_k : params.type_k[i];
        l.type_v = params.type_v.empty() || params.type_v[i] == GGML_TYPE_COUNT ? cparams_user.type_v : params.type_v[i];

        llama_kv_depth_check_type(l.type_k);
        llama_kv_depth_check_type(l.type_v);

        res.layers.push_back(l);
    }

    const uint32_t n_cells_min = *std::min_element(cells.begin(), cells.end());

    check_floor(n_cells_min); // of an explicit plan

    // nothing is ever evicted from a full layer
    res.n_ubatch = n_cells_min >= cparams.n_ctx_seq ? cparams.n_ubatch : llama_kv_depth_n_ubatch(n_cells_min, n_safe, cparams.n_ubatch);

    return res;
}

void llama_kv_depth_plan_apply(
        const llama_model         & model,
        const llama_kv_depth_plan & plan,
              llama_cparams       & cparams) {
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
