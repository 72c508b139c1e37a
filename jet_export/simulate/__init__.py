"""`jet-export simulate`: the real scheduler over measured step times, in simulated time; how many GPUs a load takes."""
