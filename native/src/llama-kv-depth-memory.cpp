#include "llama-kv-depth-memory.h"

#include "llama-impl.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>

#if defined(_WIN32)
#    define WIN32_LEAN_AND_MEAN
#    ifndef NOMINMAX
#        define NOMINMAX
#    endif
#    include <windows.h>
#elif defined(__APPLE__)
#    include <mach/mach.h>
#endif

// the CPU backend reports all memory as free: what is free is ill-defined, but what can be had is known
size_t llama_kv_depth_memory_free() {
#if defined(_WIN32)
    MEMORYSTATUSEX status;
    status.dwLength = sizeof(status);

    if (GlobalMemoryStatusEx(&status)) {
        return status.ullAvailPhys;
    }
#elif defined(__APPLE__)
    vm_statistics64_data_t stats;
    mach_msg_type_number_t n = HOST_VM_INFO64_COUNT;

    if (host_statistics64(mach_host_self(), HOST_VM_INFO64, (host_info64_t) &stats, &n) == KERN_SUCCESS) {
        return ((size_t) stats.free_count + stats.inactive_count)*vm_kernel_page_size;
    }
#else
    std::ifstream meminfo("/proc/meminfo");

    for (std::string line; std::getline(meminfo, line);) {
        const std::string key = "MemAvailable:";
        if (line.compare(0, key.size(), key) != 0) {
            continue;
        }

        size_t res = std::strtoull(line.c_str() + key.size(), nullptr, 10)*1024;

        // a container sees its own group here, and all of the machine above
        size_t limit   = 0;
        size_t current = 0;
        if (std::ifstream("/sys/fs/cgroup/memory.max") >> limit && std::ifstream("/sys/fs/cgroup/memory.current") >> current) {
            res = std::min(res, limit - std::min(limit, current));
        }

        return res;
    }
#endif

    return 0;
}

// a CPU's buffers are in the host's memory. those of other devices may be, too, or be counted apart
std::map<ggml_backend_dev_t, size_t> llama_kv_depth_memory_devices(const llama_memory_breakdown & mb) {
    std::map<ggml_backend_dev_t, size_t> res;

    for (const auto & [buft, data] : mb) {
        auto * dev = ggml_backend_buft_get_device(buft);

        if (!dev || ggml_backend_buft_is_host(buft) || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
            continue;
        }

        res[dev] += data.total();
    }

    return res;
}

bool llama_kv_depth_memory_is_own(ggml_backend_dev_t dev) {
    ggml_backend_dev_props props;
    ggml_backend_dev_get_props(dev, &props);

    // what can use a buffer of the host in place shares its memory, as Metal does
    return props.type == GGML_BACKEND_DEVICE_TYPE_GPU && !props.caps.buffer_from_host_ptr;
}

std::string llama_kv_depth_memory_check(const std::map<ggml_backend_dev_t, size_t> & devices) {
    const double mib = 1024.0*1024.0;

    for (const auto & [dev, bytes] : devices) {
        if (bytes == 0) {
            continue;
        }

        size_t free  = 0;
        size_t total = 0;
        ggml_backend_dev_memory(dev, &free, &total);

        if (total == 0) {
            return format("device %s does not say how much memory it has", ggml_backend_dev_name(dev));
        }
        if (bytes > free/10*9) { // pools and kernels want some of it, too
            return format("%.0f MiB are too much for device %s, where %.0f MiB can be had", bytes/mib, ggml_backend_dev_name(dev), free/10*9/mib);
        }
    }

    return "";
}
