#pragma once

#include "llama-batch.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-depth-cells.h"
#include "llama-kv-depth-plan.h"
#include "llama-kv-depth-sched.h"
#include "llama-kv-evict.h"
#include "llama-kv-score.h"
#include "llama-memory.h"

#include <array>
#include <unordered_map>
#include <vector>

struct llama_cparams;
struct llama_hparams;
struct llama_model;
struct llama_context;

//
// llama_kv_cache_depth
//

// a KV cache of its own size for every layer
//
//   logical context: n_ctx positions        physical cells: cells[il] per layer
//
// evicting a token in a layer frees its cell there. no K or V row moves: kept keys keep their rotary position, the next
// token is scattered into the hole by ggml_set_rows. before a ubatch runs, every layer frees enough cells to hold it, so
// memory is bounded at every moment, prefill included
//
// one stream per sequence: a cell belongs to one sequence, so its position alone decides who may attend to it
//
// layers with a sliding window are bounded already, they stay in a llama_kv_cache_iswa
class llama_kv_cache_depth : public llama_memory_i {
public:
    llama_kv_cache_depth(
            const llama_model         & model,
            const llama_kv_depth_plan & plan,
            const llama_memory_params & params,
            const llama_cparams       & cparams,
            const layer_filter_cb     & filter,
            const layer_reuse_cb      & reuse);

    ~llama_kv_cache_depth() = default;

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) override;

    llama_memory_context_ptr init_full() override;

    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override;

    void clear(bool data) override;

    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    // state write/load

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // llama_kv_cache_depth specific API
    //

    // where the tokens of one ubatch go, decided by llama_kv_cache_depth_context::apply()
    struct slot_info {
        // streams [s0, s0 + n_stream), the same number of tokens in each
        uint32_t s0       = 0;
        uint32_t n_stream = 1;
        uint32_t n_tps    = 0;

        // some sequence of the ubatch has lost tokens, so its logits are not those of the full cache
        bool evicted = false;

        std::vector<uint32_t> n_kv; // [n_layers]                    rows that attention reads
        std::vector<uint32_t> rows; // [n_layers][n_stream][n_tps]   rows of the tokens

        std::vector<uint32_t> q_idxs; // [n_stream][n_q] sampled queries: index in the ubatch
        std::vector<uint32_t> q_rows; // [n_stream][n_q] ..             row in the layer's query samples
    };

    struct kv_layer {
        // layer index in the model
        uint32_t il;

        uint32_t n_cells;

        ggml_tensor * k; // [n_embd_k_gqa, n_cells, n_stream]
        ggml_tensor * v; // [n_embd_v_gqa, n_cells, n_stream]
        ggml_tensor * q; // [n_embd_q, llama_kv_n_query, n_stream] sampled queries, nullptr if the scorer needs none

        // K and V are stored rotated (see llama_kv_cache::attn_rot_k), sizes of the rotation, 0: none
        uint32_t n_rot_k;
        uint32_t n_rot_v;

        std::vector<llama_kv_depth_cells> cells; // [n_stream]
    };

    // the attention of a layer as the graph has it
    struct attn_params {
        float         kq_scale = 0.0f; // 0: the graph leaves the layer out
        ggml_tensor * sinks    = nullptr;
    };

    const llama_kv_depth_plan & get_plan() const { return plan; }

    uint32_t get_n_stream() const { return n_stream; }

    // most tokens of a sequence in a ubatch: as planned, or what pinned tokens leave of the layers
    uint32_t get_n_ubatch() const;
    bool     get_v_trans()  const { return v_trans;  }

    const std::vector<kv_layer> & get_layers() const { return layers; }

    // layer whose cells model layer il reads
    const kv_layer & get_layer(int32_t il) const { return layers[map_layer_ids.at(il)]; }

    // [n_layers] of the graph that is about to run, for the scoring pass
    void set_attn(const std::vector<attn_params> & params);

    const attn_params & get_attn(const kv_layer & layer) const { return layer_attn[&layer - layers.data()]; }

    // cells that a sequence uses, by why it holds them
    std::array<uint32_t, LLAMA_KV_KIND_COUNT> count_kinds(const kv_layer & layer, uint32_t strm) const;

    // the SWA layers, nullptr if the model has none
    llama_kv_cache_iswa * get_iswa() const { return kv_iswa.get(); }

    const llama_cparams & get_cparams() const { return cparams; }

    // see llama_depthkv_seq_pos_rollback() and llama_depthkv_seq_rollback()
    llama_pos seq_pos_rollback(llama_seq_id seq_id, llama_pos p) const;
    llama_pos seq_rollback    (llama_seq_id seq_id, llama_pos p);

    // bytes of K and V, SWA layers included, and of the eviction state
    size_t size_kv_bytes()     const;
    size_t size_scorer_bytes() const;

    // see llama_depthkv_pin(), throws one line if the layers have no room left
    void seq_pin  (llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    void seq_unpin(llama_seq_id seq_id);

    // see llama_depthkv_seq_keep(). pos: ascending
    void evict_except(uint32_t i, llama_seq_id seq_id, const std::vector<llama_pos> & pos);

    // bring every layer to hold the ubatch: evict where there is no room, then place the tokens
    // n_room [n_stream]: tokens of the sequences that evict at once, so that all of them can be taken back
    // after a failure nothing has been placed
    ggml_status apply_ubatch(const llama_ubatch & ubatch, const std::vector<uint32_t> & n_room, slot_info & sinfo);

    // the ubatch has been computed
    void commit_ubatch(const llama_ubatch & ubatch);

    // slot info of a full cache, to reserve the worst-case graph
    slot_info get_slot_full() const;

    // rotate the keys of the cells that have been shifted
    bool update();

    // allocate what eviction and shifts compute with, called when the backends are known. throws if there is not enough memory
    void reserve(llama_context * lctx);

    // attention of the sampled queries that each of some layers has not counted yet
    ggml_status compute_attn(const std::vector<const kv_layer *> & layers, uint32_t strm, std::vector<llama_kv_attn> & attns);

    // fill with an orthonormal Walsh-Hadamard matrix, F32 [n, n] in host memory
    static void set_input_rot(ggml_tensor * dst);

    struct stats {
        uint64_t n_score    = 0;
        uint64_t n_evict    = 0;
        uint64_t n_reeval   = 0;
        int64_t  t_evict_us = 0;
    };

    const stats & get_stats() const { return stat; }

private:
    // state of one sequence that its layers share
    struct stream_state {
        // the tokens of the sequence, whether a layer still holds them or not
        llama_kv_depth_spans tokens;

        llama_kv_depth_spans pins;

        // tokens from here on are placed, but their ubatch has not been computed. it may fail
        llama_pos pos_placed = llama_kv_depth_cells::none;

        // what has been sampled, see kv_layer::q
        llama_kv_queries queries;

        void clear();
    };

    const llama_model   & model;
    const llama_hparams & hparams;
    const llama_cparams & cparams;

    const llama_kv_depth_plan plan;

    const llama_kv_score_ptr score;

    const uint32_t n_stream;
    const bool     v_trans;

    std::vector<kv_layer> layers;

    // model layer id -> index in layers
    std::unordered_map<int32_t, int32_t> map_layer_ids;

    std::vector<stream_state> streams;    // [n_stream]
    std::vector<attn_params>  layer_attn; // [n_layers]

    // ggml contexts along with the allocated backend buffers
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    std::unique_ptr<llama_kv_cache_iswa> kv_iswa;

    // computes scores and shifts apart from the main graph, so that this one can be reused
    llama_kv_depth_sched sched;

    // known from reserve() on, before that nothing can have been computed
    llama_context * lctx = nullptr;

    // why the last shift has not been completed, if it has not
    ggml_status status_shift = GGML_STATUS_FAILED;

    stats stat;

    bool has_seq(llama_seq_id seq_id) const {
        return seq_id >= 0 && (uint32_t) seq_id < n_stream;
    }

    // streams of a sequence id, -1 stands for all
    std::pair<uint32_t, uint32_t> get_streams(llama_seq_id seq_id) const;

    void pos_range(llama_pos & p0, llama_pos & p1) const;

    // the positions from p0 on can be removed: a fresh evaluation could have left what is left
    bool can_rm_from(uint32_t strm, llama_pos p0) const;

    // some keys lack a rotation
    bool has_shift() const;

    // the keys of a layer carry their position
    bool has_rope(uint32_t il) const;

    // every layer that lacks room for n_tokens more of a sequence frees it
    ggml_status evict(uint32_t strm, uint32_t n_tokens);

    // what the sampled queries say is added to the scores of some layers
    ggml_status count_attn(const std::vector<kv_layer *> & layers, uint32_t strm);

    // cells whose key is not a finite number get the lowest score
    void mark_broken(kv_layer & layer, uint32_t strm);

    // inputs and outputs of the small graphs
    struct attn_graph;
    struct attn_pass;
    struct shift_graph;

    // of the largest of them
    size_t max_nodes() const;

    // is_full: as if the layers were full
    void init_attn (attn_pass & pass, const std::vector<const kv_layer *> & layers, uint32_t strm, bool is_full) const;
    void build_attn(ggml_context * ctx, ggml_cgraph * gf, attn_pass & pass);
    void build_attn(ggml_context * ctx, ggml_cgraph * gf, attn_pass & pass, attn_graph & res);

    // layers from i on that are scored in one graph
    size_t n_attn_layers(const std::vector<const kv_layer *> & layers, size_t i) const;

    void build_shift(ggml_context * ctx, ggml_cgraph * gf, const kv_layer & layer, uint32_t strm, uint32_t i0, uint32_t n, shift_graph & res) const;

    // wait for the main graph before its results are read
    void synchronize() const;

    size_t size_layers_bytes() const;

    void state_write_stream(llama_io_write_i & io, uint32_t strm) const;
    void state_read_stream (llama_io_read_i  & io, uint32_t strm);
    void state_clear_stream(uint32_t strm);
};

class llama_kv_cache_depth_context : public llama_memory_context_i {
public:
    // used for errors
    llama_kv_cache_depth_context(llama_memory_status status, ggml_status status_compute = GGML_STATUS_FAILED);

    // used to create a full-cache context
    llama_kv_cache_depth_context(llama_kv_cache_depth * kv);

    // used to create an update context
    llama_kv_cache_depth_context(
            llama_kv_cache_depth * kv,
            llama_memory_context_ptr ctx_iswa,
            bool do_shift);

    // used to create a batch processing context from a batch
    llama_kv_cache_depth_context(
            llama_kv_cache_depth * kv,
            llama_memory_context_ptr ctx_iswa,
            std::vector<llama_ubatch> ubatches);

    virtual ~llama_kv_cache_depth_context() = default;

    //
    // llama_memory_context_i
    //

    bool next()  override;
    bool apply() override;

    llama_memory_status  get_status() const override;
    ggml_status          get_status_compute() const override;
    const llama_ubatch & get_ubatch() const override;

    //
    // llama_kv_cache_depth_context specific API
    //

    llama_kv_cache_depth * get_kv() const { return kv; }

    const llama_kv_cache_depth::slot_info & get_sinfo() const { return sinfo; }

    // nullptr if the model has no SWA layers
    const llama_kv_cache_iswa_context * get_iswa() const;

private:
    const llama_memory_status status;

    ggml_status status_compute = GGML_STATUS_FAILED;

    llama_kv_cache_depth * kv = nullptr;

    llama_memory_context_ptr ctx_iswa;

    // update context

    bool do_shift = false;

    // batch processing context

    // the index of the next ubatch to process
    size_t i_next = 0;

    std::vector<llama_ubatch> ubatches;

    // rows of one ubatch only: the next ubatch may evict
    llama_kv_cache_depth::slot_info sinfo;

    // see llama_kv_cache_depth::apply_ubatch()
    std::vector<uint32_t> n_room;
};
