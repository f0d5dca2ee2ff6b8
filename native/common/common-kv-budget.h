#pragma once

// --kv-budget of llama.cpp's programs: how much of the full KV cache the target model gets (see llama-depthkv.h)

#include "llama.h"

#include <string>

struct common_params;

// throws std::invalid_argument, one line that names the text, if it is not a budget
void common_kv_budget_check_text(const std::string & text);

// throws the same
bool common_kv_budget_is_auto(const std::string & text);

// throws std::invalid_argument, one line that names the other argument, if one does not go with a budget
void common_kv_budget_check(const common_params & params);

// turn the argument into a key-value override of the model
// throws std::invalid_argument, one line, if it is not a budget or if another argument does not go with it
void common_kv_budget_apply(common_params & params);

// the budget is that of the target model: a draft model keeps its full cache
void common_kv_budget_apply_draft(common_params & params);

// "auto": the budget, and in cparams the ubatch, that fit free memory; any other budget is returned as it is
// throws std::runtime_error, one line, if none does
std::string common_kv_budget_fit(const std::string & text, const std::string & path_model, llama_model_params mparams, llama_context_params & cparams);

// the same for what common_kv_budget_apply() has left in the parameters; false if none does, which is logged
bool common_kv_budget_fit(common_params & params, llama_model_params & mparams, llama_context_params & cparams);
