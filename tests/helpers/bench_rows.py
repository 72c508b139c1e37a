"""A measured row with given figures, for tests of what is made of rows."""

from jet_export.bench.rows import Row


def row(batch: int, decode: float, **changes) -> Row:
    """batch sequences, `decode` tokens/s; prefill twice that; the roofline reached by 80 %."""
    values = dict(
        bundle="b", model="jet-2b", precision="bf16", context=4096, batch=batch, chunk=256, new_tokens=128,
        filled_by="prefill", throughput_only=False, prefill_tokens_per_s=2 * decode, prefill_of_roofline=0.8,
        decode_tokens_per_s=decode, ms_per_token=1e3 * batch / decode, ms_per_token_p90=2e3 * batch / decode,
        decode_of_roofline=0.8, ttft_p50=10.0, ttft_p99=20.0, ttft_samples=10, step_bytes={"weights": 5, "total": 9},
        state_bytes=7, memory_predicted=11, memory_peak=None,
    )  # fmt: skip
    return Row(**{**values, **changes})
