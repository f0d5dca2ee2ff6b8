# llama-server, and the libraries it consists of, which llama-cli shares.
#
# Upstream's own CMake files for these directories are used as they are, with static libraries: one program, and of the
# shared libraries only those that it needs anyway. Its web UI is a target that fetches or builds; an empty one takes its
# place, and server-http.cpp then serves the directory that `--path` names.
find_package(Threads REQUIRED)

add_library(llama-ui INTERFACE)
target_include_directories(llama-ui INTERFACE "${native}/server/no-ui")
add_custom_target(llama-ui-assets)

function(add_upstream_tools)
    set(BUILD_SHARED_LIBS OFF)
    set(PROJECT_SOURCE_DIR "${tree}") # their include directories start there
    set(LLAMA_VERSION_BASE 0)         # of shared libraries
    set(LLAMA_VERSION_MAJOR 0)
    foreach(tool ${ARGN})
        add_subdirectory("${tree}/tools/${tool}" "${CMAKE_BINARY_DIR}/llama.cpp-build/tools/${tool}" EXCLUDE_FROM_ALL)
    endforeach()
endfunction()

if(DEPTHKV_BUILD_TOOLS)
    add_upstream_tools(mtmd server cli)
else()
    add_upstream_tools(mtmd server)
endif()

if(NOT DEPTHKV_BASELINE)
    target_sources(server-context PRIVATE "${native}/server/server-kv.cpp")
    target_include_directories(server-context PUBLIC "${native}/server")
endif()

if(DEPTHKV_BUILD_SERVER)
    add_custom_target(depthkv-server ALL DEPENDS llama-server)
    install(TARGETS llama-server llama-common
        LIBRARY DESTINATION ${install_dir}/lib
        RUNTIME DESTINATION ${install_dir}/lib
        ARCHIVE DESTINATION ${install_dir}/lib)
    install(FILES "${tree}/vendor/cpp-httplib/LICENSE" DESTINATION ${install_dir}/lib RENAME LICENSE.cpp-httplib)
    install(FILES "${tree}/licenses/LICENSE-jsonhpp" DESTINATION ${install_dir}/lib RENAME LICENSE.nlohmann-json)
endif()
