#include "llama-kv-score.h"

// sinks and recency, StreamingLLM (arXiv 2309.17453): the oldest token goes first
// not faithful to it: positions stay those of the text, they are not renumbered inside the cache
class llama_kv_score_streaming : public llama_kv_score_i {
public:
    bool needs_attn() const override {
        return false;
    }

    void score(const llama_kv_depth_cells & cells, int32_t il, std::vector<float> & scores) const override {
        GGML_UNUSED(il);

        // the older token goes first among equals
        scores.assign(cells.used_max_p1(), 0.0f);
    }
};

llama_kv_score_ptr llama_kv_score_init_streaming() {
    return std::make_unique<llama_kv_score_streaming>();
}
