#include "plugin.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>

namespace jet {

Plugin::Plugin(NodeSpec const& spec, double const* values) : spec_(spec), name_(spec.name) {
    std::copy(values, values + kMaxAttributes, values_);
}

int32_t Plugin::fail(Error const& error) const {
    char text[1024];
    std::snprintf(text, sizeof(text), "jet::%s: %s", name_, error.text);
    log(ILogger::Severity::kERROR, text);
    return -1;
}

bool Plugin::supported(Error& error) const {
    if (form() > kVERIFY) {
        error.set("form is %d; %d (decode), %d (mixed) or %d (verify) is served", form(), kDECODE, kMIXED, kVERIFY);
        return false;
    }
    char held[512] = "none";
    size_t at = 0;
    for (int i = 0; i < num_cases(); ++i) {
        if (has_attributes(i) && has_form(i)) return true;
        if (has_attributes(i)) error.set("this library was built for a model that verifies no drafts (form %d)", kVERIFY);
        if (at + 96 < sizeof(held)) {
            if (at) at += size_t(std::snprintf(held + at, sizeof(held) - at, "; "));
            describe(i, held + at, sizeof(held) - at);
            at += std::strlen(held + at);
        }
    }
    error.set("this library holds no kernels for the node's dimensions; it holds: %s", held);
    return false;
}

IPluginCapability* Plugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

DataType Plugin::type_of(int i, int tensor) const {
    switch (spec_.tensors[tensor].kind) {
    case Kind::kMODEL: return view(i).dtype;
    case Kind::kSTATE: return view(i).state_dtype;
    case Kind::kFLOAT: return DataType::kFLOAT;
    case Kind::kINT: return DataType::kINT32;
    }
    return DataType::kFLOAT;
}

bool Plugin::supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t, int32_t) noexcept {
    if (inOut[pos].desc.format != TensorFormat::kLINEAR) return false;
    for (int i = 0; i < num_cases(); ++i) {
        bool same = has_attributes(i);
        for (int t = 0; same && t <= pos; ++t) same = inOut[t].desc.type == type_of(i, t);
        if (same) return true;
    }
    return false;
}

int32_t Plugin::getOutputDataTypes(DataType* types, int32_t, DataType const* inputs, int32_t) const noexcept {
    types[0] = inputs[0];
    for (int i = 1; i < spec_.num_outputs; ++i) types[i] = inputs[spec_.state_inputs[i - 1]];
    return 0;
}

int32_t Plugin::getOutputShapes(DimsExprs const* inputs, int32_t num, DimsExprs const*, int32_t, DimsExprs* outputs,
    int32_t, IExprBuilder& builder) noexcept {
    Error error;
    if (num != spec_.num_inputs) error.set("%d inputs, %d expected", num, spec_.num_inputs);
    for (int i = 0; i < num && !error.failed(); ++i)
        if (spec_.tensors[i].rank && inputs[i].nbDims != spec_.tensors[i].rank)
            error.set("%s has rank %d, %d expected", spec_.tensors[i].name, inputs[i].nbDims, spec_.tensors[i].rank);
    if (error.failed()) return fail(error);
    outputs[0].nbDims = 2;
    outputs[0].d[0] = inputs[0].d[0];
    outputs[0].d[1] = builder.constant(output_columns());
    for (int i = 1; i < spec_.num_outputs; ++i) outputs[i] = inputs[spec_.state_inputs[i - 1]];
    return 0;
}

bool Plugin::fits(int i, Dims const* dims, Plan& plan, Error& error) const {
    int64_t symbols[kSYMBOLS];
    std::fill(symbols, symbols + kSYMBOLS, -1);
    for (int t = 0; t < spec_.num_inputs; ++t) {
        TensorSpec const& tensor = spec_.tensors[t];
        if (dims[t].nbDims != rank(i, t)) {
            error.set("%s has rank %d, %d expected", tensor.name, dims[t].nbDims, rank(i, t));
            return false;
        }
        for (int axis = 0; axis < rank(i, t); ++axis) {
            int64_t const found = dims[t].d[axis];
            int64_t wanted = expected(i, t, axis);
            if (wanted < 0) {
                int64_t& symbol = symbols[-1 - wanted];
                if (symbol < 0) symbol = found;
                wanted = symbol;
            }
            if (found != wanted) {
                error.set("%s: axis %d is %lld, %lld expected", tensor.name, axis, (long long)found, (long long)wanted);
                return false;
            }
        }
    }
    plan.T = symbols[kT];
    plan.N = symbols[kN];
    plan.columns = symbols[kCOLUMNS];
    plan.M = symbols[kM];
    plan.P = symbols[kP];
    plan.S = symbols[kS];
    plan.pages = symbols[kPAGES];
    if (symbols[kN1] != plan.N + 1)
        error.set("cu_seqlens has %lld entries, N + 1 = %lld expected", (long long)symbols[kN1], (long long)plan.N + 1);
    else if (plan.N < 1 || plan.T < plan.N)
        error.set("%lld tokens for %lld sequences: each needs one", (long long)plan.T, (long long)plan.N);
    else if (form() == kDECODE && plan.T != plan.N)
        error.set("%lld tokens for %lld sequences in the form decode: each has one", (long long)plan.T, (long long)plan.N);
    else if (form() == kVERIFY && plan.T > kMaxVerify * plan.N)
        error.set("%lld tokens for %lld sequences in the form verify: each has %d at most", (long long)plan.T,
            (long long)plan.N, kMaxVerify);
    else if (plan.columns > 0 && (plan.columns % 16 || plan.columns < least_columns(i)))
        error.set("%s has %lld columns: a multiple of 16, %lld or more, is needed", spec_.tensors[0].name,
            (long long)plan.columns, (long long)least_columns(i));
    return !error.failed();
}

int Plugin::bind(Dims const* dims, DataType const* types, Plan& plan, Error& error) const {
    for (int i = 0; i < num_cases(); ++i) {
        if (!has_attributes(i) || !has_form(i)) continue;
        bool same = true;
        for (int t = 0; same && t < spec_.num_inputs; ++t) same = types[t] == type_of(i, t);
        if (!same) continue;
        error = Error{};
        if (fits(i, dims, plan, error)) return i;
    }
    error.set("this library was not built for the node's dtypes");
    return -1;
}

int32_t Plugin::configurePlugin(
    DynamicPluginTensorDesc const* in, int32_t num, DynamicPluginTensorDesc const*, int32_t) noexcept {
    Error error;
    Plan plan;
    Dims dims[kMaxTensors];
    DataType types[kMaxTensors];
    if (num != spec_.num_inputs) error.set("%d inputs, %d expected", num, spec_.num_inputs);
    for (int i = 0; i < num && !error.failed(); ++i) dims[i] = in[i].max, types[i] = in[i].desc.type;
    if (!error.failed() && bind(dims, types, plan, error) >= 0) return 0;
    return fail(error);
}

// The maximum over all T <= max T and N <= max N. The splits of decode decrease as N grows, so every N is evaluated.
size_t Plugin::getWorkspaceSize(
    DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*, int32_t) const noexcept {
    Error error;
    Plan most;
    Dims dims[kMaxTensors];
    DataType types[kMaxTensors];
    for (int i = 0; i < spec_.num_inputs; ++i) dims[i] = in[i].max, types[i] = in[i].desc.type;
    int const i = bind(dims, types, most, error);
    if (i < 0) {
        fail(error);
        return 0;
    }
    size_t bytes = 0;
    for (int64_t n = 1; n <= most.N; ++n) bytes = std::max(bytes, scratch_of(i, most, n));
    return bytes;
}

// The most that any call of case i with so many sequences takes.
size_t Plugin::scratch_of(int i, Plan const& most, int64_t sequences) const {
    Plan longer, step;
    longer.N = step.T = step.N = sequences;
    longer.T = form() == kVERIFY ? std::min<int64_t>(most.T, kMaxVerify * sequences) : most.T;
    for (Plan* plan : {&longer, &step})
        plan->columns = most.columns, plan->M = most.M, plan->P = most.P, plan->sms = kMaxSms;
    if (form() == kVERIFY)
        view(i).verify(longer);
    else
        view(i).decode(step);
    if (form() == kMIXED) view(i).mixed(longer);
    return std::max(longer.used, step.used);
}

int32_t Plugin::onShapeChange(PluginTensorDesc const* in, int32_t, PluginTensorDesc const*, int32_t) noexcept {
    Error error;
    Plan plan;
    Dims dims[kMaxTensors];
    DataType types[kMaxTensors];
    for (int i = 0; i < spec_.num_inputs; ++i) dims[i] = in[i].dims, types[i] = in[i].type;
    return bind(dims, types, plan, error) >= 0 ? 0 : fail(error);
}

static size_t bytes_of(PluginTensorDesc const& tensor) {
    bool const wide = tensor.type == DataType::kFLOAT || tensor.type == DataType::kINT32;
    size_t bytes = wide ? 4 : tensor.type == DataType::kFP8 ? 1 : 2;
    for (int i = 0; i < tensor.dims.nbDims; ++i) bytes *= size_t(tensor.dims.d[i]);
    return bytes;
}

int32_t Plugin::enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
    void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
    Plan plan;
    Dims dims[kMaxTensors];
    DataType types[kMaxTensors];
    for (int i = 0; i < spec_.num_inputs; ++i) dims[i] = in[i].dims, types[i] = in[i].type;
    int const i = bind(dims, types, plan, plan.error);
    if (i < 0) return fail(plan.error);
    for (int t = 0; t < spec_.num_inputs + spec_.num_outputs; ++t) {
        void const* address = t < spec_.num_inputs ? inputs[t] : outputs[t - spec_.num_inputs];
        if (!address || reinterpret_cast<uintptr_t>(address) % 16) {
            plan.error.set("%s is at %p: an address divisible by 16 is needed", spec_.tensors[t].name, address);
            return fail(plan.error);
        }
    }
    plan.inputs = inputs;
    plan.outputs = outputs;
    plan.workspace = static_cast<char*>(workspace);
    plan.stream = reinterpret_cast<CUstream>(stream);
    Device device;
    bool entered = false;
    if (enter(plan.stream, device, entered, plan.error)) {
        plan.device = &device;
        plan.sms = device.sms;
        run(i, in, plan);
    }
    if (entered) leave(plan.error);
    return plan.error.failed() ? fail(plan.error) : 0;
}

// Case i on the device whose context is current.
void Plugin::run(int i, PluginTensorDesc const* in, Plan& plan) const {
    attributes(plan);
    // A mixed call in which every sequence has one token, and each has at least one, makes only decode's launches.
    CaseView const known = view(i);
    Form const launches = form() == kVERIFY ? known.verify : plan.T == plan.N ? known.decode : known.mixed;
    // All kernels are loaded at the first call, so that any later one may be captured in a CUDA graph.
    plan.preload = true;
    if (form() == kMIXED) known.mixed(plan);
    (form() == kVERIFY ? known.verify : known.decode)(plan);
    plan.preload = false;
    plan.used = 0;
    for (int o = 1; o < spec_.num_outputs && !plan.error.failed(); ++o) {
        int const input = spec_.state_inputs[o - 1];
        if (plan.inputs[input] == plan.outputs[o]) continue;  // in place, as the runtime binds it
        check(driver(plan.error)->memcpyDtoDAsync(reinterpret_cast<CUdeviceptr>(plan.outputs[o]),
                  reinterpret_cast<CUdeviceptr>(plan.inputs[input]), bytes_of(in[input]), plan.stream),
            "cuMemcpyDtoDAsync", spec_.tensors[input].name, plan.error);
    }
    launches(plan);
}

PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept {
    int n = 0;
    for (; n < spec_.num_attributes; ++n) {
        Attribute const& a = spec_.attributes[n];
        ints_[n] = int32_t(values_[n]);
        floats_[n] = float(values_[n]);
        if (a.is_float)
            fields_[n] = PluginField(a.name, &floats_[n], PluginFieldType::kFLOAT32, 1);
        else
            fields_[n] = PluginField(a.name, &ints_[n], PluginFieldType::kINT32, 1);
    }
    fields_[n++] = PluginField("format", &format_, PluginFieldType::kINT32, 1);
    fields_[n++] = PluginField("digest", table_digest, PluginFieldType::kCHAR, int32_t(std::strlen(table_digest)));
    collection_ = PluginFieldCollection{n, fields_};
    return &collection_;
}

}  // namespace jet
