// A libcuda.so.1 for tests: records launches and copies, executes nothing.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <cuda.h>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {
struct Launch {
    std::string name;
    unsigned grid[3], block[3], shared;
    std::vector<uint64_t> args;
    uint64_t stream, image;  // image: a hash of the cubin
};
struct KernelInfo {
    std::string name;
    void const* image;
    int max_shared = 48 * 1024;
};
std::mutex mutex;  // of launches; sizes are only read once threads run
std::vector<Launch> launches;
std::map<std::string, std::vector<int>> sizes;  // bytes of a kernel's parameters
int major_ = 9, minor_ = 0, sms_ = 132, loads_ = 0;
std::string failing;  // the call that fails
bool threads_have_context = true;  // before any is pushed
thread_local std::vector<CUcontext> pushed;
std::vector<uint64_t> contexts;  // each pushed context, and 0 for each that was popped, of all threads

// FNV-1a of what lies before the ELF's section table.
uint64_t hash(void const* image) {
    auto const* bytes = static_cast<unsigned char const*>(image);
    uint64_t end, h = 14695981039346656037ull;
    std::memcpy(&end, bytes + 40, 8);
    for (uint64_t i = 0; i < end; ++i) h = (h ^ bytes[i]) * 1099511628211ull;
    return h;
}

bool has_context() { return threads_have_context || !pushed.empty(); }
CUresult result(char const* call) { return failing == call ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
// Of a call that needs a current context.
CUresult in_context(char const* call) { return has_context() ? result(call) : CUDA_ERROR_INVALID_CONTEXT; }
}  // namespace

API void fake_device(int major, int minor, int sms) { major_ = major, minor_ = minor, sms_ = sms; }
API void fake_fail(char const* call) { failing = call; }
API void fake_parameters(char const* name, int const* bytes, int count) { sizes[name].assign(bytes, bytes + count); }
API void fake_context(int current) { threads_have_context = current; }
// The pushes and pops since the last call, and how many contexts the calling thread has left on its stack.
API int fake_contexts(uint64_t* events, int* left) {
    std::lock_guard<std::mutex> lock(mutex);
    int const count = int(contexts.size());
    std::copy(contexts.begin(), contexts.end(), events);
    contexts.clear();
    *left = int(pushed.size());
    return count;
}
API int fake_count() { return int(launches.size()); }
API int fake_loads() { return loads_; }
API void fake_clear() { launches.clear(); }
// numbers: grid, block, shared, stream, hash of the cubin, arguments; returns how many
API int fake_launch(int i, char* name, uint64_t* numbers) {
    Launch const& l = launches[size_t(i)];
    std::strcpy(name, l.name.c_str());
    for (int k = 0; k < 3; ++k) numbers[k] = l.grid[k], numbers[3 + k] = l.block[k];
    numbers[6] = l.shared;
    numbers[7] = l.stream;
    numbers[8] = l.image;
    for (size_t k = 0; k < l.args.size(); ++k) numbers[9 + k] = l.args[k];
    return int(9 + l.args.size());
}

API CUresult cuGetErrorName(CUresult error, char const** text) {
    *text = error == CUDA_ERROR_INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : "CUDA_ERROR_INVALID_VALUE";
    return CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult error, char const** text) {
    *text = error == CUDA_ERROR_INVALID_CONTEXT ? "invalid device context" : "invalid argument";
    return CUDA_SUCCESS;
}
API CUresult cuCtxGetDevice(CUdevice* device) {
    if (has_context()) *device = 0;
    return in_context("cuCtxGetDevice");
}
// A stream's context is at 1000 + its handle. Without a current one, the default streams have none.
API CUresult cuStreamGetCtx(CUstream stream, CUcontext* context) {
    auto const handle = reinterpret_cast<uint64_t>(stream);
    if (handle <= 2 && !has_context()) return CUDA_ERROR_INVALID_CONTEXT;
    *context = reinterpret_cast<CUcontext>(1000 + handle);
    return result("cuStreamGetCtx");
}
#undef cuCtxPushCurrent
API CUresult cuCtxPushCurrent_v2(CUcontext context) {
    CUresult const r = result("cuCtxPushCurrent");
    if (r != CUDA_SUCCESS) return r;
    std::lock_guard<std::mutex> lock(mutex);
    pushed.push_back(context);
    contexts.push_back(reinterpret_cast<uint64_t>(context));
    return r;
}
#undef cuCtxPopCurrent
API CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    std::lock_guard<std::mutex> lock(mutex);
    if (pushed.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    *context = pushed.back();
    pushed.pop_back();
    contexts.push_back(0);
    return result("cuCtxPopCurrent");
}
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? major_
        : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR    ? minor_
                                                                       : sms_;
    return result("cuDeviceGetAttribute");
}
API CUresult cuLibraryLoadData(CUlibrary* library, void const* code, CUjit_option*, void**, unsigned,
    CUlibraryOption*, void**, unsigned) {
    ++loads_;
    if (std::memcmp(code, "\x7f" "ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
    *library = reinterpret_cast<CUlibrary>(const_cast<void*>(code));
    return result("cuLibraryLoadData");
}
API CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, char const* name) {
    if (!sizes.count(name)) return CUDA_ERROR_NOT_FOUND;
    *kernel = reinterpret_cast<CUkernel>(new KernelInfo{name, library});
    return result("cuLibraryGetKernel");
}
API CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice) {
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
        reinterpret_cast<KernelInfo*>(kernel)->max_shared = value;
    return result("cuKernelSetAttribute");
}
API CUresult cuLaunchKernelEx(CUlaunchConfig const* c, CUfunction function, void** params, void** extra) {
    auto* kernel = reinterpret_cast<KernelInfo*>(function);
    if (extra || int(c->sharedMemBytes) > kernel->max_shared) return CUDA_ERROR_INVALID_VALUE;
    Launch l{kernel->name, {c->gridDimX, c->gridDimY, c->gridDimZ}, {c->blockDimX, c->blockDimY, c->blockDimZ},
        c->sharedMemBytes, {}, reinterpret_cast<uint64_t>(c->hStream), hash(kernel->image)};
    for (size_t i = 0; i < sizes[kernel->name].size(); ++i) {
        uint64_t bits = 0;
        std::memcpy(&bits, params[i], size_t(sizes[kernel->name][i]));
        l.args.push_back(bits);
    }
    std::lock_guard<std::mutex> lock(mutex);
    CUresult const r = in_context("cuLaunchKernelEx");
    if (r == CUDA_SUCCESS) launches.push_back(l);
    return r;
}
#undef cuMemcpyDtoDAsync
API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!has_context()) return CUDA_ERROR_INVALID_CONTEXT;
    launches.push_back({"memcpy", {0, 0, 0}, {0, 0, 0}, 0, {to, from, bytes}, reinterpret_cast<uint64_t>(stream), 0});
    return result("cuMemcpyDtoDAsync");
}
