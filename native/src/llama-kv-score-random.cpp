#include "llama-kv-score.h"

// control: any useful rule must beat it
// the score is a hash of layer and position, so that runs repeat and a token's fate does not change
class llama_kv_score_random : public llama_kv_score_i {
public:
    bool needs_attn() const override {
        return false;
    }

    void score(const llama_kv_depth_cells & cells, int32_t il, std::vector<float> & scores) const override {
        scores.resize(cells.used_max_p1());

        for (uint32_t i = 0; i < scores.size(); ++i) {
            // the finalizer of splitmix64
            uint64_t x = ((uint64_t) il << 32) + (uint32_t) cells.pos_get(i) + 0x9e3779b97f4a7c15ull;
            x = (x ^ (x >> 30))*0xbf58476d1ce4e5b9ull;
            x = (x ^ (x >> 27))*0x94d049bb133111ebull;
            x = (x ^ (x >> 31));

            scores[i] = (x >> 40)/16777216.0f;
        }
    }
};

llama_kv_score_ptr llama_kv_score_init_random() {
    return std::make_unique<llama_kv_score_random>();
}
