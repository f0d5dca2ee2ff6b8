# llama-cli, llama-bench, llama-perplexity, the upstream tests that touch the cache, and our own native tests. Taking single
# sources out of upstream's tools/ and tests/ spares us configuring all of them; llama-cli comes with the server.
enable_testing()
set(test_timeout 1200)
if(CMAKE_CROSSCOMPILING)
    set(test_timeout 7200) # an emulator takes its time
endif()

foreach(tool bench perplexity)
    set(dir "${tree}/tools/llama-bench")
    if(tool STREQUAL perplexity)
        set(dir "${tree}/tools/perplexity")
    endif()
    file(GLOB sources "${dir}/*.cpp")
    add_executable(llama-${tool} EXCLUDE_FROM_ALL ${sources})
    target_link_libraries(llama-${tool} PRIVATE llama-common llama)
    list(APPEND tools llama-${tool})
endforeach()

if(TARGET llama-cli)
    list(APPEND tools llama-cli)
endif()

# The device that every machine has: its CPU behind ggml's RPC. scripts/test-device.sh runs native tests on it.
if(TARGET ggml-rpc)
    add_executable(ggml-rpc-server EXCLUDE_FROM_ALL "${tree}/tools/rpc/rpc-server.cpp")
    target_link_libraries(ggml-rpc-server PRIVATE ggml)
    list(APPEND tools ggml-rpc-server)
endif()

set(upstream_tests test-llama-archs test-save-load-state test-state-restore-fragmented test-batch-alloc test-thread-safety)
foreach(test ${upstream_tests})
    add_executable(${test} EXCLUDE_FROM_ALL "${tree}/tests/${test}.cpp")
    target_link_libraries(${test} PRIVATE llama-common llama)
    list(APPEND tools ${test})
endforeach()

function(upstream_test test)
    add_test(NAME upstream/${test} COMMAND ${test} ${ARGN})
    set_tests_properties(upstream/${test} PROPERTIES LABELS upstream TIMEOUT ${test_timeout} RUN_SERIAL ON)
endfunction()
# The first writes tiny models of every architecture, the second saves and restores each of them.
set(test_models "${CMAKE_BINARY_DIR}/test-models")
file(MAKE_DIRECTORY "${test_models}")
upstream_test(test-llama-archs -o "${test_models}/")
set_tests_properties(upstream/test-llama-archs PROPERTIES FIXTURES_SETUP test-models)
upstream_test(test-save-load-state --models "${test_models}/")
set_tests_properties(upstream/test-save-load-state PROPERTIES FIXTURES_REQUIRED test-models)
upstream_test(test-batch-alloc)
if(DEPTHKV_TEST_MODEL)
    upstream_test(test-state-restore-fragmented -m "${DEPTHKV_TEST_MODEL}")
    upstream_test(test-thread-safety -m "${DEPTHKV_TEST_MODEL}" -ngl 99 -p "The meaning of life is"
                  -n 128 -c 256 -ub 32 -np 4 -t 2)
endif()

add_custom_target(depthkv-native-tests)
if(NOT DEPTHKV_BASELINE)
    file(GLOB test_sources CONFIGURE_DEPENDS "${native}/tests/*.cpp")
    foreach(source ${test_sources})
        get_filename_component(test "${source}" NAME_WE)
        add_executable(${test} EXCLUDE_FROM_ALL "${source}")
        target_link_libraries(${test} PRIVATE llama)
        target_include_directories(${test} PRIVATE "${native}/src" "${tree}/src")
        target_compile_features(${test} PRIVATE cxx_std_17)
        if(NOT MSVC)
            target_compile_options(${test} PRIVATE -UNDEBUG) # assert() in a release build
        endif()
        target_compile_options(${test} PRIVATE ${native_flags})
        add_dependencies(depthkv-native-tests ${test})
        if(NOT test MATCHES "^test-") # programs of the Python tests
            continue()
        elseif(test MATCHES "^test-depth-") # these read the tiny models
            add_test(NAME native/${test} COMMAND ${test} "${test_models}")
            set_tests_properties(native/${test} PROPERTIES FIXTURES_REQUIRED test-models)
        else()
            add_test(NAME native/${test} COMMAND ${test})
        endif()
        set_tests_properties(native/${test} PROPERTIES LABELS native TIMEOUT ${test_timeout})
    endforeach()

    # What GPU backends support, from their own sources.
    set(supports_op "${CMAKE_BINARY_DIR}/supports-op")
    set(supports_op_script "${CMAKE_CURRENT_SOURCE_DIR}/cmake/supports_op.py")
    add_custom_command(
        OUTPUT "${supports_op}/metal.inc" "${supports_op}/cuda.inc" "${supports_op}/vulkan.inc"
        COMMAND "${Python_EXECUTABLE}" "${supports_op_script}" "${tree}" "${supports_op}"
        DEPENDS "${supports_op_script}" "${native}/llama.cpp.lock"
        VERBATIM)
    target_sources(test-depth-ops PRIVATE "${supports_op}/metal.inc")
    target_include_directories(test-depth-ops PRIVATE "${supports_op}" "${tree}/ggml/src")
endif()

# An unmodified front end obeys the key, `--fit` included.
if(DEPTHKV_TEST_MODEL AND NOT DEPTHKV_BASELINE)
    add_test(NAME native/perplexity-with-a-budget COMMAND llama-perplexity -m "${DEPTHKV_TEST_MODEL}" -c 512 --chunks 1
             -f "${native}/include/llama-depthkv.h" --override-kv depthkv.budget=float:0.5 -lv 4)
    set_tests_properties(native/perplexity-with-a-budget PROPERTIES LABELS native
                         PASS_REGULAR_EXPRESSION "256\\.\\.256 of 512 cells.*Final estimate")
endif()

add_custom_target(depthkv-tools DEPENDS ${tools} depthkv-native-tests)
