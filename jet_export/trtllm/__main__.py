"""Print the directory that `trtllm-serve --custom_module_dirs` takes."""

from pathlib import Path

print(Path(__file__).parent / "module" / "jet_nemotron_trtllm")
