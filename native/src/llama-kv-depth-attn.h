#pragma once

#include "ggml.h"

// attention of one token of each sequence over quantized cells, on the CPU: keys and values are read once for all query heads of a
// group, and multiplied as the integers that they are stored as. the flash attention kernel of the CPU backend reads them once for
// each head, and widens the values each time

bool llama_kv_depth_attn_supports(ggml_type type_k, ggml_type type_v);

// q [n_embd_k, n_head, n_stream] F32, scaled; k, v [n_embd, n_head_kv, n_kv, n_stream]; mask [n_kv, 1, 1, n_stream] F16; sinks
// [n_head] F32 or nullptr
// returns [n_embd_v*n_head, n_stream] F32
ggml_tensor * llama_kv_depth_build_attn(
        ggml_context * ctx,
        ggml_tensor  * q,
        ggml_tensor  * k,
        ggml_tensor  * v,
        ggml_tensor  * mask,
        ggml_tensor  * sinks);
