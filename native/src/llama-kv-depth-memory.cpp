#include "llama-kv-depth-plan.h"

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
