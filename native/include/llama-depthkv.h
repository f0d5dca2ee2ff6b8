// Per-layer KV capacity and token eviction for llama.cpp.
//
// Additive to llama.h: no upstream struct or function changes. A context gets a depth KV cache when
//   - it is created with llama_depthkv_init_from_model(), or
//   - the model carries the key `depthkv.budget`: in the file, as a fraction, or as a key-value override, as a fraction
//     or as text.
// Otherwise the stock cache runs and the functions below report on it where that makes sense.
//
// A "cell" is one K row and one V row of one layer. The full cache has n_ctx cells per layer, a depth cache has
// fewer, and frees the least important ones of a layer when that layer has to hold new tokens.

#pragma once

#include "llama.h"

#include <stddef.h>
#include <stdint.h>
#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

// changes whenever a struct or a function below does
#define LLAMA_DEPTHKV_VERSION 9

// the version that the library was built with: structs are passed by value, so check it before anything else
LLAMA_API int32_t llama_depthkv_version(void);

// the reason why the last call on this thread failed: one line, empty if nothing failed
// loading a model with bad keys and llama_init_from_model() leave it here too
LLAMA_API const char * llama_depthkv_last_error(void);
LLAMA_API void         llama_depthkv_clear_error(void);

//
// rules
//

struct llama_depthkv_rule {
    const char * name;
    const char * desc;
    bool         needs_attn; // of a token-scoring rule: it judges by attention
};

// token-scoring rules, the default one first, and allocation rules. false: there is no i-th
LLAMA_API bool llama_depthkv_get_scorer(int32_t i, struct llama_depthkv_rule * rule);
LLAMA_API bool llama_depthkv_get_alloc (int32_t i, struct llama_depthkv_rule * rule);

//
// budget
//
// how much of the full cache a context may have, as text:
//   "0.4", "40%"   a share of it, above 0 and at most 1
//   "96MiB"        bytes of K and V, all layers and sequences (kB, MB, GB, KiB, MiB, GiB)
//   "4096t"        tokens that a layer holds, on average, all sequences
//   "auto"         the largest that fits the memory, for llama_depthkv_plan() only
//

enum llama_depthkv_budget_type {
    LLAMA_DEPTHKV_BUDGET_FRACTION = 0,
    LLAMA_DEPTHKV_BUDGET_BYTES    = 1,
    LLAMA_DEPTHKV_BUDGET_TOKENS   = 2,
    LLAMA_DEPTHKV_BUDGET_AUTO     = 3,
};

struct llama_depthkv_budget {
    enum llama_depthkv_budget_type type;
    double                         value;
};

LLAMA_API bool llama_depthkv_budget_parse(const char * text, struct llama_depthkv_budget * budget);

//
// context
//

struct llama_depthkv_params {
    // see above; NULL: the model's `depthkv.budget`, or the full cache when it has none
    const char * budget;

    // of llama_depthkv_plan(): bytes that everything has to fit; 0: no limit, with "auto" llama_depthkv_memory_free()
    size_t memory;

    // token-scoring rule, see llama_depthkv_get_scorer(); NULL: the model's, or the default one
    const char * scorer;

    // allocation rule, see llama_depthkv_get_alloc(); NULL: the model's, or "optimal" if it is calibrated
    const char * rule;

    // tokens never evicted at the front and at the end of a sequence; negative: the model's, or 4 and 32
    int32_t n_sink;
    int32_t n_recent;

    // optional explicit plan, one entry for each KV layer that grows with the context (see llama_depthkv_layer_count)
    // 0 cells or GGML_TYPE_COUNT: what the budget, or the context parameters, give
    size_t                 n_layers;
    const uint32_t       * cells;  // cells of one sequence
    const enum ggml_type * type_k;
    const enum ggml_type * type_v;
};

LLAMA_API struct llama_depthkv_params llama_depthkv_default_params(void);

// llama_init_from_model() with an explicit plan that takes precedence over the model's keys
// returns NULL on failure, with the reason in llama_depthkv_last_error()
LLAMA_API struct llama_context * llama_depthkv_init_from_model(
        struct llama_model          * model,
        struct llama_context_params   params,
        struct llama_depthkv_params   depth);

// number of layers whose KV cells grow with the context, and their index in the model
// -1 if per-layer eviction is not defined for the model: llama_depthkv_last_error() names the architecture
LLAMA_API int32_t llama_depthkv_layer_count(const struct llama_model * model);
LLAMA_API int32_t llama_depthkv_layer_id   (const struct llama_model * model, int32_t i);

//
// statistics
//

struct llama_depthkv_layer {
    int32_t  layer;     // index in the model
    uint32_t cells;     // capacity of one sequence
    uint32_t used;      // cells in use by the sequence
    uint64_t evicted;   // cells freed by eviction since the layer last held all of the sequence
    size_t   bytes;     // K and V of all sequences

    // of the cells in use those that eviction leaves alone, the first reason that holds. the others are held for their scores
    uint32_t sinks;     // at the front of the sequence
    uint32_t pinned;
    uint32_t recent;    // at its end
};

struct llama_depthkv_stats {
    bool     active;        // false: the stock cache runs
    float    budget;        // fraction of the full cache that the layers share, in (0, 1]
    int32_t  n_layers;
    uint32_t n_ctx_seq;     // positions of one sequence
    uint32_t n_ubatch;      // most tokens of a sequence at once, fewer where what is pinned leaves less room
    size_t   bytes;         // K and V allocated, all layers and sequences, SWA layers included
    size_t   bytes_full;    // the same for the full cache
    size_t   bytes_scorer;  // query samples, and the buffers that scoring and context shifts compute in: all there from the start
    size_t   bytes_compute; // temporary buffers of all backends, for the largest ubatch
    size_t   bytes_work;    // bound of what the CPU backend needs beside them to convert operands
    size_t   bytes_weights; // tensors of the model
    size_t   bytes_other;   // about what a process takes beside all that: records of the cells, logits, graphs
    size_t   bytes_device;  // of all these what lies in memory that devices have for themselves, and the process does not take
    uint64_t n_score;       // scoring passes
    uint64_t n_evict;       // cells freed by eviction, all layers
    uint64_t n_reeval;      // tokens to be evaluated again after llama_depthkv_seq_rollback()
    int64_t  t_evict_us;    // time spent on scoring and eviction
    char     scorer[32];
    char     rule[32];      // allocation rule
    char     calibrated[32]; // scorer that the model's layers were calibrated with, empty: they were not
};

LLAMA_API bool llama_depthkv_get_stats(const struct llama_context * ctx, struct llama_depthkv_stats * stats);

// i: 0 .. n_layers - 1
LLAMA_API bool llama_depthkv_get_layer(
        const struct llama_context       * ctx,
        int32_t                            i,
        llama_seq_id                       seq_id,
        struct llama_depthkv_layer       * layer);

// positions that layer i holds for the sequence, ascending; returns how many there are (writes at most n)
LLAMA_API int32_t llama_depthkv_get_positions(
        const struct llama_context * ctx,
        int32_t                      i,
        llama_seq_id                 seq_id,
        llama_pos                  * pos,
        int32_t                      n);

//
// plan
//

// bytes that this process may take: nine tenths of what can be had without swapping, within the limit of its control group
// 0 if that is not known
LLAMA_API size_t llama_depthkv_memory_free(void);

// the statistics that a context would have when it is empty, and of its layers at most n. nothing is allocated
//
// on a model that was loaded without weights (llama_model_params::no_alloc) they are complete, and depth.memory may be
// given: the ubatch, and with "auto" the budget, become such that weights, cells and buffers fit it together, and what
// devices hold fits nine tenths of what is free there. a context with the returned n_ubatch, and with the returned
// budget in place of "auto", is that plan
// on a model with weights the sizes of buffers are 0
//
//  0: there is a plan
//  1: it does not fit memory, or a device: llama_depthkv_last_error() says which. the statistics are those of the least
//     that would do, or, if it was not to fit memory, of what was asked for
// -1: there is none, llama_depthkv_last_error() says why
LLAMA_API int32_t llama_depthkv_plan(
        struct llama_model          * model,
        struct llama_context_params   params,
        struct llama_depthkv_params   depth,
        struct llama_depthkv_stats  * stats,
        struct llama_depthkv_layer  * layers,
        int32_t                       n);

//
// going back
//
// what a layer has evicted does not come back when the tokens that took its place are removed. so llama_memory_seq_rm()
// removes the end of a sequence only while a fresh evaluation could have left what is left: nothing of it has been evicted
// since the removed tokens came, or nothing of it is missing. otherwise it returns false and changes nothing
//
// the tokens of one llama_decode() can always be removed, if they are no more than llama_depthkv_stats::n_ubatch
//

// the last position <= p that the sequence can go back to: llama_memory_seq_rm(mem, seq_id, pos, -1) succeeds
// without a budget that is p. negative on failure
LLAMA_API llama_pos llama_depthkv_seq_pos_rollback(const struct llama_context * ctx, llama_seq_id seq_id, llama_pos p);

// go back to p, or as little further as possible: removes the positions from the returned one on
// the caller evaluates the tokens between the returned position and p again: what was pinned among them still is
// negative on failure
LLAMA_API llama_pos llama_depthkv_seq_rollback(struct llama_context * ctx, llama_seq_id seq_id, llama_pos p);

//
// pinning
//

// never evict positions [p0, p1) of the sequence, whether or not they hold a token yet
// a position shift moves the span along, removing the tokens removes it
// false if the pinned tokens would leave no room for the recent window and a ubatch of 32 tokens
LLAMA_API bool llama_depthkv_pin  (struct llama_context * ctx, llama_seq_id seq_id, llama_pos p0, llama_pos p1);
LLAMA_API void llama_depthkv_unpin(struct llama_context * ctx, llama_seq_id seq_id);

//
// evicting
//

// layer i evicts what it holds of the sequence but for pos [n], what is pinned and the last token
// to measure what a layer loses, or to choose by a rule of one's own between two calls of llama_decode()
// false, and nothing is changed, on failure: without a budget no layer can
LLAMA_API bool llama_depthkv_seq_keep(
        struct llama_context * ctx,
        int32_t                i,
        llama_seq_id           seq_id,
        const llama_pos      * pos,
        int32_t                n);

//
// allocation (pure)
//

struct llama_depthkv_alloc_params {
    const char * rule;         // see llama_depthkv_get_alloc(); NULL: "optimal" if there are curves, else "uniform"

    uint32_t n_layers;
    uint32_t n_ctx;            // positions of one sequence
    double   budget;           // fraction of the bytes of n_layers*n_ctx cells, in (0, 1]

    uint32_t n_floor;          // least cells of a layer
    uint32_t n_align;          // granularity of a layer, in cells

    // optional: what pruning a single layer costs, as in `depthkv.keep_ratios` and `depthkv.sensitivity`
    uint32_t      n_ratios;
    const float * keep_ratios; // [n_ratios] ascending, in (0, 1]
    const float * sensitivity; // [n_layers*n_ratios] row-major by layer, not increasing with the keep ratio

    const uint64_t * cell_bytes; // [n_layers] bytes of a cell of each layer; NULL: all the same
};

// cells [n_layers]: capacity of each layer, a multiple of n_align (or n_ctx), whose bytes do not exceed the budget
// a larger budget never gives a layer fewer cells
// false, with the reason in llama_depthkv_last_error(), if the budget is out of range or below the floor, or if the rule
// is unknown or needs curves that are missing or nonsense
LLAMA_API bool llama_depthkv_alloc(struct llama_depthkv_alloc_params params, uint32_t * cells);

//
// keys
//

// whether the keys `depthkv.*` of a GGUF are whole and sound; false, with a line in llama_depthkv_last_error() that names the
// key. a file without them is sound. the model is not loaded
LLAMA_API bool llama_depthkv_check_file(const char * path);

//
// simulation (pure)
//
// which tokens of a text a layer would hold, by the code of the cache and without a model: what eviction costs can be measured
// with it where the attention comes from, in calibration. for each ubatch:
//
//   n = llama_depthkv_sim_queries(sim, n_tokens, pos, n_max);
//   if (n > 0) { llama_depthkv_sim_count(sim, mass); }   // attention of these queries to the held tokens
//   llama_depthkv_sim_evict(sim, n_tokens);
//   llama_depthkv_sim_positions(sim, pos, n_max);        // held while the ubatch runs, beside its own tokens
//   llama_depthkv_sim_add(sim, n_tokens);
//

// numbers that the cache goes by
struct llama_depthkv_constants {
    uint32_t n_sink;           // tokens never evicted at the front and at the end of a sequence, by default
    uint32_t n_recent;
    uint32_t n_align;          // granularity of a layer on a CPU, in cells
    uint32_t n_ubatch_min;     // tokens of a ubatch that a layer must have room for
    uint32_t n_query_span;     // tokens of a prompt that a scoring pass covers
    uint32_t n_warmup;         // tokens before its first eviction that a layer counts attention
};

LLAMA_API struct llama_depthkv_constants llama_depthkv_get_constants(void);

// tokens of a ubatch, from the cells of the smallest layer and with the default sinks and recent tokens
LLAMA_API uint32_t llama_depthkv_n_ubatch(uint32_t n_cells_min, uint32_t n_ubatch_max);

struct llama_depthkv_sim;

// layer: index in the model, n_cells: of one sequence
// NULL, with the reason in llama_depthkv_last_error(), if the scorer is unknown or the layer has no room for a ubatch
LLAMA_API struct llama_depthkv_sim * llama_depthkv_sim_init(
        const char * scorer,
        int32_t      layer,
        uint32_t     n_cells,
        uint32_t     n_sink,
        uint32_t     n_recent);

LLAMA_API void llama_depthkv_sim_free(struct llama_depthkv_sim * sim);

// positions of the queries that are counted before n_tokens more come, ascending; returns how many (writes at most n)
LLAMA_API int32_t llama_depthkv_sim_queries(const struct llama_depthkv_sim * sim, uint32_t n_tokens, llama_pos * pos, int32_t n);

// all queries that have not been counted yet, whether or not it is time
LLAMA_API int32_t llama_depthkv_sim_pending(const struct llama_depthkv_sim * sim, llama_pos * pos, int32_t n);

// mass: what the pending queries say of each held position, in the order of llama_depthkv_sim_positions()
LLAMA_API void llama_depthkv_sim_count(struct llama_depthkv_sim * sim, const float * mass);

// make room for n_tokens
LLAMA_API void llama_depthkv_sim_evict(struct llama_depthkv_sim * sim, uint32_t n_tokens);

// the next n_tokens of the text: there is room
LLAMA_API void llama_depthkv_sim_add(struct llama_depthkv_sim * sim, uint32_t n_tokens);

// positions that the layer holds, ascending; returns how many (writes at most n)
LLAMA_API int32_t llama_depthkv_sim_positions(const struct llama_depthkv_sim * sim, llama_pos * pos, int32_t n);

// of n_tokens that come together those whose queries are sampled, ascending; returns how many (writes at most n)
// -1 if the scorer is unknown
LLAMA_API int32_t llama_depthkv_sim_sample(const char * scorer, uint32_t n_tokens, uint32_t * idxs, int32_t n);

#ifdef __cplusplus
}
#endif
