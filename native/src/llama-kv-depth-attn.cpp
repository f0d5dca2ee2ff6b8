#include "llama-kv-depth-attn.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#    include <immintrin.h>
#endif

// vectors of the compiler. other compilers attend with the kernel of the CPU backend
#if defined(__GNUC__)

#if defined(__clang__)
#    define LLAMA_KV_ATTN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#    define LLAMA_KV_ATTN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vec_i32 { __VA_ARGS__ })
#    pragma GCC diagnostic ignored "-Wpsabi"              // nothing that has vectors as arguments is ever called
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // of immintrin.h
#endif

// values of a block of the quantized types, and of a vector
static constexpr int n_blck = 32;
static constexpr int n_vec  = 16;

typedef float   vec_f32 __attribute__((vector_size(n_vec*sizeof(float)),   may_alias));
typedef int32_t vec_i32 __attribute__((vector_size(n_vec*sizeof(int32_t)), may_alias));
typedef int16_t vec_i16 __attribute__((vector_size(n_vec*sizeof(int16_t)), may_alias));
typedef int8_t  vec_i8  __attribute__((vector_size(n_vec*sizeof(int8_t)),  may_alias));

// cells of a partial result: not a matter of how many threads there are, or the sum would be
static constexpr int n_part = 256;

// the largest heads that there are
static constexpr int n_blck_max = 1024/n_blck;

// heads at once, what the registers hold
static constexpr int n_head_max = 4;

struct llama_kv_attn_part {
    const uint8_t * k;
    const uint8_t * v;

    size_t nb_k;
    size_t nb_v;

    const uint16_t * mask; // F16: 0 or -INFINITY

    int n; // cells, a multiple of n_vec
    int n_embd_k;
    int n_embd_v;

    const float * q;   // [n_head, n_embd_k]
    float       * dst; // [n_head, n_embd_v + 2]: the values, the largest score, the sum of the weights
};

using llama_kv_attn_t = void (*)(const llama_kv_attn_part & part, int n_head);

struct llama_kv_attn_kernels {
    llama_kv_attn_t q8_0_q8_0;
    llama_kv_attn_t q8_0_q4_0;
    llama_kv_attn_t q4_0_q4_0;
};

//
// kinds of processors. this file is no part of the CPU backend, which is built for each
//

namespace llama_kv_attn_any {
#define LLAMA_KV_ATTN_LEVEL 0
#define LLAMA_KV_ATTN_TARGET
#include "llama-kv-depth-attn-impl.h"
#undef  LLAMA_KV_ATTN_TARGET
#undef  LLAMA_KV_ATTN_LEVEL
}

#if defined(__x86_64__)
namespace llama_kv_attn_avx2 {
#define LLAMA_KV_ATTN_LEVEL 1
#define LLAMA_KV_ATTN_TARGET __attribute__((target("avx2,fma")))
#include "llama-kv-depth-attn-impl.h"
#undef  LLAMA_KV_ATTN_TARGET
#undef  LLAMA_KV_ATTN_LEVEL
}

namespace llama_kv_attn_avx512 {
#define LLAMA_KV_ATTN_LEVEL 2
#define LLAMA_KV_ATTN_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#include "llama-kv-depth-attn-impl.h"
#undef  LLAMA_KV_ATTN_TARGET
#undef  LLAMA_KV_ATTN_LEVEL
}
#endif

static const llama_kv_attn_kernels & llama_kv_attn_get_kernels() {
#if defined(__x86_64__)
    static const llama_kv_attn_kernels & res =
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? llama_kv_attn_avx512::kernels :
        __builtin_cpu_supports("avx2")     && __builtin_cpu_supports("fma")                                            ? llama_kv_attn_avx2  ::kernels :
                                                                                                                         llama_kv_attn_any   ::kernels;
    return res;
#else
    return llama_kv_attn_any::kernels;
#endif
}

static llama_kv_attn_t llama_kv_attn_get(ggml_type type_k, ggml_type type_v) {
    if (type_k == GGML_TYPE_Q8_0 && type_v == GGML_TYPE_Q8_0) {
        return llama_kv_attn_get_kernels().q8_0_q8_0;
    }
    if (type_k == GGML_TYPE_Q8_0 && type_v == GGML_TYPE_Q4_0) {
        return llama_kv_attn_get_kernels().q8_0_q4_0;
    }
    if (type_k == GGML_TYPE_Q4_0 && type_v == GGML_TYPE_Q4_0) {
        return llama_kv_attn_get_kernels().q4_0_q4_0;
    }
    return nullptr;
}

bool llama_kv_depth_attn_supports(ggml_type type_k, ggml_type type_v) {
    return llama_kv_attn_get(type_k, type_v) != nullptr;
}

//
// graph
//

// dst [n_embd_v + 2, n_head, n_parts, n_stream]
static void llama_kv_attn_compute_parts(ggml_tensor * dst, int ith, int nth, void * /*userdata*/) {
    const auto * q    = dst->src[0];
    const auto * k    = dst->src[1];
    const auto * v    = dst->src[2];
    const auto * mask = dst->src[3];

    const int n_head    = dst->ne[1];
    const int n_parts   = dst->ne[2];
    const int n_stream  = dst->ne[3];
    const int n_head_kv = k->ne[1];
    const int n_kv      = k->ne[2];
    const int n_gqa     = n_head/n_head_kv;

    const auto fn = llama_kv_attn_get(k->type, v->type);

    const int n_units = n_head_kv*n_parts*n_stream;

    for (int u = ith*n_units/nth; u < (ith + 1)*n_units/nth; ++u) {
        const int h = u%n_head_kv;
        const int i = u/n_head_kv%n_parts;
        const int s = u/n_head_kv/n_parts;

        llama_kv_attn_part part;

        part.k        = (const uint8_t  *) k->data + h*k->nb[1] + (size_t) i*n_part*k->nb[2] + s*k->nb[3];
        part.v        = (const uint8_t  *) v->data + h*v->nb[1] + (size_t) i*n_part*v->nb[2] + s*v->nb[3];
        part.nb_k     = k->nb[2];
        part.nb_v     = v->nb[2];
        part.mask     = (const uint16_t *) ((const uint8_t *) mask->data + s*mask->nb[3]) + i*n_part;
        part.n        = std::min(n_kv - i*n_part, n_part);
        part.n_embd_k = k->ne[0];
        part.n_embd_v = v->ne[0];
        part.q        = (const float    *) ((const uint8_t *) q->data + s*q->nb[2]) + h*n_gqa*q->ne[0];
        part.dst      = (float          *) ((uint8_t *) dst->data + s*dst->nb[3] + i*dst->nb[2] + h*n_gqa*dst->nb[1]);

        fn(part, n_gqa);
    }
}

// dst [n_embd_v, n_head, n_stream]
static void llama_kv_attn_compute_sum(ggml_tensor * dst, int ith, int nth, void * /*userdata*/) {
    const auto * parts = dst->src[0];
    const auto * sinks = dst->src[1];

    const int n_embd   = dst->ne[0];
    const int n_head   = dst->ne[1];
    const int n_rows   = n_head*dst->ne[2];

    for (int r = ith; r < n_rows; r += nth) {
        const int h = r%n_head;
        const int s = r/n_head;

        const auto part = [&](int i) {
            return (const float *) ((const uint8_t *) parts->data + s*parts->nb[3] + i*parts->nb[2] + h*parts->nb[1]);
        };

        float max = sinks ? ((const float *) sinks->data)[h] : -INFINITY;
        for (int i = 0; i < parts->ne[2]; ++i) {
            max = std::max(max, part(i)[n_embd]);
        }

        float * res = (float *) ((uint8_t *) dst->data + s*dst->nb[2] + h*dst->nb[1]);
        std::fill_n(res, n_embd, 0.0f);

        float sum = sinks ? std::exp(((const float *) sinks->data)[h] - max) : 0.0f;

        for (int i = 0; i < parts->ne[2]; ++i) {
            const float * p = part(i);
            if (p[n_embd] == -INFINITY) {
                continue;
            }

            const float w = std::exp(p[n_embd] - max);

            sum += w*p[n_embd + 1];
            for (int j = 0; j < n_embd; ++j) {
                res[j] += w*p[j];
            }
        }

        for (int j = 0; j < n_embd; ++j) {
            res[j] /= sum;
        }
    }
}

ggml_tensor * llama_kv_depth_build_attn(
        ggml_context * ctx,
        ggml_tensor  * q,
        ggml_tensor  * k,
        ggml_tensor  * v,
        ggml_tensor  * mask,
        ggml_tensor  * sinks) {
    GGML_ASSERT(k->ne[0] <= n_blck_max*n_blck);
    GGML_ASSERT(k->ne[0]%n_blck == 0 && v->ne[0]%n_blck == 0 && k->ne[2]%n_vec == 0);
    GGML_ASSERT(ggml_is_contiguous(q) && q->type == GGML_TYPE_F32 && mask->type == GGML_TYPE_F16);

    const int64_t n_head   = q->ne[1];
    const int64_t n_stream = k->ne[3];

    ggml_tensor * args[] = { q, k, v, mask };

    ggml_tensor * parts = ggml_custom_4d(ctx, GGML_TYPE_F32, v->ne[0] + 2, n_head, (k->ne[2] + n_part - 1)/n_part, n_stream,
            args, 4, llama_kv_attn_compute_parts, GGML_N_TASKS_MAX, nullptr);

    ggml_tensor * args_sum[] = { parts, sinks };

    ggml_tensor * res = ggml_custom_4d(ctx, GGML_TYPE_F32, v->ne[0], n_head, n_stream, 1,
            args_sum, sinks ? 2 : 1, llama_kv_attn_compute_sum, GGML_N_TASKS_MAX, nullptr);

    return ggml_reshape_2d(ctx, res, v->ne[0]*n_head, n_stream);
}

#else

bool llama_kv_depth_attn_supports(ggml_type, ggml_type) {
    return false;
}

ggml_tensor * llama_kv_depth_build_attn(ggml_context *, ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *) {
    GGML_ABORT("not supported by this compiler");
}

#endif
