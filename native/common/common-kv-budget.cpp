#include "common-kv-budget.h"

#include "common.h"
#include "llama-cpp.h"
#include "llama-depthkv.h"
#include "log.h"
#include "speculative.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

static const char * const COMMON_KV_BUDGET_KEY = "depthkv.budget";

static llama_depthkv_budget common_kv_budget_parse(const std::string & text) {
    llama_depthkv_budget res;

    if (!llama_depthkv_budget_parse(text.c_str(), &res)) {
        throw std::invalid_argument(string_format("error: --kv-budget: %s", llama_depthkv_last_error()));
    }

    return res;
}

bool common_kv_budget_is_auto(const std::string & text) {
    return !text.empty() && common_kv_budget_parse(text).type == LLAMA_DEPTHKV_BUDGET_AUTO;
}

void common_kv_budget_check_text(const std::string & text) {
    common_kv_budget_parse(text);
}

static void common_kv_budget_override(common_params & params, const std::string & text) {
    auto & overrides = params.kv_overrides;

    // the list may be terminated already
    overrides.erase(std::remove_if(overrides.begin(), overrides.end(), [](const llama_model_kv_override & kvo) {
        return kvo.key[0] == 0 || strcmp(kvo.key, COMMON_KV_BUDGET_KEY) == 0;
    }), overrides.end());

    llama_model_kv_override kvo = {};

    if (text.size() >= sizeof(kvo.val_str)) {
        throw std::invalid_argument(string_format("error: --kv-budget has %zu characters: give at most %zu", text.size(), sizeof(kvo.val_str) - 1));
    }

    kvo.tag = LLAMA_KV_OVERRIDE_TYPE_STR;
    strncpy(kvo.key,     COMMON_KV_BUDGET_KEY, sizeof(kvo.key)     - 1);
    strncpy(kvo.val_str, text.c_str(),         sizeof(kvo.val_str) - 1);

    overrides.push_back(kvo);
}

void common_kv_budget_check(const common_params & params) {
    const auto refuse = [](bool used, const std::string & arg, const char * why) {
        if (used) {
            throw std::invalid_argument(string_format("error: --kv-budget does not go with %s: %s", arg.c_str(), why));
        }
    };

    const bool is_rerank = params.pooling_type == LLAMA_POOLING_TYPE_RANK;

    refuse(params.embedding,       is_rerank ? "--rerank" : "--embedding", "every token of the input counts, drop one of the two");
    refuse(params.swa_full,        "--swa-full",        "layers with a sliding window hold no more than their window, drop one of the two");
    refuse(params.hellaswag,       "--hellaswag",       "its answers share cells between sequences, drop one of the two");
    refuse(params.winogrande,      "--winogrande",      "its answers share cells between sequences, drop one of the two");
    refuse(params.multiple_choice, "--multiple-choice", "its answers share cells between sequences, drop one of the two");

    refuse(!params.mmproj.path.empty() || !params.mmproj.url.empty(),
            "--mmproj", "evicting tokens of images and audio has not been tried, drop one of the two (--no-mmproj if -hf brings it)");

    for (const auto type : params.speculative.types) {
        switch (type) {
            case COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3:
            case COMMON_SPECULATIVE_TYPE_DRAFT_MTP:
            case COMMON_SPECULATIVE_TYPE_DRAFT_DFLASH:
            case COMMON_SPECULATIVE_TYPE_DRAFT_DSPARK:
                refuse(true, "--spec-type " + common_speculative_type_to_str(type),
                        "it drafts from the state of the target model, use draft-simple or an ngram type");
                break;
            default:
                break;
        }
    }

    // with a budget every slot may fill the whole context, the cells of a unified draft cache are for all slots together
    // the server replaces a negative number of slots by several and a unified cache
    refuse(params.speculative.has_dft() && (params.n_parallel < 0 || (params.n_parallel > 1 && params.kv_unified)),
            "--spec-draft-model and a unified KV cache", "add -np 1, or -np N and --no-kv-unified");
}

void common_kv_budget_apply(common_params & params) {
    if (params.kv_budget.empty()) {
        return;
    }

    const auto budget = common_kv_budget_parse(params.kv_budget);

    // the full cache is that of stock llama.cpp
    if (budget.type != LLAMA_DEPTHKV_BUDGET_FRACTION || budget.value < 1.0) {
        common_kv_budget_check(params);
    }

    common_kv_budget_override(params, params.kv_budget);
}

void common_kv_budget_apply_draft(common_params & params) {
    // rather than no override: the file may carry a budget of its own
    common_kv_budget_override(params, "1");

    params.kv_overrides.emplace_back();
    params.kv_overrides.back().key[0] = 0;
}

//
// auto
//

// resident beside the model and its context: libraries and threads, and for each sequence its tokens and its sampler.
// twice what llama-server took with one conversation and with four
static constexpr size_t COMMON_KV_BUDGET_BYTES_PROCESS = 24*1024*1024;
static constexpr size_t COMMON_KV_BUDGET_BYTES_SEQ     =  4*1024*1024;

std::string common_kv_budget_fit(const std::string & text, const std::string & path_model, llama_model_params mparams, llama_context_params & cparams) {
    if (!common_kv_budget_is_auto(text)) {
        return text;
    }

    mparams.no_alloc  = true;
    mparams.load_mode = LLAMA_LOAD_MODE_NONE;

    llama_model_ptr model(llama_model_load_from_file(path_model.c_str(), mparams));
    if (!model) {
        throw std::runtime_error(string_format("error: --kv-budget auto: '%s' cannot be loaded", path_model.c_str()));
    }

    const size_t n_reserved = COMMON_KV_BUDGET_BYTES_PROCESS + cparams.n_seq_max*COMMON_KV_BUDGET_BYTES_SEQ;

    auto depth = llama_depthkv_default_params();
    depth.budget = text.c_str();
    depth.memory = llama_depthkv_memory_free();
    depth.memory = depth.memory > n_reserved ? depth.memory - n_reserved : 1;

    llama_depthkv_stats stats;

    if (llama_depthkv_plan(model.get(), cparams, depth, &stats, nullptr, 0) != 0) {
        throw std::runtime_error(string_format("error: --kv-budget auto: %s", llama_depthkv_last_error()));
    }

    cparams.n_ubatch = stats.n_ubatch;

    // 9 digits tell any two floats apart
    return string_format("%.9g", stats.budget);
}

bool common_kv_budget_fit(common_params & params, llama_model_params & mparams, llama_context_params & cparams) {
    if (!common_kv_budget_is_auto(params.kv_budget)) {
        return true;
    }

    try {
        common_kv_budget_override(params, common_kv_budget_fit(params.kv_budget, params.model.path, mparams, cparams));
    } catch (const std::exception & e) {
        COM_ERR("%s\n", e.what());
        return false;
    }

    params.kv_overrides.emplace_back();
    params.kv_overrides.back().key[0] = 0;

    mparams.kv_overrides = params.kv_overrides.data();

    return true;
}
