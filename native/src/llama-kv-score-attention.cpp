#include "llama-kv-score.h"

#include <cmath>
#include <limits>

// accumulated attention, decayed, divided by how many queries could have attended, weighted by the value norm:
//
//   s(c) = |V(c)|_1 * a(c) / n(c)
//   a(c) <- d*a(c) + attention given to c by the sampled queries
//   n(c) <- d*n(c) + number of sampled queries that could see c
//
// the accumulation is that of H2O (arXiv 2306.14048), the division by n removes its bias towards old tokens: an old
// token has been attended by more queries than a young one
class llama_kv_score_attention : public llama_kv_score_i {
public:
    const char * name() const override {
        return "attention";
    }

    bool needs_attn() const override {
        return true;
    }

    bool weights_value() const override {
        return true;
    }

    bool samples_last() const override {
        return false;
    }

    void accumulate(llama_kv_depth_cells & cells, const llama_kv_attn & attn, uint32_t n_tokens) const override {
        const float d = powf(0.5f, n_tokens/n_half_life);

        for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
            const llama_pos p = cells.pos_get(i);
            if (p < 0) {
                continue;
            }

            const auto n_seen = attn.pos.end() - std::lower_bound(attn.pos.begin(), attn.pos.end(), p);

            // a broken value goes first, and costs the others nothing
            if (!std::isfinite(attn.mass[i])) {
                cells.acc[i] = -std::numeric_limits<float>::max();
                cells.cnt[i] = 1.0f;
                continue;
            }

            cells.acc[i] = d*cells.acc[i] + attn.mass[i];
            cells.cnt[i] = d*cells.cnt[i] + n_seen;
        }
    }

    void score(const llama_kv_depth_cells & cells, int32_t il, std::vector<float> & scores) const override {
        GGML_UNUSED(il);

        scores.resize(cells.used_max_p1());

        for (uint32_t i = 0; i < scores.size(); ++i) {
            // a token that no query has judged yet is not to be evicted before one has
            scores[i] = cells.cnt[i] > 0.0f ? cells.acc[i]/cells.cnt[i] : std::numeric_limits<float>::infinity();
        }
    }

private:
    // tokens after which an observation counts half
    const float n_half_life = 256.0f;
};

llama_kv_score_ptr llama_kv_score_init_attention() {
    return std::make_unique<llama_kv_score_attention>();
}
