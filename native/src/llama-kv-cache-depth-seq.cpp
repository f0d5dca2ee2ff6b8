// sequences: remove, go back, copy, keep, shift, divide, pin

#include "llama-kv-cache-depth.h"

#include "llama-impl.h"

#include <algorithm>
#include <cinttypes>
#include <limits>
#include <stdexcept>

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

        for (auto & p : stream.queries.pos) {
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
        const llama_pos n_ubatch = get_n_ubatch();
        const llama_pos n_align  = (llama_kv_n_query_span_pp + n_ubatch - 1)/n_ubatch*n_ubatch;

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

    for (auto & p : dst_stream.queries.pos) {
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
    for (auto & p : stream.queries.pos) {
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

    for (auto & p : stream.queries.pos) {
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

    // the ubatch follows the room that pins leave, see get_n_ubatch()
    const uint32_t n_ubatch = std::min(plan.n_ubatch, llama_kv_n_ubatch_min);

    for (const auto & layer : layers) {
        const uint64_t n_floor = (uint64_t) params.n_sink + n_pin + params.n_recent + n_ubatch;

        if (layer.n_cells < plan.n_ctx_seq && layer.n_cells < n_floor) {
            throw std::runtime_error(format("layer capacity %u is below the floor %" PRIu64 " (%u sinks + %u pinned + %u recent + %u ubatch): raise --kv-budget or pin fewer tokens",
                    layer.n_cells, n_floor, params.n_sink, n_pin, params.n_recent, n_ubatch));
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
