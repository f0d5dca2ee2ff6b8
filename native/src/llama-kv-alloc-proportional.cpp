#include "llama-kv-alloc.h"

#include <cmath>

// cells in proportion to the square root of the sensitivity (after DepthKV, arXiv 2604.24647), between the floor and the
// full layer: what a full layer cannot use goes to the others in the same proportion
//
// the sensitivity of a layer is its mean loss over the keep ratios. a step goes to the layer with the largest
// sqrt(sensitivity)/cells at the middle of the step, the divisor method of Webster and Sainte-Lague
class llama_kv_alloc_proportional : public llama_kv_alloc_i {
public:
    llama_kv_alloc_proportional(const llama_kv_alloc_params & params) {
        const size_t n_ratios = params.curves.ratios.size();

        weight.resize(params.n_layers);
        for (uint32_t il = 0; il < params.n_layers; ++il) {
            double sum = 0.0;
            for (size_t i = 0; i < n_ratios; ++i) {
                sum += params.curves.loss[il*n_ratios + i];
            }
            weight[il] = std::sqrt(sum/n_ratios);
        }
    }

    double gain(uint32_t il, uint32_t n0, uint32_t n1) const override {
        return weight[il]/(0.5*n0 + 0.5*n1);
    }

private:
    std::vector<double> weight;
};

llama_kv_alloc_ptr llama_kv_alloc_init_proportional(const llama_kv_alloc_params & params) {
    return std::make_unique<llama_kv_alloc_proportional>(params);
}
