// gives a model that exists only as metadata its tensors, as many and as large as the architecture wants them: random weights,
// quantized where they are large, or none at all (a sparse file, enough to create a context)
//
// usage: depth-zoo-make METADATA.gguf OUT.gguf [--no-weights]

#include "ggml.h"
#include "gguf.h"
#include "llama-model.h"
#include "llama.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

// long has 32 bits there
#if defined(_WIN32)
#    define fseek _fseeki64
#    define ftell _ftelli64
#endif

static void set_tensor_data(ggml_tensor * tensor, void * userdata) {
    GGML_UNUSED(tensor);
    GGML_UNUSED(userdata);
}

static bool is_matrix(const ggml_tensor * t) {
    return ggml_n_dims(t) > 1 && t->ne[0] % ggml_blck_size(GGML_TYPE_Q8_0) == 0 && !strstr(t->name, "norm") && !strstr(t->name, "bias");
}

// rows of unit variance for an embedding, otherwise what keeps the variance of the activations
static std::vector<char> random_data(const ggml_tensor * t, std::mt19937 & rng) {
    std::vector<char> res(ggml_nbytes(t));

    const float stdev = strstr(t->name, "token_embd") ? 1.0f : 1.0f/sqrtf(t->ne[0]);

    if (t->type == GGML_TYPE_Q8_0) {
        const size_t      size_blk = ggml_type_size(GGML_TYPE_Q8_0);
        const ggml_fp16_t d        = ggml_fp32_to_fp16(stdev*sqrtf(3.0f)/127.0f);

        std::uniform_int_distribution<uint32_t> dis;
        for (size_t i = 0; i < res.size(); i += size_blk) {
            memcpy(&res[i], &d, sizeof(d));
            for (size_t j = sizeof(d); j < size_blk; j += sizeof(uint32_t)) {
                const uint32_t x = dis(rng);
                memcpy(&res[i + j], &x, sizeof(x));
            }
        }

        return res;
    }

    std::normal_distribution<float> dis(0.0f, stdev);

    auto * dst = (float *) res.data();
    for (int64_t i = 0; i < ggml_nelements(t); ++i) {
        if (strstr(t->name, "rope_")) {
            dst[i] = 1.0f + (float) i/ggml_nelements(t); // divisors of the frequencies
        } else if (strstr(t->name, "norm") || strstr(t->name, "scale")) {
            dst[i] = 1.0f;
        } else {
            dst[i] = dis(rng);
        }
    }

    return res;
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s METADATA.gguf OUT.gguf [--no-weights]\n", argv[0]);
        return 1;
    }

    const bool weights = argc < 4 || strcmp(argv[3], "--no-weights") != 0;

    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            fputs(text, stderr);
        }
    }, nullptr);
    llama_backend_init();

    gguf_init_params gparams = { /*.no_alloc =*/ true, /*.ctx =*/ nullptr };

    gguf_context * meta = gguf_init_from_file(argv[1], gparams);
    if (!meta) {
        fprintf(stderr, "%s: cannot be read\n", argv[1]);
        return 1;
    }

    llama_model_params mparams = llama_model_default_params();
    mparams.n_gpu_layers = 0;
    mparams.no_alloc     = true;

    llama_model * model = llama_model_init_from_user(meta, set_tensor_data, nullptr, mparams);
    if (!model) {
        fprintf(stderr, "%s: no such model\n", argv[1]);
        return 1;
    }

    // the loader has decided about names and shapes, types are ours

    ggml_init_params params = { /*.mem_size =*/ 16384*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true };

    ggml_context * ctx = ggml_init(params);
    gguf_context * out = gguf_init_empty();

    gguf_set_kv(out, meta);

    std::set<std::string> names;
    std::vector<ggml_tensor *> tensors;

    for (const auto & [name, src] : llama_internal_get_tensor_map(model)) {
        if (!names.insert(name).second) {
            continue;
        }

        ggml_tensor * t = ggml_new_tensor(ctx, is_matrix(src) ? GGML_TYPE_Q8_0 : GGML_TYPE_F32, GGML_MAX_DIMS, src->ne);
        ggml_set_name(t, name.c_str());

        gguf_add_tensor(out, t);
        tensors.push_back(t);
    }

    if (!gguf_write_to_file(out, argv[2], /*.only_meta =*/ true)) {
        return 1;
    }

    FILE * file = fopen(argv[2], "r+b");
    if (!file) {
        return 1;
    }

    std::mt19937 rng(42);

    bool ok = true;
    for (const auto * t : tensors) {
        const size_t offs = gguf_get_meta_size(out) + gguf_get_tensor_offset(out, gguf_find_tensor(out, t->name));

        // without weights the last byte is enough, what lies before it reads as 0
        const auto data = weights ? random_data(t, rng) : std::vector<char>(1);

        ok = ok && fseek(file, offs + ggml_nbytes(t) - data.size(), SEEK_SET) == 0;
        ok = ok && fwrite(data.data(), 1, data.size(), file) == data.size();
    }

    // the data of the last tensor is padded too
    const size_t n_align = gguf_get_alignment(out);
    fseek(file, 0, SEEK_END);
    for (size_t size = ftell(file); ok && size % n_align != 0; ++size) {
        ok = fputc(0, file) == 0;
    }

    ok = fclose(file) == 0 && ok;

    gguf_free(out);
    gguf_free(meta);
    ggml_free(ctx);
    llama_model_free(model);

    return ok ? 0 : 1;
}
