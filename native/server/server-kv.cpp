#include "server-kv.h"

#include "common-kv-budget.h"

#include "common.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <sstream>

// strips cost milliseconds: they are read before a decode only while somebody watches, and not before every one
static constexpr int64_t t_strips_us = 500*1000;
static constexpr int64_t t_watch_us  = 5*1000*1000;

//
// server_kv_metrics
//

std::string server_kv_metrics::to_text() const {
    std::ostringstream ss;

    if (!has_stats) {
        return "";
    }

    // integers in full: an ostream prints doubles with 6 digits
    const auto add = [&ss](const char * type, const char * name, const char * help, const std::string & value) {
        ss << "# HELP llamacpp:" << name << " " << help  << "\n"
           << "# TYPE llamacpp:" << name << " " << type  << "\n"
           << "llamacpp:"        << name << " " << value << "\n";
    };

    add("gauge",   "kv_bytes",               "Bytes of the KV cache",                                      std::to_string(bytes));
    add("gauge",   "kv_bytes_full",          "Bytes that the KV cache would take without a budget",        std::to_string(bytes_full));
    add("gauge",   "kv_cells",               "Cells of the KV cache, over layers and slots",               std::to_string(n_cells));
    add("gauge",   "kv_cells_used",          "Cells that hold a token",                                    std::to_string(n_used));
    add("gauge",   "kv_cells_pinned",        "Cells that hold a pinned token",                             std::to_string(n_pinned));
    add("counter", "kv_cells_evicted_total", "Cells freed by eviction",                                    std::to_string(n_evicted));
    add("counter", "kv_tokens_reevaluated_total", "Tokens of a known prompt that were evaluated again, because cells had been freed since", std::to_string(n_reeval));
    add("counter", "kv_evict_seconds_total", "Time spent on choosing and freeing cells",                   std::to_string(t_evict_us/1e6));

    return ss.str();
}

//
// server_kv
//

bool server_kv::init(llama_context * ctx, const common_params & params) {
    reset();

    this->ctx = ctx;

    slots.resize(std::max(1, params.n_parallel));

    has_stats = llama_depthkv_get_stats(ctx, &stats);

    if (active()) {
        try {
            common_kv_budget_check(params);
        } catch (const std::exception & e) {
            SRV_ERR("%s\n", e.what());
            return false;
        }
    }

    // with a budget every sequence has cells of its own
    is_unified = params.kv_unified && !active();

    update(false);

    return true;
}

void server_kv::reset() {
    *this = server_kv();
}

// pos: ascending
static std::vector<double> server_kv_get_strip(const std::vector<llama_pos> & pos, llama_pos n_pos) {
    std::vector<double> res;

    if (n_pos <= 0) {
        return res;
    }

    auto it = pos.begin();

    for (int64_t i = 0; i < server_kv::n_strip; ++i) {
        // a part has at least one position: in a short sequence several parts show the same one
        const llama_pos p0 = i*n_pos/server_kv::n_strip;
        const llama_pos p1 = std::max<llama_pos>(p0 + 1, (i + 1)*n_pos/server_kv::n_strip);

        const auto first = std::lower_bound(it,    pos.end(), p0);
        const auto last  = std::lower_bound(first, pos.end(), p1);

        res.push_back(std::round(1000.0*(last - first)/(p1 - p0))/1000.0);

        it = first;
    }

    return res;
}

void server_kv::update(bool with_strips) {
    if (!has_stats) {
        return;
    }

    if (with_strips) {
        t_strips = ggml_time_us();
    }

    llama_depthkv_get_stats(ctx, &stats);

    auto * mem = llama_get_memory(ctx);

    for (llama_seq_id id = 0; id < (llama_seq_id) slots.size(); ++id) {
        auto & slot = slots[id];

        slot.n_pos = llama_memory_seq_pos_max(mem, id) + 1;

        slot.layers.resize(stats.n_layers);
        for (int32_t i = 0; i < stats.n_layers; ++i) {
            llama_depthkv_get_layer(ctx, i, id, &slot.layers[i]);
        }

        if (!with_strips) {
            continue;
        }

        slot.strips.resize(stats.n_layers);
        for (int32_t i = 0; i < stats.n_layers; ++i) {
            std::vector<llama_pos> pos(slot.layers[i].used);
            llama_depthkv_get_positions(ctx, i, id, pos.data(), pos.size());

            slot.strips[i] = server_kv_get_strip(pos, slot.n_pos);
        }
    }
}

void server_kv::update_for_decode() {
    const int64_t t_now = ggml_time_us();

    update(t_asked > 0 && t_now - t_asked < t_watch_us && t_now - t_strips > t_strips_us);
}

json server_kv::to_json(int id_slot, bool with_strips) {
    if (with_strips) {
        t_asked = ggml_time_us();
    }

    if (!has_stats) {
        return nullptr;
    }

    const auto & slot = slots.at(id_slot);

    // every slot has the same share of what is allocated
    const size_t n_slots = slots.size();

    json layers = json::array();
    for (const auto & layer : slot.layers) {
        layers.push_back({
            {"layer",   layer.layer},
            {"cells",   layer.cells},
            {"used",    layer.used},
            {"evicted", layer.evicted},
            {"bytes",   layer.bytes/n_slots},
            {"sinks",   layer.sinks},
            {"pinned",  layer.pinned},
            {"recent",  layer.recent},
        });
    }

    json res = {
        {"active",     stats.active},
        {"budget",     std::round(1e6*stats.budget)/1e6}, // a float: 0.4 rather than 0.4000000059604645
        {"scorer",     stats.scorer},
        {"rule",       stats.rule},
        {"bytes",      stats.bytes/n_slots},
        {"bytes_full", stats.bytes_full/n_slots},
        {"pinned",     slot.n_held_pinned()},
        {"layers",     layers},
    };

    if (with_strips) {
        json strips = json::array();
        for (const auto & strip : slot.strips) {
            strips.push_back(strip);
        }
        res["strips"] = strips;
    }

    return res;
}

server_kv_metrics server_kv::get_metrics() const {
    server_kv_metrics res;

    res.has_stats  = has_stats;
    res.bytes      = stats.bytes;
    res.bytes_full = stats.bytes_full;
    res.n_evicted  = stats.n_evict;
    res.n_reeval   = stats.n_reeval;
    res.t_evict_us = stats.t_evict_us;

    for (size_t id = 0; id < slots.size(); ++id) {
        for (const auto & layer : slots[id].layers) {
            res.n_cells  += is_unified && id > 0 ? 0 : layer.cells;
            res.n_used   += layer.used;
            res.n_pinned += slots[id].n_held_pinned();
        }
    }

    // in a unified cache a cell may belong to several slots
    res.n_used = std::min(res.n_used, res.n_cells);

    return res;
}

void server_kv::pin(int id_slot, int id_task, int32_t n_tokens) {
    auto & slot = slots.at(id_slot);

    if (!active() || slot.id_task == id_task) {
        return;
    }

    // a state that was restored brings its pins along
    llama_depthkv_unpin(ctx, id_slot);

    slot.id_task  = id_task;
    slot.n_pinned = 0;

    if (n_tokens <= 0) {
        return;
    }

    if (llama_depthkv_pin(ctx, id_slot, 0, n_tokens)) {
        slot.n_pinned = n_tokens;
    } else {
        SRV_WRN("slot %d: the system prompt (%d tokens) is not pinned: %s\n", id_slot, n_tokens, llama_depthkv_last_error());
    }
}

llama_pos server_kv::rollback(int id_slot, llama_pos p) {
    if (!active()) {
        return p;
    }

    const llama_pos res = llama_depthkv_seq_rollback(ctx, id_slot, p);

    GGML_ASSERT(res >= 0);

    if (res < p) {
        SRV_INF("slot %d: positions %d to %d are evaluated again, cells have been freed since\n", id_slot, res, p);
    }

    return res;
}

int32_t server_kv::get_n_draft_max() const {
    if (!active()) {
        return std::numeric_limits<int32_t>::max();
    }

    // windows move with every ubatch, which slots that draft at the same time share
    const int32_t n_share = llama_model_n_swa(llama_get_model(ctx)) > 0 ? (int32_t) slots.size() : 1;

    // what a conversation has pinned may have made it less
    llama_depthkv_stats now;
    if (!llama_depthkv_get_stats(ctx, &now)) {
        return 0;
    }

    // and the token that it follows
    return (int32_t) now.n_ubatch/n_share - 1;
}

void server_kv::copy(int id_slot_src, int id_slot_dst) {
    slots.at(id_slot_dst) = slots.at(id_slot_src);
}

int32_t server_kv::get_n_pinned(int id_slot) const {
    return slots.at(id_slot).n_pinned;
}

//
// system prompt
//

std::string server_kv_system_prompt(
        const common_chat_templates        * tmpls,
        const common_chat_templates_inputs & inputs,
        const std::string                  & prompt) {
    // what does not change when the rest of the chat does: that includes tools, and a system prompt that the template
    // makes up or puts into the first user message
    common_chat_templates_inputs other = inputs;

    const auto rest = std::find_if(other.messages.begin(), other.messages.end(), [](const common_chat_msg & msg) {
        return msg.role != "system" && msg.role != "developer";
    });
    other.messages.erase(rest, other.messages.end());

    common_chat_msg msg;
    msg.role    = "user";
    msg.content = "\x01"; // no message begins like this
    other.messages.push_back(msg);

    other.add_generation_prompt  = true;
    other.continue_final_message = COMMON_CHAT_CONTINUATION_NONE;

    try {
        const std::string prompt_other = common_chat_templates_apply(tmpls, other).prompt;

        const size_t n_max = std::min(prompt.size(), prompt_other.size());

        return prompt.substr(0, std::mismatch(prompt.begin(), prompt.begin() + n_max, prompt_other.begin()).first - prompt.begin());
    } catch (const std::exception & e) {
        SRV_DBG("cannot tell the system prompt from the rest of the chat: %s\n", e.what());
    }

    return "";
}

int32_t server_kv_count_tokens(const llama_vocab * vocab, const server_tokens & tokens, const std::string & text) {
    if (text.empty()) {
        return 0;
    }

    const auto tokens_text = common_tokenize(vocab, text, true, true);

    const size_t n_max = std::min(tokens.size(), tokens_text.size());

    size_t res = 0;
    while (res < n_max && tokens[res] == tokens_text[res]) {
        res++;
    }

    return res;
}
