"""The tensors of the Triton model. Their names are those of TensorRT-LLM's and vLLM's Triton backends, so that requests
their clients send to the generate endpoint work."""

from __future__ import annotations

from dataclasses import dataclass

# Environment variable: the directory through which `jet-export serve` and the model's instances coordinate a shutdown.
# `serve` creates "draining" and, once requests have to end, "stop"; an instance keeps "<instance>.busy" or
# "<instance>.idle", which holds its process id.
CONTROL = "JET_EXPORT_CONTROL"


@dataclass(frozen=True)
class TensorSpec:
    name: str
    kind: str  # Triton's type, less TYPE_
    dim: int  # -1: any number of elements
    help: str


INPUTS = (
    TensorSpec("text_input", "STRING", 1, "the prompt; this or `input_ids`"),
    TensorSpec("input_ids", "INT32", -1, "the prompt as token ids"),
    TensorSpec("stream", "BOOL", 1, "a response every few tokens; default false: one response"),
    TensorSpec("max_tokens", "INT32", 1, "at most this many new tokens; default 16"),
    TensorSpec("temperature", "FP32", 1, "0 is greedy; default 0, or 1 where `top_k` or `top_p` is given"),
    TensorSpec("top_k", "INT32", 1, "0, the default, keeps every token"),
    TensorSpec("top_p", "FP32", 1, "1, the default, keeps every token"),
    TensorSpec("min_p", "FP32", 1, "0, the default, keeps every token"),
    TensorSpec("repetition_penalty", "FP32", 1, "1, the default: none"),
    TensorSpec("presence_penalty", "FP32", 1, "0, the default: none"),
    TensorSpec("frequency_penalty", "FP32", 1, "0, the default: none"),
    TensorSpec("min_tokens", "INT32", 1, "no end before so many tokens, `min_length` too"),
    TensorSpec("priority", "INT32", 1, "the lower is started first, and preempted last; default 0"),
    TensorSpec("seed", "UINT64", 1, "of the sampling; default: random"),
    TensorSpec("stop_words", "STRING", -1, "the text ends before the first of them"),
    TensorSpec("stop_token_ids", "INT32", -1, "tokens that end the text, in addition to the model's"),
    TensorSpec("end_id", "INT32", 1, "one more stop token"),
    TensorSpec("ignore_eos", "BOOL", 1, "continue past the end-of-sequence token"),
    TensorSpec("guided_decoding_guide_type", "STRING", 1, "`json`, `json_schema`, `regex` or `ebnf_grammar`"),
    TensorSpec("guided_decoding_guide", "STRING", 1, "the schema, expression or grammar that the text matches"),
    TensorSpec("logprobs", "INT32", 1, "log probability of each token, and of this many most likely tokens"),
    TensorSpec("return_log_probs", "BOOL", 1, "log probability of each token"),
    TensorSpec("return_cumulative_logprob", "BOOL", 1, "their sum"),
    TensorSpec("return_logprobs", "BOOL", 1, "as `logprobs` 0, unless that is given"),
    TensorSpec("exclude_input_in_output", "BOOL", 1, "`text_output` without the prompt; default: as `stream`"),
    TensorSpec("return_finish_reason", "BOOL", 1, "false leaves the output out"),
    TensorSpec("return_num_input_tokens", "BOOL", 1, "false leaves the output out"),
    TensorSpec("return_num_output_tokens", "BOOL", 1, "false leaves the output out"),
    TensorSpec(
        "sampling_parameters",
        "STRING",
        1,
        "JSON object with any of the above, and `logit_bias`; numbers may be strings",
    ),
)
OUTPUTS = (
    TensorSpec("text_output", "STRING", 1, "the text; in a stream, its new part"),
    TensorSpec("output_ids", "INT32", -1, "the generated tokens, likewise"),
    TensorSpec("finish_reason", "STRING", 1, "`stop` or `length`; with the last response"),
    TensorSpec("num_input_tokens", "UINT32", 1, "tokens of the prompt; with the last response"),
    TensorSpec("num_output_tokens", "UINT32", 1, "all generated tokens; with the last response"),
    TensorSpec("output_log_probs", "FP32", -1, "natural logarithms, one per token of `output_ids`"),
    TensorSpec("cum_log_probs", "FP32", 1, "their sum since the first token"),
    TensorSpec("cumulative_logprob", "FP32", 1, "the same, by vLLM's name"),
    TensorSpec(
        "logprobs",
        "STRING",
        1,
        "JSON list, for each token: its id and those of the most likely tokens, with `logprob`, `rank` and "
        "`decoded_token`",
    ),
)
