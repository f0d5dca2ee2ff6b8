#include "llama-kv-score.h"

#include <algorithm>

llama_kv_score_ptr llama_kv_score_init(const std::string & name) {
    if (name == "attention") { return llama_kv_score_init_attention(); }
    if (name == "window")    { return llama_kv_score_init_window();    }
    if (name == "streaming") { return llama_kv_score_init_streaming(); }
    if (name == "random")    { return llama_kv_score_init_random();    }

    return nullptr;
}

const char * llama_kv_score_names() {
    return "attention, window, streaming, random";
}

std::vector<uint32_t> llama_kv_score_select(
        const llama_kv_depth_cells & cells,
        const llama_kv_depth_spans & pins,
        const std::vector<float>   & scores,
        uint32_t                     n_sink,
        uint32_t                     n_recent,
        uint32_t                     n_evict) {
    const llama_pos p0 = n_sink;
    const llama_pos p1 = cells.pos_max() + 1 - (llama_pos) n_recent;

    std::vector<uint32_t> rows;
    rows.reserve(cells.get_used());

    std::vector<uint32_t> sinks;
    std::vector<uint32_t> pinned;
    std::vector<uint32_t> recent;

    for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
        const llama_pos p = cells.pos_get(i);

        if (p < 0) {
            continue;
        }

        (p < p0 ? sinks : !pins.empty() && pins.has(p) ? pinned : p >= p1 ? recent : rows).push_back(i);
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
