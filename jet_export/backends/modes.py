"""The packages of an AOTInductor bundle, by the names of their files."""

MODES = ("prefill", "decode")
ONE_ROW = "decode_one"
FEW_ROWS = "decode_few"
VERIFY = "verify"
MTP_PREFILL, MTP_DECODE = "mtp_prefill", "mtp_decode"  # of a multi-token-prediction layer
MAX_FEW_ROWS = 64  # sequences: with more the library's products are faster (results/h200/skinny_gemm.json)
