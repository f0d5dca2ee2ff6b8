#include "llama-graph-depth.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-cache-depth.h"

#include <algorithm>
#include <cmath>

// up to this many tokens the masks of all layers are small enough to come from the host
// a decode step is not slowed down by building them
static constexpr uint32_t n_tokens_mask_host = 8;

// attention over many tokens is built in up to so many slices of KV heads
static constexpr int64_t n_slices_max = 8;

// nodes and inputs of build_attn() for one layer: 7 for each slice and 2 for all of them, up to 6 for the mask, 12 to store K and V,
// 5 for the sampled queries, 4 rotations of 4 and the views of K and V. llama_context::graph_max_nodes() has counted on
// what stock builds instead, which is left as headroom
static constexpr uint32_t n_nodes_layer = 7*n_slices_max + 48;

uint32_t llm_graph_kv_depth_n_nodes(const llama_hparams & hparams) {
    return n_nodes_layer*hparams.n_layer_all;
}

// the position of an empty cell relative to the ubatch: no token reaches it
static constexpr float pos_kv_empty = 1e9f;

llm_graph_input_kv_depth::llm_graph_input_kv_depth(
        const llm_graph_context            & graph,
        const llama_kv_cache_depth_context * mctx) : mctx(mctx) {
    const auto & sinfo = mctx->get_sinfo();

    auto * ctx0 = graph.ctx0;

    s0       = sinfo.s0;
    n_stream = sinfo.n_stream;
    n_tps    = graph.n_tokens/n_stream;
    n_kv     = sinfo.n_kv;
    evicted  = sinfo.evicted;

    // the slot of a full cache has no tokens, they come with the graph to reserve
    n_q = sinfo.n_tps > 0 ? sinfo.q_rows.size()/n_stream : std::min(n_tps, llama_kv_n_query);

    GGML_ASSERT(sinfo.n_tps == 0 || sinfo.n_tps == n_tps);

    const size_t n_layers = n_kv.size();

    attn.resize(n_layers);

    size_t n_kv_all = 0;
    for (const uint32_t n : n_kv) {
        offs.push_back(n_kv_all);
        n_kv_all += n;
    }

    const auto add_input = [&](ggml_tensor * cur, const char * name) {
        ggml_set_input(cur);
        ggml_set_name(cur, name);
        return cur;
    };

    rows   = add_input(ggml_new_tensor_3d(ctx0, GGML_TYPE_I64, n_tps, n_stream, n_layers), "attn_inp_depth_rows");
    q_idxs = add_input(ggml_new_tensor_1d(ctx0, GGML_TYPE_I32, n_q*n_stream), "attn_inp_depth_q_idxs");
    q_rows = add_input(ggml_new_tensor_1d(ctx0, GGML_TYPE_I64, n_q*n_stream), "attn_inp_depth_q_rows");

    if (n_tps*n_stream <= n_tokens_mask_host) {
        kq_mask = add_input(ggml_new_tensor_1d(ctx0, GGML_TYPE_F32, n_kv_all*n_tps*n_stream), "attn_inp_depth_kq_mask");
    } else {
        pos_kv  = add_input(ggml_new_tensor_1d(ctx0, GGML_TYPE_F32, n_kv_all*n_stream), "attn_inp_depth_pos_kv");
        pos_tok = add_input(ggml_new_tensor_4d(ctx0, GGML_TYPE_F32, 1, n_tps, 1, n_stream), "attn_inp_depth_pos_tok");
    }
}

void llm_graph_input_kv_depth::set_input(const llama_ubatch * ubatch) {
    const auto & sinfo  = mctx->get_sinfo();
    const auto & layers = mctx->get_kv()->get_layers();

    GGML_ASSERT(sinfo.n_tps == n_tps && sinfo.n_stream == n_stream);

    mctx->get_kv()->set_attn(attn);

    // a model may build a graph that leaves out a layer or its queries
    if (rows->buffer) {
        std::vector<int64_t> data(sinfo.rows.begin(), sinfo.rows.end());
        ggml_backend_tensor_set(rows, data.data(), 0, ggml_nbytes(rows));
    }

    if (q_idxs->buffer) {
        std::vector<int32_t> data(sinfo.q_idxs.begin(), sinfo.q_idxs.end());
        ggml_backend_tensor_set(q_idxs, data.data(), 0, ggml_nbytes(q_idxs));
    }

    if (q_rows->buffer) {
        std::vector<int64_t> data(n_q*n_stream);
        for (uint32_t i = 0; i < n_q*n_stream; ++i) {
            data[i] = (s0 + i/n_q)*llama_kv_n_query + sinfo.q_rows[i];
        }
        ggml_backend_tensor_set(q_rows, data.data(), 0, ggml_nbytes(q_rows));
    }

    if (kq_mask && kq_mask->buffer) {
        GGML_ASSERT(ggml_backend_buffer_is_host(kq_mask->buffer));

        float * dst = (float *) kq_mask->data;

        for (size_t i = 0; i < layers.size(); ++i) {
            for (uint32_t s = 0; s < n_stream; ++s) {
                const llama_pos * pos = layers[i].cells[s0 + s].pos_data();

                for (uint32_t t = 0; t < n_tps; ++t) {
                    const llama_pos p = ubatch->pos[s*n_tps + t];

                    for (uint32_t j = 0; j < n_kv[i]; ++j) {
                        // as unsigned, the -1 of an empty cell is in the future
                        dst[j] = (uint32_t) pos[j] <= (uint32_t) p ? 0.0f : -INFINITY;
                    }

                    dst += n_kv[i];
                }
            }
        }
    }

    if (pos_kv && pos_kv->buffer) {
        std::vector<float> data(ggml_nelements(pos_kv));

        float * dst = data.data();

        for (size_t i = 0; i < layers.size(); ++i) {
            for (uint32_t s = 0; s < n_stream; ++s) {
                const llama_pos * pos = layers[i].cells[s0 + s].pos_data();
                const llama_pos   p0  = ubatch->pos[s*n_tps];

                for (uint32_t j = 0; j < n_kv[i]; ++j) {
                    dst[j] = pos[j] < 0 ? pos_kv_empty : (float) (pos[j] - p0);
                }

                dst += n_kv[i];
            }
        }

        ggml_backend_tensor_set(pos_kv, data.data(), 0, ggml_nbytes(pos_kv));

        data.resize(n_tps*n_stream);
        for (uint32_t t = 0; t < n_tps*n_stream; ++t) {
            data[t] = ubatch->pos[t] - ubatch->pos[t/n_tps*n_tps];
        }

        ggml_backend_tensor_set(pos_tok, data.data(), 0, ggml_nbytes(pos_tok));
    }

    for (auto & [_, rot] : rots) {
        if (rot->buffer) {
            llama_kv_cache_depth::set_input_rot(rot);
        }
    }
}

bool llm_graph_input_kv_depth::can_reuse(const llm_graph_params & params) {
    mctx = static_cast<const llama_kv_cache_depth_context *>(params.mctx);

    const auto & sinfo = mctx->get_sinfo();

    bool res = true;

    res &= sinfo.s0       == s0;
    res &= sinfo.n_stream == n_stream;
    res &= sinfo.n_tps    == n_tps;
    res &= sinfo.n_kv     == n_kv;
    res &= sinfo.evicted  == evicted;

    res &= sinfo.q_rows.size() == n_q*n_stream;

    return res;
}

ggml_tensor * llm_graph_input_kv_depth::build_kq_mask(const llm_graph_context & graph, uint32_t i) const {
    auto * ctx0 = graph.ctx0;

    const size_t nb1 = n_kv[i]*sizeof(float);

    ggml_tensor * res;

    if (kq_mask) {
        res = ggml_view_4d(ctx0, kq_mask, n_kv[i], n_tps, 1, n_stream, nb1, nb1*n_tps, nb1*n_tps, offs[i]*n_tps*n_stream*sizeof(float));
    } else {
        // cells in the future of the token get a large negative number
        res = ggml_view_4d(ctx0, pos_kv, n_kv[i], 1, 1, n_stream, nb1, nb1, nb1, offs[i]*n_stream*sizeof(float));
        res = ggml_repeat_4d     (ctx0, res, n_kv[i], n_tps, 1, n_stream);
        res = ggml_sub_inplace   (ctx0, res, pos_tok);
        res = ggml_relu_inplace  (ctx0, res);
        res = ggml_scale_inplace (ctx0, res, -1e30f);
    }

    // flash attention requires an f16 mask
    return graph.cparams.flash_attn ? ggml_cast(ctx0, res, GGML_TYPE_F16) : res;
}

// llm_graph_context::build_attn_mha() without flash attention, for one token of each sequence
//
// the query heads of a group are columns of one matrix when they meet the values, which are then read once per group.
// doing the same with the keys would be slower on the CPU: their rows are short, the time goes into the sum at the end
// of each dot product
ggml_tensor * llm_graph_input_kv_depth::build_attn_tok(
        const llm_graph_context & graph,
        ggml_tensor * q,
        ggml_tensor * k,
        ggml_tensor * v,
        ggml_tensor * mask,
        ggml_tensor * sinks,
              float   kq_scale) const {
    auto * ctx0 = graph.ctx0;

    const int64_t n_head    = q->ne[1];
    const int64_t n_head_kv = k->ne[1];
    const int64_t n_kv      = k->ne[2];

    q = ggml_view_4d(ctx0, q, q->ne[0], 1, n_head, n_stream, q->nb[2], q->nb[1], q->nb[2], 0);
    k = ggml_permute(ctx0, k, 0, 2, 1, 3);
    v = ggml_permute(ctx0, v, 0, 2, 1, 3);

    ggml_tensor * kq = ggml_mul_mat(ctx0, k, q);

    // see llm_graph_context::build_attn_mha()
    ggml_prec_set_acc(kq, GGML_PREC_F32);

    kq = ggml_soft_max_ext(ctx0, kq, mask, kq_scale, 0.0f);
    ggml_soft_max_add_sinks(kq, sinks);

    kq = ggml_reshape_4d(ctx0, kq, n_kv, n_head/n_head_kv, n_head_kv, n_stream);

    ggml_tensor * cur = ggml_mul_mat(ctx0, v, kq);

    return ggml_reshape_2d(ctx0, cur, cur->ne[0]*n_head, n_stream);
}

// the same for many tokens, a slice of the KV heads at a time: the scores of all heads at once are the largest tensor of the
// graph by far. a slice is one KV head, or more where a model has so many that the graph would grow with them
ggml_tensor * llm_graph_input_kv_depth::build_attn_heads(
        const llm_graph_context & graph,
        ggml_tensor * q,
        ggml_tensor * k,
        ggml_tensor * v,
        ggml_tensor * mask,
              float   kq_scale) const {
    auto * ctx0 = graph.ctx0;

    const int64_t n_head    = q->ne[1];
    const int64_t n_head_kv = k->ne[1];
    const int64_t n_gqa     = n_head/n_head_kv;

    const int64_t n_slice   = (n_head_kv + n_slices_max - 1)/n_slices_max;

    ggml_tensor * cur = nullptr; // [n_embd_head_v, n_tps, n_head, n_stream]

    for (int64_t h = 0; h < n_head_kv; h += n_slice) {
        const int64_t n = std::min(n_slice, n_head_kv - h);

        ggml_tensor * qh = ggml_view_4d(ctx0, q, q->ne[0], n_tps, n*n_gqa, n_stream, q->nb[2], q->nb[1], q->nb[2]*n_tps, h*n_gqa*q->nb[1]);
        ggml_tensor * kh = ggml_view_4d(ctx0, k, k->ne[0], k->ne[2], n, n_stream, k->nb[2], k->nb[1], k->nb[3], h*k->nb[1]);
        ggml_tensor * vh = ggml_view_4d(ctx0, v, v->ne[0], v->ne[2], n, n_stream, v->nb[2], v->nb[1], v->nb[3], h*v->nb[1]);

        ggml_tensor * kq = ggml_mul_mat(ctx0, kh, qh);

        // see llm_graph_context::build_attn_mha()
        ggml_prec_set_acc(kq, GGML_PREC_F32);

        kq = ggml_soft_max_ext(ctx0, kq, mask, kq_scale, 0.0f);

        ggml_tensor * kqv = ggml_mul_mat(ctx0, vh, kq);

        cur = cur ? ggml_concat(ctx0, cur, kqv, 2) : kqv;
    }

    cur = ggml_permute(ctx0, cur, 0, 2, 1, 3);

    return ggml_cont_2d(ctx0, cur, cur->ne[0]*n_head, (int64_t) n_tps*n_stream);
}

ggml_tensor * llm_graph_input_kv_depth::build_rot(const llm_graph_context & graph, ggml_tensor * cur, uint32_t n_rot) {
    if (n_rot == 0 || cur == nullptr) {
        return cur;
    }

    auto & rot = rots[n_rot];
    if (!rot) {
        rot = ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_F32, n_rot, n_rot);
        ggml_set_input(rot);
        ggml_set_name(rot, "attn_inp_depth_rot");
    }

    return llama_mul_mat_hadamard(graph.ctx0, cur, rot);
}

ggml_tensor * llm_graph_input_kv_depth::build_attn(
        const llm_graph_context & graph,
        ggml_tensor * q_cur,
        ggml_tensor * k_cur,
        ggml_tensor * v_cur,
        ggml_tensor * kq_b,
        ggml_tensor * sinks,
              float   kq_scale,
                int   il) {
    auto * kv   = mctx->get_kv();
    auto * ctx0 = graph.ctx0;
    auto * gf   = graph.gf;

    const auto & layer = kv->get_layer(il);

    const uint32_t i = &layer - kv->get_layers().data();

    const auto & hparams = graph.hparams;

    const int64_t n_head      = hparams.n_head(il);
    const int64_t n_head_kv   = hparams.n_head_kv(il);
    const int64_t n_embd_k    = hparams.n_embd_head_k(il);
    const int64_t n_embd_v    = hparams.n_embd_head_v(il);
    const int64_t n_cells     = layer.n_cells;
    const int64_t n_tokens    = n_tps*n_stream;

    q_cur = build_rot(graph, q_cur, layer.n_rot_k);
    k_cur = build_rot(graph, k_cur, layer.n_rot_k);
    v_cur = build_rot(graph, v_cur, layer.n_rot_v);

    // these nodes are added to the graph together so that they are not reordered
    ggml_build_forward_expand(gf, q_cur);
    if (v_cur) {
        ggml_build_forward_expand(gf, v_cur);
    }
    if (k_cur) {
        ggml_build_forward_expand(gf, k_cur);
    }

    // store K and V, [n_embd, n_cells, n_stream] <- [n_embd, n_tps, n_stream]

    ggml_tensor * idxs = ggml_view_3d(ctx0, rows, n_tps, 1, n_stream, rows->nb[1], rows->nb[1], i*rows->nb[2]);

    // heads are rows of one matrix, contiguous in memory
    const auto merge_heads = [&](ggml_tensor * cur) {
        if (ggml_row_size(cur->type, cur->ne[0]) != cur->nb[1]) {
            cur = ggml_cont(ctx0, cur);
        }
        return ggml_view_4d(ctx0, cur, cur->ne[0]*cur->ne[1], n_tps, 1, n_stream, cur->nb[2], cur->nb[2]*n_tps, cur->nb[2]*n_tps, 0);
    };

    if (k_cur) {
        ggml_tensor * k = layer.k;

        k = ggml_view_4d(ctx0, k, k->ne[0], n_cells, 1, n_stream, k->nb[1], k->nb[2], k->nb[2], s0*k->nb[2]);

        ggml_build_forward_expand(gf, ggml_set_rows(ctx0, k, merge_heads(k_cur), idxs));
    }

    if (v_cur) {
        ggml_tensor * v = layer.v;

        v_cur = merge_heads(v_cur);

        if (kv->get_v_trans()) {
            // a row is a single element here, the same row for each of the n_embd_v_gqa dimensions
            const size_t size_el = ggml_type_size(v->type);

            v     = ggml_view_4d(ctx0, v, 1, n_cells, v->ne[0], n_stream, size_el, n_cells*size_el, v->nb[2], s0*v->nb[2]);
            v_cur = ggml_view_4d(ctx0, v_cur, 1, n_tps, v_cur->ne[0], n_stream, v_cur->nb[1], v_cur->nb[0], v_cur->nb[3], 0);
        } else {
            v = ggml_view_4d(ctx0, v, v->ne[0], n_cells, 1, n_stream, v->nb[1], v->nb[2], v->nb[2], s0*v->nb[2]);
        }

        ggml_build_forward_expand(gf, ggml_set_rows(ctx0, v, v_cur, idxs));
    }

    // sample queries for the scoring pass, a cheap copy that does not depend on what is evicted when
    // a layer that reads the cache of another one has its say through that one only

    if (layer.q && k_cur) {
        attn[i] = { kq_scale, sinks };

        ggml_tensor * q = q_cur;
        if (ggml_row_size(q->type, q->ne[0]) != q->nb[1]) {
            q = ggml_cont(ctx0, q);
        }
        q = ggml_view_2d(ctx0, q, n_embd_k*n_head, n_tokens, q->nb[2], 0);

        if (n_q != n_tps) {
            q = ggml_get_rows(ctx0, q, q_idxs);
        }

        ggml_tensor * dst = ggml_view_2d(ctx0, layer.q, layer.q->ne[0], layer.q->ne[1]*layer.q->ne[2], layer.q->nb[1], 0);

        ggml_build_forward_expand(gf, ggml_set_rows(ctx0, dst, q, q_rows));
    }

    // attend

    ggml_tensor * mask = build_kq_mask(graph, i);

    ggml_tensor * q = q_cur;

    ggml_tensor * k = ggml_view_4d(ctx0, layer.k, n_embd_k, n_head_kv, n_kv[i], n_stream,
            ggml_row_size(layer.k->type, n_embd_k), layer.k->nb[1], layer.k->nb[2], s0*layer.k->nb[2]);

    ggml_tensor * v;
    if (kv->get_v_trans()) {
        const size_t nb1 = ggml_row_size(layer.v->type, n_cells);

        v = ggml_view_4d(ctx0, layer.v, n_kv[i], n_head_kv, n_embd_v, n_stream, nb1*n_embd_v, nb1, layer.v->nb[2], s0*layer.v->nb[2]);
    } else {
        v = ggml_view_4d(ctx0, layer.v, n_embd_v, n_head_kv, n_kv[i], n_stream,
                ggml_row_size(layer.v->type, n_embd_v), layer.v->nb[1], layer.v->nb[2], s0*layer.v->nb[2]);
    }

    ggml_tensor * cur;

    const bool is_plain = kv->get_v_trans() && !graph.cparams.flash_attn && !kq_b && !hparams.attn_soft_cap && graph.arch != LLM_ARCH_GROK;

    if (is_plain && n_tps == 1 && evicted) {
        // not before something has been evicted: until then the logits are those of the stock cache to the last bit
        cur = build_attn_tok(graph, q, k, v, mask, sinks, kq_scale);
    } else if (is_plain && n_tps > n_tokens_mask_host && !sinks) {
        cur = build_attn_heads(graph, q, k, v, mask, kq_scale);
    } else {
        cur = graph.build_attn_mha(q, k, v, kq_b, mask, sinks, nullptr, 0, kq_scale, il);
    }

    if (is_plain && !graph.cparams.offload_kqv) {
        // all nodes between the KV store and the attention output are run on the CPU. a view has no say in where it is computed
        ggml_backend_sched_set_tensor_backend(graph.sched, cur->view_src ? cur->view_src : cur, graph.backend_cpu);
    }

    ggml_build_forward_expand(gf, cur);

    if (layer.n_rot_v) {
        cur = build_rot(graph, cur, layer.n_rot_v);
    }

    return cur;
}

//
// llm_graph_input_attn_kv_iswa_depth
//

llm_graph_input_attn_kv_iswa_depth::llm_graph_input_attn_kv_iswa_depth(
        const llama_hparams & hparams,
        const llama_cparams & cparams,
        const llama_kv_cache_depth_context * mctx) : llm_graph_input_attn_kv_iswa(hparams, cparams, mctx->get_iswa()) {
}

bool llm_graph_input_attn_kv_iswa_depth::can_reuse(const llm_graph_params & params) {
    llm_graph_params params_iswa = params;

    params_iswa.mctx = static_cast<const llama_kv_cache_depth_context *>(params.mctx)->get_iswa();

    return llm_graph_input_attn_kv_iswa::can_reuse(params_iswa);
}
