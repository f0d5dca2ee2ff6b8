# What `cmake --install` and the wheel hold: libraries, headers, and what finds them (a CMake package and depthkv.pc).
#
# In a wheel all of it lies in the Python package, otherwise in include/ and lib/ of the prefix. Either tree can be moved:
# the CMake package and depthkv.pc name everything relative to themselves.
#
# Reads `libraries`, `tree` and `native` of CMakeLists.txt.
include(CMakePackageConfigHelpers)

set(install_dir ".")
if(SKBUILD)
    set(install_dir depthkv_edge)
endif()

install(TARGETS ${libraries}
    LIBRARY DESTINATION ${install_dir}/lib
    RUNTIME DESTINATION ${install_dir}/lib
    ARCHIVE DESTINATION ${install_dir}/lib)
install(FILES "${tree}/LICENSE" DESTINATION ${install_dir}/lib RENAME LICENSE.llama.cpp)
set(header_dirs "${tree}/include/" "${tree}/ggml/include/")
if(NOT DEPTHKV_BASELINE)
    list(APPEND header_dirs "${native}/include/")
endif()
install(DIRECTORY ${header_dirs} DESTINATION ${install_dir}/include FILES_MATCHING PATTERN "*.h")

# The baseline is not ours to offer; static libraries go into other packages (examples/ios), with what they link to.
if(DEPTHKV_BASELINE OR NOT BUILD_SHARED_LIBS)
    return()
endif()

set(pyproject "${CMAKE_CURRENT_LIST_DIR}/../pyproject.toml")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${pyproject}")
file(STRINGS "${pyproject}" depthkv_version REGEX "^version = \"[0-9.]+\"$")
string(REGEX REPLACE "[^0-9.]" "" depthkv_version "${depthkv_version}")

# Apps link to libraries. Backends that are chosen at run time are modules: they only have to be there.
set(linked "")
set(loaded "")
foreach(library ${libraries})
    get_target_property(type ${library} TYPE)
    if(type STREQUAL "MODULE_LIBRARY")
        list(APPEND loaded "${CMAKE_SHARED_MODULE_PREFIX}${library}${CMAKE_SHARED_MODULE_SUFFIX}")
    else()
        list(APPEND linked ${library})
    endif()
endforeach()
set(package_dir "${CMAKE_BINARY_DIR}/package")
configure_file("${CMAKE_CURRENT_LIST_DIR}/depthkv-config.cmake.in" "${package_dir}/depthkv-config.cmake" @ONLY)
configure_file("${CMAKE_CURRENT_LIST_DIR}/depthkv.pc.in" "${package_dir}/depthkv.pc" @ONLY)
write_basic_package_version_file("${package_dir}/depthkv-config-version.cmake"
    VERSION "${depthkv_version}" COMPATIBILITY SameMinorVersion)
install(FILES "${package_dir}/depthkv-config.cmake" "${package_dir}/depthkv-config-version.cmake"
    DESTINATION ${install_dir}/lib/cmake/depthkv)
install(FILES "${package_dir}/depthkv.pc" DESTINATION ${install_dir}/lib/pkgconfig)
