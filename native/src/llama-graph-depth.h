#pragma once

#include "llama-graph.h"
#include "llama-kv-cache-depth.h"

#include <memory>
#include <vector>

// graph inputs of the layers in a llama_kv_cache_depth, and the attention over them
//
// every layer has its own rows and its own mask. a mask per layer in host memory would have to exist for all layers at once,
// n_layers*n_tokens*n_kv values, more than the cache saves. so only positions are inputs, and each layer builds its mask
// where it runs: the temporaries of one layer are reused by the next
class llm_graph_input_kv_depth : public llm_graph_input_i {
public:
    llm_graph_input_kv_depth(
            const llm_graph_context            & graph,
            const llama_kv_cache_depth_context * mctx);

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    // store k_cur and v_cur (nullptr: the layer reads the cache of another one), sample q_cur, attend
    //   - q_cur [n_embd_head_k, n_head,    n_tokens]
    //   - k_cur [n_embd_head_k, n_head_kv, n_tokens]
    //   - v_cur [n_embd_head_v, n_head_kv, n_tokens]
    //   - res   [n_embd_head_v*n_head, n_tokens]
    ggml_tensor * build_attn(
            const llm_graph_context & graph,
            ggml_tensor * q_cur,
            ggml_tensor * k_cur,
            ggml_tensor * v_cur,
            ggml_tensor * kq_b,
            ggml_tensor * sinks,
                  float   kq_scale,
                    int   il);

    // what the graph builders of upstream hold on to, without tensors of its own
    std::unique_ptr<llm_graph_input_attn_kv> inp_attn;

private:
    // inputs of the layers on one device. views of them go into the graph, and of a tensor on another device the scheduler would
    // copy each view apart, after waiting each time: some 60 for a token
    struct device_inputs {
        // nullptr: host memory, and the scheduler decides
        ggml_backend_t backend = nullptr;

        std::vector<uint32_t> layers; // indices of the layers

        ggml_tensor * rows   = nullptr; // I64 [n_rows, n_layers] the first n_tps*n_stream of each layer
        ggml_tensor * q_idxs = nullptr; // I32 [n_q*n_stream]
        ggml_tensor * q_rows = nullptr; // I64 [n_q*n_stream]

        // few tokens: the mask of each layer, as flash attention or the softmax wants it
        ggml_tensor * kq_mask = nullptr; // F16 or F32 [sum over layers of n_kv*n_tps*n_stream, padded]

        // many tokens: what is needed to build it, positions relative to the first token of the sequence in the ubatch
        ggml_tensor * pos_kv  = nullptr; // F32 [sum over layers of n_kv*n_stream, padded]
        ggml_tensor * pos_tok = nullptr; // F32 [1, n_tps, 1, n_stream]
    };

    std::vector<device_inputs> devices;

    // what each layer attends with
    std::vector<llama_kv_cache_depth::attn_params> attn; // [n_layers]

    // rotations of quantized K and V, by size
    std::map<uint32_t, ggml_tensor *> rots;

    // shape of the graph
    uint32_t s0       = 0;
    uint32_t n_stream = 1;
    uint32_t n_tps    = 0;
    uint32_t n_q      = 0;
    bool     evicted  = false;

    std::vector<uint32_t> n_kv; // [n_layers]

    // where the layer is in the inputs of its device
    struct layer_inputs {
        uint32_t i_device;
        uint32_t i_rows;
        size_t   offs; // of the mask or the positions, in elements

        ggml_tensor * rows = nullptr; // I64 [n_tps, 1, n_stream]
        ggml_tensor * k    = nullptr; // K of the streams of the ubatch
    };

    std::vector<layer_inputs> layer_idxs; // [n_layers]

    const llama_kv_cache_depth_context * mctx;

    void set_input_device(const device_inputs & dev, const llama_ubatch & ubatch) const;

    template <typename T>
    void set_kq_mask(T * dst, const device_inputs & dev, const llama_ubatch & ubatch, T allowed, T masked) const;

    ggml_tensor * build_kq_mask(const llm_graph_context & graph, uint32_t i) const;

    // the streams of the ubatch, [n, n_rows, 1, n_stream]
    ggml_tensor * view_streams(const llm_graph_context & graph, ggml_tensor * t) const;

    ggml_tensor * build_attn_tok(
            const llm_graph_context & graph,
            ggml_tensor * q,
            ggml_tensor * k,
            ggml_tensor * v,
            ggml_tensor * mask,
            ggml_tensor * sinks,
                  float   kq_scale) const;

    ggml_tensor * build_attn_heads(
            const llm_graph_context & graph,
            ggml_tensor * q,
            ggml_tensor * k,
            ggml_tensor * v,
            ggml_tensor * mask,
                  float   kq_scale) const;

    ggml_tensor * build_rot(const llm_graph_context & graph, ggml_tensor * cur, uint32_t n_rot);
};

// what the attention over a cache with a capacity for each layer adds to the graph, an upper bound
uint32_t llm_graph_kv_depth_n_nodes(const llama_hparams & hparams);

// the inputs of a model with SWA layers: theirs are those of upstream, the other layers are in a llm_graph_input_kv_depth
class llm_graph_input_attn_kv_iswa_depth : public llm_graph_input_attn_kv_iswa {
public:
    llm_graph_input_attn_kv_iswa_depth(
            const llama_hparams & hparams,
            const llama_cparams & cparams,
            const llama_kv_cache_depth_context * mctx);

    bool can_reuse(const llm_graph_params & params) override;
};
