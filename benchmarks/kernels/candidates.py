"""What tune.py and gemv.py choose from: configurations of each op, and the sizes of jet-2b's linear layers."""

import itertools

CANDIDATES: dict[str, list[dict[str, int]]] = {
    "attention_decode": [
        dict(BN=bn, num_warps=w, num_stages=s, programs_per_sm=p)
        for bn, w, s, p in itertools.product((64, 128), (4, 8), (2, 3, 4), (4, 8))
    ],
    "attention_prefill": [
        dict(BM=bm, BN=bn, num_warps=w, num_stages=s)
        for bm, bn, w, s in itertools.product((64, 128), (64, 128), (4, 8), (2, 3))
    ],
    "rope_append": [dict(BT=bt, num_warps=w) for bt, w in itertools.product((8, 16, 32, 64), (2, 4, 8))],
    "delta_rule_prepare": [dict(BT=64, num_warps=w, num_stages=1) for w in (2, 4, 8)],
    "delta_rule_scan": [
        dict(BV=bv, STAGES=s, num_warps=max(4, bv // 16), one_wave=132)
        for bv, s in itertools.product((32, 64, 128), (1, 2, 3, 4))
    ],
    "delta_rule_decode": [
        dict(BV=bv, num_warps=w)
        for bv, w in itertools.product((16, 32, 64, 128, 256), (2, 4, 8, 16))
        if 8 <= bv * 4 // w <= 64
    ],
    "delta_rule_deferred": [
        dict(GROUPS=g, BR=br, num_warps=2) for g, br in itertools.product((1, 4, 8), (4, 8, 16, 32)) if g * br <= 96
    ],
    "delta_rule_inputs": [dict(BV=bv, num_warps=w) for bv, w in itertools.product((32, 64, 128, 256), (1, 2, 4))],
    "delta_rule_verify": [dict(BV=bv, num_warps=w) for bv, w in itertools.product((16, 32, 64, 128), (1, 2, 4, 8))],
    "dynamic_conv": [
        dict(BT=bt, BD=bd, num_warps=4) for bt, bd in itertools.product((4, 8, 16, 32), (32, 64, 128, 256))
    ],
    "gated_rms_norm": [dict(BR=br) for br in (1, 2, 4, 8, 16, 32)],
    "gemv": [
        dict(BN=bn, BK=bk, STAGES=s, num_warps=w)
        for bn, bk, w, s in itertools.product((2, 4, 8, 16), (512, 1024, 2048), (4, 8), (1, 3))
        if 16 <= bn * bk // (32 * w) <= 64
    ],
    "skinny_gemm": [
        dict(BN=bn, BK=bk, STAGES=st, SPLITS=sp, num_warps=bn // 16)
        for bn, bk, st, sp in itertools.product((64, 128), (64, 128, 256), (3, 5), (1, 2, 4, 6, 7, 12))
        if st * bk <= 768
    ],
}

STATIC_CONV = [  # dynamic_conv's where one kernel serves all tokens: 8 or 4 channels a thread
    dict(BT=bt, BD=bd, num_warps=w)
    for bt, (bd, w) in itertools.product(
        (16, 32, 64, 128), ((256, 1), (256, 2), (512, 2), (512, 4), (1024, 4), (1024, 8))
    )
]

GEMV_SIZES = {  # out_features, in_features
    "in_proj": (8832, 1536),
    "w2": (12288, 384),
    "o_proj": (1536, 3072),
    "gate_up_proj": (17920, 1536),
    "down_proj": (1536, 8960),
    "lm_head": (151936, 1536),
}
