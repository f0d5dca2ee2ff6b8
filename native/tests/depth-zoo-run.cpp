// what a chat does to a cache with a budget, on one model, with every attention and type of K and V:
//   - with room for everything, logits are those of the stock cache, also after a context shift
//   - with half of the cells: a prompt larger than they are, decoding, a context shift, save and restore
// and on a model of all layers, whose weights may be missing: contexts are created
//
// prints a line for each combination: flash attention, K, V, whether a context shift was tried, result
//
// usage: depth-zoo-run MODEL.gguf [--create]

#include "llama-depthkv.h"
#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

static const int n_ctx    = 256;
static const int n_prompt = 200;
static const int n_decode = 6;

struct test_case {
    llama_flash_attn_type fa;
    ggml_type             type_k;
    ggml_type             type_v;
};

// without flash attention V cannot be quantized
static const test_case test_cases[] = {
    { LLAMA_FLASH_ATTN_TYPE_AUTO,     GGML_TYPE_F16,  GGML_TYPE_F16  },
    { LLAMA_FLASH_ATTN_TYPE_DISABLED, GGML_TYPE_F16,  GGML_TYPE_F16  },
    { LLAMA_FLASH_ATTN_TYPE_DISABLED, GGML_TYPE_Q8_0, GGML_TYPE_F16  },
    { LLAMA_FLASH_ATTN_TYPE_DISABLED, GGML_TYPE_Q4_0, GGML_TYPE_F16  },
    { LLAMA_FLASH_ATTN_TYPE_ENABLED,  GGML_TYPE_F16,  GGML_TYPE_F16  },
    { LLAMA_FLASH_ATTN_TYPE_ENABLED,  GGML_TYPE_Q8_0, GGML_TYPE_Q8_0 },
    { LLAMA_FLASH_ATTN_TYPE_ENABLED,  GGML_TYPE_Q4_0, GGML_TYPE_Q4_0 },
};

static std::string last_error;

static bool decode(llama_context * ctx, const llama_token * tokens, int n) {
    return llama_decode(ctx, llama_batch_get_one(const_cast<llama_token *>(tokens), n)) == 0;
}

static std::vector<float> get_logits(llama_context * ctx) {
    const float * logits = llama_get_logits_ith(ctx, -1);

    return std::vector<float>(logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx))));
}

// drop positions as a context shift does
static bool shift(llama_context * ctx) {
    auto * mem = llama_get_memory(ctx);

    if (!llama_memory_seq_rm(mem, 0, 4, 36)) {
        return false;
    }
    llama_memory_seq_add(mem, 0, 36, -1, -32);

    return true;
}

// logits of the last token of the prompt, of every decoded one, and of the one after a context shift. empty on failure
static std::vector<float> eval(llama_context * ctx, const std::vector<llama_token> & tokens, bool with_shift) {
    std::vector<float> res;

    const auto add = [&](int i, int n) {
        if (!decode(ctx, tokens.data() + i, n)) {
            return false;
        }
        const auto logits = get_logits(ctx);
        res.insert(res.end(), logits.begin(), logits.end());
        return true;
    };

    if (!add(0, n_prompt)) {
        return {};
    }
    for (int i = n_prompt; i < n_prompt + n_decode; ++i) {
        if (!add(i, 1)) {
            return {};
        }
    }
    if (with_shift && (!shift(ctx) || !add(0, 1))) {
        return {};
    }

    return res;
}

// the shift of the stock cache reads a null pointer where a quantized K is not stored rotated, and cannot cut the part of a head
// that RoPE leaves alone off a quantized row
static bool can_shift_stock(const llama_model * model, ggml_type type_k) {
    char arch[64];
    llama_model_meta_val_str(model, "general.architecture", arch, sizeof(arch));

    const auto get = [&](const char * key) {
        char val[64] = "0";
        llama_model_meta_val_str(model, (std::string(arch) + "." + key).c_str(), val, sizeof(val));
        return atoi(val);
    };

    const int n_embd_head = get("attention.key_length");

    return !ggml_is_quantized(type_k) || (n_embd_head % 64 == 0 && get("rope.dimension_count") == n_embd_head);
}

static double nmse(const std::vector<float> & a, const std::vector<float> & b) {
    double err = 0.0;
    double ref = 0.0;
    for (size_t i = 0; i < a.size(); ++i) {
        err += (double) (a[i] - b[i])*(a[i] - b[i]);
        ref += (double) a[i]*a[i];
    }
    return err/ref;
}

// whether a sequence goes on in the same way after it went through a buffer
static bool restore(llama_context * src, llama_context * dst, llama_token token) {
    std::vector<uint8_t> state(llama_state_seq_get_size(src, 0));

    if (llama_state_seq_get_data(src, state.data(), state.size(), 0) != state.size()) {
        return false;
    }

    const auto next = [&](llama_context * ctx, bool set) {
        if (set && llama_state_seq_set_data(ctx, state.data(), state.size(), 0) != state.size()) {
            return std::vector<float>();
        }
        return decode(ctx, &token, 1) ? get_logits(ctx) : std::vector<float>();
    };

    const auto live  = next(src, false);
    const auto again = next(src, true);
    const auto other = next(dst, true);

    // windows come back in other rows, and the order of additions may then tip a rounding of some value
    return !live.empty() && !again.empty() && !other.empty() && nmse(live, again) < 1e-2 && nmse(again, other) < 1e-10;
}

struct test_contexts {
    llama_context * stock = nullptr;
    llama_context * full  = nullptr; // room for everything
    llama_context * half  = nullptr;
    llama_context * other = nullptr; // like half

    ~test_contexts() {
        for (auto * ctx : { stock, full, half, other }) {
            llama_free(ctx);
        }
    }
};

static const char * test(llama_model * model, llama_context_params cparams, bool & shifted) {
    const int n_layers = llama_depthkv_layer_count(model);

    std::mt19937 rng(42);
    std::vector<llama_token> tokens(n_prompt + n_decode);
    for (auto & t : tokens) {
        t = rng() % llama_vocab_n_tokens(llama_model_get_vocab(model));
    }

    const std::vector<uint32_t> cells(n_layers, n_ctx);

    llama_depthkv_params full = llama_depthkv_default_params();
    full.n_layers = n_layers;
    full.cells    = cells.data();

    llama_depthkv_params half = llama_depthkv_default_params();
    half.budget = "0.5";

    test_contexts ctx;

    ctx.full  = llama_depthkv_init_from_model(model, cparams, full);
    ctx.half  = llama_depthkv_init_from_model(model, cparams, half);
    ctx.other = llama_depthkv_init_from_model(model, cparams, half);

    if (!ctx.full || !ctx.half || !ctx.other) {
        last_error = llama_depthkv_last_error();
        return last_error.c_str();
    }

    const bool can_shift = llama_memory_can_shift(llama_get_memory(ctx.full)); // windows do not
    const bool can_both  = can_shift && can_shift_stock(model, cparams.type_k);

    const auto res_full = eval(ctx.full, tokens, can_both);
    const auto res_half = eval(ctx.half, tokens, can_shift);

    if (res_full.empty() || res_half.empty()) {
        return "decode failed";
    }

    shifted = can_shift;

    // nothing is evicted, so nothing may differ from stock but the order of a few additions. left to itself, a context with a
    // budget may choose the other kernel
    const bool fa_auto = cparams.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_AUTO;

    double err = INFINITY;
    for (auto fa : { LLAMA_FLASH_ATTN_TYPE_DISABLED, LLAMA_FLASH_ATTN_TYPE_ENABLED }) {
        if (!fa_auto && fa != cparams.flash_attn_type) {
            continue;
        }

        llama_context_params params = cparams;
        params.flash_attn_type = fa;
        params.n_ubatch        = llama_n_ubatch(ctx.full); // flash attention adds up in another order for another ubatch

        llama_free(ctx.stock);
        ctx.stock = llama_init_from_model(model, params);
        if (!ctx.stock) {
            return "stock creates no context";
        }

        const auto res_stock = eval(ctx.stock, tokens, can_both);
        if (res_stock.size() != res_full.size()) {
            return "stock does not decode";
        }

        if (!ggml_is_quantized(cparams.type_v)) {
            err = std::min(err, nmse(res_stock, res_full));
            continue;
        }

        // quantized values have another kernel than in stock, which rounds queries to 8 bits: it is about as near to F16 cells. a
        // router may choose other experts
        params.type_k = params.type_v = GGML_TYPE_F16;

        llama_free(ctx.stock);
        ctx.stock = llama_init_from_model(model, params);
        const auto res_f16 = ctx.stock ? eval(ctx.stock, tokens, can_both) : std::vector<float>();

        err = res_f16.size() == res_full.size() && nmse(res_f16, res_full) <= 3.0*nmse(res_f16, res_stock) + 1e-7 ? 0.0 : INFINITY;
    }
    if (!(err < 1e-10)) {
        return "logits differ from stock";
    }

    for (const float x : res_half) {
        if (!std::isfinite(x)) {
            return "logits are not finite";
        }
    }

    for (int i = 0; i < n_layers; ++i) {
        llama_depthkv_layer l;
        llama_depthkv_get_layer(ctx.half, i, 0, &l);
        if (l.used > l.cells || l.cells >= (uint32_t) n_prompt || l.evicted == 0) {
            return "nothing was evicted";
        }
    }

    if (!restore(ctx.half, ctx.other, tokens[1])) {
        return "save and restore failed";
    }

    return nullptr;
}

static const char * test_create(llama_model * model, llama_context_params cparams) {
    llama_depthkv_params budget = llama_depthkv_default_params();
    budget.budget = "0.4";

    test_contexts ctx;

    ctx.half = llama_depthkv_init_from_model(model, cparams, budget);
    if (!ctx.half) {
        last_error = llama_depthkv_last_error();
        return last_error.c_str();
    }

    return nullptr;
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: %s MODEL.gguf [--create]\n", argv[0]);
        return 1;
    }

    const bool create = argc > 2 && strcmp(argv[2], "--create") == 0;

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();

    llama_model_params mparams = llama_model_default_params();
    mparams.n_gpu_layers = 0;
    mparams.load_mode    = LLAMA_LOAD_MODE_MMAP;

    llama_model * model = llama_model_load_from_file(argv[1], mparams);
    if (!model) {
        printf("FAIL: does not load\n");
        return 1;
    }

    if (llama_depthkv_layer_count(model) < 0) {
        printf("refused: %s\n", llama_depthkv_last_error());
        return 2;
    }

    int n_fail = 0;

    for (const auto & tc : test_cases) {
        llama_context_params cparams = llama_context_default_params();
        cparams.n_ctx           = create ? 2048 : n_ctx;
        cparams.n_threads       = cparams.n_threads_batch = 2;
        cparams.swa_full        = false;
        cparams.flash_attn_type = tc.fa;
        cparams.type_k          = tc.type_k;
        cparams.type_v          = tc.type_v;

        bool shifted = false;

        const char * why = create ? test_create(model, cparams) : test(model, cparams, shifted);

        printf("%s\t%s\t%s\t%d\t%s\n", llama_flash_attn_type_name(tc.fa), ggml_type_name(tc.type_k), ggml_type_name(tc.type_v),
                shifted, why ? why : "ok");
        fflush(stdout);

        n_fail += why != nullptr;
    }

    llama_model_free(model);

    return n_fail > 0;
}
