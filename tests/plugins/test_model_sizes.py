"""jet-2b and jet-4b compile for the supported SMs, within their shared memory; SM 9.0: tests/kernels, *_fit_sm_90."""

import json

import pytest

from jet_export.model.hub import PRESETS
from jet_export.plugins.cases import model_cases
from jet_export.plugins.library import build_library
from jet_export.plugins.targets import SHARED


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, cache_dtype, sms", [("jet-2b", "bfloat16", [80, 86]), ("jet-4b", "float8_e4m3fn", [89, 120])]
)
def test_kernels_fit(headers, model, cache_dtype, sms):
    folder = build_library(model_cases(PRESETS[model](), cache_dtype=cache_dtype), sms, headers)
    kernels = json.loads((folder / "kernels.json").read_text())
    images = [(kernel, image) for kernel in kernels for image in kernel["images"]]
    assert {image["sm"] for _, image in images} == set(sms)
    assert all(image["shared"] <= SHARED[image["sm"]] for _, image in images)
