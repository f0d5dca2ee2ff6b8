#pragma once

// what Metal, CUDA and Vulkan say of an operation: their own functions out of the pinned llama.cpp (cmake/supports_op.py), with
// stand-ins for what they ask of a device. an M1, an Ada, and a GPU that has what Vulkan 1.3 asks for

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// its quantized types come in super-blocks of so many values
static constexpr int QK_K = 256;

namespace metal {

struct device {
    struct {
        bool   has_simdgroup_mm           = true;
        bool   has_simdgroup_reduction    = true;
        bool   has_bfloat                 = true;
        size_t max_theadgroup_memory_size = 32768;
    } props;
};

using ggml_metal_device_t = const device *;

static constexpr int OP_LIGHTNING_INDEXER_DK = 128;
static constexpr int OP_LIGHTNING_INDEXER_NH = 64;

#include "metal.inc"

static bool supports_op(const ggml_tensor * op) {
    static const device dev;

    return ggml_metal_device_supports_op(&dev, op);
}

} // namespace metal

namespace cuda {

struct ggml_backend_cuda_device_context      { int device = 0; };
struct ggml_backend_cuda_buffer_type_context { int device = 0; };

struct info {
    struct {
        int    cc   = 890;
        size_t smpb = 49152;
    } devices[1];
};

static const info & ggml_cuda_info() {
    static const info res;
    return res;
}

static bool ggml_backend_buft_is_cuda(ggml_backend_buffer_type_t) {
    return false;
}

static bool turing_mma_available(int) { return true;  }
static bool volta_mma_available (int) { return false; }
static bool amd_mfma_available  (int) { return false; }
static bool amd_wmma_available  (int) { return false; }

static bool ggml_cuda_flash_attn_ext_mma_f16_may_use_sparse(int64_t, int64_t, int, int) {
    return false;
}

static bool ggml_cuda_flash_attn_ext_mma_f16_shall_use_sparse(int, const ggml_tensor *, int, int) {
    return false;
}

static bool ggml_cuda_lightning_indexer_supported(int, const ggml_tensor *) {
    return false;
}

#define FLASH_ATTN_AVAILABLE
#define GGML_CUDA_USE_CUB

static constexpr int FATTN_KQ_STRIDE           = 256;
static constexpr int GGML_CUDA_CC_ADA_LOVELACE = 890;

#include "cuda.inc"

static bool supports_op(const ggml_tensor * op) {
    ggml_backend_cuda_device_context context;
    ggml_backend_device              dev = {};
    dev.context = &context;

    return ggml_backend_cuda_device_supports_op(&dev, op);
}

} // namespace cuda

namespace vulkan {

struct vk_device_struct {
    bool     shader_int64                  = true;
    bool     buffer_device_address         = true;
    bool     shader_64b_indexing           = false;
    bool     coopmat2                      = false;
    bool     subgroup_basic                = true;
    bool     subgroup_shuffle              = true;
    bool     subgroup_vote                 = true;
    bool     subgroup_arithmetic           = true;
    bool     subgroup_require_full_support = true;
    bool     vulkan_memory_model           = true;
    bool     fp16                          = true;
    uint64_t max_buffer_size               = 1u << 30;
    uint32_t max_workgroup_size_log2       = 10;
    uint32_t subgroup_size_log2            = 5;

    const void * pipeline_topk_f32[11]      = {};
    const void * pipeline_topk_radix_f32    = "";
    const void * pipeline_dsv4_hc_comb_f32  = "";

    bool mul_mat_id_s[GGML_TYPE_COUNT];
    bool mul_mat_id_m[GGML_TYPE_COUNT];
    bool mul_mat_id_l[GGML_TYPE_COUNT];

    struct {
        struct {
            uint64_t maxStorageBufferRange           = 1u << 30;
            uint64_t maxComputeSharedMemorySize      = 32768;
            uint64_t minStorageBufferOffsetAlignment = 64;
        } limits;
    } properties;

    vk_device_struct() {
        std::fill_n(mul_mat_id_s, (size_t) GGML_TYPE_COUNT, true);
        std::fill_n(mul_mat_id_m, (size_t) GGML_TYPE_COUNT, true);
        std::fill_n(mul_mat_id_l, (size_t) GGML_TYPE_COUNT, true);
    }
};

using vk_device = const vk_device_struct *;

struct ggml_backend_vk_device_context { size_t device = 0; };

static const vk_device & ggml_vk_get_device(size_t) {
    static const vk_device_struct dev;
    static const vk_device        res = &dev;
    return res;
}

static uint64_t vk_tensor_offset(const ggml_tensor *) {
    return 0;
}

static bool ggml_vk_lightning_indexer_k_type_supported(ggml_type) {
    return false;
}

static constexpr uint32_t num_argsort_pipelines = 11;
static constexpr uint32_t num_topk_pipelines    = 11;

#define UNUSED GGML_UNUSED

#include "vulkan.inc"

static bool supports_op(const ggml_tensor * op) {
    ggml_backend_vk_device_context context;
    ggml_backend_device            dev = {};
    dev.context = &context;

    return ggml_backend_vk_device_supports_op(&dev, op);
}

} // namespace vulkan
