#pragma once

// --kv-budget F of llama.cpp's tools: the fraction of the full KV cache that the target model gets (see llama-depthkv.h)

#include <string>

struct common_params;

// throws std::invalid_argument, one line that names the value, if it is not a fraction above 0 and at most 1
double common_kv_budget_parse(const std::string & value);

// throws std::invalid_argument, one line that names the other argument, if one does not go with a budget
void common_kv_budget_check(const common_params & params);

// turn the argument into a key-value override of the model
// throws std::invalid_argument, one line, if it is no fraction or if another argument does not go with it
void common_kv_budget_apply(common_params & params);

// the budget is that of the target model: a draft model keeps its full cache
void common_kv_budget_apply_draft(common_params & params);
