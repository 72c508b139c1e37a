// The two nodes: their tensors, their attributes, the shapes a case serves. Node contract: domain jet, version 2.
#include "plugin.h"

#include <cstdio>

namespace jet {

constexpr NodeSpec jet_block = {
    "JetBlock",
    {{"qkuz", 2, Kind::kMODEL}, {"ba", 2, Kind::kMODEL}, {"kappa", 0, Kind::kMODEL}, {"A_log", 1, Kind::kFLOAT},
        {"dt_bias", 1, Kind::kFLOAT}, {"w_o", 1, Kind::kMODEL}, {"conv_state", 3, Kind::kMODEL},
        {"recurrent_state", 4, Kind::kSTATE}, {"cu_seqlens", 1, Kind::kINT}, {"slots", 1, Kind::kINT},
        {"context_lens", 1, Kind::kINT}, {"o", 2, Kind::kMODEL}, {"conv_state_out", 3, Kind::kMODEL},
        {"recurrent_state_out", 4, Kind::kSTATE}},
    11, 3, {6, 7},
    {{"num_heads", false, 1}, {"head_k_dim", false, 1}, {"head_v_dim", false, 1}, {"norm_eps", true, 0},
        {"form", false, kDECODE}}, 5,
};

// Two states more: the tokens since the recurrent state was written, and the position that it holds.
constexpr NodeSpec with_buffer(NodeSpec spec) {
    TensorSpec const states[] = {{"step_buffer", 4, Kind::kFLOAT}, {"state_position", 2, Kind::kINT}};
    for (int o = spec.num_outputs - 1; o >= 0; --o)  // the outputs make room
        spec.tensors[spec.num_inputs + 2 + o] = spec.tensors[spec.num_inputs + o];
    for (TensorSpec const& state : states) {
        spec.state_inputs[spec.num_outputs - 1] = spec.num_inputs;
        spec.tensors[spec.num_inputs++] = state;
        ++spec.num_outputs;
    }
    spec.tensors[spec.num_inputs + spec.num_outputs - 2] = {"step_buffer_out", 4, Kind::kFLOAT};
    spec.tensors[spec.num_inputs + spec.num_outputs - 1] = {"state_position_out", 2, Kind::kINT};
    spec.attributes[spec.num_attributes++] = {"interval", false, 1};
    return spec;
}

NodeSpec const jet_block_spec = jet_block, buffered_jet_block_spec = with_buffer(jet_block);

class JetBlock final : public Plugin {
  public:
    using Plugin::Plugin;
    IPluginV3* clone() noexcept override { return new (std::nothrow) JetBlock(*this); }

  private:
    JetBlockCase const& at(int i) const { return jet_block_cases[i]; }
    int num_cases() const override { return num_jet_block_cases; }
    bool has_attributes(int i) const override {
        bool const same = buffer_rows(i) ? has_buffer() && at(i).interval == value(5) : !has_buffer();
        return same && at(i).num_heads == value(0) && at(i).head_k_dim == value(1) && at(i).head_v_dim == value(2);
    }
    CaseView view(int i) const override {
        return {at(i).dtype, at(i).state_dtype, at(i).mixed, at(i).decode, at(i).verify};
    }
    int64_t output_columns() const override { return int64_t(value(0)) * value(2); }
    void attributes(Plan& plan) const override { plan.eps = real(3); }
    int rank(int i, int input) const override {
        int const given = Plugin::rank(i, input);
        return given ? given : at(i).key_heads ? 1 : 2;  // kappa: of all tokens, or of each
    }
    bool has_buffer() const { return spec_.num_attributes > jet_block.num_attributes; }
    // As kernels/state_layout.py.
    int64_t buffer_rows(int i) const {
        bool const any = at(i).interval > 1 || at(i).rollback > 0;
        return any ? at(i).interval - 1 + (at(i).rollback > 1 ? at(i).rollback : 1) : 0;
    }
    int form() const override { return value(4); }

    int64_t least_columns(int i) const override {
        int64_t const H = at(i).num_heads, HK = at(i).key_heads ? at(i).key_heads : H;
        return 2 * (HK * at(i).head_k_dim + H * at(i).head_v_dim);
    }

    int64_t expected(int i, int input, int axis) const override {
        int64_t const H = at(i).num_heads, K = at(i).head_k_dim, V = at(i).head_v_dim, W = at(i).conv_size;
        int64_t const C = H * V + 2 * at(i).key_heads * K, kept = W - 1 + at(i).rollback;
        bool const of_all = at(i).key_heads > 0;
        int64_t const shapes[13][4] = {
            {any(kT), any(kCOLUMNS)}, {any(kT), 2 * H}, {of_all ? C * W : any(kT), C * W}, {H}, {H}, {V},
            {any(kS), kept, C}, {any(kS), H, K, V}, {any(kN1)}, {any(kN)}, {any(kN)},
            {any(kS), H, buffer_rows(i), K + V + 4}, {any(kS), H},
        };
        return shapes[input][axis];
    }

    void describe(int i, char* text, size_t size) const override {
        int const n = std::snprintf(text, size, "num_heads %d, head_k_dim %d, head_v_dim %d", at(i).num_heads,
            at(i).head_k_dim, at(i).head_v_dim);
        if (buffer_rows(i)) std::snprintf(text + n, size - size_t(n), ", interval %d", at(i).interval);
    }
};

NodeSpec const attention_spec = {
    "Attention",
    {{"qkv", 2, Kind::kMODEL}, {"cos_sin", 2, Kind::kMODEL}, {"kv_cache", 5, Kind::kSTATE},
        {"block_table", 2, Kind::kINT}, {"cu_seqlens", 1, Kind::kINT}, {"slots", 1, Kind::kINT},
        {"context_lens", 1, Kind::kINT}, {"o", 2, Kind::kMODEL}, {"kv_cache_out", 5, Kind::kSTATE}},
    7, 2, {2, -1},
    {{"num_heads", false, 1}, {"num_kv_heads", false, 1}, {"head_dim", false, 1}, {"window", false, 0},
        {"k_scale", true, 0}, {"v_scale", true, 0}, {"form", false, kDECODE}}, 7,
};

class Attention final : public Plugin {
  public:
    using Plugin::Plugin;
    IPluginV3* clone() noexcept override { return new (std::nothrow) Attention(*this); }

  private:
    AttentionCase const& at(int i) const { return attention_cases[i]; }
    int num_cases() const override { return num_attention_cases; }
    bool has_attributes(int i) const override {
        return at(i).num_heads == value(0) && at(i).num_kv_heads == value(1) && at(i).head_dim == value(2)
            && at(i).window == value(3);
    }
    CaseView view(int i) const override {
        return {at(i).dtype, at(i).state_dtype, at(i).mixed, at(i).decode, at(i).verify};
    }
    int64_t output_columns() const override { return int64_t(value(0)) * value(2); }
    void attributes(Plan& plan) const override { plan.k_scale = real(4), plan.v_scale = real(5); }
    int form() const override { return value(6); }
    int64_t least_columns(int) const override { return 0; }

    int64_t expected(int i, int input, int axis) const override {
        int64_t const Hq = at(i).num_heads, Hkv = at(i).num_kv_heads, Dh = at(i).head_dim;
        int64_t const rotated = at(i).rotary_dim ? at(i).rotary_dim : Dh;
        int64_t const shapes[7][5] = {
            {any(kT), (Hq + 2 * Hkv) * Dh}, {any(kP), rotated}, {any(kPAGES), 2, Hkv, at(i).page, Dh},
            {any(kN), any(kM)}, {any(kN1)}, {any(kN)}, {any(kN)},
        };
        return shapes[input][axis];
    }

    void describe(int i, char* text, size_t size) const override {
        std::snprintf(text, size, "num_heads %d, num_kv_heads %d, head_dim %d, window %d", at(i).num_heads,
            at(i).num_kv_heads, at(i).head_dim, at(i).window);
    }
};

Plugin* make_jet_block(NodeSpec const& spec, double const* values) { return new (std::nothrow) JetBlock(spec, values); }
Plugin* make_attention(NodeSpec const& spec, double const* values) {
    return new (std::nothrow) Attention(spec, values);
}

}  // namespace jet
