#pragma once

#include "llama-kv-depth-cells.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

// attention that a few sampled queries of one sequence give to the cells of one layer
struct llama_kv_attn {
    // [n_cells] attention summed over heads and queries, times the L1 norm of the value if the scorer asks for it
    std::vector<float> mass;

    // [n_queries] positions of the queries, ascending
    std::vector<llama_pos> pos;
};

// a token-scoring rule: which cells of a layer are worth keeping
// the cells with the lowest scores are evicted first, sinks, pinned tokens and the recent window never
class llama_kv_score_i {
public:
    virtual ~llama_kv_score_i() = default;

    virtual const char * name() const = 0;

    // false: scoring needs no attention, accumulate() is never called
    virtual bool needs_attn() const = 0;

    // weight the attention by the L1 norm of the value
    virtual bool weights_value() const = 0;

    // sample the last queries of a chunk, not some that are spread over it
    virtual bool samples_last() const = 0;

    // add what the sampled queries say to cells.acc and cells.cnt, n_tokens: tokens seen since the last call
    virtual void accumulate(llama_kv_depth_cells & cells, const llama_kv_attn & attn, uint32_t n_tokens) const = 0;

    // scores [cells.used_max_p1()], the values for empty cells do not matter
    virtual void score(const llama_kv_depth_cells & cells, int32_t il, std::vector<float> & scores) const = 0;
};

using llama_kv_score_ptr = std::unique_ptr<llama_kv_score_i>;

llama_kv_score_ptr llama_kv_score_init_attention();
llama_kv_score_ptr llama_kv_score_init_window();
llama_kv_score_ptr llama_kv_score_init_streaming();
llama_kv_score_ptr llama_kv_score_init_random();

// nullptr if there is no scorer with that name
llama_kv_score_ptr llama_kv_score_init(const std::string & name);

// names of all scorers, for error messages
const char * llama_kv_score_names();

// choose n_evict rows of the layer to free: the lowest scores, the older token first among equals
// tokens before n_sink, the last n_recent ones and pinned ones are safe
// fewer rows are returned if there is not enough to choose from
std::vector<uint32_t> llama_kv_score_select(
        const llama_kv_depth_cells & cells,
        const llama_kv_depth_spans & pins,
        const std::vector<float>   & scores,
        uint32_t                     n_sink,
        uint32_t                     n_recent,
        uint32_t                     n_evict);
