#pragma once

// the small graphs of the cache: their inputs and outputs

#include "llama-impl.h"
#include "llama-kv-cache-depth.h"

// what one layer has in the graph of a scoring pass
struct llama_kv_cache_depth::attn_graph : public llama_kv_attn_graph_i {
    ggml_tensor * inp_pos_kv = nullptr; // F32 [n_kv]
    ggml_tensor * inp_pos_q  = nullptr; // F32 [1, llama_kv_n_query]

    const kv_layer * layer = nullptr;
    attn_pass      * pass  = nullptr;

    uint32_t strm     = 0;
    bool     v_trans  = false;
    int64_t  n_kv     = 0;
    int64_t  n_head   = 0;
    int64_t  n_embd_v = 0; // of a head

    // in the tensors of its device, in elements
    uint32_t i_device = 0;
    size_t   offs_inp = 0;
    size_t   offs_out = 0;

    static size_t max_nodes(int64_t n_head_kv) {
        return 64 + 16*n_head_kv;
    }

    static size_t pad(size_t n) {
        return GGML_PAD(n, llama_kv_depth_n_align_view);
    }

    // positions of the cells, positions of the queries, and whether they count
    size_t offs_pos_q()  const { return offs_inp     + pad(n_kv); }
    size_t offs_weight() const { return offs_pos_q() + pad(llama_kv_n_query); }
    size_t n_inp()       const { return pad(n_kv) + pad(llama_kv_n_query) + pad(llama_kv_n_query*n_head); }
    size_t n_out()       const { return pad(n_kv); }

    bool is_host() const;

    ggml_tensor * get_input(std::map<int64_t, ggml_tensor *> & inputs, int64_t n, int64_t ne0, int64_t ne1) {
        auto & res = inputs[n];
        if (!res) {
            res = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, ne0, ne1);
            ggml_set_input(res);
        }
        return res;
    }

    ggml_tensor * build_mass() override {
        if (is_host()) {
            return ggml_out_prod(ctx, prob, weight);
        }

        // not all other backends have OUT_PROD
        ggml_tensor * cur = ggml_cont(ctx, ggml_permute(ctx, prob, 1, 0, 2, 3));

        return ggml_mul_mat(ctx, cur, ggml_reshape_3d(ctx, weight, weight->ne[1], 1, n_head_kv));
    }

    // as they lie in the cache: [n_kv, n_embd_v] if v_trans, else [n_embd_v, n_kv]
    ggml_tensor * build_v_stored(int64_t ih);

    ggml_tensor * build_v(int64_t ih) override {
        ggml_tensor * v = build_v_stored(ih);

        return v_trans ? ggml_cont(ctx, ggml_transpose(ctx, v)) : v;
    }

    ggml_tensor * build_v_norm(int64_t ih) override;
};

// a scoring pass over some layers of a sequence. what the host gives and what it gets is one tensor each on a device
struct llama_kv_cache_depth::attn_pass {
    struct device {
        ggml_backend_t backend = nullptr;
        bool           is_host = false;

        size_t n_inp = 0;
        size_t n_out = 0;

        ggml_tensor * inp = nullptr; // F32 [n_inp]
        ggml_tensor * out = nullptr; // F32 [n_out] the results of all its layers
    };

    std::vector<device>     devices;
    std::vector<attn_graph> graphs;

    // inputs that layers share, by their width
    std::map<int64_t, ggml_tensor *> ones;
    std::map<int64_t, ggml_tensor *> rots;
};

inline bool llama_kv_cache_depth::attn_graph::is_host() const {
    return pass->devices[i_device].is_host;
}

inline ggml_tensor * llama_kv_cache_depth::attn_graph::build_v_stored(int64_t ih) {
    const auto * lv = layer->v;

    if (v_trans) {
        const size_t nb1 = ggml_row_size(lv->type, lv->ne[1]);

        return ggml_cast(ctx, ggml_view_2d(ctx, layer->v, n_kv, n_embd_v, nb1, strm*lv->nb[2] + ih*n_embd_v*nb1), GGML_TYPE_F32);
    }

    ggml_tensor * v = ggml_view_2d(ctx, layer->v, n_embd_v, n_kv, lv->nb[1], strm*lv->nb[2] + ih*ggml_row_size(lv->type, n_embd_v));
    v = ggml_cast(ctx, v, GGML_TYPE_F32);

    if (layer->n_rot_v) {
        v = llama_mul_mat_hadamard(ctx, v, get_input(pass->rots, layer->n_rot_v, layer->n_rot_v, layer->n_rot_v));
    }

    return v;
}

inline ggml_tensor * llama_kv_cache_depth::attn_graph::build_v_norm(int64_t ih) {
    ggml_tensor * v = ggml_abs(ctx, build_v_stored(ih));

    if (v_trans && is_host()) {
        v = ggml_out_prod(ctx, v, get_input(pass->ones, n_embd_v, 1, n_embd_v));
    } else {
        v = ggml_sum_rows(ctx, v_trans ? ggml_cont(ctx, ggml_transpose(ctx, v)) : v);
    }

    return ggml_reshape_1d(ctx, v, n_kv);
}

struct llama_kv_cache_depth::shift_graph {
    ggml_tensor * inp_shift = nullptr; // I32 [n_cells]
    ggml_tensor * inp_rot   = nullptr;
    ggml_tensor * dst       = nullptr; // the keys, [n_embd_k_gqa, n_cells]
    ggml_tensor * out       = nullptr; // the same, rotated

    static constexpr size_t max_nodes = 64;

    // keys that are rotated at once
    static constexpr uint32_t n_cells = 512;
};
