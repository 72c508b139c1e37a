"""FP8 by nvidia-modelopt: calibration, and which layers are quantised."""
