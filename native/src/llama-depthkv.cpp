#include "llama-depthkv.h"

#include "llama-context.h"
#include "llama-depthkv-impl.h"
#include "llama-impl.h"
#include "llama-kv-alloc.h"
#include "llama-kv-cache-depth.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-kv-depth-memory.h"
#include "llama-kv-depth-plan.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

static thread_local std::string llama_depthkv_error;

int32_t llama_depthkv_version(void) {
    return LLAMA_DEPTHKV_VERSION;
}

const char * llama_depthkv_last_error(void) {
    return llama_depthkv_error.c_str();
}

void llama_depthkv_clear_error(void) {
    llama_depthkv_error.clear();
}

void llama_depthkv_set_error(const char * what) {
    llama_depthkv_error = what;
}

static void llama_depthkv_check_seq(const llama_context * ctx, llama_seq_id seq_id) {
    const uint32_t n_seq_max = ctx->get_cparams().n_seq_max;

    if (seq_id < 0 || (uint32_t) seq_id >= n_seq_max) {
        throw std::runtime_error(format("sequence %d is out of range: the context has %u", seq_id, n_seq_max));
    }
}

// i: index in the order of llama_depthkv_layer_id()
static void llama_depthkv_check_layer(int32_t i, size_t n_layers) {
    if (i < 0 || (size_t) i >= n_layers) {
        throw std::runtime_error(format("layer index %d is out of range: %zu layers have KV cells of their own", i, n_layers));
    }
}

static llama_kv_cache_depth * llama_depthkv_get_cache(const llama_context * ctx) {
    return dynamic_cast<llama_kv_cache_depth *>(ctx->get_memory());
}

//
// context
//

llama_context * llama_depthkv_init_from_model(llama_model * model, llama_context_params params, llama_depthkv_params depth) {
    return llama_depthkv_try((llama_context *) nullptr, [&]() {
        llama_depthkv_check_ptr(model);

        const auto dparams = llama_depthkv_read_params(*model, depth);

        return llama_depthkv_init_context(model, params, dparams);
    });
}

int32_t llama_depthkv_layer_count(const llama_model * model) {
    return llama_depthkv_try(-1, [&]() {
        llama_depthkv_check_ptr(model);
        return (int32_t) llama_kv_depth_layers(*model).size();
    });
}

int32_t llama_depthkv_layer_id(const llama_model * model, int32_t i) {
    return llama_depthkv_try(-1, [&]() {
        llama_depthkv_check_ptr(model);
        const auto ids = llama_kv_depth_layers(*model);
        llama_depthkv_check_layer(i, ids.size());
        return ids[i];
    });
}

//
// statistics
//

// the caches of a context without a budget: those that grow with the context
static const llama_kv_cache * llama_depthkv_get_stock(const llama_context * ctx) {
    auto * mem = ctx->get_memory();

    if (auto * kv = dynamic_cast<llama_kv_cache_iswa *>(mem)) {
        return kv->get_base();
    }

    return dynamic_cast<llama_kv_cache *>(mem);
}

static size_t llama_depthkv_bytes_compute(const llama_context * ctx) {
    size_t res = 0;
    for (const auto & [_, mb] : ctx->memory_breakdown()) {
        res += mb.compute;
    }
    return res;
}

// the CPU backend converts the right-hand side of a matrix product outside of the compute buffer, see ggml_graph_plan()
// without flash attention that is the score matrix once more. 16 bits are the widest type that it converts to
static size_t llama_depthkv_bytes_work(const llama_context * ctx) {
    size_t res = 0;

    // the last graph that is reserved is the largest
    const auto * reserved = ctx->get_gf_res_reserve();
    auto       * gf       = reserved ? reserved->get_gf() : nullptr;

    for (int i = 0; gf && i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);

        if (node->op != GGML_OP_MUL_MAT && node->op != GGML_OP_MUL_MAT_ID) {
            continue;
        }
        if (node->src[0]->type != GGML_TYPE_F32 && node->src[1]->type == GGML_TYPE_F32) {
            res = std::max(res, sizeof(ggml_fp16_t)*ggml_nelements(node->src[1]));
        }
    }

    return res;
}

bool llama_depthkv_get_stats(const llama_context * ctx, llama_depthkv_stats * stats) {
    return llama_depthkv_try(false, [&]() {
        llama_depthkv_check_ptr(ctx);
        llama_depthkv_check_ptr(stats, "stats");

        const auto & cparams = ctx->get_cparams();
        const auto & model   = ctx->get_model();

        const auto * kv = llama_depthkv_get_cache(ctx);

        const llama_kv_depth_plan stock_plan;
        const llama_kv_depth_plan & plan = kv ? kv->get_plan() : stock_plan;

        *stats = llama_depthkv_init_stats(model, cparams, plan);

        stats->bytes_compute = llama_depthkv_bytes_compute(ctx);
        stats->bytes_work    = llama_depthkv_bytes_work(ctx);

        for (const auto & [dev, bytes] : llama_kv_depth_memory_devices(ctx->memory_breakdown())) {
            stats->bytes_device += llama_kv_depth_memory_is_own(dev) ? bytes : 0;
        }

        if (kv) {
            const auto & stat = kv->get_stats();

            // as the caller wanted it: a depth cache never is
            const bool unified = (size_t) cparams.n_ctx_seq*cparams.n_seq_max > cparams.n_ctx;

            stats->n_ubatch     = kv->get_n_ubatch();
            stats->bytes        = kv->size_kv_bytes();
            stats->bytes_full   = llama_kv_depth_bytes_full(model, cparams.n_ctx_seq, cparams.n_seq_max, unified, cparams.n_ubatch, plan.type_k, plan.type_v);
            stats->bytes_scorer = kv->size_scorer_bytes();
            stats->n_score      = stat.n_score;
            stats->n_evict      = stat.n_evict;
            stats->n_reeval     = stat.n_reeval;
            stats->t_evict_us   = stat.t_evict_us;

            return true;
        }

        const auto * stock = llama_depthkv_get_stock(ctx);
        if (!stock) {
            throw std::runtime_error(format("architecture '%s' has no KV cache to report on", model.arch_name().c_str()));
        }

        stats->n_layers = stock->get_layer_ids().size();

        for (const auto & [_, size] : ctx->get_memory()->memory_breakdown()) {
            stats->bytes += size;
        }
        stats->bytes_full = stats->bytes;

        return true;
    });
}

bool llama_depthkv_get_layer(const llama_context * ctx, int32_t i, llama_seq_id seq_id, llama_depthkv_layer * layer) {
    return llama_depthkv_try(false, [&]() {
        llama_depthkv_check_ptr(ctx);

        llama_depthkv_check_seq(ctx, seq_id);

        llama_depthkv_check_ptr(layer, "layer");

        *layer = {};

        if (const auto * kv = llama_depthkv_get_cache(ctx)) {
            llama_depthkv_check_layer(i, kv->get_layers().size());

            const auto & l = kv->get_layers()[i];

            layer->layer   = l.il;
            layer->cells   = l.n_cells;
            layer->used    = l.cells[seq_id].get_used();
            layer->evicted = l.cells[seq_id].n_evicted;
            layer->bytes   = ggml_nbytes(l.k) + ggml_nbytes(l.v);

            const auto n = kv->count_kinds(l, seq_id);

            layer->sinks  = n[LLAMA_KV_KIND_SINK];
            layer->pinned = n[LLAMA_KV_KIND_PINNED];
            layer->recent = n[LLAMA_KV_KIND_RECENT];

            return true;
        }

        const auto * kv = llama_depthkv_get_stock(ctx);
        if (!kv) {
            throw std::runtime_error("the context has no KV cache to report on");
        }

        const auto ids = kv->get_layer_ids();
        llama_depthkv_check_layer(i, ids.size());

        const auto & model = ctx->get_model();
        const int32_t   il = ids[i];

        layer->layer = il;
        layer->cells = kv->get_size();
        layer->used  = kv->get_cells(seq_id).seq_pos_get(seq_id).size();
        layer->bytes = llama_kv_depth_row_size_k(model, il, kv->type_k());
        if (!model.hparams.is_mla()) { // there V is a part of K
            layer->bytes += llama_kv_depth_row_size_v(model, il, kv->type_v());
        }
        layer->bytes *= (size_t) kv->get_size()*kv->get_n_stream();

        return true;
    });
}

int32_t llama_depthkv_get_positions(const llama_context * ctx, int32_t i, llama_seq_id seq_id, llama_pos * pos, int32_t n) {
    return llama_depthkv_try(-1, [&]() {
        llama_depthkv_check_ptr(ctx);

        llama_depthkv_check_seq(ctx, seq_id);

        std::vector<llama_pos> res;

        if (const auto * kv = llama_depthkv_get_cache(ctx)) {
            llama_depthkv_check_layer(i, kv->get_layers().size());

            const auto & cells = kv->get_layers()[i].cells[seq_id];

            for (uint32_t j = 0; j < cells.used_max_p1(); ++j) {
                if (!cells.is_empty(j)) {
                    res.push_back(cells.pos_get(j));
                }
            }
        } else if (const auto * kv = llama_depthkv_get_stock(ctx)) {
            llama_depthkv_check_layer(i, kv->get_layer_ids().size());

            for (const auto & [p, _] : kv->get_cells(seq_id).seq_pos_get(seq_id)) {
                res.push_back(p);
            }
        }

        if (n > 0) {
            llama_depthkv_check_ptr(pos, "pos");
        }

        std::sort(res.begin(), res.end());
        std::copy_n(res.begin(), std::min<size_t>(res.size(), std::max(n, 0)), pos);

        return (int32_t) res.size();
    });
}

//
// going back
//

static void llama_depthkv_check_pos(llama_pos p) {
    if (p < 0) {
        throw std::runtime_error(format("position %d is negative", p));
    }
}

llama_pos llama_depthkv_seq_pos_rollback(const llama_context * ctx, llama_seq_id seq_id, llama_pos p) {
    return llama_depthkv_try(-1, [&]() {
        llama_depthkv_check_ptr(ctx);

        llama_depthkv_check_seq(ctx, seq_id);
        llama_depthkv_check_pos(p);

        const auto * kv = llama_depthkv_get_cache(ctx);

        return kv ? kv->seq_pos_rollback(seq_id, p) : p;
    });
}

llama_pos llama_depthkv_seq_rollback(llama_context * ctx, llama_seq_id seq_id, llama_pos p) {
    return llama_depthkv_try(-1, [&]() {
        llama_depthkv_check_ptr(ctx);

        llama_depthkv_check_seq(ctx, seq_id);
        llama_depthkv_check_pos(p);

        if (auto * kv = llama_depthkv_get_cache(ctx)) {
            return kv->seq_rollback(seq_id, p);
        }

        auto * mem = ctx->get_memory();

        // not even in part, if the memory is a recurrent state
        if (mem && !mem->seq_rm(seq_id, p, -1)) {
            mem->seq_rm(seq_id, -1, -1);
            return 0;
        }

        return p;
    });
}

//
// pinning
//

bool llama_depthkv_pin(llama_context * ctx, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    return llama_depthkv_try(false, [&]() {
        llama_depthkv_check_ptr(ctx);

        llama_depthkv_check_seq(ctx, seq_id);

        // the stock cache evicts nothing
        if (auto * kv = llama_depthkv_get_cache(ctx)) {
            kv->seq_pin(seq_id, p0, p1);
        }

        return true;
    });
}

void llama_depthkv_unpin(llama_context * ctx, llama_seq_id seq_id) {
    if (auto * kv = ctx ? llama_depthkv_get_cache(ctx) : nullptr) {
        if (seq_id >= -1 && seq_id < (llama_seq_id) ctx->get_cparams().n_seq_max) {
            kv->seq_unpin(seq_id);
        }
    }
}

//
// evicting
//

bool llama_depthkv_seq_keep(llama_context * ctx, int32_t i, llama_seq_id seq_id, const llama_pos * pos, int32_t n) {
    return llama_depthkv_try(false, [&]() {
        llama_depthkv_check_ptr(ctx);

        llama_depthkv_check_seq(ctx, seq_id);

        if (n > 0) {
            llama_depthkv_check_ptr(pos, "pos");
        }

        auto * kv = llama_depthkv_get_cache(ctx);
        if (!kv) {
            throw std::runtime_error("a layer cannot evict: the context has no depth KV cache");
        }

        llama_depthkv_check_layer(i, kv->get_layers().size());

        std::vector<llama_pos> keep(pos, pos + std::max(n, 0));
        std::sort(keep.begin(), keep.end());

        kv->evict_except(i, seq_id, keep);

        return true;
    });
}
