// every architecture, on the tiny random models that upstream's `test-llama-archs -o DIR` writes: either a budget works
//   - with room for everything, logits are those of the stock cache, also after a position shift
//   - with half of the cells, evaluation goes on and the layers stay within their capacity, also after a position shift
// or it is refused with a line that names the architecture
//
// usage: test-depth-archs DIR

#include "llama-depthkv.h"
#include "llama.h"
#include "test-device.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

static const int n_ctx    = 256;
static const int n_prompt = 200;
static const int n_decode = 24;

// logits of the last token of the prompt and of every decoded one, empty on failure
static std::vector<float> eval(llama_context * ctx, const std::vector<llama_token> & tokens) {
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));

    std::vector<float> res;

    for (int i = 0; i < n_prompt + n_decode; ) {
        const int n = i < n_prompt ? std::min(n_prompt - i, 100) : 1;

        if (llama_decode(ctx, llama_batch_get_one(const_cast<llama_token *>(tokens.data() + i), n)) != 0) {
            return {};
        }

        i += n;

        if (i >= n_prompt) {
            const float * logits = llama_get_logits_ith(ctx, -1);
            res.insert(res.end(), logits, logits + n_vocab);
        }
    }

    return res;
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

// drop positions as a context shift does, and go on. an architecture that says it cannot shift is left alone
static bool shift(llama_context * ctx, llama_token token) {
    auto * mem = llama_get_memory(ctx);

    if (!llama_memory_can_shift(mem)) {
        return true;
    }
    if (!llama_memory_seq_rm(mem, 0, 4, 68)) {
        return false;
    }
    llama_memory_seq_add(mem, 0, 68, -1, -64);

    return llama_decode(ctx, llama_batch_get_one(&token, 1)) == 0;
}

// logits of a token after a shift, empty on failure or if the architecture says that it cannot shift
static std::vector<float> eval_shift(llama_context * ctx, llama_token token) {
    if (!llama_memory_can_shift(llama_get_memory(ctx)) || !shift(ctx, token)) {
        return {};
    }

    const float * logits = llama_get_logits_ith(ctx, -1);

    return std::vector<float>(logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx))));
}

static bool test_arch(const std::string & path) {
    const std::string name = std::filesystem::path(path).stem().string();

    llama_model_params mparams = test_model_params();

    llama_model * model = llama_model_load_from_file(path.c_str(), mparams);
    if (!model) {
        printf("%-32s FAIL: does not load\n", name.c_str());
        return false;
    }

    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx     = n_ctx;
    cparams.n_batch   = 128;
    cparams.n_ubatch  = 64;
    cparams.n_threads = cparams.n_threads_batch = 2;
    cparams.swa_full  = false;

    llama_depthkv_params half = llama_depthkv_default_params();
    half.budget = "0.5";

    const int n_layers = llama_depthkv_layer_count(model);

    {
        char arch[64];
        llama_model_meta_val_str(model, "general.architecture", arch, sizeof(arch));

        llama_context * ctx = llama_depthkv_init_from_model(model, cparams, half);

        const bool is_named = strstr(llama_depthkv_last_error(), (std::string("'") + arch + "'").c_str());

        if (!ctx || n_layers < 0) {
            const bool ok = !ctx && is_named;

            printf("%-32s %s: %s\n", name.c_str(), ok ? "refused" : "FAIL: not refused by name", llama_depthkv_last_error());

            llama_free(ctx);
            llama_model_free(model);
            return ok;
        }

        llama_free(ctx);
    }

    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

    std::mt19937 rng(42);
    std::vector<llama_token> tokens(n_prompt + n_decode);
    for (auto & t : tokens) {
        t = rng()%n_vocab;
    }

    bool ok = true;

    for (auto fa : { LLAMA_FLASH_ATTN_TYPE_DISABLED, LLAMA_FLASH_ATTN_TYPE_ENABLED }) {
        cparams.flash_attn_type = fa;

        // stock against a depth cache with room for everything
        const std::vector<uint32_t> cells(n_layers, n_ctx);

        llama_depthkv_params full = llama_depthkv_default_params();
        full.n_layers = n_layers;
        full.cells    = cells.data();

        llama_context * ctx_stock = llama_init_from_model(model, cparams);
        llama_context * ctx_full  = llama_depthkv_init_from_model(model, cparams, full);
        llama_context * ctx_half  = llama_depthkv_init_from_model(model, cparams, half);

        const char * why = nullptr;

        double err       = 0.0;
        double err_shift = 0.0;

        if (!ctx_stock || !ctx_full || !ctx_half) {
            why = llama_depthkv_last_error();
        } else {
            const auto stock = eval(ctx_stock, tokens);

            const auto res_full = eval(ctx_full, tokens);
            const auto res_half = eval(ctx_half, tokens);

            if (stock.empty() || res_full.empty() || res_half.empty()) {
                why = "decode failed";
            } else {
                err = nmse(stock, res_full);

                // nothing is evicted, so nothing may differ but the order of a few additions
                if (!(err < 1e-12)) {
                    why = "logits differ from stock";
                }
                for (const float x : res_half) {
                    if (!std::isfinite(x)) {
                        why = "logits are not finite";
                    }
                }
            }

            for (int i = 0; i < n_layers; ++i) {
                llama_depthkv_layer l;
                llama_depthkv_get_layer(ctx_half, i, 0, &l);
                if (l.used > l.cells || l.used + l.evicted != (uint32_t) (n_prompt + n_decode)) {
                    why = "cells do not add up";
                }
            }

            if (!why && !shift(ctx_half, tokens[0])) {
                why = "decode after a shift failed";
            }

            const auto shift_full  = why ? std::vector<float>() : eval_shift(ctx_full,  tokens[0]);
            const auto shift_stock = why ? std::vector<float>() : eval_shift(ctx_stock, tokens[0]);

            // windows shift in the full-size cache of stock only
            if (!shift_full.empty()) {
                err_shift = nmse(shift_stock, shift_full);

                if (!(err_shift < 1e-6)) {
                    why = "logits after a shift differ from stock";
                }
            }
        }

        printf("%-32s %s: fa = %d, layers = %d, nmse = %.1e, after a shift %.1e%s%s\n", name.c_str(), why ? "FAIL" : "OK",
                fa == LLAMA_FLASH_ATTN_TYPE_ENABLED, n_layers, err, err_shift, why ? ", " : "", why ? why : "");

        ok = ok && !why;

        llama_free(ctx_stock);
        llama_free(ctx_full);
        llama_free(ctx_half);
    }

    llama_model_free(model);

    return ok;
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: %s DIR\n", argv[0]);
        return 1;
    }

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();

    std::vector<std::string> paths;
    for (const auto & entry : std::filesystem::directory_iterator(argv[1])) {
        if (entry.path().extension() == ".gguf") {
            paths.push_back(entry.path().string());
        }
    }
    std::sort(paths.begin(), paths.end());

    int n_fail = 0;
    for (const auto & path : paths) {
        n_fail += !test_arch(path);
        fflush(stdout);
    }

    printf("%zu models, %d failed\n", paths.size(), n_fail);

    return paths.empty() || n_fail > 0;
}
