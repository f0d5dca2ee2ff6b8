#include "llama-kv-depth-sched.h"

#include "llama-impl.h"

bool llama_kv_depth_sched::compute(ggml_backend_sched_t sched_main, size_t max_nodes, const build_fn & build, const io_fn & set_inputs, const io_fn & get_outputs) {
    if (!sched || n_nodes < max_nodes) {
        n_nodes = max_nodes;

        backends.clear();

        std::vector<ggml_backend_buffer_type_t> bufts;
        for (int i = 0; i < ggml_backend_sched_get_n_backends(sched_main); ++i) {
            backends.push_back(ggml_backend_sched_get_backend(sched_main, i));
            bufts   .push_back(ggml_backend_sched_get_buffer_type(sched_main, backends.back()));
        }

        sched.reset(ggml_backend_sched_new(backends.data(), bufts.data(), backends.size(), n_nodes, false, false));

        meta.resize(ggml_tensor_overhead()*n_nodes + ggml_graph_overhead_custom(n_nodes, false));
    }

    ggml_init_params params = {
        /*.mem_size   =*/ meta.size(),
        /*.mem_buffer =*/ meta.data(),
        /*.no_alloc   =*/ true,
    };

    ggml_context_ptr ctx { ggml_init(params) };

    auto * gf = ggml_new_graph_custom(ctx.get(), n_nodes, false);

    build(ctx.get(), gf);

    ggml_backend_sched_reset(sched.get());

    if (!ggml_backend_sched_alloc_graph(sched.get(), gf)) {
        LLAMA_LOG_ERROR("%s: failed to allocate the graph\n", __func__);
        return false;
    }

    set_inputs();

    if (ggml_backend_sched_graph_compute(sched.get(), gf) != GGML_STATUS_SUCCESS) {
        LLAMA_LOG_ERROR("%s: failed to compute the graph\n", __func__);
        return false;
    }

    get_outputs();

    return true;
}

size_t llama_kv_depth_sched::size() const {
    size_t res = 0;

    if (sched) {
        for (auto * backend : backends) {
            res += ggml_backend_sched_get_buffer_size(sched.get(), backend);
        }
    }

    return res;
}
