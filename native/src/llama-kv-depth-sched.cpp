#include "llama-kv-depth-sched.h"

#include "llama-impl.h"

#include <algorithm>

ggml_backend_t llama_kv_depth_backend_of(ggml_backend_sched_t sched, const ggml_tensor * t) {
    auto * buft = ggml_backend_buffer_get_type(t->buffer);

    if (ggml_backend_buft_is_host(buft)) {
        return nullptr;
    }

    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        auto * backend = ggml_backend_sched_get_backend(sched, i);

        if (ggml_backend_supports_buft(backend, buft)) {
            return backend;
        }
    }

    return nullptr;
}

void llama_kv_depth_sched::init(ggml_backend_sched_t sched_main, size_t max_nodes) {
    if (sched && n_nodes >= max_nodes) {
        return;
    }

    n_nodes = max_nodes;

    backends.clear();

    std::vector<ggml_backend_buffer_type_t> bufts;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched_main); ++i) {
        backends.push_back(ggml_backend_sched_get_backend(sched_main, i));
        bufts   .push_back(ggml_backend_sched_get_buffer_type(sched_main, backends.back()));
    }

    sched.reset(ggml_backend_sched_new(backends.data(), bufts.data(), backends.size(), n_nodes, false, false));
    sizes.assign(backends.size(), 0);

    meta.resize(ggml_tensor_overhead()*n_nodes + ggml_graph_overhead_custom(n_nodes, false));
}

ggml_cgraph * llama_kv_depth_sched::build_graph(ggml_context_ptr & ctx, const build_fn & build) {
    ggml_init_params params = {
        /*.mem_size   =*/ meta.size(),
        /*.mem_buffer =*/ meta.data(),
        /*.no_alloc   =*/ true,
    };

    ctx.reset(ggml_init(params));

    ggml_backend_sched_reset(sched.get());

    auto * gf = ggml_new_graph_custom(ctx.get(), n_nodes, false);

    build(ctx.get(), gf);

    return gf;
}

bool llama_kv_depth_sched::set_backend(ggml_tensor * t, ggml_backend_t backend) {
    if (!ggml_backend_supports_op(backend, t)) {
        return false;
    }

    ggml_backend_sched_set_tensor_backend(sched.get(), t, backend);

    return true;
}

bool llama_kv_depth_sched::reserve(ggml_backend_sched_t sched_main, size_t max_nodes, bool no_alloc, const build_fn & build) {
    init(sched_main, max_nodes);

    ggml_context_ptr ctx;

    auto * gf = build_graph(ctx, build);

    if (!no_alloc) {
        return ggml_backend_sched_reserve(sched.get(), gf);
    }

    std::vector<size_t> cur(backends.size(), 0);
    ggml_backend_sched_reserve_size(sched.get(), gf, cur.data());

    for (size_t i = 0; i < sizes.size(); ++i) {
        // backends that share a type of buffer share the buffer
        bool is_shared = false;
        for (size_t j = 0; j < i; ++j) {
            is_shared = is_shared || ggml_backend_sched_get_buffer_type(sched.get(), backends[j]) == ggml_backend_sched_get_buffer_type(sched.get(), backends[i]);
        }

        sizes[i] = is_shared ? 0 : std::max(sizes[i], cur[i]);
    }

    return true;
}

ggml_status llama_kv_depth_sched::compute(ggml_backend_sched_t sched_main, size_t max_nodes, const build_fn & build, const io_fn & set_inputs, const io_fn & get_outputs) {
    init(sched_main, max_nodes);

    ggml_context_ptr ctx;

    auto * gf = build_graph(ctx, build);

    if (!ggml_backend_sched_alloc_graph(sched.get(), gf)) {
        LLAMA_LOG_ERROR("%s: failed to allocate the graph\n", __func__);
        return GGML_STATUS_ALLOC_FAILED;
    }

    set_inputs();

    const ggml_status status = ggml_backend_sched_graph_compute(sched.get(), gf);

    if (status == GGML_STATUS_ABORTED) {
        return status;
    }
    if (status != GGML_STATUS_SUCCESS) {
        LLAMA_LOG_ERROR("%s: failed to compute the graph: %s\n", __func__, ggml_status_to_string(status));
        return status;
    }

    get_outputs();

    return GGML_STATUS_SUCCESS;
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_depth_sched::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;

    for (size_t i = 0; sched && i < backends.size(); ++i) {
        res[ggml_backend_sched_get_buffer_type(sched.get(), backends[i])] +=
            std::max(sizes[i], ggml_backend_sched_get_buffer_size(sched.get(), backends[i]));
    }

    return res;
}
