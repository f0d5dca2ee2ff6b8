#pragma once

#include "server-common.h"

#include "chat.h"
#include "llama-depthkv.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

struct common_params;

// totals of the server, for /metrics
struct server_kv_metrics {
    bool     has_stats     = false; // the model has a KV cache that can be reported on
    uint64_t bytes         = 0; // K and V allocated
    uint64_t bytes_full    = 0; // what the full cache would take
    uint64_t n_cells       = 0; // over layers and slots, as are the next three
    uint64_t n_used        = 0;
    uint64_t n_pinned      = 0;
    uint64_t n_evicted     = 0; // since the model was loaded, as are the next two
    uint64_t n_reeval      = 0; // tokens of a known prompt that were evaluated again
    int64_t  t_evict_us    = 0; // spent on scoring and eviction

    // Prometheus text format, empty if there is nothing to report
    std::string to_text() const;
};

// what the KV cache of a server holds, slot by slot, and which part of it is pinned
//
// the cache must not be read while it is decoded, but /slots and /metrics are answered then too: they see what update()
// read last. update() and pin() are for the thread that decodes, the rest may be called by the one that answers meanwhile
class server_kv {
public:
    // a strip says for each of so many parts of a sequence which share of its positions a layer holds
    static constexpr int n_strip = 64;

    // ctx: one sequence for each slot
    // false, with the reason in the log, if one of the arguments does not go with the KV budget
    bool init(llama_context * ctx, const common_params & params);

    // the context is about to be freed
    void reset();

    // layers evict: the cache has a budget
    bool active() const {
        return stats.active;
    }

    // read the cache
    void update(bool with_strips);

    // the same before a decode, with strips if somebody is likely to ask for them meanwhile
    void update_for_decode();

    // null if the model has no KV cache that can be reported on
    json to_json(int id_slot, bool with_strips);

    server_kv_metrics get_metrics() const;

    // pin the first n_tokens of the slot, instead of what was pinned for an earlier task, and once for each task
    void pin(int id_slot, int id_task, int32_t n_tokens);

    // go back to the first p positions of the slot, or as little further as the cells allow: returns how many are left
    llama_pos rollback(int id_slot, llama_pos p);

    // longest draft that can be taken back
    int32_t get_n_draft_max() const;

    // the slot has become a copy of another one
    void copy(int id_slot_src, int id_slot_dst);

    // number of positions at the front of the slot that are pinned, ahead of their tokens as well
    int32_t get_n_pinned(int id_slot) const;

private:
    struct slot_info {
        int     id_task  = -1; // of the last pin()
        int32_t n_pinned = 0;

        // read by update()
        llama_pos n_pos = 0; // positions of the sequence, whether a layer still holds them or not

        std::vector<llama_depthkv_layer> layers;
        std::vector<std::vector<double>> strips;

        // a pinned span may be ahead of the tokens, or outlive them
        int32_t n_held_pinned() const {
            return std::min<int32_t>(n_pinned, n_pos);
        }
    };

    llama_context * ctx = nullptr;

    bool   has_stats  = false;
    bool   is_unified = false; // the slots share the cells of a layer

    llama_depthkv_stats stats = {};

    std::vector<slot_info> slots;

    int64_t t_strips = 0; // when strips were last read
    int64_t t_asked  = 0; // when somebody last asked for them
};

// the text that a chat template puts before the first message of a chat that is not a system message
// empty if the template cannot tell
std::string server_kv_system_prompt(
        const common_chat_templates        * tmpls,
        const common_chat_templates_inputs & inputs,
        const std::string                  & prompt);

// number of tokens at the front of a prompt that spell the text
int32_t server_kv_count_tokens(const llama_vocab * vocab, const server_tokens & tokens, const std::string & text);
