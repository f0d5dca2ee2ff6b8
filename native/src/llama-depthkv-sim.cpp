// rules, keys of a file, and the simulation of one layer

#include "llama-depthkv.h"

#include "llama-depthkv-impl.h"
#include "llama-impl.h"
#include "llama-kv-alloc.h"
#include "llama-kv-evict.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

static llama_kv_score_ptr llama_depthkv_init_scorer(const char * name) {
    llama_depthkv_check_ptr(name, "scorer");

    auto res = llama_kv_score_init(name);
    if (!res) {
        throw std::runtime_error(format("unknown scorer '%s': use one of %s", name, llama_kv_score_names().c_str()));
    }

    return res;
}

template <typename T>
static int32_t llama_depthkv_copy(const std::vector<T> & src, T * dst, int32_t n) {
    std::copy_n(src.begin(), std::min<size_t>(src.size(), std::max(n, 0)), dst);

    return src.size();
}

//
// rules
//

bool llama_depthkv_get_scorer(int32_t i, llama_depthkv_rule * rule) {
    const auto & list = llama_kv_score_list();

    if (i < 0 || (size_t) i >= list.size()) {
        return false;
    }

    *rule = { list[i].name, list[i].desc, list[i].init()->needs_attn() };

    return true;
}

bool llama_depthkv_get_alloc(int32_t i, llama_depthkv_rule * rule) {
    const auto & list = llama_kv_alloc_list();

    if (i < 0 || (size_t) i >= list.size()) {
        return false;
    }

    *rule = { list[i].name, list[i].desc, false };

    return true;
}

//
// keys
//

bool llama_depthkv_check_file(const char * path) {
    return llama_depthkv_try(false, [&]() {
        llama_depthkv_check_ptr(path, "path");

        llama_kv_depth_params().load(path);

        return true;
    });
}

//
// simulation
//

llama_depthkv_constants llama_depthkv_get_constants(void) {
    return {
        /*.n_sink       =*/ llama_kv_n_sink,
        /*.n_recent     =*/ llama_kv_n_recent,
        /*.n_align      =*/ llama_kv_n_align,
        /*.n_ubatch_min =*/ llama_kv_n_ubatch_min,
        /*.n_query_span =*/ llama_kv_n_query_span_pp,
        /*.n_warmup     =*/ llama_kv_n_warmup,
    };
}

uint32_t llama_depthkv_n_ubatch(uint32_t n_cells_min, uint32_t n_ubatch_max) {
    return llama_kv_evict_n_ubatch(n_cells_min, llama_kv_n_sink + llama_kv_n_recent, n_ubatch_max);
}

struct llama_depthkv_sim {
    llama_kv_score_ptr score;

    int32_t  il;
    uint32_t n_sink;
    uint32_t n_recent;

    // position of the next token
    llama_pos pos = 0;

    llama_kv_depth_cells cells;
    llama_kv_queries     queries;

    // rows by position
    std::vector<uint32_t> rows() const {
        std::vector<uint32_t> res;

        for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
            if (!cells.is_empty(i)) {
                res.push_back(i);
            }
        }

        std::sort(res.begin(), res.end(), [&](uint32_t a, uint32_t b) {
            return cells.pos_get(a) < cells.pos_get(b);
        });

        return res;
    }
};

llama_depthkv_sim * llama_depthkv_sim_init(const char * scorer, int32_t layer, uint32_t n_cells, uint32_t n_sink, uint32_t n_recent) {
    return llama_depthkv_try((llama_depthkv_sim *) nullptr, [&]() {
        if (n_cells <= n_sink + n_recent) {
            throw std::runtime_error(format("layer capacity %u has no room beside %u sinks + %u recent", n_cells, n_sink, n_recent));
        }

        auto res = std::make_unique<llama_depthkv_sim>();

        res->score    = llama_depthkv_init_scorer(scorer);
        res->il       = layer;
        res->n_sink   = n_sink;
        res->n_recent = n_recent;

        res->cells.resize(n_cells);

        return res.release();
    });
}

void llama_depthkv_sim_free(llama_depthkv_sim * sim) {
    delete sim;
}

int32_t llama_depthkv_sim_pending(const llama_depthkv_sim * sim, llama_pos * pos, int32_t n) {
    return sim->score->needs_attn() ? llama_depthkv_copy(sim->queries.after(sim->cells.pos_scored), pos, n) : 0;
}

int32_t llama_depthkv_sim_queries(const llama_depthkv_sim * sim, uint32_t n_tokens, llama_pos * pos, int32_t n) {
    return llama_kv_evict_is_due(sim->cells, sim->il, n_tokens) ? llama_depthkv_sim_pending(sim, pos, n) : 0;
}

void llama_depthkv_sim_count(llama_depthkv_sim * sim, const float * mass) {
    llama_kv_attn attn;

    attn.pos = sim->queries.after(sim->cells.pos_scored);
    attn.mass.resize(sim->cells.used_max_p1());

    for (const uint32_t i : sim->rows()) {
        attn.mass[i] = *mass++;
    }

    llama_kv_evict_count(*sim->score, sim->cells, attn);
}

void llama_depthkv_sim_evict(llama_depthkv_sim * sim, uint32_t n_tokens) {
    for (const uint32_t i : llama_kv_evict_select(*sim->score, sim->cells, {}, sim->il, sim->n_sink, sim->n_recent, n_tokens)) {
        sim->cells.evict(i, sim->pos - 1);
    }
}

void llama_depthkv_sim_add(llama_depthkv_sim * sim, uint32_t n_tokens) {
    for (const uint32_t i : llama_kv_evict_sample(*sim->score, n_tokens)) {
        sim->queries.add(*sim->score, sim->pos + i, n_tokens);
    }

    for (uint32_t i = 0; i < n_tokens; ++i) {
        sim->cells.add(sim->pos++);
    }
}

int32_t llama_depthkv_sim_positions(const llama_depthkv_sim * sim, llama_pos * pos, int32_t n) {
    std::vector<llama_pos> res;
    for (const uint32_t i : sim->rows()) {
        res.push_back(sim->cells.pos_get(i));
    }

    return llama_depthkv_copy(res, pos, n);
}

int32_t llama_depthkv_sim_sample(const char * scorer, uint32_t n_tokens, uint32_t * idxs, int32_t n) {
    return llama_depthkv_try(-1, [&]() {
        return llama_depthkv_copy(llama_kv_evict_sample(*llama_depthkv_init_scorer(scorer), n_tokens), idxs, n);
    });
}
