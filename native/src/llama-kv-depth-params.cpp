#include "llama-kv-depth-params.h"

#include "llama-impl.h"
#include "llama-kv-alloc.h"
#include "llama-kv-score.h"
#include "llama-model-loader.h"

#include "ggml-cpp.h"
#include "gguf.h"

#include <cmath>
#include <stdexcept>
#include <unordered_map>

// the keys are few and private to this file, so they are read with gguf.h: a wrong type must be an error that names the
// key, also when it comes from the command line
struct llama_kv_depth_keys {
    const gguf_context * meta;

    // layers of the model
    uint32_t n_layer = 0;

    std::unordered_map<std::string, llama_model_kv_override> overrides;

    const llama_model_kv_override * find_override(const char * key) const {
        const auto it = overrides.find(key);

        return it == overrides.end() ? nullptr : &it->second;
    }
};

static bool llama_kv_depth_get_f32(const llama_kv_depth_keys & keys, const char * key, float & res) {
    if (const auto * ovrd = keys.find_override(key)) {
        switch (ovrd->tag) {
            case LLAMA_KV_OVERRIDE_TYPE_FLOAT: res = ovrd->val_f64; return true;
            case LLAMA_KV_OVERRIDE_TYPE_INT:   res = ovrd->val_i64; return true;
            default: throw std::runtime_error(format("key '%s' must be overridden with a float", key));
        }
    }

    const int64_t id = gguf_find_key(keys.meta, key);
    if (id < 0) {
        return false;
    }

    if (gguf_get_kv_type(keys.meta, id) != GGUF_TYPE_FLOAT32) {
        throw std::runtime_error(format("key '%s' must be of type f32, not %s", key, gguf_type_name(gguf_get_kv_type(keys.meta, id))));
    }

    res = gguf_get_val_f32(keys.meta, id);

    return true;
}

static bool llama_kv_depth_get_u32(const llama_kv_depth_keys & keys, const char * key, uint32_t & res) {
    if (const auto * ovrd = keys.find_override(key)) {
        if (ovrd->tag != LLAMA_KV_OVERRIDE_TYPE_INT || ovrd->val_i64 < 0 || ovrd->val_i64 > INT32_MAX) {
            throw std::runtime_error(format("key '%s' must be overridden with a non-negative integer", key));
        }
        res = ovrd->val_i64;
        return true;
    }

    const int64_t id = gguf_find_key(keys.meta, key);
    if (id < 0) {
        return false;
    }

    if (gguf_get_kv_type(keys.meta, id) != GGUF_TYPE_UINT32) {
        throw std::runtime_error(format("key '%s' must be of type u32, not %s", key, gguf_type_name(gguf_get_kv_type(keys.meta, id))));
    }

    res = gguf_get_val_u32(keys.meta, id);

    return true;
}

static bool llama_kv_depth_get_str(const llama_kv_depth_keys & keys, const char * key, std::string & res) {
    if (const auto * ovrd = keys.find_override(key)) {
        if (ovrd->tag != LLAMA_KV_OVERRIDE_TYPE_STR) {
            throw std::runtime_error(format("key '%s' must be overridden with a string", key));
        }
        res = ovrd->val_str;
        return true;
    }

    const int64_t id = gguf_find_key(keys.meta, key);
    if (id < 0) {
        return false;
    }

    if (gguf_get_kv_type(keys.meta, id) != GGUF_TYPE_STRING) {
        throw std::runtime_error(format("key '%s' must be of type string, not %s", key, gguf_type_name(gguf_get_kv_type(keys.meta, id))));
    }

    res = gguf_get_val_str(keys.meta, id);

    return true;
}

// arrays cannot be overridden
static const void * llama_kv_depth_get_arr(const llama_kv_depth_keys & keys, const char * key, gguf_type type, size_t & n) {
    const int64_t id = gguf_find_key(keys.meta, key);
    if (id < 0) {
        throw std::runtime_error(format("key '%s' is missing: the other keys of a calibration are there", key));
    }

    if (gguf_get_kv_type(keys.meta, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(keys.meta, id) != type) {
        throw std::runtime_error(format("key '%s' must be an array of type %s", key, gguf_type_name(type)));
    }

    n = gguf_get_arr_n(keys.meta, id);

    // gguf keeps nothing for an empty array
    return n == 0 ? nullptr : gguf_get_arr_data(keys.meta, id);
}

static std::vector<float> llama_kv_depth_get_arr_f32(const llama_kv_depth_keys & keys, const char * key) {
    size_t n = 0;
    const auto * data = (const float *) llama_kv_depth_get_arr(keys, key, GGUF_TYPE_FLOAT32, n);

    return std::vector<float>(data, data + n);
}

static std::vector<int32_t> llama_kv_depth_get_arr_i32(const llama_kv_depth_keys & keys, const char * key) {
    size_t n = 0;
    const auto * data = (const int32_t *) llama_kv_depth_get_arr(keys, key, GGUF_TYPE_INT32, n);

    return std::vector<int32_t>(data, data + n);
}

// all of the keys or none: a file with half a calibration is broken, not uniform
static void llama_kv_depth_curves_load(const llama_kv_depth_keys & keys, llama_kv_depth_params & params) {
    const char * key_layers = "depthkv.layer_ids";
    const char * key_ratios = "depthkv.keep_ratios";
    const char * key_loss   = "depthkv.sensitivity";
    const char * key_se     = "depthkv.sensitivity_se";
    const char * key_scorer = "depthkv.scorer";

    bool found = false;
    for (const char * key : { key_layers, key_ratios, key_loss, key_se }) {
        found = found || gguf_find_key(keys.meta, key) >= 0;
    }
    if (!found) {
        return;
    }

    for (const char * key : { key_scorer, "depthkv.sink_tokens", "depthkv.recent_tokens" }) {
        if (gguf_find_key(keys.meta, key) < 0) {
            throw std::runtime_error(format("key '%s' is missing: the other keys of a calibration are there", key));
        }
    }

    // the curves were measured with the scorer of the file, an override does not change that
    {
        const int64_t id = gguf_find_key(keys.meta, key_scorer);

        if (gguf_get_kv_type(keys.meta, id) != GGUF_TYPE_STRING || !llama_kv_score_init(gguf_get_val_str(keys.meta, id))) {
            throw std::runtime_error(format("key '%s' must be one of %s", key_scorer, llama_kv_score_names().c_str()));
        }

        params.curve_scorer = gguf_get_val_str(keys.meta, id);
    }

    const auto layers = llama_kv_depth_get_arr_i32(keys, key_layers);
    const auto ratios = llama_kv_depth_get_arr_f32(keys, key_ratios);
    const auto loss   = llama_kv_depth_get_arr_f32(keys, key_loss);

    if (layers.empty()) {
        throw std::runtime_error(format("key '%s' is empty: it must name at least one layer", key_layers));
    }

    for (size_t i = 0; i < layers.size(); ++i) {
        if (layers[i] < 0 || layers[i] >= (int32_t) keys.n_layer) {
            throw std::runtime_error(format("key '%s' names layer %d: the model has %u", key_layers, layers[i], keys.n_layer));
        }
        if (i > 0 && layers[i] <= layers[i - 1]) {
            throw std::runtime_error(format("key '%s' names layer %d after layer %d: layers must ascend", key_layers, layers[i], layers[i - 1]));
        }
    }

    params.curves.ratios = ratios;
    params.curves.loss   = loss;
    params.curves.check(layers.size(), "key 'depthkv.keep_ratios'", "key 'depthkv.sensitivity'");

    const auto se = llama_kv_depth_get_arr_f32(keys, key_se);

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

// a file carries a fraction, an override anything that a user may write
static void llama_kv_depth_budget_load(const llama_kv_depth_keys & keys, llama_kv_budget & budget) {
    const char * key = "depthkv.budget";

    const auto * ovrd = keys.find_override(key);
    if (ovrd && ovrd->tag == LLAMA_KV_OVERRIDE_TYPE_STR) {
        budget = llama_kv_budget::parse(ovrd->val_str);
        return;
    }

    float fraction = 0.0f;
    if (!llama_kv_depth_get_f32(keys, key, fraction)) {
        return;
    }

    if (!(fraction > 0.0f && fraction <= 1.0f)) {
        throw std::runtime_error(format("key '%s' is %g: it must be above 0 and at most 1", key, fraction));
    }

    budget = { llama_kv_budget::FRACTION, fraction };
}

static void llama_kv_depth_params_load(const llama_kv_depth_keys & keys, llama_kv_depth_params & params) {
    uint32_t version = 1;
    llama_kv_depth_get_u32(keys, "depthkv.version", version);
    if (version != 1) {
        throw std::runtime_error(format("key 'depthkv.version' is %u, this build reads version 1: update it", version));
    }

    llama_kv_depth_budget_load(keys, params.budget);

    llama_kv_depth_curves_load(keys, params);

    llama_kv_depth_get_str(keys, "depthkv.scorer",        params.scorer);
    llama_kv_depth_get_str(keys, "depthkv.rule",          params.rule);
    llama_kv_depth_get_u32(keys, "depthkv.sink_tokens",   params.n_sink);
    llama_kv_depth_get_u32(keys, "depthkv.recent_tokens", params.n_recent);

    params.check();
}

void llama_kv_depth_params::load(llama_model_loader & ml) {
    llama_kv_depth_keys keys { ml.metadata, 0, ml.kv_overrides };
    ml.get_key(LLM_KV_BLOCK_COUNT, keys.n_layer);

    llama_kv_depth_params_load(keys, *this);
}

void llama_kv_depth_params::load(const char * path) {
    gguf_context_ptr meta { gguf_init_from_file(path, { /*.no_alloc =*/ true, /*.ctx =*/ nullptr }) };
    if (!meta) {
        throw std::runtime_error("damaged or incomplete: get the file again");
    }

    llama_kv_depth_keys keys { meta.get(), 0, {} };

    std::string arch;
    llama_kv_depth_get_str(keys, "general.architecture", arch);
    llama_kv_depth_get_u32(keys, (arch + ".block_count").c_str(), keys.n_layer);

    llama_kv_depth_params_load(keys, *this);
}

void llama_kv_depth_params::check() const {
    if (!rule.empty()) {
        llama_kv_alloc_check_rule(rule);
    }

    if (!llama_kv_score_init(scorer)) {
        throw std::runtime_error(format("unknown scorer '%s': use one of %s", scorer.c_str(), llama_kv_score_names().c_str()));
    }

    // the first token must stay to know where a sequence begins, the last one to know where it ends
    for (const uint32_t n : { n_sink, n_recent }) {
        if (n == 0 || n > 1u << 20) {
            throw std::runtime_error(format("%u sink tokens (depthkv.sink_tokens) and %u recent tokens (depthkv.recent_tokens): use 1 to %u of each", n_sink, n_recent, 1u << 20));
        }
    }
}
