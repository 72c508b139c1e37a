// The CUDA driver, found with dlopen at the first enqueue: the library links neither libcuda nor libcudart, so that it
// loads, and an engine builds, on a machine without a GPU.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cuda.h>

namespace jet {

constexpr int kMaxDevices = 64;
constexpr int kMaxSms = 256;  // assumed when declaring workspace: an engine may be built on another machine

// One kernel compiled for one SM.
struct Image {
    int sm, shared, threads, clusters;
    unsigned char const* cubin;
    size_t size;
};

struct Kernel {
    char const* name;
    Image const* images;
    int num_images;
    int num_arguments;  // without Triton's two trailing scratch pointers
};

struct Loaded {
    CUkernel handle;
    Image const* image;
};

// One kernel as loaded on each device; each entry is written once, under a lock.
struct KernelCache {
    std::atomic<Loaded const*> loaded[kMaxDevices];
};

struct Driver {
    decltype(&::cuGetErrorName) getErrorName;
    decltype(&::cuGetErrorString) getErrorString;
    decltype(&::cuCtxGetDevice) ctxGetDevice;
    decltype(&::cuCtxPushCurrent) ctxPushCurrent;
    decltype(&::cuCtxPopCurrent) ctxPopCurrent;
    decltype(&::cuStreamGetCtx) streamGetCtx;
    decltype(&::cuDeviceGetAttribute) deviceGetAttribute;
    decltype(&::cuLibraryLoadData) libraryLoadData;
    decltype(&::cuLibraryGetKernel) libraryGetKernel;
    decltype(&::cuKernelSetAttribute) kernelSetAttribute;
    decltype(&::cuLaunchKernelEx) launchKernelEx;
    decltype(&::cuMemcpyDtoDAsync) memcpyDtoDAsync;
};

struct Device {
    int id, sm, sms;  // sm: 90 is 9.0; sms: multiprocessors, at most kMaxSms
};

// Text of a failure, written without allocating.
struct Error {
    char text[768] = "";
    bool failed() const { return text[0] != 0; }
    void set(char const* format, ...) __attribute__((format(printf, 2, 3)));
};

Driver const* driver(Error& error);              // null, and the error set, where there is none
// The device of the calling thread's context. A thread that has none is given the stream's until `leave`: then `entered`
// is true, whatever is returned.
bool enter(CUstream stream, Device& device, bool& entered, Error& error);
void leave(Error& error);
Loaded const* load(Kernel const& kernel, KernelCache& cache, Device const& device, Error& error);
bool check(CUresult result, char const* call, char const* what, Error& error);

}  // namespace jet
