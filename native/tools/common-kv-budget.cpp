#include "common-kv-budget.h"

#include "common.h"
#include "speculative.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

static const char * const COMMON_KV_BUDGET_KEY = "depthkv.budget";

double common_kv_budget_parse(const std::string & value) {
    char * end = nullptr;

    const double res = std::strtod(value.c_str(), &end);

    // also refuses what is not a number
    if (end == value.c_str() || *end != '\0' || !(res > 0.0 && res <= 1.0)) {
        throw std::invalid_argument(string_format(
                    "error: --kv-budget is '%s': give the fraction of the full KV cache to keep, above 0 and at most 1, such as 0.5", value.c_str()));
    }

    return res;
}

static void common_kv_budget_override(common_params & params, double budget) {
    auto & overrides = params.kv_overrides;

    // the list may be terminated already
    overrides.erase(std::remove_if(overrides.begin(), overrides.end(), [](const llama_model_kv_override & kvo) {
        return kvo.key[0] == 0 || strcmp(kvo.key, COMMON_KV_BUDGET_KEY) == 0;
    }), overrides.end());

    llama_model_kv_override kvo = {};

    kvo.tag     = LLAMA_KV_OVERRIDE_TYPE_FLOAT;
    kvo.val_f64 = budget;
    strncpy(kvo.key, COMMON_KV_BUDGET_KEY, sizeof(kvo.key) - 1);

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

    const double budget = common_kv_budget_parse(params.kv_budget);

    // the full cache is that of stock llama.cpp
    if (budget < 1.0) {
        common_kv_budget_check(params);
    }

    common_kv_budget_override(params, budget);
}

void common_kv_budget_apply_draft(common_params & params) {
    // rather than no override: the file may carry a budget of its own
    common_kv_budget_override(params, 1.0);

    params.kv_overrides.emplace_back();
    params.kv_overrides.back().key[0] = 0;
}
