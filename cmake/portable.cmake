# Libraries that run on every processor of an architecture.
#
# Of ggml's CPU backend there is one library for each generation of processors then, and the best that the machine at hand can
# run is chosen when a program starts. What upstream has no generations for, or a compiler that does not know them, gets one
# library for the oldest processor.
#
# Sets options of ggml, for the directory that includes this file: DEPTHKV_PORTABLE means all of them.
include(CheckCXXCompilerFlag)
set(GGML_NATIVE OFF)
set(GGML_CPU_ALL_VARIANTS OFF)

# As ggml tells it: a generator may build for another architecture than the machine's.
set(processor "${CMAKE_SYSTEM_PROCESSOR}")
if(CMAKE_OSX_ARCHITECTURES)
    set(processor "${CMAKE_OSX_ARCHITECTURES}")
elseif(CMAKE_GENERATOR_PLATFORM)
    set(processor "${CMAKE_GENERATOR_PLATFORM}")
endif()

set(obstacle "")
if(NOT BUILD_SHARED_LIBS)
    set(obstacle "static libraries cannot be chosen from at run time")
elseif(CMAKE_OSX_ARCHITECTURES MATCHES ";")
    set(obstacle "of several architectures at once")
elseif(processor MATCHES "^(x86_64|AMD64|amd64|x64)$")
    if(NOT MSVC)
        set(newest -mavxvnni -mavx512bf16 -mamx-int8)
        list(JOIN newest " " flags)
        check_cxx_compiler_flag("${flags}" DEPTHKV_CXX_KNOWS_VARIANTS)
        if(NOT DEPTHKV_CXX_KNOWS_VARIANTS)
            set(obstacle "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} does not know ${flags}")
        endif()
    endif()
elseif(NOT processor MATCHES "^(aarch64|arm64|ARM64)$" OR NOT CMAKE_SYSTEM_NAME MATCHES "^(Linux|Android|Darwin)$")
    set(obstacle "ggml lists no variants for ${processor} on ${CMAKE_SYSTEM_NAME}")
endif()

if(obstacle STREQUAL "")
    set(GGML_BACKEND_DL ON)
    set(GGML_CPU_ALL_VARIANTS ON)
    message(STATUS "CPU backend: all variants for ${processor}, chosen at run time")
else()
    # ggml's own default without GGML_NATIVE asks for AVX2
    foreach(feature SSE42 AVX AVX2 BMI2 FMA F16C)
        set(GGML_${feature} OFF)
    endforeach()
    message(STATUS "CPU backend: one for the oldest ${processor}, slow on newer ones (${obstacle})")
endif()
