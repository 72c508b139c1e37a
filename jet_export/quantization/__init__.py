"""FP8 with nvidia-modelopt: calibration, and which layers are quantised."""
