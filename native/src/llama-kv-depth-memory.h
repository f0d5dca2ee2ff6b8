#pragma once

#include "llama-ext.h"

#include <cstddef>
#include <map>
#include <string>

// memory that this process can have without swapping, within the limit of its control group; 0: not known
size_t llama_kv_depth_memory_free();

// bytes that a context and its model take, by the device that holds them: where the host does not
std::map<ggml_backend_dev_t, size_t> llama_kv_depth_memory_devices(const llama_memory_breakdown & mb);

// whether the memory of a device is its own, rather than a part of the host's
bool llama_kv_depth_memory_is_own(ggml_backend_dev_t dev);

// one line about the first device that has no room for them, empty if all have
std::string llama_kv_depth_memory_check(const std::map<ggml_backend_dev_t, size_t> & devices);
