// every operation of our graphs that a GPU backend would leave to the CPU and that of the stock cache it would not, for every model of
// a directory: the tiny random ones that upstream's `test-llama-archs -o DIR` writes, or those of benchmarks/zoo. Metal, CUDA and Vulkan are asked through their own
// functions (test-depth-ops-backends.h), about graphs that a device of ours is given: the CPU, which says that it is a GPU
//
// usage: test-depth-ops DIR [--list]          --list: every operation, whoever supports it

#include "test-depth-ops-backends.h"

#include "llama-cpp.h"
#include "llama-depthkv.h"
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: check failed: %s (%s)\n", __FILE__, __LINE__, #x, llama_depthkv_last_error()); exit(1); } } while (0)

static constexpr int n_ctx_max = 1024;
static constexpr int n_decode  = 2;

// no multiple of 256: what kernels for whole blocks refuse shows
static constexpr const char * budget = "0.4";

//
// what is asked for
//

static const struct {
    const char * name;
    bool (* supports_op)(const ggml_tensor * op);
} backends[] = {
    { "Metal",  metal ::supports_op },
    { "CUDA",   cuda  ::supports_op },
    { "Vulkan", vulkan::supports_op },
};

// by operation: the backends that leave it to the CPU
using ops_t = std::map<std::string, std::set<std::string>>;

static ops_t * recorded = nullptr;

static constexpr const char * not_padded = ", n_kv % 256 != 0";

static std::string describe(const ggml_tensor * op) {
    std::string res = ggml_op_desc(op);

    res += std::string(" ") + ggml_type_name(op->type) + " <-";
    for (int i = 0; i < GGML_MAX_SRC && op->src[i]; ++i) {
        const auto * src = op->src[i];
        res += std::string(" ") + ggml_type_name(src->type);
        res += ggml_is_contiguous(src) ? "" : ggml_is_transposed(src) ? "'" : ggml_is_permuted(src) ? "*" : "-";
    }
    if (op->op == GGML_OP_FLASH_ATTN_EXT) {
        res += " heads of " + std::to_string(op->src[1]->ne[0]) + "," + std::to_string(op->src[2]->ne[0]);
        res += op->src[1]->ne[1] % 256 == 0 ? "" : not_padded;
    }

    return res;
}

static void record(const ggml_tensor * op) {
    if (!recorded || ggml_op_is_empty(op->op)) {
        return;
    }

    auto & missing = (*recorded)[describe(op)];

    for (const auto & backend : backends) {
        if (!backend.supports_op(op)) {
            missing.insert(backend.name);
        }
    }
}

//
// the device
//

static ggml_backend_dev_t cpu;

static ggml_backend_device      device;
static ggml_backend_buffer_type buffer_type;

static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    auto * host = ggml_backend_dev_buffer_type(cpu);
    auto * res  = host->iface.alloc_buffer(host, size);
    if (res) {
        res->buft = buft;
    }
    return res;
}

static ggml_backend_t init_backend(ggml_backend_dev_t dev, const char * params) {
    auto * res = cpu->iface.init_backend(cpu, params);
    res->device = dev;
    return res;
}

static void init_device() {
    cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    CHECK(cpu);

    buffer_type = *ggml_backend_dev_buffer_type(cpu);
    buffer_type.iface.get_name     = [](ggml_backend_buffer_type_t) { return "OPS0"; };
    buffer_type.iface.alloc_buffer = alloc_buffer;
    buffer_type.iface.is_host      = nullptr;
    buffer_type.device             = &device;

    device = *cpu;
    device.iface.get_name             = [](ggml_backend_dev_t) { return "OPS0"; };
    device.iface.get_description      = device.iface.get_name;
    device.iface.get_type             = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
    device.iface.init_backend         = init_backend;
    device.iface.get_buffer_type      = [](ggml_backend_dev_t) { return &buffer_type; };
    device.iface.buffer_from_host_ptr = nullptr;
    device.iface.supports_buft        = [](ggml_backend_dev_t, ggml_backend_buffer_type_t buft) { return buft == &buffer_type; };
    device.iface.get_memory           = [](ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = (size_t) 8 << 30; };

    device.iface.get_props = [](ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
        *props = {};
        props->name        = dev->iface.get_name(dev);
        props->description = dev->iface.get_description(dev);
        props->type        = dev->iface.get_type(dev);
        dev->iface.get_memory(dev, &props->memory_free, &props->memory_total);
    };

    // all that the CPU can: nothing is left to another one
    device.iface.supports_op = [](ggml_backend_dev_t, const ggml_tensor * op) {
        record(op);
        return cpu->iface.supports_op(cpu, op);
    };
}

//
// graphs
//

struct cache_type {
    ggml_type k;
    ggml_type v;
    bool      fa;

    std::string name() const {
        return std::string(ggml_type_name(k)) + "/" + ggml_type_name(v) + (fa ? ", flash attention" : "");
    }
};

// a prompt, decoding, what a context shift rotates; false if there is no such context
static bool run(llama_model * model, const cache_type & type, const char * kv_budget, ops_t & ops) {
    const int n_ctx    = std::min(n_ctx_max, llama_model_n_ctx_train(model));
    const int n_prompt = n_ctx*5/8;

    auto cparams = llama_context_default_params();
    cparams.n_ctx           = n_ctx;
    cparams.n_batch         = 256;
    cparams.n_ubatch        = 256;
    cparams.type_k          = type.k;
    cparams.type_v          = type.v;
    cparams.swa_full        = false;
    cparams.n_threads       = cparams.n_threads_batch = 1;
    cparams.flash_attn_type = type.fa ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;

    auto depth = llama_depthkv_default_params();
    depth.budget = kv_budget;

    llama_context_ptr ctx(llama_depthkv_init_from_model(model, cparams, depth));
    if (!ctx) {
        return false;
    }

    std::mt19937 rng(42);
    std::vector<llama_token> tokens(n_prompt + n_decode);
    for (auto & token : tokens) {
        token = rng()%llama_vocab_n_tokens(llama_model_get_vocab(model));
    }

    recorded = &ops;

    for (int i = 0; i < n_prompt + n_decode; ) {
        const int n = i < n_prompt ? std::min(n_prompt - i, 256) : 1;
        CHECK(llama_decode(ctx.get(), llama_batch_get_one(tokens.data() + i, n)) == 0);
        i += n;
    }

    // the stock cache aborts where it has to rotate BF16
    auto * mem = llama_get_memory(ctx.get());
    if (type.k != GGML_TYPE_BF16 && llama_memory_can_shift(mem) && llama_memory_seq_rm(mem, 0, 4, 68)) {
        llama_memory_seq_add(mem, 0, 68, -1, -64);
        CHECK(llama_decode(ctx.get(), llama_batch_get_one(tokens.data(), 1)) == 0);
    }

    recorded = nullptr;

    return true;
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: %s DIR [--list]\n", argv[0]);
        return 1;
    }

    const bool list = argc > 2 && std::string(argv[2]) == "--list";

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();

    init_device();

    int    n_contexts = 0;
    int    n_failed   = 0;
    size_t n_ops      = 0;

    for (const auto & entry : std::filesystem::directory_iterator(argv[1])) {
        if (entry.path().extension() != ".gguf") {
            continue;
        }

        ggml_backend_dev_t devices[] = { &device, nullptr };

        auto mparams = llama_model_default_params();
        mparams.n_gpu_layers = 999;
        mparams.devices      = devices;

        llama_model_ptr model(llama_model_load_from_file(entry.path().string().c_str(), mparams));
        CHECK(model);

        if (llama_depthkv_layer_count(model.get()) < 0) {
            continue;
        }

        std::vector<cache_type> types = { { GGML_TYPE_F16, GGML_TYPE_F16, false }, { GGML_TYPE_F16, GGML_TYPE_F16, true } };

        const std::string name = entry.path().stem().string();
        if (name == "llama-dense" || name == "gemma3-dense" || name == "gpt-oss-moe") {
            for (const auto type : { GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
                types.push_back({ type, type, true });
                types.push_back({ type, GGML_TYPE_F16, false });
            }
        }

        for (const auto & type : types) {
            ops_t stock;
            ops_t ours;

            if (!run(model.get(), type, "1", stock) || !run(model.get(), type, budget, ours)) {
                continue;
            }

            n_contexts++;
            n_ops = std::max(n_ops, ours.size());

            for (const auto & [op, missing] : ours) {
                // the stock cache always reads blocks of 256 cells
                const auto it       = stock.find(op.substr(0, op.find(not_padded)));
                const bool is_stock = it != stock.end();

                if (list) {
                    printf("%s, %s: %s%s\n", name.c_str(), type.name().c_str(), op.c_str(), is_stock ? "" : " (new)");
                }
                for (const auto & backend : missing) {
                    if (is_stock && it->second.count(backend)) {
                        continue;
                    }
                    fprintf(stderr, "%s, %s: %s leaves to the CPU: %s\n", name.c_str(), type.name().c_str(), backend.c_str(), op.c_str());
                    n_failed++;
                }
            }
        }
    }

    CHECK(n_contexts > 0 && n_ops > 20);

    printf("%s: up to %zu operations in each of %d contexts\n", n_failed ? "FAILED" : "OK", n_ops, n_contexts);

    return n_failed ? 1 : 0;
}
