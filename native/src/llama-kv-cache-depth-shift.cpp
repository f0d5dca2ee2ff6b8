// rotation of the keys of cells that have been shifted, and the buffers of the small graphs

#include "llama-kv-cache-depth.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-depth-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

void llama_kv_cache_depth::set_input_rot(ggml_tensor * dst) {
    const int64_t n = dst->ne[0];

    // Sylvester's construction: the sign is the parity of the bits that row and column share
    std::vector<float> data(n*n);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            bool odd = false;
            for (int64_t b = i & j; b > 0; b &= b - 1) {
                odd = !odd;
            }
            data[i*n + j] = (odd ? -1.0f : 1.0f)/sqrtf(n);
        }
    }

    ggml_backend_tensor_set(dst, data.data(), 0, ggml_nbytes(dst));
}

void llama_kv_cache_depth::build_shift(ggml_context * ctx, ggml_cgraph * gf, const kv_layer & layer, uint32_t strm, uint32_t i0, uint32_t n, shift_graph & res) const {
    const uint32_t il = layer.il;

    const int64_t n_rot       = hparams.n_rot(il);
    const int64_t n_head_kv   = hparams.n_head_kv(il);
    const int64_t n_embd_head = hparams.n_embd_head_k(il);

    // see llama_kv_cache::build_graph_shift()
    const int64_t n_embd_nope = hparams.n_lora_kv > 0 ? n_embd_head - n_rot : 0;

    res.inp_shift = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
    ggml_set_input(res.inp_shift);

    res.dst = ggml_view_2d(ctx, layer.k, layer.k->ne[0], n, layer.k->nb[1], strm*layer.k->nb[2] + i0*layer.k->nb[1]);

    ggml_tensor * cur = ggml_cast(ctx, res.dst, GGML_TYPE_F32);
    cur = ggml_reshape_3d(ctx, cur, n_embd_head, n_head_kv, n);

    if (layer.n_rot_k) {
        res.inp_rot = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, layer.n_rot_k, layer.n_rot_k);
        ggml_set_input(res.inp_rot);

        cur = llama_mul_mat_hadamard(ctx, cur, res.inp_rot);
    }

    const auto rope = [&](ggml_tensor * t) {
        return ggml_rope_ext(ctx, t, res.inp_shift, model.get_rope_factors(cparams, il), n_rot, hparams.rope_type,
                cparams.n_ctx_orig_yarn, model.get_rope_freq_base(cparams, il), model.get_rope_freq_scale(cparams, il),
                cparams.yarn_ext_factor, cparams.yarn_attn_factor, cparams.yarn_beta_fast, cparams.yarn_beta_slow);
    };

    if (n_embd_nope > 0) {
        ggml_tensor * nope = ggml_view_3d(ctx, cur, n_embd_nope, n_head_kv, n, cur->nb[1], cur->nb[2], 0);
        ggml_tensor * pe   = ggml_view_3d(ctx, cur, n_rot,       n_head_kv, n, cur->nb[1], cur->nb[2], n_embd_nope*cur->nb[0]);

        cur = ggml_concat(ctx, ggml_cont(ctx, nope), rope(pe), 0);
    } else {
        cur = rope(cur);
    }

    if (layer.n_rot_k) {
        cur = llama_mul_mat_hadamard(ctx, cur, res.inp_rot);
    }

    res.out = ggml_cast(ctx, ggml_reshape_2d(ctx, cur, layer.k->ne[0], n), layer.k->type);
    ggml_set_output(res.out);

    ggml_build_forward_expand(gf, res.dst);
    ggml_build_forward_expand(gf, res.out);
}

bool llama_kv_cache_depth::has_rope(uint32_t il) const {
    return hparams.rope_type != LLAMA_ROPE_TYPE_NONE && hparams.has_rope(il);
}

bool llama_kv_cache_depth::update() {
    synchronize();

    // M-RoPE and per-layer RoPE dims are refused by get_can_shift()
    for (auto & layer : layers) {
        for (uint32_t s = 0; s < n_stream; ++s) {
            auto & cells = layer.cells[s];

            for (uint32_t i0 = 0; cells.get_has_shift() && has_rope(layer.il) && i0 < cells.used_max_p1(); i0 += shift_graph::n_cells) {
                const uint32_t n = std::min(shift_graph::n_cells, cells.used_max_p1() - i0);

                shift_graph graph;

                const auto build = [&](ggml_context * ctx, ggml_cgraph * gf) {
                    build_shift(ctx, gf, layer, s, i0, n, graph);
                };

                const auto set_inputs = [&]() {
                    std::vector<int32_t> data(n);
                    for (uint32_t i = 0; i < n; ++i) {
                        data[i] = cells.get_shift(i0 + i);
                    }
                    ggml_backend_tensor_set(graph.inp_shift, data.data(), 0, ggml_nbytes(graph.inp_shift));

                    if (graph.inp_rot) {
                        set_input_rot(graph.inp_rot);
                    }
                };

                // only a graph that has run to its end changes the keys: after an abort it runs again
                const auto get_outputs = [&]() {
                    ggml_backend_tensor_copy(graph.out, graph.dst);
                };

                const ggml_status status = sched.compute(lctx->get_sched(), max_nodes(), build, set_inputs, get_outputs);

                if (status != GGML_STATUS_SUCCESS) {
                    status_shift = status;
                    return false;
                }

                for (uint32_t i = 0; i < n; ++i) {
                    cells.set_shift(i0 + i, 0);
                }
            }

            cells.reset_shift();
        }
    }

    return true;
}

size_t llama_kv_cache_depth::max_nodes() const {
    // of all layers: with a larger graph the scheduler would have to be made anew, without what has been reserved.
    // some layers are scored together, each start costs a GPU more than the layer. the scheduler's tables grow with the nodes
    size_t res = std::max<size_t>(shift_graph::max_nodes, 2048);
    for (const auto & layer : layers) {
        res = std::max(res, attn_graph::max_nodes(hparams.n_head_kv(layer.il)));
    }
    return res;
}

void llama_kv_cache_depth::reserve(llama_context * lctx) {
    this->lctx = lctx;

    // the largest layers that can be scored together
    std::vector<const kv_layer *> largest;
    for (const auto & layer : layers) {
        if (layer.q) {
            largest.push_back(&layer);
        }
    }
    std::stable_sort(largest.begin(), largest.end(), [&](const kv_layer * a, const kv_layer * b) {
        return (uint64_t) a->n_cells*hparams.n_head(a->il) > (uint64_t) b->n_cells*hparams.n_head(b->il);
    });
    largest.resize(n_attn_layers(largest, 0));

    attn_pass pass;
    init_attn(pass, largest, 0, true);

    const auto attn = [&](ggml_context * ctx, ggml_cgraph * gf) {
        build_attn(ctx, gf, pass);
    };

    bool ok = largest.empty() || sched.reserve(lctx->get_sched(), max_nodes(), hparams.no_alloc, attn);

    for (const auto & layer : layers) {
        shift_graph graph_shift;

        const auto shift = [&](ggml_context * ctx, ggml_cgraph * gf) {
            build_shift(ctx, gf, layer, 0, 0, std::min(shift_graph::n_cells, layer.n_cells), graph_shift);
        };

        if (get_can_shift() && has_rope(layer.il)) {
            ok = ok && sched.reserve(lctx->get_sched(), max_nodes(), hparams.no_alloc, shift);
        }
    }

    if (!ok) {
        throw std::runtime_error(format("failed to allocate the buffers that score the KV cells of %zu layers", layers.size()));
    }
}
