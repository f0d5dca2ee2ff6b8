#include "llama-kv-score.h"

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
        const llama_kv_depth_pins  & pins,
        const std::vector<float>   & scores,
        uint32_t                     n_sink,
        uint32_t                     n_recent,
        uint32_t                     n_evict) {
    const llama_pos p0 = n_sink;
    const llama_pos p1 = cells.pos_max() + 1 - (llama_pos) n_recent;

    std::vector<uint32_t> rows;
    rows.reserve(cells.get_used());

    for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
        const llama_pos p = cells.pos_get(i);

        if (p >= p0 && p < p1 && (pins.empty() || !pins.has(p))) {
            rows.push_back(i);
        }
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
