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

ggml_status llama_kv_cache_depth::evict(uint32_t strm, uint32_t n_tokens) {
    auto & stream = streams[strm];

    std::vector<kv_layer *> full;
    std::vector<kv_layer *> due;

    for (auto & layer : layers) {
        const auto & cells = layer.cells[strm];

        if (cells.size() - cells.get_used() < llama_kv_evict_n_free(cells, layer.il, n_tokens)) {
            full.push_back(&layer);
        }
        if (layer.q && llama_kv_evict_is_due(cells, layer.il, n_tokens) && !stream.queries.after(cells.pos_scored).empty()) {
            due.push_back(&layer);
        }
    }

    if (full.empty() && due.empty()) {
        return GGML_STATUS_SUCCESS;
    }

    const int64_t t_start_us = ggml_time_us();

    // the samples and the cells are written by the previous ubatch, which may still be running
    synchronize();

    const ggml_status status = count_attn(due, strm);

    if (status != GGML_STATUS_SUCCESS) {
        return status;
    }

    for (auto * layer : full) {
        auto & cells = layer->cells[strm];

        const auto rows = llama_kv_evict_select(*score, cells, stream.pins, layer->il, plan.params.n_sink, plan.params.n_recent, n_tokens);

        for (const uint32_t i : rows) {
            cells.evict(i, stream.tokens.pos_max());
        }

        stat.n_evict += rows.size();

        if (cells.size() - cells.get_used() < n_tokens) {
            LLAMA_LOG_ERROR("%s: layer %u of sequence %u has no %u cells to spare\n", __func__, layer->il, strm, n_tokens);
            return GGML_STATUS_FAILED;
        }
    }

    stat.t_evict_us += ggml_time_us() - t_start_us;

    return GGML_STATUS_SUCCESS;
}

ggml_status llama_kv_cache_depth::count_attn(const std::vector<kv_layer *> & layers, uint32_t strm) {
    std::vector<llama_kv_attn> attns;

    const ggml_status status = compute_attn({ layers.begin(), layers.end() }, strm, attns);

    // an abort between two graphs leaves what has been computed: it is counted, and not computed again
    for (size_t i = 0; i < attns.size(); ++i) {
        auto & cells = layers[i]->cells[strm];
        auto & attn  = attns[i];

        // a broken value shows in its own cell, a broken key in all of them
        if (std::none_of(attn.mass.begin(), attn.mass.end(), [](float x) { return std::isfinite(x); })) {
            mark_broken(*layers[i], strm);

            cells.pos_scored = attn.pos.back();
            cells.is_scored  = true;
        } else {
            llama_kv_evict_count(*score, cells, attn);
        }

        stat.n_score++;
    }

    return status;
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

void llama_kv_cache_depth::init_attn(attn_pass & pass, const std::vector<const kv_layer *> & layers, uint32_t strm, bool is_full) const {
    for (const auto * layer : layers) {
        const auto & cells = layer->cells[strm];

        attn_graph graph;

        graph.layer     = layer;
        graph.strm      = strm;
        graph.v_trans   = v_trans;
        graph.n_kv      = is_full ? layer->n_cells : std::min(GGML_PAD(cells.used_max_p1(), 32), cells.size());
        graph.n_head    = hparams.n_head(layer->il);
        graph.n_head_kv = hparams.n_head_kv(layer->il);
        graph.n_embd_v  = hparams.n_embd_head_v(layer->il);

        auto * backend = llama_kv_depth_backend_of(lctx->get_sched(), layer->k);

        const bool is_host = backend == nullptr;
        if (is_host) {
            // the CPU comes last
            backend = ggml_backend_sched_get_backend(lctx->get_sched(), ggml_backend_sched_get_n_backends(lctx->get_sched()) - 1);
        }

        while (graph.i_device < pass.devices.size() && pass.devices[graph.i_device].backend != backend) {
            graph.i_device++;
        }
        if (graph.i_device == pass.devices.size()) {
            pass.devices.emplace_back();
            pass.devices.back().backend = backend;
            pass.devices.back().is_host = is_host;
        }

        auto & dev = pass.devices[graph.i_device];

        graph.offs_inp = dev.n_inp;
        graph.offs_out = dev.n_out;

        dev.n_inp += graph.n_inp();
        dev.n_out += graph.n_out();

        pass.graphs.push_back(graph);
    }
}

void llama_kv_cache_depth::build_attn(ggml_context * ctx, ggml_cgraph * gf, attn_pass & pass) {
    for (auto & dev : pass.devices) {
        dev.inp = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, dev.n_inp);
        dev.out = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, dev.n_out);

        ggml_set_input (dev.inp);
        ggml_set_input (dev.out); // there from the first layer on
        ggml_set_output(dev.out);

        sched.set_backend(dev.inp, dev.backend);
        sched.set_backend(dev.out, dev.backend);
    }

    for (auto & graph : pass.graphs) {
        build_attn(ctx, gf, pass, graph);
    }
}

void llama_kv_cache_depth::build_attn(ggml_context * ctx, ggml_cgraph * gf, attn_pass & pass, attn_graph & res) {
    const auto & layer = *res.layer;
    const auto & dev   = pass.devices[res.i_device];

    const int64_t n_kv        = res.n_kv;
    const int64_t n_head      = res.n_head;
    const int64_t n_head_kv   = res.n_head_kv;
    const int64_t n_gqa       = n_head/n_head_kv;
    const int64_t n_embd_head = hparams.n_embd_head_k(layer.il);

    res.ctx  = ctx;
    res.pass = &pass;

    const size_t nb = sizeof(float);

    res.inp_pos_kv = ggml_view_1d(ctx, dev.inp, n_kv, res.offs_inp*nb);
    res.inp_pos_q  = ggml_view_2d(ctx, dev.inp, 1, llama_kv_n_query, nb, res.offs_pos_q()*nb);
    res.weight     = ggml_view_3d(ctx, dev.inp, 1, llama_kv_n_query*n_gqa, n_head_kv, nb, llama_kv_n_query*n_gqa*nb, res.offs_weight()*nb);

    ggml_tensor * mask = ggml_repeat_4d(ctx, res.inp_pos_kv, n_kv, llama_kv_n_query, 1, 1);
    mask = ggml_sub_inplace  (ctx, mask, res.inp_pos_q);
    mask = ggml_relu_inplace (ctx, mask);
    mask = ggml_scale_inplace(ctx, mask, -1e30f);

    const auto * lk = layer.k;
    const auto * lq = layer.q;

    ggml_tensor * k = ggml_view_3d(ctx, layer.k, n_embd_head, n_head_kv, n_kv,
            ggml_row_size(lk->type, n_embd_head), lk->nb[1], res.strm*lk->nb[2]);
    k = ggml_permute(ctx, k, 0, 2, 1, 3);

    // not all other backends multiply quantized rows that do not lie one after the other
    if (!dev.is_host && ggml_is_quantized(lk->type)) {
        k = ggml_cast(ctx, k, GGML_TYPE_F32);
    }

    // the heads of a group are rows of one matrix, so that each key is read once for all of them
    ggml_tensor * q = ggml_view_4d(ctx, layer.q, n_embd_head, n_gqa, n_head_kv, llama_kv_n_query,
            ggml_row_size(lq->type, n_embd_head), ggml_row_size(lq->type, n_embd_head*n_gqa), lq->nb[1], res.strm*lq->nb[2]);
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

    // where the cells are. the sinks are weights, and may be elsewhere
    if (sched.set_backend(kq->view_src, dev.backend)) {
        sched.set_backend(kq, dev.backend);
    }

    res.prob = ggml_reshape_3d(ctx, kq, n_kv, llama_kv_n_query*n_gqa, n_head_kv);

    ggml_tensor * out = ggml_cpy(ctx, score->build(res), ggml_view_1d(ctx, dev.out, n_kv, res.offs_out*nb));

    // a copy into what is not allocated yet is computed anywhere otherwise
    sched.set_backend(out, dev.backend);

    ggml_build_forward_expand(gf, out);
}

void llama_kv_cache_depth::set_attn(const std::vector<attn_params> & params) {
    for (size_t i = 0; i < layers.size(); ++i) {
        if (params[i].kq_scale != 0.0f) {
            layer_attn[i] = params[i];
        }
    }
}

size_t llama_kv_cache_depth::n_attn_layers(const std::vector<const kv_layer *> & layers, size_t i) const {
    size_t n_nodes = 0;
    size_t res     = 0;

    for (; i < layers.size(); ++i, ++res) {
        n_nodes += attn_graph::max_nodes(hparams.n_head_kv(layers[i]->il));
        if (n_nodes > max_nodes()) {
            break;
        }
    }

    return res;
}

ggml_status llama_kv_cache_depth::compute_attn(const std::vector<const kv_layer *> & layers, uint32_t strm, std::vector<llama_kv_attn> & attns) {
    const auto & q_pos = streams[strm].queries.pos;

    for (size_t i0 = 0; i0 < layers.size(); ) {
        const size_t n = n_attn_layers(layers, i0);

        attn_pass pass;
        init_attn(pass, { layers.begin() + i0, layers.begin() + i0 + n }, strm, false);

        const auto build = [&](ggml_context * ctx, ggml_cgraph * gf) {
            build_attn(ctx, gf, pass);
        };

        const auto set_inputs = [&]() {
            std::vector<std::vector<float>> data;
            for (const auto & dev : pass.devices) {
                data.emplace_back(dev.n_inp);
            }

            for (const auto & graph : pass.graphs) {
                const auto & cells = graph.layer->cells[strm];

                float * pos_kv = data[graph.i_device].data() + graph.offs_inp;
                float * pos_q  = data[graph.i_device].data() + graph.offs_pos_q();
                float * weight = data[graph.i_device].data() + graph.offs_weight();

                // no token ahead: an empty cell has a position that no query reaches
                for (int64_t i = 0; i < graph.n_kv; ++i) {
                    pos_kv[i] = cells.is_empty(i) ? 1e9f : cells.pos_get(i);
                }

                for (uint32_t i = 0; i < llama_kv_n_query; ++i) {
                    const bool counts = q_pos[i] > cells.pos_scored;

                    // a query that does not count may see everything, so that its softmax is defined
                    pos_q[i] = counts ? q_pos[i] : 1e9f;

                    for (int64_t h = 0; h < graph.n_head; ++h) {
                        weight[h*llama_kv_n_query + i] = counts ? 1.0f : 0.0f;
                    }
                }
            }

            for (size_t i = 0; i < pass.devices.size(); ++i) {
                ggml_backend_tensor_set(pass.devices[i].inp, data[i].data(), 0, ggml_nbytes(pass.devices[i].inp));
            }

            for (auto & [_, ones] : pass.ones) {
                const std::vector<float> one(ggml_nelements(ones), 1.0f);
                ggml_backend_tensor_set(ones, one.data(), 0, ggml_nbytes(ones));
            }

            for (auto & [_, rot] : pass.rots) {
                set_input_rot(rot);
            }
        };

        const auto get_outputs = [&]() {
            std::vector<std::vector<float>> data;
            for (const auto & dev : pass.devices) {
                data.emplace_back(dev.n_out);
                ggml_backend_tensor_get(dev.out, data.back().data(), 0, ggml_nbytes(dev.out));
            }

            for (const auto & graph : pass.graphs) {
                const float * mass = data[graph.i_device].data() + graph.offs_out;

                attns.emplace_back();
                attns.back().mass.assign(mass, mass + graph.n_kv);
                attns.back().pos = streams[strm].queries.after(graph.layer->cells[strm].pos_scored);
            }
        };

        const ggml_status status = sched.compute(lctx->get_sched(), max_nodes(), build, set_inputs, get_outputs);

        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }

        i0 += n;
    }

    return GGML_STATUS_SUCCESS;
}
