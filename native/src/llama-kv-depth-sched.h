#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <functional>
#include <vector>

// a scheduler for small graphs beside the main one
//
// going through the scheduler of the context would reset it, lose the reusable main graph and reserve it again each time
class llama_kv_depth_sched {
public:
    // builds a graph, input tensors are marked with ggml_set_input
    using build_fn = std::function<void(ggml_context * ctx, ggml_cgraph * gf)>;

    // called between allocation and computation, to fill the inputs, and after the computation, to read the results
    using io_fn = std::function<void()>;

    // sched: where the backends are taken from. returns false if the graph cannot be allocated or computed
    bool compute(ggml_backend_sched_t sched, size_t max_nodes, const build_fn & build, const io_fn & set_inputs, const io_fn & get_outputs);

    // bytes of the compute buffers
    size_t size() const;

private:
    ggml_backend_sched_ptr sched;

    size_t n_nodes = 0;

    std::vector<ggml_backend_t> backends;
    std::vector<uint8_t>        meta;
};
