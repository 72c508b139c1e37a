// The launches of one enqueue: sizes and addresses, as the generated functions of kernels.inc use them.
#pragma once

#include "driver.h"

namespace jet {

// A kernel argument: the driver copies as many bytes as the cubin states, 4 or 8.
struct Arg {
    uint64_t bits = 0;
    bool fits = true;
    static Arg i32(int64_t value);
    static Arg fp32(double value);
    static Arg pointer(void const* value);
};

struct Plan {
    // sizes: tokens, sequences, columns of qkuz, columns of block_table, positions, rows of the state pools, pages of the
    // KV cache, multiprocessors
    int64_t T = 0, N = 0, columns = 0, M = 0, P = 0, S = 0, pages = 0, sms = 0;
    double eps = 0, k_scale = 1, v_scale = 1;  // attributes
    // addresses
    void const* const* inputs = nullptr;
    void* const* outputs = nullptr;
    char* workspace = nullptr;
    size_t used = 0;  // bytes of workspace
    // where to launch; without a device a plan only counts its workspace
    Device const* device = nullptr;
    CUstream stream = nullptr;
    bool preload = false;  // load the kernels, launch none
    Error error;

    Arg in(int i) const { return Arg::pointer(inputs ? inputs[i] : nullptr); }
    Arg out(int i) const { return Arg::pointer(outputs ? outputs[i] : nullptr); }
    Arg scratch(int64_t bytes);

    template <class... Args>
    void launch(Kernel const& kernel, KernelCache& cache, int64_t x, int64_t y, int64_t z, Args... args) {
        Arg list[] = {args..., Arg{}, Arg{}};  // Triton's scratch pointers: its kernels here use none
        submit(kernel, cache, x, y, z, list, int(sizeof...(args)));
    }

  private:
    void submit(Kernel const& kernel, KernelCache& cache, int64_t x, int64_t y, int64_t z, Arg* args, int count);
};

}  // namespace jet
