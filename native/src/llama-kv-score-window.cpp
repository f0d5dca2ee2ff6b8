#include "llama-kv-score.h"

#include <algorithm>
#include <cmath>

// attention given by the latest queries only, after SnapKV (arXiv 2404.14469)
// not faithful to it: one choice for all heads of a layer, and repeated whenever the layer has to evict
class llama_kv_score_window : public llama_kv_score_i {
public:
    bool samples_last() const override {
        return true;
    }

    void accumulate(llama_kv_depth_cells & cells, const llama_kv_attn & attn, uint32_t n_tokens) const override {
        GGML_UNUSED(n_tokens);

        for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
            // a broken value costs its neighbours nothing
            cells.acc[i] = std::isfinite(attn.mass[i]) ? attn.mass[i] : 0.0f;
        }
    }

    void score(const llama_kv_depth_cells & cells, int32_t il, std::vector<float> & scores) const override {
        GGML_UNUSED(il);

        // neighbours of an important token are kept with it: max pooling over 7 consecutive positions, as in SnapKV
        const int n_pool = 3;

        const llama_pos p0    = std::max(0, cells.pos_min());
        const llama_pos n_pos = cells.pos_max() + 1 - p0;

        std::vector<float> by_pos(n_pos, 0.0f);
        for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
            if (!cells.is_empty(i)) {
                by_pos[cells.pos_get(i) - p0] = cells.acc[i];
            }
        }

        scores.assign(cells.used_max_p1(), 0.0f);

        for (uint32_t i = 0; i < scores.size(); ++i) {
            if (cells.is_empty(i)) {
                continue;
            }

            const llama_pos p = cells.pos_get(i) - p0;

            for (llama_pos j = std::max(0, p - n_pool); j < std::min(n_pos, p + n_pool + 1); ++j) {
                scores[i] = std::max(scores[i], by_pos[j]);
            }
        }
    }
};

llama_kv_score_ptr llama_kv_score_init_window() {
    return std::make_unique<llama_kv_score_window>();
}
