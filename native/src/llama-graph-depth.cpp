#include "llama-graph-depth.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-cache-depth.h"
#include "llama-kv-depth-attn.h"

#include <algorithm>
#include <cmath>

// up to this many tokens the masks of all layers are small enough to come from the host
// a decode step is not slowed down by building them
static constexpr uint32_t n_tokens_mask_host = 8;

// attention over many tokens is built in up to so many slices of KV heads
static constexpr int64_t n_slices_max = 8;

// nodes and inputs of build_attn() for one layer: 10 for each slice and 2 for all of them, up to 6 for the mask, 12 to store K and V,
// 5 for the sampled queries, 4 rotations of 4 and the views of K and V. llama_context::graph_max_nodes() has counted on
// what stock builds instead, which is left as headroom
static constexpr uint32_t n_nodes_layer = 10*n_slices_max + 48;

uint32_t llm_graph_kv_depth_n_nodes(const llama_hparams & hparams) {
    return n_nodes_layer*hparams.n_layer_all;
}

// the position of an empty cell relative to the ubatch: no token reaches it
static constexpr float pos_kv_empty = 1e9f;

llm_graph_input_kv_depth::llm_graph_input_kv_depth(
        const llm_graph_context            & graph,
        const llama_kv_cache_depth_context * mctx) : mctx(mctx) {
    const auto & sinfo  = mctx->get_sinfo();
    const auto & layers = mctx->get_kv()->get_layers();

    auto * ctx0 = graph.ctx0;

    s0       = sinfo.s0;
    n_stream = sinfo.n_stream;
    n_tps    = graph.n_tokens/n_stream;
    n_kv     = sinfo.n_kv;
    evicted  = sinfo.evicted;

    // the slot of a full cache has no tokens, they come with the graph to reserve
    n_q = sinfo.n_tps > 0 ? sinfo.q_rows.size()/n_stream : std::min(n_tps, llama_kv_n_query);

    GGML_ASSERT(sinfo.n_tps == 0 || sinfo.n_tps == n_tps);

    attn.resize(n_kv.size());

    const bool host_mask = n_tps*n_stream <= n_tokens_mask_host;

    std::vector<size_t> n_mask; // [n_devices]

    for (uint32_t i = 0; i < n_kv.size(); ++i) {
        auto * backend = llama_kv_depth_backend_of(graph.sched, layers[i].k);

        uint32_t i_device = 0;
        while (i_device < devices.size() && devices[i_device].backend != backend) {
            i_device++;
        }
        if (i_device == devices.size()) {
            devices.emplace_back();
            devices.back().backend = backend;
            n_mask.push_back(0);
        }

        layer_idxs.push_back({ i_device, (uint32_t) devices[i_device].layers.size(), n_mask[i_device], nullptr, nullptr });

        devices[i_device].layers.push_back(i);
        n_mask[i_device] += GGML_PAD((size_t) n_kv[i]*n_stream*(host_mask ? n_tps : 1), llama_kv_depth_n_align_view);
    }

    for (size_t i = 0; i < devices.size(); ++i) {
        auto & dev = devices[i];

        const auto add_input = [&](ggml_tensor * cur, const char * name) {
            ggml_set_input(cur);
            ggml_format_name(cur, "attn_inp_depth_%s_%zu", name, i);
            if (dev.backend) {
                ggml_backend_sched_set_tensor_backend(graph.sched, cur, dev.backend);
            }
            return cur;
        };

        dev.rows   = add_input(ggml_new_tensor_2d(ctx0, GGML_TYPE_I64, GGML_PAD((size_t) n_tps*n_stream, llama_kv_depth_n_align_view), dev.layers.size()), "rows");
        dev.q_idxs = add_input(ggml_new_tensor_1d(ctx0, GGML_TYPE_I32, n_q*n_stream), "q_idxs");
        dev.q_rows = add_input(ggml_new_tensor_1d(ctx0, GGML_TYPE_I64, n_q*n_stream), "q_rows");

        if (host_mask) {
            dev.kq_mask = add_input(ggml_new_tensor_1d(ctx0, graph.cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32, n_mask[i]), "kq_mask");
        } else {
            dev.pos_kv  = add_input(ggml_new_tensor_1d(ctx0, GGML_TYPE_F32, n_mask[i]), "pos_kv");
            dev.pos_tok = add_input(ggml_new_tensor_4d(ctx0, GGML_TYPE_F32, 1, n_tps, 1, n_stream), "pos_tok");
        }
    }

    // backends store K together with its rotation where the one node follows the other, with nothing but the view of it between.
    // so the views that storing it needs are in the graph before
    for (uint32_t i = 0; i < layer_idxs.size(); ++i) {
        auto & layer = layer_idxs[i];

        ggml_tensor * rows = devices[layer.i_device].rows;

        layer.rows = ggml_view_3d(ctx0, rows, n_tps, 1, n_stream, n_tps*sizeof(int64_t), n_tps*sizeof(int64_t), layer.i_rows*rows->nb[1]);
        layer.k    = view_streams(graph, layers[i].k);

        ggml_build_forward_expand(graph.gf, layer.rows);
        ggml_build_forward_expand(graph.gf, layer.k);
    }
}

ggml_tensor * llm_graph_input_kv_depth::view_streams(const llm_graph_context & graph, ggml_tensor * t) const {
    return t->ne[2] == 1 ? t : ggml_view_4d(graph.ctx0, t, t->ne[0], t->ne[1], 1, n_stream, t->nb[1], t->nb[2], t->nb[2], s0*t->nb[2]);
}

template <typename T>
void llm_graph_input_kv_depth::set_kq_mask(T * dst, const device_inputs & dev, const llama_ubatch & ubatch, T allowed, T masked) const {
    const auto & layers = mctx->get_kv()->get_layers();

    for (const uint32_t i : dev.layers) {
        T * row = dst + layer_idxs[i].offs;

        for (uint32_t s = 0; s < n_stream; ++s) {
            const llama_pos * pos = layers[i].cells[s0 + s].pos_data();

            for (uint32_t t = 0; t < n_tps; ++t) {
                const llama_pos p = ubatch.pos[s*n_tps + t];

                for (uint32_t j = 0; j < n_kv[i]; ++j) {
                    // as unsigned, the -1 of an empty cell is in the future
                    row[j] = (uint32_t) pos[j] <= (uint32_t) p ? allowed : masked;
                }

                row += n_kv[i];
            }
        }
    }
}

void llm_graph_input_kv_depth::set_input_device(const device_inputs & dev, const llama_ubatch & ubatch) const {
    const auto & sinfo  = mctx->get_sinfo();
    const auto & layers = mctx->get_kv()->get_layers();

    // the graph before this one may still read them
    if (dev.backend) {
        ggml_backend_synchronize(dev.backend);
    }

    // a model may build a graph that leaves out a layer or its queries
    if (dev.rows->buffer) {
        const uint32_t n_tokens = n_tps*n_stream;

        std::vector<int64_t> data(ggml_nelements(dev.rows));
        for (size_t i = 0; i < dev.layers.size(); ++i) {
            std::copy_n(sinfo.rows.begin() + dev.layers[i]*n_tokens, n_tokens, data.begin() + i*dev.rows->ne[0]);
        }
        ggml_backend_tensor_set(dev.rows, data.data(), 0, ggml_nbytes(dev.rows));
    }

    if (dev.q_idxs->buffer) {
        std::vector<int32_t> data(sinfo.q_idxs.begin(), sinfo.q_idxs.end());
        ggml_backend_tensor_set(dev.q_idxs, data.data(), 0, ggml_nbytes(dev.q_idxs));
    }

    if (dev.q_rows->buffer) {
        std::vector<int64_t> data(n_q*n_stream);
        for (uint32_t i = 0; i < n_q*n_stream; ++i) {
            data[i] = (s0 + i/n_q)*llama_kv_n_query + sinfo.q_rows[i];
        }
        ggml_backend_tensor_set(dev.q_rows, data.data(), 0, ggml_nbytes(dev.q_rows));
    }

    if (dev.kq_mask && dev.kq_mask->buffer) {
        const bool is_host = ggml_backend_buffer_is_host(dev.kq_mask->buffer);

        std::vector<uint8_t> data(is_host ? 0 : ggml_nbytes(dev.kq_mask));

        void * dst = is_host ? dev.kq_mask->data : data.data();

        if (dev.kq_mask->type == GGML_TYPE_F16) {
            set_kq_mask((ggml_fp16_t *) dst, dev, ubatch, ggml_fp32_to_fp16(0.0f), ggml_fp32_to_fp16(-INFINITY));
        } else {
            set_kq_mask((float *) dst, dev, ubatch, 0.0f, -INFINITY);
        }

        if (!is_host) {
            ggml_backend_tensor_set(dev.kq_mask, data.data(), 0, data.size());
        }
    }

    if (dev.pos_kv && dev.pos_kv->buffer) {
        std::vector<float> data(ggml_nelements(dev.pos_kv), pos_kv_empty);

        for (const uint32_t i : dev.layers) {
            float * dst = data.data() + layer_idxs[i].offs;

            for (uint32_t s = 0; s < n_stream; ++s) {
                const llama_pos * pos = layers[i].cells[s0 + s].pos_data();
                const llama_pos   p0  = ubatch.pos[s*n_tps];

                for (uint32_t j = 0; j < n_kv[i]; ++j) {
                    dst[j] = pos[j] < 0 ? pos_kv_empty : (float) (pos[j] - p0);
                }

                dst += n_kv[i];
            }
        }

        ggml_backend_tensor_set(dev.pos_kv, data.data(), 0, ggml_nbytes(dev.pos_kv));

        data.resize(n_tps*n_stream);
        for (uint32_t t = 0; t < n_tps*n_stream; ++t) {
            data[t] = ubatch.pos[t] - ubatch.pos[t/n_tps*n_tps];
        }

        ggml_backend_tensor_set(dev.pos_tok, data.data(), 0, ggml_nbytes(dev.pos_tok));
    }
}

void llm_graph_input_kv_depth::set_input(const llama_ubatch * ubatch) {
    const auto & sinfo = mctx->get_sinfo();

    GGML_ASSERT(sinfo.n_tps == n_tps && sinfo.n_stream == n_stream);

    mctx->get_kv()->set_attn(attn);

    for (const auto & dev : devices) {
        set_input_device(dev, *ubatch);
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

    const auto & dev  = devices[layer_idxs[i].i_device];
    const size_t offs = layer_idxs[i].offs;

    if (dev.kq_mask) {
        const size_t nb0 = ggml_type_size(dev.kq_mask->type);
        const size_t nb1 = n_kv[i]*nb0;

        return ggml_view_4d(ctx0, dev.kq_mask, n_kv[i], n_tps, 1, n_stream, nb1, nb1*n_tps, nb1*n_tps, offs*nb0);
    }

    const size_t nb1 = n_kv[i]*sizeof(float);

    // cells in the future of the token get a large negative number
    ggml_tensor * res = ggml_view_4d(ctx0, dev.pos_kv, n_kv[i], 1, 1, n_stream, nb1, nb1, nb1, offs*sizeof(float));
    res = ggml_repeat_4d     (ctx0, res, n_kv[i], n_tps, 1, n_stream);
    res = ggml_sub_inplace   (ctx0, res, dev.pos_tok);
    res = ggml_relu_inplace  (ctx0, res);
    res = ggml_scale_inplace (ctx0, res, -1e30f);

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

        // as the cells of a cache with transposed values, once for all tokens
        if (ggml_is_quantized(vh->type)) {
            vh = ggml_cast(ctx0, vh, GGML_TYPE_F32);
            vh = ggml_cast(ctx0, ggml_transpose(ctx0, vh), GGML_TYPE_F16);
        }

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

    const auto & dev  = devices[layer_idxs[i].i_device];
    auto       * idxs = layer_idxs[i].rows;

    // these nodes are added to the graph together so that they are not reordered
    ggml_build_forward_expand(gf, q_cur);
    if (v_cur) {
        ggml_build_forward_expand(gf, v_cur);
    }
    if (k_cur) {
        ggml_build_forward_expand(gf, k_cur);
    }

    // store K and V, [n_embd, n_cells, n_stream] <- [n_embd, n_tps, n_stream]

    // heads are rows of one matrix, contiguous in memory
    const auto merge_heads = [&](ggml_tensor * cur) {
        if (ggml_row_size(cur->type, cur->ne[0]) != cur->nb[1]) {
            cur = ggml_cont(ctx0, cur);
        }
        return ggml_view_4d(ctx0, cur, cur->ne[0]*cur->ne[1], n_tps, 1, n_stream, cur->nb[2], cur->nb[2]*n_tps, cur->nb[2]*n_tps, 0);
    };

    if (k_cur) {
        ggml_build_forward_expand(gf, ggml_set_rows(ctx0, layer_idxs[i].k, merge_heads(k_cur), idxs));
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
            v = view_streams(graph, v);
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
            q = ggml_get_rows(ctx0, q, dev.q_idxs);
        }

        ggml_tensor * dst = layer.q;
        if (dst->ne[2] > 1) {
            dst = ggml_view_2d(ctx0, dst, dst->ne[0], dst->ne[1]*dst->ne[2], dst->nb[1], 0);
        }

        ggml_build_forward_expand(gf, ggml_set_rows(ctx0, dst, q, dev.q_rows));
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

    const bool is_usual = !kq_b && !hparams.attn_soft_cap && graph.arch != LLM_ARCH_GROK;
    const bool is_plain = is_usual && kv->get_v_trans() && !graph.cparams.flash_attn;

    // the CPU's kernel for flash attention takes twice the time with quantized cells (docs/engine.md)
    const bool is_quant     = is_usual && dev.backend == nullptr && ggml_is_quantized(layer.v->type);

    // not before something has been evicted: until then the logits are those of the stock cache to the last bit
    const bool is_tok       = is_plain && evicted && n_tps == 1;
    const bool is_tok_quant = is_quant && n_tps == 1 && llama_kv_depth_attn_supports(layer.k->type, layer.v->type);
    const bool is_heads     = (is_plain || is_quant) && n_tps > n_tokens_mask_host && !sinks;

    if (is_tok) {
        cur = build_attn_tok(graph, q, k, v, mask, sinks, kq_scale);
    } else if (is_tok_quant) {
        q   = ggml_scale(ctx0, ggml_is_contiguous(q) ? q : ggml_cont(ctx0, q), kq_scale);
        cur = llama_kv_depth_build_attn(ctx0, q, k, v, mask, sinks);
    } else if (is_heads) {
        cur = build_attn_heads(graph, q, k, v, mask, kq_scale);
    } else {
        cur = graph.build_attn_mha(q, k, v, kq_b, mask, sinks, nullptr, 0, kq_scale, il);
    }

    if ((is_plain || is_quant) && !graph.cparams.offload_kqv) {
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
