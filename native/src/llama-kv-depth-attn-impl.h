// the kernel of llama-kv-depth-attn.cpp, which includes this once for each kind of processor, in a namespace of its own
//
//   LLAMA_KV_ATTN_TARGET    attribute of a function for it
//   LLAMA_KV_ATTN_LEVEL     1: AVX2, 2: AVX-512, 0: what the compiler makes of vectors

#define LLAMA_KV_ATTN_INLINE LLAMA_KV_ATTN_TARGET static inline __attribute__((always_inline))

//
// blocks: a scale in F16, and the values. see block_q8_0 and block_q4_0 in ggml-common.h
//

LLAMA_KV_ATTN_INLINE void llama_kv_attn_widen(const vec_i8 & src, vec_f32 & dst) {
#if LLAMA_KV_ATTN_LEVEL == 2
    const __m512 res = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i) src));
    memcpy(&dst, &res, sizeof(dst));
#elif LLAMA_KV_ATTN_LEVEL == 1
    const __m256 res[2] = {
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32((__m128i) src)),
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128((__m128i) src, 8))),
    };
    memcpy(&dst, res, sizeof(dst));
#else
    dst = __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(src, vec_i16), vec_i32), vec_f32);
#endif
}

struct llama_kv_block_q8_0 {
    static constexpr size_t size = 2 + n_blck;

    LLAMA_KV_ATTN_INLINE void load(const uint8_t * block, vec_f32 & lo, vec_f32 & hi) {
        vec_i8 qs[2];
        memcpy(qs, block + 2, sizeof(qs));

        llama_kv_attn_widen(qs[0], lo);
        llama_kv_attn_widen(qs[1], hi);
    }
};

struct llama_kv_block_q4_0 {
    static constexpr size_t size = 2 + n_blck/2;

    LLAMA_KV_ATTN_INLINE void load(const uint8_t * block, vec_f32 & lo, vec_f32 & hi) {
        vec_i8 qs;
        memcpy(&qs, block + 2, sizeof(qs));

        llama_kv_attn_widen(( qs       & 0x0F) - 8, lo);
        llama_kv_attn_widen(((qs >> 4) & 0x0F) - 8, hi);
    }
};

LLAMA_KV_ATTN_INLINE float llama_kv_attn_bits_to_f32(uint32_t bits) {
    float res;
    memcpy(&res, &bits, sizeof(res));
    return res;
}

// the scales of a block of n cells
LLAMA_KV_ATTN_INLINE void llama_kv_attn_load_scales(const uint8_t * block, size_t nb, float * dst, int n) {
    uint16_t half[n_part];
    for (int i = 0; i < n; ++i) {
        memcpy(half + i, block + i*nb, sizeof(uint16_t));
    }

    // without a branch, so that it is vectorized. the power is what the exponents of the two types differ by
    for (int i = 0; i < n; ++i) {
        const float value = llama_kv_attn_bits_to_f32((uint32_t) (half[i] & 0x7FFF) << 13)*0x1p112f;

        dst[i] = half[i] & 0x8000 ? -value : value;
    }
}

// exp(x) for x <= 0, to 2e-7
LLAMA_KV_ATTN_INLINE void llama_kv_attn_exp(float * x, int n) {
    for (int i = 0; i < n; ++i) {
        const float y = x[i] < -87.0f ? -87.0f : x[i];

        // y = k*ln(2) + r
        const float k = (y*1.44269504f + 0x1.8p23f) - 0x1.8p23f;
        const float r = (y - k*0.693145752f) - k*1.42860677e-6f;

        float p = 1.0f/720.0f;
        p = p*r + 1.0f/120.0f;
        p = p*r + 1.0f/24.0f;
        p = p*r + 1.0f/6.0f;
        p = p*r + 0.5f;
        p = p*r + 1.0f;
        p = p*r + 1.0f;

        const float power = llama_kv_attn_bits_to_f32((uint32_t) ((int32_t) k + 127) << 23);

        x[i] = x[i] < -87.0f ? 0.0f : p*power;
    }
}

//
// part of the cells, a few heads of one group
//

// the sums of 4 vectors, in the first, second, third and fourth element of each quarter: a quarter each
LLAMA_KV_ATTN_INLINE vec_f32 llama_kv_attn_reduce4(const vec_f32 * x) {
    const vec_f32 a = LLAMA_KV_ATTN_SHUFFLE(x[0], x[1], 0, 16, 1, 17, 4, 20, 5, 21,  8, 24,  9, 25, 12, 28, 13, 29) +
                      LLAMA_KV_ATTN_SHUFFLE(x[0], x[1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    const vec_f32 b = LLAMA_KV_ATTN_SHUFFLE(x[2], x[3], 0, 16, 1, 17, 4, 20, 5, 21,  8, 24,  9, 25, 12, 28, 13, 29) +
                      LLAMA_KV_ATTN_SHUFFLE(x[2], x[3], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);

    return LLAMA_KV_ATTN_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21,  8,  9, 24, 25, 12, 13, 28, 29) +
           LLAMA_KV_ATTN_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

// the sums of 16 vectors, from 4 of the above
LLAMA_KV_ATTN_INLINE vec_f32 llama_kv_attn_reduce16(const vec_f32 * x) {
    const vec_f32 a = LLAMA_KV_ATTN_SHUFFLE(x[0], x[1], 0, 1,  2,  3,  4,  5,  6,  7, 16, 17, 18, 19, 20, 21, 22, 23) +
                      LLAMA_KV_ATTN_SHUFFLE(x[0], x[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    const vec_f32 b = LLAMA_KV_ATTN_SHUFFLE(x[2], x[3], 0, 1,  2,  3,  4,  5,  6,  7, 16, 17, 18, 19, 20, 21, 22, 23) +
                      LLAMA_KV_ATTN_SHUFFLE(x[2], x[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);

    return LLAMA_KV_ATTN_SHUFFLE(a, b, 0, 1, 2, 3,  8,  9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           LLAMA_KV_ATTN_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

template <typename K, int N>
LLAMA_KV_ATTN_INLINE void llama_kv_attn_scores(const llama_kv_attn_part & part, const float * scales, float (*p)[n_part]) {
    const int n_b = part.n_embd_k/n_blck;

    for (int i = 0; i < part.n; i += n_vec) {
        vec_f32 sums[N][4];

        for (int j = 0; j < n_vec; j += 4) {
            vec_f32 dots[N][4] = {};

            for (int c = 0; c < 4; ++c) {
                const uint8_t * k = part.k + (i + j + c)*part.nb_k;

                for (int b = 0; b < n_b; ++b) {
                    vec_f32 lo, hi;
                    K::load(k + b*K::size, lo, hi);

                    const float scale = scales[b*n_part + i + j + c];
                    lo *= scale;
                    hi *= scale;

                    for (int h = 0; h < N; ++h) {
                        vec_f32 q[2];
                        memcpy(q, part.q + h*part.n_embd_k + b*n_blck, sizeof(q));

                        dots[h][c] += q[0]*lo;
                        dots[h][c] += q[1]*hi;
                    }
                }
            }

            for (int h = 0; h < N; ++h) {
                sums[h][j/4] = llama_kv_attn_reduce4(dots[h]);
            }
        }

        for (int h = 0; h < N; ++h) {
            const vec_f32 sum = llama_kv_attn_reduce16(sums[h]);
            memcpy(p[h] + i, &sum, sizeof(sum));
        }
    }
}

// from scores to weights
LLAMA_KV_ATTN_INLINE void llama_kv_attn_weights(const llama_kv_attn_part & part, float * p, float * dst) {
    // in lanes: a sum of floats is not vectorized otherwise
    float max[n_vec];
    float sum[n_vec] = {};

    std::fill_n(max, n_vec, -INFINITY);

    for (int i = 0; i < part.n; i += n_vec) {
        for (int j = 0; j < n_vec; ++j) {
            const float x = part.mask[i + j] == 0 ? p[i + j] : -INFINITY;

            p[i + j] = x;
            max[j]   = max[j] < x ? x : max[j];
        }
    }

    dst[0] = *std::max_element(max, max + n_vec);

    for (int i = 0; i < part.n; ++i) {
        p[i] = dst[0] == -INFINITY ? -INFINITY : p[i] - dst[0];
    }

    llama_kv_attn_exp(p, part.n);

    for (int i = 0; i < part.n; i += n_vec) {
        for (int j = 0; j < n_vec; ++j) {
            sum[j] += p[i + j];
        }
    }

    dst[1] = 0.0f;
    for (int j = 0; j < n_vec; ++j) {
        dst[1] += sum[j];
    }
}

template <typename V, int N>
LLAMA_KV_ATTN_INLINE void llama_kv_attn_values(const llama_kv_attn_part & part, float (*p)[n_part]) {
    for (int b = 0; b < part.n_embd_v/n_blck; ++b) {
        const uint8_t * v = part.v + b*V::size;

        float scales[n_part];
        llama_kv_attn_load_scales(v, part.nb_v, scales, part.n);

        vec_f32 acc[N][2] = {};

        for (int i = 0; i < part.n; ++i) {
            vec_f32 lo, hi;
            V::load(v + i*part.nb_v, lo, hi);

            lo *= scales[i];
            hi *= scales[i];

            for (int h = 0; h < N; ++h) {
                acc[h][0] += p[h][i]*lo;
                acc[h][1] += p[h][i]*hi;
            }
        }

        for (int h = 0; h < N; ++h) {
            memcpy(part.dst + h*(part.n_embd_v + 2) + b*n_blck, acc[h], sizeof(acc[h]));
        }
    }
}

template <typename K, typename V, int N>
LLAMA_KV_ATTN_INLINE void llama_kv_attn_heads(const llama_kv_attn_part & part) {
    float scales[n_blck_max*n_part];
    float p[N][n_part];

    for (int b = 0; b < part.n_embd_k/n_blck; ++b) {
        llama_kv_attn_load_scales(part.k + b*K::size, part.nb_k, scales + b*n_part, part.n);
    }

    llama_kv_attn_scores<K, N>(part, scales, p);

    for (int h = 0; h < N; ++h) {
        llama_kv_attn_weights(part, p[h], part.dst + h*(part.n_embd_v + 2) + part.n_embd_v);
    }

    llama_kv_attn_values<V, N>(part, p);
}

template <typename K, typename V>
LLAMA_KV_ATTN_INLINE void llama_kv_attn_group(llama_kv_attn_part part, int n_head) {
    while (n_head > 0) {
        const int n = std::min(n_head, n_head_max);

        switch (n) {
            case 1:  llama_kv_attn_heads<K, V, 1>(part); break;
            case 2:  llama_kv_attn_heads<K, V, 2>(part); break;
            case 3:  llama_kv_attn_heads<K, V, 3>(part); break;
            default: llama_kv_attn_heads<K, V, 4>(part); break;
        }

        part.q   += n*part.n_embd_k;
        part.dst += n*(part.n_embd_v + 2);

        n_head -= n;
    }
}

LLAMA_KV_ATTN_TARGET
static void llama_kv_attn_q8_0_q8_0(const llama_kv_attn_part & part, int n_head) {
    llama_kv_attn_group<llama_kv_block_q8_0, llama_kv_block_q8_0>(part, n_head);
}

LLAMA_KV_ATTN_TARGET
static void llama_kv_attn_q8_0_q4_0(const llama_kv_attn_part & part, int n_head) {
    llama_kv_attn_group<llama_kv_block_q8_0, llama_kv_block_q4_0>(part, n_head);
}

LLAMA_KV_ATTN_TARGET
static void llama_kv_attn_q4_0_q4_0(const llama_kv_attn_part & part, int n_head) {
    llama_kv_attn_group<llama_kv_block_q4_0, llama_kv_block_q4_0>(part, n_head);
}

static const llama_kv_attn_kernels kernels = {
    /*.q8_0_q8_0 =*/ llama_kv_attn_q8_0_q8_0,
    /*.q8_0_q4_0 =*/ llama_kv_attn_q8_0_q4_0,
    /*.q4_0_q4_0 =*/ llama_kv_attn_q4_0_q4_0,
};

#undef LLAMA_KV_ATTN_INLINE
