// The creators TensorRT finds when it loads the library, the reading of their fields, and the log.
#include "plugin.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <new>

namespace jet {

namespace {

std::atomic<ILoggerFinder*> logger_finder{nullptr};

bool number(PluginField const& field, bool is_float, double& value) {
    if (field.length != 1 || !field.data) return false;
    switch (field.type) {
    case PluginFieldType::kINT32: value = *static_cast<int32_t const*>(field.data); return !is_float;
    case PluginFieldType::kINT64: value = double(*static_cast<int64_t const*>(field.data)); return !is_float;
    case PluginFieldType::kFLOAT32: value = *static_cast<float const*>(field.data); return is_float;
    case PluginFieldType::kFLOAT64: value = float(*static_cast<double const*>(field.data)); return is_float;
    default: return false;
    }
}

// What getFieldsToSerialize adds; both must be this library's own.
bool read_version(PluginField const& field, bool& has_format, bool& has_digest, Error& error) {
    double value = 0;
    if (!std::strcmp(field.name, "format")) {
        has_format = number(field, false, value) && value == kFormat;
        if (!has_format) error.set("the engine was written with field format %g, this library reads %d", value, kFormat);
        return true;
    }
    if (!std::strcmp(field.name, "digest")) {
        has_digest = field.type == PluginFieldType::kCHAR && field.length == int32_t(std::strlen(table_digest))
            && !std::memcmp(field.data, table_digest, size_t(field.length));
        if (!has_digest)
            error.set("the engine was built with other kernels than this library's (%s): build it again", table_digest);
        return true;
    }
    return false;
}

}  // namespace

void set_logger(ILoggerFinder* finder) { logger_finder.store(finder); }

void log(ILogger::Severity severity, char const* text) {
    ILoggerFinder* finder = logger_finder.load();
    ILogger* logger = finder ? finder->findLogger() : nullptr;
    if (logger)
        logger->log(severity, text);
    else
        std::fprintf(stderr, "%s\n", text);
}

bool read_fields(NodeSpec const& spec, PluginFieldCollection const* fields, TensorRTPhase phase, double* values,
    Error& error) {
    bool seen[kMaxAttributes] = {}, has_format = false, has_digest = false;
    for (int f = 0; fields && f < fields->nbFields && !error.failed(); ++f) {
        PluginField const& field = fields->fields[f];
        int i = 0;
        while (i < spec.num_attributes && std::strcmp(spec.attributes[i].name, field.name)) ++i;
        if (i == spec.num_attributes) {
            if (phase != TensorRTPhase::kRUNTIME || !read_version(field, has_format, has_digest, error))
                error.set("field %s is not known", field.name);
            continue;
        }
        Attribute const& attribute = spec.attributes[i];
        if (!number(field, attribute.is_float, values[i]))
            error.set("field %s must be one %s", field.name, attribute.is_float ? "float" : "integer");
        else if (!std::isfinite(values[i]) || values[i] < attribute.minimum || values[i] > INT32_MAX
            || (attribute.is_float && values[i] == 0))
            error.set("field %s is %g, which is out of range", field.name, values[i]);
        seen[i] = true;
    }
    for (int i = 0; i < spec.num_attributes; ++i)
        if (!seen[i]) error.set("field %s is missing", spec.attributes[i].name);
    if (phase == TensorRTPhase::kRUNTIME && !(has_format && has_digest))
        error.set("fields format and digest are missing: this is not a serialised node of this library");
    return !error.failed();
}

namespace {

class Creator final : public IPluginCreatorV3One {
  public:
    // `more`: the spec of nodes whose last attribute, which `spec` lacks, is given.
    Creator(NodeSpec const& spec, NodeSpec const& more, Plugin* (*make)(NodeSpec const&, double const*), char const* name)
        : spec_(spec), more_(more), make_(make), name_(name) {
        for (int i = 0; i < more.num_attributes; ++i) {
            auto const type = more.attributes[i].is_float ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;
            fields_[i] = PluginField(more.attributes[i].name, nullptr, type, 1);
        }
        collection_ = PluginFieldCollection{more.num_attributes, fields_};
    }

    IPluginV3* createPlugin(
        AsciiChar const* name, PluginFieldCollection const* fields, TensorRTPhase phase) noexcept override {
        Error error;
        double values[kMaxAttributes] = {};
        Plugin* plugin = nullptr;
        NodeSpec const& spec = has_more(fields) ? more_ : spec_;
        if (read_fields(spec, fields, phase, values, error)) {
            plugin = make_(spec, values);
            if (plugin) plugin->rename(name_);
            if (plugin && plugin->supported(error)) return plugin;
        }
        delete plugin;
        char text[1024];
        std::snprintf(text, sizeof(text), "jet::%s %s: %s", name_, name ? name : "", error.text);
        log(ILogger::Severity::kERROR, text);
        return nullptr;
    }

    PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
    AsciiChar const* getPluginName() const noexcept override { return name_; }
    AsciiChar const* getPluginVersion() const noexcept override { return "1"; }
    AsciiChar const* getPluginNamespace() const noexcept override { return ""; }

  private:
    bool has_more(PluginFieldCollection const* fields) const {
        for (int f = 0; fields && f < fields->nbFields; ++f)
            if (!std::strcmp(fields->fields[f].name, more_.attributes[more_.num_attributes - 1].name)) return true;
        return false;
    }

    NodeSpec const &spec_, &more_;
    Plugin* (*make_)(NodeSpec const&, double const*);
    char const* name_;
    PluginField fields_[kMaxAttributes];
    PluginFieldCollection collection_;
};

}  // namespace
}  // namespace jet

#define JET_EXPORT extern "C" __attribute__((visibility("default")))

JET_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static jet::Creator jet_block(
        jet::jet_block_spec, jet::buffered_jet_block_spec, jet::make_jet_block, "JetBlock");
    static jet::Creator attention(jet::attention_spec, jet::attention_spec, jet::make_attention, "Attention");
    // TensorRT's ONNX parser takes a node called Attention for ONNX's own, whatever its domain: there it is JetAttention.
    static jet::Creator jet_attention(
        jet::attention_spec, jet::attention_spec, jet::make_attention, "JetAttention");
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&jet_block, &attention, &jet_attention};
    count = 3;
    return creators;
}

JET_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { jet::set_logger(finder); }
