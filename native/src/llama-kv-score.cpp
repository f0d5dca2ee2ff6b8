#include "llama-kv-score.h"

#include "ggml.h"

#include <algorithm>

const std::vector<llama_kv_score_info> & llama_kv_score_list() {
    static const std::vector<llama_kv_score_info> list = {
        { "attention", "accumulated attention by value norm and by how many queries could attend", llama_kv_score_init_attention },
        { "window",    "attention of the latest queries only, after SnapKV",                       llama_kv_score_init_window    },
        { "streaming", "sinks and recent tokens, after StreamingLLM",                              llama_kv_score_init_streaming },
        { "random",    "a control: a hash of layer and position",                                  llama_kv_score_init_random    },
    };

    return list;
}

llama_kv_score_ptr llama_kv_score_init(const std::string & name) {
    for (const auto & info : llama_kv_score_list()) {
        if (name == info.name) {
            return info.init();
        }
    }

    return nullptr;
}

std::string llama_kv_score_names() {
    std::string res;
    for (const auto & info : llama_kv_score_list()) {
        res += (res.empty() ? "" : ", ") + std::string(info.name);
    }

    return res;
}

ggml_tensor * llama_kv_score_i::build(llama_kv_attn_graph_i & attn) const {
    ggml_tensor * mass = attn.build_mass();

    ggml_tensor * res = nullptr;

    for (int64_t ih = 0; ih < attn.n_head_kv; ++ih) {
        ggml_tensor * cur = ggml_view_1d(attn.ctx, mass, mass->ne[0], ih*mass->nb[2]);

        res = res ? ggml_add(attn.ctx, res, cur) : cur;
    }

    return res;
}

void llama_kv_score_i::accumulate(llama_kv_depth_cells & cells, const llama_kv_attn & attn, uint32_t n_tokens) const {
    GGML_UNUSED(cells);
    GGML_UNUSED(attn);
    GGML_UNUSED(n_tokens);
}

llama_kv_kind llama_kv_score_kind(llama_pos p, const llama_kv_depth_spans & pins, uint32_t n_sink, llama_pos p1) {
    if (p < (llama_pos) n_sink) {
        return LLAMA_KV_KIND_SINK;
    }
    if (!pins.empty() && pins.has(p)) {
        return LLAMA_KV_KIND_PINNED;
    }

    return p >= p1 ? LLAMA_KV_KIND_RECENT : LLAMA_KV_KIND_CHOSEN;
}

std::vector<uint32_t> llama_kv_score_select(
        const llama_kv_depth_cells & cells,
        const llama_kv_depth_spans & pins,
        const std::vector<float>   & scores,
        uint32_t                     n_sink,
        uint32_t                     n_recent,
        uint32_t                     n_evict) {
    const llama_pos p1 = cells.pos_max() + 1 - (llama_pos) n_recent;

    std::vector<uint32_t> by_kind[LLAMA_KV_KIND_COUNT];

    auto & sinks  = by_kind[LLAMA_KV_KIND_SINK];
    auto & pinned = by_kind[LLAMA_KV_KIND_PINNED];
    auto & recent = by_kind[LLAMA_KV_KIND_RECENT];
    auto & rows   = by_kind[LLAMA_KV_KIND_CHOSEN];

    rows.reserve(cells.get_used());

    for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
        const llama_pos p = cells.pos_get(i);

        if (p < 0) {
            continue;
        }

        by_kind[llama_kv_score_kind(p, pins, n_sink, p1)].push_back(i);
    }

    const uint32_t n_pin = pins.count(n_sink);

    // positions that have been divided share cells: no more of them are safe than the capacity of a layer counts on
    const auto by_pos = [&](uint32_t a, uint32_t b) {
        return cells.pos_get(a) < cells.pos_get(b);
    };

    if (sinks.size() > n_sink) {
        std::stable_sort(sinks.begin(), sinks.end(), by_pos);
        rows.insert(rows.end(), sinks.begin() + n_sink, sinks.end());
    }
    if (pinned.size() > n_pin) {
        std::stable_sort(pinned.begin(), pinned.end(), by_pos);
        rows.insert(rows.end(), pinned.begin() + n_pin, pinned.end());
    }
    if (recent.size() > n_recent) {
        std::stable_sort(recent.begin(), recent.end(), by_pos);
        rows.insert(rows.end(), recent.begin(), recent.end() - n_recent);
    }

    if (rows.size() <= n_evict) {
        return rows;
    }

    std::nth_element(rows.begin(), rows.begin() + n_evict, rows.end(), [&](uint32_t a, uint32_t b) {
        return scores[a] != scores[b] ? scores[a] < scores[b] : cells.pos_get(a) < cells.pos_get(b);
    });

    rows.resize(n_evict);

    return rows;
}
