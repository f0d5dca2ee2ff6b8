#!/bin/sh
# Builds the engine with the Android NDK and lays out what an app module takes into src/main:
#   jniLibs/<abi>/*.so    the libraries, and the C++ runtime that they share
#   include/              llama-depthkv.h, llama.h, ggml*.h; build-<abi>/ holds the CMake package for the app's own native code
#
#   ANDROID_NDK=~/Android/Sdk/ndk/28.0.0 examples/android/build.sh [OUT]
#
# ABIS="arm64-v8a x86_64" and API=28 choose the targets. ARM_ARCH is what every phone has to be able to run:
# dot products are in all ARM cores for phones since 2018. ARM_ARCH=armv8-a runs on older ones, more slowly.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-$root/build/android}
abis=${ABIS:-arm64-v8a}
api=${API:-28}
arm_arch=${ARM_ARCH:-armv8.2-a+dotprod}

fail() { echo "build.sh: $1" >&2; exit 1; }
ndk=${ANDROID_NDK:-${ANDROID_NDK_HOME:-}}
toolchain=$ndk/build/cmake/android.toolchain.cmake
[ -n "$ndk" ] || fail "ANDROID_NDK is not set: give the directory of the NDK"
[ -f "$toolchain" ] || fail "no $toolchain: ANDROID_NDK has to name the directory of the NDK, r26 or later"

for abi in $abis; do
    case $abi in
        arm64-v8a) triple=aarch64-linux-android ;;
        x86_64) triple=x86_64-linux-android ;;
        *) fail "ABI $abi is not supported: give arm64-v8a, x86_64 or both" ;;
    esac
    # Several libraries throw exceptions at each other, so the C++ runtime has to be one and shared. Android 15 needs segments
    # aligned to 16 KiB. OpenMP is not part of Android; ggml has threads of its own.
    cmake -S "$root" -B "$out/build-$abi" -G Ninja -DCMAKE_BUILD_TYPE=Release \
        -DCMAKE_TOOLCHAIN_FILE="$toolchain" -DANDROID_ABI="$abi" -DANDROID_PLATFORM="android-$api" \
        -DANDROID_STL=c++_shared -DANDROID_SUPPORT_FLEXIBLE_PAGE_SIZES=ON \
        -DGGML_OPENMP=OFF -DGGML_LLAMAFILE=OFF -DGGML_CPU_ARM_ARCH="$arm_arch"
    cmake --build "$out/build-$abi"
    cmake --install "$out/build-$abi" --prefix "$out/build-$abi/install" --strip

    runtime=$(ls "$ndk"/toolchains/llvm/prebuilt/*/sysroot/usr/lib/"$triple"/libc++_shared.so 2> /dev/null | head -n 1)
    [ -n "$runtime" ] || fail "the NDK has no libc++_shared.so for $abi"
    mkdir -p "$out/jniLibs/$abi"
    cp "$out/build-$abi/install/lib/"*.so "$runtime" "$out/jniLibs/$abi/"
    rm -rf "$out/include"
    cp -R "$out/build-$abi/install/include" "$out/include"
done
echo "$out: copy jniLibs to app/src/main; include for native code of your own"
