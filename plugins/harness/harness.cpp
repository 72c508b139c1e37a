// Drives the plugin objects with no TensorRT library: what a builder and a runtime do, for ctypes. Test only.
#include "NvInferRuntime.h"

#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <string>

using namespace nvinfer1;

#define API extern "C" __attribute__((visibility("default")))

namespace {

std::string messages;

class Logger final : public ILogger {
    void log(Severity, AsciiChar const* text) noexcept override { messages += std::string(text) + "\n"; }
} logger;

class Finder final : public ILoggerFinder {
    ILogger* findLogger() override { return &logger; }
} finder;

// A dimension is a number here; TensorRT's are expressions.
class Constant final : public IDimensionExpr, public apiv::VDimensionExpr {
  public:
    explicit Constant(int64_t value) : value_(value) { mImpl = this; }
    bool isConstant() const override { return true; }
    int64_t getConstantValue() const override { return value_; }
    bool isSizeTensor() const override { return false; }

  private:
    int64_t value_;
};

class Builder final : public IExprBuilder, public apiv::VExprBuilder {
  public:
    Builder() { mImpl = this; }
    IDimensionExpr const* constant(int64_t value) override { return &made_.emplace_back(value); }
    IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override {
        return nullptr;
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
        return nullptr;
    }

  private:
    std::deque<Constant> made_;
};

template <class T>
T* capability(void* plugin, PluginCapabilityType type) {
    return static_cast<T*>(static_cast<IPluginV3*>(plugin)->getCapabilityInterface(type));
}

constexpr int kMost = 20;

// A tensor as ctypes gives it: type, format, rank, dims.
struct Tensor {
    int32_t type, format, rank;
    int64_t dims[8];
};

PluginTensorDesc desc(Tensor const& t) {
    PluginTensorDesc d{};
    d.type = DataType(t.type);
    d.format = TensorFormat(t.format);
    d.scale = 1.0f;
    d.dims.nbDims = t.rank;
    for (int i = 0; i < t.rank; ++i) d.dims.d[i] = t.dims[i];
    return d;
}

struct Descs {
    PluginTensorDesc fixed[kMost];
    DynamicPluginTensorDesc dynamic[kMost];
    Descs(Tensor const* tensors, int count) {
        for (int i = 0; i < count; ++i) {
            fixed[i] = desc(tensors[i]);
            dynamic[i].desc = fixed[i];
            dynamic[i].min = dynamic[i].max = dynamic[i].opt = fixed[i].dims;
        }
    }
};

}  // namespace

API char const* messages_taken() {
    static std::string taken;
    taken = messages;
    messages.clear();
    return taken.c_str();
}

// The creator of a name, or null.
API void* open_creator(char const* library, char const* name) {
    void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        messages = dlerror();
        return nullptr;
    }
    auto get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle, "getCreators"));
    auto set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(handle, "setLoggerFinder"));
    if (!get || !set) return nullptr;
    set(&finder);
    int32_t count = 0;
    IPluginCreatorInterface* const* creators = get(count);
    for (int i = 0; i < count; ++i) {
        if (std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE")) return nullptr;
        auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
        if (!std::strcmp(creator->getPluginName(), name)) return creator;
    }
    return nullptr;
}

API int field_names(void* creator, char* text) {
    PluginFieldCollection const* fields = static_cast<IPluginCreatorV3One*>(creator)->getFieldNames();
    std::string all;
    for (int i = 0; i < fields->nbFields; ++i)
        all += std::string(fields->fields[i].name) + ":" + std::to_string(int(fields->fields[i].type)) + " ";
    std::strcpy(text, all.c_str());
    return fields->nbFields;
}

API void* create(void* creator, int count, char const** names, void const** data, int32_t const* types,
    int32_t const* lengths, int runtime) {
    PluginField fields[32];
    for (int i = 0; i < count; ++i) fields[i] = PluginField(names[i], data[i], PluginFieldType(types[i]), lengths[i]);
    PluginFieldCollection const all{count, fields};
    return static_cast<IPluginCreatorV3One*>(creator)->createPlugin(
        "layer", &all, runtime ? TensorRTPhase::kRUNTIME : TensorRTPhase::kBUILD);
}

// Serialises and creates again in the runtime phase; `alter` spoils the field of that name.
API void* round_trip(void* creator, void* plugin, char const* alter) {
    auto* runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    PluginFieldCollection const* fields = runtime->getFieldsToSerialize();
    std::deque<std::string> bytes;  // as in a plan: a copy of each field
    PluginField copies[32];
    for (int i = 0; i < fields->nbFields; ++i) {
        PluginField const& f = fields->fields[i];
        int const size = f.type == PluginFieldType::kCHAR ? f.length : 4;
        bytes.emplace_back(static_cast<char const*>(f.data), size_t(size));
        if (!std::strcmp(f.name, alter)) bytes.back()[0] ^= 1;
        copies[i] = PluginField(f.name, bytes.back().data(), f.type, f.length);
    }
    PluginFieldCollection const all{fields->nbFields, copies};
    return static_cast<IPluginCreatorV3One*>(creator)->createPlugin("layer", &all, TensorRTPhase::kRUNTIME);
}

API void* clone(void* plugin) { return static_cast<IPluginV3*>(plugin)->clone(); }
// As for an execution context of its own.
API void* attach(void* plugin) {
    return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr);
}
API void destroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }

API int supports(void* plugin, int pos, Tensor const* tensors, int inputs, int outputs) {
    Descs d(tensors, inputs + outputs);
    return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD)
        ->supportsFormatCombination(pos, d.dynamic, inputs, outputs);
}

API int num_outputs(void* plugin) {
    return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD)->getNbOutputs();
}

API int configure(void* plugin, Tensor const* tensors, int inputs, int outputs) {
    Descs d(tensors, inputs + outputs);
    return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD)
        ->configurePlugin(d.dynamic, inputs, d.dynamic + inputs, outputs);
}

API size_t workspace(void* plugin, Tensor const* tensors, int inputs, int outputs) {
    Descs d(tensors, inputs + outputs);
    return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD)
        ->getWorkspaceSize(d.dynamic, inputs, d.dynamic + inputs, outputs);
}

// Fills the outputs behind the inputs.
API int outputs_of(void* plugin, Tensor* tensors, int inputs) {
    auto* build = capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    Builder builder;
    DimsExprs in[kMost], out[kMost];
    DataType in_types[kMost], out_types[kMost];
    for (int i = 0; i < inputs; ++i) {
        in[i].nbDims = tensors[i].rank;
        in_types[i] = DataType(tensors[i].type);
        for (int d = 0; d < tensors[i].rank; ++d) in[i].d[d] = builder.constant(tensors[i].dims[d]);
    }
    int const count = build->getNbOutputs();
    if (build->getOutputShapes(in, inputs, nullptr, 0, out, count, builder)) return -1;
    if (build->getOutputDataTypes(out_types, count, in_types, inputs)) return -1;
    for (int i = 0; i < count; ++i) {
        Tensor& t = tensors[inputs + i];
        t.type = int32_t(out_types[i]);
        t.rank = out[i].nbDims;
        for (int d = 0; d < t.rank; ++d) t.dims[d] = out[i].d[d]->getConstantValue();
    }
    return count;
}

API int enqueue(void* plugin, Tensor const* tensors, int inputs, int outputs, void const* const* in, void* const* out,
    void* workspace, void* stream) {
    Descs d(tensors, inputs + outputs);
    auto* runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    if (runtime->onShapeChange(d.fixed, inputs, d.fixed + inputs, outputs)) return -1;
    return runtime->enqueue(d.fixed, d.fixed + inputs, in, out, workspace, static_cast<cudaStream_t>(stream));
}
