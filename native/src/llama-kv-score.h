#pragma once

#include "llama-kv-depth-cells.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct ggml_context;
struct ggml_tensor;

// attention that a few sampled queries of one sequence give to the cells of one layer
struct llama_kv_attn {
    // [n_cells] what llama_kv_score_i::build() makes of it
    std::vector<float> mass;

    // [n_queries] positions of the queries, ascending
    std::vector<llama_pos> pos;
};

// the same in the graph of a scoring pass, by query and head
class llama_kv_attn_graph_i {
public:
    virtual ~llama_kv_attn_graph_i() = default;

    ggml_context * ctx = nullptr;

    int64_t n_head_kv = 0;

    ggml_tensor * prob   = nullptr; // F32 [n_kv, n_query*n_gqa, n_head_kv] what each query gives to each cell
    ggml_tensor * weight = nullptr; // F32 [1,    n_query*n_gqa, n_head_kv] 1 for a query that counts, 0 for one that does not

    // F32 [n_kv, 1, n_head_kv] what the queries that count give to each cell, summed
    virtual ggml_tensor * build_mass() = 0;

    // values of a KV head, F32 [n_embd_v, n_kv], and the L1 norm of each, F32 [n_kv]
    virtual ggml_tensor * build_v     (int64_t ih) = 0;
    virtual ggml_tensor * build_v_norm(int64_t ih) = 0;
};

// a token-scoring rule: which cells of a layer are worth keeping
// the cells with the lowest scores are evicted first, sinks, pinned tokens and the recent window never
class llama_kv_score_i {
public:
    virtual ~llama_kv_score_i() = default;

    // false: scoring needs no attention, build() and accumulate() are never called
    virtual bool needs_attn() const { return true; }

    // sample the last queries of a chunk, not some that are spread over it
    virtual bool samples_last() const { return false; }

    // one number for each cell, F32 [n_kv]: by default the attention summed over queries and heads
    virtual ggml_tensor * build(llama_kv_attn_graph_i & attn) const;

    // add what the sampled queries say to cells.acc and cells.cnt, n_tokens: tokens seen since the last call
    virtual void accumulate(llama_kv_depth_cells & cells, const llama_kv_attn & attn, uint32_t n_tokens) const;

    // scores [cells.used_max_p1()], the values for empty cells do not matter
    virtual void score(const llama_kv_depth_cells & cells, int32_t il, std::vector<float> & scores) const = 0;
};

using llama_kv_score_ptr = std::unique_ptr<llama_kv_score_i>;

llama_kv_score_ptr llama_kv_score_init_attention();
llama_kv_score_ptr llama_kv_score_init_window();
llama_kv_score_ptr llama_kv_score_init_streaming();
llama_kv_score_ptr llama_kv_score_init_random();

struct llama_kv_score_info {
    const char * name;
    const char * desc;

    llama_kv_score_ptr (*init)();
};

// every scorer, the default one first
const std::vector<llama_kv_score_info> & llama_kv_score_list();

// nullptr if there is no scorer with that name
llama_kv_score_ptr llama_kv_score_init(const std::string & name);

// names of all scorers, for error messages
std::string llama_kv_score_names();

// why a token is held
enum llama_kv_kind {
    LLAMA_KV_KIND_SINK,
    LLAMA_KV_KIND_PINNED,
    LLAMA_KV_KIND_RECENT,
    LLAMA_KV_KIND_CHOSEN, // for its score
    LLAMA_KV_KIND_COUNT,
};

// of the token at position p, the first that holds. p1: the recent window begins there
llama_kv_kind llama_kv_score_kind(llama_pos p, const llama_kv_depth_spans & pins, uint32_t n_sink, llama_pos p1);

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
