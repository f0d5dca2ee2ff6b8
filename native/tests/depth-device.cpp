// the depth cache on the devices that test-device.h names, beside the CPU: all layers there, half of them, and with the cache in
// host memory. the tiny models are those that `test-llama-archs -o DIR` writes
//
// usage: depth-device DIR

#include "llama-cpp.h"
#include "llama-depthkv.h"
#include "llama-kv-cache-depth.h"
#include "llama.h"
#include "test-device.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: check failed: %s (%s)\n", __FILE__, __LINE__, #x, llama_depthkv_last_error()); exit(1); } } while (0)

static constexpr int n_ctx    = 256;
static constexpr int n_prompt = 160;
static constexpr int n_decode = 64;

// of the logits of another backend
static constexpr double tolerance = 1e-5;

using logits_t = std::vector<float>;

struct placement {
    const char * name;
    int          n_gpu_layers;
    bool         offload_kqv;
};

static llama_context_ptr make_context(llama_model * model, bool offload_kqv, bool fa, const char * budget) {
    auto cparams = llama_context_default_params();

    cparams.n_ctx           = n_ctx;
    cparams.n_batch         = n_prompt;
    cparams.n_threads       = 2;
    cparams.n_threads_batch = 2;
    cparams.offload_kqv     = offload_kqv;
    cparams.swa_full        = false;
    cparams.flash_attn_type = fa ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;

    auto depth = llama_depthkv_default_params();
    depth.budget = budget;

    llama_context_ptr res(llama_depthkv_init_from_model(model, cparams, depth));
    CHECK(res);

    return res;
}

static logits_t eval(llama_context * ctx, std::vector<llama_token> tokens) {
    CHECK(llama_decode(ctx, llama_batch_get_one(tokens.data(), tokens.size())) == 0);

    const float * logits = llama_get_logits_ith(ctx, -1);

    return { logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx))) };
}

static double nmse(const logits_t & a, const logits_t & b) {
    double err = 0.0;
    double ref = 0.0;
    for (size_t i = 0; i < a.size(); ++i) {
        err += (double) (a[i] - b[i])*(a[i] - b[i]);
        ref += (double) a[i]*a[i];
    }
    return err/ref;
}

static llama_token argmax(const logits_t & logits) {
    return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

static std::vector<uint8_t> save(llama_context * ctx) {
    std::vector<uint8_t> res(llama_state_seq_get_size(ctx, 0));
    CHECK(llama_state_seq_get_data(ctx, res.data(), res.size(), 0) == res.size());

    return res;
}

static uint64_t n_evicted(const llama_context * ctx) {
    llama_depthkv_stats stats;
    CHECK(llama_depthkv_get_stats(ctx, &stats));

    return stats.n_evict;
}

// K and V of a layer lie where the layer is computed
static void check_placement(llama_context * ctx, bool offload_kqv) {
    const auto * kv = dynamic_cast<llama_kv_cache_depth *>(llama_get_memory(ctx));
    CHECK(kv);

    size_t n_device = 0;
    for (const auto & layer : kv->get_layers()) {
        for (const auto * t : { layer.k, layer.v }) {
            n_device += !ggml_backend_buffer_is_host(t->buffer);
        }
    }

    CHECK((n_device > 0) == offload_kqv);
}

static void test_model(const std::string & path) {
    auto mparams = llama_model_default_params();
    mparams.n_gpu_layers = 0;

    llama_model_ptr model_cpu(llama_model_load_from_file(path.c_str(), mparams));
    CHECK(model_cpu);

    std::mt19937 rng(1);
    std::vector<llama_token> prompt(n_prompt);
    for (auto & t : prompt) {
        t = rng()%llama_vocab_n_tokens(llama_model_get_vocab(model_cpu.get()));
    }

    const std::string name = path.substr(path.rfind('/') + 1);

    for (const bool fa : { false, true }) {
        // greedy text on the CPU
        auto cpu = make_context(model_cpu.get(), true, fa, "0.5");

        std::vector<llama_token> text;
        std::vector<logits_t>    expected;

        expected.push_back(eval(cpu.get(), prompt));
        for (int i = 0; i < n_decode; ++i) {
            text.push_back(argmax(expected.back()));
            expected.push_back(eval(cpu.get(), { text.back() }));
        }
        CHECK(n_evicted(cpu.get()) > 0);

        for (const placement & where : { placement { "all layers", 999, true }, placement { "half of the layers", 2, true }, placement { "cache in host memory", 999, false } }) {
            mparams = test_model_params();
            mparams.n_gpu_layers = where.n_gpu_layers;

            llama_model_ptr model(llama_model_load_from_file(path.c_str(), mparams));
            CHECK(model);

            auto ctx = make_context(model.get(), where.offload_kqv, fa, "0.5");
            check_placement(ctx.get(), where.offload_kqv);

            double err      = 0.0;
            int    n_differ = 0;

            std::vector<uint8_t> state;

            for (int i = 0; i <= n_decode; ++i) {
                const auto logits = i == 0 ? eval(ctx.get(), prompt) : eval(ctx.get(), { text[i - 1] });

                err = std::max(err, nmse(expected[i], logits));
                n_differ += i < n_decode && argmax(logits) != text[i];

                if (i == n_decode/2) {
                    state = save(ctx.get());
                }
            }

            printf("%-24s fa = %d, %-22s nmse = %.1e, %d of %d tokens differ\n", name.c_str(), fa, where.name, err, n_differ, n_decode);
            CHECK(err < tolerance && n_differ == 0);
            CHECK(n_evicted(ctx.get()) == n_evicted(cpu.get()));

            // what was saved there goes on on the CPU, and what is saved then goes on there
            auto moved = make_context(model_cpu.get(), true, fa, "0.5");
            CHECK(llama_state_seq_set_data(moved.get(), state.data(), state.size(), 0) == state.size());
            for (int i = n_decode/2; i < n_decode; ++i) {
                CHECK(nmse(expected[i + 1], eval(moved.get(), { text[i] })) < tolerance);
                if (i == n_decode*3/4) {
                    state = save(moved.get());
                }
            }

            CHECK(llama_state_seq_set_data(ctx.get(), state.data(), state.size(), 0) == state.size());
            for (int i = n_decode*3/4 + 1; i < n_decode; ++i) {
                CHECK(nmse(expected[i + 1], eval(ctx.get(), { text[i] })) < tolerance);
            }
        }
    }
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: %s DIR\n", argv[0]);
        return 1;
    }

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();

    if (test_on_cpu()) {
        fprintf(stderr, "name a device: DEPTHKV_TEST_DEVICE\n");
        return 1;
    }

    // the usual one, windows with soft caps, sinks, several experts, a shared expert
    for (const char * name : { "llama-dense", "gemma2-dense", "gpt-oss-moe", "qwen3moe-moe", "llama4-moe" }) {
        test_model(std::string(argv[1]) + "/" + name + ".gguf");
    }

    printf("OK\n");

    return 0;
}
