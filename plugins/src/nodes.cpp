// The two nodes: their tensors, their attributes, the shapes a case serves. Node contract: domain jet, version 2.
#include "plugin.h"

#include <cstdio>

namespace jet {

NodeSpec const jet_block_spec = {
    "JetBlock",
    {{"qkuz", 2, Kind::kMODEL}, {"ba", 2, Kind::kMODEL}, {"kappa", 2, Kind::kMODEL}, {"A_log", 1, Kind::kFLOAT},
        {"dt_bias", 1, Kind::kFLOAT}, {"w_o", 1, Kind::kMODEL}, {"conv_state", 3, Kind::kMODEL},
        {"recurrent_state", 4, Kind::kSTATE}, {"cu_seqlens", 1, Kind::kINT}, {"slots", 1, Kind::kINT},
        {"context_lens", 1, Kind::kINT}, {"o", 2, Kind::kMODEL}, {"conv_state_out", 3, Kind::kMODEL},
        {"recurrent_state_out", 4, Kind::kSTATE}},
    11, 3, {6, 7},
    {{"num_heads", false, 1}, {"head_k_dim", false, 1}, {"head_v_dim", false, 1}, {"norm_eps", true, 0},
        {"form", false, kDECODE}}, 5,
};

class JetBlock final : public Plugin {
  public:
    explicit JetBlock(double const* values) : Plugin(jet_block_spec, values) {}
    IPluginV3* clone() noexcept override { return new (std::nothrow) JetBlock(*this); }

  private:
    JetBlockCase const& at(int i) const { return jet_block_cases[i]; }
    int num_cases() const override { return num_jet_block_cases; }
    bool has_attributes(int i) const override {
        return at(i).num_heads == value(0) && at(i).head_k_dim == value(1) && at(i).head_v_dim == value(2);
    }
    CaseView view(int i) const override { return {at(i).dtype, at(i).state_dtype, at(i).mixed, at(i).decode}; }
    int64_t output_columns() const override { return int64_t(value(0)) * value(2); }
    void attributes(Plan& plan) const override { plan.eps = real(3); }
    int form() const override { return value(4); }

    int64_t least_columns(int i) const override {
        return 2 * int64_t(at(i).num_heads) * (at(i).head_k_dim + at(i).head_v_dim);
    }

    int64_t expected(int i, int input, int axis) const override {
        int64_t const H = at(i).num_heads, K = at(i).head_k_dim, V = at(i).head_v_dim, W = at(i).conv_size;
        int64_t const shapes[11][4] = {
            {any(kT), any(kCOLUMNS)}, {any(kT), 2 * H}, {any(kT), H * V * W}, {H}, {H}, {V}, {any(kS), W - 1, H * V},
            {any(kS), H, K, V}, {any(kN1)}, {any(kN)}, {any(kN)},
        };
        return shapes[input][axis];
    }

    void describe(int i, char* text, size_t size) const override {
        std::snprintf(text, size, "num_heads %d, head_k_dim %d, head_v_dim %d", at(i).num_heads, at(i).head_k_dim,
            at(i).head_v_dim);
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
    explicit Attention(double const* values) : Plugin(attention_spec, values) {}
    IPluginV3* clone() noexcept override { return new (std::nothrow) Attention(*this); }

  private:
    AttentionCase const& at(int i) const { return attention_cases[i]; }
    int num_cases() const override { return num_attention_cases; }
    bool has_attributes(int i) const override {
        return at(i).num_heads == value(0) && at(i).num_kv_heads == value(1) && at(i).head_dim == value(2)
            && at(i).window == value(3);
    }
    CaseView view(int i) const override { return {at(i).dtype, at(i).state_dtype, at(i).mixed, at(i).decode}; }
    int64_t output_columns() const override { return int64_t(value(0)) * value(2); }
    void attributes(Plan& plan) const override { plan.k_scale = real(4), plan.v_scale = real(5); }
    int form() const override { return value(6); }
    int64_t least_columns(int) const override { return 0; }

    int64_t expected(int i, int input, int axis) const override {
        int64_t const Hq = at(i).num_heads, Hkv = at(i).num_kv_heads, Dh = at(i).head_dim;
        int64_t const shapes[7][5] = {
            {any(kT), (Hq + 2 * Hkv) * Dh}, {any(kP), Dh}, {any(kPAGES), 2, Hkv, at(i).page, Dh},
            {any(kN), any(kM)}, {any(kN1)}, {any(kN)}, {any(kN)},
        };
        return shapes[input][axis];
    }

    void describe(int i, char* text, size_t size) const override {
        std::snprintf(text, size, "num_heads %d, num_kv_heads %d, head_dim %d, window %d", at(i).num_heads,
            at(i).num_kv_heads, at(i).head_dim, at(i).window);
    }
};

Plugin* make_jet_block(double const* values) { return new (std::nothrow) JetBlock(values); }
Plugin* make_attention(double const* values) { return new (std::nothrow) Attention(values); }

}  // namespace jet
