#include "llama-kv-evict.h"

#include <algorithm>
#include <cmath>
#include <limits>

// tokens freed at once while decoding, so that most steps do not have to evict at all
static constexpr uint32_t n_evict_batch = 64;

// a ubatch costs capacity: that many cells of every layer are free before it runs. small ones keep more of the past,
// large ones run faster. half of the smallest layer costs little of either (docs/engine.md)
// a power of two: batches of the usual sizes are cut into equal parts, at the same places when a sequence goes back
uint32_t llama_kv_evict_n_ubatch(uint32_t n_cells_min, uint32_t n_safe, uint32_t n_ubatch_max) {
    uint32_t res = llama_kv_n_ubatch_min;
    while (2*res <= n_cells_min/2) {
        res *= 2;
    }

    res = std::min(res, n_ubatch_max);
    res = std::min(res, n_cells_min - n_safe);

    return res;
}

std::vector<uint32_t> llama_kv_evict_sample(const llama_kv_score_i & score, uint32_t n_tokens) {
    const uint32_t n_skip = llama_kv_n_query_span_pp/llama_kv_n_query;
    const uint32_t n_q    = std::min(llama_kv_n_query, (n_tokens + n_skip - 1)/n_skip);

    std::vector<uint32_t> res(n_q);

    for (uint32_t i = 0; i < n_q; ++i) {
        // the last token is always one of them: every token is seen by a query
        res[i] = score.samples_last() ? n_tokens - n_q + i : (i + 1)*n_tokens/n_q - 1;
    }

    return res;
}

uint32_t llama_kv_queries::add(const llama_kv_score_i & score, llama_pos p, uint32_t n_tokens) {
    const uint32_t res = head;

    pos[res] = p;

    // one token at a time, a row is overwritten until it holds the sample to keep
    if (n_tokens > 1 || ++skip >= llama_kv_n_query_span_tg/llama_kv_n_query || score.samples_last()) {
        skip = 0;
        head = (res + 1)%llama_kv_n_query;
    }

    return res;
}

std::vector<llama_pos> llama_kv_queries::after(llama_pos p) const {
    std::vector<llama_pos> res;

    for (const llama_pos q : pos) {
        if (q > p) {
            res.push_back(q);
        }
    }

    std::sort(res.begin(), res.end());

    return res;
}

bool llama_kv_evict_is_due(const llama_kv_depth_cells & cells, uint32_t n_tokens) {
    const uint32_t n_free = cells.size() - cells.get_used();

    if (n_free >= n_tokens + (n_tokens > 1 ? llama_kv_n_warmup : 0)) {
        return false;
    }

    const llama_pos n_new  = cells.pos_max() - cells.pos_scored;
    const llama_pos n_span = n_tokens > 1 ? llama_kv_n_query_span_pp : llama_kv_n_query_span_tg;

    return n_new >= n_span || (n_free < n_tokens && !cells.is_scored);
}

void llama_kv_evict_count(const llama_kv_score_i & score, llama_kv_depth_cells & cells, const llama_kv_attn & attn) {
    score.accumulate(cells, attn, attn.pos.back() - std::max(cells.pos_scored, 0));

    cells.pos_scored = attn.pos.back();
    cells.is_scored  = true;
}

std::vector<uint32_t> llama_kv_evict_select(
        const llama_kv_score_i     & score,
        const llama_kv_depth_cells & cells,
        const llama_kv_depth_spans & pins,
        int32_t                      il,
        uint32_t                     n_sink,
        uint32_t                     n_recent,
        uint32_t                     n_tokens) {
    const uint32_t n_free = cells.size() - cells.get_used();

    if (n_free >= n_tokens) {
        return {};
    }

    std::vector<float> scores;
    score.score(cells, il, scores);

    // a broken key or value must not break the order of the others
    for (auto & x : scores) {
        if (std::isnan(x)) {
            x = -std::numeric_limits<float>::infinity();
        }
    }

    // a few cells more than needed while decoding, but not more than a small layer can spare
    const uint32_t n_evict = std::max(n_tokens - n_free, std::min(n_evict_batch, cells.size()/32));

    return llama_kv_score_select(cells, pins, scores, n_sink, n_recent, n_evict);
}
