#pragma once

// what the functions of llama-depthkv.h share

#include "llama-depthkv.h"

#include "llama-impl.h"
#include "llama-kv-depth-params.h"

#include <stdexcept>

struct llama_cparams;
struct llama_kv_depth_plan;

// run a function that may throw, the reason goes to llama_depthkv_last_error()
template <typename T, typename F>
static T llama_depthkv_try(T on_error, const F & fn) {
    llama_depthkv_set_error("");

    try {
        return fn();
    } catch (const std::exception & err) {
        llama_depthkv_set_error(err.what());
    }

    return on_error;
}

static inline void llama_depthkv_check_ptr(const void * ptr, const char * what = "model or context") {
    if (!ptr) {
        throw std::runtime_error(format("%s is NULL", what));
    }
}

// the keys of the model, overridden by the caller; throws one line that names the value
llama_kv_depth_params llama_depthkv_read_params(const llama_model & model, const llama_depthkv_params & depth);

// throws one line
llama_context * llama_depthkv_init_context(llama_model * model, const llama_context_params & params, const llama_kv_depth_params & dparams);

// what a plan says of its context: without what is allocated and counted
llama_depthkv_stats llama_depthkv_init_stats(const llama_model & model, const llama_cparams & cparams, const llama_kv_depth_plan & plan);
