"""DeepSpeed ZeRO as a training engine; only this room imports deepspeed."""
