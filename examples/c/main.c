// Reads a file in a KV cache that is smaller than the file, and continues it.
#include "llama-depthkv.h"

#include <stdio.h>
#include <stdlib.h>

static void fail(const char * what, const char * why) {
    fprintf(stderr, "example: %s: %s\n", what, why);
    exit(1);
}

static void log_errors(enum ggml_log_level level, const char * text, void * user_data) {
    (void) user_data;
    if (level == GGML_LOG_LEVEL_ERROR) { fputs(text, stderr); }
}

int main(int argc, char ** argv) {
    if (argc < 4) { fail("usage", "example MODEL FILE BUDGET [TOKENS], the budget as 0.4, 40%, 96MiB or 4096t"); }
    if (llama_depthkv_version() != LLAMA_DEPTHKV_VERSION) { fail("libllama", "header and library are of different versions"); }
    const int32_t n_predict = argc > 4 ? atoi(argv[4]) : 32, n_pin = 16, n_batch = 512;

    llama_log_set(log_errors, NULL);
    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) { fail(argv[1], "cannot be loaded"); }
    const struct llama_vocab * vocab = llama_model_get_vocab(model);

    static char text[1 << 20];
    FILE * file = fopen(argv[2], "rb");
    if (!file) { fail(argv[2], "cannot be read"); }
    const int32_t n_text = (int32_t) fread(text, 1, sizeof(text), file);
    fclose(file);

    static llama_token tokens[1 << 20];
    const int32_t n_prompt = llama_tokenize(vocab, text, n_text, tokens, 1 << 20, true, false);
    if (n_prompt <= n_pin) { fail(argv[2], "is too short"); }

    // the context counts positions, all of them; the budget says for how many of them, on average over the layers, there are cells
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx   = n_prompt + n_predict;
    params.n_batch = n_batch;
    struct llama_depthkv_params depth = llama_depthkv_default_params();
    depth.budget = argv[3];
    struct llama_context * ctx = llama_depthkv_init_from_model(model, params, depth);
    if (!ctx) { fail("context", llama_depthkv_last_error()); }

    // what must not be forgotten is pinned before anything can be evicted: here the first tokens, in an app the system prompt
    if (!llama_depthkv_pin(ctx, 0, 0, n_pin)) { fail("pin", llama_depthkv_last_error()); }
    for (int32_t i = 0; i < n_prompt; i += n_batch) {
        const int32_t n = n_prompt - i < n_batch ? n_prompt - i : n_batch;
        if (llama_decode(ctx, llama_batch_get_one(tokens + i, n)) != 0) { fail("prefill", "failed"); }
    }

    struct llama_sampler * greedy = llama_sampler_init_greedy();
    for (int32_t i = 0; i < n_predict; ++i) {
        llama_token token = llama_sampler_sample(greedy, ctx, -1);
        if (llama_vocab_is_eog(vocab, token)) { break; }
        char piece[256];
        const int32_t n = llama_token_to_piece(vocab, token, piece, sizeof(piece), 0, false);
        printf("%.*s", n > 0 ? n : 0, piece);
        if (llama_decode(ctx, llama_batch_get_one(&token, 1)) != 0) { fail("decode", "failed"); }
    }

    struct llama_depthkv_stats stats;
    if (!llama_depthkv_get_stats(ctx, &stats)) { fail("statistics", llama_depthkv_last_error()); }
    printf("\n\n%d tokens, KV cache %.1f of %.1f MiB, %llu cells evicted in %.0f ms\n", n_prompt, stats.bytes / 1048576.0,
           stats.bytes_full / 1048576.0, (unsigned long long) stats.n_evict, stats.t_evict_us / 1000.0);
    for (int32_t i = 0; i < stats.n_layers; ++i) {
        struct llama_depthkv_layer layer;
        llama_depthkv_get_layer(ctx, i, 0, &layer);
        printf("layer %2d: %u of %u cells\n", layer.layer, layer.used, layer.cells);
    }

    llama_sampler_free(greedy);
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}
