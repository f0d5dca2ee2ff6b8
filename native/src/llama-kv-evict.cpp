#include "llama-kv-evict.h"

#include <algorithm>
#include <cmath>
#include <limits>

// tokens freed at once while decoding, so that most steps do not have to evict at all
static constexpr uint32_t n_evict_batch = 64;

// but not more than a small layer can spare
static uint32_t llama_kv_evict_n_batch(const llama_kv_depth_cells & cells) {
    return std::min(n_evict_batch, std::max(cells.size()/32, 1u));
}

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

// 39 and 64 have no common divisor, and their ratio is near the golden one: the turns of any number of layers lie apart
static uint32_t llama_kv_evict_n_since_turn(const llama_kv_depth_cells & cells, int32_t il) {
    const uint32_t n_batch = llama_kv_evict_n_batch(cells);

    return (cells.pos_max() + 1 + (il*39u)%64u*n_batch/64u)%n_batch;
}

uint32_t llama_kv_evict_n_free(const llama_kv_depth_cells & cells, int32_t il, uint32_t n_tokens) {
    if (n_tokens != 1) {
        return n_tokens;
    }

    const uint32_t n_since = llama_kv_evict_n_since_turn(cells, il);

    // a layer may have room for all that will ever come
    const bool is_turn = n_since == 0 && cells.n_evicted > 0;
    const bool is_full = cells.get_used() == cells.size();

    return is_turn || is_full ? llama_kv_evict_n_batch(cells) - n_since : 1;
}

bool llama_kv_evict_is_due(const llama_kv_depth_cells & cells, int32_t il, uint32_t n_tokens) {
    const uint32_t  n_free = cells.size() - cells.get_used();
    const llama_pos n_new  = cells.pos_max() - cells.pos_scored;

    if (n_free < n_tokens && !cells.is_scored) {
        return true;
    }
    if (n_tokens > 1) {
        return n_free < n_tokens + llama_kv_n_warmup && n_new >= (llama_pos) llama_kv_n_query_span_pp;
    }

    // in its turn, and before it first has to evict
    return n_free < llama_kv_evict_n_batch(cells) && llama_kv_evict_n_since_turn(cells, il) == 0 &&
        (n_new >= (llama_pos) llama_kv_n_query_span_tg || !cells.is_scored);
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
    const uint32_t n_need = llama_kv_evict_n_free(cells, il, n_tokens);

    if (n_free >= n_need) {
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

    uint32_t n_evict = n_need - n_free;

    // a few cells more than needed, of a batch that is hardly larger than a token
    if (n_tokens > 1) {
        n_evict = std::max(n_evict, llama_kv_evict_n_batch(cells));
    }

    return llama_kv_score_select(cells, pins, scores, n_sink, n_recent, n_evict);
}
