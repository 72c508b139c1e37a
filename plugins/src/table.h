// What kernels.inc, generated for a model, defines: the cases that this library was built for.
#pragma once

#include "NvInferRuntime.h"
#include "plan.h"

namespace jet {

using nvinfer1::DataType;
using Form = void (*)(Plan&);  // launches, or counts workspace

struct JetBlockCase {
    int num_heads, head_k_dim, head_v_dim, conv_size;
    DataType dtype, state_dtype;
    int key_heads;  // of a Gated DeltaNet; 0: a JetBlock
    int interval, rollback;
    Form mixed, decode, verify;  // null: the case has no such form
};

struct AttentionCase {
    int num_heads, num_kv_heads, head_dim, page, window;
    DataType dtype, state_dtype;
    int rotary_dim, rollback;
    Form mixed, decode, verify;
};

extern JetBlockCase const jet_block_cases[];
extern int const num_jet_block_cases;
extern AttentionCase const attention_cases[];
extern int const num_attention_cases;
extern char const table_digest[];  // 16 hexadecimal digits: kernels, configurations, launches

}  // namespace jet
