#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <functional>
#include <map>
#include <vector>

// elements between what two layers have in one tensor are a multiple of this: backends want their views aligned
static constexpr size_t llama_kv_depth_n_align_view = 128;

// the backend that computes what lies in the buffer of a tensor, nullptr if that is host memory
ggml_backend_t llama_kv_depth_backend_of(ggml_backend_sched_t sched, const ggml_tensor * t);

// a scheduler for small graphs beside the main one
//
// going through the scheduler of the context would reset it, lose the reusable main graph and reserve it again each time
class llama_kv_depth_sched {
public:
    // builds a graph, input tensors are marked with ggml_set_input
    using build_fn = std::function<void(ggml_context * ctx, ggml_cgraph * gf)>;

    // called between allocation and computation, to fill the inputs, and after the computation, to read the results
    using io_fn = std::function<void()>;

    // allocate for a graph what is not there yet, so that computing it cannot fail for want of memory later
    // no_alloc: only count it. sched: where the backends are taken from
    bool reserve(ggml_backend_sched_t sched, size_t max_nodes, bool no_alloc, const build_fn & build);

    ggml_status compute(ggml_backend_sched_t sched, size_t max_nodes, const build_fn & build, const io_fn & set_inputs, const io_fn & get_outputs);

    // while a graph is built: where a tensor of it lies. false if the backend does not compute it: then the scheduler decides
    bool set_backend(ggml_tensor * t, ggml_backend_t backend);

    // bytes of the compute buffers, allocated or counted
    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const;

private:
    ggml_backend_sched_ptr sched;

    size_t n_nodes = 0;

    std::vector<ggml_backend_t> backends;
    std::vector<uint8_t>        meta;

    std::vector<size_t> sizes; // [n_backends] counted by reserve()

    void init(ggml_backend_sched_t sched_main, size_t max_nodes);

    ggml_cgraph * build_graph(ggml_context_ptr & ctx, const build_fn & build);
};
