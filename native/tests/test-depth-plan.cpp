// the plan of a context, on the tiny random models that upstream's `test-llama-archs -o DIR` writes
//   - it is what a context gets, with and without weights, for every architecture and several parameters
//   - budgets that come to the same are the same plan
//   - what is to fit a memory size does
//
// usage: test-depth-plan DIR

#include "llama-cpp.h"
#include "llama-depthkv.h"
#include "llama.h"
#include "test-device.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: check failed: %s (%s)\n", __FILE__, __LINE__, #x, llama_depthkv_last_error()); exit(1); } } while (0)

static const int32_t n_layers_max = 256;

struct plan_result {
    int32_t             status;
    llama_depthkv_stats stats;

    std::vector<llama_depthkv_layer> layers;

    // of the host
    size_t total() const {
        return stats.bytes + stats.bytes_scorer + stats.bytes_compute + stats.bytes_work + stats.bytes_weights + stats.bytes_other - stats.bytes_device;
    }
};

static llama_model_ptr load(const std::string & path, bool no_alloc) {
    auto mparams = test_model_params();
    mparams.no_alloc     = no_alloc;
    if (no_alloc) {
        mparams.load_mode = LLAMA_LOAD_MODE_NONE;
    }

    llama_model_ptr res(llama_model_load_from_file(path.c_str(), mparams));
    CHECK(res);

    return res;
}

static llama_depthkv_params make_depth(const char * budget, size_t memory = 0) {
    auto res = llama_depthkv_default_params();
    res.budget = budget;
    res.memory = memory;

    return res;
}

static plan_result plan(llama_model * model, const llama_context_params & params, const llama_depthkv_params & depth) {
    plan_result res;

    res.layers.resize(n_layers_max);
    res.status = llama_depthkv_plan(model, params, depth, &res.stats, res.layers.data(), n_layers_max);

    if (res.status >= 0) {
        res.layers.resize(res.stats.n_layers);
    }

    return res;
}

static bool same_layers(const plan_result & a, const plan_result & b) {
    for (size_t i = 0; i < std::min(a.layers.size(), b.layers.size()); ++i) {
        const auto & x = a.layers[i];
        const auto & y = b.layers[i];
        if (x.layer != y.layer || x.cells != y.cells || x.bytes != y.bytes) {
            return false;
        }
    }

    return a.layers.size() == b.layers.size();
}

// the plan of a model with weights, of one without, and the context itself
static int test_context(const std::string & path, llama_model * model, llama_model * model_dry, const llama_context_params & params, const char * budget) {
    const auto depth = make_depth(budget);

    const auto cells = plan(model,     params, depth);
    const auto dry   = plan(model_dry, params, depth);

    llama_context_ptr ctx(llama_depthkv_init_from_model(model, params, depth));

    if (!ctx) {
        CHECK(dry.status == -1);
        return 0;
    }

    llama_depthkv_stats stats;
    if (!llama_depthkv_get_stats(ctx.get(), &stats)) {
        CHECK(dry.status == -1 && !cells.stats.active); // there is no cache to report on
        return 0;
    }

    plan_result real = { 0, stats, std::vector<llama_depthkv_layer>(stats.n_layers) };
    for (int32_t i = 0; i < stats.n_layers; ++i) {
        CHECK(llama_depthkv_get_layer(ctx.get(), i, 0, &real.layers[i]));
    }

    CHECK(cells.status == 0 && dry.status == 0);

    for (const auto * planned : { &cells, &dry }) {
        const auto & s = planned->stats;

        if (s.active != stats.active || s.n_ctx_seq != stats.n_ctx_seq || s.n_ubatch != stats.n_ubatch || s.budget != stats.budget ||
            s.bytes_weights != stats.bytes_weights || strcmp(s.rule, stats.rule) != 0 || strcmp(s.scorer, stats.scorer) != 0) {
            fprintf(stderr, "%s, budget %s: active %d/%d, n_ctx_seq %u/%u, n_ubatch %u/%u, budget %g/%g, weights %zu/%zu, rule %s/%s, scorer %s/%s\n",
                    path.c_str(), budget, s.active, stats.active, s.n_ctx_seq, stats.n_ctx_seq, s.n_ubatch, stats.n_ubatch, s.budget, stats.budget,
                    s.bytes_weights, stats.bytes_weights, s.rule, stats.rule, s.scorer, stats.scorer);
            exit(1);
        }
        if (stats.active) {
            CHECK(s.bytes == stats.bytes && s.bytes_full == stats.bytes_full && s.n_layers == stats.n_layers);
            CHECK(same_layers(*planned, real));
        }
    }

    CHECK(dry.stats.bytes == stats.bytes && dry.stats.bytes_scorer == stats.bytes_scorer && dry.stats.bytes_other == stats.bytes_other);

    // where all layers are on a device, most of it is there
    if (test_on_cpu()) {
        CHECK(dry.stats.bytes_device == 0 && stats.bytes_device == 0);
    } else {
        CHECK(stats.bytes_device >= stats.bytes);
        CHECK(dry.stats.bytes_device - dry.stats.bytes_compute <= stats.bytes_device && stats.bytes_device <= dry.stats.bytes_device + stats.bytes_compute);
    }

    // of a stock cache the windows have their full size in a context with swa_full, which these parameters are without
    if (llama_depthkv_layer_count(model) >= 0 && cells.stats.bytes != stats.bytes) {
        fprintf(stderr, "%s, budget %s, n_ctx_seq %u, n_seq_max %u, unified %d: %zu bytes, not %zu\n", path.c_str(), budget,
                stats.n_ctx_seq, params.n_seq_max, params.kv_unified, cells.stats.bytes, stats.bytes);
        exit(1);
    }

    return 1;
}

static int test_contexts(const std::string & path) {
    const auto model     = load(path, false);
    const auto model_dry = load(path, true);

    int n = 0;

    for (const uint32_t n_ctx : { 0u, 300u, 2048u }) {
        for (const uint32_t n_seq_max : { 1u, 3u }) {
            for (const bool kv_unified : { false, true }) {
                auto params = llama_context_default_params();
                params.n_ctx      = n_ctx == 0 && llama_model_n_ctx_train(model.get()) > 4096 ? 512 : n_ctx;
                params.n_seq_max  = n_seq_max;
                params.kv_unified = kv_unified;
                params.n_batch    = 256;
                params.n_ubatch   = 64*n_seq_max;
                params.swa_full   = false;
                params.n_threads  = params.n_threads_batch = 1;

                for (const char * budget : { "0.4", "0.75", "1" }) {
                    n += test_context(path, model.get(), model_dry.get(), params, budget);
                }
            }
        }
    }

    return n;
}

static void test_budgets(const std::string & path) {
    const auto model = load(path, true);

    auto params = llama_context_default_params();
    params.n_ctx    = 8192;
    params.swa_full = false;

    const auto part = plan(model.get(), params, make_depth("0.4"));
    CHECK(part.status == 0 && part.stats.active);

    size_t n_cells = 0;
    for (const auto & layer : part.layers) {
        n_cells += layer.cells;
    }
    // the budget in tokens, and in bytes. where there are windows these depend on the ubatch, and bytes are what counts
    const bool has_windows = part.stats.bytes_full > (size_t) llama_depthkv_layer_count(model.get())*params.n_ctx*part.layers[0].bytes/part.layers[0].cells;

    const std::string tokens = std::to_string((n_cells + part.layers.size() - 1)/part.layers.size()) + "t";
    const std::string bytes  = std::to_string(part.stats.bytes) + "e-3kB";

    for (const char * budget : { "40%", "0.40", tokens.c_str(), bytes.c_str() }) {
        const auto other = plan(model.get(), params, make_depth(budget));
        CHECK(other.status == 0);
        if (has_windows && budget == bytes) {
            CHECK(other.stats.bytes <= part.stats.bytes && other.stats.bytes > part.stats.bytes*9/10);
            continue;
        }
        if (!same_layers(part, other) || other.stats.n_ubatch != part.stats.n_ubatch) {
            fprintf(stderr, "%s: a budget of %s is not one of 0.4: %zu bytes rather than %zu\n", path.c_str(), budget, other.stats.bytes, part.stats.bytes);
            exit(1);
        }
    }

    // limits are never exceeded, and what is left over is less than a step of the largest layer and its alignment
    for (const size_t limit : { part.stats.bytes - 1, part.stats.bytes + 1, part.stats.bytes*3/2 }) {
        const auto other = plan(model.get(), params, make_depth((std::to_string(limit) + "e-3kB").c_str()));
        CHECK(other.status == 0 && other.stats.bytes <= limit);
    }

    // the full cache is the stock one, however it is written
    const std::string all = std::to_string(plan(model.get(), params, make_depth("1")).stats.bytes) + "e-3kB";
    for (const char * budget : { "1", "100%", "8192t", "100GB", all.c_str() }) {
        const auto full = plan(model.get(), params, make_depth(budget));
        CHECK(full.status == 0 && !full.stats.active && full.stats.budget == 1.0f);
    }
}

static void test_memory(const std::string & path) {
    const auto model = load(path, true);

    auto params = llama_context_default_params();
    params.n_ctx    = 32768;
    params.n_batch  = 512;
    params.n_ubatch = 512;
    params.swa_full = false;

    const auto full  = plan(model.get(), params, make_depth("1"));
    auto       small = params;
    small.n_ubatch = 32;
    const auto least = plan(model.get(), small, make_depth("0.2"));

    CHECK(full.status == 0 && least.status == 0 && least.total() < full.total());

    // with enough memory the full cache
    const auto enough = plan(model.get(), params, make_depth("auto", full.total()));
    CHECK(enough.status == 0 && !enough.stats.active && enough.stats.n_ubatch == 512);

    // with less a part of it, and never more than there is
    float last = 0.0f;
    for (int i = 0; i <= 8; ++i) {
        const size_t memory = least.total() + i*(full.total() - least.total())/8;
        const auto   fit    = plan(model.get(), params, make_depth("auto", memory));

        CHECK(fit.status == 0 && fit.total() <= memory);
        CHECK(fit.stats.budget >= 0.2f - 1e-6f);
        last = fit.stats.budget;

        // the plan stands when it is written down
        char text[32];
        snprintf(text, sizeof(text), "%.9g", fit.stats.budget);
        auto again = params;
        again.n_ubatch = fit.stats.n_ubatch;
        const auto same = plan(model.get(), again, make_depth(text));
        CHECK(same.status == 0 && same.total() == fit.total() && same_layers(same, fit));
    }
    CHECK(last == 1.0f);

    // a budget that is given stays, the ubatch gives way
    const auto kept = plan(model.get(), params, make_depth("1", plan(model.get(), small, make_depth("1")).total()));
    CHECK(kept.status == 0 && !kept.stats.active && kept.stats.n_ubatch < 512);

    // too little: what would do is said
    const auto no = plan(model.get(), params, make_depth("auto", least.total() - 1));
    CHECK(no.status == 1 && no.stats.n_ubatch == 32 && std::string(llama_depthkv_last_error()).find("is too little memory") != std::string::npos);
    CHECK(plan(model.get(), params, make_depth("auto", no.total())).status == 0);
    CHECK(plan(model.get(), params, make_depth("auto", 1)).status == 1);
    CHECK(plan(model.get(), params, make_depth("0.001", full.total())).status == -1);

    // what this machine has
    CHECK(llama_depthkv_memory_free() > 0);
    CHECK(plan(model.get(), params, make_depth("auto")).status == 0);

    // only without weights
    const auto loaded = load(path, false);
    CHECK(plan(loaded.get(), params, make_depth("auto")).status == -1);
    CHECK(plan(loaded.get(), params, make_depth("0.4", full.total())).status == -1);
    CHECK(!llama_depthkv_init_from_model(loaded.get(), params, make_depth("auto")));
}

static void test_bad_calls(const std::string & path) {
    const auto model = load(path, true);

    llama_depthkv_stats stats;
    llama_depthkv_layer layer;

    const auto params = llama_context_default_params();

    CHECK(llama_depthkv_plan(nullptr,     params, make_depth("0.5"), &stats,  nullptr, 0) == -1);
    CHECK(llama_depthkv_plan(model.get(), params, make_depth("0.5"), nullptr, nullptr, 0) == -1);
    CHECK(llama_depthkv_plan(model.get(), params, make_depth("0.5"), &stats,  nullptr, 1) == -1);
    CHECK(llama_depthkv_plan(model.get(), params, make_depth("0.5"), &stats,  &layer,  1) ==  0);
    CHECK(llama_depthkv_plan(model.get(), params, make_depth("much"), &stats, &layer,  1) == -1);

    auto wrong = params;
    wrong.type_k = GGML_TYPE_Q2_K;
    CHECK(llama_depthkv_plan(model.get(), wrong, make_depth("0.5"), &stats, nullptr, 0) == -1);

    wrong = params;
    wrong.n_batch = wrong.n_ubatch = 0;
    CHECK(llama_depthkv_plan(model.get(), wrong, make_depth("0.5"), &stats, nullptr, 0) == -1);
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: %s DIR\n", argv[0]);
        return 1;
    }

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();

    const std::string dir = argv[1];

    int n_models = 0;
    int n_plans  = 0;

    for (const auto & entry : std::filesystem::directory_iterator(dir)) {
        if (entry.path().extension() == ".gguf") {
            n_plans += test_contexts(entry.path().string());
            n_models++;
        }
    }

    CHECK(n_models > 0 && n_plans > n_models);

    for (const char * name : { "/llama-dense.gguf", "/gemma3-dense.gguf" }) {
        test_budgets(dir + name);
        test_memory(dir + name);
    }
    test_bad_calls(dir + "/llama-dense.gguf");

    printf("OK: %d plans of %d models\n", n_plans, n_models);

    return 0;
}
