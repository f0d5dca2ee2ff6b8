#pragma once

// the small graphs of the cache: their inputs and outputs

#include "llama-impl.h"
#include "llama-kv-cache-depth.h"

struct llama_kv_cache_depth::attn_graph : public llama_kv_attn_graph_i {
    ggml_tensor * inp_pos_kv = nullptr; // F32 [n_kv]
    ggml_tensor * inp_pos_q  = nullptr; // F32 [1, llama_kv_n_query]
    ggml_tensor * inp_ones   = nullptr; // F32 [1, n_embd_v]
    ggml_tensor * inp_rot_v  = nullptr;
    ggml_tensor * out        = nullptr; // F32 [n_kv]

    const kv_layer * layer = nullptr;

    uint32_t strm     = 0;
    bool     v_trans  = false;
    int64_t  n_kv     = 0;
    int64_t  n_embd_v = 0; // of a head

    static size_t max_nodes(int64_t n_head_kv) {
        return 64 + 16*n_head_kv;
    }

    ggml_tensor * new_input(int64_t ne0, int64_t ne1, int64_t ne2) {
        ggml_tensor * cur = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, ne0, ne1, ne2);
        ggml_set_input(cur);
        return cur;
    }

    // as they lie in the cache: [n_kv, n_embd_v] if v_trans, else [n_embd_v, n_kv]
    ggml_tensor * build_v_stored(int64_t ih) {
        const auto * lv = layer->v;

        if (v_trans) {
            const size_t nb1 = ggml_row_size(lv->type, lv->ne[1]);

            return ggml_cast(ctx, ggml_view_2d(ctx, layer->v, n_kv, n_embd_v, nb1, strm*lv->nb[2] + ih*n_embd_v*nb1), GGML_TYPE_F32);
        }

        ggml_tensor * v = ggml_view_2d(ctx, layer->v, n_embd_v, n_kv, lv->nb[1], strm*lv->nb[2] + ih*ggml_row_size(lv->type, n_embd_v));
        v = ggml_cast(ctx, v, GGML_TYPE_F32);

        if (layer->n_rot_v) {
            if (!inp_rot_v) {
                inp_rot_v = new_input(layer->n_rot_v, layer->n_rot_v, 1);
            }
            v = llama_mul_mat_hadamard(ctx, v, inp_rot_v);
        }

        return v;
    }

    ggml_tensor * build_v(int64_t ih) override {
        ggml_tensor * v = build_v_stored(ih);

        return v_trans ? ggml_cont(ctx, ggml_transpose(ctx, v)) : v;
    }

    ggml_tensor * build_v_norm(int64_t ih) override {
        ggml_tensor * v = ggml_abs(ctx, build_v_stored(ih));

        if (v_trans && !inp_ones) {
            inp_ones = new_input(1, n_embd_v, 1);
        }

        v = v_trans ? ggml_out_prod(ctx, v, inp_ones) : ggml_sum_rows(ctx, v);

        return ggml_reshape_1d(ctx, v, n_kv);
    }
};

struct llama_kv_cache_depth::shift_graph {
    ggml_tensor * inp_shift = nullptr; // I32 [n_cells]
    ggml_tensor * inp_rot   = nullptr;
    ggml_tensor * dst       = nullptr; // the keys, [n_embd_k_gqa, n_cells]
    ggml_tensor * out       = nullptr; // the same, rotated

    static constexpr size_t max_nodes = 64;

    // keys that are rotated at once
    static constexpr uint32_t n_cells = 512;
};
