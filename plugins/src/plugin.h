// The common part of JetBlock and Attention: an IPluginV3 over a table of cases. A node states its tensors, its
// attributes and which case serves given shapes; the answers to TensorRT follow from that.
#pragma once

#include "table.h"

#include <new>

namespace jet {

using namespace nvinfer1;

enum class Kind { kMODEL, kSTATE, kFLOAT, kINT };  // model dtype, state dtype, fp32, int32

struct TensorSpec {
    char const* name;
    int rank;  // 0: the case's, 1 or 2
    Kind kind;
};

struct Attribute {
    char const* name;
    bool is_float;
    double minimum;
};

constexpr int kMaxTensors = 20;
constexpr int kMaxStates = 4;
constexpr int kMaxAttributes = 8;
constexpr int kFormat = 3;  // of the serialised fields; 1 had no form, 2 no interval
// Attribute `form`: one token a sequence; any mix of these and longer ones; 1 to kMaxVerify, which may be taken back.
enum CallForm { kDECODE = 1, kMIXED = 2, kVERIFY = 3 };
constexpr int kMaxVerify = 16;

struct NodeSpec {
    char const* name;
    TensorSpec tensors[kMaxTensors];  // inputs, then outputs
    int num_inputs, num_outputs;
    int state_inputs[kMaxStates];  // which input each output from 1 on continues
    Attribute attributes[kMaxAttributes];
    int num_attributes;
};

// The case that serves a node, independent of the kind of node.
struct CaseView {
    DataType dtype, state_dtype;
    Form mixed, decode, verify;
};

class Plugin : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
  public:
    Plugin(NodeSpec const& spec, double const* values);
    Plugin(Plugin const& other) = default;

    bool supported(Error& error) const;  // some case has these attributes

    void rename(char const* name) { name_ = name; }  // as its creator is called

    // IPluginV3
    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override;
    // core
    AsciiChar const* getPluginName() const noexcept override { return name_; }
    AsciiChar const* getPluginVersion() const noexcept override { return "1"; }
    AsciiChar const* getPluginNamespace() const noexcept override { return ""; }
    // build
    int32_t configurePlugin(
        DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const* out, int32_t) noexcept override;
    int32_t getOutputDataTypes(DataType* types, int32_t, DataType const* inputs, int32_t) const noexcept override;
    int32_t getOutputShapes(DimsExprs const* inputs, int32_t, DimsExprs const*, int32_t, DimsExprs* outputs, int32_t,
        IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(
        int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t, int32_t) noexcept override;
    int32_t getNbOutputs() const noexcept override { return spec_.num_outputs; }
    size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*,
        int32_t) const noexcept override;
    // runtime
    int32_t onShapeChange(PluginTensorDesc const* in, int32_t, PluginTensorDesc const*, int32_t) noexcept override;
    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const* out, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override;

  protected:
    int value(int attribute) const { return int(values_[attribute]); }
    double real(int attribute) const { return values_[attribute]; }

    virtual int num_cases() const = 0;
    virtual bool has_attributes(int i) const = 0;  // case i is of this node's attributes
    virtual CaseView view(int i) const = 0;
    virtual int64_t output_columns() const = 0;
    virtual int64_t least_columns(int i) const = 0;  // of qkuz, where its width is free
    virtual void attributes(Plan& plan) const = 0;
    virtual int form() const = 0;  // a CallForm
    virtual int64_t expected(int i, int input, int axis) const = 0;  // size, or -1 - symbol for one of Symbol
    virtual int rank(int, int input) const { return spec_.tensors[input].rank; }
    virtual void describe(int i, char* text, size_t size) const = 0;

    enum Symbol { kT, kN, kN1, kCOLUMNS, kM, kP, kS, kPAGES, kSYMBOLS };
    static constexpr int64_t any(Symbol s) { return -1 - int64_t(s); }

    NodeSpec const& spec_;

  private:
    // The case for these inputs, or -1 and why not; fills the plan's sizes.
    int bind(Dims const* dims, DataType const* types, Plan& plan, Error& error) const;
    bool fits(int i, Dims const* dims, Plan& plan, Error& error) const;
    DataType type_of(int i, int tensor) const;
    void run(int i, PluginTensorDesc const* in, Plan& plan) const;
    bool has_form(int i) const { return form() != kVERIFY || view(i).verify; }
    size_t scratch_of(int i, Plan const& most, int64_t sequences) const;
    int32_t fail(Error const& error) const;

    char const* name_;
    double values_[kMaxAttributes];
    // storage behind getFieldsToSerialize
    int32_t ints_[kMaxAttributes];
    float floats_[kMaxAttributes];  // as ONNX and the plan hold them
    int32_t format_ = kFormat;
    PluginField fields_[kMaxAttributes + 2];
    PluginFieldCollection collection_;
};

void log(ILogger::Severity severity, char const* text);
void set_logger(ILoggerFinder* finder);

// Reads and checks a creator's fields; false and a logged message when one is wrong, missing or unknown.
bool read_fields(NodeSpec const& spec, PluginFieldCollection const* fields, TensorRTPhase phase, double* values,
    Error& error);

extern NodeSpec const jet_block_spec, attention_spec;
extern NodeSpec const buffered_jet_block_spec;  // has a step buffer, and the attribute `interval` that others have not
Plugin* make_jet_block(NodeSpec const& spec, double const* values);
Plugin* make_attention(NodeSpec const& spec, double const* values);

}  // namespace jet
