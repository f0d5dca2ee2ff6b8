#include "llama-kv-cache-depth.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>
#include <limits>
#include <stdexcept>

// rotation of quantized K and V, same rules as in llama_kv_cache
static uint32_t llama_kv_depth_n_rot(ggml_type type, uint32_t n_embd_head, bool largest) {
    const char * LLAMA_ATTN_ROT_DISABLE = getenv("LLAMA_ATTN_ROT_DISABLE");

    if ((LLAMA_ATTN_ROT_DISABLE && atoi(LLAMA_ATTN_ROT_DISABLE)) || !ggml_is_quantized(type) || n_embd_head % 64 != 0) {
        return 0;
    }

    uint32_t res = 64;
    while (largest && n_embd_head % (2*res) == 0) {
        res *= 2;
    }

    return res;
}

// a system that overcommits would grant any size, and kill the process when the buffer is cleared
static void llama_kv_depth_check_memory(ggml_backend_buffer_type_t buft, size_t size) {
    auto * dev = ggml_backend_buft_get_device(buft);
    if (!dev) {
        return;
    }

    size_t free  = 0;
    size_t total = 0;
    ggml_backend_dev_memory(dev, &free, &total);

    // 0: not known. a device that borrows the memory of the system may have more free than is its own
    total = std::max(free, total);

    if (total > 0 && size > total) {
        throw std::runtime_error(format("the KV cache takes %.0f MiB, and all of %s is %.0f MiB: give a smaller context or KV budget",
                size/1024.0/1024.0, ggml_backend_dev_name(dev), total/1024.0/1024.0));
    }
}

void llama_kv_cache_depth::stream_state::clear() {
    tokens.clear();
    pins.clear();

    pos_placed = llama_kv_depth_cells::none;

    queries = {};
}

llama_kv_cache_depth::llama_kv_cache_depth(
        const llama_model         & model,
        const llama_kv_depth_plan & plan,
        const llama_memory_params & params,
        const llama_cparams       & cparams,
        const layer_filter_cb     & filter,
        const layer_reuse_cb      & reuse) :
    model(model), hparams(model.hparams), cparams(cparams), plan(plan),
    score(llama_kv_score_init(plan.params.scorer)),
    n_stream(cparams.n_seq_max), v_trans(!cparams.flash_attn) {

    GGML_ASSERT(score);

    // define a comparator for the buft -> ctx map to ensure that the order is well-defined
    struct ggml_backend_buft_comparator {
        bool operator()(const ggml_backend_buffer_type_t & lhs, const ggml_backend_buffer_type_t & rhs) const {
            return strcmp(ggml_backend_buft_name(lhs), ggml_backend_buft_name(rhs)) < 0;
        }
    };
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr, ggml_backend_buft_comparator> ctx_map;

    const auto ctx_for_buft = [&](ggml_backend_buffer_type_t buft) -> ggml_context * {
        auto & ctx = ctx_map[buft];
        if (!ctx) {
            ggml_init_params params = {
                /*.mem_size   =*/ 3*plan.layers.size()*ggml_tensor_overhead(),
                /*.mem_buffer =*/ NULL,
                /*.no_alloc   =*/ true,
            };
            ctx.reset(ggml_init(params));
        }
        return ctx.get();
    };

    for (const auto & pl : plan.layers) {
        const uint32_t il = pl.il;

        const uint32_t n_embd_head_k = hparams.n_embd_head_k(il);
        const uint32_t n_embd_head_v = hparams.n_embd_head_v(il);

        if (n_embd_head_k % ggml_blck_size(pl.type_k) != 0 || n_embd_head_v % ggml_blck_size(pl.type_v) != 0) {
            throw std::runtime_error(format("KV types %s/%s do not divide the head size %u/%u of layer %u",
                    ggml_type_name(pl.type_k), ggml_type_name(pl.type_v), n_embd_head_k, n_embd_head_v, il));
        }
        if (v_trans && ggml_is_quantized(pl.type_v)) {
            throw std::runtime_error(format("V cache type %s of layer %u requires flash attention", ggml_type_name(pl.type_v), il));
        }

        auto * buft = cparams.offload_kqv ? ggml_backend_dev_buffer_type(model.dev_layer(il)) : ggml_backend_cpu_buffer_type();
        auto * ctx  = ctx_for_buft(buft);

        kv_layer layer;

        layer.il      = il;
        layer.n_cells = pl.cells;

        layer.k = ggml_new_tensor_3d(ctx, pl.type_k, hparams.n_embd_k_gqa(il), pl.cells, n_stream);
        layer.v = ggml_new_tensor_3d(ctx, pl.type_v, hparams.n_embd_v_gqa(il), pl.cells, n_stream);
        layer.q = nullptr;

        ggml_format_name(layer.k, "cache_depth_k_l%d", il);
        ggml_format_name(layer.v, "cache_depth_v_l%d", il);

        if (score->needs_attn() && pl.cells < plan.n_ctx_seq) {
            layer.q = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, n_embd_head_k*hparams.n_head(il), llama_kv_n_query, n_stream);
            ggml_format_name(layer.q, "cache_depth_q_l%d", il);
        }

        layer.n_rot_k = llama_kv_depth_n_rot(pl.type_k, n_embd_head_k, true);
        layer.n_rot_v = llama_kv_depth_n_rot(pl.type_v, n_embd_head_v, false);

        map_layer_ids[il] = layers.size();

        layers.push_back(std::move(layer));
    }

    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        const int32_t il_reuse = reuse ? reuse(il) : -1;
        if (!hparams.is_swa(il) && il_reuse >= 0) {
            map_layer_ids[il] = map_layer_ids.at(il_reuse);
        }
    }

    // allocate tensors and initialize the buffers to avoid NaNs in the padding
    for (auto & [buft, ctx] : ctx_map) {
        ggml_backend_buffer_t buf;
        if (hparams.no_alloc) {
            buf = ggml_backend_buft_alloc_buffer(buft, /*size =*/ 0); // dummy buffer
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t != nullptr; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf; // set dummy buffer so that the backend scheduler won't try to allocate it
            }
        } else {
            llama_kv_depth_check_memory(buft, ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft));
            buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft); // real buffer
        }
        if (!buf) {
            throw std::runtime_error("failed to allocate buffer for kv cache");
        }

        LLAMA_LOG_INFO("%s: %10s KV buffer size = %8.2f MiB\n", __func__, ggml_backend_buffer_name(buf), ggml_backend_buffer_get_size(buf)/1024.0/1024.0);

        ggml_backend_buffer_clear(buf, 0);
        ctxs_bufs.emplace_back(std::move(ctx), buf);
    }

    for (auto & layer : layers) {
        layer.cells.resize(n_stream);
        for (auto & cells : layer.cells) {
            cells.resize(layer.n_cells);
        }
    }

    streams.resize(n_stream);
    layer_attn.resize(layers.size());
    for (auto & stream : streams) {
        stream.clear();
    }

    if (hparams.is_swa_any()) {
        const layer_filter_cb filter_swa = [&](int32_t il) {
            return hparams.is_swa(il) && (!filter || filter(il));
        };

        // the other layers are filtered out, so its base cache has cells but no tensors
        kv_iswa = std::make_unique<llama_kv_cache_iswa>(
                model, params.type_k, params.type_v, v_trans, cparams.offload_kqv, false, false,
                cparams.n_ctx_seq, cparams.n_seq_max, cparams.n_ubatch, 1, nullptr, filter_swa, reuse, nullptr);
    }

    uint32_t n_cells_min = layers[0].n_cells;
    uint32_t n_cells_max = layers[0].n_cells;
    for (const auto & layer : layers) {
        n_cells_min = std::min(n_cells_min, layer.n_cells);
        n_cells_max = std::max(n_cells_max, layer.n_cells);
    }

    LLAMA_LOG_INFO("%s: size = %7.2f MiB (%u..%u of %u cells, %3zu layers, %2u seqs), rule = %s, scorer = %s, n_ubatch = %u\n", __func__,
            size_kv_bytes()/1024.0/1024.0, n_cells_min, n_cells_max, plan.n_ctx_seq, layers.size(), n_stream,
            plan.params.rule.c_str(), plan.params.scorer.c_str(), plan.n_ubatch);
}

//
// llama_memory_i
//

llama_memory_context_ptr llama_kv_cache_depth::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all);

    const auto fail = [](const char * why) {
        if (why) {
            LLAMA_LOG_ERROR("llama_kv_cache_depth: %s\n", why);
        }
        return std::make_unique<llama_kv_cache_depth_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    };

    if (!cparams.causal_attn) {
        return fail("a KV budget is not defined for non-causal attention");
    }

    // update() comes first. if it was aborted, some keys are not where the others are
    if (has_shift()) {
        LLAMA_LOG_ERROR("%s: the context shift has not been completed\n", __func__);
        return std::make_unique<llama_kv_cache_depth_context>(LLAMA_MEMORY_STATUS_FAILED_COMPUTE, status_shift);
    }

    balloc.split_reset();

    n_ubatch = std::min(n_ubatch, get_n_ubatch());

    std::vector<llama_ubatch> ubatches;
    while (true) {
        auto ubatch = n_stream == 1 ? balloc.split_simple(n_ubatch) : balloc.split_equal(n_ubatch, true, 0);

        if (ubatch.n_tokens == 0) {
            break;
        }

        ubatches.push_back(std::move(ubatch)); // NOLINT
    }

    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        return fail(nullptr);
    }

    // the cells never run out, the context does
    std::vector<llama_pos> pos_min(n_stream);
    for (uint32_t s = 0; s < n_stream; ++s) {
        pos_min[s] = streams[s].tokens.pos_min();
    }

    for (const auto & ubatch : ubatches) {
        if (ubatch.is_pos_2d() && !ubatch.token) {
            return fail("a KV budget is not defined for images with two-dimensional positions (M-RoPE)");
        }

        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            const uint32_t strm = ubatch.seq_id[i][0];

            if (ubatch.pos[i] > llama_kv_depth_pos_max) {
                return fail("a position is out of range");
            }

            pos_min[strm] = pos_min[strm] < 0 ? ubatch.pos[i] : std::min(pos_min[strm], ubatch.pos[i]);

            if (ubatch.pos[i] - pos_min[strm] >= (llama_pos) plan.n_ctx_seq) {
                return fail(nullptr);
            }
        }
    }

    llama_memory_context_ptr ctx_iswa;

    if (kv_iswa) {
        auto sinfos_base = kv_iswa->get_base()->prepare(ubatches);
        auto sinfos_swa  = kv_iswa->get_swa ()->prepare(ubatches);

        if (sinfos_base.empty() || sinfos_swa.empty()) {
            return fail(nullptr);
        }

        ctx_iswa = std::make_unique<llama_kv_cache_iswa_context>(kv_iswa.get(), std::move(sinfos_base), std::move(sinfos_swa), ubatches);
    }

    return std::make_unique<llama_kv_cache_depth_context>(this, std::move(ctx_iswa), std::move(ubatches));
}

llama_memory_context_ptr llama_kv_cache_depth::init_full() {
    return std::make_unique<llama_kv_cache_depth_context>(this);
}

llama_memory_context_ptr llama_kv_cache_depth::init_update(llama_context * lctx, bool optimize) {
    return std::make_unique<llama_kv_cache_depth_context>(this, kv_iswa ? kv_iswa->init_update(lctx, optimize) : nullptr, has_shift());
}

bool llama_kv_cache_depth::has_shift() const {
    for (const auto & layer : layers) {
        for (const auto & cells : layer.cells) {
            if (cells.get_has_shift()) {
                return true;
            }
        }
    }

    return false;
}

bool llama_kv_cache_depth::get_can_shift() const {
    // Step35 uses per-layer RoPE dims, M-RoPE has several positions per token (see llama_kv_cache::get_can_shift)
    if (model.arch == LLM_ARCH_STEP35 || hparams.n_pos_per_embd() > 1) {
        return false;
    }

    // windows shift in a full-size cache only, see llama_kv_cache_iswa::get_can_shift(). here they are smaller, unless the
    // context is as small as they are, and then the base cache beside them has no tensors to build a graph from
    return !kv_iswa;
}

//
// sizes
//

size_t llama_kv_cache_depth::size_layers_bytes() const {
    size_t res = 0;
    for (const auto & layer : layers) {
        res += ggml_nbytes(layer.k) + ggml_nbytes(layer.v);
    }
    return res;
}

size_t llama_kv_cache_depth::size_kv_bytes() const {
    size_t res = size_layers_bytes();

    if (kv_iswa) {
        for (const auto & [_, size] : kv_iswa->memory_breakdown()) {
            res += size;
        }
    }

    return res;
}

size_t llama_kv_cache_depth::size_scorer_bytes() const {
    size_t res = 0;
    for (const auto & [_, size] : sched.memory_breakdown()) {
        res += size;
    }
    for (const auto & layer : layers) {
        res += layer.q ? ggml_nbytes(layer.q) : 0;
    }
    return res;
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_cache_depth::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;

    if (kv_iswa) {
        res = kv_iswa->memory_breakdown();
    }

    for (const auto & [ctx, buf] : ctxs_bufs) {
        auto * buft = ggml_backend_buffer_get_type(buf.get());

        res[buft] += hparams.no_alloc ?
            ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft) :
            ggml_backend_buffer_get_size(buf.get());
    }

    for (const auto & [buft, size] : sched.memory_breakdown()) {
        res[buft] += size;
    }

    return res;
}

//
// ubatch
//

uint32_t llama_kv_cache_depth::get_n_ubatch() const {
    const auto & params = plan.params;

    uint32_t n_pin = 0;
    for (const auto & stream : streams) {
        n_pin = std::max(n_pin, stream.pins.count(params.n_sink));
    }

    uint32_t n_left = plan.n_ubatch;

    for (const auto & layer : layers) {
        if (layer.n_cells < plan.n_ctx_seq) {
            n_left = std::min(n_left, layer.n_cells - params.n_sink - params.n_recent - n_pin);
        }
    }

    return n_left < plan.n_ubatch ? std::max(std::min(plan.n_ubatch, llama_kv_n_ubatch_min), n_left/llama_kv_n_ubatch_min*llama_kv_n_ubatch_min) : plan.n_ubatch;
}

ggml_status llama_kv_cache_depth::apply_ubatch(const llama_ubatch & ubatch, const std::vector<uint32_t> & n_room, slot_info & sinfo) {
    const uint32_t n_seqs = n_stream > 1 ? ubatch.n_seqs_unq : 1;

    GGML_ASSERT(ubatch.n_tokens % n_seqs == 0);

    sinfo.s0       = ubatch.seq_id_unq[0];
    sinfo.n_stream = n_seqs;
    sinfo.n_tps    = ubatch.n_tokens/n_seqs;

    for (uint32_t s = 0; s < n_seqs; ++s) {
        // sequential splits put consecutive sequences in a ubatch, the views in the graph rely on it
        GGML_ASSERT(ubatch.seq_id_unq[s] == (llama_seq_id) (sinfo.s0 + s));
    }

    for (uint32_t s = 0; s < n_seqs; ++s) {
        const uint32_t strm = sinfo.s0 + s;

        const ggml_status status = evict(strm, std::max(sinfo.n_tps, n_room[strm]));

        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
    }

    // place the tokens

    sinfo.n_kv.clear();
    sinfo.rows.clear();

    sinfo.evicted = false;

    for (auto & layer : layers) {
        uint32_t n_kv = 0;

        for (uint32_t s = 0; s < n_seqs; ++s) {
            auto & cells = layer.cells[sinfo.s0 + s];

            for (uint32_t i = 0; i < sinfo.n_tps; ++i) {
                sinfo.rows.push_back(cells.add(ubatch.pos[s*sinfo.n_tps + i]));
            }

            n_kv = std::max(n_kv, cells.used_max_p1());

            sinfo.evicted = sinfo.evicted || cells.n_evicted > 0;
        }

        // pad the n_kv value so that the graph remains constant across batches and can be reused
        sinfo.n_kv.push_back(std::min((uint32_t) GGML_PAD(n_kv, 256), layer.n_cells));
    }

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        auto & stream = streams[sinfo.s0 + i/sinfo.n_tps];

        stream.tokens.add(ubatch.pos[i], ubatch.pos[i] + 1);
        stream.pos_placed = std::min(stream.pos_placed, ubatch.pos[i]);
    }

    // choose the queries to sample

    const auto idxs = llama_kv_evict_sample(*score, sinfo.n_tps);

    sinfo.q_idxs.clear();
    sinfo.q_rows.clear();

    for (uint32_t s = 0; s < n_seqs; ++s) {
        for (const uint32_t i : idxs) {
            const uint32_t idx = s*sinfo.n_tps + i;

            sinfo.q_idxs.push_back(idx);
            sinfo.q_rows.push_back(streams[sinfo.s0 + s].queries.add(*score, ubatch.pos[idx], sinfo.n_tps));
        }
    }

    return GGML_STATUS_SUCCESS;
}

void llama_kv_cache_depth::commit_ubatch(const llama_ubatch & ubatch) {
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        streams[ubatch.seq_id[i][0]].pos_placed = llama_kv_depth_cells::none;
    }
}

llama_kv_cache_depth::slot_info llama_kv_cache_depth::get_slot_full() const {
    slot_info res;

    res.s0       = 0;
    res.n_stream = n_stream;
    res.n_tps    = 0;

    for (const auto & layer : layers) {
        res.n_kv.push_back(layer.n_cells);
    }

    return res;
}

//
// llama_kv_cache_depth_context
//

llama_kv_cache_depth_context::llama_kv_cache_depth_context(llama_memory_status status, ggml_status status_compute) :
    status(status), status_compute(status_compute) {
}

llama_kv_cache_depth_context::llama_kv_cache_depth_context(llama_kv_cache_depth * kv) :
    status(LLAMA_MEMORY_STATUS_SUCCESS), kv(kv),
    ctx_iswa(kv->get_iswa() ? kv->get_iswa()->init_full() : nullptr),
    sinfo(kv->get_slot_full()) {
}

llama_kv_cache_depth_context::llama_kv_cache_depth_context(
        llama_kv_cache_depth * kv,
        llama_memory_context_ptr ctx_iswa,
        bool do_shift) :
    status(llama_memory_status_combine(
                do_shift ? LLAMA_MEMORY_STATUS_SUCCESS : LLAMA_MEMORY_STATUS_NO_UPDATE,
                ctx_iswa ? ctx_iswa->get_status()      : LLAMA_MEMORY_STATUS_NO_UPDATE)),
    kv(kv), ctx_iswa(std::move(ctx_iswa)), do_shift(do_shift) {
}

llama_kv_cache_depth_context::llama_kv_cache_depth_context(
        llama_kv_cache_depth * kv,
        llama_memory_context_ptr ctx_iswa,
        std::vector<llama_ubatch> ubatches) :
    status(LLAMA_MEMORY_STATUS_SUCCESS), kv(kv), ctx_iswa(std::move(ctx_iswa)), ubatches(std::move(ubatches)) {
}

bool llama_kv_cache_depth_context::next() {
    assert(status == LLAMA_MEMORY_STATUS_SUCCESS);

    if (ctx_iswa) {
        ctx_iswa->next();
    }

    kv->commit_ubatch(ubatches[i_next]);

    return ++i_next < ubatches.size();
}

bool llama_kv_cache_depth_context::apply() {
    assert(!llama_memory_status_is_fail(status));

    bool res = true;

    if (ctx_iswa && (!ubatches.empty() || ctx_iswa->get_status() == LLAMA_MEMORY_STATUS_SUCCESS)) {
        res = res & ctx_iswa->apply();
    }

    // no ubatches -> this is a KV cache update
    if (ubatches.empty()) {
        if (do_shift) {
            res = res & kv->update();
        }

        return res;
    }

    if (i_next == 0) {
        // few tokens of a sequence, a draft for one, make room at once: then they can be taken back
        n_room.assign(kv->get_n_stream(), 0);
        for (const auto & ubatch : ubatches) {
            for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
                n_room[ubatch.seq_id[i][0]]++;
            }
        }
        for (auto & n : n_room) {
            n = n <= kv->get_n_ubatch() ? n : 0;
        }
    }

    status_compute = kv->apply_ubatch(ubatches[i_next], n_room, sinfo);

    for (uint32_t i = 0; i < ubatches[i_next].n_tokens; ++i) {
        auto & n = n_room[ubatches[i_next].seq_id[i][0]];
        n -= n > 0;
    }

    return res && status_compute == GGML_STATUS_SUCCESS;
}

llama_memory_status llama_kv_cache_depth_context::get_status() const {
    return status;
}

ggml_status llama_kv_cache_depth_context::get_status_compute() const {
    return status_compute;
}

const llama_ubatch & llama_kv_cache_depth_context::get_ubatch() const {
    assert(status == LLAMA_MEMORY_STATUS_SUCCESS);

    return ubatches[i_next];
}

const llama_kv_cache_iswa_context * llama_kv_cache_depth_context::get_iswa() const {
    return static_cast<const llama_kv_cache_iswa_context *>(ctx_iswa.get());
}
