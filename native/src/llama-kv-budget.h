#pragma once

#include <cstdint>
#include <string>

// how much of the full cache a context may have, as users write it: "0.4", "40%", "96MiB", "4096t" or "auto"
struct llama_kv_budget {
    enum kind_t {
        NONE,
        FRACTION, // of the full cache, in (0, 1]
        BYTES,    // of K and V, all layers and sequences, SWA layers included
        TOKENS,   // that a layer holds, on average, all sequences
        AUTO,     // the largest that fits the memory
    };

    kind_t kind  = NONE;
    double value = 0.0; // no meaning with NONE and AUTO

    // the stock cache serves a full budget
    bool is_full() const {
        return kind == NONE || (kind == FRACTION && value >= 1.0);
    }

    // throws one line that names the text
    static llama_kv_budget parse(const std::string & text);
};

// the full cache of a context that a budget is a share of
struct llama_kv_budget_full {
    uint32_t n_tokens;    // cells of a layer that grows with the context, all sequences
    uint64_t bytes;       // K and V of these layers
    uint64_t bytes_fixed; // K and V of the others, which a budget leaves alone
};

// the fraction that a budget comes to, in (0, 1]; not for NONE and AUTO
// throws one line if there is nothing left of it
double llama_kv_budget_resolve(const llama_kv_budget & budget, const llama_kv_budget_full & full);
