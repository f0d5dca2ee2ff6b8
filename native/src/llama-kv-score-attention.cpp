#include "llama-kv-score.h"

#include "ggml.h"

#include <algorithm>
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
    ggml_tensor * build(llama_kv_attn_graph_i & attn) const override {
        ggml_tensor * mass = attn.build_mass();

        ggml_tensor * res = nullptr;

        // a head at a time: its values are needed in F32, all of them would be as large as the cache
        for (int64_t ih = 0; ih < attn.n_head_kv; ++ih) {
            ggml_tensor * cur = ggml_view_1d(attn.ctx, mass, mass->ne[0], ih*mass->nb[2]);

            cur = ggml_mul(attn.ctx, attn.build_v_norm(ih), cur);

            res = res ? ggml_add(attn.ctx, res, cur) : cur;
        }

        return res;
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
