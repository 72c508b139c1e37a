"""The tensors of the Triton model. Names are those of TensorRT-LLM's and vLLM's Triton backends, so that requests which
their clients send to the generate endpoint work."""

from __future__ import annotations

from dataclasses import dataclass

# The directory where `jet-export serve` and the model's instances tell each other of the end, by files: the one makes
# "draining" and, where requests have to end, "stop"; each of the others "<instance>.busy" or "<instance>.idle", which
# holds its process id.
CONTROL = "JET_EXPORT_CONTROL"


@dataclass(frozen=True)
class TensorSpec:
    name: str
    kind: str  # Triton's type, less TYPE_
    dim: int  # -1: any number of elements
    text: str


INPUTS = (
    TensorSpec("text_input", "STRING", 1, "the prompt; this or `input_ids`"),
    TensorSpec("input_ids", "INT32", -1, "the prompt as token ids"),
    TensorSpec("stream", "BOOL", 1, "a response every few tokens; default false: one response"),
    TensorSpec("max_tokens", "INT32", 1, "tokens to make at most; default 16"),
    TensorSpec("temperature", "FP32", 1, "0 is greedy; default 0, or 1 where `top_k` or `top_p` is given"),
    TensorSpec("top_k", "INT32", 1, "0, the default, keeps every token"),
    TensorSpec("top_p", "FP32", 1, "1, the default, keeps every token"),
    TensorSpec("repetition_penalty", "FP32", 1, "1, the default: none"),
    TensorSpec("seed", "UINT64", 1, "of the sampling; default: another one each time"),
    TensorSpec("stop_words", "STRING", -1, "text ends before the first of them"),
    TensorSpec("stop_token_ids", "INT32", -1, "tokens that end the text, beside the model's own"),
    TensorSpec("end_id", "INT32", 1, "one more of those"),
    TensorSpec("ignore_eos", "BOOL", 1, "go on past the end-of-sequence token"),
    TensorSpec("logprobs", "INT32", 1, "log probability of each token, and of this many most likely ones"),
    TensorSpec("return_log_probs", "BOOL", 1, "log probability of each token"),
    TensorSpec("return_cumulative_logprob", "BOOL", 1, "their sum"),
    TensorSpec("return_logprobs", "BOOL", 1, "as `logprobs` 0, where that is not given"),
    TensorSpec("exclude_input_in_output", "BOOL", 1, "`text_output` without the prompt; default: as `stream`"),
    TensorSpec("return_finish_reason", "BOOL", 1, "false leaves the output out"),
    TensorSpec("return_num_input_tokens", "BOOL", 1, "false leaves the output out"),
    TensorSpec("return_num_output_tokens", "BOOL", 1, "false leaves the output out"),
    TensorSpec("sampling_parameters", "STRING", 1, "JSON object with any of the above; numbers may be strings"),
)
OUTPUTS = (
    TensorSpec("text_output", "STRING", 1, "text: the new part of it in a stream, else all"),
    TensorSpec("output_ids", "INT32", -1, "the tokens made, likewise"),
    TensorSpec("finish_reason", "STRING", 1, "`stop` or `length`; with the last response"),
    TensorSpec("num_input_tokens", "UINT32", 1, "tokens of the prompt; with the last response"),
    TensorSpec("num_output_tokens", "UINT32", 1, "tokens made, all of them; with the last response"),
    TensorSpec("output_log_probs", "FP32", -1, "natural logarithms, one for each of `output_ids`"),
    TensorSpec("cum_log_probs", "FP32", 1, "their sum from the first token on"),
    TensorSpec("cumulative_logprob", "FP32", 1, "the same, by vLLM's name"),
    TensorSpec("logprobs", "STRING", 1, "JSON list, for each token: its id and the most likely ones' with `logprob`, "
               "`rank` and `decoded_token`"),
)  # fmt: skip
