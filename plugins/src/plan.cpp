#include "plan.h"

#include <cstdio>
#include <cstring>

namespace jet {

constexpr int kMaxArguments = 48;
constexpr size_t kAlign = 256;

Arg Arg::i32(int64_t value) {
    Arg arg;
    arg.fits = value == int64_t(int32_t(value));
    arg.bits = uint32_t(int32_t(value));
    return arg;
}

Arg Arg::fp32(double value) {
    float const narrow = float(value);
    Arg arg;
    std::memcpy(&arg.bits, &narrow, sizeof(narrow));
    return arg;
}

Arg Arg::pointer(void const* value) {
    Arg arg;
    arg.bits = reinterpret_cast<uintptr_t>(value);
    return arg;
}

Arg Plan::scratch(int64_t bytes) {
    size_t const at = used;
    used += (size_t(bytes) + kAlign - 1) / kAlign * kAlign;
    return Arg::pointer(workspace + at);
}

void Plan::submit(Kernel const& kernel, KernelCache& cache, int64_t x, int64_t y, int64_t z, Arg* args, int count) {
    if (!device || error.failed()) return;
    Loaded const* loaded = load(kernel, cache, *device, error);
    if (!loaded || preload) return;
    if (count != kernel.num_arguments || count + 2 > kMaxArguments)
        return error.set("%s: %d arguments, %d expected", kernel.name, count, kernel.num_arguments);
    if (x < 1 || y < 1 || z < 1 || x > INT32_MAX || y > 65535 || z > 65535)
        return error.set("%s: a grid of %lld x %lld x %lld is beyond the GPU's limits", kernel.name, (long long)x,
            (long long)y, (long long)z);
    void* pointers[kMaxArguments];
    for (int i = 0; i < count + 2; ++i) {
        if (!args[i].fits) return error.set("%s: argument %d does not fit in 32 bits", kernel.name, i);
        pointers[i] = &args[i].bits;
    }
    Image const& image = *loaded->image;
    CUlaunchAttribute cluster{};
    cluster.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    cluster.value.clusterDim.x = unsigned(image.clusters);
    cluster.value.clusterDim.y = cluster.value.clusterDim.z = 1;
    CUlaunchConfig config{};
    config.gridDimX = unsigned(x) * unsigned(image.clusters);
    config.gridDimY = unsigned(y);
    config.gridDimZ = unsigned(z);
    config.blockDimX = unsigned(image.threads);
    config.blockDimY = config.blockDimZ = 1;
    config.sharedMemBytes = unsigned(image.shared);
    config.hStream = stream;
    config.attrs = &cluster;
    config.numAttrs = image.clusters > 1 ? 1 : 0;
    CUresult const result =
        driver(error)->launchKernelEx(&config, reinterpret_cast<CUfunction>(loaded->handle), pointers, nullptr);
    if (result != CUDA_SUCCESS) {
        char what[256];
        std::snprintf(what, sizeof(what), "%s, grid %lld x %lld x %lld, %d threads, %d bytes of shared memory",
            kernel.name, (long long)x, (long long)y, (long long)z, image.threads, image.shared);
        check(result, "cuLaunchKernelEx", what, error);
    }
}

}  // namespace jet
