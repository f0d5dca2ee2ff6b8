#include "llama-kv-cache-depth.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

// tokens freed at once while decoding, so that most steps do not have to evict at all
static constexpr uint32_t n_evict_batch = 64;

// a layer counts attention this many tokens before it first has to evict, so that the first choice is not a blind one
static constexpr uint32_t n_warmup = 512;

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

    q_pos.assign(n_query, -1);
    q_head = 0;
    q_skip = 0;
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
            layer.q = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, n_embd_head_k*hparams.n_head(il), n_query, n_stream);
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
            plan.params.rule.c_str(), score->name(), plan.n_ubatch);
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
// ops
//

std::pair<uint32_t, uint32_t> llama_kv_cache_depth::get_streams(llama_seq_id seq_id) const {
    if (seq_id != -1 && !has_seq(seq_id)) {
        throw std::runtime_error(format("sequence %d is out of range: the context has %u", seq_id, n_stream));
    }

    return seq_id == -1 ? std::make_pair(0u, n_stream) : std::make_pair((uint32_t) seq_id, (uint32_t) seq_id + 1);
}

void llama_kv_cache_depth::pos_range(llama_pos & p0, llama_pos & p1) const {
    if (p0 < 0) {
        p0 = 0;
    }
    if (p1 < 0) {
        p1 = std::numeric_limits<llama_pos>::max();
    }
}

void llama_kv_cache_depth::clear(bool data) {
    for (auto & layer : layers) {
        for (auto & cells : layer.cells) {
            cells.clear();
        }
    }
    for (auto & stream : streams) {
        stream.clear();
    }

    if (data) {
        for (auto & [_, buf] : ctxs_bufs) {
            ggml_backend_buffer_clear(buf.get(), 0);
        }
    }

    if (kv_iswa) {
        kv_iswa->clear(data);
    }
}

bool llama_kv_cache_depth::can_rm_from(uint32_t strm, llama_pos p0) const {
    const auto & tokens = streams[strm].tokens;

    if (p0 > tokens.pos_max() || p0 <= tokens.pos_min()) {
        return true;
    }

    // the next token has to find its window whole, up to the last token that the windows have dropped
    if (kv_iswa) {
        const llama_pos p = tokens.pos_before(kv_iswa->seq_pos_min(strm));

        if (p >= 0 && !llama_hparams::is_masked_swa(hparams.n_swa, hparams.swa_type, p, p0)) {
            return false;
        }
    }

    for (const auto & layer : layers) {
        if (!layer.cells[strm].can_rm_from(p0)) {
            return false;
        }
    }

    return true;
}

bool llama_kv_cache_depth::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    // a sequence that does not exist has nothing to remove
    if (seq_id != -1 && !has_seq(seq_id)) {
        return true;
    }

    pos_range(p0, p1);

    const auto [s0, s1] = get_streams(seq_id);

    for (uint32_t s = s0; s < s1; ++s) {
        if (p1 > streams[s].tokens.pos_max() && !can_rm_from(s, p0)) {
            return false;
        }
    }

    if (kv_iswa && !kv_iswa->seq_rm(seq_id, p0, p1)) {
        return false;
    }

    for (uint32_t s = s0; s < s1; ++s) {
        auto & stream = streams[s];

        const llama_pos pos_max = stream.tokens.pos_max();

        // spans pinned ahead of the tokens stay. those of a ubatch that has failed are still ahead
        stream.pins.rm(p0, std::min({ p1, pos_max + 1, stream.pos_placed }));

        stream.pos_placed = llama_kv_depth_cells::none;

        stream.tokens.rm(p0, p1);

        for (auto & p : stream.q_pos) {
            if (p >= p0 && p < p1) {
                p = -1;
            }
        }

        for (auto & layer : layers) {
            if (stream.tokens.empty()) {
                layer.cells[s].clear();
            } else {
                layer.cells[s].rm_range(p0, p1 > pos_max ? llama_kv_depth_cells::none : p1);
            }
        }
    }

    return true;
}

llama_pos llama_kv_cache_depth::seq_pos_rollback(llama_seq_id seq_id, llama_pos p) const {
    if (can_rm_from(seq_id, p)) {
        return p;
    }

    // up to where no layer misses anything
    for (const auto & layer : layers) {
        p = std::min(p, layer.cells[seq_id].pos_missing);
    }

    return can_rm_from(seq_id, p) ? p : streams[seq_id].tokens.pos_min();
}

llama_pos llama_kv_cache_depth::seq_rollback(llama_seq_id seq_id, llama_pos p) {
    auto & stream = streams[seq_id];

    llama_pos res = seq_pos_rollback(seq_id, p);

    if (res < p) {
        // ubatches, and scoring with them, start where they would in a fresh evaluation: equal prompts give equal text
        const llama_pos n_align = (n_query_span_pp + plan.n_ubatch - 1)/plan.n_ubatch*plan.n_ubatch;

        res = seq_pos_rollback(seq_id, res - res % n_align);

        stat.n_reeval += p - std::max(res, stream.tokens.pos_min());
    }

    // what is evaluated again stays pinned
    auto pins = stream.pins;
    pins.rm(p, stream.tokens.pos_max() + 1);

    GGML_ASSERT(seq_rm(seq_id, res, -1));

    stream.pins = std::move(pins);

    return res;
}

void llama_kv_cache_depth::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (!has_seq(seq_id_src) || !has_seq(seq_id_dst)) {
        LLAMA_LOG_ERROR("%s: sequences %d and %d must be below %u\n", __func__, seq_id_src, seq_id_dst, n_stream);
        return;
    }

    if (seq_id_src == seq_id_dst) {
        return;
    }

    pos_range(p0, p1);

    // a copy of the front is a copy that goes back. if it has to go back further, it says so by where it ends
    if (p1 <= streams[seq_id_src].tokens.pos_max()) {
        const llama_pos p = seq_pos_rollback(seq_id_src, p1);
        if (p < p1) {
            LLAMA_LOG_WARN("%s: sequence %d ends at %d instead of %d: of what comes next some has been evicted\n", __func__, seq_id_dst, p, p1);
        }
        p1 = p;
    } else {
        p1 = llama_kv_depth_cells::none;
    }

    if (kv_iswa) {
        // whole streams only, see llama_kv_cache::seq_cp
        kv_iswa->seq_cp(seq_id_src, seq_id_dst, -1, -1);
        kv_iswa->seq_rm(seq_id_dst, -1, p0);
        kv_iswa->seq_rm(seq_id_dst, p1, -1);

        // it copies with the next update, and a state that is saved before that would be of what was there
        if (lctx) {
            const auto ctx_update = kv_iswa->init_update(lctx, false);
            if (ctx_update->get_status() == LLAMA_MEMORY_STATUS_SUCCESS) {
                ctx_update->apply();
            }
        }
    }

    synchronize();

    auto & dst_stream = streams[seq_id_dst];

    dst_stream = streams[seq_id_src];
    for (auto * spans : { &dst_stream.tokens, &dst_stream.pins }) {
        spans->rm(0, p0);
        spans->rm(p1, llama_kv_depth_cells::none);
    }

    for (auto & p : dst_stream.q_pos) {
        if (p < p0 || p >= p1) {
            p = -1;
        }
    }

    for (auto & layer : layers) {
        auto & cells = layer.cells[seq_id_dst];

        cells = layer.cells[seq_id_src];
        cells.rm_range(0, p0);
        cells.rm_range(p1, llama_kv_depth_cells::none);

        ggml_init_params params = {
            /*.mem_size   =*/ 2*ggml_tensor_overhead(),
            /*.mem_buffer =*/ NULL,
            /*.no_alloc   =*/ true,
        };

        for (ggml_tensor * t : { layer.k, layer.v, layer.q }) {
            if (!t) {
                continue;
            }

            ggml_context_ptr ctx { ggml_init(params) };

            ggml_tensor * src = ggml_view_2d(ctx.get(), t, t->ne[0], t->ne[1], t->nb[1], seq_id_src*t->nb[2]);
            ggml_tensor * dst = ggml_view_2d(ctx.get(), t, t->ne[0], t->ne[1], t->nb[1], seq_id_dst*t->nb[2]);

            for (ggml_tensor * view : { src, dst }) {
                ggml_backend_view_init(view);
            }

            ggml_backend_tensor_copy(src, dst);
        }
    }
}

void llama_kv_cache_depth::seq_keep(llama_seq_id seq_id) {
    for (uint32_t s = 0; s < n_stream; ++s) {
        if (s != (uint32_t) seq_id) {
            seq_rm(s, -1, -1);
        }
    }
}

void llama_kv_cache_depth::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    if (!has_seq(seq_id) || !get_can_shift()) {
        LLAMA_LOG_ERROR("%s: not supported by this model, or sequence %d is not below %u\n", __func__, seq_id, n_stream);
        return;
    }

    if (shift == 0) {
        return;
    }

    pos_range(p0, p1);

    auto & stream = streams[seq_id];

    if (shift > llama_kv_depth_pos_max - std::min(stream.tokens.pos_max(), p1)) {
        LLAMA_LOG_ERROR("%s: positions up to %d of sequence %d cannot move by %d: the last one is %d\n", __func__, stream.tokens.pos_max(), seq_id, shift, llama_kv_depth_pos_max);
        return;
    }

    if (kv_iswa) {
        kv_iswa->seq_add(seq_id, p0, p1, shift);
    }

    stream.tokens.shift(p0, p1, shift);
    stream.pins  .shift(p0, p1, shift);

    // the sampled queries keep their rotary position, so they cannot be compared with the shifted keys any more
    for (auto & p : stream.q_pos) {
        if (p >= p0 && p < p1) {
            p = -1;
        }
    }

    for (auto & layer : layers) {
        layer.cells[seq_id].add_range(p0, p1, shift);
    }
}

void llama_kv_cache_depth::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    if (!has_seq(seq_id) || !get_can_shift()) {
        LLAMA_LOG_ERROR("%s: not supported by this model, or sequence %d is not below %u\n", __func__, seq_id, n_stream);
        return;
    }

    if (d == 1) {
        return;
    }
    if (d < 1) {
        LLAMA_LOG_ERROR("%s: positions of sequence %d cannot be divided by %d\n", __func__, seq_id, d);
        return;
    }

    pos_range(p0, p1);

    if (kv_iswa) {
        kv_iswa->seq_div(seq_id, p0, p1, d);
    }

    auto & stream = streams[seq_id];

    stream.tokens.div(p0, p1, d);

    // pinned tokens would fall together with others, and others with them
    stream.pins.rm(p0/d, p1);

    for (auto & p : stream.q_pos) {
        if (p >= p0 && p < p1) {
            p = -1;
        }
    }

    for (auto & layer : layers) {
        layer.cells[seq_id].div_range(p0, p1, d);
    }
}

llama_pos llama_kv_cache_depth::seq_pos_min(llama_seq_id seq_id) const {
    if (!has_seq(seq_id)) {
        return -1;
    }

    return kv_iswa ? kv_iswa->seq_pos_min(seq_id) : streams[seq_id].tokens.pos_min();
}

llama_pos llama_kv_cache_depth::seq_pos_max(llama_seq_id seq_id) const {
    return has_seq(seq_id) ? streams[seq_id].tokens.pos_max() : -1;
}

void llama_kv_cache_depth::seq_pin(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    get_streams(seq_id);

    pos_range(p0, p1);

    if (p1 <= p0) {
        throw std::runtime_error(format("cannot pin positions [%d, %d): the span is empty", p0, p1));
    }

    const auto & params = plan.params;

    auto pins = streams[seq_id].pins;
    pins.add(p0, p1);

    const uint32_t n_pin = pins.count(params.n_sink);

    for (const auto & layer : layers) {
        const uint64_t n_floor = (uint64_t) params.n_sink + n_pin + params.n_recent + plan.n_ubatch;

        if (layer.n_cells < plan.n_ctx_seq && layer.n_cells < n_floor) {
            throw std::runtime_error(format("layer capacity %u is below the floor %" PRIu64 " (%u sinks + %u pinned + %u recent + %u ubatch): raise --kv-budget or pin fewer tokens",
                    layer.n_cells, n_floor, params.n_sink, n_pin, params.n_recent, plan.n_ubatch));
        }
    }

    streams[seq_id].pins = std::move(pins);
}

void llama_kv_cache_depth::seq_unpin(llama_seq_id seq_id) {
    const auto [s0, s1] = get_streams(seq_id);

    for (uint32_t s = s0; s < s1; ++s) {
        streams[s].pins.clear();
    }
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
// eviction
//

void llama_kv_cache_depth::synchronize() const {
    if (lctx) {
        ggml_backend_sched_synchronize(lctx->get_sched());
    }
}

ggml_status llama_kv_cache_depth::evict(kv_layer & layer, uint32_t strm, uint32_t n_tokens) {
    auto & cells  = layer.cells[strm];
    auto & stream = streams[strm];

    const uint32_t n_free = cells.size() - cells.get_used();

    if (layer.q && n_free < n_tokens + n_warmup) {
        const llama_pos n_new  = cells.pos_max() - cells.pos_scored;
        const llama_pos n_span = n_tokens > 1 ? n_query_span_pp : n_query_span_tg;

        if (n_new >= n_span || (n_free < n_tokens && !cells.is_scored)) {
            llama_kv_attn attn;

            const ggml_status status = compute_attn(layer, strm, attn);

            if (status != GGML_STATUS_SUCCESS) {
                return status;
            }

            if (!attn.pos.empty()) {
                const uint32_t n_seen = attn.pos.back() - std::max(cells.pos_scored, 0);

                // a broken value shows in its own cell, a broken key in all of them
                if (std::none_of(attn.mass.begin(), attn.mass.end(), [](float x) { return std::isfinite(x); })) {
                    mark_broken(layer, strm);
                } else {
                    score->accumulate(cells, attn, n_seen);
                }

                cells.pos_scored = attn.pos.back();
                cells.is_scored  = true;

                stat.n_score++;
            }
        }
    }

    if (n_free >= n_tokens) {
        return GGML_STATUS_SUCCESS;
    }

    // a few cells more than needed while decoding, but not more than a small layer can spare
    const uint32_t n_evict = std::max(n_tokens - n_free, std::min(n_evict_batch, cells.size()/32));

    std::vector<float> scores;
    score->score(cells, layer.il, scores);

    // a broken key or value must not break the order of the others
    for (auto & x : scores) {
        if (std::isnan(x)) {
            x = -std::numeric_limits<float>::infinity();
        }
    }

    const auto rows = llama_kv_score_select(cells, stream.pins, scores, plan.params.n_sink, plan.params.n_recent, n_evict);

    for (const uint32_t i : rows) {
        cells.evict(i, stream.tokens.pos_max());
    }

    stat.n_evict += rows.size();

    if (n_free + rows.size() < n_tokens) {
        LLAMA_LOG_ERROR("%s: layer %u of sequence %u has no %u cells to spare\n", __func__, layer.il, strm, n_tokens);
        return GGML_STATUS_FAILED;
    }

    return GGML_STATUS_SUCCESS;
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

struct llama_kv_cache_depth::attn_graph {
    ggml_tensor * inp_pos_kv = nullptr; // F32 [n_kv]
    ggml_tensor * inp_pos_q  = nullptr; // F32 [1, n_query]
    ggml_tensor * inp_weight = nullptr; // F32 [1, n_query*n_gqa, n_head_kv] 1 for a query that counts
    ggml_tensor * inp_ones   = nullptr; // F32 [1, n_embd_v]
    ggml_tensor * inp_rot_v  = nullptr;
    ggml_tensor * out        = nullptr; // F32 [n_kv]

    static size_t max_nodes(int64_t n_head_kv) {
        return 64 + 16*n_head_kv;
    }
};

void llama_kv_cache_depth::build_attn(ggml_context * ctx, ggml_cgraph * gf, const kv_layer & layer, uint32_t strm, int64_t n_kv, attn_graph & res) const {
    const int64_t n_head      = hparams.n_head(layer.il);
    const int64_t n_head_kv   = hparams.n_head_kv(layer.il);
    const int64_t n_gqa       = n_head/n_head_kv;
    const int64_t n_embd_head = hparams.n_embd_head_k(layer.il);
    const int64_t n_embd_v    = hparams.n_embd_head_v(layer.il);

    const auto new_input = [&](int64_t ne0, int64_t ne1, int64_t ne2) {
        ggml_tensor * cur = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, ne0, ne1, ne2);
        ggml_set_input(cur);
        return cur;
    };

    res.inp_pos_kv = new_input(n_kv, 1, 1);
    res.inp_pos_q  = new_input(1, n_query, 1);
    res.inp_weight = new_input(1, n_query*n_gqa, n_head_kv);

    ggml_tensor * mask = ggml_repeat_4d(ctx, res.inp_pos_kv, n_kv, n_query, 1, 1);
    mask = ggml_sub_inplace  (ctx, mask, res.inp_pos_q);
    mask = ggml_relu_inplace (ctx, mask);
    mask = ggml_scale_inplace(ctx, mask, -1e30f);

    const auto * lk = layer.k;
    const auto * lq = layer.q;

    ggml_tensor * k = ggml_view_3d(ctx, layer.k, n_embd_head, n_head_kv, n_kv,
            ggml_row_size(lk->type, n_embd_head), lk->nb[1], strm*lk->nb[2]);
    k = ggml_permute(ctx, k, 0, 2, 1, 3);

    // the heads of a group are rows of one matrix, so that each key is read once for all of them
    ggml_tensor * q = ggml_view_4d(ctx, layer.q, n_embd_head, n_gqa, n_head_kv, n_query,
            ggml_row_size(lq->type, n_embd_head), ggml_row_size(lq->type, n_embd_head*n_gqa), lq->nb[1], strm*lq->nb[2]);
    q = ggml_cast(ctx, ggml_permute(ctx, q, 0, 2, 3, 1), GGML_TYPE_F32);
    q = ggml_reshape_3d(ctx, q, n_embd_head, n_query*n_gqa, n_head_kv);

    ggml_tensor * kq = ggml_mul_mat(ctx, k, q);
    ggml_prec_set_acc(kq, GGML_PREC_F32);

    kq = ggml_reshape_3d(ctx, kq, n_kv, n_query, n_head);

    // see llm_graph_context::build_attn_mha()
    if (hparams.attn_soft_cap || model.arch == LLM_ARCH_GROK) {
        const float scale = model.arch == LLM_ARCH_GROK ? hparams.f_attn_out_scale : 1.0f;

        kq = ggml_scale(ctx, kq, scale/hparams.f_attn_logit_softcapping);
        kq = ggml_tanh (ctx, kq);
        kq = ggml_scale(ctx, kq, hparams.f_attn_logit_softcapping);
    }

    kq = ggml_soft_max_ext_inplace(ctx, kq, mask, layer.kq_scale, 0.0f);
    ggml_soft_max_add_sinks(kq, layer.sinks);

    kq = ggml_reshape_3d(ctx, kq, n_kv, n_query*n_gqa, n_head_kv);

    // sum over the queries of a group: [n_kv, 1, n_head_kv]
    ggml_tensor * mass = ggml_out_prod(ctx, kq, res.inp_weight);

    if (score->weights_value()) {
        res.inp_ones = new_input(1, n_embd_v, 1);

        if (layer.n_rot_v) {
            res.inp_rot_v = new_input(layer.n_rot_v, layer.n_rot_v, 1);
        }
    }

    // a head at a time: its values are needed in F32, all of them would be as large as the cache
    for (int64_t h = 0; h < n_head_kv; ++h) {
        ggml_tensor * cur = ggml_view_1d(ctx, mass, n_kv, h*mass->nb[2]);

        if (score->weights_value()) {
            const auto * lv = layer.v;

            ggml_tensor * v;
            if (v_trans) {
                const size_t nb1 = ggml_row_size(lv->type, lv->ne[1]);

                v = ggml_view_2d(ctx, layer.v, n_kv, n_embd_v, nb1, strm*lv->nb[2] + h*n_embd_v*nb1);
                v = ggml_cast(ctx, v, GGML_TYPE_F32);
            } else {
                v = ggml_view_2d(ctx, layer.v, n_embd_v, n_kv, lv->nb[1], strm*lv->nb[2] + h*ggml_row_size(lv->type, n_embd_v));
                v = ggml_cast(ctx, v, GGML_TYPE_F32);
                if (res.inp_rot_v) {
                    v = llama_mul_mat_hadamard(ctx, v, res.inp_rot_v);
                }
            }

            v = ggml_abs(ctx, v);
            v = v_trans ? ggml_out_prod(ctx, v, res.inp_ones) : ggml_sum_rows(ctx, v);

            cur = ggml_mul(ctx, ggml_reshape_1d(ctx, v, n_kv), cur);
        }

        res.out = res.out ? ggml_add(ctx, res.out, cur) : cur;
    }

    res.out = ggml_cont(ctx, res.out);
    ggml_set_output(res.out);
    ggml_build_forward_expand(gf, res.out);
}

ggml_status llama_kv_cache_depth::compute_attn(kv_layer & layer, uint32_t strm, llama_kv_attn & attn) {
    GGML_ASSERT(layer.q);

    const auto & cells  = layer.cells[strm];
    const auto & stream = streams[strm];

    for (const llama_pos p : stream.q_pos) {
        if (p > cells.pos_scored) {
            attn.pos.push_back(p);
        }
    }

    if (attn.pos.empty()) {
        return GGML_STATUS_SUCCESS;
    }

    std::sort(attn.pos.begin(), attn.pos.end());

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
        data.resize(n_query);
        for (uint32_t i = 0; i < n_query; ++i) {
            data[i] = stream.q_pos[i] > cells.pos_scored ? stream.q_pos[i] : 1e9f;
        }
        ggml_backend_tensor_set(graph.inp_pos_q, data.data(), 0, ggml_nbytes(graph.inp_pos_q));

        data.resize(n_query*n_head);
        for (int64_t h = 0; h < n_head; ++h) {
            for (uint32_t i = 0; i < n_query; ++i) {
                data[h*n_query + i] = stream.q_pos[i] > cells.pos_scored ? 1.0f : 0.0f;
            }
        }
        ggml_backend_tensor_set(graph.inp_weight, data.data(), 0, ggml_nbytes(graph.inp_weight));

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

    const int64_t t_start_us = ggml_time_us();

    bool need_sync = true;

    for (auto & layer : layers) {
        for (uint32_t s = 0; s < n_seqs; ++s) {
            const auto & cells = layer.cells[sinfo.s0 + s];

            const uint32_t n_free   = cells.size() - cells.get_used();
            const uint32_t n_tokens = std::max(sinfo.n_tps, n_room[sinfo.s0 + s]);

            if (n_free >= n_tokens + (layer.q && n_tokens > 1 ? n_warmup : 0)) {
                continue;
            }

            // the samples and the cells are written by the previous ubatch, which may still be running
            if (need_sync) {
                synchronize();
                need_sync = false;
            }

            const ggml_status status = evict(layer, sinfo.s0 + s, n_tokens);

            if (status != GGML_STATUS_SUCCESS) {
                return status;
            }
        }
    }

    if (!need_sync) {
        stat.t_evict_us += ggml_time_us() - t_start_us;
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

    const uint32_t n_skip = (sinfo.n_tps > 1 ? n_query_span_pp : n_query_span_tg)/n_query;
    const uint32_t n_q    = sinfo.n_tps == 1 ? 1 : std::min(n_query, (sinfo.n_tps + n_skip - 1)/n_skip);

    sinfo.q_idxs.clear();
    sinfo.q_rows.clear();

    for (uint32_t s = 0; s < n_seqs; ++s) {
        auto & stream = streams[sinfo.s0 + s];

        for (uint32_t i = 0; i < n_q; ++i) {
            // the last token is always one of them: every token of the chunk is seen by a query
            const uint32_t idx = s*sinfo.n_tps + (score->samples_last() ? sinfo.n_tps - n_q + i : (i + 1)*sinfo.n_tps/n_q - 1);
            const uint32_t row = stream.q_head;

            sinfo.q_idxs.push_back(idx);
            sinfo.q_rows.push_back(row);

            stream.q_pos[row] = ubatch.pos[idx];

            // one token at a time, a row is overwritten until it holds the sample to keep
            if (sinfo.n_tps > 1 || ++stream.q_skip >= n_skip || score->samples_last()) {
                stream.q_skip = 0;
                stream.q_head = (row + 1)%n_query;
            }
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
// shift
//

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

struct llama_kv_cache_depth::shift_graph {
    ggml_tensor * inp_shift = nullptr; // I32 [n_cells]
    ggml_tensor * inp_rot   = nullptr;
    ggml_tensor * dst       = nullptr; // the keys, [n_embd_k_gqa, n_cells]
    ggml_tensor * out       = nullptr; // the same, rotated

    static constexpr size_t max_nodes = 64;

    // keys that are rotated at once
    static constexpr uint32_t n_cells = 512;
};

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
    // of all layers: with a larger graph the scheduler would have to be made anew, without what has been reserved
    size_t res = shift_graph::max_nodes;
    for (const auto & layer : layers) {
        res = std::max(res, attn_graph::max_nodes(hparams.n_head_kv(layer.il)));
    }
    return res;
}

void llama_kv_cache_depth::reserve(llama_context * lctx) {
    this->lctx = lctx;

    for (const auto & layer : layers) {
        attn_graph  graph_attn;
        shift_graph graph_shift;

        const auto attn = [&](ggml_context * ctx, ggml_cgraph * gf) {
            build_attn(ctx, gf, layer, 0, layer.n_cells, graph_attn);
        };

        const auto shift = [&](ggml_context * ctx, ggml_cgraph * gf) {
            build_shift(ctx, gf, layer, 0, 0, std::min(shift_graph::n_cells, layer.n_cells), graph_shift);
        };

        const bool can_rotate = get_can_shift() && has_rope(layer.il);

        const bool ok =
            (!layer.q    || sched.reserve(lctx->get_sched(), max_nodes(), hparams.no_alloc, attn)) &&
            (!can_rotate || sched.reserve(lctx->get_sched(), max_nodes(), hparams.no_alloc, shift));

        if (!ok) {
            throw std::runtime_error(format("failed to allocate the buffers that score the %u KV cells of layer %u", layer.n_cells, layer.il));
        }
    }
}

//
// state write/load
//

// version of the format below
static constexpr uint32_t LLAMA_KV_DEPTH_STATE_VERSION = 2;

void llama_kv_cache_depth::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    // partial states hold what cannot be rolled back, that is the SWA layers
    if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
        const auto [s0, s1] = get_streams(seq_id);

        const uint32_t version  = LLAMA_KV_DEPTH_STATE_VERSION;
        const uint32_t n_layers = layers.size();
        const uint32_t n_strm   = s1 - s0;
        const uint32_t is_trans = v_trans;

        io.write(&version,  sizeof(version));
        io.write(&n_layers, sizeof(n_layers));
        io.write(&n_strm,   sizeof(n_strm));
        io.write(&is_trans, sizeof(is_trans));

        for (uint32_t s = s0; s < s1; ++s) {
            state_write_stream(io, s);
        }
    }

    if (kv_iswa) {
        kv_iswa->state_write(io, seq_id, flags);
    }
}

void llama_kv_cache_depth::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    const auto [s0, s1] = get_streams(seq_id);

    try {
        if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
            uint32_t version;
            uint32_t n_layers;
            uint32_t n_strm;
            uint32_t is_trans;

            io.read(&version,  sizeof(version));
            io.read(&n_layers, sizeof(n_layers));
            io.read(&n_strm,   sizeof(n_strm));
            io.read(&is_trans, sizeof(is_trans));

            if (version != LLAMA_KV_DEPTH_STATE_VERSION || n_layers != layers.size() || n_strm != s1 - s0) {
                throw std::runtime_error(format("the saved KV state (version %u, %u layers, %u sequences) does not fit this context (version %u, %zu layers, %u sequences)",
                        version, n_layers, n_strm, LLAMA_KV_DEPTH_STATE_VERSION, layers.size(), s1 - s0));
            }
            if (is_trans != (uint32_t) v_trans) {
                throw std::runtime_error("the saved KV state is from a context with another flash attention setting");
            }

            for (uint32_t s = s0; s < s1; ++s) {
                state_clear_stream(s);
                state_read_stream(io, s);
            }
        }

        if (kv_iswa) {
            // it takes no notice of a sequence that is empty
            for (uint32_t s = s0; s < s1 && (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0; ++s) {
                kv_iswa->seq_rm(s, -1, -1);
            }
            kv_iswa->state_read(io, seq_id, flags);
        }
    } catch (...) {
        // tensor data is applied only when all of the state has been read: no sequence may claim tokens without it
        for (uint32_t s = s0; s < s1; ++s) {
            state_clear_stream(s);
            if (kv_iswa) {
                kv_iswa->seq_rm(s, -1, -1);
            }
        }
        throw;
    }
}

template <typename T>
static void llama_kv_depth_write(llama_io_write_i & io, const std::vector<T> & data, size_t n) {
    if (n > 0) {
        io.write(data.data(), n*sizeof(T));
    }
}

template <typename T>
static void llama_kv_depth_read(llama_io_read_i & io, std::vector<T> & data, size_t n) {
    data.resize(n);
    if (n > 0) {
        io.read(data.data(), n*sizeof(T));
    }
}

void llama_kv_cache_depth::state_write_stream(llama_io_write_i & io, uint32_t strm) const {
    const auto & stream = streams[strm];

    for (const auto * spans : { &stream.tokens, &stream.pins }) {
        const uint32_t n_spans = spans->spans.size();

        io.write(&n_spans, sizeof(n_spans));
        for (const auto & [p0, p1] : spans->spans) {
            io.write(&p0, sizeof(p0));
            io.write(&p1, sizeof(p1));
        }
    }

    llama_kv_depth_write(io, stream.q_pos, n_query);
    io.write(&stream.q_head, sizeof(stream.q_head));
    io.write(&stream.q_skip, sizeof(stream.q_skip));

    for (const auto & layer : layers) {
        const auto & cells = layer.cells[strm];

        // rows are restored where they were, holes included: the order of summation in attention stays the same
        const uint32_t n_rows    = cells.used_max_p1();
        const uint32_t has_q     = layer.q != nullptr;
        const uint32_t has_shift = cells.get_has_shift();
        const uint32_t is_scored = cells.is_scored;
        const int32_t  type_k    = layer.k->type;
        const int32_t  type_v    = layer.v->type;

        io.write(&layer.il,          sizeof(layer.il));
        io.write(&type_k,            sizeof(type_k));
        io.write(&type_v,            sizeof(type_v));
        io.write(&n_rows,            sizeof(n_rows));
        io.write(&has_q,             sizeof(has_q));
        io.write(&has_shift,         sizeof(has_shift));
        io.write(&is_scored,         sizeof(is_scored));
        io.write(&cells.pos_scored,  sizeof(cells.pos_scored));
        io.write(&cells.pos_evicted, sizeof(cells.pos_evicted));
        io.write(&cells.pos_missing, sizeof(cells.pos_missing));
        io.write(&cells.n_evicted,   sizeof(cells.n_evicted));

        if (n_rows == 0) {
            continue;
        }

        io.write(cells.pos_data(), n_rows*sizeof(llama_pos));

        llama_kv_depth_write(io, cells.acc, n_rows);
        llama_kv_depth_write(io, cells.cnt, n_rows);

        if (has_shift) {
            std::vector<llama_pos> shift(n_rows);
            for (uint32_t i = 0; i < n_rows; ++i) {
                shift[i] = cells.get_shift(i);
            }
            llama_kv_depth_write(io, shift, n_rows);
        }

        io.write_tensor(layer.k, strm*layer.k->nb[2], n_rows*layer.k->nb[1]);

        if (!v_trans) {
            io.write_tensor(layer.v, strm*layer.v->nb[2], n_rows*layer.v->nb[1]);
        } else {
            const size_t size_el = ggml_type_size(layer.v->type);

            for (int64_t j = 0; j < layer.v->ne[0]; ++j) {
                io.write_tensor(layer.v, strm*layer.v->nb[2] + j*layer.n_cells*size_el, n_rows*size_el);
            }
        }

        if (has_q) {
            io.write_tensor(layer.q, strm*layer.q->nb[2], layer.q->nb[2]);
        }
    }
}

void llama_kv_cache_depth::state_read_stream(llama_io_read_i & io, uint32_t strm) {
    auto & stream = streams[strm];

    for (const bool is_pins : { false, true }) {
        uint32_t n_spans;
        io.read(&n_spans, sizeof(n_spans));
        for (uint32_t i = 0; i < n_spans; ++i) {
            llama_pos p0;
            llama_pos p1;
            io.read(&p0, sizeof(p0));
            io.read(&p1, sizeof(p1));
            if (p0 < 0 || p1 <= p0 || (!is_pins && p1 > llama_kv_depth_pos_max + 1)) {
                throw std::runtime_error("the saved KV state has an invalid span of positions");
            }
            if (is_pins) {
                seq_pin(strm, p0, p1);
            } else {
                stream.tokens.add(p0, p1);
            }
        }
    }

    const llama_pos pos_max = stream.tokens.pos_max();

    llama_kv_depth_read(io, stream.q_pos, n_query);
    io.read(&stream.q_head, sizeof(stream.q_head));
    io.read(&stream.q_skip, sizeof(stream.q_skip));
    if (stream.q_head >= n_query) {
        throw std::runtime_error("the saved KV state has invalid query samples");
    }

    for (auto & layer : layers) {
        auto & cells = layer.cells[strm];

        uint32_t  il;
        int32_t   type_k;
        int32_t   type_v;
        uint32_t  n_rows;
        uint32_t  has_q;
        uint32_t  has_shift;
        uint32_t  is_scored;
        llama_pos pos_scored;
        llama_pos pos_evicted;
        llama_pos pos_missing;
        uint64_t  n_evicted;

        io.read(&il,          sizeof(il));
        io.read(&type_k,      sizeof(type_k));
        io.read(&type_v,      sizeof(type_v));
        io.read(&n_rows,      sizeof(n_rows));
        io.read(&has_q,       sizeof(has_q));
        io.read(&has_shift,   sizeof(has_shift));
        io.read(&is_scored,   sizeof(is_scored));
        io.read(&pos_scored,  sizeof(pos_scored));
        io.read(&pos_evicted, sizeof(pos_evicted));
        io.read(&pos_missing, sizeof(pos_missing));
        io.read(&n_evicted,   sizeof(n_evicted));

        if (il != layer.il || type_k != layer.k->type || type_v != layer.v->type) {
            throw std::runtime_error(format("the saved KV state does not fit layer %u: other K or V type", layer.il));
        }
        if (n_rows > layer.n_cells) {
            throw std::runtime_error(format("the saved KV state has %u cells in layer %u, this context has %u: use the same KV budget", n_rows, il, layer.n_cells));
        }
        if (has_q != (layer.q != nullptr)) {
            throw std::runtime_error(format("the saved KV state does not fit layer %u: other scorer or budget", layer.il));
        }
        if (pos_evicted < -1 || pos_evicted > pos_max || pos_missing < 0) {
            throw std::runtime_error(format("the saved KV state has invalid positions in layer %u", layer.il));
        }

        cells.n_evicted   = n_evicted;
        cells.pos_evicted = pos_evicted;
        cells.pos_missing = pos_missing;

        if (n_rows == 0) {
            continue;
        }

        std::vector<llama_pos> pos;
        std::vector<float>     acc;
        std::vector<float>     cnt;
        std::vector<llama_pos> shift;

        llama_kv_depth_read(io, pos, n_rows);
        llama_kv_depth_read(io, acc, n_rows);
        llama_kv_depth_read(io, cnt, n_rows);

        if (has_shift) {
            llama_kv_depth_read(io, shift, n_rows);
        }

        for (uint32_t i = 0; i < n_rows; ++i) {
            if (pos[i] > pos_max || !std::isfinite(acc[i]) || !(cnt[i] >= 0.0f)) {
                throw std::runtime_error(format("the saved KV state has invalid cells in layer %u", layer.il));
            }
        }

        for (uint32_t i = 0; i < n_rows; ++i) {
            if (pos[i] < 0) {
                continue;
            }
            cells.set(i, pos[i]);
            cells.acc[i] = acc[i];
            cells.cnt[i] = cnt[i];
            if (has_shift && shift[i] != 0) {
                cells.set_shift(i, shift[i]);
            }
        }

        cells.pos_scored = std::max(-1, std::min(pos_scored, cells.pos_max()));
        cells.is_scored  = is_scored;

        io.read_tensor(layer.k, strm*layer.k->nb[2], n_rows*layer.k->nb[1]);

        if (!v_trans) {
            io.read_tensor(layer.v, strm*layer.v->nb[2], n_rows*layer.v->nb[1]);
        } else {
            const size_t size_el = ggml_type_size(layer.v->type);

            for (int64_t j = 0; j < layer.v->ne[0]; ++j) {
                io.read_tensor(layer.v, strm*layer.v->nb[2] + j*layer.n_cells*size_el, n_rows*size_el);
            }
        }

        if (has_q) {
            io.read_tensor(layer.q, strm*layer.q->nb[2], layer.q->nb[2]);
        }
    }
}

void llama_kv_cache_depth::state_clear_stream(uint32_t strm) {
    streams[strm].clear();

    for (auto & layer : layers) {
        layer.cells[strm].clear();
    }
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
            n = n <= kv->get_plan().n_ubatch ? n : 0;
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
