#include "llama-kv-alloc.h"

// the same number of cells for every layer
class llama_kv_alloc_uniform : public llama_kv_alloc_i {
public:
    double gain(uint32_t il, uint32_t n0, uint32_t n1) const override {
        (void) il;
        (void) n1;

        return -(double) n0;
    }
};

llama_kv_alloc_ptr llama_kv_alloc_init_uniform(const llama_kv_alloc_params & params) {
    (void) params;

    return std::make_unique<llama_kv_alloc_uniform>();
}
