#include "driver.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <dlfcn.h>
#include <mutex>

namespace jet {

void Error::set(char const* format, ...) {
    if (failed()) return;  // the first failure is the cause
    va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof(text), format, args);
    va_end(args);
}

namespace {

std::mutex mutex;

template <class F>
bool find(void* library, char const* name, F& function, Error& error) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (!function) error.set("libcuda.so.1 has no %s: a driver of CUDA 12 or newer is needed", name);
    return function != nullptr;
}

bool open(Driver& d, Error& error) {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        error.set("the NVIDIA driver was not found (%s): running an engine needs a GPU and its driver", dlerror());
        return false;
    }
    return find(library, "cuGetErrorName", d.getErrorName, error)
        && find(library, "cuGetErrorString", d.getErrorString, error)
        && find(library, "cuCtxGetDevice", d.ctxGetDevice, error)
        && find(library, "cuCtxPushCurrent_v2", d.ctxPushCurrent, error)
        && find(library, "cuCtxPopCurrent_v2", d.ctxPopCurrent, error)
        && find(library, "cuStreamGetCtx", d.streamGetCtx, error)
        && find(library, "cuDeviceGetAttribute", d.deviceGetAttribute, error)
        && find(library, "cuLibraryLoadData", d.libraryLoadData, error)
        && find(library, "cuLibraryGetKernel", d.libraryGetKernel, error)
        && find(library, "cuKernelSetAttribute", d.kernelSetAttribute, error)
        && find(library, "cuLaunchKernelEx", d.launchKernelEx, error)
        && find(library, "cuMemcpyDtoDAsync_v2", d.memcpyDtoDAsync, error);
}

// A cubin runs on its own SM; those of 8.x also on later 8.x. Triton's for 9.0 and later are exact.
Image const* choose(Kernel const& kernel, int sm) {
    Image const* best = nullptr;
    for (int i = 0; i < kernel.num_images; ++i) {
        Image const& image = kernel.images[i];
        bool runs = image.sm == sm || (sm / 10 == 8 && image.sm / 10 == 8 && image.sm < sm);
        if (runs && (!best || image.sm > best->sm)) best = &image;
    }
    return best;
}

}  // namespace

Driver const* driver(Error& error) {
    static std::atomic<Driver const*> ready{nullptr};
    if (Driver const* d = ready.load(std::memory_order_acquire)) return d;
    std::lock_guard<std::mutex> lock(mutex);
    static Driver opened;
    if (!ready.load(std::memory_order_relaxed)) {
        if (!open(opened, error)) return nullptr;
        ready.store(&opened, std::memory_order_release);
    }
    return &opened;
}

bool check(CUresult result, char const* call, char const* what, Error& error) {
    if (result == CUDA_SUCCESS) return true;
    Driver const* d = driver(error);
    char const *name = nullptr, *text = nullptr;
    if (d) {
        d->getErrorName(result, &name);
        d->getErrorString(result, &text);
    }
    error.set("%s failed for %s: %s (%d, %s)", call, what, name ? name : "?", int(result), text ? text : "?");
    return false;
}

// Makes the stream's context current. The default streams have none of their own: theirs is the current one.
static bool push_context(Driver const& d, CUstream stream, Error& error) {
    if (!stream || stream == CU_STREAM_LEGACY || stream == CU_STREAM_PER_THREAD) {
        error.set("the calling thread has no current CUDA context, and a default stream does not say which: call "
                  "cudaSetDevice or cuCtxSetCurrent on this thread first, or enqueue on a stream of its own");
        return false;
    }
    CUcontext context = nullptr;
    return check(d.streamGetCtx(stream, &context), "cuStreamGetCtx", "the stream", error)
        && check(d.ctxPushCurrent(context), "cuCtxPushCurrent", "the stream's context", error);
}

bool enter(CUstream stream, Device& device, bool& entered, Error& error) {
    entered = false;
    Driver const* d = driver(error);
    if (!d) return false;
    CUdevice id = -1;
    CUresult found = d->ctxGetDevice(&id);
    if (found == CUDA_ERROR_INVALID_CONTEXT) {  // as on a thread whose first use of CUDA this is
        entered = push_context(*d, stream, error);
        if (!entered) return false;
        found = d->ctxGetDevice(&id);
    }
    if (!check(found, "cuCtxGetDevice", "the calling thread", error)) return false;
    if (id < 0 || id >= kMaxDevices) {
        error.set("device %d: at most %d devices are supported", id, kMaxDevices);
        return false;
    }
    static std::atomic<int> known[kMaxDevices];  // sm * 1024 + sms
    int value = known[id].load(std::memory_order_relaxed);
    if (value == 0) {
        int major = 0, minor = 0, sms = 0;
        struct { CUdevice_attribute attribute; int* value; } const wanted[] = {
            {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, &major},
            {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, &minor},
            {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, &sms},
        };
        for (auto const& w : wanted)
            if (!check(d->deviceGetAttribute(w.value, w.attribute, id), "cuDeviceGetAttribute", "the device", error))
                return false;
        value = (major * 10 + minor) * 1024 + std::min(sms, kMaxSms);
        known[id].store(value, std::memory_order_relaxed);
    }
    device = {int(id), value / 1024, value % 1024};
    return true;
}

void leave(Error& error) {
    CUcontext context = nullptr;
    if (Driver const* d = driver(error))
        check(d->ctxPopCurrent(&context), "cuCtxPopCurrent", "the stream's context", error);
}

Loaded const* load(Kernel const& kernel, KernelCache& cache, Device const& device, Error& error) {
    std::atomic<Loaded const*>& slot = cache.loaded[device.id];
    if (Loaded const* found = slot.load(std::memory_order_acquire)) return found;
    Driver const* d = driver(error);
    if (!d) return nullptr;
    Image const* image = choose(kernel, device.sm);
    if (!image) {
        error.set("%s was not compiled for this GPU (SM %d.%d): build the engine again with --sm %d.%d", kernel.name,
            device.sm / 10, device.sm % 10, device.sm / 10, device.sm % 10);
        return nullptr;
    }
    std::lock_guard<std::mutex> lock(mutex);
    if (Loaded const* found = slot.load(std::memory_order_relaxed)) return found;
    CUlibrary library = nullptr;
    CUkernel handle = nullptr;
    if (!check(d->libraryLoadData(&library, image->cubin, nullptr, nullptr, 0, nullptr, nullptr, 0),
            "cuLibraryLoadData", kernel.name, error)
        || !check(d->libraryGetKernel(&handle, library, kernel.name), "cuLibraryGetKernel", kernel.name, error))
        return nullptr;
    if (image->shared > 48 * 1024
        && !check(d->kernelSetAttribute(
                      CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, image->shared, handle, CUdevice(device.id)),
            "cuKernelSetAttribute", kernel.name, error))
        return nullptr;
    Loaded const* loaded = new Loaded{handle, image};  // for the life of the process
    slot.store(loaded, std::memory_order_release);
    return loaded;
}

}  // namespace jet
