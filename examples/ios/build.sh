#!/bin/sh
# Builds depthkv.xcframework for iOS devices and simulators: one static library each, Metal kernels embedded, with a module map.
# Drag it into an Xcode project, and in Swift: `import depthkv`. Needs macOS with Xcode 15 or later, and cmake.
#
#   examples/ios/build.sh [OUT]
#
# IOS=16.4 chooses the oldest version of iOS.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-$root/build/ios}
ios=${IOS:-16.4}

fail() { echo "build.sh: $1" >&2; exit 1; }
command -v xcodebuild > /dev/null || fail "no xcodebuild: this needs macOS with Xcode"

# build SDK ARCHITECTURES: one static library out of all that the build makes
build() {
    dir=$out/build-$1
    cmake -S "$root" -B "$dir" -G Xcode -DCMAKE_SYSTEM_NAME=iOS -DCMAKE_OSX_SYSROOT="$1" -DCMAKE_OSX_ARCHITECTURES="$2" \
        -DCMAKE_OSX_DEPLOYMENT_TARGET="$ios" -DCMAKE_XCODE_ATTRIBUTE_CODE_SIGNING_ALLOWED=NO \
        -DCMAKE_XCODE_ATTRIBUTE_SUPPORTED_PLATFORMS="$1" -DBUILD_SHARED_LIBS=OFF \
        -DGGML_METAL=ON -DGGML_METAL_EMBED_LIBRARY=ON -DGGML_METAL_TARGET_OS=ios -DGGML_OPENMP=OFF
    cmake --build "$dir" --config Release --target depthkv-libraries -- -quiet
    cmake --install "$dir" --config Release --prefix "$dir/install"
    cat > "$dir/install/include/module.modulemap" << 'MAP'
module depthkv {
    header "llama-depthkv.h"
    link "c++"
    link framework "Accelerate"
    link framework "Foundation"
    link framework "Metal"
    link framework "MetalKit"
    export *
}
MAP
    libtool -static -o "$dir/libdepthkv.a" "$dir/install/lib/"*.a
}
build iphoneos arm64
build iphonesimulator "arm64;x86_64"

rm -rf "$out/depthkv.xcframework"
xcodebuild -create-xcframework \
    -library "$out/build-iphoneos/libdepthkv.a" -headers "$out/build-iphoneos/install/include" \
    -library "$out/build-iphonesimulator/libdepthkv.a" -headers "$out/build-iphonesimulator/install/include" \
    -output "$out/depthkv.xcframework"
echo "$out/depthkv.xcframework"
