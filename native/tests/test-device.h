#pragma once

// where a native test runs: on the CPU, or with all layers on the devices that the environment names
//
//   DEPTHKV_TEST_DEVICE=NAME[,NAME]            as llama-bench --list-devices shows them
//   DEPTHKV_TEST_RPC=HOST:PORT[,HOST:PORT]     connect to these servers first, their devices are RPC0, RPC1, ...

#include "ggml-backend.h"
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

static std::vector<std::string> test_env(const char * name) {
    std::vector<std::string> res;

    const char * value = getenv(name);
    std::stringstream ss(value ? value : "");
    for (std::string part; std::getline(ss, part, ','); ) {
        res.push_back(part);
    }

    return res;
}

// terminated by nullptr, empty: the CPU. a device that is missing ends the test
static std::vector<ggml_backend_dev_t> & test_devices() {
    static std::vector<ggml_backend_dev_t> res;

    if (!res.empty()) {
        return res;
    }

    for (const auto & endpoint : test_env("DEPTHKV_TEST_RPC")) {
        ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");

        auto * add_server = rpc ? (ggml_backend_reg_t (*)(const char *)) ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server") : nullptr;

        ggml_backend_reg_t reg = add_server ? add_server(endpoint.c_str()) : nullptr;
        if (!reg) {
            fprintf(stderr, "there is no RPC server at %s, or no RPC backend (GGML_RPC) in this build\n", endpoint.c_str());
            exit(1);
        }

        ggml_backend_register(reg);
    }

    for (const auto & name : test_env("DEPTHKV_TEST_DEVICE")) {
        res.push_back(ggml_backend_dev_by_name(name.c_str()));
        if (!res.back()) {
            fprintf(stderr, "there is no device '%s'\n", name.c_str());
            exit(1);
        }
    }

    res.push_back(nullptr);

    return res;
}

static bool test_on_cpu() {
    return test_devices().size() == 1;
}

static llama_model_params test_model_params() {
    llama_model_params res = llama_model_default_params();

    res.n_gpu_layers = test_on_cpu() ? 0 : 999;
    if (!test_on_cpu()) {
        res.devices = test_devices().data();
    }

    return res;
}
