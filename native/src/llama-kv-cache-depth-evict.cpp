// what a layer evicts, and the scoring pass that says so

#include "llama-kv-cache-depth.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-depth-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

void llama_kv_cache_depth::synchronize() const {
    if (lctx) {
        ggml_backend_sched_synchronize(lctx->get_sched());
    }
}

ggml_status llama_kv_cache_depth::evict(kv_layer & layer, uint32_t strm, uint32_t n_tokens) {
    auto & cells  = layer.cells[strm];
    auto & stream = streams[strm];

    if (layer.q && llama_kv_evict_is_due(cells, n_tokens)) {
        llama_kv_attn attn;

        const ggml_status status = compute_attn(layer, strm, attn);

        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }

        if (!attn.pos.empty()) {
            // a broken value shows in its own cell, a broken key in all of them
            if (std::none_of(attn.mass.begin(), attn.mass.end(), [](float x) { return std::isfinite(x); })) {
                mark_broken(layer, strm);

                cells.pos_scored = attn.pos.back();
                cells.is_scored  = true;
            } else {
                llama_kv_evict_count(*score, cells, attn);
            }

            stat.n_score++;
        }
    }

    const auto rows = llama_kv_evict_select(*score, cells, stream.pins, layer.il, plan.params.n_sink, plan.params.n_recent, n_tokens);

    for (const uint32_t i : rows) {
        cells.evict(i, stream.tokens.pos_max());
    }

    stat.n_evict += rows.size();

    if (cells.size() - cells.get_used() < n_tokens) {
        LLAMA_LOG_ERROR("%s: layer %u of sequence %u has no %u cells to spare\n", __func__, layer.il, strm, n_tokens);
        return GGML_STATUS_FAILED;
    }

    return GGML_STATUS_SUCCESS;
}

void llama_kv_cache_depth::evict_except(uint32_t i, llama_seq_id seq_id, const std::vector<llama_pos> & pos) {
    auto & cells = layers[i].cells[seq_id];

    const auto & stream = streams[seq_id];

    const llama_pos p_last = stream.tokens.pos_max();

    for (uint32_t j = cells.used_max_p1(); j-- > 0; ) {
        if (cells.is_empty(j)) {
            continue;
        }

        const llama_pos p = cells.pos_get(j);

        if (p != p_last && !stream.pins.has(p) && !std::binary_search(pos.begin(), pos.end(), p)) {
            cells.evict(j, p_last);

            stat.n_evict++;
        }
    }
}

std::array<uint32_t, LLAMA_KV_KIND_COUNT> llama_kv_cache_depth::count_kinds(const kv_layer & layer, uint32_t strm) const {
    const auto & cells = layer.cells[strm];

    const llama_pos p1 = cells.pos_max() + 1 - (llama_pos) plan.params.n_recent;

    std::array<uint32_t, LLAMA_KV_KIND_COUNT> res = {};

    for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
        if (!cells.is_empty(i)) {
            res[llama_kv_score_kind(cells.pos_get(i), streams[strm].pins, plan.params.n_sink, p1)]++;
        }
    }

    return res;
}

void llama_kv_cache_depth::mark_broken(kv_layer & layer, uint32_t strm) {
    auto & cells = layer.cells[strm];

    const int64_t n_embd = layer.k->ne[0];
    const auto  * traits = ggml_get_type_traits(layer.k->type);

    std::vector<uint8_t> row(layer.k->nb[1]);
    std::vector<float>   key(n_embd);

    for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
        if (cells.is_empty(i)) {
            continue;
        }

        ggml_backend_tensor_get(layer.k, row.data(), strm*layer.k->nb[2] + i*layer.k->nb[1], row.size());

        if (traits->to_float) {
            traits->to_float(row.data(), key.data(), n_embd);
        } else {
            memcpy(key.data(), row.data(), row.size()); // F32
        }

        if (!std::all_of(key.begin(), key.end(), [](float x) { return std::isfinite(x); })) {
            cells.acc[i] = -std::numeric_limits<float>::max();
            cells.cnt[i] = 1.0f;
        }
    }
}

void llama_kv_cache_depth::build_attn(ggml_context * ctx, ggml_cgraph * gf, const kv_layer & layer, uint32_t strm, int64_t n_kv, attn_graph & res) const {
    const int64_t n_head      = hparams.n_head(layer.il);
    const int64_t n_head_kv   = hparams.n_head_kv(layer.il);
    const int64_t n_gqa       = n_head/n_head_kv;
    const int64_t n_embd_head = hparams.n_embd_head_k(layer.il);

    res.ctx       = ctx;
    res.layer     = &layer;
    res.strm      = strm;
    res.v_trans   = v_trans;
    res.n_kv      = n_kv;
    res.n_head_kv = n_head_kv;
    res.n_embd_v  = hparams.n_embd_head_v(layer.il);

    res.inp_pos_kv = res.new_input(n_kv, 1, 1);
    res.inp_pos_q  = res.new_input(1, llama_kv_n_query, 1);
    res.weight     = res.new_input(1, llama_kv_n_query*n_gqa, n_head_kv);

    ggml_tensor * mask = ggml_repeat_4d(ctx, res.inp_pos_kv, n_kv, llama_kv_n_query, 1, 1);
    mask = ggml_sub_inplace  (ctx, mask, res.inp_pos_q);
    mask = ggml_relu_inplace (ctx, mask);
    mask = ggml_scale_inplace(ctx, mask, -1e30f);

    const auto * lk = layer.k;
    const auto * lq = layer.q;

    ggml_tensor * k = ggml_view_3d(ctx, layer.k, n_embd_head, n_head_kv, n_kv,
            ggml_row_size(lk->type, n_embd_head), lk->nb[1], strm*lk->nb[2]);
    k = ggml_permute(ctx, k, 0, 2, 1, 3);

    // the heads of a group are rows of one matrix, so that each key is read once for all of them
    ggml_tensor * q = ggml_view_4d(ctx, layer.q, n_embd_head, n_gqa, n_head_kv, llama_kv_n_query,
            ggml_row_size(lq->type, n_embd_head), ggml_row_size(lq->type, n_embd_head*n_gqa), lq->nb[1], strm*lq->nb[2]);
    q = ggml_cast(ctx, ggml_permute(ctx, q, 0, 2, 3, 1), GGML_TYPE_F32);
    q = ggml_reshape_3d(ctx, q, n_embd_head, llama_kv_n_query*n_gqa, n_head_kv);

    ggml_tensor * kq = ggml_mul_mat(ctx, k, q);
    ggml_prec_set_acc(kq, GGML_PREC_F32);

    kq = ggml_reshape_3d(ctx, kq, n_kv, llama_kv_n_query, n_head);

    // see llm_graph_context::build_attn_mha()
    if (hparams.attn_soft_cap || model.arch == LLM_ARCH_GROK) {
        const float scale = model.arch == LLM_ARCH_GROK ? hparams.f_attn_out_scale : 1.0f;

        kq = ggml_scale(ctx, kq, scale/hparams.f_attn_logit_softcapping);
        kq = ggml_tanh (ctx, kq);
        kq = ggml_scale(ctx, kq, hparams.f_attn_logit_softcapping);
    }

    kq = ggml_soft_max_ext_inplace(ctx, kq, mask, get_attn(layer).kq_scale, 0.0f);
    ggml_soft_max_add_sinks(kq, get_attn(layer).sinks);

    res.prob = ggml_reshape_3d(ctx, kq, n_kv, llama_kv_n_query*n_gqa, n_head_kv);

    res.out = score->build(res);
    res.out = ggml_cont(ctx, res.out);
    ggml_set_output(res.out);
    ggml_build_forward_expand(gf, res.out);
}

void llama_kv_cache_depth::set_attn(const std::vector<attn_params> & params) {
    for (size_t i = 0; i < layers.size(); ++i) {
        if (params[i].kq_scale != 0.0f) {
            layer_attn[i] = params[i];
        }
    }
}

ggml_status llama_kv_cache_depth::compute_attn(const kv_layer & layer, uint32_t strm, llama_kv_attn & attn) {
    GGML_ASSERT(layer.q);

    const auto & cells  = layer.cells[strm];
    const auto & stream = streams[strm];

    const auto & q_pos = stream.queries.pos;

    attn.pos = stream.queries.after(cells.pos_scored);

    if (attn.pos.empty()) {
        return GGML_STATUS_SUCCESS;
    }

    const int64_t n_kv   = std::min(GGML_PAD(cells.used_max_p1(), 32), cells.size());
    const int64_t n_head = hparams.n_head(layer.il);

    attn_graph graph;

    const auto build = [&](ggml_context * ctx, ggml_cgraph * gf) {
        build_attn(ctx, gf, layer, strm, n_kv, graph);
    };

    const auto set_inputs = [&]() {
        // no token ahead: an empty cell has a position that no query reaches
        std::vector<float> data(n_kv);
        for (int64_t i = 0; i < n_kv; ++i) {
            data[i] = cells.is_empty(i) ? 1e9f : cells.pos_get(i);
        }
        ggml_backend_tensor_set(graph.inp_pos_kv, data.data(), 0, ggml_nbytes(graph.inp_pos_kv));

        // a query that does not count may see everything, so that its softmax is defined
        data.resize(llama_kv_n_query);
        for (uint32_t i = 0; i < llama_kv_n_query; ++i) {
            data[i] = q_pos[i] > cells.pos_scored ? q_pos[i] : 1e9f;
        }
        ggml_backend_tensor_set(graph.inp_pos_q, data.data(), 0, ggml_nbytes(graph.inp_pos_q));

        data.resize(llama_kv_n_query*n_head);
        for (int64_t h = 0; h < n_head; ++h) {
            for (uint32_t i = 0; i < llama_kv_n_query; ++i) {
                data[h*llama_kv_n_query + i] = q_pos[i] > cells.pos_scored ? 1.0f : 0.0f;
            }
        }
        ggml_backend_tensor_set(graph.weight, data.data(), 0, ggml_nbytes(graph.weight));

        if (graph.inp_ones && graph.inp_ones->buffer) {
            data.assign(ggml_nelements(graph.inp_ones), 1.0f);
            ggml_backend_tensor_set(graph.inp_ones, data.data(), 0, ggml_nbytes(graph.inp_ones));
        }

        if (graph.inp_rot_v && graph.inp_rot_v->buffer) {
            set_input_rot(graph.inp_rot_v);
        }
    };

    const auto get_outputs = [&]() {
        attn.mass.resize(n_kv);
        ggml_backend_tensor_get(graph.out, attn.mass.data(), 0, ggml_nbytes(graph.out));
    };

    return sched.compute(lctx->get_sched(), max_nodes(), build, set_inputs, get_outputs);
}
