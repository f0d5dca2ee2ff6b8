#pragma once

#include "llama-kv-score.h"

#include <cstdint>
#include <vector>

// when a layer evicts, how many cells, and which queries judge them: the cache (llama_kv_cache_depth) and the simulation of a
// layer (llama_depthkv_sim) decide here. no tensor is needed for it

// tokens never evicted at the front and at the end of a sequence, unless the model or the user asks for other numbers
static constexpr uint32_t llama_kv_n_sink   = 4;
static constexpr uint32_t llama_kv_n_recent = 32;

// queries sampled for scoring: so many of them are kept, and they cover so many tokens of a prompt, or of a text that is
// decoded a token at a time, where a scoring pass weighs more
static constexpr uint32_t llama_kv_n_query         = 32;
static constexpr uint32_t llama_kv_n_query_span_pp = 128;
static constexpr uint32_t llama_kv_n_query_span_tg = 512;

// a layer counts attention this many tokens before it first has to evict, so that the first choice is not a blind one
static constexpr uint32_t llama_kv_n_warmup = 512;

// granularity of a layer, in cells
static constexpr uint32_t llama_kv_n_align = 32;

// least tokens of a ubatch that a layer must have room for, and the granularity of the ubatch
static constexpr uint32_t llama_kv_n_ubatch_min = 32;

// tokens of a ubatch, from the cells of the smallest layer
// n_safe: tokens of a layer that are never evicted
uint32_t llama_kv_evict_n_ubatch(uint32_t n_cells_min, uint32_t n_safe, uint32_t n_ubatch_max);

// of the next n_tokens of a sequence those whose queries are sampled, ascending
std::vector<uint32_t> llama_kv_evict_sample(const llama_kv_score_i & score, uint32_t n_tokens);

// the sampled queries of one sequence, in the rows of a ring
struct llama_kv_queries {
    std::vector<llama_pos> pos = std::vector<llama_pos>(llama_kv_n_query, -1); // -1: none

    // row of the next one
    uint32_t head = 0;

    // tokens seen one at a time, of which only every few is kept as a sample
    uint32_t skip = 0;

    // row of a query at position p, one of n_tokens that come together
    uint32_t add(const llama_kv_score_i & score, llama_pos p, uint32_t n_tokens);

    // positions after p, ascending
    std::vector<llama_pos> after(llama_pos p) const;
};

// rows that a layer is to have free before it takes n_tokens more
// one token at a time, layers take turns: each frees as many as it takes until its next one, so that no token waits for all
uint32_t llama_kv_evict_n_free(const llama_kv_depth_cells & cells, int32_t il, uint32_t n_tokens);

// the queries that a layer has not counted yet are counted before it takes n_tokens more
bool llama_kv_evict_is_due(const llama_kv_depth_cells & cells, int32_t il, uint32_t n_tokens);

// count what they say. a broken value shows in its own cell
void llama_kv_evict_count(const llama_kv_score_i & score, llama_kv_depth_cells & cells, const llama_kv_attn & attn);

// rows to free so that the layer has llama_kv_evict_n_free()
std::vector<uint32_t> llama_kv_evict_select(
        const llama_kv_score_i     & score,
        const llama_kv_depth_cells & cells,
        const llama_kv_depth_spans & pins,
        int32_t                      il,
        uint32_t                     n_sink,
        uint32_t                     n_recent,
        uint32_t                     n_tokens);
