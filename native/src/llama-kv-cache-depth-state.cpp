// state write/load

#include "llama-kv-cache-depth.h"

#include "llama-impl.h"
#include "llama-io.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

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

    llama_kv_depth_write(io, stream.queries.pos, llama_kv_n_query);
    io.write(&stream.queries.head, sizeof(stream.queries.head));
    io.write(&stream.queries.skip, sizeof(stream.queries.skip));

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

    llama_kv_depth_read(io, stream.queries.pos, llama_kv_n_query);
    io.read(&stream.queries.head, sizeof(stream.queries.head));
    io.read(&stream.queries.skip, sizeof(stream.queries.skip));
    if (stream.queries.head >= llama_kv_n_query) {
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
