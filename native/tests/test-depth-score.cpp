// what the scoring pass computes is the attention that the model computes: against a plain loop over the same queries, keys and
// values, for the architectures whose attention is not the usual one
//
// usage: test-depth-score DIR          the tiny models that `test-llama-archs -o DIR` writes

#include "llama-context.h"
#include "llama-depthkv.h"
#include "llama-kv-cache-depth.h"
#include "llama-model.h"
#include "llama.h"
#include "test-device.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: check failed: %s (%s)\n", __FILE__, __LINE__, #x, llama_depthkv_last_error()); exit(1); } } while (0)

static std::vector<float> get_f16(const ggml_tensor * t) {
    CHECK(t->type == GGML_TYPE_F16 && ggml_is_contiguous(t));

    std::vector<ggml_fp16_t> data(ggml_nelements(t));
    std::vector<float>       res (ggml_nelements(t));

    ggml_backend_tensor_get(t, data.data(), 0, ggml_nbytes(t));
    ggml_fp16_to_fp32_row(data.data(), res.data(), data.size());

    return res;
}

// [n_cells] attention of the sampled queries in rows [0, pos_q.size()), times the L1 norm of the values
static std::vector<double> reference(
        const llama_model                       & model,
        const llama_kv_cache_depth::kv_layer    & layer,
        const llama_kv_cache_depth::attn_params & attn,
        const std::vector<llama_pos>            & pos_q) {
    const auto & hparams = model.hparams;
    const auto & cells   = layer.cells[0];

    const int n_head   = hparams.n_head(layer.il);
    const int n_gqa    = n_head/hparams.n_head_kv(layer.il);
    const int n_embd_k = hparams.n_embd_head_k(layer.il);
    const int n_embd_v = hparams.n_embd_head_v(layer.il);

    const auto q = get_f16(layer.q);
    const auto k = get_f16(layer.k);
    const auto v = get_f16(layer.v); // transposed

    std::vector<float> sinks;
    if (attn.sinks) {
        sinks.resize(n_head);
        ggml_backend_tensor_get(attn.sinks, sinks.data(), 0, ggml_nbytes(attn.sinks));
    }

    std::vector<double> res(layer.n_cells, 0.0);

    for (size_t r = 0; r < pos_q.size(); ++r) {
        for (int h = 0; h < n_head; ++h) {
            std::vector<double> p(layer.n_cells, 0.0);

            double sum = 0.0;
            for (uint32_t i = 0; i < layer.n_cells; ++i) {
                if (cells.is_empty(i) || cells.pos_get(i) > pos_q[r]) {
                    continue;
                }

                double x = 0.0;
                for (int d = 0; d < n_embd_k; ++d) {
                    x += q[r*layer.q->ne[0] + h*n_embd_k + d]*k[i*layer.k->ne[0] + h/n_gqa*n_embd_k + d];
                }

                const double cap = hparams.f_attn_logit_softcapping;
                if (model.arch == LLM_ARCH_GROK) {
                    x = cap*tanh(x*hparams.f_attn_out_scale/cap);
                } else if (hparams.attn_soft_cap) {
                    x = cap*tanh(x/cap);
                }

                p[i] = exp(x*attn.kq_scale);
                sum += p[i];
            }
            if (!sinks.empty()) {
                sum += exp(sinks[h]);
            }

            for (uint32_t i = 0; i < layer.n_cells; ++i) {
                double norm = 0.0;
                for (int d = 0; d < n_embd_v; ++d) {
                    norm += fabs(v[(h/n_gqa*n_embd_v + d)*layer.n_cells + i]);
                }
                res[i] += norm*p[i]/sum;
            }
        }
    }

    return res;
}

static void test_model(const std::string & path) {
    auto mparams = test_model_params();

    llama_model * model = llama_model_load_from_file(path.c_str(), mparams);
    CHECK(model);

    auto cparams = llama_context_default_params();
    cparams.n_ctx           = 256;
    cparams.n_threads       = cparams.n_threads_batch = 2;
    cparams.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    cparams.swa_full        = false;

    auto depth = llama_depthkv_default_params();
    depth.budget = "0.5";

    llama_context * ctx = llama_depthkv_init_from_model(model, cparams, depth);
    CHECK(ctx);

    auto * kv = dynamic_cast<llama_kv_cache_depth *>(llama_get_memory(ctx));
    CHECK(kv);

    // the queries of the first ubatch
    const int n_tokens = 32;

    std::mt19937 rng(1);
    std::vector<llama_token> tokens(n_tokens);
    for (auto & t : tokens) {
        t = rng() % llama_vocab_n_tokens(llama_model_get_vocab(model));
    }
    CHECK(llama_decode(ctx, llama_batch_get_one(tokens.data(), n_tokens)) == 0);

    std::vector<const llama_kv_cache_depth::kv_layer *> layers;
    for (const auto & l : kv->get_layers()) {
        layers.push_back(&kv->get_layer(l.il));
    }

    std::vector<llama_kv_attn> attns;
    CHECK(kv->compute_attn(layers, 0, attns) == GGML_STATUS_SUCCESS);
    CHECK(attns.size() == layers.size());

    for (size_t il = 0; il < layers.size(); ++il) {
        const auto & layer = *layers[il];
        const auto & attn  = attns[il];

        CHECK(!attn.pos.empty() && attn.pos.back() == n_tokens - 1);

        const auto ref = reference(*model, layer, kv->get_attn(layer), attn.pos);

        double err = 0.0;
        double sum = 0.0;
        for (int i = 0; i < n_tokens; ++i) {
            err += fabs(attn.mass[i] - ref[i]);
            sum += ref[i];
        }

        printf("%-24s layer %u: error %.1e\n", std::filesystem::path(path).stem().string().c_str(), layer.il, err/sum);
        CHECK(sum > 0.0 && err < 1e-2*sum);
    }

    llama_free(ctx);
    llama_model_free(model);
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: %s DIR\n", argv[0]);
        return 1;
    }

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();

    // the usual one, an output scale and a tanh, soft caps, sinks, a scale of its own, keys that are rotated in part
    for (const char * name : { "llama-dense", "grok-moe", "gemma2-dense", "gpt-oss-moe", "granite-dense", "minicpm3-dense" }) {
        test_model(std::string(argv[1]) + "/" + name + ".gguf");
    }

    printf("OK\n");

    return 0;
}
