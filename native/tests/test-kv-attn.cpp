// attention over quantized cells: what it computes is that of a plain loop over the same numbers, for every shape of the heads
//
// usage: test-kv-attn [--bench]          --bench: what a cell takes, beside the flash attention kernel of the CPU backend

#include "llama-kv-depth-attn.cpp" // kernels that this processor would not choose, too

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <tuple>
#include <vector>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, #x); exit(1); } } while (0)

struct shape {
    ggml_type type_k;
    ggml_type type_v;

    int n_embd_k;
    int n_embd_v;
    int n_head_kv;
    int n_gqa;
    int n_kv;
    int n_cells;
    int n_stream;

    bool sinks;
};

static std::mt19937 rng(42);

static std::vector<float> randoms(size_t n, float scale) {
    std::normal_distribution<float> dist(0.0f, scale);

    std::vector<float> res(n);
    for (auto & x : res) {
        x = dist(rng);
    }

    return res;
}

// quantized, and as it is read again
static std::vector<uint8_t> quantize(ggml_type type, std::vector<float> & x) {
    std::vector<uint8_t> res(ggml_row_size(type, x.size()));

    ggml_quantize_chunk(type, x.data(), res.data(), 0, 1, x.size(), nullptr);
    ggml_get_type_traits(type)->to_float(res.data(), x.data(), x.size());

    return res;
}

static void test(ggml_backend_t backend, const shape & s) {
    const int n_head = s.n_head_kv*s.n_gqa;

    ggml_init_params params = { ggml_tensor_overhead()*32 + ggml_graph_overhead(), nullptr, true };
    ggml_context_ptr ctx_ptr(ggml_init(params));
    auto * ctx = ctx_ptr.get();

    // the cache has more cells than are read
    auto * k    = ggml_new_tensor_3d(ctx, s.type_k, s.n_embd_k*s.n_head_kv, s.n_cells, s.n_stream);
    auto * v    = ggml_new_tensor_3d(ctx, s.type_v, s.n_embd_v*s.n_head_kv, s.n_cells, s.n_stream);
    auto * q    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s.n_embd_k, n_head, s.n_stream);
    auto * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, s.n_kv, 1, 1, s.n_stream);
    auto * sink = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_head);

    auto * kv = ggml_view_4d(ctx, k, s.n_embd_k, s.n_head_kv, s.n_kv, s.n_stream, ggml_row_size(s.type_k, s.n_embd_k), k->nb[1], k->nb[2], 0);
    auto * vv = ggml_view_4d(ctx, v, s.n_embd_v, s.n_head_kv, s.n_kv, s.n_stream, ggml_row_size(s.type_v, s.n_embd_v), v->nb[1], v->nb[2], 0);

    auto * out = llama_kv_depth_build_attn(ctx, q, kv, vv, mask, s.sinks ? sink : nullptr);

    auto * gf = ggml_new_graph(ctx);
    ggml_build_forward_expand(gf, out);

    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx, backend));

    auto data_q = randoms(ggml_nelements(q), 0.3f);
    auto data_k = randoms(ggml_nelements(k), 1.0f);
    auto data_v = randoms(ggml_nelements(v), 1.0f);
    auto data_s = randoms(n_head, 1.0f);

    const auto raw_k = quantize(s.type_k, data_k);
    const auto raw_v = quantize(s.type_v, data_v);

    // in the last stream the first 256 cells are empty
    std::vector<float> data_m(ggml_nelements(mask));
    for (size_t i = 0; i < data_m.size(); ++i) {
        const bool is_empty = i/s.n_kv == (size_t) s.n_stream - 1 && i%s.n_kv < 256 && s.n_kv > 256;
        data_m[i] = is_empty || rng()%5 == 0 ? -INFINITY : 0.0f;
    }
    std::vector<ggml_fp16_t> half(data_m.size());
    ggml_fp32_to_fp16_row(data_m.data(), half.data(), half.size());

    ggml_backend_tensor_set(q,    data_q.data(), 0, ggml_nbytes(q));
    ggml_backend_tensor_set(k,    raw_k .data(), 0, ggml_nbytes(k));
    ggml_backend_tensor_set(v,    raw_v .data(), 0, ggml_nbytes(v));
    ggml_backend_tensor_set(mask, half  .data(), 0, ggml_nbytes(mask));
    ggml_backend_tensor_set(sink, data_s.data(), 0, ggml_nbytes(sink));

    CHECK(ggml_backend_graph_compute(backend, gf) == GGML_STATUS_SUCCESS);

    std::vector<float> res(ggml_nelements(out));
    ggml_backend_tensor_get(out, res.data(), 0, ggml_nbytes(out));

    double err = 0.0;
    double ref = 0.0;

    for (int is = 0; is < s.n_stream; ++is) {
        for (int h = 0; h < n_head; ++h) {
            const int hk = h/s.n_gqa;

            std::vector<double> p(s.n_kv);
            double max = s.sinks ? data_s[h] : -INFINITY;

            for (int i = 0; i < s.n_kv; ++i) {
                double dot = 0.0;
                for (int j = 0; j < s.n_embd_k; ++j) {
                    dot += (double) data_q[(is*n_head + h)*s.n_embd_k + j]*data_k[((size_t) is*s.n_cells + i)*s.n_embd_k*s.n_head_kv + hk*s.n_embd_k + j];
                }
                p[i] = dot + data_m[is*s.n_kv + i];
                max  = std::max(max, p[i]);
            }

            double sum = s.sinks ? std::exp(data_s[h] - max) : 0.0;
            for (auto & x : p) {
                x    = std::exp(x - max);
                sum += x;
            }

            for (int j = 0; j < s.n_embd_v; ++j) {
                double x = 0.0;
                for (int i = 0; i < s.n_kv; ++i) {
                    x += p[i]*data_v[((size_t) is*s.n_cells + i)*s.n_embd_v*s.n_head_kv + hk*s.n_embd_v + j];
                }
                x /= sum;

                const double d = x - res[(is*n_head + h)*s.n_embd_v + j];
                err += d*d;
                ref += x*x;
            }
        }
    }

    if (!(err <= 1e-6*ref)) {
        fprintf(stderr, "%s/%s, heads of %d and %d, %d groups of %d, %d cells, %d streams, sinks %d: error %g\n", ggml_type_name(s.type_k), ggml_type_name(s.type_v),
                s.n_embd_k, s.n_embd_v, s.n_head_kv, s.n_gqa, s.n_kv, s.n_stream, s.sinks, err/ref);
        exit(1);
    }
}

#if defined(__GNUC__)
// every kernel that this processor can run computes the same, a partial result after the other
static void test_levels() {
    std::vector<const llama_kv_attn_kernels *> levels = { &llama_kv_attn_any::kernels };
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        levels.push_back(&llama_kv_attn_avx2::kernels);
    }
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        levels.push_back(&llama_kv_attn_avx512::kernels);
    }
#endif
    const int n = 160, n_embd = 96, n_head = 7;

    for (const auto & [type_k, type_v, kernel] : {
            std::make_tuple(GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, &llama_kv_attn_kernels::q8_0_q8_0),
            std::make_tuple(GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, &llama_kv_attn_kernels::q8_0_q4_0),
            std::make_tuple(GGML_TYPE_Q4_0, GGML_TYPE_Q4_0, &llama_kv_attn_kernels::q4_0_q4_0) }) {
        auto data_k = randoms(n*n_embd, 1.0f);
        auto data_v = randoms(n*n_embd, 1.0f);

        const auto q = randoms(n_head*n_embd, 0.3f);
        const auto k = quantize(type_k, data_k);
        const auto v = quantize(type_v, data_v);

        std::vector<uint16_t> mask(n);
        for (auto & x : mask) {
            x = rng()%5 == 0 ? 0xFC00 : 0;
        }

        std::vector<float> first;
        for (const auto * level : levels) {
            std::vector<float> res(n_head*(n_embd + 2));

            llama_kv_attn_part part = {
                k.data(), v.data(), ggml_row_size(type_k, n_embd), ggml_row_size(type_v, n_embd), mask.data(), n, n_embd, n_embd, q.data(), res.data() };
            (level->*kernel)(part, n_head);

            first = first.empty() ? res : first;
            for (size_t i = 0; i < res.size(); ++i) {
                CHECK(std::fabs(res[i] - first[i]) <= 1e-4f*(1.0f + std::fabs(first[i])));
            }
        }
    }

    printf("%zu kernels\n", levels.size());
}
#endif

// microseconds of a graph that attends n_layers times, a median
static double bench(ggml_backend_t backend, const shape & s, bool fa, int n_layers) {
    const int n_head = s.n_head_kv*s.n_gqa;

    ggml_init_params params = { ggml_tensor_overhead()*(16*n_layers + 16) + ggml_graph_overhead(), nullptr, true };
    ggml_context_ptr ctx_ptr(ggml_init(params));
    auto * ctx = ctx_ptr.get();

    auto * q    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s.n_embd_k, n_head, 1);
    auto * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, s.n_kv, 1, 1, 1);
    auto * gf   = ggml_new_graph(ctx);

    for (int il = 0; il < n_layers; ++il) {
        auto * k = ggml_new_tensor_3d(ctx, s.type_k, s.n_embd_k, s.n_head_kv, s.n_kv);
        auto * v = ggml_new_tensor_3d(ctx, s.type_v, s.n_embd_v, s.n_head_kv, s.n_kv);

        ggml_tensor * out;
        if (fa) {
            out = ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), ggml_permute(ctx, k, 0, 2, 1, 3), ggml_permute(ctx, v, 0, 2, 1, 3), mask, 1.0f, 0.0f, 0.0f);
            ggml_prec_set_acc(out, GGML_PREC_F32);
        } else {
            out = llama_kv_depth_build_attn(ctx, q, k, v, mask, nullptr);
        }
        ggml_build_forward_expand(gf, out);
    }

    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx, backend));
    ggml_backend_buffer_clear(buffer.get(), 0);

    std::vector<double> times;
    for (int i = 0; i < 21; ++i) {
        const int64_t t_start_us = ggml_time_us();
        CHECK(ggml_backend_graph_compute(backend, gf) == GGML_STATUS_SUCCESS);
        times.push_back(ggml_time_us() - t_start_us);
    }
    std::sort(times.begin(), times.end());

    return times[times.size()/2];
}

int main(int argc, char ** argv) {
    ggml_time_init();
    ggml_backend_load_all();

    ggml_backend_ptr backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    CHECK(backend);

    auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend.get()));
    auto * set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    set_n_threads(backend.get(), 2);

    if (argc > 1 && strcmp(argv[1], "--bench") == 0) {
        const shape shapes[] = {
            { GGML_TYPE_Q8_0, GGML_TYPE_Q8_0,  64,  64, 3, 3, 5376, 5376, 1, false }, // SmolLM2-135M
            { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,  64,  64, 3, 3, 5376, 5376, 1, false },
            { GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, 128, 128, 2, 6, 5376, 5376, 1, false }, // Qwen2.5 1.5B
            { GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, 128, 128, 8, 4, 5376, 5376, 1, false }, // Llama 3.1 8B
        };
        const int n_layers = 30;

        for (const auto & s : shapes) {
            auto f16 = s;
            f16.type_k = f16.type_v = GGML_TYPE_F16;

            printf("%s/%s, heads of %3d, %d groups of %d: %.2f us a cell and token in 30 layers, flash attention %.2f, with F16 cells %.2f\n",
                    ggml_type_name(s.type_k), ggml_type_name(s.type_v), s.n_embd_k, s.n_head_kv, s.n_gqa,
                    bench(backend.get(), s, false, n_layers)/s.n_kv, bench(backend.get(), s, true, n_layers)/s.n_kv, bench(backend.get(), f16, true, n_layers)/s.n_kv);
        }
        return 0;
    }

#if defined(__GNUC__)
    test_levels();
#endif

    int n = 0;

    for (const auto type_k : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        for (const auto type_v : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            if (!llama_kv_depth_attn_supports(type_k, type_v)) {
                continue;
            }
            for (const int n_gqa : { 1, 2, 3, 4, 5, 7, 8, 12 }) {
                for (const int n_kv : { 32, 288, 640 }) {
                    for (const int n_embd : { 32, 64, 96, 256, 576 }) {
                        const int n_stream = 1 + rng()%3;
                        test(backend.get(), { type_k, type_v, n_embd, n_embd == 576 ? 512 : n_embd, 1 + (int) (rng()%3), n_gqa, n_kv, n_kv + 32, n_stream, rng()%2 == 0 });
                        n++;
                    }
                }
            }
        }
    }

    CHECK(!llama_kv_depth_attn_supports(GGML_TYPE_F16, GGML_TYPE_F16) && n > 0);

    printf("OK: %d shapes\n", n);

    return 0;
}
